"""Times with censoring, without a law: Kaplan-Meier curves over clusters of heads, and permutation tests of widths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import factorial, lgamma, log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from probes.cure import Array, Heads, Index, Mask, check_confidence, checked
from probes.words import counted

MIN_CLUSTERS = 4
EXACT = 20_000  # most arrangements that are all gone through
BATCH = 2_000  # random arrangements at a time
TIE = 1e-9  # a statistic this near, relative to the largest, counts as equal
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalCurve:
    """Share of heads that have not emerged up to and including `times`; right-continuous steps, 1 before the first."""

    times: Array  # [T] distinct event times, increasing
    survival: Array  # [T]
    low: Array  # [T]; nan where survival is 0, or is 1 without some single cluster, or no interval was asked for
    high: Array
    at_risk: Array  # [T] heads not emerged or censored before
    events: Array  # [T]
    median: float  # first time at which survival is 1/2 or less; nan if that is never reached
    refusal: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationTest:
    """Result of `permutation_test`; numbers are nan where `refusal` is not empty."""

    statistic: float = NAN
    p_value: float = NAN
    arrangements: int = 0  # that were compared, the one seen included
    exact: bool = False  # whether these were all there are
    paired: bool = False
    left_out: int = 0  # clusters of a paired test that are not at all widths
    refusal: str = ""


def kaplan_meier(
    time: ArrayLike, status: Sequence[str], cluster: ArrayLike | None = None, *, confidence: float | None = 0.9
) -> SurvivalCurve:
    """Kaplan-Meier estimate S(t) = prod over event times u <= t of (1 - events(u) / at_risk(u)).

    `time`, `status`, `cluster`, all `[n]`, as in `fit_width_law`; without `cluster` every head is one. `emerged`,
    `transient` and `at_start` are events (the latter at the first probe: the estimate takes no left-censored data, so
    the curve before the first probe is not known); `growing` and `never` are censored. Heads that never emerge make a
    plateau: no median may be reached.

    Intervals, pointwise: jackknife over clusters of log(-log S), with Student's t on clusters - 1 degrees of freedom.
    With `confidence` None there are none (nan).
    Not guaranteed: coverage near the ends of the curve, where few clusters have had an event or few heads are left.

    Refused: fewer than 4 clusters (unless `confidence` is None), no event. Raises ValueError as `fit_width_law` does.
    """
    if confidence is not None:
        check_confidence(confidence)
    times = np.asarray(time, dtype=np.float64)
    labels = np.arange(times.size) if cluster is None else cluster
    heads = checked(np.ones(times.shape), times, status, labels)
    event = heads.event | heads.start
    refusal = "no event: none is seen to emerge" if not event.any() else ""
    if confidence is not None and heads.clusters < MIN_CLUSTERS:
        refusal = f"{counted(heads.clusters, 'cluster')}, fewer than {MIN_CLUSTERS}"
    if refusal:
        none = np.full(0, NAN)
        return SurvivalCurve(
            times=none, survival=none, low=none, high=none, at_risk=none, events=none, median=NAN, refusal=refusal
        )
    distinct = np.unique(times[event])
    total, happened = _counts(distinct, times, event)
    survival = _product(total, happened)
    half = np.full(distinct.size, NAN)
    if confidence is not None:
        half = stdtrit(heads.clusters - 1, 0.5 * (1 + confidence)) * _error(distinct, heads, event)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.log(-np.log(survival))
        high, low = (np.exp(-np.exp(odds + sign * half)) for sign in (-1.0, 1.0))
    reached = np.flatnonzero(survival <= 0.5)
    return SurvivalCurve(
        times=distinct, survival=survival, low=low, high=high, at_risk=total, events=happened,
        median=float(distinct[reached[0]]) if reached.size else NAN,
    )  # fmt: skip


def _counts(distinct: Array, times: Array, event: Mask) -> tuple[Array, Array]:
    """Heads at risk and events at the `distinct [T]` event times."""
    at_risk = times.size - np.searchsorted(np.sort(times), distinct)
    events = np.bincount(np.searchsorted(distinct, times[event]), minlength=distinct.size)
    return at_risk.astype(np.float64), events.astype(np.float64)


def _product(at_risk: Array, events: Array) -> Array:
    """S `[T]`; event times at which nobody is left change nothing."""
    return np.asarray(np.cumprod(1.0 - events / np.maximum(at_risk, 1.0), axis=-1))


def _error(distinct: Array, heads: Heads, event: Mask) -> Array:
    """Jackknife error `[T]` of log(-log S) over clusters; nan where S without one of them is 0 or 1."""
    total, happened = _counts(distinct, heads.time, event)
    middle, _ = _log_odds(_product(total, happened))  # sums about this lose no digits
    inside = np.ones(distinct.size, dtype=np.bool_)
    first, second = np.zeros((2, distinct.size))
    order = np.argsort(heads.cluster, kind="stable")
    for own in np.split(order, np.cumsum(np.bincount(heads.cluster))[:-1]):
        at_risk, events = _counts(distinct, heads.time[own], event[own])
        odds, finite = _log_odds(_product(total - at_risk, happened - events))
        inside &= finite
        first += odds - middle
        second += (odds - middle) ** 2
    variance = second / heads.clusters - (first / heads.clusters) ** 2
    return np.where(inside, np.sqrt((heads.clusters - 1.0) * np.maximum(variance, 0.0)), NAN)


def _log_odds(survival: Array) -> tuple[Array, Mask]:
    """log(-log S) `[T]`, of 1/2 where S is 0 or 1, and where it is neither."""
    inside = (survival > 0.0) & (survival < 1.0)
    return np.log(-np.log(np.where(inside, survival, 0.5))), inside


def log_rank_scores(time: ArrayLike, status: Sequence[str]) -> Array:
    """`[n]`: whether a head has emerged, less the Nelson-Aalen cumulated hazard of all heads up to its time.

    Higher is earlier; they sum to 0. The log-rank test is a test of their sums (Peto and Peto 1972,
    doi:10.2307/2344317). Statuses count as in `kaplan_meier`.
    """
    times = np.asarray(time, dtype=np.float64)
    heads = checked(np.ones(times.shape), times, status, np.zeros(times.shape))
    event = heads.event | heads.start
    distinct, place = np.unique(times, return_inverse=True)
    happened = np.bincount(place, weights=event, minlength=distinct.size)
    left = np.bincount(place, minlength=distinct.size)[::-1].cumsum()[::-1]
    return np.asarray(event - (happened / left).cumsum()[place])


def permutation_test(
    width: ArrayLike,
    value: ArrayLike,
    cluster: ArrayLike,
    *,
    statistic: Literal["slope", "spread"] = "slope",
    draws: int = 9_999,
    seed: int = 0,
) -> PermutationTest:
    """Whether `value` differs between widths, by exchanging whole members between them.

    Rows `[n]`, averaged over a cluster's rows of one width to member values. For times with censoring pass
    `log_rank_scores`: a log-rank test. These ask whether widths differ in whether or when; pass log times of the heads
    that emerged to ask for when alone.
    - every cluster at one width (a member): widths are dealt out anew to members, their numbers by width kept;
    - more than half of the clusters at all widths (seeds): `paired`, widths are dealt out anew within each of these;
      clusters that lack a width are left out.
    Statistic: `slope`, of the member values on log width by least squares, two-sided; or `spread`, the sum over widths
    of members x (mean - mean of all)^2. p is the share of arrangements whose |statistic| is not less than the one
    seen: of all where there are at most 20,000; else of `draws` random ones and the one seen, (1 + more) / (1 + draws).
    The p-value is valid if members are exchangeable under no difference, whatever their distribution.

    Refused: fewer than 2 widths, most clusters at some but not all widths, fewer than 4 clusters (2 if paired),
    equal values. Raises ValueError for unequal lengths, widths that are not above 0, values that are not finite, an
    unknown statistic, or draws below 99.
    """
    widths, labels, values = _members(width, value, cluster)
    if statistic not in ("slope", "spread"):
        raise ValueError(f"statistic is {statistic!r}; allowed: slope, spread")
    if draws < 99:
        raise ValueError(f"draws is {draws!r}; allowed: 99 or more")
    x, group = np.unique(widths, return_inverse=True)
    per_cluster = np.bincount(labels)
    whole = per_cluster == x.size
    paired, left_out = bool(2 * whole.sum() > whole.size), 0
    if paired:
        kept, left_out = whole[labels], int((~whole).sum())
        group, labels, values, per_cluster = group[kept], labels[kept], values[kept], per_cluster[whole]
    refusal = _refusal(x.size, per_cluster, paired, values)
    if refusal:
        return PermutationTest(paired=paired, left_out=left_out, refusal=refusal)
    order = np.lexsort((group, labels))
    group, values = group[order], values[order]
    rng, total = np.random.default_rng(seed), _arrangements(group, per_cluster.size, paired)
    exact = total <= EXACT
    found = np.concatenate(
        [
            _statistic(dealt, values, np.log(x), statistic)
            for dealt in (
                _all(group, per_cluster.size, paired) if exact else _random(group, x.size, draws, paired, rng)
            )
        ]
    )
    seen = float(_statistic(group[None], values, np.log(x), statistic)[0])
    more = int((np.abs(found) >= abs(seen) - TIE * np.abs(found).max()).sum())
    p_value = more / total if exact else (1 + more) / (1 + draws)
    return PermutationTest(
        statistic=seen, p_value=p_value, arrangements=total if exact else draws + 1, exact=exact, paired=paired,
        left_out=left_out,
    )  # fmt: skip


def _members(width: ArrayLike, value: ArrayLike, cluster: ArrayLike) -> tuple[Array, Index, Array]:
    """Width, cluster (0 ..) and mean value of every member `[m]`: the rows that share cluster and width."""
    widths, values, labels = np.asarray(width, np.float64), np.asarray(value, np.float64), np.asarray(cluster)
    if widths.ndim != 1 or widths.size == 0:
        raise ValueError(f"width has shape {widths.shape}; allowed: [n] with n >= 1 rows")
    for name, shape in (("value", values.shape), ("cluster", labels.shape)):
        if shape != widths.shape:
            raise ValueError(f"{name} has shape {shape}; allowed: {widths.shape}, as width has")
    for i in np.flatnonzero(~(np.isfinite(widths) & (widths > 0.0)))[:1]:
        raise ValueError(f"width[{i}] is {widths[i]:g}; allowed: finite numbers above 0")
    for i in np.flatnonzero(~np.isfinite(values))[:1]:
        raise ValueError(f"value[{i}] is {values[i]}; allowed: finite numbers")
    distinct, place = np.unique(widths, return_inverse=True)
    number = np.unique(labels, return_inverse=True)[1]
    member, row = np.unique(number * distinct.size + place, return_inverse=True)
    mean = np.bincount(row, weights=values) / np.bincount(row)
    return distinct[member % distinct.size], member // distinct.size, mean


def _refusal(widths: int, per_cluster: Index, paired: bool, values: Array) -> str:
    least = 2 if paired else MIN_CLUSTERS
    if widths < 2:
        return "one width"
    if not paired and per_cluster.max() > 1:
        return "clusters are neither at one width each nor at all widths each"
    if per_cluster.size < least:
        return f"{counted(per_cluster.size, 'cluster')}{' at all widths' if paired else ''}, fewer than {least}"
    return "all values are equal" if np.ptp(values) == 0.0 else ""


def _arrangements(group: Index, clusters: int, paired: bool) -> int:
    """How many ways there are to deal out the widths; 10^18 stands for more."""
    counts = np.bincount(group)
    if paired:
        logs = clusters * lgamma(counts.size + 1)
        return factorial(counts.size) ** clusters if logs < log(1e18) else 10**18
    logs = lgamma(group.size + 1) - sum(lgamma(count + 1) for count in counts.tolist())
    return round(np.exp(logs)) if logs < log(1e18) else 10**18


def _all(group: Index, clusters: int, paired: bool) -> list[Index]:
    """Every arrangement, `[arrangements, m]` in one batch; members are ordered by cluster, then width."""
    if paired:
        each = np.array(list(permutations(range(group.size // clusters))))
        picks = np.array(list(product(range(len(each)), repeat=clusters)))
        return [each[picks].reshape(len(picks), -1)]
    found: list[tuple[int, ...]] = [()]
    for _ in range(group.size):  # sorted words over the multiset of widths, letter by letter
        found = [
            (*word, k) for word in found for k in range(int(group.max()) + 1) if word.count(k) < (group == k).sum()
        ]
    return [np.array(found)]


def _random(group: Index, widths: int, draws: int, paired: bool, rng: np.random.Generator) -> list[Index]:
    """`draws` random arrangements in batches `[BATCH, m]`."""
    sizes = [min(BATCH, draws - begin) for begin in range(0, draws, BATCH)]
    blocks = group.reshape(-1, widths) if paired else group[None]
    return [rng.permuted(np.broadcast_to(blocks, (n, *blocks.shape)), axis=-1).reshape(n, -1) for n in sizes]


def _statistic(group: Index, values: Array, x: Array, kind: str) -> Array:
    """`[B]`, of arrangements `group [B, m]` of the widths' logs `x [W]`; `values [m]`."""
    apart = values - values.mean()
    if kind == "slope":
        level = x[group]
        level = level - level.mean(axis=-1, keepdims=True)
        return np.asarray(level @ apart / (level**2).sum(axis=-1))
    sums = np.stack([(group == k) @ apart for k in range(x.size)])
    return np.asarray((sums**2 / np.bincount(group[0], minlength=x.size)[:, None]).sum(axis=0))
