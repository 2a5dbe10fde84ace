"""Figures of degenerate geometry: learning coefficients under scores, and by phase of emergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cluster.figures import COLOURS, GREY, INK, PALE, Array, new_figure, on_axis, plain, step_axis
from probes.emergence import LEVEL_LIFT

PHASES = ("before", "during", "after")
GROUPS = ("emerged", "never")
COLUMNS = 3
GROUP_COLOURS = dict(zip(GROUPS, (COLOURS[0], GREY), strict=True))


class HeadPlot(NamedTuple):
    """One head: lift `[T]` at steps `[T]`; coefficient, low and high `[3, K]` at K kept steps; span: t10, t90."""

    title: str
    steps: NDArray[np.int64]
    lift: Array
    at: NDArray[np.int64]
    llc: Array
    sound: NDArray[np.bool_]
    span: tuple[float, float]


class PhaseMean(NamedTuple):
    """Mean coefficient of a group of heads in a phase, over members of one width, with its interval."""

    width: float
    group: str
    phase: str
    value: float
    low: float
    high: float
    members: int


def draw_heads(plots: Sequence[HeadPlot]) -> Figure:
    """Lift above, coefficient below, on the same steps; three heads a row."""
    blocks = math.ceil(len(plots) / COLUMNS)
    heights = [1.5, 1.8] * blocks
    figure, axes = new_figure(2 * blocks, COLUMNS, sum(heights) + 0.9 * blocks, height_ratios=heights, sharex=True)
    last = max(float(plot.steps[-1]) for plot in plots)
    for place in range(COLUMNS * blocks):
        row, column = divmod(place, COLUMNS)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        if place >= len(plots):
            above.set_visible(False)
            below.set_visible(False)
            continue
        plot = plots[place]
        for ax in (above, below):
            step_axis(ax, last)
            ax.set_xlabel("")
            if all(map(math.isfinite, plot.span)):
                ax.axvspan(*on_axis(plot.span), color=PALE, lw=0, zorder=0)
        above.plot(on_axis(plot.steps), plot.lift, color=INK, lw=1.4)
        above.axhline(LEVEL_LIFT, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
        above.set_ylim(0, None)
        above.set_title(plain(plot.title.replace("_", " ")), fontsize=9, loc="left", color=INK)
        x, (value, low, high) = on_axis(plot.at), plot.llc
        below.vlines(x, low, high, color=COLOURS[0], lw=1.4, alpha=0.6)
        below.plot(x, value, color=COLOURS[0], lw=0.9, alpha=0.6)
        below.plot(x[plot.sound], value[plot.sound], "o", color=COLOURS[0], ms=4)
        below.plot(x[~plot.sound], value[~plot.sound], "o", mec=COLOURS[0], mfc="white", ms=4)
        below.tick_params(labelbottom=True)
        if column == 0:
            above.set_ylabel("lift", fontsize=9)
            below.set_ylabel("refined coefficient", fontsize=9)
    figure.supxlabel("training step (log scale)", fontsize=9.5)
    return figure


def draw_phases(means: Sequence[PhaseMean], widths: Sequence[float]) -> Figure:
    """One panel a width: the two groups of heads before, during and after emergence."""
    rows = math.ceil(len(widths) / COLUMNS)
    figure, axes = new_figure(rows, min(len(widths), COLUMNS), 3.2 * rows + 0.3)
    for ax in axes.flat[len(widths) :]:
        ax.set_visible(False)
    for ax, width in zip(axes.flat, widths, strict=False):
        for shift, group in zip((-0.08, 0.08), GROUPS, strict=True):
            own = sorted(
                (PHASES.index(each.phase), each) for each in means if (each.width, each.group) == (width, group)
            )
            if not own:
                continue
            x = np.array([place + shift for place, _ in own])
            colour, each = GROUP_COLOURS[group], [one for _, one in own]
            ax.vlines(x, [one.low for one in each], [one.high for one in each], color=colour, lw=1.8)
            ax.plot(x, [one.value for one in each], "o-", color=colour, ms=5, lw=1, label=f"heads that {WORDS[group]}")
            for at, one in zip(x, each, strict=True):
                ax.annotate(
                    f"{one.members}", (at, one.value), (6, 0), textcoords="offset points", fontsize=8, color=INK
                )
        ax.set_xticks(range(len(PHASES)), PHASES)
        ax.set_xlim(-0.5, len(PHASES) - 0.5)
        ax.set_title(f"width {width:g}", fontsize=9.5, loc="left", color=INK)
    axes[0, 0].set_ylabel("mean refined coefficient", fontsize=9.5)
    axes[0, 0].legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


WORDS = {"emerged": "emerged", "never": "never did"}
