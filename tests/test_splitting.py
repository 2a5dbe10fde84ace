"""The two ways to put a layer together: the Macaron layer against the standard one, and the order of the splittings."""

import dataclasses

import pytest
import torch

from sim.generator import Generator
from sim.system import Batch
from train.config import ModelConfig
from train.model import Reading, count_parameters, feed, forward, initial, look, tensor_specs

D_IN, D_OUT = 3, 2
STRANG = ModelConfig(width=16, layers=2, heads=2, feedforward=4, splitting="strang")
HALF = ModelConfig(width=16, layers=2, heads=2, feedforward=2)  # a standard layer with one of the two feed-forwards
BATCH = Batch(inputs=Generator.of("inputs").normal(4, 5, D_IN, dtype=torch.float64), targets=torch.zeros(4, 5, D_OUT))


def parameters(config=STRANG):
    """Of two members, no vector at 0 or 1."""
    values = initial(config, D_IN, D_OUT, Generator.stack([1, 2]), torch.float64)
    noise = Generator.stack([3, 4])
    return {k: v + 0.3 * noise.fold(k).normal(*v.shape[1:], dtype=torch.float64) for k, v in values.items()}


def without(values, block):
    """Layers in which a feed-forward adds nothing."""
    names = [f"{layer}{block}.{name}" for layer in range(2) for name in ("W2", "b2")]
    return values | {name: torch.zeros_like(values[name]) for name in names}


def test_without_its_first_feed_forward_it_is_a_standard_layer_of_half_the_hidden_width():
    values = without(parameters(), ".before")
    doubled = {f"{layer}.{name}" for layer in range(2) for name in ("W2", "b2")}
    standard = {k: v / 2 if k in doubled else v for k, v in values.items() if ".before" not in k}
    assert standard.keys() == tensor_specs(HALF, D_IN, D_OUT).keys()
    assert torch.equal(forward(values, STRANG, BATCH), forward(standard, HALF, BATCH))


def test_without_its_second_it_is_feed_forward_then_attention():
    values = without(parameters(), "")
    reading: Reading = look(
        values, STRANG, 0, stream := Generator.stack([5, 6]).normal(4, 5, 16, dtype=torch.float64), BATCH
    )
    assert torch.equal(reading.stream, feed(values, STRANG, "0.before", stream))
    full = {**values, "0.before.W2": values["0.before.W2"] / 2, "0.before.b2": values["0.before.b2"] / 2}
    whole = ModelConfig(width=16, layers=2, heads=2, splitting="strang", feedforward_residual=1.0)
    torch.testing.assert_close(look(full, whole, 0, stream, BATCH).stream, reading.stream)


def test_without_both_only_attention_is_left():
    values = without(without(parameters(), ".before"), "")
    bare = ModelConfig(width=16, layers=2, heads=2, feedforward=2, feedforward_residual=0.0)
    standard = {k: v for k, v in values.items() if ".before" not in k}
    assert torch.equal(forward(values, STRANG, BATCH), forward(standard, bare, BATCH))
    silent = ModelConfig(width=16, layers=2, heads=2, splitting="strang", attention_residual=0.0)
    one_by_one = torch.stack([forward(values, silent, Batch(inputs=BATCH.inputs[:, i : i + 1], targets=BATCH.targets))
                              for i in range(5)], 2).squeeze(3)  # fmt: skip
    torch.testing.assert_close(forward(values, silent, BATCH), one_by_one)


@pytest.mark.parametrize("feedforward", [1, 4])
@pytest.mark.parametrize("width", [16, 64])
def test_both_layers_have_as_many_parameters_but_for_three_widths(width, feedforward):
    def count(splitting):
        config = ModelConfig(width=width, layers=3, heads=4, feedforward=feedforward, splitting=splitting)
        return count_parameters(tensor_specs(config, D_IN, D_OUT).values())

    assert count("strang") - count("lie") == 3 * 3 * width


# --- the order of the splittings: x' = (A + B) x over one step h, A and B any matrices


def exact(M, h):
    return torch.linalg.matrix_exp(h * M)


def euler(M, h):
    return torch.eye(len(M), dtype=M.dtype) + h * M


def one_step(splitting, flow, A, B, h):
    """A stands for attention, B for the feed-forward, in the order of the layer."""
    return flow(B, h) @ flow(A, h) if splitting == "lie" else flow(B, h / 2) @ flow(A, h) @ flow(B, h / 2)


@pytest.mark.parametrize(
    ("splitting", "flow", "order"), [("lie", exact, 2), ("strang", exact, 3), ("lie", euler, 2), ("strang", euler, 2)]
)
def test_order_of_the_local_error(splitting, flow, order):
    """Strang is of higher order for exact sub-flows only: with what a network computes, Euler steps, it is not."""
    A, B = (Generator.of("flow", name).normal(6, 6, dtype=torch.float64) for name in "AB")
    h = torch.logspace(-3, -2, 8, dtype=torch.float64)
    error = torch.stack([(one_step(splitting, flow, A, B, x) - exact(A + B, x)).norm() for x in h])
    x, y = h.log() - h.log().mean(), error.log()
    assert float((x * y).sum() / x.square().sum()) == pytest.approx(order, abs=0.1)
    commuting = torch.diag(torch.arange(6.0, dtype=torch.float64))
    if flow is exact:
        torch.testing.assert_close(one_step(splitting, exact, commuting, commuting, 0.1), exact(2 * commuting, 0.1))


def test_factors_of_residuals():
    """Half of what a feed-forward adds, unless the factor says otherwise."""
    values, stream = parameters(), Generator.stack([7, 8]).normal(4, 5, 16, dtype=torch.float64)
    unit = feed(values, HALF, "0.before", stream) - stream
    torch.testing.assert_close(feed(values, STRANG, "0.before", stream) - stream, 0.5 * unit)
    whole = dataclasses.replace(STRANG, feedforward_residual=1.0)
    torch.testing.assert_close(feed(values, whole, "0.before", stream) - stream, unit)
