"""Active matter as a task: what a perfect network would report, equilibrium, floors, and a network that learns."""

import dataclasses

import pytest
import torch

from cluster.pack import probe_batch
from cluster.recipes import RECIPES
from cluster.report import shared_floors
from cluster.sweep import Sweep
from sim import linear_swimmers
from sim.active_matter import ActiveMatter, Swimmers
from sim.generator import Generator
from sim.pool import Pool
from sim.system import Rows
from tests.test_swimmers import BOX, LINEAR, SOFT
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer
from train.neighbours import draw
from train.snapshot import Snapshot
from train.state import unflatten

TASK = ActiveMatter()
SOFT_TASK = ActiveMatter(swimmers=SOFT, noise=0.02, relax=1.0, spacing=0.2, rows_per_trajectory=8)


def rows_of(system, part="validation", n=64, dtype=torch.float64):
    return Pool.make(system, 0, {"train": 64, part: n}).parts[part].to("cpu", dtype)


def perfect(system, noise=0.0):
    """Predictions of the exact score of a linear system."""
    matrices = linear_swimmers.residual(system.swimmers, noise)
    unit = system._unit(rows_of(system), torch.zeros(1, dtype=torch.float64))

    def predict(batch):
        x, g = batch.inputs.chunk(2, -1)
        z = torch.stack((x * system.swimmers.free_spread, g), -1)
        return torch.cat(linear_swimmers.by_mode(matrices, z).unbind(-1), -1) / unit

    return predict


def nothing(system):
    return lambda batch: torch.zeros(*batch.inputs.shape[:-1], system.d_out, dtype=batch.inputs.dtype)


def test_what_the_exact_score_reports():
    rows = rows_of(TASK, n=20000)
    found = TASK.diagnose(perfect(TASK), rows, Generator.of("d"))
    assert found["score_error"] < 1e-6
    rate = linear_swimmers.entropy_production(LINEAR)
    assert rate == pytest.approx(24.4444, abs=1e-3)
    assert float(found["entropy_production"]) == pytest.approx(rate, rel=0.01)
    assert float(found["entropy_production_expected"]) == pytest.approx(rate, rel=0.01)
    for name in ("flow", "drift", "force", "score"):
        assert abs(float(found[f"balance_{name}"])) < 0.02, name
    parts = found["entropy_production_contact"], found["entropy_production_free"]
    assert 8 * min(parts) < rate < 8 * max(parts)
    assert 0 < found["entropy_production_turning"] < found["entropy_production"]


def test_balances_of_a_wrong_score_are_not_zero():
    found = TASK.diagnose(lambda batch: 1.5 * perfect(TASK)(batch), rows_of(TASK, n=2000), Generator.of("d"))
    assert abs(float(found["balance_drift"])) > 0.1
    assert abs(float(found["balance_force"])) > 0.1
    assert found["score_error"] > 0.05


@pytest.mark.parametrize("system", [TASK, SOFT_TASK], ids=["linear", "soft"])
def test_particles_that_do_not_swim_are_at_equilibrium(system):
    """v0 = 0: a network that says nothing has the exact score, grad log of the Boltzmann density, and no flow."""
    still = dataclasses.replace(system, swimmers=dataclasses.replace(system.swimmers, speed=0.0))
    rows = rows_of(still)
    x, g = rows.columns["x"], rows.columns["g"]
    score = torch.cat((still.swimmers.force(x) / still.swimmers.diffusion, -g), -1)
    torch.testing.assert_close(still.shift(x, g), score, rtol=0, atol=0)
    found = still.diagnose(nothing(still), rows, Generator.of("d"))
    assert found["entropy_production"] == found["current_position"] == found["current_turning"] == 0
    if still.swimmers.linear:
        assert found["score_error"] < 1e-6
        exact = linear_swimmers.score(still.swimmers, torch.stack((x, g), -1))
        torch.testing.assert_close(torch.cat(exact.unbind(-1), -1), score)


def test_without_diffusion_only_orientations_have_a_score():
    """<|v_g|^2> / gamma = -<div F>: for linear forces d times the trace of the stiffness."""
    swimmers = Swimmers(n=4, trap=0.7, spring=0.2, diffusion=0.0)
    system = ActiveMatter(swimmers=swimmers)
    assert (system.d_in, system.d_out) == (4, 2)
    rows = rows_of(system, n=20000)
    found = system.diagnose(perfect(system), rows, Generator.of("d"))
    stiffness = 2 * (0.7 + 3 * (0.7 + 4 * 0.2))
    assert float(found["entropy_production_expected"]) == pytest.approx(stiffness, rel=1e-6)
    assert float(found["entropy_production"]) == pytest.approx(stiffness, rel=0.02)
    assert found["score_error"] < 1e-6
    for name in ("flow", "drift", "force", "score"):
        assert abs(float(found[f"balance_{name}"])) < 0.02, name


