"""Oracles of the simulator: closed forms, conservation laws, another integrator; and its interface."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem

SPEEDS = (0.1, 1.0, 7.0)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def double(*nested):
    return torch.tensor(nested, dtype=torch.float64)


def trace(box: ParticleBox, positions, velocities, steps):
    """States at the beginning of every time step and after the last, `[steps + 1, B, N, 2]` each."""
    states = [(positions, velocities)]
    for _ in range(steps):
        motion = box.simulate(*states[-1], box.time_step)
        states.append((motion.positions, motion.velocities))
    return (torch.stack(column) for column in zip(*states, strict=True))


def crowd(box: ParticleBox, boxes, dtype=torch.float64, name="crowd"):
    """Non-overlapping positions and Gaussian velocities."""
    start = ParticleSystem(box=box, horizon=0.01, restart=0.01).rows("train", boxes, Generator.of(name))
    state = start.columns["state"].to(dtype)
    return state[..., :2].clone(), state[..., 2:].clone()


# --- contacts against their closed forms -----------------------------------------------------------------------------


def oscillator(box: ParticleBox, mass: float):
    """gamma, w of the overlap d'' + 2 gamma d' + w0^2 d = 0 for an effective mass."""
    gamma = box.damping / (2 * mass)
    return gamma, math.sqrt(box.stiffness / mass - gamma**2)


def contact_to_zero_overlap(gamma, w):
    """The dashpot may pull: duration pi/w, restitution exp(-pi gamma/w)."""
    return math.pi / w, math.exp(-math.pi * gamma / w)


def contact_to_zero_force(gamma, w):
    """The force is clamped: it ends where d'' = 0, at w t = pi - 2 atan(gamma/w), with restitution exp(-gamma t).

    Schwager and Poeschel 2007, doi:10.1007/s10035-007-0065-z.
    """
    duration = (math.pi - 2 * math.atan(gamma / w)) / w
    return duration, math.exp(-gamma * duration)


CONVENTIONS = {False: contact_to_zero_overlap, True: contact_to_zero_force}
STEPS = 400  # per pair contact


def fine(limit_damping, restitution=0.8, **fields):
    box = ParticleBox(radius=0.5, mass=2.0, width=20, height=20, gravity=0, restitution=restitution,
                      limit_damping=limit_damping, **fields)  # fmt: skip
    return replace(box, time_step=box.contact_time / STEPS)


def assert_contact(box, mass, speeds, closing):
    """closing `[steps + 1, B]`: approach speed over time, from `speeds` at first touch."""
    duration, restitution = CONVENTIONS[box.limit_damping](*oscillator(box, mass))
    torch.testing.assert_close(-closing[-1] / speeds, torch.full_like(speeds, restitution), rtol=3 / STEPS, atol=0)
    steps_acting = (closing.diff(dim=0) != 0).sum(0)
    assert (steps_acting - duration / box.time_step).abs().max() < 3


@pytest.mark.parametrize("limit_damping", [False, True])
@pytest.mark.parametrize("restitution", [0.3, 0.8, 1.0])
def test_pair_contact(limit_damping, restitution):
    """Head-on, in four directions, at several speeds: duration and restitution do not depend on the speed."""
    box = fine(limit_damping, restitution, n=2)
    angles = double(0.0, 0.5 * math.pi, math.pi, 1.0)
    normal = torch.stack((angles.cos(), angles.sin()), -1).repeat(len(SPEEDS), 1)
    speeds = double(*SPEEDS).repeat_interleave(4)
    away, velocity = 0.5 * normal, 0.5 * speeds[:, None] * normal
    positions = 10 + torch.stack((away, -away), 1)
    _, after = trace(box, positions, torch.stack((-velocity, velocity), 1), round(1.1 * STEPS))
    closing = ((after[:, :, 1] - after[:, :, 0]) * normal).sum(-1)
    assert_contact(box, box.mass / 2, speeds, closing)
    if not limit_damping:
        assert contact_to_zero_overlap(*oscillator(box, box.mass / 2)) == pytest.approx((box.contact_time, restitution))


