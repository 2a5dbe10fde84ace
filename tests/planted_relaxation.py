"""Planted approaches to a plateau and planted growth, with their truth; no code and no fit of the estimators in it.

Coordinates x of a gradient flow dx/dt = -dU/dx in U = u |x|^k, begun at x0 at time `begin`, in closed form; scores are
made from them. Other curves are plain closed forms in raw or in log time. Noise is that of `planted.observe`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.planted import Array, Generator, Noise, observe

JITTER = Noise(jitter=0.01, memory=0.4)
MIXED = Noise(jitter=0.006, memory=0.4, flat=0.02, spread=0.1, wander=0.01, white=0.03)
FAINT = Noise(jitter=0.002, memory=0.4)


def probe_times(first: float = 1.0, last: float = 1e4, per_decade: int = 20) -> Array:
    """Integer times, log-spaced."""
    return np.unique(np.round(np.geomspace(first, last, int(np.log10(last / first) * per_decade) + 1)))


@dataclass(frozen=True)
class Flow:
    """Gradient flow in u |x|^k from x0 at time `begin`; k = 2 is exponential."""

    k: float
    u: float
    x0: float = 1.0
    begin: float = 0.0

    def x(self, time: Array) -> Array:
        """Coordinate; x0 before `begin`."""
        passed = np.maximum(np.asarray(time, dtype=np.float64) - self.begin, 0.0)
        if self.k == 2.0:
            return self.x0 * np.exp(-2.0 * self.u * passed)
        p = self.k - 2.0
        return (self.x0**-p + self.k * p * self.u * passed) ** (-1.0 / p)

    def loss(self, time: Array) -> Array:
        """U(x)."""
        return self.u * self.x(time) ** self.k

    def gradient(self, time: Array) -> Array:
        """|dU/dx|."""
        return self.k * self.u * self.x(time) ** (self.k - 1.0)

    @property
    def origin(self) -> float:
        """The t0 of x = A (t - t0)^(-1 / (k - 2)), k > 2."""
        p = self.k - 2.0
        return self.begin - self.x0**-p / (self.k * p * self.u)

    def reaches(self, x: float) -> float:
        """Time at which the coordinate is down to x."""
        p = self.k - 2.0
        passed = np.log(self.x0 / x) / (2.0 * self.u) if p == 0.0 else (x**-p - self.x0**-p) / (self.k * p * self.u)
        return self.begin + float(passed)


@dataclass(frozen=True)
class Escape:
    """Gradient flow out of a saddle, dx/dt = k u x^(k-1), from x0 at time 0; finite only before `end` if k > 2."""

    k: float
    u: float
    x0: float

    def x(self, time: Array) -> Array:
        """Coordinate."""
        p = self.k - 2.0
        if p == 0.0:
            return self.x0 * np.exp(2.0 * self.u * time)
        return (self.x0**-p - self.k * p * self.u * time) ** (-1.0 / p)

    @property
    def end(self) -> float:
        """The t_c at which x would be infinite."""
        p = self.k - 2.0
        return np.inf if p == 0.0 else self.x0**-p / (self.k * p * self.u)

    def reaches(self, x: float) -> float:
        """Time at which the coordinate is up to x."""
        p = self.k - 2.0
        return float(
            np.log(x / self.x0) / (2.0 * self.u) if p == 0.0 else (self.x0**-p - x**-p) / (self.k * p * self.u)
        )


@dataclass(frozen=True)
class Curve:
    """A noiseless score over time, the window it is fitted in, and its law with that law's exponent (or rate)."""

    law: str
    score: Callable[[Array], Array]
    window: tuple[float, float]
    exponent: float = np.nan
    t0: float = np.nan  # or t_c
    floor: float = np.nan  # of growth: the score at x = 0

    def seen(self, time: Array, noise: Noise, rng: Generator, replicates: int = 8) -> Array:
        """Noisy scores `[R, T]`."""
        lift = _Lift(lambda z: self.score(10.0**z) / 0.1)
        return observe(lift, time, noise, rng, replicates)


