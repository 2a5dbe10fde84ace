"""S stacked transformers as functions of named parameters `[S, ...]`.

Legend: S members, B examples, N tokens, K keys of a query, D width, H heads, d size of a head, F feed-forward size.
One layer: x + a Attention(LayerNorm(x)), then x + b FeedForward(LayerNorm(x)) with a = b = 1; under Strang splitting a
feed-forward comes before attention too, each of half the hidden size, with weights of its own and b = 1/2. Attention
weights carry a head axis, so that a head is an index: `Wq, Wk, Wv [S, H, D, d]`, `Wo [S, H, d, D]`. There is no
positional encoding: permuting tokens permutes outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sim.generator import Generator
from sim.system import Batch
from train.config import ModelConfig, Optimizer

Parameters = Mapping[str, Tensor]
Role = Literal["input", "hidden", "output", "vector", "constant"]

EPSILON = 1e-5  # that of a norm
FULL = 32  # tokens of a member's batch come in multiples of this, see `filled`
HIDDEN_LOGIT = -1e30  # exp underflows to exactly 0 beside any visible key, and a row without one stays finite


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One named parameter of a single member."""

    shape: tuple[int, ...]
    fan_in: int
    role: Role
    fill: float | None = None

    def std(self, config: ModelConfig) -> float:
        """Initial standard deviation: fan_in^-1/2; under `mup` that of the output also falls as (width ratio)^-1/2."""
        return math.sqrt(1 / (self.fan_in * (config.width_ratio if self.role == "output" else 1.0)))

    def rate(self, config: ModelConfig, optimizer: Optimizer) -> float:
        """Learning rate relative to the member's: Yang et al. 2022 (arXiv 2203.03466), table 3; 1 under `standard`.

        Adam: hidden and output weights m^-1. SGD: input weights and vectors m, output weights m^-1 (m: width ratio).
        """
        power = {
            "adam": {"input": 0, "hidden": -1, "output": -1, "vector": 0, "constant": 0},
            "sgd": {"input": 1, "hidden": 0, "output": -1, "vector": 1, "constant": 0},
        }[optimizer][self.role]
        return math.pow(config.width_ratio, power)


def tensor_specs(config: ModelConfig, d_in: int, d_out: int) -> dict[str, TensorSpec]:
    """The parameters of one member by name, in the order in which they are stored."""
    config.require_divisible()
    D, H, d, hidden = config.width, config.n_heads, config.d_head, config.feedforward * config.width
    strang = config.splitting == "strang"
    hidden = hidden // 2 if strang else hidden

    def weight(shape: tuple[int, ...], fan_in: int, role: Role = "hidden") -> TensorSpec:
        return TensorSpec(shape=shape, fan_in=fan_in, role=role)

    def vector(size: int, fill: float = 0.0, role: Role = "vector") -> TensorSpec:
        return TensorSpec(shape=(size,), fan_in=1, role=role, fill=fill)

    def feedforward(block: str) -> dict[str, TensorSpec]:
        return {
            f"{block}.norm2.scale": vector(D, 1.0),
            f"{block}.norm2.shift": vector(D),
            f"{block}.W1": weight((D, hidden), D),
            f"{block}.b1": vector(hidden),
            f"{block}.W2": weight((hidden, D), hidden),
            f"{block}.b2": vector(D),
        }

    specs = {"embed.W": weight((d_in, D), d_in, "input"), "embed.b": vector(D)}
    for layer in range(config.layers):
        specs |= feedforward(f"{layer}.before") if strang else {}
        specs |= {
            f"{layer}.norm1.scale": vector(D, 1.0),
            f"{layer}.norm1.shift": vector(D),
            f"{layer}.Wq": weight((H, D, d), D),
            f"{layer}.Wk": weight((H, D, d), D),
            f"{layer}.Wv": weight((H, D, d), D),
            f"{layer}.Wo": weight((H, d, D), D),
        }
        specs |= feedforward(f"{layer}")
    return specs | {
        "norm.scale": vector(D, 1.0),
        "norm.shift": vector(D),
        "unembed.W": weight((D, d_out), D, "output"),
        "unembed.b": vector(d_out, role="constant"),
    }


