"""The particle system: its starts, trajectories, relations, statistics and figures."""

import math

import pytest
import torch

import sim.particles
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from sim.pool import Pool

SYSTEM = ParticleSystem()
SIZES = {"train": 320, "validation": 96, "probe": 96}


@pytest.fixture(scope="module")
def pool():
    return Pool.make(SYSTEM, 0, SIZES)


@pytest.fixture(scope="module")
def starts():
    """Only first rows of trajectories."""
    system = ParticleSystem(horizon=0.01, restart=0.01)
    return system.rows("train", 500, Generator.of("starts")).columns["state"]


def test_starts_neither_overlap_nor_touch_walls(starts):
    positions = starts[..., :2]
    apart = torch.cdist(positions, positions) + torch.eye(16)
    assert apart.min() >= 2 * SYSTEM.box.radius
    assert positions.min() >= SYSTEM.box.radius and positions.max() <= 1 - SYSTEM.box.radius


def test_starts_spread_over_the_box_with_gaussian_velocities(starts):
    """`speed` is the standard deviation of each component; the centres reach all corners."""
    velocities = starts[..., 2:].flatten(0, 1)
    error = SYSTEM.speed / math.sqrt(len(velocities))
    assert (velocities.mean(0).abs() < 5 * error).all()
    assert ((velocities.std(0) - SYSTEM.speed).abs() < 5 * error / math.sqrt(2)).all()
    assert abs(float(torch.corrcoef(velocities.T)[0, 1])) < 5 / math.sqrt(len(velocities))
    cells = (starts[..., :2] * 4).long().clamp_max(3)
    counts = torch.bincount((cells[..., 0] * 4 + cells[..., 1]).flatten(), minlength=16) / 500
    assert counts.min() > 0.5  # of one disc per sixteenth of the box, corners being harder to reach


def test_a_tall_box_and_few_discs():
    box = ParticleBox(n=3, width=0.5, height=3.0)
    positions = ParticleSystem(box=box, horizon=0.01, restart=0.01).rows("train", 50, Generator.of(1)).columns["state"]
    assert positions[..., 0].max() <= 0.44 and 1.5 < positions[..., 1].max() <= 2.94


def test_rows_follow_one_another_along_trajectories():
    """With every row of 10 trajectories of 4 at hand, all but the last of each have their successor among them."""
    rows = ParticleSystem(restart=0.4).rows("train", 40, Generator.of("along"))
    state, after = rows.columns["state"], rows.columns["state"] + rows.columns["change"]
    follows = (after[:, None] - state[None]).abs().amax((-1, -2)) < 1e-5
    assert follows.sum() == 30 and follows.sum(1).max() == 1
    neighbours = follows.nonzero()
    assert ((neighbours[:, 1] - neighbours[:, 0]).abs() > 1).float().mean() > 0.7  # shuffled


def test_fewer_rows_than_trajectories_offer_are_not_only_early_ones():
    """A falling disc tells the time by its velocity: 4 rows of 8 span more than 3 horizons."""
    system = ParticleSystem(box=ParticleBox(n=1, width=100, height=100))
    assert system.rows_per_trajectory == 8
    assert ParticleSystem(restart=0.3).rows_per_trajectory == 3  # 0.3 / 0.1 is 2.9999999999999996
    speeds = torch.stack([system.rows("train", 4, Generator.of(i)).columns["state"][:, 0, 3] for i in range(8)])
    assert (speeds.amax(1) - speeds.amin(1)).median() > 3.5 * system.horizon * system.box.gravity


def test_changes_are_those_of_the_simulator(pool):
    rows = pool.parts["probe"]
    state = rows.columns["state"]
    motion = SYSTEM.box.simulate(state[..., :2], state[..., 2:], SYSTEM.horizon)
    change = torch.cat((motion.positions, motion.velocities), -1) - state
    assert torch.equal(change, rows.columns["change"])
    assert torch.equal(motion.overlapped, rows.columns["overlapped"])
    assert "overlapped" not in pool.parts["train"].columns


