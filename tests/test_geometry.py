"""Degenerate geometry in the service: which weights are kept, what is measured of a member, and what is said of it."""

import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cluster import curves, geometry, report, tracking
from cluster.analysis import Analysis
from cluster.cli import main
from cluster.curves import Curves
from cluster.geometry import (
    METHODS,
    VERSION,
    Geometry,
    Kept,
    Request,
    Subject,
    cumulative_rate,
    from_lines,
    from_profiles,
    head_facts,
    with_tables,
)
from cluster.geometry_sections import (
    GEOMETRY_PANELS,
    agreement_lines,
    by_phase,
    commonest,
    convergence_line,
    degree_table,
    not_falling,
    phase_lines,
    phase_means,
)
from cluster.intervals import mean_interval
from cluster.measuring import curve, find_subjects
from cluster.pack import make_pool, member_files
from cluster.recipes import RECIPES
from cluster.report import write_report
from cluster.sweep import DataConfig, ProbeConfig, Sweep, member_id, validate
from probes.degree import LINE, PROFILE, SCORE, degree_from_score
from probes.llc import LLCSettings, estimate_llcs
from probes.relaxation import fit_relaxation
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from tests.planted_relaxation import probe_times
from tests.test_end_to_end import SMALL, Ledger, main_in, start, wait_for
from tests.test_report import LAST, Planted, heads, make_sweep, panels
from train.config import ModelConfig, TrainConfig
from train.model import initial, tensor_specs
from train.snapshot import Snapshot
from train.state import flatten

SWEEP = Sweep(
    name="g",
    widths=(8,),
    system=ParticleSystem(box=ParticleBox(n=6, radius=0.1)),
    data=DataConfig(rows=32, validation_rows=8),
    model=ModelConfig(layers=2, heads=2),
    train=TrainConfig(steps=60, batch_size=4, precision="float64"),
    probe=ProbeConfig(replicates=2, examples=8, sparse_examples=4),
)
MEMBER = SWEEP.members()[0]
SHORT = LLCSettings(n_beta=5.0, gamma=50.0, step_size=1e-4, chains=2, draws=6, burn_in=2, sensitivity=False)


NAN = float("nan")


def with_probe(config, **changes):
    return replace(config, probe=replace(config.probe, **changes))


# Which weights are kept


def test_what_is_kept_changes_no_id():
    """A sweep trained while only one step a decade was kept goes on, whatever is kept now."""
    other = replace(SWEEP, probe=replace(SWEEP.probe, weights_per_decade=1, weights_last=2, weights_budget=9.0))
    assert other.id == SWEEP.id
    assert [member.id for member in other.members()] == [member.id for member in SWEEP.members()]
    assert member_id(with_probe(MEMBER.config, examples=9)) != MEMBER.id


def test_quick_keeps_weights_before_during_and_after_emergence():
    kept = sorted(RECIPES["quick"]().members()[0].config.weight_steps)
    assert kept[0] == 0
    assert kept[-1] == 4000
    assert all(later <= 2 * earlier for earlier, later in pairwise(kept[5:]))


def test_only_the_last_steps_are_kept():
    every = sorted(MEMBER.config.weight_steps)
    assert len(every) > 5
    assert sorted(with_probe(MEMBER.config, weights_last=3).weight_steps) == every[-3:]
    assert with_probe(MEMBER.config, weights_last=99).weight_steps == MEMBER.config.weight_steps


@pytest.mark.parametrize("budget", [0.05, 0.08, 0.1, 5.0])
def test_a_budget_thins_steps_out_keeps_the_ends_and_holds_for_the_file(budget):
    config = with_probe(MEMBER.config, weights_budget=budget)
    every, kept = sorted(MEMBER.config.weight_steps), sorted(config.weight_steps)
    assert {kept[0], kept[-1]} == {0, 60}
    assert set(kept) <= set(every)
    assert (kept == every) == (budget == 5.0)
    rows = flatten(make_weights(0), tensor_specs(config.model, config.system.d_in, config.system.d_out)).numpy()
    member = replace(MEMBER, config=config)
    size = len(member_files(member, 0, Curves(members=1, weights=dict.fromkeys(kept, rows)))["weights.npz"])
    assert size <= 1e6 * budget
    assert len(kept) == len(every) or size + config.weight_bytes > 1e6 * budget  # one more would not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_last": 0}, "weights_last: 0 is not allowed; it must be at least 1"),
        ({"weights_budget": 0.0}, "weights_budget: 0.0 is not allowed; it must be above 0"),
        ({"weights_per_decade": 0}, "weights_per_decade: 0 is not allowed"),
        ({"weights_budget": 0.01}, r"weights_budget: 0\.01 .* at least 0\.0\d, megabytes of the weights at 2 steps"),
    ],
)
def test_impossible_wishes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(replace(SWEEP, probe=replace(SWEEP.probe, **changes)))


def test_a_budget_for_one_step_is_enough_where_one_is_wanted():
    size = MEMBER.config.weight_bytes
    config = with_probe(MEMBER.config, weights_last=1, weights_budget=1.1e-6 * size)
    assert config.weight_steps == {60}


