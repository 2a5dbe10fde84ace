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

from cluster.crew import spread_out
from cluster.encoding import decode
from cluster.sweep import Sweep
from cluster.tracking import Place, log_points, now_ms
from probes.ablation import matters
from probes.attention import lift
from probes.emergence import Status, fit_emergence, smooth

STATUSES: tuple[str, ...] = get_args(Status)
RISEN = ("emerged", "growing", "transient", "at_start")
DETECTOR_LIFT = 1.5  # least lift over exchanged rows of a head that is called a detector
CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCurve:
    """One probe's table of one member. relations: Q names; steps `[T]`; values `[T, L, H, Q, R]` by column.

    Columns of other probes are NaN throughout.
    """

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
    }
    return DenseCurve(
        relations=tuple(sorted(rows["relation"].unique())), steps=np.sort(rows["step"].unique()), values=values
    )


def analyze_heads(table: pd.DataFrame, worth: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """One row per (layer, head, relation) of a member: status, timescales with intervals, lifts, and its worth."""
    curve = dense(table, "attention")
    score = curve.values["score"].astype(float)
    by_uniform = along_steps(lift(curve.values["score"], curve.values["null_uniform"]))
    by_rows = along_steps(lift(curve.values["score"], curve.values["null_rows"]))
    rows = []
    for layer, head, q in np.ndindex(score.shape[1:4]):
        null = curve.values["null_uniform"][:, layer, head, q].astype(float)
        sound = np.isfinite(score[:, layer, head, q]).all(0)
        if sound.sum() < 2:
            continue  # the relation is too rare in this probe set to say anything of it
        found = fit_emergence(curve.steps, score[:, layer, head, q][:, sound].T, null[:, sound].T)
        lifts = by_uniform[:, layer, head, q]
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


def along_steps(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lifts `[T, ...]` smoothed over probe steps as those are that statuses and times come from."""
    return np.moveaxis(smooth(np.moveaxis(values, 0, -1)), -1, 0)


def head_worth(table: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """At the last sparse step, by (layer, head): mean shares of what attention saves, and whether it matters."""
    curve = dense(table, "ablation")
    last = {name: values[-1, :, :, curve.relations.index("all")] for name, values in curve.values.items()}
    columns = ("ablation", "pattern", "only", "whole_layer", "redundancy")
    return {
        **{f"{name}_share": last[name].mean(-1) for name in columns if name in last},
        "matters": matters(last["pattern"]),
    }


def analyze_member(
    table: pd.DataFrame, figures: pd.DataFrame, judged: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The head rows of a member, and its own row: the level of its best detector on the judged relation, and the ends.

    The best detector is the one whose lift peaks highest. Its level is NaN where the member has none.
    """
    worth = head_worth(table)
    heads = analyze_heads(table, worth)
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
        "heads_that_matter": int(worth["matters"].sum()),
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
    """One row per point along the axes and relation: members by outcome, heads by status, geometric means of times.

    Times are averaged within a member first: members are the independent units, heads of one network are not. t50 is
    over risen heads; `t50_bounds` of these were still growing, so that theirs are lower bounds and so is the mean.
    """
    rows = []
    for key, group in heads.groupby([*axes, "relation"], sort=True):
        by_member = group.groupby("member_id")
        own = members.loc[(members[[*axes]] == list(key[:-1])).all(axis=1), "outcome"].value_counts()
        row: dict[str, Any] = dict(zip([*axes, "relation"], key, strict=True))
        row |= {"members": int(own.get("finished", 0)), "diverged": int(own.get("diverged", 0))}
        row |= {"lost": int(own.sum()) - row["members"] - row["diverged"], "heads": len(group)}
        row |= {name: int((group["status"] == name).sum()) for name in STATUSES}
        share, low, high = mean_interval(list(by_member["status"].apply(lambda s: s.isin(RISEN).mean())))
        row |= {"share_risen": share, "share_low": max(low, 0.0), "share_high": min(high, 1.0)}
        detectors = group[group["detector"]]
        row["detectors_per_member"] = len(detectors) / max(row["members"], 1)
        best = detectors.loc[detectors.groupby("member_id")["lift_peak"].idxmax()] if len(detectors) else detectors
        row["members_without_detector"] = row["members"] - len(best)
        row |= dict(zip(("level", "level_low", "level_high"), log_mean_interval(list(best["level"])), strict=True))
        risen = group[group["status"].isin(RISEN) & group["t50"].gt(0)]
        t50 = risen.groupby("member_id")["t50"].apply(lambda t: float(np.exp(np.log(t).mean())))
        row |= dict(zip(("t50", "t50_low", "t50_high"), log_mean_interval(list(t50)), strict=True))
        rows.append({**row, "t50_bounds": int((risen["status"] == "growing").sum())})
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
        outcome, cause = run.data.tags.get("outcome", "failed"), run.data.tags.get("cause", "its worker was stopped")
        members.append({**member_keys(run, sweep), "outcome": outcome, "cause": cause})
    analysis = tabulate(heads, members, sweep.axis_names)
    save(client, place, analysis)
    return analysis


def tabulate(heads: list[dict[str, Any]], members: list[dict[str, Any]], axes: Sequence[str]) -> Analysis:
    """Rows as tables in a stable order, whatever order they came in."""
    order = [*axes, "seed"]
    member_table, head_table = pd.DataFrame(members), pd.DataFrame(heads)
    for name in axes:
        if any(
            isinstance(row[name], str) for row in members
        ):  # one type a column: None or auto beside numbers are texts
            for table in (member_table, head_table):
                table[name] = table[name].astype(str) if name in table else None
    if not member_table.empty:
        member_table = member_table.sort_values([*order, "member_id"], ignore_index=True)
    if head_table.empty:
        return Analysis(heads=head_table, members=member_table, widths=pd.DataFrame())
    head_table = head_table.sort_values([*order, "member_id", "relation", "layer", "head"], ignore_index=True)
    return Analysis(heads=head_table, members=member_table, widths=width_table(head_table, member_table, axes))


def member_keys(run: Run, sweep: Sweep) -> dict[str, Any]:
    """What names a member in the tables."""
    tags = run.data.tags
    axes = {name: number(tags[name]) for name in sweep.axis_names}
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
    """Results by member id as they come, or the cause why there is none, from as many actors as there are CPUs."""
    kind: Any = ray.remote(num_cpus=1)(Analyst)
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    work = spread_out(
        lambda: kind.remote(place, judged),
        lambda actor, member: actor.analyze.remote(runs[member].info.run_id),
        list(runs),
        max(1, cpus),
    )
    for member, found in work:
        yield member, str(found).strip().splitlines()[-1] if isinstance(found, Exception) else found


def save(client: MlflowClient, place: Place, analysis: Analysis) -> None:
    """`heads.parquet`, `members.parquet`, `widths.parquet`, `sweep.json` and width curves on the parent run."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("heads", "members", "widths"):
            getattr(analysis, name).to_parquet(Path(folder) / f"{name}.parquet", index=False)
        (Path(folder) / "sweep.json").write_text(json.dumps(summary(analysis), indent=1))
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
        for column in ("level", "share_risen", "detectors_per_member"):
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
