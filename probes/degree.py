"""The degree k of an effective potential U = u |x|^k, from several observations, each with what it assumes.

Under gradient flow in U, x ~ t^(-1/(k-2)) and U ~ t^(-k/(k-2)) for k > 2, while k = 2 is exponential. Without any
dynamics |dU/dx| ~ U^(1 - 1/k). Estimates of different kinds need not agree: where an assumption fails, they do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probes.inference import gls
from probes.relaxation import Relaxation
from probes.windows import Array
from probes.words import counted

MIN_POINTS = 8
MIN_DECADES = 1.0  # of the gap, or of |x|
BENT, BENT_ERRORS = 0.2, 6.0  # degrees of the two halves that differ by more (share of k; standard errors) are not one
ENDS = np.geomspace(1e-12, 10.0, 300)  # (least loss - end) in units of the loss's range
BLOCKS_PER_DECADE = 4.0  # of the drift
TINY = 1e-9  # standard error of a point that is believed at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Degree:
    """An estimate of k with its interval, what it assumes, and why it is refused (then k, low and high are nan)."""

    k: float
    low: float
    high: float
    assumption: str
    refusal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Slope of log |ds/dt| against log |s_inf - s|, and 1 + 1/a, which it is if the power law holds."""

    slope: float
    expected: float
    refusal: str


LOSS_GAP = "the loss falls by gradient flow in u|x|^k, time being cumulative learning rate"
GRADIENT = "loss and gradient follow one direction of a potential u|x|^k; no dynamics"
PROFILE = "the loss along this line is u|x|^k up to the largest |x|; no dynamics"
SCORE = "gradient flow in u|x|^k, and a score linear in x"


def degree_from_loss(fit: Relaxation) -> Degree:
    """k = 2b / (b - 1) from the exponent b of a loss curve's approach to its end, as `fit_relaxation` gives it.

    Refused where the fit is, where another law than a power law's kind is preferred, and for b <= 1, which no k has.
    """
    return _from_exponent(fit, LOSS_GAP, lambda b: 2.0 * b / (b - 1.0) if b > 1.0 else np.inf)


def degree_from_score(fit: Relaxation) -> Degree:
    """k = 2 + 1/a from the exponent a of a score's approach to its plateau.

    A score ~ x^p makes this 2 + (k - 2) / p: for k = 4 and a score x^2 it says 3. `drift` cannot tell.
    """
    return _from_exponent(fit, SCORE, lambda a: 2.0 + 1.0 / a if a > 0.0 else np.inf)


def _from_exponent(fit: Relaxation, assumption: str, degree: Callable[[float], float]) -> Degree:
    """A falling function of the exponent."""
    if fit.preferred in {"exponential", "logistic"}:
        return refused(assumption, f"the approach is {fit.preferred}, as for k = 2")
    if fit.refusal:
        return refused(assumption, fit.refusal)
    k = degree(fit.exponent)
    if not np.isfinite(k):
        return refused(assumption, f"exponent {fit.exponent:.3g} is that of no degree")
    return Degree(
        k=k, low=degree(fit.high) if fit.high < np.inf else 2.0, high=degree(fit.low), assumption=assumption, refusal=""
    )


def drift(time: ArrayLike, value: ArrayLike, fit: Relaxation, window: tuple[float, float] | None = None) -> Drift:
    """Slope of the drift over `window`, from secants between means over quarter decades of t - t0.

    `time [T]`, `value [T]` or `[R, T]`, `fit` of the same curve. A check of the fit, not a second estimate of k: the
    slope and 1 + 1/a are the same information, and agree for any power law, whatever the score is of x. Refused where
    the fit is, for probes in fewer than 2 quarter decades, and for under 3 secants that fall.
    """
    times, values = np.asarray(time, dtype=np.float64), np.atleast_2d(np.asarray(value, dtype=np.float64)).mean(axis=0)
    if times.ndim != 1 or times.shape != values.shape:
        raise ValueError(f"value has shape {np.shape(value)}; allowed: [{times.size}] or [R, {times.size}]")
    nan = float("nan")
    if fit.refusal:
        return Drift(slope=nan, expected=nan, refusal=fit.refusal)
    start, end = window or (times[0], times[-1])
    inside = (times >= start) & (times <= end) & (times > fit.t0)
    times, gaps, expected = times[inside] - fit.t0, np.abs(fit.s_inf - values[inside]), 1.0 + 1.0 / fit.exponent
    if not times.size:
        return Drift(slope=nan, expected=expected, refusal="no probe in the window")
    block = np.floor(BLOCKS_PER_DECADE * np.log10(times / times[0]) + 1e-9).astype(np.intp)
    count = np.bincount(block)
    held = count > 0
    if held.sum() < 2:
        return Drift(slope=nan, expected=expected, refusal="all probes of the window lie within a quarter decade")
    t, gap = (np.bincount(block, weights=x)[held] / count[held] for x in (np.log(times), gaps))
    speed, middle = -np.diff(gap) / np.diff(np.exp(t)), 0.5 * (gap[1:] + gap[:-1])
    falling = (speed > 0.0) & (middle > 0.0)
    if falling.sum() < 3:
        return Drift(slope=nan, expected=expected, refusal="the curve nears its plateau in under 3 steps")
    slope = float(np.polyfit(np.log(middle[falling]), np.log(speed[falling]), 1)[0])
    return Drift(slope=slope, expected=expected, refusal="")