def test_packs_that_kept_weights_at_other_steps_go_on_together():
    parts = []
    for steps in ((0, 1, 5), (0, 5)):
        part = Curves(members=1, weights={step: np.full((1, 2), float(step)) for step in steps})
        part.add_figures(0, 1.0, {"train_loss": np.array([0.5])})
        parts.append(part.to_arrays())
    joined = Curves.from_arrays(curves.join(parts))
    assert sorted(joined.weights) == [0, 5]
    np.testing.assert_array_equal(joined.weights[5], [[5.0, 5.0], [5.0, 5.0]])


def test_the_dry_run_states_what_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = ["--seeds", "1", "--probe.weights-last", "2", *SMALL]
    assert main(["sweep", "tiny", "--dry-run", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    (each,) = {config.weight_bytes for config in [RECIPES["tiny"]().members()[0].config]}
    assert f"kept weights: {2 * each / 1000:.3g} kB to " in said
    assert "a member x 2 members," in said
    assert "in all, at 2 steps: 34, 60" in said


# What is measured of a member


def make_weights(seed):
    model, system = MEMBER.config.model, MEMBER.config.system
    return initial(model, system.d_in, system.d_out, Generator.stack([seed]), torch.float64)


def make_kept(steps=(0, 5, 60)):
    weights = {step: {name: value[0].numpy() for name, value in make_weights(step).items()} for step in steps}
    at = np.array([0, 1, 5, 20, 60])
    return Kept(
        weights=weights, figures=pd.DataFrame({"step": at, "wall_time": 1e9 + at, "validation_loss": 1 / (1.0 + at)})
    )


@pytest.fixture(scope="module")
def pool():
    return make_pool(MEMBER.config)


def measure(pool, kept=None, facts=(), member="m", **request):
    subject = Subject(member_id=member, run_id="r", name="n", config=MEMBER.config, heads=list(facts), best_head="1.0")
    return Geometry(
        subject,
        kept or make_kept(),
        Request(**{"llc": SHORT, "minibatch": 4, "checkpoints": "all", **request}),
        pool,
        "cpu",
    )


def test_an_estimate_does_not_depend_on_what_else_is_asked_for(pool, monkeypatch):
    every = measure(pool).coefficients()
    assert len(every) == 3 * 2 * 2
    assert set(every["n"]) == {16}
    alone = measure(pool, heads=("1.0",), checkpoints=(5,)).coefficients()
    monkeypatch.setattr(geometry, "MEMORY", 1)  # a step at a time
    parts = measure(pool).coefficients()
    assert len(alone) == 1
    same = every[(every["layer"] == 1) & (every["head"] == 0) & (every["step"] == 5)]
    for column in ("llc", "low", "high"):
        np.testing.assert_allclose(alone[column], same[column], rtol=1e-9)
        np.testing.assert_allclose(parts[column], every[column], rtol=1e-9)
    assert not np.allclose(measure(pool, member="other").coefficients()["llc"], every["llc"], rtol=1e-3)


def test_related_tokens_are_those_of_examples_that_have_some(pool):
    found = measure(pool, tokens=("all", "related"), checkpoints=(60,), heads=("0.1",)).coefficients()
    assert found["tokens"].tolist() == ["all", "related"]
    system, rows = MEMBER.config.system, pool.parts["probe"].take(slice(0, 16))
    batch = system.draw(rows, Generator.of("geometry", 0))
    some = system.relations(batch.geometry, batch.keys)["collision"].any(-1).any(-1)
    assert 0 < int(some.sum()) < 16
    assert found["n"].tolist() == [16, int(some.sum())]
    assert found["llc"].nunique() == 2


def test_gradients_are_those_of_the_whole_model(pool):
    work = measure(pool)
    found = work.gradients()
    assert len(found) == 3 * 2 * 2
    batch = work.examples["all"].batch
    named = {name: torch.from_numpy(value)[None] for name, value in work.kept.weights[5].items()}
    snapshot = Snapshot(step=5, system=MEMBER.config.system, model=MEMBER.config.model, parameters=named)
    whole, loss = snapshot.gradient(batch), snapshot.loss(snapshot.predict(batch), batch).mean()
    for row in found[found["step"] == 5].to_dict("records"):
        parts = [whole[f"{row['layer']}.{name}"][0, row["head"]] for name in ("Wq", "Wk", "Wv", "Wo")]
        assert row["gradient"] == pytest.approx(float(torch.cat([part.flatten() for part in parts]).norm()))
        assert row["loss"] == pytest.approx(float(loss))


def test_every_method_has_a_row_and_lines_begin_before_emergence(pool, monkeypatch):
    directions = []
    real = geometry.LineTarget

    def noted(target, direction):
        directions.append(direction)
        return real(target, direction)

    monkeypatch.setattr(geometry, "LineTarget", noted)
    facts = [
        {"layer": 1, "head": 1, "t10": 17.0, "onset": 3.0, "relaxation_refusal": "too short", "relaxation_law": ""}
    ]
    work = measure(pool, facts=facts, heads=("1.0", "1.1"))
    found = work.degrees(work.gradients())
    assert sorted(found.loc[found["head"] == 1, "method"]) == sorted(set(METHODS) - {"loss gap"})
    assert found.loc[found["layer"] == -1, "method"].tolist() == ["loss gap"]
    refusals = found.set_index(["head", "method"])["refusal"]
    assert refusals[1, "score"] == "too short"
    assert refusals[0, "score"] == "it did not rise and stay"
    assert refusals[0, "gradient"] == "3 points, under 8"
    assumptions = found.set_index(["head", "method"])["assumption"]
    assert assumptions[1, "score"] == "descriptive under adam: " + SCORE
    assert assumptions[1, "profile"] == PROFILE
    direction = directions[-1]
    weights = {step: torch.from_numpy(named["1.Wv"]) for step, named in work.kept.weights.items()}
    torch.testing.assert_close(direction["Wv"][0], weights[0][0] - weights[60][0])  # it never emerged: from step 0
    torch.testing.assert_close(direction["Wv"][1], weights[5][1] - weights[60][1])
    alone = measure(pool, kept=make_kept(steps=(60,)), heads=("1.0",))
    found = alone.degrees(alone.gradients()).set_index("method")["refusal"]
    assert found["profile"] == found["line coefficient"] == "the head's weights are the same at both ends of its line"


class Line:
    """A line along which the loss of every example is a planted power, with a slope and scatter of its own."""

    def __init__(self, degrees, lengths, scale=0.01, slope=0.0, scatter=0.0):
        self.slope, self.scatter, self.scale = slope, scatter, scale
        self.degrees, self.length = torch.tensor(degrees).double(), torch.tensor(lengths).double()

    def profile(self, t):
        own = (t / self.length[:, None])[:, None]
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 64, 1)))
        slope = self.slope + self.scatter * (noise - noise.mean())
        return 0.3 + self.scale * own.abs() ** self.degrees[:, None, None] + slope * own