@pytest.mark.parametrize("limit_damping", [False, True])
@pytest.mark.parametrize("restitution", [0.3, 0.8])
def test_wall_contact(limit_damping, restitution):
    """All four walls: the same spring and dashpot with m_eff = m."""
    box = fine(limit_damping, restitution, n=1)
    normal = double([1, 0], [-1, 0], [0, 1], [0, -1]).repeat(len(SPEEDS), 1)  # into the box
    speeds = double(*SPEEDS).repeat_interleave(4)
    positions, velocities = 10 - 9.5 * normal, -speeds[:, None] * normal
    _, after = trace(box, positions[:, None], velocities[:, None], round(1.6 * STEPS))
    assert_contact(box, box.mass, speeds, -(after[:, :, 0] * normal).sum(-1))
    assert (after[-1, :, 0] * normal[:, [1, 0]] == 0).all()  # walls do not touch the motion along them


def test_limited_damping_bounces_higher_and_sooner():
    gamma, w = oscillator(fine(True, 0.5), 1.0)
    pulling, clamped = contact_to_zero_overlap(gamma, w), contact_to_zero_force(gamma, w)
    assert clamped[0] < pulling[0] and clamped[1] > pulling[1]


# --- motion ----------------------------------------------------------------------------------------------------------


def test_free_fall():
    """Exactly y0 + v0 T - g T^2/2, less the g T dt/2 of semi-implicit Euler."""
    box = ParticleBox(n=1, gravity=3.0, height=100, width=100)
    motion = box.simulate(double([[50, 90]]), double([[2, 5]]), 1.7)
    _, dt = box.steps(1.7)
    expected = double([[50 + 2 * 1.7, 90 + 5 * 1.7 - 1.5 * 1.7**2 - 1.5 * 1.7 * dt]])
    torch.testing.assert_close(motion.positions, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(motion.velocities, double([[2, 5 - 3 * 1.7]]), rtol=1e-12, atol=0)
    assert not motion.overlapped.any()


@pytest.mark.parametrize("limit_damping", [False, True])
def test_momentum_and_angular_momentum_of_a_pair(limit_damping):
    """Oblique hits; central forces conserve both to round-off, at any time step."""
    box = ParticleBox(n=2, radius=0.5, width=20, height=20, gravity=0, restitution=0.5, limit_damping=limit_damping)
    offsets = double(*[[1.02 * math.cos(a), 1.02 * math.sin(a)] for a in (0.0, 0.4, 0.8, -0.5)])
    positions = 10 + torch.stack((torch.zeros_like(offsets), offsets), 1)
    velocities = double([[3, 0], [-2, 0.5]]).expand(4, 2, 2)
    motion = box.simulate(positions, velocities, 0.1)
    assert motion.overlapped[:, 0, 1].all() and not torch.equal(motion.velocities, velocities)
    torch.testing.assert_close(motion.velocities.sum(1), velocities.sum(1), rtol=0, atol=1e-14)

    def spin(x, v):
        return (x[..., 0] * v[..., 1] - x[..., 1] * v[..., 0]).sum(-1)

    torch.testing.assert_close(
        spin(motion.positions, motion.velocities), spin(positions, velocities), rtol=0, atol=1e-11
    )


def test_energy_falls_across_contacts_and_is_kept_between_them():
    """Without gravity: constant to round-off in free flight, never rises over a contact, falls in all."""
    box = replace(ParticleBox(gravity=0, restitution=0.8), time_step=ParticleBox().contact_time / 200)
    positions, velocities = (column[:, 0] for column in trace(box, *crowd(box, 1), 1500))
    energy = box.energy(positions, velocities)
    apart = torch.cdist(positions, positions) + torch.eye(box.n)
    inside = ((positions > box.radius) & (positions < 1 - box.radius)).all(-1).all(-1)
    free = (apart > 2 * box.radius).all(-1).all(-1) & inside
    assert 0.02 < free.float().mean() < 0.98
    flight = free[:-1] & free[1:]
    assert (energy.diff()[flight].abs() < 1e-13 * energy[0]).all()
    # between moments without any contact, the dissipated energy outweighs the error of the integrator
    assert (energy[free].diff() < 1e-3 * energy[0]).all()
    assert energy[-1] < 0.9 * energy[0]


def test_energy_in_free_fall():
    """Semi-implicit Euler loses m g^2 dt T / 2."""
    box = ParticleBox(n=1, mass=2.0, gravity=3.0, height=100)
    start = (double([[0.5, 90]]), double([[0, 5]]))
    motion = box.simulate(*start, 1.0)
    lost = box.energy(*start) - box.energy(motion.positions, motion.velocities)
    assert lost.item() == pytest.approx(0.5 * 2.0 * 9.0 * box.steps(1.0)[1], rel=1e-8)


def test_energy_by_hand():
    box = ParticleBox(n=2, radius=0.1, mass=2.0, stiffness=100.0, gravity=3.0)
    positions, velocities = double([[0.05, 0.5], [0.2, 0.5]]), double([[1.0, 2.0], [0.0, 0.0]])
    expected = 5.0 + 2 * 3 * (0.5 + 0.5) + 50 * (0.05**2 + 0.05**2)
    assert box.energy(positions, velocities).item() == pytest.approx(expected)


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_order_of_convergence_within_a_contact():
    """Semi-implicit Euler is of first order: the error at a fixed time halves with the time step."""
    base = ParticleBox(n=2, radius=0.5, width=20, height=20, gravity=0, restitution=0.6)
    gamma, w = oscillator(base, base.mass / 2)
    time = 0.6 * base.contact_time
    overlap = 2.0 / w * math.exp(-gamma * time) * math.sin(w * time)
    counts, errors = (50, 100, 200, 400), []
    for count in counts:
        box = replace(base, time_step=time / count)
        start = double([[9.5, 10], [10.5, 10]])
        # first touch an instant ago: the overlap is 1e-12
        end = box.simulate(start + double([[1e-12, 0], [0, 0]]), double([[1, 0], [-1, 0]]), time).positions
        errors.append(abs(1 - (end[0, 1, 0] - end[0, 0, 0]).item() - overlap))
    assert slope(counts, errors) == pytest.approx(1.0, abs=0.05)
    assert errors[-1] < 0.01 * overlap


def acceleration(box: ParticleBox, x, v):
    """The equations of motion once more, in numpy: `[N, 2]`."""

    def push(d, speed):
        strength = np.where(d > 0, box.stiffness * d - box.damping * speed, 0.0)
        return np.maximum(strength, 0.0) if box.limit_damping else strength

    r = np.linalg.norm(x[:, None] - x, axis=-1) + 9 * np.eye(box.n)
    normal = (x[:, None] - x) / r[..., None]
    closing = np.einsum("ijc,ijc->ij", v[:, None] - v, normal)
    force = (push(2 * box.radius - r, closing)[..., None] * normal).sum(1)
    force += push(box.radius - x, v) - push(x + box.radius - [box.width, box.height], -v)
    return force / box.mass - [0.0, box.gravity]


def solved(box: ParticleBox, positions, velocities, duration):
    """State `[2, N, 2]` at the end by Runge-Kutta 8(5,3), steps short enough to see every contact."""

    def flow(_, state):
        x, v = state.reshape(2, box.n, 2)
        return np.stack((v, acceleration(box, x, v))).ravel()

    start = torch.stack((positions, velocities)).numpy().ravel()
    end = solve_ivp(flow, (0, duration), start, "DOP853", rtol=1e-8, atol=1e-8, max_step=box.contact_time / 4)
    return torch.from_numpy(end.y[:, -1].reshape(2, box.n, 2))


@pytest.mark.parametrize("limit_damping", [False, True])
def test_many_bodies_against_another_integrator(limit_damping):
    """Three discs, hits of pairs and of walls: our error against Runge-Kutta at tolerance 1e-8 is of first order.

    A contact begins and ends anywhere within a time step, and its force jumps there, so one trajectory's error is dt
    times a number that varies from one dt to the next: hence the rms over several starts, and the loose slope.
    """
    base = ParticleBox(n=3, radius=0.15, gravity=2.0, stiffness=1000.0, restitution=0.7, limit_damping=limit_damping)
    start, duration = crowd(base, 8), 0.3
    expected = torch.stack([solved(base, *one, duration) for one in zip(*start, strict=True)])
    counts, errors = (25, 50, 100, 200, 400), []
    for count in counts:
        motion = replace(base, time_step=base.contact_time / count).simulate(*start, duration)
        error = torch.stack((motion.positions, motion.velocities), 1) - expected
        errors.append(float(error.square().mean().sqrt()))
    assert motion.overlapped.any(-1).any(-1).sum() >= 4  # pairs met in half of the boxes
    assert errors[-1] < 2e-3
    assert slope(counts, errors) == pytest.approx(1.0, abs=0.25)


# --- the interface ---------------------------------------------------------------------------------------------------


def test_overlap_flags_against_a_trace():
    """The time step and the duration are powers of two, so that one call and many take exactly the same steps."""
    box = ParticleBox(n=12, radius=0.08, time_step=2.0**-10)
    start = crowd(box, 20)
    positions, velocities = trace(box, *start, 100)
    met = (torch.cdist(positions[:-1], positions[:-1]) < 2 * box.radius).any(0) & ~torch.eye(12, dtype=torch.bool)
    motion = box.simulate(*start, 100 * 2.0**-10)
    assert torch.equal(motion.overlapped, met) and met.any() and not met.all()
    assert torch.equal(motion.overlapped, motion.overlapped.mT)
    assert torch.equal(motion.positions, positions[-1]) and torch.equal(motion.velocities, velocities[-1])


@pytest.mark.parametrize("device", DEVICES)
def test_single_precision_follows_double(device):
    box = ParticleBox()
    x, v = crowd(box, 32)
    exact, motion = box.simulate(x, v, 0.1), box.simulate(x.float().to(device), v.float().to(device), 0.1)
    assert motion.positions.device.type == device and motion.positions.dtype == torch.float32
    torch.testing.assert_close(motion.positions.cpu().double(), exact.positions, rtol=0, atol=2e-5)
    assert (motion.overlapped.cpu() == exact.overlapped).float().mean() > 0.999


def test_order_of_discs_does_not_matter():
    box = ParticleBox()
    x, v = crowd(box, 8)
    order = Generator.of("order").permutation(box.n)
    motion, permuted = box.simulate(x, v, 0.1), box.simulate(x[:, order], v[:, order], 0.1)
    torch.testing.assert_close(permuted.positions, motion.positions[:, order], rtol=0, atol=1e-10)
    assert torch.equal(permuted.overlapped, motion.overlapped[:, order][:, :, order])


def test_steps_fit_the_duration():
    box = ParticleBox(time_step=0.001)
    for duration, count in ((0.001, 1), (0.0005, 1), (0.1, 100), (0.3, 300), (0.1001, 101), (0.7 * 3, 2100)):
        assert box.steps(duration)[0] == count
        assert count * box.steps(duration)[1] == pytest.approx(duration) and box.steps(duration)[1] <= 0.001 + 1e-12
    automatic = ParticleBox()
    assert automatic.steps(1.0)[1] <= automatic.contact_time / 40


def test_no_boxes_and_coinciding_discs():
    box = ParticleBox(n=2)
    empty = box.simulate(torch.zeros(0, 2, 2), torch.zeros(0, 2, 2), 0.1)
    assert empty.positions.shape == (0, 2, 2) and empty.overlapped.shape == (0, 2, 2)
    same = box.simulate(torch.full((1, 2, 2), 0.5), torch.zeros(1, 2, 2), 0.01)
    assert torch.isfinite(same.positions).all() and same.overlapped[0, 0, 1]


IMPOSSIBLE = [
    ("n", 0), ("n", 2.5), ("n", True), ("radius", 0.0), ("radius", -1.0), ("radius", math.nan), ("mass", 0.0),
    ("mass", math.inf), ("stiffness", -4.0), ("restitution", 0.0), ("restitution", 1.1), ("gravity", math.inf),
    ("gravity", "1"), ("width", 0.1), ("height", 0.12), ("height", None), ("time_step", 0.0), ("time_step", 0.01),
    ("time_step", math.nan), ("limit_damping", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_boxes(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* must be ") as raised:
        ParticleBox(**{name: value})
    assert repr(value) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "positions", "velocities", "duration"),
    [
        ("positions", torch.zeros(3, 2), torch.zeros(3, 2), 0.1),
        ("positions", torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), 0.1),
        ("positions", torch.zeros(1, 3, 2).half(), torch.zeros(1, 3, 2).half(), 0.1),
        ("velocities", torch.zeros(1, 3, 2), torch.zeros(2, 3, 2), 0.1),
        ("velocities", torch.zeros(1, 3, 2), torch.zeros(1, 3, 2).double(), 0.1),
        ("duration", torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), 0.0),
        ("duration", torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), math.nan),
    ],
)
def test_impossible_calls(name, positions, velocities, duration):
    with pytest.raises(ValueError, match=f"^{name}: "):
        ParticleBox(n=3).simulate(positions, velocities, duration)
