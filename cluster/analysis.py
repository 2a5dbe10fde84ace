"""From curve tables to timescales: Ray actors over finished members, then tables by head, member and width."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from numpy.typing import NDArray

from cluster.crew import spread_out
from cluster.encoding import decode
from cluster.intervals import log_mean_interval, mean_interval
from cluster.laws import STAYED, Law, Series, laws_or_cause, series_of
from cluster.sweep import Sweep
from cluster.tracking import Place, log_points, now_ms
from probes.ablation import matters
from probes.attention import lift
from probes.emergence import STATUSES, Emergence, fit_emergences, smooth
from probes.growth import fit_growths
from probes.relaxation import fit_relaxations

RISEN = ("emerged", "growing", "transient", "at_start")
TABLES = ("heads", "members", "widths", "detectors")
STAYED_NOT = "it did not rise and stay"
DETECTOR_LIFT = 1.5  # least lift over exchanged rows of a head that is called a detector


Rows = list[dict[str, Any]]
MemberResult = tuple[Rows, dict[str, Any], Rows]
"""Rows of the head table, the row of the member table, rows of the table of detectors' curves."""


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


def analyze_heads(curve: DenseCurve, worth: Mapping[str, NDArray[Any]]) -> Rows:
    """One row per (layer, head, relation) of a member: status, timescales with intervals, lifts, how it approached its
    plateau, and its worth. Relations too rare in the probe set to say anything of them have no rows."""
    score, null = curve.values["score"], curve.values["null_uniform"]
    by_uniform = along_steps(lift(score, null))
    by_rows = along_steps(lift(score, curve.values["null_rows"]))
    scores, nulls = (np.moveaxis(values, 0, -1).reshape(-1, values.shape[-1], len(values)) for values in (score, null))
    sound: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(-1))
    places = np.array(list(np.ndindex(score.shape[1:4])))
    kept = sound.sum(-1) >= 2
    scores, nulls, sound, places = (
        values[kept] for values in (scores.astype(float), nulls.astype(float), sound, places)
    )
    fits = fit_emergences(curve.steps, scores, nulls, sound=sound)
    means = np.nanmean(np.where(sound[..., None], scores, np.nan), axis=1)
    rows = []
    for (layer, head, q), found, relaxed in zip(places, fits, approach(curve.steps, means, fits), strict=True):
        lifts = by_uniform[:, layer, head, q]
        peak = int(np.argmax(lifts))
        over_rows = by_rows[peak, layer, head, q]
        rows.append(
            {
                "relation": curve.relations[q],
                "layer": int(layer),
                "head": int(head),
                **dataclasses.asdict(found),
                "lift_peak": lifts[peak],
                "lift_end": lifts[-1],
                "lift_rows_peak": over_rows,
                "detector": bool(np.isfinite(found.level) and over_rows > DETECTOR_LIFT),
                **relaxed,
                **{name: values[layer, head] for name, values in worth.items()},
            }
        )
    return rows


def approach(steps: NDArray[np.int64], means: NDArray[np.float64], fits: Sequence[Emergence]) -> Rows:
    """How curves `means [n, T]` that rose and stayed grew, from onset to t50, and approach their plateaus, from t50 to
    the end, as columns."""
    stayed = [found.status in STAYED for found in fits]
    late = [(found.t50, steps[-1]) if yes else (np.nan, np.nan) for found, yes in zip(fits, stayed, strict=True)]
    early = [(found.onset, found.t50) if yes else (np.nan, np.nan) for found, yes in zip(fits, stayed, strict=True)]
    relaxations = fit_relaxations(steps, means, np.reshape(late, (-1, 2)))
    growths = fit_growths(steps, means, np.reshape(early, (-1, 2)))
    return [
        {
            "relaxation": found.exponent,
            "relaxation_low": found.low,
            "relaxation_high": found.high,
            "relaxation_law": found.preferred if yes else "",
            "relaxation_decades": found.decades,
            "relaxation_t0": found.t0,
            "relaxation_plateau": found.s_inf,
            "relaxation_refusal": found.refusal if yes else STAYED_NOT,
            "growth_law": grown.preferred if yes else "",
            "growth": grown.value,
            "growth_low": grown.low,
            "growth_high": grown.high,
            "growth_refusal": grown.refusal if yes else STAYED_NOT,
        }
        for found, grown, yes in zip(relaxations, growths, stayed, strict=True)
    ]


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