def test_the_degree_along_a_line_of_any_length():
    for planted, found in zip((2.0, 4.0, 3.0), from_profiles(Line([2.0, 4.0, 3.0], [0.1, 1.0, 30.0])), strict=True):
        assert found.refusal == ""
        assert found.k == pytest.approx(planted, rel=1e-3)


def test_a_slope_that_the_examples_scatter_explains_does_not_refuse_a_profile():
    """The loss falls on one side of the end: by more than its error that is no least loss, by less it is noise."""
    (sure,) = from_profiles(Line([2.0], [1.0], slope=2e-4, scatter=4e-4))
    assert sure.refusal == "the loss is not least at x = 0"
    (unsure,) = from_profiles(Line([2.0], [1.0], slope=2e-4, scatter=2e-3))
    assert unsure.refusal == ""
    assert unsure.k == pytest.approx(2.0, abs=1e-3)


def test_the_coefficient_along_a_line_gives_a_degree_only_where_it_can():
    """Localised by the line's own length: a potential on a line of another length is the same."""
    settings = replace(SHORT, n_beta=1e4)
    for length in (0.1, 1.0, 30.0):
        two, four = from_lines(Line([2.0, 4.0], [length, length], scale=1.0), settings)
        for planted, found in ((2.0, two), (4.0, four)):
            assert (found.refusal, found.assumption) == ("", LINE)
            assert found.k == pytest.approx(planted, rel=0.01)
            assert found.low < planted < found.high
    halved = from_lines(Line([2.0], [1.0], scale=2.0), replace(settings, sigma=1.0))[0]
    assert halved.k == pytest.approx(two.k)
    (held,) = from_lines(Line([2.0], [1.0], scale=1e-4), settings)
    assert held.refusal.startswith("depends on the settings: -")


def test_a_row_of_the_head_table_stands_for_its_fit():
    time = probe_times()
    fit = fit_relaxation(time, 0.8 - 0.5 * (1 + time / 10.0) ** -0.5, (5.0, 1e4))
    names = {
        "relaxation": fit.exponent, "relaxation_low": fit.low, "relaxation_high": fit.high,
        "relaxation_law": fit.preferred, "relaxation_refusal": fit.refusal,
    }  # fmt: skip
    assert degree_from_score(geometry.relaxation_of(names)) == degree_from_score(fit)
    assert degree_from_score(fit).k == pytest.approx(4.0, rel=0.05)


def test_recent_steps_are_every_second_of_the_last_two_decades():
    kept = [0, 1, 2, 3, 5, 9, 15, 27, 48, 84, 148, 262, 462, 728, 1284, 2266, 4000]
    assert Request().steps_of(kept) == [48, 148, 462, 1284, 4000]
    assert Request(checkpoints="all").steps_of(kept) == kept


def test_looks_are_those_that_are_made():
    """Counted as the gradients that chains take; the gradient at each point is one more."""
    for sensitivity, burn_in, every in ((False, 2, 0), (True, 2, 3)):
        llc = replace(SHORT, sensitivity=sensitivity, burn_in=burn_in, check_every=every, chains=3)
        target = Counting(1)
        estimate_llcs(target, [0], llc)
        assert target.looks == llc.looks


class Counting:
    """A parabola that counts the chains of which a loss is asked for."""

    def __init__(self, points):
        self.centre, self.looks = {"w": torch.zeros(points, 2).double()}, 0

    def gradient(self):
        return self.centre

    def at(self, place):
        return self

    def draw(self, streams):
        return None

    def loss(self, weights, batch):
        self.looks += len(weights["w"])
        return weights["w"].square().sum(1)

    def base(self, batch):
        return torch.zeros(1).double()


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cumulative_rate_is_the_sum_of_rates(warmup):
    rates = [min(1.0, (step + 1) / warmup) if warmup else 1.0 for step in range(30)]
    expected = np.concatenate([[0.0], np.cumsum(rates)])
    np.testing.assert_allclose(cumulative_rate(np.arange(31.0), TrainConfig(warmup=warmup)), expected)


