"""Times against width, or another axis: the level of every member's best detector and t50, with those that never got
there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from cluster.analysis import RISEN, number
from cluster.figures import COLOURS, GREY, INK, PALE, Array, count_text, new_figure, on_axis, plain
from cluster.findings import Point
from cluster.sweep import Sweep
from probes.emergence import STEP_ZERO

STATUS_COLOURS = {
    "emerged": "#0072B2",
    "growing": "#8CC4E8",
    "transient": "#E69F00",
    "at_start": "#5B3794",
    "never": "#D5D8DC",
    "with a detector": "#0072B2",
    "without": "#D5D8DC",
}
DARK = ("emerged", "at_start", "with a detector")  # colours that white letters stand out from
MOST_MARKS = 400  # members drawn one by one at one point


def values_along(sweep: Sweep, name: str, found: Iterable[Any]) -> list[Any]:
    """The values of an axis that tables have, each once: as the sweep has them in order, then any others."""
    wanted = [number(str(value)) for value in (sweep.widths if name == "width" else sweep.axes[name])]
    if name == "width":
        wanted = sorted(wanted)
    places = {value: number(str(value)) for value in dict.fromkeys(found)}
    return sorted(places, key=lambda value: wanted.index(places[value]) if places[value] in wanted else len(wanted))


@dataclass(frozen=True, kw_only=True, slots=True)
class Along:
    """The axis along a figure. places: x of each of its values; numeric: these are numbers; others: axes that vary
    besides, whose settings are told by colour."""

    name: str
    label: str
    places: Mapping[Any, float]
    numeric: bool
    others: Sequence[str]


def along(sweep: Sweep, points: Sequence[Point]) -> Along:
    """Width, on a log2 axis, if there are several or nothing else varies; else the first axis that varies, its values
    side by side in the sweep's order."""
    found = {name: values_along(sweep, name, (p.values[name] for p in points)) for name in sweep.axis_names}
    varying = [name for name, values in found.items() if len(values) > 1]
    name = varying[0] if varying else "width"
    others = [other for other in varying if other != name]
    if name == "width":
        places = {width: math.log2(width) for width in found[name]}
        return Along(
            name=name, label="width of the residual stream (log scale)", places=places, numeric=True, others=others
        )
    places = {value: float(rank) for rank, value in enumerate(found[name])}
    numeric = not any(isinstance(number(str(value)), str) for value in places)
    return Along(name=name, label=name, places=places, numeric=numeric, others=others)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """Times at one point along the axes. x: its place along the figure; series: the other axes, in words.

    counts: members or heads by outcome; times: of members that have one, `bounds`: those that are lower bounds only;
    none: members without a time; mean, low, high: geometric mean and its interval over members.
    """

    x: float
    series: str
    counts: Mapping[str, int]
    times: Array
    bounds: NDArray[np.bool_]
    none: int
    mean: float
    low: float
    high: float


def level_spots(points: Iterable[Point], axis: Along) -> list[Spot]:
    """Levels of the members' best detectors."""
    return [
        Spot(
            x=axis.places[point.values[axis.name]],
            series=point.at(axis.others),
            counts={"with a detector": len(point.detecting), "without": point.without},
            times=point.detecting["level"].to_numpy(float) if len(point.detecting) else np.zeros(0),
            bounds=np.zeros(len(point.detecting), dtype=bool),
            none=point.without,
            **_mean(point, "level"),
        )
        for point in points
    ]


def t50_spots(points: Iterable[Point], axis: Along) -> list[Spot]:
    """Geometric means of t50 over each member's risen heads; a bound where one of these was still growing."""
    spots = []
    for point in points:
        risen = point.heads[point.heads["status"].isin(RISEN) & point.heads["t50"].gt(0)] if len(point.heads) else None
        groups = [] if risen is None else [group for _, group in risen.groupby("member_id")]
        spots.append(
            Spot(
                x=axis.places[point.values[axis.name]],
                series=point.at(axis.others),
                counts={name: point.count(name) for name in ("emerged", "growing", "transient", "at_start", "never")},
                times=np.array([float(np.exp(np.log(group["t50"]).mean())) for group in groups]),
                bounds=np.array([(group["status"] == "growing").any() for group in groups], dtype=bool),
                none=len(point.finished) - len(groups),
                **_mean(point, "t50"),
            )
        )
    return spots


def _mean(point: Point, name: str) -> dict[str, float]:
    keys = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
    return {key: float(point.figures.get(column, math.nan)) for key, column in keys.items()}


