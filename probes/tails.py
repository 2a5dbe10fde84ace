"""Whether times have a power-law tail, p(x) ~ x^-alpha above xmin, with which exponent, and what else they may be.

The method of Clauset, Shalizi and Newman (SIAM Review 51, 661, 2009, doi:10.1137/070710111), for times some of which
are right-censored, and which may come in clusters that are dependent within (the heads of one network).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from probes.tail_draws import SINGLE_LAWS, imitate_tail, no_straighter, one_each
from probes.tail_models import FAMILIES, TailData, compare
from probes.tail_scan import CHUNK, Laws, Sample, scan
from probes.words import counted

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Generator = np.random.Generator
Verdict = Literal["power law", "not a power law", "undecided"]

MIN_EVENTS = 50  # seen at or above xmin
MIN_CLUSTERS = 10  # the p-value draws one item of each, and a fit needs 10 events
MIN_DECADES = 1.0  # between xmin and the largest event
MIN_BOOTSTRAP = 100
LEVEL = 0.1  # of every test that the verdict rests on
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """A power-law tail, or in `refusal` why there is none to speak of; then every float is nan."""

    alpha: float  # exponent of the density
    low: float  # interval of alpha
    high: float
    xmin: float  # where the tail begins, units of the times
    distance: float  # Kolmogorov-Smirnov, to the Kaplan-Meier curve of the tail
    decades: float  # log10 of largest event / xmin
    n_tail: int  # items at or above xmin, censored ones among them
    n_events: int  # of these, seen
    n_clusters: int  # with an item in the tail
    p_value: float  # of the power law, by bootstrap: small means that it does not fit
    comparisons: dict[str, tuple[float, float]]  # family -> (log-likelihood ratio, p); positive favours the power law
    single_laws: dict[str, float]  # p of one lognormal, one Weibull law for all items; nan if xmin given or discrete
    refusal: str

    @property
    def verdict(self) -> Verdict:
        """At the 10% level.

        "not a power law": p_value < 0.1, or an alternative is significantly better on the tail. "power law": neither,
        and the exponential is significantly worse on the tail, and (where `single_laws` has p) neither one lognormal
        nor one Weibull law could have made all items, and at least 50 clusters have an item in the tail (p_value rests
        on one item of each). "undecided": all else, and whatever was refused.

        The other families cannot be worse than a power law: all contain it as a limit. So a tail alone never rules out
        a curvature too slight to see, and xmin is chosen where there is least of it; hence the look at all items, which
        holds "power law" to at most 10% of lognormal, exponential and Weibull samples. Other laws, and these above a
        given xmin, have no such bound.
        """
        if self.refusal:
            return "undecided"
        better = any(ratio < 0.0 and p < LEVEL for ratio, p in self.comparisons.values())
        if better or self.p_value < LEVEL:
            return "not a power law"
        ratio, p = self.comparisons["exponential"]
        told_apart = ratio > 0.0 and p < LEVEL and not any(p >= LEVEL for p in self.single_laws.values())
        fits = self.p_value >= LEVEL and self.n_clusters >= MIN_EVENTS
        return "power law" if told_apart and fits else "undecided"


def fit_tail(
    times: ArrayLike,
    censored: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    xmin: float | None = None,
    n_bootstrap: int = 2500,
    seed: int = 0,
    discrete: bool = False,
    confidence: float = 0.9,
) -> Tail:
    """The power-law tail of `times [n]`, with interval, goodness of fit and comparisons.

    `censored [n]`: true where the time is only known to exceed times[i], by censoring that does not depend on the time;
    `clusters [n]`: labels of groups that are independent of each other (default: every item its own). `discrete`:
    integers, without censoring. Items censored below xmin are left out (`tail_scan`).

    xmin, unless given: the item with the least distance among at most 100 (`tail_scan.scan`) that leave 10 events.
    Interval: log(alpha - 1) +- t_{G-1} / z * h for G clusters, h from random halves of them (`_interval`).
    p-value: each replicate draws one item per cluster, fits it, and makes as many new items: below its xmin from its
    Kaplan-Meier curve, above from its power law, censored by times drawn from the Kaplan-Meier curve of the censoring
    (never beyond the last if that item was seen); p is the share whose new distance is not below the drawn one. With
    clusters it is a mean over draws, hence conservative.
    Single laws: the same draws, against the straightness of their probability plots (`tail_draws.no_straighter`).
    Comparisons: `tail_models.compare`, on all items of the tail, as if xmin had been given.

    Refused: times that are not finite and positive, all censored, one value only, fewer than 50 events in the tail,
    less than one decade from xmin to the largest event, fewer than 10 clusters, fewer than half of the bootstrap
    replicates with 10 events in a tail.
    Not guaranteed: where the body bends into the tail slowly, xmin comes out too low and the interval misses.
    Right-truncation is not allowed for: a power law whose items beyond the end of observation are absent, instead of
    censored, looks like a truncated one.

    Raises ValueError, naming argument, value and what is allowed, for wrong shapes, n_bootstrap < 100, confidence
    outside (0, 1), xmin <= 0, integers asked for and not given, or `discrete` together with censored times.
    """
    x, hidden, groups = _validated(times, censored, clusters, n_bootstrap, discrete, confidence)
    _check_xmin(xmin, discrete)
    if refusal := _unfit(x, hidden):
        return _refused(refusal)
    items = _Items.of(x, hidden, groups, xmin)
    method = _Method(discrete, xmin is not None)
    law = method.fit(items.sample(items.weight[None]))
    if not np.isfinite(law.distance[0]):
        return _refused(f"fewer than 10 events above {'any' if xmin is None else 'the given'} xmin")
    tail, excess = items.tail(law, discrete), float(law.excess[0])
    n_events, n_clusters = int(tail.seen.sum()), np.unique(tail.cluster).size
    sizes = {"n_tail": tail.u.size, "n_events": n_events, "n_clusters": n_clusters}
    decades = float(tail.u[tail.seen].max() / np.log(10.0))
    if n_events < MIN_EVENTS:
        return _refused(f"{n_events} events in the tail from {tail.xmin:.4g} on, fewer than {MIN_EVENTS}", **sizes)
    if items.n_groups < MIN_CLUSTERS:
        return _refused(f"{counted(items.n_groups, 'cluster')}, fewer than {MIN_CLUSTERS}", **sizes)
    if decades < MIN_DECADES:
        return _refused(f"{decades:.2f} decades from {tail.xmin:.4g} to the largest event, under 1", **sizes)
    rng = np.random.default_rng(seed)
    low, high = _interval(items, method, law, n_bootstrap, confidence, rng)
    p_value, single_laws = _p_values(items, method, law, n_bootstrap, rng)
    if np.isnan([low, p_value]).any():
        return _refused("fewer than half of the bootstrap replicates have 10 events in a tail", **sizes)
    return Tail(
        alpha=1.0 + excess, low=low, high=high, xmin=tail.xmin, distance=float(law.distance[0]), decades=decades,
        p_value=p_value, single_laws=single_laws, refusal="", **sizes,
        comparisons={name: compare(name, tail, excess) for name in FAMILIES},
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Items:
    """Items sorted by time, what is seen first, every field `[n]`; a given xmin leads them, as an item of no weight."""

    log_x: Array
    seen: Array
    group: Index
    weight: Array

    @classmethod
    def of(cls, x: Array, hidden: NDArray[np.bool_], groups: NDArray[np.generic], xmin: float | None) -> "_Items":
        order = np.lexsort((hidden, x))
        order = order if xmin is None else order[x[order] >= xmin]
        group = np.unique(groups[order], return_inverse=True)[1].astype(np.intp)
        log_x, seen, weight = np.log(x[order]), (~hidden[order]).astype(np.float64), np.ones(order.size)
        items = cls(log_x, seen, group, weight)
        return items if xmin is None else items.above(float(np.log(xmin)))

    def above(self, log_xmin: float) -> "_Items":
        """The items at or above an xmin, led by it."""
        inside = self.log_x >= log_xmin
        group = np.r_[0, self.group[inside]].astype(np.intp)
        log_x, seen, weight = self.log_x[inside], self.seen[inside], self.weight[inside]
        return _Items(np.r_[log_xmin, log_x], np.r_[0.0, seen], group, np.r_[0.0, weight])

    @property
    def n_groups(self) -> int:
        return int(self.group.max(initial=-1)) + 1

    def sample(self, weight: Array) -> Sample:
        return Sample(self.log_x, weight, self.seen)

    def tail(self, law: Laws, discrete: bool) -> TailData:
        """The items at or above the first row's xmin."""
        inside = (self.log_x >= law.log_xmin[0]) & (self.weight > 0.0)
        xmin = float(np.exp(law.log_xmin[0]))
        u = self.log_x[inside] - law.log_xmin[0]
        return TailData(u, self.seen[inside] > 0.0, self.group[inside], round(xmin) if discrete else xmin, discrete)


