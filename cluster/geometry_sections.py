"""The report's section on degenerate geometry: coefficients of heads that emerged and that did not, estimates of k."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cluster.analysis import Analysis, DenseCurve, along_steps, dense
from cluster.findings import DASH, Table, interval, number_text, plural
from cluster.geometry import METHODS, NEARBY
from cluster.geometry_figures import GROUPS, PHASES, HeadPlot, PhaseMean, draw_heads, draw_phases
from cluster.intervals import CONFIDENCE, mean_interval
from cluster.laws import FIGURE
from cluster.page import Section, take_picture
from cluster.sweep import Sweep
from probes.attention import lift
from probes.llc import DEPENDS, TOLERANCE, UNSURE

EMERGED, NEVER = 6, 3  # heads drawn, at most
WIDTHS = 6  # drawn, at most
GEOMETRY_PANELS = 2 * (EMERGED + NEVER) + WIDTHS
REASONS = 3  # named, of why estimates are not sound
THREE = ".3g"  # figures
ROSE = ("emerged", "growing", "transient")
HEAD = ["member_id", "layer", "head"]
TITLE = "Degenerate geometry"
Interval = tuple[float, float, float]


def not_falling(llc: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of those members and steps at which the median over heads is not below 0, and a line on the others.

    An estimate below 0 says that lower losses lie near by: early in training there is no minimum to speak of, and how
    far below 0 it comes out is no geometry. Steps are left out whole, so that no head is picked by its own value.
    """
    place = ["member_id", "step"]
    falling = llc.groupby(place)["llc"].transform("median") < 0.0
    if not falling.any():
        return llc, ""
    out = llc[falling]
    line = (
        f"At {plural(len(out[place].drop_duplicates()), 'step')} of {plural(out['member_id'].nunique(), 'member')} "
        f"(all at or before step {out['step'].max():,}) most estimates are below 0, as lower losses lie near by: these "
        "steps are left out of the figures and of what follows."
    )
    return llc[~falling], line


