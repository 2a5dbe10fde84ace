"""Local attention: nearest keys against sorting all pairs, global attention at k = N, memory that grows as N."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.pack import build_probes, make_pool
from cluster.sizing import activation_bytes
from cluster.sweep import DataConfig, ProbeConfig, Sweep, packs, validate
from sim import neighbours
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from sim.pool import Pool
from sim.system import gather_keys
from tests.test_step import TRAIN, trainer
from tests.toys import EnumeratedToy, MaskedToy, NoisedToy
from train.config import ModelConfig
from train.model import forward, initial, visible_keys
from train.neighbours import nearest, tokens_and_keys, with_keys
from train.snapshot import Snapshot


class RingToy(NoisedToy):
    """Positions on a periodic square of side 2."""

    def distance(self, geometry, keys):
        positions = geometry["positions"]
        apart = positions.unsqueeze(-2) - gather_keys(positions, keys)
        return (apart - 2 * (apart / 2).round()).square().sum(-1).sqrt()


SYSTEMS = {"plain": NoisedToy(n=9), "periodic": RingToy(n=9), "masked": MaskedToy(n=9, fewest=2)}
each_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
RING = SYSTEMS["periodic"]
LOCAL = ModelConfig(width=8, layers=2, heads=2, attention="local", neighbours=4)


def batch_of(system, count=6, lead=(), dtype=torch.float64):
    rows = Pool.make(system, 0, {"train": 64}).parts["train"].to("cpu", dtype)
    generator = Generator.stack([1, 2, 3]) if lead else Generator.of("batch")
    return system.draw(rows.take(generator.integers(64, count)), generator)


def by_sorting(system, batch, k):
    """The k nearest visible keys of every query, by ascending distance; -1 where there are not so many."""
    n = batch.inputs.shape[-2]
    apart, visible = system.distance(batch.geometry, None), visible_keys(batch)
    visible = torch.ones_like(apart, dtype=torch.bool) if visible is None else visible.expand_as(apart)
    rows = []
    for r, seen in zip(apart.reshape(-1, n), visible.reshape(-1, n), strict=True):
        order = sorted((float(x), j) for j, x in enumerate(r) if seen[j])[:k]
        rows.append([j for _, j in order] + [-1] * (k - len(order)))
    return torch.tensor(rows).view(*apart.shape[:-1], k)


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("k", [1, 4, 9])
@each_system
def test_the_nearest_visible_keys(system, k, at_once, monkeypatch):
    """All pairs at once, and as few keys at a time as there can be."""
    if at_once is not None:
        monkeypatch.setattr(neighbours, "PAIRS_AT_ONCE", at_once)
    batch = batch_of(system)
    allowed = torch.rand(6, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    for given in (batch, dataclasses.replace(batch, allowed=allowed)):
        found, expected = nearest(system, given, k), by_sorting(system, given, k)
        assert found.keys.shape == (6, 9, k)
        visible = visible_keys(found)
        visible = torch.ones_like(expected, dtype=torch.bool) if visible is None else visible
        assert torch.equal(torch.where(visible, found.keys, -1), expected)


@each_system
def test_among_keys_that_a_system_gives_the_nearest(system):
    batch = batch_of(system)
    keys = torch.argsort(torch.rand(6, 9, 9, generator=torch.Generator().manual_seed(1)), -1)[..., :6]
    allowed = torch.rand(6, 9, 6, generator=torch.Generator().manual_seed(2)) < 0.8
    some = nearest(system, dataclasses.replace(batch, keys=keys, allowed=allowed), 3)
    spread = torch.zeros(6, 9, 9, dtype=torch.bool).scatter(2, keys, allowed)
    expected = by_sorting(system, dataclasses.replace(batch, allowed=spread), 3)
    assert torch.equal(torch.where(visible_keys(some), some.keys, -1), expected)


def test_a_pack_gets_the_keys_of_its_members():
    packed = nearest(RING, batch_of(RING, lead=(3,)), 4)
    for member in range(3):
        stream = Generator(Generator.stack([1, 2, 3]).key[member])
        rows = Pool.make(RING, 0, {"train": 64}).parts["train"].to("cpu", torch.float64)
        alone = nearest(RING, RING.draw(rows.take(stream.integers(64, 6)), stream), 4)
        assert torch.equal(packed.keys[member], alone.keys)


@pytest.mark.parametrize("splitting", ["lie", "strang"])
@each_system
def test_as_many_neighbours_as_tokens_is_global_attention(system, splitting):
    config = dataclasses.replace(LOCAL, splitting=splitting)
    parameters = initial(config, system.d_in, system.d_out, Generator.stack([1, 2]), torch.float64)
    batch = batch_of(system)
    real = torch.ones(6, 9, dtype=torch.bool) if batch.mask is None else batch.mask
    every, near = forward(parameters, config, batch), forward(parameters, config, nearest(system, batch, 9))
    torch.testing.assert_close(near[:, real], every[:, real], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(forward(parameters, config, nearest(system, batch, 4))[:, real], every[:, real])


def test_a_batch_is_left_alone_where_it_has_no_more_keys():
    system, batch = SYSTEMS["plain"], batch_of(SYSTEMS["plain"])
    for config in (ModelConfig(), dataclasses.replace(LOCAL, neighbours=9), dataclasses.replace(LOCAL, neighbours=50)):
        assert with_keys(system, config, batch) is batch
    near = with_keys(system, LOCAL, batch)
    assert near.keys.shape == (6, 9, 4)
    assert with_keys(system, LOCAL, near) is near


def test_tokens_and_keys():
    rows = Pool.make(SYSTEMS["plain"], 0, {"train": 2}).parts["train"]
    for config, expected in ((ModelConfig(), None), (LOCAL, 4), (dataclasses.replace(LOCAL, neighbours=9), None)):
        assert tokens_and_keys(SYSTEMS["plain"], config, rows) == (9, expected)


def test_a_system_without_distances_has_no_local_attention():
    """Said when packs are cut, before any work."""
    config = Sweep(name="s", system=EnumeratedToy(), model=ModelConfig(attention="local"))
    words = "model.attention: 'local' is not allowed; it must be 'global', as EnumeratedToy has no distances"
    with pytest.raises(ValueError, match=words):
        packs(validate(config), workers=1, most=activation_bytes)


def test_predictions_fed_back_are_seen_locally_too(monkeypatch):
    """In the rollouts of particles every batch is new."""
    system = ParticleSystem(box=ParticleBox(n=9, radius=0.09))
    pool = Pool.make(system, 0, {"train": 32, "validation": 8})
    parameters = initial(LOCAL, 4, 4, Generator.stack([1]), torch.float32)
    seen = []
    monkeypatch.setattr("train.snapshot.forward", lambda p, c, batch: seen.append(batch) or forward(p, c, batch))
    snapshot = Snapshot(step=0, system=system, model=LOCAL, parameters=parameters)
    system.diagnose(snapshot.predict, pool.parts["validation"], Generator.of("diagnose"))
    assert len(seen) == 9
    assert {tuple(batch.keys.shape[-2:]) for batch in seen} == {(9, 4)}


def config_of(system, examples=6):
    probe = ProbeConfig(replicates=2, examples=examples, sparse_examples=1)
    data = DataConfig(rows=8, validation_rows=1)
    return Sweep(name="s", system=system, data=data, model=LOCAL, probe=probe).members()[0].config


def test_probes_see_what_the_model_sees():
    config = config_of(NoisedToy(n=9))
    parameters = initial(LOCAL, 2, 2, Generator.stack([1, 2]), torch.float32)
    snapshot = Snapshot(step=0, system=config.system, model=LOCAL, parameters=parameters)
    (attention,) = (probe for probe in build_probes(config, make_pool(config)) if probe.name == "attention")
    found = attention.measure(snapshot).values["null_uniform"]
    for r, replicate in enumerate(attention.replicates):
        assert replicate.batch.keys.shape == (6, 9, 4)
        related = replicate.relations["alike"]
        assert related.shape == (6, 9, 4)
        assert found[..., r] == pytest.approx(float(related.float().mean(-1)[related.any(-1)].mean()))


class Largest(TorchDispatchMode):
    """The size of the largest tensor made on the way."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_nothing_of_size_n_squared_is_made_of_4096_tokens(monkeypatch):
    """A training step, predictions, attention and its scores."""
    monkeypatch.setattr(neighbours, "PAIRS_AT_ONCE", 1 << 18)
    sizes = {}
    for n in (512, 4096):
        system = NoisedToy(n=n)
        config = config_of(system, examples=1)
        with Largest() as largest:
            pack = trainer(system, dataclasses.replace(TRAIN, batch_size=1), (1,), LOCAL)
            list(pack.run([1]))
            for probe in build_probes(config, make_pool(config)):
                if probe.name != "ablation":  # only predictions, many
                    probe.measure(pack.snapshot())
        sizes[n] = largest.size
    assert sizes[4096] <= 8.2 * sizes[512]
    assert sizes[4096] < 4096 * 4096 / 8
