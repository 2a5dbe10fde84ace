"""Particle-steps per second, compiled and eager, and the making of a pool: `python -m tests.bench.simulation`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.recipes import quick
from cluster.sweep import Pack, packs, part_sizes, validate
from sim.box import ParticleBox
from sim.compiling import can_compile
from sim.generator import Generator
from sim.integrator import chunk_size, compiled_advance
from sim.particles import ParticleSystem
from sim.pool import Pool
from tests.bench.measure import Row, Timing, burst, compare, one_thread, quartiles, span, synchronise, timed, write
from train.loop import Trainer

RADIUS = {16: 0.06, 64: 0.03}  # discs fill 18% of the box either way
FEWEST_STEPS = 20  # a call: its set-up is then a small part
WARM_UP = 6  # steps before timing; on a GPU the fourth is recorded
LARGEST = 8192  # boxes: their kernel is the one whose compilation is timed
WORKERS = 2  # that share the sweep, as on a machine of 2 cores


def start(n: int, boxes: int, device: torch.device) -> tuple[ParticleBox, Tensor, Tensor]:
    """A box of `n` discs; positions and velocities `[boxes, n, 2]` as trajectories start with, made on the device."""
    box = ParticleBox(n=n, radius=RADIUS[n])
    short = box.contact_time / 40  # rows of one time step are fresh starts
    system = ParticleSystem(box=box, horizon=short, restart=short)
    state = system.rows("train", boxes, Generator.of("simulation", device=device)).columns["state"]
    return box, state[..., :2].contiguous(), state[..., 2:].contiguous()


def compile_times(n: int, device: torch.device) -> tuple[float, float] | None:
    """Seconds to compile the integrator with nothing on disk, and again from what that left there; None if it fails."""
    if not can_compile(device):
        return None
    found = []
    for _ in range(2):
        compiled_advance.cache_clear()
        torch.compiler.reset()
        begin = time.perf_counter()
        if compiled_advance(n, chunk_size(n, LARGEST, device, True), torch.float32, device, False) is None:
            return None
        synchronise()
        found.append(time.perf_counter() - begin)
    return found[0], found[1]


def steps_within(work: int, boxes: int, n: int, box: ParticleBox) -> int:
    """Time steps of a call of about `work` particle-steps: from 20 to those of a trajectory's horizon."""
    return max(FEWEST_STEPS, min(work // (boxes * n), box.steps(ParticleSystem().horizon)[0]))


def rate_row(
    n: int, boxes: int, device: torch.device, compiles: bool, options: argparse.Namespace
) -> dict[str, object]:
    """Million particle-steps a second of so many boxes, eager and (where it works) compiled, timed in turns."""
    box, positions, velocities = start(n, boxes, device)
    steps = steps_within(options.work, boxes, n, box)
    duration = steps * box.contact_time / 40  # the default time step
    steps = box.steps(duration)[0]

    def eager() -> object:
        return box.simulate(positions, velocities, duration, compiled=False)

    def compiled() -> object:
        return box.simulate(positions, velocities, duration, compiled=True)

    million = steps * boxes * n / 1e6
    row: dict[str, object] = {
        "discs": n,
        "boxes": boxes,
        "steps": steps,
        "compiled chunk": chunk_size(n, boxes, device, True),
    }
    if not compiles:
        return row | rate("eager", million, timed(eager, options.rounds, options.seconds))
    found = compare(eager, compiled, options.rounds, options.seconds)
    row |= rate("eager", million, found.a) | rate("compiled", million, found.b)
    return row | {"compiled / eager": found.ratio, "quartiles of it": span(*found.quartiles)}


def rate(name: str, million: float, timing: Timing) -> dict[str, object]:
    """Entries of a row: the median rate, its quartiles, and the single bursts."""
    low, high = timing.quartiles
    return {
        f"{name} M/s": million / timing.median,
        f"{name} quartiles": span(million / high, million / low),
        f"{name} seconds": timing.bursts,
    }


def rates(device: torch.device, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows for one device."""
    for n in options.discs:
        seconds = compile_times(n, device)
        cold, cached = seconds or (None, None)
        yield {"what": "torch.compile", "discs": n, "s, nothing on disk": cold, "s, from its disk cache": cached}
        for boxes in options.boxes:
            yield {"what": "rates"} | rate_row(n, boxes, device, seconds is not None, options)


def pool_seconds(device: torch.device, times: int, rows: int | None) -> tuple[Pool, tuple[float, ...]]:
    """The pool of the quick recipe, and the seconds that each making of it took."""
    config = quick_packs()[0].config
    sizes = part_sizes(config) | ({"train": rows} if rows else {})
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        pool = Pool.make(config.system, config.data.seed, sizes, device)
        synchronise()
        found.append(time.perf_counter() - begin)
    return pool, tuple(found)


def quick_packs() -> tuple[Pack, ...]:
    """The packs of the quick recipe, as they are cut for the workers."""
    return packs(validate(quick()), workers=WORKERS)


def pack_step(pack: Pack, pool: Pool, steps: int) -> Timing:
    """Seconds a step of a pack, over bursts of `steps / 3` steps, after a few that are not timed."""
    trains, keys = [member.config.train for member in pack.members], [member.key for member in pack.members]
    trainer = Trainer(pack.config.system, pool.parts["train"], pack.config.model, trains, keys)

    for _ in range(WARM_UP):
        trainer.advance()
    count = max(1, steps // 3)
    return Timing(bursts=tuple(burst(trainer.advance, count) for _ in range(3)), calls=count)


def sweep_seconds(pool: Pool, steps: int) -> tuple[float, list[dict[str, object]]]:
    """Seconds of all training steps of the quick recipe over its workers, extrapolated; and what was timed."""
    every, rows, total = quick_packs(), [], 0.0
    for width in dict.fromkeys(pack.config.model.width for pack in every):
        same = [pack for pack in every if pack.config.model.width == width]
        timing, count = pack_step(same[0], pool, steps), same[0].config.train.steps
        total += timing.median * count * len(same) / WORKERS
        low, high = (1e3 * value for value in timing.quartiles)
        rows.append(
            {
                "what": "quick recipe: a step of a pack",
                "width": width,
                "members": len(same[0].members),
                "packs": len(same),
                "ms": 1e3 * timing.median,
                "quartiles": span(low, high),
                "seconds": timing.bursts,
            }
        )
    return total, rows


def quick_rows(device: torch.device, options: argparse.Namespace) -> list[dict[str, object]]:
    """What the pool of the quick recipe costs beside its training."""
    pool, seconds = pool_seconds(device, options.pools, options.rows)
    training, rows = sweep_seconds(pool, options.steps)
    made = sorted(seconds)[len(seconds) // 2]
    pool_row: dict[str, object] = {
        "what": "quick recipe: pool",
        "train rows": len(pool.parts["train"]),
        "s": made,
        "quartiles": span(*quartiles(seconds)),
        "seconds": seconds,
        "training s (extrapolated)": training,
        "pool / training": made / training,
    }
    return [pool_row, *rows]


def notes(options: argparse.Namespace) -> list[str]:
    """What the numbers mean."""
    where = "one CPU thread" if options.device == "cpu" else "the GPU"
    found = [
        f"M/s: million particle-steps a second (boxes x discs x time steps) of {where}, medians and quartiles over "
        f"{options.rounds} rounds in which eager and compiled take turns; set-up of a call included.",
        "Compiled kernels have one fixed size, `compiled chunk` boxes: the least power of two that holds all of them, "
        "up to what a cache is good for.",
        "torch.compile is not part of any rate; the first of its rows includes loading the compiler's own modules.",
        f"Radius {RADIUS[16]} for 16 discs, {RADIUS[64]} for 64 in a box of 1 x 1: both fill 18% of it.",
    ]
    if options.pools:
        found.append(
            f"Training is extrapolated: {options.steps} steps of one pack of each width of the quick recipe, times all "
            f"steps and packs, over {WORKERS} workers taken to run as fast as one alone; probes are not counted."
        )
    if options.rows:
        found.append(f"The pool has {options.rows} train rows here and not the recipe's.")
    return found + ([options.note] if options.note else [])


def show(rows: Sequence[Row]) -> None:
    """Rows as they come, to standard output."""
    for row in rows:
        print({key: value for key, value in row.items() if not isinstance(value, tuple)}, flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """All rows; nothing that was compiled before is used."""
    device, rows = torch.device(options.device), []
    for row in rates(device, options):
        show([row])
        rows.append(row)
    if options.pools:
        costs = quick_rows(device, options)
        show(costs)
        rows += costs
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.simulation", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--discs", type=int, nargs="+", choices=sorted(RADIUS), default=sorted(RADIUS))
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 512, 4096, 8192])
    parser.add_argument("--work", type=int, default=4_000_000, help="particle-steps a call, about")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of bursts")
    parser.add_argument(
        "--pools", type=int, default=3, help="times that the quick recipe's pool is made; 0: not at all"
    )
    parser.add_argument("--rows", type=int, help="train rows of that pool (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=30, help="training steps timed of each width")
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = str(Path(folder) / name.lower())
        rows = measure(options)
    write("simulation", rows, notes(options), options.device)


if __name__ == "__main__":
    main()
