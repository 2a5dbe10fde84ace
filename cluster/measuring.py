"""The job of measuring degenerate geometry: finished members of a sweep, as Ray tasks, none a second time."""

from __future__ import annotations

import json
import math
import operator
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from cluster import tracking
from cluster.analysis import Analysis, load_analysis, member_axes
from cluster.dispatch import make_pools, ray_cluster, settle_resources, slots
from cluster.driver import Desk, make_report
from cluster.encoding import decode
from cluster.geometry import TABLES, VERSION, Geometry, Kept, Request, Subject, head_facts
from cluster.sweep import MemberConfig, Sweep
from cluster.tracking import Place
from cluster.trial import pool_name, to_parquet
from sim.checks import require
from sim.pool import Pool
from train.process import be_worker

CURVE = "llc_best_head"


class Display(Protocol):
    """What a user sees meanwhile."""

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""

    def measures(
        self, request: Request, members: Sequence[Subject], steps: Sequence[int], estimates: int, seconds: float
    ) -> None:
        """So many estimates will be made of these members, at these steps, in about so many seconds."""

    def measured(self, done: int, total: int, member: str, cause: str) -> None:
        """Members whose geometry was measured so far; the last of them, and the cause where it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What `measure_geometry` ended with: members measured in this call and in all; name and cause of those that
    failed, by run."""

    report: Path
    now: int
    total: int
    failed: Mapping[str, tuple[str, str]]
    seconds: float


def measure_geometry(
    desk: Desk, parent: Run, sweep: Sweep, request: Request, which: Mapping[str, Sequence[int]], display: Display
) -> Measured:
    """Learning coefficients and degrees of finished members that have none yet, tables of all, and the report again.

    which: `widths` and `seeds` of the members to measure, none for all. ValueError, before anything starts, where the
    sweep was not analysed, or a width, seed, head, checkpoint or number of examples does not exist.
    """
    start = time.monotonic()
    place = Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    analysis = load_analysis(desk.client, place.parent)
    counted = tracking.counted(tracking.children(desk.client, place))
    subjects = find_subjects(desk.client, sweep, analysis, counted, which)
    for subject in subjects:
        request.heads_of(subject.config)
        request.examples_of(subject.config)
        request.steps_of(subject.config.weight_steps)
    tag = tag_of(request)
    tagged = {run.info.run_id: run.data.tags[tag] for run in counted.values() if tag in run.data.tags}
    todo = [each for each in subjects if tagged.get(each.run_id) != each.facts_id or desk.settings.redo]
    known = set() if desk.settings.redo else tagged.keys()
    failed = measure_members(desk, place, request, todo, known, display) if todo else {}
    facts = {**tagged, **{each.run_id: each.facts_id for each in todo}}
    have = [run for run in counted.values() if run.info.run_id in facts and run.info.run_id not in failed]
    keys = member_axes(have, sweep, analysis)
    if keys:
        display.stage("gathering tables, writing the report")
        save_tables(desk.client, place.parent, fetch_tables(desk.client, keys, facts, request))
    return Measured(
        report=make_report(desk, sweep, place, analysis),
        now=len(todo) - len(failed),
        total=len(keys),
        failed=failed,
        seconds=time.monotonic() - start,
    )


def find_subjects(
    client: MlflowClient,
    sweep: Sweep,
    analysis: Analysis,
    counted: Mapping[str, Run],
    which: Mapping[str, Sequence[int]],
) -> list[Subject]:
    """The finished members of these widths and seeds, with what their analysis says of their heads."""
    configs = {member.id: member.config for member in sweep.members()}
    if not any(run.info.status == "FINISHED" for run in counted.values()):
        raise ValueError(f"sweep: no member of {sweep.id} has finished yet")
    facts, found = head_facts(sweep, analysis), []
    for member, run in counted.items():
        if run.info.status == "FINISHED":
            run_id = run.info.run_id
            if run_id not in facts:
                raise ValueError(f"sweep: run {run_id} is not in the analysis yet; run `headway analyze` first")
            config = configs.get(member) or load_config(client, run_id)
            name, (heads, best) = str(run.info.run_name), facts[run_id]
            found.append(
                Subject(member_id=member, run_id=run_id, name=name, config=config, heads=heads, best_head=best)
            )
    for name, asked in which.items():
        known = {place_of(each)[name] for each in found}
        for value in asked:
            require(
                value in known, name, value, f"one of {', '.join(map(str, sorted(known)))}, those of finished members"
            )
        found = [each for each in found if not asked or place_of(each)[name] in asked]
    return found


