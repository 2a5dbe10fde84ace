"""The report's sections on what holds across a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, logit

from cluster import claims, law_figures
from cluster.figures import COLOURS, Array
from cluster.intervals import CONFIDENCE
from cluster.law_figures import Estimate, Line, Scaled, Spread, Stairs, TailPlot
from cluster.laws import HEADS, MEMBERS, RATE, Law, Series, detector_curves, power_laws
from cluster.page import Section, take_picture
from probes.emergence import LEVEL_LIFT

EXPONENT = ("relaxation", "relaxation_low", "relaxation_high")
FEWEST = 3  # exponents that are drawn
LINES, FEW_LINES = 12, 4  # series that are put into words: one sentence each, or several
SURVIVAL, TAILS, COLLAPSES = 6, 3, 2  # series that are drawn
LAW_PANELS = 3 + SURVIVAL + 1 + TAILS + 2 * COLLAPSES


def numbers(values: Sequence[Any]) -> Array:
    """Plain numbers as an array, None as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def several_widths(laws: Sequence[Law]) -> bool:
    """Whether any series has more than one."""
    return any(len(found["widths"]) > 1 for found in laws)


@dataclass(frozen=True, kw_only=True, slots=True)
class LawSections:
    """Makes the sections from laws and the members that they are about, by name; figures go into the folder."""

    folder: Path
    laws: Sequence[Law]
    series: Mapping[str, Series]
    failed: Mapping[str, str] = field(default_factory=dict)

    def all(self) -> list[Section]:
        """In the order of the page; none without a series."""
        if not self.laws:
            return []
        if several_widths(self.laws):
            return [self.widths(), self.survival(), self.relaxation(), self.tails(), self.collapse(), self.matter()]
        survival = self.survival()
        survival.lines = self.causes()  # one width: no law of width, no widths to compare
        if not survival.pictures:
            reasons = {curve["refusal"]: None for found in self.laws for curve in found[HEADS]["survival"].values()}
            survival.lines.append(f"No curve is drawn: {'; '.join(reasons)}.")
        return [survival, self.relaxation(), self.tails(), self.matter()]

    def causes(self) -> list[str]:
        """Why some series have no laws."""
        return [f"{name}: could not be worked out: {cause}" for name, cause in self.failed.items()]

    def section(self, title: str, text: str, line: Callable[[Law], str], first: Sequence[str] = ()) -> Section:
        """A section with a line for each series."""
        lines = [*first, *(line(found) for found in claims.ordered(self.laws, LINES))]
        if len(self.laws) > LINES:
            lines.append(f"{len(self.laws) - LINES:,} further series are in sweep.json.")
        return Section(title=title, text=text, lines=lines)

    def draw(self, section: Section, name: str, figure: Figure, caption: str, alt: str) -> None:
        """Add a picture."""
        section.pictures.append(take_picture(self.folder, name, figure, caption, alt))

    def widths(self) -> Section:
        """Whether and when, side by side."""
        first = [claims.verdict(self.laws, endpoint) for endpoint in (MEMBERS, HEADS)]
        swept = sorted({rate for each in self.series.values() if RATE in each.members for rate in each.members[RATE]})
        first += [claims.rates_line(found, swept) for found in self.laws if found["rates"]]
        first += self.causes()
        shown = claims.ordered(self.laws, FEW_LINES)
        first += [claims.law_line(found, endpoint) for endpoint in (MEMBERS, HEADS) for found in shown]
        if len(self.laws) > len(shown):
            first.append(f"All {len(self.laws):,} series stand in the table “Laws of width”.")
        section = Section(
            title="Laws of width",
            text="Whether heads emerge and when they do are fitted together, as redundant heads that never emerge, "
            "taken as merely late, would fake a law. The level of each member's best detector is the endpoint; heads' "
            "own levels come second. A law is claimed only if it holds in every series: at every learning rate, at "
            "each width's best one, and under every parametrization that was swept.",
            lines=first,
        )
        shown = claims.ordered(self.laws, len(COLOURS))
        widths = sorted({width for found in shown for width in found["widths"]})
        if len(widths) > 1:
            caption = (
                f"Left: share of a member's heads with a level (mean and {CONFIDENCE:.0%} interval over members; "
                "lines: the fitted share that ever emerges). Middle: geometric mean of the level of best detectors, "
                "with its interval (lines: fitted laws, where there are any). Right: heads a member whose looking "
                "matters. Series stand a little apart so that they can be told."
                + (f" Of {len(self.laws):,} series {len(shown):,} are drawn." if len(self.laws) > len(shown) else "")
            )
            titles = ("heads with a level", "level of the best detector", "heads that matter")
            figure = law_figures.draw_lines([line_of(found) for found in shown], widths, titles)
            self.draw(section, "laws", figure, caption, "Share, time and heads that matter against width")
        return section

    def survival(self) -> Section:
        """Kaplan-Meier curves of heads."""
        section = self.section(
            "Heads that have not emerged yet",
            "Kaplan-Meier curves of the level over all heads. Where a curve ends is the share that had not got there "
            "when the runs ended, whether they never will or are late; curves further to the left are of earlier ones.",
            claims.survival_line,
        )
        panels = []
        for found in claims.ordered(self.laws, SURVIVAL):
            curves = {float(width): curve for width, curve in found[HEADS]["survival"].items() if not curve["refusal"]}
            stairs = [
                Stairs(width, *(numbers(curve[key]) for key in ("times", "survival", "low", "high")))
                for width, curve in curves.items()
            ]
            panels += [(claims.named(found), stairs, found["last"])] if stairs else []
        if panels:
            caption = (
                f"Steps: share of heads that have not reached lift {LEVEL_LIFT:g}. Bands: {CONFIDENCE:.0%} intervals "
                "by a jackknife over independent members (or seeds), point by point."
            )
            figure = law_figures.draw_survival(panels, "heads")
            self.draw(section, "survival", figure, caption, "Survival curves of heads by width")
        return section

    def relaxation(self) -> Section:
        """Exponents of the approach to the plateau."""
        section = self.section(
            "Approach to the plateau",
            "From t50 to the end: s_inf - s = A (t - t0)^-a against an exponential and two logistic curves, with "
            "origin and plateau fitted, not read off. Under Adam the exponent is descriptive: it says how curves end, "
            "not which degree the loss has.",
            claims.relaxation_line,
        )
        told = max(self.laws, key=lambda found: int(found["relaxation"]["told"]))
        if told["relaxation"]["told"] < FEWEST:
            return section
        heads = power_laws(self.series[told["series"]].heads)
        widths = sorted(heads["width"].unique().tolist())
        groups = [
            Spread(width, *(heads.loc[heads["width"] == width, name].to_numpy(float) for name in EXPONENT))
            for width in widths
        ]
        caption = (
            f"Exponents of heads that prefer a power law, in the series with most of them ({claims.named(told)}), "
            f"sorted within each width; bars: {CONFIDENCE:.0%} profile intervals; black: median."
        )
        figure = law_figures.draw_exponents(groups, claims.named(told), "exponent a (log scale)")
        self.draw(section, "exponents", figure, caption, "Relaxation exponents of heads with intervals")
        return section

    def tails(self) -> Section:
        """Whether late heads follow a power law."""
        section = self.section(
            "Late heads",
            "Is the distribution of times heavy-tailed? Levels of heads that have one, over the median of their width; "
            "Clauset, Shalizi and Newman's maximum likelihood, p by bootstrap over independent members or seeds. A "
            "bend near the end of the runs may be owed to that, and is then not held against a power law.",
            claims.tail_line,
        )
        plots = [
            tail_plot(found) for found in claims.ordered(self.laws, len(self.laws)) if not found["tail"]["refusal"]
        ]
        if plots:
            caption = (
                "Of the heads with a level, the share that are later. Blue: the power law from its least time "
                "(grey line) on. A straight line here proves nothing: see p and the comparisons above."
            )
            figure = law_figures.draw_tails(plots[:TAILS])
            self.draw(section, "tails", figure, caption, "Complementary distribution of times with fitted tail")
        return section

    def collapse(self) -> Section:
        """Mean curves before and after scaling."""
        section = self.section(
            "Collapse",
            "If width only stretched time, the lift of the best detectors would be one curve of step x width^g. S is "
            "the mean square distance from the other widths' curve in units of its error: near 1 if they collapse.",
            claims.collapse_line,
        )
        told = [found for found in claims.ordered(self.laws, len(self.laws)) if not found["collapse"]["refusal"]]
        plots = [scaled_plot(found, self.series[found["series"]]) for found in told[:COLLAPSES]]
        if plots:
            caption = "Mean lift of the best detectors by width, with two standard errors; left as it is, right scaled."
            figure = law_figures.draw_collapse(plots)
            self.draw(section, "collapse", figure, caption, "Mean curves by width before and after scaling")
        return section

    def matter(self) -> Section:
        """How many heads are worth something."""
        text = (
            "A head that emerged may be redundant. Heads a member whose looking is surely worth over 1% of what "
            f"attention saves, mean and {CONFIDENCE:.0%} interval over members."
        )
        return self.section("Heads that matter", text, claims.matter_line)


