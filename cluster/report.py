"""The report of a sweep: figures, tables and one self-contained HTML page, bounded however large the sweep is."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cluster import figures
from cluster import findings as say
from cluster.analysis import CONFIDENCE, DETECTOR_LIFT, Analysis
from cluster.encoding import encode
from cluster.figures import COLOURS, Portrait, Run
from cluster.findings import Point, evenly
from cluster.picture import draw_box, make_scene
from cluster.sweep import Sweep, replace_fields
from cluster.widths import draw_widths, level_spots, t50_spots
from probes.ablation import LEAST_SHARE
from probes.emergence import LEVEL_LIFT, START_LIFT
from train.config import require

PANELS = 24
FIXED_PANELS = 7  # losses 1, times against width 4, box 2
MEMBERS = 12  # whose losses are drawn
LAYERS = PANELS - FIXED_PANELS - 2


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
class Picture:
    """A figure on the page. name: of its PNG; src: the same PNG as a data URL."""

    name: str
    caption: str
    alt: str
    panels: int
    src: str


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page: a few words, then pictures, or in their place the reason why there are none."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    missing: str = ""


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
        page = render(fresh, sweep, analysis, load, links, notes)
        (fresh / "report.html").write_text(page, encoding="utf-8")
        swap(fresh, folder, Path(work) / "old")
    return folder / "report.html"


def require_replaceable(folder: Path) -> None:
    """ValueError unless the folder is absent, empty, or holds a report and nothing else."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    strange = [name for name in names if name != "report.html" and not name.endswith(".png")]
    own = not names or ("report.html" in names and not strange)
    require(own, "folder", str(folder), f"new, empty or an older report (it holds {', '.join((strange or names)[:3])})")


def swap(fresh: Path, folder: Path, old: Path) -> None:
    """Rename `fresh` to `folder`; what stood there goes to `old`, and comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The members that were loaded. portraits: one a point, with its data; runs: losses of these and of others."""

    portraits: Sequence[tuple[Point, Portrait, MemberData]]
    runs: Sequence[Run]


def choose(points: Sequence[Point], portraits: int) -> list[tuple[Point, dict[str, Any]]]:
    """Members to load: the representatives of `portraits` points first, then others of all points in turn, 12 in all."""
    chosen = [(point, point.representative) for point in evenly(points, portraits)]
    seen = {row["run_id"] for _, row in chosen}
    crowd = evenly(points, MEMBERS)
    for turn in range(MEMBERS):
        for point in crowd:
            if turn < len(point.finished) and len(chosen) < MEMBERS:
                row = {str(name): value for name, value in point.finished.iloc[turn].items()}
                chosen += [] if row["run_id"] in seen else [(point, row)]
                seen.add(row["run_id"])
    return chosen


