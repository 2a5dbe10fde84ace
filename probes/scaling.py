"""Whether and when heads emerge, against width: the share that ever does, and the law t = C width^-g of those that do.

The two are fitted together by a mixture-cure model (`probes.cure`), because heads that never emerge, treated as merely
late, fake a law where their share depends on width. `censored_regression` makes that mistake on purpose, as the
sensitivity check. If time is a `level`, which does not depend on when the run stopped, a growing head that has reached
it has been seen: pass it as `emerged`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, stdtr, stdtrit

from probes.cure import (
    ALL_SEEN,
    SHARE,
    SPREAD,
    TIME,
    Array,
    Fit,
    Heads,
    Mask,
    Model,
    check_confidence,
    checked,
    cluster_error,
    late_probability,
    maximise,
    model,
)  # fmt: skip
from probes.words import counted, named

MIN_WIDTHS = 3
MIN_CLUSTERS = 4
MIN_MEMBERS = 2  # clusters in which a width needs an event to count
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Another law of the median time, held against t = C width^-g."""

    name: str  # "no dependence" or "exponential", t = C exp(-k width)
    log_ratio: float  # log-likelihood of the power law less that of this one, summed over heads (dependent: no chi^2)
    statistic: float  # Student t: of g (no dependence), or of the log ratios of clusters (exponential: Vuong's test)
    p_value: float  # two-sided; above 0: the power law is the better one where statistic > 0 (exponential)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Median time at the largest width, as the other widths predict it, and as its own heads have it."""

    width: float
    predicted: float = NAN
    low: float = NAN  # prediction interval of `observed`: the errors of both are in it
    high: float = NAN
    observed: float = NAN
    refusal: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Share of heads that ever emerge, by width; all numbers but `width` are nan where `refusal` is not empty."""

    width: Array  # [W], increasing
    share: Array  # [W]
    low: Array
    high: Array
    slope: float = NAN  # of the log-odds, by log width
    slope_low: float = NAN
    slope_high: float = NAN
    refusal: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthLaw:
    """The fit of `fit_width_law`; all numbers are nan where `refusal` is not empty."""

    exponent: float = NAN  # g, in t = constant width^-g
    low: float = NAN
    high: float = NAN
    freedom: float = NAN  # degrees of freedom of the error of g
    constant: float = NAN  # C: median time at width 1 of the heads that emerge, in the unit of time
    spread: float = NAN  # sigma: standard deviation of log t about its median, over heads
    shares: Shares  # whether; its own `refusal` may be set though there is a law
    late: float = NAN  # expected share of the heads `never` that are merely late; nan without such heads
    alternatives: tuple[Alternative, ...] = ()
    held_out: HeldOut | None = None
    decades: float  # of width
    counts: dict[str, int]  # heads by status
    clusters: int
    confidence: float
    refusal: str = ""

    @property
    def preferred(self) -> str:
        """`power law`, `exponential`, `no dependence` (g = 0 is not excluded), `undecided`, or empty if refused."""
        against = {a.name: a for a in self.alternatives}
        if not against:
            return ""
        if not against["no dependence"].p_value < 1.0 - self.confidence:
            return "no dependence"
        vuong = against["exponential"]
        if not vuong.p_value < 1.0 - self.confidence:
            return "undecided"
        return "power law" if vuong.statistic > 0.0 else "exponential"


@dataclass(frozen=True, kw_only=True, slots=True)
class CensoredRegression:
    """The fit of `censored_regression`; all numbers are nan where `refusal` is not empty."""

    exponent: float = NAN
    low: float = NAN
    high: float = NAN
    constant: float = NAN
    spread: float = NAN
    log_likelihood: float = NAN
    counts: dict[str, int]
    refusal: str = ""


def fit_width_law(
    width: ArrayLike, time: ArrayLike, status: Sequence[str], cluster: ArrayLike, *, confidence: float = 0.9
) -> WidthLaw:
    """Share of heads that emerge and exponent of their time, with intervals that allow for dependent heads.

    One row a head (or a member), all `[n]`: its `width`; its `status`, a word of `probes.emergence`; `time`, in steps:
    of its rise (`emerged`, `transient`), its lower bound (`growing`), the last step of its run (`never`), the first
    probe (`at_start`); and `cluster`, any labels: the member, or the seed across widths where widths share data order.
    Members that diverged do not come in.

        P(ever emerges) = 1 / (1 + exp(-a - b log width)),   log t = log C - g log width + sigma e,  e ~ N(0, 1)

    by maximum likelihood, heads taken as independent; what they depend on is left to the errors: a sandwich over
    clusters, corrected for few of them, with Student's t on Satterthwaite's degrees of freedom (`cure.cluster_error`).
    Intervals of shares are symmetric in log-odds. a, b are of the average over members, not within one.

    `alternatives`: g = 0, by t; and an exponential in width, by Vuong's test with clusters as units. `held_out`: the
    largest width with its own median, share and spread, predicted by g and C of the others.

    Refused, with a reason: fewer than 3 widths, or than 3 that have events in 2 clusters; fewer than 4 clusters; a
    parameter that one cluster alone decides; no maximum; `never` that cannot be told from late. Only the share is
    refused where widths without `never` separate it: p is then held at 1 for these widths.

    Not guaranteed: `never` is told from late by the shape of log t alone. Where runs end while many heads are still to
    come, another shape than the normal moves share and exponent. Few widths over less than a decade seldom tell a
    power of width from an exponential. Heads `at_start` far to the left of the others widen sigma and pull g: one of
    256 took g from 0.54 to 0.29 in one draw.

    Raises ValueError, naming argument, value and what is allowed, for unequal lengths, widths or times that are not
    above 0, unknown status words, or confidence outside (0, 1). Source: Farewell 1982, doi:10.2307/2529885.
    """
    check_confidence(confidence)
    heads = checked(width, time, status, cluster)
    every = np.ones(heads.width.size, dtype=np.bool_)
    share, certain, separated = _share_columns(heads, every)
    refusal = _too_little(heads) or ("" if share is not None else _none_emerges(heads))
    if refusal or share is None:
        return _refused(heads, confidence, refusal)
    x = _centred(heads)
    one = np.ones_like(x)
    fit = _fitted(heads, share, [one, x], [one], certain)
    refusal, (exponent, low, high, freedom) = _exponent(fit, confidence)
    if refusal:
        return _refused(heads, confidence, refusal)
    return WidthLaw(
        exponent=exponent, low=low, high=high, freedom=freedom, constant=_constant(fit),
        spread=float(np.exp(fit.theta @ fit.at(SPREAD, 0))), shares=_shares(fit, separated, confidence),
        late=_late(fit), alternatives=_alternatives(fit, share), held_out=_held_out(heads, confidence),
        decades=_decades(heads), counts=heads.counts, clusters=heads.clusters, confidence=confidence,
    )  # fmt: skip


def censored_regression(
    width: ArrayLike, time: ArrayLike, status: Sequence[str], cluster: ArrayLike, *, confidence: float = 0.9
) -> CensoredRegression:
    """log t = log C - g log width + sigma e over *all* heads, `never` taken as late; the sensitivity check.

    Arguments, errors and intervals as in `fit_width_law`. Where heads that never emerge are the more frequent the
    wider (or narrower) a network is, this finds a law that is not there.
    """
    check_confidence(confidence)
    heads = checked(width, time, status, cluster)
    refusal = _too_little(heads)
    if refusal:
        return CensoredRegression(counts=heads.counts, refusal=refusal)
    x = _centred(heads)
    one = np.ones_like(x)
    fit = _fitted(heads, [], [one, x], [one], np.ones(x.size, dtype=np.bool_))
    refusal, (exponent, low, high, _) = _exponent(fit, confidence)
    if refusal:
        return CensoredRegression(counts=heads.counts, refusal=refusal)
    return CensoredRegression(
        exponent=exponent, low=low, high=high, constant=_constant(fit), spread=float(np.exp(fit.theta[-1])),
        log_likelihood=float(fit.value.sum()), counts=heads.counts,
    )  # fmt: skip


def _too_little(heads: Heads) -> str:
    """Why these heads cannot carry a law; empty if they may."""
    widths, event = np.unique(heads.width), heads.event
    if widths.size < MIN_WIDTHS:
        return f"{counted(widths.size, 'width')}, fewer than {MIN_WIDTHS}"
    if not event.any():
        return "no event: none is seen to emerge"
    if heads.clusters < MIN_CLUSTERS:
        return f"{counted(heads.clusters, 'cluster')}, fewer than {MIN_CLUSTERS}"
    members = [np.unique(heads.cluster[event & (heads.width == w)]).size for w in widths]
    enough = sum(count >= MIN_MEMBERS for count in members)
    if enough < MIN_WIDTHS:
        words = f"{counted(enough, 'width')} with some in {MIN_MEMBERS} clusters"
        return f"too few events: {words}, fewer than {MIN_WIDTHS}"
    return ""


def _none_emerges(heads: Heads) -> str:
    """Names the widths that have nothing but `never`."""
    widths = np.unique(heads.width)
    return f"none emerges at {named('width', widths[~np.isin(widths, heads.width[~heads.never])])}"


def _refused(heads: Heads, confidence: float, refusal: str) -> WidthLaw:
    return WidthLaw(
        shares=_no_shares(heads, refusal), decades=_decades(heads), counts=heads.counts, clusters=heads.clusters,
        confidence=confidence, refusal=refusal,
    )  # fmt: skip


def _no_shares(heads: Heads, refusal: str) -> Shares:
    widths = np.unique(heads.width)
    none = np.full(widths.size, NAN)
    return Shares(width=widths, share=none, low=none, high=none, refusal=refusal)


def _decades(heads: Heads) -> float:
    return float(np.log10(heads.width.max() / heads.width.min()))


def _centred(heads: Heads) -> Array:
    """log width `[n]` about the mean of the widths."""
    return np.asarray(np.log(heads.width) - np.log(np.unique(heads.width)).mean())


def _share_columns(heads: Heads, chosen: Mask) -> tuple[list[Array] | None, Mask, bool]:
    """Columns of logit p for the `chosen` rows, where p is held at 1, and whether widths separate the shares.

    They do where at most one width has `never` and others, and the rest has it on one side only: the odds then grow
    without end. None in place of columns: a width that has nothing but `never`.
    """
    never = heads.never
    rows = [chosen & (heads.width == w) for w in np.unique(heads.width[chosen])]
    kind = np.array([int(not never[r].any()) - int(never[r].all()) for r in rows])  # 1, 0 or -1
    steps = np.diff(kind)
    separated = bool((kind == 0).sum() < 2 and ((steps >= 0).all() or (steps <= 0).all()))
    if not separated:
        return [np.where(chosen, 1.0, 0.0), np.where(chosen, _centred(heads), 0.0)], np.zeros_like(chosen), False
    certain = np.logical_or.reduce([r & ~never[r].any() for r in rows])
    mixed = [np.where(r, 1.0, 0.0) for r, k in zip(rows, kind, strict=True) if k == 0]
    return (None if (kind < 0).any() else mixed), certain, True


def _fitted(
    heads: Heads, share: list[Array], time: list[Array], spread: list[Array], certain: Mask, near: Fit | None = None
) -> Fit:
    """Maximum from two starts, `never` as cured and `never` as late; or from the shares and spread of a fit `near`."""
    seen = bool(heads.growing.any() and (heads.never & ~certain).any())
    built = model(heads, share, time, spread, certain, seen)
    starts = [_start(built, heads.event, 0.0), _start(built, np.ones_like(certain), 2.0)]
    if near is not None and not near.model.all_seen:
        starts = [np.where(built.owner == TIME, starts[0], 0.0)]
        starts[0][built.owner != TIME] = near.theta[near.model.owner != TIME]
    fit = maximise(built, starts)
    if fit.trouble != ALL_SEEN:
        return fit
    built = replace(model(heads, share, time, spread, certain, False), all_seen=True)
    return maximise(built, [_start(built, heads.event, 0.0)])


def _start(built: Model, rows: Mask, odds: float) -> Array:
    """Least squares of log time over `rows`, with shares as counted, or at `odds` if these are not 0."""
    heads, theta = built.heads, np.zeros(built.owner.size)
    place = np.unique(heads.width, return_inverse=True)[1]
    counted = logit((np.bincount(place, ~heads.never) + 0.5) / (np.bincount(place) + 1.0))[place]
    log_time, columns = np.log(heads.time), built.columns[:, built.owner == TIME]
    theta[built.owner == TIME] = np.linalg.lstsq(columns[rows], log_time[rows])[0]
    rest = (log_time - columns @ theta[built.owner == TIME])[rows]
    spread = np.full_like(log_time, np.log(max(float(rest.std()), 1e-3)))
    for owner, goal in ((SHARE, counted if odds == 0.0 else np.full_like(counted, odds)), (SPREAD, spread)):
        part = built.columns[:, built.owner == owner]
        theta[built.owner == owner] = np.linalg.lstsq(part, goal)[0] if part.size else 0.0
    return theta


def _exponent(fit: Fit, confidence: float) -> tuple[str, tuple[float, float, float, float]]:
    """Why there is none, or empty; g, its interval, and the degrees of freedom of its error."""
    if fit.trouble:
        return fit.trouble, (NAN,) * 4
    value, low, high, freedom = _interval(fit, -fit.at(TIME, 1), confidence)
    alone = "" if np.isfinite(low) else "one cluster alone decides on the exponent"
    return alone, (NAN,) * 4 if alone else (value, low, high, freedom)


def _interval(fit: Fit, contrast: Array, confidence: float) -> tuple[float, float, float, float]:
    """`contrast [P]` @ theta, its interval by Student's t, and the degrees of freedom."""
    error, freedom = cluster_error(fit, contrast)
    value, reach = float(contrast @ fit.theta), float(stdtrit(freedom, 0.5 * (1.0 + confidence))) * error
    return value, value - reach, value + reach, freedom


