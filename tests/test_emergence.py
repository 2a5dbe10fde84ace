"""`probes.emergence` against planted curves whose level and t50 are known without it."""

from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest
import ruptures
from scipy.optimize import isotonic_regression
from scipy.signal import savgol_filter
from scipy.stats import binom

from probes import emergence
from probes.emergence import Emergence, fit_emergence, fit_emergences
from tests import planted
from tests.planted import KINDS, QUIET, RISING, USUAL, Noise, Planted, observe, probe_steps
from tests.planted_emergence_coverage import STEP, U, confusion, coverage, holds, planted_scores, share_right

NOISES = {name: getattr(planted, name) for name in ("QUIET", "USUAL", "MULTIPLICATIVE", "AUTOCORRELATED", "ADDITIVE")}
TIMES = ("level", "level_low", "level_high", "t10", "t50", "t90", "low", "high")


def noiseless(head: Planted, step=STEP):
    return U * head.lift(np.log10(np.maximum(step, 0.5)))


def times(fit: Emergence):
    return np.array([getattr(fit, name) for name in TIMES])


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


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_confusion_table(noise):
    table = confusion(30, noise, seed=7)
    wrong = {key: n for key, n in table.items() if key[1] != key[2]}
    assert share_right(table) >= 0.98, wrong
    assert all(n <= 3 for n in wrong.values()), wrong


@pytest.mark.parametrize("score", [0.0, 0.3 * U, U, 0.7, 1e-300, 1e6])
@pytest.mark.parametrize("replicates", [1, 8])
def test_a_constant_curve_never_rises(score, replicates):
    fit = fit_emergence(STEP, np.full((replicates, STEP.size), score), U)
    assert fit.status == ("at_start" if score >= 1.5 * U else "never")
    assert np.isnan([fit.t10, fit.t50, fit.t90, fit.low, fit.high]).all()
    assert fit.level == 1.0 if score >= 2.0 * U else np.isnan(fit.level)


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
    assert holds(fit.level_low, fit.level_high, head.level)
    assert holds(fit.low, fit.high, head.t50)


def test_a_rise_that_ends_below_lift_two_has_t50_and_no_level():
    head = Planted("low", "emerged", lambda z: 1 + 0.8 * planted.gompertz(z, 2.0, 0.15), 1.0, 1.8)
    fit = fit_emergence(STEP, observe(head, STEP, QUIET, np.random.default_rng(0)), U)
    assert fit.status == "emerged"
    assert np.isnan([fit.level, fit.level_low, fit.level_high]).all()
    assert holds(fit.low, fit.high, head.t50)


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
        sums = emergence._up_to(emergence._sums(curve), np.asarray(peak_at))
        got = emergence._isotonic_crossing(x, sums, np.asarray(height))
        assert got == pytest.approx(expected, abs=1e-9)


def test_a_batch_gives_what_its_curves_give():
    rng = np.random.default_rng(0)
    x = np.log(STEP)
    curves = np.stack([emergence.smooth(observe(kind(rng), STEP, USUAL, rng, 1)[0]) for kind in KINDS])
    batch = emergence._log_times(x, curves.reshape(1, len(KINDS), -1), U, False)[0]
    single = np.stack([emergence._log_times(x, curve, U, False) for curve in curves])
    np.testing.assert_allclose(batch, single, rtol=1e-12)


# Intervals


def test_intervals_cover_nine_in_ten_and_those_of_wrong_estimators_do_not():
    """Wrong: percentiles over resampled replicates; the isotonic fit over a whole transient curve."""
    table = coverage(200, seed=11)
    low, high = honest_band(200)
    share = {name: hits / count for name, (hits, count) in table.items()}
    for name in ("level", "t50", "t50 of transient curves"):
        assert low <= share[name] <= high, share
        assert share[f"{name}: refused"] == 0.0
    wrong = [value for name, value in share.items() if name.endswith("wrong)")]
    assert len(wrong) == 3
    assert max(wrong) < low, share
    assert share["t50 of transient curves (isotonic over all, wrong)"] < 0.7


@pytest.mark.parametrize("replicates", [1, 4])
def test_intervals_of_few_replicates_cover_too(replicates):
    """With one replicate only what changes from probe to probe can be seen, so only that is planted."""
    noise = Noise(jitter=0.04, memory=0.2) if replicates == 1 else Noise(spread=0.2, wander=0.1, white=0.15)
    heads, scores = planted_scores(RISING, 150, noise, 11, replicates)
    fits, low = fit_emergences(STEP, scores, U), honest_band(150)[0]
    of_level = [holds(fit.level_low, fit.level_high, head.level) for head, fit in zip(heads, fits, strict=True)]
    of_t50 = [holds(fit.low, fit.high, head.t50) for head, fit in zip(heads, fits, strict=True)]
    assert min(np.mean(of_level), np.mean(of_t50)) >= low


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


