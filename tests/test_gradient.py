"""The gradient that is spelt out against autograd through the model's one forward pass, and against differences."""

import dataclasses
import gc

import pytest
import torch

from sim.generator import Generator
from sim.system import Batch, mean_square_loss
from tests.toys import MaskedToy
from train.config import ModelConfig, TrainConfig
from train.gradient import Gradient
from train.loop import Trainer
from train.model import forward, initial, tensor_specs
from train.state import flatten, unflatten

D_IN, D_OUT, S, B, N = 3, 2, 3, 4, 6
CONFIGS = {
    "lie": ModelConfig(width=12, layers=2, heads=3),
    "one narrow layer": ModelConfig(width=8, layers=1, heads=None, head_dim=4, feedforward=2),
    "mup": ModelConfig(width=24, layers=2, heads=2, parametrization="mup", base_width=12),
    "strang": ModelConfig(width=12, layers=2, heads=3, splitting="strang"),
    "factors": ModelConfig(
        width=12, layers=2, heads=2, splitting="strang", attention_residual=0.7, feedforward_residual=1.1
    ),
    "wide": ModelConfig(width=96, layers=2, heads=4),
    "heads of one number": ModelConfig(width=8, layers=2, heads=8),
}


def setting(config, members=S, dtype=torch.float32, d_in=D_IN, d_out=D_OUT):
    """Named parameters no vector of which is at its start, in one flat tensor as in training, and its gradient's."""
    specs = tensor_specs(config, d_in, d_out)
    named = initial(config, d_in, d_out, Generator.stack(range(members)), torch.float64)
    noise = Generator.stack(range(members)).fold("noise")
    named = {name: value + 0.3 * noise.fold(name).normal(*value.shape[1:]).double() for name, value in named.items()}
    weights = flatten(named, specs).to(dtype)
    gradient = torch.full_like(weights, torch.nan)
    return unflatten(weights, specs), unflatten(gradient, specs)