def degree_from_gradient(
    loss: ArrayLike, gradient: ArrayLike, end: float | None = None, *, confidence: float = 0.9
) -> Degree:
    """k = 1 / (1 - theta), theta the Lojasiewicz slope of log |grad L| against log (L - end), on fixed data.

    `loss [T]` and `gradient [T]` (norms) in the order of training, which may be by any optimiser. `end`, the loss at
    the minimum, is profiled together with theta unless given: from 1e-12 to 10 ranges of the loss below its least.
    Noise of log |grad L| is AR(1) along the order. Refused at an edge of these, for values that are not finite, for
    under 8 points above the end, a constant loss, under a decade of L - end, a bent line, or theta outside (0, 1).

    Not guaranteed: of several directions the one with the largest gradient is seen.
    """
    losses, gradients = _pair("loss", loss, "gradient", gradient, confidence)
    if not (np.isfinite(losses).all() and np.isfinite(gradients).all() and (gradients > 0.0).all()):
        return refused(GRADIENT, "loss or gradient is not finite, or a gradient is 0")
    above = ""
    if end is not None:
        keep, above = losses > end, " above the end"
        losses, gradients = losses[keep], gradients[keep]
    if losses.size < MIN_POINTS:
        return refused(GRADIENT, f"{counted(losses.size, 'point')}{above}, under {MIN_POINTS}")
    if np.ptp(losses) == 0.0:
        return refused(GRADIENT, f"the loss is constant{above}")
    ends = _ends(losses, gradients, confidence) if end is None else np.array([end], dtype=np.float64)
    x, y = np.log(losses - ends[:, None]), np.log(gradients)
    best, bounds = _profiled_slope(x, y, confidence)
    if ends.size > 1 and best in {0, ends.size - 1}:
        return refused(
            GRADIENT, f"end of the loss is at the {'upper' if best == 0 else 'lower'} edge of what was searched"
        )
    slope, low, high = bounds
    reason = _weakness(x[best], y, "L - end", lambda theta: 1.0 / (1.0 - theta))
    if not reason and not 0.0 < slope < 1.0:
        reason = f"slope {slope:.3g} is outside (0, 1)"
    if reason:
        return refused(GRADIENT, reason)
    k_high = 1.0 / (1.0 - high) if high < 1.0 else np.inf
    return Degree(k=1.0 / (1.0 - slope), low=1.0 / (1.0 - max(low, 0.0)), high=k_high, assumption=GRADIENT, refusal="")


def _ends(losses: Array, gradients: Array, confidence: float) -> Array:
    """Ends of the loss that are looked at: a grid over all of ENDS, and a finer one about the best of it."""
    coarse = losses.min() - ENDS * np.ptp(losses)
    best, _ = _profiled_slope(np.log(losses - coarse[:, None]), np.log(gradients), confidence)
    near = np.geomspace(ENDS[max(best - 1, 0)], ENDS[min(best + 1, ENDS.size - 1)], 300)
    return np.unique(np.concatenate([coarse, losses.min() - near * np.ptp(losses)]))[::-1]


def _profiled_slope(x: Array, y: Array, confidence: float) -> tuple[int, tuple[float, float, float]]:
    """Index of the best regressor among `x [E, T]`, and slope of `y [T]` on it; its interval is over all.

    rho is that of the best; RSS(slope, e) = RSS(e) + S(e) (slope - slope(e))^2 has a level set in closed form.
    """
    rho, best = 0.0, 0
    for _ in range(3):
        best = int(_line_sums(x, y, rho)[0].argmin())
        by_end = [] if len(x) == 1 else [np.exp(x[best].min() - x[best])]  # derivative by the end of the loss
        columns = np.stack([np.ones_like(y), *by_end, x[best], y])[None]
        (rho, *_), _, _, (reach, *_) = gls(columns, np.array([float(y.size)]), confidence, np.array([TINY]))
    rest, size, slope = _line_sums(x, y, rho)
    best = int(rest.argmin())
    noise = rest[best] / (y.size - 2 - (len(x) > 1)) + TINY**2
    slack = np.sqrt(np.maximum(rest[best] + reach**2 * noise - rest, 0.0) / size)
    inside = rest <= rest[best] + reach**2 * noise
    return best, (float(slope[best]), float((slope - slack)[inside].min()), float((slope + slack)[inside].max()))


