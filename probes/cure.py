"""Likelihood of heads that may never emerge (a mixture-cure model), and errors that allow for dependent heads.

A head ever emerges with probability p, and if so at log t = mu + sigma e, e standard normal. Its status says what of
that was seen; f, F and S are density, distribution function and survival function of t:

    emerged, transient   p f(t)          seen at t
    at_start             p F(t)          it lies in (0, t]
    growing              p S(t) q        later than t, and known to emerge
    never                1 - p + p S(t) (1 - q)    nothing up to t: either it never will, or it is late and unseen

q is the probability that a head which is late is seen to grow at the end of its run. Without it the growing heads
would be counted twice, as the late ones among `never` too, and p would come out too high. Where likelihood only grows
with q, q is 1: every late head is seen to grow, and `never` are those that never will.

logit p, mu, log sigma and logit q are linear in columns that a `Model` lists. Internals work on rows `[n]`, one a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, log_ndtr

from probes.emergence import STATUSES

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]

SHARE, TIME, SPREAD, SEEN = range(4)  # the predictors: logit p, mu, log sigma, logit q
EVENTS = ("emerged", "transient")
LOG_ROOT_TAU = 0.5 * float(np.log(2.0 * np.pi))
EDGE = 12.0  # a predictor beyond this has no maximum: logit p or logit q, or -log sigma
MOST_SHARE = 0.9  # of the information on a contrast that one cluster may have
LEAST_KEPT = 0.1  # a cluster's score is enlarged as if this share of the information were left without it, at least
ALL_SEEN = "every late head is seen to grow"
STEPS = 200  # of Newton's method


@dataclass(frozen=True, slots=True)
class Heads:
    """Rows as they came in, checked: `width`, `time`, `status` and `cluster`, all `[n]`."""

    width: Array
    time: Array
    status: NDArray[np.str_]
    cluster: Index  # 0 .. clusters - 1
    event: Mask  # whether a head's time was seen
    growing: Mask
    never: Mask
    start: Mask

    @property
    def clusters(self) -> int:
        """How many there are."""
        return int(self.cluster.max()) + 1

    @property
    def counts(self) -> dict[str, int]:
        """Heads by status."""
        return {name: int((self.status == name).sum()) for name in STATUSES}


def checked(width: ArrayLike, time: ArrayLike, status: Sequence[str], cluster: ArrayLike) -> Heads:
    """Rows of equal length, or a ValueError that names argument, value and what is allowed."""
    widths, times = np.asarray(width, dtype=np.float64), np.asarray(time, dtype=np.float64)
    words, labels = np.asarray(status, dtype=np.str_), np.asarray(cluster)
    if widths.ndim != 1 or widths.size == 0:
        raise ValueError(f"width has shape {widths.shape}; allowed: [n] with n >= 1 heads")
    for name, shape in (("time", times.shape), ("status", words.shape), ("cluster", labels.shape)):
        if shape != widths.shape:
            raise ValueError(f"{name} has shape {shape}; allowed: {widths.shape}, as width has")
    for name, values in (("width", widths), ("time", times)):
        for i in np.flatnonzero(~(np.isfinite(values) & (values > 0.0)))[:1]:
            raise ValueError(f"{name}[{i}] is {values[i]:g}; allowed: finite numbers above 0")
    for i in np.flatnonzero(~np.isin(words, STATUSES))[:1]:
        raise ValueError(f"status[{i}] is {str(words[i])!r}; allowed: {', '.join(STATUSES)}")
    event, growing, never, start = (np.isin(words, kind) for kind in (EVENTS, "growing", "never", "at_start"))
    return Heads(widths, times, words, np.unique(labels, return_inverse=True)[1], event, growing, never, start)


def check_confidence(confidence: float) -> None:
    """Raise a ValueError unless it is a probability."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")