def line_of(found: Law) -> Line:
    """A series as it is drawn against width."""
    share, level, law = found["share"], found[MEMBERS]["observed"], found[MEMBERS]["law"]
    heads = found[HEADS]["law"]["shares"]

    def estimates(values: Mapping[str, Any]) -> list[Estimate]:
        return [Estimate(float(width), *numbers(each)) for width, each in values.items()]

    def fitted_share(width: Array) -> Array:
        start = logit(heads["share"][0])
        return np.asarray(expit(start + heads["slope"] * np.log(width / heads["width"][0])))

    def fitted_time(width: Array) -> Array:
        return np.asarray(law["constant"] * width ** -law["exponent"])

    return Line(
        name=claims.named(found),
        share=estimates(share),
        time=estimates(level),
        matter=estimates(found["matter"]),
        fitted_share=None if heads["refusal"] or heads["slope"] is None else fitted_share,
        fitted_time=None if law["refusal"] else fitted_time,
    )


def tail_plot(found: Law) -> TailPlot:
    """The tail of a series as it is drawn."""
    tail = found["tail"]

    def power(time: Array) -> Array:
        return np.asarray((time / tail["xmin"]) ** (1 - tail["alpha"]))

    return TailPlot(
        title=claims.named(found),
        times=numbers(tail["times"]),
        survival=numbers(tail["survival"]),
        xmin=tail["xmin"],
        fits=[(f"power law, a = {tail['alpha']:.2f}", power)],
    )


def scaled_plot(found: Law, series: Series) -> Scaled:
    """The mean curves of a series before and after scaling."""
    told, before, after = found["collapse"], [], []
    for width, curves in detector_curves(series).items():
        step, lifts = curves.columns.to_numpy(float), curves.to_numpy()
        error = lifts.std(0, ddof=1) / np.sqrt(len(lifts)) if len(lifts) > 1 else np.zeros(len(step))
        before.append((width, step, lifts.mean(0), error))
        after.append((width, step * width ** told["exponent"], lifts.mean(0), error))
    words = (f"as it is: S = {told['S_before']:.1f}", f"step x width^{told['exponent']:.2f}: S = {told['S']:.1f}")
    return Scaled(title=claims.named(found), before=before, after=after, words=words)
