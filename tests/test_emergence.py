"""`probes.emergence` against planted curves whose level and t50 are known without it."""

import time
from collections import Counter

import numpy as np
import planted
import pytest
from planted import KINDS, QUIET, USUAL, Noise, Planted, observe, probe_steps
from scipy.optimize import isotonic_regression
from scipy.stats import binom

from probes import emergence
from probes.emergence import Emergence, fit_emergence

U = 0.1
STEP = probe_steps()
RISING = (planted.plain, planted.two_step, planted.overshoot, planted.drift, planted.transient)
TIMES = ("level", "level_low", "level_high", "t10", "t50", "t90", "low", "high")


def noiseless(head: Planted, step=STEP):
    return U * head.lift(np.log10(np.maximum(step, 0.5)))


def times(fit: Emergence):
    return np.array([getattr(fit, name) for name in TIMES])


def covers(low: float, high: float, truth: float) -> bool:
    return low <= truth <= high


def honest_band(count: int) -> tuple[float, float]:
    """Where the coverage of `count` true 90% intervals lies in 99 of 100 cases."""
    low, high = binom.interval(0.99, count, 0.9)
    return low / count, high / count


# The truth itself


def test_root_finding_agrees_with_closed_forms():
    gompertz = Planted("g", "emerged", lambda z: 1 + 3 * planted.gompertz(z, 1.5, 0.2), 1.0, 4.0)
    assert gompertz.t50 == pytest.approx(10 ** (1.5 - 0.2 * np.log(np.log(2.0))))
    assert gompertz.level == pytest.approx(10 ** (1.5 - 0.2 * np.log(np.log(3.0))))
    power = Planted("p", "growing", lambda z: 1 + 4 * (1 - (1 + 10.0 ** (z - 2.5)) ** -0.5), 1.0, 5.0)
    assert power.level == pytest.approx(10**2.5 * (0.75**-2 - 1))
    assert power.t50 == pytest.approx(10**2.5 * 3)


@pytest.mark.parametrize("kind", [planted.power_law, planted.late], ids=lambda kind: kind.__name__)
def test_planted_growing_heads_are_away_from_the_threshold(kind):
    for seed in range(40):
        head = kind(np.random.default_rng(seed))
        before, end = head.lift(np.array([planted.LAST - 0.5, planted.LAST]))
        assert (end - before) / (end - head.low) > 0.15


# Status


@pytest.mark.parametrize("noise", [QUIET, USUAL], ids=["quiet", "usual"])
def test_confusion_table(noise):
    count, table = 30, Counter()
    for kind in KINDS:
        rng = np.random.default_rng(7)
        for _ in range(count):
            head = kind(rng)
            table[head.kind, head.status, fit_emergence(STEP, observe(head, STEP, noise, rng), U).status] += 1
    wrong = {key: n for key, n in table.items() if key[1] != key[2]}
    assert sum(wrong.values()) <= 0.02 * count * len(KINDS), wrong
    assert all(n <= 2 for n in wrong.values()), wrong


def test_never_has_no_times():
    fit = fit_emergence(STEP, noiseless(planted.small(np.random.default_rng(0))), U)
    assert fit.status == "never"
    assert np.isnan(times(fit)).all()
    assert fit.lost == 0.0


def test_at_start_has_the_first_probe_as_its_level():
    head = planted.there(np.random.default_rng(0))
    for zero, first in ((False, 1.0), (True, 0.5)):
        step = probe_steps(zero=zero)
        fit = fit_emergence(step, observe(head, step, QUIET, np.random.default_rng(1)), U)
        assert (fit.status, fit.level) == ("at_start", first)
        assert np.isnan([fit.level_low, fit.level_high]).all()


def test_at_start_may_rise_further():
    head = Planted("more", "at_start", lambda z: 1.6 + 3 * planted.gompertz(z, 2.0, 0.15), 1.6, 4.6)
    fit = fit_emergence(STEP, observe(head, STEP, QUIET, np.random.default_rng(0)), U)
    assert fit.status == "at_start"
    assert covers(fit.level_low, fit.level_high, head.level)
    assert covers(fit.low, fit.high, head.t50)


def test_a_rise_that_ends_below_lift_two_has_t50_and_no_level():
    head = Planted("low", "emerged", lambda z: 1 + 0.8 * planted.gompertz(z, 2.0, 0.15), 1.0, 1.8)
    fit = fit_emergence(STEP, observe(head, STEP, QUIET, np.random.default_rng(0)), U)
    assert fit.status == "emerged"
    assert np.isnan([fit.level, fit.level_low, fit.level_high]).all()
    assert covers(fit.low, fit.high, head.t50)


