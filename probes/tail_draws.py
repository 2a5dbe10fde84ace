"""New samples of times: one item of every cluster, imitations of a fitted tail, and of one law for all items."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from probes.tail_scan import Laws, Sample, zeta_quantile

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Generator = np.random.Generator


def _smallest(share: Array) -> Array:
    return np.asarray(np.log(-np.log1p(-share)))


# quantiles of log x, up to place and scale; the exponential law is a Weibull law
SINGLE_LAWS: dict[str, Callable[[Array], Array]] = {"lognormal": ndtri, "weibull": _smallest}


def one_each(group: Index, present: NDArray[np.bool_], count: int, rng: Generator) -> Array:
    """Weights `[count, n]` that pick one present item of every group."""
    key = np.where(present, rng.random((count, group.size)), -1.0)
    order = np.lexsort((key, np.broadcast_to(group, key.shape)), axis=1)
    ends = np.flatnonzero(np.diff(np.sort(group), append=-1))
    weight = np.zeros_like(key)
    np.put_along_axis(weight, order[:, ends], 1.0, axis=1)
    return weight


def imitate_tail(
    picked: Sample, laws: Laws, size: int, rng: Generator, *, discrete: bool = False, fixed: bool = False
) -> Sample:
    """For every row `size` new items: its Kaplan-Meier curve below its xmin, its power law above, censored alike.

    `fixed`: all lie above, and xmin leads each row as an item of no weight.
    """
    log_x, chance, uniform = np.empty((3, len(picked), size))
    chance, uniform, survival = rng.random(chance.shape), rng.random(chance.shape), picked.survival()
    for row in range(len(picked)):
        begin = int(np.searchsorted(picked.log_x, laws.log_xmin[row]))
        reach = survival[row, begin - 1] if begin else 1.0  # share at or above xmin
        body = np.searchsorted(-survival[row], -chance[row]).clip(max=picked.log_x.size - 1)
        above = _power_law(uniform[row], float(laws.excess[row]), float(laws.log_xmin[row]), discrete)
        log_x[row] = np.where(chance[row] < reach, above, picked.log_x[body])
    made = _hidden_alike(log_x, picked, rng)
    if not fixed:
        return made
    zero = np.zeros((len(made), 1))
    parts = (laws.log_xmin[:, None], made.log_x), (zero, made.weight), (zero, made.seen)
    return Sample(*(np.concatenate(part, axis=1) for part in parts))


def _power_law(uniform: Array, excess: float, log_xmin: float, discrete: bool) -> Array:
    """log x, by inversion of P(X >= x)."""
    if not discrete:
        return np.asarray(log_xmin - np.log1p(-uniform) / excess)
    return np.asarray(np.log(zeta_quantile(1.0 - uniform, excess, round(float(np.exp(log_xmin))))))


def _hidden_alike(log_x: Array, picked: Sample, rng: Generator) -> Sample:
    """`log_x [B, m]` behind ends of observation drawn from the Kaplan-Meier curve of each row's censoring, and sorted.

    Where a row's last item was seen, nothing is known of ends after it: the share of them that is left hides nothing.
    """
    seen = np.ones_like(log_x)
    if bool((picked.seen == 0.0)[picked.weight.any(axis=0)].any()):
        kept, ends = picked.uncensored(), np.append(picked.log_x, np.inf)
        for row, lives in enumerate(rng.random(log_x.shape)):
            limit = ends[np.searchsorted(-kept[row], -lives)]
            seen[row], log_x[row] = log_x[row] <= limit, np.minimum(log_x[row], limit)
    order = np.lexsort((1.0 - seen, log_x), axis=1)
    log_x, seen = (np.take_along_axis(array, order, axis=1) for array in (log_x, seen))
    return Sample(log_x, np.ones_like(log_x), seen)


def no_straighter(name: str, picked: Sample, size: int, rng: Generator) -> NDArray[np.bool_]:
    """Whether an imitation of each row, `size` items of one law censored alike, has no straighter probability plot.

    The share of such rows is the p-value of the law (Shapiro and Francia 1972, with plotting positions of the
    Kaplan-Meier curve and the distribution of the squared correlation simulated at the fitted line).
    """
    straight, place, scale = _plot(name, picked)
    log_x = place[:, None] + scale[:, None] * SINGLE_LAWS[name](rng.uniform(1e-12, 1.0, (len(picked), size)))
    return np.asarray(_plot(name, _hidden_alike(log_x, picked, rng))[0] <= straight)


def _plot(name: str, sample: Sample) -> tuple[Array, Array, Array]:
    """Squared correlation, intercept and slope of log x of what was seen on the law's quantiles, each `[B]`."""
    weight, after = sample.weight * sample.seen, sample.survival()
    before = np.concatenate([np.ones((len(sample), 1)), after[:, :-1]], axis=1)
    quantile = SINGLE_LAWS[name](np.clip(1.0 - 0.5 * (before + after), 1e-9, 1.0 - 1e-9))
    total = weight.sum(axis=1, keepdims=True)
    log_x = np.broadcast_to(sample.log_x, weight.shape)
    mean_x, mean_q = ((weight * values).sum(axis=1, keepdims=True) / total for values in (log_x, quantile))
    x, q = log_x - mean_x, quantile - mean_q
    xx, qq, xq = ((weight * values).sum(axis=1) for values in (x * x, q * q, x * q))
    slope = xq / qq
    return slope * xq / xx, mean_x[:, 0] - slope * mean_q[:, 0], slope
