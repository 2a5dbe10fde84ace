"""Loss of a trained model as a function of one head's weights, for many chains at once: all else stays as trained.

What no chain can change is computed once over all examples and looked up: the normed stream that the layer's heads see,
and the stream plus what all other heads say. Above, each chain has its member's fixed weights; only the four tensors of
the head get a gradient. The fixed weights are rewritten for speed, which changes numbers by rounding alone:
 - a norm does not see the mean of the stream: all that is added to the stream has none, and norms need not take it off;
 - a normed vector y then has none either, so that y W + b = (y + 1) (W - 1 1^T W / D + 1 b / D): biases cost nothing,
   and the scale and shift of a norm go into the W and b that follow it.

Legend: S members, P places (a head of a member each), C chains, n examples, B of them in a chain's minibatch, N tokens,
K keys of a query, H heads, D width, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sim.checks import require
from sim.system import Batch, System
from train.config import ModelConfig
from train.model import (
    EPSILON,
    HIDDEN_LOGIT,
    Parameters,
    _Attention,
    _split,
    attention_pattern,
    embed,
    finish_layer,
    forward,
    layer,
    look,
    mix_values,
    unembed,
    visible_keys,
)
from train.snapshot import EXAMPLES_AT_ONCE, split

Weights = Mapping[str, Tensor]
Run = Callable[[Weights, slice], Tensor]

HEAD = ("Wq", "Wk", "Wv", "Wo")
CPU_TOKENS_AT_ONCE = 1 << 13  # of a few chains: many more fall out of a CPU's cache
TOKENS_AT_ONCE = 1 << 19  # elsewhere: some GB at width 32
CHAINS_AT_ONCE = 64  # of a profile, each with a copy of its member's fixed weights


class Streams(Protocol):
    """Random numbers of C chains, such as `probes.langevin.Streams`."""

    def integers(self, high: int, size: int) -> Tensor:
        """Uniform int64 in 0..high-1: `[C, size]`."""


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values [n, ...]` at `index [C, B]`: `[C, B, ...]`."""
    return values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:])


def _centred(values: Tensor) -> Tensor:
    """Without the mean over the last axis, the stream's."""
    return values - values.mean(-1, keepdim=True)


