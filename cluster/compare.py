"""Two sweeps, or two points, side by side: what differs in their configs, and whether what came out does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from cluster.analysis import RISEN, Analysis, number
from cluster.encoding import encode, require_known
from cluster.findings import DASH, number_text, plural, step_text
from cluster.intervals import CONFIDENCE, log_mean_interval, mean_interval
from cluster.sweep import Sweep
from probes.emergence import STEP_ZERO
from probes.survival import log_rank_scores, permutation_test
from sim.checks import require

Scale = Literal["log", "share", "part", "plain"]
Values = NDArray[np.float64]

ALPHA = 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """What is compared, one value a member. log: geometric means and ratios; share: 0 or 1; part: in 0..1."""

    name: str
    words: str
    scale: Scale = "plain"


QUANTITIES = (
    Quantity(name="detecting", words="share of members with a detector", scale="share"),
    Quantity(name="level", words="level of those with one (step)", scale="log"),
    Quantity(name="t50", words="t50 of a member's risen heads (step)", scale="log"),
    Quantity(name="share_risen", words="share of a member's heads that rose", scale="part"),
    Quantity(name="detectors", words="detectors a member"),
    Quantity(name="heads_that_matter", words="heads that matter a member"),
    Quantity(name="validation_loss", words="validation loss at the end", scale="log"),
)
TESTS = len(QUANTITIES) + 1  # that `compare` makes at a point
LATER = "whether and when: level, none counted as later"


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two. fixed: values of the axes at which it is looked at."""

    label: str
    sweep: Sweep
    analysis: Analysis
    fixed: Mapping[str, Any]
    link: str

    @property
    def title(self) -> str:
        """`A: quick-1234 at width 32`."""
        where = ", ".join(f"{name} {value}" for name, value in self.fixed.items())
        return f"{self.label}: {self.sweep.id}" + (f" at {where}" if where else "")

    @property
    def members(self) -> pd.DataFrame:
        """Finished members there."""
        table = self._there()
        return table[table["outcome"] == "finished"]

    def _there(self) -> pd.DataFrame:
        table = self.analysis.members
        for name, value in self.fixed.items():
            table = table[table[name] == value]
        return table

    @property
    def told(self) -> str:
        """How many members finished, and how many did not: no quantity counts these."""
        others = self._there()["outcome"].loc[lambda outcome: outcome != "finished"].value_counts()
        out = ", ".join(f"{count:,} {outcome}" for outcome, count in others.items())
        return plural(len(self.members), "finished member") + (f" ({out}, of which nothing here tells)" if out else "")

    def free(self) -> dict[str, list[Any]]:
        """Axes along which its members still differ, and their values."""
        table = self.members
        values = {name: sorted(table[name].unique().tolist()) for name in self.sweep.axis_names}
        return {name: found for name, found in values.items() if name not in self.fixed and len(found) > 1}

    def values(self) -> pd.DataFrame:
        """One row a member: axes, seed, last_step and the quantities; NaN where one has no value."""
        table, heads = self.members.copy(), self.analysis.heads
        own = heads[(heads["relation"] == self.sweep.system.relation) & heads["member_id"].isin(table["member_id"])]
        risen = own[own["status"].isin(RISEN)]
        timed = risen[risen["t50"] > 0]
        t50 = np.log(timed["t50"]).groupby(timed["member_id"]).mean()
        share = own["status"].isin(RISEN).groupby(own["member_id"]).mean()
        table["t50"] = np.exp(table["member_id"].map(t50))
        table["share_risen"] = table["member_id"].map(share)
        table["detecting"] = table["level"].notna().astype(float)
        table["level"] = table["level"].clip(lower=STEP_ZERO)  # there at the first probe: as early as can be told
        names = [item.name for item in QUANTITIES]
        return table.reindex(columns=[*self.sweep.axis_names, "seed", "last_step", *names])


