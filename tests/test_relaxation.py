"""`probes.relaxation` against planted gradient flows, other curves, and independent fits."""

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import binom, linregress

import tests.planted_relaxation as planted
import tests.planted_relaxation_coverage as measured
from probes import inference, laws, relaxation, windows
from probes.relaxation import fit_relaxation, fit_relaxations
from tests.planted import Noise
from tests.planted_relaxation import FAINT, JITTER, MIXED, Flow, probe_times

TIME = probe_times()


def honest_band(count: int) -> tuple[float, float]:
    """Where the coverage of `count` true 90% intervals lies in 99 of 100 cases."""
    low, high = binom.interval(0.99, count, 0.9)
    return low / count, high / count


def loglog_slope(t, gap) -> float:
    return -linregress(np.log(t), np.log(gap)).slope


def numbers(fit):
    return np.array([fit.exponent, fit.low, fit.high, fit.t0, fit.s_inf, fit.memory, fit.gap_decades])


# The truth itself


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0, 6.0, 8.0])
def test_flows_obey_their_equation(k):
    flow = Flow(k, 0.01, 1.3, 5.0)
    t = np.geomspace(6.0, 1e3, 50)
    speed = (flow.x(t * (1 + 1e-6)) - flow.x(t * (1 - 1e-6))) / (2e-6 * t)
    np.testing.assert_allclose(speed, -flow.gradient(t), rtol=1e-5)
    assert flow.x(np.array([flow.reaches(0.4)]))[0] == pytest.approx(0.4)


def test_an_asymptote_that_is_a_little_wrong_gives_another_exponent():
    """What a fit that reads s_inf off would report for k = 4, true exponent 0.5, times 10 to 300."""
    t = np.linspace(10.0, 300.0, 5000)
    x = Flow(4.0, 1.0).x(t)
    got = [loglog_slope(t, x + wrong) for wrong in (-0.001, -0.01, -0.02, 0.02)]
    np.testing.assert_allclose(got, [0.513, 0.697, 1.442, 0.328], rtol=0.005)
    fit = fit_relaxation(t[::50], 0.5 - x[::50])
    assert fit.exponent == pytest.approx(0.5, abs=1e-5)


def test_an_origin_that_is_a_little_wrong_gives_another_exponent():
    t = np.geomspace(10.0, 1000.0, 60)
    late, early = (loglog_slope(t, Flow(4.0, 1.0).x(t + wrong)) for wrong in (5.0, -5.0))
    assert late < 0.48 < 0.52 < early
    for wrong in (5.0, -5.0):
        fit = fit_relaxation(t, 0.5 - Flow(4.0, 1.0).x(t + wrong))
        assert fit.exponent == pytest.approx(0.5, abs=1e-5)
        assert fit.t0 == pytest.approx(-wrong - 1 / 8, abs=1e-3)


# Noiseless curves


@pytest.mark.parametrize("k", [3.0, 3.5, 4.0, 6.0])
def test_gradient_flow_gives_its_exponent_origin_and_plateau(k):
    flow = Flow(k, 0.01, 1.0, 3.0)
    t = probe_times(10.0, 1e5)
    fit = fit_relaxation(t, 0.6 - 0.3 * flow.x(t))
    law = "undecided" if k == 3.0 else "power"  # a = 1 is the log-logistic with b = 1 and t_m = -t0
    assert (fit.preferred, fit.refusal) == (law, "")
    assert fit.exponent == pytest.approx(1.0 / (k - 2.0), rel=1e-5)
    assert fit.low <= fit.exponent <= fit.high < 1.001 * fit.low
    assert fit.t0 == pytest.approx(flow.origin, rel=1e-3)
    assert fit.s_inf == pytest.approx(0.6, rel=1e-5)
    assert fit.decades == pytest.approx(4.0)
    gaps = flow.x(t[[0, -1]])
    assert fit.gap_decades == pytest.approx(np.log10(gaps[0] / gaps[1]), rel=1e-3)