def analyze_member(table: pd.DataFrame, figures: pd.DataFrame, judged: str) -> MemberResult:
    """The head rows of a member; its own row: the level of its best detector on the judged relation, and the ends; and
    that head's lift over training.

    The best detector is the one whose lift peaks highest. Its level is NaN where the member has none.
    """
    worth, curve = head_worth(table), dense(table, "attention")
    heads = analyze_heads(curve, worth)
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
    return heads, row, detector_line(curve, judged, best)


def detector_line(curve: DenseCurve, judged: str, best: Mapping[str, Any] | None) -> Rows:
    """Lift of the best detector by step; none where there is no detector."""
    if best is None:
        return []
    at = (slice(None), best["layer"], best["head"], curve.relations.index(judged))
    lifts = along_steps(lift(curve.values["score"][at], curve.values["null_uniform"][at]))
    return [{"step": int(step), "lift": float(value)} for step, value in zip(curve.steps, lifts, strict=True)]


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
        later = [math.inf] * row["members_without_detector"]
        row["level_median"] = float(np.median([*best["level"], *later] or math.nan))
        risen = group[group["status"].isin(RISEN) & group["t50"].gt(0)]
        t50 = risen.groupby("member_id")["t50"].apply(lambda t: float(np.exp(np.log(t).mean())))
        row |= dict(zip(("t50", "t50_low", "t50_high"), log_mean_interval(list(t50)), strict=True))
        rows.append({**row, "t50_bounds": int((risen["status"] == "growing").sum())})
    return pd.DataFrame(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """The tables of a sweep. Members that failed or diverged are rows of `members` with a cause.

    detectors: lift by step of every member's best detector; laws: what holds across each series of members; llc,
    degrees: learning coefficients and estimates of k, where they were measured (`cluster.geometry`); left_out: lines on
    what was measured of these and no more counts.
    """

    heads: pd.DataFrame
    members: pd.DataFrame
    widths: pd.DataFrame
    detectors: pd.DataFrame = field(default_factory=pd.DataFrame)
    laws: Sequence[Law] = ()
    llc: pd.DataFrame = field(default_factory=pd.DataFrame)
    degrees: pd.DataFrame = field(default_factory=pd.DataFrame)
    left_out: Sequence[str] = ()


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

    def analyze(self, run_id: str) -> MemberResult:
        """The member's rows; its own also become summary metrics of its run."""
        curves, figures = read_tables(self.client, run_id)
        heads, row, line = analyze_member(curves, figures, self.judged)
        time_ms = int(figures["wall_time"].iloc[-1] * 1000)  # of the run, not of now: a repeat is the same point
        names = ("level", "detectors", "risen", "heads_that_matter")
        metrics = [
            Metric(name, float(row[name]), time_ms, row["last_step"]) for name in names if np.isfinite(row[name])
        ]
        self.client.log_batch(run_id, metrics=metrics)
        return heads, row, line


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
    heads, members, lines = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for done, (member, found) in enumerate(_stream(place, sweep.system.relation, finished), start=1):
        keys = member_keys(finished[member], sweep)
        if isinstance(found, str):
            members.append({**keys, "outcome": "not analysed", "cause": found})
        else:
            heads += [{**keys, **head} for head in found[0]]
            members.append({**keys, "outcome": "finished", "cause": "", **found[1]})
            lines += [{**keys, **row} for row in found[2]]
        on_member(done, len(finished))
    settled = [run for run in runs.values() if run.info.status != "FINISHED"]
    for run in [*settled, *failed]:
        outcome, cause = run.data.tags.get("outcome", "failed"), run.data.tags.get("cause", "its worker was stopped")
        members.append({**member_keys(run, sweep), "outcome": outcome, "cause": cause})
    analysis = tabulate(heads, members, sweep.axis_names, lines)
    analysis = replace(analysis, laws=find_laws(sweep, analysis))
    save(client, place, analysis)
    return analysis


def find_laws(sweep: Sweep, analysis: Analysis) -> list[Law]:
    """The laws of each series, on as many CPUs as the cluster has free; of one alone here, where all is loaded."""
    series = series_of_sweep(sweep, analysis)
    if len(series) == 1:
        return [laws_or_cause(series[0])]
    task: Any = ray.remote(num_cpus=1, max_retries=3)(laws_or_cause)
    found: list[Law] = ray.get([task.remote(each) for each in series])
    return found


def series_of_sweep(sweep: Sweep, analysis: Analysis) -> list[Series]:
    """The series of a sweep; seeds are the independent units where widths share their data order, else members."""
    cluster = "seed" if sweep.data.order == "seed" else "member_id"
    tables = analysis.members, analysis.heads, analysis.detectors
    return series_of(*tables, sweep.axis_names, sweep.system.relation, cluster)


def tabulate(heads: Rows, members: Rows, axes: Sequence[str], lines: Sequence[dict[str, Any]] = ()) -> Analysis:
    """Rows as tables in a stable order, whatever order they came in."""
    order = [*axes, "seed"]
    member_table, head_table, line_table = pd.DataFrame(members), pd.DataFrame(heads), pd.DataFrame(list(lines))
    for name in axes:
        if any(
            isinstance(row[name], str) for row in members
        ):  # one type a column: None or auto beside numbers are texts
            for table in (member_table, head_table, line_table):
                table[name] = table[name].astype(str) if name in table else None
    if not member_table.empty:
        member_table = member_table.sort_values([*order, "member_id"], ignore_index=True)
    if not line_table.empty:
        line_table = line_table.sort_values([*order, "member_id", "step"], ignore_index=True)
    if head_table.empty:
        return Analysis(heads=head_table, members=member_table, widths=pd.DataFrame(), detectors=line_table)
    head_table = head_table.sort_values([*order, "member_id", "relation", "layer", "head"], ignore_index=True)
    widths = width_table(head_table, member_table, axes)
    return Analysis(heads=head_table, members=member_table, widths=widths, detectors=line_table)


def member_keys(run: Run, sweep: Sweep) -> dict[str, Any]:
    """What names a member in the tables."""
    tags = run.data.tags
    axes = {name: number(tags[name]) for name in sweep.axis_names}
    return {"member_id": tags["member_id"], "run_id": run.info.run_id, **axes, "seed": int(tags["seed"])}


def member_axes(runs: Sequence[Run], sweep: Sweep, analysis: Analysis) -> dict[str, dict[str, Any]]:
    """By run what names a member, in the order of the member table, with its types."""
    by_run = {run.info.run_id: member_keys(run, sweep) for run in runs}
    if len(analysis.members):
        names = list(next(iter(by_run.values()), {}))
        known = {str(row["run_id"]): row for row in analysis.members[names].to_dict("records")} if names else {}
        by_run = {run: {str(k): v for k, v in known.get(run, own).items()} for run, own in by_run.items()}
        order = {run: place for place, run in enumerate(known)}
        by_run = dict(sorted(by_run.items(), key=lambda item: order.get(item[0], len(order))))
    for name in sweep.axis_names:
        if any(isinstance(own[name], str) for own in by_run.values()):  # one type a column
            for own in by_run.values():
                own[name] = str(own[name])
    return by_run


def number(text: str) -> float | int | str:
    """A tag's text as the number it stands for, or as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
    """`heads.parquet` and the other tables, `sweep.json` and width curves on the parent run."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TABLES:
            getattr(analysis, name).to_parquet(Path(folder) / f"{name}.parquet", index=False)
        (Path(folder) / "sweep.json").write_text(json.dumps(summary(analysis), indent=1))
        client.log_artifacts(place.parent, folder, "analysis")
    log_width_curves(client, place, analysis.widths)


def summary(analysis: Analysis) -> dict[str, Any]:
    """Counts by outcome and status, and the laws."""
    return {
        "laws": list(analysis.laws),
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
            tables: dict[str, Any] = {name: pd.read_parquet(root / f"{name}.parquet") for name in TABLES}
            laws = json.loads((root / "sweep.json").read_text())["laws"]
        except Exception as error:
            hint = "run `headway analyze` first"
            raise ValueError(f"sweep: run {parent} has no analysis yet, or one of an older version; {hint}") from error
    return Analysis(**tables, laws=laws)


def load_sweep_config(client: MlflowClient, parent: str) -> Sweep:
    """The sweep's config as stored on its parent run."""
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(parent, "sweep.json", folder)
        sweep: Sweep = decode(Sweep, json.loads(Path(path).read_text()), "sweep")
    return sweep
