"""When a head's score rose, and how surely: status, level and crossing times of one learning curve.

All times live on the axis x = log(step). Step 0 has no logarithm: it is placed at step 0.5. The curve is the mean score
over replicates, smoothed over 3 probe steps (the two end probes keep their own value: no window leans to one side).
Internals take curves `[..., T]`, so that many curves, leave-one-out curves or bootstrap draws are one batch.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.signal import savgol_filter
from scipy.special import stdtrit

Status = Literal["at_start", "never", "transient", "growing", "emerged"]
Array = NDArray[np.float64]
Index = NDArray[np.intp]

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
    baseline: float  # mean of the curve up to its onset
    plateau: float  # mean of the curve over the last third of a decade
    peak: float  # highest mean of the curve over any third of a decade
    lost: float  # (peak - plateau) / (peak - baseline) if transient (above 1: it ends under its baseline), else 0


@dataclass(frozen=True, slots=True)
class _Rise:
    """Shape of smoothed curves `[..., T]`; every field `[...]`."""

    onset: Index
    baseline: Array
    peak_at: Index
    peak: Array
    plateau: Array

    @property
    def height(self) -> Array:
        return self.peak - self.baseline

    @property
    def transient(self) -> bool:
        """Whether one curve ends below half its rise."""
        return bool(self.plateau - self.baseline < KEPT_SHARE * self.height)


def fit_emergence(
    step: ArrayLike, score: ArrayLike, null: ArrayLike, *, confidence: float = 0.9, seed: int = 0
) -> Emergence:
    """Status, level and crossing times of one curve, with intervals for this head.

    `step [T]`: probe steps, increasing; `score [T]`, or `[R, T]` over replicates; `null`, a number, `[T]`, `[R]` or
    `[R, T]`: the score under uniform attention, u = its mean, lift = score / u.

    Onset: the last probe, before the isotonic fit is half way up, at which the curve is less than 5% of the rise above
    the baseline; the baseline is the mean up to there. The two are iterated, starting from the lowest mean of any
    initial stretch. So a dip before the rise is no onset; a drift by under 5% of the rise belongs to the baseline.

    Intervals are symmetric in log t, with half-width^2 = (t_{R-1} s_J)^2 + f (t_{n-1} s_B)^2: s_J is the jackknife
    error over replicates, s_B the spread under a moving-block bootstrap of the residuals over probe steps in n blocks,
    f = max(0, 1 - jackknife variance of the residuals / their mean square) the share of the residuals that all
    replicates have in common; the rest is in s_J already. With one replicate s_J = 0 and f = 1.
    Not guaranteed: jitter that lasts over many probes cannot be told from the shape of a curve. Where AR(1) jitter with
    coefficient 0.7 dominates, the 90% interval of t50 covers about 70%.

    Raises ValueError, naming argument, value and what is allowed, for wrong shapes, values that are not finite, steps
    that do not increase, fewer than 8 probes, null <= 0, or confidence outside (0, 1).
    """
    steps, replicates, u = _validated(step, score, null)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")
    x = np.log(np.where(steps == 0.0, STEP_ZERO, steps))
    mean = replicates.mean(axis=0)
    curve, residual, left_out = smooth(mean), _residual(mean), _left_out(replicates)
    rise = _rise(x, curve)
    common = _common_share(residual, left_out)
    rises = bool(rise.height >= max(RISE_ERRORS * _rise_error(replicates, rise, residual, common), RISE_LIFT * u))
    status = _status(x, mean, rise, u, rises)
    times, bounds = np.full(4, np.nan), np.full((2, 2), np.nan)
    if rises or status == "at_start":
        times = _log_times(x, curve, u, rise.transient, (0.5, 0.1, 0.9))
        jackknife = _log_times(x, smooth(left_out), u, rise.transient)
        drawn = _log_times(x, smooth(_block_bootstrap(_unimodal(curve), residual, seed)), u, rise.transient)
        bounds = _bounds(x, times[:2], jackknife, drawn, common, confidence)
    if not rises:
        times[1:], bounds[:, 1] = np.nan, np.nan
    (level, t50, t10, t90), ((level_low, low), (level_high, high)) = np.exp(times).tolist(), np.exp(bounds).tolist()
    shape = {"baseline": float(rise.baseline), "plateau": float(rise.plateau), "peak": float(rise.peak)}
    lost = float((rise.peak - rise.plateau) / rise.height) if status == "transient" else 0.0
    return Emergence(
        status=status, level=level, level_low=level_low, level_high=level_high,
        t10=t10, t50=t50, t90=t90, low=low, high=high, lost=lost, **shape,
    )  # fmt: skip


def _validated(step: ArrayLike, score: ArrayLike, null: ArrayLike) -> tuple[Array, Array, float]:
    """Steps `[T]`, replicates `[R, T]` and u, or a ValueError."""
    steps, scores, nulls = (np.asarray(values, dtype=np.float64) for values in (step, score, null))
    count = steps.size
    if steps.ndim != 1 or count < MIN_PROBES:
        raise ValueError(f"step has shape {steps.shape}; allowed: [T] with T >= {MIN_PROBES} probe steps")
    if scores.ndim not in (1, 2) or scores.shape[-1] != count or scores.size == 0:
        raise ValueError(f"score has shape {scores.shape}; allowed: [{count}] or [R, {count}], as step has {count}")
    replicates = np.atleast_2d(scores)
    allowed = ((), (count,), replicates.shape[:1], replicates.shape)
    if nulls.shape not in allowed:
        raise ValueError(f"null has shape {nulls.shape}; allowed: {', '.join(map(str, allowed))}")
    for name, values in (("step", steps), ("score", scores), ("null", nulls)):
        for where in np.argwhere(~np.isfinite(values))[:1].tolist():
            raise ValueError(f"{name}{where or ''} is {values[tuple(where)]}; allowed: finite numbers")
    _check_increasing(steps)
    if (nulls <= 0.0).any():
        raise ValueError(f"null contains {nulls.min():g}; allowed: numbers above 0")
    return steps, replicates, float(nulls.mean())


def _check_increasing(steps: Array) -> None:
    if steps[0] < 0.0:
        raise ValueError(f"step[0] is {steps[0]:g}; allowed: 0 or more")
    for i in np.flatnonzero(np.diff(steps) <= 0.0)[:1] + 1:
        raise ValueError(f"step[{i}] is {steps[i]:g} after {steps[i - 1]:g}; allowed: strictly increasing steps")
    if steps[0] == 0.0 and steps[1] <= STEP_ZERO:
        raise ValueError(f"step[1] is {steps[1]:g} after step 0; allowed: above {STEP_ZERO}, where step 0 is placed")


def smooth(curve: Array) -> Array:
    """Centred mean over 3 probes of `[..., T]`; the end probes keep their value."""
    smoothed = curve.copy()
    smoothed[..., 1:-1] = (curve[..., :-2] + curve[..., 1:-1] + curve[..., 2:]) / 3.0
    return smoothed


def _residual(curve: Array) -> Array:
    """`[..., T]` less local quadratics over 15 probes, which swallow less of the noise than the 3-probe mean does."""
    window = min(15, curve.shape[-1] - 1) // 2 * 2 + 1
    return np.asarray(curve - savgol_filter(curve, window, 2, axis=-1))


def _at(values: Array, index: Index) -> Array:
    """`values[..., index]` for `values [..., T]` and `index [...]`."""
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _rise(x: Array, curve: Array) -> _Rise:
    """Onset, baseline, peak and plateau of smoothed curves `[..., T]`."""
    probe = np.arange(x.size)
    peak_at, peak = np.asarray(curve.argmax(axis=-1)), _highest(x, curve)
    running = curve.cumsum(axis=-1) / (probe + 1)
    baseline, onset = running.min(axis=-1), np.zeros_like(peak_at)
    for _ in range(3):  # settles in two rounds, but for crooked curves
        half = _vertex(curve, 0.5 * (baseline + peak), peak_at)[1]
        low = curve <= (baseline + ONSET_SHARE * (peak - baseline))[..., None]
        onset = np.where(low & (probe < half[..., None]), probe, 0).max(axis=-1)
        baseline = _at(running, onset)
    return _Rise(onset, baseline, peak_at, peak, curve[..., _last(x, DECADE / 3.0)].mean(axis=-1))


def _highest(x: Array, curve: Array) -> Array:
    """Highest mean of `[..., T]` over a third of a decade around any probe: a single maximum would follow the noise."""
    first, stop = np.searchsorted(x, x - DECADE / 6.0 - 1e-9), np.searchsorted(x, x + DECADE / 6.0 + 1e-9)
    sums = np.concatenate([np.zeros_like(curve[..., :1]), curve.cumsum(axis=-1)], axis=-1)
    return np.asarray(((sums[..., stop] - sums[..., first]) / (stop - first)).max(axis=-1))


def _last(x: Array, width: float) -> slice:
    """The probes of the last `width` in log step, at least 3."""
    return slice(min(int(np.searchsorted(x, x[-1] - width - 1e-9)), x.size - 3), None)


def _vertex(curve: Array, height: Array, peak_at: Index) -> tuple[Array, Index]:
    """Sums S_j of (curve - height) over the first j probes, `[..., T + 1]`, and the j <= peak_at at which S is least.

    The isotonic fit up to the peak is below `height` on the first j probes and not below from there on: its values are
    the slopes of the convex minorant of S, which change sign where S is least.
    """
    sums = np.zeros((*curve.shape[:-1], curve.shape[-1] + 1))
    np.cumsum(curve - height[..., None], axis=-1, out=sums[..., 1:])
    reachable = np.arange(sums.shape[-1]) <= peak_at[..., None]
    return sums, np.asarray(np.where(reachable, sums, np.inf).argmin(axis=-1))


def _isotonic_crossing(x: Array, curve: Array, height: Array, peak_at: Index) -> Array:
    """log step at which the isotonic fit to `[..., :peak_at + 1]` crosses `height [...]`, linear between probes."""
    sums, vertex = _vertex(curve, height, peak_at)
    place = np.arange(sums.shape[-1])
    apart = place - vertex[..., None]
    slope = (sums - _at(sums, vertex)[..., None]) / np.where(apart == 0, 1, apart)
    below = -np.where(apart < 0, slope, -np.inf).max(axis=-1)  # how far the fit is under `height` just before
    above = np.where((apart > 0) & (place <= peak_at[..., None] + 1), slope, np.inf).min(axis=-1)  # over it just after
    inside = vertex > 0  # else the fit starts above `height`
    share = np.where(inside, below, 1.0) / np.where(inside, below + above, 1.0)
    before = x[np.maximum(vertex - 1, 0)]
    return np.asarray(before + share * (x[vertex] - before))


def _first_crossing(x: Array, curve: Array, height: float) -> Array:
    """log step at which `curve [..., T]` first reaches `height`, linear between probes; nan if it never does."""
    reached = curve >= height
    after = np.asarray(reached.argmax(axis=-1))
    before = np.maximum(after - 1, 0)
    climb = np.where(after > 0, _at(curve, after) - _at(curve, before), 1.0)
    share = np.where(after > 0, height - _at(curve, before), 0.0) / np.where(climb > 0.0, climb, 1.0)
    return np.where(reached.any(axis=-1), x[before] + share * (x[after] - x[before]), np.nan)


def _log_times(x: Array, curve: Array, u: float, transient: bool, shares: tuple[float, ...] = (0.5,)) -> Array:
    """log level, and log times at which `shares` of (top - baseline) are done, `[..., 1 + len(shares)]`."""
    rise = _rise(x, curve)
    climb = (rise.peak if transient else rise.plateau) - rise.baseline
    times = [_isotonic_crossing(x, curve, rise.baseline + share * climb, rise.peak_at) for share in shares]
    return np.stack([_first_crossing(x, curve, LEVEL_LIFT * u), *times], axis=-1)


def _unimodal(curve: Array) -> Array:
    """Isotonic fit to `curve [T]` up to its peak, antitonic after it: the signal of the bootstrap."""
    peak_at = int(curve.argmax())
    up, down = isotonic_regression(curve[: peak_at + 1]), isotonic_regression(curve[peak_at:], increasing=False)
    return np.concatenate([up.x, down.x[1:]])


def _left_out(replicates: Array) -> Array:
    """Mean curves with one replicate left out, `[R, T]`; of a single replicate none, `[0, T]`."""
    others = replicates.shape[0] - 1
    return (replicates.sum(axis=0) - replicates) / others if others else replicates[:0]


def _jackknife_variance(values: Array) -> Array:
    """Variance of the estimate from its leave-one-out values, over the leading axis; 0 without any."""
    return np.asarray((len(values) - 1) * values.var(axis=0)) if len(values) else np.zeros(values.shape[1:])


def _common_share(residual: Array, left_out: Array) -> float:
    """Share of the mean curve's residual variance that all replicates have in common: noise of training."""
    if not len(left_out):
        return 1.0
    total = float((residual**2).mean())
    explained = float(_jackknife_variance(_residual(left_out)).mean())
    return max(0.0, 1.0 - explained / total) if total > 0.0 else 0.0


