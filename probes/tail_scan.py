"""Many samples at once: power laws above every candidate xmin, and the one with the least Kolmogorov-Smirnov distance.

A sample is a row of items sorted by time, each with a weight (0 for items that a resample left out) and a flag that
says whether its time was seen or is only known to be exceeded (right-censored). Tied items stand one behind another,
those seen first. Given x >= xmin the items below play no part: an item censored below xmin is left out, as nothing says
on which side of xmin its time lies. Where ends do not depend on times this loses information, not validity.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import zeta

Array = NDArray[np.float64]
Index = NDArray[np.intp]

LEAST_EVENTS = 10.0  # seen in the smallest tail that is searched
MOST_CANDIDATES = 100  # for xmin; where there are more times, those whose tail counts are spaced geometrically
CHUNK = 1 << 17  # numbers in one batch of rows: it stays in the cache
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows sorted by time; `log_x [n]` or `[B, n]`, `weight [B, n]`, `seen [n]` or `[B, n]` (1 or 0)."""

    log_x: Array
    weight: Array
    seen: Array

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, part: slice) -> "Sample":
        """Some of the rows."""
        log_x, seen = (array[part] if array.ndim == 2 else array for array in (self.log_x, self.seen))
        return Sample(log_x, self.weight[part], seen)

    def survival(self) -> Array:
        """Kaplan-Meier share that outlives each item, `[B, n]`."""
        return _product(self.weight * self.seen, _from_here(self.weight))

    def uncensored(self) -> Array:
        """Kaplan-Meier share of censoring times after each item, `[B, n]`; at a tie what is seen goes first."""
        return _product(self.weight * (1.0 - self.seen), _from_here(self.weight))


@dataclass(frozen=True, slots=True)
class Laws:
    """One power law per row, every field `[B]`; `distance` is inf where no candidate leaves enough events."""

    distance: Array
    log_xmin: Array
    excess: Array  # alpha - 1
    events: Array  # weight of what was seen in the tail

    def repeated(self, count: int) -> "Laws":
        """One row, `count` times."""
        return Laws(*(np.repeat(getattr(self, name), count) for name in Laws.__slots__))


def scan(sample: Sample, *, discrete: bool = False, least: float = LEAST_EVENTS, fixed: bool = False) -> Laws:
    """The power law of each row whose xmin, among its items, has the least distance; `fixed`: xmin is the first item.

    Exponent above xmin: continuous, alpha = 1 + sum_seen w / sum_all w log(x / xmin); discrete, the maximum of
    -alpha sum w log x - log zeta(alpha, xmin) sum w. Distance: the largest difference between the Kaplan-Meier curve of
    the tail and x^-(alpha - 1), on both sides of its steps and up to the last event. A candidate needs `least` events.
    """
    sample = _merged(sample) if discrete else sample
    height = max(1, CHUNK // sample.weight.shape[1])
    parts = [sample.rows(slice(i, i + height)) for i in range(0, len(sample), height)]
    laws = [_scan(part, discrete, least, fixed) for part in parts]
    return Laws(*(np.concatenate([getattr(law, name) for law in laws]) for name in Laws.__slots__))


def _merged(sample: Sample) -> Sample:
    """Items of one integer made one, with the sum of their weights; rows are filled up with their last, weighing 0."""
    log_x = np.broadcast_to(sample.log_x, sample.weight.shape)
    new = np.diff(log_x, axis=1, prepend=-np.inf) > 0.0
    place = new.cumsum(axis=1) - 1
    width = int(place[:, -1].max()) + 1
    flat = (place + width * np.arange(len(sample))[:, None]).ravel()
    weight = np.bincount(flat, sample.weight.ravel(), minlength=width * len(sample)).reshape(-1, width)
    merged = np.repeat(log_x[:, -1:], width, axis=1)
    np.put_along_axis(merged, place, log_x, axis=1)
    return Sample(merged, weight.astype(np.float64), np.ones(width))


def _from_here(values: Array) -> Array:
    """Sums over this item and all later ones."""
    return np.asarray(values[:, ::-1].cumsum(axis=1)[:, ::-1])


def _product(lost: Array, at_risk: Array) -> Array:
    return np.asarray(np.cumprod(1.0 - lost / np.maximum(at_risk, TINY), axis=1))


def _candidates(events: Array, least: float) -> Index:
    """Columns to try as xmin, from the mean events `[n]` at or above each."""
    enough = np.flatnonzero(events >= least)
    if enough.size <= MOST_CANDIDATES:
        return enough
    wanted = np.geomspace(events[enough[0]], events[enough[-1]], MOST_CANDIDATES)
    return np.unique(enough[np.clip(np.searchsorted(-events[enough], -wanted), 0, enough.size - 1)])


def _scan(sample: Sample, discrete: bool, least: float, fixed: bool) -> Laws:
    shape, rows = sample.weight.shape, np.arange(len(sample))
    log_x, seen = np.broadcast_to(sample.log_x, shape), np.broadcast_to(sample.seen, shape)
    at_risk, hit = _from_here(sample.weight), sample.weight * seen
    events, logs, after = _from_here(hit), _from_here(sample.weight * log_x), sample.survival()
    before = np.concatenate([np.ones((shape[0], 1)), after[:, :-1]], axis=1)
    first, last = _ties(log_x)
    steps = _Steps.of(log_x, hit, before, after, first, last, discrete)
    best = Laws(*(np.full(shape[0], value) for value in (np.inf, np.nan, np.nan, 0.0)))
    for column in [0] if fixed else _candidates(events.mean(axis=0), least):
        start = first[:, column]
        log_xmin, count, total = log_x[:, column], events[rows, start], at_risk[rows, start]
        spread = logs[rows, start] - total * log_xmin
        able = (count >= least) & (spread > 1e-12 * total) & (fixed | (sample.weight[:, column] > 0.0))
        if not able.any():
            continue
        spread = np.where(able, spread, 1.0)
        excess = zeta_excess(log_xmin, spread / total) if discrete else count / spread
        distance = steps.distance(int(column), excess, log_xmin, before[rows, start])
        better = able & (distance < best.distance)
        for name, values in zip(Laws.__slots__, (distance, log_xmin, excess, count), strict=True):
            getattr(best, name)[better] = values[better]
    return best


def _ties(log_x: Array) -> tuple[Index, Index]:
    """Columns of the first and the last item tied with each."""
    column, change = np.arange(log_x.shape[1]), np.diff(log_x, axis=1) > 0.0
    edge = np.ones((len(log_x), 1), dtype=bool)
    first = np.where(np.concatenate([edge, change], axis=1), column, 0)
    last = np.where(np.concatenate([change, edge], axis=1), column, log_x.shape[1])
    return np.maximum.accumulate(first, axis=1), np.asarray(np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1])


