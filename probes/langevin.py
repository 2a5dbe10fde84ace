"""Stochastic gradient Langevin dynamics of many chains at once, each about its own point and at its own settings.

A chain draws from exp(-n_beta L(w) - gamma/2 |w - w*|^2) by steps

    w <- w - eps/2 M [n_beta grad L_batch(w) + gamma (w - w*)] + N(0, eps M)

(Welling and Teh 2011; M = 1 for "sgld"). "rmsprop" has a diagonal M (Li et al. 2016, arXiv 1512.07666) from gradients
of the first half of the burn-in, then held: so the steps leave the same density in place. Axes: C chains, P points.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Sampler = Literal["sgld", "rmsprop"]

BLOCK = 1 << 16  # random numbers that a chain draws ahead, at most
AHEAD = 64  # draws of them, at most
FORGET, STABILITY = 0.99, 0.1  # of the running squared gradient; share of its root mean square added to its root
LOST = 1e6  # n_beta (L - L*) of a chain that has left for good


class Placed(Protocol):
    """A loss for C chains."""

    def draw(self, streams: Streams) -> Any:
        """A minibatch for each chain."""

    def loss(self, weights: Weights, batch: Any) -> Tensor:
        """`[C]`: mean over each chain's minibatch, by weights `[C, ...]`."""

    def base(self, batch: Any) -> Tensor:
        """`[C]`: the same at the point itself."""


class Target(Protocol):
    """A loss about P points."""

    @property
    def centre(self) -> Weights:
        """The points: what moves, `[P, ...]` each."""

    def at(self, place: Tensor) -> Placed:
        """For chains at points `place [C]`."""

    def gradient(self) -> Weights:
        """Gradient of the mean loss over all data at the points: `[P, ...]` each."""