def _line_sums(x: Array, y: Array, rho: float) -> tuple[Array, Array, Array]:
    """Whitened residual sum of squares, squared length of the centred regressor, slope, for each of `x [E, T]`."""

    def white(values: Array) -> Array:
        first = np.sqrt(1.0 - rho**2) * values[..., :1]
        return np.concatenate([first, values[..., 1:] - rho * values[..., :-1]], axis=-1)

    one, regressor, response = white(np.ones_like(y)), white(x), white(y)
    one = one / np.sqrt(one @ one)
    regressor, response = regressor - (regressor @ one)[:, None] * one, response - (response @ one) * one
    size = np.square(regressor).sum(axis=1)
    slope = regressor @ response / size
    return np.square(response - slope[:, None] * regressor).sum(axis=1), size, slope


def degree_from_profile(x: ArrayLike, loss: ArrayLike, *, floor: ArrayLike = 0.0, confidence: float = 0.9) -> Degree:
    """Slope of log (L(x) - L(0)) against log |x| along a line in weight space, on fixed data.

    `x [P]` holds 0 (the end point) once, `loss [P]` the loss there; both signs of x are allowed, each with its own
    amplitude. Points with L(x) - L(0) <= `floor` (one number or `[P]`: rounding, or twice the standard error of the
    difference) are left out. Deviations are AR(1) along the line.
    Refused for values that are not finite, for under 8 points or under a decade of |x| above the floor, where some L(x)
    is below L(0) - floor, and for a bent line: then no single degree holds over these |x|.
    """
    places, losses = _pair("x", x, "loss", loss, confidence)
    if not np.isfinite(places).all() or (places == 0.0).sum() != 1:
        raise ValueError(f"x holds 0 {int((places == 0.0).sum())} times; allowed: finite numbers, 0 once")
    floors = np.asarray(floor, dtype=np.float64)
    if floors.shape not in {(), places.shape}:
        raise ValueError(f"floor has shape {floors.shape}; allowed: a number, or {places.shape}, as x has")
    if not (floors >= 0.0).all():
        raise ValueError(f"floor is {floors.min():g}; allowed: 0 or more")
    if not np.isfinite(losses).all():
        return refused(PROFILE, "loss is not finite")
    gap = losses - losses[places == 0.0]
    if (gap < -floors).any():
        return refused(PROFILE, "the loss is not least at x = 0")
    keep = (gap > floors) & (places != 0.0)
    order = np.lexsort((np.abs(places[keep]), places[keep] > 0.0))
    places, gap = places[keep][order], gap[keep][order]
    if places.size < MIN_POINTS:
        return refused(PROFILE, f"{counted(places.size, 'point')} above the floor, under {MIN_POINTS}")
    distance, rise = np.log(np.abs(places)), np.log(gap)
    for sign in np.unique(np.sign(places)):
        reason = _weakness(distance[np.sign(places) == sign], rise[np.sign(places) == sign], "|x|", lambda k: k)
        if reason:
            return refused(PROFILE, reason)
    sides = [np.where(np.sign(places) == sign, 1.0, 0.0) for sign in np.unique(np.sign(places))]
    columns = np.stack([*sides, distance, rise])[None]
    _, (k, *_), (error, *_), (reach, *_) = gls(columns, np.array([float(rise.size)]), confidence, np.array([TINY]))
    half = float(reach * error)
    return Degree(k=float(k), low=float(k) - half, high=float(k) + half, assumption=PROFILE, refusal="")


def _weakness(x: Array, y: Array, name: str, degree: Callable[[float], float]) -> str:
    """Why the line y(x) gives no degree: too short, or its halves have different ones. Empty if it gives one."""
    decades = float(np.ptp(x) / np.log(10.0))
    if decades < MIN_DECADES - 1e-9:
        return f"{decades:.2f} decades of {name}, under {MIN_DECADES:g}"
    lower = x < 0.5 * (x.min() + x.max())
    if min(lower.sum(), (~lower).sum()) < 4:
        return ""
    (a, error_a), (b, error_b) = (_rough_line(x[half], y[half]) for half in (lower, ~lower))
    apart = abs(degree(a) - degree(b)) > BENT * abs(degree(0.5 * (a + b)))
    if apart and abs(a - b) > BENT_ERRORS * np.hypot(error_a, error_b):
        return f"no single degree: {degree(a):.3g} at small {name}, {degree(b):.3g} at large"
    return ""


def _rough_line(x: Array, y: Array) -> tuple[float, float]:
    """Least-squares slope and its error, from neighbouring residuals' differences: a bend does not count as noise."""
    apart = x - x.mean()
    slope = float(apart @ y / (apart @ apart))
    noise = np.square(np.diff(y - slope * x)).mean() / 2.0
    return slope, float(np.sqrt(noise / (apart @ apart)))


def _pair(name: str, a: ArrayLike, other: str, b: ArrayLike, confidence: float) -> tuple[Array, Array]:
    """Two arrays `[T]` of equal length, or a ValueError."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1:
        raise ValueError(f"{name} has shape {first.shape}; allowed: [T]")
    if second.shape != first.shape:
        raise ValueError(f"{other} has shape {second.shape}; allowed: {first.shape}, as {name} has")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")
    return first, second


def refused(assumption: str, reason: str) -> Degree:
    """No estimate."""
    nan = float("nan")
    return Degree(k=nan, low=nan, high=nan, assumption=assumption, refusal=reason)
