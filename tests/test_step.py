"""A step of training: that it can be recorded, that parts of a pack do not notice, and its pieces against slow ones."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from sim.active_matter import ActiveMatter, Swimmers
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from sim.pool import Pool
from sim.system import Batch
from tests.stock import StockTransformer, stacked
from tests.toys import MaskedToy, NoisedToy
from train.config import ModelConfig, TrainConfig
from train.loop import WARM, Schedule, Trainer, even_cuts
from train.model import _Attention, attention_pattern, count_parameters, mix_values
from train.state import flatten, unflatten
from train.step import DIVERGED_LOSS, arithmetic

MODEL = ModelConfig(width=16, layers=2, heads=2)
NARROW = ModelConfig(width=8, layers=1, heads=2)
MUP = ModelConfig(width=16, layers=1, heads=2, parametrization="mup", base_width=8)
STRANG = ModelConfig(width=8, layers=1, heads=2, splitting="strang")
LOCAL = ModelConfig(width=8, layers=2, heads=2, attention="local", neighbours=3)
TRAIN = TrainConfig(steps=12, batch_size=5, learning_rate=3e-3)
SGD = dataclasses.replace(TRAIN, optimizer="sgd", learning_rate=1e-2)
DOUBLE = dataclasses.replace(TRAIN, precision="float64")
MASKED, NOISED = MaskedToy(), NoisedToy()
SWIMMERS = Swimmers(n=6, trap=0.0, spring=0.0, repulsion=2.5, packing=0.4, time_step=0.02)
BOX = ActiveMatter(swimmers=SWIMMERS, relax=1.0, spacing=0.2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows_of(system, dtype=torch.float32, n=64, device="cpu"):
    return Pool.make(system, 0, {"train": n}).to(device, dtype).parts["train"]


def trainer(system=MASKED, trains=TRAIN, keys=(1, 2), model=MODEL, device="cpu", **options):
    trains = trains if isinstance(trains, list) else [trains] * len(keys)
    return Trainer(system, rows_of(system, trains[0].dtype, device=device), model, trains, list(keys), **options)


def state_after(steps, *args, **kwargs):
    pack = trainer(*args, **kwargs)
    list(pack.run([steps]))
    return pack.state


def assert_equal(state, other, places=slice(None)):
    for name, value in state.tensors().items():
        torch.testing.assert_close(value[places], other.tensors()[name][places], rtol=0, atol=0, equal_nan=True)


# --- a step can be recorded


def lasting(pack):
    """Every tensor that outlives a step, by name."""
    held = {f"state.{name}": value for name, value in pack.state.tensors().items()} | {"clock": pack.clock}
    task = pack.parts[0].task
    held |= {f"rows.{name}": value for name, value in {**task.rows.columns, **task.rows.statistics}.items()}
    for place, part in enumerate(pack.parts):
        held |= {f"{place}.{name}": value for name, value in vars(part).items() if isinstance(value, torch.Tensor)}
    return held if task.rate is None else held | {"relative rate": task.rate}


def memory(value):
    return value.untyped_storage().data_ptr()


def is_question(function, args):
    """Whether the host must wait for numbers to know what this operation gives, or what shape it has."""
    if function is torch.ops.aten.index.Tensor:  # tagged for what a mask makes of it; row numbers are harmless
        return any(value is not None and value.dtype in (torch.bool, torch.uint8) for value in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


class Tape(TorchDispatchMode):
    """What `Recording` does, on a CPU: the operations of `work(*inputs)`, written down here and done again by `replay`.

    Outputs go to where they were first, and what the host knew then is not asked again. As with a graph, making one
    leaves every tensor as it was. Tensors stay alive, so that one address is one tensor.
    """

    def __init__(self, work, *inputs):
        super().__init__()
        self.inputs = tuple(value.clone() for value in inputs)
        self.operations, self.questions, self.before = [], [], {}
        self.made = {memory(value) for value in self.inputs}
        with self:
            work(*self.inputs)
        for storage, copy in self.before.values():
            storage.copy_(copy)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        for value in given:
            if memory(value) not in self.made and memory(value) not in self.before:
                self.before[memory(value)] = value.untyped_storage(), value.untyped_storage().clone()
        if is_question(function, args):
            self.questions.append(str(function))
        out = function(*args, **kwargs)
        old = {memory(value) for value in given}
        new = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor) and memory(value) not in old]
        self.made |= {memory(value) for value in new}
        self.operations.append((function, args, kwargs, out, new))
        return out

    @torch.no_grad()
    def replay(self, *inputs):
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        for function, args, kwargs, out, new in self.operations:
            again = function(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if any(place is kept for kept in new):
                    place.detach().copy_(value)

    def script(self, held):
        """Every operation with its arguments: of a tensor its dtype, shape, strides and where it comes from."""
        homes = {memory(value): name for name, value in held.items()}
        homes |= {memory(value): f"input {place}" for place, value in enumerate(self.inputs)}
        lines = []
        for number, (function, args, kwargs, _, new) in enumerate(self.operations):
            leaves, layout = tree_flatten((args, kwargs))
            said = [
                (value.dtype, value.shape, value.stride(), homes.get(memory(value), "the host"))
                if isinstance(value, torch.Tensor)
                else repr(value)
                for value in leaves
            ]
            lines.append((str(function), str(layout), said))
            homes |= {memory(value): f"operation {number}" for value in new}
        return lines


def why_not_recordable(pack):
    """Reasons why a recording of one step would not do for all steps; none where it would."""
    for part in pack.parts:
        part.frozen = True  # as on a GPU, which is never asked whether all is sound
    held = lasting(pack)
    addresses = {name: value.data_ptr() for name, value in held.items()}
    reasons, scripts = [], []
    for step in (3, 8):
        list(pack.run([step]))
        tape = Tape(pack._take, *pack.schedule.at(step))
        reasons += tape.questions
        scripts.append(tape.script(held))
    if any("the host" in str(line) for line in scripts[0]):
        reasons.append("numbers of the host")
    if scripts[0] != scripts[1]:
        reasons.append("steps differ")
    if addresses != {name: value.data_ptr() for name, value in lasting(pack).items()}:
        reasons.append("memory moves")
    return reasons


RECORDED = {
    "adam": (MASKED, TRAIN, MODEL),
    "sgd": (MASKED, SGD, MODEL),
    "everything": (NOISED, dataclasses.replace(TRAIN, warmup=6, clip=0.5, weight_decay=0.1), MUP),
    "sgd, everything": (MASKED, dataclasses.replace(SGD, warmup=20, clip=0.5, weight_decay=0.1), MUP),
    "float64": (NOISED, DOUBLE, NARROW),
    "local": (MASKED, TRAIN, LOCAL),
    "strang": (MASKED, TRAIN, STRANG),
    "bf16": (MASKED, dataclasses.replace(TRAIN, precision="bf16"), NARROW),
    "particles": (ParticleSystem(box=ParticleBox(n=9, radius=0.09)), TRAIN, NARROW),
    "particles, local": (ParticleSystem(box=ParticleBox(n=9, radius=0.09)), TRAIN, LOCAL),
    "active matter": (ActiveMatter(), dataclasses.replace(TRAIN, batch_size=6), NARROW),
    "active matter, local": (BOX, TRAIN, LOCAL),
}
each_recorded = pytest.mark.parametrize(("system", "train", "model"), RECORDED.values(), ids=RECORDED)


@each_recorded
def test_steps_ask_the_host_nothing_and_are_all_the_same_to_it(system, train, model):
    pack = trainer(system, train, (1, 2, 3), model, chunk=2)
    assert why_not_recordable(pack) == []


class AskingToy(MaskedToy):
    def loss(self, prediction, batch):
        loss = super().loss(prediction, batch)
        return loss if loss.max().item() > 0 else -loss


class SortingToy(MaskedToy):
    def loss(self, prediction, batch):
        return torch.stack([each[each > -1].mean().expand(batch.inputs.shape[-3]) for each in prediction])


class TellingToy(MaskedToy):
    def draw(self, rows, generator):
        batch = super().draw(rows, generator)
        return dataclasses.replace(batch, inputs=batch.inputs * torch.tensor([1.0, 2.0]))


class CountingToy(MaskedToy):
    counter = itertools.count()

    def loss(self, prediction, batch):
        return super().loss(prediction, batch) * 0.9 ** next(self.counter)


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        (AskingToy(), "aten._local_scalar_dense.default"),
        (SortingToy(), "aten.index.Tensor"),
        (TellingToy(), "numbers of the host"),
        (CountingToy(), "steps differ"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_found_out(system, reason):
    assert reason in why_not_recordable(trainer(system, model=NARROW))


def test_a_step_whose_memory_moves_is_found_out():
    pack = trainer(model=NARROW)
    take, part = pack._take, pack.parts[0]

    def moving(*inputs):
        take(*inputs)
        part.direction = part.direction.clone()

    pack._take = moving
    assert "memory moves" in why_not_recordable(pack)


@pytest.fixture(params=["tape", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """A GPU; and on a CPU the same way through `Trainer.advance`, with a tape in place of a graph."""
    if request.param == "tape":
        monkeypatch.setattr("train.loop.Recording", Tape)
        monkeypatch.setattr("train.loop.aside", lambda work: work())
    return request.param


def recorded_and_not(device, *args, **kwargs):
    """Two equal packs: one whose `advance` records, one to be driven by `plain`."""
    packs = [trainer(*args, device="cpu" if device == "tape" else device, **kwargs) for _ in range(2)]
    if device == "tape":
        packs[0].device = torch.device("cuda")
        for part in packs[0].parts:
            part.frozen = True
    return packs


def plain(pack, steps):
    while pack.state.step < steps:
        pack._take(*pack.schedule.at(pack.state.step))
        pack.state.step += 1
    return pack.state


@each_recorded
def test_a_recorded_step_done_again_and_again_is_every_step(system, train, model, device):
    first, second = recorded_and_not(device, system, train, (1, 2, 3), model, chunk=2)
    list(first.run([12]))
    assert first._recorded is not None
    plain(second, 12)
    if device == "tape":
        assert_equal(first.state, second.state)
    for name, value in first.state.tensors().items():
        torch.testing.assert_close(value, second.state.tensors()[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_recording_starts_anew_from_a_state_and_makes_no_step_of_its_own(device):
    """Stop and go on, twice: each trainer warms up and records anew."""
    _, whole = recorded_and_not(device)
    state = None
    for stop in (WARM, WARM + 1, 12):
        pack, _ = recorded_and_not(device, state=state)
        list(pack.run([stop]))
        state = pack.state
    torch.testing.assert_close(state.weights, plain(whole, 12).weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rate", "late"), [(70.0, True), (1e30, False)])
def test_a_member_that_diverges_in_a_recording_is_frozen_at_the_right_step(device, rate, late):
    """The clip lets weights grow by the rate at every step, so that at 70 the end comes after the recording began."""
    calm = dataclasses.replace(SGD, clip=1.0)
    trains = [calm, dataclasses.replace(calm, learning_rate=rate), calm]
    first, second = recorded_and_not(device, MASKED, trains, (1, 2, 3))
    list(first.run([12]))
    plain(second, 12)
    step = int(first.state.diverged[1])
    assert step > (WARM if late else 0)
    assert first.state.diverged.tolist() == second.state.diverged.tolist() == [-1, step, -1]
    torch.testing.assert_close(first.state.weights[::2], second.state.weights[::2], rtol=1e-5, atol=1e-5)
    until, _ = recorded_and_not(device, MASKED, trains, (1, 2, 3))
    list(until.run([step]))
    assert until.state.diverged[1] == -1
    assert torch.equal(until.state.weights[1], first.state.weights[1])


@each_recorded
def test_what_a_gpu_does_and_what_a_cpu_may_leave_out_give_the_same_numbers(system, train, model):
    packs = [trainer(system, train, (1, 2, 3), model) for _ in range(2)]
    packs[1].parts[0].frozen = True
    for pack in packs:
        list(pack.run([10]))
    assert not packs[0].parts[0].frozen
    assert_equal(packs[0].state, packs[1].state)


# --- parts of a pack


def various(train, **own):
    """Seven members, each with its own rate, decay and clip."""
    return [
        dataclasses.replace(
            train, learning_rate=train.learning_rate * (1 + place), weight_decay=0.1 * place, clip=0.2 + place, **own
        )
        for place in range(7)
    ]


@pytest.mark.parametrize(
    ("system", "train", "model"),
    [
        (MASKED, TRAIN, MODEL),
        (NOISED, DOUBLE, NARROW),
        (NOISED, dataclasses.replace(SGD, warmup=4), MUP),
        (MASKED, TRAIN, LOCAL),
    ],
    ids=["adam", "float64", "sgd, mup", "local"],
)
def test_parts_of_any_size_give_the_same_numbers(system, train, model):
    whole = state_after(8, system, various(train), range(7), model)
    for chunk in (1, 2, 3, 7, 100):
        pack = trainer(system, various(train), range(7), model, chunk=chunk)
        assert len(pack.parts) == -(-7 // chunk)
        list(pack.run([8]))
        assert_equal(pack.state, whole)


@pytest.mark.parametrize("train", [TRAIN, dataclasses.replace(DOUBLE, warmup=4)], ids=["float32", "float64"])
def test_long_members_are_updated_one_by_one_to_the_same_end(train, monkeypatch):
    together = state_after(8, NOISED, various(train), range(7), NARROW)
    monkeypatch.setattr("train.step.LONG_ROW", 1)
    single = state_after(8, NOISED, various(train), range(7), NARROW)
    torch.testing.assert_close(single.weights, together.weights, rtol=1e-5, atol=1e-6)
    assert not torch.equal(single.weights, together.weights), "the same way was taken"
    for chunk in (1, 3):
        pack = trainer(NOISED, various(train), range(7), NARROW, chunk=chunk)
        assert pack.parts[0].by_rows
        list(pack.run([5]))
        again = trainer(NOISED, various(train), range(7), NARROW, state=pack.state.take(range(7)))
        list(again.run([8]))
        assert_equal(again.state, single)
    wild = [dataclasses.replace(each, learning_rate=1e30) if i == 3 else each for i, each in enumerate(various(train))]
    exploded = state_after(8, NOISED, wild, range(7), NARROW)
    assert (exploded.diverged >= 0).tolist() == [i == 3 for i in range(7)]
    assert_equal(exploded, single, [i for i in range(7) if i != 3])


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_member_that_explodes_touches_no_other_whatever_part_it_is_in(place):
    calm = various(SGD)
    wild = [*calm]
    wild[place] = dataclasses.replace(SGD, learning_rate=1e30)
    others = [other for other in range(7) if other != place]
    untouched = state_after(8, MASKED, calm, range(7), NARROW)
    whole = state_after(8, MASKED, wild, range(7), NARROW)
    step = int(whole.diverged[place])
    assert step > 0
    assert (whole.diverged[others] == -1).all()
    assert_equal(whole, untouched, others)
    for chunk in (1, 2, 3, 7):
        pack = trainer(MASKED, wild, range(7), NARROW, chunk=chunk)
        list(pack.run([step]))
        before = pack.state.weights[place].clone()
        assert pack.state.diverged[place] == -1
        list(pack.run([step + 1]))
        state = pack.state.take(range(7))
        assert torch.equal(state.weights[place], before)
        resumed = trainer(MASKED, wild, range(7), NARROW, chunk=2, state=dataclasses.replace(state, step=step + 1))
        for each in (pack, resumed):
            list(each.run([8]))
            assert torch.equal(each.state.weights[place], before)
            assert_equal(each.state, whole)


def test_a_frozen_member_stays_frozen_after_a_resume_though_all_is_sound():
    state = state_after(3, keys=(1, 2, 3))
    state.diverged[1] = 2
    before = state.take(range(3))
    pack = trainer(keys=(1, 2, 3), state=state, chunk=2)
    list(pack.run([6]))
    assert torch.equal(pack.state.weights[1], before.weights[1])
    assert pack.state.diverged.tolist() == [-1, 2, -1]
    assert_equal(pack.state, state_after(6, keys=(1, 2, 3)), [0, 2])


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_member_warms_up_and_diverges_at_the_same_steps(stop):
    calm = dataclasses.replace(SGD, clip=1.0, warmup=10)
    wild = dataclasses.replace(calm, learning_rate=100.0)
    whole = state_after(12, MASKED, [calm, wild])
    assert whole.diverged[1] > 4
    pack = trainer(MASKED, [calm, wild], state=state_after(stop, MASKED, [calm, wild]))
    list(pack.run([12]))
    assert_equal(pack.state, whole)


def test_parts_of_no_member_are_refused():
    with pytest.raises(ValueError, match="chunk: 0"):
        trainer(chunk=0)


def test_even_cuts_cover_all_in_order_and_differ_by_one_at_most():
    for count, most in itertools.product(range(1, 60), range(1, 70)):
        cuts = even_cuts(count, most)
        assert [place for cut in cuts for place in range(count)[cut]] == list(range(count))
        sizes = [cut.stop - cut.start for cut in cuts]
        assert 0 < max(sizes) <= min(sizes) + 1
        assert max(sizes) <= most
        assert len(cuts) == math.ceil(count / most)


# --- which rows, which noise


def direct(members, rows, batch, step):
    return members.fold("rows").fold(step).integers(rows, batch), members.fold("draw").fold(step).key


@pytest.mark.parametrize("ahead", [1, 30, 1 << 18])  # blocks of 1, 5 and 64 steps
def test_a_schedule_worked_out_ahead_is_that_of_every_step(ahead, monkeypatch):
    monkeypatch.setattr("train.loop.AHEAD", ahead)
    members = Generator.stack([3, -7])
    block = Schedule(members, 50, 3).steps
    assert block == {1: 1, 30: 5, 1 << 18: 64}[ahead]
    steps = sorted({max(0, k * block + shift) for k in (0, 1, 2, 40) for shift in (-2, -1, 0, 1)})
    mixed = [step for pair in zip(steps, reversed(steps), strict=True) for step in pair]
    for order in (steps, steps[::-1], mixed):
        schedule = Schedule(members, 50, 3)
        for step in order:
            for found, expected in zip(schedule.at(step), direct(members, 50, 3, step), strict=True):
                assert torch.equal(found, expected), step


class Seen(NoisedToy):
    """Keeps what every step drew."""

    inputs = None

    def draw(self, rows, generator):
        batch = super().draw(rows, generator)
        Seen.inputs.append(batch.inputs)
        return batch


def test_members_of_equal_order_see_the_same_and_keys_say_where_they_start(monkeypatch):
    """Members 0 and 1 start alike, 1 and 2 see the same; 3 is 0 again in all."""
    monkeypatch.setattr(Seen, "inputs", [])
    pack = trainer(Seen(), keys=(1, 1, 2, 1), orders=(5, 6, 6, 5), chunk=4)
    start = pack.state.weights.clone()
    Seen.inputs.clear()
    list(pack.run([6]))
    alike = {"start": start, "seen": torch.stack(Seen.inputs, 1), "end": pack.state.weights}
    pairs = {
        name: {(i, j) for i, j in itertools.combinations(range(4), 2) if torch.equal(value[i], value[j])}
        for name, value in alike.items()
    }
    assert pairs == {"start": {(0, 1), (0, 3), (1, 3)}, "seen": {(0, 3), (1, 2)}, "end": {(0, 3)}}


def test_without_orders_a_member_has_the_order_of_its_key():
    own, given = (state_after(4, NOISED, keys=(4, 9), orders=orders) for orders in (None, (4, 9)))
    assert_equal(own, given)
    with pytest.raises(ValueError, match="orders"):
        trainer(orders=(1, 2, 3))


# --- attention with a backward pass of its own

S, B, N, H, D = 2, 3, 5, 2, 4
SCALE = 0.37


def visible_of(kind):
    g = torch.Generator().manual_seed(1)
    visible = torch.rand((S, B, N, N) if kind == "per member" else (B, N, N), generator=g) < 0.6
    visible |= torch.eye(N, dtype=torch.bool)
    if kind == "blind":
        visible[1, 2] = False
    return None if kind == "none" else visible


def hidden_of(visible):
    return None if visible is None else ~visible.unsqueeze(-3)


def slow_attention(heads, visible):
    q, k, v = (part.unflatten(-1, (H, D)).transpose(2, 3) for part in heads.split(H * D, dim=-1))
    batch = Batch(inputs=heads, targets=heads)
    return mix_values(attention_pattern(q, k, batch, visible, SCALE), v, batch).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("kind", ["none", "shared", "per member", "blind"])
def test_attention_and_its_gradient_equal_autograds(kind):
    torch.manual_seed(0)
    heads = (2 * torch.randn(S, B, N, 3 * H * D, dtype=torch.float64)).requires_grad_()
    visible = visible_of(kind)
    fast, slow = _Attention.apply(heads, hidden_of(visible), H, SCALE), slow_attention(heads, visible)
    torch.testing.assert_close(fast, slow)
    assert fast.shape == (S, B, N, H * D)
    weights = torch.randn_like(fast)
    strided = torch.randn(N, H * D, B, S, dtype=torch.float64).permute(3, 2, 0, 1)
    for upstream in (weights, strided, torch.ones(1, dtype=torch.float64).expand_as(fast)):
        found, expected = (torch.autograd.grad(out, heads, upstream, retain_graph=True)[0] for out in (fast, slow))
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected)


def test_a_query_that_sees_nothing_reads_the_mean_and_moves_no_logit():
    torch.manual_seed(0)
    heads = torch.randn(S, B, N, 3 * H * D, dtype=torch.float64).requires_grad_()
    out = _Attention.apply(heads, hidden_of(visible_of("blind")), H, SCALE)
    values = heads.detach()[..., 2 * H * D :]
    torch.testing.assert_close(out[:, 1, 2], values[:, 1].mean(1))
    upstream = torch.zeros_like(out)
    upstream[:, 1, 2] = torch.randn(S, H * D, dtype=torch.float64)
    (found,) = torch.autograd.grad(out, heads, upstream)
    assert (found[..., : 2 * H * D] == 0).all()
    torch.testing.assert_close(found[:, 1, :, 2 * H * D :], (upstream[:, 1, 2] / N)[:, None].expand(-1, N, -1))
    assert (found[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("blind", [False, True])
def test_the_gradient_of_attention_is_that_of_small_differences(blind):
    torch.manual_seed(0)
    heads = torch.randn(1, 2, 3, 3 * H * 2, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    hidden[0, 0, 1, 2] = True
    hidden[1, 0, 0] = blind
    assert torch.autograd.gradcheck(lambda heads: _Attention.apply(heads, hidden, H, SCALE), (heads,))


# --- precision


def test_the_type_of_every_precision():
    types = {name: TrainConfig(precision=name).dtype for name in ("float32", "float64", "tf32", "bf16")}
    f32 = torch.float32
    assert types == {"float32": f32, "float64": torch.float64, "tf32": f32, "bf16": f32}
    with pytest.raises(ValueError, match="precision: 'half'"):
        TrainConfig(precision="half")


def precision(name, train=TRAIN):
    return dataclasses.replace(train, precision=name)


def test_tf32_is_float32_on_a_cpu():
    assert_equal(*(state_after(6, trains=precision(name)) for name in ("tf32", "float32")))


def stock_gradient(pack, system):
    """Of the first step, as stock modules under torch's autocast have it: named, `[S, ...]`."""
    models = [StockTransformer(pack.model, system.d_in, system.d_out) for _ in pack.schedule.order.key]
    index, keys = pack.schedule.at(0)
    for s, model in enumerate(models):
        for name, value in model.named().items():
            value.detach().copy_(pack.parameters[name][s])
        batch = system.draw(pack.parts[0].task.rows.take(index[s]), Generator(keys[s]))
        visible = None if batch.mask is None else batch.mask[:, None].expand(-1, batch.mask.shape[1], -1)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(batch.inputs, visible)
        system.loss(prediction.float(), batch).mean().backward()
    return stacked(models, gradient=True)