def test_noise_alone_is_no_rise():
    """Over half u of it passes for a rise, unless it is held against its own standard error."""
    head, noise = Planted("noise", "never", lambda z: np.full_like(z, 0.5)), Noise(flat=0.4)
    scores = [observe(head, STEP, noise, np.random.default_rng(seed)) for seed in range(60)]
    table = Counter(fit_emergence(STEP, score, U).status for score in scores)
    assert table["never"] + table["at_start"] == 60
    assert sum(emergence._rise(np.log(STEP), emergence.smooth(s.mean(axis=0))).height > 0.5 * U for s in scores) > 10


def test_peak_does_not_follow_the_noise():
    head, noise = planted.plain(np.random.default_rng(0)), Noise(flat=0.2)
    excess, largest = np.mean([
        (fit_emergence(STEP, score, U).peak / U - head.top, emergence.smooth(score.mean(axis=0)).max() / U - head.top)
        for score in (observe(head, STEP, noise, np.random.default_rng(seed)) for seed in range(40))
    ], axis=0)  # fmt: skip
    assert 0.0 < excess < 0.6 * largest


def test_a_level_that_is_hardly_reached_has_no_upper_bound():
    head = Planted("hardly", "emerged", lambda z: 1 + 1.01 * planted.gompertz(z, 2.0, 0.15), 1.0, 2.01)
    fit = fit_emergence(STEP, observe(head, STEP, Noise(jitter=0.01, spread=0.1), np.random.default_rng(2)), U)
    assert fit.level_low < fit.level < fit.level_high == np.inf


def test_growing_t50_is_a_lower_bound():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        head = planted.power_law(rng)
        fit = fit_emergence(STEP, observe(head, STEP, USUAL, rng), U)
        assert fit.t50 < head.t50


def test_level_does_not_depend_on_when_the_run_stopped_and_t50_does():
    head = planted.power_law(np.random.default_rng(0))
    score = observe(head, STEP, QUIET, np.random.default_rng(0))
    cut = np.searchsorted(STEP, 3 * head.level)
    whole, part = fit_emergence(STEP, score, U), fit_emergence(STEP[:cut], score[:, :cut], U)
    assert part.level == pytest.approx(whole.level, rel=1e-12)
    assert part.t50 < 0.8 * whole.t50


# Times


@pytest.mark.parametrize("kind", [*RISING, planted.dip], ids=lambda kind: kind.__name__)
def test_noiseless_times_lie_within_a_third_of_a_probe_gap(kind):
    gap = np.log(10) / 20
    for seed in range(20):
        head = kind(np.random.default_rng(seed))
        fit = fit_emergence(STEP, noiseless(head), U)
        assert fit.status == head.status
        assert np.log(fit.level / head.level) == pytest.approx(0.0, abs=gap / 3)
        assert np.log(fit.t50 / head.t50) == pytest.approx(0.0, abs=gap / 3)
        assert fit.t10 < fit.t50 < fit.t90
        assert fit.lost == pytest.approx(head.lost, abs=0.03)
        assert fit.baseline == pytest.approx(U * head.low, abs=0.08 * U * (head.top - head.low))


def test_t10_and_t90_of_a_gompertz_curve():
    middle, width = 2.0, 0.2
    fit = fit_emergence(STEP, U * (1 + 4 * planted.gompertz(np.log10(STEP), middle, width)), U)
    for share, time_ in ((0.1, fit.t10), (0.5, fit.t50), (0.9, fit.t90)):
        assert np.log10(time_) == pytest.approx(middle - width * np.log(-np.log(share)), abs=0.015)


def test_crossing_is_that_of_the_isotonic_fit():
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = np.cumsum(rng.uniform(0.05, 0.3, 40))
        curve = np.linspace(0, rng.uniform(0, 3), 40) + rng.standard_normal(40)
        peak_at = curve.argmax()
        fit = isotonic_regression(curve[: peak_at + 1]).x
        height = rng.uniform(fit[0] - 0.1, fit[-1])
        k = int(np.flatnonzero(fit >= height)[0])
        expected = x[0] if k == 0 else np.interp(height, fit[k - 1 : k + 1], x[k - 1 : k + 1])
        got = emergence._isotonic_crossing(x, curve, np.asarray(height), np.asarray(peak_at))
        assert got == pytest.approx(expected, abs=1e-9)


def test_a_batch_gives_what_its_curves_give():
    rng = np.random.default_rng(0)
    x = np.log(STEP)
    curves = np.stack([emergence.smooth(observe(kind(rng), STEP, USUAL, rng, 1)[0]) for kind in KINDS])
    batch = emergence._log_times(x, curves.reshape(3, 4, -1), U, False).reshape(12, -1)
    single = np.stack([emergence._log_times(x, curve, U, False) for curve in curves])
    np.testing.assert_allclose(batch, single, rtol=1e-12)


# Intervals


