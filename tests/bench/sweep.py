"""A whole sweep as packs against one Tune trial a member, work and overhead apart: `python -m tests.bench.sweep`.

Both go through `cluster.driver.run_sweep`: Ray with its workers, Tune with reused actors, and an MLflow ledger, all in
a folder that is deleted afterwards. The same packs are then run once more without any of that, in as many processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.driver import Settings, run_sweep
from cluster.pack import PackRun, build_probes, make_pool
from cluster.plan import Nowhere
from cluster.sweep import DataConfig, Pack, ProbeConfig, Sweep, validate
from probes.probe import Probe
from sim.pool import Pool
from tests.bench.measure import Row, one_thread, short, write
from tests.bench.runs import parts
from train.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from cluster.trial import Report

PACKS, TRIALS = "packs", "one trial a member"
WARM_UP = 3  # steps in each process before the clock starts
PATIENCE = 600.0  # seconds that one process waits for the others


@dataclass(kw_only=True, slots=True)
class Times:
    """A display that notes when things happen, in seconds of `time.perf_counter`."""

    packed: float = 0.0
    """The packs were known: the training stage begins."""
    over: float = 0.0
    """A pack's report of its last step came in, the last one so far."""
    stages: dict[str, float] = field(default_factory=dict)
    cut: tuple[Pack, ...] = ()
    troubles: list[str] = field(default_factory=list)

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""
        self.stages[text] = time.perf_counter()

    def packs(self, packs: Sequence[Pack]) -> None:
        """These packs will be trained."""
        self.packed, self.cut = time.perf_counter(), tuple(packs)

    def progress(self, report: Report) -> None:
        """A pack has come to a step, has failed for good, or does not go as planned."""
        if report.failed or report.note:
            self.troubles.append(report.failed or report.note)
        if report.step >= self.cut[0].config.train.steps:
            self.over = time.perf_counter()

    def analyzed(self, done: int, total: int) -> None:
        """Members analysed so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """Seconds of a sweep's stages. start: up to the training stage; close: from the last trial's end to the analysis;
    analysis: the report too."""

    cut: tuple[Pack, ...]
    start: float
    wall: float
    close: float
    analysis: float


def sweep_of(options: argparse.Namespace, name: str) -> Sweep:
    """Members that differ by their seeds only."""
    return Sweep(
        name=name,
        widths=(options.width,),
        seeds=options.members,
        data=DataConfig(rows=options.rows),
        model=ModelConfig(layers=2, heads=4),
        train=TrainConfig(steps=options.steps, batch_size=options.batch),
        probe=ProbeConfig(per_decade=options.per_decade),
    )


def swept(sweep: Sweep, pack_size: int | None, workers: int) -> Swept:
    """A sweep with a ledger and a folder of its own. RuntimeError unless all members were trained without trouble."""
    times = Times()
    with tempfile.TemporaryDirectory(prefix="headway-bench-", ignore_cleanup_errors=True) as folder:
        out, uri = Path(folder) / "out", f"sqlite:///{folder}/mlflow.db"
        settings = Settings(tracking_uri=uri, out=out, workers=workers, gpus=0.0, pack_size=pack_size)
        begun = time.perf_counter()
        outcome = run_sweep(sweep, settings, times)
        ended = time.perf_counter()
    if times.troubles or outcome.failed or outcome.trained != sweep.seeds:
        raise RuntimeError(f"{outcome.trained} of {sweep.seeds} members were trained; {'; '.join(times.troubles)}")
    analysis = times.stages["analysing heads"]
    return Swept(
        cut=times.cut,
        start=times.packed - begun,
        wall=times.over - times.packed,
        close=analysis - times.over,
        analysis=ended - analysis,
    )


_held: list[tuple[Pool, tuple[Probe, ...]]] = []  # of a process of `work_seconds`


def make_ready(pack: Pack, arrays: dict[str, Any], barrier: Barrier) -> None:
    """Hold the pool and the probes, do everything once, then wait for the other processes."""
    one_thread()
    pool = Pool.from_arrays(arrays).to("cpu", pack.config.train.dtype)
    _held.append((pool, build_probes(pack.config, pool)))
    run = PackRun(pack, *_held[0], Nowhere())
    for _ in range(WARM_UP):
        run.trainer.advance()
    for part in parts(run):
        part.call()
    barrier.wait(PATIENCE)


def run_alone(pack: Pack) -> float:
    """Seconds of a pack from its setting up to its last probe, with results that go nowhere."""
    start = time.perf_counter()
    PackRun(pack, *_held[0], Nowhere()).run()
    return time.perf_counter() - start


def work_seconds(cut: Sequence[Pack], pool: Pool, workers: int) -> tuple[float, ...]:
    """Seconds inside each of the packs, handed out in order to one process a worker, one thread each."""
    context = multiprocessing.get_context("spawn")
    ready = (cut[-1], pool.to_arrays(), context.Barrier(workers))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=make_ready, initargs=ready) as processes:
        return tuple(processes.map(run_alone, cut))


def measured(arrangement: str, repeat: int, pool: Pool, options: argparse.Namespace) -> dict[str, object]:
    """One row: a sweep, then its packs without Ray, Tune and MLflow."""
    name = f"bench-{arrangement.replace(' ', '-')}-{repeat}"
    found = swept(sweep_of(options, name), None if arrangement == PACKS else 1, options.workers)
    seconds = work_seconds(found.cut, pool, options.workers)
    work = sum(seconds) / options.workers
    return {
        "what": "sweeps",
        "arrangement": arrangement,
        "repeat": repeat,
        "packs": len(found.cut),
        "members a pack": max(len(pack.members) for pack in found.cut),
        "wall s": found.wall,
        "work s": work,
        "overhead s": found.wall - work,
        "overhead / wall": 1 - work / found.wall,
        "overhead ms a pack and worker": 1e3 * (found.wall - work) * options.workers / len(found.cut),
        "start s": found.start,
        "close s": found.close,
        "analysis s": found.analysis,
        "seconds of packs": seconds,
    }


def sweeps(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of both arrangements in turns; every other repeat begins with the other one."""
    pool = make_pool(validate(sweep_of(options, "bench"))[0].config)
    for repeat in range(options.repeats):
        for arrangement in (PACKS, TRIALS) if repeat % 2 == 0 else (TRIALS, PACKS):
            yield measured(arrangement, repeat, pool, options)


