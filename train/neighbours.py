"""What each token attends to under local attention: its k nearest by the system's own distance, as keys of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sim.checks import require
from sim.generator import Generator
from sim.neighbours import nearest_keys
from sim.system import Batch, Rows, System
from train.config import ModelConfig
from train.model import visible_keys


def draw(system: System, model: ModelConfig, rows: Rows, generator: Generator) -> Batch:
    """A batch of the system as the model sees it: `System.draw`, with keys where attention is local."""
    return with_keys(system, model, system.draw(rows, generator))


def with_keys(system: System, model: ModelConfig, batch: Batch) -> Batch:
    """The batch with at most `model.reach` keys a token; the batch itself where it has no more."""
    n, k = batch.inputs.shape[-2], model.reach
    if k is None or k >= (n if batch.keys is None else batch.keys.shape[-1]):
        return batch
    return nearest(system, batch, k)


def tokens_and_keys(system: System, model: ModelConfig, rows: Rows) -> tuple[int, int | None]:
    """N and K of batches as the model sees them, K None where all tokens see all.

    ValueError for local attention in a system that has no distances.
    """
    batch = system.draw(rows.take(slice(0, 1)), Generator.of("example", device=rows.device))
    n, keys = batch.inputs.shape[-2], None if batch.keys is None else batch.keys.shape[-1]
    if model.reach is None:
        return n, keys
    _distance(system, batch, torch.zeros_like(batch.inputs[..., :1, :1], dtype=torch.int64))
    return n, keys if model.reach >= (keys or n) else model.reach


@torch.no_grad()
def nearest(system: System, batch: Batch, k: int) -> Batch:
    """The batch with keys `[..., N, k]`: each token's k nearest visible keys, itself among them, nearest first.

    Where fewer are visible the rest are hidden keys, which stay hidden.
    """
    if batch.keys is not None:
        r = _hide(_distance(system, batch, batch.keys), visible_keys(batch))
        best = torch.topk(r, k, dim=-1, largest=False).indices
        allowed = None if batch.allowed is None else torch.gather(batch.allowed, -1, best)
        return replace(batch, keys=torch.gather(batch.keys, -1, best), allowed=allowed)
    tokens, visible = batch.inputs[..., 0], visible_keys(batch)
    *lead, n = tokens.shape

    def apart(keys: Tensor | None) -> Tensor:
        seen = visible
        if seen is not None and keys is not None:
            seen = torch.gather(seen.expand(*lead, -1, n), -1, keys.expand(*lead, seen.shape[-2], -1))
        return _hide(_distance(system, batch, keys), seen)

    keys = nearest_keys(apart, lead, tokens, k)
    allowed = None if batch.allowed is None else torch.gather(batch.allowed.expand(*lead, n, n), -1, keys)
    return replace(batch, keys=keys, allowed=allowed)


def _distance(system: System, batch: Batch, keys: Tensor | None) -> Tensor:
    apart = system.distance(batch.geometry, keys)
    allowed = f"'global', as {type(system).__name__} has no distances between tokens"
    require(apart is not None, "model.attention", "local", allowed)
    assert apart is not None
    return apart


def _hide(apart: Tensor, visible: Tensor | None) -> Tensor:
    return apart if visible is None else torch.where(visible, apart, torch.inf)