def batch_of(kind, dtype=torch.float32, members=S, d_in=D_IN, d_out=D_OUT):
    g = torch.Generator().manual_seed(1)
    lead = (B,) if kind == "shared" else (members, B)
    inputs = torch.randn(*lead, N, d_in, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randn(*lead, N, d_out, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.arange(N) < torch.randint(1, N + 1, (*lead, 1), generator=g) if kind == "masked" else None
    allowed = torch.rand(*lead, N, N, generator=g) < 0.5 if kind == "allowed" else None
    if allowed is not None:
        allowed[:, 0, 2] = False  # one query sees nothing
    return Batch(inputs=inputs, targets=targets, mask=mask, allowed=allowed)


def by_autograd(config, parameters, batch, loss_of=mean_square_loss):
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = loss_of(forward(leaves, config, batch), batch).mean(-1)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("kind", ["own", "shared", "masked", "allowed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradient_are_autograds_bit_for_bit(config, dtype, kind):
    parameters, gradients = setting(config, dtype=dtype)
    batch = batch_of(kind, dtype)
    loss = Gradient(config, parameters, gradients).of(mean_square_loss, batch)
    expected_loss, expected = by_autograd(config, parameters, batch)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bits_are_autograds_for_one_number_a_token_and_one_member(dtype, d_in, d_out, members):
    config = CONFIGS["lie"]
    parameters, gradients = setting(config, members, dtype, d_in, d_out)
    batch = batch_of("own", dtype, members, d_in, d_out)
    Gradient(config, parameters, gradients).of(mean_square_loss, batch)
    expected = by_autograd(config, parameters, batch)[1]
    assert all(torch.equal(gradients[name], expected[name]) for name in gradients)


def contrast(prediction, batch):
    return torch.einsum("sbnc,sbnc->sb", prediction, batch.targets)


def turned(prediction, batch):
    return (prediction.transpose(-1, -2) @ batch.targets).square().sum((-1, -2))


def total(prediction, batch):
    return prediction.sum((-1, -2))


def in_place(prediction, batch):
    return prediction.sub_(batch.targets).square().mean((-1, -2))


def log_loss(prediction, batch):
    return -(prediction.log_softmax(-1) * batch.targets.softmax(-1)).sum(-1).mean(-1)


@pytest.mark.parametrize("loss", [contrast, turned, total, in_place, log_loss])
@pytest.mark.parametrize("d_out", [1, D_OUT])
def test_bits_are_autograds_whatever_the_loss_does_with_predictions(loss, d_out):
    config, batch = CONFIGS["lie"], batch_of("own", d_out=d_out)
    parameters, gradients = setting(config, d_out=d_out)
    found = Gradient(config, parameters, gradients).of(loss, batch)
    expected_loss, expected = by_autograd(config, parameters, batch, loss)
    assert torch.equal(found, expected_loss)
    for name, gradient in gradients.items():
        if d_out == 1:  # how a loss lays out its gradient then reaches the order of autograd's sums
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(gradient, expected[name]), name


def test_keys_are_refused():
    config = CONFIGS["lie"]
    batch = dataclasses.replace(batch_of("own"), keys=torch.zeros(S, B, N, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"batch.keys: 'a tensor' is not allowed; it must be None, for all tokens"):
        Gradient(config, *setting(config)).of(mean_square_loss, batch)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_loss_changes_along_any_direction_as_the_gradient_says(config):
    parameters, gradients = setting(config, dtype=torch.float64)
    batch, noise, h = batch_of("allowed", torch.float64), Generator.stack(range(S)).fold("direction"), 1e-5
    Gradient(config, parameters, gradients).of(mean_square_loss, batch)
    along = {name: noise.fold(name).normal(*value.shape[1:]).double() for name, value in parameters.items()}

    def loss(t):
        moved = {name: value + t * along[name] for name, value in parameters.items()}
        return mean_square_loss(forward(moved, config, batch), batch).mean(-1)

    slope = sum((gradients[name] * along[name]).flatten(1).sum(1) for name in gradients)
    torch.testing.assert_close((loss(h) - loss(-h)) / (2 * h), slope, rtol=1e-5, atol=1e-7)


def test_parameters_are_read_and_gradients_written_where_they_lie():
    config = CONFIGS["lie"]
    parameters, gradients = setting(config)
    gradient, batch = Gradient(config, parameters, gradients), batch_of("own")
    gradient.of(mean_square_loss, batch)
    before = {name: value.clone() for name, value in gradients.items()}
    for value in parameters.values():
        value.mul_(1.1)
    gradient.of(mean_square_loss, batch)
    expected = by_autograd(config, parameters, batch)[1]
    assert all(torch.equal(gradients[name], expected[name]) for name in gradients)
    assert not any(torch.equal(gradients[name], before[name]) for name in gradients)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_nothing_is_kept_of_a_step():
    config, batch = CONFIGS["strang"], batch_of("masked")
    gradient = Gradient(config, *setting(config))
    gradient.of(mean_square_loss, batch)
    before = tensors_alive()
    loss = gradient.of(mean_square_loss, batch)
    assert tensors_alive() == before + 1 and loss.grad_fn is None


LOCAL = ModelConfig(width=8, layers=2, heads=2, attention="local", neighbours=3)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (CONFIGS["lie"], {}, True),
        (CONFIGS["lie"], {"precision": "float64"}, True),
        (CONFIGS["lie"], {"precision": "bf16"}, False),
        (CONFIGS["lie"], {"precision": "tf32"}, True),
        (CONFIGS["lie"], {"compiled": True}, False),
        (LOCAL, {}, False),
        (dataclasses.replace(LOCAL, neighbours=99), {}, True),  # as many as there are: all tokens see all
    ],
)
def test_training_takes_it_wherever_it_is_exact(model, options, expected, monkeypatch):
    system, train, taken = MaskedToy(), TrainConfig(steps=2, batch_size=4, **options), []
    of = Gradient.of
    monkeypatch.setattr(Gradient, "of", lambda self, loss, batch: taken.append(1) or of(self, loss, batch))
    rows = system.rows("train", 16, Generator.of("rows")).to("cpu", train.dtype)
    rows = dataclasses.replace(rows, statistics=system.statistics(rows))
    Trainer(system, rows, model, [train], [0]).advance()
    assert bool(taken) is expected
