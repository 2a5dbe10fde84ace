"""Training packs: invariance of every member, independence of neighbours, exact resume, and that it does train."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from sim.active_matter import ActiveMatter
from sim.generator import Generator
from sim.particles import ParticleSystem
from sim.pool import Pool
from tests.toys import MaskedToy, NoisedToy
from train import checkpoint
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer, probe_steps, shape_of
from train.model import forward, tensor_specs
from train.state import ALIGNMENT, flatten, join, unflatten

MODEL = ModelConfig(width=16, layers=2, heads=2)
TRAIN = TrainConfig(steps=12, batch_size=7, learning_rate=3e-3)
MASKED, NOISED = MaskedToy(), NoisedToy()


def rows_of(system, dtype=torch.float32, n=64):
    return Pool.make(system, 0, {"train": n}).to("cpu", dtype).parts["train"]


def trainer(system=MASKED, trains=TRAIN, keys=(1,), model=MODEL, state=None, n=64):
    trains = trains if isinstance(trains, list) else [trains] * len(keys)
    dtype = trains[0].dtype
    return Trainer(system, rows_of(system, dtype, n), model, trains, list(keys), state=state)


def run(*args, steps=12, **kwargs):
    pack = trainer(*args, **kwargs)
    list(pack.run([steps]))
    return pack.state


def test_probe_steps():
    assert probe_steps(1, 20) == (0, 1)
    steps = probe_steps(10_000, 20)
    assert steps[0] == 0
    assert steps[-1] == 10_000
    assert list(steps) == sorted(set(steps))
    for low, high in ((100, 1000), (1000, 10_000)):
        assert 20 <= sum(low <= step < high for step in steps) <= 21
    gaps = np.diff(np.log10([step for step in steps if step >= 100]))
    assert gaps.max() < 1.1 / 20


@pytest.mark.parametrize(
    ("system", "model", "train"),
    [
        (MASKED, MODEL, TRAIN),
        (MASKED, MODEL, dataclasses.replace(TRAIN, precision="float64", clip=0.5, weight_decay=0.1)),
        (NOISED, MODEL, dataclasses.replace(TRAIN, optimizer="sgd", warmup=5)),
        (NOISED, ModelConfig(width=48, heads=3, layers=1, parametrization="mup"), TRAIN),
        (MASKED, ModelConfig(width=64, heads=None, head_dim=16), dataclasses.replace(TRAIN, batch_size=32)),
        (MASKED, ModelConfig(width=20, heads=4, feedforward=3), dataclasses.replace(TRAIN, batch_size=3)),
        (NOISED, dataclasses.replace(MODEL, splitting="strang"), TRAIN),
        (NOISED, dataclasses.replace(MODEL, attention="local", neighbours=3), TRAIN),
        (MASKED, ModelConfig(width=32, attention="local", neighbours=4), dataclasses.replace(TRAIN, batch_size=32)),
        (MaskedToy(d=1), MODEL, dataclasses.replace(TRAIN, batch_size=16)),  # one number a token, in and out
        (NoisedToy(d=1), MODEL, dataclasses.replace(TRAIN, batch_size=16, precision="float64")),
        (NoisedToy(d=1, n=16), ModelConfig(width=32), dataclasses.replace(TRAIN, batch_size=8)),
        (NOISED, ModelConfig(width=8, heads=8), TRAIN),  # one number a head
        *(  # batches that end within a line of the cache or a vector of numbers
            (kind(d=d, n=n), model, dataclasses.replace(TRAIN, batch_size=batch, precision=precision))
            for kind, d, n, batch, precision, model in [
                (NoisedToy, 6, 7, 25, "float32", ModelConfig(width=32)),
                (NoisedToy, 5, 9, 50, "float32", ModelConfig(width=32)),
                (NoisedToy, 3, 7, 25, "float64", ModelConfig(width=32)),
                (NoisedToy, 7, 10, 28, "float32", ModelConfig(width=24, feedforward=2)),
                (NoisedToy, 3, 5, 11, "float32", ModelConfig(width=12, heads=4, feedforward=3, splitting="strang")),
                (NoisedToy, 5, 11, 9, "float32", ModelConfig(width=20, attention="local", neighbours=3)),
                (MaskedToy, 7, 13, 26, "float32", ModelConfig(width=20, splitting="strang")),
                (NoisedToy, 7, 3, 15, "bf16", ModelConfig(width=12, heads=4, feedforward=1)),
            ]
        ),
    ],
)
def test_a_member_follows_the_same_path_in_any_company(system, model, train):
    alone = run(system, train, (7,), model)
    many = list(range(32))
    np.random.default_rng(0).shuffle(many)
    for keys in ([3, 7, 9, 11, 13, 15, 17, 19], many):
        pack = run(system, train, keys, model)
        place = keys.index(7)
        for name, value in alone.tensors().items():
            assert torch.equal(pack.tensors()[name][place], value[0]), (name, len(keys))


@dataclasses.dataclass(frozen=True)
class Edit:
    layer: int = 0
    output: tuple[int, ...] = (0,)
    pattern: tuple[int, ...] = (1,)


@pytest.mark.parametrize("examples", [1, 3, 10, 18])
@pytest.mark.parametrize("system", [NoisedToy(d=7, n=10), MaskedToy(d=7, n=13)])
def test_what_is_measured_of_a_member_is_the_same_in_any_company(system, examples):
    batch = system.draw(rows_of(system).take(slice(0, examples)), Generator.of("probe"))
    model = ModelConfig(width=24, heads=4)

    def measured(keys):
        snapshot = trainer(system, TRAIN, keys, model).snapshot()
        edited = [snapshot.predict(batch, edits) for edits in ((Edit(),), (Edit(1),))]
        found = (snapshot.attention(batch), snapshot.predict(batch), *edited, *snapshot.gradient(batch).values())
        return [values[keys.index(7)] for values in found]

    alone = measured([7])
    assert alone[0].shape[2] == alone[1].shape[0] == alone[2].shape[0] == examples
    for keys in ([1, 7, 3], [9, 8, 7, 6, 5, 4, 3]):
        assert all(map(torch.equal, measured(keys), alone))


@pytest.mark.parametrize(
    ("system", "model"),
    [
        (ParticleSystem(), ModelConfig(width=32)),
        (ParticleSystem(), ModelConfig(width=32, attention="local", neighbours=6, splitting="strang")),
        (ActiveMatter(), ModelConfig(width=32)),
    ],
)
def test_particles_follow_the_same_path_in_any_company(system, model):
    train = dataclasses.replace(TRAIN, batch_size=16)
    alone, pack = (run(system, train, keys, model, steps=6) for keys in ((7,), (1, 7, 3)))
    assert torch.equal(alone.weights[0], pack.weights[1])


def test_members_with_their_own_keys_differ():
    state = run(keys=(1, 2))
    assert not torch.equal(state.weights[0], state.weights[1])


def reference_training(system, train, key, steps):
    """The same member by `torch.optim` on separate tensors: same start, same batches."""
    rows = rows_of(system, torch.float64)
    begin = trainer(system, train, (key,))
    parameters = {name: value.detach().clone().requires_grad_() for name, value in begin.parameters.items()}
    values = list(parameters.values())
    kind = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[train.optimizer]
    decay = {"weight_decay": train.weight_decay} if train.optimizer == "adam" else {}
    optimizer = kind(values, lr=train.learning_rate, **decay)
    generator = Generator.stack([key])
    losses = []
    for step in range(steps):
        index = generator.fold("rows").fold(step).integers(len(rows), train.batch_size)
        batch = system.draw(rows.take(index), generator.fold("draw").fold(step))
        loss = system.loss(forward(parameters, MODEL, batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(values, train.clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * min(1.0, (step + 1) / max(train.warmup, 1))
        optimizer.step()
        losses.append(loss.item())
    return parameters, losses


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_decay": 0.2, "clip": 0.3}, {"optimizer": "sgd", "learning_rate": 0.1, "warmup": 8}],
)
def test_steps_equal_those_of_torch_optim(changes):
    train = dataclasses.replace(TRAIN, precision="float64", **changes)
    pack = trainer(MASKED, train, (5, 6))
    list(pack.run([12]))
    for s, key in enumerate((5, 6)):
        expected, losses = reference_training(MASKED, train, key, 12)
        for name, value in expected.items():
            close = {"rtol": 1e-8, "atol": 1e-10} if train.clip is None else {"rtol": 1e-4, "atol": 1e-8}
            torch.testing.assert_close(pack.parameters[name][s], value[0], **close)  # torch clips by norm + 1e-6
    assert pack.take_loss()[1].item() == pytest.approx(np.mean(losses), rel=1e-9)
    assert math.isnan(pack.take_loss()[1].item())


def test_rates_decays_and_clips_are_each_members_own():
    kinds = [
        TRAIN,
        dataclasses.replace(TRAIN, learning_rate=1e-4),
        dataclasses.replace(TRAIN, weight_decay=0.5),
        dataclasses.replace(TRAIN, clip=1e-3),
    ]
    assert len({shape_of(kind) for kind in kinds}) == 1
    pack = run(trains=kinds, keys=(7, 7, 7, 7))
    for place, kind in enumerate(kinds):
        assert torch.equal(pack.weights[place], run(trains=kind, keys=(7,)).weights[0]), place
    assert len({row.numpy().tobytes() for row in pack.weights}) == 4


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_member_that_explodes_is_frozen_and_its_neighbours_do_not_notice(rate):
    wild = dataclasses.replace(TRAIN, optimizer="sgd", learning_rate=rate)
    calm = dataclasses.replace(TRAIN, optimizer="sgd", learning_rate=1e-2)
    pack = run(trains=[calm, wild, calm], keys=(1, 2, 3))
    assert pack.diverged[1] > 0
    assert torch.equal(pack.diverged[[0, 2]], torch.tensor([-1, -1]))
    for place, key in ((0, 1), (2, 3)):
        assert torch.equal(pack.weights[place], run(trains=calm, keys=(key,)).weights[0])
    frozen = run(trains=[calm, wild, calm], keys=(1, 2, 3), steps=int(pack.diverged[1]))
    assert torch.equal(frozen.weights[1], pack.weights[1])
    assert torch.isfinite(pack.loss_sum[[0, 2]]).all()
    assert torch.isnan(pack.loss_sum[1])


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resume_is_exact(stop):
    whole = run(NOISED, keys=(1, 2, 3))
    first = run(NOISED, keys=(1, 2, 3), steps=stop)
    arrays = checkpoint.decode_arrays(checkpoint.encode_arrays(checkpoint.to_arrays(first)))
    second = run(NOISED, keys=(1, 2, 3), state=checkpoint.to_state(stop, arrays))
    for name, value in whole.tensors().items():
        assert torch.equal(second.tensors()[name], value), name


def test_slices_resume_in_packs_of_another_size_and_order():
    whole = run(keys=(1, 2, 3, 4))
    halves = [run(keys=keys, steps=5) for keys in ((1, 2), (3, 4))]
    order = [(1, 0), (0, 1), (0, 0)]  # members 3, 2, 1
    state = join([halves[half].take([row]) for half, row in order])
    again = run(keys=(3, 2, 1), state=state)
    for name, value in whole.tensors().items():
        assert torch.equal(again.tensors()[name], value[[2, 1, 0]]), name


def test_states_at_different_steps_do_not_join():
    with pytest.raises(ValueError, match="step"):
        join([run(steps=2), run(steps=3)])


def test_one_pack_after_another_equals_it_alone():
    run(keys=(8, 9))
    assert torch.equal(run(NOISED, keys=(1,)).weights, run(NOISED, keys=(1,)).weights)


def test_run_yields_every_stop_once_and_skips_those_behind():
    pack = trainer()
    assert [snapshot.step for snapshot in pack.run([0, 3, 3, 5])] == [0, 3, 3, 5]
    assert [snapshot.step for snapshot in pack.run([1, 5, 8])] == [5, 8]


def test_flat_rows_and_named_views_are_the_same_numbers():
    specs = tensor_specs(MODEL, 2, 2)
    named = {name: torch.randn(3, *spec.shape) for name, spec in specs.items()}
    flat = flatten(named, specs)
    assert flat.shape[1] % ALIGNMENT == 0
    assert all(torch.equal(view, named[name]) for name, view in unflatten(flat, specs).items())


def test_training_finds_what_needs_attention():
    """The masked toy's best loss without attention is 1 by construction: only a head that looks can beat it."""
    train = TrainConfig(steps=400, batch_size=32, learning_rate=3e-3)
    pack = trainer(MASKED, train, (1, 2), ModelConfig(width=16, layers=1, heads=2), n=4096)
    list(pack.run([300]))
    pack.take_loss()
    list(pack.run([400]))
    assert (pack.take_loss() < 0.5 * MASKED.floors().without_attention).all()