def by_phase(llc: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """Mean coefficients of members' heads by width, member, group and phase, from rows over the same tokens.

    group: heads that emerged (or were growing, or transient) and heads that never did; at_start ones are left out.
    phase: `before`, up to t10; `during`, up to t90; `after`. Heads that never emerged have the median t10 and t90 of
    those of their member that did, and no rows where none did.
    """
    facts = heads[[*HEAD, "status", "t10", "t90"]]
    rows = llc[np.isfinite(llc["llc"])].merge(facts, on=HEAD)
    rows["group"] = rows["status"].map({**dict.fromkeys(ROSE, GROUPS[0]), "never": GROUPS[1]})
    rows = rows.dropna(subset="group")
    rose = facts[facts["status"].isin(ROSE)].groupby("member_id")[["t10", "t90"]].median()
    for name in ("t10", "t90"):
        theirs = rows["member_id"].map(rose[name])
        rows[name] = rows[name].where(rows["group"] == GROUPS[0], theirs)
    rows = rows.dropna(subset=["t10", "t90"])
    late = (rows["step"] > rows["t10"]).astype(int) + (rows["step"] > rows["t90"])
    rows["phase"] = late.map(dict(enumerate(PHASES)))
    own = rows.groupby(["width", *HEAD, "group", "phase"], as_index=False)["llc"].mean()
    means: pd.DataFrame = own.groupby(["width", "member_id", "group", "phase"], as_index=False)["llc"].mean()
    return means


def phase_means(phases: pd.DataFrame) -> list[PhaseMean]:
    """Means over members with their intervals."""
    groups: Any = phases.groupby(["width", "group", "phase"])["llc"]
    return [
        PhaseMean(width, group, phase, *mean_interval(own.tolist()), len(own)) for (width, group, phase), own in groups
    ]


def paired(phases: pd.DataFrame, width: float, columns: str, first: Any, second: Any, **fixed: str) -> Interval:
    """Mean over members of first - second, two values of a column, where a member has both; and its interval."""
    own = phases[phases["width"] == width]
    for name, value in fixed.items():
        own = own[own[name] == value]
    wide = own.pivot_table(index="member_id", columns=columns, values="llc")
    if not {first, second} <= set(wide):
        return math.nan, math.nan, math.nan
    return mean_interval((wide[first] - wide[second]).dropna().tolist())


def settings_text(llc: pd.DataFrame) -> str:
    """What estimates rest on."""

    def values(name: str) -> str:
        known = sorted(llc[name].dropna().unique().tolist())
        return f"{known[0]:,.6g}" + (f" to {known[-1]:,.6g}" if len(known) > 1 else "") if known else "none"

    sigma = f"sigma = {values('sigma')}" if llc["sigma"].notna().any() else "no sigma: the loss is taken as it is"
    return (
        f"n = {values('n')}, n_beta = {values('n_beta')}, gamma = {values('gamma')}, {sigma}, "
        f"{values('chains')} chains x {values('draws')} draws"
    )


def phase_lines(phases: pd.DataFrame, level: pd.DataFrame | None = None) -> list[str]:
    """Heads that emerged against heads that did not, width by width, and in one sentence over all widths.

    level: the same phases with what the slope at each point takes off added back; a claim is made if it holds of both.
    """
    if phases.empty:
        return ["No member has a head that emerged and was measured, so there is no before and after to compare."]
    means = {(each.width, each.group, each.phase): each for each in phase_means(phases)}
    lines, contrasts = [], phase_contrasts(phases)
    for width, (difference, change) in contrasts.items():
        parts = []
        for phase in PHASES:
            both = [means.get((width, group, phase)) for group in GROUPS]
            told = [f"{group} {interval(each[3:6], THREE)}" for group, each in zip(GROUPS, both, strict=True) if each]
            parts += [f"{phase} emergence: {', '.join(told)}"] if told else []
        members = phases.loc[phases["width"] == width, "member_id"].nunique()
        lines.append(
            f"Width {width:g}, {plural(members, 'member')}: {'; '.join(parts)}. Within members, emerged less never "
            f"after emergence: {interval(difference, THREE)}; emerged heads, after less before: "
            f"{interval(change, THREE)}."
        )
    found = list(contrasts.values())
    held = [] if level is None else list(phase_contrasts(level).values())
    return [
        sentence([each for each, _ in found], [each for each, _ in held],
                 "After emergence, heads that emerged have {} coefficients {} heads of the same "
                 "member that never did",
                 "whether coefficients of heads that emerged differ from those of heads that never did"),
        sentence([each for _, each in found], [each for _, each in held],
                 "Coefficients of heads that emerge are {} after emergence {} before it",
                 "whether coefficients of heads that emerge change from before to after"),
        *lines,
    ]  # fmt: skip


def phase_contrasts(phases: pd.DataFrame) -> dict[float, tuple[Interval, Interval]]:
    """By width, within members: heads that emerged less heads that never did, after emergence; and heads that emerged,
    after less before it."""
    return {
        width: (
            paired(phases, width, "group", *GROUPS, phase=PHASES[2]),
            paired(phases, width, "phase", PHASES[2], PHASES[0], group=GROUPS[0]),
        )
        for width in sorted(phases["width"].unique())
    }


def sentence(found: Sequence[Interval], level: Sequence[Interval], claim: str, question: str) -> str:
    """One claim over all widths, made only if its sign is sure at each; level: the same with slopes' share added."""
    signs = {int(low > 0) - int(high < 0) for _, low, high in found}
    over = f"at {'the one width' if len(found) == 1 else f'each of {len(found)} widths'}"
    if not any(math.isfinite(low) for _, low, _ in found):
        return f"It cannot be said {question}: no width has two members with both."
    if signs in ({1}, {-1}):
        words = claim.format(*(("higher", "than") if signs == {1} else ("lower", "than")))
        kept = {int(low > 0) - int(high < 0) for _, low, high in level} in (signs, set())
        if not kept:
            return f"{words}, {over}; but not so once what slopes take off is added back: they alone may make it so."
        also = ", also with what slopes take off added back" if level else ""
        return f"{words}, {over} ({CONFIDENCE:.0%} intervals over members exclude 0{also})."
    if {1, -1} <= signs:
        return f"Widths differ in {question}: the sign is not the same at all of them."
    return f"It is not shown {question}: not at every width is there a {CONFIDENCE:.0%} interval that excludes 0."


def convergence_line(llc: pd.DataFrame) -> str:
    """How many estimates are sound and why the others are not, and how many hardly depend on n_beta and gamma."""
    held, sound = int(llc["converged"].sum()), int(llc["sound"].sum())
    text = f"{sound:,} of {plural(len(llc), 'estimate')} ({settings_text(llc)}) are sound at these settings"
    kinds = commonest(llc.loc[~llc["sound"], "reason"].str.split("; ").explode())
    kinds = [(reason, count) for reason, count in kinds if not reason.startswith((DEPENDS, UNSURE))]
    if kinds:
        named = "; ".join(f"{reason} ({count:,})" for reason, count in kinds[:REASONS])
        text += f" (of the others: {named}" + (", and other reasons)" if len(kinds) > REASONS else ")")
    moved = llc.loc[llc["sound"], list(NEARBY)].div(llc.loc[llc["sound"], "llc"], axis=0)
    if not moved.notna().any(axis=None):
        return f"{text}; how far they depend on n_beta and gamma was not looked at."
    told = ", ".join(f"{moved[column].median() - 1:+.0%} at {name}" for column, name in NEARBY.items())
    return (
        f"{text}; {held:,} of these are converged: they also change by less than {TOLERANCE:.0%} at n_beta and gamma x "
        f"1/3 and x 3 (median changes: {told})."
    )


def commonest(reasons: pd.Series[str]) -> list[tuple[str, int]]:
    """Kinds of reasons with their counts, most first: alike but for their figures, which are shown if all the same."""
    kinds = reasons.str.replace(r"[-+]?" + FIGURE + "%?", "…", regex=True)
    found = [(str(kind), reasons[kinds == kind]) for kind in kinds.value_counts().index]
    return [(str(own.iloc[0]) if own.nunique() == 1 else kind, len(own)) for kind, own in found]


def agreement_lines(degrees: pd.DataFrame) -> list[str]:
    """Whether estimates of k agree, pair by pair of methods over heads; the loss gap counts for all of its member."""
    told = degrees[(degrees["refusal"] == "") & np.isfinite(degrees["k"])]
    every = degrees.loc[degrees["layer"] >= 0, HEAD].drop_duplicates()
    whole = told[told["layer"] < 0].drop(columns=["layer", "head"]).merge(every, on="member_id")
    by_method = dict(list(pd.concat([told[told["layer"] >= 0], whole]).set_index(HEAD).groupby("method")))
    lines, shares = [], []
    for one, other in itertools.combinations([method for method in METHODS if method in by_method], 2):
        pairs = by_method[one].join(by_method[other], rsuffix="_other", how="inner")
        if len(pairs):
            overlap = (pairs["low"] <= pairs["high_other"]) & (pairs["low_other"] <= pairs["high"])
            shares.append(float(overlap.mean()))
            members = pairs.index.get_level_values("member_id").nunique()
            lines.append(
                f"{one} and {other}: {plural(len(pairs), 'head')} of {plural(members, 'member')} with both; intervals "
                f"overlap in {int(overlap.sum()):,} (medians of k: {pairs['k'].median():.3g} and "
                f"{pairs['k_other'].median():.3g})."
            )
    if not lines:
        return ["Estimates of k: no two methods give estimates of the same head: nothing to compare."]
    agree = sum(share >= CONFIDENCE for share in shares)
    verdict = f"Estimates of k: of {plural(len(lines), 'pair')} of methods {agree:,} agree"
    return [f"{verdict} (intervals overlap in at least {CONFIDENCE:.0%} of heads).", *lines]


def degree_table(degrees: pd.DataFrame) -> Table:
    """Estimates of k side by side."""
    columns = [
        "method",
        "median k",
        "interquartile range",
        "with an estimate",
        "refused",
        "commonest reason",
        "assumption",
    ]
    rows = []
    for method in METHODS:
        for assumption, own in degrees[degrees["method"] == method].groupby("assumption"):
            told = own.loc[own["refusal"] == "", "k"]
            refusals = commonest(own.loc[own["refusal"] != "", "refusal"].str.split("; ").str[0])
            spread = (number_text(float(told.quantile(q))) for q in (0.25, 0.75))
            rows.append(
                [
                    method,
                    number_text(float(told.median())) if len(told) else DASH,
                    " to ".join(spread) if len(told) else DASH,
                    f"{len(told):,}",
                    f"{len(own) - len(told):,}",
                    f"{refusals[0][0]} ({refusals[0][1]:,})" if refusals else DASH,
                    str(assumption),
                ]
            )
    note = (
        "Every estimate assumes something else, and they need not agree. One a head; the loss gap is one a member. "
        "Each head's own interval is in degrees.parquet."
    )
    return Table(title="Estimates of the degree k of heads' potentials, u|x|^k", columns=columns, rows=rows, note=note)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeometrySection:
    """Makes the section from the tables of an analysis. load: curves of a member by run id, called at most 6 times."""

    folder: Path
    sweep: Sweep
    analysis: Analysis
    load: Callable[[str], pd.DataFrame]

    @property
    def judged(self) -> pd.DataFrame:
        """Heads on the relation that the sweep is judged by."""
        heads = self.analysis.heads
        return heads[heads["relation"] == self.sweep.system.relation] if len(heads) else heads

    def all(self) -> list[Section]:
        """The section, where anything was measured."""
        llc, degrees = self.analysis.llc, self.analysis.degrees
        if llc.empty or self.judged.empty:
            empty = Section(title=TITLE, text="Nothing that was measured counts.", lines=list(self.analysis.left_out))
            return [empty] if empty.lines else []
        section = Section(
            title=TITLE,
            text="Do heads emerge together with a change in the geometry of the loss? A head's refined learning "
            "coefficient, n_beta (E[L(w)] - L(w*)), is by how much the loss rises when that head's weights alone "
            "wander about the point where training was: the more degenerate the loss in them, the smaller it is. At "
            "finite n_beta and gamma it is no exponent; it is compared between heads and steps at the same settings: "
            f"{settings_text(llc)}.",
        )
        for tokens, own in llc.groupby("tokens"):
            resting, left_out = not_falling(own)
            phases = by_phase(resting, self.judged)
            start = "" if llc["tokens"].nunique() == 1 else f"Loss over {tokens} tokens: "
            level = by_phase(resting.assign(llc=resting["llc"] + resting["slope"]), self.judged)
            told = [convergence_line(own), left_out, *phase_lines(phases, level)]
            section.lines += [start + line for line in told if line]
        section.lines += [*self.analysis.left_out, *(agreement_lines(degrees) if len(degrees) else [])]
        first, _ = not_falling(llc[llc["tokens"] == llc["tokens"].min()])
        self._draw_heads(section, first)
        self._draw_phases(section, first)
        return [section]

    def tables(self) -> list[Table]:
        """Estimates of k, where there are any."""
        return [degree_table(self.analysis.degrees)] if len(self.analysis.degrees) else []

    def _draw_heads(self, section: Section, llc: pd.DataFrame) -> None:
        rows = list(chosen_heads(self.judged, llc))
        curves = {run: dense(self.load(run), "attention") for run in dict.fromkeys(str(row["run_id"]) for row in rows)}
        plots = [self._plot(row, llc, curves[str(row["run_id"])]) for row in rows]
        if plots:
            rose = sum(row["status"] in ROSE for row in rows)
            caption = (
                f"Width {llc['width'].max():g}. Above: lift over training, smoothed. Below: the refined coefficient of "
                f"the same head ({settings_text(llc)}), mean and {CONFIDENCE:.0%} interval over chains; hollow where "
                f"it is not sound. Grey: from t10 to t90. {plural(rose, 'head')} that emerged, of highest peak "
                f"lift, and {len(rows) - rose} that never did."
            )
            alt = "Lift and refined learning coefficient of heads against step"
            section.pictures.append(take_picture(self.folder, "geometry_heads", draw_heads(plots), caption, alt))

    def _plot(self, row: Mapping[str, Any], llc: pd.DataFrame, curve: DenseCurve) -> HeadPlot:
        at = (slice(None), int(row["layer"]), int(row["head"]), curve.relations.index(self.sweep.system.relation))
        own = llc[(llc[HEAD] == [row[name] for name in HEAD]).all(axis=1)].sort_values("step")
        return HeadPlot(
            title=f"seed {row['seed']}, head {row['layer']}.{row['head']}: {row['status']}",
            steps=curve.steps,
            lift=along_steps(lift(curve.values["score"][at], curve.values["null_uniform"][at])),
            at=own["step"].to_numpy(),
            llc=own[["llc", "low", "high"]].to_numpy(float).T,
            sound=own["sound"].to_numpy(bool),
            span=(float(row["t10"]), float(row["t90"])),
        )

    def _draw_phases(self, section: Section, llc: pd.DataFrame) -> None:
        means = phase_means(by_phase(llc, self.judged))
        widths = sorted({each.width for each in means})[-WIDTHS:]
        if widths:
            caption = (
                f"Mean refined coefficient ({settings_text(llc)}) of heads that emerged, and of heads of the same "
                "members that never did, at the kept steps up to t10, from t10 to t90 and after (of the latter: at "
                f"the median t10 and t90 of the former). Means over members, with {CONFIDENCE:.0%} Student-t intervals "
                "over members; numbers of members beside the marks."
            )
            figure = draw_phases([each for each in means if each.width in widths], widths)
            alt = "Mean refined coefficient before, during and after emergence"
            section.pictures.append(take_picture(self.folder, "geometry_phases", figure, caption, alt))


def chosen_heads(heads: pd.DataFrame, llc: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Measured heads of the largest width: those of highest peak lift that emerged, then others of their members."""
    measured = heads.merge(llc[HEAD].drop_duplicates(), on=HEAD)
    measured = measured[measured["width"] == llc["width"].max()].sort_values(
        "lift_peak", ascending=False, kind="stable"
    )
    rose = measured[measured["status"].isin(ROSE)].head(EMERGED)
    never = measured[measured["status"] == "never"]
    among = never["member_id"].isin(rose["member_id"]) if len(rose) else never["member_id"] == never["member_id"].min()
    for row in [*rose.to_dict("records"), *never[among].head(NEVER).to_dict("records")]:
        yield {str(name): value for name, value in row.items()}
