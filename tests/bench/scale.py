"""What ten thousand members cost beside their training: `python -m tests.bench.scale --parts ledger stream overhead`.

`ledger`: a real SQLite store of MLflow in which so many member runs are finished. One pack is logged the way workers
do; its rows are then copied in the database for all other members, with ids, names and tags of their own. On that store
everything is timed that `headway sweep`, `--dry-run` and `headway status` do before and after training.
`stream`: so many tiny members through Ray, Tune and MLflow: time a member over the course of the sweep.
`overhead`: packs that last half a minute or more: what dispatch, logging and checkpoints take beside their work.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlflow import MlflowClient
from rich.console import Console

from cluster import dispatch, pack, tracking, trial
from cluster.commands import show_members
from cluster.driver import Settings, run_sweep
from cluster.member_runs import MemberRuns
from cluster.sizing import Room
from cluster.sweep import DataConfig, Member, Pack, ProbeConfig, Sweep, packs, validate
from tests.bench.measure import one_thread, write
from tests.bench.sweep import Times, sweep_of
from train.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from cluster.tracking import Place
    from cluster.trial import Report, TrialContext

T = TypeVar("T")
WIDTHS, RATES = (16, 24, 32, 48, 64), tuple(round(1e-4 * 1.5**k, 8) for k in range(10))
TABLES = ("tags", "params", "metrics", "latest_metrics")
FILES = {"config.json": b"{}"}
FIGURES = ("train_loss", "validation_loss", "level", "detectors", "risen", "heads_that_matter")


def large(members: int) -> Sweep:
    """Widths x rates x seeds, about so many members."""
    seeds = max(1, members // (len(WIDTHS) * len(RATES)))
    return Sweep(name="scale", widths=WIDTHS, seeds=seeds, axes={"train.learning_rate": RATES})


def fill(database: Path, ledger: tracking.Ledger, members: Sequence[Member]) -> None:
    """All members as finished runs: the first as a worker logs it, the others as copies of its rows."""
    first = members[0]
    runs = MemberRuns(ledger.place, Pack(members=(first,)), "cpu")
    for step in range(20):
        runs.point(runs.pack, step, 1000 * step, {name: [1.0] for name in FIGURES})
    runs.flush()
    runs.finish(first, FILES)
    runs.close()
    with sqlite3.connect(database) as store:
        copy_runs(store, runs.runs[0], members[1:])


def copy_runs(store: sqlite3.Connection, template: str, members: Sequence[Member]) -> None:
    """Rows of a run once more for every member."""
    store.row_factory = sqlite3.Row
    ids = [uuid.uuid4().hex for _ in members]
    run = dict(store.execute("select * from runs where run_uuid = ?", (template,)).fetchone())
    insert(store, "runs", [
        {**run, "run_uuid": key, "name": run_name(member), "artifact_uri": run["artifact_uri"].replace(template, key)}
        for key, member in zip(ids, members, strict=True)
    ])  # fmt: skip
    for table in TABLES:
        rows = [dict(row) for row in store.execute(f"select * from {table} where run_uuid = ?", (template,))]
        copies = []
        for key, member in zip(ids, members, strict=True):
            own = {"mlflow.runName": run_name(member), "member_id": member.id, "seed": str(member.config.seed)}
            own |= {name: str(value) for name, value in member.point.items()}
            for row in rows:
                changed = {"value": own[row["key"]]} if row["key"] in own and table == "tags" else {}
                copies.append({**row, **changed, "run_uuid": key})
        insert(store, table, copies)


def run_name(member: Member) -> str:
    """As `MemberRuns` names runs."""
    return " ".join(f"{key}={value}" for key, value in {**member.point, "seed": member.config.seed}.items())


def insert(store: sqlite3.Connection, table: str, rows: Sequence[dict[str, object]]) -> None:
    """Rows into a table, all of the same columns."""
    names = list(rows[0]) if rows else []
    places = ", ".join(f":{name}" for name in names)
    store.executemany(f"insert into {table} ({', '.join(names)}) values ({places})", rows)


@dataclass
class Clock:
    """Seconds of named stages, on the wall and of this process."""

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def time(self, name: str, call: Callable[[], T]) -> T:
        """Run and note."""
        start = time.perf_counter(), time.process_time()
        found = call()
        self.seconds[name] = time.perf_counter() - start[0], time.process_time() - start[1]
        return found


PLAN, OPEN, SETTLE, PACK = "plan: validate, ids", "open the ledger", "look-up and settle", "packs of what is missing"


def ledger_rows(members: int, folder: Path) -> Iterator[dict[str, object]]:
    """Everything around the training of a sweep of so many members, of which a hundredth is missing."""
    clock, sweep, uri = Clock(), large(members), f"sqlite:///{folder}/mlflow.db"
    client = tracking.connect(uri)
    held = tracking.open_sweep(client, uri, sweep)
    planned = clock.time(PLAN, lambda: validate(sweep))
    missing = max(1, len(planned) // 100)
    held.close("FINISHED")  # no heartbeat while rows are written past MLflow
    fill(folder / "mlflow.db", held, planned[: len(planned) - missing])
    again = clock.time(OPEN, lambda: tracking.open_sweep(client, uri, sweep))
    settled = clock.time(SETTLE, lambda: again.settle(running_too=True))
    left = [member for member in planned if member.id not in settled]
    if not len(settled) == len(planned) - missing == len(planned) - len(left):
        raise RuntimeError(f"{len(settled)} of {len(planned)} members count, {len(left)} are left")
    room = Room(device="cpu", memory=8 << 30)
    clock.time(PACK, lambda: packs(left, 2, most=room.most))
    again.close("FINISHED")
    clock.time("packs of all members", lambda: packs(planned, 2, most=room.most))
    clock.time("dry run: settled members", lambda: tracking.settled_members(client, uri, sweep))
    pack = {member.id for member in planned[:32]}
    clock.time("restarted pack of 32: its members' runs", lambda: tracking.own_children(client, again.place, pack))
    console = Console(file=io.StringIO(), width=140)

    def status() -> None:
        show_members(console, sweep, tracking.children(client, again.place))

    clock.time("status: look-up and table", status)
    decision = [clock.seconds[name] for name in (PLAN, OPEN, SETTLE, PACK)]
    clock.seconds["resume decided: the first four"] = sum(s for s, _ in decision), sum(s for _, s in decision)
    for name, (wall, cpu) in clock.seconds.items():
        yield {
            "what": "around training", "members": str(len(planned)), "stage": name, "wall s": wall, "CPU s": cpu,
            "CPU ms a member": 1e3 * cpu / len(planned),
        }  # fmt: skip


@dataclass
class Course(Times):
    """When each pack was through."""

    through: dict[str, float] = field(default_factory=dict)

    def progress(self, report: Report) -> None:
        """Note a pack's last step."""
        super().progress(report)
        if report.step >= self.cut[0].config.train.steps:
            self.through.setdefault(report.pack, time.perf_counter())


