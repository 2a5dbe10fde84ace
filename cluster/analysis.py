"""From curve tables to timescales: Ray actors over finished members, then tables by head, member and width."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import ray
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from numpy.typing import NDArray
from scipy.stats import t as student

from cluster.encoding import decode
from cluster.sweep import Sweep
from cluster.tracking import Place, log_points, now_ms, short_axes
from probes.ablation import matters
from probes.attention import lift
from probes.emergence import Status, fit_emergence

STATUSES: tuple[str, ...] = get_args(Status)
RISEN = ("emerged", "growing", "transient", "at_start")
DETECTOR_LIFT = 1.5  # least lift over exchanged rows of a head that is called a detector
CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCurve:
    """One probe's table of one member. relations: Q names; steps `[T]`; values `[T, L, H, Q, R]` by column."""

    relations: tuple[str, ...]
    steps: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float32]]


def dense(table: pd.DataFrame, probe: str) -> DenseCurve:
    """The rows of one probe as a dense grid. ValueError if the member was not measured by it."""
    rows = table[table["probe"] == probe]
    if rows.empty:
        raise ValueError(f"probe: {probe!r} is not in the table; it must be one of {sorted(set(table['probe']))}")
    keys = ["step", "layer", "head", "relation", "replicate"]
    rows = rows.sort_values(keys)
    shape = tuple(rows[key].nunique() for key in keys)
    values = {
        column: rows[column].to_numpy(np.float32).reshape(shape)
        for column in rows.columns.difference([*keys, "probe", "wall_time"])
        if rows[column].notna().any()
    }
    return DenseCurve(
        relations=tuple(sorted(rows["relation"].unique())), steps=np.sort(rows["step"].unique()), values=values
    )


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over 3 neighbouring probe steps, 2 at the ends; axis 0."""
    padded = np.concatenate([np.full_like(values[:1], np.nan), values, np.full_like(values[:1], np.nan)])
    return np.asarray(np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0))


def analyze_heads(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per (layer, head, relation) of a member: status, timescales with intervals, lifts, worth."""
    curve = dense(table, "attention")
    score = curve.values["score"].astype(float)
    by_uniform = lift(curve.values["score"], curve.values["null_uniform"])
    by_rows = smooth(lift(curve.values["score"], curve.values["null_rows"]))
    worth = head_worth(table)
    rows = []
    for layer, head, q in np.ndindex(score.shape[1:4]):
        null = curve.values["null_uniform"][:, layer, head, q].astype(float)
        sound = np.isfinite(score[:, layer, head, q]).all(0)
        if sound.sum() < 2:
            continue  # the relation is too rare in this probe set to say anything of it
        found = fit_emergence(curve.steps, score[:, layer, head, q][:, sound].T, null[:, sound].T)
        lifts = smooth(by_uniform[:, layer, head, q])
        peak = int(np.argmax(lifts))
        rows.append(
            {
                "relation": curve.relations[q],
                "layer": layer,
                "head": head,
                **{name: getattr(found, name) for name in found.__dataclass_fields__},
                "lift_peak": lifts[peak],
                "lift_end": lifts[-1],
                "lift_rows_peak": by_rows[peak, layer, head, q],
                "detector": bool(np.isfinite(found.level) and by_rows[peak, layer, head, q] > DETECTOR_LIFT),
                **{name: values[layer, head] for name, values in worth.items()},
            }
        )
    return rows


