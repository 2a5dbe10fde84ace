"""Train a pack: S members of equal shape in one process, each on its own stream of random numbers.

Everything is per member - data order, learning rate, weight decay, clip, loss, divergence - so that a member's numbers
depend on its own config and key alone. A pack is trained in parts of a few members, as many as work best at once on the
device. On a GPU a step is recorded once as a CUDA graph and then replayed; between probe steps nothing is copied to the
host.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sim.checks import require
from sim.generator import Generator
from sim.system import Rows, System
from train.config import ModelConfig, TrainConfig
from train.model import activations, filled_examples, initial, tensor_specs
from train.neighbours import tokens_and_keys
from train.recording import Recording, aside
from train.snapshot import Snapshot
from train.state import State, flatten, unflatten
from train.step import Part, Task

PER_MEMBER = ("learning_rate", "weight_decay", "clip")
RESULTS_VERSION = 4  # raised when a fix changes numbers
WARM = 3  # steps on a GPU before one is recorded: libraries choose their kernels and work space in them
CACHE = 24 << 20  # bytes of activations that a part may keep on a CPU, and
MEMBERS_AT_ONCE = 32  # members: both measured (tests/bench/steps.py), speed is flat below them and falls beyond
AHEAD = 1 << 18  # row numbers worked out at once: enough to spread the cost of many tiny operations over steps


@functools.cache
def probe_steps(steps: int, per_decade: int) -> tuple[int, ...]:
    """0, then whole steps log-spaced from 1 to `steps` inclusive, `per_decade` a decade where whole numbers allow."""
    count = math.ceil(per_decade * math.log10(max(steps, 1))) + 1
    return (0, *sorted({round(step) for step in np.geomspace(1, steps, max(count, 2))}))


def shape_of(train: TrainConfig) -> TrainConfig:
    """The config with what may differ within a pack set to its default: equal for members that can share one."""
    default = TrainConfig()
    return replace(train, **{name: getattr(default, name) for name in PER_MEMBER})


def fitting(system: System, rows: Rows, model: ModelConfig, train: TrainConfig, examples: int | None = None) -> int:
    """How many members should pass that many examples at once (None: a batch) on the device of the rows.

    A CPU is fastest while what they keep for the backward pass stays near its cache; a GPU while half of its free
    memory holds it.
    """
    each = kept_bytes(model, train, examples or train.batch_size, *tokens_and_keys(system, model, rows))
    if rows.device.type == "cuda":
        return max(1, free_memory(rows.device) // 2 // each)
    return max(1, min(MEMBERS_AT_ONCE, CACHE // each))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take: what nobody holds, within the share that it has been given."""
    held, (free, total) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - held
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + unused, share - held))


def kept_bytes(model: ModelConfig, train: TrainConfig, examples: int, tokens: int, keys: int | None) -> int:
    """Bytes that one member keeps of so many examples for the backward pass, about."""
    return filled_examples(examples, tokens) * activations(model, tokens, keys) * train.dtype.itemsize


