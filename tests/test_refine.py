"""The loss around single heads against full forward passes with that head's weights replaced, one chain at a time."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sim.generator import Generator
from sim.system import Batch, System
from tests.toys import EnumeratedToy, MaskedToy, NoisedToy
from train import refine
from train.config import ModelConfig
from train.model import forward, tensor_specs
from train.refine import HEAD, HeadTarget, LineTarget, head_gradients
from train.snapshot import Snapshot

S, N_EXAMPLES, B = 3, 70, 5  # more examples than are computed at once
HEADS = [(0, 1), (2, 0), (2, 1), (0, 1)]  # member 1 unused, one place twice
PLACE = torch.tensor([2, 0, 3, 1, 2, 1, 0])


@dataclass(frozen=True, kw_only=True)
class Case:
    system: System
    model: ModelConfig
    batch: Batch
    tokens: Tensor | None = None

    def parameters(self, dtype=torch.float64):
        """No vector stays at 0 or 1, no residual stream is without a mean."""
        g = torch.Generator().manual_seed(0)
        specs = tensor_specs(self.model, self.system.d_in, self.system.d_out)
        return {
            name: torch.randn(S, *spec.shape, generator=g, dtype=torch.float64)
            .mul(0.4 if spec.fill is not None else 1.3 * spec.std(self.model))
            .add(spec.fill or 0.2 * (spec.fill is not None))
            .to(dtype)
            for name, spec in specs.items()
        }

    def target(self, layer, heads=HEADS, dtype=torch.float64):
        return HeadTarget(
            self.system, self.model, self.parameters(dtype), self.batch, heads, layer, B, tokens=self.tokens
        )

    def slow(self, layer, weights, rows, place=PLACE):
        """Losses `[C, B]` by the whole model, one chain after another."""
        found, parameters = [], self.parameters()
        for c, p in enumerate(place.tolist()):
            member, head = HEADS[p]
            own = {name: value[member : member + 1].clone() for name, value in parameters.items()}
            for name in HEAD:
                own[f"{layer}.{name}"][0, head] = weights[name][c]
            part = {name: getattr(self.batch, name) for name in ("inputs", "targets", "mask", "keys", "allowed")}
            part = Batch(**{name: None if value is None else value[rows[c]] for name, value in part.items()})
            prediction = forward(own, self.model, part)
            counted = part if self.tokens is None else replace(part, mask=self.tokens[rows[c]])
            found.append(self.system.loss(prediction, counted)[0])
        return torch.stack(found)


def drawn(system):
    generator = Generator.of("refine", 0)
    rows = system.rows("train", N_EXAMPLES, generator)
    return system.draw(replace(rows, statistics=system.statistics(rows)), generator.fold("noise"))


def cases():
    small = ModelConfig(width=12, layers=2, heads=3)
    large = ModelConfig(width=32, layers=2, heads=2, parametrization="mup", base_width=16)  # products are MKL's own
    strang = ModelConfig(width=12, layers=2, heads=3, splitting="strang", attention_residual=0.8)
    masked, plain, wide, enumerated = (
        drawn(toy) for toy in (MaskedToy(), NoisedToy(), NoisedToy(n=12), EnumeratedToy())
    )
    g = torch.Generator().manual_seed(1)
    keys = torch.randint(0, 7, (N_EXAMPLES, 7, 3), generator=g)
    near = torch.randint(0, 6, (N_EXAMPLES, 6, 4), generator=g)
    allowed = torch.rand(N_EXAMPLES, 12, 12, generator=g) < 0.5
    allowed[:, 3] = False  # a query that sees nothing
    some = torch.rand(N_EXAMPLES, 6, generator=g) < 0.4
    return {
        "plain": Case(system=EnumeratedToy(), model=small, batch=enumerated),
        "masked": Case(system=MaskedToy(), model=small, batch=masked),
        "some tokens": Case(system=MaskedToy(), model=small, batch=masked, tokens=some & masked.mask),
        "local": Case(system=NoisedToy(), model=small, batch=replace(plain, keys=keys, allowed=keys > 0)),
        "local, masked": Case(system=MaskedToy(), model=small, batch=replace(masked, keys=near)),
        "strang": Case(system=MaskedToy(), model=strang, batch=masked),
        "large": Case(system=NoisedToy(n=12), model=large, batch=wide),
        "allowed": Case(system=NoisedToy(n=12), model=large, batch=replace(wide, allowed=allowed)),
    }


CASES = cases()
both_layers = pytest.mark.parametrize("layer", [0, 1])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def moved(target, size=0.3):
    """Weights of chains some way from their places, as leaves."""
    g = torch.Generator().manual_seed(2)
    centre = {name: value[PLACE] for name, value in target.centre.items()}
    return {
        name: (value + size * torch.randn(value.shape, generator=g, dtype=torch.float64)).to(value).requires_grad_()
        for name, value in centre.items()
    }


def some_rows():
    return torch.randint(0, N_EXAMPLES, (len(PLACE), B), generator=torch.Generator().manual_seed(3))


def gradients(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@both_layers
@every_case
def test_losses_and_gradients_equal_the_whole_model_with_a_head_replaced(case, layer):
    target, rows = case.target(layer), some_rows()
    placed, weights = target.at(PLACE), moved(target)
    slow = case.slow(layer, weights, rows)
    torch.testing.assert_close(placed.loss_of(weights, rows), slow)
    torch.testing.assert_close(placed.loss(weights, rows), slow.mean(-1))
    with torch.no_grad():
        torch.testing.assert_close(placed.loss(weights, rows), slow.mean(-1))
    per_chain = torch.linspace(-1.0, 2.0, len(PLACE), dtype=torch.float64)  # chains weigh differently in the sum
    expected = gradients((per_chain * slow.mean(-1)).sum(), weights)
    fast = gradients((per_chain * placed.loss(weights, rows)).sum(), weights)
    by_example = gradients((per_chain * placed.loss_of(weights, rows).mean(-1)).sum(), weights)
    for name in HEAD:
        assert expected[name].abs().amax() > 1e-4
        torch.testing.assert_close(fast[name], expected[name], msg=name)
        torch.testing.assert_close(by_example[name], expected[name], msg=name)


@both_layers
@every_case
def test_base_is_the_loss_at_the_centre(case, layer):
    target, rows = case.target(layer), some_rows()
    placed = target.at(PLACE)
    centre = {name: value[PLACE] for name, value in target.centre.items()}
    torch.testing.assert_close(placed.base(rows), placed.loss(centre, rows))
    torch.testing.assert_close(placed.base(rows), case.slow(layer, centre, rows).mean(-1))
    assert (placed.loss(moved(target), rows) - placed.base(rows)).abs().min() > 1e-5


@both_layers
def test_numbers_are_of_the_parameters_precision(layer):
    case, rows = CASES["masked"], some_rows()
    single, double = case.target(layer, dtype=torch.float32), case.target(layer)
    weights = moved(single)
    loss = single.at(PLACE).loss(weights, rows)
    assert {loss.dtype, single.at(PLACE).base(rows).dtype} == {torch.float32}
    exact = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    expected = double.at(PLACE).loss(exact, rows)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    fast, exact = gradients(loss.sum(), weights), gradients(expected.sum(), exact)
    for name in HEAD:
        torch.testing.assert_close(fast[name].double(), exact[name], rtol=1e-4, atol=1e-5)


@both_layers
@pytest.mark.parametrize("chains", [1, 2, 3])
def test_a_chain_does_not_depend_on_the_others(layer, chains, monkeypatch):
    case = CASES["masked"]
    target, rows = case.target(layer), some_rows()
    weights = moved(target)
    together = target.at(PLACE).loss(weights, rows)
    expected = gradients(together.sum(), weights)
    monkeypatch.setattr(refine, "CPU_TOKENS_AT_ONCE", chains * B * 6)
    order = torch.tensor([4, 1, 6, 0, 5, 2, 3])
    shuffled = {name: value.detach()[order].requires_grad_() for name, value in weights.items()}
    placed = target.at(PLACE[order])
    assert len(list(placed._blocks(rows))) == -(-len(PLACE) // chains)
    apart = placed.loss(shuffled, rows[order])
    torch.testing.assert_close(apart, together[order])
    torch.testing.assert_close(placed.loss_of(shuffled, rows[order]).mean(-1), together[order])
    torch.testing.assert_close(placed.base(rows[order]), target.at(PLACE).base(rows)[order])
    found = gradients(apart.sum(), shuffled)
    for name in HEAD:
        torch.testing.assert_close(found[name], expected[name][order])


@both_layers
def test_only_some_of_the_four_tensors_may_move(layer):
    target, rows = CASES["masked"].target(layer), some_rows()
    weights = moved(target)
    expected = gradients(target.at(PLACE).loss(weights, rows).sum(), weights)
    fixed = {name: value.detach().requires_grad_(name == "Wk") for name, value in weights.items()}
    (found,) = torch.autograd.grad(target.at(PLACE).loss(fixed, rows).sum(), [fixed["Wk"]])
    torch.testing.assert_close(found, expected["Wk"])


@both_layers
def test_a_head_that_says_nothing_may_look_anywhere(layer):
    case, rows = CASES["masked"], some_rows()
    parameters = case.parameters()
    parameters[f"{layer}.Wo"] = torch.zeros_like(parameters[f"{layer}.Wo"])
    target = HeadTarget(case.system, case.model, parameters, case.batch, HEADS, layer, B)
    placed, weights = target.at(PLACE), moved(target, size=1.0)
    centre = {name: value[PLACE] for name, value in target.centre.items()}
    torch.testing.assert_close(placed.loss(centre | {"Wq": weights["Wq"]}, rows), placed.base(rows))
    assert (placed.loss(centre | {"Wo": weights["Wo"]}, rows) - placed.base(rows)).abs().min() > 1e-3


def test_rows_come_from_the_streams():
    class Streams:
        def integers(self, high, size):
            assert (high, size) == (N_EXAMPLES, B)
            return some_rows()

    target = CASES["masked"].target(1)
    assert torch.equal(target.at(PLACE).draw(Streams()), some_rows())


def test_the_target_does_not_follow_parameters_that_train_on():
    case, rows = CASES["masked"], some_rows()
    parameters = case.parameters()
    target = HeadTarget(case.system, case.model, parameters, case.batch, HEADS, 0, B)
    weights = moved(target)
    before = target.at(PLACE).loss(weights, rows)
    for value in parameters.values():
        value.zero_()
    torch.testing.assert_close(target.at(PLACE).loss(weights, rows), before)
    torch.testing.assert_close(target.centre["Wq"], case.target(0).centre["Wq"])


def test_the_centre_is_the_trained_heads():
    case = CASES["masked"]
    target, parameters = case.target(1), case.parameters()
    for name in HEAD:
        expected = torch.stack([parameters[f"1.{name}"][member, head] for member, head in HEADS])
        torch.testing.assert_close(target.centre[name], expected, rtol=0, atol=0)


def some_direction(target):
    g = torch.Generator().manual_seed(4)
    return {name: torch.randn(value.shape, generator=g).to(value) for name, value in target.centre.items()}


def along(target, direction, place, t):
    """Weights at centre + t direction / |direction|, spelt out."""
    flat = torch.cat([direction[name].flatten(1) for name in HEAD], dim=1)
    unit = {name: value / flat.norm(dim=1)[:, None, None] for name, value in direction.items()}
    return {name: (target.centre[name] + t * unit[name])[place] for name in HEAD}


@both_layers
@pytest.mark.parametrize("name", ["masked", "local, masked", "some tokens"])
def test_profile_is_the_loss_of_each_example_along_each_line(name, layer, monkeypatch):
    monkeypatch.setattr(refine, "CHAINS_AT_ONCE", 5)
    case = CASES[name]
    target = case.target(layer)
    direction, t = some_direction(target), torch.tensor([-1.0, 0.0, 0.5, 2.0])
    line = LineTarget(target, direction)
    scales = torch.arange(1, len(HEADS) + 1)[:, None]  # each line has points of its own
    found = line.profile(t * scales)
    assert found.shape == (len(HEADS), N_EXAMPLES, 4)
    everyone, all_rows = torch.arange(len(HEADS)), torch.arange(N_EXAMPLES).expand(len(HEADS), -1)
    for index, value in enumerate(t.tolist()):
        weights = along(target, direction, everyone, value * scales[:, :, None])
        torch.testing.assert_close(found[:, :, index], case.slow(layer, weights, all_rows, everyone))
    flat = torch.cat([value.flatten(1) for value in direction.values()], dim=1)
    torch.testing.assert_close(line.length, flat.norm(dim=1))


@both_layers
def test_loss_and_slope_along_a_line(layer):
    case, rows = CASES["masked"], some_rows()
    target = case.target(layer)
    direction = some_direction(target)
    line = LineTarget(target, direction)
    placed = line.at(PLACE)
    t = torch.linspace(-1.0, 1.0, len(PLACE), dtype=torch.float64)[:, None].requires_grad_()
    loss = placed.loss({"t": t}, rows)
    expected = case.slow(layer, along(target, direction, PLACE, 0.0), rows).mean(-1)
    torch.testing.assert_close(placed.loss({"t": line.centre["t"][PLACE]}, rows), expected)
    torch.testing.assert_close(placed.base(rows), expected)
    (slope,) = torch.autograd.grad(loss.sum(), t)
    for c in range(len(PLACE)):
        weights = along(target, direction, PLACE[c : c + 1], t[c].item())
        one = case.slow(layer, weights, rows[c : c + 1], PLACE[c : c + 1]).mean()
        torch.testing.assert_close(loss[c], one)
    step = 1e-5
    difference = placed.loss({"t": t.detach() + step}, rows) - placed.loss({"t": t.detach() - step}, rows)
    torch.testing.assert_close(slope[:, 0], difference / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(placed.loss_of({"t": t}, rows).mean(-1), loss)


@both_layers
@pytest.mark.parametrize("name", ["masked", "local, masked", "some tokens"])
def test_gradient_of_a_target_is_that_of_the_mean_over_all_examples(name, layer):
    case = CASES[name]
    target = case.target(layer)
    everyone, all_rows = torch.arange(len(HEADS)), torch.arange(N_EXAMPLES).expand(len(HEADS), -1)
    leaves = {key: value.clone().requires_grad_() for key, value in target.centre.items()}
    slow = torch.autograd.grad(case.slow(layer, leaves, all_rows, everyone).mean(-1).sum(), list(leaves.values()))
    found = target.gradient()
    for key, value in zip(HEAD, slow, strict=True):
        torch.testing.assert_close(found[key], value)
    direction = some_direction(target)
    along_line = LineTarget(target, direction).gradient()["t"]
    length = torch.cat([value.flatten(1) for value in direction.values()], dim=1).norm(dim=1)
    inner = torch.stack([(direction[key] * found[key]).sum((-2, -1)) for key in HEAD]).sum(0)
    torch.testing.assert_close(along_line[:, 0], inner / length)


@every_case
def test_head_gradients_equal_those_of_the_snapshot(case):
    parameters = case.parameters()
    with torch.no_grad():
        loss, norm = head_gradients(case.system, case.model, parameters, case.batch)
    view = Snapshot(step=0, system=case.system, model=case.model, parameters=parameters)
    torch.testing.assert_close(loss, view.loss(view.predict(case.batch), case.batch).mean(-1))
    gradient = view.gradient(case.batch)
    for layer in range(case.model.layers):
        for head in range(case.model.n_heads):
            parts = [gradient[f"{layer}.{name}"][:, head].flatten(1) for name in HEAD]
            torch.testing.assert_close(norm[:, layer, head], torch.cat(parts, dim=1).norm(dim=1))
    assert norm.shape == (S, case.model.layers, case.model.n_heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "layer: 2"),
        ({"layer": -1}, "layer: -1"),
        ({"heads": []}, "heads: "),
        ({"heads": [(3, 0)]}, "member: 3"),
        ({"heads": [(-1, 0)]}, "member: -1"),
        ({"heads": [(0, 3)]}, "head: 3"),
        ({"minibatch": 0}, "minibatch: 0"),
        ({"tokens": torch.ones(2, 6, dtype=torch.bool)}, r"tokens: \(2, 6\)"),
        ({"batch": Batch(inputs=torch.zeros(S, 2, 6, 2), targets=torch.zeros(S, 2, 6, 2))}, "batch.inputs: "),
    ],
)
def test_a_target_that_does_not_exist_is_refused(change, message):
    case = CASES["masked"]
    right = {"batch": case.batch, "heads": HEADS, "layer": 0, "minibatch": B}
    with pytest.raises(ValueError, match=message):
        HeadTarget(case.system, case.model, case.parameters(), **(right | change))


def test_a_line_without_direction_is_refused():
    target = CASES["masked"].target(0)
    direction = some_direction(target)
    with pytest.raises(ValueError, match="direction: "):
        LineTarget(target, {name: value for name, value in direction.items() if name != "Wo"})
    with pytest.raises(ValueError, match="direction Wq: "):
        LineTarget(target, direction | {"Wq": direction["Wq"][:1]})
    for bad in (0.0, float("nan")):
        lost = {name: value.clone() for name, value in direction.items()}
        for value in lost.values():
            value[1] = bad
        with pytest.raises(ValueError, match="direction: "):
            LineTarget(target, lost)