@dataclass(frozen=True, slots=True)
class _Method:
    """How every sample is fitted, the given one and all replicates alike."""

    discrete: bool
    fixed: bool

    def fit(self, sample: Sample) -> Laws:
        return scan(sample, discrete=self.discrete, fixed=self.fixed)


def _interval(
    items: _Items, method: _Method, law: Laws, n_bootstrap: int, confidence: float, rng: Generator
) -> tuple[float, float]:
    """Of alpha, symmetric in log(alpha - 1); nan if fewer than half of the replicates can be fitted.

    A half of the clusters has variance 2 V; about the mean of a sample's halves they scatter by W = 2 V - M, with M the
    variance of that mean. Averaging smooths the choice of xmin, so M lies between V and V0, the variance with xmin held
    (which its halves give: there W = V0). Taken half way, V = (2 W + V0) / 3.
    """
    level, groups = 0.5 * (1.0 + confidence), items.n_groups
    square = _spread(items, method, law, n_bootstrap, level, rng) ** 2
    if not method.fixed:
        held = items.above(float(law.log_xmin[0])), _Method(method.discrete, fixed=True)
        square = (2.0 * square + _spread(*held, law, n_bootstrap, level, rng) ** 2) / 3.0
    factor = float(np.exp(stdtrit(groups - 1.0, level) / ndtri(level) * np.sqrt(square)))
    excess = float(law.excess[0])
    return 1.0 + excess / factor, 1.0 + excess * factor


