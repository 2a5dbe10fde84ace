"""What holds across a sweep: whether and when heads emerge against width, exponents, tails and collapse.

All is worked out per *series*: the members that differ in width and seed only. Where a sweep has several learning
rates there is a further series of each width's best rate, by validation loss, so that the choice does not look at what
is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cluster.intervals import log_mean_interval, mean_interval
from probes.collapse import Collapse, collapse
from probes.emergence import STEP_ZERO
from probes.scaling import WidthLaw, censored_regression, fit_width_law
from probes.survival import SurvivalCurve, kaplan_meier, log_rank_scores, permutation_test
from probes.tails import fit_tail

RATE = "train.learning_rate"
BEST = "each width's best learning rate"
DRAWN = 400  # points of a curve that are kept for figures
MEMBERS, HEADS = "member_level", "head_level"  # endpoints: the level of best detectors, that of every head
Law = Mapping[str, Any]
"""Plain form of what `laws_of` finds, as in sweep.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Finished members that are compared along width, their heads on the judged relation, and the lift curves of their
    best detectors. cluster: the column that names independent units."""

    name: str
    cluster: str
    members: pd.DataFrame
    heads: pd.DataFrame
    curves: pd.DataFrame

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

    def make(name: str, some: pd.DataFrame) -> Series:
        heads, lines = (
            table[table["member_id"].isin(some["member_id"])] if len(table) else table for table in (own, curves)
        )
        return Series(name=name, cluster=cluster, members=some, heads=heads, curves=lines)

    others = [name for name in axes if name != "width"]
    found = [make(label(others, key), group) for key, group in _groups(finished, others)]
    if RATE in others and finished[RATE].nunique() > 1:
        rest = [name for name in others if name != RATE]
        for key, group in _groups(finished, rest):
            found.append(make(", ".join(filter(None, (BEST, label(rest, key)))), at_best_rate(group)))
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


def at_best_rate(members: pd.DataFrame) -> pd.DataFrame:
    """Of each width the members at the rate of least median validation loss at the end."""
    losses = members.groupby(["width", RATE])["validation_loss"].median()
    best = {width: losses[width].idxmin() for width in members["width"].unique()}
    return members[members[RATE] == members["width"].map(best)]


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


def laws_of(series: Series) -> Law:
    """All laws of one series, as plain numbers, texts and lists."""
    found: dict[str, Any] = {
        "series": series.name,
        "members": len(series.members),
        "heads": len(series.heads),
        "clusters": int(series.members[series.cluster].nunique()),
        "widths": series.widths,
    }
    for name, times in ((MEMBERS, member_times(series)), (HEADS, head_times(series))):
        found[name] = {
            "law": _with_preferred(fit_width_law(*times.columns)),
            "regression": censored_regression(*times.columns),
            "log_rank": permutation_test(
                times.width, log_rank_scores(times.time, times.status.tolist()), times.cluster
            ),
            "survival": {f"{width:g}": _survival(times, width) for width in series.widths},
        }
    found[MEMBERS]["observed"] = {f"{width:g}": _level(series, width) for width in series.widths}
    found["share"] = {f"{width:g}": _share(series, width) for width in series.widths}
    found["matter"] = {f"{width:g}": _matter(series, width) for width in series.widths}
    found["relaxation"] = exponents(series)
    found["tail"] = tail_of(head_times(series))
    found["collapse"] = collapse_of(series)
    return plain(found)  # type: ignore[no-any-return]


def _with_preferred(law: WidthLaw) -> dict[str, Any]:
    return {**dataclasses.asdict(law), "preferred": law.preferred}


def _survival(times: Times, width: float) -> SurvivalCurve:
    own = times.width == width
    return kaplan_meier(times.time[own], times.status[own].tolist(), times.cluster[own])


def _level(series: Series, width: float) -> tuple[float, float, float]:
    """Of members with a detector, geometric mean and interval over members."""
    return log_mean_interval(series.members.loc[series.members["width"] == width, "level"].tolist())


def _share(series: Series, width: float) -> tuple[float, float, float]:
    """Of a member's heads that rose, mean and interval over members."""
    own = series.heads[series.heads["width"] == width]
    middle, low, high = mean_interval((own["status"] != "never").groupby(own["member_id"]).mean().tolist())
    return middle, max(low, 0.0), min(high, 1.0)


