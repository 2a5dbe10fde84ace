"""What each token attends to under local attention: its k nearest by the system's own distance, as keys of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sim.checks import require
from sim.generator import Generator
from sim.system import Batch, Rows, System
from train.config import ModelConfig
from train.model import visible_keys

PAIRS_AT_ONCE = 1 << 20  # whose distances are known at one time: a few MB for each number that a distance takes


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

    Where fewer are visible the rest are hidden keys, which stay hidden. All pairs are looked at, some keys at a time:
    N^2 in time, N k in memory. Asks the host nothing.
    """
    if batch.keys is not None:
        apart = _hide(_distance(system, batch, batch.keys), visible_keys(batch))
        best = torch.topk(apart, k, dim=-1, largest=False).indices
        allowed = None if batch.allowed is None else torch.gather(batch.allowed, -1, best)
        return replace(batch, keys=torch.gather(batch.keys, -1, best), allowed=allowed)
    lead, n = batch.inputs.shape[:-2], batch.inputs.shape[-2]
    at_once = max(k, PAIRS_AT_ONCE // max(1, batch.inputs[..., 0].numel()))
    visible = visible_keys(batch)
    if at_once >= n:
        keys = torch.topk(_hide(_distance(system, batch, None), visible), k, dim=-1, largest=False).indices
    else:
        tokens = torch.arange(n, device=batch.inputs.device).expand(*lead, 1, n)
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, n, at_once):
            cut = (..., slice(start, start + at_once))
            some = tokens[cut]
            apart = _hide(_distance(system, batch, some), None if visible is None else visible[cut])
            found = [_merge([*found, (apart, some.expand_as(apart))], min(k, start + some.shape[-1]))]
        keys = found[0][1]
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


def _merge(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of several lists of distances and tokens `[..., N, C]`."""
    apart, tokens = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    near = torch.topk(apart, k, dim=-1, largest=False)
    return near.values, torch.gather(tokens, -1, near.indices)
