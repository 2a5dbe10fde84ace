"""Learning the score of active matter in its stationary state, and from it how far it is from equilibrium.

After Boffi and Vanden-Eijnden 2024 (arXiv 2309.12991). State z = (x, g) of `sim.swimmers`; b = v0 g + F is the drift
of positions, s = grad log rho the score. Shift c = (b / eps, -g): the score itself at equilibrium. The network predicts
the residual r = s - c, in units of the entropy production: with weights w = (eps, gamma) the mean of sum_i w r^2 is its
rate sigma. Axes: S members, B examples, N particles, d dimensions, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sim import linear_swimmers
from sim.checks import require, require_number, require_one_of
from sim.generator import Generator
from sim.swimmers import Swimmers
from sim.system import Batch, Floors, Part, Predict, Rows, exclude_self

__all__ = ["ActiveMatter", "Swimmers"]

Relation = Literal["contact", "others"]

WAVES = (8.0, 16.0, 32.0)
"""Lengths, in radii, of the waves that tell positions in a periodic box; as near as whole numbers in a side allow."""
FORCES_AT_ONCE = 1 << 20  # pairs
LEAST_RATE = 1e-3
"""Of entropy production, in units of that of free particles: below it residuals are not made larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveMatter:
    """The task: from positions and orientations with a little noise, the score of their density, by denoising.

    Inputs: x over the spread of a free particle, or waves of it in a periodic box; g. Outputs: the residual of the
    score by x and by g (by g alone where eps is 0, as x then has no noise of its own). Examples 2 j and 2 j + 1 see the
    same row with opposite noise, so that what the noise adds to the loss cancels between them. Rows are float32.
    """

    swimmers: Swimmers = field(default_factory=Swimmers)
    """The particles and their forces."""
    noise: float = 0.05
    """Standard deviation of the noise on every coordinate that the network is trained at."""
    relax: float = 60.0
    """How long a trajectory runs before its first row (time). Linear systems are sampled without one."""
    spacing: float = 5.0
    """Between rows of one trajectory (time)."""
    rows_per_trajectory: int = 64
    """Rows of one trajectory; the probe set takes one of each."""
    relation: Relation = "contact"
    """The relation that a sweep is judged by; `others` for linear systems only."""
    results_version: ClassVar[int] = 1
    """Raised when a fix changes numbers."""

    def __post_init__(self) -> None:
        require(isinstance(self.swimmers, Swimmers), "swimmers", self.swimmers, "a Swimmers")
        for name in ("noise", "relax", "spacing"):
            require_number(name, getattr(self, name))
        for name in ("noise", "spacing"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.relax >= 0, "relax", self.relax, "0 or above")
        require(self.rows_per_trajectory >= 1, "rows_per_trajectory", self.rows_per_trajectory, "at least 1")
        require_one_of("relation", self.relation, ("contact", "others") if self.swimmers.linear else ("contact",))

    @property
    def d_in(self) -> int:
        """Position, or two numbers a wave of it, and orientation."""
        d = self.swimmers.dimension
        return d + d * (1 if self.swimmers.side is None else 2 * len(WAVES))

    @property
    def d_out(self) -> int:
        """Score by position and orientation, or by orientation alone."""
        return self.swimmers.dimension * len(self.weights)

    @property
    def weights(self) -> tuple[float, ...]:
        """w of the squares that make up the entropy production: (eps, gamma), or gamma alone where eps is 0."""
        eps, gamma = self.swimmers.diffusion, self.swimmers.turning
        return (eps, gamma) if eps > 0 else (gamma,)

    # --- rows

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        """`n` shuffled rows of the stationary state: x, g `[n, N, d]`; parts have trajectories of their own."""
        require(n >= 1, "n", n, "at least 1")
        stream, swimmers = generator.fold(part), self.swimmers
        if swimmers.linear:
            normal = stream.normal(n, swimmers.n, swimmers.dimension, 2, dtype=torch.float64)
            x, g = linear_swimmers.sample(swimmers, normal).float().unbind(-1)
            return Rows(columns={"x": x, "g": g})
        each = 1 if part == "probe" else self.rows_per_trajectory
        states = self._trajectories(math.ceil(n / each), min(n, each), stream)
        order = stream.fold("order").permutation(len(states[0]))[:n]
        return Rows(columns={"x": states[0][order], "g": states[1][order]})

    def _trajectories(self, count: int, each: int, stream: Generator) -> tuple[Tensor, Tensor]:
        """Positions and orientations `[count * each, N, d]`."""
        relax, every = (max(1, round(time / self.swimmers.time_step)) for time in (self.relax, self.spacing))
        start = self.swimmers.start(count, stream)
        motion = self.swimmers.simulate(*start, stream.fold("motion"), relax if self.relax > 0 else 0, every)
        states = [next(motion) for _ in range(each)]
        x, g = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*states, strict=True))
        return x, g

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        """rate: what the mean of sum_i w r^2 comes to, `[]`. Exact for linear systems, else by `entropy_production`."""
        x = rows.columns["x"]
        if self.swimmers.linear:
            rate = self._explained().total
        else:
            rate = float(self.entropy_production(x, rows.columns["g"]).double().mean())
        return {"rate": x.new_tensor(max(rate, LEAST_RATE * self._free_rate()))}

    def _free_rate(self) -> float:
        """Of particles that neither interact nor are held; 1 where nothing moves by itself."""
        eps, gamma, v0 = self.swimmers.diffusion, self.swimmers.turning, self.swimmers.speed
        return (v0**2 / eps if eps > 0 else gamma) * self.swimmers.n * self.swimmers.dimension or 1.0

    def entropy_production(self, x: Tensor, g: Tensor) -> Tensor:
        """Of each state `[B, N, d]`, what averages to the rate sigma without any score: `[B]`.

        `(v0 / eps) (v0 N d + sum_i g_i F_i)`; where eps is 0, `-div F`, which averages to `|v_g|^2 / gamma`.
        """
        swimmers, found = self.swimmers, []
        n, d, v0 = swimmers.n, swimmers.dimension, swimmers.speed
        size = max(1, FORCES_AT_ONCE // (n * n))
        for start in range(0, len(x), size):
            some, turned = x[start : start + size], g[start : start + size]
            keys = swimmers.neighbours(some)
            if swimmers.diffusion > 0:
                along = (turned * swimmers.force(some, keys)).sum((-1, -2))
                found.append(v0 / swimmers.diffusion * (v0 * n * d + along))
            else:
                found.append(-swimmers.divergence(some, keys))
        return torch.cat(found)

    # --- batches

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        """Rows with noise and its negative by turns. Geometry: the positions with it, as the network sees them:
        neighbours by those without would tell it of the noise, which it is to guess."""
        x, g = (_in_pairs(rows.columns[name]) for name in ("x", "g"))
        lead = generator.key.dim()  # one stream per member where rows lead with S
        *members, examples, n, d = x.shape
        half = generator.normal(*members[lead:], -(-examples // 2), n, 2 * d, dtype=x.dtype)
        noise = torch.stack((half, -half), -3).flatten(-4, -3)[..., :examples, :, :]
        push, turn = (self.noise * noise).chunk(2, -1)
        batch = self._batch(x + push, g + turn)
        wanted = -torch.cat((push, turn), -1)[..., -self.d_out :] / self.noise**2 - self.shift(x + push, g + turn)
        return replace(batch, targets=wanted / self._unit(rows, x))

    def _batch(self, x: Tensor, g: Tensor) -> Batch:
        """A state to predict of, without targets."""
        inputs = torch.cat((self._waves(x), g), -1)
        return Batch(inputs=inputs, targets=x.new_zeros(*x.shape[:-1], self.d_out), geometry={"positions": x})

    def _waves(self, x: Tensor) -> Tensor:
        side = self.swimmers.side
        if side is None:
            return x / self.swimmers.free_spread
        periods = [max(1, round(side / (wave * self.swimmers.radius))) for wave in WAVES]
        phases = torch.cat([x * (2 * math.pi * count / side) for count in periods], -1)
        return torch.cat((phases.cos(), phases.sin()), -1)

    def shift(self, x: Tensor, g: Tensor) -> Tensor:
        """c `[..., N, d_out]`: the score of particles of these velocities that were at equilibrium."""
        if self.swimmers.diffusion == 0:
            return -g
        drift = self.swimmers.speed * g + self.swimmers.force(x, self.swimmers.neighbours(x))
        return torch.cat((drift / self.swimmers.diffusion, -g), -1)

    def _unit(self, rows: Rows, like: Tensor) -> Tensor:
        """What a prediction of 1 stands for, `[d_out]`: predictions of the true residual have mean square 1."""
        d = self.swimmers.dimension
        per_output = (rows.statistics["rate"] / (self.swimmers.n * self.d_out)).sqrt().to(like)
        return torch.cat([per_output.expand(d) / math.sqrt(weight) for weight in self.weights])

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        """contact: r < 2 r0. For linear systems others: all but the particle itself; what these need is the mean over
        particles, and a head that gives it is as far from uniform as (1 - entropy) log N says, in nats."""
        r = self.distance(geometry, keys)
        named = {"contact": exclude_self(r < 2 * self.swimmers.radius, keys)}
        if self.swimmers.linear:
            named["others"] = exclude_self(torch.ones_like(r, dtype=torch.bool), keys)
        return named

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> Tensor:
        """Between particles, to the nearest image: `[..., N, K]`."""
        return self.swimmers.distance(geometry["positions"], keys)

    # --- loss

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Denoising score matching, `[..., B]`: mean over particles and outputs of p^2 - 2 p y + 1.

        Its mean over rows and noise is 1 where nothing is predicted and about 0 at the true residual (by definition of
        the unit; exactly for linear systems). That of one example is not: look at pairs 2 j, 2 j + 1.
        """
        term = (prediction.square() - 2 * prediction * batch.targets + 1).mean(-1)
        if batch.mask is None:
            return term.mean(-1)
        return (term * batch.mask).sum(-1) / batch.mask.sum(-1).clamp_min(1)

    def _explained(self) -> linear_swimmers.Explained:
        return linear_swimmers.explained(self.swimmers, self.noise, torch.tensor(self.weights))

    def floors(self) -> Floors:
        """The equilibrium score has loss 1. For linear systems the other two are closed forms."""
        if not self.swimmers.linear:
            return Floors(trivial=1.0)
        known, rate = self._explained(), LEAST_RATE * self._free_rate()
        unit = max(known.total, rate)
        alone, total = (1.0 - value / unit for value in (known.alone, known.total))
        return Floors(trivial=1.0, without_attention=max(alone, 0.0), optimum=max(total, 0.0))

    # --- what follows from a score

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        """Figures at rows without noise, `[...]` per member. v: flow of probability, (b - eps s_x, -gamma (g + s_g)).

        entropy_production: rate sigma = <|v_x|^2 / eps + |v_g|^2 / gamma>, without its first part where eps is 0; of it
        `_turning`, the part of g, and per particle `_contact`, of those that touch another, and `_free` (NaN where
        there are none); `_expected`: sigma by `entropy_production` of these rows. current_position, current_turning:
        root mean square of a component of v. score_error: relative root mean square error, for linear systems.
        What is 0 in a stationary state, over sigma: balance_flow <div v>, balance_drift <v.s>, balance_force
        <eps |s_x|^2 + gamma |s_g|^2> - gamma N d + <div F>; over <|s|^2>: balance_score <|s|^2 + div s>. Divergences
        are differences along one random direction a row. Where eps is 0, s_x is not known: v.s and |s|^2 are of g.
        """
        with torch.no_grad():
            x, g = rows.columns["x"], rows.columns["g"]
            here, keys = self._flow(predict, rows, x, g), self.swimmers.neighbours(x)
            produced = (here.weights * here.residual.square()).sum(-1)  # [..., B, N]
            turning = here.weights[-1] * here.residual[..., -self.swimmers.dimension :].square().sum(-1)
            touching = self.relations({"positions": x}, keys)["contact"].any(-1)
            expected = self.entropy_production(x, g).double().mean()
            rate = _mean(produced.sum(-1))
            figures = {
                "entropy_production": rate,
                "entropy_production_turning": _mean(turning.sum(-1)),
                "entropy_production_contact": torch.where(touching, produced, 0).double().sum((-1, -2))
                / touching.sum(),
                "entropy_production_free": torch.where(touching, 0, produced).double().sum((-1, -2))
                / (~touching).sum(),
                "entropy_production_expected": expected.expand_as(rate),
                "current_position": self._current(here, x, g, keys).expand_as(rate),
                "current_turning": _mean(turning.mean(-1) * self.swimmers.turning / self.swimmers.dimension).sqrt(),
            }
            if self.swimmers.linear:
                true = linear_swimmers.score(self.swimmers, torch.stack((x, g), -1)).unbind(-1)
                wanted = torch.cat(true, -1)[..., -self.d_out :]
                error = _mean((here.score - wanted).square().mean((-1, -2))) / wanted.square().double().mean()
                figures["score_error"] = error.sqrt()
            scale = expected.clamp_min(LEAST_RATE * self._free_rate())
            return figures | self._balances(predict, rows, generator, here, scale)

    def _current(self, here: _Flow, x: Tensor, g: Tensor, keys: Tensor | None) -> Tensor:
        """Root mean square of a component of v_x: of the drift itself where eps is 0."""
        flow = here.flow[..., : self.swimmers.dimension]
        if self.swimmers.diffusion == 0:
            flow = self.swimmers.speed * g + self.swimmers.force(x, keys)
        return _mean(flow.square().mean((-1, -2))).sqrt()

    def _flow(self, predict: Predict, rows: Rows, x: Tensor, g: Tensor) -> _Flow:
        residual = predict(self._batch(x, g)) * self._unit(rows, x)
        weights = x.new_tensor(self.weights).repeat_interleave(self.swimmers.dimension)
        return _Flow(residual=residual, score=residual + self.shift(x, g), flow=-weights * residual, weights=weights)

    def _balances(
        self, predict: Predict, rows: Rows, generator: Generator, here: _Flow, rate: Tensor
    ) -> dict[str, Tensor]:
        """What is 0 in a stationary state; rate: the unit of the first three."""
        x, g = rows.columns["x"], rows.columns["g"]
        swimmers, d = self.swimmers, self.swimmers.dimension
        along = generator.normal(*x.shape[:-1], self.d_out, dtype=x.dtype)
        step = torch.cat((torch.zeros_like(x), along), -1)[..., -2 * d :] * self.noise
        ahead, behind = (
            self._flow(predict, rows, x + sign * step[..., :d], g + sign * step[..., d:]) for sign in (1, -1)
        )

        def divergence(after: Tensor, before: Tensor) -> Tensor:
            return _mean(((after - before) * along).sum((-1, -2))) / (2 * self.noise)

        forces = swimmers.divergence(x, swimmers.neighbours(x)).double().mean()
        unseen = forces if swimmers.diffusion == 0 else 0 * forces  # by x, of the drift
        squares = _mean(here.score.square().sum((-1, -2)))
        weighted = _mean((here.weights * here.score.square()).sum((-1, -2)))
        balances = {
            "balance_flow": (divergence(ahead.flow, behind.flow) + unseen) / rate,
            "balance_drift": (_mean((here.flow * here.score).sum((-1, -2))) - unseen) / rate,
            "balance_force": (weighted - swimmers.turning * swimmers.n * d + forces) / rate,
        }
        return balances | {"balance_score": 1 + divergence(ahead.score, behind.score) / squares}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flow:
    """What a network says of states: residual, score, flow of probability `[..., B, N, d_out]`; weights `[d_out]`."""

    residual: Tensor
    score: Tensor
    flow: Tensor
    weights: Tensor


def _mean(values: Tensor) -> Tensor:
    """Over examples, in float64: `[...]` of `[..., B]`."""
    return values.double().mean(-1)


def _in_pairs(states: Tensor) -> Tensor:
    """States `[..., B, N, d]` with every odd example replaced by the one before."""
    return states[..., ::2, :, :].repeat_interleave(2, dim=-3)[..., : states.shape[-3], :, :]