def test_a_part_does_not_depend_on_others_and_shares_no_trajectory(pool):
    alone = SYSTEM.rows("train", SIZES["train"], Generator.of("pool", 0)).columns["state"]
    assert torch.equal(alone, pool.parts["train"].columns["state"])
    probe = pool.parts["probe"].columns["state"]
    assert torch.cdist(alone.flatten(1), probe.flatten(1)).min() > 0.1


def test_train_rows_are_standardised(pool):
    batch = SYSTEM.draw(pool.parts["train"], Generator.of("none"))
    for values in (batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)):
        torch.testing.assert_close(values.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(4), rtol=1e-5, atol=0)
    assert SYSTEM.loss(torch.zeros_like(batch.targets), batch).mean().item() == pytest.approx(1.0, abs=1e-5)
    assert set(batch.geometry) == {"positions"}
    assert set(SYSTEM.draw(pool.parts["probe"], Generator.of(1)).geometry) == {"positions", "overlapped"}


def test_relations_by_hand():
    """Four discs on a line, gaps of 0.02, 0.05 and 0.07 between surfaces."""
    system = ParticleSystem(box=ParticleBox(n=4, radius=0.05), margin=0.06)
    x = torch.tensor([[0.1, 0.22, 0.37, 0.54]])
    overlapped = torch.zeros(1, 4, 4, dtype=torch.bool)
    overlapped[0, 0, 1] = overlapped[0, 1, 0] = True
    geometry = {"positions": torch.stack((x, torch.full_like(x, 0.5)), -1), "overlapped": overlapped}
    near = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    relations = system.relations(geometry, None)
    assert torch.equal(relations["near"][0], near) and torch.equal(relations["collision"], overlapped)
    keys = torch.tensor([[[0, 1], [1, 2], [3, 1], [2, 0]]])
    near = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0]]).bool()
    assert torch.equal(system.relations(geometry, keys)["near"][0], near)
    torch.testing.assert_close(system.distance(geometry, keys)[0, 2], torch.tensor([0.17, 0.15]))


def test_discs_that_overlap_at_the_start_collide(pool):
    batch = SYSTEM.draw(pool.parts["probe"], Generator.of("none"))
    relations, apart = SYSTEM.relations(batch.geometry, None), SYSTEM.distance(batch.geometry, None)
    touching = (apart < 2 * SYSTEM.box.radius - 1e-6) & ~torch.eye(16, dtype=torch.bool)
    assert touching.any() and relations["collision"][touching].all()
    assert 0.01 < relations["collision"].float().mean() < relations["near"].float().mean() + 0.1 < 0.3


def exact(statistics):
    """The simulator as a predictor in standardised units."""

    def predict(batch):
        state = batch.inputs * statistics["state_deviation"] + statistics["state_mean"]
        flat = state.reshape(-1, *state.shape[-2:])
        motion = SYSTEM.box.simulate(flat[..., :2], flat[..., 2:], SYSTEM.horizon)
        change = (torch.cat((motion.positions, motion.velocities), -1) - flat).reshape(state.shape)
        return (change - statistics["change_mean"]) / statistics["change_deviation"]

    return predict


def test_figures_of_the_exact_predictor(pool):
    """Zero but for rounding, which collisions amplify along a rollout."""
    rows = pool.parts["validation"].take(slice(16))
    figures = SYSTEM.diagnose(exact(rows.statistics), rows, Generator.of("none"))
    assert {name for name in figures if name.startswith("rollout")} == {
        f"rollout_position_error_{horizon}" for horizon in (1, 2, 4, 8)
    }
    for name, value in figures.items():
        assert value < (3e-2 if name.endswith("8") else 1e-3), name


