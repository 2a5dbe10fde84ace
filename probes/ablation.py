"""What a head is worth: the loss without it, without its looking, with it alone, and without its whole layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from probes.attention import Pairs, to_measurement
from probes.probe import Measurement, ProbeBatch, Replace, View, When, join_batches

LEAST_GAP = 1e-3
"""Attention must lower the loss by more than this share of the loss without attention, or shares are undefined."""

LEAST_SHARE = 0.01
"""A head matters if its looking is worth more than this share."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Group:
    """Tokens that a loss is restricted to, of all replicates: bool `[R B, N]` or None for all; weights of examples."""

    tokens: Tensor | None
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, replicates: tuple[ProbeBatch, ...], name: str) -> _Group:
        real = [Pairs.of(replicate.batch).real for replicate in replicates]
        if name == "all":
            return cls(tokens=None, weights=tuple(_shares(every, every) for every in real))
        inside = [r.groups[name] & every for r, every in zip(replicates, real, strict=True)]
        weights = tuple(_shares(some, every) for some, every in zip(inside, real, strict=True))
        return cls(tokens=torch.cat(inside), weights=weights)

    def mean(self, losses: Tensor) -> Tensor:
        """Losses by example `[S, R B]` as means `[S, R]`."""
        sizes = [len(weights) for weights in self.weights]
        parts = torch.split(losses.double(), sizes, -1)
        return torch.stack([(part * weights).sum(-1) for part, weights in zip(parts, self.weights, strict=True)], -1)


def _shares(inside: Tensor, real: Tensor) -> Tensor:
    """Weight `[B]` of each example: the share of its real tokens that are inside, adding up to 1."""
    share = inside.sum(-1) / real.sum(-1).clamp_min(1).double()
    return share / share.sum()


