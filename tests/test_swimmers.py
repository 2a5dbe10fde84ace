"""Swimmers: forces against derivatives of their energy, motion against closed forms and a Fokker-Planck solution."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.linalg import solve_continuous_lyapunov
from scipy.sparse.linalg import spsolve

from sim import linear_swimmers, swimmers
from sim.active_matter import ActiveMatter
from sim.generator import Generator
from sim.swimmers import Swimmers

LINEAR = Swimmers()  # N=8, d=2, A=.5, K=.1, v0=1, gamma=.5, eps=.2
SOFT = Swimmers(n=5, spring=0.0, trap=0.05, repulsion=2.5, turning=0.1, diffusion=0.1, speed=0.2, time_step=0.02)
BOX = Swimmers(
    n=12, spring=0.0, trap=0.0, repulsion=1.0, packing=0.5, turning=0.1, diffusion=0.05, speed=0.2, time_step=0.02
)
FORCES = {
    "linear": LINEAR,
    "soft": SOFT,
    "box": BOX,
    "cut off": dataclasses.replace(BOX, sharpness=None),
    "line": dataclasses.replace(SOFT, dimension=1),
    "all": dataclasses.replace(SOFT, spring=0.2, dimension=3),
}
each_force = pytest.mark.parametrize("system", FORCES.values(), ids=FORCES)


def places(system, count=3, name="x"):
    scale = system.side or 2.0
    return scale * Generator.of(name).uniform(count, system.n, system.dimension, dtype=torch.float64)


def energy(system, x):
    """Trap, springs, and contacts by integrating f from the far end with the trapezium rule."""
    apart = system.apart(x, None)
    total = 0.5 * system.trap * x.square().sum((-1, -2)) + 0.25 * system.spring * apart.square().sum((-1, -2, -3))
    if system.repulsion == 0:
        return total
    r = (apart.square().sum(-1) + torch.eye(system.n) * 1e4).sqrt()
    far = 2 * system.radius + 6
    grid = r.unsqueeze(-1) + (far - r).clamp_min(0).unsqueeze(-1) * torch.linspace(0, 1, 1001, dtype=torch.float64)
    gap = 2 * system.radius - grid
    f = (
        gap.clamp_min(0)
        if system.sharpness is None
        else torch.log1p(torch.exp(system.sharpness * gap)) / system.sharpness
    )
    return total + 0.5 * system.repulsion * torch.trapezoid(f, grid, dim=-1).sum((-1, -2))


@each_force
def test_forces_are_minus_the_gradient_of_an_energy(system):
    x = places(system).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(system, x).sum(), x)
    torch.testing.assert_close(system.force(x.detach()), -gradient, rtol=2e-3, atol=5e-3)


@each_force
def test_divergence_of_the_forces(system):
    x, h = places(system, 1)[0], 1e-6
    moves = h * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    slopes = (system.force(x + moves) - system.force(x - moves)) / (2 * h)
    trace = slopes.flatten(1).diagonal().sum()
    torch.testing.assert_close(system.divergence(x[None])[0], trace, rtol=1e-6, atol=1e-6)


def test_forces_by_lists_of_neighbours_are_those_of_all_pairs(monkeypatch):
    system = dataclasses.replace(BOX, n=40)
    x = places(system)
    every, spread = system.force(x), system.divergence(x)
    assert system.neighbours(x) is None
    monkeypatch.setattr(swimmers, "ALL_PAIRS", 1)
    monkeypatch.setattr(swimmers, "CROWD", 24)
    keys = system.neighbours(x)
    assert keys.shape == (3, 40, 24)
    torch.testing.assert_close(system.force(x, keys), every, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(system.divergence(x, keys), spread, rtol=1e-6, atol=1e-8)


def test_motion_by_lists_is_that_of_all_pairs_and_a_crowd_is_refused(monkeypatch):
    system = dataclasses.replace(BOX, n=40, packing=0.3, speed=2.0, time_step=0.02)

    def end():
        start = system.start(2, Generator.of("start"))
        return next(system.simulate(start[0].double(), start[1].double(), Generator.of("motion"), 150, 1))[0]

    every = end()
    monkeypatch.setattr(swimmers, "ALL_PAIRS", 1)
    made = []
    monkeypatch.setattr(Swimmers, "neighbours", lambda s, x, make=Swimmers.neighbours: made.append(1) or make(s, x))
    monkeypatch.setattr(swimmers, "CROWD", 36)
    torch.testing.assert_close(end(), every, rtol=0, atol=1e-5)
    assert 1 < len(made) < 100
    monkeypatch.setattr(swimmers, "CROWD", 4)
    with pytest.raises(ValueError, match=r"swimmers.radius: 1.0 .* more than 4 of them are near one"):
        end()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trap": 0.0}, "trap: 0.0 is not allowed; it must be above 0 in open space"),
        ({"packing": 0.5}, "trap: 0.5 is not allowed; it must be 0 in a periodic box"),
        ({"packing": 0.5, "trap": 0.0}, "spring: 0.1 is not allowed; it must be 0 in a periodic box"),
        ({"turning": 0.0}, "turning: 0.0 is not allowed; it must be above 0"),
        ({"diffusion": 0.0, "speed": 0.0}, "diffusion: 0.0 is not allowed"),
        ({"sharpness": -1.0}, "sharpness: -1.0 is not allowed"),
        ({"n": 0}, "n: 0 is not allowed"),
        ({"speed": math.nan}, "speed: nan is not allowed; it must be a finite number"),
    ],
)
def test_wrong_configs(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LINEAR, **change)
    with pytest.raises(ValueError, match="relation: 'others' is not allowed; it must be one of 'contact'"):
        ActiveMatter(swimmers=SOFT, relation="others")


def test_the_box_is_as_full_as_packing_says():
    for d, ball in ((1, 2.0), (2, math.pi), (3, 4 / 3 * math.pi)):
        system = dataclasses.replace(BOX, dimension=d)
        assert system.n * ball / system.side**d == pytest.approx(0.5)
    apart = BOX.apart(torch.tensor([[[0.1, 0.0]] * 11 + [[BOX.side - 0.1, 0.0]]]), None)
    torch.testing.assert_close(apart[0, 0, 11], torch.tensor([0.2, 0.0]))


# --- linear systems in closed form


def big_matrices(system):
    """Drift and noise of all 2 N coordinates of one dimension, (x_1 .. x_N, g_1 .. g_N), spelt out."""
    n, eye = system.n, np.eye(system.n)
    drift = np.block(
        [[-system.trap * eye - system.spring * (n * eye - np.ones((n, n))), system.speed * eye],
         [0 * eye, -system.turning * eye]]
    )  # fmt: skip
    return drift, np.diag([system.diffusion] * n + [system.turning] * n)


def full_covariance(system):
    drift, noise = big_matrices(system)
    return solve_continuous_lyapunov(drift, -2 * noise)


OTHER = dataclasses.replace(LINEAR, n=3, dimension=1, trap=0.7, spring=0.3, speed=0.4, turning=0.2, diffusion=0.1)
each_linear = pytest.mark.parametrize("system", [LINEAR, OTHER, dataclasses.replace(OTHER, diffusion=0.0)])


@each_linear
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_score_and_samples_by_the_lyapunov_equation(system, noise):
    n, covariance = system.n, full_covariance(system)
    z = Generator.of("z").normal(5, n, 1, 2, dtype=torch.float64)
    flat = z[..., 0, :].transpose(1, 2).reshape(5, 2 * n).numpy()
    wanted = -np.linalg.solve(covariance + noise**2 * np.eye(2 * n), flat.T).T
    found = linear_swimmers.score(system, z, noise)[..., 0, :].transpose(1, 2).reshape(5, 2 * n)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)
    columns = torch.eye(2 * n, dtype=torch.float64).view(2 * n, 2, n).transpose(1, 2).unsqueeze(2)
    root = linear_swimmers.sample(system, columns)[..., 0, :].transpose(1, 2).reshape(2 * n, 2 * n).numpy()
    np.testing.assert_allclose(root.T @ root, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (LINEAR, 24.4444),
        (Swimmers(n=1, dimension=1, trap=0.05, spring=0.0, speed=0.2, turning=0.1, diffusion=0.1), 0.26667),
        (Swimmers(n=5, dimension=1, trap=1.0, spring=0.3, speed=1.0, turning=0.5, diffusion=0.2), 5.0),
    ],
)
def test_entropy_production_of_linear_systems(system, expected):
    """The values known; flows of the full Gaussian; and the mean over states that needs no score."""
    assert linear_swimmers.entropy_production(system) == pytest.approx(expected, rel=1e-4)
    (drift, noise), covariance = big_matrices(system), full_covariance(system)
    flow = drift + noise @ np.linalg.inv(covariance)
    rate = system.dimension * np.trace(np.linalg.inv(noise) @ flow @ covariance @ flow.T)
    assert rate == pytest.approx(expected, rel=1e-4)
    z = linear_swimmers.sample(
        system, Generator.of("s").normal(20000, system.n, system.dimension, 2, dtype=torch.float64)
    )
    free = ActiveMatter(swimmers=system).entropy_production(*z.unbind(-1))
    assert abs(float(free.mean()) - expected) < 4 * float(free.std()) / math.sqrt(len(free))


@each_linear
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_can_be_known_of_scores_by_regression(system, noise):
    """Exact moments of the full Gaussian: the residual's square, and the best linear map of a particle's own state."""
    n, d, eps = system.n, system.dimension, system.diffusion
    drift, _ = big_matrices(system)
    covariance = full_covariance(system) + noise**2 * np.eye(2 * n)
    shift = np.vstack([drift[:n] / (eps or 1.0), np.block([np.zeros((n, n)), -np.eye(n)])])
    residual = -np.linalg.inv(covariance) - shift
    weights = np.repeat([eps, system.turning], n)
    whole = d * np.sum(weights * np.diag(residual @ covariance @ residual.T))
    alone = 0.0
    for i in range(n):
        own, outputs = [i, n + i], [i, n + i]
        cross = (residual @ covariance)[np.ix_(outputs, own)]
        seen = cross @ np.linalg.solve(covariance[np.ix_(own, own)], cross.T)
        alone += d * np.sum(weights[outputs] * np.diag(seen))
    given = torch.tensor([w for w in (eps, system.turning) if w > 0])
    found = linear_swimmers.explained(system, noise, given)
    assert found.total == pytest.approx(whole, rel=1e-6)
    assert found.alone == pytest.approx(alone, rel=1e-6)
    if noise == 0 and eps > 0:
        assert found.total == pytest.approx(linear_swimmers.entropy_production(system), rel=1e-6)


def mean_and_error(system, boxes, relax, rows, seed=0):
    """Entropy production without a score: mean over boxes of their means over time, and its standard error."""
    every = round(1.0 / system.time_step)
    start = system.start(boxes, Generator.of("start", seed))
    motion = system.simulate(*start, Generator.of("motion", seed), round(relax / system.time_step), every)
    task = ActiveMatter(swimmers=system)
    means = torch.stack([task.entropy_production(*next(motion)) for _ in range(rows)]).double().mean(0)
    return float(means.mean()), float(means.std()) / math.sqrt(boxes)


def test_motion_of_a_linear_system_has_its_covariance():
    """Steps of 0.02 bias the spread by about 1%."""
    system = dataclasses.replace(OTHER, time_step=0.02)
    start = system.start(1500, Generator.of("start"))
    x, g = next(system.simulate(*start, Generator.of("motion"), 600, 1))
    z = torch.cat((x, g), 1)[..., 0].double().numpy()
    found, wanted = z.T @ z / len(z), full_covariance(system)
    spread = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / len(z))
    assert (np.abs(found - wanted) < 4.5 * spread + 0.02 * np.abs(wanted)).all()


def fokker_planck_rate(force, half, v0, gamma, eps, nx=400, modes=16):
    """Entropy production of one coordinate on a ring, `(v0 / eps) (v0 + <g F>)`: differences by Hermite modes."""
    h = 2 * half / nx
    x = -half + h * (np.arange(nx) + 0.5)
    ahead = sp.csr_array(np.roll(np.eye(nx), 1, 1))
    slope = (ahead - ahead.T) / (2 * h)
    bend = (ahead + ahead.T - 2 * sp.eye_array(nx)) / h**2
    root = np.sqrt(np.arange(1.0, modes))
    couple = sp.diags_array([root, root], offsets=[1, -1])
    still = -slope @ sp.diags_array(force(x)) + eps * bend
    matrix = sp.kron(sp.eye_array(modes), still) - v0 * sp.kron(couple, slope)
    matrix = sp.lil_array(matrix - gamma * sp.kron(sp.diags_array(np.arange(modes, dtype=float)), sp.eye_array(nx)))
    right = np.zeros(nx * modes)
    matrix[[0], :], right[0] = 0.0, 1.0
    matrix[[0], :nx] = h
    density = spsolve(sp.csc_array(matrix), right).reshape(modes, nx)
    return (v0 / eps) * (v0 + h * np.sum(density[1] * force(x)))


def test_two_particles_on_a_ring():
    """Their distance, over sqrt(2), is one particle that a fixed one repels, of 0.397; their mean is free, of v0^2/eps.

    Radii, stiffness and side are such that this one has r0 = 1, k = 2.5, b = 7.5 and half side 8.
    """

    def push(x):
        return np.sign(x) * 2.5 * np.logaddexp(0, 7.5 * (2 - np.abs(x))) / 7.5

    assert fokker_planck_rate(push, 8.0, 0.25, 0.1, 0.1) == pytest.approx(0.3970, abs=2e-4)
    assert fokker_planck_rate(push, 8.0, 0.1, 0.1, 0.1) == pytest.approx(0.0780, abs=2e-4)
    root = math.sqrt(2)
    ring = Swimmers(
        n=2, dimension=1, speed=0.25, turning=0.1, diffusion=0.1, trap=0.0, spring=0.0, repulsion=1.25, radius=root,
        sharpness=7.5 / root, packing=0.25, time_step=0.02,
    )  # fmt: skip
    assert ring.side == pytest.approx(16 * root)
    mean, error = mean_and_error(ring, 600, 40.0, 60)
    assert error < 0.02
    assert abs(mean - (0.3970 + 0.625)) < 4 * error


@pytest.mark.parametrize(("n", "speed", "expected", "spread"), [(2, 0.2, 0.528, 0.004), (4, 0.5, 3.314, 0.014)])
def test_soft_particles_in_a_trap(n, speed, expected, spread):
    """Per particle, against an independent simulation; without interaction it would be 0.5333 and 3.3333."""
    system = dataclasses.replace(SOFT, n=n, speed=speed, time_step=0.02)
    mean, error = mean_and_error(system, 300, 40.0, 30)
    assert error / n < 0.03 * expected
    assert abs(mean / n - expected) < 4 * math.hypot(error / n, spread)
