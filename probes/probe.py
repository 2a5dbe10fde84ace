"""What a probe is and what it may look at. Structural types only: any model that fits `View` can be measured.

Axes: S members, L layers, H heads, B examples, N tokens, K keys, Q relations, R replicates (disjoint sets of examples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

When = Literal["every", "sparse", "checkpoints"]


class BatchLike(Protocol):
    """The part of a batch, a dataclass, that probes read; no leading member axis. Shapes as in `sim.system.Batch`."""

    @property
    def inputs(self) -> Tensor:
        """`[B, N, d_in]`."""

    @property
    def mask(self) -> Tensor | None:
        """Bool `[B, N]`: the real tokens; None: all."""

    @property
    def keys(self) -> Tensor | None:
        """int64 `[B, N, K]`: the keys of each query; None: all tokens, K = N."""

    @property
    def allowed(self) -> Tensor | None:
        """Bool `[B, N, K]`: the visible keys; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replace:
    """An intervention on the heads of one layer; everything else works as trained.

    output: heads whose contribution is replaced by its mean over all examples and real tokens of the batch.
    pattern: heads whose attention is made uniform over the visible keys, their values kept.
    """

    layer: int
    output: tuple[int, ...] = ()
    pattern: tuple[int, ...] = ()


class View(Protocol):
    """S models of L layers and H heads at one training step."""

    @property
    def step(self) -> int:
        """Training steps taken."""

    @property
    def time(self) -> float:
        """When, in Unix seconds."""

    @property
    def members(self) -> int:
        """S."""

    @property
    def layers(self) -> int:
        """L."""

    @property
    def heads(self) -> int:
        """H."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Named weights `[S, ...]`."""

    def attention(self, batch: Any) -> Tensor:
        """Attention weights `[S, L, H, B, N, K]`; rows of real queries sum to 1, hidden keys have weight 0."""

    def predict(self, batch: Any, replace: tuple[Replace, ...] = ()) -> Tensor:
        """Predictions `[S, B, N, d_out]`, under interventions on one or several layers (at most one per layer)."""

    def loss(self, prediction: Tensor, batch: Any, tokens: Tensor | None = None) -> Tensor:
        """Loss per example `[S, B]`, over `tokens` (bool `[B, N]`) or all real ones; 0 where an example has none."""

    def gradient(self, batch: Any) -> Mapping[str, Tensor]:
        """Gradient of each member's mean loss by its own parameters, `[S, ...]` each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeBatch:
    """One replicate of the frozen probe set.

    relations: bool `[B, N, K]` by name, self excluded. distance: `[B, N, K]` or None.
    groups: bool `[B, N]` by name: tokens to split losses by (for particles: colliding, free).
    ceilings: by group, and "all": a loss that is surely reached without attention (at worst that of the mean target).
    """

    batch: BatchLike
    relations: Mapping[str, Tensor]
    distance: Tensor | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)


def join_batches(batches: Sequence[BatchLike]) -> Any:
    """One batch of the examples of all: dataclasses whose tensors, and mappings of tensors, lead with B.

    ValueError for batches of another kind.
    """
    first = batches[0]
    if not is_dataclass(first) or isinstance(first, type):
        raise ValueError(f"batch: got a {type(first).__name__}, need a dataclass of tensors that lead with B")
    named = {item.name: [getattr(batch, item.name) for batch in batches] for item in fields(first)}
    return replace(first, **{name: _joined(values) for name, values in named.items()})


def _joined(values: Sequence[Any]) -> Any:
    if len({type(value) for value in values}) > 1:
        raise ValueError(f"batch: got {[type(value).__name__ for value in values]} for one field, need the same in all")
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], Mapping):
        return {name: _joined([value[name] for value in values]) for name in values[0]}
    return values[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a probe saw at one step: a dense grid of rows keyed by (member, layer, head, relation, replicate).

    relations: the Q names along the relation axis (a probe whose values do not depend on one uses other names, see its
    docstring). values: float arrays `[S, L, H, Q, R]` by column name; NaN where undefined.
    """

    relations: tuple[str, ...]
    values: Mapping[str, NDArray[np.float32]]

    @classmethod
    def join(cls, parts: Sequence[Measurement]) -> Measurement:
        """Of all members of several measurements by one probe, in order."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        return cls(relations=parts[0].relations, values=values)


class Probe(Protocol):
    """A measurement of all heads of all members at once."""

    @property
    def name(self) -> str:
        """Unique among the probes of a sweep."""

    @property
    def when(self) -> When:
        """`every` probe step; `sparse`: four a decade and the end; `checkpoints`: where parameters are kept."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values measured."""

    @property
    def relations(self) -> tuple[str, ...]:
        """The Q names along the relation axis."""

    def measure(self, view: View) -> Measurement:
        """Measure. Does not change the view; holds nothing from one call to the next."""
