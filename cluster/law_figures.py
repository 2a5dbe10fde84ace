"""Figures of what holds across a sweep: survival, laws of width, exponents, tails and collapse."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from cluster.figures import COLOURS, DASHES, GREY, INK, TITLE, Array, count_text, new_figure, plain, step_axis

TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL_LETTERS = 42  # in a line of the title of one of three panels


class Stairs(NamedTuple):
    """A survival curve of one width: the share without the event after each of `times`, and its interval."""

    width: float
    times: Array
    survival: Array
    low: Array
    high: Array


class Estimate(NamedTuple):
    """A number with its interval at one width."""

    width: float
    value: float
    low: float
    high: float


class Line(NamedTuple):
    """One series against width: estimates, and a fitted law as a function of width (None: none is claimed)."""

    name: str
    share: Sequence[Estimate]
    time: Sequence[Estimate]
    matter: Sequence[Estimate]
    fitted_share: Callable[[Array], Array] | None
    fitted_time: Callable[[Array], Array] | None


class Spread(NamedTuple):
    """Exponents of heads at one width, with their intervals; all `[n]`."""

    width: float
    value: Array
    low: Array
    high: Array


class TailPlot(NamedTuple):
    """Complementary distribution of times `[n]`, and fitted ones from the least time of the tail on."""

    title: str
    times: Array
    survival: Array
    xmin: float
    fits: Sequence[tuple[str, Callable[[Array], Array]]]


class Scaled(NamedTuple):
    """Mean curves by width before and after scaling, with standard errors: `(width, time, score, error)`."""

    title: str
    before: Sequence[tuple[float, Array, Array, Array]]
    after: Sequence[tuple[float, Array, Array, Array]]
    words: tuple[str, str]


def width_colour(width: float, widths: Sequence[float]) -> tuple[float, ...]:
    """Dark for narrow, light for wide."""
    low, high = math.log(min(widths)), math.log(max(widths))
    place = (math.log(width) - low) / (high - low) if high > low else 0.0
    colour: tuple[float, ...] = colormaps["viridis"](0.85 * place)
    return colour


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side, two or three a row."""
    columns = min(count, 3 if count > 4 or count == 3 else 2)
    rows = math.ceil(count / columns)
    figure, axes = new_figure(rows, columns, height * rows + 0.4, sharex=True, sharey=True)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def draw_survival(panels: Sequence[tuple[str, Sequence[Stairs], float]], unit: str) -> Figure:
    """The share of members or heads that have not emerged yet against step, one line a width; one panel a series, with
    its name and the last step of its runs."""
    figure, axes = _grid(len(panels), 2.9)
    widths = sorted({stairs.width for _, lines, _ in panels for stairs in lines})
    for ax, (name, lines, last) in zip(axes, panels, strict=True):
        for stairs in lines:
            colour = width_colour(stairs.width, widths)
            x = np.concatenate(([0.5], stairs.times, [last]))
            low, y, high = (
                np.concatenate(([1.0], part, part[-1:])) for part in (stairs.low, stairs.survival, stairs.high)
            )
            ax.step(x, y, where="post", color=colour, lw=1.6, label=f"width {stairs.width:g}")
            ax.fill_between(x, low, high, step="post", color=colour, alpha=0.13, lw=0)
        ax.set_ylim(0, 1.02)
        ax.set_title(textwrap.fill(plain(name), PANEL_LETTERS), fontsize=9, loc="left", color=INK)
        step_axis(ax, max(end for *_, end in panels))
        ax.set_xlabel("")
    for ax in axes[-3:]:
        ax.set_xlabel("training step (log scale)", fontsize=9.5)
    axes[0].set_ylabel(f"share of {unit} without", fontsize=9.5)
    axes[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    return figure


def draw_lines(lines: Sequence[Line], widths: Sequence[float], titles: tuple[str, str, str]) -> Figure:
    """Share that emerges, time to emerge, and heads that matter against width, with the laws that are fitted."""
    figure, ((share, time, matter),) = new_figure(1, 3, 4.6)
    fine = np.geomspace(min(widths), max(widths), 60)
    for rank, line in enumerate(lines):
        colour, shift = COLOURS[rank % len(COLOURS)], 2 ** (0.05 * (rank - (len(lines) - 1) / 2))
        for ax, estimates, fitted in (
            (share, line.share, line.fitted_share), (time, line.time, line.fitted_time), (matter, line.matter, None),
        ):  # fmt: skip
            x, y, low, high = (
                (np.array(part, dtype=float) for part in zip(*estimates, strict=True))
                if estimates
                else (np.zeros((4, 0)))
            )
            ax.vlines(x * shift, low, high, color=colour, lw=1.6, alpha=0.8)
            marker = MARKERS[rank % len(MARKERS)]
            ax.plot(x * shift, y, marker, color=colour, ms=5, label=plain(line.name) if ax is share else None)
            if fitted is not None:
                ax.plot(fine * shift, fitted(fine), color=colour, lw=1.2, ls=DASHES[rank % len(DASHES)])
    for ax, title in zip((share, time, matter), titles, strict=True):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(list(widths)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("width (log scale)", fontsize=9.5)
        ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    share.set_ylim(0, 1.03)
    if any(np.isfinite(each.value) for line in lines for each in line.time):
        time.set_yscale("log")
        time.yaxis.set_major_locator(LogLocator(subs=TICKS))
        time.yaxis.set_major_formatter(FuncFormatter(count_text))
        time.yaxis.set_minor_locator(NullLocator())
    else:
        time.set_yticks([])
        time.annotate("no member has a detector", (0.5, 0.5), xycoords="axes fraction", ha="center", color=INK)
    time.set_ylabel("training step (log scale)", fontsize=9.5)
    matter.set_ylim(0, None)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower left", ncols=2)
    return figure


def draw_exponents(groups: Sequence[Spread], title: str, label: str) -> Figure:
    """Exponents of heads with their intervals, ordered within each width."""
    figure, ((ax,),) = new_figure(1, 1, 3.9)
    widths = [group.width for group in groups]
    start = 0
    ticks = []
    for group in groups:
        order = np.argsort(group.value)
        at = start + np.arange(len(order))
        colour = width_colour(group.width, widths)
        ax.vlines(at, group.low[order], np.minimum(group.high[order], 1e3), color=colour, lw=0.9, alpha=0.6)
        ax.plot(at, group.value[order], ".", color=colour, ms=4.5)
        ax.hlines(np.median(group.value), at[0] - 0.5, at[-1] + 0.5, color=INK, lw=1.4)
        ticks.append((at.mean(), f"width {group.width:g}\n{len(order)} heads"))
        start = int(at[-1]) + 4
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=TICKS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=9)
    ax.set_ylabel(label, fontsize=9.5)
    figure.suptitle(plain(title), **TITLE)
    return figure


def draw_tails(plots: Sequence[TailPlot]) -> Figure:
    """Share of times above t against t, both axes logarithmic, with the fitted tails."""
    figure, axes = _grid(len(plots), 3.4)
    for ax, tail in zip(axes, plots, strict=True):
        ax.step(tail.times, tail.survival, where="post", color=INK, lw=1.3, label="heads")
        fine = np.geomspace(tail.xmin, tail.times[-1], 80)
        at = float(np.interp(tail.xmin, tail.times, tail.survival))
        for rank, (name, survival) in enumerate(tail.fits):
            ax.plot(fine, at * survival(fine), color=COLOURS[rank], lw=1.4, ls=DASHES[rank % 4], label=name)
        ax.axvline(tail.xmin, color=GREY, lw=0.8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(0.7 * float(tail.survival.min()), 1.3)
        ax.set_title(textwrap.fill(plain(tail.title), PANEL_LETTERS), fontsize=9, loc="left", color=INK)
        ax.set_xlabel("time over the width's median", fontsize=9.5)
    axes[0].set_ylabel("share of heads later than this", fontsize=9.5)
    axes[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    return figure


def draw_collapse(plots: Sequence[Scaled]) -> Figure:
    """Mean curves by width against step, and against scaled step."""
    figure, axes = new_figure(len(plots), 2, 3.3 * len(plots) + 0.3, sharey="row")
    widths = sorted({curve[0] for plot in plots for curve in plot.before})
    for row, plot in zip(axes, plots, strict=True):
        for ax, curves, words in zip(row, (plot.before, plot.after), plot.words, strict=True):
            for width, time, score, error in curves:
                colour = width_colour(width, widths)
                ax.plot(time, score, color=colour, lw=1.4, label=f"width {width:g}")
                ax.fill_between(time, score - 2 * error, score + 2 * error, color=colour, alpha=0.15, lw=0)
            ax.set_xscale("log")
            ax.set_title(plain(words), fontsize=9.5, loc="left", color=INK)
        row[0].set_ylabel("lift of the best detector", fontsize=9.5)
        row[0].annotate(plain(plot.title), (0.02, 0.97), xycoords="axes fraction", fontsize=8.5, va="top", color=INK)
    axes[-1, 0].set_xlabel("training step (log scale)", fontsize=9.5)
    axes[-1, 1].set_xlabel("scaled step (log scale)", fontsize=9.5)
    axes[0, 1].legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure
