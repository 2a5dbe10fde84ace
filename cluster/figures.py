"""Figures of the report, from plain tables: lines labelled where they end, colours that survive colour blindness.

Only matplotlib's object-oriented interface on the Agg canvas is used, so nothing global is touched and nothing leaks.
"""

from __future__ import annotations

import math
import textwrap
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

from cluster.analysis import DenseCurve, along_steps, dense
from probes.ablation import LEAST_SHARE
from probes.attention import lift
from probes.emergence import LEVEL_LIFT, STEP_ZERO
from sim.system import Floors

Array = NDArray[np.float64]
HeadKey = tuple[int, int]
"""(layer, head)"""

DPI = 110
WIDTH = 10.0  # inches, of every figure that fills the page
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#A6761D", "#5B3794")
TITLE: dict[str, Any] = {"x": 0.005, "ha": "left", "fontsize": 11, "fontweight": "bold", "color": "#2B2F33"}
GREY, PALE, INK = "#9AA0A6", "#E4E6E9", "#2B2F33"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
PANEL_LETTERS = 34  # of a title above one of two panels, left of what is written beside it
NAMED = 6  # heads drawn in colour where all layers share a panel


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
    """Write a PNG, whole or not at all, and let the figure go; returns its number of panels."""
    panels = sum(ax.get_visible() for ax in figure.axes)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=DPI, metadata={"Software": None}, format="png")
    temporary.replace(path)
    figure.clear()
    return panels


def plain(text: object) -> str:
    """Text in which a dollar sign is a dollar sign."""
    return str(text).replace("$", r"\$")


def on_axis(steps: Iterable[float]) -> Array:
    """Steps on a logarithmic axis: step 0 stands at 0.5, as in `probes.emergence`."""
    return np.asarray(np.maximum(np.asarray(list(steps), dtype=float), STEP_ZERO))


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
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("training step (log scale)", fontsize=9.5)


def spread(values: Sequence[float], gap: float) -> Array:
    """Values in 0..1 moved as little as possible (least squares) such that sorted neighbours are `gap` apart.

    They stay in 0..1 as far as there is room.
    """
    order = np.argsort(values, kind="stable")
    blocks: list[list[float]] = []  # [sum, count] of values less their offsets, merged until they increase
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in blocks])
    offset = gap * np.arange(len(values))
    placed = np.empty(len(values))
    placed[order] = np.maximum(np.minimum(level + offset, 1 - offset[::-1]), offset)
    return placed


class End(NamedTuple):
    """A label for the end of a line."""

    y: float
    text: str
    colour: str
    bold: bool = False
    dash: Any = "-"


