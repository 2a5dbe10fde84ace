"""The gradient of a pack's loss without autograd: each block of the model with a backward pass spelt out.

A step of small models is mostly the calling of operations. Here it calls half as many, and leaves the gradient of each
parameter where the optimiser reads it. The operations that are left are those of autograd through
`train.model.forward`, in its order: on a CPU the numbers are the same bit for bit (where a token has one output, but
for rounding: sums go by how the loss lays out its gradient).

Legend as in `train.model`; R = B N rows of the stream. Blocks take the stream x `[S, R, D]` and give the next; back
again, the gradient by what they gave, `[S, R, D]`, for that by x, and write those of their parameters. Neither changes
what it is given. The forward pass of a block puts on a tape what its backward pass takes off again, so that nothing is
kept longer than it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sim.checks import require
from sim.system import Batch
from train.config import ModelConfig
from train.model import (
    EPSILON,
    Parameters,
    affine,
    attend,
    attend_backward,
    filled,
    inputs_of,
    is_thin,
    visible_keys,
)

aten = torch.ops.aten
Tape: TypeAlias = list[tuple[Any, ...]]
Named: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""A parameter and its gradient by name, `[S, ...]`."""


class _Norm:
    """LayerNorm(x) scale + shift."""

    def __init__(self, named: Named, name: str) -> None:
        (scale, self.scale_gradient), (shift, self.shift_gradient) = named[f"{name}.scale"], named[f"{name}.shift"]
        self.scale, self.shift, self.size = scale[:, None], shift[:, None], scale.shape[1:]

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        normed, mean, factor = torch.native_layer_norm(x, self.size, None, None, EPSILON)
        tape.append((x, normed, mean, factor))
        return torch.addcmul(self.shift, normed, self.scale)

    def backward(self, gradient: Tensor, tape: Tape) -> Tensor:
        x, normed, mean, factor = tape.pop()
        product = gradient * normed
        torch.sum(product, 1, out=self.scale_gradient)
        torch.sum(gradient, 1, out=self.shift_gradient)
        torch.mul(gradient, self.scale, out=product)
        outputs = (True, False, False)
        found: Tensor = aten.native_layer_norm_backward(product, x, self.size, mean, factor, None, None, outputs)[0]
        return found


class _Affine:
    """x W + b: `train.model.affine`."""

    def __init__(self, named: Named, W: str, b: str) -> None:
        (self.W, self.W_gradient), (self.b, self.b_gradient) = named[W], named[b]
        self.W_back, self.thin = self.W.transpose(1, 2), is_thin(self.W)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        tape.append((x,))
        return affine(x, self.W, self.b)

    def parameters_backward(self, gradient: Tensor, tape: Tape) -> None:
        (x,) = tape.pop()
        if self.thin:
            torch.sum(x.unsqueeze(3) * gradient.unsqueeze(2), 1, out=self.W_gradient)
        else:
            torch.bmm(x.transpose(1, 2), gradient, out=self.W_gradient)
        torch.sum(gradient, 1, out=self.b_gradient)

    def backward(self, gradient: Tensor, tape: Tape) -> Tensor:
        self.parameters_backward(gradient, tape)
        if self.thin:
            return (gradient.unsqueeze(2) * self.W.unsqueeze(1)).sum(3)
        return torch.bmm(gradient, self.W_back)


class _Feed:
    """x + factor FeedForward(Norm(x)): `train.model.feed`."""

    def __init__(self, named: Named, block: str, factor: float) -> None:
        self.norm, self.factor = _Norm(named, f"{block}.norm2"), factor
        self.inward = _Affine(named, f"{block}.W1", f"{block}.b1")
        self.outward = _Affine(named, f"{block}.W2", f"{block}.b2")

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        hidden = self.inward.forward(self.norm.forward(x, tape), tape)
        tape.append((hidden,))
        return torch.add(x, self.outward.forward(F.gelu(hidden), tape), alpha=self.factor)

    def backward(self, gradient: Tensor, tape: Tape) -> Tensor:
        found = self.outward.backward(gradient if self.factor == 1 else gradient * self.factor, tape)
        (hidden,) = tape.pop()
        aten.gelu_backward.grad_input(found, hidden, grad_input=found)
        return self.norm.backward(self.inward.backward(found, tape), tape).add_(gradient)


