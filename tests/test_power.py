"""Seeds planned for are enough: planted sweeps through the estimator itself, and the formulas by brute force."""

import dataclasses
import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cluster import compare
from cluster.arguments import parse
from cluster.power import (
    MOST_SEEDS,
    Pilot,
    PlanOptions,
    Scatter,
    designs,
    least_seeds,
    mean_power,
    needs,
    pooled,
    read_pilot,
    scatter_in_pairs,
    slope_design,
    slope_power,
    t_power,
)  # fmt: skip
from cluster.sweep import DataConfig, Sweep
from probes.scaling import fit_width_law
from tests.planted_scaling import Truth, sweep
from tests.planted_sweep import planted_sweep

WIDTHS = (16.0, 32.0, 64.0, 128.0)


def test_the_design_is_that_of_a_sandwich_worked_out_by_brute_force():
    seeds = 3
    x = np.column_stack([np.ones(4 * seeds), np.repeat(np.log(WIDTHS), seeds)])
    bread = np.linalg.inv(x.T @ x)
    hat = x @ bread @ x.T
    weights = (bread @ x.T)[1] / np.sqrt(1 - np.diag(hat))
    quadratic = np.diag(weights) @ (np.eye(len(x)) - hat) @ np.diag(weights)
    error, freedom = slope_design(WIDTHS, seeds)
    assert error == pytest.approx(math.sqrt(bread[1, 1]))
    assert np.trace(quadratic) == pytest.approx(bread[1, 1])  # CR2 is not biased
    assert freedom == pytest.approx(np.trace(quadratic) ** 2 / np.trace(quadratic @ quadratic))


def test_the_design_with_shared_seeds_is_that_of_a_sandwich_over_them():
    """A seed is a cluster with a member at every width: n - 1 degrees of freedom, whatever the widths."""
    seeds, count = 5, len(WIDTHS)
    x = np.column_stack([np.ones(count * seeds), np.tile(np.log(WIDTHS), seeds)])
    bread = np.linalg.inv(x.T @ x)
    hat = x @ bread @ x.T
    quadratic = np.zeros_like(hat)
    for seed in range(seeds):
        own = slice(seed * count, (seed + 1) * count)
        left = np.eye(count) - hat[own, own]
        values, vectors = np.linalg.eigh(left)
        row = (bread @ x[own].T)[1] @ (vectors / np.sqrt(values)) @ vectors.T @ (np.eye(len(x)) - hat)[own]
        quadratic += np.outer(row, row)
    assert np.trace(quadratic) ** 2 / np.trace(quadratic @ quadratic) == pytest.approx(seeds - 1)
    power = slope_power(0.2, 0.3, WIDTHS, seeds, 0.05, paired=True)
    error = 0.3 * math.sqrt(bread[1, 1])
    assert power == pytest.approx(t_power(0.2 / error, seeds - 1, 0.05))


