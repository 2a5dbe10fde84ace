"""Losses of known geometry as targets of the sampler, and what they are worth; no code of the estimators in it.

Expectations are of n_beta L under exp(-n_beta L - gamma/2 |w|^2), by quadrature or in closed form; coefficients are
those of n_beta to infinity. Values are written for numpy and torch alike. Axes: C chains, P points, d weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Value = Callable[[Any], Any]  # w [..., d] -> L [...]


def quadratic(*curvatures: float) -> Value:
    """1/2 sum h w^2."""
    return lambda w: sum(0.5 * h * w[..., i] ** 2 for i, h in enumerate(curvatures))


def power(k: float) -> Value:
    """|w|^k, one weight."""
    return lambda w: abs(w[..., 0]) ** k


def crossing(*halves: int) -> Value:
    """prod w_i^(2 k_i), a normal crossing."""
    return lambda w: math.prod(w[..., i] ** (2 * k) for i, k in enumerate(halves))


@dataclass(frozen=True, kw_only=True)
class Product:
    """1/2 |W_L .. W_1 - target|^2 of matrices of widths H_1 .. H_(L+1) and a target of ones on its first `rank` places.

    The loss of a linear network whose inputs are white; for two layers, reduced-rank regression. The point is the
    target's own factors and zeros elsewhere: of all zeros of the loss the most degenerate one.
    """

    widths: tuple[int, ...]
    rank: int

    @property
    def point(self) -> Tensor:
        """All weights `[d]`."""
        layers = []
        for i, o in zip(self.widths[:-1], self.widths[1:], strict=True):
            layer = torch.zeros(o, i, dtype=torch.float64)
            layer[range(self.rank), range(self.rank)] = 1.0
            layers.append(layer.flatten())
        return torch.cat(layers)

    def __call__(self, w: Tensor) -> Tensor:
        """`[..., d]` to `[...]`."""
        product, start = None, 0
        for i, o in zip(self.widths[:-1], self.widths[1:], strict=True):
            layer = w[..., start : start + i * o].unflatten(-1, (o, i))
            product = layer if product is None else layer @ product
            start += i * o
        target = torch.zeros(self.widths[-1], self.widths[0], dtype=w.dtype)
        target[range(self.rank), range(self.rank)] = 1.0
        return 0.5 * (product - target).square().sum((-1, -2))

    @property
    def coefficient(self) -> float:
        """Aoyagi 2024: of a linear network of any depth, over the widths that matter."""
        free = [h - self.rank for h in self.widths]
        for size in range(2, len(free) + 1):
            for some in combinations(range(len(free)), size):
                inside, n = [free[i] for i in some], size - 1
                outside = [free[i] for i in range(len(free)) if i not in some]
                if max(inside) < sum(inside) / n <= min(outside, default=math.inf):
                    break
            else:
                continue
            break
        else:
            inside, n = [0, 0], 1
        rest = sum(inside) - (math.ceil(sum(inside) / n) - 1) * n
        pairs = sum(a * b for a, b in combinations(inside, 2))
        known = self.rank * (self.widths[0] + self.widths[-1]) - self.rank**2
        return known / 2 + rest * (n - rest) / (4 * n) - (n - 1) / (4 * n) * sum(inside) ** 2 + pairs / 2


def reduced_rank_coefficient(M: int, N: int, H: int, r: int) -> float:
    """Aoyagi and Watanabe 2005: M inputs, N outputs, H hidden units, rank r; four cases, the first in two parts."""
    if N + r > H + M:
        return (H * M - H * r + N * r) / 2
    if M + r > H + N:
        return (H * N - H * r + M * r) / 2
    if H + r > M + N:
        return M * N / 2
    value = -((H + r) ** 2) - M**2 - N**2 + 2 * (H + r) * (M + N) + 2 * M * N
    return (value + (M + N + H + r) % 2) / 8


REDUCED_RANK = {"1": (2, 3, 2, 1), "2": (1, 4, 2, 1), "3": (3, 1, 1, 1), "4": (1, 2, 4, 1)}
"""M, N, H, r by the case of Aoyagi and Watanabe that they are."""


def product_of(case: str) -> Product:
    """The reduced-rank regression of a case."""
    M, N, H, r = REDUCED_RANK[case]
    return Product(widths=(M, H, N), rank=r)


def expected_quadratic(curvatures: Array, n_beta: float, gamma: float) -> float:
    """1/2 sum n_beta h / (n_beta h + gamma)."""
    h = n_beta * np.asarray(curvatures, dtype=np.float64)
    return float(0.5 * (h / (h + gamma)).sum())


def expected(value: Value, d: int, n_beta: float, gamma: float, nodes: int = 600, sharp: float = 14.0) -> float:
    """E[n_beta L] of a loss even in each weight: Gauss-Legendre in u on the positive orthant, w ~ sinh(sharp u)."""
    u, weight = np.polynomial.legendre.leggauss(nodes)
    u, weight = 0.5 * (u + 1.0), weight * np.cosh(sharp * 0.5 * (u + 1.0))
    axis = 12.0 / math.sqrt(gamma) * np.sinh(sharp * u) / math.sinh(sharp)
    w = np.stack(np.meshgrid(*[axis] * d, indexing="ij"), axis=-1)
    measure = math.prod(np.meshgrid(*[weight] * d, indexing="ij"))
    loss = n_beta * value(w)
    density = measure * np.exp(-loss - 0.5 * gamma * np.square(w).sum(axis=-1))
    return float((loss * density).sum() / density.sum())


def expected_product(product: Product, n_beta: float, gamma: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """The same of a linear network, and its standard error.

    Given the lower layers the last one is Gaussian: it is integrated out, by rows. The lower ones are drawn from the
    localisation and weighted by what is left.
    """
    M, H, N = product.widths[0], product.widths[-2], product.widths[-1]
    lower, last = product.point[: -H * N], product.point[-H * N :].view(N, H)
    noise = torch.randn(draws, len(lower), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    w, A = lower + noise / math.sqrt(gamma), None
    for i, o in zip(product.widths[:-2], product.widths[1:-1], strict=True):
        layer, w = w[:, : i * o].unflatten(1, (o, i)), w[:, i * o :]
        A = layer if A is None else layer @ A
    target = torch.zeros(N, M, dtype=torch.float64)
    target[range(product.rank), range(product.rank)] = 1.0
    covariance = torch.linalg.inv(n_beta * A @ A.mT + gamma * torch.eye(H, dtype=torch.float64))
    mean = (n_beta * target @ A.mT + gamma * last) @ covariance  # [draws, N, H]
    rest = 0.5 * n_beta * (mean @ A - target).square().sum((1, 2))
    loss = rest + 0.5 * n_beta * N * (A * (covariance @ A)).sum((1, 2))
    log_weight = 0.5 * N * torch.logdet(covariance) - rest - 0.5 * gamma * (mean - last).square().sum((1, 2))
    weight = torch.softmax(log_weight, 0)
    value = (weight * loss).sum()
    return float(value), float((weight * (loss - value)).square().sum().sqrt())


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A target of P points: loss `factor[p] * value(w)`, exact unless it has rows.

    rows: slope `[n, d]` and level `[n]` that example b adds to the loss, slope . w + level, both of mean 0; a draw
    takes `minibatch` of them. paired: whether the centre is looked at on the same minibatch, as it should be.
    """

    value: Value
    points: Tensor  # [P, d]
    factor: Tensor  # [P]
    rows: tuple[Tensor, Tensor] | None = None
    minibatch: int = 1
    paired: bool = True

    @property
    def centre(self) -> dict[str, Tensor]:
        """One tensor, w."""
        return {"w": self.points}

    def gradient(self) -> dict[str, Tensor]:
        """At the points; rows have none in the mean."""
        w = self.points.clone().requires_grad_()
        return {"w": torch.autograd.grad((self.factor * self.value(w)).sum(), w)[0]}

    def at(self, place: Tensor) -> PlacedPlanted:
        """The loss of chains at `place [C]`."""
        return PlacedPlanted(target=self, place=place)