def _constant(fit: Fit) -> float:
    """C: columns of time are 1 and log width about the mean of the widths."""
    middle = float(np.log(np.unique(fit.model.heads.width)).mean())
    return float(np.exp(fit.theta @ (fit.at(TIME, 0) - middle * fit.at(TIME, 1))))


def _shares(fit: Fit, separated: bool, confidence: float) -> Shares:
    heads = fit.model.heads
    if separated:
        some = np.unique(heads.width[heads.never])
        where = f"only at {named('width', some)}" if some.size else "at no width"
        return _no_shares(heads, f"how the share depends on width cannot be fitted: {where} do some never emerge")
    widths = np.unique(heads.width)
    x = np.log(widths) - np.log(widths).mean()
    odds = np.array([_interval(fit, fit.at(SHARE, 0) + at * fit.at(SHARE, 1), confidence)[:3] for at in x])
    share, low, high = expit(odds).T
    slope, slope_low, slope_high, _ = _interval(fit, fit.at(SHARE, 1), confidence)
    return Shares(
        width=widths, share=share, low=low, high=high, slope=slope, slope_low=slope_low, slope_high=slope_high
    )


def _late(fit: Fit) -> float:
    """Expected share of the heads `never` that are late; nan without any."""
    never = fit.model.heads.never
    return float(late_probability(fit.model, fit.theta)[never].mean()) if never.any() else NAN