def test_the_curve_of_the_best_head_has_the_times_of_training():
    table = pd.DataFrame(
        {"step": [0, 0, 5, 5], "layer": 1, "head": [0, 1, 0, 1], "tokens": "all", "llc": [1.0, 2.0, np.nan, 4.0]}
    )
    figures = make_kept().figures
    points = [(point.step, point.value, point.timestamp) for point in curve(table, figures, "1.1", "llc")]
    assert points == [(0, 2.0, 1_000_000_000_000), (5, 4.0, 1_000_000_005_000)]
    assert [point.step for point in curve(table, figures, "1.0", "llc")] == [0]
    assert curve(table, figures, "", "llc") == []
    both = pd.concat([table, table.assign(tokens="related", llc=9.0)])
    assert [point.value for point in curve(both, figures, "1.1", "llc")] == [2.0, 4.0]


def test_results_are_named_by_everything_that_changes_them():
    changes = [
        {"llc": replace(SHORT, gamma=3.0)}, {"llc": replace(SHORT, seed=1)}, {"checkpoints": (0,)}, {"heads": ("0.1",)},
        {"tokens": ("related",)}, {"minibatch": 3}, {"examples": 3},
    ]  # fmt: skip
    changes += [{"checkpoints": "all"}, {"llc": replace(SHORT, draws=7)}]
    ids = [Request(**{"llc": SHORT, **change}).id for change in [{}, *changes]]
    assert len(set(ids)) == len(ids)
    forth, back = {"checkpoints": (0, 5), "heads": ("0.1", "1.0")}, {"checkpoints": (5, 0), "heads": ("1.0", "0.1")}
    assert Request(**forth).id == Request(**back).id
    assert Request(llc=SHORT).id == ids[0]


def test_what_a_model_or_its_record_has_not_is_refused_by_name():
    with pytest.raises(ValueError, match=r"checkpoints: 7 is not allowed; it must be one of 0, 5, where weights were"):
        Request(checkpoints=(0, 7)).steps_of((5, 0))
    with pytest.raises(ValueError, match=r"heads: '2\.0' is not allowed; it must be one of 0\.0, 0\.1, 1\.0, 1\.1"):
        Request(heads=("2.0",)).heads_of(MEMBER.config)
    with pytest.raises(ValueError, match="examples: 1 is not allowed; it must be at least 2, or None"):
        Request(examples=1)
    with pytest.raises(ValueError, match="examples: 17 is not allowed; it must be at most 16"):
        Request(examples=17).examples_of(MEMBER.config)
    assert Request(checkpoints=(5, 0)).steps_of((0, 1, 5)) == [0, 5]
    assert Request(heads=("1.1", "0.1")).heads_of(MEMBER.config) == [(0, 1), (1, 1)]


def finished_run(member):
    tags = {"member_id": member.id, "seed": str(member.config.seed)}
    info = SimpleNamespace(run_id=f"r-{member.config.seed}", status="FINISHED", run_name=f"seed={member.config.seed}")
    return SimpleNamespace(info=info, data=SimpleNamespace(tags=tags))


def test_members_are_chosen_with_what_their_analysis_says():
    sweep = replace(SWEEP, seeds=2)
    counted = {member.id: finished_run(member) for member in sweep.members()}
    names = [{"run_id": f"r-{seed}", "member_id": "m", "relation": "collision"} for seed in (0, 0, 1)]
    table = pd.DataFrame([{**row, "layer": 1, "head": i, "t10": 3.0} for i, row in enumerate(names)])
    members = pd.DataFrame({"run_id": ["r-0", "r-1"], "best_head": ["1.0", NAN]})
    analysis = Analysis(heads=table, members=members, widths=pd.DataFrame())
    every = {"widths": (), "seeds": ()}
    first, second = find_subjects(None, sweep, analysis, counted, every)
    assert (first.name, first.best_head, second.best_head) == ("seed=0", "1.0", "")
    assert [row["head"] for row in first.heads] == [0, 1]
    assert first.config == sweep.members()[0].config
    assert find_subjects(None, sweep, analysis, counted, {"widths": (8,), "seeds": (1,)}) == [second]
    with pytest.raises(ValueError, match="seeds: 5 is not allowed; it must be one of 0, 1, those of finished members"):
        find_subjects(None, sweep, analysis, counted, {**every, "seeds": (5,)})
    with pytest.raises(ValueError, match="run r-1 is not in the analysis yet; run `headway analyze` first"):
        find_subjects(None, sweep, replace(analysis, members=members[:1]), counted, every)
    with pytest.raises(ValueError, match=r"no member of g-.* has finished yet"):
        find_subjects(None, sweep, analysis, {}, every)


# What is said of it


def rows_of(member, width, plan, steps=(0, 10, 100, 1000)):
    """plan: {head: (status, t10, t90, coefficients by step)}."""
    names = {"member_id": member, "run_id": f"r-{member}", "width": width, "layer": 0}
    facts = [
        {**names, "head": head, "status": status, "t10": t10, "t90": t90}
        for head, (status, t10, t90, _) in plan.items()
    ]
    found = [
        {**names, "head": head, "step": step, "tokens": "all", "llc": value}
        for head, (*_, values) in plan.items()
        for step, value in zip(steps, values, strict=True)
    ]
    return facts, found


