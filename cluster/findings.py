"""What a report says in words and tables: points along the axes, numbers with intervals, and what to beware of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from cluster.analysis import RISEN, Analysis
from cluster.intervals import CONFIDENCE
from cluster.sweep import Sweep
from probes.emergence import LEVEL_LIFT, STATUSES
from probes.scaling import MIN_WIDTHS

T = TypeVar("T")

LINES = 12  # points named one by one in the summary
ROWS, FEW_ROWS = 60, 40  # rows of the long and of the short tables
CAUSE = 300  # letters of a cause that are shown
FEW_MEMBERS = 10  # below so many members a point an interval is called rough
CROWDED = 0.25  # share that uniform attention gives to related tokens, above which lift cannot rise far
UNEVEN = 1.5  # ratio of shares that uniform attention gives to related tokens, above which levels are no like ones
DASH = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point along the axes. values: by axis name; its members, heads and widths row on the judged relation."""

    values: Mapping[str, Any]
    members: pd.DataFrame
    heads: pd.DataFrame
    figures: Mapping[str, Any]

    @property
    def label(self) -> str:
        """`width 16, learning_rate 0.001`."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    @property
    def series(self) -> str:
        """The axes other than width, in words."""
        return self.at([name for name in self.values if name != "width"])

    def at(self, names: Sequence[str]) -> str:
        """Its values along these axes, in words."""
        return ", ".join(f"{name} {self.values[name]}" for name in names)

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        return "_".join(re.sub(r"[^A-Za-z0-9.+-]", "_", f"{k}{v}") for k, v in self.values.items())[:100]

    @property
    def finished(self) -> pd.DataFrame:
        """Members with results."""
        return self.members[self.members["outcome"] == "finished"]

    @property
    def detecting(self) -> pd.DataFrame:
        """Finished members with a detector, earliest level first."""
        table = self.finished
        return table[table["level"].notna()].sort_values("level") if "level" in table else table.iloc[:0]

    @property
    def without(self) -> int:
        """Finished members in which no head is a detector."""
        return len(self.finished) - len(self.detecting)

    @property
    def representative(self) -> dict[str, Any]:
        """The finished member of (lower) median level; the first one where none has a detector."""
        table = self.detecting if len(self.detecting) else self.finished.iloc[:1]
        return {str(name): value for name, value in table.iloc[(len(table) - 1) // 2].items()}

    def count(self, status: str) -> int:
        """Judged heads of that status."""
        return int((self.heads["status"] == status).sum()) if len(self.heads) else 0

    @property
    def risen(self) -> int:
        """Judged heads that rose, or were there from the start."""
        return sum(self.count(status) for status in RISEN)


def make_points(sweep: Sweep, analysis: Analysis) -> list[Point]:
    """The points in the order of the member table."""
    axes, points = list(sweep.axis_names), []
    if analysis.members.empty:
        return []
    heads, widths = (
        table[table["relation"] == sweep.system.relation] if len(table) else table
        for table in (analysis.heads, analysis.widths)
    )
    own_heads = dict(list(heads.groupby(axes, sort=False))) if len(heads) else {}
    own_figures = {tuple(row[name] for name in axes): row for row in widths.to_dict("records")}
    for key, members in analysis.members.groupby(axes, sort=False):
        points.append(
            Point(
                values=dict(zip(axes, key, strict=True)),
                members=members,
                heads=own_heads.get(key, heads.iloc[:0]),
                figures={str(name): value for name, value in own_figures.get(key, {}).items()},
            )
        )
    return points


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, the first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, count)] if count > 1 else [items[0]]


def step_text(value: Any) -> str:
    """A number of steps: `1,204`, `12.3`, a dash for none, the infinity sign for an open end."""
    if value is None or not isinstance(value, int | float | np.number) or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number_text(value: Any, form: str = ".2f") -> str:
    """A number in a form, a dash for none."""
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return DASH
    return format(value, form)


def interval(values: Sequence[float | None], form: str = ".2f") -> str:
    """`0.53 (0.31 to 0.75)` of an estimate and its ends, without brackets where there is no interval."""
    middle, low, high = (number_text(value, form) for value in values)
    return middle if DASH in (low, high) else f"{middle} ({low} to {high})"


def interval_text(row: Mapping[Any, Any], name: str, low: str, high: str) -> str:
    """`960 (616–1,496)`, without brackets where there is no interval."""
    middle, ends = step_text(row.get(name)), [step_text(row.get(low)), step_text(row.get(high))]
    return middle if DASH in ends or middle == DASH else f"{middle} ({ends[0]}–{ends[1]})"


def plural(count: int, noun: str) -> str:
    """`1 member`, `1,200 members`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def planned(sweep: Sweep, analysis: Analysis) -> int:
    """Members of the sweep as configured, or those on record where these are more (it was wider before)."""
    points = len(sweep.widths) * math.prod(len(values) for values in sweep.axes.values())
    return max(points * sweep.seeds, recorded(analysis))


