"""A pack at one probe step, as probes see it (it satisfies `probes.probe.View`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sim.system import Batch, System
from train.config import ModelConfig
from train.model import HeadEdit, Reading, embed, filled, finish_layer, forward, layer, look, unembed
from train.neighbours import with_keys

EXAMPLES_AT_ONCE = 64  # in a prediction: many more fall out of a CPU's cache


class Intervention(Protocol):
    """What is replaced in one layer: `probes.probe.Replace`, or anything of its shape."""

    @property
    def layer(self) -> int:
        """Index of the layer."""

    @property
    def output(self) -> tuple[int, ...]:
        """Heads whose output becomes its mean over the batch."""

    @property
    def pattern(self) -> tuple[int, ...]:
        """Heads whose attention becomes uniform."""


def split(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch, a few at a time, without their geometry."""
    for start in range(0, batch.inputs.shape[-3], EXAMPLES_AT_ONCE):
        cut = (..., slice(start, start + EXAMPLES_AT_ONCE), slice(None), slice(None))
        yield Batch(
            inputs=batch.inputs[cut],
            targets=batch.targets[cut],
            mask=None if batch.mask is None else batch.mask[cut[:-1]],
            keys=None if batch.keys is None else batch.keys[cut],
            allowed=None if batch.allowed is None else batch.allowed[cut],
        )


@dataclass(kw_only=True, slots=True)
class Snapshot:
    """S members at one step and time (Unix seconds). `parameters [S, ...]` are live: read them before training goes on.

    A batch that has no keys, such as a system makes when it feeds predictions back, gets those of local attention.

    Interventions on one batch in a row share all that comes before what heads of the lowest layer replaced say.
    """

    step: int
    system: System
    model: ModelConfig
    parameters: Mapping[str, Tensor]
    time: float = field(default_factory=time.time)
    _batch: Batch | None = field(default=None, repr=False)
    _full: Batch | None = field(default=None, repr=False)
    _residuals: list[Tensor] = field(default_factory=list, repr=False)
    _readings: dict[int, Reading] = field(default_factory=dict, repr=False)

    @property
    def members(self) -> int:
        """S."""
        return len(self.parameters["embed.W"])

    @property
    def layers(self) -> int:
        """L."""
        return self.model.layers

    @property
    def heads(self) -> int:
        """H."""
        return self.model.n_heads

    def part(self, rows: slice) -> Snapshot:
        """Some of the members."""
        parameters = {name: value[rows] for name, value in self.parameters.items()}
        return Snapshot(step=self.step, system=self.system, model=self.model, parameters=parameters, time=self.time)

    @torch.no_grad()
    def attention(self, batch: Batch) -> Tensor:
        """Attention weights `[S, L, H, B, N, K]` on a batch without a member axis."""
        full = filled(with_keys(self.system, self.model, batch))
        x = embed(self.parameters, full)
        patterns: list[Tensor] = []
        for index in range(self.layers):
            reading = look(self.parameters, self.model, index, x, full)
            patterns.append(reading.pattern)
            if index + 1 < self.layers:
                x = finish_layer(self.parameters, self.model, index, reading.stream, reading.merged())
        return torch.stack(patterns, dim=1).transpose(2, 3)[:, :, :, : batch.inputs.shape[-3]]

    @torch.no_grad()
    def predict(self, batch: Batch, replace: Iterable[Intervention] = ()) -> Tensor:
        """Predictions `[S, B, N, d_out]`, under interventions (at most one per layer)."""
        batch = with_keys(self.system, self.model, batch)
        edits = {item.layer: HeadEdit(output=item.output, pattern=item.pattern) for item in replace}
        if not edits:
            return torch.cat([forward(self.parameters, self.model, part) for part in split(batch)], dim=1)
        full, lowest = self._take_up(batch), min(edits)
        x = self._residual(batch, lowest)
        for index in range(lowest, self.layers):
            if index not in edits:
                x = layer(self.parameters, self.model, index, x, full)
                continue
            first = index == lowest
            reading = self._reading(batch, index) if first else look(self.parameters, self.model, index, x, full)
            merged = reading.merged(full, edits[index])
            x = finish_layer(self.parameters, self.model, index, reading.stream, merged)
        return unembed(self.parameters, x)[:, : batch.inputs.shape[-3]]

    def _take_up(self, batch: Batch) -> Batch:
        """The batch, filled; what is kept of another one goes."""
        if self._full is None or self._batch is not batch:
            self._batch, self._full = batch, filled(batch)
            self._residuals, self._readings = [embed(self.parameters, self._full)], {}
        return self._full

    def _reading(self, batch: Batch, index: int) -> Reading:
        """What the heads of layer `index` do on the untouched stream, kept for the batch and layer asked about last."""
        x = self._residual(batch, index)
        if index not in self._readings:
            self._readings = {index: look(self.parameters, self.model, index, x, self._take_up(batch))}
        return self._readings[index]

    def _residual(self, batch: Batch, index: int) -> Tensor:
        """The untouched stream that enters layer `index` on the filled batch, kept for the batch asked about last."""
        full = self._take_up(batch)
        while len(self._residuals) <= index:
            below = len(self._residuals) - 1
            self._residuals.append(layer(self.parameters, self.model, below, self._residuals[below], full))
        return self._residuals[index]

    def loss(self, prediction: Tensor, batch: Batch, tokens: Tensor | None = None) -> Tensor:
        """Loss per example `[S, B]` over `tokens` (bool `[B, N]`) or all real ones; 0 where an example has none."""
        return self.system.loss(prediction, batch if tokens is None else replace(batch, mask=tokens))

    def gradient(self, batch: Batch) -> dict[str, Tensor]:
        """Gradient of each member's mean loss by its own parameters."""
        batch = with_keys(self.system, self.model, batch)
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        loss = self.system.loss(forward(leaves, self.model, batch), batch).mean(-1).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