@pytest.mark.parametrize("system", [MASKED, NOISED], ids=["masked", "noised"])
def test_bf16_is_as_exact_as_a_stock_model_under_autocast(system):
    """One step of SGD at rate 1 shows the gradient. It is off by some roundings of 2^-9, in both about alike."""
    train, keys = dataclasses.replace(SGD, learning_rate=1.0, batch_size=32), range(2, 8)
    start = trainer(system, train, keys)
    rough, exact = (state_after(1, system, precision(name, train), keys) for name in ("bf16", "float32"))
    truth = start.state.weights - exact.weights

    def off(gradient):
        return (gradient - truth).norm(dim=1) / truth.norm(dim=1)

    ours, stock = off(start.state.weights - rough.weights), off(flatten(stock_gradient(start, system), start.specs))
    assert (ours < 1.3 * stock).all(), (ours, stock)
    assert (ours < 5 * 2**-8).all(), ours
    assert (ours > 2**-10).all(), ours
    losses = rough.loss_sum / exact.loss_sum - 1
    assert (losses.abs() < 2 * 2**-8).all(), losses
    assert (losses != 0).all()
    types = {name: value.dtype for name, value in rough.tensors().items()}
    assert types == {name: value.dtype for name, value in exact.tensors().items()}


@pytest.mark.parametrize("system", [MASKED, NOISED], ids=["masked", "noised"])
def test_bf16_is_the_same_in_any_company_and_part(system):
    train = precision("bf16", dataclasses.replace(TRAIN, batch_size=7))
    alone = state_after(8, system, train, (7,))
    for keys, chunk in itertools.product([(1, 7, 3), (7, 1, 2, 3, 4, 5, 6, 8)], [None, 2]):
        pack = state_after(8, system, train, keys, chunk=chunk)
        assert_equal(pack.take([keys.index(7)]), alone)