@pytest.mark.parametrize(
    ("exponent", "share", "together"),
    [(0.2, 1.0, 0.0), (0.5, 0.8, 0.0), (0.2, 1.0, 0.75), (0.1, 0.8, 0.75), (0.1, 0.6, 0.75)],
)
def test_planned_seeds_have_the_power_promised_in_the_estimator_itself(exponent, share, together):
    """Of planted sweeps of one level a member, at the planned seeds, `fit_width_law` sees g != 0 in 80%: within four
    Monte-Carlo standard errors below and, as seeds are whole, what one seed more gives above. together: share of the
    variance that the members of a seed have in common over widths. share: of the members that get there, each by its
    own luck, which is where a seed's luck in when cancels least."""
    draws, shared = 120, together > 0
    spread = 0.4 * math.sqrt(1 - together)
    pilot = Pilot(
        widths=tuple(map(int, WIDTHS)), members=99, settings=4, reached=share,
        log_level=Scatter(deviation=spread, freedom=95, paired=shared), share=None, shared=shared,
        whole_level=Scatter(deviation=0.4, freedom=95) if shared else None,
    )  # fmt: skip
    (need,) = needs(pilot, PlanOptions(exponents=(exponent,), shares=()))
    truth = Truth(
        widths=WIDTHS, shares=(1.0,) * 4, exponent=exponent, spread=0.4, together=together, seeds=need.seeds, heads=1,
        constant=300.0, end=1e9, shared=shared,
    )  # fmt: skip
    rng, seen = np.random.default_rng(1), 0
    for _ in range(draws):
        width, when, status, cluster = sweep(truth, rng).rows
        there = rng.random(width.size) < share
        when, status = np.where(there, when, truth.end), np.where(there, status, "never")
        law = fit_width_law(width, when, status, cluster, confidence=0.95)
        seen += bool(law.low > 0 or law.high < 0)
    noise = 4 * math.sqrt(0.8 * 0.2 / draws)
    spread = pilot.slope_scatter[0]
    promised = slope_power(exponent, spread, WIDTHS, math.floor(need.seeds * share), 0.05, shared)
    assert 0.8 - noise < seen / draws < max(promised, 0.8) + noise
    assert slope_power(exponent, spread, WIDTHS, math.ceil(need.seeds * share) - 2, 0.05, shared) < 0.8
    if shared:  # members that were independent, with all of the scatter, would be more
        apart = Scatter(deviation=0.4, freedom=95)
        (more,) = needs(dataclasses.replace(pilot, log_level=apart), PlanOptions(exponents=(exponent,), shares=()))
        assert more.seeds > (2 if share == 1 else 1) * need.seeds


def compared(a, b, paired, others):
    """Whether `compare` calls a quantity of two settings shown, whose other tests of the point have these p."""
    p, reason = compare._permuted((a, b), a.size if paired else 0)
    assert reason == ""
    none = (math.nan,) * 3
    ps = [p, *others]
    rows = [
        compare.Row(point="", quantity="", scale="plain", n_a=a.size, n_b=b.size, pairs=0, a=none, b=none, gap=none,
                    p=each, reason="") for each in ps
    ]  # fmt: skip
    return compare.adjusted(rows)[0].shown


@pytest.mark.parametrize("paired", [True, False])
def test_planned_differences_are_shown_by_the_comparison_as_often_as_promised(paired):
    """Planted: shares of two settings, 0.75 of whose variance is the seed's where seeds are shared; the other tests of
    the point find nothing but luck, which shows this one a little more often than if they never did."""
    draws, together, rng = 150, 0.75 if paired else 0.0, np.random.default_rng(7)
    spread = 0.1 * math.sqrt(1 - together)
    pilot = Pilot(
        widths=(16,), members=99, settings=2, reached=1.0, log_level=None, shared=paired,
        share=Scatter(deviation=spread, freedom=95, paired=paired),
    )  # fmt: skip
    difference = 0.085 if paired else 0.15
    (need,) = needs(pilot, PlanOptions(exponents=(), shares=(difference,)))
    assert 8 < need.seeds < 13
    seen = 0
    for _ in range(draws):
        common = 0.1 * math.sqrt(together) * rng.standard_normal(need.seeds)
        a, b = common + spread * rng.standard_normal((2, need.seeds))
        seen += compared(a, b + difference, paired, rng.random(compare.TESTS - 1))
    level = compare.ALPHA / compare.TESTS
    promised = mean_power(difference, spread, need.seeds, level, paired)
    noise = 4 * math.sqrt(0.8 * 0.2 / draws)
    assert 0.8 - noise < seen / draws < promised + 0.04 + noise


@pytest.mark.parametrize(("paired", "floor"), [(True, 8), (False, 5)])
def test_no_fewer_seeds_are_planned_than_permutations_can_show(paired, floor):
    """However large a difference: a seed fewer, and the comparison cannot call it shown where nothing else differs."""
    share = Scatter(deviation=1e-6, freedom=95, paired=paired)
    pilot = Pilot(widths=(16,), members=9, settings=2, reached=1.0, log_level=None, share=share, shared=paired)
    (need,) = needs(pilot, PlanOptions(exponents=(), shares=(0.5,)))
    assert need.seeds == need.cautious == floor
    (text,) = designs(pilot)
    assert f"which takes {floor} {'pairs' if paired else 'members a side'}" in text
    for seeds, shown in ((floor, True), (floor - 1, False)):
        a = np.linspace(0.0, 0.01, seeds)
        assert compared(a, a + 1.0, paired, [0.99] * (compare.TESTS - 1)) == shown