# Many curves at once


def same(fit: Emergence, other: Emergence) -> bool:
    """To the last bit, where nan is nan."""
    return all(a == b or (a != a and b != b) for a, b in zip(astuple(fit), astuple(other), strict=True))


def company(replicates: int = 8, noise: Noise = USUAL, count: int = 2 * len(KINDS)):
    return planted_scores(KINDS, count, noise, 3, replicates)[1]


@pytest.mark.parametrize("replicates", [1, 2, 8])
@pytest.mark.parametrize("noise", [USUAL, planted.LOUD, Noise()], ids=["usual", "loud", "none"])
def test_a_curve_is_fitted_alone_as_in_company(replicates, noise):
    scores = company(replicates, noise)
    together = fit_emergences(STEP, scores, U)
    assert len({fit.status for fit in together}) == 5
    assert all(same(fit, fit_emergence(STEP, score, U)) for fit, score in zip(together, scores, strict=True))


@pytest.mark.parametrize("draws_at_once", [1, 2**15, 2**22])
def test_neither_order_nor_chunks_nor_memory_layout_matter(draws_at_once, monkeypatch):
    scores = company()
    expected = fit_emergences(STEP, scores, U)
    monkeypatch.setattr(emergence, "CHUNK", draws_at_once)
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = fit_emergences(STEP, scores[order], U)
    assert all(same(shuffled[i], expected[j]) for i, j in enumerate(order))
    strided = fit_emergences(STEP, np.asfortranarray(scores), U)
    assert all(same(a, b) for a, b in zip(strided, expected, strict=True))
    assert same(fit_emergence(STEP, np.asfortranarray(scores[0]), U), expected[0])


def test_unsound_replicates_count_as_if_they_were_not_there():
    scores, rng = company(), np.random.default_rng(0)
    nulls = U * rng.uniform(0.9, 1.1, scores.shape)
    sound = rng.random(scores.shape[:2]) < 0.6
    sound[:, 0] = True
    some = np.where(sound[..., None], scores, np.nan), np.where(sound[..., None], nulls, -1.0)
    for null in (some[1], some[1][..., 0]):
        fits = fit_emergences(STEP, some[0], null, sound=sound)
        alone = [fit_emergence(STEP, scores[i, use], null[i, use]) for i, use in enumerate(sound)]
        assert len(set(sound.sum(axis=1).tolist())) > 3
        assert all(same(a, b) for a, b in zip(fits, alone, strict=True))
    assert not same(fits[0], fit_emergence(STEP, scores[0], U))


def test_nulls_may_have_any_of_their_shapes():
    scores, spread = company(), np.linspace(0.9, 1.1, 8 * STEP.size)
    n = len(scores)
    own = U * (1.0 + 0.01 * np.arange(n))
    expected = [fit_emergence(STEP, score, u) for score, u in zip(scores, own, strict=True)]
    for nulls in (own, np.outer(own, spread[:8] / spread[:8].mean()), np.outer(own, spread).reshape(n, 8, -1)):
        for fit, one in zip(fit_emergences(STEP, scores, nulls), expected, strict=True):
            assert fit.status == one.status
            np.testing.assert_allclose(times(fit), times(one), rtol=1e-9)
    flat = scores.mean(axis=1)
    for nulls in (own, own[:, None], np.repeat(own[:, None], STEP.size, axis=1)):
        for fit, score, u in zip(fit_emergences(STEP, flat, nulls), flat, own, strict=True):
            np.testing.assert_allclose(times(fit), times(fit_emergence(STEP, score, u)), rtol=1e-9)


def test_no_curves_give_no_fits():
    assert fit_emergences(STEP, np.empty((0, 8, STEP.size)), U) == []


def test_seed_and_confidence_reach_every_curve():
    scores = company()
    fits = fit_emergences(STEP, scores, U, confidence=0.5, seed=4)
    assert all(
        same(fit, fit_emergence(STEP, score, U, confidence=0.5, seed=4))
        for fit, score in zip(fits, scores, strict=True)
    )


@pytest.mark.parametrize("count", [8, 9, 15, 40])
def test_residuals_are_those_of_the_savitzky_golay_filter(count):
    curves = np.random.default_rng(0).standard_normal((3, 2, count))
    window = min(15, count - 1) // 2 * 2 + 1
    np.testing.assert_allclose(emergence._residual(curves), curves - savgol_filter(curves, window, 2), atol=1e-12)


# Beside change points


def break_at(curve, jump: int, search=ruptures.Dynp) -> int:
    """The one change of mean that `ruptures` finds: the first probe after it."""
    return search(model="l2", jump=jump, min_size=2).fit(curve).predict(n_bkps=1)[0]


