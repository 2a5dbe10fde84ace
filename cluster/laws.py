"""What holds across a sweep: whether and when heads emerge against width, exponents, tails and collapse.

All is worked out per *series*: the members that differ in width and seed only. Where a sweep has several learning
rates there is a further series of each width's best rate, by validation loss, so that the choice does not look at what
is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cluster.intervals import log_mean_interval, mean_interval
from probes.collapse import Collapse, collapse
from probes.emergence import STEP_ZERO
from probes.scaling import WidthLaw, censored_regression, fit_width_law
from probes.survival import kaplan_meier, log_rank_scores, permutation_test
from probes.tails import fit_tail

RATE = "train.learning_rate"
BEST = "each width's best learning rate"
STAYED = ("emerged", "growing")
FIGURE = r"\d+(?:\.\d+)?"  # reasons are counted whatever figures they hold
DRAWN = 400  # points of a curve that are kept for figures
NEAR_END = 1 / 3  # a largest time this near to the end of the runs may owe its bend to that
MEMBERS, HEADS = "member_level", "head_level"  # endpoints: the level of best detectors, that of every head
Law = Mapping[str, Any]
"""Plain form of what `laws_of` finds, as in sweep.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Finished members that are compared along width, their heads on the judged relation, and the lift curves of their
    best detectors. cluster: the column that names independent units; rates: where it is of best ones, by width."""

    name: str
    cluster: str
    members: pd.DataFrame
    heads: pd.DataFrame
    curves: pd.DataFrame
    rates: Mapping[float, float] = field(default_factory=dict)

    @property
    def widths(self) -> list[float]:
        """In order."""
        return sorted(self.members["width"].unique().tolist())


def series_of(
    members: pd.DataFrame, heads: pd.DataFrame, curves: pd.DataFrame, axes: Sequence[str], judged: str, cluster: str
) -> list[Series]:
    """One series for each setting of the axes other than width, then one of best rates for each setting of the rest."""
    finished = members[members["outcome"] == "finished"] if len(members) else members
    own = heads[heads["relation"] == judged] if len(heads) else heads
    if finished.empty or own.empty:
        return []

    def make(name: str, some: pd.DataFrame, rates: Mapping[float, float] | None = None) -> Series:
        heads, lines = (
            table[table["member_id"].isin(some["member_id"])] if len(table) else table for table in (own, curves)
        )
        return Series(name=name, cluster=cluster, members=some, heads=heads, curves=lines, rates=rates or {})

    others = [name for name in axes if name != "width"]
    found = [make(label(others, key), group) for key, group in _groups(finished, others)]
    if RATE in others and finished[RATE].nunique() > 1:
        rest = [name for name in others if name != RATE]
        for key, group in _groups(members[members["outcome"].isin(("finished", "diverged"))], rest):
            rates = best_rates(group)
            chosen = group[(group["outcome"] == "finished") & (group[RATE] == group["width"].map(rates))]
            if len(chosen):
                found.append(make(", ".join(filter(None, (BEST, label(rest, key)))), chosen, rates))
    return found


def label(names: Sequence[str], values: Sequence[Any]) -> str:
    """`train.learning_rate 0.001, model.parametrization mup`, as points are labelled."""
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def _groups(table: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not names:
        yield (), table
        return
    for key, group in table.groupby([*names], sort=True):
        yield tuple(key), group


def best_rates(members: pd.DataFrame) -> dict[float, float]:
    """By width the rate of least median validation loss at the end; that of a member that diverged is infinite."""
    losses = members["validation_loss"].where(members["outcome"] == "finished").fillna(math.inf)
    medians = losses.groupby([members["width"], members[RATE]]).median()
    best = {width: medians[width] for width in sorted(members["width"].unique().tolist())}
    return {width: float(of_rate.idxmin()) for width, of_rate in best.items() if math.isfinite(of_rate.min())}


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """When lift 2 was reached, one row a member or head, as `probes.scaling` takes it; all `[n]`."""

    width: NDArray[np.float64]
    time: NDArray[np.float64]
    status: NDArray[np.str_]
    cluster: NDArray[Any]

    @property
    def columns(self) -> tuple[Any, ...]:
        """In the order of `fit_width_law`."""
        return self.width, self.time, self.status.tolist(), self.cluster


def member_times(series: Series) -> Times:
    """The level of every member's best detector; `never` where it has none, at the last step."""
    table = series.members
    return _times(series, table, table["level"].to_numpy(float), table["last_step"].to_numpy(float))