def test_pairs_see_one_row_with_opposite_noise():
    rows = rows_of(TASK)
    for count in (1, 6, 7):
        batch = TASK.draw(rows.take(slice(count)), Generator.of("draw"))
        assert len(batch.inputs) == count
        even, odd = batch.inputs[0::2], batch.inputs[1::2]
        clean = torch.cat((rows.columns["x"] / LINEAR.free_spread, rows.columns["g"]), -1)[:count:2]
        torch.testing.assert_close((even[: len(odd)] + odd) / 2, clean[: len(odd)])
        assert float((even - clean)[..., 2:].std()) == pytest.approx(TASK.noise, rel=0.4)
        torch.testing.assert_close(batch.geometry["positions"] / LINEAR.free_spread, batch.inputs[..., :2])


def test_denoising_has_the_score_of_the_smoothed_density_as_its_best():
    """Any change of the exact prediction raises the mean loss by the square of the change."""
    rows, unit = rows_of(TASK, "train", 4000), 1.0
    batch = TASK.draw(rows, Generator.of("draw"))
    best = perfect(TASK, TASK.noise)(batch)
    loss = TASK.loss(best, batch).mean()
    assert abs(float(loss) - TASK.floors().optimum) < 0.03
    for name, change in {
        "scaled": 0.1 * best,
        "turned": 0.1 * best.flip(-1),
        "constant": 0.2 * torch.ones_like(best),
    }.items():
        more = TASK.loss(best + unit * change, batch).mean() - loss
        assert float(more) == pytest.approx(float(change.square().mean()), rel=0.1, abs=2e-3), name


def test_the_best_without_attention_by_regression():
    batch = TASK.draw(rows_of(TASK, "train", 20000), Generator.of("draw"))
    own, targets = batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)
    fit = own @ torch.linalg.lstsq(own, targets).solution
    loss = TASK.loss(fit.view_as(batch.targets), batch).mean()
    assert float(loss) == pytest.approx(TASK.floors().without_attention, abs=0.02)
    assert TASK.floors().without_attention == pytest.approx(0.1496, abs=1e-3)


def test_relations_and_the_uniform_average():
    """Under uniform attention, whose mean is all that the exact score needs, entropy is 1 and others get 1 - 1 / N."""
    rows = rows_of(TASK, "probe", 8)
    config = Sweep(name="s", system=TASK).members()[0].config
    batch = probe_batch(config, rows, Generator.of("p"))
    positions = batch.batch.inputs[..., :2] * LINEAR.free_spread
    r = torch.cdist(positions, positions)
    touching = (r < 2) & ~torch.eye(8, dtype=torch.bool)
    assert torch.equal(batch.relations["contact"], touching)
    assert (batch.relations["others"].sum(-1) == 7).all()
    assert torch.equal(batch.groups["related"], touching.any(-1))
    ring = dataclasses.replace(SOFT_TASK, swimmers=BOX)
    far = torch.zeros(1, 12, 2, dtype=torch.float64)
    far[0, 1, 0] = BOX.side - 1.0
    assert ring.relations({"positions": far}, None)["contact"][0, 0, 1]
    assert set(ring.relations({"positions": far}, None)) == {"contact"}


def test_a_box_looks_the_same_from_everywhere_but_for_its_waves():
    system = dataclasses.replace(SOFT_TASK, swimmers=BOX)
    x = BOX.side * Generator.of("x").uniform(2, 12, 2, dtype=torch.float64)
    torch.testing.assert_close(system._waves(x), system._waves(x + BOX.side))
    torch.testing.assert_close(system.shift(x, x), system.shift(x + BOX.side, x) + 0 * x.repeat(1, 1, 2))
    assert system._waves(x).shape[-1] == system.d_in - 2 == 12


def test_probe_rows_come_from_trajectories_of_their_own():
    system = dataclasses.replace(SOFT_TASK, relax=0.2, rows_per_trajectory=4)
    rows = system.rows("train", 10, Generator.of("rows"))
    assert rows.columns["x"].shape == (10, 5, 2)
    alone = system.rows("probe", 3, Generator.of("rows")).columns["g"]
    assert not torch.equal(alone[0], alone[1])


