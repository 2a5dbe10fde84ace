"""Train a pack: S members of equal shape in one process, each on its own stream of random numbers.

Everything is per member - data order, learning rate, weight decay, clip, loss, divergence - so that a member's numbers
depend on its own config and key alone. Between probe steps nothing is copied to the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from sim.checks import require
from sim.generator import Generator
from sim.system import Rows, System
from train.config import ModelConfig, TrainConfig
from train.model import TensorSpec, forward, initial, tensor_specs
from train.snapshot import Snapshot

PER_MEMBER = ("learning_rate", "weight_decay", "clip")
RESULTS_VERSION = 1  # raised when a fix changes numbers
ALIGNMENT = 64  # a member's row starts at a multiple of this many numbers: vector kernels then treat all members alike
DIVERGED_LOSS = 1e6  # a member above this is frozen, as is one whose loss or gradient is not finite


@functools.cache
def probe_steps(steps: int, per_decade: int) -> tuple[int, ...]:
    """0, then whole steps log-spaced from 1 to `steps` inclusive, `per_decade` a decade where whole numbers allow."""
    count = math.ceil(per_decade * math.log10(max(steps, 1))) + 1
    return (0, *sorted({round(step) for step in np.geomspace(1, steps, max(count, 2))}))


def shape_of(train: TrainConfig) -> TrainConfig:
    """The config with what may differ within a pack set to its default: equal for members that can share one."""
    default = TrainConfig()
    return replace(train, **{name: getattr(default, name) for name in PER_MEMBER})


@dataclass(kw_only=True, slots=True)
class State:
    """Everything that training a pack needs to go on, leading axis S throughout: `take` and `join` cut and merge packs.

    weights, mean, square `[S, P]`: parameters in the order of `tensor_specs`, padded, and Adam's two moments;
    loss_sum, loss_count `[S]`: training loss since the last probe step;
    diverged `[S]`: the step at which a member was frozen, -1 while it runs.
    """

    step: int
    weights: Tensor
    mean: Tensor
    square: Tensor
    loss_sum: Tensor
    loss_count: Tensor
    diverged: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The stacked tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "step"}

    def take(self, index: Sequence[int]) -> State:
        """A copy of the members at `index`."""
        return State(step=self.step, **{name: value[list(index)] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> State:
        """On another device."""
        return State(step=self.step, **{name: value.to(device) for name, value in self.tensors().items()})


def join(states: Sequence[State]) -> State:
    """One pack of several packs that stand at the same step."""
    steps = {state.step for state in states}
    require(len(steps) == 1, "step", sorted(steps), "the same in all states that are joined")
    parts = [state.tensors() for state in states]
    return State(step=steps.pop(), **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def unflatten(flat: Tensor, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Named views `[S, ...]` into rows `[S, P]`."""
    views, start = {}, 0
    for name, spec in specs.items():
        size = math.prod(spec.shape)
        views[name] = flat[:, start : start + size].view(len(flat), *spec.shape)
        start += size
    return views


def flatten(named: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> Tensor:
    """Rows `[S, P]` of named tensors `[S, ...]`, padded with zeros to the alignment."""
    rows = [named[name].flatten(1) for name in specs]
    used = sum(row.shape[1] for row in rows)
    return torch.cat([*rows, rows[0].new_zeros(len(rows[0]), -used % ALIGNMENT)], dim=1)


class Trainer:
    """A pack in training. `trains` and `keys` hold one entry a member; `rows` is the train part, on the device."""

    def __init__(
        self,
        system: System,
        rows: Rows,
        model: ModelConfig,
        trains: Sequence[TrainConfig],
        keys: Sequence[int],
        *,
        state: State | None = None,
    ) -> None:
        require(len({shape_of(train) for train in trains}) == 1, "train", trains, f"equal but for {PER_MEMBER}")
        require(len(trains) == len(keys), "keys", len(keys), f"one for each of {len(trains)} members")
        self.system, self.rows, self.model, self.train = system, rows, model, shape_of(trains[0])
        self.specs = tensor_specs(model, system.d_in, system.d_out)
        self.dtype = getattr(torch, self.train.precision)
        device = rows.device
        self.generator = Generator.stack(keys, device)
        self.state = (state or self._start(keys)).to(device)
        self.rate = self._column([train.learning_rate for train in trains])
        self.decay = self._column([train.weight_decay for train in trains])
        self.clip = self._column([train.clip if train.clip is not None else math.inf for train in trains])
        self.clipped = any(train.clip is not None for train in trains)
        relative = {
            name: torch.full((1, *spec.shape), spec.rate(model, self.train.optimizer), dtype=self.dtype)
            for name, spec in self.specs.items()
        }
        self.relative_rate = flatten(relative, self.specs).to(device)
        self.parameters = {
            name: view.requires_grad_() for name, view in unflatten(self.state.weights, self.specs).items()
        }

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.generator.key.device)[:, None]

    def _start(self, keys: Sequence[int]) -> State:
        generator = Generator.stack(keys).fold("initial")
        named = initial(self.model, self.system.d_in, self.system.d_out, generator, self.dtype)
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

    def snapshot(self) -> Snapshot:
        """The pack as it stands; valid until the next step."""
        parameters = {name: value.detach() for name, value in self.parameters.items()}
        return Snapshot(step=self.state.step, system=self.system, model=self.model, parameters=parameters)

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

    def advance(self) -> None:
        """One optimiser step of every member that has not diverged."""
        state, step = self.state, self.state.step
        index = self.generator.fold("rows").fold(step).integers(len(self.rows), self.train.batch_size)
        batch = self.system.draw(self.rows.take(index), self.generator.fold("draw").fold(step))
        loss = self.system.loss(forward(self.parameters, self.model, batch), batch).mean(-1)
        named = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
        with torch.no_grad():
            gradient = flatten(dict(zip(self.parameters, named, strict=True)), self.specs)
            norm = gradient.square().sum(1, keepdim=True).sqrt()
            sound = torch.isfinite(norm[:, 0]) & (loss <= DIVERGED_LOSS)
            state.diverged = torch.where(sound | (state.diverged >= 0), state.diverged, step)
            alive = state.diverged < 0
            if self.clipped:
                gradient.mul_((self.clip / norm).clamp_max(1.0))
            self._apply(torch.where(alive[:, None], self._direction(gradient), 0.0), alive)
            state.loss_sum += torch.where(alive, loss, torch.nan)
            state.loss_count += 1
        state.step = step + 1

    def _direction(self, gradient: Tensor) -> Tensor:
        """The step `[S, P]` for unit rate: the gradient, or Adam's (Kingma and Ba 2015, algorithm 1)."""
        if self.train.optimizer == "sgd":
            return gradient
        beta1, beta2, count = self.train.beta1, self.train.beta2, self.state.step + 1
        self.state.mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.state.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (self.state.square / (1 - beta2**count)).sqrt_().add_(self.train.epsilon)
        return (self.state.mean / (1 - beta1**count)).div_(root)

    def _apply(self, direction: Tensor, alive: Tensor) -> None:
        rate = self.rate * min(1.0, (self.state.step + 1) / max(self.train.warmup, 1))
        shrink = torch.where(alive[:, None], 1 - rate * self.decay, 1.0)
        self.state.weights.mul_(shrink).sub_(direction.mul_(self.relative_rate).mul_(rate))
