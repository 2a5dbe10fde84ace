"""The report of a sweep: figures, tables and one self-contained HTML page, bounded however large the sweep is."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cluster import figures
from cluster.analysis import CONFIDENCE, DETECTOR_LIFT, RISEN, STATUSES, Analysis, axis_names
from cluster.encoding import encode
from cluster.figures import HeadKey, Portrait, Run, Spot
from cluster.picture import draw_box, make_scene
from cluster.sweep import Sweep, replace_fields

PANELS = 24
FIXED_PANELS = 7  # losses 1, times against width 4, box 2
MEMBERS, LAYERS = 12, 15
LINES, ROWS, FEW_ROWS = 12, 60, 40  # points in the summary; rows of the long and of the short tables
CAUSE = 300  # letters of a cause that are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberData:
    """What is kept of one finished member.

    curves: long table, `cluster.curves.KEYS` and value columns. figures: step, wall_time, train_loss, validation_loss
    and system figures, NaN where not measured. weights: "STEP/NAME" -> array without a member axis.
    """

    curves: pd.DataFrame
    figures: pd.DataFrame
    weights: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point along the axes: its members, and its judged heads. values: by axis name."""

    values: Mapping[str, Any]
    members: pd.DataFrame
    finished: pd.DataFrame
    heads: pd.DataFrame

    @property
    def label(self) -> str:
        """`width 16, learning_rate 0.001`."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        parts = (re.sub(r"[^A-Za-z0-9.+-]", "_", f"{name}{value}") for name, value in self.values.items())
        return "_".join(parts)[:100]

    @property
    def series(self) -> str:
        """The axes other than width, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items() if name != "width")

    @property
    def detecting(self) -> pd.DataFrame:
        """Finished members with a detector, by level."""
        if "level" not in self.finished:
            return self.finished.iloc[:0]
        return self.finished[self.finished["level"].notna()].sort_values("level", kind="stable")

    @property
    def representative(self) -> Mapping[str, Any] | None:
        """The finished member whose level is the (lower) median; where none has a detector, the first one."""
        table = self.detecting if len(self.detecting) else self.finished.iloc[:1]
        return None if table.empty else dict(table.iloc[(len(table) - 1) // 2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure on the page. name: of its PNG; src: the same PNG as a data URL."""

    name: str
    caption: str
    alt: str
    panels: int
    src: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table on the page; cells are texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page: a few words, then pictures, or in their place the reason why there are none."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(
    folder: Path,
    sweep: Sweep,
    analysis: Analysis,
    load: Callable[[str], MemberData],
    links: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` and its PNGs into `folder`, in place of an older report, all at once; returns the page's path.

    load: tables of a finished member by run id; called for at most 12 members. links: label -> address or command.
    ValueError if the folder holds anything but a report.
    """
    folder = folder.resolve()
    require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh = Path(work) / "new"
        fresh.mkdir()
        page = render(Writer(fresh, sweep, analysis, load), links, notes)
        (fresh / "report.html").write_text(page, encoding="utf-8")
        swap(fresh, folder, Path(work) / "old")
    return folder / "report.html"


def require_replaceable(folder: Path) -> None:
    """ValueError unless the folder is absent, empty, or holds a report and nothing else."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    strange = [name for name in names if name != "report.html" and not name.endswith(".png")]
    if names and (strange or "report.html" not in names):
        raise ValueError(f"folder: {str(folder)!r} holds {(strange or names)[0]!r}; it must be new, empty or a report")


def swap(fresh: Path, folder: Path, old: Path) -> None:
    """Rename `fresh` to `folder`; what stood there goes to `old`, and comes back if the renaming fails."""
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


class Writer:
    """Chooses what is shown of a sweep and draws it into a folder."""

    def __init__(
        self, folder: Path, sweep: Sweep, analysis: Analysis, load: Callable[[str], MemberData]
    ) -> None:
        self.folder, self.sweep, self.analysis, self.load = folder, sweep, analysis, load
        self.relation = sweep.system.relation
        self.points = make_points(sweep, analysis)
        self.settled = [point for point in self.points if len(point.finished)]
        heads = analysis.heads
        layers = [] if heads.empty else list(heads.groupby("layer")["lift_peak"].max().nlargest(LAYERS).index)
        self.layers = sorted(int(layer) for layer in layers)
        room = (PANELS - FIXED_PANELS) // (2 + len(self.layers))
        self.shown = evenly(self.settled, max(1, room))
        self.portraits: list[tuple[Point, Portrait, MemberData]] = []
        self.runs: list[Run] = []

    def fetch(self) -> None:
        """Load the members shown: one for each point shown in detail, and others for their losses, 12 in all."""
        chosen = [(point, dict(point.representative or {})) for point in self.shown]
        seen = {row["run_id"] for _, row in chosen}
        crowd = evenly(self.settled, MEMBERS)
        for turn in range(max((len(point.finished) for point in crowd), default=0)):
            for point in crowd:
                row = dict(point.finished.iloc[turn]) if turn < len(point.finished) else None
                if row is not None and row["run_id"] not in seen and len(chosen) < MEMBERS:
                    chosen.append((point, row))
                    seen.add(row["run_id"])
            if len(chosen) >= MEMBERS:
                break
        place = {id(point): index for index, point in enumerate(self.points)}
        for number, (point, row) in enumerate(chosen):
            data = self.load(str(row["run_id"]))
            rank = place[id(point)] / max(len(self.points) - 1, 1)
            self.runs.append(Run(point.label, rank, data.figures))
            if number < len(self.shown):
                self.portraits.append((point, self._portrait(point, row, data), data))
        self.runs.sort(key=lambda run: run.rank)

    def _portrait(self, point: Point, row: Mapping[str, Any], data: MemberData) -> Portrait:
        heads = self.analysis.heads
        own = heads[heads["member_id"] == row["member_id"]] if len(heads) else heads
        return Portrait(
            label=point.label, seed=int(row["seed"]), relation=self.relation, curves=data.curves, heads=own
        )

    def picture(self, name: str, figure: Figure, caption: str, alt: str) -> Picture:
        """Write a figure and take it into the page."""
        path = self.folder / f"{name}.png"
        panels = figures.save(figure, path)
        src = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        return Picture(name=path.name, caption=caption, alt=alt, panels=panels, src=src)
