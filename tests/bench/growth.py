"""How cost grows with the number of members, of a pack and of a sweep: `python -m tests.bench.growth`.

Every number comes from a process of its own. The ladder of sizes is climbed and descended in turns, so that what slows
the machine for a while does not fall on one size only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.curves import Curves
from cluster.pack import PackRun, make_pool, member_files, out_of_memory, save_checkpoint
from cluster.recipes import quick
from cluster.sizing import available_memory, pack_bytes
from cluster.store import FolderStore
from cluster.sweep import DataConfig, Pack, packs, validate
from sim.pool import Pool
from tests.bench import memory
from tests.bench.measure import burst, calls_within, one_thread, quartiles, span, synchronise, write
from tests.bench.runs import prepare
from train.checkpoint import encode_arrays
from train.loop import free_memory

WARM_UP = 6  # steps before timing; on a GPU the fourth is recorded
SAFE = 0.8  # share of the free memory that a pack may be expected to take
WORKERS = 2  # that a sweep is planned for
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # a planned sweep's learning rates; with its two widths, ten points
Answer = dict[str, object]


def pack_of(members: int, width: int, rows: int) -> Pack:
    """So many members of the quick recipe at one width, on a pool of so many train rows."""
    sweep = replace(quick(), widths=(width,), seeds=members, data=DataConfig(rows=rows))
    return Pack(members=validate(sweep))


def nothing() -> Answer:
    """The peak of a process that has imported all this and done nothing else."""
    return {"peak": memory.peak()}


def pack_job(
    members: int, width: int, rows: int, pool: str, device: str, seconds: float, rounds: int, whole: bool
) -> Answer:
    """Seconds a step by burst, and peaks in bytes: of training, and (whole) of all that happens in a pack's life."""
    one_thread()
    pack, where = pack_of(members, width, rows), torch.device(device)
    try:
        held = Pool.load(Path(pool)).to(device, pack.config.train.dtype)
        run = prepare(pack, held)
        for _ in range(WARM_UP):
            run.trainer.advance()
        count = calls_within(run.trainer.advance, seconds)
        found: Answer = {"steps": [burst(run.trainer.advance, count) for _ in range(rounds)]}
        found |= {"training": peak(where), "at once": max(cut.stop - cut.start for cut in run.trainer.cuts)}
        if not whole:
            return found
        live(run)
        return found | {"life": peak(where)}
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        return {"left out": memory.OUT_OF_MEMORY}


def peak(device: torch.device) -> int:
    """Bytes held at most so far: by the process, or on a GPU by torch's tensors."""
    if device.type == "cpu":
        return memory.peak()
    synchronise()
    return torch.cuda.max_memory_allocated(device)


def live(run: PackRun) -> None:
    """What else needs memory in a pack's life: a round of all probes, tables as long as at the last step (copies of
    that round's), a checkpoint of it all on disk, and one member's files."""
    curves = full_tables(run)
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        save_checkpoint(FolderStore(folder), run.pack, run.trainer.state, curves)
    for table in (curves.head_table(0), curves.figure_table(0)):
        encode_arrays(table)
    member_files(run.pack.members[0], 0, curves)


def full_tables(run: PackRun) -> Curves:
    """Tables with an entry at every probe step, all from one round on the pack as it stands."""
    curves, snapshot, state = Curves(members=len(run.pack.members)), run.trainer.snapshot(), run.trainer.state
    due = {"every": run.stops, "sparse": sorted(run.sparse), "checkpoints": sorted(run.kept)}
    for probe in run.probes:
        found = run.measure(probe, snapshot)
        for step in due[probe.when]:
            values = {name: value.copy() for name, value in found.values.items()}
            curves.add(probe.name, step, snapshot.time, replace(found, values=values))
    figures = run.measure_figures(snapshot, True)
    for step in run.stops:
        curves.add_figures(step, snapshot.time, {name: value.copy() for name, value in figures.items()})
    for step in run.kept:
        curves.weights[step] = state.weights.detach().cpu().numpy().copy()
    return curves