def stream_row(members: int, workers: int, folder: Path) -> dict[str, object]:
    """So many tiny members on so many workers: seconds a member in the first and the last tenth of them."""
    sweep = Sweep(
        name="stream", widths=(8,), seeds=members, data=DataConfig(rows=256, validation_rows=16),
        model=ModelConfig(layers=1, heads=2), train=TrainConfig(steps=30, batch_size=4),
        probe=ProbeConfig(examples=4, sparse_examples=2),
    )  # fmt: skip
    course = Course()
    settings = Settings(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", out=folder / "out", workers=workers, gpus=0.0, pack_size=10
    )
    begun = time.perf_counter()
    outcome = run_sweep(sweep, settings, course)
    if outcome.failed or outcome.trained != members or course.troubles:
        raise RuntimeError(f"{outcome.trained} of {members} members were trained; {'; '.join(course.troubles)}")
    ends = sorted(course.through.values())
    tenth = max(1, len(ends) // 10)
    size = members / len(course.cut)
    first = (ends[tenth] - ends[0]) / (tenth * size)  # from the first end on: workers start before it
    last = (ends[-1] - ends[-1 - tenth]) / (tenth * size)
    return {
        "what": "tiny members", "members": str(members), "packs": len(course.cut), "workers": workers,
        "s a member, first tenth": first, "last tenth": last, "last / first": last / first,
        "training s": course.over - course.packed, "all s": time.perf_counter() - begun,
    }  # fmt: skip


def noted_pack(config: Mapping[str, Any], context: TrialContext) -> None:
    """The trainable of a sweep; what its pack took is noted in the folder `spent` beside the checkpoints.

    own: seconds of training and probing on the wall; CPU: CPU seconds of their thread. sink: seconds for which they
    wait until points are handed over, checkpoints kept, tables made.
    """
    spent = {"own": 0.0, "CPU": 0.0, "sink": 0.0}

    class Sink(trial.TrialSink):
        """Notes its own time."""

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return noted(found) if name in ("restore", "progress", "save", "finish") else found

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            found = call(*arguments)
            spent["sink"] += (took := time.perf_counter() - wall)
            spent["own"] -= took
            spent["CPU"] -= time.thread_time() - cpu
            return found

        return run

    def run_pack(*arguments: Any) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        pack.run_pack(*arguments)
        spent["own"] += time.perf_counter() - wall
        spent["CPU"] += time.thread_time() - cpu

    kept = trial.TrialSink
    trial.TrialSink, trial.run_pack = Sink, run_pack  # type: ignore[misc]
    try:
        trial.train_pack(config, context)
    finally:
        trial.TrialSink = kept  # type: ignore[misc]
    folder = Path(context.store) / "spent"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{context.packs[config['pack']].id}.json").write_text(json.dumps(spent))


def overhead_row(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Packs that last long, on as many cores as there are workers: where the wall time of the training stage goes.

    Not by the same packs once more without Ray: a shared machine's speed changes by more than the overhead.
    """
    own = argparse.Namespace(
        members=options.packs * options.pack_size, steps=options.steps, width=32, batch=16, rows=4096, per_decade=20,
    )  # fmt: skip
    times, workers, out = Times(), options.workers, folder / "out"
    settings = Settings(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", out=out, workers=workers, gpus=0.0, pack_size=options.pack_size
    )
    begun, dispatch.train_pack = time.perf_counter(), noted_pack
    outcome = run_sweep(sweep_of(own, "long-packs"), settings, times)
    ended = time.perf_counter()
    if outcome.failed or outcome.trained != own.members or times.troubles:
        raise RuntimeError(f"{outcome.trained} of {own.members} members were trained; {'; '.join(times.troubles)}")
    spent = [json.loads(path.read_text()) for path in out.glob("*/spent/*.json")]
    if len(spent) != len(times.cut):
        raise RuntimeError(f"{len(spent)} notes of {len(times.cut)} packs")
    total = {name: sum(each[name] for each in spent) / workers for name in spent[0]}
    spans = list(run_spans(outcome.place, times.cut, time.time() - (ended - times.packed)))
    begins, ends = (sorted(edge) for edge in zip(*spans, strict=True))
    wall, inside = times.over - times.packed, sum(end - begin for begin, end in spans) / workers
    before, after = sum(begins[:workers]) / workers, wall - sum(ends[-workers:]) / workers
    beside = wall - before - after - total["CPU"]
    return {
        "what": "long packs", "packs": len(spans), "members a pack": options.pack_size,
        "shortest pack s": min(end - begin for begin, end in spans), "start s": times.packed - begun, "wall s": wall,
        "to the first pack s": before, "packs s": inside, "training and probing s": total["own"],
        "of it CPU s": total["CPU"], "sink s": total["sink"], "after the last pack s": after, "beside CPU s": beside,
        "beside / packs": beside / inside, "close and analysis s": ended - times.over,
    }  # fmt: skip


def run_spans(place: Place, cut: Sequence[Pack], packed: float) -> Iterator[tuple[float, float]]:
    """Of each pack: when its members' runs began and ended by the ledger, in seconds after `packed` (`time.time`)."""
    runs = tracking.counted(tracking.children(MlflowClient(place.uri), place))
    for each in cut:
        infos = [runs[member.id].info for member in each.members]
        begin, end = min(info.start_time for info in infos), max(info.end_time or 0 for info in infos)
        yield begin / 1e3 - packed, end / 1e3 - packed


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("ledger", "stream", "overhead"), default=["ledger"])
    parser.add_argument("--members", type=int, nargs="+", default=[1000, 10_000], help="of the ledger")
    parser.add_argument("--tiny", type=int, default=1000, help="members of the stream")
    parser.add_argument("--packs", type=int, default=12, help="long ones")
    parser.add_argument("--pack-size", type=int, default=4, help="members of a long pack")
    parser.add_argument("--steps", type=int, default=3000, help="of the long packs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)  # a cluster of our own
    one_thread()
    rows: list[dict[str, object]] = []
    for members in options.members if "ledger" in options.parts else ():
        with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
            rows += ledger_rows(members, Path(folder))
    if "stream" in options.parts:
        with tempfile.TemporaryDirectory(prefix="headway-bench-", ignore_cleanup_errors=True) as folder:
            rows.append(stream_row(options.tiny, options.workers, Path(folder)))
    if "overhead" in options.parts:
        with tempfile.TemporaryDirectory(prefix="headway-bench-", ignore_cleanup_errors=True) as folder:
            rows.append(overhead_row(options, Path(folder)))
    load = os.getloadavg()[0]
    notes = [
        "around training: on a SQLite store of MLflow in which 99 of 100 members are finished, each with 13 tags, 8 "
        "params and 6 metrics. CPU s is of this process alone: what the wall shows where nothing else is at work.",
        "long packs: seconds a worker, as many workers as cores. start: before the packs are known; then to the first "
        "pack: a worker's process and its imports. packs: from the beginning of their runs in the ledger to their end; "
        "training and probing in them, and CPU s of that thread (the rest of it: waiting for a core that the driver, "
        "Ray and the ledger's own thread share); sink: waiting for points, checkpoints and tables to be taken. Beside: "
        "all but that CPU time, from the first pack's beginning to the last one's end.",
        f"Load average at the end {load:.1f} on {os.cpu_count()} cores.",
    ]
    write("scale", rows, notes + ([options.note] if options.note else []))


if __name__ == "__main__":
    main()
