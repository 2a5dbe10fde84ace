"""Analysis of planted tables: known heads in, known rows out; intervals over members against closed forms."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from cluster.analysis import (
    analyze_member,
    dense,
    number,
    tabulate,
    width_table,
)
from cluster.curves import Curves
from cluster.intervals import log_mean_interval, mean_interval
from cluster.sweep import ProbeConfig
from probes.probe import Measurement

STEPS = ProbeConfig().steps(3000)
U, R, L, H = 0.1, 8, 1, 4
RELATIONS = ("collision", "near")


def rise(step, middle, top):
    """A jump-free rise in log step from u to top, half way at `middle`."""
    return U + (top - U) / (1 + (middle / max(step, 0.5)) ** 3)


def planted_curves(seed=0, members=1):
    """Head 0 detects, head 1 looks at the crowded (its rows can be exchanged), head 2 never rises, head 3 is late."""
    rng = np.random.default_rng(seed)
    curves = Curves(members=members)
    for t, step in enumerate(STEPS):
        mean = np.array([rise(step, 100, 0.5), rise(step, 200, 0.4), U, rise(step, 1000, 0.35)])
        score = mean[None, None, :, None, None] + 0.002 * rng.standard_normal((members, L, H, 2, R))
        null_rows = np.full_like(score, U)
        null_rows[:, :, 1] = score[:, :, 1] / 1.05
        values = {"score": score, "null_uniform": np.full_like(score, U), "null_rows": null_rows}
        curves.add("attention", step, 1000.0 + t, Measurement(relations=RELATIONS, values=values))
        curves.add_figures(
            step,
            1000.0 + t,
            {"train_loss": np.full(members, 1 / (t + 1)), "rare": np.full(members, 2.0 if t == 3 else np.nan)},
        )
    shares = np.array([0.6, 0.005, 0.0, 0.2])[None, None, :, None, None] + 0.001 * rng.standard_normal(
        (members, L, H, 1, R)
    )
    for at in (0, 3000):
        late = {
            "pattern": np.where(at, shares, np.nan),
            "ablation": shares,
            "only": shares,
            "whole_layer": shares,
            "redundancy": shares,
        }
        curves.add("ablation", at, 2000.0, Measurement(relations=("all",), values=late))
    return curves


def tables_of(curves, member=0):
    return pd.DataFrame(curves.head_table(member)), pd.DataFrame(curves.figure_table(member))


def test_dense_undoes_the_long_form_whatever_the_order_of_rows():
    curves = planted_curves()
    table = tables_of(curves)[0].sample(frac=1, random_state=0)
    found = dense(table, "attention")
    assert found.relations == RELATIONS
    assert tuple(found.steps) == STEPS
    expected = np.stack([values[0] for values in curves.probes["attention"].values["score"]])
    np.testing.assert_allclose(found.values["score"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="probe: 'gallery' is not in the table"):
        dense(table, "gallery")


def test_planted_heads_are_told_apart():
    rows = {(row["head"], row["relation"]): row for row in analyze_member(*tables_of(planted_curves()), "collision")[0]}
    assert len(rows) == H * len(RELATIONS)
    detector, crowded, never, late = (rows[head, "collision"] for head in range(H))
    # lift 2 is reached where 0.1 + 0.4 / (1 + (100/t)^3) = 0.2, that is (100/t)^3 = 3
    assert detector["level"] == pytest.approx(100 / 3 ** (1 / 3), rel=0.05)
    assert detector["level_low"] < 100 / 3 ** (1 / 3) < detector["level_high"]
    assert detector["t50"] == pytest.approx(100, rel=0.05)
    assert detector["status"] == "emerged"
    assert detector["detector"]
    assert detector["lift_peak"] == pytest.approx(5.0, rel=0.03)
    assert detector["lift_rows_peak"] == pytest.approx(5.0, rel=0.03)
    assert crowded["lift_peak"] > 2
    assert not crowded["detector"]
    assert (never["status"], never["detector"]) == ("never", False)
    assert np.isnan(never["level"])
    assert late["status"] == "growing"
    assert [row["matters"] for row in (detector, crowded, never, late)] == [True, False, False, True]
    assert detector["pattern_share"] == pytest.approx(0.6, abs=0.01)


def test_a_members_row_has_its_best_detector_and_its_last_figures():
    heads, row, line = analyze_member(*tables_of(planted_curves()), judged="collision")
    best = next(head for head in heads if head["head"] == 0 and head["relation"] == "collision")
    assert (row["best_head"], row["level"], row["detectors"]) == ("0.0", best["level"], 2)
    assert row["risen"] == 3
    assert row["heads_that_matter"] == 2  # of all heads, whatever the relation
    assert row["train_loss"] == pytest.approx(1 / len(STEPS))
    assert row["rare"] == 2.0
    assert row["last_step"] == 3000
    assert row["seconds"] == len(STEPS) - 1
    assert [point["step"] for point in line] == list(STEPS)
    assert line[-1]["lift"] == pytest.approx(best["lift_end"])


def test_a_relation_too_rare_to_score_gives_no_rows():
    curves = planted_curves()
    for values in curves.probes["attention"].values["score"]:
        values[..., 0, 1:] = np.nan  # one replicate left of "collision"
        values[..., 1, :2] = np.nan  # six left of "near"
    heads, row, line = analyze_member(*tables_of(curves), judged="collision")
    assert {head["relation"] for head in heads} == {"near"}
    assert (row["detectors"], row["best_head"], line) == (0, "", [])
    assert np.isnan(row["level"])


def test_intervals_over_members_are_students():
    values = [3.0, 5.0, 4.0, 8.0]
    mean, low, high = mean_interval([*values, np.nan])
    expected = student.interval(0.9, 3, loc=5.0, scale=np.std(values, ddof=1) / 2)
    assert (mean, low, high) == pytest.approx((5.0, *expected))
    assert mean_interval([2.0])[0] == 2.0
    assert np.isnan(mean_interval([2.0])[1])
    assert np.isnan(mean_interval([])[0])
    geometric, low, high = log_mean_interval([10.0, 1000.0])
    assert geometric == pytest.approx(100)
    assert low * high == pytest.approx(100**2)


def test_interval_of_a_mean_covers_as_it_says():
    rng = np.random.default_rng(1)
    draws = [log_mean_interval(np.exp(5 + 0.3 * rng.standard_normal(5))) for _ in range(2000)]
    covered = np.mean([low < np.exp(5) < high for _, low, high in draws])
    assert 0.88 < covered < 0.92


def planted_tables():
    heads, members = [], []
    levels = {16: [200.0, 300.0, None], 32: [100.0, 100.0, 400.0]}
    for width, times in levels.items():
        for seed, level in enumerate(times):
            keys = {"member_id": f"{width}-{seed}", "run_id": "r", "width": width, "seed": seed}
            members.append({**keys, "outcome": "finished", "cause": ""})
            for head in range(2):
                found = level is not None and head == 0
                heads.append({
                    **keys, "relation": "near", "layer": 0, "head": head, "status": "emerged" if found else "never",
                    "detector": found, "level": level if found else np.nan, "t50": 2 * level if found else np.nan,
                    "lift_peak": 3.0,
                })  # fmt: skip
    return heads, members


def test_width_rows_count_everything_and_average_over_members():
    analysis = tabulate(*planted_tables(), ["width"])
    narrow, wide = (row for _, row in analysis.widths.iterrows())
    assert (narrow["members"], narrow["heads"], narrow["never"], narrow["emerged"]) == (3, 6, 4, 2)
    assert (narrow["members_without_detector"], wide["members_without_detector"]) == (1, 0)
    assert narrow["level"] == pytest.approx((200 * 300) ** 0.5)
    assert wide["level"] == pytest.approx((100 * 100 * 400) ** (1 / 3))
    assert wide["t50"] == pytest.approx(2 * wide["level"])
    assert (narrow["share_risen"], wide["share_risen"]) == pytest.approx((1 / 3, 1 / 2))
    assert 0 <= narrow["share_low"] < narrow["share_risen"] < narrow["share_high"] <= 1
    assert narrow["detectors_per_member"] == pytest.approx(2 / 3)


def test_tables_do_not_depend_on_the_order_in_which_members_come():
    heads, members = planted_tables()
    first, second = tabulate(heads, members, ["width"]), tabulate(heads[::-1], members[::-1], ["width"])
    for name in ("heads", "members", "widths"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("name", ["train.learning_rate", "model.heads", "data.seed", "system.box.width"])
def test_any_axis_takes_the_place_of_width(name):
    heads, members = planted_tables()
    for row in [*heads, *members]:
        row[name] = 2 if row["seed"] else 4
    found = width_table(pd.DataFrame(heads), pd.DataFrame(members), ["width", name])
    counts = {(row["width"], row[name]): (row["members"], row["heads"]) for _, row in found.iterrows()}
    assert counts == {(16, 2): (2, 4), (16, 4): (1, 2), (32, 2): (2, 4), (32, 4): (1, 2)}
    assert found.loc[(found["width"] == 16) & (found[name] == 4), "level"].item() == pytest.approx(200)


def test_members_without_heads_on_a_relation_and_those_that_failed_are_counted():
    heads, members = planted_tables()
    for index, outcome in enumerate(("finished", "diverged", "failed")):
        keys = {"member_id": f"16-{10 + index}", "run_id": "r", "width": 16, "seed": 10 + index}
        members.append({**keys, "outcome": outcome, "cause": "why"})
    narrow = tabulate(heads, members, ["width"]).widths.iloc[0]
    assert (narrow["members"], narrow["diverged"], narrow["lost"]) == (4, 1, 1)
    assert narrow["members_without_detector"] == 2


def test_axis_values_of_mixed_kinds_become_texts(tmp_path):
    heads, members = planted_tables()
    for row in [*heads, *members]:
        row["train.clip"] = "None" if row["seed"] else 0.5
    analysis = tabulate(heads, members, ["width", "train.clip"])
    assert set(analysis.widths["train.clip"]) == {"None", "0.5"}
    analysis.members.to_parquet(tmp_path / "x.parquet")


def test_a_sweep_without_finished_members_has_its_members_still():
    failed = [{"member_id": "a", "run_id": "r", "width": 16, "seed": 0, "outcome": "failed", "cause": "why"}]
    analysis = tabulate([], failed, ["width"])
    assert len(analysis.members) == 1
    assert analysis.heads.empty
    assert analysis.widths.empty


def test_numbers_in_tags():
    assert [number(text) for text in ("16", "0.001", "strang")] == [16, 0.001, "strang"]