def take_side(label: str, sweep: Sweep, analysis: Analysis, chosen: str, link: str = "") -> Side:
    """The sweep at the values of `AXIS=VALUE,...`. ValueError for an axis or value that it has not."""
    fixed: dict[str, Any] = {}
    table = analysis.members
    finished = len(table) > 0 and bool((table["outcome"] == "finished").any())
    require(finished, label, sweep.id, "a sweep with finished members")
    for item in filter(None, chosen.split(",")):
        name, equals, text = item.partition("=")
        require(bool(equals and text) and name not in fixed, label, item, "AXIS=VALUE, each axis once")
        require_known(name, list(sweep.axis_names), label)
        known = table[name].unique().tolist()
        value = text if text in known else number(text)
        require(value in known, f"{label}: {name}", text, f"one of {', '.join(map(str, sorted(known)))}")
        fixed[name] = value
    return Side(label=label, sweep=sweep, analysis=analysis, fixed=fixed, link=link)


def shared_points(a: Side, b: Side) -> list[dict[str, Any]]:
    """Points along the axes that both leave free. ValueError for an axis free on one side, or without common value."""
    free_a, free_b = a.free(), b.free()
    for side, own, other in ((a, free_a, free_b), (b, free_b, free_a)):
        for name, values in own.items():
            if name not in other:
                shown = ", ".join(map(str, values[:6]))
                raise ValueError(
                    f"{side.label}: {name} has {len(values)} values ({shown}) and the other side one or none; "
                    f"choose one: {side.sweep.id}@{name}={values[0]}"
                )
    points: list[dict[str, Any]] = [{}]
    for name in free_a:
        common = [value for value in free_a[name] if value in free_b[name]]
        require(bool(common), name, free_a[name], f"in common with those of B, {free_b[name]}")
        points = [{**point, name: value} for point in points for value in common]
    return points


def is_paired(a: Side, b: Side) -> bool:
    """Whether members of one seed have seen the same rows and noise on both sides."""
    same = (a.sweep.data, a.sweep.system) == (b.sweep.data, b.sweep.system)
    differing = {name for name in {*a.fixed, *b.fixed} if a.fixed.get(name) != b.fixed.get(name)}
    chosen = {name for name in {*a.fixed, *b.fixed} if name == "data.order"}
    touched = any(name.startswith(("data.", "system.")) for name in differing | chosen)
    return same and not touched and a.sweep.data.order == "seed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One quantity at one point. a, b, gap: estimate and ends of the interval, gap = B / A on a log scale, else B - A.

    pairs: how many seeds both sides have a value of, where these are paired; gap and p are then of these alone. p: of
    the permutation test, NaN with a reason; adjusted: over all rows (Benjamini and Hochberg).
    """

    point: str
    quantity: str
    scale: Scale
    n_a: int
    n_b: int
    pairs: int
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    gap: tuple[float, float, float]
    p: float
    reason: str
    adjusted: float = math.nan

    @property
    def shown(self) -> bool:
        """Whether the difference is more than luck with members."""
        return self.adjusted < ALPHA

    @property
    def words(self) -> str:
        """`shown (p = 0.012, adjusted 0.031)`, or why there is no test."""
        if self.reason:
            return f"not tested: {self.reason}"
        found = f"p = {number_text(self.p, '.2g')}, adjusted {number_text(self.adjusted, '.2g')}"
        return f"{'shown' if self.shown else 'not shown'} ({found})"


def matched(a: pd.DataFrame, b: pd.DataFrame, paired: bool) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Members of the seeds that both sides have, by seed, and how many these are; all, and 0, where none is paired."""
    common = set(a["seed"]) & set(b["seed"]) if paired else set()
    if not common:
        return a, b, 0
    first, second = (table[table["seed"].isin(common)].sort_values("seed") for table in (a, b))
    return first, second, len(common)


def compare(a: Side, b: Side, quantities: Sequence[Quantity] = QUANTITIES) -> list[Row]:
    """These quantities, and whether and when together, at every point that both have."""
    paired, rows = is_paired(a, b), list[Row]()
    tables = {"A": a.values(), "B": b.values()}
    for point in shared_points(a, b):
        label = ", ".join(f"{name} {value}" for name, value in point.items()) or "all members"
        own = [table[np.logical_and.reduce([table[n] == v for n, v in point.items()], initial=True)]
               if point else table for table in tables.values()]  # fmt: skip
        rows += [_row(label, item, own[0], own[1], paired) for item in quantities]
        rows.append(_whether_and_when(label, own[0], own[1], paired))
    return adjusted(rows)


