"""Everything that training a pack needs to go on: stacked tensors, one row a member."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sim.checks import require
from train.model import TensorSpec

ALIGNMENT = 64  # a member's row starts at a multiple of this many numbers: vector kernels then treat all members alike


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

    def part(self, rows: slice) -> State:
        """The members in `rows`, on the same memory."""
        return State(step=self.step, **{name: value[rows] for name, value in self.tensors().items()})

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
