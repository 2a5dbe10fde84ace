"""One member as anybody would write it in plain PyTorch: oracle of the stacked model, and its rival in benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig


class Feed(nn.Sequential):
    """A feed-forward on the normed stream, and its names in the stacked model."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def named(self, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """By name within a block."""
        norm, inward, _, outward = self
        found = {"norm2.scale": value(norm.weight), "norm2.shift": value(norm.bias)}
        found |= {"W1": value(inward.weight).T, "b1": value(inward.bias)}
        return found | {"W2": value(outward.weight).T, "b2": value(outward.bias)}


class Block(nn.Module):
    """Attention, then feed-forward, each on the normed residual stream; for `strang` a feed-forward comes first too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.feedforward * config.width
        self.heads, self.scale = config.n_heads, config.logit_scale
        self.said, self.fed = config.attention_residual, config.feedforward_residual
        strang = config.splitting == "strang"
        if self.fed is None:
            self.fed = 0.5 if strang else 1.0
        self.norm1 = nn.LayerNorm(width)
        self.before = Feed(width, hidden // 2) if strang else None
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ff = Feed(width, hidden // 2 if strang else hidden)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """`x [B, N, D]`; visible bool `[B, N, N]` or None."""
        if self.before is not None:
            x = torch.add(x, self.before(x), alpha=self.fed)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if visible is None else visible[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        x = torch.add(x, self.o(y.transpose(1, 2).flatten(2)), alpha=self.said)
        return torch.add(x, self.ff(x), alpha=self.fed)


class StockTransformer(nn.Module):
    """The architecture of `train.model` for one member, of stock parts and with scaled-dot-product attention."""

    def __init__(self, config: ModelConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.embed = nn.Linear(d_in, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.unembed = nn.LayerNorm(config.width), nn.Linear(config.width, d_out)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """`x [B, N, d_in]` to `[B, N, d_out]`."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, visible)
        out: Tensor = self.unembed(self.norm(x))
        return out

    def named(self, gradient: bool = False) -> dict[str, Tensor]:
        """The parameters, or their gradients, under the stacked model's names and in its shapes."""

        def value(parameter: Tensor) -> Tensor:
            return parameter if not gradient or parameter.grad is None else parameter.grad

        found = {"embed.W": value(self.embed.weight).T, "embed.b": value(self.embed.bias)}
        for i, block in enumerate(self.blocks):
            projections = value(block.qkv.weight).unflatten(0, (3, block.heads, -1)).transpose(2, 3)
            found |= dict(zip((f"{i}.Wq", f"{i}.Wk", f"{i}.Wv"), projections, strict=True))
            found[f"{i}.Wo"] = value(block.o.weight).T.unflatten(0, (block.heads, -1))
            found |= {f"{i}.norm1.scale": value(block.norm1.weight), f"{i}.norm1.shift": value(block.norm1.bias)}
            found |= {f"{i}.{name}": each for name, each in block.ff.named(value).items()}
            if block.before is not None:
                found |= {f"{i}.before.{name}": each for name, each in block.before.named(value).items()}
        found |= {"norm.scale": value(self.norm.weight), "norm.shift": value(self.norm.bias)}
        return found | {"unembed.W": value(self.unembed.weight).T, "unembed.b": value(self.unembed.bias)}


def stacked(models: list[StockTransformer], gradient: bool = False) -> dict[str, Tensor]:
    """Parameters (or gradients) of several members as one pack's, `[S, ...]`."""
    named = [model.named(gradient) for model in models]
    return {name: torch.stack([each[name].detach() for each in named]) for name in named[0]}
