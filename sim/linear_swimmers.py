"""Closed forms for swimmers with linear forces: covariance, score, entropy production, and what can be known of scores.

The stationary density is Gaussian and, in each dimension, falls apart into modes of (x, g): the mean over particles,
of stiffness a = A, and N - 1 relative ones of a = A + N K. Arrays over modes `[2, ...]` lead with (mean, relative).
All of the density smoothed by Gaussian noise of standard deviation `noise` on every coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim.swimmers import Swimmers


def stiffness(swimmers: Swimmers) -> Tensor:
    """a by mode `[2]`, float64."""
    trap, spring = swimmers.trap, swimmers.spring
    return torch.tensor([trap, trap + swimmers.n * spring], dtype=torch.float64)


def covariance(swimmers: Swimmers, noise: float = 0.0) -> Tensor:
    """Of (x, g) by mode, `[2, 2, 2]`: the solution of the Lyapunov equation, plus noise^2."""
    a, v0, gamma = stiffness(swimmers), swimmers.speed, swimmers.turning
    cross = v0 / (a + gamma)
    spread = (swimmers.diffusion + v0 * cross) / a
    matrices = torch.stack((spread, cross, cross, torch.ones_like(a)), -1).view(2, 2, 2)
    return matrices + noise**2 * torch.eye(2, dtype=torch.float64)


def by_mode(matrices: Tensor, z: Tensor) -> Tensor:
    """Matrices `[2, o, i]` applied to the modes of `z [..., N, d, i]`: `[..., N, d, o]`."""
    matrices, mean = matrices.to(z), z.mean(-3, keepdim=True)
    result: Tensor = (z - mean) @ matrices[1].T + mean @ matrices[0].T
    return result


def sample(swimmers: Swimmers, normal: Tensor) -> Tensor:
    """Stationary states `[..., N, d, 2]` of (x, g) from standard normal numbers of that shape."""
    return by_mode(torch.linalg.cholesky(covariance(swimmers)), normal)


def score(swimmers: Swimmers, z: Tensor, noise: float = 0.0) -> Tensor:
    """Gradient of the log density at `z [..., N, d, 2]`, of (x, g): the same shape."""
    return by_mode(-torch.linalg.inv(covariance(swimmers, noise)), z)


def entropy_production(swimmers: Swimmers) -> float:
    """Its rate, `d [v0^2 gamma / (eps (A + gamma)) + (N - 1) v0^2 gamma / (eps (A + N K + gamma))]`; eps above 0."""
    gamma, v0, eps = swimmers.turning, swimmers.speed, swimmers.diffusion
    per_mode = v0**2 * gamma / (eps * (stiffness(swimmers) + gamma))
    return swimmers.dimension * float(per_mode[0] + (swimmers.n - 1) * per_mode[1])


def residual(swimmers: Swimmers, noise: float) -> Tensor:
    """Matrices `[2, o, 2]` from (x, g) to score minus shift; o: (x, g), or g alone where eps is 0."""
    eps = swimmers.diffusion
    a, one = stiffness(swimmers), torch.ones(2, dtype=torch.float64)
    rows = (-a / (eps or 1.0), swimmers.speed / (eps or 1.0) * one, 0 * one, -one)
    shift = torch.stack(rows, -1).view(2, 2, 2)
    matrices: Tensor = -torch.linalg.inv(covariance(swimmers, noise)) - shift
    return matrices if eps > 0 else matrices[:, 1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Mean square of the residual, weighted and summed over particles and dimensions: all of it; by own state alone."""

    total: float
    alone: float


def explained(swimmers: Swimmers, noise: float, weights: Tensor) -> Explained:
    """What can be known of the residual; weights `[o]` of its squares, those of entropy production.

    `alone` is the best that a function of a particle's own (x, g) can explain, which is a linear one.
    """
    S, R, W = covariance(swimmers, noise), residual(swimmers, noise), torch.diag(weights.double())
    share = torch.tensor([1.0, swimmers.n - 1.0], dtype=torch.float64)[:, None, None] / swimmers.n
    whole = (share * (R @ S @ R.mT)).sum(0)
    own, cross = (share * S).sum(0), (share * (R @ S)).sum(0)
    count = swimmers.n * swimmers.dimension
    seen = cross @ torch.linalg.inv(own) @ cross.T
    return Explained(total=count * float(torch.trace(W @ whole)), alone=count * float(torch.trace(W @ seen)))