def head_times(series: Series) -> Times:
    """The level of every head, as of members. Not t50: that of a growing head is a bound which its own rise has set,
    and censoring that knows of the time bends a law."""
    table = series.heads
    last = table["member_id"].map(series.members.set_index("member_id")["last_step"]).to_numpy(float)
    return _times(series, table, table["level"].to_numpy(float), last)


def _times(series: Series, table: pd.DataFrame, level: NDArray[np.float64], last: NDArray[np.float64]) -> Times:
    none, first = np.isnan(level), level <= STEP_ZERO
    return Times(
        width=table["width"].to_numpy(float),
        time=np.where(none, last, np.maximum(level, STEP_ZERO)),
        status=np.where(none, "never", np.where(first, "at_start", "emerged")),
        cluster=table[series.cluster].to_numpy(),
    )


def laws_or_cause(series: Series) -> Law:
    """All laws of one series; where that fails the cause, so that no series takes the others with it."""
    try:
        return laws_of(series)
    except Exception as error:
        return {"series": series.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def laws_of(series: Series) -> Law:
    """All laws of one series, as plain numbers, texts and lists."""
    found: dict[str, Any] = {
        "series": series.name,
        "members": len(series.members),
        "heads": len(series.heads),
        "clusters": int(series.members[series.cluster].nunique()),
        "widths": series.widths,
        "unit": "seed" if series.cluster == "seed" else "member",
        "last": float(series.members["last_step"].max()),
        "rates": {f"{width:g}": rate for width, rate in series.rates.items()},
    }
    for name, times in ((MEMBERS, member_times(series)), (HEADS, head_times(series))):
        found[name] = {
            "law": _with_preferred(fit_width_law(*times.columns)),
            "regression": censored_regression(*times.columns),
            "log_rank": permutation_test(
                times.width, log_rank_scores(times.time, times.status.tolist()), times.cluster
            ),
            "survival": {f"{width:g}": _survival(times, width) for width in series.widths},
            "never_clusters": int(np.unique(times.cluster[times.status == "never"]).size),
            "never_widths": int(np.unique(times.width[times.status == "never"]).size),
        }
    found[MEMBERS]["observed"] = {f"{width:g}": _level(series, width) for width in series.widths}
    found["share"] = {f"{width:g}": _share(series, width) for width in series.widths}
    found["matter"] = {f"{width:g}": _matter(series, width) for width in series.widths}
    found["relaxation"] = exponents(series)
    found["tail"] = tail_of(series)
    found["collapse"] = collapse_of(series)
    return plain(found)  # type: ignore[no-any-return]


def _with_preferred(law: WidthLaw) -> dict[str, Any]:
    return {**dataclasses.asdict(law), "preferred": law.preferred}


def _survival(times: Times, width: float) -> dict[str, Any]:
    own = times.width == width
    curve = dataclasses.asdict(kaplan_meier(times.time[own], times.status[own].tolist(), times.cluster[own]))
    shown = np.unique(np.linspace(0, max(len(curve["times"]) - 1, 0), DRAWN).astype(int))
    return {name: part[shown] if isinstance(part, np.ndarray) and len(part) else part for name, part in curve.items()}


def _level(series: Series, width: float) -> tuple[float, float, float]:
    """Of members with a detector, geometric mean and interval over members."""
    return log_mean_interval(series.members.loc[series.members["width"] == width, "level"].tolist())


def _share(series: Series, width: float) -> tuple[float, float, float]:
    """Of a member's heads that have a level, mean and interval over members."""
    own = series.heads[series.heads["width"] == width]
    middle, low, high = mean_interval(own["level"].notna().groupby(own["member_id"]).mean().tolist())
    return middle, max(low, 0.0), min(high, 1.0)


def _matter(series: Series, width: float) -> tuple[float, float, float]:
    """Heads a member that matter, mean and interval over members."""
    return mean_interval(series.members.loc[series.members["width"] == width, "heads_that_matter"].tolist())


def exponents(series: Series) -> dict[str, Any]:
    """How risen heads approach their plateaus: which law is preferred, why exponents are refused, and whether widths
    share one exponent (members dealt out anew to widths). Exponents are of heads that prefer a power law."""
    risen, told = series.heads[series.heads["status"].isin(STAYED)], power_laws(series.heads)
    refused = risen.loc[risen["relaxation_refusal"] != "", "relaxation_refusal"]
    test: Any = None
    if told["width"].nunique() > 1:
        test = permutation_test(told["width"], np.log(told["relaxation"]), told[series.cluster], statistic="spread")
    return {
        "heads": len(risen),
        "told": len(told),
        "members": int(told["member_id"].nunique()),
        "preferred": risen["relaxation_law"].value_counts().to_dict(),
        "growth": risen["growth_law"].value_counts().to_dict(),
        "refusals": refused.str.replace(FIGURE, "…", regex=True).value_counts().to_dict(),
        "by_width": {f"{width:g}": log_mean_interval(_by_member(group)) for width, group in told.groupby("width")},
        "one_value": test,
    }


def power_laws(heads: pd.DataFrame) -> pd.DataFrame:
    """Heads that rose and stayed, prefer a power law and have its exponent."""
    stands = (heads["relaxation_refusal"] == "") & (heads["relaxation_law"] == "power")
    return heads[stands & heads["status"].isin(STAYED)]


def _by_member(told: pd.DataFrame) -> list[float]:
    """Median exponent of each member."""
    return told.groupby("member_id")["relaxation"].median().tolist()


def tail_of(series: Series) -> dict[str, Any]:
    """The tail of heads' levels over the median of their width; heads that rose and did not get there are censored.

    Heads that come after the runs' end and show no rise by then are missing, which bends the tail down: a bend is held
    against the power law only where the largest time is far from the end.
    """
    heads = series.heads[series.heads["level"].notna() | series.heads["status"].ne("never")]
    last = heads["member_id"].map(series.members.set_index("member_id")["last_step"])
    median = heads.groupby("width")["level"].transform("median")
    known = heads["level"].notna().to_numpy()
    times = (heads["level"].clip(lower=STEP_ZERO).fillna(last) / median).to_numpy(float)
    kept = np.isfinite(times)
    tail = fit_tail(times[kept], censored=~known[kept], clusters=heads[series.cluster].to_numpy()[kept])
    found = {**dataclasses.asdict(tail), "verdict": tail.verdict, "heads": int(kept.sum())}
    if tail.refusal:
        return found
    end = float((last / median).min())
    if tail.verdict == "not a power law" and times[known].max() > NEAR_END * end:
        found["verdict"] = "undecided"
    order = np.sort(times[known])
    above = 1 - (np.arange(len(order)) + 0.5) / len(order)
    even = np.geomspace(above[-1], above[0], DRAWN)  # evenly in the logarithm of what is drawn
    shown = np.unique(np.searchsorted(-above, -even[::-1]).clip(max=len(order) - 1))
    return {**found, "end": end, "times": order[shown], "survival": above[shown]}


def collapse_of(series: Series) -> dict[str, Any]:
    """Whether the lift of best detectors is one curve of step x width^g, from a tenth of the least median level on."""
    levels, shared = series.members.groupby("width")["level"].median(), series.cluster == "seed"
    lines, window = detector_curves(series), (0.1 * levels.min(), float(series.members["last_step"].max()))
    if shared and lines:
        seeds = set.intersection(*(set(curve.index) for curve in lines.values()))
        lines = {width: curve.loc[sorted(seeds)] for width, curve in lines.items()}
    if len(lines) < 2 or not window[0] < window[1]:
        return dataclasses.asdict(Collapse(leave_one_out=np.ones(0), refusal="fewer than 2 widths with detectors"))
    steps = next(iter(lines.values())).columns.to_numpy(float)
    curves = [curve.to_numpy() for curve in lines.values()]
    found = collapse(list(lines), steps, curves, window=window, shared=shared)
    return {**dataclasses.asdict(found), "window": window, "members": sum(map(len, lines.values()))}


def detector_curves(series: Series) -> dict[float, pd.DataFrame]:
    """Lift of members' best detectors by width: a row a member, or a seed where these are shared; a column a step."""
    if series.curves.empty:
        return {}
    kept = series.curves[series.curves["step"] > 0]
    tables = {width: kept[kept["width"] == width] for width in sorted(kept["width"].unique().tolist())}
    return {
        width: table.pivot_table(index=series.cluster, columns="step", values="lift") for width, table in tables.items()
    }


def plain(value: Any) -> Any:
    """Dataclasses, arrays and numbers of numpy as what JSON has; a number that is not one becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
