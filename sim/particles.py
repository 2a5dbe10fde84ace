"""The task of predicting how discs in a box move, as a system of tokens that interact where they collide.

Axes: S members, B boxes, N discs, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sim.box import Motion, ParticleBox
from sim.checks import require, require_number
from sim.generator import Generator
from sim.system import Batch, Floors, Part, Predict, Rows, exclude_self, gather_keys, gather_pairs, mean_square_loss

__all__ = ["Motion", "ParticleBox", "ParticleSystem"]

Relation = Literal["near", "collision"]

FULLEST = 0.4
"""Largest share of the box that discs may fill: random sequential placement jams at 0.547."""
CANDIDATES, PLACEMENTS, PLACED_AT_ONCE = 32, 100, 4096
"""Candidate places per disc, attempts per box, boxes at once."""
ROLLOUT_BOXES, ROLLOUT_HORIZONS = 32, (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParticleSystem:
    """The task: from (x, y, vx, vy) of every disc, the change of these over `horizon`; both standardised.

    A trajectory starts with discs that do not overlap, placed one after the other, and Gaussian velocities; it gives a
    row every `horizon` until `restart`, before the damped system falls quiet. Rows are float32.
    """

    box: ParticleBox = field(default_factory=ParticleBox)
    """The discs, their contacts and the walls."""
    horizon: float = 0.1
    """How far ahead the change is asked for (time)."""
    speed: float = 0.7
    """Standard deviation of each component of the velocity at the start."""
    restart: float = 0.8
    """Length of a trajectory (time); it gives restart / horizon rows."""
    margin: float = 0.06
    """Gap between surfaces up to which discs count as `near` (length)."""
    relation: Relation = "collision"
    """The relation that a sweep is judged by."""

    def __post_init__(self) -> None:
        require(isinstance(self.box, ParticleBox), "box", self.box, "a ParticleBox")
        for name in ("horizon", "speed", "restart", "margin"):
            require_number(name, getattr(self, name))
        require(self.horizon > 0, "horizon", self.horizon, "above 0")
        require(self.speed > 0, "speed", self.speed, "above 0")
        longest = self.restart * (1 + 1e-9)
        require(longest >= self.horizon, "restart", self.restart, f"at least the horizon {self.horizon:g}")
        require(self.margin >= 0, "margin", self.margin, "0 or above")
        require(self.relation in {"near", "collision"}, "relation", self.relation, "'near' or 'collision'")
        box = self.box
        filled = box.n * math.pi * box.radius**2 / (box.width * box.height)
        limit = f"so few that they fill at most {FULLEST:g} of the box (they fill {filled:.2f})"
        require(filled <= FULLEST, "box.n", box.n, limit)

    @property
    def d_in(self) -> int:
        """Position and velocity."""
        return 4

    @property
    def d_out(self) -> int:
        """Their changes."""
        return 4

    @property
    def rows_per_trajectory(self) -> int:
        """Whole horizons before the restart."""
        return math.floor(self.restart / self.horizon + 1e-9)

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        """`n` shuffled rows: state, change `[n, N, 4]`; overlapped bool `[n, N, N]` for validation and probe; for
        validation also future `[n, horizons, N, 2]`, the positions after `ROLLOUT_HORIZONS`.

        A trajectory gives up to `rows_per_trajectory` of them, but only one for the probe, whose rows are compared as
        independent; parts draw their trajectories from streams of their own.
        """
        require(n >= 1, "n", n, "at least 1")
        stream, length = generator.fold(part), self.rows_per_trajectory
        trajectories = n if part == "probe" else math.ceil(n / length)
        later = max(ROLLOUT_HORIZONS) - 1 if part == "validation" else 0
        along, overlapped = self._trajectories(trajectories, length + later, stream)
        columns = {"state": along[:, :length], "change": along.diff(dim=1)[:, :length]}
        if part != "train":  # every training step would gather it for nothing
            columns["overlapped"] = overlapped[:, :length]
        if part == "validation":
            columns["future"] = torch.stack([along[:, h : h + length, :, :2] for h in ROLLOUT_HORIZONS], 2)
        order = stream.fold("order").permutation(trajectories * length)[:n]
        if part == "probe":
            order = torch.arange(n, device=order.device) * length + stream.fold("time").integers(length, n)
        return Rows(columns={name: value.flatten(0, 1)[order] for name, value in columns.items()})

    def _trajectories(self, count: int, horizons: int, stream: Generator) -> tuple[Tensor, Tensor]:
        """States `[count, horizons + 1, N, 4]` from fresh starts; which pairs overlap, `[count, horizons, N, N]`."""
        start = self._place(stream.fold("positions"), count)
        speed = self.speed * stream.fold("velocities").normal(count, self.box.n, 2)
        states, overlapped = [torch.cat((start, speed), -1)], []
        work = horizons * self.box.steps(self.horizon)[0] * count * self.box.n
        compiled = self.box.compiles_for(work, start)
        for _ in range(horizons):
            motion = self.box.simulate(states[-1][..., :2], states[-1][..., 2:], self.horizon, compiled=compiled)
            states.append(torch.cat((motion.positions, motion.velocities), -1))
            overlapped.append(motion.overlapped)
        return torch.stack(states, 1), torch.stack(overlapped, 1)

    def _place(self, generator: Generator, boxes: int) -> Tensor:
        """Positions without overlap, `[boxes, N, 2]`; each box has its own stream and starts anew where it jams."""
        device = generator.key.device
        placed = torch.empty(boxes, self.box.n, 2, device=device)
        for begin in range(0, boxes, PLACED_AT_ONCE):
            left = torch.arange(begin, min(begin + PLACED_AT_ONCE, boxes), device=device)
            for attempt in range(PLACEMENTS):
                placed[left], jammed = self._try_to_place(generator.fold(left).fold(attempt))
                left = left[jammed]
                if not len(left):
                    break
            else:
                limit = f"few or small enough to place at random ({len(left)} boxes jammed {PLACEMENTS} times)"
                require(False, "box.n", self.box.n, limit)
        return placed

    def _try_to_place(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """One disc after the other, each at its first free candidate: positions `[b, N, 2]` and jammed `[b]`."""
        box = self.box
        span = torch.tensor([box.width, box.height], device=generator.key.device) - 2 * box.radius
        placed = torch.empty(len(generator.key), 0, 2, device=generator.key.device)
        jammed = torch.zeros_like(generator.key, dtype=torch.bool)
        for i in range(box.n):
            candidates = box.radius + span * generator.fold(i).uniform(CANDIDATES, 2)
            apart = (candidates.unsqueeze(-2) - placed.unsqueeze(-3)).square().sum(-1)  # [b, candidates, i]
            free = (apart > (2 * box.radius) ** 2).all(-1)
            first = free.to(torch.uint8).argmax(-1)
            jammed |= ~free.any(-1)
            chosen = candidates[torch.arange(len(first), device=first.device), first]
            placed = torch.cat((placed, chosen.unsqueeze(1)), 1)
        return placed, jammed

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        """Mean and standard deviation of each feature of state and change, `[4]` each."""
        figures = {}
        for name in ("state", "change"):
            values = rows.columns[name].flatten(0, -2).double()
            figures[f"{name}_mean"] = values.mean(0).to(rows.columns[name])
            figures[f"{name}_deviation"] = values.std(0, correction=0).to(rows.columns[name])
        return figures

    def _batch(self, state: Tensor, change: Tensor, rows: Rows) -> Batch:
        figures = rows.statistics
        geometry = {"positions": state[..., :2]}
        if "overlapped" in rows.columns:
            geometry["overlapped"] = rows.columns["overlapped"]
        return Batch(
            inputs=(state - figures["state_mean"]) / figures["state_deviation"],
            targets=(change - figures["change_mean"]) / figures["change_deviation"],
            geometry=geometry,
        )

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        """The rows standardised; nothing is random. Geometry: positions, and overlapped where rows have it."""
        return self._batch(rows.columns["state"], rows.columns["change"], rows)

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        """near: centres closer than 2R + margin at the start; collision: overlapped at some time within the horizon."""
        near = self.distance(geometry, keys) < 2 * self.box.radius + self.margin
        return {"near": exclude_self(near, keys), "collision": gather_pairs(geometry["overlapped"], keys)}

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> Tensor:
        """Between centres at the start, `[..., N, K]`."""
        positions = geometry["positions"]
        return (positions.unsqueeze(-2) - gather_keys(positions, keys)).square().sum(-1).sqrt()

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of the standardised change, `[..., B]`."""
        return mean_square_loss(prediction, batch)

    def floors(self) -> Floors:
        """The mean change has loss 1 on the train rows, by standardisation; the other two are not known."""
        return Floors(trivial=1.0)

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        """Errors in physical terms, `[...]` per member; of validation rows.

        loss_colliding, loss_free: loss over discs that overlap / do not overlap another disc within the horizon (NaN
        where there are none); energy_error: rms error of a box's energy after one horizon over its mean kinetic energy;
        rollout_position_error_h: rms distance from the true position after h horizons, predictions fed back, over the
        box width, of the first `ROLLOUT_BOXES` rows.
        """
        with torch.no_grad():
            batch, figures = self.draw(rows, generator), rows.statistics
            prediction = predict(batch)
            change = prediction * figures["change_deviation"] + figures["change_mean"]
            errors = self._split_loss(prediction, batch) | self._energy_error(change, rows)
            return errors | self._rollout_errors(predict, rows.take(slice(ROLLOUT_BOXES)))

    def _split_loss(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        error = (prediction - batch.targets).square().mean(-1)  # [..., B, N]
        colliding = batch.geometry["overlapped"].any(-1)
        split = {"loss_colliding": colliding, "loss_free": ~colliding}
        return {name: torch.where(which, error, 0).sum((-1, -2)) / which.sum() for name, which in split.items()}

    def _energy_error(self, change: Tensor, rows: Rows) -> dict[str, Tensor]:
        state = rows.columns["state"]
        after, true = state + change, state + rows.columns["change"]
        error = self.box.energy(after[..., :2], after[..., 2:]) - self.box.energy(true[..., :2], true[..., 2:])
        kinetic = 0.5 * self.box.mass * true[..., 2:].square().sum((-1, -2)).mean()
        return {"energy_error": error.square().mean(-1).sqrt() / kinetic}

    def _rollout_errors(self, predict: Predict, rows: Rows) -> dict[str, Tensor]:
        figures, state = rows.statistics, rows.columns["state"]
        errors = {}
        for horizon in range(1, max(ROLLOUT_HORIZONS) + 1):
            batch = self._batch(state, torch.zeros_like(state), Rows(columns={}, statistics=figures))
            state = state + predict(batch) * figures["change_deviation"] + figures["change_mean"]
            if horizon in ROLLOUT_HORIZONS:
                true = rows.columns["future"][:, ROLLOUT_HORIZONS.index(horizon)]
                off = (state[..., :2] - true).square().sum(-1).mean((-1, -2)).sqrt()
                errors[f"rollout_position_error_{horizon}"] = off / self.box.width
        return errors
