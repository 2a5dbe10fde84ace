"""The report of a sweep: figures, tables and one self-contained HTML page, bounded however large the sweep is."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cluster import figures
from cluster import findings as say
from cluster.analysis import DETECTOR_LIFT, Analysis, series_of_sweep
from cluster.axes_section import AXES_PANELS, AxesSection
from cluster.claims import law_rows, sound_laws
from cluster.encoding import encode
from cluster.figures import COLOURS, Portrait, Run
from cluster.findings import Point, evenly
from cluster.geometry_sections import GEOMETRY_PANELS, GeometrySection
from cluster.intervals import CONFIDENCE
from cluster.law_sections import LAW_PANELS, LawSections, several_widths
from cluster.own_sections import OWN_PANELS, own_sections
from cluster.page import Picture, Section, take_picture, template
from cluster.picture import LEAST_WEIGHT, draw_box, make_scene
from cluster.sweep import Sweep, replace_fields
from cluster.widths import along, draw_times, level_spots, t50_spots
from probes.ablation import LEAST_SHARE
from probes.emergence import LEVEL_LIFT, START_LIFT
from sim.checks import require
from sim.system import Floors

PANELS = 24 + AXES_PANELS + LAW_PANELS + GEOMETRY_PANELS + OWN_PANELS
FIXED_PANELS = 7 + AXES_PANELS + LAW_PANELS + GEOMETRY_PANELS + OWN_PANELS  # losses 1, times against width 4, box 2
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


def write_report(
    folder: Path,
    sweep: Sweep,
    analysis: Analysis,
    load: Callable[[str], MemberData],
    links: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` and its PNGs into `folder`, in place of an older report, all at once; returns the page.

    load: tables of a finished member by run id; called for at most 12 members, and for 6 where geometry was measured.
    links: label -> address or command.
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
    """Rename `fresh` to `folder`; what stood there goes to `old`, and comes back if that fails or is broken off."""
    folder = folder.resolve()
    try:
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The members that were loaded. portraits: one a point, with its data; runs: losses of these and of others."""

    portraits: Sequence[tuple[Point, Portrait, MemberData]]
    runs: Sequence[Run]


def choose(points: Sequence[Point], portraits: int) -> list[tuple[Point, dict[str, Any]]]:
    """Members to load, 12 at most: representatives of `portraits` points first, then others of all points in turn."""
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


