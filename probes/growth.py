"""By which law a head's score grows before it is half way up: exponential, power law, or towards a finite time.

Over the window from onset to t50, s = base + A f(t) with f one of
  - `exponential`: exp(lambda t), escape from a regular saddle;
  - `power`: t^b;
  - `critical`: (t_c - t)^-a, escape from a degenerate saddle of degree k under gradient flow, a = 1 / (k - 2).
`base` is fitted or given; A and t_c are free at every shape that is looked at. See `probes.laws`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from probes.inference import Compared, Score, compare, gap_decades, settle, shape_interval, weaknesses
from probes.laws import Fit, Law, log_range
from probes.windows import Array, Cut, Index, Noise, Windows, cut_windows

Name = Literal["power", "exponential", "critical", "undecided"]

MIN_DECADES = 1.0  # of raw time in a window, asked of the power law


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The rise of one curve up to t50; times in the unit of `time`.

    `preferred` is found as in `probes.relaxation.Relaxation`: "undecided" where the power law is best but refused.
    `law` is the law that was asked for, else the best one (so it may be a power law that is refused), and `value` is
    its parameter: lambda (per unit of time), b, or a = 1 / (k - 2).
    """

    preferred: Name
    law: Name
    value: float  # nan if refused
    low: float  # profile interval; 0 or inf where the end of the search lies inside
    high: float
    baseline: float
    t_c: float  # of a critical law, else nan
    memory: float  # rho of the law's residuals, between neighbouring probes
    decades: float  # of raw time in the window
    gap_decades: float  # of |s - baseline|, from the last probe down to the first or the noise
    probes: int
    scores: Mapping[str, Score]  # by law; empty where nothing could be fitted
    refusal: str  # empty if the value stands


# Families. tau = t / (first time of the window), from 1 to span


def _rate(v: Array, span: Array) -> Array:
    """lambda (t_end - t_start) from 0.1 to 100."""
    return np.asarray(0.1 * np.exp(v * np.log(1000.0)) / (span - 1.0))


def _ahead(u: Array, span: Array) -> Array:
    """(t_c - t_end) / t_start, from 1e-4 to 10 times the window."""
    return np.asarray(1e-4 * np.exp(u * np.log(1e5)) * (span - 1.0))


_exponent, _critical_exponent = log_range(0.1, 30.0), log_range(0.05, 8.0)


