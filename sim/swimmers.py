"""Self-propelled particles whose orientations are Ornstein-Uhlenbeck processes: forces, and motion in time.

    dx_i = (v0 g_i + F_i) dt + sqrt(2 eps) dW_i,    dg_i = -gamma g_i dt + sqrt(2 gamma) dW'_i

as in Boffi and Vanden-Eijnden 2024 (arXiv 2309.12991). Axes: N particles, d dimensions, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from sim.checks import require, require_number
from sim.generator import Generator
from sim.neighbours import nearest_keys
from sim.system import gather_keys

ALL_PAIRS = 256  # particles up to which every pair is looked at; beyond, lists of neighbours
CROWD = 64  # neighbours in a list
SKIN = 1.0  # by which lists reach farther than the force, in radii: they hold until particles have moved half of it
FADED = 14.0  # a soft contact is over where its exponential is below e^-14
AT_ONCE = 64  # steps whose random numbers are drawn together


@dataclass(frozen=True, kw_only=True, slots=True)
class Swimmers:
    """The particles and their forces: a trap -A x and springs -K (x_i - x_j) between all pairs in open space, or a
    periodic box; soft repulsion k f(r), f = ln(1 + exp(b (2 r0 - r))) / b, in either."""

    n: int = 8
    """N, number of particles."""
    dimension: int = 2
    """d, of space."""
    speed: float = 1.0
    """v0, of propulsion; a component of the orientation has variance 1."""
    turning: float = 0.5
    """gamma, rate at which orientations are forgotten (1 / time)."""
    diffusion: float = 0.2
    """eps, of positions (length^2 / time); 0: they move by their velocities alone."""
    trap: float = 0.5
    """A, stiffness of the trap around the origin; 0 in a box."""
    spring: float = 0.1
    """K, stiffness of the spring between any two; 0 in a box."""
    repulsion: float = 0.0
    """k, stiffness of soft contacts."""
    radius: float = 1.0
    """r0: particles repel each other within 2 r0."""
    sharpness: float | None = 7.5
    """b, of the onset of repulsion (1 / length); None: a spring that is cut off, (2 r0 - r)+."""
    packing: float | None = None
    """Share of a periodic box that particles of radius r0 would fill, which sets its side. None: open space."""
    time_step: float = 0.005
    """Of the integration."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if (value := getattr(self, item.name)) is not None:
                require_number(item.name, value)
        for name in ("n", "dimension"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("speed", "diffusion", "trap", "spring", "repulsion"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        for name in ("turning", "radius", "time_step"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.speed > 0 or self.diffusion > 0, "diffusion", self.diffusion, "above 0 where speed is 0")
        require(self.sharpness is None or self.sharpness > 0, "sharpness", self.sharpness, "above 0, or None")
        require(self.packing is None or self.packing > 0, "packing", self.packing, "above 0, or None")
        if self.packing is None:
            require(self.trap > 0, "trap", self.trap, "above 0 in open space (packing None), or they disperse")
        for name in ("trap", "spring"):
            bound = self.packing is None or getattr(self, name) == 0
            require(bound, name, getattr(self, name), f"0 in a periodic box (packing {self.packing})")

    @property
    def linear(self) -> bool:
        """Whether all forces are linear, so that the stationary density is Gaussian."""
        return self.packing is None and self.repulsion == 0

    @property
    def side(self) -> float | None:
        """Of the periodic box (length); None in open space."""
        if self.packing is None:
            return None
        ball = math.pi ** (self.dimension / 2) / math.gamma(self.dimension / 2 + 1) * self.radius**self.dimension
        return float((self.n * ball / self.packing) ** (1 / self.dimension))

    @property
    def reach(self) -> float:
        """Distance at which the repulsion is over."""
        return 2 * self.radius + (0.0 if self.sharpness is None else FADED / self.sharpness)

    def apart(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """`x_i - x_j` to the nearest image of each key, `[..., N, K, d]`."""
        difference = x.unsqueeze(-2) - gather_keys(x, keys)
        return difference if self.side is None else difference - self.side * (difference / self.side).round()

    def distance(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """`[..., N, K]`."""
        return self.apart(x, keys).square().sum(-1).sqrt()

    def neighbours(self, x: Tensor) -> Tensor | None:
        """Keys of all that may touch each particle, and more; None: all."""
        if self.n <= ALL_PAIRS or self.repulsion == 0:
            return None
        return nearest_keys(lambda keys: self.distance(x, keys), x.shape[:-2], x[..., 0], min(CROWD, self.n))

    def force(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """F of positions `[..., N, d]`; keys: whom to look at for contacts (None: all)."""
        total = -self.trap * x
        if self.spring > 0:
            total = total - self.spring * (self.n * x - x.sum(-2, keepdim=True))
        if self.repulsion > 0:
            apart = self.apart(x, keys)
            r = apart.square().sum(-1).sqrt()
            total = total + (apart * (self._push(r) / r.clamp_min(1e-12)).unsqueeze(-1)).sum(-2)
        return total

    def divergence(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Sum over particles of the divergence of F by their own position: `[...]`."""
        own = self.trap + self.spring * (self.n - 1)
        total = torch.full(x.shape[:-2], -own * self.n * self.dimension, dtype=x.dtype, device=x.device)
        if self.repulsion > 0:
            r = self.distance(x, keys)
            other = r > 0
            fall = (self.dimension - 1) * self._push(r) / r.clamp_min(1e-12) - self._slope(r)
            total = total + torch.where(other, fall, 0.0).sum((-1, -2))
        return total

    def _push(self, r: Tensor) -> Tensor:
        """k f(r)."""
        if self.sharpness is None:
            return self.repulsion * (2 * self.radius - r).clamp_min(0)
        return self.repulsion * F.softplus(2 * self.radius - r, beta=self.sharpness, threshold=FADED)

    def _slope(self, r: Tensor) -> Tensor:
        """-k f'(r)."""
        if self.sharpness is None:
            return self.repulsion * (r < 2 * self.radius).to(r.dtype)
        return self.repulsion * torch.sigmoid(self.sharpness * (2 * self.radius - r))

    @property
    def free_spread(self) -> float:
        """Standard deviation of a coordinate of a particle alone in the trap (length)."""
        return math.sqrt((self.diffusion + self.speed**2 / (self.trap + self.turning)) / self.trap)

    def start(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Positions and orientations `[count, N, d]` to relax from: as if there were no interaction."""
        shape = (count, self.n, self.dimension)
        g = generator.fold("orientations").normal(*shape)
        if self.side is not None:
            return self.side * generator.fold("positions").uniform(*shape), g
        return self.free_spread * generator.fold("positions").normal(*shape), g

    @torch.no_grad()
    def simulate(
        self, x: Tensor, g: Tensor, generator: Generator, relax: int, every: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """States `[B, N, d]` after `relax` steps, then every so many, without end.

        Euler-Maruyama steps of positions; orientations take exact steps of their process. `generator`: one stream.
        ValueError where more than `CROWD` particles may touch one.
        """
        dt, decay = self.time_step, math.exp(-self.turning * self.time_step)
        kick, shake = math.sqrt(1 - decay * decay), math.sqrt(2 * self.diffusion * dt)
        lists = _Lists(self)
        stop = relax
        for step in range(1 << 62):
            if step == stop:
                yield x, g
                stop += every
            if step % AT_ONCE == 0:
                noise = generator.fold(step).normal(AT_ONCE, *x.shape[:-1], 2 * self.dimension, dtype=x.dtype)
            push, turn = noise[step % AT_ONCE].chunk(2, -1)
            x = x + dt * (self.speed * g + self.force(x, lists.at(x))) + shake * push
            g = decay * g + kick * turn
            if self.side is not None:
                x = x - self.side * (x / self.side).floor()


class _Lists:
    """Lists of neighbours of moving particles, made anew before any pair that is in none can touch."""

    def __init__(self, swimmers: Swimmers) -> None:
        self.swimmers = swimmers
        self.keys: Tensor | None = None
        self.made_at: Tensor | None = None

    def at(self, x: Tensor) -> Tensor | None:
        """The keys for positions `[B, N, d]`."""
        swimmers = self.swimmers
        if swimmers.n <= ALL_PAIRS or swimmers.repulsion == 0:
            return None
        skin = SKIN * swimmers.radius
        if self.made_at is not None:
            moved = x - self.made_at
            moved = moved if swimmers.side is None else moved - swimmers.side * (moved / swimmers.side).round()
            if float(moved.square().sum(-1).max()) < (skin / 2) ** 2:
                return self.keys
        self.keys, self.made_at = swimmers.neighbours(x), x
        assert self.keys is not None
        farthest = float(swimmers.distance(x, self.keys[..., -1:]).min())
        if self.keys.shape[-1] < swimmers.n and farthest < swimmers.reach + skin:
            limit = f"smaller, or particles fewer: more than {CROWD} of them are near one"
            require(False, "swimmers.radius", swimmers.radius, limit)
        return self.keys
