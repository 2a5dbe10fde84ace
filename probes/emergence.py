"""When a head's score rose, and how surely: status, level and crossing times of one learning curve.

All times live on the axis x = log(step). Step 0 has no logarithm: it is placed at step 0.5. The curve is the mean score
over replicates, smoothed over 3 probe steps (the two end probes keep their own value: no window leans to one side).
Internals take curves `[..., T]`, so that many heads, leave-one-out curves or bootstrap draws are one batch. Nothing is
summed by a routine whose rounding depends on how many curves there are: a fit does not depend on its company, to the
last bit.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

Status = Literal["at_start", "never", "transient", "growing", "emerged"]
STATUSES: tuple[Status, ...] = get_args(Status)
Array = NDArray[np.float64]
Index = NDArray[np.intp]
Mask = NDArray[np.bool_]

LEVEL_LIFT = 2.0  # lift that `level` waits for
START_LIFT = 1.5  # lift at the first probe that counts as being there from the start
RISE_LIFT, RISE_ERRORS = 0.5, 4.0  # smallest rise, in units of u and of its standard error
ONSET_SHARE = 0.05  # share of the rise that still belongs to the baseline
KEPT_SHARE = 0.5  # a curve that ends below this share of its rise is transient
GAIN_SHARE = 0.1  # a curve that gains more than this share of its rise in the last half decade is growing
STEP_ZERO = 0.5  # where step 0 stands on the log axis
MIN_PROBES = 8
DECADE = float(np.log(10.0))
DRAWS = 200  # of the bootstrap
CHUNK = 2**18  # numbers in the draws of the curves that are fitted together: 2 MB, which stays in a cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Emergence:
    """What one curve says about when its head emerged; times in training steps, scores in score units.

    `status` is the first that holds of
      - `at_start`: lift >= 1.5 at the first probe, unsmoothed;
      - `never`: no rise, that is peak - baseline < max(4 standard errors, 0.5 u);
      - `transient`: plateau - baseline < (peak - baseline) / 2;
      - `growing`: the regression line through the last half decade gains > 10% of the rise over that half decade;
      - `emerged`.
    Without a rise t10, t50, t90 are nan, and so is `level`, but for a head that is there from the start. A rise may end
    below lift 2 (`level` nan) and a head that is there from the start may rise further (all times finite).
    """

    status: Status
    level: float  # first step at which the curve reaches lift 2 (0.5 if already at step 0); nan if it never does
    level_low: float  # interval of level; nan where level is nan or the first probe
    level_high: float  # inf where it would lie after the end, or where it is not sure that lift 2 is reached at all
    t10: float  # steps at which the isotonic fit up to the peak has gone 10, 50, 90% of the way from baseline to top;
    t50: float  # top is the plateau, or the peak of a transient curve
    t90: float
    low: float  # interval of t50, `high` inf likewise
    high: float
    onset: float  # last step at which the curve is still at its baseline; nan without a rise
    baseline: float  # mean of the curve up to its onset
    plateau: float  # mean of the curve over the last third of a decade
    peak: float  # highest mean of the curve over any third of a decade
    lost: float  # (peak - plateau) / (peak - baseline) if transient (above 1: it ends under its baseline), else 0


@dataclass(frozen=True, slots=True)
class _Rise:
    """Shape of smoothed curves `[..., T]`; every field `[...]`, but for `sums`."""

    onset: Index
    baseline: Array
    peak_at: Index
    peak: Array
    plateau: Array
    sums: Array  # `[..., T + 1]`, see _sums_up_to

    @property
    def height(self) -> Array:
        return self.peak - self.baseline

    @property
    def transient(self) -> Mask:
        """Whether it ends below half its rise."""
        return np.asarray(self.plateau - self.baseline < KEPT_SHARE * self.height)


def fit_emergence(
    step: ArrayLike, score: ArrayLike, null: ArrayLike, *, confidence: float = 0.9, seed: int = 0
) -> Emergence:
    """Status, level and crossing times of one curve, with intervals for this head.

    `step [T]`: probe steps, increasing; `score [T]`, or `[R, T]` over replicates; `null`, a number, `[T]`, `[R]` or
    `[R, T]`: the score under uniform attention, u = its mean, lift = score / u.

    Onset: the last probe, before the isotonic fit is half way up, at which the curve is less than 5% of the rise above
    the baseline; the baseline is the mean up to there. The two are iterated, starting from the lowest mean of any
    initial stretch. So a dip before the rise is no onset; a drift by under 5% of the rise belongs to the baseline.

    Intervals are symmetric in log t, with half-width t sqrt(s_J^2 + f s_B^2): s_J is the jackknife error over
    replicates, s_B the spread under a moving-block bootstrap of the residuals over probe steps in n blocks,
    f = max(0, 1 - jackknife variance of the residuals / their mean square) the share of the residuals that all
    replicates have in common; the rest is in s_J already; t is Student's on Welch and Satterthwaite's degrees of
    freedom, from R - 1 and n - 1. With one replicate s_J = 0 and f = 1.
    Not guaranteed: jitter that lasts over many probes cannot be told from the shape of a curve. Where AR(1) jitter with
    coefficient 0.7 dominates, the 90% interval of t50 covers about 70%.

    Raises ValueError, naming argument, value and what is allowed, for wrong shapes, values that are not finite, steps
    that do not increase, fewer than 8 probes, null <= 0, or confidence outside (0, 1).
    """
    steps = _checked_steps(step)
    scores, nulls = np.asarray(score, dtype=np.float64), np.asarray(null, dtype=np.float64)
    count = steps.size
    if scores.ndim not in (1, 2) or scores.shape[-1] != count or scores.size == 0:
        raise ValueError(f"score has shape {scores.shape}; allowed: [{count}] or [R, {count}], as step has {count}")
    replicates = np.atleast_2d(scores)
    allowed = ((), (count,), replicates.shape[:1], replicates.shape)
    if nulls.shape not in allowed:
        raise ValueError(f"null has shape {nulls.shape}; allowed: {', '.join(map(str, allowed))}")
    _check_finite("score", scores)
    _check_null("null", nulls)
    nulls = nulls[None] if nulls.shape in allowed[2:] else np.atleast_1d(nulls.mean())
    all_sound = np.ones((1, len(replicates)), dtype=np.bool_)
    return _fit_all(steps, replicates[None], nulls, all_sound, confidence, seed)[0]


def fit_emergences(
    step: ArrayLike,
    scores: ArrayLike,
    nulls: ArrayLike,
    *,
    sound: ArrayLike | None = None,
    confidence: float = 0.9,
    seed: int = 0,
) -> list[Emergence]:
    """What `fit_emergence` says of each of n curves over common probe steps, bit for bit, whatever their company.

    `step [T]`; `scores [n, T]`, or `[n, R, T]` over replicates; `nulls`, a number, `[n]`, `[n, R]` or the shape of
    `scores`; their mean is taken by curve. `sound [n, R]`: which replicates to use (all by default), at least one of
    each curve; the others' scores and nulls may be anything, nan too, and count as if they were not there.

    Time grows in proportion to n. Curves are fitted a few at a time, so that some 20 MB do beside `scores`.

    Raises ValueError as `fit_emergence` does, and where `sound` leaves a curve without a replicate.
    """
    steps = _checked_steps(step)
    values, u = np.asarray(scores, dtype=np.float64), np.asarray(nulls, dtype=np.float64)
    count = steps.size
    if values.ndim not in (2, 3) or values.shape[-1] != count or 0 in values.shape[1:]:
        raise ValueError(
            f"scores has shape {values.shape}; allowed: [n, {count}] or [n, R, {count}], as step has {count}"
        )
    replicates = values if values.ndim == 3 else values[:, None]
    allowed = ((), replicates.shape[:1], replicates.shape[:2], values.shape)
    if u.shape not in allowed:
        raise ValueError(f"nulls has shape {u.shape}; allowed: {', '.join(map(str, allowed))}")
    picked = _checked_sound(sound, replicates.shape[:2])
    _check_finite("scores", values, picked[..., None] if values.ndim == 3 else picked)
    _check_null("nulls", u, (True, True, picked, picked[..., None])[u.ndim])
    if u.ndim >= 2:  # a null beside a score that is left out is left out with it
        u = u.reshape(*replicates.shape[:2], -1)
    return _fit_all(steps, replicates, u, picked, confidence, seed)


def _checked_steps(step: ArrayLike) -> Array:
    """Steps `[T]`, or a ValueError."""
    steps = np.asarray(step, dtype=np.float64)
    if steps.ndim != 1 or steps.size < MIN_PROBES:
        raise ValueError(f"step has shape {steps.shape}; allowed: [T] with T >= {MIN_PROBES} probe steps")
    _check_finite("step", steps)
    if steps[0] < 0.0:
        raise ValueError(f"step[0] is {steps[0]:g}; allowed: 0 or more")
    for i in np.flatnonzero(np.diff(steps) <= 0.0)[:1] + 1:
        raise ValueError(f"step[{i}] is {steps[i]:g} after {steps[i - 1]:g}; allowed: strictly increasing steps")
    if steps[0] == 0.0 and steps[1] <= STEP_ZERO:
        raise ValueError(f"step[1] is {steps[1]:g} after step 0; allowed: above {STEP_ZERO}, where step 0 is placed")
    return steps


def _check_finite(name: str, values: Array, used: Mask | bool = True) -> None:
    for where in np.argwhere(~np.isfinite(values) & used)[:1].tolist():
        raise ValueError(f"{name}{where or ''} is {values[tuple(where)]}; allowed: finite numbers")


def _check_null(name: str, values: Array, used: Mask | bool = True) -> None:
    _check_finite(name, values, used)
    for lowest in np.sort(values[(values <= 0.0) & used])[:1]:
        raise ValueError(f"{name} contains {lowest:g}; allowed: numbers above 0")


def _checked_sound(sound: ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    """Which replicates `[n, R]` to use, or a ValueError."""
    if sound is None:
        return np.ones(shape, dtype=np.bool_)
    picked = np.asarray(sound)
    if picked.shape != shape or picked.dtype != np.bool_:
        raise ValueError(f"sound is {picked.dtype} of shape {picked.shape}; allowed: bool of shape {shape}")
    for i in np.flatnonzero(~picked.any(axis=1))[:1]:
        raise ValueError(f"sound[{i}] is False throughout; allowed: at least one sound replicate a curve")
    return picked


def _fit_all(
    steps: Array, replicates: Array, nulls: Array, sound: Mask, confidence: float, seed: int
) -> list[Emergence]:
    """Fits of `replicates [n, R, T]`: curves with equally many sound replicates together, a few at a time."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")
    x = np.log(np.where(steps == 0.0, STEP_ZERO, steps))
    picked = _blocks(x.size, seed)
    counts = sound.sum(axis=1)
    found: dict[int, Emergence] = {}
    size = max(1, CHUNK // picked.size)
    for count in np.unique(counts).tolist():
        members = np.flatnonzero(counts == count)
        for chunk in (members[i : i + size] for i in range(0, members.size, size)):
            dense = np.ascontiguousarray(replicates[chunk][sound[chunk]]).reshape(chunk.size, count, x.size)
            if nulls.ndim < 2:
                u = np.broadcast_to(nulls, len(replicates))[chunk]
            else:
                u = np.ascontiguousarray(nulls[chunk][sound[chunk]]).reshape(chunk.size, -1).mean(axis=1)
            found.update(zip(chunk.tolist(), _fit(x, dense, u, picked, confidence), strict=True))
    return [found[i] for i in range(len(replicates))]


def _fit(x: Array, replicates: Array, u: Array, picked: Index, confidence: float) -> list[Emergence]:
    """Fits of `replicates [n, R, T]` with u `[n]`; `picked [DRAWS, T]`: the probes whose residuals make up a draw."""
    mean = replicates.mean(axis=-2)
    curve, residual, left_out = smooth(mean), _residual(mean), _left_out(replicates)
    rise, common = _rise(x, curve), _common_share(residual, left_out)
    rises = rise.height >= np.maximum(RISE_ERRORS * _rise_error(replicates, rise, residual, common), RISE_LIFT * u)
    status = _status(x, mean, rise, u, rises)
    times, bounds = np.full((len(mean), 4), np.nan), np.full((len(mean), 2, 2), np.nan)
    timed = np.flatnonzero(rises | (status == STATUSES.index("at_start")))
    if timed.size:
        lift_one, transient = u[timed], rise.transient[timed]
        times[timed] = _log_times(x, curve[timed], lift_one, transient, (0.5, 0.1, 0.9))
        drawn = _block_bootstrap(_unimodal(curve[timed]), residual[timed], picked)
        jackknifed, jittered = (
            _log_times(x, smooth(curves), lift_one[:, None], transient[:, None]) for curves in (left_out[timed], drawn)
        )
        bounds[timed] = _bounds(x, times[timed, :2], jackknifed, jittered, common[timed], confidence)
    times[~rises, 1:], bounds[~rises, 1] = np.nan, np.nan
    onset = np.where(rises, x[rise.onset], np.nan)
    return _results(status, np.exp(times), np.exp(bounds), np.exp(onset), rise)


def _results(status: Index, times: Array, bounds: Array, onset: Array, rise: _Rise) -> list[Emergence]:
    """Rows of times (level, t50, t10, t90) and of bounds (of level, of t50) as results."""
    lost = np.where(rise.height > 0.0, (rise.peak - rise.plateau) / np.where(rise.height > 0.0, rise.height, 1.0), 0.0)
    shapes = np.stack([onset, rise.baseline, rise.plateau, rise.peak, lost], axis=-1).tolist()
    return [
        Emergence(
            status=STATUSES[i], level=level, level_low=level_low, level_high=level_high,
            t10=t10, t50=t50, t90=t90, low=low, high=high, onset=start,
            baseline=baseline, plateau=plateau, peak=peak, lost=share if STATUSES[i] == "transient" else 0.0,
        )
        for i, (level, t50, t10, t90), ((level_low, level_high), (low, high)), (start, baseline, plateau, peak, share)
        in zip(status.tolist(), times.tolist(), bounds.tolist(), shapes, strict=True)
    ]  # fmt: skip


def smooth(curve: Array) -> Array:
    """Centred mean over 3 probes of `[..., T]`; the end probes keep their value."""
    smoothed = curve.copy()
    middle = smoothed[..., 1:-1]
    middle += curve[..., :-2]
    middle += curve[..., 2:]
    middle /= 3.0
    return smoothed


def _residual(curve: Array) -> Array:
    """`[..., T]` less local quadratics over 15 probes, which swallow less of the noise than the 3-probe mean does.

    What scipy's savgol_filter gives, but that its rounding at the ends depends on the number of curves.
    """
    count = curve.shape[-1]
    window = min(15, count - 1) // 2 * 2 + 1
    first = np.clip(np.arange(count) - window // 2, 0, count - window)  # the probes around each, shifted at the ends
    basis = np.linalg.qr(np.vander(np.arange(window) - window // 2, 3))[0]
    weights = (basis @ basis.T)[np.arange(count) - first]
    fit = np.zeros_like(curve)
    for i in range(window):
        fit += weights[:, i] * curve[..., first + i]
    return curve - fit


def _at(values: Array, index: Index) -> Array:
    """`values[..., index]` for `values [..., T]` and `index [...]`."""
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _rise(x: Array, curve: Array) -> _Rise:
    """Onset, baseline, peak and plateau of smoothed curves `[..., T]`."""
    probe = np.arange(x.size)
    sums, peak_at = _sums(curve), np.asarray(curve.argmax(axis=-1))
    running, peak = sums[..., 1:] / (probe + 1.0), _highest(x, sums)
    sums = _up_to(sums, peak_at)
    baseline, onset = running.min(axis=-1), np.zeros_like(peak_at)
    for _ in range(3):  # settles in two rounds, but for crooked curves
        half = _above(sums, 0.5 * (baseline + peak)).argmin(axis=-1)
        low = curve <= (baseline + ONSET_SHARE * (peak - baseline))[..., None]
        low &= probe < half[..., None]
        onset = np.where(low.any(axis=-1), x.size - 1 - low[..., ::-1].argmax(axis=-1), 0)
        baseline = _at(running, onset)
    return _Rise(onset, baseline, peak_at, peak, curve[..., _last(x, DECADE / 3.0)].mean(axis=-1), sums)


def _sums(curve: Array) -> Array:
    """Sums over the first j probes of `[..., T]`, `[..., T + 1]`."""
    sums = np.zeros((*curve.shape[:-1], curve.shape[-1] + 1))
    np.cumsum(curve, axis=-1, out=sums[..., 1:])
    return sums


def _up_to(sums: Array, last: Index) -> Array:
    """The sums that take no probe after `last [...]`; infinite for the others."""
    return np.where(np.arange(sums.shape[-1]) <= last[..., None] + 1, sums, np.inf)


def _highest(x: Array, sums: Array) -> Array:
    """Highest mean over a third of a decade around any probe: a single maximum would follow the noise."""
    first, stop = np.searchsorted(x, x - DECADE / 6.0 - 1e-9), np.searchsorted(x, x + DECADE / 6.0 + 1e-9)
    means = sums[..., stop]
    means -= sums[..., first]
    means /= stop - first
    return np.asarray(means.max(axis=-1))


def _last(x: Array, width: float) -> slice:
    """The probes of the last `width` in log step, at least 3."""
    return slice(min(int(np.searchsorted(x, x[-1] - width - 1e-9)), x.size - 3), None)


def _above(sums: Array, height: Array) -> Array:
    """Sums S_j of (curve - height) over the first j probes, `[..., T + 1]`, from those of the curve.

    The isotonic fit is below `height` on the first j probes and not below from there on, for the j at which S is least:
    its values are the slopes of the convex minorant of S, which change sign there. S is infinite after the peak, and so
    the fit is that up to the peak.
    """
    found = height[..., None] * np.arange(sums.shape[-1], dtype=np.float64)
    return np.subtract(sums, found, out=found)


def _isotonic_crossing(x: Array, sums: Array, height: Array) -> Array:
    """log step at which the isotonic fit, up to where `sums` end, crosses `height [...]`, linear between probes."""
    above = _above(sums, height)
    vertex = above.argmin(axis=-1)
    above -= _at(above, vertex)[..., None]
    apart = np.arange(above.shape[-1]) - vertex[..., None]
    above /= np.maximum(
        np.abs(apart), 1
    )  # slopes of the lines from the vertex, as they fall to it and as they leave it
    under = np.where(apart < 0, above, np.inf).min(axis=-1)  # how far the fit is under `height` just before
    over = np.where(apart > 0, above, np.inf).min(axis=-1)  # over it just after
    inside = vertex > 0  # else the fit starts above `height`
    share = np.where(inside, under, 1.0) / np.where(inside, under + over, 1.0)
    before = x[np.maximum(vertex - 1, 0)]
    return np.asarray(before + share * (x[np.minimum(vertex, x.size - 1)] - before))


def _first_crossing(x: Array, curve: Array, height: Array) -> Array:
    """log step at which `curve [..., T]` first reaches `height [...]`, linear between probes; nan if it never does."""
    reached = curve >= height[..., None]
    after = np.asarray(reached.argmax(axis=-1))
    before = np.maximum(after - 1, 0)
    start = _at(curve, before)
    climb = np.where(after > 0, _at(curve, after) - start, 1.0)
    share = np.where(after > 0, height - start, 0.0) / np.where(climb > 0.0, climb, 1.0)
    return np.where(reached.any(axis=-1), x[before] + share * (x[after] - x[before]), np.nan)


def _log_times(x: Array, curve: Array, u: ArrayLike, transient: ArrayLike, shares: tuple[float, ...] = (0.5,)) -> Array:
    """log level, and log times at which `shares` of (top - baseline) are done, `[..., 1 + len(shares)]`."""
    rise = _rise(x, curve)
    climb = np.where(transient, rise.peak, rise.plateau) - rise.baseline
    times = [_isotonic_crossing(x, rise.sums, rise.baseline + share * climb) for share in shares]
    return np.stack([_first_crossing(x, curve, LEVEL_LIFT * np.asarray(u)), *times], axis=-1)


def _unimodal(curve: Array) -> Array:
    """Isotonic fit to each of `curve [n, T]` up to its peak, antitonic after it: the signal of the bootstrap."""
    fits = np.empty_like(curve)
    for fit, own, peak_at in zip(fits, curve, curve.argmax(axis=-1).tolist(), strict=True):
        fit[: peak_at + 1] = isotonic_regression(own[: peak_at + 1]).x
        fit[peak_at + 1 :] = isotonic_regression(own[peak_at:], increasing=False).x[1:]
    return fits


def _left_out(replicates: Array) -> Array:
    """Mean curves with one replicate left out, `[..., R, T]`; of a single replicate none, `[..., 0, T]`."""
    others = replicates.shape[-2] - 1
    if not others:
        return replicates[..., :0, :]
    return np.asarray((replicates.sum(axis=-2, keepdims=True) - replicates) / others)


def _jackknife_variance(values: Array) -> Array:
    """Variance of the estimate from its leave-one-out values `[..., R, T]`, over R; 0 without any."""
    count = values.shape[-2]
    return np.asarray((count - 1) * values.var(axis=-2)) if count else np.zeros((*values.shape[:-2], values.shape[-1]))


def _common_share(residual: Array, left_out: Array) -> Array:
    """Share `[...]` of a mean curve's residual variance that all replicates have in common: noise of training."""
    total = (residual**2).mean(axis=-1)
    if not left_out.shape[-2]:
        return np.ones_like(total)
    explained = _jackknife_variance(_residual(left_out)).mean(axis=-1)
    return np.where(total > 0.0, np.maximum(0.0, 1.0 - explained / np.where(total > 0.0, total, 1.0)), 0.0)


def _rise_error(replicates: Array, rise: _Rise, residual: Array, common: Array) -> Array:
    """Standard error of peak - baseline: over replicates, and common jitter of a smoothed probe and of the baseline."""
    curves, count = smooth(replicates), replicates.shape[-2]
    onset = rise.onset[..., None]
    heights = _at(curves, rise.peak_at[..., None]) - _at(curves.cumsum(axis=-1), onset) / (onset + 1)
    sampling = heights.var(axis=-1, ddof=1) / count if count > 1 else 0.0
    jitter = (smooth(residual) ** 2).mean(axis=-1) + (residual**2).mean(axis=-1) / (rise.onset + 1)
    return np.asarray(np.sqrt(sampling + common * jitter))


def _status(x: Array, mean: Array, rise: _Rise, u: Array, rises: Mask) -> Index:
    """Places in STATUSES of the first status that holds."""
    end = _last(x, DECADE / 2.0)
    away = x[end] - x[end].mean()
    gain = (away * mean[..., end]).sum(axis=-1) / (away**2).sum() * DECADE / 2.0
    grows = gain > GAIN_SHARE * (rise.plateau - rise.baseline)
    return np.select([mean[..., 0] >= START_LIFT * u, ~rises, rise.transient, grows], [0, 1, 2, 3], 4)


def _blocks(count: int, seed: int) -> Index:
    """Probes `[DRAWS, count]` of moving blocks of sqrt(count); the same for all curves, so company changes nothing."""
    length = isqrt(count)
    starts = np.random.default_rng(seed).integers(0, count - length + 1, size=(DRAWS, -(-count // length), 1))
    return np.asarray((starts + np.arange(length)).reshape(DRAWS, -1)[:, :count])


def _block_bootstrap(signal: Array, residual: Array, picked: Index) -> Array:
    """`[n, DRAWS, T]` curves: the signals `[n, T]` plus blocks of residuals."""
    drawn: Array = (residual - residual.mean(axis=-1, keepdims=True)).take(picked, axis=-1)
    drawn += signal[:, None]
    return drawn


def _bounds(x: Array, times: Array, jackknife: Array, drawn: Array, common: Array, confidence: float) -> Array:
    """Intervals in log step, `[n, k, 2]`, of `times [n, k]` from `jackknife [n, R, k]` and `drawn [n, DRAWS, k]`."""
    tail = 0.5 * (1.0 + confidence)
    unsure = np.isnan(jackknife).any(axis=-2) | (np.isnan(drawn).mean(axis=-2) > 1.0 - tail)
    # a curve that never gets there counts as getting there at the last probe
    jackknife, drawn = (np.where(np.isnan(values), x[-1], values) for values in (jackknife, drawn))
    sampling, jitter = _jackknife_variance(jackknife), common[:, None] * drawn.var(axis=-2)
    total = sampling + jitter
    freedom = sampling**2 / max(jackknife.shape[-2] - 1, 1) + jitter**2 / (x.size / isqrt(x.size) - 1.0)
    reach = stdtrit(np.where(total > 0.0, total**2, 1.0) / np.where(total > 0.0, freedom, 1.0), tail)
    half = np.where(times > x[0], reach * np.sqrt(total), np.nan)
    unbounded = np.isfinite(half) & (unsure | (times + half > x[-1]))  # nothing is known beyond the end
    return np.stack([times - half, np.where(unbounded, np.inf, times + half)], axis=-1)
