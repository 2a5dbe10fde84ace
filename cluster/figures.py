"""Figures of the report, from plain tables: lines labelled where they end, colours that survive colour blindness.

Only matplotlib's object-oriented interface on the Agg canvas is used, so nothing global is touched and nothing leaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from cluster.analysis import DenseCurve, dense, smooth
from probes.attention import lift
from probes.emergence import LEVEL_LIFT, STEP_ZERO
from sim.system import Floors

Array = NDArray[np.float64]
HeadKey = tuple[int, int]
"""(layer, head)"""

DPI = 110
WIDTH = 10.0  # inches, of every figure that fills the page
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#A6761D", "#5B3794")
GREY, PALE, INK = "#9AA0A6", "#E4E6E9", "#2B2F33"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STATUS_COLOURS = {
    "emerged": "#0072B2",
    "growing": "#8CC4E8",
    "transient": "#E69F00",
    "at_start": "#5B3794",
    "never": "#D5D8DC",
    "with a detector": "#0072B2",
    "without": "#D5D8DC",
}
NAMED = 6  # heads drawn in colour where all layers share a panel
MOST_MARKS = 400  # members drawn one by one at one point


@dataclass(frozen=True, kw_only=True, slots=True)
class Portrait:
    """One member that stands for its point along the axes. heads: its rows of the head table, every relation."""

    label: str
    seed: int
    relation: str
    curves: pd.DataFrame
    heads: pd.DataFrame

    @property
    def judged(self) -> pd.DataFrame:
        """Rows of the relation that the sweep is judged by, strongest head first."""
        rows = self.heads[self.heads["relation"] == self.relation]
        return rows.sort_values("lift_peak", ascending=False)

    def curve(self, probe: str) -> DenseCurve | None:
        """A probe's curves; None where it was not measured."""
        return dense(self.curves, probe) if (self.curves["probe"] == probe).any() else None


class Run(NamedTuple):
    """Losses of one member; `rank` orders the points along the axes from 0 to 1 and sets the colour."""

    label: str
    rank: float
    figures: pd.DataFrame


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """Times at one point along the axes. series: the axes other than width, in words.

    counts: members or heads by outcome; times: of members that have one, `bounds`: those that are lower bounds only;
    none: members without a time; mean, low, high: geometric mean and its interval over members.
    """

    width: float
    series: str
    counts: Mapping[str, int]
    times: Array
    bounds: NDArray[np.bool_]
    none: int
    mean: float
    low: float
    high: float


def new_figure(rows: int, columns: int, height: float, **grid: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure of the page's width (two thirds of it for a single panel) with panels `[rows, columns]`."""
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.68, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    return figure, axes


def save(figure: Figure, path: Path) -> int:
    """Write a PNG and let the figure go; returns its number of panels."""
    panels = sum(ax.get_visible() for ax in figure.axes)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    figure.clear()
    return panels


def plain(text: object) -> str:
    """Text in which a dollar sign is a dollar sign."""
    return str(text).replace("$", r"\$")


def on_axis(steps: Iterable[float]) -> Array:
    """Steps on a logarithmic axis: step 0 stands at 0.5, as in `probes.emergence`."""
    return np.maximum(np.asarray(list(steps), dtype=float), STEP_ZERO)


def count_text(value: float, _: int = 0) -> str:
    """A step as a tick label."""
    return "0" if value == STEP_ZERO else f"{value:,.0f}"


def step_axis(ax: Axes, last: float) -> None:
    """Training steps, logarithmic, from step 0 to the last."""
    decades = [10.0**power for power in range(math.floor(math.log10(max(last, 1))) + 1)]
    ax.set_xscale("log")
    ax.set_xlim(STEP_ZERO * 0.9, max(last, 2) * 1.06)
    ax.xaxis.set_major_locator(FixedLocator([STEP_ZERO, *decades]))
    ax.xaxis.set_major_formatter(FuncFormatter(count_text))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("training step (log scale)", fontsize=9.5)


def spread(values: Sequence[float], gap: float) -> Array:
    """The values moved as little as possible (least squares) such that sorted neighbours are `gap` apart."""
    order = np.argsort(values, kind="stable")
    blocks: list[list[float]] = []  # [sum, count] of values less their offsets, merged until they increase
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in blocks]) if blocks else np.zeros(0)
    placed = np.empty(len(values))
    placed[order] = level + gap * np.arange(len(values))
    return placed


class End(NamedTuple):
    """A label for the end of a line."""

    y: float
    text: str
    colour: str
    bold: bool = False


