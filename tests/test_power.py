"""Seeds planned for are enough: planted sweeps through the estimator itself, and the formulas by brute force."""

import dataclasses
import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cluster.arguments import parse
from cluster.power import (
    MOST_SEEDS,
    Pilot,
    PlanOptions,
    Scatter,
    least_seeds,
    mean_power,
    needs,
    pooled,
    read_pilot,
    slope_design,
    slope_power,
)  # fmt: skip
from cluster.sweep import Sweep
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


@pytest.mark.parametrize(("exponent", "share"), [(0.2, 1.0), (0.5, 0.8)])
def test_planned_seeds_have_the_power_promised_in_the_estimator_itself(exponent, share):
    """Of planted sweeps of one level a member, at the planned seeds, `fit_width_law` sees g != 0 in 80%: within four
    Monte-Carlo standard errors below and, as seeds are whole, what one seed more gives above."""
    draws, spread = 120, 0.4
    pilot = Pilot(
        widths=tuple(map(int, WIDTHS)), members=99, settings=4, reached=share,
        log_level=Scatter(deviation=spread, freedom=95), share=None,
    )  # fmt: skip
    (need,) = needs(pilot, PlanOptions(exponents=(exponent,), shares=()))
    truth = Truth(
        widths=WIDTHS, shares=(share,) * 4, exponent=exponent, spread=spread, together=0.0, seeds=need.seeds, heads=1,
        constant=300.0, end=1e9,
    )  # fmt: skip
    rng, seen = np.random.default_rng(1), 0
    for _ in range(draws):
        law = fit_width_law(*sweep(truth, rng).rows, confidence=0.95)
        seen += bool(law.low > 0 or law.high < 0)
    noise = 4 * math.sqrt(0.8 * 0.2 / draws)
    promised = slope_power(exponent, spread, WIDTHS, math.floor(need.seeds * share), 0.05)
    assert 0.8 - noise < seen / draws < max(promised, 0.8) + noise
    assert slope_power(exponent, spread, WIDTHS, math.ceil(need.seeds * share) - 2, 0.05) < 0.8


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