def design(a: Side, b: Side, rows: Sequence[Row]) -> str:
    """How members were exchanged between the sides in these rows of theirs, in words."""
    if not is_paired(a, b):
        return "between the two sides, as their seeds share no data order"
    in_pairs = {row.pairs > 0 for row in rows if row.n_a and row.n_b}
    within = "within each seed that both sides have (pairs), as seeds share their data order"
    if in_pairs == {True}:
        return f"{within}; the difference is of these"
    if in_pairs == {True, False}:
        return (
            f"{within}, and the difference is of these, in rows that tell how many are in pairs; between the two sides "
            "in the others, as no seed has a value on both"
        )
    return "between the two sides: seeds share their data order, but none has a value on both"


def cell(values: tuple[float, float, float], scale: Scale, ratio: bool = False) -> str:
    """An estimate with its interval. ratio: it is a difference, or a ratio on a log scale."""
    if scale in ("share", "part"):
        texts = [number_text(value, "+.0%" if ratio else ".0%") for value in values]
    elif ratio:
        texts = [number_text(value, ".2f" if scale == "log" else "+.2f") for value in values]
    else:
        texts = [step_text(value) for value in values]
    return texts[0] if DASH in texts[1:] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def adjusted(rows: Sequence[Row]) -> list[Row]:
    """With p-values at their false discovery rates."""
    known = [row.p for row in rows if math.isfinite(row.p)]
    levels = iter(stats.false_discovery_control(known).tolist() if known else ())
    return [replace(row, adjusted=next(levels)) if math.isfinite(row.p) else row for row in rows]


def _row(label: str, item: Quantity, a: pd.DataFrame, b: pd.DataFrame, paired: bool) -> Row:
    x, y = (table[[item.name, "seed"]].dropna() for table in (a, b))
    if item.scale == "log":
        x, y = (table[table[item.name] > 0] for table in (x, y))
    interval = INTERVALS[item.scale]
    *own, pairs = matched(x, y, paired)
    first, second = (table[item.name].to_numpy(float) for table in own)
    if item.scale == "log":
        first, second = np.log(first), np.log(second)
    p, reason = _permuted((first, second), pairs)
    gap = (math.nan, math.nan, math.nan)
    if first.size and second.size:
        gap = (newcombe if item.scale == "share" else gap_interval)(first, second, pairs > 0)
        gap = tuple(map(math.exp, gap)) if item.scale == "log" else gap  # type: ignore[assignment]
    return Row(
        point=label, quantity=item.words, scale=item.scale, n_a=len(x), n_b=len(y), pairs=pairs,
        a=interval(x[item.name].tolist()), b=interval(y[item.name].tolist()), gap=gap, p=p, reason=reason,
    )  # fmt: skip


def _whether_and_when(label: str, a: pd.DataFrame, b: pd.DataFrame, paired: bool) -> Row:
    """A log-rank test: members without a detector are censored at their last step."""
    first, second, pairs = matched(a, b, paired)
    both = pd.concat([first, second])
    status = np.where(both["level"].notna(), "emerged", "never")
    times = both["level"].fillna(both["last_step"]).to_numpy(float)
    scores = log_rank_scores(np.maximum(times, STEP_ZERO), status.tolist())
    p, reason = _permuted((scores[: len(first)], scores[len(first) :]), pairs)
    none = (math.nan, math.nan, math.nan)
    return Row(
        point=label, quantity=LATER, scale="plain", n_a=len(a), n_b=len(b), pairs=pairs, a=none, b=none, gap=none, p=p,
        reason=reason,
    )  # fmt: skip


def _permuted(values: Sequence[Values], pairs: int) -> tuple[float, str]:
    """p of exchanging members between the sides, within so many pairs or (0) freely; or why there is none."""
    if not all(part.size for part in values):
        return math.nan, "no member has a value on one side"
    if pairs == 1:
        return math.nan, "1 seed in common, fewer than 2"
    side = np.repeat([1.0, 2.0], [part.size for part in values])
    cluster = np.tile(np.arange(pairs), 2) if pairs else np.arange(side.size)
    test = permutation_test(side, np.concatenate(list(values)), cluster)
    return test.p_value, test.refusal