def plan_job(members: int) -> Answer:
    """Seconds to check a sweep of so many members and to cut it into packs, and the bytes that both take."""
    axes = {"train.learning_rate": RATES}
    sweep = replace(quick(), axes=axes, seeds=-(-members // (len(quick().widths) * len(RATES))))
    memory.settle()
    before = memory.resident()
    memory.forget_peak()
    start = time.perf_counter()
    found = validate(sweep)
    checked = time.perf_counter()
    cut = packs(found, WORKERS)
    ended = time.perf_counter()
    answer: Answer = {"members": len(found), "packs": len(cut), "bytes": memory.peak() - before}
    return answer | {"validate": checked - start, "cut": ended - checked}


JOBS: dict[str, Callable[..., Answer]] = {"nothing": nothing, "pack": pack_job, "plan": plan_job}


def do(kind: str, **job: object) -> Answer:
    """One of the jobs in a new process."""
    return memory.fresh("tests.bench.growth", {"kind": kind, **job})


def ladder(most: int, factor: int, first: int) -> list[int]:
    """first, first x factor, ... up to `most`."""
    found = []
    while first <= most:
        found.append(first)
        first *= factor
    return found


def room(device: torch.device) -> float:
    """Bytes that a pack may take here."""
    return SAFE * (available_memory() if device.type == "cpu" else free_memory(device))


def pack_rows(options: argparse.Namespace) -> Iterator[Answer]:
    """Rows by members a pack, up to the most asked for or that memory holds."""
    sizes, bursts, peaks = ladder(options.most, 4, 1), dict[int, list[float]](), dict[int, Answer]()
    if not sizes:
        return
    left = room(torch.device(options.device))
    config = pack_of(1, options.width, options.rows).config
    expected = {size: pack_bytes(config, size, options.device) for size in sizes}
    short = {size for size in sizes if expected[size] > left}
    base = number(do("nothing")["peak"]) if options.device == "cpu" else 0.0
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
        pool = Path(folder) / "pool.npz"
        make_pool(config).save(pool)
        for repeat in range(options.repeats):
            for size in sizes if repeat % 2 == 0 else sizes[::-1]:
                if size in short:
                    continue
                answer = do("pack", members=size, pool=str(pool), whole=repeat == 0, **shared(options))
                print(f"repeat {repeat}, {size} members:", answer, flush=True)
                if "left out" in answer:
                    short.add(size)
                    continue
                bursts.setdefault(size, []).extend(numbers(answer["steps"]))
                peaks.setdefault(size, answer)
    below: tuple[int, float, int] | None = None
    for size in sizes:
        row: Answer = {"what": "packs", "members": size}
        if size in short:
            yield row | {"left out": memory.OUT_OF_MEMORY}
            continue
        life = number(peaks[size]["life"]) - base
        row |= {"members at once": peaks[size]["at once"]} | step_entries(bursts[size], size)
        row |= {"training MB": (number(peaks[size]["training"]) - base) / memory.MB, "life MB": life / memory.MB}
        row |= {"life MB a member": life / memory.MB / size, "estimate MB": expected[size] / memory.MB}
        row |= {"estimate / life": expected[size] / life}
        if below is not None:
            more = size - below[0]
            row |= {"MB a further member": (life - below[1]) / memory.MB / more}
            row |= {"estimate of it": (expected[size] - below[2]) / memory.MB / more}
        yield row
        below = (size, life, expected[size])


def shared(options: argparse.Namespace) -> Answer:
    """What is the same in the jobs of all packs."""
    return {name: getattr(options, name) for name in ("width", "rows", "device", "seconds", "rounds")}


def step_entries(seconds: Sequence[float], size: int) -> Answer:
    """A step's median, and its share for each member with quartiles."""
    each = [1e3 * value / size for value in seconds]
    found: Answer = {"step ms": 1e3 * float(np.median(seconds)), "step ms a member": float(np.median(each))}
    return found | {"quartiles": span(*quartiles(each)), "seconds": tuple(seconds)}


def plan_rows(options: argparse.Namespace) -> Iterator[Answer]:
    """Rows by members a sweep: medians over processes."""
    for size in ladder(options.most_planned, 10, 10):
        answers = [do("plan", members=size) for _ in range(options.plans)]
        print(f"planning {size} members:", answers, flush=True)
        members = number(answers[0]["members"])
        found = {key: np.array([number(answer[key]) for answer in answers]) for key in ("validate", "cut", "bytes")}
        whole = (found["validate"] + found["cut"]).tolist()
        low, high = (1e6 * value / members for value in quartiles(whole))
        yield {
            "what": "planning",
            "members": int(members),
            "packs": answers[0]["packs"],
            "s": float(np.median(whole)),
            "µs a member": 1e6 * float(np.median(whole)) / members,
            "quartiles": span(low, high),
            "checking": 1e6 * float(np.median(found["validate"])) / members,
            "cutting": 1e6 * float(np.median(found["cut"])) / members,
            "peak MB": float(np.median(found["bytes"])) / memory.MB,
            "peak KB a member": float(np.median(found["bytes"])) / 1e3 / members,
            "seconds": tuple(whole),
        }


def number(value: object) -> float:
    """The value, known to be a number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"value: got {type(value).__name__}, need a number")
    return float(value)


def numbers(value: object) -> list[float]:
    """The value, known to be a list of numbers."""
    if not isinstance(value, list):
        raise TypeError(f"value: got {type(value).__name__}, need a list")
    return [number(item) for item in value]


def notes(options: argparse.Namespace) -> list[str]:
    """What the numbers mean."""
    cpu, config = options.device == "cpu", quick()
    found = [
        f"Packs of the quick recipe's model at width {options.width}, batch {config.train.batch_size}, tables of "
        f"{config.train.steps:,} steps, on a pool of {options.rows} train rows; one "
        f"{'CPU thread' if cpu else 'GPU'}. Steps: medians and quartiles over {options.repeats} processes of "
        f"{options.rounds} bursts each; the sizes in rising, then in falling order, and so on.",
        (
            "Memory: the process's peak less that of one which only imports."
            if cpu
            else "Memory: the peak of what torch has allocated on the GPU."
        )
        + " training: up to the last burst; life: after a round of all probes, tables as long as at the last step (on "
        "the host), a checkpoint of them, and one member's files.",
        "estimate: `cluster.sizing.pack_bytes`, by which packs are sized"
        + ("." if cpu else "; it has the tables in it, which lie on the host."),
        f"Planning: `validate` and `packs` of a sweep of two widths, {len(RATES)} learning rates and seeds, in "
        f"{options.plans} new processes for each size; memory beside what they held before.",
    ]
    return found + ([options.note] if options.note else [])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--most", type=int, default=1024, help="members of the largest pack; 0: no packs")
    parser.add_argument("--most-planned", type=int, default=10000, help="members of the largest sweep; 0: none")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4096, help="train rows of the pool")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst of steps")
    parser.add_argument("--rounds", type=int, default=3, help="bursts in each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each size of pack")
    parser.add_argument("--plans", type=int, default=3, help="processes for each size of sweep")
    parser.add_argument("--note", help="a line to keep with the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        job = json.loads(options.job)
        print(json.dumps(JOBS[job.pop("kind")](**job)))
        return
    one_thread()
    rows = []
    for row in (*plan_rows(options), *pack_rows(options)):
        rows.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, tuple)}, flush=True)
    write("growth", rows, notes(options), options.device)


if __name__ == "__main__":
    main()