def ratios(rows: Sequence[Row], repeats: int) -> list[dict[str, object]]:
    """How many times more seconds one trial a member takes than packs: by repeat, and the median over repeats."""
    found: list[dict[str, object]] = []
    for repeat in range(repeats):
        both = {row["arrangement"]: row for row in rows if row["repeat"] == repeat}
        over = {key: number(both[TRIALS], key) / number(both[PACKS], key) for key in ("wall s", "work s", "overhead s")}
        found.append({"what": "one trial a member / packs", "repeat": str(repeat), **over})
    medians = {key: float(np.median([number(row, key) for row in found])) for key in ("wall s", "work s", "overhead s")}
    return [*found, {"what": "one trial a member / packs", "repeat": "median", **medians}]


def number(row: Row, key: str) -> float:
    """An entry of a row that is known to be a number."""
    return float(str(row[key]))


def notes(options: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """What the numbers mean."""
    steps = options.members * options.steps
    walls = {name: [number(row, "wall s") for row in rows if row["arrangement"] == name] for name in (PACKS, TRIALS)}
    rates = ", ".join(f"{name} {short(steps / float(np.median(found)))}" for name, found in walls.items())
    found = [
        f"{options.members} members of width {options.width}, batch {options.batch}, {options.steps} steps, "
        f"{options.per_decade} probe steps a decade, on {options.workers} workers of one thread each; packs are of "
        "the size that a sweep chooses by itself.",
        "wall: from when the packs are known to the last trial's last report. start is before that (Ray, the ledger, "
        "the pool), close and analysis after it.",
        "work: the same packs once more in one process a worker, without Ray, Tune and MLflow, with results that go "
        "nowhere; seconds from setting up to the last probe, summed over packs, over workers. The pool, the probe set "
        "and a few steps came before. overhead = wall - work: starting the workers, Tune, the ledger, checkpoints, "
        "idle workers, and the driver's share of the same cores.",
        f"Member-steps a second of the training stage (median wall): {rates}.",
    ]
    return found + ([options.note] if options.note else [])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sweep", description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4096, help="train rows of the pool")
    parser.add_argument("--per-decade", type=int, default=ProbeConfig().per_decade, help="probe steps, at least 20")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="sweeps of each arrangement")
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)  # a cluster of our own
    one_thread()
    rows = []
    for row in sweeps(options):
        rows.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, tuple)}, flush=True)
    write("sweep", [*rows, *ratios(rows, options.repeats)], notes(options, rows))


if __name__ == "__main__":
    main()