def least_p(n_a: int, n_b: int, pairs: int) -> float:
    """The least p that so many members can give: of one arrangement, and its mirror image where there is one."""
    if pairs:
        return float(2.0 ** (1 - pairs))
    return (2 if n_a == n_b else 1) / math.comb(n_a + n_b, n_a)


def share_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Share of ones and Wilson's interval."""
    if not values:
        return math.nan, math.nan, math.nan
    found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(CONFIDENCE, method="wilson")
    return float(np.mean(values)), float(found.low), float(found.high)


def part_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values in 0..1 and its interval, cut off at 0 and 1."""
    mean, low, high = mean_interval(values)
    return mean, max(low, 0.0), min(high, 1.0)


INTERVALS: Mapping[Scale, Callable[[Sequence[float]], tuple[float, float, float]]] = {
    "log": log_mean_interval, "share": share_interval, "part": part_interval, "plain": mean_interval
}  # fmt: skip


def newcombe(a: Values, b: Values, paired: bool) -> tuple[float, float, float]:
    """B - A of two shares with Newcombe's hybrid score interval (1998, Statistics in Medicine 17:873, method 10).

    paired: values `[n]` of the same seeds in the same order, with their correlation (there, 17:2635, method 10).
    """
    (p, p_low, p_high), (q, q_low, q_high) = share_interval(a.tolist()), share_interval(b.tolist())
    phi = correlation(a, b) if paired else 0.0
    low, high = (
        math.sqrt(max(x**2 - 2 * phi * x * y + y**2, 0.0))
        for x, y in ((q - q_low, p_high - p), (q_high - q, p - p_low))
    )
    return q - p, q - p - low, q - p + high


def correlation(a: Values, b: Values) -> float:
    """Of pairs of 0 and 1, drawn towards 0 from above as in Newcombe's method 10; 0 where one side is all alike."""
    both, first, second = float(a @ b), float(a @ (1 - b)), float((1 - a) @ b)
    neither = a.size - both - first - second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0.0:
        return 0.0
    product = both * neither - first * second
    return (max(product - a.size / 2, 0.0) if product > 0 else product) / math.sqrt(margins)


def gap_interval(a: Values, b: Values, paired: bool) -> tuple[float, float, float]:
    """B - A with its interval: Student's t over the differences of pairs, given in the same order, or Welch's."""
    if paired:
        return mean_interval((b - a).tolist())
    n, m = a.size, b.size
    gap = float(b.mean() - a.mean())
    if min(n, m) < 2 or np.ptp(a) + np.ptp(b) == 0.0:
        return gap, math.nan, math.nan
    parts = np.array([a.var(ddof=1) / n, b.var(ddof=1) / m])
    freedom = parts.sum() ** 2 / float(parts**2 @ [1 / (n - 1), 1 / (m - 1)])
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(parts.sum())
    return gap, gap - reach, gap + reach


def differences(a: Side, b: Side) -> list[tuple[str, str, str]]:
    """Fields of the configs that differ, with both values; what a side is looked at stands for its axis."""
    first, second = (dict(_flat(_settings(side))) for side in (a, b))
    names = list(dict.fromkeys([*first, *second]))
    return [
        (name, str(first.get(name, DASH)), str(second.get(name, DASH)))
        for name in names
        if first.get(name) != second.get(name)
    ]


def _settings(side: Side) -> dict[str, Any]:
    body = encode(side.sweep)
    axes = {"model.width": body.pop("widths"), **body.pop("axes")}
    fixed = {("model.width" if name == "width" else name): value for name, value in side.fixed.items()}
    flat = dict(_flat(body))
    values = {name: fixed.get(name, axis[0] if len(axis) == 1 else axis) for name, axis in axes.items()}
    return {**flat, **values}


def _flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """All rows as numbers."""
    body = []
    for row in rows:
        ends = {
            f"{name}{end}": value
            for name in ("a", "b", "gap")
            for end, value in zip(("", "_low", "_high"), getattr(row, name), strict=True)
        }
        own = {"point": row.point, "quantity": row.quantity, "scale": row.scale, "n_a": row.n_a, "n_b": row.n_b}
        own["pairs"] = row.pairs
        body.append({**own, **ends, "p": row.p, "p_adjusted": row.adjusted, "shown": row.shown, "reason": row.reason})
    return pd.DataFrame(body)
