"""The report's section on axes other than width: each of their values against the first, and whether a difference is
shown."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cluster.analysis import Analysis
from cluster.compare import ALPHA, LATER, QUANTITIES, Row, Side, adjusted, cell, compare, is_paired, least_p
from cluster.figures import COLOURS, GREY, INK, new_figure, plain
from cluster.findings import ROWS, Table, evenly, more, number_text, plural
from cluster.intervals import CONFIDENCE
from cluster.page import Section, take_picture
from cluster.sweep import Sweep
from cluster.widths import values_along

AXES_PANELS = 2
LINES, DRAWN = 12, 20  # contrasts that are put into words, and that are drawn
MOST = 36  # contrasts that are worked out: about half a second each
LEVEL, SHARE = (item for item in QUANTITIES if item.name in ("level", "share_risen"))
WORDS = {LEVEL.words: "of the level", SHARE.words: "of the share of heads that rose", LATER: "of whether and when"}
Setting = Mapping[str, Any]
"""Values by axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Members of one setting against those of the first one. where: the other axes that vary, at the same values."""

    base: Setting
    other: Setting
    where: Setting
    paired: bool
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """`model.splitting strang, model.attention local against lie, global at width 32`."""
        place = f" at {told(self.where)}" if self.where else ""
        return f"{told(self.other)} against {', '.join(map(str, self.base.values()))}{place}"

    @property
    def short(self) -> str:
        """For a figure: `splitting strang, attention local`."""
        return told({name.rpartition(".")[2]: value for name, value in {**self.where, **self.other}.items()})

    def row(self, quantity: str) -> Row:
        """Of that quantity, by its words."""
        return next(row for row in self.rows if row.quantity == quantity)

    @property
    def line(self) -> str:
        """One sentence."""
        level, share, later = (self.row(words) for words in (LEVEL.words, SHARE.words, LATER))
        parts = []
        if math.isfinite(level.gap[0]):
            count = f"{level.n_b:,} and {level.n_a:,} members with a detector"
            times = f"the level is {cell(level.gap, 'log', ratio=True)} times as late ({count})"
            parts.append(f"{times}, {self.verdict(level)}")
        else:
            parts.append("levels are not compared, as a side has no member with a detector")
        if math.isfinite(share.gap[0]):
            gap = cell(share.gap, "part", ratio=True)
            parts.append(f"the share of heads that rose differs by {gap}, {self.verdict(share)}")
        parts.append(f"whether and when together, {self.verdict(later)}")
        return f"{self.name}: {'; '.join(parts)}."

    def verdict(self, row: Row) -> str:
        """Whether a difference is shown, or could have been with so few members."""
        if row.reason:
            return f"not tested ({row.reason})"
        found = f"(p = {number_text(row.p, '.2g')}, adjusted {number_text(row.adjusted, '.2g')})"
        if row.shown:
            return f"a difference is shown {found}"
        if row.p <= least_p(row.n_a, row.n_b, row.pairs) * (1 + 1e-9):
            return f"no difference is shown, but so few members can give no lower p {found}"
        return f"no difference is shown {found}"


def told(setting: Setting) -> str:
    """In words, as points are labelled."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def families(varying: Sequence[str]) -> list[tuple[str, ...]]:
    """The axes whose combined values are settled against each other: one or two together, more of them one by one."""
    return [tuple(varying)] if len(varying) <= 2 else [(name,) for name in varying]


