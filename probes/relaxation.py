"""By which law a head's score approaches its plateau: power law, exponential, or logistic.

Over the window from t50 to the end of the run, s = s_inf + A f(t) with f one of
  - `power`: (t - t0)^-a;
  - `exponential`: exp(-t / tau);
  - `logistic`: 1 / (1 + exp((t - t_m) / tau));
  - `log_logistic`: 1 / (1 + (t / t_m)^b), whose tail is a power law with exponent b and origin 0; with b = 1 it is the
    power law with a = 1 and t0 = -t_m, and nothing can tell them apart.
Nothing is read off: s_inf, A and t0 (t_m) are free at every shape that is looked at. See `probes.laws`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from probes.inference import Compared, Score, compare, gap_decades, settle, shape_interval, weaknesses
from probes.laws import Law, log_range
from probes.windows import Array, Cut, Noise, Windows, cut_windows

Preferred = Literal["power", "exponential", "logistic", "log_logistic", "undecided"]

MIN_DECADES = 1.0  # of raw time in a window


@dataclass(frozen=True, kw_only=True, slots=True)
class Relaxation:
    """The approach of one curve to its plateau; times in the unit of `time`.

    `preferred` is the law whose AICc is least by 2 or more and whose held-out error (fitted to the first two thirds of
    the window's probes, root mean square over the rest) is at most 1.1 times that of any other law; else "undecided",
    as it also is where that law is the power law and its exponent is refused.
    `exponent` is that of the power law whatever is preferred: read it together with `preferred`.
    """

    preferred: Preferred
    exponent: float  # a; nan if refused
    low: float  # profile interval; 0 or inf where the end of the search (0.05 or 8) lies inside
    high: float
    t0: float  # of the power law; nan, as s_inf and memory, where nothing could be fitted
    s_inf: float
    memory: float  # rho of the power law's residuals, between neighbouring probes
    decades: float  # of raw time in the window
    gap_decades: float  # of |s_inf - s|, from the first probe down to the last or the noise
    probes: int
    scores: Mapping[str, Score]  # by law; empty where nothing could be fitted
    refusal: str  # empty if the exponent stands


# Families. tau = t / (first time of the window), from 1 to span


def _origin(u: Array, span: Array) -> Array:
    """(t_start - t0) / t_start: from 0.02 up to span, where t - t0 grows by less than a factor 2 over the window."""
    return np.asarray(0.02 * np.exp(u * np.log(span / 0.02)))


def _timescale(v: Array, span: Array) -> Array:
    return np.asarray(0.01 * np.exp(v * np.log(3.0 * span / 0.01)))


def _midpoint(u: Array, span: Array) -> Array:
    """t_m of the log-logistic, from 1/20 of the window's start up to its middle in log time."""
    return np.asarray(0.05 * np.exp(u * np.log(np.sqrt(span) / 0.05)))


_exponent = log_range(0.05, 8.0)


def _power(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.asarray(np.exp(-_exponent(v, span) * np.log1p((tau - 1.0) / _origin(u, span))))


def _exponential(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.exp(-(tau - 1.0) / _timescale(v, span))


def _logistic(tau: Array, span: Array, u: Array, v: Array) -> Array:
    """Midpoint (8 u - 3) time constants after the window's start; far before it this is the exponential."""
    return np.asarray(1.0 / (1.0 + np.exp(np.minimum((tau - 1.0) / _timescale(v, span) - (8.0 * u - 3.0), 700.0))))


def _log_logistic(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(_exponent(v, span) * np.log(tau / _midpoint(u, span)))))


POWER = Law(name="power", basis=_power, shape=_exponent, place=_origin, nodes=(20, 20))
APPROACH = (
    POWER,
    Law(name="exponential", basis=_exponential, shape=_timescale, place=None, nodes=(1, 80)),
    Law(name="logistic", basis=_logistic, shape=_timescale, place=_midpoint, nodes=(10, 40)),
    Law(name="log_logistic", basis=_log_logistic, shape=_exponent, place=_midpoint, nodes=(20, 20)),
)


# Public face


def fit_relaxation(
    time: ArrayLike,
    value: ArrayLike,
    window: ArrayLike | None = None,
    *,
    confidence: float = 0.9,
    noise: Noise = "relative",
) -> Relaxation:
    """The law by which one curve approaches its plateau, and the exponent of the power law with its interval.

    `time [T]`: times of the probes, 0 or more; `value`: `[T]`, or `[R, T]` over replicates, whose mean is fitted;
    `window`: (start, end) in time, both included (default: all; t50 and the end of the run in a sweep). Time 0 is
    never part of a window. `noise`: "relative", its standard deviation goes with |s| (smoothed over 5 probes, and at
    least a tenth of its largest), or "constant".

    Searched: (t_start - t0) from 0.02 t_start to t_end, exponents from 0.05 to 8, s_inf and A without bounds. The
    interval is by profile likelihood, t0 and s_inf profiled, noise AR(1) over probes; see `probes.inference.gls` for
    its threshold. Refused, with a reason in `refusal`: values that are not finite, times that do not increase, fewer
    than 16 probes or less than a decade of time in the window, constant values; then t0 or the exponent at the edge of
    the search, s_inf more than ten rises beyond the last probe, |s_inf - s| above the noise for under 0.7 decade.

    Not guaranteed: the noise may be of another size, or not be forgotten within the window. A log-logistic has
    a power-law tail, and where the window shows little else it may be taken for a power law, or a power law for it.

    Raises ValueError, naming argument, value and what is allowed, for wrong shapes, times that are negative or not
    finite, or confidence outside (0, 1).
    """
    values = np.asarray(value, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise ValueError(f"value has shape {values.shape}; allowed: [T] or [R, T]")
    return fit_relaxations(time, values[None], window, confidence=confidence, noise=noise)[0]


def fit_relaxations(
    time: ArrayLike,
    values: ArrayLike,
    windows: ArrayLike | None = None,
    *,
    confidence: float = 0.9,
    noise: Noise = "relative",
) -> list[Relaxation]:
    """`fit_relaxation` of many curves over common times: values `[n, T]` or `[n, R, T]`, windows `[n, 2]` or `[2]`.

    A window that is not finite (of a head that never rose) is a refusal.
    """
    cut = cut_windows(time, values, windows, confidence, noise, decades=MIN_DECADES)
    found = [_unfitted(cut, i) for i in range(len(cut.refusals))]
    for rows, some in cut.chunks():
        results = _relaxations(some, cut.start[rows], compare(some, APPROACH), confidence)
        for i, relaxation in zip(rows, results, strict=True):
            found[i] = relaxation
    return found


def _unfitted(cut: Cut, i: int) -> Relaxation:
    """What is known of a curve that cannot be fitted."""
    nan = float("nan")
    return Relaxation(
        preferred="undecided", exponent=nan, low=nan, high=nan, t0=nan, s_inf=nan, memory=nan, gap_decades=nan,
        decades=cut.decades(i), probes=cut.probes(i), scores={}, refusal=cut.refusals[i],
    )  # fmt: skip


def _relaxations(windows: Windows, start: Array, compared: Compared, confidence: float) -> list[Relaxation]:
    """Results of curves that can be fitted; `start [N]` is where their windows begin."""
    fit, span = settle(windows, POWER, compared.fits["power"]), windows.span[:, 0]
    words = ("asymptote s_inf", "origin t0", "exponent")
    refusals = weaknesses(windows, POWER, fit, ends_at_level=True, words=words)
    gaps, _ = gap_decades(windows, POWER, fit, ends_at_level=True)
    standing = np.flatnonzero([not refusal for refusal in refusals])
    middle, low, high = shape_interval(windows, POWER, fit, confidence, standing)
    low, high = np.where(low <= 0.0, 0.0, _exponent(low, span)), np.where(high >= 1.0, np.inf, _exponent(high, span))
    columns = {
        "exponent": _exponent(middle, span), "low": low, "high": high, "t0": start * (1.0 - _origin(fit.u, span)),
        "s_inf": fit.level, "memory": fit.rho, "decades": np.log10(span), "gap_decades": gaps,
    }  # fmt: skip
    return [
        Relaxation(
            preferred=_preferred(compared.preferred[i], refusals[i]),
            probes=int(windows.count[i]),
            scores=compared.scores[i],
            refusal=refusals[i],
            **{name: float(column[i]) for name, column in columns.items()},
        )
        for i in range(span.size)
    ]


def _preferred(name: str, refusal: str) -> Preferred:
    return "undecided" if name == "power" and refusal else cast(Preferred, name)