def fetch(
    points: Sequence[Point], analysis: Analysis, relation: str, layers: int, load: Callable[[str], MemberData]
) -> Shown:
    """Load what is shown: as many portraits as their panels leave room for."""
    count = max(1, (PANELS - FIXED_PANELS) // (2 + layers))
    portraits, runs = [], []
    ranks = {point.label: index / max(len(points) - 1, 1) for index, point in enumerate(points)}
    for number, (point, row) in enumerate(choose(points, count)):
        data = load(str(row["run_id"]))
        runs.append(Run(point.label, ranks[point.label], data.figures))
        if number < min(count, len(points)):
            own = (
                analysis.heads[analysis.heads["member_id"] == row["member_id"]]
                if len(analysis.heads)
                else analysis.heads
            )
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
    geometry = GeometrySection(folder=folder, sweep=sweep, analysis=analysis, load=lambda run: load(run).curves)
    compared = AxesSection(folder=folder, sweep=sweep, analysis=analysis)
    sections = [
        drawing.losses(),
        drawing.box(),
        drawing.heads(layers),
        drawing.widths(),
        *compared.sections(),
        *across(folder, sweep, analysis),
        *geometry.all(),
        drawing.distance(),
        drawing.worth(),
        *own_sections(folder, sweep.probe.probes, drawing.portraits),
    ]
    lines = [(point.label, say.point_line(point, relation)) for point in evenly(points, say.LINES)]
    tables = [make(sweep, analysis) for make in (say.width_rows, say.head_rows, say.member_rows, say.lost_rows)]
    laws = sound_laws(analysis.laws)
    one_width = bool(laws) and not several_widths(laws)
    tables[:0] = [*([] if one_width else [law_rows(laws)]), *geometry.tables(), *compared.tables()]
    return template("report.html.j2").render(
        sweep=sweep,
        system=type(sweep.system).__name__,
        about=(type(sweep.system).__doc__ or "").partition("\n\n")[0].replace("`", ""),
        trained=say.trained_line(sweep),
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


def across(folder: Path, sweep: Sweep, analysis: Analysis) -> list[Section]:
    """The sections on what holds across the sweep."""
    series = {each.name: each for each in series_of_sweep(sweep, analysis)}
    failed = {str(law["series"]): str(law["failed"]) for law in analysis.laws if "failed" in law}
    return LawSections(folder=folder, laws=sound_laws(analysis.laws), series=series, failed=failed).all()


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Draws the sections' figures into a folder. points: those with a finished member."""

    folder: Path
    sweep: Sweep
    points: Sequence[Point]
    shown: Shown

    def picture(self, name: str, figure: Figure, caption: str, alt: str) -> Picture:
        """Write a figure, and take it into the page."""
        return take_picture(self.folder, name, figure, caption, alt)

    @property
    def portraits(self) -> list[Portrait]:
        """Those whose heads were measured on the judged relation."""
        return [portrait for _, portrait, _ in self.shown.portraits if len(portrait.heads) and len(portrait.judged)]

    def _who(self) -> str:
        """Which members stand for the points, and which points are left out."""
        shown = [point.label for point, _, _ in self.shown.portraits]
        words = (
            "Each point is shown by one member: the one of median level among those with a detector (the first seed "
            "where no member has one)."
        )
        if len(shown) == len(self.points):
            return words
        return f"{words} Of {len(self.points):,} points {len(shown)} are drawn, evenly chosen: {'; '.join(shown)}."

    def losses(self) -> Section:
        """Learning curves."""
        section = Section(
            title="Losses",
            text="What the models learn, before asking how. Look for a fall in the loss where heads begin to look.",
        )
        if not self.shown.runs:
            section.missing = "No member has finished, so there are no losses to draw."
            return section
        total, count = sum(len(point.finished) for point in self.points), len(self.shown.runs)
        caption = (
            f"{f'{count} of {total:,}' if total > count else 'All'} finished members. Lines: loss on held-out "
            "examples; dots: mean training loss since the last probe. Dashed: losses of reference predictors."
        )
        losses = pd.concat([run.figures[["train_loss", "validation_loss"]] for run in self.shown.runs])
        if (losses <= 0).any(axis=None):
            caption += " Losses that are not above 0 have no place on a logarithmic axis and are not drawn."
        figure = figures.draw_losses(self.shown.runs, shared_floors(self.sweep))
        section.pictures = [self.picture("losses", figure, caption, "Held-out and training loss against step")]
        return section

    def box(self) -> Section:
        """One head's attention in one example."""
        relation = self.sweep.system.relation
        section = Section(
            title="What a head looks at",
            text="One example, drawn afresh, and one head: where every token's attention goes before training and "
            f"after. Tokens related by “{relation}” are joined by a yellow band.",
        )
        found = [
            (row["lift_end"], number, int(row["layer"]), int(row["head"]))
            for number, (_, portrait, _) in enumerate(self.shown.portraits)
            for row in (portrait.judged[portrait.judged["detector"]].to_dict("records") if len(portrait.heads) else ())
        ]
        if not found:
            section.missing = f"No member shown here has a detector of “{relation}”: there is no head to look through."
            return section
        _, number, layer, head = max(found)
        point, portrait, data = self.shown.portraits[number]
        if not data.weights:
            section.missing = "The member's weights were not kept, so its attention cannot be worked out again."
            return section
        scene = make_scene(*self._models(point), data.weights, (layer, head), relation)
        if scene is None:
            section.missing = (
                f"A picture needs positions in the plane and a pair related by “{relation}”; examples of this system "
                "offer none."
            )
            return section
        who = f"head {layer}.{head} (layer.head) of {portrait.label}, seed {portrait.seed}"
        caption = (
            f"Of the members shown below, the detector with the highest lift at the end: {who}. Lines run from the "
            "token that looks, where they are thick, to the one looked at, where they are thin, and bend to the left; "
            "width and opacity grow with the attention weight, on one scale for both panels. The core of a disc is as "
            f"dark as its attention to itself. Weights below {LEAST_WEIGHT:.0%} are left out. The example was picked "
            "for its related pairs, before any attention was known; the percentages are of this example alone."
        )
        figure = draw_box(scene, who.replace(" (layer.head)", ""))
        section.pictures = [self.picture("box", figure, caption, f"Attention of {who} in one example, early and late")]
        return section

    def _models(self, point: Point) -> tuple[Any, Any]:
        """The system and the model at a point; its values as plain numbers and under their full names."""
        values = (value.item() if isinstance(value, np.generic) else value for value in point.values.values())
        axes = dict(zip(("model.width", *self.sweep.axes), values, strict=True))
        return replace_fields(self.sweep.system, "system", axes), replace_fields(self.sweep.model, "model", axes)

    def heads(self, layers: Sequence[int]) -> Section:
        """Lift curves, layer by layer."""
        section = Section(title="Heads, layer by layer", text=f"When each head turned to related tokens. {self._who()}")
        if not self.portraits:
            section.missing = "No finished member has a head measured on the judged relation."
            return section
        caption = (
            "Lift over training, smoothed over three probe steps; band: two standard errors over the replicates of the "
            f"probe set, often thinner than the line. Dashed: lift {LEVEL_LIFT:g}; a ring marks a head's level there, "
            "the bar through it the interval. Names give the status; bold names and lines are detectors."
        )
        relations = self._relations(len(layers))
        for point, portrait, _ in self.shown.portraits:
            if portrait not in self.portraits:
                continue
            busy = portrait.judged.groupby("layer").size().max() > len(COLOURS)
            words = f" Grey: all but the {len(COLOURS)} strongest heads of a layer." if busy else ""
            figure = figures.draw_heads(portrait, relations, layers)
            name, alt = f"heads_{point.slug}", f"Lift of every head against step, {portrait.label}"
            section.pictures.append(self.picture(name, figure, f"{portrait.label}. {caption}{words}", alt))
        return section

    def _relations(self, layers: int) -> list[str]:
        """The judged relation, then as many others as the bound on panels leaves room for."""
        judged, count = self.sweep.system.relation, len(self.portraits)
        left = PANELS - FIXED_PANELS - count * (2 + layers)
        common = set.intersection(*(set(portrait.heads["relation"]) for portrait in self.portraits))
        return [judged, *sorted(common - {judged})[: left // (count * layers)]]

    def widths(self) -> Section:
        """Times against width, or the axis that takes its place."""
        axis = along(self.sweep, self.points)
        after = "Laws are fitted below." if axis.name == "width" else "Differences are tested below."
        section = Section(
            title=f"Level and t50 against {axis.name}",
            text="Whether heads emerge, and when they do, are two questions: the strips on top answer the first, the "
            f"panels below the second. {after}",
        )
        series = list(dict.fromkeys(point.at(axis.others) for point in self.points))
        names = evenly(series, len(COLOURS))
        points = [point for point in self.points if point.at(axis.others) in names]
        if not any(len(point.heads) for point in points):
            section.missing = "No finished member has measured heads, so there are no times to draw."
            return section
        caption = (
            "Left: of every member the level of its best detector. Right: of every member the geometric mean of t50 "
            "over its risen heads; a triangle is a lower bound, as some head was still growing. Open marks are "
            f"members; diamonds their geometric means with {CONFIDENCE:.0%} intervals (Student t over members in log "
            "time; none for a single member). Arrows count members that never got there. Strips, over the "
            "same places: members that have a detector (left) and heads by status (right)."
            + (f" Of {len(series):,} series {len(names)} are drawn, evenly chosen." if len(series) > len(names) else "")
        )
        last = max(float(point.finished["last_step"].max()) for point in points)
        figure = draw_times(level_spots(points, axis), t50_spots(points, axis), axis, last)
        name, alt = "widths" if axis.name == "width" else "axes", f"Level and t50 against {axis.name} with intervals"
        section.pictures = [self.picture(name, figure, caption, alt)]
        return section

    def distance(self) -> Section:
        """Attention by distance."""
        section = Section(
            title="Attention and distance",
            text="Is looking at related tokens just looking at close ones? g(r) is the attention paid at distance r "
            "over the mean; 1 everywhere means that distance plays no part.",
        )
        portraits = [portrait for portrait in self.portraits if portrait.curve("distance") is not None]
        if not portraits:
            section.missing = "There are no distances between tokens in this system, or they were not measured."
            return section
        caption = (
            f"Grey: every head at the first probe. Colours: at the end, the {figures.NAMED} heads of highest peak "
            "lift, coloured as above, solid in layer 0, dashed in layer 1, and so on, with two standard errors over "
            "replicates; other heads pale. Bold: detectors. corr(A, r): correlation of attention and distance."
        )
        radius = getattr(getattr(self.sweep.system, "box", None), "radius", None)
        figure = figures.draw_distance(portraits, None if radius is None else 2 * radius)
        section.pictures = [self.picture("distance", figure, caption, "Attention by distance, start and end")]
        return section

    def worth(self) -> Section:
        """Ablations over training."""
        section = Section(
            title="What the looking is worth",
            text="A head may look at the right tokens and be useless. Here each head's attention is made uniform, the "
            "rest left as trained, and the rise in loss is given as a share of all that attention saves this model.",
        )
        portraits = [portrait for portrait in self.portraits if portrait.curve("ablation") is not None]
        if not portraits:
            section.missing = "Ablations were not measured."
            return section
        caption = (
            f"The same members, heads and colours. Dashed: {LEAST_SHARE:.0%}; a head matters if its worth is surely "
            "above. Over 100%: a model that loses this head's looking does worse than one that never had attention, as "
            "the rest has come to rely on it. Drawn once attention saves a tenth of what it saves at its best."
        )
        figure = figures.draw_worth(portraits)
        section.pictures = [self.picture("worth", figure, caption, "Worth of each head's looking over training")]
        return section


def shared_floors(sweep: Sweep) -> Floors:
    """Losses of reference predictors; without those that differ, or are not known, along an axis of the system."""
    floors = sweep.system.floors()
    if not any(name.startswith("system.") for name in sweep.axes):
        return floors
    every = [system.floors() for system in {member.config.system for member in sweep.members()}]
    known = {
        name: getattr(floors, name) if len({getattr(each, name) for each in every}) == 1 else None
        for name in ("without_attention", "optimum")
    }
    same = len({each.trivial for each in every}) == 1
    return Floors(trivial=floors.trivial if same else math.nan, **known)
