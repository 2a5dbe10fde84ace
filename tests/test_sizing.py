"""Sizes of packs: estimates against what tensors really take, and the bounds that follow from them."""

import dataclasses
import functools
import gc
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import RayError

from cluster import dispatch, plan
from cluster.cli import main
from cluster.pack import PackRun, build_probes, make_pool
from cluster.plan import PackCost, Plan
from cluster.sizing import (
    MOST,
    SAFE,
    Room,
    activation_bytes,
    available_memory,
    member_bytes,
    pack_bytes,
    require_computable,
)
from cluster.sweep import DataConfig, Pack, Sweep, packs, validate
from cluster.tracking import BrokenOffError
from sim.particles import ParticleBox
from sim.pool import Pool
from sim.system import Batch
from tests.test_pack import MEMBERS, Memory
from tests.toys import MaskedToy
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer, kept_bytes
from train.model import activations, forward

GIB = 1 << 30
CONFIG = Sweep(name="s").members()[0].config


def kept_by_autograd(trainer, batch):
    """What autograd really keeps of one forward pass and loss, beside the parameters: each storage once."""
    kept = {}

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    parameters = trainer.parts[0].parameters
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = trainer.system.loss(forward(parameters, trainer.model, batch), batch).sum()
    del loss
    return sum(size for place, size in kept.items() if place != trainer.state.weights.untyped_storage().data_ptr())


def storages():
    """Bytes of all tensors that are alive, by where they lie; a compiler's own, of other types, lie nowhere."""
    gc.collect()
    alive = [item.untyped_storage() for item in gc.get_objects() if type(item) in {torch.Tensor, torch.nn.Parameter}]
    return {storage.data_ptr(): storage.nbytes() for storage in alive}


def kept_by_tape(trainer, batch):
    """What is there between the passes of the gradient that is spelt out and was not before."""
    before, kept = storages(), {}

    def loss(prediction, batch):
        kept.update({place: size for place, size in storages().items() if place not in before})
        return trainer.system.loss(prediction, batch)

    trainer.parts[0].spelt_out.of(loss, batch)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("model", "batch_size", "precision"),
    [
        (ModelConfig(width=32), 64, "float32"),
        (ModelConfig(width=64, heads=8, layers=1), 64, "float64"),
        (ModelConfig(width=16, heads=2, layers=3, feedforward=2), 128, "float32"),
    ],
)
def test_activations_are_estimated_to_a_quarter(model, batch_size, precision):
    train = TrainConfig(batch_size=batch_size, precision=precision)
    config = dataclasses.replace(CONFIG, model=model, train=train, data=DataConfig(rows=64))
    rows = Pool.make(config.system, 0, {"train": 64}).to("cpu", train.dtype).parts["train"]
    trainer = Trainer(config.system, rows, model, [train] * 3, [1, 2, 3], chunk=3)
    batch = config.system.draw(rows.take(torch.zeros(3, batch_size, dtype=torch.int64)), None)
    batch = Batch(inputs=batch.inputs, targets=batch.targets)
    for kept in (kept_by_tape, kept_by_autograd):
        assert 3 * activation_bytes(config) == pytest.approx(kept(trainer, batch), rel=0.25)
    nearest = torch.randint(16, (3, batch_size, 16, 5), generator=torch.Generator().manual_seed(0))
    local = dataclasses.replace(batch, keys=nearest)
    estimate = 3 * batch_size * activations(model, 16, 5) * train.dtype.itemsize
    assert estimate == pytest.approx(kept_by_autograd(trainer, local), rel=0.25)


def test_examples_that_fill_a_batch_up_are_estimated_too():
    """40 examples of 7 tokens are read as 64."""
    system = dataclasses.replace(CONFIG.system, box=ParticleBox(n=7))
    train = TrainConfig(batch_size=40)
    rows = Pool.make(system, 0, {"train": 64}).parts["train"]
    trainer = Trainer(system, rows, CONFIG.model, [train] * 3, [1, 2, 3], chunk=3)
    batch = system.draw(rows.take(torch.zeros(3, 40, dtype=torch.int64)), None)
    batch = Batch(inputs=batch.inputs, targets=batch.targets)
    assert 3 * kept_bytes(CONFIG.model, train, 40, 7, None) == pytest.approx(kept_by_tape(trainer, batch), rel=0.25)