def recorded(analysis: Analysis) -> int:
    """Members with a row, whatever their outcome."""
    return int(analysis.members["member_id"].nunique()) if len(analysis.members) else 0


def trained_line(sweep: Sweep) -> str:
    """The shape of the models and their training, as far as it is the same for all members."""
    parts = {
        "model.layers": plural(sweep.model.layers, "layer"),
        "model.heads": f"{plural(sweep.model.heads, 'head')} a layer" if sweep.model.heads else "",
        "model.head_dim": f"heads of size {sweep.model.head_dim}" if sweep.model.head_dim else "",
        "train.steps": f"{sweep.train.steps:,} steps of {sweep.train.optimizer}",
        "train.batch_size": f"batches of {sweep.train.batch_size:,}",
    }
    return ", ".join(text for name, text in parts.items() if text and name not in sweep.axes)


def outcome_line(sweep: Sweep, analysis: Analysis) -> str:
    """How many members finished, diverged, failed, and are still to come."""
    table = analysis.members
    counts = table["outcome"].value_counts().to_dict() if len(table) else {}
    finished = counts.pop("finished", 0)
    parts = [f"{finished:,} of {plural(planned(sweep, analysis), 'member')} finished training"]
    parts += [f"{counts.pop(name, 0):,} {name}" for name in ("diverged", "failed")]
    parts += [f"{count:,} {name}" for name, count in sorted(counts.items())]
    waiting = planned(sweep, analysis) - recorded(analysis)
    if waiting > 0:
        parts.append(f"{waiting:,} without a result yet")
    return ", ".join(parts) + "."


def point_line(point: Point, relation: str) -> str:
    """What became of one point's members and heads, with its interval where there is one."""
    finished, having = len(point.finished), len(point.detecting)
    if not finished:
        return "no member finished."
    if not having:
        among = "the one finished member" if finished == 1 else f"any of {finished:,} finished members"
        start = f"no detector of “{relation}” in {among}"
    else:
        have = f"{having:,} of {plural(finished, 'finished member')} {'has' if having == 1 else 'have'}"
        start = f"{have} a detector of “{relation}”"
        level = point.figures.get("level", math.nan)
        low, high = (step_text(point.figures.get(name)) for name in ("level_low", "level_high"))
        spread = "this is one member, without an interval"
        if DASH not in (low, high):
            spread = f"geometric mean; {CONFIDENCE:.0%} interval {low}–{high} over {plural(having, 'member')}"
        start += f"; the best one reached lift {LEVEL_LIFT:g} at step {step_text(level)} ({spread})"
    total = len(point.heads)
    share = f" ({point.risen / total:.0%})" if total else ""
    return f"{start}. {point.risen:,} of {plural(total, 'head')}{share} rose."