def test_what_a_seed_has_in_common_is_taken_off_where_it_is_shared():
    """Planted: settings, seeds and a scatter of 0.2; some values are missing. By lstsq on the same dummies too."""
    rng = np.random.default_rng(8)
    setting, seed = np.repeat(np.arange(30), 12), np.tile(np.arange(12), 30)
    values = pd.Series(setting + 3.0 * rng.standard_normal(12)[seed] + 0.2 * rng.standard_normal(360))
    values[rng.random(360) < 0.1] = np.nan
    keys = pd.Series(setting), pd.Series(seed)
    found = scatter_in_pairs(values, keys[:1], keys[1:])
    assert found.deviation == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(2 * found.freedom))
    known = values.dropna()
    dummies = np.column_stack([np.eye(30)[setting], np.eye(12)[seed]])[known.index]
    best, _, rank, _ = np.linalg.lstsq(dummies, known.to_numpy(), rcond=None)
    assert found.freedom == len(known) - rank
    assert found.deviation == pytest.approx(math.sqrt(((known - dummies @ best) ** 2).sum() / found.freedom), rel=1e-6)
    assert pooled(values, keys[:1]).deviation > 2.0
    assert scatter_in_pairs(values[:12], [keys[0][:12]], [keys[1][:12]]) is None  # one setting says nothing of it
    assert scatter_in_pairs(pd.Series([np.nan]), [pd.Series([0])], [pd.Series([0])]) is None


def test_a_pilot_whose_seeds_share_their_data_is_read_in_pairs():
    analysis = planted_sweep(seeds=12, share=0.7, widths=(16, 32, 64))
    axes = {"train.learning_rate": (0.001, 0.004)}
    own = Sweep(name="s", widths=(16, 32, 64), seeds=12, axes=axes, data=DataConfig(order="seed"))
    pilot = read_pilot(own, analysis)
    assert (pilot.shared, pilot.log_level.paired, pilot.share.paired) == (True, True, True)
    assert pilot.log_level.freedom == 2 * 2 * 11  # by rate: widths x seeds, less means of either
    assert pilot.share.freedom == 5 * 11
    assert "within each seed" in designs(pilot)[0]
    assert pilot.whole_level.freedom == 11  # the luck of a seed is one
    assert (pilot.reached, pilot.slope_scatter) == (1.0, (pilot.log_level.deviation, pilot.log_level.high))
    table = analysis.members.copy()
    table.loc[np.random.default_rng(1).random(len(table)) < 0.25, "level"] = np.nan
    some = read_pilot(own, dataclasses.replace(analysis, members=table))
    for found, within, whole in zip(
        some.slope_scatter, (some.log_level.deviation, some.log_level.high),
        (some.whole_level.deviation, some.whole_level.high), strict=True,
    ):  # fmt: skip
        assert found == pytest.approx(
            math.sqrt(some.reached * within**2 + (1 - some.reached) * max(within, whole) ** 2)
        )
    assert "does not cancel where a width lacks it" in designs(some)[1]
    one = planted_sweep(seeds=12, share=0.7, widths=(16,), rates=(0.001,))
    alone = read_pilot(Sweep(name="s", widths=(16,), seeds=12, data=DataConfig(order="seed")), one)
    assert not alone.share.paired
    assert "cannot tell by how much" in designs(alone)[-1]


def test_the_power_of_a_difference_is_that_of_simulated_t_tests():
    rng, seeds = np.random.default_rng(2), 9
    a, b = rng.standard_normal((2, 20_000, seeds))
    seen = (stats.ttest_ind(a, b + 1.3, axis=1).pvalue < 0.05).mean()
    assert mean_power(1.3, 1.0, seeds, 0.05) == pytest.approx(seen, abs=4 * math.sqrt(seen * (1 - seen) / 20_000))


