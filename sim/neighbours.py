"""The nearest tokens of each token, found a few candidates at a time: N^2 in time, N k in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 20  # whose distances are known at one time: a few MB for each number that a distance takes


def nearest_keys(apart: Callable[[Tensor | None], Tensor], lead: Sequence[int], like: Tensor, k: int) -> Tensor:
    """The k nearest of N tokens for each of them, nearest first, int64 `[*lead, N, k]`.

    apart: distances `[*lead, N, C]` of every token to the keys `[*lead, 1, C]`, or to all N where given None; infinite
    to those that come last. like `[..., N]`: for N and the device. Asks the host nothing.
    """
    n = like.shape[-1]
    at_once = max(k, PAIRS_AT_ONCE // max(1, torch.Size(lead).numel() * n))
    if at_once >= n:
        return torch.topk(apart(None), k, dim=-1, largest=False).indices
    tokens = torch.arange(n, device=like.device).expand(*lead, 1, n)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n, at_once):
        some = tokens[..., start : start + at_once]
        r = apart(some)
        found = [_merge([*found, (r, some.expand_as(r))], min(k, start + some.shape[-1]))]
    return found[0][1]


def _merge(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of several lists of distances and tokens `[..., N, C]`."""
    apart, tokens = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    near = torch.topk(apart, k, dim=-1, largest=False)
    return near.values, torch.gather(tokens, -1, near.indices)