def _spread(items: _Items, method: _Method, law: Laws, n_bootstrap: int, level: float, rng: Generator) -> float:
    """Half the central range of log(alpha - 1) over random halves of the clusters, xmin chosen anew; or nan.

    Deviations from `law` count in units of 1 / sqrt(events), as long tails hold alpha more tightly than short ones.
    Resampling with replacement would repeat items, and the repeats alone move the chosen xmin.
    """
    groups = items.n_groups
    kept, found = groups // 2, []
    for count in _batches(n_bootstrap, items.log_x.size):
        half = (rng.random((count, groups)).argsort(axis=1) < kept).astype(np.float64)
        laws = method.fit(items.sample(half[:, items.group] * items.weight))
        usable = np.isfinite(laws.distance)
        gap = np.log(laws.excess[usable] / law.excess[0])
        found.append(gap * np.sqrt(laws.events[usable] * groups / (law.events[0] * kept)))
    deviations = np.concatenate(found)
    if 2 * deviations.size < n_bootstrap:
        return NAN
    low, high = np.quantile(deviations, (1.0 - level, level))
    return float(0.5 * (high - low) * np.sqrt(kept / (groups - kept)))


def _p_values(
    items: _Items, method: _Method, law: Laws, n_bootstrap: int, rng: Generator
) -> tuple[float, dict[str, float]]:
    """p of the power law in the tail, and of each single law for all items; nan if under half of the draws fit."""
    single = items.n_groups == int(items.weight.sum())
    names = () if method.fixed or method.discrete else tuple(SINGLE_LAWS)
    hits, able = dict.fromkeys(("tail", *names), 0), 0
    for count in _batches(n_bootstrap, items.log_x.size):
        if single:
            picked, laws = items.sample(np.broadcast_to(items.weight, (count, items.weight.size))), law.repeated(count)
        else:
            picked = items.sample(one_each(items.group, items.weight > 0.0, count, rng))
            laws = method.fit(picked)
        usable = np.isfinite(laws.distance)
        made = imitate_tail(picked, laws, items.n_groups, rng, discrete=method.discrete, fixed=method.fixed)
        hits["tail"] += int((method.fit(made).distance >= laws.distance)[usable].sum())
        able += int(usable.sum())
        for name in names:
            hits[name] += int(no_straighter(name, picked, items.n_groups, rng)[usable].sum())
    shares = {name: hits[name] / able if 2 * able >= n_bootstrap else NAN for name in hits}
    return shares["tail"], {name: shares.get(name, NAN) for name in SINGLE_LAWS}


