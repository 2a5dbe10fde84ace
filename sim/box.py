"""Discs in a box: damped springs at contact, gravity, walls.

Contact of overlap d = 2R - r > 0, unit normal n from j to i, normal velocity v_n = (v_i - v_j).n:
force on i `(k d - c v_n) n`; a wall is an immovable partner, d = R - (distance of the centre from the wall).
This is the linear spring and dashpot of Cundall and Strack 1979 (doi:10.1680/geot.1979.29.1.47): contact time and
restitution do not depend on the impact speed. Any consistent units.

Axes: B boxes, N discs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sim.checks import require, require_number
from sim.compiling import can_compile
from sim.integrator import Advance, chunk_size, compiled_advance, integrate

STEPS_PER_CONTACT = 40
COMPILE_ABOVE = 1_000_000_000
"""Looks at a pair from which compiling pays: 10 s of eager integration on one core, against 2 s of compiled integration
and 3-4 s for the kernel, 12 s for a process's first (`tests/bench/results/simulation-cpu.md`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Where discs are after a time, and whom they touched.

    positions, velocities `[B, N, 2]` at the end; overlapped bool `[B, N, N]`: pairs that overlapped at the beginning of
    at least one time step, which is when forces act; the diagonal is False.
    """

    positions: Tensor
    velocities: Tensor
    overlapped: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ParticleBox:
    """`n` equal discs in the box [0, width] x [0, height] under gravity along -y.

    The damping c follows from stiffness k and restitution e of a *pair* (m_eff = m/2) whose contact ends at zero
    overlap: w0^2 = k/m_eff, gamma = c/(2 m_eff), w^2 = w0^2 - gamma^2, e = exp(-pi gamma/w), contact time pi/w. A wall
    (m_eff = m) has the same k and c, hence a longer contact and a restitution nearer 1. With `limit_damping` the force
    never pulls: discs leave at zero force, before zero overlap, faster than `restitution` says.
    """

    n: int = 16
    """Discs in one box."""
    radius: float = 0.06
    """Radius R of a disc (length)."""
    mass: float = 1.0
    """Mass m of a disc."""
    stiffness: float = 4000.0
    """Spring constant k of a contact (force per overlap)."""
    restitution: float = 0.8
    """Speed after over speed before a pair contact, e; 1 has no damping."""
    gravity: float = 1.0
    """Acceleration g along -y."""
    width: float = 1.0
    """W, between the walls along x (length)."""
    height: float = 1.0
    """H, between the walls along y (length)."""
    time_step: float | None = None
    """Largest integration step (time); None: a fortieth of the pair contact time."""
    limit_damping: bool = False
    """Whether the contact force is clamped at zero from below."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "limit_damping" and not (item.name == "time_step" and value is None):
                require_number(item.name, value)
        require(isinstance(self.n, int) and self.n >= 1, "n", self.n, "an integer of at least 1")
        for name in ("radius", "mass", "stiffness"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(0 < self.restitution <= 1, "restitution", self.restitution, "above 0 and at most 1")
        for name in ("width", "height"):
            wide = getattr(self, name) > 2 * self.radius
            require(wide, name, getattr(self, name), f"above the diameter {2 * self.radius:g}")
        require(isinstance(self.limit_damping, bool), "limit_damping", self.limit_damping, "True or False")
        if self.time_step is not None:
            longest = self.contact_time / 10
            require(0 < self.time_step <= longest, "time_step", self.time_step, f"above 0 and at most {longest:.3g}")

    @property
    def damping(self) -> float:
        """Dashpot constant c = m gamma of every contact, from k and e (force per normal velocity)."""
        ratio = -math.log(self.restitution) / math.pi  # gamma / w
        return self.mass * math.sqrt(2 * self.stiffness / self.mass) * ratio / math.hypot(1.0, ratio)

    @property
    def contact_time(self) -> float:
        """How long a pair is in contact, pi/w."""
        return math.pi / math.sqrt(2 * self.stiffness / self.mass - (self.damping / self.mass) ** 2)

    def steps(self, duration: float) -> tuple[int, float]:
        """Number of time steps in `duration`, and their length: at most `time_step`, shortened so that they fit."""
        require_number("duration", duration)
        require(duration > 0, "duration", duration, "above 0")
        count = math.ceil(duration / (self.time_step or self.contact_time / STEPS_PER_CONTACT) - 1e-9)
        return max(count, 1), duration / max(count, 1)

    def energy(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """Kinetic, gravitational and elastic energy of each box, `[...]` from `[..., N, 2]`."""
        apart = (positions.unsqueeze(-2) - positions.unsqueeze(-3)).square().sum(-1).sqrt()
        pairs = (2 * self.radius - apart).clamp_min(0).square().triu(1).sum((-1, -2))
        far = positions.new_tensor([self.width - self.radius, self.height - self.radius])
        walls = (self.radius - positions).clamp_min(0).square() + (positions - far).clamp_min(0).square()
        moving = 0.5 * self.mass * velocities.square().sum((-1, -2))
        elastic = 0.5 * self.stiffness * (pairs + walls.sum((-1, -2)))
        return moving + self.mass * self.gravity * positions[..., 1].sum(-1) + elastic

    def compiles_for(self, particle_steps: int, like: Tensor) -> bool:
        """Whether a job of so many particle-steps on boxes `like [B, ...]` is worth compiling for, and that works."""
        looks = particle_steps * max(self.n // 2, 1)
        return looks >= COMPILE_ABOVE and can_compile(like.device) and self._compiled(like) is not None

    def _compiled(self, like: Tensor) -> Advance | None:
        size = chunk_size(self.n, len(like), like.device, compiled=True)
        return compiled_advance(self.n, size, like.dtype, like.device, self.limit_damping)

    def simulate(
        self, positions: Tensor, velocities: Tensor, duration: float, *, compiled: bool | None = None
    ) -> Motion:
        """Motion after `duration` from positions and velocities `[B, N, 2]`, float32 or float64, on their device.

        Semi-implicit Euler, first order in the time step: v += a(x, v) dt, then x += v dt. The number of steps is an
        integer: the step is shortened, never lengthened, until it divides the duration.
        A box's numbers do not depend on the other boxes of the call, to the last bit. Not differentiable.

        compiled: None compiles (`torch.compile`, 3-12 s once per process, N, dtype and power of two of boxes) where
        that pays and works, and is eager otherwise; True compiles or raises; False never does. On x86 CPUs both gave
        the same bits.
        """
        shape, dtype = f"[B, {self.n}, 2]", positions.dtype
        require(positions.dim() == 3 and positions.shape[1:] == (self.n, 2), "positions", [*positions.shape], shape)
        require(velocities.shape == positions.shape, "velocities", [*velocities.shape], "shaped as positions")
        require(dtype in {torch.float32, torch.float64}, "positions", dtype, "float32 or float64")
        require(velocities.dtype == dtype, "velocities", velocities.dtype, f"of the dtype of positions, {dtype}")
        steps, time_step = self.steps(duration)
        if compiled is None:
            compiled = self.compiles_for(steps * len(positions) * self.n, positions)
        step = self._compiled(positions) if compiled else None
        if compiled and step is None:
            raise RuntimeError("compiled: torch.compile fails here (sim.integrator logs why at level INFO); use None")
        constants = positions.new_tensor(self._constants(time_step))
        end, speed, overlapped = integrate(positions, velocities, constants, steps, self.limit_damping, step)
        return Motion(positions=end, velocities=speed, overlapped=overlapped)

    def _constants(self, time_step: float) -> list[float]:
        far_x, far_y = self.width - self.radius, self.height - self.radius
        contact = [2 * self.radius, self.stiffness, self.damping]
        return [*contact, self.gravity, 1 / self.mass, time_step, self.radius, far_x, far_y]