def label_ends(ax: Axes, ends: Sequence[End], inches: float, head: str = "") -> None:
    """Names beside the panel, `inches` high, at the height where each line ends, moved apart; set limits before."""
    if not ends:
        return
    to_panel = ax.transData + ax.transAxes.inverted()
    heights = [float(np.clip(to_panel.transform((1.0, end.y))[1], 0, 1)) for end in ends]
    for end, at, height in zip(ends, spread(heights, 0.155 / inches), heights, strict=True):
        style = {"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        style |= {"color": end.colour, "lw": 1.1, "ls": end.dash}
        ax.annotate(
            plain(end.text), (1.0, height), (1.05, at), "axes fraction", "axes fraction",
            arrowprops=style, color=end.colour, fontsize=8.5, va="center", fontweight="bold" if end.bold else "normal",
        )  # fmt: skip
    if head:
        ax.annotate(head, (1.05, 1.0), (0, 6), "axes fraction", "offset points", fontsize=8, color=INK)


def head_colours(rows: pd.DataFrame) -> dict[HeadKey, str]:
    """A colour by (layer, head) from judged rows, strongest first: heads of a layer differ, all but 7 are grey."""
    colours: dict[HeadKey, str] = {}
    for layer in sorted(set(rows["layer"].astype(int))):
        kept = sorted(int(head) for head in rows.loc[rows["layer"] == layer, "head"].iloc[: len(COLOURS)])
        colours |= {(layer, head): COLOURS[rank] for rank, head in enumerate(kept)}
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
    figure, ((ax,),) = new_figure(1, 1, 4.2)
    figure.set_figwidth(WIDTH * 0.86)
    named = set[str]()
    for run in runs:
        colour = colormaps["viridis"](0.82 * run.rank)
        x = on_axis(run.figures["step"])
        name = None if run.label in named else plain(run.label)
        ax.plot(x, run.figures["train_loss"], ".", color=colour, ms=2.2, alpha=0.7)
        ax.plot(x, run.figures["validation_loss"], color=colour, lw=1.5, alpha=0.9, label=name)
        named.add(run.label)
    ax.set_yscale("log")
    known = {
        "predicting the mean": floors.trivial,
        "best without attention": floors.without_attention,
        "optimum": floors.optimum,
    }
    for name, value in known.items():
        if value and math.isfinite(value):
            ax.axhline(value, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
            ax.annotate(
                f"{name}: {value:.3g}", (0.995, value), (0, 3), ("axes fraction", "data"), "offset points",
                fontsize=8.5, color=INK, ha="right",
            )  # fmt: skip
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("loss (log scale)", fontsize=9.5)
    step_axis(ax, max(float(run.figures["step"].iloc[-1]) for run in runs))
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_heads(portrait: Portrait, relations: Sequence[str], layers: Sequence[int]) -> Figure:
    """Lift over log step, one panel a layer, one row of panels a relation: status, level mark, band over replicates."""
    curve = portrait.curve("attention")
    assert curve is not None
    ratio, error = ratio_band(curve.values["score"], curve.values["null_uniform"])
    columns = min(len(layers), 2)
    deep = math.ceil(len(layers) / columns)
    heights = [3.1 if relation == portrait.relation else 2.3 for relation in relations for _ in range(deep)]
    figure, axes = new_figure(len(heights), columns, sum(heights) + 0.3, height_ratios=heights, sharex=True)
    figure.suptitle(plain(f"{portrait.label}, seed {portrait.seed}"), **TITLE)
    colours = head_colours(portrait.judged)
    for row, relation in enumerate(relations):
        q = curve.relations.index(relation)
        rows = portrait.heads[portrait.heads["relation"] == relation]
        upper = (ratio + np.nan_to_num(error))[..., q]
        top = 1.06 * float(np.max(upper, initial=2.4, where=np.isfinite(upper)))
        for place, ax in enumerate(axes[row * deep : (row + 1) * deep].flat):
            if place >= len(layers):
                ax.set_visible(False)
                continue
            own = rows[rows["layer"] == layers[place]]
            ax.set_ylim(0, top)
            _lift_panel(ax, curve.steps, ratio[..., q], error[..., q], own, colours, heights[row * deep] - 0.85)
            ax.set_title(plain(f"layer {layers[place]}, relation “{relation}”"), fontsize=10, loc="left", color=INK)
            ax.set_xlabel("" if row + 1 < len(relations) else ax.get_xlabel())
    return figure


def _lift_panel(
    ax: Axes, steps: NDArray[np.int64], ratio: Array, error: Array, rows: pd.DataFrame,
    colours: Mapping[HeadKey, str], inches: float,
) -> None:  # fmt: skip
    """Heads of one layer; `rows` of the head table, `ratio` and `error` `[T, L, H]`."""
    x, last = on_axis(steps), float(steps[-1])
    step_axis(ax, last)
    ax.set_ylabel("lift (1: uniform)", fontsize=9.5)
    ax.axhline(1, color=GREY, lw=0.9, zorder=0)
    ax.axhline(LEVEL_LIFT, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
    ends = []
    for row in rows.to_dict("records"):
        key = (int(row["layer"]), int(row["head"]))
        colour, line = colours.get(key, GREY), along_steps(ratio[:, key[0], key[1]])
        band = error[:, key[0], key[1]]
        ax.fill_between(x, line - band, line + band, color=colour, alpha=0.2, lw=0)
        ax.plot(x, line, color=colour, lw=2.0 if row["detector"] else 1.2, alpha=1.0 if key in colours else 0.5)
        _level_mark(ax, row, colour, last)
        if key in colours:
            text = f"head {key[1]}: {str(row['status']).replace('_', ' ')}"
            ends.append(End(line[-1], text, colour, bool(row["detector"])))
    if len(rows) > len(ends):
        ends.append(End(1.0, f"{len(rows) - len(ends)} others", GREY))
    label_ends(ax, ends, inches)


def _level_mark(ax: Axes, row: Mapping[Any, Any], colour: str, last: float) -> None:
    """A ring where the head reaches lift 2, with its interval; an arrow where that has no upper end."""
    if not np.isfinite(row["level"]):
        return
    low, high = float(row["level_low"]), float(row["level_high"])
    if np.isfinite(low) and not np.isnan(high):
        ax.hlines(LEVEL_LIFT, low, min(high, last), color=colour, lw=5, alpha=0.45, zorder=3)
        if np.isinf(high):
            ax.plot(last, LEVEL_LIFT, marker=">", color=colour, ms=5, clip_on=False, zorder=4)
    ax.plot(max(row["level"], STEP_ZERO), LEVEL_LIFT, marker="o", ms=6, mfc="white", mec=colour, mew=1.6, zorder=5)


def draw_distance(portraits: Sequence[Portrait], contact: float | None) -> Figure:
    """Attention by distance g(r): all heads at the start in grey, at the end in colour; one panel a portrait."""
    figure, panels = portrait_panels(portraits)
    for ax, portrait in zip(panels, portraits, strict=False):
        curve = portrait.curve("distance")
        assert curve is not None
        order = np.argsort([float(name) for name in curve.relations])
        r = np.array([float(curve.relations[index]) for index in order])
        g, error = mean_band(curve.values["g"][..., order, :])
        defined = np.isfinite(g) & (g > 0)
        low, high = (float(choose(g, initial=one, where=defined)) for choose, one in ((np.min, 0.5), (np.max, 2.0)))
        ax.set_yscale("log")
        ax.set_ylim(max(low / 1.3, 0.02), high * 1.3)
        ax.set_xlim(0, r[-1] * 1.03)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.axhline(1, color=INK, lw=0.9, zorder=0)
        if contact is not None:
            ax.axvline(contact, color=INK, lw=0.9, ls=(0, (1, 2)), zorder=0)
            ax.annotate(
                "contact", (contact, 0), (3, 3), ("data", "axes fraction"), "offset points", fontsize=8, color=INK
            )
        ax.plot(r, g[0].reshape(-1, len(r)).T, color=GREY, lw=0.9, alpha=0.7)
        corr = mean_band(curve.values["corr"])[0][..., 0]
        texts = {key: f"{signed(corr[0][key])} → {signed(corr[-1][key])}" for key in np.ndindex(corr.shape[1:])}
        all_heads(ax, r, np.clip(g[-1], 1e-9, None), error[-1], portrait, "head: corr(A, r), start → end", texts)
        ax.set_xlabel("distance r (length units of the system)", fontsize=9.5)
        ax.set_ylabel("attention over its mean, g(r)", fontsize=9.5)
    return figure


def signed(value: float) -> str:
    """A correlation: `+0.10`, `−0.69`, or a dash."""
    return f"{value:+.2f}".replace("-", "−") if np.isfinite(value) else "–"


def draw_worth(portraits: Sequence[Portrait]) -> Figure:
    """What each head's looking is worth over log step, as a share of all that attention saves; a panel a portrait.

    Drawn once attention saves a tenth of what it saves at its best: shares of next to nothing are noise.
    """
    figure, panels = portrait_panels(portraits)
    for ax, portrait in zip(panels, portraits, strict=False):
        curve = portrait.curve("ablation")
        assert curve is not None
        q = curve.relations.index("all")
        share, error = mean_band(curve.values["pattern"][:, :, :, q])
        without, loss = (curve.values[name][:, 0, 0, q].mean(-1) for name in ("loss_without_attention", "loss"))
        share = np.where((without - loss >= 0.1 * (without - loss).max())[:, None, None], share, np.nan)
        step_axis(ax, float(curve.steps[-1]))
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        ax.set_ylim(-0.05, 1.5 * float(np.max(share, initial=1.0, where=np.isfinite(share))))
        ax.yaxis.set_major_locator(FixedLocator([-0.01, 0, 0.01, 0.1, 1, 10, 100]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0%}"))
        ax.axhline(0, color=GREY, lw=0.9, zorder=0)
        ax.axhline(LEAST_SHARE, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
        known = np.isfinite(share)
        texts = {key: f"{share[-1][key]:,.0%}" if known[-1][key] else "–" for key in np.ndindex(share.shape[1:])}
        if not known.any():
            words = "attention saves nothing\nthat a head could have a share of"
            ax.text(0.5, 0.6, words, transform=ax.transAxes, ha="center", fontsize=9, color=INK)
        values, errors = np.moveaxis(share, 0, -1), np.moveaxis(error, 0, -1)
        all_heads(ax, on_axis(curve.steps), values, errors, portrait, "head: worth at the end", texts)
        ax.set_ylabel("worth of looking (symlog scale)", fontsize=9.5)
    return figure


def portrait_panels(portraits: Sequence[Portrait]) -> tuple[Figure, Sequence[Axes]]:
    """A figure with one panel for each of the members, named above it."""
    columns = min(len(portraits), 2)
    rows = math.ceil(len(portraits) / columns)
    figure, axes = new_figure(rows, columns, 3.4 * rows)
    for ax in axes.flat[len(portraits) :]:
        ax.set_visible(False)
    for ax, portrait in zip(axes.flat, portraits, strict=False):
        title = textwrap.fill(f"{portrait.label}, seed {portrait.seed}", PANEL_LETTERS)
        ax.set_title(plain(title), fontsize=10, loc="left", color=INK)
    return figure, list(axes.flat)


def all_heads(
    ax: Axes, x: Array, values: Array, errors: Array, portrait: Portrait, title: str, texts: Mapping[Any, str]
) -> None:
    """Lines `[L, H, X]` of all layers in one panel: the strongest heads coloured, dashed by layer, the rest pale."""
    judged = portrait.judged
    colours, ends = head_colours(judged), []
    detector = {(int(r["layer"]), int(r["head"])): bool(r["detector"]) for r in judged.to_dict("records")}
    named = [key for key in detector if key in colours][:NAMED]
    for layer, head in np.ndindex(values.shape[:2]):
        line, error = values[layer, head], errors[layer, head]
        if (layer, head) not in named:
            ax.plot(x, line, color=PALE, lw=1.0, zorder=1)
            continue
        colour, dash = colours[layer, head], DASHES[layer % len(DASHES)]
        ax.fill_between(x, line - error, line + error, color=colour, alpha=0.18, lw=0)
        finite = line[np.isfinite(line)]
        ax.plot(x, line, color=colour, lw=1.6, ls=dash, marker="." if finite.size == 1 else "", zorder=3)
        if not finite.size:
            continue
        ends.append(End(finite[-1], f"{layer}.{head}: {texts[layer, head]}", colour, detector[layer, head], dash))
    label_ends(ax, ends, 2.5, title)