def _rise_error(replicates: Array, rise: _Rise, residual: Array, common: float) -> float:
    """Standard error of peak - baseline: over replicates, and common jitter of a smoothed probe and of the baseline."""
    curves = smooth(replicates)
    heights = curves[:, int(rise.peak_at)] - curves[:, : int(rise.onset) + 1].mean(axis=1)
    sampling = heights.var(ddof=1) / heights.size if heights.size > 1 else 0.0
    jitter = (smooth(residual) ** 2).mean() + (residual**2).mean() / (rise.onset + 1)
    return float(np.sqrt(sampling + common * jitter))


def _status(x: Array, mean: Array, rise: _Rise, u: float, rises: bool) -> Status:
    """The first status that holds, in the order in which `Emergence` lists them."""
    if mean[0] >= START_LIFT * u:
        return "at_start"
    if not rises:
        return "never"
    if rise.transient:
        return "transient"
    end = _last(x, DECADE / 2.0)
    gain = np.polyfit(x[end], mean[end], 1)[0] * DECADE / 2.0
    return "growing" if gain > GAIN_SHARE * (rise.plateau - rise.baseline) else "emerged"


def _block_bootstrap(signal: Array, residual: Array, seed: int) -> Array:
    """`[DRAWS, T]` curves: the signal plus moving blocks of sqrt(T) residuals."""
    count, length = signal.size, isqrt(signal.size)
    starts = np.random.default_rng(seed).integers(0, count - length + 1, size=(DRAWS, -(-count // length), 1))
    picked = (starts + np.arange(length)).reshape(DRAWS, -1)[:, :count]
    return np.asarray(signal + (residual - residual.mean())[picked])


def _bounds(x: Array, times: Array, jackknife: Array, drawn: Array, common: float, confidence: float) -> Array:
    """Interval in log step, `[2, n]`, of `times [n]` from `jackknife [R, n]` and `drawn [DRAWS, n]`."""
    tail = 0.5 * (1.0 + confidence)
    unsure = np.isnan(jackknife).any(axis=0) | (np.isnan(drawn).mean(axis=0) > 1.0 - tail)
    # a curve that never gets there counts as getting there at the last probe
    jackknife, drawn = (np.where(np.isnan(values), x[-1], values) for values in (jackknife, drawn))
    sampling = stdtrit(max(len(jackknife) - 1, 1), tail) ** 2 * _jackknife_variance(jackknife)
    jitter = stdtrit(x.size / isqrt(x.size) - 1.0, tail) ** 2 * drawn.var(axis=0)
    half = np.where(times > x[0], np.sqrt(sampling + common * jitter), np.nan)
    unbounded = np.isfinite(half) & (unsure | (times + half > x[-1]))  # nothing is known beyond the end
    return np.stack([times - half, np.where(unbounded, np.inf, times + half)])