@dataclass(frozen=True, slots=True)
class Model:
    """Columns `[n, P]` of all parameters; `owner [P]` says which predictor a column belongs to.

    `certain [n]`: p is 1 there, and `never` then means late. q is a parameter if any column is SEEN's; else it is 1
    where `all_seen`, or else whether a late head is seen to grow says nothing (the factors q and 1 - q are left out).
    """

    heads: Heads
    columns: Array
    owner: Index
    certain: Mask
    all_seen: bool = False

    def predictors(self, theta: Array) -> Array:
        """`[n, 4]` of parameters `theta [P]`."""
        parts = [self.columns[:, self.owner == k] @ theta[self.owner == k] for k in range(4)]
        return np.stack(parts, axis=-1)

    def slope(self, gradient: Array) -> Array:
        """From a gradient by predictor, `[n, 4]`, to one by parameter, `[n, P]`."""
        return np.asarray(gradient[:, self.owner] * self.columns)

    def bend(self, hessian: Array) -> Array:
        """From a hessian by predictor, `[n, 4, 4]`, to one by parameter, `[n, P, P]`."""
        outer = self.columns[:, :, None] * self.columns[:, None, :]
        return np.asarray(hessian[:, self.owner[:, None], self.owner] * outer)


def model(
    heads: Heads, share: Sequence[Array], time: Sequence[Array], spread: Sequence[Array], certain: Mask, seen: bool
) -> Model:
    """The model whose predictors have these columns, each `[n]`; `seen` adds a constant q."""
    one = np.ones(heads.width.size)
    sets = (share, time, spread, (one,) if seen else ())
    owner = [k for k, columns in enumerate(sets) for _ in columns]
    return Model(heads, np.stack([c for columns in sets for c in columns], axis=-1), np.array(owner), certain)


def log_likelihood(model: Model, theta: Array) -> tuple[Array, Array, Array, Array]:
    """log-likelihood of every head `[n]` (density in t, not in log t), gradient `[n, 4]` and hessian `[n, 4, 4]`.

    The last, also `[n, 4, 4]`, is the hessian as it would be expected if `never` were told from late: never positive.
    """
    heads, log_time = model.heads, np.log(model.heads.time)
    eta, mu, log_sigma, kappa = model.predictors(theta).T
    z, sigma = (log_time - mu) * np.exp(-log_sigma), np.exp(log_sigma)
    event, start = heads.event, heads.start
    sign = np.where(start, 1.0, -1.0)  # F(z) or S(z) = F(-z)
    tail = log_ndtr(sign * z)
    mills = sign * np.exp(-0.5 * z**2 - LOG_ROOT_TAU - tail)
    value = np.where(event, -0.5 * z**2 - LOG_ROOT_TAU - log_sigma - log_time, tail)
    first = np.where(event, -z, mills)  # derivatives by z
    second = np.where(event, -1.0, -mills * (mills + z))
    gradient, hessian = np.zeros((z.size, 4)), np.zeros((z.size, 4, 4))
    gradient[:, TIME], gradient[:, SPREAD] = -first / sigma, -z * first - event
    hessian[:, TIME, TIME], hessian[:, SPREAD, SPREAD] = second / sigma**2, z * (z * second + first)
    hessian[:, TIME, SPREAD] = hessian[:, SPREAD, TIME] = (z * second + first) / sigma
    if (model.owner == SEEN).any():
        late = heads.growing * 1.0 - heads.never
        value = value + np.where(late == 0.0, 0.0, log_expit(late * kappa))
        gradient[:, SEEN] = late * expit(-late * kappa)
        hessian[:, SEEN, SEEN] = -np.abs(late) * expit(kappa) * expit(-kappa)
    if model.all_seen:
        value = np.where(heads.never, -np.inf, value)
    free = ~model.certain
    value = value + np.where(free, log_expit(eta), 0.0)
    gradient[:, SHARE] = np.where(free, expit(-eta), 0.0)
    hessian[:, SHARE, SHARE] = np.where(free, -expit(eta) * expit(-eta), 0.0)
    return _with_cured(model, eta, value, gradient, hessian)


