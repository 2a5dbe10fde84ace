"""Member-steps per second of packs, against a plain PyTorch loop over single members: `python -m tests.bench.steps`.

The plain loop is what one would write for one member: `tests.stock.StockTransformer` with scaled-dot-product attention,
fused Adam, rows drawn by `torch.randint` from data that is standardised beforehand. A second of it gives as many
member-steps however many members wait their turn. On a GPU it runs eagerly there, and a pack replays its CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from cluster.pack import STRIDE
from sim.generator import Generator
from sim.particles import ParticleSystem
from sim.pool import Pool
from sim.system import Rows
from tests.bench.measure import Row, Timing, burst, compare, one_thread, short, span, synchronise, timed, write
from tests.stock import StockTransformer
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer
from train.model import activations, count_parameters
from train.state import State

WARM_UP = 6  # steps before timing; on a GPU the fourth is recorded
COUNTED = 16  # members of the pack whose kernels are counted
COPIES = 7  # numbers a parameter that a pack's memory holds: weights, moments, gradient, direction, and found gradients
POOL_SEED, ROWS = 0, 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the device reaches by itself: flops and bytes a second, and seconds a kernel of a replayed graph."""

    flops: float
    bytes: float | None = None
    launch: float | None = None


def plain_step(model: ModelConfig, rows: Rows, system: ParticleSystem, batch_size: int) -> Callable[[], None]:
    """A member's training step in plain PyTorch."""
    batch = system.draw(rows, Generator.of("plain"))
    inputs, targets = batch.inputs.contiguous(), batch.targets.contiguous()
    net = StockTransformer(model, system.d_in, system.d_out).to(rows.device)
    optimiser = torch.optim.Adam(net.parameters(), lr=TrainConfig().learning_rate, fused=True)

    def step() -> None:
        index = torch.randint(len(inputs), (batch_size,), device=inputs.device)
        optimiser.zero_grad(set_to_none=True)
        functional.mse_loss(net(inputs[index]), targets[index]).backward()
        optimiser.step()

    return step


def pack(
    system: ParticleSystem, rows: Rows, model: ModelConfig, train: TrainConfig, size: int, state: State | None
) -> Trainer:
    """A pack of `size` members past its first steps; it goes on from `state`, if given."""
    trainer = Trainer(system, rows, model, [train] * size, list(range(size)), state=state)
    for _ in range(WARM_UP):
        trainer.advance()
    synchronise()
    return trainer


def products(device: torch.device, size: tuple[int, int, int]) -> float:
    """Float32 flops a second of a product `[m, k] x [k, n]`: the best of some bursts."""
    m, k, n = size
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    out = torch.empty(m, n, device=device)
    return 2 * m * k * n / min(timed(lambda: torch.mm(a, b, out=out), 5, 0.1).bursts)