def uniform_share(point: Point) -> float:
    """Of the weight, what attention that is uniform over visible keys gives to related tokens: peak score over peak
    lift, the median over heads; NaN without heads."""
    if not len(point.heads):
        return math.nan
    return float((point.heads["peak"] / point.heads["lift_peak"]).median()) if "peak" in point.heads else math.nan


def ceiling_lines(points: Sequence[Point]) -> list[str]:
    """A line where lift cannot rise far, or not equally far at all points; no head attends by more than all it has."""
    shares = [share for share in map(uniform_share, points) if math.isfinite(share)]
    low, high = min(shares, default=math.nan), max(shares, default=math.nan)
    hopeless = sum(1 / share < LEVEL_LIFT for share in shares)
    where = "" if hopeless == len(shares) else f" at {hopeless:,} of {len(shares):,} points"
    end = f": no head can reach lift {LEVEL_LIFT:g}{where}" if hopeless else ""
    if high > UNEVEN * low:
        most = f"lift is at most {1 / low:.1f} and {1 / high:.1f} there"
        return [
            f"Uniform attention gives related tokens {low:.0%} of the weight at one point and {high:.0%} at another, "
            f"so {most}{end or ', and a level is not the same demand'}."
        ]
    if high > CROWDED:
        start = f"Uniform attention already gives related tokens {high:.0%} of the weight"
        return [f"{start}, so lift is at most {1 / high:.1f}{end}."]
    return []


def caveats(sweep: Sweep, analysis: Analysis, points: Sequence[Point]) -> list[str]:
    """What a reader should keep in mind, with numbers; only what applies."""
    settled = [point for point in points if len(point.finished)]
    if not settled:
        return ["No member has finished, so nothing can be said of heads yet."]
    found = []
    fewest = min(len(point.finished) for point in settled)
    if fewest < FEW_MEMBERS:
        found.append(f"Points rest on as few as {plural(fewest, 'member')}: intervals over members are rough.")
    widths = len({point.values["width"] for point in settled})
    if widths < MIN_WIDTHS:
        found.append(f"{plural(widths, 'width')}: too few to fit a law of width; it takes {MIN_WIDTHS}.")
    without = sum(point.without for point in settled)
    if without and any(len(point.detecting) for point in settled):
        found.append(
            f"{plural(without, 'finished member')} without a detector: mean levels are over the others only, and so "
            "say when detectors come where they come, not whether."
        )
    growing = sum(point.count("growing") for point in settled)
    if growing:
        total = sum(point.risen for point in settled)
        found.append(
            f"{growing:,} of {total:,} risen heads were still growing at the end: their t50 is a lower bound. "
            "Levels do not depend on when training stopped."
        )
    found += ceiling_lines(settled)
    fooled = sum(int((p.heads["level"].notna() & ~p.heads["detector"]).sum()) for p in settled if len(p.heads))
    if fooled:
        found.append(
            f"{plural(fooled, 'head')} reached lift {LEVEL_LIFT:g} without being a detector: they look at popular "
            "tokens, whoever asks."
        )
    lost = int((analysis.members["outcome"] != "finished").sum())
    if lost:
        found.append(f"{plural(lost, 'member')} ended without a result and {'is' if lost == 1 else 'are'} in no mean.")
    if planned(sweep, analysis) > recorded(analysis):
        found.append("The sweep is not complete; numbers will move as members come in.")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table on the page; cells are texts. note: what is left out, and where it is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def more(total: int, shown: int, where: str) -> str:
    """Says how many rows are not shown."""
    return f"{total - shown:,} more rows are in {where}." if total > shown else ""