def _with_cured(
    model: Model, eta: Array, value: Array, gradient: Array, hessian: Array
) -> tuple[Array, Array, Array, Array]:
    """Add 1 - p to the likelihood of what has not been seen: log(e^a + e^b) and its derivatives."""
    cured = model.heads.never & ~model.certain
    total = np.where(cured, np.logaddexp(log_expit(-eta), value), value)
    late = np.exp(value - total)  # probability that the head is merely late, given that it has not been seen
    apart = np.where(cured[:, None], gradient, 0.0)  # gradient of b - a
    apart[cured, SHARE] += expit(eta[cured])
    other = np.zeros_like(hessian)  # hessian of a
    other[:, SHARE, SHARE] = -expit(eta) * expit(-eta)
    share = np.where(cured, late, 1.0)[:, None, None]
    told = share * hessian + (1.0 - share) * other
    mixed = told + share * (1.0 - share) * apart[:, :, None] * apart[:, None, :]
    return total, gradient - (1.0 - share[:, :, 0]) * apart, mixed, told


def late_probability(model: Model, theta: Array) -> Array:
    """`[n]`: probability that a head would still emerge, given that it has not up to its time; of use for `never`."""
    eta, mu, log_sigma, kappa = model.predictors(theta).T
    late = log_ndtr((mu - np.log(model.heads.time)) * np.exp(-log_sigma))
    if (model.owner == SEEN).any():
        late = late + log_expit(-kappa)
    late = late + log_expit(eta)
    if model.all_seen:
        return np.zeros_like(late)
    return np.where(model.certain, 1.0, np.exp(late - np.logaddexp(late, log_expit(-eta))))


@dataclass(frozen=True, slots=True)
class Fit:
    """A maximum of the likelihood: `theta [P]`, and by cluster scores `[G, P]` and information `[G, P, P]`.

    `complete [G, P, P]` is the information if `never` were told from late: positive semi-definite for every cluster,
    as `information` need not be.
    """

    model: Model
    theta: Array
    value: Array  # log-likelihood by cluster [G]
    score: Array
    information: Array
    complete: Array
    trouble: str  # why this is no maximum; empty if it is one

    def at(self, predictor: int, column: int) -> Array:
        """The unit vector `[P]` of one parameter."""
        unit = np.zeros(self.theta.size)
        unit[np.flatnonzero(self.model.owner == predictor)[column]] = 1.0
        return unit


def maximise(model: Model, starts: Sequence[Array], weight: Array | None = None) -> Fit:
    """The best of Newton's maxima from `starts`, each `[P]`; `weight [G]` counts a cluster several times or not at all.

    The hessian's eigenvalues are made negative, steps are cut to length 3 and halved until the likelihood grows.
    """
    weights = np.ones(model.heads.clusters) if weight is None else weight
    found = [_newton(model, start, weights[model.heads.cluster]) for start in starts]
    theta, _, converged = max(found, key=lambda f: f[1])
    value, gradient, hessian, told = log_likelihood(model, theta)
    rows = (value, model.slope(gradient), -model.bend(hessian), -model.bend(told))
    sums = [np.zeros((model.heads.clusters, *part.shape[1:])) for part in rows]
    for total, part in zip(sums, rows, strict=True):
        np.add.at(total, model.heads.cluster, part)
    fit = Fit(model, theta, sums[0], sums[1], sums[2], sums[3], "")
    return replace(fit, trouble=_trouble(fit, weights, converged))


