"""The degree k of an effective potential U = u |x|^k, from several observations, each with what it assumes.

Under gradient flow in U, x ~ t^(-1/(k-2)) and U ~ t^(-k/(k-2)) for k > 2, while k = 2 is exponential. Without any
dynamics |dU/dx| ~ U^(1 - 1/k). Estimates of different kinds need not agree: where an assumption fails, they do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from probes.inference import gls
from probes.llc import NEARBY, TOLERANCE
from probes.relaxation import Relaxation
from probes.windows import Array
from probes.words import counted

MIN_POINTS = 8
MIN_DECADES = 1.0  # of the gap, or of |x|
BENT, BENT_ERRORS = 0.2, 6.0  # degrees of the two halves that differ by more (share of k; standard errors) are not one
ENDS = np.geomspace(1e-12, 10.0, 300)  # (least loss - end) in units of the loss's range
BLOCKS_PER_DECADE = 4.0  # of the drift
TINY = 1e-9  # standard error of a point that is believed at most
FLOOR = 2.0  # standard errors over examples that a difference of losses must exceed
BLOCKS = 16  # of examples, left out one at a time
POINTS, REACH, CROWDING = 48, 6.0, 6.0  # of a quadrature: a side; standard deviations; how dense about 0
ALIVE = 8.0  # points that a density must cover


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
PROFILE = "the loss along this line, mean of both sides, is u|x|^k up to the largest |x|; no dynamics"
LINE = "one-dimensional learning coefficient along the line, taken to gamma = 0; equals 1/k only as n_beta grows"
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


def _white(values: Array, rho: float) -> Array:
    """AR(1) noise along the last axis made white."""
    first = np.sqrt(1.0 - rho**2) * values[..., :1]
    return np.concatenate([first, values[..., 1:] - rho * values[..., :-1]], axis=-1)


def _line_sums(x: Array, y: Array, rho: float) -> tuple[Array, Array, Array]:
    """Whitened residual sum of squares, squared length of the centred regressor, slope, for each of `x [E, T]`."""
    one, regressor, response = _white(np.ones_like(y), rho), _white(x, rho), _white(y, rho)
    one = one / np.sqrt(one @ one)
    regressor, response = regressor - (regressor @ one)[:, None] * one, response - (response @ one) * one
    size = np.square(regressor).sum(axis=1)
    slope = regressor @ response / size
    return np.square(response - slope[:, None] * regressor).sum(axis=1), size, slope


def degree_from_profile(x: ArrayLike, loss: ArrayLike, *, floor: float = 0.0, confidence: float = 0.9) -> Degree:
    """Slope of log (L(x) - L(0)) against log |x| along a line in weight space, L being the mean over fixed data.

    `x [P]` holds 0 (the end point) once, and other points on one side of it, or on both as each other's mirror images:
    then L is the mean of both sides, in which what is odd (a slope at the point) has no part. `loss [P]`, or `[n, P]`
    of n examples. Points with L(x) - L(0) <= `floor` (rounding), plus 2 standard errors over examples, are left out.
    The interval has two parts: deviations from the line, AR(1) along it, and the scatter of examples (delta method).
    Refused for values that are not finite, for under 8 points or under a decade of |x| above the floor, where L is
    lower on a side than L(0) by more than the floor, and for a bent line: then no single degree holds over these |x|.

    Raises ValueError for shapes that do not match, one example, points that are no mirror images, and a floor below 0.
    """
    places, losses = _line(x, loss, confidence)
    if not floor >= 0.0:
        raise ValueError(f"floor is {floor:g}; allowed: 0 or more")
    if not np.isfinite(losses).all():
        return refused(PROFILE, "loss is not finite")
    gaps = losses - losses[:, places == 0.0]
    if (gaps.mean(axis=0) < -_floor(gaps, floor)).any():
        return refused(PROFILE, "the loss is not least at x = 0")
    above, below = places > 0.0, places < 0.0
    if above.any() and below.any():
        side, gaps = places[above], 0.5 * (gaps[:, above] + gaps[:, below][:, ::-1])
    else:
        side, gaps = np.abs(places[above | below]), gaps[:, above | below]
    keep = gaps.mean(axis=0) > _floor(gaps, floor)
    if keep.sum() < MIN_POINTS:
        return refused(PROFILE, f"{counted(int(keep.sum()), 'point')} above the floor, under {MIN_POINTS}")
    gaps, distance = gaps[:, keep], np.log(side[keep])
    rise = np.log(gaps.mean(axis=0))
    reason = _weakness(distance, rise, "|x|", lambda k: k)
    if reason:
        return refused(PROFILE, reason)
    columns = np.stack([np.ones_like(rise), distance, rise])[None]
    (rho, *_), (k, *_), (error, *_), (reach, *_) = gls(
        columns, np.array([float(rise.size)]), confidence, np.array([TINY])
    )
    half = float(np.hypot(reach * error, _scatter(gaps, distance, float(rho), confidence)))
    return Degree(k=float(k), low=float(k) - half, high=float(k) + half, assumption=PROFILE, refusal="")


def _floor(gaps: Array, floor: float) -> Array:
    """`[P]`: what the mean of `gaps [n, P]` must exceed."""
    error = gaps.std(axis=0, ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else np.zeros(gaps.shape[1])
    return np.asarray(floor + FLOOR * error)


def _scatter(gaps: Array, distance: Array, rho: float, confidence: float) -> float:
    """Half the interval of the slope for the scatter of examples: it is linear in the logarithm of the mean gap."""
    if len(gaps) == 1:
        return 0.0
    white = _white(np.eye(distance.size), rho).T
    weights = (np.linalg.pinv(white @ np.stack([np.ones_like(distance), distance], axis=1)) @ white)[1]
    own = gaps / gaps.mean(axis=0) @ weights
    return float(stdtrit(len(own) - 1, 0.5 * (1.0 + confidence)) * own.std(ddof=1) / np.sqrt(len(own)))


def line_points(gamma: float) -> Array:
    """Points of a line `[2 x 48 + 1]`, densest about 0, for `degree_from_line` at gamma > 0, a third and three times
    it: to 6 standard deviations of exp(-gamma/3 x^2/2)."""
    weakest = gamma * min(b for _, b in NEARBY.values())
    side = REACH / np.sqrt(weakest) * np.sinh(CROWDING * np.arange(1, POINTS + 1) / POINTS) / np.sinh(CROWDING)
    return np.concatenate([-side[::-1], [0.0], side])


def degree_from_line(
    x: ArrayLike, loss: ArrayLike, n_beta: float, gamma: float, *, scale: float = 1.0, confidence: float = 0.9
) -> Degree:
    """k = 1 / llc of the learning coefficient along one line, taken to gamma = 0,

        llc(gamma) = n_beta (E[L(x)] - L(0)),   x ~ exp(-n_beta L(x) - gamma/2 x^2),
        llc = (3 llc(gamma / 3) - llc(gamma)) / 2,

    as a potential u|x|^k has llc(gamma) = 1/k - c gamma + O(gamma^2). By quadrature over `x [P]`, the points of
    `line_points(gamma)`: nothing is sampled, so that only the examples scatter. `loss [P]`, or `[n, P]` of n examples;
    L is `scale` times their mean. The interval goes by llc - llc(gamma / 3) to either side, for what is beyond first
    order, and by a jackknife over 16 blocks of examples further.

    Refused where a loss is not finite, the density covers under 8 points, the coefficient is not above 0, what is odd
    in L (a slope at the point) changes it by more than 20%, the same at n_beta and gamma x 1/3 and x 3 differs by more
    than 20%, or its interval lies above 1/2, which no k has. ValueError for n_beta or gamma that are not above 0, and
    for other points.
    """
    if not (0.0 < n_beta < np.inf and 0.0 < gamma < np.inf):
        raise ValueError(f"n_beta, gamma are {n_beta:g}, {gamma:g}; allowed: finite numbers above 0")
    places, losses = _line(x, loss, confidence)
    if places.size != 2 * POINTS + 1 or not np.allclose(places, line_points(gamma), rtol=1e-6):
        raise ValueError(f"x is {places.size} points; allowed: those of line_points({gamma:g})")
    if not np.isfinite(losses).all():
        return refused(LINE, "loss is not finite")
    blocks = min(len(losses), BLOCKS)
    block = np.arange(len(losses)) * blocks // len(losses)
    left_out = [losses[block != index].mean(axis=0) for index in range(blocks)] if blocks > 1 else []
    mean = losses.mean(axis=0)
    curves = scale * np.stack([mean, 0.5 * (mean + mean[::-1]), *left_out])
    if (_weights(places, curves[:1], n_beta * max(a for a, _ in NEARBY.values()), gamma)[0] > 0.01).sum() < ALIVE:
        return refused(LINE, "the density is narrower than the points about 0")
    held = _coefficients(places, curves, n_beta, gamma)
    value, even = held[:2]
    if not value > 0.0:
        return refused(LINE, f"coefficient {value:.3g} is not above 0")
    if not abs(value - even) <= TOLERANCE * value:
        return refused(LINE, f"the slope at the point changes the coefficient by {value / even - 1.0:+.0%}")
    near = {name: _coefficients(places, curves[:1], a * n_beta, b * gamma)[0] for name, (a, b) in NEARBY.items()}
    moved = [
        f"{at / value - 1.0:+.0%} at {name}" for name, at in near.items() if not abs(at / value - 1.0) <= TOLERANCE
    ]
    if moved:
        return refused(LINE, f"depends on the settings: {', '.join(moved)}")
    freer = _coefficients(places, curves, n_beta, gamma / 3.0)
    free, _, *others = 1.5 * freer - 0.5 * held
    half = abs(free - freer[0])
    if others:
        error = np.sqrt((blocks - 1) / blocks * np.square(np.array(others) - np.mean(others)).sum())
        half += float(stdtrit(blocks - 1, 0.5 * (1.0 + confidence)) * error)
    low, high = free - half, free + half
    if low > 0.5 * (1.0 + 1e-6):
        return refused(LINE, f"coefficient {free:.3g} (from {low:.3g}) is above 1/2")
    return Degree(
        k=float(1 / free), low=float(1 / high), high=float(1 / low) if low > 0 else np.inf, assumption=LINE, refusal=""
    )


def _coefficients(x: Array, losses: Array, n_beta: float, gamma: float) -> Array:
    """Of each of the curves `losses [C, P]`. Trapezia in the variable in which points are evenly spaced."""
    gap = losses - losses[:, x == 0.0]
    weight = _weights(x, losses, n_beta, gamma) * np.gradient(x)
    return np.asarray(n_beta * (weight * gap).sum(axis=1) / weight.sum(axis=1))


def _weights(x: Array, losses: Array, n_beta: float, gamma: float) -> Array:
    """Density at the points `[C, P]`, 1 where it is greatest."""
    exponent = -n_beta * losses - 0.5 * gamma * x**2
    return np.asarray(np.exp(exponent - exponent.max(axis=1, keepdims=True)))


def _line(x: ArrayLike, loss: ArrayLike, confidence: float) -> tuple[Array, Array]:
    """Points `[P]` in order, 0 once, one side or mirror images; losses `[n, P]`, n = 1 of a mean. ValueError if not."""
    places, losses = np.asarray(x, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if losses.ndim == 2 and len(losses) < 2:
        raise ValueError(f"loss has shape {losses.shape}; allowed: [P], or [n, P] of two examples or more")
    losses = np.atleast_2d(losses)
    _pair("x", places, "loss", losses[0], confidence)
    if not np.isfinite(places).all() or (places == 0.0).sum() != 1:
        raise ValueError(f"x holds 0 {int((places == 0.0).sum())} times; allowed: finite numbers, 0 once")
    order = np.argsort(places)
    places, losses = places[order], losses[:, order]
    both = places[0] < 0.0 < places[-1]
    if both and not (places.size % 2 and np.allclose(places, -places[::-1], rtol=1e-9, atol=0.0)):
        raise ValueError("x has two sides that differ; allowed: one side, or each other's mirror images")
    return places, losses


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