def _exponential(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.asarray(np.exp(_rate(v, span) * (tau - span)))


def _power(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.asarray(np.exp(_exponent(v, span) * np.log(tau / span)))


def _critical(tau: Array, span: Array, u: Array, v: Array) -> Array:
    return np.asarray(np.exp(-_critical_exponent(v, span) * np.log1p((span - tau) / _ahead(u, span))))


FAMILIES = (
    Law(name="power", basis=_power, shape=_exponent, place=None, nodes=(1, 60)),
    Law(name="exponential", basis=_exponential, shape=_rate, place=None, nodes=(1, 60)),
    Law(name="critical", basis=_critical, shape=_critical_exponent, place=_ahead, nodes=(20, 20)),
)


# Public face


def fit_growth(
    time: ArrayLike,
    value: ArrayLike,
    window: ArrayLike | None = None,
    *,
    baseline: float | None = None,
    law: Name | None = None,
    confidence: float = 0.9,
    noise: Noise = "relative",
) -> Growth:
    """The law by which one curve grows over `window` (from onset to t50), with the interval of its parameter.

    Arguments, noise model, interval, refusals and errors as in `probes.relaxation.fit_relaxation`, with s - baseline in
    place of s_inf - s; `baseline` is fitted unless given. `law` asks for that law's parameter, whichever is preferred.
    Searched: lambda (t_end - t_start) from 0.1 to 100, b from 0.1 to 30, a from 0.05 to 8, and t_c - t_end from 1e-4
    to 10 times the length of the window. Only the power law is asked for a decade of raw time.
    """
    values = np.asarray(value, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise ValueError(f"value has shape {values.shape}; allowed: [T] or [R, T]")
    return fit_growths(time, values[None], window, baselines=baseline, law=law, confidence=confidence, noise=noise)[0]


def fit_growths(
    time: ArrayLike,
    values: ArrayLike,
    windows: ArrayLike | None = None,
    *,
    baselines: ArrayLike | None = None,
    law: Name | None = None,
    confidence: float = 0.9,
    noise: Noise = "relative",
) -> list[Growth]:
    """`fit_growth` of many curves over common times: values `[n, T]` or `[n, R, T]`, windows `[n, 2]` or `[2]`.

    `baselines`: a number or `[n]`.
    """
    names = [each.name for each in FAMILIES]
    if law is not None and law not in names:
        raise ValueError(f"law is {law!r}; allowed: None, {', '.join(names)}")
    cut = cut_windows(time, values, windows, confidence, noise, baselines=baselines, decades=0.0)
    found = [_unfitted(cut, i, law) for i in range(len(cut.refusals))]
    for rows, some in cut.chunks():
        compared = compare(some, FAMILIES)
        chosen = [law or cast(Name, name) for name in compared.preferred]
        for i, growth in zip(rows, _growths(some, cut, rows, compared, chosen, confidence), strict=True):
            found[i] = growth
    return found


def _unfitted(cut: Cut, i: int, law: Name | None) -> Growth:
    """What is known of a curve that cannot be fitted."""
    nan = float("nan")
    return Growth(
        preferred="undecided", law=law or "undecided", value=nan, low=nan, high=nan, baseline=float(cut.baselines[i]),
        t_c=nan, memory=nan, gap_decades=nan, decades=cut.decades(i), probes=cut.probes(i), scores={},
        refusal=cut.refusals[i],
    )  # fmt: skip


def _growths(
    windows: Windows, cut: Cut, rows: Index, compared: Compared, chosen: list[Name], confidence: float
) -> list[Growth]:
    """Results of curves that can be fitted; `chosen` is the law of each."""
    span, start, size = windows.span[:, 0], cut.start[rows], len(chosen)
    numbers = {
        name: np.full(size, np.nan) for name in ("value", "low", "high", "baseline", "t_c", "memory", "gap_decades")
    }
    refusals = ["no law is preferred"] * size
    for law in FAMILIES:
        mine = np.flatnonzero([name == law.name for name in chosen])
        if mine.size:
            some = windows.take(mine)
            fit = settle(some, law, compared.fits[law.name].take(mine))
            reasons = _reasons(law, some, fit)
            for i, reason in zip(mine, reasons, strict=True):
                refusals[i] = reason
            for name, column in _numbers(law, some, fit, start[mine], reasons, confidence).items():
                numbers[name][mine] = column
    preferred = _preferred(windows, compared)
    if not windows.free_level:
        numbers["baseline"] = cut.baselines[rows]
    return [
        Growth(
            preferred=preferred[i],
            law=chosen[i],
            decades=float(np.log10(span[i])),
            probes=int(windows.count[i]),
            scores=compared.scores[i],
            refusal=refusals[i],
            **{name: float(column[i]) for name, column in numbers.items()},
        )
        for i in range(size)
    ]


def _preferred(windows: Windows, compared: Compared) -> list[Name]:
    """The law preferred of each curve; none in place of a power law that is refused, whatever was asked for."""
    names = [cast(Name, name) for name in compared.preferred]
    mine = np.flatnonzero([name == "power" for name in names])
    for law in FAMILIES if mine.size else ():
        if law.name == "power":
            some = windows.take(mine)
            reasons = _reasons(law, some, settle(some, law, compared.fits[law.name].take(mine)))
            for i in mine[[bool(reason) for reason in reasons]]:
                names[i] = "undecided"
    return names


def _reasons(law: Law, windows: Windows, fit: Fit) -> list[str]:
    """Why `law` cannot be claimed of each curve."""
    words = ("baseline", "end t_c", {"power": "exponent", "exponential": "rate", "critical": "exponent"}[law.name])
    reasons = weaknesses(windows, law, fit, ends_at_level=False, words=words)
    for i, decades in enumerate(np.log10(windows.span[:, 0])):
        if law.name == "power" and decades < MIN_DECADES - 1e-9 and not reasons[i]:
            reasons[i] = f"{decades:.2f} decades of time in the window, under {MIN_DECADES:g}"
    return reasons


def _numbers(
    law: Law, windows: Windows, fit: Fit, start: Array, reasons: list[str], confidence: float
) -> dict[str, Array]:
    """Fields of the results under one law, `[N]` each."""
    span = windows.span[:, 0]
    middle, low, high = shape_interval(
        windows, law, fit, confidence, np.flatnonzero([not reason for reason in reasons])
    )
    unit = start if law.name == "exponential" else 1.0
    low = np.where(low <= 0.0, 0.0, law.shape(low, span) / unit)
    high = np.where(high >= 1.0, np.inf, law.shape(high, span) / unit)
    gaps, _ = gap_decades(windows, law, fit, ends_at_level=False)
    end = start * (span + law.place(fit.u, span)) if law.place else np.full(span.size, np.nan)
    return {
        "value": law.shape(middle, span) / unit, "low": low, "high": high,
        "baseline": fit.level, "t_c": end, "memory": fit.rho, "gap_decades": gaps,
    }  # fmt: skip
