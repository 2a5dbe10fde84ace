"""`probes.cure` and `probes.scaling` against planted sweeps, a slow obvious likelihood, and lifelines."""

import warnings
from dataclasses import replace
from math import erfc, exp, log, pi, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.special import expit
from scipy.stats import binom

from probes.cure import checked, log_likelihood, model
from probes.scaling import censored_regression, fit_width_law
from tests import planted_scaling_coverage as planted
from tests.planted_scaling import Truth, sweep

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import LogNormalAFTFitter

NUMBERS = ("exponent", "low", "high", "freedom", "constant", "spread", "late")


def drawn(truth: Truth, seed: int = 0):
    return sweep(truth, np.random.default_rng(seed))


def slow_log_likelihood(rows, a, b, log_c, g, sigma, q) -> float:
    """The model as `probes.cure` states it, head by head."""
    total = 0.0
    for width, when, status, _ in zip(*rows, strict=True):
        p = 1 / (1 + exp(-a - b * log(width)))
        z = (log(when) - log_c + g * log(width)) / sigma
        f, F, S = exp(-z * z / 2) / sqrt(2 * pi) / sigma / when, erfc(-z / sqrt(2)) / 2, erfc(z / sqrt(2)) / 2
        seen = {"emerged": p * f, "transient": p * f, "at_start": p * F, "growing": p * S * q}
        total += log(seen[status] if status in seen else 1 - p + p * S * (1 - q))
    return total


# The likelihood and its maximum


def test_likelihood_is_the_slow_obvious_one_and_derivatives_are_its_differences():
    heads = checked(*drawn(planted.ONE, 1).rows)
    x, one = np.log(heads.width), np.ones(heads.width.size)
    made = model(heads, [one, x], [one, x], [one], np.zeros(x.size, bool), True)
    theta = np.array([1.0, -0.3, 8.0, -0.9, -0.6, 0.4])
    slow = slow_log_likelihood(drawn(planted.ONE, 1).rows, 1.0, -0.3, 8.0, 0.9, np.exp(-0.6), expit(0.4))
    assert all(count > 0 for name, count in heads.counts.items() if name != "transient")
    assert log_likelihood(made, theta)[0].sum() == pytest.approx(slow, rel=1e-10)
    value = lambda at: log_likelihood(made, at)[0].sum()  # noqa: E731
    slope = lambda at: made.slope(log_likelihood(made, at)[1]).sum(axis=0)  # noqa: E731
    assert slope(theta) == pytest.approx(approx_fprime(theta, value, 1e-6), rel=1e-4, abs=1e-3)
    bend = made.bend(log_likelihood(made, theta)[2]).sum(axis=0)
    assert bend == pytest.approx(approx_fprime(theta, slope, 1e-6), rel=1e-4, abs=1e-2)


def test_fit_is_the_maximum_that_a_direct_search_finds():
    found = drawn(replace(planted.ONE, seeds=3, heads=6), 3)
    law = fit_width_law(*found.rows)

    def loss(theta):
        return -slow_log_likelihood(found.rows, *theta[:4], np.exp(theta[4]), expit(theta[5]))

    start = np.array([1.7, -0.4, np.log(8000.0), 1.0, np.log(0.5), 0.0])
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-4}).x
    assert law.refusal == ""
    assert [law.shares.slope, law.exponent, np.log(law.spread)] == pytest.approx(best[[1, 3, 4]], abs=2e-4)
    assert law.constant == pytest.approx(np.exp(best[2]), rel=1e-3)
    assert law.shares.share == pytest.approx(expit(best[0] + best[1] * np.log(law.shares.width)), abs=2e-4)