def label_ends(ax: Axes, ends: Sequence[End], size: float = 8.5) -> None:
    """Names to the right of the panel at the height where each line ends, moved apart; limits must be set before."""
    if not ends:
        return
    to_panel = ax.transData + ax.transAxes.inverted()
    x_end = ax.get_xlim()[1]
    heights = [float(np.clip(to_panel.transform((x_end, end.y))[1], 0, 1)) for end in ends]
    figure = ax.figure
    inches = figure.get_figheight() * 0.72 / ax.get_gridspec().nrows if ax.get_gridspec() else 2.5
    for end, at, height in zip(ends, spread(heights, size * 1.28 / 72 / inches), heights, strict=True):
        style = {"arrowstyle": "-", "color": end.colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(
            plain(end.text), (1.0, height), (1.035, at), "axes fraction", "axes fraction",
            arrowprops=style, color=end.colour, fontsize=size, va="center", fontweight="bold" if end.bold else "normal",
        )  # fmt: skip


def head_colours(rows: pd.DataFrame) -> dict[HeadKey, str]:
    """A colour by (layer, head) from judged rows, strongest first: heads of a layer differ, all but 7 are grey."""
    colours: dict[HeadKey, str] = {}
    for layer, group in rows.groupby("layer"):
        kept = sorted(int(head) for head in group["head"].iloc[: len(COLOURS)])
        colours |= {(int(layer), head): COLOURS[rank] for rank, head in enumerate(kept)}
    return colours


def ratio_band(score: NDArray[np.float32], null: NDArray[np.float32]) -> tuple[Array, Array]:
    """Lift `[...]` from scores `[..., R]`, and two standard errors of it over replicates (of a ratio of means)."""
    ratio = lift(score, null)
    defined = np.isfinite(score) & np.isfinite(null)
    count = defined.sum(-1)
    residual = np.where(defined, score - ratio[..., None] * null, 0.0)
    mean_null = np.where(defined, null, 0.0).sum(-1) / np.maximum(count, 1)
    error = np.sqrt((residual**2).sum(-1) / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return ratio, 2 * error / np.where(mean_null > 0, mean_null, np.nan)


def mean_band(values: NDArray[np.float32]) -> tuple[Array, Array]:
    """Mean over defined replicates `[..., R]` and two standard errors; NaN where none is defined."""
    defined = np.isfinite(values)
    count = defined.sum(-1)
    mean = np.where(defined, values, 0.0).sum(-1) / np.where(count > 0, count, np.nan)
    squares = np.where(defined, values - mean[..., None], 0.0) ** 2
    return mean, 2 * np.sqrt(squares.sum(-1) / np.maximum(count - 1, 1) / np.maximum(count, 1))


def draw_losses(runs: Sequence[Run], floors: Floors) -> Figure:
    """Validation loss (line) and training loss (dots) of members over log step, with the floors that are known."""
    figure, ((ax,),) = new_figure(1, 1, 4.0)
    figure.set_figwidth(WIDTH * 0.86)
    last, named = 1.0, dict[str, str]()
    for run in runs:
        colour = colormaps["viridis"](0.9 * run.rank)
        table = run.figures
        last = max(last, float(table["step"].iloc[-1]))
        for column, style in (("train_loss", {"lw": 0, "marker": ".", "ms": 2.2}), ("validation_loss", {"lw": 1.5})):
            if column in table:
                name = run.label if column == "validation_loss" and run.label not in named else None
                ax.plot(on_axis(table["step"]), table[column], color=colour, alpha=0.85, label=name, **style)
        named[run.label] = run.label
    ax.set_yscale("log")
    known = {"mean target": floors.trivial, "best without attention": floors.without_attention, "optimum": floors.optimum}
    for name, value in known.items():
        if value:
            ax.axhline(value, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
            ax.annotate(
                f"{name}: {value:.3g}", (0.005, value), (0, 3), ("axes fraction", "data"), "offset points",
                fontsize=8.5, color=INK,
            )  # fmt: skip
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("loss (log scale)", fontsize=9.5)
    step_axis(ax, last)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_heads(portrait: Portrait, relations: Sequence[str], layers: Sequence[int]) -> Figure:
    """Lift over log step, one panel a layer, one row of panels a relation: status, level mark, band over replicates."""
    curve = portrait.curve("attention")
    assert curve is not None
    ratio, error = ratio_band(curve.values["score"], curve.values["null_uniform"])
    columns = min(len(layers), 2)
    deep = math.ceil(len(layers) / columns)
    heights = [3.1 if relation == portrait.relation else 2.3 for relation in relations for _ in range(deep)]
    figure, axes = new_figure(len(heights), columns, sum(heights), height_ratios=heights, sharex=True)
    colours = head_colours(portrait.judged)
    for row, relation in enumerate(relations):
        q = curve.relations.index(relation)
        rows = portrait.heads[portrait.heads["relation"] == relation]
        top = max(2.6, 1.06 * float(np.nanmax(ratio[..., q] + np.nan_to_num(error[..., q]))))
        panels = axes[row * deep : (row + 1) * deep].ravel()
        for ax in panels[len(layers) :]:
            ax.set_visible(False)
        for ax, layer in zip(panels, layers, strict=False):
            own = rows[rows["layer"] == layer]
            _lift_panel(ax, curve.steps, ratio[..., q], error[..., q], own, colours, top)
            ax.set_title(plain(f"layer {layer}, relation “{relation}”"), fontsize=10, loc="left", color=INK)
    return figure


def _lift_panel(
    ax: Axes, steps: NDArray[np.int64], ratio: Array, error: Array, rows: pd.DataFrame,
    colours: Mapping[HeadKey, str], top: float,
) -> None:  # fmt: skip
    """Heads of one layer; `rows` of the head table, `ratio` and `error` `[T, L, H]`."""
    x, last = on_axis(steps), float(steps[-1])
    step_axis(ax, last)
    ax.set_ylim(0, top)
    ax.set_ylabel("lift (1 = uniform attention)", fontsize=9.5)
    ax.axhline(1, color=GREY, lw=0.9, zorder=0)
    ax.axhline(LEVEL_LIFT, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
    ends = []
    for row in rows.to_dict("records"):
        key = (int(row["layer"]), int(row["head"]))
        colour, line = colours.get(key, GREY), smooth(ratio[:, key[0], key[1]])
        band = error[:, key[0], key[1]]
        ax.fill_between(x, line - band, line + band, color=colour, alpha=0.16, lw=0)
        ax.plot(x, line, color=colour, lw=1.9 if row["detector"] else 1.2, alpha=1.0 if key in colours else 0.6)
        _level_mark(ax, row, colour, last)
        if key in colours:
            text = f"head {key[1]}: {str(row['status']).replace('_', ' ')}"
            ends.append(End(line[-1], text, colour, bool(row["detector"])))
    if len(rows) > len(ends):
        ends.append(End(1.0, f"{len(rows) - len(ends)} others", GREY))
    label_ends(ax, ends)


def _level_mark(ax: Axes, row: Mapping[Any, Any], colour: str, last: float) -> None:
    """A ring where the head reaches lift 2, with its interval; an arrow where that has no upper end."""
    if not np.isfinite(row["level"]):
        return
    low, high = float(row["level_low"]), float(row["level_high"])
    if np.isfinite(low) and not np.isnan(high):
        ax.hlines(LEVEL_LIFT, low, min(high, last), color=colour, lw=4, alpha=0.45, zorder=3)
        if np.isinf(high):
            ax.plot(last, LEVEL_LIFT, marker=">", color=colour, ms=5, clip_on=False, zorder=4)
    ax.plot(max(row["level"], STEP_ZERO), LEVEL_LIFT, marker="o", ms=6, mfc="white", mec=colour, mew=1.6, zorder=5)


def draw_distance(portraits: Sequence[Portrait], contact: float | None) -> Figure:
    """Attention by distance g(r): all heads at the start in grey, at the end in colour; one panel a portrait."""
    figure, panels = _portrait_panels(portraits, 3.3)
    for ax, portrait in zip(panels, portraits, strict=False):
        curve = portrait.curve("distance")
        if curve is None:
            ax.set_axis_off()
            continue
        order = np.argsort([float(name) for name in curve.relations])
        r = np.array([float(curve.relations[index]) for index in order])
        g, error = mean_band(curve.values["g"][..., order, :])
        corr = mean_band(curve.values["corr"])[0][..., 0] if "corr" in curve.values else np.full(g.shape[:3], np.nan)
        ax.axhline(1, color=GREY, lw=0.9, zorder=0)
        if contact is not None:
            ax.axvline(contact, color=INK, lw=0.9, ls=(0, (1, 2)), zorder=0)
            ax.annotate(
                "contact", (contact, 1.0), (3, -2), ("data", "axes fraction"), "offset points",
                fontsize=8, color=INK, va="top",
            )  # fmt: skip
        ax.plot(r, g[0].reshape(-1, len(r)).T, color=GREY, lw=0.9, alpha=0.7)
        ax.set_xlim(0, r[-1] * 1.05)
        top = float(np.nanmax(g, initial=1.5, where=np.isfinite(g)))
        ax.set_ylim(0, top * 1.08)

        def text(key: HeadKey, corr: Array = corr) -> str:
            return f"head {key[0]}.{key[1]}: corr {corr[0][key]:+.2f} → {corr[-1][key]:+.2f}"

        _all_heads(ax, r, g[-1], error[-1], portrait, text)
        ax.set_xlabel("distance r of query and key (length units of the system)", fontsize=9.5)
        ax.set_ylabel("attention over its mean, g(r)", fontsize=9.5)
    return figure


def draw_worth(portraits: Sequence[Portrait]) -> Figure:
    """What each head's looking is worth over log step, as a share of all that attention saves; a panel a portrait."""
    figure, panels = _portrait_panels(portraits, 3.3)
    for ax, portrait in zip(panels, portraits, strict=False):
        curve = portrait.curve("ablation")
        if curve is None or "pattern" not in curve.values:
            ax.set_axis_off()
            continue
        share, error = mean_band(curve.values["pattern"][:, :, :, curve.relations.index("all")])
        step_axis(ax, float(curve.steps[-1]))
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        ax.set_ylim(-0.05, max(1.3, float(np.nanmax(share, initial=0.0, where=np.isfinite(share))) * 1.5))
        ax.yaxis.set_major_locator(FixedLocator([-0.01, 0, 0.01, 0.1, 1, 10, 100]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        ax.axhline(0, color=GREY, lw=0.9, zorder=0)
        ax.axhline(0.01, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)

        def text(key: HeadKey, share: Array = share) -> str:
            return f"head {key[0]}.{key[1]}: {share[-1][key]:.0%}"

        values, errors = np.moveaxis(share, 0, -1), np.moveaxis(error, 0, -1)
        _all_heads(ax, on_axis(curve.steps), values, errors, portrait, text)
        ax.set_ylabel("worth of looking (symlog scale)", fontsize=9.5)
    return figure


def _portrait_panels(portraits: Sequence[Portrait], height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = min(len(portraits), 2)
    rows = math.ceil(len(portraits) / columns)
    figure, axes = new_figure(rows, columns, height * rows)
    for ax in axes.flat[len(portraits) :]:
        ax.set_visible(False)
    for ax, portrait in zip(axes.flat, portraits, strict=False):
        ax.set_title(plain(f"{portrait.label}, seed {portrait.seed}"), fontsize=10, loc="left", color=INK)
    return figure, list(axes.flat)


def _all_heads(ax: Axes, x: Array, values: Array, errors: Array, portrait: Portrait, text: Any) -> None:
    """Lines `[L, H, X]` of all layers in one panel: the strongest heads coloured, dashed by layer, the rest grey."""
    judged = portrait.judged
    colours, ends = head_colours(judged), []
    detector = {(int(r["layer"]), int(r["head"])): bool(r["detector"]) for r in judged.to_dict("records")}
    named = [key for key in detector if key in colours][:NAMED]
    for layer, head in np.ndindex(values.shape[:2]):
        key, line = (int(layer), int(head)), values[layer, head]
        if key not in named:
            ax.plot(x, line, color=PALE, lw=1.0, zorder=1)
            continue
        colour = colours[key]
        ax.fill_between(x, line - errors[layer, head], line + errors[layer, head], color=colour, alpha=0.16, lw=0)
        ax.plot(x, line, color=colour, lw=1.6, ls=DASHES[key[0] % len(DASHES)], zorder=3)
        finite = line[np.isfinite(line)]
        ends.append(End(finite[-1] if finite.size else ax.get_ylim()[0], text(key), colour, detector[key]))
    label_ends(ax, ends, size=8)


def draw_law(levels: Sequence[Spot], t50s: Sequence[Spot], last: float) -> Figure:
    """Level (left) and t50 (right) against width on log-log axes, each under a strip of what never got there."""
    figure, axes = new_figure(2, 2, 5.4, height_ratios=[1, 3.2], sharex="col")
    names = list(dict.fromkeys(spot.series for spot in levels))
    widths = sorted({spot.width for spot in levels})
    for column, (spots, title, unit) in enumerate(
        ((levels, "level: first step at lift 2, best detector", "members"), (t50s, "t50: half of the rise done", "heads"))
    ):
        strip, ax = axes[:, column]
        _strip(strip, spots, names, f"share of {unit}")
        strip.set_title(title, fontsize=10, loc="left", color=INK, pad=22)
        _times(ax, spots, names, last)
        shown = widths[:: math.ceil(len(widths) / 10)]
        ax.xaxis.set_major_locator(FixedLocator([math.log2(width) for width in shown]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:g}"))
        ax.set_xlim(math.log2(widths[0]) - 0.6, math.log2(widths[-1]) + 0.6)
        ax.set_xlabel("width of the residual stream (log scale)", fontsize=9.5)
        ax.set_ylabel("training step (log scale)", fontsize=9.5)
    if names != [""]:
        axes[1, 1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _place(spot: Spot, names: Sequence[str], widths: Sequence[float]) -> tuple[float, float]:
    """Centre of a spot on the log2 axis, where series stand side by side, and the room that it has."""
    gaps = np.diff(np.log2(sorted(set(widths))))
    room = 0.7 * float(min(gaps, default=1.0)) / max(len(names), 1)
    return math.log2(spot.width) + (names.index(spot.series) - (len(names) - 1) / 2) * room, room


def _strip(ax: Axes, spots: Sequence[Spot], names: Sequence[str], label: str) -> None:
    """Stacked shares by outcome, the counts written in where there is room."""
    widths = [spot.width for spot in spots]
    shown = dict[str, None]()
    for spot in spots:
        (x, room), total, below = _place(spot, names, widths), max(sum(spot.counts.values()), 1), 0.0
        for name, count in spot.counts.items():
            share = count / total
            legend = name.replace("_", " ") if count and name not in shown else None
            ax.bar(x, share, 0.86 * room, below, color=STATUS_COLOURS[name], label=legend)
            if count and share > 0.16 and len(spots) <= 16:
                dark = name in ("emerged", "at_start", "with a detector")
                ax.text(x, below + share / 2, count, ha="center", va="center", fontsize=8, color="w" if dark else INK)
            below += share
            shown |= {name: None} if count else {}
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 1], ["0", "1"])
    ax.set_ylabel(label, fontsize=9)
    ax.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(-0.02, 0.98), columnspacing=1.0,
              handlelength=1.0, borderpad=0.1)  # fmt: skip


def _times(ax: Axes, spots: Sequence[Spot], names: Sequence[str], last: float) -> None:
    """Members as dots, geometric means with intervals, and arrows over the end of training for those without a time."""
    widths = [spot.width for spot in spots]
    finite = [time for spot in spots for time in on_axis(spot.times)]
    ax.set_yscale("log")
    low = min([*finite, *(spot.low for spot in spots if spot.low > 0), last / 10])
    ax.set_ylim(max(low / 1.6, STEP_ZERO * 0.8), last * 1.9)
    ax.axhspan(last, last * 1.9, color=PALE, alpha=0.6, lw=0)
    ax.axhline(last, color=GREY, lw=0.9)
    ax.annotate("not by the end of training", (0.01, last), (0, 3), ("axes fraction", "data"), "offset points",
                fontsize=8, color=INK)  # fmt: skip
    for index, name in enumerate(names):
        own = [spot for spot in spots if spot.series == name]
        colour, centres = COLOURS[index % len(COLOURS)], []
        for spot in own:
            x, room = _place(spot, names, widths)
            centres.append(x)
            _members(ax, spot, x, room, colour, last)
            if spot.low > 0:
                ax.vlines(x, spot.low, spot.high, color=colour, lw=2.4, zorder=3)
        label = plain(name) if name else None
        ax.plot(centres, [spot.mean for spot in own], color=colour, lw=1.0, marker="D", ms=6, zorder=4, label=label)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(count_text))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _members(ax: Axes, spot: Spot, x: float, room: float, colour: str, last: float) -> None:
    """Members of one spot beside its mean; triangles are lower bounds, arrows have no time at all."""
    times, bounds = on_axis(spot.times)[:MOST_MARKS], spot.bounds[:MOST_MARKS]
    across = x + room * (0.22 + 0.24 * (np.arange(len(times)) + 0.5) / max(len(times), 1))
    for which, marker in ((~bounds, "o"), (bounds, "^")):
        ax.plot(across[which], times[which], marker, ms=4.5, mfc="none", mec=colour, mew=1.0, alpha=0.8)
    if spot.none:
        ax.annotate(
            f"{spot.none:,}", (x, last * 1.75), (x, last * 1.15), ha="center", va="bottom", fontsize=8.5,
            color=colour, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3},
        )  # fmt: skip