class Streams:
    """Random numbers of C chains; a chain's depend on its seed and on what is asked for, not on the others."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._device = device
        self._kept: dict[tuple[object, ...], tuple[int, Tensor]] = {}

    def normal(self, size: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers `[C, size]`."""
        return self._next(("normal", size, dtype), size, lambda out, g: out.normal_(generator=g), dtype)

    def integers(self, high: int, size: int) -> Tensor:
        """Uniform in 0 .. high - 1, int64 `[C, size]`."""
        return self._next(("integers", high, size), size, lambda out, g: out.random_(0, high, generator=g), torch.int64)

    def _next(self, key: tuple[object, ...], size: int, fill: Any, dtype: torch.dtype) -> Tensor:
        used, block = self._kept.get(key, (0, None))
        if block is None or used == block.shape[1]:
            ahead = min(AHEAD, max(1, BLOCK // max(size, 1)))
            used, block = 0, torch.empty(len(self._generators), ahead, size, dtype=dtype, device=self._device)
            for row, generator in zip(block, self._generators, strict=True):
                fill(row, generator)
        self._kept[key] = used + 1, block
        return block[:, used]


def seed_of(*parts: object) -> int:
    """A seed in 0 .. 2^63 - 1 by the text of its parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What all chains have in common. check_every: draws between looks at the acceptance, 0 for none."""

    draws: int
    burn_in: int
    sampler: Sampler = "sgld"
    check_every: int = 10
    scale: float = 1.0  # of the loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """What each chain has of its own, every field `[C]`."""

    n_beta: Tensor
    gamma: Tensor
    step_size: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Chains:
    """trace `[C, draws]`: n_beta (L(w) - L(w*)), each on one minibatch that w has not seen, NaN for a chain that was
    lost. acceptance `[C]`: mean probability with which a Metropolis step would accept the move (MALA, on the minibatch
    of the move), NaN where never looked at. diverged `[C]`.

    spread `[C]`: mean over draws of (w - w*) . grad U / d, the gradient on a minibatch that w has not seen, d how many
    weights move. It is 1 for any density exp(-U) once a chain has reached it (the virial theorem): less while
    soft directions still widen, more where steps or minibatches heat.
    heating `[C]`: eps n_beta^2 / 4 tr(C M C M) / tr(C M) with C the covariance of a minibatch's gradient: the share by
    which its noise raises the temperature of the directions it lies in; NaN where fewer than two looks were made."""

    trace: Tensor
    acceptance: Tensor
    diverged: Tensor
    spread: Tensor
    heating: Tensor


class _Flat:
    """Weights `[C, size]` in one tensor, the named ones being views into it; where: 1 for what may move."""

    def __init__(self, centre: Weights, place: Tensor, where: Weights | None) -> None:
        shapes = {name: value.shape[1:] for name, value in centre.items()}
        self.centre = torch.cat([value.flatten(1)[place] for value in centre.values()], dim=1)
        self.where: Tensor | None = None
        if where is not None:
            masks = [torch.as_tensor(where[name]).expand(shape).flatten() for name, shape in shapes.items()]
            self.where = torch.cat(masks).to(self.centre)
        self.values, self.gradient = self.centre.clone(), torch.zeros_like(self.centre)
        self.named, self._gradients = ({}, {})
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self.named[name] = self.values[:, start:stop].view(-1, *shape).requires_grad_()
            self._gradients[name] = self.gradient[:, start:stop].view(-1, *shape)
            start = stop

    def look(self, placed: Placed, batch: Any, scale: float) -> tuple[Tensor, Tensor]:
        """Loss `[C]` and its gradient `[C, size]`, scaled."""
        with torch.enable_grad():
            loss = placed.loss(self.named, batch)
            named = list(self.named.values())
            found = torch.autograd.grad(loss.sum(), named, allow_unused=True, materialize_grads=True)
        torch._foreach_copy_(list(self._gradients.values()), list(found))
        return scale * loss.detach(), self.free(self.gradient * scale)

    def free(self, values: Tensor) -> Tensor:
        """The values of what may move, 0 elsewhere."""
        return values if self.where is None else values * self.where


@torch.no_grad()
def run_chains(
    target: Target,
    place: Tensor,
    seeds: Sequence[int],
    levels: Levels,
    schedule: Schedule,
    where: Weights | None = None,
) -> Chains:
    """C chains, one at each of the points `place [C]`; a chain's numbers depend on its point, seed and levels alone,
    spread and heating but for rounding.

    where: bool by name, shaped as a point's tensors: the weights that move, all others stay. A chain whose loss is not
    finite, or n_beta (L - L*) above 1e6, is lost: it goes back to its point and stays.
    """
    flat, placed = _Flat(target.centre, place, where), target.at(place)
    streams = Streams(seeds, flat.values.device)
    n_beta, gamma, eps = (x.to(flat.values)[:, None] for x in (levels.n_beta, levels.gamma, levels.step_size))
    total = schedule.burn_in + schedule.draws
    trace = flat.values.new_empty(len(place), total)
    lost = torch.zeros(len(place), 1, dtype=torch.bool, device=flat.values.device)
    accepted, looks, virial = flat.values.new_zeros(len(place)), 0, flat.values.new_zeros(len(place))
    seen, warmth = None, _Heating()
    metric, square = torch.ones_like(flat.values[:, :1]), torch.zeros_like(flat.values)

    def force(gradient: Tensor) -> Tensor:
        return n_beta * gradient + flat.free(gamma * (flat.values - flat.centre))

    def energy(loss: Tensor) -> Tensor:
        return n_beta[:, 0] * loss + 0.5 * gamma[:, 0] * (flat.values - flat.centre).square().sum(1)

    for draw in range(total):
        batch = placed.draw(streams)
        loss, gradient = flat.look(placed, batch, schedule.scale)
        trace[:, draw] = n_beta[:, 0] * (loss - schedule.scale * placed.base(batch))
        lost |= ~(trace[:, draw].isfinite() & (trace[:, draw] < LOST))[:, None]
        if schedule.sampler == "rmsprop" and draw < schedule.burn_in // 2:
            square.mul_(FORGET).addcmul_(gradient, gradient, value=1.0 - FORGET)
            metric = _metric(square, flat.where)
        if seen is not None:  # two minibatches at the same w
            warmth.add(gradient - seen, metric)
            seen = None
        pull, noise = force(gradient), flat.free(streams.normal(flat.values.shape[1], flat.values.dtype))
        if draw >= schedule.burn_in:
            virial += ((flat.values - flat.centre) * pull).sum(1)
        before, old = flat.values.clone(), energy(loss)
        move = (eps * metric).sqrt() * noise - 0.5 * eps * metric * pull
        flat.values.copy_(torch.where(lost, flat.centre, flat.values + move))
        checks = schedule.check_every > 0 and draw >= schedule.burn_in
        if checks and (draw - schedule.burn_in) % schedule.check_every == 0:
            loss, gradient = flat.look(placed, batch, schedule.scale)
            back = before - flat.values + 0.5 * eps * metric * force(gradient)
            log_ratio = old - energy(loss) + 0.5 * (noise.square() - back.square() / (eps * metric)).sum(1)
            accepted += log_ratio.nan_to_num(nan=-math.inf).clamp_max(0.0).exp()  # to where the loss is no number
            looks += 1
            seen = gradient if schedule.check_every > 1 or looks % 2 else None  # no minibatch twice
    trace = trace[:, schedule.burn_in :].masked_fill(lost, math.nan)
    acceptance = accepted / looks if looks else torch.full_like(accepted, math.nan)
    moving = flat.values.shape[1] if flat.where is None else max(float(flat.where.sum()), 1.0)
    figures = {
        "acceptance": acceptance,
        "spread": virial / (schedule.draws * moving),
        "heating": 0.25 * eps[:, 0] * n_beta[:, 0].square() * warmth.variance(len(place), eps),
    }
    gone = lost[:, 0]
    return Chains(trace=trace, diverged=gone, **{k: value.masked_fill(gone, math.nan) for k, value in figures.items()})


class _Heating:
    """tr(C M C M) / tr(C M) of a minibatch's gradient, from differences between two of them at the same place."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._size: list[Tensor] = []
        self._overlap: list[Tensor] = []

    def add(self, difference: Tensor, metric: Tensor) -> None:
        """`difference [C, size]` has covariance 2 C, and is independent of the last one."""
        own = difference * metric.sqrt()
        self._size.append(own.square().sum(1))
        if self._last is not None:
            self._overlap.append((own * self._last).sum(1).square())
        self._last = own

    def variance(self, chains: int, like: Tensor) -> Tensor:
        """`[C]`; 0 where gradients do not differ, NaN where too few were seen."""
        if not self._overlap:
            return like.new_full((chains,), math.nan)
        size, overlap = (torch.stack(values).mean(0) for values in (self._size, self._overlap))
        return 0.5 * overlap / size.clamp_min(torch.finfo(size.dtype).tiny)


def _metric(square: Tensor, where: Tensor | None) -> Tensor:
    """1 / (root of the squared gradient), with mean 1 over what moves: step sizes mean the same with and without it."""
    free = torch.ones_like(square[:1]) if where is None else where[None]
    count = free.sum(1, keepdim=True).clamp_min(1.0)
    size = ((square * free).sum(1, keepdim=True) / count).clamp_min(torch.finfo(square.dtype).tiny)
    metric = 1.0 / ((square / size).sqrt() + STABILITY)
    level = (metric * free).sum(1, keepdim=True) / count
    return metric / torch.where(level > 0.0, level, 1.0)  # 0 where nothing moves