@dataclass(frozen=True)
class _Lift:
    """What `planted.observe` asks for: lift against log10 time."""

    lift: Callable[[Array], Array]


def power(rng: Generator, degrees: tuple[float, float] = (2.9, 4.0), end: float = 1e4) -> Curve:
    """Score that falls short of its plateau by a coordinate x of gradient flow; exponent 1 / (k - 2)."""
    k, middle = rng.uniform(*degrees), 10.0 ** rng.uniform(1.5, 2.3)
    start = rng.uniform(0.0, 0.6)  # of t50
    p = k - 2.0
    flow = Flow(k, (2.0**p - 1.0) / (k * p * middle * (1.0 - start)), 1.0, start * middle)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)
    return Curve("power", lambda t: low + rise * (1.0 - flow.x(t)), (flow.reaches(0.5), end), 1.0 / p, flow.origin)


def exponential(rng: Generator) -> Curve:
    """1 - exp(-t / tau) after a delay."""
    tau, begin = 10.0 ** rng.uniform(1.8, 3.0), 10.0 ** rng.uniform(0.5, 1.8)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)
    flow = Flow(2.0, 0.5 / tau, 1.0, begin)
    return Curve("exponential", lambda t: low + rise * (1.0 - flow.x(t)), (flow.reaches(0.5), 1e4))


def logistic(rng: Generator) -> Curve:
    """Sigmoid in raw time."""
    middle = 10.0 ** rng.uniform(1.8, 2.8)
    width = middle * rng.uniform(0.2, 0.5)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)
    return Curve("logistic", lambda t: low + rise * 0.5 * (1.0 + np.tanh(0.5 * (t - middle) / width)), (middle, 1e4))


def log_logistic(rng: Generator) -> Curve:
    """Sigmoid in log time: its tail is a power law, so that "power" is a near miss."""
    middle, slope = 10.0 ** rng.uniform(1.5, 2.3), rng.uniform(0.7, 1.5)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)

    def score(t: Array) -> Array:
        return low + rise * 0.5 * (1.0 + np.tanh(0.5 * slope * np.log(t / middle)))

    return Curve("log_logistic", score, (middle, 1e4), slope, 0.0)


def gompertz(rng: Generator) -> Curve:
    """exp(-exp(-(log t - m) / w)), a law that no family of the fits contains; its tail is a power law of origin 0."""
    middle, width = rng.uniform(1.4, 2.2), rng.uniform(0.2, 0.4)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)
    half = 10.0 ** (middle - width * np.log(np.log(2.0)))
    return Curve("gompertz", lambda t: low + rise * np.exp(-np.exp(-(np.log10(t) - middle) / width)), (half, 1e4))


def growing(rng: Generator, k: float) -> Curve:
    """Escape along a score linear in x, seen until x = 1; exponential for k = 2, else critical."""
    middle, x0 = 10.0 ** rng.uniform(2.0, 3.0), rng.uniform(0.02, 0.05)
    scale = Escape(k, 1.0, x0).reaches(1.0)
    flow = Escape(k, scale / middle, x0)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)

    def score(t: Array) -> Array:
        return low + rise * flow.x(np.minimum(t, middle))

    law, value = ("exponential", 2.0 * flow.u) if k == 2.0 else ("critical", 1.0 / (k - 2.0))
    return Curve(law, score, (0.05 * middle, middle), value, flow.end, low)


def growing_power(rng: Generator) -> Curve:
    """Growth by t^b from time 0."""
    middle, b = 10.0 ** rng.uniform(2.0, 3.0), rng.uniform(1.0, 3.0)
    low, rise = rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.4)
    return Curve("power", lambda t: low + rise * (t / middle) ** b, (0.03 * middle, middle), b, floor=low)