def tables(*parts):
    facts, found = (pd.DataFrame([row for part in parts for row in part[i]]) for i in (0, 1))
    return found, facts


def test_means_before_during_and_after_emergence():
    plan = {
        0: ("emerged", 5.0, 50.0, (1.0, 2.0, 3.0, 4.0)),
        1: ("transient", 20.0, 200.0, (10.0, 20.0, 30.0, 40.0)),
        2: ("never", NAN, NAN, (5.0, 7.0, 11.0, 13.0)),  # as if from 12.5 to 125
        3: ("at_start", 5.0, 50.0, (99.0, 99.0, 99.0, 99.0)),
        4: ("emerged", 5.0, 50.0, (NAN, NAN, NAN, NAN)),  # every chain diverged
    }
    lonely = {0: ("never", NAN, NAN, (1.0, 1.0, 1.0, 1.0))}  # nobody of its member says when
    plan[4] = ("emerged", 20.0, 200.0, plan[4][3])
    plan[1] = ("transient", 20.0, 200.0, plan[1][3])
    found = by_phase(*tables(rows_of("a", 8, {k: plan[k] for k in (0, 1, 2, 3)}), rows_of("b", 8, lonely)))
    means = {(row["group"], row["phase"]): row["llc"] for row in found.to_dict("records")}
    assert set(found["member_id"]) == {"a"}
    assert means == pytest.approx(
        {
            ("emerged", "before"): (1.0 + 15.0) / 2,
            ("emerged", "during"): (2.0 + 30.0) / 2,
            ("emerged", "after"): (3.5 + 40.0) / 2,
            ("never", "before"): 6.0,
            ("never", "during"): 11.0,
            ("never", "after"): 13.0,
        }
    )
    with_lost = by_phase(*tables(rows_of("a", 8, {0: plan[0], 4: plan[4]})))
    assert with_lost["llc"].tolist() == pytest.approx([3.5, 1.0, 2.0])  # after, before, during


def planted_phases(gap, change=5.0, members=6, width=8, seed=0):
    """Members whose emerged heads end `gap` above others, and `change` above where they began."""
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(members):
        base, noise = 10 + rng.normal(), 0.05 * rng.normal(size=(2, 4))
        rose = base + np.array([0, 0, change, change]) + noise[0]
        never = base + np.array([0, 0, change - gap, change - gap]) + noise[1]
        plan = {0: ("emerged", 5.0, 50.0, rose), 1: ("never", NAN, NAN, never)}
        parts.append(rows_of(f"{width}-{number}", width, plan))
    return by_phase(*tables(*parts))


def test_intervals_are_over_members():
    phases = planted_phases(2.0)
    mean = next(each for each in phase_means(phases) if (each.group, each.phase) == ("emerged", "after"))
    own = phases[(phases["group"] == "emerged") & (phases["phase"] == "after")]["llc"]
    assert (mean.value, mean.low, mean.high) == mean_interval(own.tolist())
    assert mean.members == 6


def test_words_follow_the_data_whichever_way_it_came_out():
    higher, changed, line = phase_lines(planted_phases(2.0))
    assert higher.startswith("After emergence, heads that emerged have higher coefficients than heads of the same")
    assert changed.startswith("Coefficients of heads that emerge are higher after emergence than before it")
    assert line.startswith("Width 8, 6 members: before emergence: emerged 9.57 (9.03 to 10.1), never 9.57 (")
    assert "Within members, emerged less never after emergence: 2 (1.96 to 2.03); emerged heads, after less" in line
    lower, fallen, _ = phase_lines(planted_phases(-2.0, change=-5.0))
    assert "have lower coefficients than heads" in lower
    assert "are lower after emergence than before it" in fallen
    assert phase_lines(planted_phases(0.0))[0].startswith("It is not shown whether coefficients of heads that emerged")
    both = pd.concat([planted_phases(2.0), planted_phases(-2.0, width=16)])
    assert phase_lines(both)[0].startswith("Widths differ in whether")
    unsure = pd.concat([planted_phases(2.0), planted_phases(0.0, width=16)])
    assert phase_lines(unsure)[0].startswith("It is not shown")
    assert phase_lines(planted_phases(2.0, members=1))[0].startswith("It cannot be said whether")
    assert phase_lines(planted_phases(2.0).iloc[:0]) == [
        "No member has a head that emerged and was measured, so there is no before and after to compare."
    ]


def degree_rows(member, layer, head, **methods):
    names = {"member_id": member, "run_id": f"r-{member}", "width": 8, "layer": layer, "head": head}
    return [
        {**names, "method": method.replace("_", " "), "k": k[0], "low": k[1], "high": k[2], "assumption": "a",
         "refusal": k[3]}
        for method, k in methods.items()
    ]  # fmt: skip


def stands(k, half=0.2):
    return k, k - half, k + half, ""


def refused(reason):
    return NAN, NAN, NAN, reason