def _newton(model: Model, theta: Array, weight: Array) -> tuple[Array, float, bool]:
    """Parameters, log-likelihood, and whether Newton's method came to rest."""

    owner, columns = model.owner, model.columns

    def terms(at: Array) -> tuple[float, Array, Array]:
        value, gradient, hessian, _ = log_likelihood(model, at)
        slopes = (weight[:, None] * gradient)[:, owner] * columns
        pairs = (weight[:, None, None] * hessian)[:, owner[:, None], owner] * columns[:, :, None]
        bends = (pairs.transpose(1, 2, 0) * columns.T).sum(axis=-1)
        return float(weight @ value), slopes.sum(axis=0), bends

    value, gradient, hessian = terms(theta)
    for _ in range(STEPS):
        bends, axes = np.linalg.eigh(-hessian)
        floor = max(float(np.abs(bends).max()) * 1e-9, 1e-12)
        step = axes @ ((axes.T @ gradient) / np.maximum(np.abs(bends), floor))
        if gradient @ step < 1e-12 * (1.0 + abs(value)):
            return theta, value, True
        step *= min(1.0, 3.0 / float(np.linalg.norm(step)))
        for _ in range(40):
            new = terms(theta + step)
            if np.isfinite(new[0]) and new[0] > value:
                break
            step *= 0.5
        else:
            return theta, value, bool(np.abs(gradient @ step) < 1e-6)
        theta, (value, gradient, hessian) = theta + step, new
        if np.abs(model.predictors(theta)[:, [SHARE, SPREAD, SEEN]]).max() > 2.0 * EDGE:
            return theta, value, False
    return theta, value, False


def _trouble(fit: Fit, weight: Array, converged: bool) -> str:
    """Why the fit is no maximum inside its range; empty if it is one."""
    eta, _, log_sigma, kappa = fit.model.predictors(fit.theta).T
    if -log_sigma.min() > EDGE:
        return "times lie exactly on a line: the likelihood has no maximum"
    never = fit.model.heads.never & ~fit.model.certain
    if never.any() and eta[never].max() > EDGE:
        return "never cannot be told from late: the share of emerging heads is at its edge, 1"
    if kappa.max() > EDGE:
        return ALL_SEEN
    if np.abs(eta).max() > EDGE:
        return "share of emerging heads at its edge: the likelihood has no maximum"
    if not converged or np.linalg.eigvalsh((weight[:, None, None] * fit.information).sum(axis=0)).min() <= 0.0:
        return "the likelihood has no maximum"
    return ""


def cluster_error(fit: Fit, contrast: Array) -> tuple[float, float]:
    """Standard error of `contrast [P]` @ theta, and its degrees of freedom; (nan, nan) if one cluster decides on it.

    Sandwich over clusters, H^-1 (sum_c u_c u_c') H^-1, with cluster scores enlarged to u_c = (1 - I_c I^-1)^-1/2 s_c,
    because the fit has been drawn towards every cluster (CR2: Bell and McCaffrey 2002), and with Satterthwaite's
    degrees of freedom under the working assumption that a cluster's score has covariance I_c (Pustejovsky and Tipton
    2018, doi:10.1080/07350015.2016.1247004). Both are carried over from least squares to likelihood scores, with the
    complete information I_c for a cluster's weight.
    """
    bends, axes = np.linalg.eigh(fit.complete.sum(axis=0))
    white, colour = (axes / np.sqrt(bends)) @ axes.T, (axes * np.sqrt(bends)) @ axes.T  # I^-1/2, I^1/2
    share = white @ fit.complete @ white  # of the information, by cluster; sums to 1
    aim = colour @ np.linalg.solve(fit.information.sum(axis=0), contrast)
    if (share @ aim @ aim).max() > MOST_SHARE * (aim @ aim):
        return float("nan"), float("nan")
    kept, turn = np.linalg.eigh(np.eye(len(contrast)) - share)
    enlarged = np.einsum("gij,gj,gkj,k->gi", turn, np.maximum(kept, LEAST_KEPT) ** -0.5, turn, aim)
    error = float(np.sqrt(((enlarged * (fit.score @ white)).sum(axis=1) ** 2).sum()))
    bent = np.einsum("gij,gj->gi", share, enlarged)
    own, length = (enlarged * bent).sum(axis=1), (bent**2).sum(axis=1)  # covariance [G, G]: diag(own) - bent bent'
    trace = (own - length).sum()
    freedom = float(trace**2 / ((own * (own - 2.0 * length)).sum() + ((bent.T @ bent) ** 2).sum()))
    return error, min(max(freedom, 1.0), len(share) - 1.0)