def draw_times(levels: Sequence[Spot], t50s: Sequence[Spot], axis: Along, last: float) -> Figure:
    """Level (left) and t50 (right) along an axis, each under a strip of shares by outcome."""
    figure, axes = new_figure(2, 2, 5.4, height_ratios=[1, 3.6], sharex="col")
    names = list(dict.fromkeys(spot.series for spot in levels))
    ticks = list(axis.places.items())
    titles = ("level: first step at lift 2, best detector", "t50: half of the rise done, mean of risen heads")
    for column, (spots, title, unit) in enumerate(zip((levels, t50s), titles, ("members", "heads"), strict=True)):
        strip, ax = axes[:, column]
        _strip(strip, spots, names, unit)
        strip.set_title(title, fontsize=10, loc="left", color=INK, pad=22)
        without = ("members without a detector", "members without a risen head")[column]
        _times(ax, spots, names, last, "-" if axis.numeric else "", without)
        shown = ticks[:: math.ceil(len(ticks) / 10)]
        ax.set_xticks([x for _, x in shown], [plain(value) for value, _ in shown])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(ticks[0][1] - 0.6, ticks[-1][1] + 0.6)
        ax.set_xlabel(plain(axis.label), fontsize=9.5)
        ax.set_ylabel("training step (log scale)", fontsize=9.5)
    if names != [""]:
        handles = axes[1, 0].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, fontsize=8.5, loc="outside lower left", ncols=2)
        figure.set_figheight(5.4 + 0.22 * math.ceil(len(names) / 2))
    return figure


def _place(spot: Spot, names: Sequence[str], xs: Sequence[float]) -> tuple[float, float]:
    """Centre of a spot on the axis, where series stand side by side, and the room that it has."""
    gaps = np.diff(sorted(set(xs)))
    room = 0.6 * float(min(gaps, default=1.0)) / max(len(names), 1)
    return spot.x + (names.index(spot.series) - (len(names) - 1) / 2) * room, room


def _strip(ax: Axes, spots: Sequence[Spot], names: Sequence[str], label: str) -> None:
    """Stacked shares by outcome, the counts written in where there is room."""
    xs = [spot.x for spot in spots]
    for spot in spots:
        (x, room), total, below = _place(spot, names, xs), max(sum(spot.counts.values()), 1), 0.0
        for name, count in spot.counts.items():
            share = count / total
            ax.bar(x, share, 0.86 * room, below, color=STATUS_COLOURS[name])
            if share > 0.17 and len(spots) <= 16:
                colour = "w" if name in DARK else INK
                ax.text(x, below + share / 2, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
            below += share
    present = [name for name in STATUS_COLOURS if any(spot.counts.get(name) for spot in spots)]
    patches = [Patch(color=STATUS_COLOURS[name], label=name.replace("_", " ")) for name in present]
    ax.legend(
        handles=patches, frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(-0.02, 0.98),
        columnspacing=1.0, handlelength=1.0, borderpad=0.1,
    )  # fmt: skip
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 1], ["0", "100%"])
    ax.set_ylabel(label, fontsize=9)


def _times(ax: Axes, spots: Sequence[Spot], names: Sequence[str], last: float, line: str, without: str) -> None:
    """Members as open marks, geometric means with intervals, and arrows past the end for those without a time."""
    xs = [spot.x for spot in spots]
    least = min([last / 10, *(time for spot in spots for time in (*on_axis(spot.times), spot.low) if time > 0)])
    ax.set_yscale("log")
    lost = any(spot.none for spot in spots)
    top = last * (2.4 if lost else 1.35)
    ax.set_ylim(max(least / 1.6, STEP_ZERO * 0.8), top)
    ax.axhspan(last, top, color=PALE, alpha=0.6, lw=0)
    ax.axhline(last, color=GREY, lw=0.9)
    words = f"{without} by the end of training" if lost else "end of training"
    ax.annotate(words, (0.01, 1.0), (0, -3), "axes fraction", "offset points", fontsize=8, color=INK, va="top")
    for index, name in enumerate(names):
        own = sorted((spot for spot in spots if spot.series == name), key=lambda spot: spot.x)
        colour, centres = COLOURS[index % len(COLOURS)], []
        for spot in own:
            x, room = _place(spot, names, xs)
            centres.append(x)
            _members(ax, spot, x, room, colour, last)
            if spot.low > 0:
                ax.vlines(x, spot.low, spot.high, color=colour, lw=2.4, zorder=3)
        label = plain(name) if name else None
        means = [spot.mean for spot in own]
        ax.plot(centres, means, color=colour, lw=1.0, ls=line, marker="D", ms=6, zorder=4, label=label)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(count_text))
    ax.yaxis.set_minor_locator(NullLocator())


def _members(ax: Axes, spot: Spot, x: float, room: float, colour: str, last: float) -> None:
    """Members of one spot beside its mean; triangles are lower bounds, the arrow counts those without a time."""
    times, bounds = on_axis(spot.times)[:MOST_MARKS], spot.bounds[:MOST_MARKS]
    across = x + room * (0.2 + 0.05 * (np.arange(len(times)) % 5) * (len(times) > 8))
    for which, marker in ((~bounds, "o"), (bounds, "^")):
        ax.plot(across[which], times[which], marker, ms=4.5, mfc="none", mec=colour, mew=1.0, alpha=0.8)
    if spot.none:
        ax.annotate(
            f"{spot.none:,}", (x, last * 1.62), (x, last * 1.03), ha="center", va="bottom", fontsize=8.5,
            color=colour, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3},
        )  # fmt: skip