def test_a_member_takes_at_least_its_tensors():
    pool = Pool.make(MaskedToy(), 0, {"train": 64})
    config = dataclasses.replace(CONFIG, system=MaskedToy(), model=ModelConfig(width=16, heads=2))
    trainer = Trainer(config.system, pool.parts["train"], config.model, [config.train] * 4, [1, 2, 3, 4])
    tensors = [*trainer.state.tensors().values()]
    tensors += [value for part in trainer.parts for value in (part.gradient, part.direction)]
    assert 4 * member_bytes(config) > sum(value.nbytes for value in tensors)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("memory", [0, GIB // 8, GIB // 2, 2 * GIB, 140 * GIB])
def test_the_largest_pack_fits_and_one_more_would_not(device, memory):
    room = Room(device=device, memory=memory)
    for config in (CONFIG, dataclasses.replace(CONFIG, model=ModelConfig(width=512))):
        most = room.most(config)
        assert 1 <= most <= MOST[device]
        if most > 1:
            assert pack_bytes(config, most, device) <= SAFE * memory
        if most < MOST[device]:
            assert pack_bytes(config, most + 1, device) > SAFE * memory


def test_a_gpu_holds_all_activations_at_once_and_a_cpu_a_few():
    extra = pack_bytes(CONFIG, 512, "cuda") - pack_bytes(CONFIG, 256, "cuda")
    assert extra == 256 * (member_bytes(CONFIG) + activation_bytes(CONFIG))
    assert pack_bytes(CONFIG, 512) - pack_bytes(CONFIG, 256) == 256 * member_bytes(CONFIG)


def test_packs_heed_the_room_and_the_plan_says_why():
    members = Sweep(name="s", seeds=100).members()
    large, small = Room(device="cpu", memory=8 * GIB), Room(device="cpu", memory=GIB // 4)
    assert small.most(CONFIG) < 32 == large.most(CONFIG)
    for room, workers, reason in (
        (large, 50, "every worker has work"),
        (large, 1, "as many as gain from it"),
        (small, 1, "as many as memory holds"),
        (small, 50, "every worker has work"),
    ):
        cut = packs(members, workers, most=room.most)
        plan = Plan(packs=cut, costs={}, workers=workers, done=0, room=room, measured_on="cpu")
        sizes = {len(pack.members) for pack in plan.packs}
        parts = -(-100 // min(room.most(CONFIG), -(-100 // workers)))
        assert sizes == {100 // parts, -(-100 // parts)}
        assert {plan.reason(pack) for pack in plan.packs} == {reason}
    assert max(len(pack.members) for pack in packs(members, 1, size=7, most=small.most)) == 7


def test_rooms_are_found_by_node(monkeypatch):
    nodes = [{"CPU": 4.0, "memory": 8.0 * GIB}, {"CPU": 2.0, "memory": 2.0 * GIB}, {"GPU": 1.0, "memory": 1.0}]
    monkeypatch.setattr(dispatch, "nodes", lambda: nodes)
    assert dispatch.slots({"CPU": 1.0}) == 6
    assert dispatch.find_room({"CPU": 1.0}) == Room(device="cpu", memory=GIB)
    monkeypatch.setattr(dispatch, "nodes", lambda: [{"CPU": 2.0}])  # says nothing of its memory
    assert dispatch.find_room({"CPU": 1.0}).memory == pytest.approx(available_memory() / 2, rel=0.2)
    here = Room.here(workers=4, gpus=0)
    assert here.device == "cpu"
    assert here.memory == pytest.approx(available_memory() / 4, rel=0.2)


def test_a_plan_for_gpus_that_are_not_here_is_measured_on_as_few_as_a_cpu_takes(monkeypatch):
    few = dataclasses.replace(CONFIG, data=DataConfig(rows=16, validation_rows=8), train=TrainConfig(compiled=True))
    one = dataclasses.replace(MEMBERS[0], config=few)
    members = tuple(dataclasses.replace(one, id=f"{i:016x}") for i in range(40))
    cost = PackCost(step=1.0, probe=2.0, sparse=3.0, at_once=8, memory=7, artifacts=11, checkpoint=1000)
    tried = []
    monkeypatch.setattr(plan, "measure", lambda pack, pool, memory: tried.append(pack) or cost)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = plan.make_plan([Pack(members=members)], 1, 0, Room(device="cuda", memory=70 * GIB))
    assert len(tried[0].members) == MOST["cpu"] == 32
    assert not any(member.config.train.compiled for member in tried[0].members)
    expected = dataclasses.replace(cost, step=1.25, probe=2.5, sparse=3.75, at_once=None, checkpoint=1250)
    assert list(found.costs.values()) == [expected]
    assert found.measured_on == "cpu"
    here = plan.make_plan([Pack(members=members)], 1, 0, Room(device="cpu", memory=70 * GIB))
    assert tried[1].members[0].config.train.compiled
    assert (len(tried[1].members), list(here.costs.values())) == (40, [cost])


def test_on_a_smaller_gpu_than_the_workers_a_plan_is_measured_on_as_many_as_it_takes(monkeypatch):
    """In the way that they will be trained."""
    one = dataclasses.replace(MEMBERS[0], config=dataclasses.replace(CONFIG, train=TrainConfig(compiled=True)))
    pack = Pack(members=tuple(dataclasses.replace(one, id=f"{i:016x}") for i in range(40)))
    for most, expected in ((10, 10), (40, 40), (1000, 40)):
        room = SimpleNamespace(most=lambda config, most=most: most)
        monkeypatch.setattr(plan, "Room", SimpleNamespace(here=lambda gpus, room=room: room if gpus else None))
        tried = plan.stand_in(pack, "cuda")
        assert len(tried.members) == expected
        assert (tried is pack) == (expected == 40)
        assert all(member.config.train.compiled for member in tried.members)


def test_the_dry_run_tells_sizes_and_reasons(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    uri = f"sqlite:///{tmp_path}/x.db"
    few = ["--data.rows", "64", "--data.validation-rows", "16", "--probe.examples", "16", "--system.box.n", "6"]
    assert main(["sweep", "tiny", "--dry-run", "--workers", "2", "--tracking-uri", uri, *few]) == 0
    assert "every worker has work" in capsys.readouterr().out
    assert main(["sweep", "tiny", "--dry-run", "--pack-size", "1", "--tracking-uri", uri, *few]) == 0
    told = capsys.readouterr().out
    assert "--pack-size" in told
    assert "a worker takes 0.5 GB before that, and has" in told


CUDA, SMALL, CPU = (Room(device=kind, memory=size) for kind, size in (("cuda", 3 * GIB), ("cuda", GIB), ("cpu", 7)))
LOST = RayError("a task failed\nno driver")


class Asked:
    """Ray, as far as nodes are asked for their room: `found` is what each answers, or raises; all at once."""

    def __init__(self, monkeypatch, found):
        self.found, self.asked, self.cancelled = found, [], []
        monkeypatch.setattr(dispatch, "ray", self)

    def nodes(self):
        with_gpu = {"CPU": 4.0, "GPU": 1.0, "memory": 4.0 * GIB}
        nodes = [{"NodeID": 56 * name, "Alive": True, "Resources": with_gpu} for name in self.found]
        return [*nodes, {"NodeID": "head", "Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False}]

    def remote(self, **wanted):
        def remote(name, gpus):
            self.asked.append((name, wanted["num_gpus"], gpus))
            return name

        def options(scheduling_strategy):
            return SimpleNamespace(remote=functools.partial(remote, scheduling_strategy.node_id[0]))

        return lambda work: SimpleNamespace(options=options)

    def wait(self, answers, num_returns, timeout=None):
        """What stands in a tuple comes only to those who wait without a limit."""
        there = [name for name in answers if timeout is None or not isinstance(self.found[name], tuple)][:num_returns]
        return there, [name for name in answers if name not in there]

    def get(self, name):
        answer = self.found[name][0] if isinstance(self.found[name], tuple) else self.found[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, name):
        self.cancelled.append(name)


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ({"a": CUDA, "b": SMALL}, SMALL, []),
        ({"a": CUDA, "b": CPU}, CUDA, []),
        ({"a": CPU, "b": CPU}, Room(device="cpu", memory=GIB), []),  # GPUs in name only
        ({"a": CUDA, "b": LOST}, CUDA, ["node " + 56 * "b" + " does not say what room its GPUs have: no driver"]),
        ({"a": CUDA, "b": (SMALL,)}, CUDA, ["the GPUs of node " + 56 * "b" + " are in use"]),
        ({"a": (CUDA,), "b": (SMALL,)}, CUDA, ["the GPUs of node " + 56 * "b" + " are in use"]),
        ({"a": LOST, "b": (SMALL,)}, SMALL, ["node " + 56 * "a" + " does not say"]),
    ],
)
def test_the_gpus_of_every_node_are_asked_for_their_free_memory(monkeypatch, capsys, found, expected, told):
    cluster = Asked(monkeypatch, found)
    assert dispatch.find_room({"CPU": 1.0, "GPU": 0.25}) == expected
    assert cluster.asked == [("a", 0.25, 0.25), ("b", 0.25, 0.25)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told) == len(cluster.cancelled) + sum(answer is LOST for answer in found.values())
    assert all(line.startswith(f"headway: {start}") for line, start in zip(lines, told, strict=True))


def test_where_no_node_has_place_for_a_worker_no_gpu_is_asked(monkeypatch):
    cluster = Asked(monkeypatch, {})
    assert dispatch.find_room({"CPU": 1.0, "GPU": 0.25}).device == "cpu"
    assert cluster.asked == []


def test_gpus_of_which_no_node_says_anything_are_no_room(monkeypatch):
    Asked(monkeypatch, {"a": LOST, "b": LOST})
    with pytest.raises(BrokenOffError, match="no node of the cluster says what room its GPUs have"):
        dispatch.find_room({"CPU": 1.0, "GPU": 0.25})


@pytest.mark.slow
def test_a_gpu_in_use_is_not_waited_for_where_another_answers(monkeypatch):
    """GPUs in name, on a cluster of one node that is asked twice; one of two tasks has to wait for the other."""

    def slow_room(gpus):
        time.sleep(gpus)
        return Room(device="cuda", memory=GIB)

    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setattr(dispatch, "_gpu_room", slow_room)
        (node,) = dispatch.alive()
        monkeypatch.setattr(dispatch, "alive", lambda: [node, node])
        monkeypatch.setattr(dispatch, "ROOM_WAIT", 0.0)
        assert dispatch.find_room({"CPU": 1.0, "GPU": 1.0}) == Room(device="cuda", memory=GIB)
        monkeypatch.setattr(dispatch, "ROOM_WAIT", 60.0)
        assert len(dispatch._gpu_rooms({"CPU": 1.0, "GPU": 1.0})) == 2
    finally:
        ray.shutdown()


def test_tf32_needs_a_gpu():
    config = dataclasses.replace(CONFIG, train=TrainConfig(precision="tf32"))
    require_computable(config, "cuda")
    with pytest.raises(ValueError, match=r"train.precision: 'tf32' .* where packs have no GPU"):
        require_computable(config, "cpu")


def test_compiled_training_needs_a_compiler(monkeypatch):
    config = dataclasses.replace(CONFIG, train=TrainConfig(compiled=True))
    monkeypatch.setattr("cluster.sizing.can_compile", lambda device: device.type == "cuda")
    require_computable(config, "cuda")
    with pytest.raises(ValueError, match=r"train.compiled: True .* no C\+\+ compiler"):
        require_computable(config, "cpu")


def test_by_seed_members_see_the_same_rows_at_every_width():
    sweep = Sweep(name="s", widths=(8, 16), seeds=2, model=ModelConfig(heads=2), train=TrainConfig(batch_size=4))
    for order, paired in (("member", False), ("seed", True)):
        data = DataConfig(rows=64, validation_rows=8, order=order)
        members = validate(dataclasses.replace(sweep, data=data, system=MEMBERS[0].config.system))
        runs = {}
        for pack in packs(members, 1):
            pool = make_pool(pack.config)
            runs[pack.config.model.width] = PackRun(pack, pool, build_probes(pack.config, pool), Memory())
        for step in (0, 7, 3999):
            narrow, wide = (runs[width].trainer.schedule.at(step) for width in (8, 16))
            assert all(torch.equal(a, b) == paired for a, b in zip(narrow, wide, strict=True))
            assert not torch.equal(narrow[0][0], narrow[0][1])  # seeds differ
        starts = [runs[width].trainer.parameters["unembed.W"].flatten()[:4] for width in (8, 16)]
        assert not torch.equal(*starts)
    own, shared = (validate(dataclasses.replace(sweep, data=DataConfig(order=order))) for order in ("member", "seed"))
    assert not {m.id for m in own} & {m.id for m in shared}
    assert {m.id for m in own} == {m.id for m in validate(sweep)}
