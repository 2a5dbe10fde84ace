"""How often the intervals of `probes.emergence`, and of estimators known to be wrong, hold the planted truth.

Also how often statuses are right. The curves, their truth and their noise come from `tests.planted`, which knows
nothing of the estimator.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from probes import emergence
from probes.emergence import Emergence, fit_emergences
from tests import planted
from tests.planted import Noise, Planted, observe, probe_steps

Array = NDArray[np.float64]
Kind = Callable[[np.random.Generator], Planted]
U = 0.1
STEP = probe_steps()
RESAMPLINGS = 200
PERCENTILES = [0.05, 0.95]


def planted_scores(
    kinds: Sequence[Kind], count: int, noise: Noise, seed: int, replicates: int = 8
) -> tuple[list[Planted], Array]:
    """`count` heads, of the kinds in turn, and their scores `[count, R, T]`."""
    rng = np.random.default_rng(seed)
    heads = [kinds[i % len(kinds)](rng) for i in range(count)]
    scores = [observe(head, STEP, noise, rng, replicates, U) for head in heads]
    return heads, np.stack(scores)


def percentile_bounds(score: Array, transient: bool, rng: np.random.Generator) -> tuple[Array, Array]:
    """The textbook interval that is too short: quantiles over resampled replicates; bounds of level, and of t50."""
    picked = rng.integers(0, len(score), size=(RESAMPLINGS, len(score)))
    curves = emergence.smooth(score[picked].mean(axis=1))
    low_high = np.exp(np.quantile(emergence._log_times(np.log(STEP), curves, U, transient), PERCENTILES, axis=0))
    return low_high[:, 0], low_high[:, 1]


def whole_isotonic_t50(score: Array) -> float:
    """t50 of the isotonic fit over the whole curve, as if nothing could fall again."""
    fit = isotonic_regression(emergence.smooth(score.mean(axis=0))).x
    k = int(np.flatnonzero(fit >= 0.5 * (fit[0] + fit[-1]))[0])
    return float(STEP[k])


def holds(low: float, high: float, truth: float) -> bool:
    """Whether the truth lies in the interval."""
    return bool(low <= truth <= high)


def coverage(count: int, seed: int) -> dict[str, tuple[int, int]]:
    """By quantity, how many nominal 90% intervals hold the truth, of how many, under the usual noise.

    The level and t50 of `count` rising curves, and t50 of `count` transient ones. A time that was not given is not
    attempted; "<name>: refused" counts these. The wrong estimators see the same curves: the percentile bootstrap of the
    replicates; for transient curves the isotonic fit over all probes instead of up to the peak, around whose t50 the
    right interval's width is laid.
    """
    hits: dict[str, list[bool]] = {}
    rng = np.random.default_rng(seed + 1)
    heads, scores = planted_scores(planted.RISING, count, planted.USUAL, seed)
    for head, score, fit in zip(heads, scores, fit_emergences(STEP, scores, U), strict=True):
        level, t50 = percentile_bounds(score, fit.status == "transient", rng)
        record(hits, "level", fit.level, (fit.level_low, fit.level_high), head.level)
        record(hits, "t50", fit.t50, (fit.low, fit.high), head.t50)
        record(hits, "level (percentile bootstrap, wrong)", fit.level, level, head.level)
        record(hits, "t50 (percentile bootstrap, wrong)", fit.t50, t50, head.t50)
    heads, scores = planted_scores((planted.transient,), count, planted.USUAL, seed + 2)
    for head, score, fit in zip(heads, scores, fit_emergences(STEP, scores, U), strict=True):
        around = whole_isotonic_t50(score) / fit.t50
        record(hits, "t50 of transient curves", fit.t50, (fit.low, fit.high), head.t50)
        record(hits, "t50 of transient curves (isotonic over all, wrong)", fit.t50,
               (around * fit.low, around * fit.high), head.t50)  # fmt: skip
    table: dict[str, tuple[int, int]] = {}
    for name, found in hits.items():
        table[name] = (sum(found), len(found))
        table[f"{name}: refused"] = (count - len(found), count)
    return table


def record(
    hits: dict[str, list[bool]], name: str, estimate: float, bounds: tuple[float, float] | Array, truth: float
) -> None:
    """Add to `hits` whether the bounds hold the truth, if there is an estimate."""
    found = hits.setdefault(name, [])
    if np.isfinite(estimate):
        found.append(holds(bounds[0], bounds[1], truth))


def confusion(count: int, noise: Noise, seed: int) -> Counter[tuple[str, str, str]]:
    """How many curves there were, of `count` of each kind, by kind, planted status and status found."""
    table: Counter[tuple[str, str, str]] = Counter()
    for kind in planted.KINDS:
        heads, scores = planted_scores((kind,), count, noise, seed)
        fits: list[Emergence] = fit_emergences(STEP, scores, U)
        table.update((head.kind, head.status, fit.status) for head, fit in zip(heads, fits, strict=True))
    return table


def share_right(table: Counter[tuple[str, str, str]]) -> float:
    """Share of the curves whose status is the planted one."""
    return sum(n for (_, true, found), n in table.items() if true == found) / table.total()