def planted_fits(kinds, count: int, noise: Noise, replicates: int = 8):
    rng = np.random.default_rng(11)
    for i in range(count):
        head = kinds[i % len(kinds)](rng)
        score = observe(head, STEP, noise, rng, replicates)
        yield head, score, fit_emergence(STEP, score, U)


def percentile_interval(head: Planted, score, rng) -> list[float]:
    """The textbook interval that is too short: quantiles over resampled replicates; low and high of level and t50."""
    picked = rng.integers(0, len(score), size=(200, len(score)))
    curves = emergence.smooth(score[picked].mean(axis=1))
    drawn = emergence._log_times(np.log(STEP), curves, U, head.status == "transient")
    return np.exp(np.quantile(drawn, [0.05, 0.95], axis=0)).T.ravel().tolist()


def test_intervals_cover_nine_in_ten_and_the_percentile_bootstrap_does_not():
    count, rng = 250, np.random.default_rng(3)
    hits, naive = [], []
    for head, score, fit in planted_fits(RISING, count, USUAL):
        hits.append((covers(fit.level_low, fit.level_high, head.level), covers(fit.low, fit.high, head.t50)))
        low, high, low50, high50 = percentile_interval(head, score, rng)
        naive.append((covers(low, high, head.level), covers(low50, high50, head.t50)))
    low, high = honest_band(count)
    level, t50 = np.mean(hits, axis=0)
    assert low <= level <= high
    assert low <= t50 <= high
    assert (np.mean(naive, axis=0) < low).all()


@pytest.mark.parametrize("replicates", [1, 4])
def test_intervals_of_few_replicates_cover_too(replicates):
    """With one replicate only what changes from probe to probe can be seen, so only that is planted."""
    noise = Noise(jitter=0.04, memory=0.2) if replicates == 1 else Noise(spread=0.2, wander=0.1, white=0.15)
    fits = list(planted_fits(RISING, 150, noise, replicates))
    low = honest_band(150)[0]
    assert np.mean([covers(fit.level_low, fit.level_high, head.level) for head, _, fit in fits]) >= low
    assert np.mean([covers(fit.low, fit.high, head.t50) for head, _, fit in fits]) >= low


def test_isotonic_fit_over_a_whole_transient_curve_misses():
    """The wrong estimator, given the right one's interval width, fails the check that the right one passes."""
    count, right, wrong = 100, [], []
    for head, score, fit in planted_fits((planted.transient,), count, USUAL):
        whole = isotonic_regression(emergence.smooth(score.mean(axis=0))).x
        k = int(np.flatnonzero(whole >= 0.5 * (whole[0] + whole[-1]))[0])
        right.append(covers(fit.low, fit.high, head.t50))
        wrong.append(covers(STEP[k] * fit.low / fit.t50, STEP[k] * fit.high / fit.t50, head.t50))
    assert np.mean(right) >= honest_band(count)[0]
    assert np.mean(wrong) < 0.7


def test_jackknife_variance_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).standard_normal((8, 5))
    got = emergence._jackknife_variance(emergence._left_out(values))
    np.testing.assert_allclose(got, values.var(axis=0, ddof=1) / 8)
    assert (emergence._jackknife_variance(emergence._left_out(values[:1])) == 0.0).all()


def test_common_share_tells_jitter_from_replicate_noise():
    head = planted.plain(np.random.default_rng(0))
    for noise, low, high in ((Noise(white=0.2), 0.0, 0.35), (Noise(jitter=0.05), 0.999, 1.0)):
        score = observe(head, STEP, noise, np.random.default_rng(1))
        share = emergence._common_share(emergence._residual(score.mean(axis=0)), emergence._left_out(score))
        assert low <= share <= high


