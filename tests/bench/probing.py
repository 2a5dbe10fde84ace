"""What probing costs beside training in the quick recipe, by width: `python -m tests.bench.probing`.

A round is a burst of training steps, then everything that a probe step does, each part once and by itself; a share
compares what stood in the same round. Memory is that of a process of its own for every size of pack.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from cluster.pack import PackRun, make_pool
from cluster.plan import on_trial
from cluster.recipes import quick
from cluster.sweep import Pack, packs, validate
from tests.bench import memory
from tests.bench.measure import Call, one_thread, quartiles, span, synchronise, write
from tests.bench.runs import parts, prepare

WORKERS = 2  # that share the recipe, as on a machine of 2 cores
WARM_UP = 6  # steps before timing; on a GPU the fourth is recorded
AGAIN = 2  # steps after each part of a probe step, not timed: they bring the training's data back into the cache


def quick_packs() -> list[Pack]:
    """One pack of each width of the quick recipe, as cut for the workers; on a pool of few train rows."""
    cut = packs(validate(quick()), workers=WORKERS)
    return [on_trial(pack) for pack in {pack.config.model.width: pack for pack in reversed(cut)}.values()]


def seconds(call: Call) -> float:
    """Of one call."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def train(run: PackRun, steps: int) -> None:
    """Some steps of a pack."""
    for _ in range(steps):
        run.trainer.advance()


def timed_rounds(run: PackRun, calls: Sequence[Call], options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """By round: seconds a step, and seconds of the calls in order, one after the other in a single list."""
    each, found = [], []
    for i in range(options.rounds):
        if i % 2 == 0:
            each.append(seconds(lambda: train(run, options.steps)) / options.steps)
        for call in calls:
            found.append(seconds(call))
            train(run, AGAIN)
        if i % 2 == 1:
            each.append(seconds(lambda: train(run, options.steps)) / options.steps)
    return each, found


def cost_rows(pack: Pack, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of one pack: a step, then every part of a probe step with its share of the pack's training time; sums."""
    run = prepare(pack, make_pool(pack.config, options.device))
    todo, steps = list(parts(run)), pack.config.train.steps
    place: dict[str, object] = {"width": pack.config.model.width, "members": len(pack.members)}
    train(run, WARM_UP)
    for part in todo:
        part.call()
    each, found = timed_rounds(run, [part.call for part in todo], options)
    table = np.array(found).reshape(options.rounds, len(todo))
    shares = table / np.array(each)[:, None] * [part.times / steps for part in todo]
    yield {"what": "costs", **place, "of": "step"} | spread("ms", 1e3 * np.array(each)) | {"times": steps}
    for i, part in enumerate(todo):
        row = {"what": "costs", **place, "of": part.name} | spread("ms", 1e3 * table[:, i]) | {"times": part.times}
        yield row | {"in steps": float(np.median(table[:, i] / each))} | spread("% of training", 100 * shares[:, i])
    groups: dict[str, object] = {"what": "% of the training time", **place}
    for group in dict.fromkeys(part.group for part in todo):
        mine = [i for i, part in enumerate(todo) if part.group == group]
        groups[group] = 100 * float(np.median(shares[:, mine].sum(1)))
    yield groups | spread("all", 100 * shares.sum(1))


def spread(name: str, values: np.ndarray) -> dict[str, object]:
    """Entries of a row: the median, the quartiles, and for the JSON file the values themselves."""
    return {
        name: float(np.median(values)),
        f"quartiles of {name}": span(*quartiles(values.tolist())),
        f"{name} by round": tuple(values.tolist()),
    }


def pack_of(width: int, members: int) -> Pack:
    """So many members of the quick recipe at one width, on a pool of few train rows."""
    found = validate(replace(quick(), widths=(width,), seeds=members))
    return on_trial(Pack(members=found))


def extra_memory(width: int, members: int, device: str) -> dict[str, object]:
    """MB that a step and the parts of a probe step take at their peak beside what the pack holds anyway."""
    one_thread()
    pack, where = pack_of(width, members), torch.device(device)
    run = prepare(pack, make_pool(pack.config, device))
    train(run, WARM_UP)
    todo = list(parts(run))
    found: dict[str, object] = {"members at once": max(cut.stop - cut.start for cut in run.cuts)}
    calls: dict[str, Callable[[], object]] = {"step": run.trainer.advance} | {part.name: part.call for part in todo}
    most = {name: memory.extra(call, where) / memory.MB for name, call in calls.items()}
    whole = max(value for name, value in most.items() if name != "step")
    return found | {f"{name} MB": value for name, value in most.items()} | {"a probe round MB": whole}


def memory_rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows by width and size of pack."""
    for width in quick().widths:
        for members in options.sizes:
            job = {"width": width, "members": members, "device": options.device}
            yield {"what": "extra memory", "width": width, "members": members} | memory.fresh(
                "tests.bench.probing", job
            )


def notes(options: argparse.Namespace) -> list[str]:
    """What the numbers mean."""
    config = quick()
    last, probe = config.train.steps, config.probe
    found = [
        f"Packs of the quick recipe ({last:,} steps, batch {config.train.batch_size}) for {WORKERS} workers, on one "
        f"{'CPU thread' if options.device == 'cpu' else 'GPU'}: {len(probe.steps(last))} probe steps, "
        f"{len(probe.sparse_steps(last))} of them with the sparse probes and the system's own figures.",
        f"Medians and quartiles over {options.rounds} rounds of {options.steps} steps and one call of each part. "
        "in steps: a call over the mean step of the same round. % of training: calls in the whole recipe over steps "
        "in the whole recipe, by round; tables, checkpoints and the ledger are not in it.",
        "Extra memory: what a call takes at its peak beside what was held before it, in a process of its own for each "
        f"row ({'peak of resident memory' if options.device == 'cpu' else 'as torch has allocated it'}). A round takes "
        "as much as its greediest part. Members pass a few at a time (members at once), and so it does not grow beyond "
        "that number.",
    ]
    return found + ([options.note] if options.note else [])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.probing", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=30, help="training steps a round")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 16, 64], help="members a pack, for its memory")
    parser.add_argument("--note", help="a line to keep with the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(extra_memory(**json.loads(options.job))))
        return
    one_thread()
    rows = []
    for row in (*(row for pack in quick_packs() for row in cost_rows(pack, options)), *memory_rows(options)):
        rows.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, tuple)}, flush=True)
    write("probing", rows, notes(options), options.device)


if __name__ == "__main__":
    main()