def initial(config: ModelConfig, d_in: int, d_out: int, generator: Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters `[S, ...]` on the CPU: weights normal, drawn from each member's own stream; vectors constant."""
    S = len(generator.key)
    values = {}
    for name, spec in tensor_specs(config, d_in, d_out).items():
        if spec.fill is not None:
            values[name] = torch.full((S, *spec.shape), spec.fill, dtype=dtype)
        else:
            values[name] = generator.fold(name).normal(*spec.shape, dtype=torch.float64).mul(spec.std(config)).to(dtype)
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadEdit:
    """Heads of one layer to edit: those whose output becomes its mean, those whose attention becomes uniform."""

    output: tuple[int, ...] = ()
    pattern: tuple[int, ...] = ()


def is_thin(W: Tensor) -> bool:
    """Whether products with `W [S, i, o]` are by a single row or column, which libraries round by the number of
    members."""
    return 1 in W.shape[1:]


def affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """`x [S, R, i] @ W [S, i, o] + b [S, o]`, the same bits in any company on a CPU."""
    if is_thin(W):
        return (x.unsqueeze(3) * W.unsqueeze(1)).sum(2) + b[:, None]
    return torch.baddbmm(b[:, None], x, W)


def _affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """`affine` of `x [S, B, N, i]`."""
    S, B, N, i = x.shape
    return affine(x.reshape(S, B * N, i), W, b).view(S, B, N, -1)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None, None], F.layer_norm(x, x.shape[-1:], eps=EPSILON), scale[:, None, None])


def visible_keys(batch: Batch) -> Tensor | None:
    """Bool `[..., B, N, K]`: keys that are real and allowed; None where all are."""
    visible = batch.allowed
    if batch.mask is not None:
        if batch.keys is None:
            real = batch.mask.unsqueeze(-2)
        else:
            shape = batch.keys.shape
            real = torch.gather(batch.mask, -1, batch.keys.flatten(-2)).reshape(shape)
        visible = real if visible is None else visible & real
    return visible


