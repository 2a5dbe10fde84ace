"""Planted curves: lift against log10 step, their truth by formula or root-finding, and noise of several kinds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

Array = NDArray[np.float64]
Generator = np.random.Generator
FIRST, LAST = 0.0, 4.0  # decades of step that probes cover


@dataclass(frozen=True)
class Planted:
    """A noiseless curve `lift(log10 step)`, the status it should get, and the lifts that its rise goes between."""

    kind: str
    status: str
    lift: Callable[[Array], Array]
    low: float = np.nan
    top: float = np.nan
    lost: float = 0.0

    def first(self, height: float) -> float:
        """First step at which the noiseless lift reaches `height`, even after the last probe; nan if it never does."""
        grid = np.linspace(FIRST, LAST + 6.0, 10001)
        above = np.flatnonzero(self.lift(grid) >= height)
        if above.size == 0:
            return float("nan")
        i = int(above[0])
        if i == 0:
            return float(10**FIRST)
        return float(10 ** brentq(lambda z: float(self.lift(np.array([z]))[0]) - height, grid[i - 1], grid[i]))

    @property
    def level(self) -> float:
        return self.first(2.0)

    @property
    def t50(self) -> float:
        return self.first(0.5 * (self.low + self.top))


@dataclass(frozen=True)
class Noise:
    """Standard deviations relative to the score, except `flat` (units of u); `jitter` and `flat` hit all replicates."""

    jitter: float = 0.0
    memory: float = 0.0  # AR(1) coefficient of jitter from probe to probe
    flat: float = 0.0
    spread: float = 0.0  # of replicates, lasting over the whole curve
    wander: float = 0.0  # of replicates, slowly varying
    white: float = 0.0  # of replicates, new at every probe


QUIET = Noise(jitter=0.01, spread=0.05, white=0.02)
USUAL = Noise(jitter=0.015, memory=0.4, flat=0.02, spread=0.1, wander=0.03, white=0.05)
LOUD = Noise(jitter=0.06, memory=0.7, flat=0.03, spread=0.2, wander=0.1, white=0.1)
MULTIPLICATIVE = Noise(jitter=0.02, spread=0.1, white=0.05)
AUTOCORRELATED = Noise(jitter=0.015, memory=0.7, spread=0.1, wander=0.05)
ADDITIVE = Noise(flat=0.05, memory=0.7, spread=0.1)


def probe_steps(per_decade: int = 20, zero: bool = False) -> Array:
    """Integer steps, log-spaced over the decades of the planted curves."""
    steps = np.unique(np.round(10 ** np.linspace(FIRST, LAST, int((LAST - FIRST) * per_decade) + 1)))
    return np.concatenate([[0.0], steps]) if zero else steps


def autoregressive(rng: Generator, shape: tuple[int, ...], memory: float) -> Array:
    """Stationary AR(1) of unit variance along the last axis."""
    out = rng.standard_normal(shape)
    for i in range(1, shape[-1]):
        out[..., i] = memory * out[..., i - 1] + np.sqrt(1.0 - memory**2) * out[..., i]
    return out


def observe(planted: Planted, step: Array, noise: Noise, rng: Generator, replicates: int = 8, u: float = 0.1) -> Array:
    """Noisy scores `[R, T]` of a planted curve."""
    lift = planted.lift(np.log10(np.maximum(step, 0.5)))
    shape = (replicates, step.size)
    common = noise.jitter * autoregressive(rng, shape[1:], noise.memory)
    own = noise.spread * rng.standard_normal((replicates, 1)) + noise.white * rng.standard_normal(shape)
    own = own + noise.wander * autoregressive(rng, shape, 0.9)
    return u * (lift * (1.0 + common + own) + noise.flat * autoregressive(rng, shape[1:], noise.memory))


def gompertz(z: Array, middle: float, width: float) -> Array:
    return np.exp(-np.exp(-(z - middle) / width))


def bump(z: Array, middle: float, width: float) -> Array:
    return np.exp(-0.5 * ((z - middle) / width) ** 2)


def plain(rng: Generator) -> Planted:
    low, rise, middle, width = rng.uniform(0.8, 1.2), rng.uniform(2, 5), rng.uniform(1.0, 2.4), rng.uniform(0.1, 0.2)
    return Planted("gompertz", "emerged", lambda z: low + rise * gompertz(z, middle, width), low, low + rise)


def two_step(rng: Generator) -> Planted:
    low, rise, share = rng.uniform(0.8, 1.2), rng.uniform(5, 6.5), rng.uniform(0.32, 0.4)
    a, b = rng.uniform(0.8, 1.4), rng.uniform(1.9, 2.6)

    def lift(z: Array) -> Array:
        return low + rise * (share * ndtr((z - a) / 0.12) + (1 - share) * ndtr((z - b) / 0.15))

    return Planted("two_step", "emerged", lift, low, low + rise)


def overshoot(rng: Generator) -> Planted:
    low, rise, middle = rng.uniform(0.8, 1.2), rng.uniform(2, 4), rng.uniform(1.2, 2.2)
    extra = rng.uniform(0.15, 0.35) * rise

    def lift(z: Array) -> Array:
        return low + rise * 0.5 * (1 + np.tanh((z - middle) / 0.2)) + extra * bump(z, middle + 0.8, 0.22)

    return Planted("overshoot", "emerged", lift, low, low + rise)


def dip(rng: Generator) -> Planted:
    low, rise, middle, width = rng.uniform(0.9, 1.2), rng.uniform(2, 4), rng.uniform(1.6, 2.4), rng.uniform(0.1, 0.2)
    deep, place = rng.uniform(0.2, 0.4), rng.uniform(0.5, middle - 0.6)

    def lift(z: Array) -> Array:
        return low + rise * gompertz(z, middle, width) - deep * bump(z, place, 0.15)

    return Planted("dip", "emerged", lift, low, low + rise)


def drift(rng: Generator) -> Planted:
    low, rise, middle, width = rng.uniform(0.8, 1.0), rng.uniform(3, 5), rng.uniform(1.6, 2.4), rng.uniform(0.1, 0.2)

    def lift(z: Array) -> Array:
        return low + 0.05 * np.minimum(z, 2.0) + rise * gompertz(z, middle, width)

    return Planted("drift", "emerged", lift, low + 0.05, low + 0.1 + rise)


def power_law(rng: Generator) -> Planted:
    low, rise, scale, a = rng.uniform(0.8, 1.1), rng.uniform(6, 9), rng.uniform(2.8, 3.4), rng.uniform(0.4, 0.7)

    def lift(z: Array) -> Array:
        return low + rise * (1 - (1 + 10.0 ** (z - scale)) ** -a)

    return Planted("power_law", "growing", lift, low, low + rise)


def late(rng: Generator) -> Planted:
    low, rise, middle = rng.uniform(0.8, 1.1), rng.uniform(4, 6), rng.uniform(3.4, 3.7)
    return Planted("late", "growing", lambda z: low + rise * ndtr((z - middle) / 0.3), low, low + rise)


def transient(rng: Generator) -> Planted:
    low, rise, middle, fall = rng.uniform(0.8, 1.2), rng.uniform(2, 5), rng.uniform(1.0, 1.8), rng.uniform(2.9, 3.3)
    lost = rng.uniform(0.7, 0.95)

    def lift(z: Array) -> Array:
        return low + rise * gompertz(z, middle, 0.13) * (1 - lost * gompertz(z, fall, 0.12))

    return Planted("transient", "transient", lift, low, low + rise, lost)


def flat(rng: Generator) -> Planted:
    low, slope = rng.uniform(0.75, 1.25), rng.uniform(-0.15, 0.05)
    return Planted("flat", "never", lambda z: low + slope * z)


def constant(rng: Generator) -> Planted:
    low = rng.uniform(0.5, 1.3)
    return Planted("constant", "never", lambda z: np.full_like(z, low))


def fading(rng: Generator) -> Planted:
    low, drop, middle = rng.uniform(0.9, 1.3), rng.uniform(0.3, 0.7), rng.uniform(1, 3)
    return Planted("fading", "never", lambda z: low - drop * ndtr((z - middle) / 0.3))


def small(rng: Generator) -> Planted:
    low, rise, middle = rng.uniform(0.8, 1.2), rng.uniform(0.1, 0.25), rng.uniform(1, 3)
    return Planted("small", "never", lambda z: low + rise * ndtr((z - middle) / 0.3))


def there(rng: Generator) -> Planted:
    low, slope = rng.uniform(2.1, 4), rng.uniform(-0.2, 0.5)
    return Planted("there", "at_start", lambda z: low + slope * z)


KINDS = (plain, two_step, overshoot, dip, drift, power_law, late, transient, flat, constant, fading, small, there)
RISING = (
    plain,
    two_step,
    overshoot,
    drift,
    transient,
)  # whose level and t50 lie within the probes, and no dip bends t50