def copies(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB: the best of some bursts."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), 5, 0.1).bursts)


def launches(device: torch.device) -> float:
    """Seconds a kernel of a replayed graph of 1,000 that each add to one number: the best of some bursts."""
    number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    number.add_(1)
    synchronise()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            number.add_(1)
    return min(timed(graph.replay, 5, 0.1).bursts) / 1000


def measured_rates(device: torch.device) -> Rates:
    """The rates of this device; of a CPU the products only."""
    if device.type == "cpu":
        return Rates(flops=products(device, (512, 128, 512)))
    return Rates(flops=products(device, (4096, 4096, 4096)), bytes=copies(device), launch=launches(device))


def take_eagerly(trainer: Trainer) -> None:
    """One step of all parts without a graph; the trainer's own count of steps stays behind."""
    index, keys = trainer.schedule.at(trainer.state.step)
    for cut, part in zip(trainer.cuts, trainer.parts, strict=True):
        part.take(trainer.clock, index[cut], Generator(keys[cut]))


def kernels(trainer: Trainer) -> int:
    """Kernels, copies and fills that one eager step launches on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        take_eagerly(trainer)
        synchronise()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def shares(trainer: Trainer, steps: int, most: int = 8) -> list[tuple[str, float]]:
    """The operations (on a GPU: kernels) that take most of the time of eager steps, with their share of it."""
    on_gpu = trainer.device.type == "cuda"
    take_eagerly(trainer)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        for _ in range(steps):
            take_eagerly(trainer)
        synchronise()
    events = seen.key_averages()
    if on_gpu:  # operations on the host carry the time of the kernels they launch: that would count it twice
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    spent = {e.key: float(e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events}
    total = sum(spent.values()) or 1.0
    return [(name, time / total) for name, time in sorted(spent.items(), key=lambda item: -item[1])[:most]]


def shares_text(trainer: Trainer, model: ModelConfig, batch: int, steps: int) -> str:
    """`shares` as a note."""
    found = ", ".join(f"{name.split('<')[0][:60]} {share:.0%}" for name, share in shares(trainer, steps))
    where = "time on the GPU" if trainer.device.type == "cuda" else "own CPU time under the profiler"
    members = len(trainer.state.weights)
    return f"Shares of {where}, pack of {members}, width {model.width}, batch {batch}, eager: {found}."


def bounds(trainer: Trainer, rates: Rates) -> dict[str, float]:
    """Seconds that a step of the pack takes at least, by what would bound it.

    arithmetic: 6 flops a parameter and token, at the measured rate of products (those of attention itself are left
    out). traffic: every parameter is read forward and backward, its gradient written and read, and weight and both
    moments read and written; every activation that is kept is written and read; at the rate of a copy.
    """
    members, padded = trainer.state.weights.shape
    example = trainer.system.draw(trainer.parts[0].task.rows.take(slice(0, 1)), Generator.of("example"))
    examples, tokens = members * trainer.train.batch_size, example.inputs.shape[-2]
    numbers = count_parameters(trainer.specs.values())
    found = {"arithmetic": 6 * numbers * trainer.train.batch_size * tokens * members / rates.flops}
    if rates.bytes is not None:
        kept = 2 * activations(trainer.model, tokens, tokens) * examples
        found["traffic"] = (10 * members * padded + kept) * trainer.train.dtype.itemsize / rates.bytes
    return found


def memory_left(device: torch.device) -> float:
    """Bytes that are free on the device; infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def release() -> None:
    """Give memory of what is gone back to the device: how a GPU cuts a pack goes by what is free there."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Bench:
    """All cells of the table, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.system = ParticleSystem()
        self.rows = Pool.make(self.system, POOL_SEED, {"train": ROWS}).to(self.device).parts["train"]
        self.rates = measured_rates(self.device)
        self.each: dict[int, float] = {}  # seconds a member-step by batch size, of the last size measured

    def train(self, batch: int) -> TrainConfig:
        """How members are trained."""
        return TrainConfig(batch_size=batch, compiled=self.options.compiled)

    def run(self) -> Iterator[dict[str, object]]:
        """Rows of the table."""
        for width in self.options.widths:
            model = ModelConfig(width=width, layers=2, heads=4)
            self.each.clear()
            for size in self.options.sizes:
                yield from self.sized(model, size)

    def sized(self, model: ModelConfig, size: int) -> Iterator[dict[str, object]]:
        """Rows of one width and one size of pack, by batch. The packs go on from one another, to draw weights once."""
        state: State | None = None
        for batch in self.options.batches:
            place: dict[str, object] = {"width": model.width, "batch": batch, "members": size}
            if reason := self.reason_to_skip(model, batch, size):
                yield place | {"left out": reason}
                continue
            try:
                trainer = pack(self.system, self.rows, model, self.train(batch), size, state)
                state = trainer.state
                yield place | self.cell(model, batch, trainer)
            except torch.OutOfMemoryError:
                yield place | {"left out": "out of memory"}
            trainer = None
            release()

    def add_launches(self, rows: Sequence[dict[str, object]]) -> None:
        """Add to rows of a GPU how many kernels a step is, and its time over theirs at the pace of a replayed graph.

        Kernels are counted in a pack of few members, times the chunks, without the drawing of row numbers; last of all,
        as a profiler that has once been attached may slow what follows.
        """
        if self.rates.launch is None:
            return
        counted: dict[tuple[object, object], int] = {}
        for row in rows:
            if "left out" in row:
                continue
            width, batch, chunks, step = (row[key] for key in ("width", "batch", "chunks", "step ms"))
            if (width, batch) not in counted:
                model = ModelConfig(width=int(str(width)), layers=2, heads=4)
                train, size = self.train(int(str(batch))), min(COUNTED, max(self.options.sizes))
                few = pack(self.system, self.rows, model, train, size, None)
                counted[width, batch] = kernels(few) // len(few.cuts)
                del few
                release()
            row["kernels"] = counted[width, batch] * int(str(chunks))
            row["step / launches"] = float(str(step)) / 1e3 / (row["kernels"] * self.rates.launch)

    def reason_to_skip(self, model: ModelConfig, batch: int, size: int) -> str | None:
        """Why a pack is not measured: one step takes too long, going by what a member takes, or memory is short."""
        if batch not in self.each:
            one = pack(self.system, self.rows, model, self.train(batch), 1, None)
            self.each[batch] = burst(one.advance, 3)
            self.numbers = one.state.weights.shape[1]
            del one
            release()
        if (step := self.each[batch] * size) > self.options.longest:
            return f"a step would take about {short(step)} s"
        wanted = COPIES * 4 * self.numbers * size
        return "memory" if wanted > 0.6 * memory_left(self.device) else None

    def cell(self, model: ModelConfig, batch: int, trainer: Trainer) -> dict[str, object]:
        """One row: member-steps a second of both, how many times more the pack makes, and what bounds its step."""
        size, options = len(trainer.state.weights), self.options
        plain = plain_step(model, self.rows, self.system, batch)
        turn = STRIDE if len(trainer.parts) > 1 else 1  # as `run_pack` does: parts take turns after so many steps
        found = compare(plain, lambda: trainer.advance(turn), options.rounds, options.seconds)
        step = found.b.median / turn
        self.each[batch] = step / size
        low, high = (turn * size * value for value in found.quartiles)
        row: dict[str, object] = {
            "ratio": turn * size * found.ratio,
            "quartiles": span(low, high),
            "pack member-steps/s": size / step,
            "plain member-steps/s": 1 / found.a.median,
            "chunks": len(trainer.cuts),
            "step ms": 1e3 * step,
        }
        row |= {f"step / {name}": step / least for name, least in bounds(trainer, self.rates).items()}
        return row | raw(found.a, found.b, turn)


def raw(plain: Timing, packed: Timing, turn: int) -> dict[str, object]:
    """Seconds of a step in single bursts, for the JSON file."""
    return {"seconds plain": plain.bursts, "seconds pack": tuple(burst / turn for burst in packed.bursts)}


def closest_bounds(rows: Sequence[Row]) -> str | None:
    """What the steps of each size of pack come nearest to, as a note; None where only one bound is known."""
    cells: dict[object, list[dict[str, float]]] = {}
    for row in rows:
        over = {key: value for key, value in row.items() if key.startswith("step / ") and isinstance(value, float)}
        if len(over) > 1:
            cells.setdefault(row["members"], []).append({key.removeprefix("step / "): over[key] for key in over})
    parts = []
    for size, some in cells.items():
        nearest = [min(cell, key=cell.__getitem__) for cell in some]
        counts = ", ".join(f"{name} in {nearest.count(name)}" for name in dict.fromkeys(nearest))
        parts.append(
            f"packs of {size}: {counts} (median {short(float(np.median([min(c.values()) for c in some])))} times it)"
        )
    return f"The bound that a step comes nearest to, by cells: {'; '.join(parts)}." if parts else None


def notes(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """What the table's numbers mean, what the device reaches, what a profile says."""
    gpu, rates = bench.device.type == "cuda", bench.rates
    found = [
        "ratio: member-steps a second of the pack over those of the plain loop, median over rounds of neighbouring "
        f"bursts; quartiles over {bench.options.rounds} rounds. Member-steps a second and step: medians over rounds.",
        "The plain loop trains the same model eagerly on the GPU; the pack replays its CUDA graph."
        if gpu
        else "Both run on one CPU thread.",
        "step / arithmetic, traffic, launches: time of the pack's step over the least it could be (docstrings of "
        "`bounds` and `Bench.add_launches`).",
        f"Measured: float32 products {rates.flops / 1e9:,.0f} Gflop/s"
        + (f", copy {rates.bytes / 1e9:,.0f} GB/s" if rates.bytes else " ([512, 128] x [128, 512])")
        + (f", {1e6 * rates.launch:.2f} µs a kernel of a replayed graph." if rates.launch else "."),
    ]
    if any("left out" in row for row in rows):
        found.append(
            f"Cells whose step would take more than {bench.options.longest:g} s, or more memory than there is, are "
            "left out; rows of several chunks show what a member costs beyond one."
        )
    if closest := closest_bounds(rows):
        found.append(closest)
    return found + ([bench.options.note] if bench.options.note else [])


def profiled(bench: Bench) -> str:
    """Shares of operations in a pack of the middle of the ranges asked for."""
    options = bench.options
    width, batch, size = (values[(len(values) - 1) // 2] for values in (options.widths, options.batches, options.sizes))
    model = ModelConfig(width=width, layers=2, heads=4)
    return shares_text(pack(bench.system, bench.rows, model, bench.train(batch), size, None), model, batch, 10)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.steps", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="members a pack")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--compiled", action="store_true", help="train packs through compiled kernels")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a burst")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of bursts")
    parser.add_argument("--longest", type=float, default=3.0, help="leave out steps that take longer, in seconds")
    parser.add_argument("--note", help="a line to keep with the results")
    one_thread()
    bench = Bench(parser.parse_args())
    rows, start = [], time.perf_counter()
    for row in bench.run():
        rows.append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, tuple)}
        print(f"[{time.perf_counter() - start:.0f} s]", shown, flush=True)
    bench.add_launches(rows)
    write(
        "steps-compiled" if bench.options.compiled else "steps",
        rows,
        [*notes(bench, rows), profiled(bench)],
        bench.device,
    )


if __name__ == "__main__":
    main()