@pytest.mark.parametrize("first", [1.0, 150.0], ids=["right", "interval"])
def test_censored_regression_is_lifelines_aft(first):
    found = drawn(replace(planted.HALF, first=first))
    fit = censored_regression(*found.rows)
    seen, start = found.status == "emerged", found.status == "at_start"
    table = pd.DataFrame(
        {"low": found.time, "high": np.where(seen | start, found.time, np.inf), "x": np.log(found.width)}
    )
    table.loc[start, "low"] = 1e-9
    assert start.any() == (first > 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = LogNormalAFTFitter().fit_interval_censoring(table, "low", "high")
    params = other.params_
    assert fit.exponent == pytest.approx(-params["mu_", "x"], abs=1e-4)
    assert np.log(fit.constant) == pytest.approx(params["mu_", "Intercept"], abs=1e-3)
    assert np.log(fit.spread) == pytest.approx(params["sigma_", "Intercept"], abs=1e-4)
    assert fit.log_likelihood == pytest.approx(other.log_likelihood_, abs=1e-4)


def test_without_never_the_law_is_the_censored_regression():
    found = drawn(replace(planted.HALF, shares=(1.0,) * 4))
    law, plain = fit_width_law(*found.rows), censored_regression(*found.rows)
    assert law.counts["never"] == 0
    assert (law.exponent, law.low, law.high) == pytest.approx((plain.exponent, plain.low, plain.high))
    assert law.shares.refusal == "how the share depends on width cannot be fitted: at no width do some never emerge"
    assert np.isnan([law.shares.slope, *law.shares.share, law.late]).all()


def test_widths_without_never_may_separate_the_shares_and_leave_a_law():
    truth = replace(planted.HALF, shares=(0.6, 1.0, 1.0, 1.0))
    law = fit_width_law(*drawn(truth).rows)
    assert law.shares.refusal.endswith("depends on width cannot be fitted: only at width 16 do some never emerge")
    assert np.isnan(law.shares.high).all()
    assert law.refusal == ""
    assert law.low <= 0.5 <= law.high
    assert law.held_out.refusal == ""


def test_one_growing_head_counts_little_and_refuses_nothing():
    found = drawn(planted.FALLING)
    last = int(np.flatnonzero(found.status == "never")[-1])
    status = np.where(np.arange(found.status.size) == last, "growing", found.status)
    before, after = fit_width_law(*found.rows), fit_width_law(found.width, found.time, status, found.cluster)
    assert after.refusal == ""
    assert after.shares.share[-1] > before.shares.share[-1]
    assert after.exponent == pytest.approx(before.exponent, abs=0.3)


def test_scales_of_time_and_width_do_not_matter():
    width, when, status, cluster = drawn(planted.ONE).rows
    law, other = fit_width_law(width, when, status, cluster), fit_width_law(width * 3, when * 7, status, cluster)
    assert (other.exponent, other.low, other.high) == pytest.approx((law.exponent, law.low, law.high), rel=1e-6)
    assert other.constant == pytest.approx(law.constant * 7 * 3**law.exponent, rel=1e-6)
    assert other.shares.low == pytest.approx(law.shares.low, rel=1e-6)
    assert other.decades == pytest.approx(np.log10(16))


# Intervals


@pytest.fixture(scope="module")
def table():
    return planted.coverage(24, seed=7)


def pooled(table, *names):
    rows = [row for key, row in table.items() if key.startswith(names) and not key.endswith(("refused", planted.WRONG))]
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


def honest(attempted: int) -> tuple[float, float]:
    """Where coverage of nominal 90% lies in 99.9 of 100 cases, were intervals independent."""
    return binom.interval(0.999, attempted, 0.9)


@pytest.mark.parametrize("quantity", ["exponent (", "share slope", "first share", "last share", "held out", "survival"])
def test_nominal_intervals_cover(table, quantity):
    covered, attempted = pooled(table, quantity)
    low, high = honest(attempted)
    assert attempted >= 48
    assert low <= covered <= high


@pytest.mark.parametrize("wrong", ["never as late", "heads independent", "3 seeds, percentile bootstrap"])
def test_wrong_estimators_do_not(table, wrong):
    (row,) = [row for key, row in table.items() if wrong in key]
    covered, attempted = row
    assert covered < binom.interval(0.95, attempted, 0.9)[0]


def test_few_are_refused(table):
    for name in planted.SWEEPS:
        refused, count = table[f"exponent ({name}): refused"]
        assert refused <= 0.3 * count if name == "3 seeds" else refused <= 0.05 * count


def test_never_as_late_fakes_a_law():
    found = [drawn(planted.FALLING, seed) for seed in range(12)]
    plain = np.mean([censored_regression(*f.rows).exponent for f in found])
    ours = np.mean([fit_width_law(*f.rows).exponent for f in found])
    assert plain < -0.7  # times would grow with width
    assert abs(ours) < 0.15


# Alternatives and the width held out


def test_power_laws_are_claimed_at_the_nominal_level_at_most():
    claims = planted.false_power_laws(30, seed=5)
    level = binom.ppf(0.999, 30, 0.1)
    assert claims["no dependence: ours, g is not 0"][0] <= level
    assert claims["no dependence: ours"][0] <= level
    assert claims["exponential: ours"][0] <= level
    assert claims["exponential: line through heads, p < 0.1"][0] > 2 * level
    assert claims["no dependence: line through heads, p < 0.1"][0] > claims["no dependence: ours, g is not 0"][0]


def test_true_laws_are_told_apart_where_widths_span_enough():
    wide = replace(planted.ONE, widths=(4.0, 16.0, 64.0, 256.0), constant=4000.0, end=1e5, first=1.0, shares=(0.8,) * 4)
    assert fit_width_law(*drawn(wide).rows).preferred == "power law"
    steep = replace(planted.EXPONENTIAL, rate=0.02, widths=wide.widths, shares=wide.shares, end=1e5)
    law = fit_width_law(*drawn(steep).rows)
    assert law.preferred == "exponential"
    held = law.held_out
    assert held.refusal == ""
    assert held.width == 256.0
    assert not held.low <= held.observed <= held.high  # a power law cannot foresee the cut-off


def test_held_out_prediction_does_not_look_at_the_largest_width():
    found = drawn(planted.HALF)
    largest = found.width == 128.0
    moved = np.where(largest & (found.status == "emerged"), found.time / 3.0, found.time)
    before = fit_width_law(*found.rows).held_out
    after = fit_width_law(found.width, moved, found.status, found.cluster).held_out
    assert after.predicted == pytest.approx(before.predicted, rel=1e-6)
    assert after.observed == pytest.approx(before.observed / 3.0, rel=1e-3)


# Refusals and malformed arguments


def few_widths(f):
    return f.width.clip(max=32.0), f.time, f.status, f.cluster


def constant_width(f):
    return np.full_like(f.width, 32.0), f.time, f.status, f.cluster


def all_censored(f):
    return f.width, np.full_like(f.time, 4000.0), np.full(f.width.size, "never"), f.cluster


def one_event_a_width(f):
    first = np.isin(np.arange(f.width.size), [np.flatnonzero(f.width == w)[0] for w in np.unique(f.width)])
    return f.width, f.time, np.where(first, "emerged", "never"), f.cluster


def constant_times(f):
    return f.width, np.where(f.status == "never", 4000.0, 100.0), f.status, f.cluster


def few_clusters(f):
    return f.width, f.time, f.status, f.cluster % 3


def short(f):
    """Runs of every width end when a quarter of the heads that emerge have done so."""
    ends = {w: np.quantile(f.hidden[(f.width == w) & np.isfinite(f.hidden)], 0.25) for w in np.unique(f.width)}
    end = np.array([ends[w] for w in f.width])
    early = f.hidden < end
    return f.width, np.where(early, f.hidden, end), np.where(early, "emerged", "never"), f.cluster


def none_at_the_largest(f):
    return f.width, f.time, np.where(f.width == f.width.max(), "never", "emerged"), f.cluster


def test_a_width_where_none_emerges_is_named():
    found = drawn(planted.HALF)
    law = fit_width_law(*none_at_the_largest(found))
    assert law.refusal == f"none emerges at width {found.width.max():g}"


@pytest.mark.parametrize(("change", "reason"), [
    (few_widths, "2 widths"), (constant_width, "1 width,"), (all_censored, "no event"),
    (one_event_a_width, "too few events"), (constant_times, "exactly on a line"), (few_clusters, "3 clusters"),
])  # fmt: skip
def test_refusals_have_a_reason_and_no_number(change, reason):
    rows = change(drawn(planted.FALLING))
    law, plain = fit_width_law(*rows), censored_regression(*rows)
    assert reason in law.refusal
    assert np.isnan([getattr(law, name) for name in NUMBERS]).all()
    assert np.isnan([law.shares.slope, *law.shares.share, *law.shares.low]).all()
    assert (law.alternatives, law.held_out, law.preferred) == ((), None, "")
    if change is not constant_times:  # there `never` has its own time
        assert reason in plain.refusal
        assert np.isnan([plain.exponent, plain.low, plain.high, plain.constant]).all()


def test_runs_that_end_too_early_are_refused_or_unsure():
    laws = [fit_width_law(*short(drawn(replace(planted.HALF, shares=(0.95,) * 4), seed))) for seed in range(12)]
    told = [law for law in laws if not law.refusal]
    assert all(
        "never cannot be told from late" in law.refusal or "maximum" in law.refusal for law in laws if law.refusal
    )
    assert len(told) < len(laws)
    assert np.mean([law.low <= 0.5 <= law.high for law in told]) > 0.6


@pytest.mark.parametrize(("argument", "value", "message"), [
    ("width", [16.0, 32.0], r"time has shape \(3,\); allowed: \(2,\)"),
    ("width", [16.0, -1.0, 64.0], r"width\[1\] is -1; allowed: finite numbers above 0"),
    ("time", [10.0, np.nan, 5.0], r"time\[1\] is nan; allowed"),
    ("status", ["emerged", "late", "never"], r"status\[1\] is 'late'; allowed: at_start, never"),
    ("confidence", 1.0, "confidence is 1.0; allowed"),
])  # fmt: skip
def test_malformed_arguments_are_named(argument, value, message):
    good = {"width": [16.0, 32.0, 64.0], "time": [9.0, 8.0, 7.0], "status": ["emerged"] * 3, "cluster": [0, 1, 2]}
    with pytest.raises(ValueError, match=message):
        fit_width_law(**(good | {argument: value}))
