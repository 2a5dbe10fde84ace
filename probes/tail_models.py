"""What a power-law tail is compared with, and the likelihood ratios that do it.

With u = log(x / xmin) the density of u above 0 is, up to its norm,
  - power law            exp(-a u), a = alpha - 1;
  - lognormal            exp(-a u - s u^2 / 2), variance of log x 1 / s;
  - stretched exponential exp(s u - a (exp(s u) - 1) / s), survival exp(-a (exp(s u) - 1) / s);
  - truncated power law  exp(-a u - s exp(u)), cut off at x = xmin / s;
  - exponential          the stretched one at s = 1.
The first three alternatives all become the power law at s = 0, the edge of their range. So none can be *worse* than it,
twice the log ratio has a known law there (half the time 0, else chi-square with one degree of freedom), and the normal
law of Vuong's ratio, whose variance vanishes at that edge, does not apply. It does for the exponential.
Integers have the same kernels times 1 / x, summed over the integers from xmin on instead of integrated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import chdtrc, erfc, erfcx, log_ndtr

Array = NDArray[np.float64]

SUMMED = 2000  # integers whose probabilities are summed one by one; the rest is an integral
FALL = 45.0  # the quadrature stops where the integrand has fallen by exp(-FALL)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(96)
LARGE = 1e10
EVEN = 1e-5  # a gain in log-likelihood below this is none


@dataclass(frozen=True, slots=True)
class Family:
    """`kernel(u, a, s)`: log of the density up to its norm; `tail(u, a, s)`: log of its integral from u on."""

    kernel: Callable[[Array, float, float], Array]
    tail: Callable[[Array, float, float], Array]
    nested: bool = True


@dataclass(frozen=True, slots=True)
class TailData:
    """Items at or above xmin: u = log(x / xmin), whether the time was seen, and the cluster's number, each `[n]`."""

    u: Array
    seen: NDArray[np.bool_]
    cluster: NDArray[np.intp]
    xmin: float
    discrete: bool


def _power(u: Array, a: float, s: float) -> Array:
    return np.asarray(-a * u)


def _power_tail(u: Array, a: float, s: float) -> Array:
    return np.asarray(-a * u - np.log(a))


def _lognormal(u: Array, a: float, s: float) -> Array:
    return np.asarray(-a * u - 0.5 * s * u**2)


def _lognormal_tail(u: Array, a: float, s: float) -> Array:
    z = (a + s * u) / np.sqrt(2.0 * s)
    far = np.log(erfcx(np.maximum(z, 0.0)))  # far below the mode erfcx overflows
    near = z**2 + np.log(2.0) + log_ndtr(-np.sqrt(2.0) * z)
    return np.asarray(0.5 * np.log(0.5 * np.pi / s) + _lognormal(u, a, s) + np.where(z > 0.0, far, near))


def _stretched_tail(u: Array, a: float, s: float) -> Array:
    return np.asarray(-a * np.expm1(s * u) / s - np.log(a))


def _stretched(u: Array, a: float, s: float) -> Array:
    return np.asarray(s * u - a * np.expm1(s * u) / s)


def _truncated(u: Array, a: float, s: float) -> Array:
    return np.asarray(-a * u - s * np.exp(u))


def _truncated_tail(u: Array, a: float, s: float) -> Array:
    """By Gauss-Legendre quadrature of exp(-a u) E_{1 + a}(s exp(u)), E the generalised exponential integral."""
    cut = s * np.exp(u)
    span = np.log1p((FALL + 10.0 * FALL * max(-a, 0.0)) / cut)
    span = np.minimum(span, FALL / a) if a > 0.0 else span
    w = 0.5 * span[..., None] * (NODES + 1.0)
    exponent = -a * w - cut[..., None] * np.expm1(w)
    top = exponent.max(axis=-1)
    total = (WEIGHTS * np.exp(exponent - top[..., None])).sum(axis=-1)
    return np.asarray(-a * u - cut + top + np.log(0.5 * span * total))


def _exponential(u: Array, a: float, s: float) -> Array:
    return _stretched(u, a, 1.0)


def _exponential_tail(u: Array, a: float, s: float) -> Array:
    return _stretched_tail(u, a, 1.0)