def _alternatives(fit: Fit, share: list[Array]) -> tuple[Alternative, ...]:
    """No dependence on width, and t = C exp(-k width), with the same model of the share."""
    heads, one = fit.model.heads, np.ones(fit.model.heads.width.size)
    error, freedom = cluster_error(fit, fit.at(TIME, 1))
    exponent = -float(fit.theta @ fit.at(TIME, 1))
    flat = _fitted(heads, share, [one], [one], fit.model.certain, fit)
    width = heads.width / heads.width.mean() - 1.0
    other = _fitted(heads, share, [one, width], [one], fit.model.certain, fit)
    ratio = fit.value - other.value  # by cluster
    vuong = float(ratio.sum() / max(np.sqrt(ratio.size) * ratio.std(ddof=1), np.finfo(float).tiny))
    found = []
    for name, against, statistic, degrees in (
        ("no dependence", flat, exponent / error, freedom),
        ("exponential", other, vuong, ratio.size - 1.0),
    ):
        bad = bool(against.trouble)
        found.append(Alternative(
            name=name, log_ratio=NAN if bad else float((fit.value - against.value).sum()), statistic=statistic,
            p_value=NAN if bad and name != "no dependence" else float(2.0 * stdtr(degrees, -abs(statistic))),
        ))  # fmt: skip
    return tuple(found)