def test_statistics_of_nonlinear_systems_are_their_entropy_production():
    rows = rows_of(SOFT_TASK, "train", 64)
    mean = SOFT_TASK.entropy_production(rows.columns["x"], rows.columns["g"]).mean()
    assert float(SOFT_TASK.statistics(rows)["rate"]) == pytest.approx(max(float(mean), 1e-3 * 4.0 * 0.4), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_local_attention_of_swimmers_in_a_box(dtype):
    system = dataclasses.replace(SOFT_TASK, swimmers=BOX)
    rows = rows_of(system, n=8, dtype=dtype)
    batch = draw(system, ModelConfig(attention="local", neighbours=5), rows, Generator.of("draw"))
    assert batch.keys.shape == (8, 12, 5)
    assert batch.inputs.dtype == dtype


def test_neighbours_say_nothing_of_the_noise():
    """They are those of the positions that the network sees: the clean ones' would tell it what it is to guess."""
    system = dataclasses.replace(SOFT_TASK, noise=0.5)
    rows = rows_of(system, n=32)
    batch = draw(system, ModelConfig(attention="local", neighbours=3), rows, Generator.of("draw"))

    def near(x):
        return torch.cdist(x, x).topk(3, largest=False).indices.sort(-1).values

    found = batch.keys.sort(-1).values
    assert torch.equal(found, near(batch.inputs[..., :2] * SOFT.free_spread))
    assert not torch.equal(found, near(rows.columns["x"][0::2].repeat_interleave(2, 0)))


def averaged(system, train, pool, steps, keep, state=None):
    """Train on; the state, and the mean of the weights at every fifth step after `keep`, as a snapshot."""
    start = 0 if state is None else state.step
    trainer = Trainer(system, pool.parts["train"], ModelConfig(), [train], [1], state=state)
    kept = [trainer.state.weights.detach().clone() for _ in trainer.run(range(start + keep, start + steps + 1, 5))]
    parameters = unflatten(torch.stack(kept).mean(0), trainer.specs)
    return trainer.state, Snapshot(step=start + steps, system=system, model=ModelConfig(), parameters=parameters)


@pytest.mark.slow
def test_a_trained_network_has_the_entropy_production_of_the_linear_system():
    """Within 1% of 24.444, with an error far below that of the best score without attention; about 15 s on a core."""
    pool = Pool.make(TASK, 0, {"train": 32768, "validation": 16384})
    fast = TrainConfig(learning_rate=3e-3, batch_size=96)
    state, _ = averaged(TASK, fast, pool, 500, 500)
    _, network = averaged(TASK, dataclasses.replace(fast, learning_rate=1e-3), pool, 600, 200, state)
    found = TASK.diagnose(network.predict, pool.parts["validation"], Generator.of("d"))
    rate = linear_swimmers.entropy_production(LINEAR)
    assert float(found["entropy_production"]) == pytest.approx(rate, rel=0.01)
    assert found["score_error"] < 0.1
    for name in ("flow", "drift", "force", "score"):
        assert abs(float(found[f"balance_{name}"])) < 0.03, name


@pytest.mark.slow
def test_a_trained_network_agrees_with_the_identity_that_needs_no_score():
    """Soft particles, where the score is not known: entropy production by the network and by <g F>."""
    swimmers = Swimmers(n=3, spring=0.0, repulsion=1.0, sharpness=2.0, time_step=0.02)
    system = ActiveMatter(swimmers=swimmers, relax=8.0, spacing=1.0, rows_per_trajectory=32)
    pool = Pool.make(system, 0, {"train": 16384, "validation": 8192})
    fast = TrainConfig(learning_rate=3e-3, batch_size=96)
    state, _ = averaged(system, fast, pool, 500, 500)
    _, network = averaged(system, dataclasses.replace(fast, learning_rate=1e-3), pool, 600, 200, state)
    found = system.diagnose(network.predict, pool.parts["validation"], Generator.of("d"))
    assert float(found["entropy_production"]) == pytest.approx(float(found["entropy_production_expected"]), rel=0.06)
    for name in ("flow", "drift", "force"):
        assert abs(float(found[f"balance_{name}"])) < 0.06, name


def test_a_network_moves_to_another_number_and_density_of_particles():
    """Predictions of one box in the units of another: only the rows and the system change."""
    system = dataclasses.replace(SOFT_TASK, swimmers=BOX)
    statistics = rows_of(system, dtype=torch.float32).statistics
    other = dataclasses.replace(system, swimmers=dataclasses.replace(BOX, n=20, packing=0.2))
    rows = Rows(columns=rows_of(other, n=6, dtype=torch.float32).columns, statistics=statistics)
    assert (other.d_in, other.d_out) == (system.d_in, system.d_out)
    found = other.diagnose(nothing(other), rows, Generator.of("d"))
    assert found["entropy_production"] == 0
    assert found["entropy_production_expected"] > 0


def test_a_figure_shows_floors_that_all_members_share():
    sweep = RECIPES["active-matter"]()
    assert shared_floors(sweep).without_attention is None
    for other in (dataclasses.replace(sweep, axes={}), dataclasses.replace(sweep, axes={"system.relax": (1.0, 2.0)})):
        assert shared_floors(other) == sweep.system.floors()