def place_of(subject: Subject) -> dict[str, int]:
    """What members are chosen by."""
    return {"widths": subject.config.model.width, "seeds": subject.config.seed}


def load_config(client: MlflowClient, run_id: str) -> MemberConfig:
    """Of a member that is on record, but no more in the sweep as it is configured now."""
    with tempfile.TemporaryDirectory() as folder:
        body = json.loads(Path(client.download_artifacts(run_id, "config.json", folder)).read_text())
    config: MemberConfig = decode(MemberConfig, body)
    return config


def measure_members(
    desk: Desk, place: Place, request: Request, todo: Sequence[Subject], known: Collection[str], display: Display
) -> dict[str, tuple[str, str]]:
    """Measure on the cluster, what costs most first; name and cause of those that failed, by run. known: runs whose
    coefficients stand, so that only their degrees are renewed."""
    todo = sorted(todo, key=lambda each: (each.run_id in known, -each.config.model.width))
    fresh = [each for each in todo if each.run_id not in known]
    steps = [len(request.steps_of(each.config.weight_steps)) for each in fresh]
    heads = [len(request.heads_of(each.config)) for each in fresh]
    for each in todo if desk.settings.redo else ():
        with suppress(MlflowException):  # it has none
            desk.client.delete_tag(each.run_id, tag_of(request))
    display.stage("starting Ray")
    failed = {}
    with ray_cluster(desk.settings.address, desk.settings.workers):
        resources = settle_resources(desk.settings.gpus)
        display.stage("making the pool of examples" + (", and one short trial" if fresh else ""))
        pools = make_pools(each.config for each in todo)
        if fresh:
            look = time_first(place, fresh[0], request, pools, resources)
            seconds = look * sum(map(request.looks, heads, steps)) / min(slots(resources), len(fresh))
            estimates = len(request.tokens) * sum(map(operator.mul, heads, steps))
            display.measures(request, fresh, request.steps_of(fresh[0].config.weight_steps), estimates, seconds)
        if len(todo) > len(fresh):
            display.stage(f"estimates of k again: {len(todo) - len(fresh):,}, on a newer analysis")
        for done, (subject, cause) in enumerate(spread(place, todo, request, pools, resources), start=1):
            if cause:
                failed[subject.run_id] = (subject.name, cause)
            display.measured(done, len(todo), subject.name, cause)
    return failed


def set_up(place: Place, subject: Subject, request: Request, pools: Mapping[str, Any]) -> Geometry:
    """A member on this worker's device."""
    be_worker()
    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
    kept = Kept.fetch(MlflowClient(tracking_uri=place.uri), subject.run_id)
    pool = Pool.from_arrays(ray.get(pools[pool_name(subject.config)])).to(device, subject.config.train.dtype)
    return Geometry(subject, kept, request, pool, device)


def time_member(place: Place, subject: Subject, request: Request, pools: Mapping[str, Any]) -> float:
    """A Ray task: seconds of one look, on one member."""
    return set_up(place, subject, request, pools).seconds_a_look()


