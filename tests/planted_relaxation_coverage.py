"""How often intervals hold the truth, and how often a law is found that is not there: ours, and wrong methods."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import stdtrit

import tests.planted_relaxation as planted
from probes.degree import Degree, degree_from_gradient, degree_from_loss
from probes.growth import fit_growths
from probes.relaxation import Relaxation, fit_relaxations
from tests.planted import Array, Generator, Noise, autoregressive
from tests.planted_relaxation import FAINT, JITTER, MIXED, Curve, Flow, probe_times

Counts = dict[str, tuple[int, int]]
NOISES = {"faint": FAINT, "jitter": JITTER, "mixed": MIXED}
TIME = probe_times()
Interval = tuple[float, float]


def coverage(count: int, seed: int) -> Counts:
    """Name of a quantity -> (truths inside the 90% interval, intervals given); "...: refused" -> (refused, all)."""
    return exponent_coverage(count, seed) | growth_coverage(count, seed) | degree_coverage(count, seed)


def exponent_coverage(count: int, seed: int) -> Counts:
    """Of the exponent of approach under several noises; wrong estimators under the one called jitter."""
    found: Counts = {}
    for i, (name, noise) in enumerate(NOISES.items()):
        curves, scores, fits = planted_fits(planted.power, count, noise, (seed, i))
        found |= tally(f"exponent ({name})", curves, [(f.low, f.high) if not f.refusal else None for f in fits])
        if name == "jitter":
            for wrong, method in WRONG.items():
                intervals = [method(*cut(c, s)) for c, s in zip(curves, scores, strict=True)]
                found |= tally(f"exponent ({wrong}, wrong)", curves, intervals)
    return found


def planted_fits(
    kind: Callable[[Generator], Curve], count: int, noise: Noise, seed: int | tuple[int, ...]
) -> tuple[list[Curve], Array, list[Relaxation]]:
    """Curves of one kind, their noisy scores `[n, R, T]`, and their fits."""
    rng = np.random.default_rng(seed)
    curves = [kind(rng) for _ in range(count)]
    scores = np.stack([curve.seen(TIME, noise, rng) for curve in curves])
    return curves, scores, fit_relaxations(TIME, scores, [curve.window for curve in curves])


def tally(name: str, curves: list[Curve], intervals: list[Interval | None]) -> Counts:
    given = [(c.exponent, i) for c, i in zip(curves, intervals, strict=True) if i is not None]
    covered = sum(bool(low <= truth <= high) for truth, (low, high) in given)
    return {name: (covered, len(given)), f"{name}: refused": (len(curves) - len(given), len(curves))}


def growth_coverage(count: int, seed: int) -> Counts:
    """Of lambda, of b and of 1 / (k - 2), each on its own law; times up to t50.

    k stays below 3.5: beyond, a tenth to a quarter of the curves are refused for their short gap, which are those whose
    fits are off, and intervals of the others cover more than they say.
    """
    found: Counts = {}
    kinds = {
        "exponential": lambda rng: planted.growing(rng, 2.0),
        "critical": lambda rng: planted.growing(rng, rng.uniform(2.8, 3.5)),
        "power": planted.growing_power,
    }
    time = probe_times(per_decade=40)
    for i, (law, kind) in enumerate(kinds.items()):
        rng = np.random.default_rng((seed, 10 + i))
        curves = [kind(rng) for _ in range(count)]
        scores = np.stack([curve.seen(time, JITTER, rng) for curve in curves])
        fits = fit_growths(time, scores, [curve.window for curve in curves], law=law)
        found |= tally(f"growth, {law}", curves, [(f.low, f.high) if not f.refusal else None for f in fits])
    return found


def degree_coverage(count: int, seed: int) -> Counts:
    """Of k from the loss gap and from the Lojasiewicz slope, along gradient flows of degree 3 to 6."""
    rng, time = np.random.default_rng((seed, 20)), probe_times(10.0, 1e4)
    degrees, losses, gradients = rng.uniform(3.0, 6.0, count), [], []
    for k in degrees:
        flow = Flow(k, 10.0 ** rng.uniform(-3.0, -2.0))
        start = flow.loss(time[:1])
        losses.append(flow.loss(time) / start + 0.3 + 0.003 * autoregressive(rng, time.shape, 0.4))
        gradients.append(flow.gradient(time) * np.exp(0.1 * autoregressive(rng, time.shape, 0.4)))
    gap = [degree_from_loss(fit) for fit in fit_relaxations(time, np.stack(losses), noise="constant")]
    flows = [Flow(k, 0.01) for k in degrees]
    clean = [flow.loss(time) + 0.3 for flow in flows]
    noisy = [f.gradient(time) * np.exp(0.1 * autoregressive(rng, time.shape, 0.4)) for f in flows]
    slope = [degree_from_gradient(loss, gradient) for loss, gradient in zip(clean, noisy, strict=True)]
    return degrees_held("degree, loss gap", degrees, gap) | degrees_held("degree, gradient slope", degrees, slope)


def degrees_held(name: str, truths: Array, found: list[Degree]) -> Counts:
    given = [(k, d) for k, d in zip(truths, found, strict=True) if not d.refusal]
    covered = sum(bool(d.low <= k <= d.high) for k, d in given)
    return {name: (covered, len(given)), f"{name}: refused": (len(found) - len(given), len(found))}


# Wrong estimators of the exponent: (time, value, start) -> 90% interval


def cut(curve: Curve, score: Array) -> tuple[Array, Array]:
    """Times and mean score over a curve's window."""
    inside = (curve.window[0] <= TIME) & (curve.window[1] >= TIME)
    return TIME[inside], score.mean(axis=0)[inside]