def test_least_seeds_are_the_least():
    asked = []

    def power(seeds):
        asked.append(seeds)
        return mean_power(0.3, 1.0, seeds, 0.05)

    found = least_seeds(power, 0.8)
    assert power(found) >= 0.8 > power(found - 1)
    assert found == 176  # of every table of two-sample tests: d = 0.3, 5%, 80%
    assert len(asked) < 25
    assert least_seeds(lambda seeds: 0.5, 0.8) is None
    assert least_seeds(lambda seeds: 0.9, 0.8) == 2
    start = time.monotonic()
    assert least_seeds(lambda seeds: slope_power(0.001, 1.0, WIDTHS, min(seeds, 500), 0.05), 0.8) is None
    assert time.monotonic() - start < 20
    assert MOST_SEEDS == 100_000


def test_scatter_is_pooled_within_points_and_its_bound_holds_it():
    rng = np.random.default_rng(4)
    group = pd.Series(np.repeat(np.arange(200), 3))
    values = pd.Series(5.0 * group.to_numpy() + 0.7 * rng.standard_normal(600))
    found = pooled(values, [group])
    assert found.freedom == 400
    assert found.deviation == pytest.approx(0.7, abs=4 * 0.7 / math.sqrt(800))
    held = 0
    for _ in range(400):
        few = pooled(pd.Series(rng.standard_normal(6)), [pd.Series(np.repeat([0, 1], 3))])
        held += few.high > 1.0
    assert held / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 400))
    assert pooled(pd.Series([1.0, 2.0]), [pd.Series([0, 1])]) is None
    assert pooled(pd.Series([1.0, 1.0]), [pd.Series([0, 0])]) is None
    assert pooled(pd.Series([np.nan, 1.0]), [pd.Series([0, 0])]) is None


def test_a_pilot_is_read_off_a_planted_sweep():
    """Levels of heads scatter by 0.25 in the logarithm; a member's is the least of its eight."""
    analysis = planted_sweep(seeds=40, share=1.0, widths=(16, 32, 64))
    own = Sweep(name="s", widths=(16, 32, 64), seeds=40, axes={"train.learning_rate": (0.001, 0.004)})
    pilot = read_pilot(own, analysis)
    least = 0.25 * np.random.default_rng(0).standard_normal((20_000, 8)).min(axis=1).std()
    assert pilot.log_level.deviation == pytest.approx(least, rel=0.15)
    assert (pilot.log_level.freedom, pilot.members, pilot.settings, pilot.reached) == (6 * 39, 240, 6, 1.0)
    assert pilot.share is None  # all heads rise in all members
    table = analysis.members.copy()
    table.loc[::2, "level"] = np.nan
    half = read_pilot(own, dataclasses.replace(analysis, members=table))
    assert half.reached == 0.5
    asked = PlanOptions(exponents=(0.2,))
    assert needs(half, asked)[0].seeds == pytest.approx(2 * needs(pilot, asked)[0].seeds, rel=0.3)
    with pytest.raises(ValueError, match=r"sweep: s-\w+ has no finished member to plan from"):
        read_pilot(own, dataclasses.replace(analysis, members=table.assign(outcome="failed")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exponents", "0"], "exponents: 0.0 is not allowed; it must be a finite number above 0"),
        (["--shares", "1.5"], "shares: 1.5 is not allowed; it must be below 1"),
        (["--widths", "16", "32"], "widths: (16, 32) is not allowed; it must be at least 3"),
        (["--power", "1"], "power: 1.0 is not allowed; it must be above level = 0.05 and below 1"),
        (["--level", "0"], "level: 0.0 is not allowed; it must be in (0, 1)"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ValueError, match="is not allowed") as caught:
        parse(PlanOptions, flags, PlanOptions(), "headway plan", "")
    assert message in str(caught.value)