def head_worth(table: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """At the last sparse step, by (layer, head): mean shares of what attention saves, and whether it matters."""
    curve = dense(table, "ablation")
    last = {name: values[-1, :, :, curve.relations.index("all")] for name, values in curve.values.items()}
    columns = ("ablation", "pattern", "only", "whole_layer", "redundancy")
    empty = np.full(next(iter(last.values())).shape, np.nan, dtype=np.float32)
    shares = {f"{name}_share": last.get(name, empty).mean(-1) for name in columns}
    return {**shares, "matters": matters(last.get("pattern", empty))}


def analyze_member(
    table: pd.DataFrame, figures: pd.DataFrame, judged: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The head rows of a member, and its own row: the level of its best detector on the judged relation, and the ends.

    The best detector is the one whose lift peaks highest. Its level is NaN where the member has none.
    """
    heads = analyze_heads(table)
    own = [row for row in heads if row["relation"] == judged]
    detectors = [row for row in own if row["detector"]]
    best = max(detectors, key=lambda row: row["lift_peak"], default=None)
    figure = {name: figures[name].dropna().iloc[-1] for name in figures if figures[name].notna().any()}
    row = {
        "level": best["level"] if best else math.nan,
        "level_low": best["level_low"] if best else math.nan,
        "level_high": best["level_high"] if best else math.nan,
        "best_head": f"{best['layer']}.{best['head']}" if best else "",
        "detectors": len(detectors),
        "risen": sum(row["status"] in RISEN for row in own),
        "heads_that_matter": sum(bool(row["matters"]) for row in own),
        "last_step": int(figures["step"].iloc[-1]),
        "seconds": float(figures["wall_time"].iloc[-1] - figures["wall_time"].iloc[0]),
        **{str(name): float(value) for name, value in figure.items() if name not in ("step", "wall_time")},
    }
    return heads, row


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of members' values and its 90% Student-t interval over members; NaN limits below two members."""
    array = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    if array.size == 0:
        return math.nan, math.nan, math.nan
    if array.size == 1:
        return float(array[0]), math.nan, math.nan
    reach = student.ppf((1 + CONFIDENCE) / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean()), float(array.mean() - reach), float(array.mean() + reach)


def log_mean_interval(times: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of members' times and its 90% interval, Student t over members in log time."""
    low_mid_high = mean_interval([math.log(time) for time in times if time > 0])
    return tuple(math.exp(value) for value in low_mid_high)  # type: ignore[return-value]


def width_table(heads: pd.DataFrame, members: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """One row per point along the axes and relation: shares by status, detectors, geometric means with intervals.

    Times are averaged within a member first: members are the independent units, heads of one network are not.
    """
    rows = []
    for key, group in heads.groupby([*axes, "relation"], sort=True):
        values = dict(zip([*axes, "relation"], key, strict=True))
        by_member = group.groupby("member_id")
        share, share_low, share_high = mean_interval(list(by_member["status"].apply(lambda s: s.isin(RISEN).mean())))
        row: dict[str, Any] = {**values, "members": by_member.ngroups, "heads": len(group)}
        row |= {name: int((group["status"] == name).sum()) for name in STATUSES}
        row |= {"share_risen": share, "share_low": max(share_low, 0.0), "share_high": min(share_high, 1.0)}
        detectors = group[group["detector"]]
        row["detectors_per_member"] = len(detectors) / by_member.ngroups
        best = detectors.loc[detectors.groupby("member_id")["lift_peak"].idxmax()] if len(detectors) else detectors
        row["members_without_detector"] = by_member.ngroups - len(best)
        row |= dict(zip(("level", "level_low", "level_high"), log_mean_interval(list(best["level"])), strict=True))
        risen = group[group["status"].isin(RISEN) & group["t50"].gt(0)]
        t50 = risen.groupby("member_id")["t50"].apply(lambda t: float(np.exp(np.log(t).mean())))
        row |= dict(zip(("t50", "t50_low", "t50_high"), log_mean_interval(list(t50)), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """The tables of a sweep. Members that failed or diverged are rows of `members` with a cause."""

    heads: pd.DataFrame
    members: pd.DataFrame
    widths: pd.DataFrame


def read_tables(client: MlflowClient, run_id: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves and figures of a member run."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [client.download_artifacts(run_id, f"{name}.parquet", folder) for name in ("curves", "figures")]
        curves, figures = (pd.read_parquet(path) for path in paths)
    return curves, figures


class Analyst:
    """Works out one member at a time; the body of a Ray actor."""

    def __init__(self, place: Place, judged: str) -> None:
        self.client, self.judged = MlflowClient(tracking_uri=place.uri), judged

    def analyze(self, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Head rows and the member's row, which also become summary metrics of its run."""
        curves, figures = read_tables(self.client, run_id)
        heads, row = analyze_member(curves, figures, self.judged)
        time_ms = int(figures["wall_time"].iloc[-1] * 1000)  # of the run, not of now: a repeat is the same point
        names = ("level", "detectors", "risen", "heads_that_matter")
        metrics = [
            Metric(name, float(row[name]), time_ms, row["last_step"]) for name in names if np.isfinite(row[name])
        ]
        self.client.log_batch(run_id, metrics=metrics)
        return heads, row


def analyze_sweep(
    client: MlflowClient,
    place: Place,
    sweep: Sweep,
    runs: Mapping[str, Run],
    failed: Sequence[Run],
    on_member: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Tables over the counted runs by member id, by as many actors as the cluster has CPUs; artifacts of the parent."""
    finished = {member: run for member, run in runs.items() if run.info.status == "FINISHED"}
    heads: list[dict[str, Any]] = []
    members: list[dict[str, Any]] = []
    for done, (member, found) in enumerate(_stream(place, sweep.system.relation, finished), start=1):
        keys = member_keys(finished[member], sweep)
        if isinstance(found, str):
            members.append({**keys, "outcome": "not analysed", "cause": found})
        else:
            heads += [{**keys, **head} for head in found[0]]
            members.append({**keys, "outcome": "finished", "cause": "", **found[1]})
        on_member(done, len(finished))
    settled = [run for run in runs.values() if run.info.status != "FINISHED"]
    for run in [*settled, *failed]:
        outcome = run.data.tags.get("outcome", "failed")
        members.append({**member_keys(run, sweep), "outcome": outcome, "cause": run.data.tags.get("cause", "")})
    analysis = tabulate(heads, members, axis_names(sweep))
    save(client, place, analysis)
    return analysis


def tabulate(heads: list[dict[str, Any]], members: list[dict[str, Any]], axes: Sequence[str]) -> Analysis:
    """Rows as tables in a stable order, whatever order they came in."""
    order = [*axes, "seed"]
    member_table = pd.DataFrame(members)
    head_table = pd.DataFrame(heads)
    if not member_table.empty:
        member_table = member_table.sort_values([*order, "member_id"], ignore_index=True)
    if head_table.empty:
        return Analysis(heads=head_table, members=member_table, widths=pd.DataFrame())
    head_table = head_table.sort_values([*order, "member_id", "relation", "layer", "head"], ignore_index=True)
    return Analysis(heads=head_table, members=member_table, widths=width_table(head_table, member_table, axes))


def axis_names(sweep: Sweep) -> list[str]:
    """Columns that the sweep's axes have in the tables; width first."""
    return list(short_axes({"model.width": None, **sweep.axes}))


def member_keys(run: Run, sweep: Sweep) -> dict[str, Any]:
    """What names a member in the tables."""
    tags = run.data.tags
    axes = {name: number(tags[name]) for name in axis_names(sweep)}
    return {"member_id": tags["member_id"], "run_id": run.info.run_id, **axes, "seed": int(tags["seed"])}


def number(text: str) -> float | int | str:
    """A tag's text as the number it stands for, or as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


MemberResult = tuple[list[dict[str, Any]], dict[str, Any]]


def _stream(place: Place, judged: str, runs: Mapping[str, Run]) -> Iterator[tuple[str, MemberResult | str]]:
    """Results by member id as they come, or the cause why there is none; a lost actor's member is analysed again."""
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    kind: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(Analyst)
    actors = [kind.remote(place, judged) for _ in range(max(1, min(cpus, len(runs))))]
    waiting, idle = list(runs), actors * 2  # two members on each actor: the next one's tables are asked for in time
    under_way: dict[Any, tuple[str, Any]] = {}
    while waiting or under_way:
        while waiting and idle:
            member, actor = waiting.pop(0), idle.pop(0)
            under_way[actor.analyze.remote(runs[member].info.run_id)] = (member, actor)
        ready, _ = ray.wait(list(under_way), num_returns=1)
        member, actor = under_way.pop(ready[0])
        idle.append(actor)
        try:
            yield member, ray.get(ready[0])
        except ray.exceptions.RayError as error:
            yield member, str(error).strip().splitlines()[-1]


def save(client: MlflowClient, place: Place, analysis: Analysis) -> None:
    """`heads.parquet`, `members.parquet`, `widths.parquet`, `sweep_summary.json` and width curves on the parent run."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("heads", "members", "widths"):
            getattr(analysis, name).to_parquet(Path(folder) / f"{name}.parquet", index=False)
        (Path(folder) / "summary.json").write_text(json.dumps(summary(analysis), indent=1))
        client.log_artifacts(place.parent, folder, "analysis")
    log_width_curves(client, place, analysis.widths)


def summary(analysis: Analysis) -> dict[str, Any]:
    """Counts by outcome and status."""
    return {
        "members": analysis.members["outcome"].value_counts().to_dict() if len(analysis.members) else {},
        "heads": {
            str(relation): group["status"].value_counts().to_dict()
            for relation, group in (analysis.heads.groupby("relation") if len(analysis.heads) else ())
        },
    }


def log_width_curves(client: MlflowClient, place: Place, widths: pd.DataFrame) -> None:
    """Aggregates on the parent with step = width, where nothing but width is swept: MLflow draws them as a curve.

    Only what differs from the value logged last is logged again, as points cannot be taken back.
    """
    if widths.empty or widths.duplicated(["width", "relation"]).any():
        return
    points: dict[str, dict[int, float]] = {}
    for relation, group in widths.groupby("relation"):
        for column in ("level", "t50", "share_risen", "detectors_per_member"):
            name = f"{relation}/{column}"
            known = {metric.step: metric.value for metric in client.get_metric_history(place.parent, name)}
            series = {int(width): float(value) for width, value in zip(group["width"], group[column], strict=True)}
            points[name] = {w: v for w, v in series.items() if np.isfinite(v) and known.get(w) != v}
    log_points(client, place.parent, points, now_ms())


def load_analysis(client: MlflowClient, parent: str) -> Analysis:
    """The tables saved last. ValueError if the sweep was not analysed yet."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            root = Path(client.download_artifacts(parent, "analysis", folder))
        except Exception as error:
            raise ValueError(f"sweep: run {parent} has no analysis yet; run `headway analyze` first") from error
        tables = {name: pd.read_parquet(root / f"{name}.parquet") for name in ("heads", "members", "widths")}
    return Analysis(**tables)


def load_sweep_config(client: MlflowClient, parent: str) -> Sweep:
    """The sweep's config as stored on its parent run."""
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(parent, "sweep.json", folder)
        sweep: Sweep = decode(Sweep, json.loads(Path(path).read_text()), "sweep")
    return sweep
