"""How attention falls off with distance. Axes as in `probes.probe`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from probes.attention import Pairs, contract, to_measurement
from probes.probe import Measurement, ProbeBatch, View, When

FLAT = 1e-10
"""Attention whose variance is below this share of its squared mean is constant, and correlates with nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _DistanceWeights:
    """Weights of one replicate: pairs that count, shells, and centred distances, all for means over pairs."""

    pairs: Pairs
    mean: Tensor  # [B, N*K, 1]
    shells: Tensor  # [B, N*K, shells]
    centred: Tensor  # [B, N*K, 1]: r - <r>
    variance: Tensor  # []: of r

    @classmethod
    def of(cls, replicate: ProbeBatch, edges: tuple[float, ...]) -> _DistanceWeights:
        pairs = Pairs.of(replicate.batch)
        counted, r = _distances(replicate, pairs)
        mean = (counted / counted.sum()).float().flatten(1)[..., None]
        bounds = torch.tensor(edges, dtype=torch.float64, device=r.device)
        shell = torch.bucketize(r, bounds, right=True).flatten(1)[..., None] - 1
        centred = torch.where(counted, r - r[counted].mean(), 0.0).flatten(1)[..., None]
        return cls(
            pairs=pairs,
            mean=mean,
            shells=(shell == torch.arange(len(edges) - 1, device=r.device)) * mean,
            centred=(centred * mean).float(),
            variance=(centred.square() * mean).sum(),
        )


def _distances(replicate: ProbeBatch, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Which pairs count (bool `[B, N, K]`: visible, not the query itself) and their distances in float64, else 0."""
    if replicate.distance is None:
        raise ValueError("replicates: got distance=None, need the distances of a system that has them")
    counted = pairs.visible & ~pairs.own
    return counted, torch.where(counted, replicate.distance.double(), 0.0)


def shell_edges(replicates: tuple[ProbeBatch, ...], shells: int = 12) -> tuple[float, ...]:
    """Edges of equally wide shells from 0 to about the 90th percentile of the distances between visible tokens.

    The width is rounded up to two digits. The farthest pairs, of which a box has few and mostly in its corners, are in
    no shell; they still count in every mean.
    """
    pairs = (_distances(replicate, Pairs.of(replicate.batch)) for replicate in replicates)
    width = float(np.quantile(torch.cat([r[counted] for counted, r in pairs]).cpu().numpy(), 0.9)) / shells
    if not width > 0:
        raise ValueError(f"replicates: 90th percentile of the distances is {width * shells}, need more than 0")
    unit = 10.0 ** (math.floor(math.log10(width)) - 1)
    digits = math.ceil(width / unit - 1e-9)
    return tuple(float(f"{s * digits * unit:.12g}") for s in range(shells + 1))


@dataclass(frozen=True, eq=False)
class DistanceCorrelation:
    """How attention goes with distance. Means `<>` run over pairs of a real query and a visible other key.

    corr  Pearson correlation of A_ij and r_ij, the same for every shell; NaN for constant attention
    G     connected correlation by shell, `G(r) = <A 1_r> - <A><1_r>`; adds up to 0 over shells that cover all pairs
    g     pair correlation by shell, `g(r) = <A 1_r> / (<A><1_r>)`: 1 where attention ignores distance; NaN where the
          shell is empty or no attention goes to others

    Shell s holds `edges[s] <= r < edges[s + 1]`. The relation axis holds the shells, named by their midpoints.
    Not to be confused with correlations in space of the *states*: this is one of attention with separation.
    """

    replicates: tuple[ProbeBatch, ...]
    edges: tuple[float, ...]
    relations: tuple[str, ...] = field(init=False)
    _weights: tuple[_DistanceWeights, ...] = field(init=False, repr=False)

    name: ClassVar[str] = "distance"
    when: ClassVar[When] = "sparse"
    columns: ClassVar[tuple[str, ...]] = ("corr", "G", "g")

    def __post_init__(self) -> None:
        if not self.replicates:
            raise ValueError("replicates: got none, need at least one")
        if len(self.edges) < 2 or any(not low < high for low, high in pairwise(self.edges)):
            raise ValueError(f"edges: got {self.edges}, need at least two that increase")
        object.__setattr__(self, "relations", tuple(f"{(low + high) / 2:.4g}" for low, high in pairwise(self.edges)))
        object.__setattr__(self, "_weights", tuple(_DistanceWeights.of(r, self.edges) for r in self.replicates))

    @classmethod
    def over_shells(cls, replicates: tuple[ProbeBatch, ...]) -> DistanceCorrelation | None:
        """On the shells of `shell_edges`; None for a system without distances."""
        if any(replicate.distance is None for replicate in replicates):
            return None
        return cls(replicates, shell_edges(replicates))

    @torch.no_grad()
    def measure(self, view: View) -> Measurement:
        """Correlations of all heads, one replicate's attention in memory at a time."""
        pairs = zip(self.replicates, self._weights, strict=True)
        found = [self._correlations(view.attention(r.batch), weights) for r, weights in pairs]
        return to_measurement(self.relations, self.columns, found)

    def _correlations(self, attention: Tensor, weights: _DistanceWeights) -> Tensor:
        """`[columns, S, L, H, shells]` of one replicate."""
        attention = weights.pairs.clean(attention)
        mean = contract(attention, weights.mean)
        joint = contract(attention, weights.shells)
        apart = mean * weights.shells.sum((0, 1), dtype=torch.float64)
        covariance = contract(attention, weights.centred)
        variance = contract((attention - mean[..., None, None].float()).square(), weights.mean)
        varies = variance > FLAT * mean.square()
        corr = torch.where(varies, covariance / (variance * weights.variance).sqrt(), torch.nan)
        ratio = torch.where(apart > 0, joint / apart, torch.nan)
        return torch.stack([corr.expand_as(ratio), joint - apart, ratio])
