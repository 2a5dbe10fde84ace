"""Hand-made Views: models whose attention is planted, or whose loss is a known sum of what the heads say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.probe import ProbeBatch, Replace


@dataclass(frozen=True, kw_only=True)
class PlainBatch:
    """A batch without a system behind it; shapes as in `probes.probe.BatchLike`."""

    inputs: Tensor
    targets: Tensor | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    allowed: Tensor | None = None


def plain_batch(b: int, n: int, **fields: Tensor | None) -> PlainBatch:
    """B examples of N tokens, all zero."""
    return PlainBatch(inputs=torch.zeros(b, n, 1), **fields)


class FakeView:
    """The parts of a View that a test does not care about; `step` 0 and nothing to see."""

    step, time = 0, 0.0
    members = layers = heads = 1
    parameters: dict[str, Tensor] = {}  # noqa: RUF012

    def attention(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def predict(self, batch: Any, replace: tuple[Replace, ...] = ()) -> Tensor:
        raise NotImplementedError

    def loss(self, prediction: Tensor, batch: Any, tokens: Tensor | None = None) -> Tensor:
        """Mean squared error by example `[S, B]` over `tokens` or all real ones, 0 where an example has none."""
        real = torch.ones(batch.inputs.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
        counted = real if tokens is None else tokens & real
        error = (prediction - batch.targets).square().mean(-1)
        return torch.where(counted, error, 0.0).sum(-1) / counted.sum(-1).clamp_min(1)

    def gradient(self, batch: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class PlantedView(FakeView):
    """Given attention `[S, L, H, B, N, K]`, one tensor per replicate of a probe set."""

    def __init__(self, replicates: Sequence[ProbeBatch], attention: Sequence[Tensor]) -> None:
        self.members, self.layers, self.heads = attention[0].shape[:3]
        self._planted = {id(r.batch): a for r, a in zip(replicates, attention, strict=True)}

    def attention(self, batch: Any) -> Tensor:
        return self._planted[id(batch)]


class SumView(FakeView):
    """A model that adds up what its heads say, `says [S, L, H, B, N]`, and what they say under uniform attention.

    A layer passes its sum through `saturate`, if given: heads that do the same work then hide each other's loss.
    """

    def __init__(self, says: Tensor, uniform: Tensor, saturate: float = float("inf")) -> None:
        self.members, self.layers, self.heads = says.shape[:3]
        self.says, self.uniform, self.saturate = says, uniform, saturate
        self.calls: list[tuple[Replace, ...]] = []

    def predict(self, batch: Any, replace: tuple[Replace, ...] = ()) -> Tensor:
        self.calls.append(replace)
        copies = len(batch.inputs) // self.says.shape[3]  # a batch of several replicates says the same several times
        says, uniform = (said.repeat(1, 1, 1, copies, 1) for said in (self.says, self.uniform))
        for r in replace:
            for h in r.pattern:
                says[:, r.layer, h] = uniform[:, r.layer, h]
            for h in r.output:
                said = says[:, r.layer, h]
                real = torch.ones_like(said[0], dtype=torch.bool) if batch.mask is None else batch.mask
                says[:, r.layer, h] = said[:, real].mean(-1)[:, None, None]
        return says.sum(2).clamp(-self.saturate, self.saturate).sum(1)[..., None]