def last_mean(time: Array, value: Array) -> float:
    """The asymptote as one reads it off: the mean over the last third of a decade."""
    return float(value[time >= time[-1] * 10 ** (-1 / 3)].mean())


def line(time: Array, value: Array) -> tuple[Interval, float]:
    """Slope of a log-log line of (last mean - value) against t, with its textbook interval, and R^2."""
    gap = last_mean(time, value) - value
    x, y = np.log(time[gap > 0.0]), np.log(gap[gap > 0.0])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    half = stdtrit(x.size - 2, 0.95) * np.sqrt(covariance[0, 0])
    return (-slope - half, -slope + half), float(np.corrcoef(x, y)[0, 1] ** 2)


def fitted(model: Callable[..., Array], time: Array, value: Array, start: list[float], at: int) -> Interval:
    """Textbook interval of parameter `at` of a least-squares fit, noise taken to be white; nothing if it fails."""
    try:
        best, covariance = curve_fit(model, time, value, start, maxfev=4000)
    except RuntimeError:
        return np.nan, np.nan
    half = stdtrit(time.size - len(start), 0.95) * np.sqrt(covariance[at, at])
    return best[at] - half, best[at] + half


def origin_at_zero(time: Array, value: Array) -> Interval:
    scale = time[0]
    return fitted(lambda t, s, g, a: s - g * (t / scale) ** -a, time, value, [value[-1], np.ptp(value), 0.7], 2)


def asymptote_read_off(time: Array, value: Array) -> Interval:
    scale, end = time[0], last_mean(time, value)

    def model(t: Array, g: float, a: float, log_d: float) -> Array:
        return end - g * ((t - scale) / (scale * np.exp(log_d)) + 1.0) ** -a

    return fitted(model, time, value, [np.ptp(value), 0.7, -0.3], 1)


def white_noise(time: Array, value: Array) -> Interval:
    scale = time[0]

    def model(t: Array, s: float, g: float, a: float, log_d: float) -> Array:
        return s - g * ((t - scale) / (scale * np.exp(log_d)) + 1.0) ** -a

    return fitted(model, time, value, [value[-1], np.ptp(value), 0.7, -0.3], 2)


WRONG: dict[str, Callable[[Array, Array], Interval]] = {
    "t0 = 0 and asymptote read off": lambda time, value: line(time, value)[0],
    "t0 = 0": origin_at_zero,
    "asymptote read off": asymptote_read_off,
    "white noise": white_noise,
}


# False positives

TRUTHS = {"exponential": planted.exponential, "logistic": planted.logistic, "log_logistic": planted.log_logistic,
          "gompertz": planted.gompertz, "power": planted.power}  # fmt: skip


def found_power(count: int, seed: int) -> Counts:
    """Truth and noise -> (times "power" is found, curves); beside a log-log line with R^2 > 0.95 as criterion."""
    found: Counts = {}
    for i, (truth, kind) in enumerate(TRUTHS.items()):
        for j, (name, noise) in enumerate(NOISES.items()):
            curves, scores, fits = planted_fits(kind, count, noise, (seed, i, j))
            straight = [line(*cut(c, s))[1] > 0.95 for c, s in zip(curves, scores, strict=True)]
            found[f"{truth}, {name}"] = (Counter(fit.preferred for fit in fits)["power"], count)
            found[f"{truth}, {name} (log-log line)"] = (sum(straight), count)
    return found