def fetch(points: Sequence[Point], analysis: Analysis, relation: str, layers: int, load: Callable[[str], MemberData]) -> Shown:
    """Load what is shown: as many portraits as their panels leave room for."""
    count = max(1, (PANELS - FIXED_PANELS) // (2 + layers))
    portraits, runs = [], []
    ranks = {point.label: index / max(len(points) - 1, 1) for index, point in enumerate(points)}
    for number, (point, row) in enumerate(choose(points, count)):
        data = load(str(row["run_id"]))
        runs.append(Run(point.label, ranks[point.label], data.figures))
        if number < min(count, len(points)):
            own = analysis.heads[analysis.heads["member_id"] == row["member_id"]] if len(analysis.heads) else analysis.heads
            portrait = Portrait(
                label=point.label, seed=int(row["seed"]), relation=relation, curves=data.curves, heads=own
            )
            portraits.append((point, portrait, data))
    return Shown(portraits=portraits, runs=sorted(runs, key=lambda run: run.rank))


def render(
    folder: Path,
    sweep: Sweep,
    analysis: Analysis,
    load: Callable[[str], MemberData],
    links: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """Draw every figure into the folder and return the page."""
    relation = sweep.system.relation
    points = say.make_points(sweep, analysis)
    settled = [point for point in points if len(point.finished)]
    by_layer = analysis.heads.groupby("layer")["lift_peak"].max() if len(analysis.heads) else pd.Series(dtype=float)
    layers = sorted(int(layer) for layer in by_layer.nlargest(LAYERS).index)
    shown = fetch(settled, analysis, relation, len(layers), load)
    drawing = Drawing(folder=folder, sweep=sweep, points=settled, shown=shown)
    sections = [drawing.losses(), drawing.box(), drawing.heads(layers), drawing.law(), drawing.distance(), drawing.worth()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = [(point.label, say.point_line(point, relation)) for point in evenly(points, say.LINES)]
    tables = [make(sweep, analysis) for make in (say.width_rows, say.head_rows, say.member_rows, say.lost_rows)]
    return environment.get_template("report.html.j2").render(
        sweep=sweep,
        system=type(sweep.system).__name__,
        relation=relation,
        outcome=say.outcome_line(sweep, analysis),
        lines=lines,
        more_points=len(points) - len(lines),
        caveats=say.caveats(sweep, analysis, points),
        sections=sections,
        tables=tables,
        links=[(label, target, target.startswith(("http://", "https://"))) for label, target in links.items()],
        notes=notes,
        config=json.dumps(encode(sweep), indent=2),
        level=LEVEL_LIFT,
        start=START_LIFT,
        rows_lift=DETECTOR_LIFT,
        least_share=LEAST_SHARE,
        confidence=CONFIDENCE,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Draws the sections' figures into a folder. points: those with a finished member."""

    folder: Path
    sweep: Sweep
    points: Sequence[Point]
    shown: Shown

    def picture(self, name: str, figure: Figure, caption: str, alt: str) -> Picture:
        """Write a figure, and take it into the page."""
        path = self.folder / f"{name}.png"
        panels = figures.save(figure, path)
        src = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        return Picture(name=path.name, caption=caption, alt=alt, panels=panels, src=src)

    @property
    def portraits(self) -> list[Portrait]:
        """Those whose heads were measured on the judged relation."""
        return [portrait for _, portrait, _ in self.shown.portraits if len(portrait.heads) and len(portrait.judged)]

    def _who(self) -> str:
        """Which members stand for the points, and which points are left out."""
        shown = [point.label for point, _, _ in self.shown.portraits]
        left = len(self.points) - len(shown)
        return (
            "Each point is shown by one member: the one of median level among those with a detector (the first seed "
            "where no member has one)."
            + (f" {left:,} of {len(self.points):,} points are not drawn; shown are {'; '.join(shown)}." if left else "")
        )

    def losses(self) -> Section:
        """Learning curves."""
        section = Section(
            title="Losses",
            text="What the models learn, before asking how. A plateau followed by a fall is where structure forms.",
        )
        if not self.shown.runs:
            section.missing = "No member has finished, so there are no losses to draw."
            return section
        total = sum(len(point.finished) for point in self.points)
        part = f"{len(self.shown.runs)} of {total:,} finished members" if total > len(self.shown.runs) else "All members"
        caption = (
            f"{part}. Lines: loss on held-out examples; dots: mean training loss since the last probe. "
            "Dashed: losses of reference predictors, where the system knows them."
        )
        figure = figures.draw_losses(self.shown.runs, self.sweep.system.floors())
        section.pictures = [self.picture("losses", figure, caption, "Validation and training loss against step")]
        return section

    def box(self) -> Section:
        """One head's attention in one example."""
        relation = self.sweep.system.relation
        section = Section(
            title="What a head looks at",
            text=f"One example, drawn afresh, and one head: where every token's attention goes before training and "
            f"after. Tokens related by “{relation}” are joined by a yellow band.",
        )
        detectors = [
            (row["lift_peak"], number, int(row["layer"]), int(row["head"]))
            for number, (_, portrait, _) in enumerate(self.shown.portraits)
            for row in (portrait.judged[portrait.judged["detector"]].to_dict("records") if len(portrait.heads) else ())
        ]
        if not detectors:
            section.missing = f"No member drawn here has a detector of “{relation}”, so there is no head to look through."
            return section
        _, number, layer, head = max(detectors)
        point, portrait, data = self.shown.portraits[number]
        if not data.weights:
            section.missing = "The member's weights were not kept, so its attention cannot be worked out again."
            return section
        scene = make_scene(*self._models(point), data.weights, (layer, head), relation)
        if scene is None:
            section.missing = (
                f"A picture needs positions in the plane and a pair related by “{relation}”; this system's examples "
                "offer none."
            )
            return section
        caption = (
            f"Head {layer}.{head} (layer.head) of {portrait.label}, seed {portrait.seed}: the strongest detector among "
            "the members drawn below. Every line runs from the token that looks, where it is thick, to the one looked "
            "at, where it is thin, and bends to the left; width and opacity grow with the attention weight, on one "
            "scale in both panels. Weights below 2% and attention to oneself are not drawn. The example was picked "
            "for its related pairs, before any attention was known."
        )
        alt = f"Attention of head {layer}.{head} in one example, at the first and last kept step"
        section.pictures = [self.picture("box", draw_box(scene), caption, alt)]
        return section

    def _models(self, point: Point) -> tuple[Any, Any]:
        """The system and the model at a point; its values as plain numbers and under their full names."""
        values = (value.item() if isinstance(value, np.generic) else value for value in point.values.values())
        axes = dict(zip(("model.width", *self.sweep.axes), values, strict=True))
        system, model = replace_fields(self.sweep.system, "system", axes), replace_fields(self.sweep.model, "model", axes)
        return system, model

    def heads(self, layers: Sequence[int]) -> Section:
        """Lift curves, layer by layer."""
        section = Section(
            title="Heads, layer by layer",
            text="When each head turned to related tokens. " + self._who(),
        )
        if not self.portraits:
            section.missing = "No finished member has a head measured on the judged relation."
            return section
        relations = self._relations(len(layers))
        for point, portrait, _ in self.shown.portraits:
            if portrait not in self.portraits:
                continue
            caption = (
                f"{portrait.label}, seed {portrait.seed}. Lift over training, smoothed over three probe steps as for the "
                f"times; band: two standard errors over the replicates of the probe set. Dashed: lift {LEVEL_LIFT:g}; a "
                "ring marks a head's level there, the bar through it the interval. Bold names are detectors; names give "
                f"the status. In grey: heads beyond the {len(COLOURS)} strongest of a layer."
            )
            figure = figures.draw_heads(portrait, relations, layers)
            alt = f"Lift of every head against step, {portrait.label}"
            section.pictures.append(self.picture(f"heads_{point.slug}", figure, caption, alt))
        return section

    def _relations(self, layers: int) -> list[str]:
        """The judged relation, then as many others as the bound on panels leaves room for."""
        judged, count = self.sweep.system.relation, len(self.portraits)
        left = PANELS - FIXED_PANELS - count * (2 + layers)
        common = set.intersection(*(set(portrait.heads["relation"]) for portrait in self.portraits))
        return [judged, *sorted(common - {judged})[: left // max(count * layers, 1)]]

    def law(self) -> Section:
        """Times against width."""
        section = Section(
            title="Level and t50 against width",
            text="Whether heads emerge, and when they do, are two questions: the strips on top answer the first, the "
            "panels below the second. No law is fitted here.",
        )
        names = evenly(list(dict.fromkeys(point.series for point in self.points)), len(COLOURS))
        points = [point for point in self.points if point.series in names]
        if not any(len(point.heads) for point in points):
            section.missing = "No finished member has measured heads, so there are no times to draw."
            return section
        last = max(float(point.finished["last_step"].max()) for point in points)
        left = len({point.series for point in self.points}) - len(names)
        caption = (
            "Left: of every member the level of its best detector. Right: of every member the geometric mean of t50 over "
            "its risen heads; triangles are lower bounds (some head was still growing). Open marks are members; diamonds "
            f"their geometric means with {CONFIDENCE:.0%} intervals (Student t over members in log time; none for a single "
            "member). Arrows count members that never got there. Strips: shares, with counts, of members that have a "
            "detector (left) and of heads by status (right)." + (f" {left} further series are not drawn." if left else "")
        )
        figure = draw_widths(level_spots(points), t50_spots(points), last)
        section.pictures = [self.picture("widths", figure, caption, "Level and t50 against width with intervals")]
        return section

    def distance(self) -> Section:
        """Attention by distance."""
        section = Section(
            title="Attention and distance",
            text="Is looking at related tokens just looking at close ones? g(r) is the attention paid at distance r over "
            "the mean; 1 everywhere means that distance plays no part.",
        )
        portraits = [portrait for portrait in self.portraits if portrait.curve("distance") is not None]
        if not portraits:
            section.missing = "This system has no distances between tokens, or they were not measured."
            return section
        box = getattr(self.sweep.system, "box", None)
        contact = 2 * box.radius if hasattr(box, "radius") else None
        caption = (
            f"Grey: all heads at the start. At the end: the {figures.NAMED} strongest heads in colour with two standard "
            "errors over replicates (solid: layer 0, dashed: layer 1, …), the others pale. corr: correlation of attention "
            "and distance over pairs, start → end."
        )
        figure = figures.draw_distance(portraits, contact)
        section.pictures = [self.picture("distance", figure, caption, "Attention by distance, start and end")]
        return section

    def worth(self) -> Section:
        """Ablations over training."""
        section = Section(
            title="What the looking is worth",
            text="A head may look at the right tokens and be useless. Here each head's attention is made uniform, the rest "
            "left as trained, and the rise in loss is given as a share of all that attention saves this model.",
        )
        portraits = [portrait for portrait in self.portraits if portrait.curve("ablation") is not None]
        if not portraits:
            section.missing = "Ablations were not measured."
            return section
        caption = (
            f"The same members and colours as above. Dashed: {LEAST_SHARE:.0%}, above which a head matters if two standard "
            "errors agree. Above 100%: without this head's looking the model does worse than without any attention. Nothing "
            "is drawn while attention saves nothing yet."
        )
        figure = figures.draw_worth(portraits)
        section.pictures = [self.picture("worth", figure, caption, "Share of what attention saves, by head, over training")]
        return section
