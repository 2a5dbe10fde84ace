"""The contract of a system, for every system and three toys. A new system is one more entry of `CASES`."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from toys import EnumeratedToy, MaskedToy, NoisedToy

from sim import SYSTEMS
from sim.active_matter import ActiveMatter, Swimmers
from sim.generator import Generator
from sim.linear_swimmers import by_mode
from sim.linear_swimmers import residual as linear_residual
from sim.particles import ParticleBox, ParticleSystem
from sim.pool import Pool
from sim.system import Batch, Rows, System, gather_pairs, mean_square_loss

SIZES = {"train": 240, "validation": 12, "probe": 10}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A system and what it declares of itself beyond the protocol."""

    system: System
    symmetric: frozenset = frozenset()
    noised: bool = False
    best: bool = True


class Linear(ActiveMatter):
    """With its best prediction in closed form, from inputs."""

    def best(self, batch):
        x, g = batch.inputs.chunk(2, -1)
        residual = by_mode(
            linear_residual(self.swimmers, self.noise), torch.stack((x * self.swimmers.free_spread, g), -1)
        )
        rows = Rows(columns={"x": x})
        return torch.cat(residual.unbind(-1), -1) / self._unit(Rows(columns={}, statistics=self.statistics(rows)), x)


CASES = {
    "particles": Case(
        system=ParticleSystem(box=ParticleBox(n=9, radius=0.09)),
        symmetric=frozenset({"near", "collision"}),
        best=False,
    ),
    "active matter, linear": Case(system=Linear(), symmetric=frozenset({"contact", "others"}), noised=True),
    "active matter, soft": Case(
        system=ActiveMatter(
            swimmers=Swimmers(n=6, trap=0.0, spring=0.0, repulsion=2.5, packing=0.4, time_step=0.02),
            relax=4.0,
            spacing=1.0,
        ),
        symmetric=frozenset({"contact"}),
        noised=True,
        best=False,
    ),
    "masked": Case(system=MaskedToy(), symmetric=frozenset({"near", "company"})),
    "enumerated": Case(system=EnumeratedToy()),
    "noised": Case(system=NoisedToy(), symmetric=frozenset({"alike"}), noised=True),
}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pools():
    return {name: Pool.make(case.system, 0, SIZES) for name, case in CASES.items()}


@pytest.fixture
def pool(case, pools):
    return next(pools[name] for name, known in CASES.items() if known is case)


@pytest.fixture
def system(case):
    return case.system


@pytest.fixture
def batch(system, pool):
    return system.draw(pool.parts["probe"], Generator.of("probe"))


def tensors(batch: Batch) -> dict:
    named = {name: getattr(batch, name) for name in ("inputs", "targets", "mask", "keys", "allowed")}
    named |= {f"geometry {name}": value for name, value in batch.geometry.items()}
    return {name: value for name, value in named.items() if value is not None}


def random_like(tensor, seed=0):
    return Generator.of("random", seed).normal(*tensor.shape, dtype=tensor.dtype)


def zeros(batch: Batch):
    return torch.zeros_like(batch.targets)


def assert_equal(one: Batch, other: Batch):
    assert tensors(one).keys() == tensors(other).keys()
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(other)[name]), name


def test_every_listed_system_has_a_case():
    tested = {type(case.system) for case in CASES.values()}
    assert all(any(issubclass(kind, system) for kind in tested) for system in SYSTEMS.values())
    assert all(isinstance(case.system, System) for case in CASES.values())


def test_rows_are_as_many_as_asked_and_start_with_examples(system, pool):
    for part, n in SIZES.items():
        rows = pool.parts[part]
        assert len(rows) == n
        assert {len(column) for column in rows.columns.values()} == {n}


def test_same_generator_same_rows_and_parts_differ(system):
    one, again = (system.rows("train", 8, Generator.of("rows")) for _ in range(2))
    other = system.rows("probe", 8, Generator.of("rows"))
    assert all(torch.equal(column, again.columns[name]) for name, column in one.columns.items())
    assert any(not torch.equal(column, other.columns[name]) for name, column in one.columns.items())