def even_cuts(count: int, most: int) -> list[slice]:
    """0..count in as few slices as `most` allows, of sizes that differ by at most 1."""
    parts = max(1, -(-count // most))
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class Schedule:
    """Which rows each member sees at a step, and keys for what else is random there; worked out many steps at once."""

    def __init__(self, members: Generator, rows: int, batch: int) -> None:
        self.order, self.noise = members.fold("rows"), members.fold("draw")
        self.rows, self.batch = rows, batch
        self.steps = max(1, min(64, AHEAD // (len(members.key) * batch)))
        self._block = -1
        self._index = self._keys = members.key

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Row numbers `[S, B]` and keys `[S]`."""
        block, place = divmod(step, self.steps)
        if block != self._block:
            start = block * self.steps
            steps = torch.arange(start, start + self.steps, device=self.order.key.device)[:, None]
            self._index = self.order.fold(steps).integers(self.rows, self.batch)
            self._block, self._keys = block, self.noise.fold(steps).key
        return self._index[place], self._keys[place]


class Trainer:
    """A pack in training. `trains` and `keys` hold one entry a member; `rows` is the train part, on the device.

    orders: each member's key for its order of rows and its noise (None: `keys`); members with equal ones see the same.
    chunk: how many members take a step at once (None: as `fitting` has it); on a CPU it changes no number.
    """

    def __init__(
        self,
        system: System,
        rows: Rows,
        model: ModelConfig,
        trains: Sequence[TrainConfig],
        keys: Sequence[int],
        *,
        orders: Sequence[int] | None = None,
        state: State | None = None,
        chunk: int | None = None,
    ) -> None:
        orders = keys if orders is None else orders
        require(len({shape_of(train) for train in trains}) == 1, "train", trains, f"equal but for {PER_MEMBER}")
        for name, given in (("keys", keys), ("orders", orders)):
            require(len(given) == len(trains), name, len(given), f"one for each of {len(trains)} members")
        require(chunk is None or chunk >= 1, "chunk", chunk, "at least 1, or None")
        self.system, self.model, self.train, self.device = system, model, shape_of(trains[0]), rows.device
        self.specs = tensor_specs(model, system.d_in, system.d_out)
        self.state = (state or self._start(keys)).to(self.device)
        self.schedule = Schedule(Generator.stack(orders, self.device), len(rows), self.train.batch_size)
        task = Task(
            system=system, rows=rows, model=model, train=self.train, specs=self.specs, rate=self._relative_rate()
        )
        self.cuts = even_cuts(len(keys), chunk or fitting(system, rows, model, self.train))
        self.parts = [Part(task, self.state.part(cut), trains[cut]) for cut in self.cuts]
        self.clock = torch.tensor(self.state.step, device=self.device)
        self._first = self.state.step
        self._recorded: Recording | None = None

    def _start(self, keys: Sequence[int]) -> State:
        generator = Generator.stack(keys).fold("initial")
        named = initial(self.model, self.system.d_in, self.system.d_out, generator, self.train.dtype)
        weights = flatten(named, self.specs)
        zeros = torch.zeros(len(keys), dtype=torch.float64)
        return State(
            step=0,
            weights=weights,
            mean=torch.zeros_like(weights),
            square=torch.zeros_like(weights),
            loss_sum=zeros,
            loss_count=zeros.clone(),
            diverged=torch.full((len(keys),), -1, dtype=torch.int64),
        )

    def _relative_rate(self) -> Tensor | None:
        rates = {name: spec.rate(self.model, self.train.optimizer) for name, spec in self.specs.items()}
        if set(rates.values()) == {1.0}:
            return None
        full = {name: torch.full((1, *self.specs[name].shape), rate) for name, rate in rates.items()}
        return flatten(full, self.specs).to(self.device, self.train.dtype)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Named weights `[S, ...]`, live."""
        return unflatten(self.state.weights, self.specs)

    def snapshot(self) -> Snapshot:
        """The pack as it stands; valid until the next step."""
        return Snapshot(step=self.state.step, system=self.system, model=self.model, parameters=self.parameters)

    def run(self, stops: Sequence[int]) -> Iterator[Snapshot]:
        """Train on to each of the steps that lie ahead (or here), in order, and yield the snapshot there."""
        for stop in stops:
            if stop < self.state.step:
                continue
            while self.state.step < stop:
                self.advance()
            yield self.snapshot()

    def take_loss(self) -> Tensor:
        """Mean training loss `[S]` since it was last taken (NaN before the first step)."""
        mean = self.state.loss_sum / self.state.loss_count
        self.state.loss_sum.zero_()
        self.state.loss_count.zero_()
        return mean

    def advance(self, steps: int = 1) -> None:
        """So many optimiser steps of every member that has not diverged.

        On a CPU a part takes all of them before the next part's turn: its weights and moments then stay in the cache.
        """
        if self.device.type == "cuda":
            for step in range(self.state.step, self.state.step + steps):
                self._take_on_gpu(step)
        else:
            drawn = [self.schedule.at(self.state.step + step) for step in range(steps)]
            for cut, part in zip(self.cuts, self.parts, strict=True):
                for step, (index, keys) in enumerate(drawn):
                    part.take(self.clock + step, index[cut], Generator(keys[cut]))
            self.clock.add_(steps)
        self.state.step += steps

    def _take_on_gpu(self, step: int) -> None:
        index, keys = self.schedule.at(step)
        if self._recorded is None and step < self._first + WARM:
            aside(functools.partial(self._take, index, keys))
            return
        if self._recorded is None:
            self._recorded = Recording(self._take, index, keys)
        self._recorded.replay(index, keys)

    def _take(self, index: Tensor, keys: Tensor) -> None:
        """A step of all parts; all that it reads of time is on the device."""
        for cut, part in zip(self.cuts, self.parts, strict=True):
            part.take(self.clock, index[cut], Generator(keys[cut]))
        self.clock.add_(1)
