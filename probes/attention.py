"""Scores of attention heads on pair relations.

Every score but the entropy is linear in the attention, so a probe set is turned once into weights of (query, key)
pairs, and measuring is one matrix product per replicate. Axes as in `probes.probe`; P sums over pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.probe import BatchLike, Measurement, ProbeBatch, View, When

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pairs:
    """Which (query, key) pairs of a batch count.

    real bool `[B, N]`: tokens that are no padding. index int64 `[B, N, K]`: the token behind each key.
    visible bool `[B, N, K]`: real query, real key, allowed; complete: all are. own bool `[B, N, K]`: the key is the
    query itself.
    """

    real: Tensor
    index: Tensor
    visible: Tensor
    complete: bool
    own: Tensor

    @classmethod
    def of(cls, batch: BatchLike) -> Pairs:
        """The pairs of one batch, on its device."""
        b, n = batch.inputs.shape[:2]
        tokens = torch.arange(n, device=batch.inputs.device)
        real = torch.ones_like(tokens, dtype=torch.bool).expand(b, n) if batch.mask is None else batch.mask
        index = tokens.expand(b, n, n) if batch.keys is None else batch.keys
        visible = real[:, :, None] & torch.gather(real[:, None, :].expand(b, n, n), 2, index)
        if batch.allowed is not None:
            visible = visible & batch.allowed
        complete, own = bool(visible.all()), index == tokens[:, None]
        return cls(real=real, index=index, visible=visible, complete=complete, own=own)

    def clean(self, attention: Tensor) -> Tensor:
        """Attention in float32 with 0, and no NaN, at padding queries and hidden keys."""
        return attention.float() if self.complete else torch.where(self.visible, attention.float(), 0.0)

    def from_tokens(self, values: Tensor) -> Tensor:
        """Values of tokens `[Q, B, N]` at every query's keys: `[Q, B, N, K]`."""
        return torch.gather(values, 2, self._flat(len(values))).view(-1, *self.index.shape)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Sums over queries of values at keys `[Q, B, N, K]`, by the token behind the key: `[Q, B, N]`."""
        sums = values.new_zeros(len(values), *self.real.shape)
        return sums.scatter_add(2, self._flat(len(values)), values.flatten(2))

    def _flat(self, q: int) -> Tensor:
        return self.index.flatten(1).expand(q, -1, -1)


def contract(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over pairs: values `[S, L, H, B, N, K]`, weights `[B, N*K, P]`, result `[S, L, H, P]` in float64.

    One product of the same shape for every member, not one for all: which kernel a stacked product picks depends on S,
    and a member's sums would differ, in the last bits, with its company in the pack. Float32 sums end at an example.
    """
    s, layers, heads, b = values.shape[:4]
    members = values.reshape(s, layers * heads, b, -1).transpose(1, 2)
    sums = [torch.bmm(member, weights).sum(0, dtype=torch.float64) for member in members]
    return torch.stack(sums).view(s, layers, heads, -1)


def to_measurement(relations: tuple[str, ...], columns: Iterable[str], replicates: list[Tensor]) -> Measurement:
    """Replicates, each `[columns, S, L, H, Q]` on any device, as dense arrays `[S, L, H, Q, R]` by column."""
    values = torch.stack(replicates, -1).float().cpu().numpy()
    return Measurement(relations=relations, values=dict(zip(columns, values, strict=True)))


def relation_names(replicates: tuple[ProbeBatch, ...]) -> tuple[str, ...]:
    """The relations of a probe set, which all of its replicates must share."""
    if not replicates:
        raise ValueError("replicates: got none, need at least one")
    names = tuple(replicates[0].relations)
    for r, replicate in enumerate(replicates):
        if not names or set(replicate.relations) != set(names):
            raise ValueError(
                f"replicates[{r}].relations: got {sorted(replicate.relations)}, need the same names, "
                f"at least one, in every replicate; the first has {sorted(names)}"
            )
    return names


