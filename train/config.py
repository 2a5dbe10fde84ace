"""Frozen configs of a model and its training. A wrong value fails here, before any work starts, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from sim.checks import require, require_number, require_one_of

Optimizer = Literal["adam", "sgd"]
Parametrization = Literal["standard", "mup"]
Splitting = Literal["lie", "strang"]
Attention = Literal["global", "local"]
Precision = Literal["float32", "float64", "tf32", "bf16"]

WIDTH_UNIT = 4
"""At other widths products would round by a member's place in its pack (see `train.model.filled`)."""


def require_finite(config: Any) -> None:
    """Raise ValueError if a float field of the dataclass is infinite or not a number."""
    for item in fields(config):
        if isinstance(value := getattr(config, item.name), float):
            require_number(item.name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A permutation-equivariant transformer over tokens: linear in, pre-LayerNorm layers, linear out."""

    width: int = 32
    """Size of the residual stream, a multiple of 4."""
    layers: int = 2
    """Number of layers, put together as `splitting` says."""
    heads: int | None = 4
    """Attention heads a layer, of size width / heads. None where head_dim is given."""
    head_dim: int | None = None
    """Size of a head; the number of heads is then width / head_dim. None where heads is given."""
    feedforward: int = 4
    """Hidden size of a layer's feed-forward, in widths; under `strang` each of the two has half of it."""
    splitting: Splitting = "lie"
    """A layer: `lie` attention, then feed-forward; `strang` feed-forward, attention, feed-forward (Macaron Net, Lu et
    al. 2019, arXiv 1906.02762), the two of them with weights of their own."""
    attention_residual: float = 1.0
    """Factor on what attention adds to the stream."""
    feedforward_residual: float | None = None
    """Factor on what each feed-forward adds to the stream. None: 1 under `lie`, 1/2 under `strang`."""
    attention: Attention = "global"
    """What a token attends to: `global` all that the system shows it, `local` the nearest of these, itself included."""
    neighbours: int = 8
    """How many nearest under `local`; all where there are not so many. Not read under `global`."""
    parametrization: Parametrization = "standard"
    """`mup` scales initialisation and learning rates with width so that wide and narrow nets move alike."""
    base_width: int = 32
    """The width at which `mup` and `standard` are the same network."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "feedforward", "neighbours", "base_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_finite(self)
        require_one_of("parametrization", self.parametrization, get_args(Parametrization))
        require_one_of("splitting", self.splitting, get_args(Splitting))
        require_one_of("attention", self.attention, get_args(Attention))
        given = "head_dim" if self.heads is None else "heads"
        parts = self.head_dim if self.heads is None else self.heads
        require(
            parts is not None and (self.heads is None or self.head_dim is None),
            "heads, head_dim",
            (self.heads, self.head_dim),
            "one number and one None",
        )
        require(parts is not None and parts >= 1, given, parts, "at least 1")

    def require_divisible(self) -> None:
        """Raise ValueError unless the width is one for packs and splits into heads. Apart from the rest, as a sweep
        sets the width last."""
        unit = f"a multiple of {WIDTH_UNIT}, for equal bits in packs of any size"
        require(self.width % WIDTH_UNIT == 0, "width", self.width, unit)
        given, parts = ("heads", self.heads) if self.heads is not None else ("head_dim", self.head_dim)
        require(self.width % (parts or 1) == 0, "width", self.width, f"divisible by {given} = {parts}")

    @property
    def n_heads(self) -> int:
        """H, heads a layer."""
        return self.heads if self.heads is not None else self.width // (self.head_dim or 1)

    @property
    def d_head(self) -> int:
        """Size of one head."""
        return self.width // self.n_heads

    @property
    def reach(self) -> int | None:
        """The most keys that a token attends to; None: all."""
        return self.neighbours if self.attention == "local" else None

    @property
    def feedforward_factor(self) -> float:
        """What `feedforward_residual` comes to."""
        if self.feedforward_residual is not None:
            return self.feedforward_residual
        return 0.5 if self.splitting == "strang" else 1.0

    @property
    def width_ratio(self) -> float:
        """Width over base width: the m of maximal-update rules; 1 under `standard`."""
        return self.width / self.base_width if self.parametrization == "mup" else 1.0

    @property
    def logit_scale(self) -> float:
        """Factor on query-key products: d_head^-1/2, under `mup` base_d_head^1/2 / d_head (equal at the base width)."""
        if self.parametrization == "standard" or self.heads is None:
            return 1 / math.sqrt(self.d_head)
        return math.sqrt(self.base_width / self.heads) / self.d_head


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a member is trained. `learning_rate`, `weight_decay` and `clip` may differ within a pack."""

    steps: int = 4000
    """Optimiser steps."""
    batch_size: int = 64
    """Examples a step, drawn with replacement from the pool."""
    optimizer: Optimizer = "adam"
    """`adam`, or plain `sgd` without momentum (gradient flow in the limit of a small rate)."""
    learning_rate: float = 1e-3
    """Constant rate after the warm-up."""
    warmup: int = 0
    """Steps over which the rate rises linearly from 0."""
    beta1: float = 0.9
    """Adam: decay of the mean of gradients."""
    beta2: float = 0.999
    """Adam: decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Adam: added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled: every step weights shrink by learning_rate x weight_decay."""
    clip: float | None = None
    """Largest norm of a member's gradient; None: no clip."""
    precision: Precision = "float32"
    """float32, float64: of parameters, data and every product. tf32, bf16: as float32, but products while training see
    operands rounded to 11 or 8 bits (tf32 on a GPU only; bf16 also between layers); probes measure in float32."""
    compiled: bool = False
    """Train through kernels of `torch.compile`: faster steps after some 20 s once for each shape of pack and worker;
    needs a C++ compiler where packs have no GPU. Numbers differ from eager ones by rounding."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_one_of("optimizer", self.optimizer, ("adam", "sgd"))
        require_one_of("precision", self.precision, get_args(Precision))
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("learning_rate", "epsilon"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "above 0, or None")

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, moments and data."""
        return torch.float64 if self.precision == "float64" else torch.float32
