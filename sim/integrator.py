"""The integrator of discs that touch: semi-implicit Euler over many boxes at once, eager or compiled.

Axes: B boxes, N discs, K = N // 2. Boxes lie on the *innermost* axis, so that every operation is one long vector.
Pairs are looked at once: [k, i] is disc i with disc i + k + 1, counted round; what it does to i it undoes to the other.
Of an even N the last k has every pair twice, once from either side, and is not undone.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sim.compiling import compiled

log = logging.getLogger(__name__)

EAGER_PAIRS, COMPILED_PAIRS, DEVICE_PAIRS = 1 << 17, 1 << 18, 1 << 22
"""Pairs in one chunk of boxes: few enough for the cache of a CPU core, enough to fill a GPU."""

State: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, y, u, v `[N, B]`; closest squared distance of each pair so far `[K, N, B]`."""
Advance: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], State]

CONSTANTS = ("diameter", "stiffness", "damping", "gravity", "per_mass", "time_step", "near", "far_x", "far_y")
"""Order of the constants' tensor: a tensor, so that one compiled kernel serves every box of N discs."""


def partners(n: int, device: torch.device) -> Tensor:
    """The disc that pair [k, i] has beside i, `[K, N]`."""
    first, shift = torch.arange(n, device=device), torch.arange(1, n // 2 + 1, device=device)
    return (first + shift[:, None]) % n


def ahead(x: Tensor) -> Tensor:
    """The numbers of each pair's other disc, `[K, N, B]`, from those of discs `[N, B]`; a view, nothing is gathered."""
    n = len(x)
    return torch.cat((x, x[: n // 2])).unfold(0, n, 1)[1:].transpose(1, 2)


def undone(n: int, device: torch.device) -> Tensor:
    """Where the pair lies of which disc i is the other one, by shift, as a place in `[K, N]` laid flat: `[K', N]`, K' =
    (N - 1) // 2."""
    first, shift = torch.arange(n, device=device), torch.arange(1, (n + 1) // 2, device=device)[:, None]
    return (shift - 1) * n + (first - shift) % n


def fold(terms: Tensor) -> Tensor:
    """Sum over the first axis by halving: `Tensor.sum` adds in an order that depends on the place along the last."""
    while (count := len(terms)) > 1:
        half = count // 2
        folded = terms[:half] + terms[count - half :]
        terms = torch.cat((folded, terms[half : half + 1])) if count % 2 else folded
    return terms[0]


def net_force(force: Tensor) -> Tensor:
    """Sum of forces on each disc, `[N, B]`, from those on the first of each pair `[K, N, B]`."""
    n = force.shape[1]
    if n < 3:
        return force.sum(0)  # of none, or of one
    return fold(force) - fold(force.flatten(0, 1)[undone(n, force.device)])


def wall_force(
    x: Tensor, u: Tensor, stiffness: Tensor, damping: Tensor, near: Tensor, far: Tensor, limit: bool
) -> Tensor:
    """Force along one axis of the two walls; a centre overlaps them below `near` and above `far`. `[N, B]`."""
    low, high = near - x, x - far
    up, down = stiffness * low - damping * u, stiffness * high + damping * u
    if limit:
        up, down = up.clamp_min(0), down.clamp_min(0)
    return torch.where(low > 0, up, 0.0) - torch.where(high > 0, down, 0.0)


def advance(x: Tensor, y: Tensor, u: Tensor, v: Tensor, closest: Tensor, constants: Tensor, limit: bool) -> State:
    """One time step: v += a(x, v) dt, then x += v dt.

    constants `[9]`, see `CONSTANTS`; limit: contact forces never pull.
    """
    diameter, stiffness, damping, gravity, per_mass, dt, near, far_x, far_y = constants.unbind()
    dx, dy, du, dv = x - ahead(x), y - ahead(y), u - ahead(u), v - ahead(v)
    squared = dx * dx + dy * dy + 1e-30  # centres that coincide exert no force, rather than NaN
    inverse = torch.rsqrt(squared)  # rounded exactly, eager or compiled; eager sqrt is not
    # (k d - c v_n) / r, still to be multiplied by (dx, dy)
    force = stiffness * (diameter * inverse - 1) - damping * ((du * dx + dv * dy) * (inverse * inverse))
    if limit:
        force = force.clamp_min(0)
    force = torch.where(squared < diameter * diameter, force, 0.0)
    force_x = net_force(force * dx) + wall_force(x, u, stiffness, damping, near, far_x, limit)
    force_y = net_force(force * dy) + wall_force(y, v, stiffness, damping, near, far_y, limit)
    u = u + force_x * per_mass * dt
    v = v + (force_y * per_mass - gravity) * dt
    # Distances, not flags: loading and storing bools makes the compiled kernel eight times slower.
    return x + u * dt, y + v * dt, u, v, torch.minimum(closest, squared)


def chunk_size(n: int, boxes: int, device: torch.device, compiled: bool) -> int:
    """Boxes that go through one kernel together; through a compiled one, the least power of two that holds all."""
    pairs = DEVICE_PAIRS if device.type != "cpu" else COMPILED_PAIRS if compiled else EAGER_PAIRS
    most = max(16, pairs // (n * max(n // 2, 1)) // 16 * 16)
    return min(max(16, 1 << (boxes - 1).bit_length()), most) if compiled else most


@functools.cache
def compiled_advance(n: int, size: int, dtype: torch.dtype, device: torch.device, limit: bool) -> Advance | None:
    """`advance` compiled for chunks of `size` boxes, tried once; None where compilation fails."""
    x = torch.ones(n, size, dtype=dtype, device=device)
    closest, constants = x.new_ones(n // 2, n, size), x.new_ones(len(CONSTANTS))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            step: Advance = compiled(advance)
            step(x, x.clone(), x.clone(), x.clone(), closest, constants, limit)
    except Exception:
        # Compilers fail in many ways, none of which should stop a sweep: the eager path gives the same motion.
        log.info("torch.compile of the integrator failed", exc_info=True)
        return None
    return step


def integrate(
    positions: Tensor, velocities: Tensor, constants: Tensor, steps: int, limit: bool, kernel: Advance | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and velocities `[B, N, 2]` after `steps`, and which pairs overlapped before any of them, `[B, N, N]`.

    A compiled kernel has one fixed size, so its last chunk repeats the last box.
    """
    boxes, n, _ = positions.shape
    step = (kernel if boxes else None) or advance
    size = chunk_size(n, boxes, positions.device, step is not advance)
    first, other = torch.arange(n, device=positions.device), partners(n, positions.device)
    start_state = torch.cat((positions, velocities), -1)
    ends, flags = [], []
    with torch.no_grad():
        for start in range(0, max(boxes, 1), size):
            count = min(size, boxes - start)
            index = torch.arange(start, start + (count if step is advance else size), device=positions.device)
            x, y, u, v = start_state[index.clamp_max(boxes - 1)].permute(2, 1, 0).contiguous().unbind()
            closest = x.new_full((n // 2, n, len(index)), math.inf)
            for _ in range(steps):
                x, y, u, v, closest = step(x, y, u, v, closest, constants, limit)
            ends.append(torch.stack((x, y, u, v), -1).transpose(0, 1)[:count])
            flags.append((closest < constants[0] * constants[0]).permute(2, 0, 1)[:count])
        end, met = torch.cat(ends), torch.cat(flags)
    overlapped = met.new_zeros(boxes, n, n)
    overlapped[:, first, other] = met
    return end[..., :2].contiguous(), end[..., 2:].contiguous(), overlapped | overlapped.mT