def sharp_steps(count: int):
    """Scores of heads that jump from one probe to the next, and the first probe after the jump."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        k, rise = int(rng.integers(15, STEP.size - 15)), rng.uniform(2.0, 4.0)
        head = Planted("sharp", "emerged", lambda z, k=k, rise=rise: 1.0 + rise * (z > np.log10(STEP[k]) - 1e-9))
        yield k, observe(head, STEP, QUIET, rng)


@pytest.mark.parametrize("search", [ruptures.Dynp, ruptures.Binseg], ids=["optimal", "binary"])
def test_a_sharp_step_is_where_ruptures_finds_it_but_for_its_default_jump(search):
    moved = []
    for k, score in sharp_steps(40):
        curve, fit = score.mean(axis=0), fit_emergence(STEP, score, U)
        assert break_at(curve, 1, search) == k
        assert STEP[k - 1] < fit.t50 < STEP[k]
        assert STEP[k - 2] <= fit.t10 < fit.t90 <= STEP[k + 1]
        moved.append(abs(break_at(curve, 5, search) - k))
    assert np.mean(np.array(moved) > 0) > 0.6  # 0.8 of all places are no multiple of 5
    assert max(moved) == 2


def test_a_change_of_mean_is_no_half_rise():
    """It makes the variance on both sides least: for two-step and transient curves that is elsewhere."""
    heads, scores = planted_scores(RISING, 50, USUAL, 5)
    x, errors = np.log(STEP), []
    for head, score, fit in zip(heads, scores, fit_emergences(STEP, scores, U), strict=True):
        k, rough = (break_at(score.mean(axis=0), jump) for jump in (1, 5))
        places = np.log(fit.t50), 0.5 * (x[k - 1] + x[k]), 0.5 * (x[rough - 1] + x[rough])
        errors.append(np.abs(np.array(places) - np.log(head.t50)))
    ours, theirs, default = np.mean(np.array(errors), axis=0)
    assert ours < 0.03
    assert theirs > 4.0 * ours
    assert default > 1.2 * theirs


@pytest.mark.parametrize("noise", [planted.AUTOCORRELATED, planted.ADDITIVE], ids=["multiplicative", "additive"])
def test_penalised_change_points_see_changes_where_nothing_changes(noise):
    """Pelt with the penalty of BIC takes noise that lasts from probe to probe for changes."""
    _, scores = planted_scores((planted.constant,), 60, noise, 9)
    assert {fit.status for fit in fit_emergences(STEP, scores, U)} == {"never"}
    false = []
    for curve in scores.mean(axis=1):
        penalty = 2.0 * 0.5 * np.diff(curve).var() * np.log(STEP.size)
        false.append(len(ruptures.Pelt(model="l2", jump=1, min_size=2).fit(curve).predict(pen=penalty)) > 1)
    assert np.mean(false) > 0.8


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


MANY = np.full((3, 2, 10), U)


@pytest.mark.parametrize(
    ("scores", "nulls", "sound", "message"),
    [
        (GOOD, U, None, r"scores has shape \(10,\); allowed: \[n, 10\] or \[n, R, 10\], as step has 10"),
        (MANY[..., 1:], U, None, r"scores has shape \(3, 2, 9\)"),
        (MANY[:, :0], U, None, r"scores has shape \(3, 0, 10\)"),
        (MANY, MANY[:, 0], None, r"nulls has shape \(3, 10\); allowed: \(\), \(3,\), \(3, 2\), \(3, 2, 10\)"),
        (MANY, MANY[0], None, r"nulls has shape \(2, 10\)"),
        (MANY[:, 0], MANY[:, :, 0], None, r"nulls has shape \(3, 2\); allowed: \(\), \(3,\), \(3, 1\), \(3, 10\)"),
        (np.where(np.arange(10) == 9, np.inf, MANY), U, None, r"scores\[0, 0, 9\] is inf; allowed: finite"),
        (MANY[:, 0] * np.array([[1.0], [1.0], [np.nan]]), U, None, r"scores\[2, 0\] is nan"),
        (MANY, np.array([U, np.nan, U]), None, r"nulls\[1\] is nan"),
        (MANY, -MANY, None, r"nulls contains -0.1; allowed: numbers above 0"),
        (MANY, U, np.ones((3, 3), bool), r"sound is bool of shape \(3, 3\); allowed: bool of shape \(3, 2\)"),
        (MANY, U, np.ones((3, 2)), r"sound is float64 of shape \(3, 2\)"),
        (MANY, U, np.eye(3, 2) > 0, r"sound\[2\] is False throughout; allowed: at least one sound replicate"),
    ],
)
def test_bad_input_of_many_curves(scores, nulls, sound, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_emergences(LATE, scores, nulls, sound=sound)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("confidence", [0.0, 1.0, float("nan")])
def test_bad_confidence(confidence):
    with pytest.raises(ValueError, match=r"confidence is .*; allowed: a number between 0 and 1"):
        fit_emergence(LATE, GOOD, U, confidence=confidence)