def test_more_confidence_is_a_wider_interval_and_a_seed_repeats_it():
    score = observe(planted.plain(np.random.default_rng(0)), STEP, USUAL, np.random.default_rng(1))
    narrow, wide = (fit_emergence(STEP, score, U, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.t50 == wide.t50 < narrow.high < wide.high
    assert wide == fit_emergence(STEP, score, U, confidence=0.99)
    assert wide.high != fit_emergence(STEP, score, U, confidence=0.99, seed=1).high


# Invariances


@pytest.mark.parametrize("kind", RISING, ids=lambda kind: kind.__name__)
def test_invariances(kind):
    rng = np.random.default_rng(5)
    score = observe(kind(rng), STEP, USUAL, rng)
    fit = fit_emergence(STEP, score, U)
    slower = fit_emergence(17.0 * STEP, score, U)
    np.testing.assert_allclose(times(slower), 17.0 * times(fit), rtol=1e-9)
    louder = fit_emergence(STEP, 3.0 * score, 3.0 * U)
    np.testing.assert_allclose(times(louder), times(fit), rtol=1e-9)
    assert louder.peak == pytest.approx(3.0 * fit.peak)
    shuffled = fit_emergence(STEP, score[::-1], U)
    np.testing.assert_allclose(times(shuffled), times(fit), rtol=1e-9)
    assert fit.status == slower.status == louder.status == shuffled.status


def test_step_zero_moves_nothing_away_from_it():
    head = planted.plain(np.random.default_rng(0))
    score = observe(head, STEP, USUAL, np.random.default_rng(1))
    fit = fit_emergence(STEP, score, U)
    zero = fit_emergence(np.r_[0.0, STEP], np.c_[score[:, :1], score], U)
    np.testing.assert_allclose(times(zero)[[0, 4]], times(fit)[[0, 4]], rtol=0.01)


@pytest.mark.parametrize("shape", [(), (STEP.size,), (8,), (8, STEP.size)], ids=str)
def test_null_may_have_any_of_its_shapes(shape):
    score = observe(planted.plain(np.random.default_rng(0)), STEP, USUAL, np.random.default_rng(1))
    null = U * np.linspace(0.9, 1.1, int(np.prod(shape))).reshape(shape) if shape else U
    np.testing.assert_allclose(times(fit_emergence(STEP, score, null)), times(fit_emergence(STEP, score, U)))


def test_one_replicate_may_drop_its_axis():
    score = observe(planted.plain(np.random.default_rng(0)), STEP, USUAL, np.random.default_rng(1), 1)
    fit = fit_emergence(STEP, score[0], U)
    assert fit == fit_emergence(STEP, score, U)
    assert fit.low < fit.t50 < fit.high


def test_odd_curves_give_a_status_and_no_warning():
    rng = np.random.default_rng(0)
    for count in (8, 9, 15, 40):
        step = np.cumsum(rng.integers(1, 20, count))
        for scale in (0.0, 0.02, 1.0):
            for replicates in (1, 2, 3):
                score = U + scale * rng.standard_normal((replicates, count))
                assert fit_emergence(step, score, U).status in emergence.Status.__args__


# Bad input


GOOD = np.full(10, U)
LATE = np.arange(1.0, 11.0)


@pytest.mark.parametrize(
    ("step", "score", "null", "message"),
    [
        (np.arange(1.0, 8.0), np.ones(7), U, r"step has shape \(7,\); allowed: \[T\] with T >= 8"),
        (LATE[None], GOOD, U, r"step has shape \(1, 10\)"),
        (LATE, GOOD[:-1], U, r"score has shape \(9,\); allowed: \[10\] or \[R, 10\]"),
        (LATE, np.ones((2, 2, 10)), U, r"score has shape \(2, 2, 10\)"),
        (LATE, np.ones((0, 10)), U, r"score has shape \(0, 10\)"),
        (LATE, GOOD, np.ones(3), r"null has shape \(3,\); allowed: \(\), \(10,\), \(1,\), \(1, 10\)"),
        (LATE, np.where(LATE == 4.0, np.nan, GOOD), U, r"score\[3\] is nan; allowed: finite"),
        (LATE, np.where(LATE == 4.0, np.inf, GOOD)[None], U, r"score\[0, 3\] is inf; allowed: finite"),
        (np.where(LATE == 10.0, np.inf, LATE), GOOD, U, r"step\[9\] is inf"),
        (LATE, GOOD, np.nan, r"null is nan; allowed: finite"),
        (LATE - 2.0, GOOD, U, r"step\[0\] is -1; allowed: 0 or more"),
        (np.where(LATE == 4.0, 3.0, LATE), GOOD, U, r"step\[3\] is 3 after 3; allowed: strictly increasing"),
        (LATE[::-1], GOOD, U, r"step\[1\] is 9 after 10"),
        (np.r_[0.0, 0.3, LATE[:8]], GOOD, U, r"step\[1\] is 0.3 after step 0; allowed: above 0.5"),
        (LATE, GOOD, 0.0, r"null contains 0; allowed: numbers above 0"),
        (LATE, GOOD, -GOOD, r"null contains -0.1; allowed: numbers above 0"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_allowed(step, score, null, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_emergence(step, score, null)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("confidence", [0.0, 1.0, float("nan")])
def test_bad_confidence(confidence):
    with pytest.raises(ValueError, match=r"confidence is .*; allowed: a number between 0 and 1"):
        fit_emergence(LATE, GOOD, U, confidence=confidence)


def test_a_fit_takes_milliseconds():
    score = observe(planted.plain(np.random.default_rng(0)), STEP, USUAL, np.random.default_rng(1))
    fit_emergence(STEP, score, U)
    start = time.process_time()
    for _ in range(20):
        fit_emergence(STEP, score, U)
    assert (time.process_time() - start) / 20 < 0.03  # 0.005 on an idle core
