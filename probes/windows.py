"""Curves over their windows: what the fits of `probes.relaxation` and `probes.growth` work on, and what they refuse.

Shapes: N curves, n probes; windows are left-aligned and padded on the right. tau = t / (first time of the window),
span = (last time) / (first time).
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.words import counted

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]

Noise = Literal["relative", "constant"]

MIN_PROBES = 16  # of a window
SMALLEST = 0.1  # share of its largest value below which a curve's noise does not fall with it
_PROBEWISE = ("tau", "value", "weight", "mask")
CHUNK = 256  # curves worked on together, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class Windows:
    """Curves over their windows, each `[N, n]`, and span `[N, 1]`; `free_level` is whether a level is fitted."""

    tau: Array
    value: Array
    weight: Array  # 1 / (standard deviation of the noise), but for a factor of each curve's own
    mask: Mask
    span: Array
    free_level: bool = True

    @property
    def count(self) -> Array:
        """Probes of each window, `[N]`."""
        return np.asarray(self.mask.sum(axis=1), dtype=np.float64)

    @property
    def scale(self) -> Array:
        """Range of each curve, `[N]`."""
        high = np.where(self.mask, self.value, -np.inf).max(axis=1)
        return np.asarray(high - np.where(self.mask, self.value, np.inf).min(axis=1))

    def take(self, index: Index) -> "Windows":
        """Some of the curves."""
        return replace(self, **{name: getattr(self, name)[index] for name in (*_PROBEWISE, "span")})

    def trimmed(self) -> "Windows":
        """Without the padding that no curve needs."""
        width = int(self.mask.sum(axis=1).max())
        return replace(self, **{name: getattr(self, name)[:, :width] for name in _PROBEWISE})

    def head(self, share: float) -> "Windows":
        """The first probes of every window only; tau and span, and so the box, are those of the whole."""
        kept = np.round(share * self.count)
        return replace(self, mask=self.mask & (np.arange(self.mask.shape[1]) < kept[:, None]))


@dataclass(frozen=True, slots=True)
class Cut:
    """Windows of all curves, left-aligned; a refusal is empty for a curve that can be fitted."""

    windows: Windows  # tau, value, mask and span of every curve, fit or not
    start: Array  # first time of each window
    baselines: Array  # given ones; nan where fitted
    refusals: list[str]
    order: Index  # the curves that can be fitted, those of equal windows together

    def decades(self, i: int) -> float:
        """Decades of raw time in window i; nan where it holds no two times."""
        return float(np.log10(self.windows.span[i, 0])) if self.probes(i) > 1 else float("nan")

    def probes(self, i: int) -> int:
        """Probes in window i."""
        return int(self.windows.mask[i].sum())

    def chunks(self) -> list[tuple[Index, Windows]]:
        """Indices and windows of up to CHUNK curves at a time, over as many probes as they need."""
        pieces = [self.order[i : i + CHUNK] for i in range(0, self.order.size, CHUNK)]
        return [(rows, self.windows.take(rows).trimmed()) for rows in pieces]


def cut_windows(
    time: ArrayLike,
    values: ArrayLike,
    windows: ArrayLike | None,
    confidence: float,
    noise: Noise,
    *,
    baselines: ArrayLike | None = None,
    decades: float,
) -> Cut:
    """Mean curves over their windows, and why some of them cannot be fitted; or a ValueError."""
    times, curves, bounds = _validated(time, values, windows)
    _check_options(confidence, noise)
    base = np.full(len(curves), np.nan) if baselines is None else np.asarray(baselines, dtype=np.float64)
    if baselines is not None and (base.shape not in {(), (len(curves),)} or not np.isfinite(base).all()):
        raise ValueError(f"baseline is {baselines!r}; allowed: a finite number, or one for each curve")
    base = np.broadcast_to(base, (len(curves),))
    inside = (times >= bounds[:, :1]) & (times <= bounds[:, 1:]) & (times > 0.0)
    count, first = inside.sum(axis=1), inside.argmax(axis=1)
    mask = np.arange(times.size) < count[:, None]
    index = np.minimum(first[:, None] + np.arange(times.size), times.size - 1)
    start = np.where(times[first] > 0.0, times[first], 1.0)
    tau = np.where(mask, times[index] / start[:, None], 1.0)
    value = np.where(mask, np.take_along_axis(curves, index, axis=1), 0.0)
    weight = _weights(value, mask) if noise == "relative" else np.ones(value.shape)
    if baselines is not None:
        value = np.where(mask, value - base[:, None], 0.0)
    cut = Windows(tau, value, weight, mask, tau.max(axis=1, keepdims=True), baselines is None)
    increasing = bool((np.diff(times) > 0.0).all())
    refusals = [_unfit(cut, i, increasing, bounds[i], decades) for i in range(len(curves))]
    fit = np.flatnonzero([not refusal for refusal in refusals])
    return Cut(cut, start, base, refusals, fit[np.lexsort((count[fit], first[fit]))])


def _weights(value: Array, mask: Mask) -> Array:
    """(largest |s|) / |s|, s smoothed over 5 probes and taken to be at least a tenth of its largest."""
    sums = np.pad(np.where(mask & np.isfinite(value), value, 0.0).cumsum(axis=1), ((0, 0), (3, 2)), mode="edge")
    sums[:, :3] = 0.0
    counts = np.pad(mask.cumsum(axis=1), ((0, 0), (3, 2)), mode="edge")
    counts[:, :3] = 0
    size = np.abs(sums[:, 5:] - sums[:, :-5]) / np.maximum(counts[:, 5:] - counts[:, :-5], 1)
    largest = np.where(mask, size, 0.0).max(axis=1, keepdims=True)
    largest = np.where(largest > 0.0, largest, 1.0)
    return np.where(mask, largest / np.maximum(size, SMALLEST * largest), 1.0)


def _validated(time: ArrayLike, values: ArrayLike, windows: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Times `[T]`, mean curves `[n, T]` and windows `[n, 2]`, or a ValueError."""
    times, curves = np.asarray(time, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"time has shape {times.shape}; allowed: [T] with T >= 1")
    if not np.isfinite(times).all() or times.min() < 0.0:
        bad = times[~(np.isfinite(times) & (times >= 0.0))][0]
        raise ValueError(f"time contains {bad:g}; allowed: finite numbers, 0 or more")
    if curves.ndim not in (2, 3) or curves.shape[-1] != times.size or (curves.ndim == 3 and curves.shape[1] == 0):
        raise ValueError(f"values has shape {curves.shape}; allowed: [n, {times.size}] or [n, R, {times.size}]")
    with np.errstate(invalid="ignore"):  # inf - inf: refused later
        curves = curves.mean(axis=1) if curves.ndim == 3 else curves
    bounds = np.asarray((times.min(), times.max()) if windows is None else windows, dtype=np.float64)
    if bounds.shape not in {(2,), (len(curves), 2)}:
        raise ValueError(f"windows has shape {bounds.shape}; allowed: (2,) or ({len(curves)}, 2)")
    return times, curves, np.broadcast_to(bounds, (len(curves), 2))


def _check_options(confidence: float, noise: str) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; allowed: a number between 0 and 1, both excluded")
    if noise not in get_args(Noise):
        raise ValueError(f"noise is {noise!r}; allowed: {', '.join(get_args(Noise))}")


def _unfit(cut: Windows, i: int, increasing: bool, bounds: Array, decades: float) -> str:
    """Why curve i cannot be fitted; empty if it can."""
    count, values, span = int(cut.mask[i].sum()), cut.value[i][cut.mask[i]], float(np.log10(cut.span[i, 0]))
    if not increasing:
        return "times do not increase strictly"
    if not np.isfinite(bounds).all():
        return f"window is ({bounds[0]:g}, {bounds[1]:g}), not finite"
    if count < MIN_PROBES:
        return f"{counted(count, 'probe')} in the window, under {MIN_PROBES}"
    if not np.isfinite(values).all():
        return "values in the window are not finite"
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return "values in the window are constant"
    if span < decades - 1e-9:
        return f"{span:.2f} decades of time in the window, under {decades:g}"
    return ""