@pytest.mark.parametrize("law", ["exponential", "logistic", "log_logistic", "power"])
def test_noiseless_curves_are_known_by_their_law(law):
    for seed in range(10):
        curve = getattr(planted, law)(np.random.default_rng(seed))
        fit = fit_relaxation(TIME, curve.score(TIME), curve.window)
        assert fit.preferred == law
        assert fit.scores[law].aicc == 0.0
        assert all(score.aicc >= 0.0 for score in fit.scores.values())


def test_a_falling_curve_has_the_exponent_of_the_rising_one():
    score = planted.power(np.random.default_rng(0)).seen(TIME, JITTER, np.random.default_rng(1))
    up = fit_relaxation(TIME, score, (50.0, 1e4), noise="constant")
    down = fit_relaxation(TIME, 1.0 - score, (50.0, 1e4), noise="constant")
    np.testing.assert_allclose(numbers(down)[:4], numbers(up)[:4], rtol=1e-5)
    assert down.s_inf == pytest.approx(1.0 - up.s_inf)


# Against independent fits


def test_the_optimum_is_that_of_curve_fit():
    """Same weights and memory given, whitened by a matrix that is inverted outright."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        curve = planted.power(rng)
        t, y = measured.cut(curve, curve.seen(TIME, JITTER, rng))
        fit = fit_relaxation(t, y, noise="constant")
        lag = np.abs(np.subtract.outer(np.arange(t.size), np.arange(t.size)))
        start = [y[-1], np.ptp(y), fit.exponent * rng.uniform(0.7, 1.4), 0.0]

        def model(t, s, g, a, log_d):
            return s - g * (1.0 + (t - curve.window[0]) / (curve.window[0] * np.exp(log_d))) ** -a  # noqa: B023

        (s_inf, _, a, log_d), _ = curve_fit(model, t, y, start, sigma=fit.memory**lag + 0.0, maxfev=20000)
        assert fit.exponent == pytest.approx(a, rel=2e-3)
        assert fit.s_inf == pytest.approx(s_inf, rel=1e-3)
        assert fit.t0 == pytest.approx(curve.window[0] * (1.0 - np.exp(log_d)), rel=0.02, abs=0.5)


def test_interval_ends_are_where_the_profile_says():
    """Slow version: at either end, a fit by brute force over t0 meets the threshold."""
    rng = np.random.default_rng(3)
    curve = planted.power(rng)
    t, y = measured.cut(curve, curve.seen(TIME, JITTER, rng))
    fit = fit_relaxation(t, y, noise="constant")

    def rss(a: float) -> float:
        def white(v):
            return np.r_[v[0] * np.sqrt(1 - fit.memory**2), v[1:] - fit.memory * v[:-1]]

        found = []
        for d in t[0] * np.geomspace(0.02, t[-1] / t[0], 1500):
            columns = np.stack([white(np.ones(t.size)), white((1 + (t - t[0]) / d) ** -a)], axis=1)
            found.append(np.linalg.lstsq(columns, white(y), rcond=None)[1][0])
        return min(found)

    least = rss(fit.exponent)
    ends = [np.sqrt((rss(a) - least) / (least / (t.size - 4))) for a in (fit.low, fit.high)]
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
    assert 1.65 < ends[0] < 2.6  # Student's t with n - 4 degrees has 1.69; rho is not known
    assert rss(fit.exponent * 1.02) > least < rss(fit.exponent / 1.02)


def test_whitened_products_are_those_of_the_inverse_covariance():
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((2, 3, 9))
    columns[1, :, 6:] = 0.0
    got = laws.moments(columns, np.array([9.0, 6.0]))
    for i, n in enumerate((9, 6)):
        x = columns[i, :, :n]
        for j, rho in enumerate(laws.MEMORIES):
            covariance = rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / (1 - rho**2)
            np.testing.assert_allclose(got[i, j], x @ np.linalg.inv(covariance) @ x.T, rtol=1e-9, atol=1e-12)
            white = laws.whiten(x, np.array([[rho]]), np.ones((3, n), bool))
            np.testing.assert_allclose(got[i, j], white @ white.T, rtol=1e-9, atol=1e-12)


def test_memory_is_found_without_the_bias_of_plain_likelihood():
    curves, scores, fits = measured.planted_fits(planted.power, 200, JITTER, 4)
    assert np.mean([fit.memory for fit in fits]) == pytest.approx(0.4, abs=0.06)
    cut = windows.cut_windows(TIME, scores, [c.window for c in curves], 0.9, "relative", decades=1.0)
    (_, some), *_ = cut.chunks()
    plain = laws.fit_law(some, relaxation.POWER, *laws.search(some, relaxation.POWER))
    assert plain.rho.mean() < 0.34


def test_a_known_memory_would_make_intervals_plain_t():
    weight = np.zeros((1, laws.MEMORIES.size))
    weight[0, 10] = 1.0
    reach = inference._reach(weight, np.ones_like(weight), np.array([[20.0]]), 0.9)
    assert reach[0] == pytest.approx(1.72472, abs=1e-4)
    mixed = inference._reach(np.full_like(weight, 1 / 27), np.linspace(0.5, 2.0, 27)[None], np.array([[20.0]]), 0.9)
    assert mixed[0] > 1.25 * reach[0]


def test_relative_weights_follow_the_smoothed_curve():
    values = np.array([[1.0, 2.0, 3.0, 4.0, 100.0, 100.0, 100.0, 0.0]])
    mask = np.array([[True] * 7 + [False]])
    got = windows._weights(values, mask)
    smooth = np.array([2.0, 2.5, 22.0, 41.8, 61.4, 76.0, 100.0])
    np.testing.assert_allclose(got[0, :7], 100.0 / np.maximum(smooth, 10.0))


# Coverage and false positives


def test_intervals_cover_nine_in_ten_and_those_of_wrong_estimators_do_not():
    found = measured.exponent_coverage(150, seed=1)
    low, high = honest_band(150)
    for name in ("faint", "jitter", "mixed"):
        covered, given = found[f"exponent ({name})"]
        assert given >= 140
        assert low <= covered / given <= high, name
    for wrong in measured.WRONG:
        covered, given = found[f"exponent ({wrong}, wrong)"]
        assert covered / given < low, wrong


def test_power_is_not_found_where_there_is_none():
    """Where truth has a power-law tail (log-logistic, Gompertz in log t) "power" is a near miss; else it is wrong."""
    count = 36
    found = measured.found_power(count, seed=1)
    for truth in ("exponential", "logistic"):
        assert sum(found[f"{truth}, {noise}"][0] for noise in measured.NOISES) <= 0.1 * count
    for truth in ("log_logistic", "gompertz"):
        for noise in measured.NOISES:
            assert found[f"{truth}, {noise}"][0] <= binom.ppf(0.99, count, 0.1)
        assert found[f"{truth}, faint (log-log line)"][0] > 0.2 * count  # the wrong criterion fails this test
    assert found["power, faint"][0] > 0.1 * count  # a test that never finds it would pass all this


# Refusals


def flow_curve(k=4.0, t=TIME):
    return 0.5 - 0.3 * Flow(k, 0.02, 1.0, 3.0).x(t)


def noisy(values, sigma, seed=0):
    return values + sigma * np.random.default_rng(seed).standard_normal(values.shape)


REFUSED = {
    "times do not increase": (np.r_[TIME[:30], TIME[29:]], np.r_[flow_curve()[:30], flow_curve()[29:]], None),
    "times do not increase strictly": (TIME[::-1], flow_curve(), None),
    "values in the window are not finite": (TIME, np.where(TIME == 100.0, np.nan, flow_curve()), None),
    "values in the window are constant": (TIME, np.full(TIME.size, 0.3), None),
    "15 probes in the window, under 16": (TIME[-60::4], flow_curve()[-60::4], None),
    "0 probes in the window, under 16": (TIME, flow_curve(), (2e4, 3e4)),
    "0.95 decades of time in the window, under 1": (TIME, flow_curve(), (1100.0, 1e4)),
    "window is (nan, 10000), not finite": (TIME, flow_curve(), (np.nan, 1e4)),
    "above the noise for": (TIME, noisy(flow_curve(), 0.05), (50.0, 1e4)),
    "origin t0 is at the upper edge": (TIME, 0.5 - 0.3 * np.exp(-TIME / 2000.0), (100.0, 1e4)),
    "exponent is at the lower edge": (TIME, 0.1 + 0.05 * np.log(TIME), (20.0, 1e4)),
    "asymptote s_inf is beyond": (TIME, 0.5 - 0.3 * (TIME + 900.0) ** -0.1, (100.0, 1e3)),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_refusals_are_named_and_give_no_number(reason):
    t, values, window = REFUSED[reason]
    fit = fit_relaxation(t, values, window)
    assert reason in fit.refusal
    assert np.isnan([fit.exponent, fit.low, fit.high]).all()
    assert fit.preferred != "power"


def test_an_infinite_value_is_a_refusal_and_a_nan_outside_the_window_is_not():
    values = np.stack([flow_curve(), flow_curve()])
    values[:, 60] = np.inf, -np.inf
    assert fit_relaxation(TIME, values).refusal == "values in the window are not finite"
    values = np.where(TIME < 20.0, np.nan, flow_curve())
    assert fit_relaxation(TIME, values, (20.0, 1e4)).exponent == pytest.approx(0.5, rel=1e-4)


def test_an_interval_that_runs_into_the_edge_is_open():
    _, _, fits = measured.planted_fits(planted.power, 200, Noise(jitter=0.02, memory=0.5), 1)
    opened = [fit for fit in fits if not fit.refusal and fit.high == np.inf]
    assert opened
    assert all(fit.low < fit.exponent < 8.0 for fit in opened)


def test_bounds_are_ordered_and_more_confidence_is_wider():
    curves, scores, fits = measured.planted_fits(planted.power, 40, MIXED, 2)
    wide = fit_relaxations(TIME, scores, [c.window for c in curves], confidence=0.99)
    for a, b in zip(fits, wide, strict=True):
        assert a.refusal or b.low <= a.low < a.exponent < a.high <= b.high
        assert a.exponent == b.exponent or a.refusal


# Invariances and batches


def test_units_of_time_and_score_do_not_matter():
    curve = planted.power(np.random.default_rng(5))
    score = curve.seen(TIME, JITTER, np.random.default_rng(6))
    fit = fit_relaxation(TIME, score, curve.window)
    slower = fit_relaxation(7.0 * TIME, 3.0 * score, 7.0 * np.array(curve.window))
    factor = [1.0, 1.0, 1.0, 7.0, 3.0, 1.0, 1.0]
    np.testing.assert_allclose(numbers(slower), numbers(fit) * factor, rtol=1e-5)
    assert slower.preferred == fit.preferred


def test_a_batch_gives_what_its_curves_give():
    curves, scores, fits = measured.planted_fits(planted.power, 8, JITTER, 9)
    others = [planted.exponential(np.random.default_rng(s)) for s in range(2)]
    scores = np.concatenate([scores, [c.seen(TIME, FAINT, np.random.default_rng(0)) for c in others]])
    bounds = [c.window for c in (*curves, *others)]
    batch = fit_relaxations(TIME, scores, bounds)
    for i, fit in enumerate(batch):
        single = fit_relaxation(TIME, scores[i], bounds[i])
        assert (single.refusal, single.preferred) == (fit.refusal, fit.preferred)
        np.testing.assert_allclose(numbers(single), numbers(fit), rtol=1e-6)
    np.testing.assert_allclose([f.exponent for f in batch[:8]], [f.exponent for f in fits], rtol=1e-6)


def test_replicates_are_averaged_and_time_zero_is_left_out():
    curve = planted.power(np.random.default_rng(5))
    score = curve.seen(TIME, JITTER, np.random.default_rng(6))
    late = curve.window[0] <= TIME
    fit = fit_relaxation(TIME, score, curve.window)
    mean = fit_relaxation(TIME, score.mean(axis=0), curve.window)
    zero = fit_relaxation(np.r_[0.0, TIME[late]], np.c_[score[:, :1], score[:, late]])
    for other in (mean, zero):
        np.testing.assert_allclose(numbers(other), numbers(fit), rtol=1e-6)
        assert (other.probes, other.refusal) == (late.sum(), "")


def test_no_curves_give_no_results():
    assert fit_relaxations(TIME, np.empty((0, TIME.size))) == []