POWER = Family(_power, _power_tail)
FAMILIES = {
    "lognormal": Family(_lognormal, _lognormal_tail),
    "exponential": Family(_exponential, _exponential_tail, nested=False),
    "stretched_exponential": Family(_stretched, _stretched_tail),
    "truncated_power_law": Family(_truncated, _truncated_tail),
}


def log_likelihood(family: Family, data: TailData, a: float, s: float) -> Array:
    """Of each item `[n]`, given that it lies at or above xmin: density where seen, survival where censored.

    Continuous: of u, so less log x than of x itself; the same for every family, and gone from all ratios.
    """
    if data.discrete:
        return family.kernel(data.u, a, s) - data.u - _log_sum(family, data.xmin, a, s)
    values = np.empty_like(data.u)
    values[data.seen] = family.kernel(data.u[data.seen], a, s)
    values[~data.seen] = family.tail(data.u[~data.seen], a, s)
    return values - family.tail(np.zeros(1), a, s)


def _log_sum(family: Family, xmin: float, a: float, s: float) -> float:
    """log of the sum of kernel(u) xmin / x over the integers x >= xmin; the far ones as an integral from half below."""
    u = np.log((xmin + np.arange(SUMMED)) / xmin)
    rest = family.tail(np.log((xmin + np.array([SUMMED - 0.5])) / xmin), a, s) + np.log(xmin)
    return float(np.logaddexp.reduce(np.concatenate([family.kernel(u, a, s) - u, rest])))


def fit(name: str, data: TailData, excess: float) -> tuple[float, float]:
    """Maximum-likelihood (a, s), beginning at a power law with alpha - 1 = `excess`; s = 0 where that is the best."""
    family, signed = FAMILIES[name], name in ("lognormal", "truncated_power_law")

    def parameters(point: Array) -> tuple[float, float]:
        a = excess * float(point[0] if signed else np.exp(point[0]))
        return a, float(np.exp(np.clip(point[1], -40.0, 10.0))) if family.nested else 1.0

    def cost(point: Array) -> float:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            value = -float(log_likelihood(family, data, *parameters(point)).sum())
        return value if np.isfinite(value) else LARGE

    begin = 1.0 if signed else 0.0
    size = 2 if family.nested else 1
    starts = [np.array([begin, np.log(s)])[:size] for s in ((1e-3, 0.3) if family.nested else (1.0,))]
    options = {"xatol": 1e-4, "fatol": 1e-6, "maxiter": 2000}
    found = [minimize(cost, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(found, key=lambda result: result.fun)
    power = -float(log_likelihood(POWER, data, excess, 0.0).sum())
    return parameters(best.x) if best.fun < power - EVEN or not family.nested else (excess, 0.0)


def compare(name: str, data: TailData, excess: float) -> tuple[float, float]:
    """(log-likelihood ratio, p) of the power law against a family; a positive ratio favours the power law.

    Nested: p = P(chi-square_1 > 2 |ratio| / k) / 2, and 1 where the ratio is 0. Exponential: Vuong's two-sided normal
    p, erfc(|ratio| / sqrt(2 V)). V is the sum over clusters of squared sums of the items' ratios less their mean, and
    k, at least 1, is V over the same with every item its own cluster: what dependence adds.
    Not guaranteed: below alpha = 3 the variance of x is infinite and the law for the truncated power law approximate.
    """
    family = FAMILIES[name]
    a, s = fit(name, data, excess)
    if family.nested and s == 0.0:
        return 0.0, 1.0
    ratios = log_likelihood(POWER, data, excess, 0.0) - log_likelihood(family, data, a, s)
    ratio, apart = float(ratios.sum()), ratios - ratios.mean()
    own, variance = float((apart**2).sum()), float((np.bincount(data.cluster, apart) ** 2).sum())
    if own == 0.0 or variance == 0.0:
        return ratio, 1.0
    if family.nested:
        return min(ratio, 0.0), 0.5 * float(chdtrc(1.0, 2.0 * max(-ratio, 0.0) / max(1.0, variance / own)))
    return ratio, float(erfc(abs(ratio) / np.sqrt(2.0 * variance)))