class _Heads:
    """x + factor Attention(Norm(x)) over all tokens."""

    def __init__(self, named: Named, index: int, config: ModelConfig) -> None:
        self.norm, self.factor = _Norm(named, f"{index}.norm1"), config.attention_residual
        self.H, self.scale = config.n_heads, config.logit_scale
        projections = [named[f"{index}.{name}"] for name in ("Wq", "Wk", "Wv")]
        self.projections = [value.transpose(1, 2) for value, _ in projections]
        self.projection_gradients = [gradient.transpose(1, 2) for _, gradient in projections]
        Wo, gradient = named[f"{index}.Wo"]
        self.Wo, self.Wo_gradient = Wo.flatten(1, 2), gradient.flatten(1, 2)

    def forward(self, x: Tensor, tape: Tape, tokens: int, hidden: Tensor | None) -> Tensor:
        S, R, D = x.shape
        normed = self.norm.forward(x, tape)
        W = torch.cat(self.projections, dim=2).view(S, D, -1)
        heads = torch.bmm(normed, W).view(S, -1, tokens, W.shape[2])
        read, kept = attend(heads, hidden, self.H, self.scale)
        tape.append((normed, W, read, hidden, kept))
        return torch.baddbmm(x, read.reshape(S, R, -1), self.Wo, alpha=self.factor)

    def backward(self, gradient: Tensor, tape: Tape) -> Tensor:
        normed, W, read, hidden, kept = tape.pop()
        S, R, D = normed.shape
        torch.bmm(read.reshape(S, R, -1).transpose(1, 2), gradient, out=self.Wo_gradient)
        found = torch.bmm(gradient, self.Wo.transpose(1, 2))
        if self.factor != 1:
            self.Wo_gradient.mul_(self.factor)
            found.mul_(self.factor)
        found = attend_backward(found.view(read.shape), hidden, self.H, self.scale, kept).view(S, R, -1)
        by_projection = torch.bmm(normed.transpose(1, 2), found).view(S, D, 3 * self.H, -1).chunk(3, dim=2)
        torch._foreach_copy_(self.projection_gradients, by_projection)
        return self.norm.backward(torch.bmm(found, W.transpose(1, 2)), tape).add_(gradient)


class _Layer:
    """`train.model.layer`."""

    def __init__(self, named: Named, index: int, config: ModelConfig) -> None:
        factor = config.feedforward_factor
        self.before = _Feed(named, f"{index}.before", factor) if config.splitting == "strang" else None
        self.heads, self.after = _Heads(named, index, config), _Feed(named, f"{index}", factor)

    def forward(self, x: Tensor, tape: Tape, tokens: int, hidden: Tensor | None) -> Tensor:
        if self.before is not None:
            x = self.before.forward(x, tape)
        return self.after.forward(self.heads.forward(x, tape, tokens, hidden), tape)

    def backward(self, gradient: Tensor, tape: Tape) -> Tensor:
        gradient = self.heads.backward(self.after.backward(gradient, tape), tape)
        return gradient if self.before is None else self.before.backward(gradient, tape)


class Gradient:
    """The gradient of the loss by `parameters`, written to `gradients`: both by name, `[S, ...]`, at fixed addresses.

    Of models that attend to all tokens, in the parameters' own precision.
    """

    def __init__(self, config: ModelConfig, parameters: Parameters, gradients: Parameters) -> None:
        named = {name: (value.detach(), gradients[name]) for name, value in parameters.items()}
        self.embed = _Affine(named, "embed.W", "embed.b")
        self.layers = [_Layer(named, index, config) for index in range(config.layers)]
        self.norm, self.unembed = _Norm(named, "norm"), _Affine(named, "unembed.W", "unembed.b")

    @torch.no_grad()
    def of(self, loss: Callable[[Tensor, Batch], Tensor], batch: Batch) -> Tensor:
        """Mean loss of each member, `[S]`, by the loss of each example `[S, B]` that `loss` makes of predictions.

        The gradients of before are overwritten. Raises ValueError for a batch with keys.
        """
        require(batch.keys is None, "batch.keys", "a tensor", "None, for all tokens")
        full = filled(batch)
        inputs, visible = inputs_of(full, self.embed.W), visible_keys(full)
        S, B, N, _ = inputs.shape
        hidden = None if visible is None else ~visible.unsqueeze(-3)
        tape: Tape = []
        x = self.embed.forward(inputs.reshape(S, B * N, -1), tape)
        for layer in self.layers:
            x = layer.forward(x, tape, N, hidden)
        prediction = self.unembed.forward(self.norm.forward(x, tape), tape)
        with torch.enable_grad():
            leaf = prediction.requires_grad_()
            copy = leaf.clone().view(S, B, N, -1)[:, : batch.inputs.shape[-3]]  # which the loss may change in place
            losses = loss(copy, batch).mean(-1)
            (found,) = torch.autograd.grad(losses.sum(), [leaf])
        found = self.norm.backward(self.unembed.backward(found.contiguous(), tape), tape)
        for layer in reversed(self.layers):
            found = layer.backward(found, tape)
        self.embed.parameters_backward(found, tape)
        return losses.detach()