def _matter(series: Series, width: float) -> tuple[float, float, float]:
    """Heads a member that matter, mean and interval over members."""
    return mean_interval(series.members.loc[series.members["width"] == width, "heads_that_matter"].tolist())


def exponents(series: Series) -> dict[str, Any]:
    """How risen heads approach their plateaus: which law is preferred, why exponents are refused, and whether widths
    share one exponent (members dealt out anew to widths)."""
    risen = series.heads[series.heads["status"].isin(("emerged", "growing"))]
    told = risen[risen["relaxation_refusal"] == ""]
    test: Any = None
    if told["width"].nunique() > 1:
        test = permutation_test(told["width"], np.log(told["relaxation"]), told[series.cluster], statistic="spread")
    return {
        "heads": len(risen),
        "told": len(told),
        "members": int(told["member_id"].nunique()),
        "preferred": risen["relaxation_law"].value_counts().to_dict(),
        "growth": risen["growth_law"].value_counts().to_dict(),
        "refusals": risen.loc[risen["relaxation_refusal"] != "", "relaxation_refusal"].value_counts().to_dict(),
        "by_width": {f"{width:g}": mean_interval(_by_member(group)) for width, group in told.groupby("width")},
        "one_value": test,
    }


def _by_member(told: pd.DataFrame) -> list[float]:
    """Median exponent of each member."""
    return told.groupby("member_id")["relaxation"].median().tolist()


def tail_of(times: Times) -> dict[str, Any]:
    """The tail of heads' levels over the median of their width; of heads that get there."""
    kept = times.status == "emerged"
    scaled = times.time.copy()
    for width in np.unique(times.width[kept]):
        own = kept & (times.width == width)
        scaled[own] /= np.median(times.time[own])
    tail = fit_tail(scaled[kept], clusters=times.cluster[kept])
    found = {**dataclasses.asdict(tail), "verdict": tail.verdict, "heads": int(kept.sum())}
    if tail.refusal:
        return found
    curve = kaplan_meier(scaled[kept], times.status[kept].tolist(), times.cluster[kept])
    shown = np.unique(np.linspace(0, len(curve.times) - 1, min(DRAWN, len(curve.times))).astype(int))
    return {**found, "times": curve.times[shown], "survival": curve.survival[shown]}


def collapse_of(series: Series) -> dict[str, Any]:
    """Whether the lift of best detectors is one curve of step x width^g, from a tenth of the least median level on."""
    levels = series.members.groupby("width")["level"].median()
    lines, window = detector_curves(series), (0.1 * levels.min(), float(series.members["last_step"].max()))
    if len(lines) < 2 or not window[0] < window[1]:
        return dataclasses.asdict(Collapse(leave_one_out=np.ones(0), refusal="fewer than 2 widths with detectors"))
    steps = next(iter(lines.values())).columns.to_numpy(float)
    found = collapse(list(lines), steps, [curve.to_numpy() for curve in lines.values()], window=window)
    return {**dataclasses.asdict(found), "window": window, "members": sum(map(len, lines.values()))}


def detector_curves(series: Series) -> dict[float, pd.DataFrame]:
    """Lift of members' best detectors by width: a row a member, a column a step above 0."""
    if series.curves.empty:
        return {}
    kept = series.curves[series.curves["step"] > 0]
    tables = {width: kept[kept["width"] == width] for width in sorted(kept["width"].unique().tolist())}
    return {
        width: table.pivot_table(index="member_id", columns="step", values="lift") for width, table in tables.items()
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
