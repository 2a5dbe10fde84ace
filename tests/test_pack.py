"""A pack from start to tables: what is measured when, exact resume of curves, and the folder it writes to."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from cluster import curves as tables
from cluster.curves import KEYS, Curves
from cluster.encoding import encode
from cluster.pack import (
    FolderSink,
    Pace,
    PackRun,
    build_probes,
    main,
    make_pool,
    out_of_memory,
    restore_checkpoint,
    run_pack,
    save_checkpoint,
    trivial_loss,
)
from cluster.store import FolderStore
from cluster.sweep import DataConfig, Pack, ProbeConfig, Sweep, validate
from probes.probe import Measurement
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from train.config import ModelConfig, TrainConfig
from train.loop import Trainer

SWEEP = Sweep(
    name="test",
    widths=(8,),
    seeds=3,
    system=ParticleSystem(box=ParticleBox(n=6, radius=0.1), restart=0.3),
    data=DataConfig(rows=64, validation_rows=16),
    model=ModelConfig(heads=2, layers=2),
    train=TrainConfig(steps=14, batch_size=4, learning_rate=1e-2),
    probe=ProbeConfig(replicates=2, examples=8, sparse_examples=4),
)
MEMBERS = validate(SWEEP)
NEVER, ALWAYS = Pace(progress=1e9, checkpoint=1e9), Pace(progress=0.0, checkpoint=0.0)


@pytest.fixture(scope="module")
def pool():
    return make_pool(MEMBERS[0].config)


@pytest.fixture(scope="module")
def probes(pool):
    return build_probes(MEMBERS[0].config, pool)


class Memory:
    """A sink that keeps everything, and breaks off after some saves."""

    def __init__(self, files=None, breaks_after=None):
        self.files, self.breaks_after = files, breaks_after
        self.told, self.finished, self.saves, self.notes = [], {}, 0, []

    def restore(self, pack):
        return restore_checkpoint(self.files, pack) if self.files else None

    def progress(self, pack, step, figures):
        self.told.append((step, figures))

    def note(self, pack, text):
        self.notes.append(text)

    def save(self, pack, state, curves):
        save_checkpoint(self.files, pack, state, curves)
        self.saves += 1
        if self.saves == self.breaks_after:
            raise InterruptedError

    def finish(self, pack, curves, diverged):
        for index, member in enumerate(pack.members):
            self.finished[member.id] = (curves.head_table(index), curves.figure_table(index), diverged[index])


def finished(members, pool, probes, files=None, pace=NEVER, breaks_after=None):
    sink = Memory(files, breaks_after)
    try:
        run_pack(Pack(members=tuple(members)), pool, probes, sink, pace)
    except InterruptedError:
        return None
    return sink.finished


def same(found, expected):
    """Equal bit for bit, but for the time of day."""
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"wall_time"}:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert found[2] == expected[2]


@pytest.fixture(scope="module")
def undisturbed(pool, probes):
    return finished(MEMBERS, pool, probes)


def test_everything_is_measured_when_it_should_be(undisturbed):
    heads, figures, diverged = undisturbed[MEMBERS[0].id]
    steps, sparse = SWEEP.probe.steps(14), SWEEP.probe.sparse_steps(14)
    assert diverged == -1
    assert tuple(figures["step"]) == steps
    for probe, at in (("attention", set(steps)), ("ablation", sparse), ("distance", sparse)):
        assert set(heads["step"][heads["probe"] == probe]) == at
    assert tuple(heads)[: len(KEYS)] == KEYS
    attention = heads["probe"] == "attention"
    assert attention.sum() == len(steps) * 2 * 2 * 2 * 2  # layers, heads, relations, replicates
    assert np.isfinite(heads["score"][attention & (heads["relation"] == "near")]).all()
    assert np.isnan(figures["train_loss"][0])
    assert np.isfinite(figures["train_loss"][1:]).all()
    assert np.isfinite(figures["validation_loss"]).all()
    measured = np.isfinite(figures["rollout_position_error_1"])
    assert set(figures["step"][measured]) == sparse


def test_a_members_tables_do_not_depend_on_its_company(pool, probes, undisturbed):
    for members in (MEMBERS[1:2], MEMBERS[::-1]):
        for name, tables_of_member in finished(members, pool, probes).items():
            same(tables_of_member, undisturbed[name])


@pytest.mark.parametrize("breaks_after", [1, 4, 11])
def test_tables_after_a_break_are_those_of_an_undisturbed_run(tmp_path, pool, probes, undisturbed, breaks_after):
    files = FolderStore(tmp_path)
    assert finished(MEMBERS, pool, probes, files, ALWAYS, breaks_after) is None
    steps = [m["step"] for m in map(json.loads, map(files.get, files.names("checkpoints")[::2]))]
    assert 0 <= max(steps) < 14
    for name, tables_of_member in finished(MEMBERS, pool, probes, files).items():
        same(tables_of_member, undisturbed[name])


def test_packs_are_formed_anew_from_slices(tmp_path, pool, probes, undisturbed):
    files = FolderStore(tmp_path)
    for part in (MEMBERS[:2], MEMBERS[2:]):
        assert finished(part, pool, probes, files, ALWAYS, breaks_after=6) is None
    for part in ((MEMBERS[2], MEMBERS[0]), MEMBERS[1:2]):
        for name, tables_of_member in finished(part, pool, probes, files).items():
            same(tables_of_member, undisturbed[name])


@pytest.mark.parametrize("stride", [1, 2, 3, 100])
def test_progress_is_told_between_probe_steps_too(tmp_path, pool, probes, monkeypatch, stride):
    monkeypatch.setattr("cluster.pack.STRIDE", stride)
    sink = Memory(FolderStore(tmp_path))
    run_pack(Pack(members=MEMBERS[:1]), pool, probes, sink, Pace(progress=0.0, checkpoint=1e9))
    stops = SWEEP.probe.steps(14)
    between = (range(start + stride, stop, stride) for start, stop in itertools.pairwise(stops))
    assert [step for step, _ in sink.told] == sorted({*stops, *itertools.chain(*between)})
    assert all("train_loss" in figures for _, figures in sink.told)


class SmallDevice:
    """Steps fail for want of memory from step `since` on in packs above `most` members."""

    def __init__(self, monkeypatch, most, since=0, error=torch.OutOfMemoryError):
        real = Trainer.advance

        def advance(trainer, steps=1):
            if len(trainer.state.weights) > most and trainer.state.step + steps > since:
                try:
                    raise error("tried to allocate 7 GiB")
                except Exception as lack:
                    raise RuntimeError("the recording was broken off") from lack
            real(trainer, steps)

        monkeypatch.setattr(Trainer, "advance", advance)


@pytest.mark.parametrize(("most", "halvings"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(("since", "pace"), [(0, NEVER), (9, NEVER), (9, ALWAYS)])
def test_where_memory_ends_packs_are_halved_and_no_number_changes(
    tmp_path, pool, probes, undisturbed, monkeypatch, most, halvings, since, pace
):
    SmallDevice(monkeypatch, most, since)
    sink = Memory(FolderStore(tmp_path))
    run_pack(Pack(members=MEMBERS), pool, probes, sink, pace)
    assert sink.finished.keys() == {member.id for member in MEMBERS}
    for member in MEMBERS:
        same(sink.finished[member.id], undisturbed[member.id])
    assert len(sink.notes) == halvings
    assert "ran out of memory with 3 members, goes on in halves: OutOfMemoryError: tried to allocate 7" in sink.notes[0]
    begun = [step for step, _ in sink.told].count(0)
    assert begun == (1 + 2 * halvings if pace is NEVER else 1)  # with checkpoints the halves went on from there


def test_a_member_that_does_not_fit_alone_and_other_errors_are_raised(pool, probes, monkeypatch):
    SmallDevice(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="broken off"):
        finished(MEMBERS[:2], pool, probes)
    SmallDevice(monkeypatch, 0, error=OSError)
    sink = Memory()
    with pytest.raises(RuntimeError, match="broken off"):
        run_pack(Pack(members=MEMBERS[:2]), pool, probes, sink)
    assert sink.notes == []


def test_a_lack_of_memory_is_known_by_its_kind():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert "can't allocate memory" in out_of_memory(caught.value)
    assert out_of_memory(MemoryError("numpy")) == "MemoryError: numpy"
    assert out_of_memory(ValueError("memory")) is None


def test_packs_are_cut_in_order_into_even_pieces():
    pack = Pack(members=MEMBERS)
    assert pack.cut(1) == (pack,)
    for pieces in (2, 3, 100):
        parts = pack.cut(pieces)
        assert tuple(member for part in parts for member in part.members) == pack.members
        assert len(parts) == min(pieces, len(pack.members))
        assert all(part.start == pack.start for part in parts)


def test_a_diverged_member_is_told_and_its_neighbour_finishes(pool, probes, undisturbed):
    wild = dataclasses.replace(SWEEP, axes={"train.learning_rate": (1e-2, 1e12)}, train=SWEEP.train)
    calm, broken = (m for m in validate(wild) if m.config.seed == 0)
    found = finished((broken, calm), pool, probes)
    assert found[broken.id][2] > 0
    assert found[calm.id][2] == -1
    same(found[calm.id], undisturbed[calm.id])


def test_probe_groups_and_ceilings(pool, probes):
    ablation = next(probe for probe in probes if probe.name == "ablation")
    system = SWEEP.system
    for replicate in ablation.replicates:
        related = replicate.relations["collision"].any(-1)
        assert torch.equal(replicate.groups["related"], related)
        assert torch.equal(replicate.groups["free"], ~related)
        error = (replicate.batch.targets - replicate.batch.targets.mean((0, 1))).square().mean()
        assert replicate.ceilings["all"] == pytest.approx(error.item(), rel=1e-5)
    batch = system.draw(pool.parts["train"], Generator.of("all"))
    everything = torch.ones(batch.targets.shape[:2], dtype=torch.bool)
    assert trivial_loss(system, batch, everything) == pytest.approx(system.floors().trivial, rel=1e-5)


def test_nothing_leaks_from_one_run_to_the_next(pool, probes):
    before = {name: value.clone() for name, value in pool.parts["train"].columns.items()}
    first = finished(MEMBERS[:1], pool, probes)
    finished(MEMBERS[1:], pool, probes)
    same(finished(MEMBERS[:1], pool, probes)[MEMBERS[0].id], first[MEMBERS[0].id])
    assert all(torch.equal(value, before[name]) for name, value in pool.parts["train"].columns.items())


def test_kept_weights_are_those_that_were_trained(tmp_path, pool, probes):
    sink = FolderSink(tmp_path)
    pack = Pack(members=MEMBERS[:2])
    run = PackRun(pack, pool, probes, sink, NEVER)
    run.run()
    folder = tmp_path / "members" / MEMBERS[1].id
    with np.load(folder / "weights.npz", allow_pickle=False) as weights:
        assert {int(name.split("/")[0]) for name in weights.files} == SWEEP.probe.weight_steps(14)
        for name, value in run.trainer.parameters.items():
            np.testing.assert_array_equal(weights[f"14/{name}"], value[1].detach().numpy())
    assert json.loads((folder / "member.json").read_text()) == {"axes": {"model.width": 8}, "diverged": -1}
    assert sink.done(MEMBERS[1].id)
    assert not sink.done(MEMBERS[2].id)


def test_a_folder_keeps_a_checkpoint_until_all_its_members_are_done(tmp_path, pool, probes):
    sink, pack = FolderSink(tmp_path), Pack(members=MEMBERS[:2])
    run = PackRun(pack, pool, probes, sink, NEVER)
    run.trainer.advance()
    sink.save(pack, run.trainer.state, run.curves)
    last, first = pack.cut(2)[::-1]  # as where memory runs out
    for half, left in ((last, 1), (first, 0)):
        PackRun(half, pool, probes, sink, NEVER).run()
        assert len(list((tmp_path / "checkpoints").glob("*.npz"))) == left
        assert all(sink.done(member.id) for member in half.members)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_bare_command_skips_what_is_done_and_refuses_nonsense(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr("cluster.pack.run_pack", lambda pack, *rest: calls.append(pack))
    (tmp_path / "members").mkdir()
    (tmp_path / "stored.json").write_text(json.dumps(encode(dataclasses.replace(SWEEP, widths=(8, 16), seeds=2))))
    command = [str(tmp_path / "stored.json"), "--out", str(tmp_path), "--device", "cpu", "--size", "1"]
    assert main(command) == 0
    assert len(calls) == 4
    done = calls[0].members[0].id
    (tmp_path / "members" / done).mkdir()
    (tmp_path / "members" / done / "member.json").write_text("{}")
    calls.clear()
    assert main(command) == 0
    assert len(calls) == 3
    for arguments, message in (
        (["tyny"], "did you mean 'tiny'"),
        (["tiny", "--only", "9"], "must be in 0.."),
        (["tiny", "--device", "cuda:99"], "--device: 'cuda:99'"),
        (["tiny", "--device", "tpu"], "one of cpu"),
        (["tiny", "--device", "cuda:-1"], "--device: 'cuda:-1'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--out", str(tmp_path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def small_curves():
    curves = Curves(members=2)
    for t, step in enumerate((0, 5)):
        values = np.arange(2 * 1 * 2 * 3 * 2, dtype=np.float32).reshape(2, 1, 2, 3, 2) + 100 * t
        curves.add("p", step, 7.0 + t, Measurement(relations=("a", "b", "c"), values={"x": values}))
        figures = {"loss": np.array([1.0, 2.0])} | ({"late": np.array([3.0, 4.0])} if t else {})
        curves.add_figures(step, 7.0 + t, figures)
    curves.add("q", 5, 8.0, Measurement(relations=("r",), values={"y": np.ones((2, 1, 2, 1, 2), dtype=np.float32)}))
    curves.weights[5] = np.array([[1.0], [2.0]])
    return curves


def test_long_tables_hold_every_value_at_its_keys():
    table = small_curves().head_table(1)
    assert len(table["step"]) == 2 * 2 * 3 * 2 + 2 * 2
    at = {"step": 5, "relation": "b", "layer": 0, "head": 1, "replicate": 0, "probe": "p"}
    row = np.logical_and.reduce([table[key] == value for key, value in at.items()])
    assert table["x"][row] == [100 + np.ravel_multi_index((1, 0, 1, 1, 0), (2, 1, 2, 3, 2))]
    assert np.isnan(table["y"][row]).all()
    assert table["wall_time"][row] == [8.0]
    figures = small_curves().figure_table(1)
    np.testing.assert_array_equal(figures["late"], [np.nan, 4.0])


def test_arrays_cut_and_merge_by_member():
    arrays = small_curves().to_arrays()
    again = Curves.from_arrays(tables.join([tables.take(arrays, [1]), tables.take(arrays, [0])]))
    for mine, theirs in ((0, 1), (1, 0)):
        for kind in ("head_table", "figure_table"):
            found, expected = getattr(again, kind)(mine), getattr(small_curves(), kind)(theirs)
            assert all(
                np.array_equal(found[name], expected[name], equal_nan=name in ("late", "x", "y")) for name in found
            )
    np.testing.assert_array_equal(again.weights[5], [[2.0], [1.0]])
    assert again.last_step == 5
    assert Curves(members=1).last_step == -1
    empty = Curves.from_arrays(Curves(members=3).to_arrays())
    assert (empty.members, empty.last_step, empty.head_table(0)) == (3, -1, {})


def test_a_column_named_like_a_key_is_refused():
    with pytest.raises(ValueError, match="column 'layer' is not allowed"):
        Curves(members=1).add("p", 0, 0.0, Measurement(relations=("a",), values={"layer": np.zeros((1, 1, 1, 1, 1))}))
