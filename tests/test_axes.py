"""Any axis in the place of width: planted differences are shown, planted sameness is not, on any axis."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cluster.analysis import Analysis, number, tabulate
from cluster.axes_section import LEVEL, SHARE, AxesSection, families, find_contrasts, plan_contrasts
from cluster.compare import LATER
from cluster.findings import make_points, width_rows
from cluster.law_sections import several_widths
from cluster.sweep import DataConfig
from cluster.widths import along, draw_times, level_spots, t50_spots, values_along
from tests.test_report import Planted, heads, make_sweep, names, write_report

SPLITTING, ATTENTION, BATCH = "model.splitting", "model.attention", "train.batch_size"
FOUR = {SPLITTING: ("lie", "strang"), ATTENTION: ("global", "local")}
COMMON, OWN = 0.5, 0.03  # scatter of log levels: shared by the members of a seed, and of each


def planted(axes, factor, seeds=8, order="seed", widths=(8,), rises=lambda setting, seed: True):
    """Tables of members whose one detector, of four heads, has level 100 x factor(setting) x luck of the seed."""
    rng = np.random.default_rng(0)
    sweep = make_sweep(widths=widths, seeds=seeds, axes=axes, data=DataConfig(order=order))
    luck, heads_, members = np.exp(COMMON * rng.standard_normal(seeds)), [], []
    for index, member in enumerate(sweep.members()):
        seed, setting = member.config.seed, {name: number(str(value)) for name, value in member.point.items()}
        up = rises(setting, seed)
        level = 100 * factor(setting) * luck[seed] * np.exp(OWN * rng.standard_normal()) if up else np.nan
        keys = {"member_id": f"m{index}", "run_id": f"r{index}", **setting, "seed": seed}
        members.append({**keys, "outcome": "finished", "cause": "", "level": level, "last_step": 1000})
        for head in range(4):
            mine = up and head == 0
            heads_.append(
                {**keys, "relation": "collision", "layer": head // 2, "head": head % 2, "detector": mine,
                 "status": "emerged" if mine else "never", "level": level if mine else np.nan,
                 "t50": level if mine else np.nan, "lift_peak": 3.0 if mine else 1.0}
            )  # fmt: skip
    return sweep, tabulate(heads_, members, sweep.axis_names)


def local_is_late(setting):
    return 2.0 if setting[ATTENTION] == "local" else 1.0


def test_a_planted_difference_is_shown_and_sameness_is_not():
    sweep, analysis = planted(FOUR, local_is_late)
    found = {tuple(each.other.values()): each for each in find_contrasts(sweep, analysis)}
    assert list(found) == [("lie", "local"), ("strang", "global"), ("strang", "local")]
    for setting, each in found.items():
        row = each.row(LEVEL.words)
        assert each.base == {SPLITTING: "lie", ATTENTION: "global"} and each.paired
        truth = 2.0 if "local" in setting else 1.0
        assert row.gap[0] == pytest.approx(truth, rel=0.06) and row.shown is (truth == 2.0)
        assert each.row(LATER).shown is (truth == 2.0)
        assert "a difference is shown" in each.line or truth == 1.0
    assert "no difference is shown" in found["strang", "global"].line


def test_ratio_and_interval_are_those_of_differences_by_seed():
    sweep, analysis = planted({ATTENTION: ("global", "local")}, local_is_late)
    (found,) = find_contrasts(sweep, analysis)
    table = analysis.members.pivot(index="seed", columns=ATTENTION, values="level")
    gaps = np.log(table["local"] / table["global"])
    reach = 1.894579 * gaps.std() / np.sqrt(8)  # Student t, 7 degrees of freedom, 95%
    row = found.row(LEVEL.words)
    assert np.log(row.gap) == pytest.approx([gaps.mean(), gaps.mean() - reach, gaps.mean() + reach], rel=1e-5)
    assert row.p == pytest.approx(2 / 2**8)


def test_unpaired_members_are_not_paired():
    """The common luck of a seed is 17 times the scatter: only pairing takes it out."""
    reach = {}
    for order in ("seed", "member"):
        sweep, analysis = planted({BATCH: (16, 64)}, lambda setting: 1.0 + (setting[BATCH] == 64) * 0.1, order=order)
        (found,) = find_contrasts(sweep, analysis)
        row = found.row(LEVEL.words)
        assert found.paired is (order == "seed") and row.shown is (order == "seed")
        reach[order] = np.log(row.gap[2] / row.gap[1])
    assert reach["member"] > 5 * reach["seed"]


def test_shares_are_compared_and_members_without_a_detector_count_as_later():
    sweep, analysis = planted(
        {SPLITTING: ("lie", "strang")}, lambda _: 1.0, rises=lambda setting, seed: setting[SPLITTING] == "lie"
    )
    (found,) = find_contrasts(sweep, analysis)
    assert found.row(SHARE.words).gap[0] == pytest.approx(-0.25)
    assert found.row(LATER).shown and found.row(LEVEL.words).reason
    assert "levels are not compared" in found.line
    lie, strang = analysis.widths.set_index(SPLITTING).loc[["lie", "strang"], "level_median"]
    assert lie == pytest.approx(analysis.members["level"].median()) and strang == np.inf


def test_median_counts_members_without_a_detector_as_later():
    sweep, analysis = planted({BATCH: (16,)}, lambda _: 1.0, seeds=5, rises=lambda _, seed: seed != 0)
    levels = np.sort(analysis.members["level"].dropna())
    assert analysis.widths["level_median"].item() == levels[2]
    table = width_rows(sweep, analysis)
    assert f"{levels[2]:.3g}" in table.rows[0][table.columns.index("median level")].replace(",", "")


def test_the_first_value_is_the_recipes_not_the_alphabets():
    sweep, analysis = planted({SPLITTING: ("strang", "lie"), "train.clip": (None, 0.5)}, lambda _: 1.0)
    assert [base for base, _, _ in plan_contrasts(sweep, analysis)] == [{SPLITTING: "strang", "train.clip": "None"}] * 3
    assert values_along(sweep, "train.clip", ["0.5", "None", "7"]) == ["None", "0.5", "7"]
    axis = along(sweep, make_points(sweep, analysis))
    assert axis.places == {"strang": 0.0, "lie": 1.0} and axis.others == ["train.clip"] and not axis.numeric


def test_widths_keep_their_place_and_settings_are_compared_at_each():
    sweep, analysis = planted({ATTENTION: ("global", "local")}, local_is_late, widths=(16, 8), seeds=6)
    assert along(sweep, make_points(sweep, analysis)).places == {8: 3.0, 16: 4.0}
    found = find_contrasts(sweep, analysis)
    assert [each.where["width"] for each in found] == [8, 16]
    assert found[0].name == "model.attention local against global at width 8"


def test_more_than_two_axes_are_compared_one_by_one():
    assert families("ab") == [("a", "b")] and families("abc") == [("a",), ("b",), ("c",)]
    axes = {**FOUR, BATCH: (16, 64)}
    sweep, analysis = planted(axes, local_is_late, seeds=2)
    plan = plan_contrasts(sweep, analysis)
    assert len(plan) == 3 * 4 and all(len(base) == 1 and len(where) == 2 for base, _, where in plan)
    few = find_contrasts(sweep, analysis, most=5)
    assert len(few) == 5


def test_system_axis_at_the_same_value_leaves_seeds_paired():
    axes = {**FOUR, "system.horizon": (0.1, 0.2)}
    sweep, analysis = planted(axes, local_is_late, seeds=2)
    paired = {tuple(each.other): each.paired for each in find_contrasts(sweep, analysis)}
    assert paired == {(SPLITTING,): True, (ATTENTION,): True, ("system.horizon",): False}


def test_too_few_members_are_said_to_be_so(tmp_path):
    sweep, analysis = planted({ATTENTION: ("global", "local")}, local_is_late, seeds=3)
    section = AxesSection(folder=tmp_path, sweep=sweep, analysis=analysis)
    assert "too few members to show a difference in any contrast" in section.lines()[1]
    assert "so few members can give no lower p (p = 0.25" in section.lines()[2]


@pytest.mark.parametrize("axes", [{}, {BATCH: (16,)}])
def test_nothing_is_compared_without_a_further_axis(tmp_path, axes):
    sweep, analysis = planted(axes, lambda _: 1.0, widths=(8, 16), seeds=2)
    section = AxesSection(folder=tmp_path, sweep=sweep, analysis=analysis)
    assert section.sections() == [] and section.tables() == []
    empty = Analysis(heads=analysis.heads.iloc[:0], members=analysis.members.iloc[:0], widths=analysis.widths.iloc[:0])
    assert find_contrasts(sweep, empty) == []


def test_spots_stand_in_the_sweeps_order_with_those_that_never_got_there():
    sweep, analysis = planted(FOUR, local_is_late, rises=lambda setting, seed: setting[SPLITTING] == "lie" or seed > 2)
    points = make_points(sweep, analysis)
    axis = along(sweep, points)
    spots = {(spot.x, spot.series): spot for spot in level_spots(points, axis)}
    assert {key: (spot.none, len(spot.times)) for key, spot in spots.items()} == {
        (x, f"{ATTENTION} {attention}"): (none, 8 - none)
        for x, none in ((0.0, 0), (1.0, 3))
        for attention in ("global", "local")
    }
    figure = draw_times(list(spots.values()), t50_spots(points, axis), axis, 1000.0)
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["lie", "strang"]
    assert {"3"} <= {text.get_text() for text in figure.axes[2].texts}


def test_page_compares_by_any_axis(tmp_path):
    sweep = make_sweep(widths=(8,), axes={BATCH: (64, 16)}, seeds=2, data=DataConfig(order="seed"))
    plan = {((8, batch), seed): heads(("emerged", 60 + batch)) for batch in (64, 16) for seed in (0, 1)}
    made = Planted(sweep, plan, relations=("collision",), distance=False)
    page = write_report(
        tmp_path / "report", sweep, made.analysis, lambda run: replace(made.load(run), weights={}), {}
    ).read_text()
    assert {"axes.png", "contrasts.png"} <= set(names(page)) and "widths.png" not in names(page)
    assert f"Level and t50 against {BATCH}" in page and f"Differences by {BATCH}" in page
    assert re.search(rf"{BATCH} 16 against 64: the level is 0\.6\d", page)
    assert not several_widths(made.analysis.laws) and "Laws of width" not in page and "against width" not in page


def test_where_no_head_rises_nothing_is_tested_and_the_page_says_so(tmp_path):
    sweep, analysis = planted({BATCH: (16, 64)}, lambda _: 1.0, seeds=4, rises=lambda _, seed: False)
    section = AxesSection(folder=tmp_path, sweep=sweep, analysis=analysis)
    lines = section.sections()[0].lines
    assert lines[0] == "No difference can be tested."
    assert "levels are not compared" in lines[1] and "shown" not in lines[1] and len(lines) == 2