def test_whether_estimates_agree():
    rows = []
    for number in range(10):
        agree = number > 0
        rows += degree_rows("m", 0, number, gradient=stands(4.0), profile=stands(4.1 if agree else 9.0))
        rows += degree_rows("m", 0, number, line_coefficient=stands(8.0), score=refused("it did not rise and stay"))
    rows += degree_rows("m", -1, -1, loss_gap=stands(4.3))
    verdict, *lines = agreement_lines(pd.DataFrame(rows))
    assert verdict.startswith("Estimates of k: of 6 pairs of methods 3 agree")
    assert lines[0] == (
        "gradient and profile: 10 heads of 1 member with both; intervals overlap in 9 (medians of k: 4 and 4.1)."
    )
    assert "gradient and loss gap: 10 heads of 1 member with both; intervals overlap in 10" in lines[1]
    assert not [line for line in lines if "score" in line]
    alone = pd.DataFrame(degree_rows("m", 0, 0, gradient=stands(4.0), profile=refused("bent")))
    assert agreement_lines(alone) == [
        "Estimates of k: no two methods give estimates of the same head: nothing to compare."
    ]
    apart = degree_rows("m", 0, 0, gradient=stands(4.0)) + degree_rows("m", 0, 1, profile=stands(4.0))
    assert "nothing to compare" in agreement_lines(pd.DataFrame(apart))[0]


def test_estimates_stand_side_by_side_with_reasons():
    rows = [row for k in (2.0, 3.0, 4.0) for row in degree_rows("m", 0, int(k), gradient=stands(k))]
    rows += degree_rows("m", 0, 9, gradient=refused("0.86 decades of L - end, under 1"))
    rows += degree_rows("m", 0, 8, gradient=refused("0.95 decades of L - end, under 1"), profile=refused("bent at 3"))
    first, second = degree_table(pd.DataFrame(rows)).rows
    assert first == ["gradient", "3.00", "2.50 to 3.50", "3", "2", "… decades of L - end, under … (2)", "a"]
    assert second == ["profile", "–", "–", "0", "1", "bent at 3 (1)", "a"]


def test_steps_at_which_most_estimates_are_below_zero_are_left_out_whole():
    rows = [
        {"member_id": member, "step": step, "layer": 0, "head": head, "llc": value}
        for member in ("a", "b")
        for step, values in {0: (-5.0, -1.0, 2.0), 10: (1.0, -1.0, 2.0), 20: (1.0, np.nan, 2.0)}.items()
        for head, value in enumerate(values)
    ]
    table = pd.DataFrame(rows)
    kept, line = not_falling(table)
    assert sorted(set(kept["step"])) == [10, 20]
    assert len(kept) == 12  # of a step that stays, also what is below 0
    assert "At 2 steps of 2 members (all at or before step 0)" in line
    again, nothing = not_falling(kept)
    assert nothing == ""
    pd.testing.assert_frame_equal(again, kept)