def lift(score: NDArray[np.float32], null: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean score over mean null, both `[..., R]`, over the replicates where both are defined; NaN where there is none.

    A ratio of means, not a mean of ratios: a replicate where the null happens to be small does not dominate.
    """
    score, null = np.broadcast_arrays(score, null)
    defined = np.isfinite(score) & np.isfinite(null)
    above = np.where(defined, score, 0.0).sum(-1, dtype=np.float64)
    below = np.where(defined, null, 0.0).sum(-1, dtype=np.float64)
    ratio: NDArray[np.float64] = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return ratio


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _ScoreWeights:
    """What one replicate contributes to every step: weights of pairs and figures without attention."""

    pairs: Pairs
    linear: Tensor  # [B, N*K, 2Q + 1]: partners, partners under exchanged rows, the query itself; sums over queries
    entropy: Tensor  # [B, N*K, 1]: for the sum of A log A
    null_uniform: Tensor  # [Q]
    asked: Tensor  # [Q]: queries with a partner
    queries: Tensor  # []: real queries

    @classmethod
    def of(cls, replicate: ProbeBatch, names: tuple[str, ...]) -> _ScoreWeights:
        pairs = Pairs.of(replicate.batch)
        partner = torch.stack([replicate.relations[name] & pairs.visible for name in names]).float()
        seen_by = pairs.to_tokens(pairs.visible[None].float())
        others = (pairs.from_tokens(seen_by) - 1).clamp_min(1)
        exchanged = (pairs.from_tokens(pairs.to_tokens(partner)) - partner) / others
        linear = torch.cat([partner, exchanged, pairs.own[None].float()])

        seen = pairs.visible.sum(-1)
        asked = (partner.sum(-1) > 0).sum((1, 2))
        choice = seen > 1
        entropy = torch.where(choice, -1.0 / seen.clamp_min(2).log(), 0.0) / choice.sum()
        return cls(
            pairs=pairs,
            linear=linear.flatten(2).movedim(0, -1).contiguous(),
            entropy=entropy[..., None].expand(pairs.index.shape).reshape(len(seen), -1, 1),
            null_uniform=(partner.sum(-1) / seen.clamp_min(1)).sum((1, 2)) / asked,
            asked=asked,
            queries=pairs.real.sum(),
        )


@dataclass(frozen=True, eq=False)
class AttentionScores:
    """How much each head's attention `A[b, i, j]` goes to the partners `m[b, i, j]` of a token, by relation.

    Partners are related, visible, and not the token itself. Means run over the real queries of a replicate; those
    marked * only over queries with a partner, and are NaN where none has one.

    score*         mean of `sum_j A_ij m_ij`
    score_all      the same over all real queries
    null_uniform*  score of attention that is uniform over visible keys: `sum_j m_ij / K_i`
    null_rows*     expected score if i gave each partner j what another query i' != i that sees j gives it, i' drawn
                   uniformly: `sum_j m_ij (C_j - A_ij) / (n_j - 1)`, `C_j = sum_i' A_i'j`, n_j: queries that see j. It
                   is exact; where all tokens see each other it exchanges whole rows
    self           mean of `A_ii`; the same for every relation
    entropy        mean of `-sum_j A_ij log A_ij / log K_i` over queries with K_i > 1 visible keys; for every relation

    The sum over i of the exchanged score is linear in A too, with weights that do not depend on it. Dividing by n_j - 1
    and not by n - 1 keeps uniform attention over k nearest keys at lift 1.
    """

    replicates: tuple[ProbeBatch, ...]
    relations: tuple[str, ...] = field(init=False)
    _weights: tuple[_ScoreWeights, ...] = field(init=False, repr=False)

    name: ClassVar[str] = "attention"
    when: ClassVar[When] = "every"
    columns: ClassVar[tuple[str, ...]] = ("score", "score_all", "null_uniform", "null_rows", "self", "entropy")

    def __post_init__(self) -> None:
        names = relation_names(self.replicates)
        object.__setattr__(self, "relations", names)
        object.__setattr__(self, "_weights", tuple(_ScoreWeights.of(r, names) for r in self.replicates))

    @torch.no_grad()
    def measure(self, view: View) -> Measurement:
        """Scores of all heads, one replicate's attention in memory at a time."""
        pairs = zip(self.replicates, self._weights, strict=True)
        scores = [self._scores(view.attention(r.batch), weights) for r, weights in pairs]
        return to_measurement(self.relations, self.columns, scores)

    def _scores(self, attention: Tensor, weights: _ScoreWeights) -> Tensor:
        """`[columns, S, L, H, Q]` of one replicate."""
        attention = weights.pairs.clean(attention)
        q = len(self.relations)
        sums = contract(attention, weights.linear)
        partners, exchanged, own = sums[..., :q], sums[..., q : 2 * q], sums[..., 2 * q :]
        surprise = attention.clamp_min(TINY).log_().mul_(attention)
        entropy = contract(surprise, weights.entropy)
        columns = (
            partners / weights.asked,
            partners / weights.queries,
            weights.null_uniform.expand_as(partners),
            exchanged / weights.asked,
            (own / weights.queries).expand_as(partners),
            entropy.expand_as(partners),
        )
        return torch.stack(columns)