def filled_examples(examples: int, tokens: int) -> int:
    """How many examples of so many tokens each the model reads in place of `examples`: see `filled`."""
    unit = FULL // math.gcd(FULL, tokens)
    return -(-examples // unit) * unit


def filled(batch: Batch) -> Batch:
    """The batch as the model reads it: with examples added that have no real token, up to a multiple of `FULL` tokens.

    Products round by where in a line of the cache an operand begins, and single operations by what is left over of a
    vector of numbers. With whole lines and vectors both are the same for all members of a stack, and for one alone.
    """
    B, N = batch.inputs.shape[-3:-1]
    if not (extra := filled_examples(B, N) - B):
        return batch
    lead = (B, N) if batch.keys is None else batch.keys.shape[:-1]
    mask = batch.inputs.new_ones(lead, dtype=torch.bool) if batch.mask is None else batch.mask
    more = (0, 0, 0, 0, 0, extra)
    return replace(
        batch,
        inputs=F.pad(batch.inputs, more),
        mask=F.pad(mask, more[2:]),
        keys=None if batch.keys is None else F.pad(batch.keys, more),
        allowed=None if batch.allowed is None else F.pad(batch.allowed, more),
    )


def inputs_of(batch: Batch, W: Tensor) -> Tensor:
    """The batch's inputs `[S, B, N, d_in]` as the weights `W [S, d_in, D]` take them; without a member axis all share
    them."""
    inputs = batch.inputs if batch.inputs.dim() == 4 else batch.inputs.expand(len(W), *batch.inputs.shape)
    return inputs.to(W.dtype)


def embed(parameters: Parameters, batch: Batch) -> Tensor:
    """Residual stream `[S, B, N, D]` before the first layer."""
    W = parameters["embed.W"]
    return _affine(inputs_of(batch, W), W, parameters["embed.b"])


def _split(heads: Tensor, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[S, B, H, N, d]` of `heads [S, B, N, 3 H d]`, contiguous."""
    S, B, N, _ = heads.shape
    q, k, v = heads.view(S, B, N, 3, H, -1).permute(3, 0, 1, 4, 2, 5).contiguous()
    return q, k, v


def attend(heads: Tensor, hidden: Tensor | None, H: int, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """softmax(scale q k^T) v over all tokens, by `heads [S, B, N, 3 H d]`: what is read, `[S, B, N, H d]`, and what
    `attend_backward` needs.

    The same as `attention_pattern` and `mix_values`, with a backward pass that copies half as much. Spelt out and not
    torch's scaled-dot-product kernel, which takes about twice as long at 16 tokens on a CPU.
    """
    q, k, v = (part.flatten(0, 2) for part in _split(heads, H))
    logits = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    shape = (*heads.shape[:2], H, heads.shape[2], -1)
    if hidden is not None:
        logits.view(shape).masked_fill_(hidden, HIDDEN_LOGIT)
    pattern = torch.softmax(logits, dim=-1).to(q.dtype)
    return torch.bmm(pattern, v).view(shape).transpose(2, 3).flatten(3), (q, k, v, pattern)


def attend_backward(gradient: Tensor, hidden: Tensor | None, H: int, scale: float, kept: tuple[Tensor, ...]) -> Tensor:
    """Gradient by the heads of `attend`, `[S, B, N, 3 H d]`, from that by what is read, `[S, B, N, H d]`."""
    q, k, v, pattern = kept
    S, B, N, _ = gradient.shape
    read = gradient.view(S, B, N, H, -1).transpose(2, 3).reshape_as(q)
    logits = torch._softmax_backward_data(torch.bmm(read, v.transpose(1, 2)), pattern, -1, pattern.dtype)
    if hidden is not None:  # a query that sees nothing has a uniform pattern, which no logit moves
        logits.view(S, B, H, N, -1).masked_fill_(hidden, 0.0)
    found = torch.empty(3, *q.shape, dtype=q.dtype, device=q.device)
    torch.baddbmm(q, logits, k, beta=0, alpha=scale, out=found[0])
    torch.baddbmm(k, logits.transpose(1, 2), q, beta=0, alpha=scale, out=found[1])
    torch.bmm(pattern.transpose(1, 2), read, out=found[2])
    return found.view(3, S, B, H, N, -1).permute(1, 2, 4, 0, 3, 5).reshape(S, B, N, -1)


class _Attention(torch.autograd.Function):
    """`attend`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, hidden: Tensor | None, H: int, scale: float) -> Tensor:
        read, kept = attend(heads, hidden, H, scale)
        ctx.save_for_backward(*kept, hidden)
        ctx.H, ctx.scale = H, scale
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, hidden = ctx.saved_tensors
        return attend_backward(gradient, hidden, ctx.H, ctx.scale, tuple(kept)), None, None, None


def _at_keys(values: Tensor, keys: Tensor) -> Tensor:
    """`values [S, B, H, N, d]` at `keys [(S,) B, N, K]`: `[S, B, H, N, K, d]`."""
    S, B, H, N, d = values.shape
    index = keys.expand(S, *keys.shape[-3:]).reshape(S, B, 1, -1, 1).expand(S, B, H, -1, d)
    return torch.gather(values, 3, index).view(S, B, H, N, -1, d)


def attention_pattern(q: Tensor, k: Tensor, batch: Batch, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax over each query's keys: `[S, B, H, N, K]` from `q, k [S, B, H, N, d]`."""
    if batch.keys is None:
        logits = torch.matmul(q * scale, k.transpose(-1, -2))
    else:
        logits = torch.matmul(_at_keys(k, batch.keys), (q * scale).unsqueeze(-1)).squeeze(-1)
    if visible is not None:
        logits = logits.masked_fill(~visible.unsqueeze(-3), HIDDEN_LOGIT)
    return torch.softmax(logits, dim=-1)


def mix_values(pattern: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """What each head reads: `[S, B, H, N, d]` from attention `[S, B, H, N, K]` and values `[S, B, H, N, d]`."""
    if batch.keys is None:
        return torch.matmul(pattern, v)
    return torch.matmul(pattern.unsqueeze(-2), _at_keys(v, batch.keys)).squeeze(-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the heads of a layer do, spelt out: stream `[S, B, N, D]`, which they see and add to; pattern
    `[S, B, H, N, K]`; values, read `[S, B, H, N, d]`."""

    stream: Tensor
    pattern: Tensor
    values: Tensor
    read: Tensor

    def merged(self, batch: Batch | None = None, edit: HeadEdit | None = None) -> Tensor:
        """What is read, `[S, B, N, H d]`; on `batch` under an edit."""
        read = self.read if batch is None or edit is None else self._edited(batch, edit)
        return read.transpose(2, 3).flatten(3)

    def _edited(self, batch: Batch, edit: HeadEdit) -> Tensor:
        read, pattern = self.read.clone(), self.pattern
        if edit.pattern:
            visible = visible_keys(batch)
            seen = torch.ones_like(pattern[:, :, :1]) if visible is None else visible.unsqueeze(-3).to(pattern.dtype)
            uniform = (seen / seen.sum(-1, keepdim=True).clamp_min(1)).expand(pattern.shape)
            heads = list(edit.pattern)
            read[:, :, heads] = mix_values(uniform[:, :, heads], self.values[:, :, heads], batch)
        if edit.output:
            weight = torch.ones_like(read[:1, :, :1, :, :1])
            if batch.mask is not None:
                weight = batch.mask.to(read.dtype)[..., :, None, :, None]
                weight = weight if weight.dim() == 5 else weight.unsqueeze(0)
            heads = list(edit.output)
            said = read[:, :, heads]
            mean = (said * weight).sum((1, 3), keepdim=True) / weight.sum((1, 3), keepdim=True)
            read[:, :, heads] = mean.expand_as(said)
        return read


def feed(parameters: Parameters, config: ModelConfig, block: str, x: Tensor) -> Tensor:
    """Residual stream `[S, B, N, D]` after a feed-forward; block: a layer's index, or `<index>.before`."""

    def p(name: str) -> Tensor:
        return parameters[f"{block}.{name}"]

    hidden = F.gelu(_affine(_norm(x, p("norm2.scale"), p("norm2.shift")), p("W1"), p("b1")))
    return torch.add(x, _affine(hidden, p("W2"), p("b2")), alpha=config.feedforward_factor)


def before_heads(parameters: Parameters, config: ModelConfig, index: int, x: Tensor) -> Tensor:
    """The stream that a layer's heads see and add to, from the one that enters the layer."""
    return feed(parameters, config, f"{index}.before", x) if config.splitting == "strang" else x


def _heads(parameters: Parameters, index: int, x: Tensor) -> Tensor:
    """Queries, keys and values of a layer's heads, `[S, B, N, 3 H d]`, from the stream that they see."""
    S, B, N, D = x.shape
    weights = [parameters[f"{index}.{name}"].transpose(1, 2) for name in ("Wq", "Wk", "Wv")]
    normed = _norm(x, parameters[f"{index}.norm1.scale"], parameters[f"{index}.norm1.shift"])
    return torch.bmm(normed.view(S, B * N, D), torch.cat(weights, dim=2).view(S, D, -1)).view(S, B, N, -1)


def look(parameters: Parameters, config: ModelConfig, index: int, x: Tensor, batch: Batch) -> Reading:
    """What the heads of a layer do, spelt out, from the residual stream `[S, B, N, D]` that enters the layer."""
    x = before_heads(parameters, config, index, x)
    q, k, values = _split(_heads(parameters, index, x), config.n_heads)
    pattern = attention_pattern(q, k, batch, visible_keys(batch), config.logit_scale)
    return Reading(stream=x, pattern=pattern, values=values, read=mix_values(pattern, values, batch))


def finish_layer(parameters: Parameters, config: ModelConfig, index: int, x: Tensor, read: Tensor) -> Tensor:
    """Residual stream `[S, B, N, D]` after a layer, from the one its heads see and what they read `[S, B, N, H d]`."""
    S, B, N, D = x.shape
    Wo, factor = parameters[f"{index}.Wo"].flatten(1, 2), config.attention_residual
    x = torch.baddbmm(x.view(S, B * N, D), read.reshape(S, B * N, -1), Wo, alpha=factor).view_as(x)
    return feed(parameters, config, f"{index}", x)


def layer(parameters: Parameters, config: ModelConfig, index: int, x: Tensor, batch: Batch) -> Tensor:
    """Residual stream `[S, B, N, D]` after one layer."""
    if batch.keys is not None or torch.compiler.is_compiling():  # a compiler takes what is spelt out
        reading = look(parameters, config, index, x, batch)
        return finish_layer(parameters, config, index, reading.stream, reading.merged())
    x, visible = before_heads(parameters, config, index, x), visible_keys(batch)
    hidden = None if visible is None else ~visible.unsqueeze(-3)
    read: Tensor = _Attention.apply(_heads(parameters, index, x), hidden, config.n_heads, config.logit_scale)  # type: ignore[no-untyped-call]
    return finish_layer(parameters, config, index, x, read)


def unembed(parameters: Parameters, x: Tensor) -> Tensor:
    """Predictions `[S, B, N, d_out]` from the residual stream after the last layer."""
    x = _norm(x, parameters["norm.scale"], parameters["norm.shift"])
    return _affine(x, parameters["unembed.W"], parameters["unembed.b"])


def forward(parameters: Parameters, config: ModelConfig, batch: Batch) -> Tensor:
    """Predictions `[S, B, N, d_out]` of all members on the batch."""
    full = filled(batch)
    x = embed(parameters, full)
    for index in range(config.layers):
        x = layer(parameters, config, index, x, full)
    return unembed(parameters, x)[:, : batch.inputs.shape[-3]]


def activations(config: ModelConfig, tokens: int, keys: int | None) -> int:
    """Numbers that one member keeps of one example for the backward pass, about.

    Per token and layer: the stream, its norm and the scaled norm, twice; queries, keys, values and what is read; the
    hidden layer before and after its nonlinearity; the pattern; with lists of keys, keys and values gathered by them;
    under Strang splitting the first three once more.
    """
    rows = 13 if config.splitting == "strang" else 10
    per_token = (rows + 2 * config.feedforward) * config.width + config.n_heads * (keys or tokens)
    if keys is not None:
        per_token += 2 * keys * config.width
    return tokens * config.layers * per_token


def count_parameters(specs: Iterable[TensorSpec]) -> int:
    """Numbers in one member."""
    return sum(math.prod(spec.shape) for spec in specs)