@dataclass(frozen=True, kw_only=True)
class PlacedPlanted:
    """The loss of C chains."""

    target: Planted
    place: Tensor

    def draw(self, streams: Any) -> Tensor | None:
        """Rows `[C, minibatch]`."""
        t = self.target
        return None if t.rows is None else streams.integers(len(t.rows[1]), t.minibatch)

    def loss(self, weights: Any, batch: Tensor | None) -> Tensor:
        """`[C]`."""
        t, w = self.target, weights["w"]
        found = t.factor[self.place] * t.value(w)
        if batch is None:
            return found
        slope, level = t.rows
        return found + (slope[batch].mean(1) * w).sum(1) + level[batch].mean(1)

    def base(self, batch: Tensor | None) -> Tensor:
        """`[C]`."""
        t = self.target
        with torch.no_grad():
            return self.loss({"w": t.points[self.place]}, batch if t.paired else None)


def at_origin(value: Value, d: int, factor: tuple[float, ...] = (1.0,), **more: Any) -> Planted:
    """A loss at the origin, once for each factor."""
    places = torch.zeros(len(factor), d, dtype=torch.float64)
    return Planted(value=value, points=places, factor=torch.tensor(factor, dtype=torch.float64), **more)


def at_point(product: Product) -> Planted:
    """A linear network at its most degenerate point."""
    return Planted(value=product, points=product.point[None], factor=torch.ones(1, dtype=torch.float64))