def head_rows(sweep: Sweep, analysis: Analysis) -> Table:
    """The judged heads with the highest lifts."""
    axes = list(sweep.axis_names)
    columns = [*axes, "seed", "head", "status", "detector", "level", "t50", "peak lift", "end lift",
               "lift over rows", "worth of looking", "matters"]  # fmt: skip
    heads = analysis.heads
    own = heads[heads["relation"] == sweep.system.relation] if len(heads) else heads
    top = own.sort_values("lift_peak", ascending=False, kind="stable").head(ROWS) if len(own) else own
    rows = [
        [
            *(str(row[name]) for name in axes),
            str(row["seed"]),
            f"{row['layer']}.{row['head']}",
            str(row["status"]).replace("_", " "),
            "yes" if row["detector"] else "no",
            interval_text(row, "level", "level_low", "level_high"),
            interval_text(row, "t50", "low", "high"),
            *(number_text(row[name]) for name in ("lift_peak", "lift_end", "lift_rows_peak")),
            number_text(row.get("pattern_share"), ".1%"),
            "yes" if row.get("matters") else "no",
        ]
        for row in top.to_dict("records")
    ]
    title = f"Heads on “{sweep.system.relation}”, highest peak lift first"
    return Table(title=title, columns=columns, rows=rows, note=more(len(own), len(rows), "heads.parquet"))


def width_rows(sweep: Sweep, analysis: Analysis) -> Table:
    """Points along the axes, the judged relation first."""
    axes = list(sweep.axis_names)
    columns = [*axes, "relation", "members", "without detector", "heads", *(s.replace("_", " ") for s in STATUSES),
               "share risen", "level", "median level", "t50"]  # fmt: skip
    table = analysis.widths
    if len(table):
        table = table.loc[(table["relation"] != sweep.system.relation).sort_values(kind="stable").index]
    rows = [
        [
            *(
                str(row[name])
                for name in [*axes, "relation", "members", "members_without_detector", "heads", *STATUSES]
            ),
            f"{number_text(row['share_risen'], '.0%')} ({number_text(row['share_low'], '.0%')}–"
            f"{number_text(row['share_high'], '.0%')})",
            interval_text(row, "level", "level_low", "level_high"),
            step_text(row.get("level_median")),
            interval_text(row, "t50", "t50_low", "t50_high"),
        ]
        for row in table.head(ROWS).to_dict("records")
    ]
    note = (
        f"In brackets: {CONFIDENCE:.0%} intervals over members. Level: geometric mean over members with a detector; "
        "its median is over all finished members, where those without one count as later (∞: half of them or more). "
    ) + more(len(table), len(rows), "widths.parquet")
    return Table(title="Points of the sweep", columns=columns, rows=rows, note=note)


def member_rows(sweep: Sweep, analysis: Analysis) -> Table:
    """Finished members."""
    axes = list(sweep.axis_names)
    columns = [*axes, "seed", "level", "best head", "detectors", "risen", "heads that matter", "validation loss", "run"]
    table = analysis.members
    table = table[table["outcome"] == "finished"] if len(table) else table
    rows = [
        [
            *(str(row[name]) for name in [*axes, "seed"]),
            interval_text(row, "level", "level_low", "level_high"),
            str(row.get("best_head") or DASH),
            *(number_text(row.get(name), ".0f") for name in ("detectors", "risen", "heads_that_matter")),
            number_text(row.get("validation_loss"), ".4g"),
            str(row["run_id"]),
        ]
        for row in table.head(FEW_ROWS).to_dict("records")
    ]
    return Table(
        title="Finished members", columns=columns, rows=rows, note=more(len(table), len(rows), "members.parquet")
    )


def lost_rows(sweep: Sweep, analysis: Analysis) -> Table:
    """Members that failed or diverged, with their causes."""
    axes, table = list(sweep.axis_names), analysis.members
    table = table[table["outcome"] != "finished"] if len(table) else table
    rows = [
        [
            *(str(row[name]) for name in [*axes, "seed", "outcome"]),
            str(row["cause"])[:CAUSE] or "not recorded",
            str(row["run_id"]),
        ]
        for row in table.head(FEW_ROWS).to_dict("records")
    ]
    title, columns = "Members without a result", [*axes, "seed", "outcome", "cause", "run"]
    return Table(title=title, columns=columns, rows=rows, note=more(len(table), len(rows), "members.parquet"))