def test_figures_of_a_predictor_that_only_knows_free_flight(pool):
    """Exact for discs that touch nothing; the error of a rollout grows with its length."""
    rows = pool.parts["validation"]
    statistics, horizon, gravity = rows.statistics, SYSTEM.horizon, SYSTEM.box.gravity

    def fly(batch):
        velocity = (batch.inputs * statistics["state_deviation"] + statistics["state_mean"])[..., 2:]
        fall = torch.tensor([0.0, -gravity])
        change = torch.cat((velocity * horizon + fall * horizon**2 / 2, (fall * horizon).expand_as(velocity)), -1)
        return (change - statistics["change_mean"]) / statistics["change_deviation"]

    figures = SYSTEM.diagnose(fly, rows, Generator.of("none"))
    rollout = [float(figures[f"rollout_position_error_{h}"]) for h in (1, 2, 4, 8)]
    assert rollout == sorted(rollout) and rollout[0] > 0.01
    assert figures["loss_colliding"] > 2 * figures["loss_free"]  # free discs still hit walls
    state = rows.columns["state"]
    after = state[..., :2] + SYSTEM.horizon * state[..., 2:]
    clear = ((after > 0.07) & (after < 0.93) & (state[..., :2] > 0.07) & (state[..., :2] < 0.93)).all(-1)
    alone = clear & ~rows.columns["overlapped"].any(-1)
    batch = SYSTEM.draw(rows, Generator.of("none"))
    assert alone.sum() > 50 and (fly(batch) - batch.targets)[alone].abs().max() < 0.01


def test_split_loss_weighs_to_the_loss(pool):
    rows = pool.parts["validation"]
    batch = SYSTEM.draw(rows, Generator.of("none"))
    prediction = 0.3 * batch.inputs
    figures = SYSTEM.diagnose(lambda batch: 0.3 * batch.inputs, rows, Generator.of("none"))
    share = rows.columns["overlapped"].any(-1).float().mean()
    whole = share * figures["loss_colliding"] + (1 - share) * figures["loss_free"]
    torch.testing.assert_close(whole, SYSTEM.loss(prediction, batch).mean())


IMPOSSIBLE = [
    ("horizon", 0.0), ("horizon", math.nan), ("speed", 0.0), ("speed", "fast"), ("restart", 0.05),
    ("restart", math.inf), ("margin", -0.1), ("relation", "far"), ("box", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_systems(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* must be ") as raised:
        ParticleSystem(**{name: value})
    assert repr(value) in str(raised.value) and "\n" not in str(raised.value)


def test_too_many_discs_to_place():
    with pytest.raises(ValueError, match=r"^box\.n: 40 .*at most 0\.4 of the box \(they fill 0\.45\)"):
        ParticleSystem(box=ParticleBox(n=40))
    ParticleSystem(box=ParticleBox(n=35)).rows("train", 8, Generator.of("dense"))  # the densest allowed


def test_jammed_boxes_start_anew_and_give_up_in_the_end(monkeypatch):
    system = ParticleSystem(box=ParticleBox(n=6), horizon=0.01, restart=0.01)
    monkeypatch.setattr(sim.particles, "CANDIDATES", 1)
    positions = system.rows("train", 20, Generator.of("jam")).columns["state"][..., :2]
    assert (torch.cdist(positions, positions) + torch.eye(6)).min() >= 2 * system.box.radius
    monkeypatch.setattr(sim.particles, "PLACEMENTS", 1)
    with pytest.raises(ValueError, match=r"^box\.n: 6 .* jammed 1 times"):
        system.rows("train", 20, Generator.of("jam"))


def test_no_rows():
    with pytest.raises(ValueError, match=r"^n: 0"):
        SYSTEM.rows("train", 0, Generator.of(0))


def test_every_probe_row_has_a_trajectory_of_its_own():
    """Rows of one trajectory are linked by their states; 40 rows of 3 windows, none of which continues another."""
    system = ParticleSystem(restart=0.3)
    columns = system.rows("probe", 40, Generator.of("probe rows")).columns
    ends = (columns["state"] + columns["change"]).flatten(1)
    assert torch.cdist(ends, columns["state"].flatten(1)).min() > 0.1
    linked = system.rows("validation", 40, Generator.of("probe rows")).columns
    ends = (linked["state"] + linked["change"]).flatten(1)
    assert torch.cdist(ends, linked["state"].flatten(1)).min() < 1e-5


def test_the_future_of_validation_rows_is_where_the_discs_go():
    rows = SYSTEM.rows("validation", 12, Generator.of("future"))
    state = rows.columns["state"]
    motion = SYSTEM.box.simulate(state[..., :2].double(), state[..., 2:].double(), SYSTEM.horizon)
    found = rows.columns["future"][:, 0].double()
    torch.testing.assert_close(found, motion.positions, rtol=0, atol=1e-4)
    assert rows.columns["future"].shape == (12, 4, SYSTEM.box.n, 2)
