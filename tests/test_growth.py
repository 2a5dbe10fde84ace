"""`probes.growth` against planted escapes from saddles."""

import numpy as np
import pytest
from scipy.stats import binom

import tests.planted_relaxation as planted
import tests.planted_relaxation_coverage as measured
from probes.growth import fit_growth, fit_growths
from tests.planted_relaxation import JITTER, Escape, probe_times

TIME = probe_times(per_decade=40)


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0, 6.0])
def test_escapes_obey_their_equation(k):
    flow = Escape(k, 0.01, 0.1)
    t = flow.reaches(2.0) * np.linspace(0.1, 0.9, 20)
    speed = (flow.x(t * (1 + 1e-6)) - flow.x(t * (1 - 1e-6))) / (2e-6 * t)
    np.testing.assert_allclose(speed, 0.01 * k * flow.x(t) ** (k - 1), rtol=1e-5)
    assert flow.x(flow.reaches(2.0)) == pytest.approx(2.0)


@pytest.mark.parametrize("k", [2.0, 3.0, 3.5, 4.0])
def test_noiseless_escape_gives_its_law_and_number(k):
    curve = planted.growing(np.random.default_rng(3), k)
    fit = fit_growth(TIME, curve.score(TIME), curve.window)
    assert (fit.preferred, fit.law, fit.refusal) == (curve.law, curve.law, "")
    assert fit.value == pytest.approx(curve.exponent, rel=1e-4)
    assert fit.low <= fit.value <= fit.high
    if k > 2.0:
        assert fit.t_c == pytest.approx(curve.t0, rel=1e-3)
    else:
        assert np.isnan(fit.t_c)


def test_noiseless_power_growth():
    curve = planted.growing_power(np.random.default_rng(3))
    fit = fit_growth(TIME, curve.score(TIME), curve.window)
    assert fit.preferred == "power"
    assert fit.value == pytest.approx(curve.exponent, rel=1e-4)
    assert fit.baseline == pytest.approx(curve.floor, rel=1e-4)


def test_intervals_cover_nine_in_ten():
    found = measured.growth_coverage(150, seed=3)
    for law in ("exponential", "critical", "power"):
        covered, given = found[f"growth, {law}"]
        low, high = binom.interval(0.99, given, 0.9)
        assert given >= 120
        assert low <= covered <= high, law


def test_noise_of_one_size_is_the_wrong_noise_for_a_score_that_grows():
    """Jitter goes with the score: with `noise` wrong the intervals fail the test that they pass otherwise."""
    rng, hits = np.random.default_rng(0), []
    curves = [planted.growing(rng, 2.0) for _ in range(150)]
    scores = np.stack([curve.seen(TIME, JITTER, rng) for curve in curves])
    bounds = [curve.window for curve in curves]
    for noise in ("relative", "constant"):
        fits = fit_growths(TIME, scores, bounds, law="exponential", noise=noise)
        hits.append(sum(f.low <= c.exponent <= f.high for c, f in zip(curves, fits, strict=True)))
    low, high = binom.interval(0.99, 150, 0.9)
    assert low <= hits[0] <= high
    assert hits[1] < low


def test_a_baseline_that_is_given_narrows_the_interval():
    rng = np.random.default_rng(4)
    curve = planted.growing(rng, 2.0)
    score = curve.seen(TIME, JITTER, rng)
    free = fit_growth(TIME, score, curve.window, law="exponential")
    given = fit_growth(TIME, score, curve.window, law="exponential", baseline=curve.floor)
    assert given.baseline == curve.floor
    assert given.low <= curve.exponent <= given.high
    assert given.high / given.low < free.high / free.low


def test_refusals_are_named_and_give_no_number():
    curve = planted.growing(np.random.default_rng(3), 2.0)
    score, (_, end) = curve.score(TIME), curve.window
    cases = {
        "decades of time in the window, under 1": {"window": (0.3 * end, end), "law": "power"},
        "probes in the window, under 16": {"window": (0.9 * end, end)},
        "above the noise for": {"window": (0.4 * end, end), "law": "exponential", "baseline": 0.0},
        "exponent is at the upper edge": {"window": curve.window, "law": "critical"},
        "not finite": {"window": (np.nan, end)},
    }
    for reason, options in cases.items():
        fit = fit_growth(TIME, score, **options)
        assert reason in fit.refusal
        assert np.isnan([fit.value, fit.low, fit.high]).all()
    noise = 0.1 * np.random.default_rng(0).standard_normal(TIME.size)
    fit = fit_growth(TIME, score + noise, curve.window)
    assert (fit.law, fit.refusal) == ("undecided", "no law is preferred")


def test_a_power_law_that_is_refused_is_not_preferred():
    time = np.geomspace(100.0, 900.0, 40)
    score = 0.1 + (time / 900.0) ** 3 + 1e-4 * np.random.default_rng(0).standard_normal(time.size)
    for law in (None, "power", "exponential"):
        fit = fit_growth(time, score, law=law)
        assert min(fit.scores, key=lambda name: fit.scores[name].aicc) == "power"
        assert fit.preferred == "undecided"
        assert law == "exponential" or "0.95 decades of time in the window" in fit.refusal


def test_a_rate_is_per_unit_of_time():
    curve = planted.growing(np.random.default_rng(3), 2.0)
    score = curve.seen(TIME, JITTER, np.random.default_rng(0))
    fit = fit_growth(TIME, score, curve.window, law="exponential")
    slower = fit_growth(5.0 * TIME, score, 5.0 * np.array(curve.window), law="exponential")
    np.testing.assert_allclose([slower.value, slower.low, slower.high], np.array([fit.value, fit.low, fit.high]) / 5.0)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="law is 'linear'; allowed: None, power, exponential, critical"):
        fit_growth(TIME, TIME, law="linear")
    with pytest.raises(ValueError, match="baseline is nan; allowed: a finite number, or one for each curve"):
        fit_growth(TIME, TIME, baseline=np.nan)
    with pytest.raises(ValueError, match=r"value has shape \(\); allowed: \[T\] or \[R, T\]"):
        fit_growth(TIME, 1.0)