def test_bf16_trains():
    train = precision("bf16", TrainConfig(steps=60, batch_size=32, learning_rate=1e-2))
    pack = trainer(NOISED, train, (1, 2), ModelConfig(width=16, layers=1, heads=2))
    losses = []
    for stop in (5, 55, 60):
        list(pack.run([stop]))
        losses.append(pack.take_loss())
    assert (losses[2] < 0.5 * losses[0]).all(), losses
    assert pack.state.weights.dtype == torch.float32
    assert not torch.equal(pack.state.weights, pack.state.weights.bfloat16().float())


def ambient():
    kinds = ("cpu", "cuda")
    return (
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        torch.is_autocast_cache_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
    )


class OopsError(Exception):
    pass


@pytest.fixture(params=["none", "ieee", "tf32"])
def products(request):
    """How a GPU's products were set before."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["float32", "float64", "tf32", "bf16"])
@pytest.mark.parametrize("casts", [False, True])
def test_arithmetic_is_as_it_was_afterwards_also_when_the_work_fails(kind, name, casts, products):
    a, device = torch.ones(2, 2), torch.device(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        before = ambient()
        with arithmetic(name, device):
            rounds = (name == "bf16") if kind == "cpu" else casts
            assert (a @ a).dtype == (torch.bfloat16 if rounds else torch.float32)
            inside = products if kind == "cpu" else "tf32" if name == "tf32" else "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == inside
        assert ambient() == before
        with pytest.raises(OopsError), arithmetic(name, device):
            raise OopsError
        assert ambient() == before


def test_two_precisions_take_turns():
    packs = {name: trainer(trains=precision(name)) for name in ("bf16", "float32", "float64")}
    for stop in range(1, 5):
        for pack in packs.values():
            list(pack.run([stop]))
    for name, pack in packs.items():
        assert_equal(pack.state, state_after(4, trains=precision(name)))


# --- the update, from gradients given


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("warmup", [0, 6])
def test_updates_equal_those_of_torch_optim_for_every_member_and_tensor(optimizer, warmup):
    """Random gradients; each member has its rate, decay and clip, each tensor its rate of `mup`; decay by hand."""
    train = dataclasses.replace(DOUBLE, optimizer=optimizer, warmup=warmup, beta2=0.98, epsilon=1e-3)
    pack = trainer(NOISED, various(train), range(7), MUP)
    part, trains = pack.parts[0], various(train)
    rates = {name: spec.rate(MUP, optimizer) for name, spec in pack.specs.items()}
    assert len(set(rates.values())) > 1
    kind = {"adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-3), "sgd": torch.optim.SGD}
    single = [{name: value[s].detach().clone() for name, value in pack.parameters.items()} for s in range(7)]
    optimizers = [
        kind[optimizer]([{"params": [value], "name": name} for name, value in values.items()]) for values in single
    ]
    used = count_parameters(pack.specs.values())
    g = torch.Generator().manual_seed(0)
    for step in range(20):
        gradient = torch.randn(part.gradient.shape, generator=g, dtype=torch.float64)
        gradient[:, used:] = 0
        part.gradient.copy_(gradient)
        part._update(torch.tensor(step), torch.ones(7, dtype=torch.float64))
        for s, (own, reference) in enumerate(zip(trains, optimizers, strict=True)):
            rate = own.learning_rate * (min(1, (step + 1) / warmup) if warmup else 1)
            named = unflatten(gradient * min(1.0, own.clip / gradient[s].norm().item()), pack.specs)
            for group in reference.param_groups:
                (value,) = group["params"]
                value.mul_(1 - rate * own.weight_decay)
                value.grad = named[group["name"]][s]
                group["lr"] = rate * rates[group["name"]]
            reference.step()
    for s, values in enumerate(single):
        for name, value in values.items():
            torch.testing.assert_close(pack.parameters[name][s].detach(), value, rtol=1e-9, atol=1e-12, msg=name)
    assert (pack.state.weights[:, used:] == 0).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_member_is_frozen_by_its_loss_or_gradient_and_stays_so(optimizer, clip):
    train = dataclasses.replace(TRAIN, optimizer=optimizer, clip=clip, weight_decay=0.1)
    ill = {"loss": math.nextafter(DIVERGED_LOSS, math.inf), "nan": math.nan, "inf": math.inf}
    keys = ["calm", "at the limit", *ill, "gradient nan", "gradient inf", "gradient too large"]
    pack = trainer(NOISED, train, range(len(keys)), NARROW)
    calm = trainer(NOISED, train, range(2), NARROW)
    part, first = pack.parts[0], pack.state.weights.clone()
    loss = torch.tensor([1.0, DIVERGED_LOSS, *ill.values(), 1.0, 1.0, 1.0], dtype=torch.float64)
    for step in (4, 5):
        part.gradient.fill_(0.1)
        if step == 4:
            part.gradient[5, 3], part.gradient[6, 3] = math.nan, -math.inf
            part.gradient[7] = 3e38  # finite, its norm is not
        now = loss if step == 4 else torch.ones_like(loss)
        part._update(torch.tensor(step), now)
        calm.parts[0].gradient.fill_(0.1)
        calm.parts[0]._update(torch.tensor(step), now[:2])
    assert pack.state.diverged.tolist() == [-1, -1] + [4] * 6
    assert torch.equal(pack.state.weights[2:], first[2:])
    assert_equal(pack.state, calm.state, slice(2))
    assert not torch.equal(calm.state.weights, first[:2])
    assert torch.isfinite(pack.state.mean).all()
    assert torch.isfinite(pack.state.square).all()
    assert pack.state.loss_sum[:2].tolist() == [2.0, DIVERGED_LOSS + 1]
    assert torch.isnan(pack.take_loss()[2:]).all()


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_parts_that_take_several_steps_in_turn_end_where_single_steps_do(chunk):
    single, several = (trainer(NOISED, TRAIN, range(5), MODEL, chunk=chunk) for _ in range(2))
    for _ in range(12):
        single.advance()
    for steps in (5, 1, 4, 2):
        several.advance(steps)
    assert single.state.step == several.state.step == int(several.clock) == 12
    assert_equal(several.state, single.state)
