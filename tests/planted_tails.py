"""Planted times: power laws above a known point with a known exponent, times that are none, and ways to hide them."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]
Generator = np.random.Generator


def pareto(rng: Generator, n: int, alpha: float) -> Array:
    """A power law from 1 on."""
    return 1.0 + rng.pareto(alpha - 1.0, n)


def bent(rng: Generator, n: int, alpha: float, share: float = 0.6) -> Array:
    """A `share` of power law from 1 on; below, a density that rises linearly from 0."""
    return np.where(rng.random(n) < share, pareto(rng, n, alpha), np.sqrt(rng.random(n)))


def zipf(rng: Generator, n: int, alpha: float) -> Array:
    """Integers from 1 on, P(x) ~ x^-alpha."""
    return rng.zipf(alpha, n).astype(np.float64)


def heads(rng: Generator, members: int, each: int, alpha: float, correlation: float = 0.5) -> tuple[Array, NDArray]:
    """Power laws from 1 on that share a normal score within a member, and the members' numbers, `[members * each]`."""
    common, own = rng.standard_normal((members, 1)), rng.standard_normal((members, each))
    score = np.sqrt(correlation) * common + np.sqrt(1.0 - correlation) * own
    return norm.sf(score).ravel() ** (-1.0 / (alpha - 1.0)), np.repeat(np.arange(members), each)


def at_random(rng: Generator, times: Array, scale: float) -> tuple[Array, NDArray[np.bool_]]:
    """Each time hidden behind its own log-normal end of observation."""
    end = scale * np.exp(rng.standard_normal(times.size))
    return np.minimum(times, end), times > end


def at_once(times: Array, end: float) -> tuple[Array, NDArray[np.bool_]]:
    """All observation ends at one time."""
    return np.minimum(times, end), times > end


def lognormal(rng: Generator, n: int, sigma: float = 1.0) -> Array:
    """No power law: the local exponent grows with log x."""
    return rng.lognormal(0.0, sigma, n)


def exponential(rng: Generator, n: int) -> Array:
    """No power law."""
    return rng.exponential(1.0, n)


def stretched(rng: Generator, n: int, shape: float = 0.5) -> Array:
    """No power law: P(X > x) = exp(-x^shape)."""
    return rng.weibull(shape, n)
