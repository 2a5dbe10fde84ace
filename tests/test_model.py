"""The stacked model against an independent single model built of stock `torch.nn` parts, and its symmetries."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sim.generator import Generator
from sim.system import Batch
from tests.stock import StockTransformer, stacked
from tests.toys import MaskedToy
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer
from train.model import HeadEdit, count_parameters, finish_layer, forward, initial, layer, look, tensor_specs
from train.snapshot import Snapshot

D_IN, D_OUT, B, N = 3, 2, 4, 6


def references(config, count=3):
    torch.manual_seed(0)
    models = [StockTransformer(config, D_IN, D_OUT).double() for _ in range(count)]
    with torch.no_grad():
        for parameter in itertools.chain(*(model.parameters() for model in models)):
            parameter.add_(0.3 * torch.randn_like(parameter))  # no vector stays at 0 or 1
    return models, stacked(models)


def random_batch(seed=0, **fields):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, D_IN, generator=g, dtype=torch.float64)
    return Batch(inputs=x, targets=torch.zeros(B, N, D_OUT, dtype=torch.float64), **fields)


CONFIGS = [
    ModelConfig(width=12, layers=2, heads=3),
    ModelConfig(width=16, layers=1, heads=None, head_dim=4, feedforward=2),
    ModelConfig(width=24, layers=2, heads=2, parametrization="mup", base_width=12),
    ModelConfig(width=12, layers=2, heads=3, splitting="strang"),
    ModelConfig(width=12, layers=2, heads=2, splitting="strang", attention_residual=0.7, feedforward_residual=1.1),
]
EITHER = [CONFIGS[0], CONFIGS[3]]
each_splitting = pytest.mark.parametrize("config", EITHER, ids=["lie", "strang"])


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_and_gradient_equal_the_stock_model(config):
    models, parameters = references(config)
    assert parameters.keys() == tensor_specs(config, D_IN, D_OUT).keys()
    batch = random_batch()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    together = forward(leaves, config, batch)
    alone = torch.stack([model(batch.inputs) for model in models])
    torch.testing.assert_close(together, alone)
    together.square().sum().backward()
    alone.square().sum().backward()
    assert all(parameter.grad is not None for model in models for parameter in model.parameters())
    for name, expected in stacked(models, gradient=True).items():
        torch.testing.assert_close(leaves[name].grad, expected, msg=name)


@each_splitting
def test_masks_hide_keys_as_in_the_stock_model(config):
    models, parameters = references(config)
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(N) < torch.tensor([6, 4, 3, 5])[:, None]
    allowed = (torch.rand(B, N, N, generator=g) < 0.6) | torch.eye(N, dtype=torch.bool)
    batch = random_batch(mask=mask, allowed=allowed)
    visible = allowed & mask[:, None, :]
    visible |= ~mask[..., None] & torch.eye(N, dtype=torch.bool)  # padding looks at itself in the stock model: no NaN
    alone = torch.stack([model(batch.inputs, visible) for model in models])
    torch.testing.assert_close(forward(parameters, config, batch)[:, mask], alone[:, mask])


@each_splitting
def test_local_keys_equal_hiding_all_others(config):
    g = torch.Generator().manual_seed(2)
    _, parameters = references(config)
    keys = torch.stack([torch.randperm(N, generator=g)[:3] for _ in range(B * N)]).view(B, N, 3)
    allowed = torch.zeros(B, N, N, dtype=torch.bool).scatter(2, keys, True)
    near, masked = random_batch(keys=keys), random_batch(allowed=allowed)
    torch.testing.assert_close(forward(parameters, config, near), forward(parameters, config, masked))
    pattern = snapshot_of(config, parameters).attention(masked)
    index = keys.expand(*pattern.shape[:-1], 3)
    torch.testing.assert_close(snapshot_of(config, parameters).attention(near), pattern.gather(-1, index))


@each_splitting
def test_permuting_tokens_permutes_predictions(config):
    _, parameters = references(config)
    batch, order = random_batch(), torch.tensor([3, 1, 5, 0, 2, 4])
    moved = Batch(inputs=batch.inputs[:, order], targets=batch.targets)
    torch.testing.assert_close(forward(parameters, config, moved), forward(parameters, config, batch)[:, :, order])


def snapshot_of(config, parameters):
    return Snapshot(step=0, system=MaskedToy(d=D_IN), model=config, parameters=parameters)


def test_attention_rows_are_probabilities_and_hidden_keys_have_none():
    config = CONFIGS[0]
    _, parameters = references(config)
    mask = torch.arange(N) < torch.tensor([6, 4, 3, 5])[:, None]
    attention = snapshot_of(config, parameters).attention(random_batch(mask=mask))
    assert attention.shape == (3, config.layers, config.n_heads, B, N, N)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    assert (attention[..., ~mask[:, None].expand(B, N, N)] == 0).all()


def feed_by_hand(config, own, block, x):
    if f"{block}.W1" not in own:
        return x
    y = F.layer_norm(x, (config.width,)) * own[f"{block}.norm2.scale"] + own[f"{block}.norm2.shift"]
    added = F.gelu(y @ own[f"{block}.W1"] + own[f"{block}.b1"]) @ own[f"{block}.W2"] + own[f"{block}.b2"]
    return x + added * (0.5 if config.splitting == "strang" else 1.0)


class Edit:
    def __init__(self, layer, output=(), pattern=()):
        self.layer, self.output, self.pattern = layer, output, pattern


@each_splitting
@pytest.mark.parametrize("masked", [False, True])
def test_interventions_equal_the_spelt_out_ones(masked, config):
    """Head contributions taken apart by hand, the mean one put in place of head 1; uniform attention for head 0."""
    _, parameters = references(config)
    mask = torch.arange(N) < torch.tensor([6, 4, 3, 5])[:, None] if masked else torch.ones(B, N, dtype=torch.bool)
    batch = random_batch(mask=mask if masked else None)
    snapshot = snapshot_of(config, parameters)
    attention = snapshot.attention(batch)
    found = snapshot.predict(batch, (Edit(1, output=(1,), pattern=(0,)),))
    for s in range(3):
        own = {name: value[s] for name, value in parameters.items()}
        x = feed_by_hand(config, own, "1.before", snapshot._residual(batch, 1)[s][:B])
        y = F.layer_norm(x, (config.width,)) * own["1.norm1.scale"] + own["1.norm1.shift"]
        uniform = mask[:, None].double().expand(B, N, N) / mask.sum(-1)[:, None, None]
        said = []
        for h in range(config.n_heads):
            pattern = uniform if h == 0 else attention[s, 1, h]
            said.append(pattern @ (y @ own["1.Wv"][h]) @ own["1.Wo"][h])
        said[1] = said[1][mask].mean(0).expand(B, N, -1)
        x = x + sum(said)
        x = feed_by_hand(config, own, "1", x)
        out = (F.layer_norm(x, (config.width,)) * own["norm.scale"] + own["norm.shift"]) @ own["unembed.W"]
        torch.testing.assert_close(found[s][mask], (out + own["unembed.b"])[mask])


@each_splitting
def test_an_empty_edit_changes_nothing_and_the_cache_knows_its_batch(config):
    _, parameters = references(config)
    snapshot, first, second = snapshot_of(config, parameters), random_batch(0), random_batch(1)
    for batch in (first, second, first):
        torch.testing.assert_close(snapshot.predict(batch, (Edit(1),)), snapshot.predict(batch))
    x = snapshot._residual(first, 0)
    reading = look(parameters, config, 0, x, first)
    assert torch.equal(reading.merged(first, HeadEdit()), reading.merged())
    torch.testing.assert_close(
        finish_layer(parameters, config, 0, reading.stream, reading.merged()), layer(parameters, config, 0, x, first)
    )


def test_parameter_count_in_closed_form():
    for config in CONFIGS:
        D, F_, L = config.width, config.feedforward * config.width, config.layers
        one_layer = 4 * D * D + 4 * D + 2 * D * F_ + F_ + D
        one_layer += 3 * D if config.splitting == "strang" else 0  # a norm and a bias more, whatever the width
        total = D_IN * D + D + L * one_layer + 2 * D + D * D_OUT + D_OUT
        assert count_parameters(tensor_specs(config, D_IN, D_OUT).values()) == total


def test_mup_is_standard_at_the_base_width():
    standard, mup = ModelConfig(width=32), ModelConfig(width=32, parametrization="mup")
    keys = Generator.stack([1, 2])
    a, b = (initial(config, D_IN, D_OUT, keys, torch.float64) for config in (standard, mup))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert standard.logit_scale == pytest.approx(mup.logit_scale, rel=1e-15)
    for optimizer in ("adam", "sgd"):
        assert all(spec.rate(mup, optimizer) == 1 for spec in tensor_specs(mup, D_IN, D_OUT).values())


def test_initial_scales():
    config = ModelConfig(width=256, parametrization="mup", base_width=32)
    values = initial(config, D_IN, D_OUT, Generator.stack([5]), torch.float64)
    for name, power in (("0.Wq", 256), ("0.W2", 1024), ("embed.W", D_IN), ("unembed.W", 256 * 8)):
        assert values[name].std().item() == pytest.approx(power**-0.5, rel=0.15), name
    assert (values["0.norm1.scale"] == 1).all()
    assert (values["0.b1"] == 0).all()


def change_in_activations(parametrization, width, steps=6):
    """Root mean square change of the stream before the output, over a few Adam steps: the coordinate check."""
    system = MaskedToy(n=6)
    config = ModelConfig(width=width, layers=2, heads=4, parametrization=parametrization, base_width=16)
    train = TrainConfig(steps=steps, batch_size=32, learning_rate=3e-3, precision="float64")
    rows = system.rows("train", 256, Generator.of("rows")).to("cpu", torch.float64)
    trainer = Trainer(system, rows, config, [train] * 3, [1, 2, 3])
    batch = system.draw(rows.take(slice(0, 64)), Generator.of("draw"))

    def stream():
        with torch.no_grad():
            return trainer.snapshot()._residual(batch, 2).clone()

    before = stream()
    list(trainer.run([steps]))
    return (stream() - before).square().mean().sqrt().item()


def test_coordinates_drift_with_width_under_standard_and_not_under_mup():
    widths = torch.tensor([16.0, 64.0, 256.0])
    slopes = {}
    for parametrization in ("standard", "mup"):
        scale = torch.tensor([change_in_activations(parametrization, int(width)) for width in widths])
        x, y = widths.log() - widths.log().mean(), scale.log()
        slopes[parametrization] = ((x * (y - y.mean())).sum() / x.square().sum()).item()
    assert slopes["standard"] > 0.3
    assert abs(slopes["mup"]) < 0.1