def test_members_that_do_not_fit_one_pack_are_refused():
    with pytest.raises(ValueError, match="train"):
        trainer(trains=[TRAIN, dataclasses.replace(TRAIN, batch_size=9)], keys=(1, 2))
    with pytest.raises(ValueError, match="keys"):
        trainer(trains=[TRAIN], keys=(1, 2))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TrainConfig, {"learning_rate": 0.0}, r"learning_rate: 0.0 is not allowed; it must be above 0"),
        (TrainConfig, {"learning_rate": math.nan}, "learning_rate: nan .* finite"),
        (TrainConfig, {"steps": 0}, "steps: 0"),
        (TrainConfig, {"optimizer": "lion"}, "optimizer: 'lion' .* 'adam', 'sgd'"),
        (TrainConfig, {"beta2": 1.0}, "beta2: 1.0"),
        (TrainConfig, {"clip": 0.0}, "clip: 0.0"),
        (ModelConfig, {"layers": 0}, "layers: 0"),
        (ModelConfig, {"heads": 4, "head_dim": 8}, r"heads, head_dim: \(4, 8\)"),
        (ModelConfig, {"heads": None}, "heads, head_dim"),
        (ModelConfig, {"parametrization": "ntk"}, "parametrization: 'ntk'"),
    ],
)
def test_configs_name_what_is_wrong(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width: 20 is not allowed; it must be divisible by heads = 8"):
        tensor_specs(ModelConfig(width=20, heads=8), 2, 2)
    with pytest.raises(ValueError, match="divisible by head_dim = 16"):
        tensor_specs(ModelConfig(width=20, heads=None, head_dim=16), 2, 2)


def test_a_width_that_would_not_give_equal_bits_is_refused():
    with pytest.raises(ValueError, match="width: 10 is not allowed; it must be a multiple of 4"):
        tensor_specs(ModelConfig(width=10, heads=2), 2, 2)
