"""Planted sweeps over widths, and planted curves that collapse: the truth is in the arguments, no estimator is used.

Heads of one member are dependent: luck in *whether* is a Gaussian copula over a common member effect, luck in *when*
is a member effect on log time. Both leave the marginal share and the marginal median of a width exactly as planted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit, ndtr, ndtri
from scipy.stats import gamma, weibull_min

Array = NDArray[np.float64]
Generator = np.random.Generator
Quantile = Callable[[Array], Array]  # of log time about its median, in units of the spread


def normal(level: Array) -> Array:
    return np.asarray(ndtri(level))


def weibull(level: Array) -> Array:
    """log of Weibull times of shape 1, scaled to unit standard deviation of the log, median 0: skewed to the left."""
    return np.asarray(np.log(weibull_min(1.0).ppf(level) / np.log(2.0)) / (np.pi / np.sqrt(6.0)))


def gamma_times(level: Array) -> Array:
    """log of gamma times of shape 2, about their median, unit standard deviation of the log."""
    return np.asarray(np.log(gamma(2.0).ppf(level) / gamma(2.0).median()) / np.sqrt(np.pi**2 / 6.0 - 1.0))


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A sweep: what is true, how it is sampled, and how long the runs are."""

    widths: tuple[float, ...]
    shares: tuple[float, ...]  # that ever emerge, by width
    exponent: float  # median time = constant width^-exponent ...
    rate: float = 0.0  # ... times exp(-rate width)
    constant: float = 500.0
    spread: float = 0.5  # standard deviation of log time, of heads
    together: float = 0.4  # share of it, as variance, and of the copula, that a member's heads have in common
    seeds: int = 8
    heads: int = 8
    end: float = 4000.0  # last step
    first: float = 1.0  # first probe
    slow: float = 1.0  # a rise begins at t / slow; a run that ends between this and t shows a growing head
    cut: bool = False  # times are middles of rises: seen only where the rise ends, at t slow, within the run
    shared: bool = False  # clusters are seeds, whose luck all widths share
    quantile: Quantile = normal

    def median(self, width: Array | float) -> Array:
        width = np.asarray(width, dtype=np.float64)
        return np.asarray(self.constant * width**-self.exponent * np.exp(-self.rate * width))

    @property
    def share_slope(self) -> float:
        """Slope of the log-odds in log width where three or more shares lie on a line, else nan."""
        x, y = np.log(self.widths), logit(np.array(self.shares))
        slope = (y[-1] - y[0]) / (x[-1] - x[0])
        return float(slope) if np.allclose(y, y[0] + slope * (x - x[0])) else float("nan")

    def with_slope(self, share: float, slope: float) -> "Truth":
        """The same with logistic shares: `share` at the middle (in log) of the widths."""
        x = np.log(self.widths)
        eta = logit(share) + slope * (x - x.mean())
        return replace(self, shares=tuple(1.0 / (1.0 + np.exp(-eta))))


@dataclass(frozen=True)
class Sweep:
    """One row a head, as `fit_width_law` takes them, and `hidden`: the time of every head, inf of those that never."""

    width: Array
    time: Array
    status: NDArray[np.str_]
    cluster: NDArray[np.intp]
    hidden: Array

    @property
    def rows(self) -> tuple[Array, Array, NDArray[np.str_], NDArray[np.intp]]:
        return self.width, self.time, self.status, self.cluster


def luck(truth: Truth, rng: Generator) -> Array:
    """Standard normal `[widths, seeds, heads]`, a share `together` of it common to the heads of a cluster."""
    shape = (len(truth.widths), truth.seeds, truth.heads)
    common = rng.standard_normal((1 if truth.shared else shape[0], truth.seeds, 1))
    return np.sqrt(truth.together) * common + np.sqrt(1.0 - truth.together) * rng.standard_normal(shape)


def sweep(truth: Truth, rng: Generator) -> Sweep:
    """Heads of all widths and seeds, seen as far as their runs go."""
    whether, when = luck(truth, rng), luck(truth, rng)
    widths = np.array(truth.widths)[:, None, None]
    emerges = ndtr(whether) < np.array(truth.shares)[:, None, None]
    hidden = truth.median(widths) * np.exp(truth.spread * truth.quantile(ndtr(when)))
    hidden = np.where(emerges, hidden, np.inf)
    time, status = seen(truth, hidden)
    member = np.arange(len(truth.widths))[:, None, None] * (0 if truth.shared else truth.seeds)
    cluster = np.broadcast_to(member + np.arange(truth.seeds)[:, None], hidden.shape)
    every = np.broadcast_to(widths, hidden.shape)
    return Sweep(every.ravel(), time.ravel(), status.ravel(), cluster.ravel(), hidden.ravel())


def seen(truth: Truth, hidden: Array) -> tuple[Array, NDArray[np.str_]]:
    """What a run up to `end` shows of true times.

    Times are crossings of a fixed level: seen up to the end; of a growing head it is known that its time is later.
    Where they are middles of rises (`cut`), so are they while the run ends within the rise, and their bound is the
    middle, in log t, of the part that was seen.
    """
    onset, settled = hidden / truth.slow, hidden * (truth.slow if truth.cut else 1.0)
    status = np.where(settled <= truth.end, "emerged", np.where(onset < truth.end, "growing", "never"))
    status = np.where(hidden <= truth.first, "at_start", status)
    bound = np.sqrt(np.where(np.isfinite(onset), onset, 1.0) * truth.end) if truth.cut else truth.end
    time = np.where(status == "emerged", hidden, np.where(status == "growing", bound, truth.end))
    return np.where(status == "at_start", truth.first, time), status


def master(z: Array) -> Array:
    """A score that rises from 0.1 to 0.6 over about a decade of scaled time exp(z)."""
    return np.asarray(0.1 + 0.5 * np.exp(-np.exp(-1.2 * z)))


def curves(
    exponent: float, widths: Array, seeds: int, rng: Generator, *, power: float = 0.0, bend: float = 0.0
) -> tuple[Array, list[Array]]:
    """Steps `[T]` and, by width, scores `[seeds, T]`: width^-power master(log(t width^exponent) - luck) + jitter.

    `bend` makes the rise of wider networks steeper, so that no exponent lets the curves collapse.
    """
    step = np.unique(np.round(np.geomspace(1.0, 4000.0, 73)))
    scores = []
    for width in widths:
        z = np.log(step) + exponent * np.log(width / widths[0]) - np.log(300.0)
        z = (z - 0.25 * rng.standard_normal((seeds, 1))) * (width / widths[0]) ** bend
        clean = master(z) * np.exp(0.08 * rng.standard_normal((seeds, 1)))
        scores.append((width / widths[0]) ** -power * clean + 0.01 * rng.standard_normal(clean.shape))
    return step, scores