def test_parts_share_no_row(system, pool):
    seen: dict = {}
    for part, rows in pool.parts.items():
        for i in range(len(rows)):
            first = next(iter(rows.columns.values()))[i]
            assert seen.setdefault(tuple(first.flatten().tolist()), part) == part


def test_statistics_come_from_the_train_rows_only(system, pool):
    expected = system.statistics(Rows(columns=pool.parts["train"].columns))
    smaller = Pool.make(system, 0, {"train": SIZES["train"], "probe": 3})
    for rows in (*pool.parts.values(), *smaller.parts.values()):
        assert rows.statistics.keys() == expected.keys()
        assert all(torch.equal(rows.statistics[name], value) for name, value in expected.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_devices(system, pool, device, dtype):
    rows = pool.parts["probe"].to(device, dtype)
    batch = system.draw(rows, Generator.of("probe", device=device))
    lead, n = batch.inputs.shape[:-1], batch.inputs.shape[-2]
    assert batch.inputs.shape == (SIZES["probe"], n, system.d_in)
    assert batch.targets.shape == (*lead, system.d_out)
    assert batch.mask is None or (batch.mask.shape == lead and batch.mask.dtype == torch.bool)
    assert batch.keys is None or (batch.keys.shape[:-1] == lead and batch.keys.dtype == torch.int64)
    assert batch.allowed is None or (batch.allowed.shape[:-1] == lead and batch.allowed.dtype == torch.bool)
    assert all(value.device.type == device for value in tensors(batch).values())
    assert batch.inputs.dtype == batch.targets.dtype
    assert torch.isfinite(batch.inputs).all() and torch.isfinite(batch.targets).all()
    if any(column.is_floating_point() for column in rows.columns.values()):
        assert batch.inputs.dtype == dtype


def test_same_generator_same_batch_and_another_one_where_noised(case, pool):
    rows = pool.parts["train"].take(slice(6))
    one, again, other = (case.system.draw(rows, Generator.of(name)) for name in ("a", "a", "b"))
    assert_equal(one, again)
    assert torch.equal(one.inputs, other.inputs) != case.noised


def test_a_member_draws_the_same_in_a_pack_as_alone(system, pool):
    """Bit for bit, with streams [S] and rows [S, B, ...]."""
    rows, generator = pool.parts["train"], Generator.stack([3, -5, 11])
    index = generator.fold("rows").integers(len(rows), 6)
    packed = system.draw(rows.take(index), generator)
    loss = system.loss(random_like(packed.targets), packed)
    assert loss.shape == (3, 6)
    for member in range(3):
        stream = Generator(generator.key[member])
        alone = system.draw(rows.take(stream.fold("rows").integers(len(rows), 6)), stream)
        for name, value in tensors(packed).items():
            assert torch.equal(value[member], tensors(alone)[name]), name
        assert torch.equal(loss[member], system.loss(random_like(packed.targets)[member], alone))


def test_shared_batch_with_a_leading_axis_of_predictions(system, batch):
    prediction = random_like(torch.empty(4, *batch.targets.shape))
    together = system.loss(prediction, batch)
    assert together.shape == (4, SIZES["probe"])
    for member in range(4):
        torch.testing.assert_close(together[member], system.loss(prediction[member], batch), rtol=1e-6, atol=0)


def permute_tokens(value, order, n):
    for axis in range(1, value.dim()):
        value = value.index_select(axis, order) if value.shape[axis] == n else value
    return value


def test_order_of_tokens_does_not_matter(case, pool, batch):
    system, n = case.system, batch.inputs.shape[-2]
    assert n not in {system.d_in, system.d_out}  # or else axes could be confused here
    order = Generator.of("order").permutation(n)
    geometry = {name: permute_tokens(value, order, n) for name, value in batch.geometry.items()}
    mask = None if batch.mask is None else batch.mask[..., order]
    shuffled = replace(
        batch, inputs=batch.inputs[..., order, :], targets=batch.targets[..., order, :], mask=mask, geometry=geometry
    )
    if not case.noised:
        rows = pool.parts["probe"]
        columns = {name: permute_tokens(column, order, n) for name, column in rows.columns.items()}
        permuted = system.draw(replace(rows, columns=columns), Generator.of("probe"))
        for name, value in tensors(permuted).items():
            torch.testing.assert_close(value, tensors(shuffled)[name])
    prediction = random_like(batch.targets)
    torch.testing.assert_close(system.loss(prediction[..., order, :], shuffled), system.loss(prediction, batch))
    before, after = system.relations(batch.geometry, None), system.relations(geometry, None)
    for name, related in before.items():
        assert torch.equal(related[:, order][:, :, order], after[name]), name
    apart = system.distance(batch.geometry, None)
    if apart is not None:
        torch.testing.assert_close(apart[:, order][:, :, order], system.distance(geometry, None))


def test_relations(case, batch):
    system, n = case.system, batch.inputs.shape[-2]
    relations = system.relations(batch.geometry, None)
    assert system.relation in relations
    assert case.symmetric <= set(relations)
    for name, related in relations.items():
        assert related.dtype == torch.bool and related.shape == (SIZES["probe"], n, n)
        assert related.any(), f"{name} never occurs in these rows"
        assert not related.diagonal(dim1=-2, dim2=-1).any()
        assert torch.equal(related, related.mT) == (name in case.symmetric)
    apart = system.distance(batch.geometry, None)
    if apart is not None:
        assert apart.shape == (SIZES["probe"], n, n) and torch.isfinite(apart).all()
        assert torch.equal(apart, apart.mT) and (apart.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("some", [False, True])
def test_keys_gather_the_full_relations(system, batch, some):
    boxes, n = batch.inputs.shape[:2]
    keys = torch.arange(n).expand(boxes, n, n)
    if some:  # other keys for every query
        keys = torch.argsort(random_like(torch.empty(boxes, n, n)), -1)[..., : n - 1]
    for name, related in system.relations(batch.geometry, None).items():
        assert torch.equal(system.relations(batch.geometry, keys)[name], gather_pairs(related, keys)), name
    apart = system.distance(batch.geometry, None)
    if apart is not None:
        assert torch.equal(system.distance(batch.geometry, keys), gather_pairs(apart, keys))


def test_distances_to_keys_that_all_queries_share(system, batch):
    boxes = len(batch.inputs)
    apart = system.distance(batch.geometry, None)
    if apart is not None:
        some = torch.tensor([4, 0, 2]).expand(boxes, 1, 3)
        assert torch.equal(system.distance(batch.geometry, some), apart[..., [4, 0, 2]])


def test_padding_changes_nothing(system, batch):
    """Two more tokens full of nonsense, masked out."""
    boxes, n = batch.inputs.shape[:2]
    mask = torch.ones(boxes, n, dtype=torch.bool) if batch.mask is None else batch.mask
    prediction = random_like(batch.targets)
    loss = system.loss(prediction, batch)

    def pad(value, number):
        return torch.cat((value, value.new_full((boxes, 2, *value.shape[2:]), number)), 1)

    padded = Batch(inputs=pad(batch.inputs, 9.0), targets=pad(batch.targets, -9.0), mask=pad(mask, 0))
    torch.testing.assert_close(system.loss(pad(prediction, 5.0), padded), loss, rtol=1e-6, atol=1e-7)


def test_masked_tokens_get_no_gradient_and_real_ones_do(system, batch):
    boxes, n = batch.inputs.shape[:2]
    mask = batch.mask if batch.mask is not None else torch.arange(n).expand(boxes, n) != 1
    prediction = random_like(batch.targets).requires_grad_()
    system.loss(prediction, replace(batch, mask=mask)).sum().backward()
    assert (prediction.grad[~mask] == 0).all()
    assert torch.isfinite(prediction.grad).all() and prediction.grad[mask].abs().sum() > 0


def test_loss_is_finite_even_where_all_tokens_are_masked(system, batch):
    nothing = replace(batch, mask=torch.zeros(batch.inputs.shape[:2], dtype=torch.bool))
    assert (system.loss(random_like(batch.targets), nothing) == 0).all()


def assert_mean(losses, expected):
    """Mean of independent losses, within 5 standard errors."""
    error = float(losses.double().std() / math.sqrt(len(losses)))
    assert abs(float(losses.double().mean()) - expected) <= 5 * error + 1e-5


@pytest.fixture(scope="module")
def many():
    """Batches of many rows, by system."""
    batches = {}
    for name, case in CASES.items():
        rows = Pool.make(case.system, 1, {"train": 2000}).parts["train"]
        batches[name] = case.system.draw(rows, Generator.of("many"))
    return batches


def test_trivial_floor(case, many):
    """A constant prediction: the mean of a target that is centred, or uniform logits."""
    batch = next(many[name] for name, known in CASES.items() if known is case)
    assert_mean(case.system.loss(zeros(batch), batch), case.system.floors().trivial)


def test_floors_are_ordered_and_the_optimum_is_reached(case, many):
    floors = case.system.floors()
    known = [floors.trivial, floors.without_attention, floors.optimum]
    ordered = [floor for floor in known if floor is not None]
    assert ordered == sorted(ordered, reverse=True) and min(ordered) >= 0
    assert (floors.optimum is not None) == case.best
    if case.best:
        batch = next(many[name] for name, other in CASES.items() if other is case)
        assert_mean(case.system.loss(case.system.best(batch), batch), floors.optimum)


def test_best_loss_without_attention_of_the_noised_toy(many):
    """Closed form, the shrunk input, and the best linear map found by least squares all agree."""
    system, batch = CASES["noised"].system, many["noised"]
    floor = system.floors().without_attention
    assert_mean(system.loss(system.alone(batch), batch), floor)
    x, y = batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)
    assert float((x @ torch.linalg.lstsq(x, y).solution - y).square().mean()) == pytest.approx(floor, rel=0.05)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_diagnose_gives_one_finite_figure_per_member(system, pool, lead):
    def predict(batch):
        return torch.zeros(*lead, *batch.targets.shape[-3:])

    figures = system.diagnose(predict, pool.parts["validation"], Generator.of("diagnose"))
    assert figures
    for name, value in figures.items():
        assert value.shape == lead and torch.isfinite(value).all(), name


def test_diagnose_of_a_member_is_what_it_gets_alone(system, pool):
    """Members that predict differently, and feed their own predictions back where the system rolls out."""
    scales = torch.tensor([0.0, 0.1, -0.2]).reshape(3, 1, 1, 1)

    def scaled(scale):
        return lambda batch: scale * batch.inputs.mean(-1, keepdim=True).expand(*batch.targets.shape)

    together = system.diagnose(scaled(scales), pool.parts["validation"], Generator.of("diagnose"))
    for member in range(3):
        alone = system.diagnose(scaled(scales[member, 0]), pool.parts["validation"], Generator.of("diagnose"))
        for name, value in together.items():
            torch.testing.assert_close(value[member], alone[name], rtol=1e-4, atol=1e-6)


def test_mean_square_loss_by_hand():
    batch = Batch(inputs=torch.zeros(1, 3, 1), targets=torch.tensor([[[1.0, 3.0], [0.0, 2.0], [7.0, 7.0]]]))
    assert mean_square_loss(torch.zeros(1, 3, 2), batch).item() == pytest.approx((5 + 2 + 49) / 3)
    masked = replace(batch, mask=torch.tensor([[True, True, False]]))
    assert mean_square_loss(torch.zeros(1, 3, 2), masked).item() == pytest.approx(3.5)