def _fixed(parameters: Parameters, model: ModelConfig, lowest: int) -> dict[str, Tensor]:
    """What lies above the heads of layer `lowest`, `[S, ...]`, rewritten as the top of this file says.

    Of each layer `in`, `out` and `bias`; above the lowest also `heads` (queries, keys, values of all) and Wo, and under
    Strang splitting the feed-forward before them; unembed. Factors of residuals are in the weights.
    """
    fixed: dict[str, Tensor] = {}
    said, fed = model.attention_residual, model.feedforward_factor

    def fold(norm: str, W: Tensor, b: Tensor | None = None) -> Tensor:
        bias = torch.bmm(parameters[f"{norm}.shift"][:, None], W)
        bias = bias if b is None else bias + b[:, None]
        W = parameters[f"{norm}.scale"][..., None] * W
        return W - W.mean(1, keepdim=True) + bias / W.shape[1]

    def feedforward(block: str) -> None:
        W1, b1, W2, b2 = (parameters[f"{block}.{name}"] for name in ("W1", "b1", "W2", "b2"))
        fixed[f"{block}.in"] = fold(f"{block}.norm2", W1, b1)
        fixed[f"{block}.out"], fixed[f"{block}.bias"] = fed * _centred(W2), fed * _centred(b2[:, None])

    for index in range(lowest, model.layers):
        if index > lowest:
            Wq, Wk, Wv, Wo = (parameters[f"{index}.{name}"] for name in HEAD)
            heads = torch.cat([weight.transpose(1, 2) for weight in (Wq, Wk, Wv)], dim=2).flatten(2)
            fixed[f"{index}.heads"] = fold(f"{index}.norm1", heads)
            fixed[f"{index}.Wo"] = said * _centred(Wo.flatten(1, 2))
            if model.splitting == "strang":
                feedforward(f"{index}.before")
        feedforward(f"{index}")
    fixed["unembed"] = fold("norm", parameters["unembed.W"], parameters["unembed.b"])
    return fixed


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean x^2 + eps) + 1` of a stream without mean, and the factor `[C, B N, 1]`."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = torch.rsqrt_(size.square_().div_(x.shape[-1]).add_(EPSILON))
    return torch.addcmul(x.new_ones(()), x, factor), factor


def _normed_backward(gradient: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Gradient by the x of `_normed`; what it has along the mean, which nothing sees, is taken off."""
    mean, outputs = torch.zeros_like(factor), (True, False, False)
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, factor, None, None, outputs
    )[0]
    return found


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Norm(torch.autograd.Function):
    """`_normed`, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        normed, factor = _normed(x)
        ctx.save_for_backward(x, factor)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _normed_backward(gradient, *ctx.saved_tensors)


class _Feed(torch.autograd.Function):
    """Feed-forward part of a layer on the stream `x [C, B N, D]`; weights are fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inward: Tensor, outward: Tensor, bias: Tensor) -> Tensor:
        normed, factor = _normed(x)
        hidden = torch.bmm(normed, inward)
        ctx.save_for_backward(x, factor, hidden, inward, outward)
        return (x + bias).baddbmm_(F.gelu(hidden), outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, hidden, inward, outward = ctx.saved_tensors
        found = torch.bmm(gradient, outward.transpose(1, 2))
        found = torch.ops.aten.gelu_backward(found, hidden)
        found = torch.bmm(found, inward.transpose(1, 2))
        return _normed_backward(found, x, factor).add_(gradient), None, None, None


class _OneHead(torch.autograd.Function):
    """What one head reads, `[C B, N, d]`, by its queries, keys and values `heads [C B, N, 3 d]`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        q, k, v = heads.chunk(3, dim=2)
        logits = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        if hidden is not None:
            logits.add_(hidden.to(logits.dtype) * HIDDEN_LOGIT)  # next to which a logit is nothing; faster than a fill
        pattern = torch.softmax(logits, dim=-1)
        ctx.save_for_backward(heads, pattern, hidden)
        ctx.scale = scale
        return torch.bmm(pattern, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        heads, pattern, hidden = ctx.saved_tensors
        q, k, v = heads.chunk(3, dim=2)
        logits = torch._softmax_backward_data(torch.bmm(gradient, v.transpose(1, 2)), pattern, -1, pattern.dtype)
        if hidden is not None:  # a query that sees nothing has a uniform pattern, which no logit moves
            logits.mul_(~hidden.all(-1, keepdim=True))
        by_q = torch.baddbmm(q.new_empty(()), logits, k, beta=0, alpha=ctx.scale)
        by_k = torch.baddbmm(k.new_empty(()), logits.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        found = torch.cat((by_q, by_k, torch.bmm(pattern.transpose(1, 2), gradient)), dim=2)
        return found, None, None


class _ByChain(torch.autograd.Function):
    """Losses `[C]` of chains that share no weights, some chains at a time, the gradients being found on the way.

    What a backward pass needs of a few chains is still in the cache then, and freed before the next.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, blocks: Sequence[slice], names: Sequence[str], *weights: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        losses, found = [], []
        for block in blocks:
            leaves = [w[block].detach().requires_grad_(need) for w, need in zip(weights, needed, strict=True)]
            with torch.enable_grad():
                loss = run(dict(zip(names, leaves, strict=True)), block)
                found.append(torch.autograd.grad(loss.sum(), [leaf for leaf in leaves if leaf.requires_grad]))
            losses.append(loss.detach())
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad[3:]
        by_chain = (next(found) if need else None for need in needed)
        return (
            None,
            None,
            None,
            *(None if f is None else f * gradient.to(f.dtype).view(-1, *[1] * (f.dim() - 1)) for f in by_chain),
        )


class HeadTarget:
    """The loss around P heads of one layer, each of which has its own weights to move.

    system: whose loss is taken; parameters `[S, ...]`, copied; batch: n fixed examples `[n, N, ...]` without a member
    axis; heads: the places, as (member, head); layer: the layer of them all; minibatch: examples a draw, with
    replacement; tokens, bool `[n, N]`: over which the loss is taken (None: all real ones). Numbers are of the
    parameters' dtype. Keeps (S + P) n N D numbers. Raises ValueError for a head, layer or shape that does not exist.
    """

    @torch.no_grad()
    def __init__(
        self,
        system: System,
        model: ModelConfig,
        parameters: Parameters,
        batch: Batch,
        heads: Sequence[tuple[int, int]],
        layer: int,
        minibatch: int,
        tokens: Tensor | None = None,
    ) -> None:
        S = len(parameters["embed.W"])
        require(batch.inputs.dim() == 3, "batch.inputs", tuple(batch.inputs.shape), "[n, N, d_in], no member axis")
        require(0 <= layer < model.layers, "layer", layer, f"in 0..{model.layers - 1}")
        require(len(heads) > 0, "heads", heads, "at least one (member, head)")
        for member, head in heads:
            require(0 <= member < S, "member", member, f"in 0..{S - 1}")
            require(0 <= head < model.n_heads, "head", head, f"in 0..{model.n_heads - 1}")
        require(minibatch >= 1, "minibatch", minibatch, "at least 1")
        shape = batch.inputs.shape[:2]
        if tokens is not None:
            require(tokens.shape == shape, "tokens", tuple(tokens.shape), f"of the shape {tuple(shape)}")

        device = batch.inputs.device
        members = sorted({member for member, _ in heads})
        self._member = torch.tensor([members.index(member) for member, _ in heads], device=device)  # of each place
        self._head = torch.tensor([head for _, head in heads], device=device)
        own = {name: value[members] for name, value in parameters.items()}
        self._centre = {name: own[f"{layer}.{name}"][self._member, self._head] for name in HEAD}
        self._fixed = _fixed(own, model, layer)
        self.system, self.model, self.layer, self.minibatch = system, model, layer, minibatch
        self.examples = len(batch.inputs)
        self._batch = replace(batch, geometry={})
        self._mask = batch.mask if tokens is None else tokens
        self._visible = visible_keys(batch)
        if self._visible is not None:
            self._visible = self._visible.expand(self.examples, *self._visible.shape[-2:])
        self._remember(own)

    def _remember(self, parameters: Parameters) -> None:
        """What does not move: normed stream `[S n, N, D]`, the rest of the stream `[P n, N, D]`, losses `[S n]`."""
        index, places = self.layer, torch.arange(len(self._head), device=self._head.device)
        scale, shift = (parameters[f"{index}.norm1.{name}"][:, None, None] for name in ("scale", "shift"))
        Wo = parameters[f"{index}.Wo"].flatten(1, 2)[self._member]
        normed, rest, predictions = [], [], []
        for part in split(self._batch):
            x = embed(parameters, part)
            for below in range(index):
                x = layer(parameters, self.model, below, x, part)
            reading = look(parameters, self.model, index, x, part)
            x = reading.stream
            normed.append(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale))
            others = reading.read[self._member]
            others[places, :, self._head] = 0.0
            others = others.transpose(2, 3).flatten(3).flatten(1, 2)
            others = torch.baddbmm(x[self._member].flatten(1, 2), others, Wo, alpha=self.model.attention_residual)
            rest.append(_centred(others).view(-1, *x.shape[1:]))
            x = finish_layer(parameters, self.model, index, x, reading.merged())
            for above in range(index + 1, self.model.layers):
                x = layer(parameters, self.model, above, x, part)
            predictions.append(unembed(parameters, x))
        self._normed, self._rest = torch.cat(normed, dim=1).flatten(0, 1), torch.cat(rest, dim=1).flatten(0, 1)
        batch = replace(self._batch, mask=self._mask)
        self._losses = self.system.loss(torch.cat(predictions, dim=1), batch).flatten()

    @property
    def centre(self) -> dict[str, Tensor]:
        """The heads as trained: Wq, Wk, Wv `[P, D, d]`, Wo `[P, d, D]`."""
        return self._centre

    def at(self, place: Tensor) -> HeadPlaced:
        """The loss for chains that live at `place`, int64 `[C]` in any order."""
        return HeadPlaced(self, place)

    def gradient(self) -> dict[str, Tensor]:
        """Of the mean loss over all n examples, at the heads as trained: shaped as `centre`."""
        places = torch.arange(len(self._head), device=self._head.device)
        leaves = {name: value.clone().requires_grad_() for name, value in self._centre.items()}
        with torch.enable_grad():
            loss = self.at(places).loss(leaves, places.new_tensor(range(self.examples)).expand(len(places), -1))
            return dict(zip(HEAD, torch.autograd.grad(loss.sum(), [leaves[name] for name in HEAD]), strict=True))


class HeadPlaced:
    """The loss for C chains, each at a head of its own: weights Wq, Wk, Wv `[C, D, d]`, Wo `[C, d, D]`."""

    def __init__(self, target: HeadTarget, place: Tensor) -> None:
        member = target._member[place]
        self._target = target
        self._member_start, self._place_start = (index[:, None] * target.examples for index in (member, place))
        self._fixed = {name: value[member] for name, value in target._fixed.items()}

    def draw(self, streams: Streams) -> Tensor:
        """Indices of examples, uniform with replacement: `[C, minibatch]`."""
        return streams.integers(self._target.examples, self._target.minibatch)

    def base(self, batch: Tensor) -> Tensor:
        """Mean loss of the trained model on the examples `batch [C, B]`: `[C]`, looked up."""
        return self.base_of(batch).mean(-1)

    def base_of(self, rows: Tensor) -> Tensor:
        """Loss of each example of `rows [B]` or `[C, B]` for the trained model: `[C, B]`, looked up."""
        return self._target._losses[self._member_start + rows]

    def loss(self, weights: Weights, batch: Tensor) -> Tensor:
        """Mean loss over the examples `batch [C, B]`: `[C]`, differentiable once in `weights`."""

        def run(some: Weights, block: slice) -> Tensor:
            return self._some(some, batch[block], block).mean(-1)

        blocks = list(self._blocks(batch))
        values = [weights[name] for name in HEAD]
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return _apply(_ByChain, run, blocks, HEAD, *values)
        return torch.cat([run({name: weights[name][block] for name in HEAD}, block) for block in blocks])

    def loss_of(self, weights: Weights, rows: Tensor) -> Tensor:
        """Loss of each example of `rows [C, B]`: `[C, B]`, differentiable in `weights`."""
        return torch.cat(
            [
                self._some({name: weights[name][block] for name in HEAD}, rows[block], block)
                for block in self._blocks(rows)
            ]
        )

    def _blocks(self, rows: Tensor) -> Iterator[slice]:
        """A few chains at a time."""
        C, B = rows.shape
        tokens = CPU_TOKENS_AT_ONCE if rows.device.type == "cpu" else TOKENS_AT_ONCE
        size = max(1, tokens // (B * self._target._normed.shape[1]))
        return (slice(start, start + size) for start in range(0, C, size))

    def _some(self, weights: Weights, rows: Tensor, block: slice) -> Tensor:
        """Loss by example `[C, B]` of the chains of one block."""
        t = self._target
        fixed = {name: value[block] for name, value in self._fixed.items()}
        batch, visible = self._look_up(rows)
        normed = _rows(t._normed, self._member_start[block] + rows).flatten(1, 2)
        rest = _rows(t._rest, self._place_start[block] + rows).flatten(1, 2)
        heads = torch.bmm(normed, torch.cat([weights[name] for name in HEAD[:3]], dim=2))
        read = self._read(heads, 1, batch, visible)
        x = torch.baddbmm(rest, read, _centred(weights["Wo"]), alpha=t.model.attention_residual)

        def feed(x: Tensor, block: str) -> Tensor:
            return _apply(_Feed, x, *(fixed[f"{block}.{name}"] for name in ("in", "out", "bias")))

        for index in range(t.layer, t.model.layers):
            if index > t.layer:
                x = feed(x, f"{index}.before") if t.model.splitting == "strang" else x
                heads = torch.bmm(_apply(_Norm, x), fixed[f"{index}.heads"])
                read = self._read(heads, t.model.n_heads, batch, visible)
                x = torch.baddbmm(x, read, fixed[f"{index}.Wo"])
            x = feed(x, f"{index}")
        prediction = torch.bmm(_apply(_Norm, x), fixed["unembed"])
        return t.system.loss(prediction.view(*batch.inputs.shape[:3], -1), batch)

    def _look_up(self, rows: Tensor) -> tuple[Batch, Tensor | None]:
        """The examples at `rows [C, B]`, masked as the loss is, and which keys are visible."""
        t = self._target
        whole = t._batch
        mask, keys, visible = (
            None if value is None else _rows(value, rows) for value in (t._mask, whole.keys, t._visible)
        )
        inputs, targets = _rows(whole.inputs, rows), _rows(whole.targets, rows)
        batch = Batch(inputs=inputs, targets=targets, mask=mask, keys=keys)
        return batch, visible

    def _read(self, heads: Tensor, H: int, batch: Batch, visible: Tensor | None) -> Tensor:
        """What H heads read, `[C, B N, H d]`, from their queries, keys and values `[C, B N, 3 H d]`."""
        C, N = len(heads), batch.inputs.shape[2]
        scale = self._target.model.logit_scale
        if batch.keys is not None:
            q, k, v = _split(heads.view(C, -1, N, heads.shape[-1]), H)
            read = mix_values(attention_pattern(q, k, batch, visible, scale), v, batch).transpose(2, 3).flatten(3)
            return read.flatten(1, 2)
        hidden = None if visible is None else ~visible
        if H == 1:
            hidden = None if hidden is None else hidden.flatten(0, 1)
            read = _apply(_OneHead, heads.view(-1, N, heads.shape[-1]), hidden, scale)
            return read.view(C, -1, read.shape[-1])
        hidden = None if hidden is None else hidden.unsqueeze(-3)
        read = _apply(_Attention, heads.view(C, -1, N, heads.shape[-1]), hidden, H, scale)
        return read.flatten(1, 2)


class LineTarget:
    """The loss around P heads along one line each: w = centre + t direction, t `[C, 1]` the only weight.

    direction: Wq, Wk, Wv `[P, D, d]`, Wo `[P, d, D]`, made of unit length over all four. Raises ValueError where one is
    of another shape, has no length or is not finite.
    """

    def __init__(self, target: HeadTarget, direction: Weights) -> None:
        require(set(direction) == set(HEAD), "direction", sorted(direction), f"of {', '.join(HEAD)}")
        for name, value in target.centre.items():
            shape = direction[name].shape
            require(shape == value.shape, f"direction {name}", tuple(shape), f"of the shape {tuple(value.shape)}")
        self._target = target
        self._length = _length(direction)
        sound = bool(((self._length > 0) & self._length.isfinite()).all())
        require(sound, "direction", self._length.tolist(), "of a finite length above 0 at every place")
        self._direction = {name: value / self._length[:, None, None] for name, value in direction.items()}

    @property
    def length(self) -> Tensor:
        """Of the directions as they were given: `[P]`."""
        return self._length

    @property
    def centre(self) -> dict[str, Tensor]:
        """t = 0: `[P, 1]`."""
        return {"t": torch.zeros_like(self._length)[:, None]}

    def at(self, place: Tensor) -> LinePlaced:
        """The loss for chains that live at `place`, int64 `[C]` in any order."""
        centre, direction = (
            {name: value[place] for name, value in tensors.items()}
            for tensors in (self._target.centre, self._direction)
        )
        return LinePlaced(self._target.at(place), centre, direction)

    def gradient(self) -> dict[str, Tensor]:
        """Of the mean loss over all n examples, along the line: `[P, 1]`."""
        by_head = self._target.gradient()
        along = torch.stack([(by_head[name] * self._direction[name]).sum((-2, -1)) for name in HEAD]).sum(0)
        return {"t": along[:, None]}

    @torch.no_grad()
    def profile(self, t: Tensor) -> Tensor:
        """Loss of each of all n examples at w = centre + t direction, `t [P, T]`: `[P, n, T]`."""
        (P, T), n = t.shape, self._target.examples
        t, rows = t.to(self._length).flatten(), torch.arange(n, device=self._length.device)
        found = []
        for start in range(0, P * T, CHAINS_AT_ONCE):
            chain = torch.arange(start, min(start + CHAINS_AT_ONCE, P * T), device=rows.device)
            placed, weights = self.at(chain // T), {"t": t[chain][:, None]}
            losses = [
                placed.loss_of(weights, rows[first : first + EXAMPLES_AT_ONCE].expand(len(chain), -1))
                for first in range(0, n, EXAMPLES_AT_ONCE)
            ]
            found.append(torch.cat(losses, dim=1))
        return torch.cat(found).view(P, T, n).transpose(1, 2)


class LinePlaced:
    """The loss for C chains, each on a line of its own: weight t `[C, 1]`."""

    def __init__(self, placed: HeadPlaced, centre: Weights, direction: Weights) -> None:
        self._placed, self._centre, self._direction = placed, centre, direction
        self.draw, self.base = placed.draw, placed.base

    def loss(self, weights: Weights, batch: Tensor) -> Tensor:
        """Mean loss over the examples `batch [C, B]`: `[C]`, differentiable once in t."""
        return self._placed.loss(self._head(weights), batch)

    def loss_of(self, weights: Weights, rows: Tensor) -> Tensor:
        """Loss of each example of `rows [C, B]`: `[C, B]`, differentiable in t."""
        return self._placed.loss_of(self._head(weights), rows)

    def _head(self, weights: Weights) -> dict[str, Tensor]:
        t = weights["t"][:, :, None]
        return {name: torch.addcmul(value, t, self._direction[name]) for name, value in self._centre.items()}


def _length(tensors: Weights) -> Tensor:
    """Length over the last two axes of all four tensors of a head together: `[...]`."""
    return torch.stack([tensors[name].square().sum((-2, -1)) for name in HEAD]).sum(0).sqrt()


def head_gradients(system: System, model: ModelConfig, parameters: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss over the batch `[S]`, and the norm of its gradient by the four tensors of each head `[S, L, H]`."""
    moved = [f"{index}.{name}" for index in range(model.layers) for name in HEAD]
    fixed = {name: value.detach() for name, value in parameters.items()}
    leaves = {name: fixed[name].clone().requires_grad_() for name in moved}
    n = batch.inputs.shape[-3]
    losses, gradients = [], {name: torch.zeros_like(fixed[name]) for name in moved}
    for part in split(batch):
        with torch.enable_grad():
            loss = system.loss(forward(fixed | leaves, model, part), part)
            found = torch.autograd.grad(loss.sum() / n, list(leaves.values()))
        losses.append(loss.detach())
        for total, value in zip(gradients.values(), found, strict=True):
            total.add_(value)
    by_layer = [_length({name: gradients[f"{index}.{name}"] for name in HEAD}) for index in range(model.layers)]
    return torch.cat(losses, dim=-1).mean(-1), torch.stack(by_layer, dim=1)
