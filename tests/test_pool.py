import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import MaskedToy, NoisedToy

import sim.pool
from sim.particles import ParticleBox, ParticleSystem
from sim.pool import Pool, digest_of, system_name

SIZES = {"train": 40, "validation": 6, "probe": 5}
SYSTEMS = {"particles": ParticleSystem(box=ParticleBox(n=4)), "masked": MaskedToy(), "noised": NoisedToy()}


@pytest.fixture(scope="module", params=list(SYSTEMS))
def pool(request):
    return Pool.make(SYSTEMS[request.param], 3, SIZES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pools" / "pool.npz"


def assert_same(one: Pool, other: Pool):
    assert one.digest == other.digest and one.parts.keys() == other.parts.keys()
    for part, rows in one.parts.items():
        for mine, its in ((rows.columns, other.parts[part].columns), (rows.statistics, other.parts[part].statistics)):
            assert mine.keys() == its.keys()
            for name, value in mine.items():
                assert value.dtype == its[name].dtype and torch.equal(value, its[name]), name


def test_the_same_pool_is_made_twice(pool):
    system = next(system for system in SYSTEMS.values() if digest_of(system, 3, SIZES) == pool.digest)
    assert_same(pool, Pool.make(system, 3, SIZES))


def test_digest_depends_on_all_that_it_is_made_of(monkeypatch):
    system = SYSTEMS["particles"]
    digests = [
        digest_of(system, 3, SIZES),
        digest_of(system, 4, SIZES),
        digest_of(system, 3, SIZES | {"train": 41}),
        digest_of(system, 3, {"train": 40}),
        digest_of(replace(system, speed=0.71), 3, SIZES),
        digest_of(replace(system, box=replace(system.box, gravity=1.01)), 3, SIZES),
        digest_of(MaskedToy(), 3, SIZES),
        digest_of(NoisedToy(), 3, SIZES),
    ]
    monkeypatch.setattr(sim.pool, "RESULTS_VERSION", 0)
    digests.append(digest_of(system, 3, SIZES))
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 32 for digest in digests)


def test_digest_ignores_the_order_of_sizes():
    backwards = dict(reversed(SIZES.items()))
    assert digest_of(MaskedToy(), 3, SIZES) == digest_of(MaskedToy(), 3, backwards)


def test_names_of_systems():
    assert system_name(ParticleSystem()) == "particles"
    assert system_name(MaskedToy()).endswith("MaskedToy")


def test_another_seed_gives_other_rows():
    one, other = (Pool.make(MaskedToy(), seed, SIZES) for seed in (0, 1))
    assert not torch.equal(one.parts["train"].columns["x"], other.parts["train"].columns["x"])


def test_train_rows_do_not_depend_on_the_other_parts():
    alone, together = Pool.make(NoisedToy(), 0, {"train": 40}), Pool.make(NoisedToy(), 0, SIZES)
    assert torch.equal(alone.parts["train"].columns["mean"], together.parts["train"].columns["mean"])


@pytest.mark.parametrize("sizes", [{}, {"probe": 3}, {"train": 0}, {"train": 3, "test": 3}])
def test_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="sizes"):
        Pool.make(MaskedToy(), 0, sizes)


def test_arrays_and_back(pool):
    arrays = pool.to_arrays()
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays.values())
    assert_same(pool, Pool.from_arrays(arrays))


def test_arrays_from_an_object_store_are_read_only(pool):
    arrays = pool.to_arrays()
    frozen = {name: array.copy() for name, array in arrays.items()}
    for array in frozen.values():
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thawed = Pool.from_arrays(frozen)
    assert_same(pool, thawed)
    next(iter(thawed.parts["train"].columns.values())).zero_()  # our own memory
    assert all(np.array_equal(array, arrays[name]) for name, array in frozen.items())


def test_foreign_arrays():
    with pytest.raises(ValueError, match="arrays"):
        Pool.from_arrays({"train/x": np.zeros(3)})


def test_to_another_dtype(pool):
    moved = pool.to("cpu", torch.float64)
    assert moved.digest == pool.digest
    for name, column in moved.parts["train"].columns.items():
        floating = pool.parts["train"].columns[name].is_floating_point()
        assert column.dtype == (torch.float64 if floating else pool.parts["train"].columns[name].dtype)


def test_save_and_load(pool, path):
    pool.save(path)
    assert_same(pool, Pool.load(path))
    assert_same(pool, Pool.load(path, pool.digest))
    pool.save(path)  # over an existing file
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_nothing_behind(pool, path, monkeypatch):
    pool.save(path)
    monkeypatch.setattr(np, "savez", lambda *_, **__: json.loads("not json"))
    with pytest.raises(json.JSONDecodeError):
        pool.save(path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert_same(pool, Pool.load(path))


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        Pool.load(path)


def test_another_pool_than_wanted(pool, path):
    pool.save(path)
    with pytest.raises(ValueError, match=r"holds pool .* is wanted"):
        Pool.load(path, "0" * 32)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_file(pool, path, keep):
    pool.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"pool\.npz"):
        Pool.load(path)


def test_every_flipped_byte_is_noticed_or_harmless(pool, path):
    """Either a clear error, or (padding and time stamps of the zip) exactly the same pool."""
    pool.save(path)
    whole = bytearray(path.read_bytes())
    for place in np.linspace(0, len(whole) - 1, 60).astype(int):
        broken = whole.copy()
        broken[place] ^= 0x55
        path.write_bytes(broken)
        try:
            assert_same(pool, Pool.load(path))
        except ValueError as error:
            assert "pool.npz" in str(error)


def test_changed_contents(pool, path):
    """A valid file of the right names whose numbers are not those that were saved."""
    pool.save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = next(name for name in arrays if name.startswith("train/"))
    arrays[name] = np.zeros_like(arrays[name])
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="checksum"):
        Pool.load(path)


def test_foreign_files(path):
    path.parent.mkdir()
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="checksum"):
        Pool.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read as a pool"):
        Pool.load(path)
    path.write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(ValueError, match="cannot be read as a pool"):
        Pool.load(path)