def planted_estimates(keys, steps=(0, 50, LAST)):
    """A row of the table of coefficients for every head of `keys` at every step."""
    fixed = {
        "tokens": "all", "sd": 0.1, "acceptance": 0.95, "diverged": 0, "chains": 4, "draws": 200, "n": 512,
        "n_beta": 30.0, "gamma": 200.0, "sigma": 0.5, "n_beta_third": 1.0, "n_beta_triple": 1.0, "gamma_third": 1.0,
        "gamma_triple": 1.0, "spread": 1.0, "heating": 0.0, "slope": 0.0,
    }  # fmt: skip
    rows = [
        {**key, "step": step, **fixed, "llc": 1.0 + i, "low": 0.5, "high": 2.0, "converged": i > 1, "sound": i > 0,
         "reason": ("acceptance 0.80, under 0.9; depends on the settings: -40% at n_beta / 3",
                    "depends on the settings: -40% at n_beta / 3", "")[i]}
        for key in keys
        for i, step in enumerate(steps)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_convergence_is_counted_with_what_estimates_rest_on():
    llc = planted_estimates([{"member_id": "m", "layer": 0, "head": 0}, {"member_id": "m", "layer": 0, "head": 1}])
    assert convergence_line(llc) == (
        "4 of 6 estimates (n = 512, n_beta = 30, gamma = 200, sigma = 0.5, 4 chains x 200 draws) are sound at these "
        "settings (of the others: acceptance 0.80, under 0.9 (2)); 2 of these are converged: they also change by less "
        "than 20% at n_beta and gamma x 1/3 and x 3 (median changes: -58% at n_beta / 3, -58% at n_beta x 3, -58% at "
        "gamma / 3, -58% at gamma x 3)."
    )
    unseen = llc[llc["sound"]].assign(**dict.fromkeys(geometry.NEARBY, np.nan), converged=False)
    assert convergence_line(unseen).endswith("how far they depend on n_beta and gamma was not looked at.")
    assert commonest(pd.Series(["a 1%", "a -2", "b"])) == [("a …", 2), ("b", 1)]


def test_a_rise_that_slopes_alone_may_make_is_not_claimed():
    """Estimates rise by 2 within members; slopes take off 2.2 before and nothing after."""
    keys = [{"member_id": m, "width": 32, "layer": 0, "head": 0} for m in "abcd"]
    llc = planted_estimates(keys)
    llc["llc"] += llc["member_id"].map({"a": 0.0, "b": 0.01, "c": 0.02, "d": 0.03})
    heads = pd.DataFrame(keys).assign(status="emerged", t10=20.0, t90=80.0)
    phases = by_phase(llc, heads)
    for slopes, said in (
        ((0.1, 0.1, 0.1), "also with what slopes take off added back"),
        ((2.2, 0.0, 0.0), "not so once"),
    ):
        level = by_phase(
            llc.assign(llc=llc["llc"] + llc["step"].map(dict(zip((0, 50, LAST), slopes, strict=True)))), heads
        )
        lines = [line for line in phase_lines(phases, level) if line.startswith("Coefficients of heads that emerge")]
        assert len(lines) == 1
        assert "higher after emergence than before it" in lines[0]
        assert said in lines[0]


def test_the_report_has_the_section_where_geometry_was_measured(tmp_path):
    sweep = make_sweep()
    plan = {((8,), 0): heads(("emerged", 100)), ((16,), 0): heads(("emerged", 40), ("transient", 60)),
            ((16,), 1): heads(("emerged", 90), ("emerged", 200))}  # fmt: skip
    made = Planted(sweep, plan)
    own = made.analysis.heads[made.analysis.heads["relation"] == "collision"]
    keys = own[["member_id", "run_id", "width", "seed", "layer", "head"]].to_dict("records")
    degrees = [row for key in keys for row in degree_rows(key["member_id"], key["layer"], key["head"],
                                                          gradient=stands(4.0), profile=stands(3.0, 0.9))]  # fmt: skip
    measured = replace(made.analysis, llc=planted_estimates(keys), degrees=pd.DataFrame(degrees))
    made.loads.clear()
    page = write_report(tmp_path / "with", sweep, measured, made.load, {}).read_text()
    assert '<h2 id="s' in page
    assert "Degenerate geometry</h2>" in page
    assert "geometry_heads.png" in page
    assert "geometry_phases.png" in page
    assert "n = 512, n_beta = 30, gamma = 200, sigma = 0.5, 4 chains x 200 draws" in page
    assert "It is not shown whether coefficients of heads that emerge change from before to after" in page
    assert "gradient and profile: 12 heads of 3 members with both; intervals overlap in 12" in page
    assert "Estimates of the degree k" in page
    assert panels(page) <= report.PANELS
    assert GEOMETRY_PANELS >= 2 * (4 + 3) + 2  # heads of width 16, and two widths
    assert len(made.loads) <= report.MEMBERS + 6


class Records:
    """The artifacts of a sweep's own run, in a folder."""

    def __init__(self, folder, **tables):
        self.folder = folder
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)

    def list_artifacts(self, run, path):
        return [SimpleNamespace(path=f"{path}/{file.name}") for file in self.folder.iterdir()]

    def download_artifacts(self, run, path, folder):
        return str(self.folder / path.partition("/")[2]) if "/" in path else str(self.folder)


def test_what_rests_on_another_analysis_or_version_is_left_out_and_said(tmp_path):
    plan = {((8,), 0): heads(("emerged", 100)), ((16,), 0): heads(("emerged", 40))}
    sweep = make_sweep()
    made = Planted(sweep, plan)
    own = made.analysis.heads[made.analysis.heads["relation"] == "collision"]
    keys = own[["member_id", "run_id", "width", "seed", "layer", "head"]].to_dict("records")
    one, other = own["run_id"].unique()
    facts = {run: geometry.facts_id(*each) for run, each in head_facts(sweep, made.analysis).items()}
    assert facts[one] != facts[other]
    llc = planted_estimates(keys).assign(version=VERSION)
    (row,) = degree_rows("", 0, 0, gradient=stands(4.0))
    degrees = pd.DataFrame([{**row, **key} for key in keys]).assign(version=VERSION)
    degrees["facts"] = degrees["run_id"].map(facts)

    def shown(degrees, llc=llc):
        analysis = replace(made.analysis)
        save_planted(tmp_path, analysis)
        return with_tables(Records(tmp_path, llc=llc, degrees=degrees), "p", sweep, analysis)

    kept = shown(degrees)
    assert kept.left_out == []
    assert len(kept.degrees) == len(degrees)
    stale = shown(degrees.assign(facts=lambda table: table["facts"].where(table["run_id"] == one, "older")))
    assert set(stale.degrees["run_id"]) == {one}
    assert len(stale.llc) == len(llc)  # coefficients rest on the weights alone
    assert stale.left_out == [
        "Estimates of k of 1 member rest on an older analysis and are left out; `headway probe llc` measures them "
        "again."
    ]
    older = shown(degrees, llc.assign(version=VERSION - 1))
    assert older.llc.empty
    assert older.degrees.empty
    page = write_report(tmp_path / "page", sweep, older, made.load, {}).read_text()
    assert "Learning coefficients of another version are left out; `headway probe llc` measures them again." in page
    assert "geometry_heads.png" not in page
    assert shown(degrees.drop(columns=["version", "facts"]), llc.drop(columns="version")).llc.empty


def save_planted(folder, analysis):
    for name in ("heads", "members", "widths", "detectors"):
        getattr(analysis, name).to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "sweep.json").write_text('{"laws": []}')


# In the service