def _batches(total: int, width: int) -> list[int]:
    """Sizes of batches of rows, so that they need little memory."""
    size = max(1, 8 * CHUNK // width)
    return [min(size, total - begin) for begin in range(0, total, size)]


def _unfit(x: Array, hidden: NDArray[np.bool_]) -> str:
    """Why no tail can be fitted to these times at all; empty if it can."""
    if not (np.isfinite(x).all() and (x > 0.0).all()):
        return "times that are not finite and positive"
    if hidden.all():
        return "all times are censored" if x.size else "no times"
    if np.ptp(x[~hidden]) == 0.0:
        return "all events have the same time"
    return ""


def _refused(refusal: str, n_tail: int = 0, n_events: int = 0, n_clusters: int = 0) -> Tail:
    return Tail(
        alpha=NAN, low=NAN, high=NAN, xmin=NAN, distance=NAN, decades=NAN, p_value=NAN, refusal=refusal,
        n_tail=n_tail, n_events=n_events, n_clusters=n_clusters,
        comparisons=dict.fromkeys(FAMILIES, (NAN, NAN)), single_laws=dict.fromkeys(SINGLE_LAWS, NAN),
    )  # fmt: skip


def _validated(
    times: ArrayLike, censored: ArrayLike | None, clusters: ArrayLike | None, n_bootstrap: int, discrete: bool,
    confidence: float,
) -> tuple[Array, NDArray[np.bool_], NDArray[np.generic]]:  # fmt: skip
    x = np.asarray(times, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"times has shape {x.shape}; allowed: [n]")
    hidden = np.zeros(x.size, dtype=bool) if censored is None else np.asarray(censored)
    groups = np.arange(x.size) if clusters is None else np.asarray(clusters)
    for name, values in (("censored", hidden), ("clusters", groups)):
        if values.shape != x.shape:
            raise ValueError(f"{name} has shape {values.shape}; allowed: {x.shape}, as times has")
    if hidden.dtype != np.bool_:
        raise ValueError(f"censored has type {hidden.dtype}; allowed: bool")
    if n_bootstrap < MIN_BOOTSTRAP:
        raise ValueError(f"n_bootstrap is {n_bootstrap!r}; allowed: {MIN_BOOTSTRAP} or more")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")
    if discrete and hidden.any():
        raise ValueError(f"censored has {hidden.sum()} true entries with discrete=True; allowed: none")
    for i in np.flatnonzero(np.isfinite(x) & (x != np.round(x)))[:1] if discrete else ():
        raise ValueError(f"times[{i}] is {x[i]:g} with discrete=True; allowed: integers")
    return x, hidden, groups


def _check_xmin(xmin: float | None, discrete: bool) -> None:
    if xmin is not None and not (np.isfinite(xmin) and xmin > 0.0 and (not discrete or xmin == round(xmin))):
        raise ValueError(f"xmin is {xmin!r}; allowed: None or a {'whole' if discrete else 'finite'} number above 0")