@dataclass(frozen=True, slots=True)
class _Steps:
    """The Kaplan-Meier curve just before and after each item `[B, n]`, cut off after the last event."""

    log_x: Array
    before: Array
    after: Array
    discrete: bool

    @classmethod
    def of(
        cls, log_x: Array, hit: Array, before: Array, after: Array, first: Index, last: Index, discrete: bool
    ) -> "_Steps":
        if discrete:  # the fitted curve steps too, so that the middle of a tie is no point of comparison
            before, after = np.take_along_axis(before, first, axis=1), np.take_along_axis(after, last, axis=1)
        end = log_x.shape[1] - 1 - (hit > 0.0)[:, ::-1].argmax(axis=1)[:, None]
        late = np.arange(log_x.shape[1]) > end
        return cls(
            np.where(late, np.take_along_axis(log_x, end, axis=1), log_x),
            np.where(late, after, before),
            after,
            discrete,
        )

    def distance(self, column: int, excess: Array, log_xmin: Array, scale: Array) -> Array:
        """Largest difference from the power law `[B]`, over the items from `column` on."""
        apart = self.log_x[:, column:] - log_xmin[:, None]
        share = 1.0 / np.maximum(scale, TINY)[:, None]
        if self.discrete:
            x, alpha = np.round(np.exp(self.log_x[:, column:])), excess[:, None] + 1.0
            norm = zeta(alpha, np.round(np.exp(log_xmin))[:, None])
            law_before = zeta(alpha, x) / norm
            law_after = law_before - x**-alpha / norm
            up, down = self.before[:, column:] * share - law_before, self.after[:, column:] * share - law_after
            return np.asarray(np.maximum(np.abs(up).max(axis=1), np.abs(down).max(axis=1)))
        apart *= -excess[:, None]
        law = np.exp(apart, out=apart)
        above = (self.before[:, column:] * share - law).max(axis=1)
        below = (law - self.after[:, column:] * share).max(axis=1)
        return np.asarray(np.maximum(above, below))


def zeta_excess(log_xmin: Array, mean_log: Array) -> Array:
    """Maximum-likelihood alpha - 1 `[B]` of integers with mean log(x / xmin) = `mean_log`, by Newton's method.

    The equation is -d/dalpha log zeta(alpha, xmin) = mean log x; the derivatives are central differences. log zeta is
    convex in alpha, and steps are held to a factor of 2 in alpha - 1.
    """
    q = np.round(np.exp(log_xmin))
    target = mean_log + np.log(q)
    excess = 1.0 / (target - np.log(q - 0.5))
    for _ in range(12):
        width = 1e-3 * excess
        low, middle, high = (np.log(np.maximum(zeta(1.0 + excess + k * width, q), TINY)) for k in (-1, 0, 1))
        slope, bend = (high - low) / (2.0 * width) + target, (high - 2.0 * middle + low) / width**2
        step = np.clip(slope / np.maximum(bend, TINY), -excess, 0.5 * excess)
        excess = excess - step
        if (np.abs(step) < 1e-8 * excess).all():
            break
    return np.asarray(excess)


def zeta_quantile(share: Array, excess: float, xmin: int) -> Array:
    """Largest integers x >= xmin with P(X >= x) >= `share`, by bisection; beyond 2^53 times xmin they are cut off."""
    alpha, norm = 1.0 + excess, zeta(1.0 + excess, xmin)
    low, high = np.full(share.shape, float(xmin)), np.full(share.shape, xmin * 2.0)
    while (grow := (zeta(alpha, high) >= share * norm) & (high < xmin * 2.0**53)).any():
        low, high = np.where(grow, high, low), np.where(grow, 2.0 * high, high)
    while (high - low > 1.0 + 1e-12 * high).any():
        middle = np.floor(0.5 * (low + high))
        above = zeta(alpha, middle) >= share * norm
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low
