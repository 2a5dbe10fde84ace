"""`probes.degree` on gradient flows of known degree, and where its assumptions fail."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, linregress

import tests.planted_relaxation_coverage as measured
from probes.degree import (
    Degree,
    degree_from_gradient,
    degree_from_line,
    degree_from_loss,
    degree_from_profile,
    degree_from_score,
    drift,
    line_points,
)
from probes.llc import LLCSettings, estimate_llcs
from probes.relaxation import fit_relaxation
from tests.planted_losses import at_origin, expected, power
from tests.planted_relaxation import Flow, probe_times

TIME = probe_times(10.0, 1e5)
SIDE = np.geomspace(0.01, 1.0, 20)
LINE = np.r_[0.0, SIDE, -SIDE]
DEGREES = [3.0, 4.0, 6.0, 8.0]


def holds(degree: Degree, k: float, rel: float = 1e-3) -> bool:
    assert degree.refusal == ""
    assert degree.low <= degree.k <= degree.high
    return degree.k == pytest.approx(k, rel=rel)


# Truth


@pytest.mark.parametrize("k", DEGREES)
def test_every_route_gives_the_degree_where_its_assumption_holds(k):
    flow = Flow(k, 0.01)
    loss, gradient = 0.3 + flow.loss(TIME), flow.gradient(TIME)
    assert holds(degree_from_loss(fit_relaxation(TIME, loss)), k)
    assert holds(degree_from_gradient(loss, gradient), k)
    assert holds(degree_from_gradient(loss, gradient, 0.3), k)
    assert holds(degree_from_profile(LINE, 0.3 + 2.0 * np.abs(LINE) ** k), k, 3e-3)
    score = degree_from_score(fit_relaxation(TIME, 0.5 - 0.3 * flow.x(TIME)))
    assert "linear in x" in score.assumption
    if k < 8.0:
        assert holds(score, k)
    else:
        assert "0.65 decades, under 0.7" in score.refusal


def test_a_score_that_is_not_linear_gives_three_for_four_and_the_drift_agrees():
    flow = Flow(4.0, 0.01)
    score = 0.5 - 0.3 * flow.x(TIME) ** 2
    fit = fit_relaxation(TIME, score)
    assert holds(degree_from_score(fit), 3.0)
    check = drift(TIME, score, fit)
    assert check.slope + 1.0 == pytest.approx(3.0, abs=0.01)
    assert check.expected == pytest.approx(2.0, rel=1e-4)
    assert holds(degree_from_loss(fit_relaxation(TIME, 0.3 + flow.loss(TIME))), 4.0)
    assert holds(degree_from_gradient(0.3 + flow.loss(TIME), flow.gradient(TIME)), 4.0)


def test_degree_two_is_exponential_and_has_no_exponent():
    flow = Flow(2.0, 1e-3)
    fit = fit_relaxation(TIME, 0.3 + flow.loss(TIME))
    assert degree_from_loss(fit).refusal == "the approach is exponential, as for k = 2"
    loss = flow.loss(TIME[TIME < 5e3])
    assert holds(degree_from_gradient(0.3 + loss, flow.gradient(TIME[TIME < 5e3])), 2.0)


def test_the_gradient_route_does_not_mind_the_optimiser():
    """A trajectory with a rate of its own at every step: no power law in time, and still 4."""
    rng, x, seen = np.random.default_rng(0), 1.0, []
    for _ in range(3000):
        seen.append(x)
        x -= 0.02 * rng.uniform(0.0, 2.0) * np.sqrt(4.0 * x**3) * (1.0 if x > 0.1 else 0.2)
    x = np.array(seen)[::40]
    assert holds(degree_from_gradient(0.3 + x**4, 4.0 * x**3), 4.0)


def test_an_end_that_is_read_off_gives_another_degree():
    """The wrong estimator: the end of the loss taken to be the last loss seen."""
    flow = Flow(4.0, 0.01)
    loss, gradient = 0.3 + flow.loss(TIME[:40]), flow.gradient(TIME[:40])
    theta = linregress(np.log(loss[:-1] - loss[-1]), np.log(gradient[:-1])).slope
    assert abs(1.0 / (1.0 - theta) - 4.0) > 0.5
    assert holds(degree_from_gradient(loss, gradient), 4.0)


# Intervals


def test_intervals_cover_nine_in_ten():
    found = measured.degree_coverage(120, seed=5)
    for name in ("degree, loss gap", "degree, gradient slope"):
        covered, given = found[name]
        low, high = binom.interval(0.99, given, 0.9)
        assert given >= 100
        assert low <= covered <= high, name


def test_intervals_of_the_profile_cover_nine_in_ten():
    rng, hits = np.random.default_rng(6), 0
    for _ in range(200):
        k = rng.uniform(2.0, 6.0)
        loss = 0.3 + np.abs(LINE) ** k * np.exp(0.1 * rng.standard_normal(LINE.size))
        degree = degree_from_profile(LINE, loss)
        hits += degree.low <= k <= degree.high
    low, high = binom.interval(0.99, 200, 0.9)
    assert low <= hits <= high


def test_ends_of_the_exponents_interval_become_ends_of_the_degrees():
    flow, rng = Flow(4.0, 0.01), np.random.default_rng(0)
    noise = 1.0 + 0.002 * rng.standard_normal(TIME.size)
    fit = fit_relaxation(TIME, (0.3 + 100.0 * flow.loss(TIME)) * noise)
    degree = degree_from_loss(fit)
    b = np.array([fit.high, fit.exponent, fit.low])
    np.testing.assert_allclose([degree.low, degree.k, degree.high], 2 * b / (b - 1))
    assert degree.low < 4.0 < degree.high


# Refusals


def test_refusals_are_named_and_give_no_number():
    flow = Flow(4.0, 0.01)
    loss, gradient = 0.3 + flow.loss(TIME), flow.gradient(TIME)
    score = degree_from_score(fit_relaxation(TIME, np.full(TIME.size, 0.5)))
    slow = degree_from_loss(fit_relaxation(TIME, 0.3 + 0.2 * TIME**-0.5))
    bent = degree_from_profile(LINE, 0.01 * LINE**2 + LINE**4)
    cases = {
        "constant": score,
        "is that of no degree": slow,
        "no single degree": bent,
        "not least at x = 0": degree_from_profile(LINE, -np.abs(LINE)),
        "7 points above the floor": degree_from_profile(LINE[:8], np.abs(LINE[:8])),
        "decades of |x|, under 1": degree_from_profile(np.linspace(0.0, 1.0, 10), np.linspace(0.0, 1.0, 10) ** 4),
        "decades of L - end, under 1": degree_from_gradient(loss[:8], gradient[:8], 0.0),
        "points above the end": degree_from_gradient(loss, gradient, float(loss[5])),
        "7 points, under 8": degree_from_gradient(loss[:7], gradient[:7]),
        "a gradient is 0": degree_from_gradient(loss, 0.0 * gradient),
        "not finite": degree_from_gradient(np.where(loss > 0.301, np.nan, loss), gradient),
        "upper edge": degree_from_gradient(np.geomspace(1e-15, 1, 40), np.geomspace(1e-15, 1, 40) ** 0.75),
        "lower edge": degree_from_gradient(loss, np.exp(50.0 * loss)),
        "slope": degree_from_gradient(loss, (loss - 0.3) ** 1.5, 0.3),
    }
    for reason, degree in cases.items():
        assert reason in degree.refusal
        assert np.isnan([degree.k, degree.low, degree.high]).all()
        assert degree.assumption


def test_a_drift_of_a_refused_fit_is_refused():
    check = drift(TIME, np.full(TIME.size, 0.5), fit_relaxation(TIME, np.full(TIME.size, 0.5)))
    assert "constant" in check.refusal
    assert np.isnan([check.slope, check.expected]).all()


def test_a_drift_leaves_out_blocks_without_a_probe():
    flow = Flow(4.0, 0.01)
    times = np.delete(TIME, np.flatnonzero((TIME > 400.0) & (TIME < 2000.0)))
    score = 0.5 - 0.3 * flow.x(times)
    check = drift(times, score, fit_relaxation(times, score))
    assert check.refusal == ""
    assert check.slope == pytest.approx(check.expected, rel=0.05)


@pytest.mark.parametrize(("window", "reason"), [
    ((2e5, 3e5), "no probe in the window"),
    ((1e4, 1.2e4), "within a quarter decade"),
])  # fmt: skip
def test_a_drift_over_too_short_a_window_is_refused(window, reason):
    score = 0.5 - 0.3 * Flow(4.0, 0.01).x(TIME)
    check = drift(TIME, score, fit_relaxation(TIME, score), window)
    assert reason in check.refusal
    assert np.isnan(check.slope)
    assert np.isfinite(check.expected)


@pytest.mark.parametrize(("loss", "end", "reason"), [
    (np.full(20, 0.5), None, "the loss is constant"),
    (np.repeat([0.5, 0.1], 10), 0.3, "the loss is constant above the end"),
    (np.repeat([0.5, 0.1], [1, 19]), 0.3, "1 point above the end, under 8"),
])  # fmt: skip
def test_a_loss_of_one_value_is_refused_without_a_warning(loss, end, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert degree_from_gradient(loss, np.linspace(1.0, 2.0, 20), end).refusal == reason


def test_points_under_the_floor_are_left_out():
    loss = 0.3 + np.abs(LINE) ** 4 + np.where(np.abs(LINE) < 0.05, 1e-7 * (LINE != 0.0), 0.0)
    assert "no single degree" in degree_from_profile(LINE, loss).refusal
    assert holds(degree_from_profile(LINE, loss, floor=1e-5), 4.0, 2e-3)
    assert holds(degree_from_profile(LINE[:21], loss[:21], floor=1e-5), 4.0, 2e-3)
    assert holds(degree_from_profile(LINE[np.r_[0, 21:41]], loss[np.r_[0, 21:41]], floor=1e-5), 4.0, 2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: degree_from_gradient([[1.0]], [1.0]), r"loss has shape \(1, 1\); allowed: \[T\]"),
        (lambda: degree_from_gradient([1.0, 2.0], [1.0]), r"gradient has shape \(1,\); allowed: \(2,\), as loss has"),
        (lambda: degree_from_gradient([1.0], [1.0], confidence=0.0), r"confidence is 0.0; allowed"),
        (lambda: degree_from_profile([1.0], [1.0]), r"x holds 0 0 times; allowed: finite numbers, 0 once"),
        (lambda: degree_from_profile([0.0], [1.0], floor=-1.0), r"floor is -1; allowed: 0 or more"),
        (
            lambda: degree_from_profile([0.0, 1.0], [[1.0, 2.0]]),
            r"loss has shape \(1, 2\); allowed: \[P\], or",
        ),
        (lambda: degree_from_profile([-2.0, 0.0, 1.0], [1.0, 0.0, 1.0]), r"x has two sides that differ; allowed: one"),
        (
            lambda: degree_from_line([-1.0, 0.0, 1.0], [1.0, 0.0, 1.0], 1.0, 1.0),
            r"x is 3 points; allowed: those of",
        ),
        (lambda: degree_from_line(line_points(1.0), line_points(1.0), 1.0, 0.0), r"n_beta, gamma are 1, 0; allowed"),
        (lambda: drift([1.0, 2.0], [1.0], fit_relaxation(TIME, TIME)), r"value has shape \(1,\); allowed: \[2\]"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Trained by steps: each route right where its assumption holds, and wrong or refused where it does not


U = 0.01
STEPS = 40_000
SEEN = np.unique(np.round(np.geomspace(100, STEPS, 70))).astype(int)


def descend(k, rate, jitter=0.1, steps=STEPS):
    """x of SGD from 1 on c_b |x|^k, whose c_b is U (1 +- jitter) from step to step; rate: of a step, by its number."""
    signs, x, seen = np.random.default_rng(0).choice([-1.0, 1.0], steps), 1.0, [1.0]
    for step in range(steps):
        x -= rate(step) * (1.0 + jitter * signs[step]) * k * U * np.sign(x) * abs(x) ** (k - 1.0)
        seen.append(x)
    return np.array(seen)


def adam(k, rate=1e-3, steps=4_000):
    """x of Adam from 1 on U |x|^k."""
    x, m, v, seen = 1.0, 0.0, 0.0, [1.0]
    for step in range(1, steps + 1):
        g = k * U * np.sign(x) * abs(x) ** (k - 1.0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= rate * m / (1.0 - 0.9**step) / (np.sqrt(v / (1.0 - 0.999**step)) + 1e-8)
        seen.append(x)
    return np.array(seen)


def about(degree, k, rel):
    return degree.refusal == "" and degree.k == pytest.approx(k, rel=rel)


@pytest.mark.parametrize("k", [3.0, 4.0, 6.0])
def test_steps_of_sgd_are_a_flow_in_cumulative_learning_rate(k):
    x = np.abs(descend(k, lambda step: 1.0)[SEEN])
    loss, gradient, time = U * x**k, k * U * x ** (k - 1.0), SEEN.astype(float)
    assert about(degree_from_loss(fit_relaxation(time, 0.3 + loss)), k, 0.03)
    assert about(degree_from_gradient(0.3 + loss, gradient), k, 0.01)
    linear = degree_from_score(fit_relaxation(time, 0.5 - 0.3 * x))
    if k < 6.0:
        assert about(linear, k, 0.01)
    else:
        assert "decades" in linear.refusal
    squared = degree_from_score(fit_relaxation(time, 0.5 - 0.3 * x**2))
    assert about(squared, 2.0 + (k - 2.0) / 2.0, 0.01)
    assert not squared.low <= k <= squared.high


@pytest.mark.parametrize("k", [3.0, 6.0])
def test_a_quadratic_score_of_a_flow_gives_half_the_excess_over_two(k):
    squared = degree_from_score(fit_relaxation(TIME, 0.5 - 0.3 * Flow(k, U).x(TIME) ** 2))
    assert about(squared, 2.0 + (k - 2.0) / 2.0, 1e-3)


def test_degree_two_has_no_power_law_by_steps_either():
    x = np.abs(descend(2.0, lambda step: 1.0, steps=600))
    time = np.arange(5.0, 600.0, 5.0)
    x = x[time.astype(int)]
    for curve in (0.3 + U * x**2, 0.5 - 0.3 * x, 0.5 - 0.3 * x**2):
        assert degree_from_loss(fit_relaxation(time, curve)).refusal
        assert degree_from_score(fit_relaxation(time, curve)).refusal
    assert about(degree_from_gradient(U * x**2, 2.0 * U * x, 0.0), 2.0, 1e-6)


def test_the_loss_gap_asks_for_cumulative_learning_rate_and_not_for_steps():
    def rate(step):
        return (1.0 + step / 100.0) ** -0.5

    x = np.abs(descend(4.0, rate, jitter=0.0)[SEEN])
    passed = np.cumsum(rate(np.arange(STEPS)))[SEEN - 1]
    loss, gradient = 0.3 + U * x**4, 4.0 * U * x**3
    assert about(degree_from_loss(fit_relaxation(passed, loss)), 4.0, 0.03)
    by_step = degree_from_loss(fit_relaxation(SEEN.astype(float), loss))
    assert by_step.refusal == ""
    assert by_step.low > 5.0
    assert about(degree_from_gradient(loss, gradient), 4.0, 1e-3)


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0, 6.0])
def test_under_adam_only_the_routes_without_dynamics_hold(k):
    seen = np.unique(np.round(np.geomspace(10, 4000, 70))).astype(int)
    x = np.abs(adam(k)[seen])
    loss, gradient, time = U * x**k, k * U * x ** (k - 1.0), seen.astype(float)
    dynamic = [degree_from_loss(fit_relaxation(time, 0.3 + loss))]
    dynamic += [degree_from_score(fit_relaxation(time, 0.5 - 0.3 * x**p)) for p in (1, 2)]
    for degree in dynamic:
        assert degree.refusal or not degree.low <= k <= degree.high
    assert about(degree_from_gradient(loss, gradient, 0.0), k, 1e-6)
    assert about(degree_from_profile(LINE, 0.3 + U * np.abs(LINE) ** k), k, 1e-4)


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0, 6.0])
def test_a_profile_about_a_point_that_has_not_arrived_is_refused(k):
    assert "not least at x = 0" in degree_from_profile(LINE, np.abs(LINE + 0.1) ** k).refusal


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_the_coefficient_along_the_line_tends_to_one_over_k(k):
    """u |x|^k whose density at n_beta 1000 is 0.1 wide: at gamma 0.3 the coefficient is 1/k, at 1000 it is not."""
    target = at_origin(power(k), 1, (10.0**k / 1000.0,))
    settings = LLCSettings(
        n_beta=1000.0, gamma=0.3, step_size=1.5e-4, chains=1536, draws=400, burn_in=300, sensitivity=False,
        check_every=0,
    )  # fmt: skip
    (free,) = estimate_llcs(target, [0], settings)
    (held,) = estimate_llcs(target, [0], replace(settings, gamma=1000.0, step_size=5e-5))
    assert free.mean == pytest.approx(1.0 / k, abs=max(0.04 / k, 3.0 * free.sd / 1536**0.5))
    assert free.sd / 1536**0.5 < 0.03 / k
    assert expected(power(k), 1, 10.0**k, 0.3) == pytest.approx(1.0 / k, rel=0.005)
    truth = expected(power(k), 1, 10.0**k, 1000.0)
    assert truth < 0.2 / k
    assert held.mean == pytest.approx(truth, abs=max(0.03 * truth, 3.0 * held.sd / 1536**0.5))


# Along a line, from the losses of examples


def examples(k, n, slope=0.0, curvature=0.0, seed=0, x=LINE):
    """`[n, P]`: |x|^k of different size by example, with slopes and curvatures that are 0 in the mean."""
    size, tilt, bend = np.random.default_rng(seed).standard_normal((3, n, 1))
    return 0.3 + (1.0 + 0.2 * size) * np.abs(x) ** k + slope * tilt * x + curvature * bend * x**2


@pytest.mark.parametrize("k", [3.0, 4.0, 6.0])
def test_slopes_that_are_noise_do_not_bend_a_profile(k):
    """Examples have slopes of their own; their mean is under 2 standard errors of 0, and odd, so it takes no part."""
    losses = examples(k, 64, slope=0.01)
    plain = linregress(np.log(SIDE), np.log(np.abs(losses.mean(axis=0)[1:21] - losses.mean(axis=0)[0]))).slope
    assert abs(plain - k) > 0.1
    assert holds(degree_from_profile(LINE, losses, floor=1e-12), k)
    tilted = degree_from_profile(LINE, losses + 0.01 * LINE)
    assert tilted.refusal == "the loss is not least at x = 0"


def test_intervals_of_the_profile_cover_the_scatter_of_examples_too():
    """Those of the mean loss alone do not: a curvature that is noise bends the whole line one way."""
    found = []
    for seed in range(200):
        losses = examples(4.0, 40, 0.001, 0.003, seed)
        own = degree_from_profile(LINE, losses)
        gaps = 0.5 * (losses[:, 1:21] + losses[:, 21:]) - losses[:, :1]
        mean, error = gaps.mean(axis=0), gaps.std(axis=0) / 40**0.5
        seen = mean > 2.0 * error
        alone = degree_from_profile(np.r_[0.0, SIDE[seen]], np.r_[0.0, mean[seen]])
        if not (own.refusal or alone.refusal):
            found.append([degree.low <= 4.0 <= degree.high for degree in (own, alone)])
    assert len(found) > 120
    covered, alone = np.sum(found, axis=0)
    low, _ = binom.interval(0.99, len(found), 0.9)
    assert alone < low <= covered


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0, 6.0])
def test_the_coefficient_along_a_line_by_quadrature(k):
    """u |x|^k at u n_beta = 10^k: as the exact expectations at gamma and a third of it say; its interval holds k."""
    for gamma, rel in ((0.3, 1e-3), (4.0, 0.02)):
        x = line_points(gamma)
        found = degree_from_line(x, 0.3 + 0.01 * np.abs(x) ** k, 100.0 * 10.0**k, gamma)
        assert holds(found, k, rel)
        assert found.low < k < found.high
        near, own = (expected(power(k), 1, 10.0**k, at) for at in (gamma / 3.0, gamma))
        assert 1.0 / found.k == pytest.approx(1.5 * near - 0.5 * own, rel=1e-3)
        scaled = degree_from_line(x, 0.3 + 0.02 * np.abs(x) ** k, 100.0 * 10.0**k, gamma, scale=0.5)
        assert scaled.k == pytest.approx(found.k, rel=1e-6)
    assert abs(1.0 / own - k) > 5.0 * abs(found.k - k)  # what is read off at one gamma is far off


def test_a_coefficient_along_a_line_is_refused_where_it_is_no_degree():
    x = line_points(100.0)
    curved = 0.5 * 1000.0 * x**2
    assert degree_from_line(x, curved, 100.0, 100.0).k == pytest.approx(2.0, rel=1e-2)
    cases = {
        "depends on the settings: -": degree_from_line(x, curved / 1000.0, 100.0, 100.0),
        "the slope at the point changes the coefficient by -": degree_from_line(x, curved + 2.0 * x, 100.0, 100.0),
        "is not above 0": degree_from_line(x, 0.2 * x, 100.0, 100.0),
        "loss is not finite": degree_from_line(x, np.where(x > 0.1, np.inf, curved), 100.0, 100.0),
        "is above 1/2": degree_from_line(x, np.abs(x), 300.0, 100.0),
        "narrower than the points": degree_from_line(x, np.abs(x), 1e5, 100.0),
    }
    for reason, degree in cases.items():
        assert reason in degree.refusal
        assert np.isnan([degree.k, degree.low, degree.high]).all()


def test_intervals_of_the_coefficient_along_a_line_cover_the_scatter_of_examples():
    """Curvatures h that scatter; at one gamma the coefficient is n_beta h / (n_beta h + gamma) / 2, not 1/2."""
    x, n, hits, spread = line_points(100.0), 48, 0, []
    rng = np.random.default_rng(3)
    for _ in range(200):
        curvature = 20.0 + 20.0 * rng.standard_normal((n, 1))
        degree = degree_from_line(x, 0.5 * curvature * x**2, 100.0, 100.0)
        hits += degree.low <= 2.0 <= degree.high
        spread.append(degree.k)
    assert hits >= 190
    assert np.std(spread) > 1e-4
