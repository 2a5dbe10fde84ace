"""`headway compare A B`: the comparison in the terminal, as a page, a figure and a table."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.analysis import load_analysis
from cluster.arguments import StoreOptions, named, open_named
from cluster.compare import QUANTITIES, Row, Side, cell, compare, design, differences, take_side, to_frame
from cluster.driver import Desk, Settings, comparison_hint
from cluster.figures import COLOURS, INK, count_text, new_figure, plain
from cluster.findings import plural
from cluster.intervals import CONFIDENCE
from cluster.page import take_picture, template
from cluster.report import swap
from cluster.tracking import Place
from sim.checks import require

COMPARE_HELP = f"""Two sweeps side by side, or two points, named SWEEP@AXIS=VALUE,AXIS=VALUE. For example

  headway compare quick quick-mup
  headway compare width@width=64,train.learning_rate=0.001 width@width=64,train.learning_rate=0.004

Points are compared where both have them. Intervals are {CONFIDENCE:.0%} over members; p by exchanging members between
A and B, within each seed that both have where seeds share their data order; what is called shown stays so at a
false discovery rate of {1 - CONFIDENCE:.0%} over all rows.
"""
FILES = ("compare.html", "compare.png", "compare.parquet")
MOST = 24  # rows shown in the terminal


def compare_command(arguments: Sequence[str], console: Console) -> int:
    """`headway compare`."""
    names, options = named(
        arguments, StoreOptions(), "headway compare", COMPARE_HELP, ("A", "B"), "two sweeps or points"
    )
    settings = Settings(tracking_uri=options.tracking_uri, out=options.out)
    desk, a = open_side("A", names[0], settings)
    _, b = open_side("B", names[1], settings)
    rows, differs = compare(a, b), differences(a, b)
    page = write_page(desk.out / "compare" / f"{slug(names[0])}_{slug(names[1])}", a, b, rows, differs)
    show(console, a, b, rows, differs)
    console.print(f"page:    {page}", soft_wrap=True)
    return 0


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name)[:60]


def open_side(label: str, name: str, settings: Settings) -> tuple[Desk, Side]:
    """What is named `SWEEP` or `SWEEP@AXIS=VALUE,...`. ValueError where there is no such thing."""
    sweep_name, _, chosen = name.partition("@")
    desk, parent, sweep = open_named(sweep_name, settings)
    analysis = load_analysis(desk.client, parent.info.run_id)
    place = Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    return desk, take_side(label, sweep, analysis, chosen, comparison_hint(desk, place))


def cells(row: Row) -> list[str]:
    """A row of the table."""
    members = f"{row.n_a}, {row.n_b}" + (f"; {row.pairs} in pairs" if row.pairs else "")
    sign = "x " if row.scale == "log" and math.isfinite(row.gap[0]) else ""
    return [
        row.point, row.quantity, members, cell(row.a, row.scale), cell(row.b, row.scale),
        sign + cell(row.gap, row.scale, ratio=True), row.words,
    ]  # fmt: skip


COLUMNS = ("at", "quantity", "members", "A", "B", "B - A, or B / A (x)", "difference")


def verdict(rows: Sequence[Row]) -> list[str]:
    """By quantity, where a difference is shown, in words."""
    lines = []
    for quantity in dict.fromkeys(row.quantity for row in rows):
        own = [row for row in rows if row.quantity == quantity]
        tested = [row for row in own if not row.reason]
        shown = [row for row in tested if row.shown]
        if not tested:
            lines.append(f"{quantity}: not tested ({own[0].reason}).")
        elif not shown:
            where = "" if len(own) == 1 else f" at any of {plural(len(tested), 'point')}"
            lines.append(f"{quantity}: no difference is shown{where}.")
        else:
            ways = Counter(_direction(row) for row in shown)
            if len(own) == 1:
                told = f"B is {next(iter(ways))}"
            else:
                some = " and ".join(f"{way} at {count}" for way, count in ways.items())
                told = f"B is {some} of {plural(len(tested), 'point')}"
            lines.append(f"{quantity}: {told}; shown.")
    return lines


def _direction(row: Row) -> str:
    middle = 1.0 if row.scale == "log" else 0.0
    if math.isnan(row.gap[0]):
        return "different"
    return "higher" if row.gap[0] > middle else "lower"


def show(console: Console, a: Side, b: Side, rows: Sequence[Row], differs: Sequence[tuple[str, str, str]]) -> None:
    """The comparison in the terminal."""
    for side in (a, b):
        console.print(f"[bold]{escape(side.title)}[/bold], {side.told}")
    for name, first, second in differs:
        console.print(f"  {escape(name)}: {escape(first)} against {escape(second)}", soft_wrap=True)
    if not differs:
        console.print("  no field of the configs differs")
    console.print(f"  p: members exchanged {design(a, b, rows)}", soft_wrap=True)
    table = Table(*COLUMNS)
    for row in rows[:MOST]:
        table.add_row(*map(escape, cells(row)))
    console.print(table)
    if len(rows) > MOST:
        console.print(f"{len(rows) - MOST} more rows are on the page")
    for line in verdict(rows):
        console.print(escape(line), soft_wrap=True)


def draw(a: Side, b: Side, rows: Sequence[Row]) -> Figure:
    """Both sides by point: one panel for each of the level, the share with a detector, t50 and the validation loss."""
    names = ("level", "detecting", "t50", "validation_loss")
    chosen = [item for item in QUANTITIES if item.name in names]
    labels = list(dict.fromkeys(row.point for row in rows))
    figure, axes = new_figure(2, 2, 6.4 + 0.1 * len(labels))
    for ax, item in zip(axes.flat, chosen, strict=True):
        own = [row for row in rows if row.quantity == item.words]
        for number_, (side, colour) in enumerate(zip((a, b), COLOURS, strict=False)):
            x = np.arange(len(own)) + (number_ - 0.5) * 0.28
            found = np.array([getattr(row, side.label.lower()) for row in own])
            ax.plot(x, found[:, 0], "D", color=colour, ms=6, label=plain(side.title))
            ax.vlines(x, found[:, 1], found[:, 2], color=colour, lw=2.2)
            for place, row in zip(x, own, strict=True):
                if row.shown and side is b:
                    ax.annotate("*", (place - 0.14, 0.95), xycoords=("data", "axes fraction"), ha="center", color=INK)
        if item.scale == "log":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            ax.yaxis.set_major_formatter(
                FuncFormatter(count_text if item.name != "validation_loss" else lambda v, _: f"{v:g}")
            )
            ax.yaxis.set_minor_locator(NullLocator())
        elif item.scale == "share":
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        ax.set_xlim(-0.6, len(labels) - 0.4)
        turned = {"rotation": 30, "ha": "right"} if max(map(len, labels)) > 12 and len(labels) > 2 else {}
        ax.set_xticks(range(len(labels)), [plain(label) for label in labels], fontsize=8, **turned)
        ax.set_title(item.words, fontsize=10, loc="left", color=INK)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside lower left", ncols=1)
    return figure


def write_page(folder: Path, a: Side, b: Side, rows: Sequence[Row], differs: Sequence[tuple[str, str, str]]) -> Path:
    """`compare.html`, its figure and the table as Parquet, in place of an older comparison; answers the page."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    require(names <= set(FILES), "compare", str(folder), "new, empty or an older comparison")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh = Path(work) / "new"
        fresh.mkdir()
        caption = (
            f"Means (geometric for steps and losses) and {CONFIDENCE:.0%} intervals over members. A star: the "
            "difference is shown."
        )
        picture = take_picture(fresh, "compare", draw(a, b, rows), caption, "Both sides by point")
        to_frame(rows).to_parquet(fresh / "compare.parquet", index=False)
        page = template("compare.html.j2").render(
            a=a, b=b, differs=differs, columns=COLUMNS, rows=[cells(row) for row in rows], picture=picture,
            verdict=verdict(rows), how=design(a, b, rows), confidence=CONFIDENCE, plural=plural,
        )  # fmt: skip
        (fresh / "compare.html").write_text(page, encoding="utf-8")
        swap(fresh, folder, Path(work) / "old")
    return folder / "compare.html"