def tagged(folder):
    return [run for run in Ledger(folder).counted.values() if any(name.startswith("llc.") for name in run.data.tags)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_members_are_measured_once_whatever_breaks_off(tmp_path, capsys, plain_environment, blank_store):
    """SIGINT after the first member, then the same command; then a member without weights; then the report."""
    sweep = ["--widths", "8", "--seeds", "3", *SMALL]
    shutil.copy(blank_store, tmp_path)
    assert main_in(tmp_path, ["sweep", "tiny", *sweep, "--workers", "1"]) == 0
    probe = ["probe", "llc", "tiny", "--chains", "2", "--draws", "10", "--burn-in", "2", "--minibatch", "4"]
    probe += ["--no-sensitivity", "--check-every", "0", "--workers", "1"]
    process = start(tmp_path, *probe)
    wait_for(lambda: tagged(tmp_path) or process.poll() is not None, 200)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("headway: stopped")
    done = {run.info.run_id: run.data.tags for run in tagged(tmp_path)}
    assert 0 < len(done) < 3

    capsys.readouterr()
    assert main_in(tmp_path, probe) == 0
    out = capsys.readouterr().out
    assert f"{3 - len(done)} member{'s' if len(done) == 1 else ''} measured in this call, 3 members in all" in out
    ledger = Ledger(tmp_path)
    assert ledger.statuses() == ["FINISHED"] * 3
    for run in tagged(tmp_path):
        assert done.get(run.info.run_id, run.data.tags) == run.data.tags
        names = {item.path.partition("-")[0] for item in ledger.client.list_artifacts(run.info.run_id)}
        assert names >= {"llc", "geometry", "degrees", "weights.npz"}
    assert {item.path for item in ledger.client.list_artifacts(ledger.parent.info.run_id, "analysis")} >= {
        "analysis/llc.parquet", "analysis/degrees.parquet",
    }  # fmt: skip
    table = ledger.table(ledger.parent, "analysis/llc.parquet", tmp_path / "tables")
    kept = Request().steps_of(RECIPES["tiny"]().members()[0].config.weight_steps)
    assert list(table.columns[:4]) == ["member_id", "run_id", "width", "seed"]
    assert len(table) == 3 * 8 * len(kept)
    assert set(table["step"]) == set(kept)

    assert main_in(tmp_path, probe) == 0
    out = capsys.readouterr().out
    assert "0 members measured in this call, 3 members in all" in out
    assert "starting Ray" not in out
    page = next(tmp_path.glob("headway-out/*/report/report.html")).read_text()
    assert "Degenerate geometry</h2>" in page

    assert main_in(tmp_path, ["probe", "transfer", "tiny", "--to", "box.n=9", "--examples", "16"]) == 0
    folder = capsys.readouterr().out.split()[-1]
    assert len(pd.read_parquet(tmp_path / folder / "heads.parquet")) == 3 * 8 * 2
    assert {item.path for item in ledger.client.list_artifacts(ledger.parent.info.run_id)} > {folder.rpartition("/")[2]}

    stale = tagged(tmp_path)[0]
    (tag,) = (name for name in stale.data.tags if name.startswith("llc."))
    ledger.client.set_tag(stale.info.run_id, tag, "another analysis")
    assert main_in(tmp_path, probe) == 0
    out = capsys.readouterr().out
    assert "estimates of k again: 1, on a newer analysis" in out
    assert "short trial" not in out
    assert "1 member measured in this call, 3 members in all" in out
    assert ledger.client.get_run(stale.info.run_id).data.tags[tag] == stale.data.tags[tag]
    again = ledger.table(ledger.parent, "analysis/llc.parquet", tmp_path / "tables")
    pd.testing.assert_frame_equal(again, table)

    victim = list(ledger.counted.values())[-1]
    folder = ledger.client.get_run(victim.info.run_id).info.artifact_uri.removeprefix("file://")
    with open(f"{folder}/weights.npz", "wb") as file:  # noqa: PTH123
        np.savez(file, **{"0/embed.W": np.zeros((1, 1))})
    capsys.readouterr()
    assert main_in(tmp_path, [*probe, "--heads", "0.1", "--checkpoints", "0", "60"]) == 1
    out = capsys.readouterr().out
    assert "failed" in out
    assert "2 members measured in this call, 2 members in all" in out
    assert main_in(tmp_path, ["report", "tiny"]) == 0
    uri = tracking.resolve_uri(f"sqlite:///{tmp_path}/mlflow.db")
    assert tracking.connect(uri).get_run(victim.info.run_id).info.status == "FINISHED"


def test_nothing_is_measured_of_a_sweep_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments, message in [
        (["probe", "lcc", "tiny"], "probe: 'lcc' is unknown; did you mean 'llc'?"),
        (["probe", "llc"], "llc: it takes a sweep, by name or id: headway probe llc SWEEP"),
        (["probe", "llc", "tiny"], "there is no ledger at"),
        (["probe", "llc", "tiny", "--n-beta", "0"], "n_beta is 0.0; allowed"),
        (["probe", "llc", "tiny", "--checkpoints", "some"], "checkpoints: 'some' is not allowed; it must be steps"),
        (["probe", "llc", "tiny", "--heads", "first"], "heads: 'first' is not allowed; it must be LAYER.HEAD"),
        (["probe", "llc", "tiny", "--tokens", "all", "all"], "tokens: ('all', 'all') is not allowed"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