def _group_names(replicates: tuple[ProbeBatch, ...]) -> tuple[str, ...]:
    """ "all" and the groups of a probe set, which all of its replicates must share."""
    if not replicates:
        raise ValueError("replicates: got none, need at least one")
    names = tuple(replicates[0].groups)
    for r, replicate in enumerate(replicates):
        if "all" in replicate.groups or set(replicate.groups) != set(names):
            raise ValueError(
                f"replicates[{r}].groups: got {sorted(replicate.groups)}, need the same names in every "
                f"replicate, none of them 'all'; the first has {sorted(names)}"
            )
    return ("all", *names)


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """The worth of each head, as a share of what all attention is worth to this model on these tokens.

    The unit is `gap = loss_without_attention - loss`, the former with the outputs of all heads of all layers replaced
    by their means, but no more than `ProbeBatch.ceilings`: a trained model that loses all its heads at once can do
    worse than one that never had any. Shares are NaN where the gap is not above 1e-3 of that. Means of outputs are over
    all replicates, which are predicted together; losses are each replicate's own. Of head h in layer l:

    ablation    (loss, h's output replaced by its mean) - loss
    pattern     (loss, h's attention made uniform, values kept) - loss: what the *looking* is worth
    only        (loss, layer l replaced) - (loss, all heads of l but h replaced): what h alone brings back. Same sign as
                `ablation` and equal to it where heads do not interact; larger where others do the same work
    whole_layer (loss, all heads of l replaced) - loss; the same for its heads
    redundancy  whole_layer - sum of `ablation` over its heads; positive where heads stand in for each other
    loss, loss_without_attention   as they are, the same for all heads

    Differences of losses are the share times the gap. The relation axis holds groups of tokens: "all", then the names
    of `ProbeBatch.groups`. An example's loss over a group counts with the share of its real tokens that are in the
    group, so that the losses of groups that split the tokens average to the loss over all; NaN for an empty group.
    """

    replicates: tuple[ProbeBatch, ...]
    relations: tuple[str, ...] = field(init=False)
    _batch: Any = field(init=False, repr=False)
    _groups: tuple[_Group, ...] = field(init=False, repr=False)
    _ceilings: tuple[tuple[float, ...], ...] = field(init=False, repr=False)

    name: ClassVar[str] = "ablation"
    when: ClassVar[When] = "sparse"
    columns: ClassVar[tuple[str, ...]] = (
        "ablation", "pattern", "only", "whole_layer", "redundancy", "loss", "loss_without_attention",
    )  # fmt: skip

    def __post_init__(self) -> None:
        names = _group_names(self.replicates)
        object.__setattr__(self, "relations", names)
        ceilings = tuple(tuple(r.ceilings.get(name, math.inf) for name in names) for r in self.replicates)
        object.__setattr__(self, "_batch", join_batches([r.batch for r in self.replicates]))
        object.__setattr__(self, "_groups", tuple(_Group.of(self.replicates, name) for name in names))
        object.__setattr__(self, "_ceilings", ceilings)

    @torch.no_grad()
    def measure(self, view: View) -> Measurement:
        """Shares of all heads: 2 + L (3 H + 1) predictions of all replicates at once, layer by layer."""
        layers, heads = view.layers, tuple(range(view.heads))
        loss = self._losses(view)
        bare = self._losses(view, *(Replace(layer=layer, output=heads) for layer in range(layers)))
        without = torch.minimum(bare, bare.new_tensor(self._ceilings))
        worth = torch.stack([self._of_layer(view, layer, loss) for layer in range(layers)], 2)
        gap = torch.where(without - loss > LEAST_GAP * without, without - loss, torch.nan)
        raw = torch.stack([loss, without])[:, :, None, None].expand(-1, *worth.shape[1:])
        columns = torch.cat([worth / gap[:, None, None], raw])  # [columns, S, L, H, R, G]
        return to_measurement(self.relations, self.columns, list(columns.unbind(-2)))

    def _losses(self, view: View, *replace: Replace) -> Tensor:
        """Mean losses `[S, R, G]` under interventions: one prediction, split by group."""
        prediction = view.predict(self._batch, replace)
        means = [group.mean(view.loss(prediction, self._batch, group.tokens)) for group in self._groups]
        return torch.stack(means, -1)

    def _of_layer(self, view: View, layer: int, loss: Tensor) -> Tensor:
        """Differences of losses `[5, S, H, R, G]` in the order of `columns`, given the loss as trained."""

        def losses(output: tuple[int, ...] = (), pattern: tuple[int, ...] = ()) -> Tensor:
            return self._losses(view, Replace(layer=layer, output=output, pattern=pattern))

        heads = tuple(range(view.heads))
        whole = losses(heads)[:, None]
        single = torch.stack([losses((h,)) for h in heads], 1)
        blurred = torch.stack([losses(pattern=(h,)) for h in heads], 1)
        alone = torch.stack([losses(heads[:h] + heads[h + 1 :]) for h in heads], 1)
        loss = loss[:, None]
        ablation, together = single - loss, (whole - loss).expand_as(single)
        redundancy = together - ablation.sum(1, keepdim=True)
        return torch.stack([ablation, blurred - loss, whole - alone, together, redundancy])


def matters(pattern: NDArray[np.float32], confidence: float = 0.95) -> NDArray[np.bool_]:
    """Whether heads matter: the lower bound of the mean `pattern` share `[..., R]` exceeds 1%; result `[...]`.

    The bound is one-sided, `mean - t(confidence, R - 1) s / sqrt(R)` over replicates: it is about this probe set's
    distribution of examples and this model, not about other seeds. A head with an undefined share does not matter.
    """
    pattern = np.where(np.isfinite(pattern), pattern, np.nan).astype(np.float64)
    r = pattern.shape[-1]
    if r < 2:
        raise ValueError(f"pattern: got {r} replicates, need at least 2")
    spread = pattern.std(-1, ddof=1) / np.sqrt(r)
    bound = pattern.mean(-1) - stdtrit(r - 1, confidence) * spread
    return np.asarray(bound > LEAST_SHARE)