def _held_out(heads: Heads, confidence: float) -> HeldOut:
    """The law of the other widths, and the largest with median, share and spread of its own, in one fit.

    So its distance from the law is a parameter, whose error allows for clusters that span widths.
    """
    largest = float(heads.width.max())
    own = heads.width == largest
    share, certain, _ = _share_columns(heads, ~own)
    share_own, certain_own, _ = _share_columns(heads, own)
    if share is None or share_own is None:
        return HeldOut(width=largest, refusal=_none_emerges(heads))
    x, one = _centred(heads) - float(_centred(heads).max()), np.ones(own.size)
    if own.all() or np.unique(heads.cluster[own & heads.event]).size < MIN_MEMBERS:
        return HeldOut(width=largest, refusal="too few events at the largest width")
    fit = _fitted(heads, share + share_own, [one, x, own * 1.0], [one, own * 1.0], certain | certain_own)
    if fit.trouble:
        return HeldOut(width=largest, refusal=fit.trouble)
    apart, low, high, _ = _interval(fit, fit.at(TIME, 2), confidence)
    if not np.isfinite(low):
        return HeldOut(width=largest, refusal="one cluster alone decides on the exponent")
    predicted = float(np.exp(fit.theta @ fit.at(TIME, 0)))
    reach = 0.5 * (high - low)
    return HeldOut(
        width=largest, predicted=predicted, low=predicted * float(np.exp(-reach)),
        high=predicted * float(np.exp(reach)), observed=predicted * float(np.exp(apart)),
    )  # fmt: skip
