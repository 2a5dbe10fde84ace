"""`headway plan SWEEP`: how many seeds it takes to see an exponent of width, or a difference of shares.

From the scatter of members in a pilot, a sweep that the ledger has. At n seeds and widths w_1 .. w_W, with log levels
of standard deviation s about the mean of their width, and a share q of members that get there at all, the slope of log
level on log width has the standard error

    se = s / sqrt(q n sum_i (x_i - mean x)^2),   x_i = log w_i,

which the sandwich of `probes.scaling.fit_width_law` estimates on about nu Satterthwaite degrees of freedom (worked out
for this design, a member a cluster: Bell and McCaffrey 2002). Under an exponent g the t statistic is noncentral,
t' ~ t(nu, g / se), and the power of the two-sided test at level a is P(|t'| > t_{nu, 1 - a/2}). The same for the
difference d of two means of n members each, of standard deviation s: t' ~ t(2n - 2, d / (s sqrt(2/n))).

Where seeds share their data order (`data.order = "seed"`), what the members of a seed have in common cancels in slopes
and differences: s is then the deviation about the means of settings and of seeds, a seed is a cluster, and nu = n - 1.
Where members never get there it cancels in part alone, as `fit_width_law` fits no mean of a seed: with s' the deviation
about the means of settings, and members missing independently of each other, s^2 becomes q s^2 + (1 - q) s'^2.

`headway compare` tests a difference by exchanging members and calls it shown at a false discovery rate q over its m
tests of a point. A difference of one quantity alone is shown at p < q / m. Permutations have p in steps of 2^(1 - n)
(n pairs) or 2 / (2n over n): below the n at which a step is less than q / m nothing can be shown, and above it a is the
multiple of the step next below q / m. Exchanging members has about the power of t at that a.
Simulated sweeps and comparisons through `fit_width_law` and the permutation test itself check this (tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import sparse, stats

from cluster.analysis import RISEN, Analysis, load_analysis
from cluster.arguments import StoreOptions, named, open_named
from cluster.compare import ALPHA, TESTS, least_p
from cluster.driver import Settings
from cluster.findings import number_text, plural
from cluster.intervals import CONFIDENCE
from cluster.laws import RATE
from cluster.sweep import Sweep
from probes.emergence import STEP_ZERO
from probes.scaling import MIN_CLUSTERS, MIN_WIDTHS
from sim.checks import require

MOST_SEEDS = 100_000
PLAN_HELP = (
    "Seeds at each width that show an exponent of width, or a difference of the share of heads that rise between two "
    "settings, with the power asked for; from the scatter of members in a sweep that is there, its pilot. Formulas: "
    "cluster/power.py. Not to be confused with `headway sweep RECIPE --dry-run`, which plans packs, time and memory."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions(StoreOptions):
    """What should be seen, and how surely."""

    exponents: tuple[float, ...] = (0.1, 0.2, 0.5)
    """Exponents g of level ~ width^-g."""
    shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Differences of the share of a member's heads that rise."""
    widths: tuple[int, ...] = ()
    """Widths of the sweep to be. Default: those of the pilot."""
    power: float = 0.8
    """Chance of seeing what is there."""
    level: float = 0.05
    """Chance of seeing an exponent that is not there: level of the two-sided test. Differences are planned for what
    `headway compare` calls shown."""

    def __post_init__(self) -> None:
        for name in ("exponents", "shares"):
            for value in getattr(self, name):
                require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        for value in self.shares:
            require(value < 1, "shares", value, "below 1")
        require(len(set(self.widths)) == len(self.widths), "widths", self.widths, "without repeats")
        require(not self.widths or len(self.widths) >= MIN_WIDTHS, "widths", self.widths, f"at least {MIN_WIDTHS}")
        require(all(width >= 1 for width in self.widths), "widths", self.widths, "at least 1 each")
        require(0 < self.level < 1, "level", self.level, "in (0, 1)")
        require(self.level < self.power < 1, "power", self.power, f"above level = {self.level:g} and below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Standard deviation within settings, pooled, on `freedom` degrees; `high`: upper end of its 90% interval.
    paired: without what the members of a seed have in common."""

    deviation: float
    freedom: int
    paired: bool = False

    @property
    def high(self) -> float:
        """By chi-square: a pilot of few members does not know its own scatter well."""
        return self.deviation * math.sqrt(self.freedom / float(stats.chi2.ppf((1 - CONFIDENCE) / 2, self.freedom)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pilot:
    """What members of a sweep scatter by. reached: share of finished members with a detector; None where a scatter
    cannot be told. shared: whether seeds share their data order. whole_level: scatter of log levels with what the
    members of a seed have in common, beside a paired `log_level`."""

    widths: tuple[int, ...]
    members: int
    settings: int
    reached: float
    log_level: Scatter | None
    share: Scatter | None
    shared: bool = False
    whole_level: Scatter | None = None

    @property
    def slope_scatter(self) -> tuple[float, float] | None:
        """Standard deviation of log levels that counts in a slope, and its upper end; None where it is not known.
        Paired, it keeps the share 1 - reached of the variance that the members of a seed have in common."""
        own, whole = self.log_level, self.whole_level
        if own is None or whole is None or not own.paired:
            return None if own is None else (own.deviation, own.high)
        return self._mixed(own.deviation, whole.deviation), self._mixed(own.high, whole.high)

    def _mixed(self, own: float, whole: float) -> float:
        return math.sqrt(self.reached * own**2 + (1 - self.reached) * max(own, whole) ** 2)


def read_pilot(sweep: Sweep, analysis: Analysis) -> Pilot:
    """Scatter of log levels, and of the share of a member's heads that rose, within points of the sweep: about seeds
    too where they share their data order, for levels those of one series (differing in width alone)."""
    axes, table = list(sweep.axis_names), analysis.members
    finished = table[table["outcome"] == "finished"] if len(table) else table
    if finished.empty:
        raise ValueError(f"sweep: {sweep.id} has no finished member to plan from")
    heads = analysis.heads[analysis.heads["relation"] == sweep.system.relation]
    share = heads["status"].isin(RISEN).groupby(heads["member_id"]).mean()
    shares = finished["member_id"].map(share)
    levels = np.log(finished["level"].clip(lower=STEP_ZERO))
    within, seed, shared = [finished[name] for name in axes], finished["seed"], sweep.data.order == "seed"
    series = [*(finished[name] for name in axes if name != "width"), seed]
    apart = scatter_in_pairs(levels, within, series) if shared else None
    whole = pooled(levels, within)
    if apart is not None and whole is not None:  # the luck of a seed is one, however many its members
        whole = replace(whole, freedom=max(1, min(whole.freedom, seed[levels.notna()].nunique() - 1)))
    same_data = shared and not any(name.startswith(("data.", "system.")) for name in axes)
    return Pilot(
        widths=tuple(sorted(int(width) for width in finished["width"].unique())),
        members=len(finished),
        settings=finished.groupby(axes).ngroups,
        reached=float(finished["level"].notna().mean()),
        log_level=apart or whole,
        share=(scatter_in_pairs(shares, within, [seed]) if same_data else None) or pooled(shares, within),
        shared=shared,
        whole_level=whole if apart is not None else None,
    )


def pooled(values: pd.Series, within: Sequence[pd.Series]) -> Scatter | None:
    """Standard deviation about the means of groups; None where no group has two values, or all are equal."""
    known = values.dropna()
    groups = known.groupby([each.loc[known.index] for each in within])
    freedom = int((groups.size() - 1).sum()) if len(known) else 0
    if freedom < 1:
        return None
    squares = float((groups.var(ddof=1).fillna(0.0) * (groups.size() - 1)).sum())
    return Scatter(deviation=math.sqrt(squares / freedom), freedom=freedom) if squares > 0 else None


def scatter_in_pairs(values: pd.Series, within: Sequence[pd.Series], seeds: Sequence[pd.Series]) -> Scatter | None:
    """Standard deviation about the sum of a mean of the setting and one of the seed, by least squares; None where that
    leaves nothing."""
    known = values.dropna()
    if known.empty:
        return None
    setting, seed = (known.groupby([key.loc[known.index] for key in keys]).ngroup() for keys in (within, seeds))
    (rows, settings), ones = (len(known), int(setting.max()) + 1), np.ones(2 * len(known))
    columns = np.concatenate([setting, settings + seed])
    means = sparse.csr_array((ones, (np.tile(np.arange(rows), 2), columns)))
    parts = sparse.csgraph.connected_components(means.T @ means, directed=False)[0]
    freedom = rows - (means.shape[1] - parts)
    about = known.to_numpy(float) - known.mean()
    squares = float(sparse.linalg.lsqr(means, about, atol=1e-12, btol=1e-12)[3] ** 2)
    if freedom < 1 or squares <= 1e-16 * float(about @ about):
        return None
    return Scatter(deviation=math.sqrt(squares / freedom), freedom=freedom, paired=True)


def slope_design(widths: Sequence[float], seeds: int) -> tuple[float, float]:
    """Standard error of the slope on log width in units of the scatter, and Satterthwaite's degrees of freedom of its
    sandwich with residuals enlarged by leverage (CR2, a member a cluster), at `seeds` members a width."""
    x = np.repeat(np.log(np.asarray(widths, dtype=np.float64)), seeds)
    x = x - x.mean()
    n, spread = x.size, float(x @ x)
    leverage = 1 / n + x**2 / spread
    weight = x / spread / np.sqrt(1 - leverage)  # of an enlarged residual in the slope
    # tr and tr of the square of diag(w) (I - H) diag(w), H = 1 1'/n + x x'/spread
    squares = weight**2
    trace = float(squares @ (1 - leverage))
    cross = (
        squares.sum() ** 2 / n**2 + 2 * float(squares @ x) ** 2 / (n * spread) + float(squares @ x**2) ** 2 / spread**2
    )
    square = float(squares @ (squares * (1 - 2 * leverage))) + cross
    return 1 / math.sqrt(spread), trace**2 / square


def slope_power(
    exponent: float, scatter: float, widths: Sequence[float], seeds: int, level: float, paired: bool = False
) -> float:
    """Power of the two-sided test of an exponent, at `seeds` members a width that all get there. paired: the same seeds
    at every width, and each of them a cluster."""
    if seeds * (1 if paired else len(widths)) < max(MIN_CLUSTERS, 3) or seeds < 2:
        return 0.0
    error, freedom = slope_design(widths, seeds)
    return t_power(exponent / (error * scatter), seeds - 1 if paired else freedom, level)


def mean_power(difference: float, scatter: float, seeds: int, level: float, paired: bool = False) -> float:
    """Power of the two-sided t test of a difference of two means of `seeds` members each, paired or not."""
    if seeds < 2 or level <= 0:
        return 0.0
    return t_power(difference / (scatter * math.sqrt(2 / seeds)), (1 if paired else 2) * (seeds - 1), level)


def attained(level: float, seeds: int, paired: bool) -> float:
    """The largest p up to `level` that exchanging `seeds` members a side, or pairs of them, can give; 0 for none."""
    if seeds > 60:  # steps of below 1e-17
        return level
    step = least_p(seeds, seeds, seeds if paired else 0)
    return math.floor(level / step) * step


def t_power(shift: float, freedom: float, level: float) -> float:
    """P(|t'| > t_{1 - level/2}) of a noncentral t."""
    edge = float(stats.t.ppf(1 - level / 2, freedom))
    return float(stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift))


def least_seeds(power: Callable[[int], float], wanted: float) -> int | None:
    """The least number of seeds with the power wanted; None above MOST_SEEDS. Power grows with seeds."""
    high = 2
    while power(high) < wanted:
        high *= 2
        if high > MOST_SEEDS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= wanted else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Seeds at each width or setting, at the pilot's scatter and at the upper end of its interval; None: too many."""

    what: str
    seeds: int | None
    cautious: int | None


def needs(pilot: Pilot, options: PlanOptions) -> list[Need]:
    """One for each exponent and difference that the pilot can speak of."""
    found = list[Need]()
    widths, level, share, scatter = options.widths or pilot.widths, pilot.log_level, pilot.share, pilot.slope_scatter
    if level is not None and scatter is not None and len(widths) >= MIN_WIDTHS:
        over = ", ".join(map(str, widths))
        for exponent in options.exponents:
            plan = [_slope_seeds(exponent, s, widths, pilot.reached, options, level.paired) for s in scatter]
            what = f"level ~ width^-g with g = {exponent:g}, over widths {over}"
            found.append(Need(what=what, seeds=plan[0], cautious=plan[1]))
    if share is not None:
        for difference in options.shares:
            plan = [_share_seeds(difference, s, options, share.paired) for s in (share.deviation, share.high)]
            what = f"share of heads that rise, {difference:.0%} apart between two settings"
            found.append(Need(what=what, seeds=plan[0], cautious=plan[1]))
    return found


def _slope_seeds(
    exponent: float, scatter: float, widths: Sequence[float], reached: float, options: PlanOptions, paired: bool
) -> int | None:
    """Enlarged by those that never get there."""
    seeds = least_seeds(lambda n: slope_power(exponent, scatter, widths, n, options.level, paired), options.power)
    return None if seeds is None else math.ceil(seeds / reached)


def _share_seeds(difference: float, scatter: float, options: PlanOptions, paired: bool) -> int | None:
    def power(seeds: int) -> float:
        return mean_power(difference, scatter, seeds, attained(ALPHA / TESTS, seeds, paired), paired)

    return least_seeds(power, options.power)


def designs(pilot: Pilot) -> list[str]:
    """What the seeds are planned for, in words."""
    found = []
    if pilot.log_level is not None:
        how = "seen within each seed (they share their data order)" if pilot.log_level.paired else "seen over members"
        found.append(f"exponents: a two-sided test of the slope, {how}")
        if pilot.whole_level is not None and pilot.reached < 1 and pilot.slope_scatter is not None:
            counted, whole = (
                number_text(each, ".3g") for each in (pilot.slope_scatter[0], pilot.whole_level.deviation)
            )
            found.append(
                f"exponents: a seed's luck does not cancel where a width lacks it, as {1 - pilot.reached:.0%} of "
                f"members have no detector: a standard deviation of {counted} counts (within a setting it is {whole})"
            )
    if pilot.share is not None:
        paired = pilot.share.paired
        floor = next(n for n in range(2, 60) if attained(ALPHA / TESTS, n, paired) > 0)
        how = "pairs of the same seed (they share their data order)" if paired else "members a side"
        found.append(
            f"differences: shown by `headway compare` at a point, of whose {TESTS} tests this one alone differs, at a "
            f"false discovery rate of {ALPHA:.0%}: p below {ALPHA / TESTS:.3g} by exchanging members, which takes "
            f"{floor} {how} however large the difference is"
        )
    unpaired = [each for each in (pilot.log_level, pilot.share) if each is not None and not each.paired]
    if pilot.shared and unpaired:
        found.append("seeds share their data order, but this pilot cannot tell by how much: planned as if they did not")
    return found


def lacking(pilot: Pilot, options: PlanOptions) -> list[str]:
    """What cannot be planned, with the reason."""
    found = []
    widths = options.widths or pilot.widths
    if len(widths) < MIN_WIDTHS:
        found.append(
            f"exponents: {plural(len(widths), 'width')}, and a law takes {MIN_WIDTHS}; name more with --widths"
        )
    if pilot.log_level is None:
        found.append("exponents: no point of the pilot has two members with a detector, so their scatter is not known")
    if pilot.share is None:
        found.append("shares: no point of the pilot has two members that differ in the share of heads that rose")
    return found


def plan_command(arguments: Sequence[str], console: Console) -> int:
    """`headway plan`."""
    (name,), options = named(arguments, PlanOptions(), "headway plan", PLAN_HELP)
    desk, parent, sweep = open_named(name, Settings(tracking_uri=options.tracking_uri, out=options.out))
    pilot = read_pilot(sweep, load_analysis(desk.client, parent.info.run_id))
    console.print(
        f"pilot {escape(sweep.id)}: {plural(pilot.members, 'finished member')} at {plural(pilot.settings, 'setting')}; "
        f"{pilot.reached:.0%} have a detector"
    )
    for words, scatter in (("log level of the best detector", pilot.log_level),
                           ("share of heads that rise", pilot.share)):  # fmt: skip
        if scatter is not None:
            console.print(
                f"  {words}: standard deviation {number_text(scatter.deviation, '.3g')} within a setting"
                f"{' once the means of seeds are taken off' if scatter.paired else ''}, "
                f"{scatter.freedom} degrees of freedom (up to {number_text(scatter.high, '.3g')} with 95% confidence)",
                soft_wrap=True,
            )
    table = Table("to see", "seeds each", "to be on the safe side")
    for need in needs(pilot, options):
        table.add_row(need.what, seeds_text(need.seeds), seeds_text(need.cautious))
    if table.rows:
        console.print(table)
        console.print(
            f"seeds at each width or setting for power {options.power:.0%} (exponents at level {options.level:.0%}); "
            "on the safe side: should the scatter be as large as the pilot allows",
            soft_wrap=True,
        )
        for text in designs(pilot):
            console.print(text, soft_wrap=True)
    for text in lacking(pilot, options):
        console.print(f"not planned: {text}", soft_wrap=True)
    if RATE in sweep.axes:
        console.print("several learning rates: the scatter is pooled over them, and each rate needs its own seeds")
    return 0 if table.rows else 1


def seeds_text(seeds: int | None) -> str:
    """A number of seeds."""
    return f"over {MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"