def settings(values: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Iterator[Setting]:
    """All combinations, the last axis fastest."""
    for chosen in itertools.product(*(values[name] for name in names)):
        yield dict(zip(names, chosen, strict=True))


def plan_contrasts(sweep: Sweep, analysis: Analysis) -> list[tuple[Setting, Setting, Setting]]:
    """(first setting, other setting, where) of every contrast for which there are finished members. The first one is
    that of the sweep's first values, or the next one that has members."""
    table = analysis.members
    if table.empty or analysis.heads.empty:
        return []
    table = table[table["outcome"] == "finished"]
    values = {name: values_along(sweep, name, table[name].tolist()) for name in sweep.axis_names}
    varying = [name for name in sweep.axis_names if len(values[name]) > 1]
    compared = [name for name in varying if name != "width"]
    known = set(table[varying].itertuples(index=False, name=None)) if compared else set()
    found = []
    for family in families(compared) if compared else []:
        for where in settings(values, [name for name in varying if name not in family]):
            here = [
                own for own in settings(values, family) if tuple({**where, **own}[name] for name in varying) in known
            ]
            found += [(here[0], other, where) for other in here[1:]]
    return found


def find_contrasts(sweep: Sweep, analysis: Analysis, most: int = MOST) -> list[Contrast]:
    """Evenly chosen where there are more; p-values adjusted to false discovery rates over all of them together."""
    found = list[Contrast]()
    for base, other, where in evenly(plan_contrasts(sweep, analysis), most):
        a, b = (
            Side(label=label, sweep=sweep, analysis=analysis, fixed={**where, **own}, link="")
            for label, own in (("A", base), ("B", other))
        )
        rows = compare(a, b, (LEVEL, SHARE))
        found.append(Contrast(base=base, other=other, where=where, paired=is_paired(a, b), rows=rows))
    every = iter(adjusted([row for contrast in found for row in contrast.rows]))
    return [replace(contrast, rows=[next(every) for _ in contrast.rows]) for contrast in found]


@dataclass(frozen=True)
class AxesSection:
    """Makes the section and its table; the figure goes into the folder."""

    folder: Path
    sweep: Sweep
    analysis: Analysis

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Worked out once."""
        return find_contrasts(self.sweep, self.analysis)

    def sections(self) -> list[Section]:
        """None where no axis but width varies."""
        found = self.contrasts
        if not found:
            return []
        names = list(dict.fromkeys(name for contrast in found for name in contrast.other))
        text = (
            "Each setting against the first, with everything else equal. A ratio of levels, over members with a "
            "detector, says when detectors come where they come; the share of heads that rose says whether; the "
            "last test asks both at once and counts members without a detector as later than the end of the runs."
        )
        section = Section(title=f"Differences by {' and '.join(names)}", text=text, lines=self.lines())
        drawn = evenly(found, DRAWN)
        caption = (
            f"Each setting against the first ({self._bases()}; grey line). Diamonds: ratio of geometric mean levels, "
            f"and difference of mean shares; bars: {CONFIDENCE:.0%} intervals, {self._how()}. Filled: a difference is "
            "shown."
            + (f" Of {len(found):,} contrasts {len(drawn)} are drawn, evenly chosen." if len(found) > DRAWN else "")
        )
        alt = "Ratio of levels and difference of shares, each setting against the first"
        section.pictures = [take_picture(self.folder, "contrasts", draw_contrasts(drawn), caption, alt)]
        return [section]

    def _bases(self) -> str:
        bases = list(dict.fromkeys(told(contrast.base) for contrast in self.contrasts))
        return bases[0] if len(bases) == 1 else "; ".join(bases[:4])

    def _how(self) -> str:
        paired = {contrast.paired for contrast in self.contrasts}
        if paired == {False}:
            return "Welch's t over members"
        words = "Student t over the differences of seeds, which share their data order"
        return words if paired == {True} else f"{words}; Welch's over members where they do not"

    def lines(self) -> list[str]:
        """What is shown, in all and then one by one."""
        found, total = self.contrasts, len(plan_contrasts(self.sweep, self.analysis))
        tested = [row for contrast in found for row in contrast.rows if not row.reason]
        shown = Counter(row.quantity for row in tested if row.shown)
        parts = [f"{WORDS[words]} in {shown[words]:,}" for words in WORDS]
        if not tested:
            return ["No difference can be tested.", *self._each(found)]
        how = sorted({"within seeds" if contrast.paired else "between settings" for contrast in found})
        lines = [
            f"Of {plural(len(found), 'contrast')} a difference is shown {', '.join(parts)}; p by exchanging members "
            f"{' or '.join(how)}, at a false discovery rate of {ALPHA:.0%} over {plural(len(tested), 'test')}. A "
            "difference that is not shown is not excluded: its interval says how large it may be."
        ]
        least = [
            [least_p(row.n_a, row.n_b, row.pairs) for row in contrast.rows if not row.reason] for contrast in found
        ]
        powerless = sum(bool(each) and min(each) >= ALPHA for each in least)
        if powerless:
            which = "any contrast" if powerless == len(found) else plural(powerless, "contrast")
            lines.append(f"There are too few members to show a difference in {which}, however large it is.")
        if total > len(found):
            lines.append(f"Of {total:,} contrasts {len(found)} were made, evenly chosen.")
        return [*lines, *self._each(found)]

    def _each(self, found: Sequence[Contrast]) -> list[str]:
        rest = len(found) - LINES
        more_lines = [f"{plural(rest, 'further contrast')} in the table “Contrasts”."] if rest > 0 else []
        return [*(contrast.line for contrast in found[:LINES]), *more_lines]

    def tables(self) -> list[Table]:
        """All contrasts, a row a quantity."""
        columns = ("setting", "against", "at", "quantity", "members", "first setting", "this one", "ratio (x), or "
                   "difference", "p", "adjusted", "shown")  # fmt: skip
        rows = [
            [
                told(contrast.other),
                told(contrast.base),
                told(contrast.where) or "all members",
                row.quantity,
                f"{row.n_a:,}, {row.n_b:,}",
                cell(row.a, row.scale),
                cell(row.b, row.scale),
                ("x " if row.scale == "log" else "") + cell(row.gap, row.scale, ratio=True),
                number_text(row.p, ".2g"),
                number_text(row.adjusted, ".2g"),
                row.reason or ("yes" if row.shown else "no"),
            ]
            for contrast in self.contrasts
            for row in contrast.rows
        ]
        if not rows:
            return []
        note = more(len(rows), min(len(rows), ROWS), "what `headway compare SWEEP@AXIS=VALUE SWEEP@AXIS=VALUE` tells")
        return [Table(title="Contrasts", columns=columns, rows=rows[:ROWS], note=note)]


def draw_contrasts(contrasts: Sequence[Contrast]) -> Figure:
    """Ratio of levels (left) and difference of the share of heads that rose (right), one row a contrast."""
    figure, ((left, right),) = new_figure(1, 2, 1.5 + 0.42 * len(contrasts), sharey=True)
    y = np.arange(len(contrasts))
    for ax, item, none in ((left, LEVEL, 1.0), (right, SHARE, 0.0)):
        ax.axvline(none, color=GREY, lw=0.9, zorder=0)
        for at, contrast in zip(y, contrasts, strict=True):
            row = contrast.row(item.words)
            middle, low, high = row.gap
            if not math.isfinite(middle):
                ax.annotate("no value", (0.01, at), xycoords=("axes fraction", "data"), fontsize=8, va="center")
                continue
            ax.hlines(at, low, high, color=COLOURS[0], lw=2.2)
            ax.plot(middle, at, "D", ms=6.5, mec=COLOURS[0], mfc=COLOURS[0] if row.shown else "white", zorder=3)
    left.set_xscale("log")
    known = [contrast for contrast in contrasts if math.isfinite(contrast.row(LEVEL.words).gap[0])]
    low, high = left.get_xlim() if known else (1.0, 1.0)
    left.set_xlim(min(low, 1 / 1.3), max(high, 1.3))
    left.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    left.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}%" if value else "0"))
    low, high = right.get_xlim()
    right.set_xlim(min(low, -0.05), max(high, 0.05))
    left.set_yticks(y, [plain(contrast.short) for contrast in contrasts], fontsize=8.5)
    left.set_ylim(len(contrasts) - 0.4, -0.6)
    left.set_title("level: times that of the first setting", fontsize=10, loc="left", color=INK)
    right.set_title("share of heads that rose, less that of the first", fontsize=10, loc="left", color=INK)
    left.set_xlabel("ratio (log scale); above 1: later", fontsize=9.5)
    right.set_xlabel("difference", fontsize=9.5)
    return figure
