"""What is learnt: the System protocol, its rows and batches, and helpers that every system shares.

Axes: S members, B examples, N tokens, K keys that a token may attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from sim.generator import Generator

Part = Literal["train", "validation", "probe"]
PARTS: tuple[Part, ...] = ("train", "validation", "probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Clean rows of one part of a pool.

    columns: named tensors `[n, ...]`, the first axis over examples (after `take` with a stacked index: `[S, B, ...]`).
    statistics: named tensors of the *train* part (means, scales), shared by all parts and never indexed.
    """

    columns: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def device(self) -> torch.device:
        """Where the columns lie."""
        return next(iter(self.columns.values())).device

    def take(self, index: Tensor | slice) -> Rows:
        """The rows at `index`, an int64 tensor of any shape (its axes come first) or a slice."""
        return Rows(columns={name: value[index] for name, value in self.columns.items()}, statistics=self.statistics)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Rows:
        """On another device, floating-point tensors cast to `dtype` if it is given."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return Rows(
            columns={name: move(value) for name, value in self.columns.items()},
            statistics={name: move(value) for name, value in self.statistics.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One batch as a model sees it; leading axes (S, or none where members share it) broadcast everywhere.

    inputs `[..., B, N, d_in]`; targets `[..., B, N, d_out]`;
    mask bool `[..., B, N]`: the real tokens (None: all);
    keys int64 `[..., B, N, K]`: what each token may attend to (None: all tokens, K = N);
    allowed bool `[..., B, N, K]`: which of the keys are visible (None: all);
    geometry: named tensors `[..., B, ...]` that `distance` and `relations` read; what only `relations` reads may be
    missing on training batches.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None
    keys: Tensor | None = None
    allowed: Tensor | None = None
    geometry: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """Losses to compare with: of the mean target, the best model without attention, the best model (None: unknown)."""

    trivial: float
    without_attention: float | None = None
    optimum: float | None = None


Predict = Callable[[Batch], Tensor]
"""Predictions `[..., B, N, d_out]` of one model, or of a pack `[S, B, N, d_out]`, in the units of `Batch.targets`."""


@runtime_checkable
class System(Protocol):
    """A task made of tokens that interact in pairs. Implementations are frozen dataclasses, fields are config."""

    @property
    def d_in(self) -> int:
        """Numbers per token that go in."""

    @property
    def d_out(self) -> int:
        """Numbers per token that come out."""

    @property
    def relation(self) -> str:
        """The relation that a sweep is judged by, one of those that `relations` returns."""

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        """`n` clean rows without statistics, sampled or enumerated. Parts never share a trajectory."""

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        """Figures of the train rows that `draw` standardises with; empty where none are needed."""

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        """One batch of the rows taken, with what is random anew at every step (noise, times) from `generator`.

        rows: columns `[..., B, ...]`; generator: one stream, or one per member where rows lead with S.
        """

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        """Named pair relations, bool `[B, N, K]`: whether i and its k-th key are related; False for i itself."""

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> Tensor | None:
        """Distance of i to its k-th key, `[..., B, N, K]`, periodic where the system is; None where there is none.

        keys `[..., B, 1, K]` are shared by all queries.
        """

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Loss per example, `[..., B]`, over the real tokens."""

    def floors(self) -> Floors:
        """Losses of reference predictors, where known."""

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        """System-level figures (rollout error, score error, ...) on validation rows, `[...]`: one per member."""


def mean_square_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Mean squared error over real tokens and outputs, per example: `[..., B]`."""
    error = (prediction - batch.targets).square().mean(-1)
    if batch.mask is None:
        return error.mean(-1)
    return (error * batch.mask).sum(-1) / batch.mask.sum(-1).clamp_min(1)


def gather_keys(values: Tensor, keys: Tensor | None) -> Tensor:
    """Per-token `values [..., N, c]` at each query's keys: `[..., N, K, c]`, or `[..., 1, N, c]` where keys is None."""
    if keys is None:
        return values.unsqueeze(-3)
    n, k = keys.shape[-2:]
    flat = keys.reshape(*keys.shape[:-2], n * k, 1).expand(*keys.shape[:-2], n * k, values.shape[-1])
    return torch.gather(values, -2, flat).reshape(*keys.shape, values.shape[-1])


def gather_pairs(pairs: Tensor, keys: Tensor | None) -> Tensor:
    """Pair values `[..., N, N]` at each query's keys: `[..., N, K]`."""
    return pairs if keys is None else torch.gather(pairs, -1, keys)


def exclude_self(pairs: Tensor, keys: Tensor | None) -> Tensor:
    """Bool pairs `[..., N, K]` with every token's own entry set to False."""
    n, k = pairs.shape[-2:]
    own = torch.arange(n, device=pairs.device)[:, None]
    other = torch.arange(k, device=pairs.device)[None, :] if keys is None else keys
    return pairs & (other != own)