def measure_member(place: Place, subject: Subject, request: Request, pools: Mapping[str, Any]) -> None:
    """A Ray task: one member's tables and curve to its run; the tag that says on what analysis they rest comes last.

    Coefficients that are there already stand: of another analysis, only degrees and the curve are other ones.
    """
    geometry, client = set_up(place, subject, request, pools), MlflowClient(tracking_uri=place.uri)
    measured = tag_of(request) in client.get_run(subject.run_id).data.tags
    llc = fetch_table(client, subject.run_id, "llc", request) if measured else geometry.coefficients()
    gradients = geometry.gradients()
    tables = {"llc": llc, "geometry": gradients, "degrees": geometry.degrees(gradients)}
    with tempfile.TemporaryDirectory() as folder:
        for name, table in tables.items():
            content = to_parquet({str(column): table[column].to_numpy() for column in table})
            (Path(folder) / f"{name}-{request.id}.parquet").write_bytes(content)
        client.log_artifacts(subject.run_id, folder)
    points = curve(llc, geometry.kept.figures, subject.best_head, f"{CURVE}.{request.id}")
    client.log_batch(subject.run_id, metrics=points)
    client.set_tag(subject.run_id, tag_of(request), subject.facts_id)


def curve(llc: pd.DataFrame, figures: pd.DataFrame, best_head: str, name: str) -> list[Metric]:
    """The coefficient of the best detector by step, at the times when the member was there: a repeat is the same."""
    own = llc[(llc["layer"].astype(str) + "." + llc["head"].astype(str) == best_head) & np.isfinite(llc["llc"])]
    own = own[own["tokens"] == own["tokens"].min()].merge(figures[["step", "wall_time"]], on="step")
    return [
        Metric(name, float(row["llc"]), int(1000 * row["wall_time"]), int(row["step"]))
        for row in own.to_dict("records")
    ]


def tag_of(request: Request) -> str:
    """On a member's run once its tables are up; its value names the analysis that they rest on."""
    return f"llc.{request.id}"


def time_first(
    place: Place, subject: Subject, request: Request, pools: Mapping[str, Any], resources: Mapping[str, float]
) -> float:
    """Seconds of one look, on one member, as a worker sees it; NaN where it fails, as its turn will tell."""
    task: Any = ray.remote(num_cpus=1, num_gpus=resources.get("GPU", 0.0), max_retries=2)(time_member)
    try:
        seconds: float = ray.get(task.remote(place, subject, request, pools))
    except ray.exceptions.RayError:
        return math.nan
    return seconds


def spread(
    place: Place,
    subjects: Sequence[Subject],
    request: Request,
    pools: Mapping[str, Any],
    resources: Mapping[str, float],
) -> Iterator[tuple[Subject, str]]:
    """Measure members, one a Ray task; each as it is done, with the cause where it failed."""
    task: Any = ray.remote(num_cpus=1, num_gpus=resources.get("GPU", 0.0), max_retries=2)(measure_member)
    waiting: dict[Any, Subject] = {task.remote(place, each, request, pools): each for each in subjects}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        cause = ""
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
        yield waiting.pop(ready), cause


def fetch_table(client: MlflowClient, run_id: str, name: str, request: Request) -> pd.DataFrame:
    """One table of one member."""
    with tempfile.TemporaryDirectory() as folder:
        return pd.read_parquet(client.download_artifacts(run_id, f"{name}-{request.id}.parquet", folder))


def fetch_tables(
    client: MlflowClient, keys: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str], request: Request
) -> dict[str, pd.DataFrame]:
    """The tables of all members, the columns that name one (`keys`, by run) in front, and at the end `facts`, the
    analysis that they rest on (by run), and `version`."""
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for run_id, own in keys.items():
        for name, found in parts.items():
            table = fetch_table(client, run_id, name, request)
            rests = table.assign(facts=facts[run_id], version=VERSION)
            found.append(pd.concat([pd.DataFrame([own] * len(table), index=table.index), rests], axis=1))
    return {name: pd.concat(found, ignore_index=True) for name, found in parts.items()}


def save_tables(client: MlflowClient, parent: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """On the sweep's own run, beside those of its analysis."""
    with tempfile.TemporaryDirectory() as folder:
        for name, table in tables.items():
            table.to_parquet(Path(folder) / f"{name}.parquet", index=False)
        client.log_artifacts(parent, folder, "analysis")
