"""Members, ids and packs; configs through JSON; what is refused and how it is said."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from cluster.encoding import decode, encode, set_field
from cluster.recipes import RECIPES, load_sweep
from cluster.sweep import (
    DataConfig,
    MemberConfig,
    ProbeConfig,
    Sweep,
    canonical,
    member_id,
    packs,
    validate,
)
from sim.particles import ParticleBox, ParticleSystem
from tests.toys import EnumeratedToy, MaskedToy, NoisedToy
from train.config import ModelConfig, TrainConfig

MEMBER = Sweep(name="s").members()[0].config


def sweep(**changes):
    return dataclasses.replace(Sweep(name="s", widths=(16, 32), seeds=3), **changes)


def test_members_are_the_whole_grid_once_in_a_stable_order():
    wide = sweep(axes={"train.learning_rate": (0.001, 0.004), "system.box.restitution": (0.5,)})
    members = validate(wide)
    assert len(members) == 2 * 3 * 2 * 1 == len({member.id for member in members})
    assert [m.config.model.width for m in members] == [16] * 6 + [32] * 6
    assert [m.config.seed for m in members[:3]] == [0, 1, 2]
    assert {m.config.system.box.restitution for m in members} == {0.5}
    assert [m.id for m in validate(wide)] == [m.id for m in members]
    assert members[0].axes == {"model.width": 16, "train.learning_rate": 0.001, "system.box.restitution": 0.5}


def test_more_seeds_and_widths_extend_the_same_sweep():
    small, large = sweep(), sweep(widths=(16, 32, 64), seeds=5)
    assert small.id == large.id
    assert {m.id for m in small.members()} < {m.id for m in large.members()}
    axis = sweep(axes={"train.learning_rate": (0.001,)})
    longer = sweep(axes={"train.learning_rate": (0.001, 0.002)})
    assert axis.id == longer.id != small.id
    assert axis.members()[0].id == small.members()[0].id  # the same config is the same member on any axis


@pytest.mark.parametrize(
    "changes",
    [
        {"train": TrainConfig(steps=50)},
        {"data": DataConfig(seed=1)},
        {"system": ParticleSystem(box=ParticleBox(gravity=0.0))},
        {"model": ModelConfig(layers=3)},
        {"probe": ProbeConfig(examples=32)},
    ],
)
def test_what_changes_numbers_changes_ids(changes):
    assert sweep(**changes).id != sweep().id
    assert not {m.id for m in sweep(**changes).members()} & {m.id for m in sweep().members()}


def test_ids_do_not_hold_fields_at_their_default():
    config = sweep().members()[0].config
    text = json.dumps(canonical(config))
    assert "beta1" not in text
    assert canonical(config)["model"] == {"width": 16}
    assert canonical(config)["system"] == {"type": "particles"}


def test_a_changed_results_version_changes_every_id(monkeypatch):
    before = member_id(sweep().members()[0].config)
    monkeypatch.setattr("train.loop.RESULTS_VERSION", 99)
    assert member_id(sweep().members()[0].config) != before


def test_whole_numbers_in_float_fields_are_the_same_config():
    one, other = (sweep(train=TrainConfig(learning_rate=value)) for value in (1, 1.0))
    assert one.id == other.id
    assert [m.id for m in one.members()] == [m.id for m in other.members()]


def test_ids_are_the_same_in_another_process():
    code = "from cluster.recipes import quick; print(quick().id, quick().members()[-1].id)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    quick = RECIPES["quick"]()
    assert said == [quick.id, quick.members()[-1].id]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert RECIPES[name].__doc__
    validate(recipe)
    body = json.loads(json.dumps(encode(recipe)))
    assert decode(Sweep, body) == recipe


def test_a_stored_sweep_is_run_again_from_its_file(tmp_path):
    wanted = sweep(axes={"train.learning_rate": (0.001, 0.002)}, model=ModelConfig(heads=None, head_dim=8))
    (tmp_path / "s.json").write_text(json.dumps(encode(wanted)))
    assert load_sweep(str(tmp_path / "s.json")) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["train"].update(stepz=3), "sweep.train: 'stepz' is unknown; did you mean 'steps'"),
        (lambda b: b["train"].update(steps="many"), "sweep.train.steps: 'many' .* a whole number"),
        (lambda b: b["train"].update(steps=True), "sweep.train.steps: True"),
        (lambda b: b["train"].update(learning_rate=None), "sweep.train.learning_rate: None .* a finite number"),
        (lambda b: b["system"].update(type="proteins"), "sweep.system: .* a type among particles"),
        (lambda b: b["system"]["box"].update(n=0), "n: 0"),
        (lambda b: b.update(widths="wide"), "sweep.widths: 'wide' .* a list"),
        (lambda b: b.update(axes=[1]), "sweep.axes"),
        (lambda b: b.update(data=3), "sweep.data: 3 .* a mapping"),
    ],
)
def test_stored_configs_are_checked_by_name(tmp_path, change, message):
    body = json.loads(json.dumps(encode(sweep())))
    change(body)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "widths: () is not allowed; it must be at least one width"),
        ({"widths": (16, 16)}, "widths: (16, 16) is not allowed; it must be without repeats"),
        ({"widths": (18,)}, "width: 18 is not allowed; it must be a multiple of 4"),
        ({"seeds": 0}, "seeds: 0"),
        ({"name": ""}, "name: ''"),
        ({"axes": {"train.lr": (1.0,)}}, "train: 'lr' is unknown"),
        ({"axes": {"trian.steps": (10,)}}, "axes: 'trian' is unknown; did you mean 'train'?"),
        ({"axes": {"seeds": (1, 2)}}, "axes: 'seeds' is unknown"),
        (
            {"axes": {"system.relation": ("near",)}},
            "axes: 'system.relation' is not allowed; it must be one for the whole",
        ),
        ({"axes": {"train.clip": (1, 1.0)}}, "train.clip: (1, 1.0) is not allowed; it must be without repeats"),
        (
            {"train": TrainConfig(steps=5)},
            "train.steps: 5 is not allowed; it must be so many that there are 8 probe steps",
        ),
        ({"axes": {"train.learning_rate": ()}}, "train.learning_rate: ()"),
        (
            {"axes": {"train.learning_rate": ("fast",)}},
            "train.learning_rate: 'fast' is not allowed; it must be a finite",
        ),
        ({"axes": {"model.width": (16,)}}, "axes: 'model.width'"),
        ({"axes": {"system.box.restitution": (1.5,)}}, "restitution: 1.5"),
        ({"widths": (16.0,)}, "widths: (16.0,) is not allowed; it must be a list of which each is a whole number"),
    ],
)
def test_impossible_sweeps_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(sweep(**changes))


def test_types_and_infinities_anywhere_are_found_by_dotted_name():
    bad = sweep(probe=dataclasses.replace(ProbeConfig(), examples=2.5, sparse_examples=1))
    with pytest.raises(ValueError, match=r"probe\.examples: 2\.5"):
        validate(bad)
    with pytest.raises(ValueError, match="speed"):
        validate(sweep(system=ParticleSystem(speed=math.inf)))


def test_unknown_recipes_have_a_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="recipe: 'quikc' is unknown; did you mean 'quick'"):
        load_sweep("quikc")
    with pytest.raises(ValueError, match="cannot be read"):
        load_sweep(str(tmp_path / "none.json"))


def test_dotted_fields_are_set_together():
    config = MemberConfig(
        system=ParticleSystem(),
        data=DataConfig(),
        model=ModelConfig(),
        train=TrainConfig(),
        probe=ProbeConfig(),
        seed=0,
    )
    changed = set_field(config, {"model.heads": 6, "model.width": 48, "system.box.n": 4}, "member")
    assert (changed.model.heads, changed.model.width, changed.system.box.n) == (6, 48, 4)


def test_packs_hold_every_member_once_with_its_like():
    members = sweep(axes={"train.learning_rate": (0.001, 0.004)}).members()
    for workers, size in ((1, None), (3, None), (64, None), (2, 4), (2, 1)):
        cut = packs(members, workers, size)
        assert sorted(m.id for pack in cut for m in pack.members) == sorted(m.id for m in members)
        assert all(len({m.group for m in pack.members}) == 1 for pack in cut)
        assert max(len(pack.members) for pack in cut) <= (size or 32)
        assert [p.id for p in packs(members, workers, size)] == [p.id for p in cut]
    assert len(packs(members, 1)) == 2  # learning rates share a pack, widths do not
    assert len(packs(members, 3)) >= 4
    assert packs(members, 2, 4)[0].config.model.width == 32  # costly ones first


def test_members_at_different_steps_are_packed_apart():
    members = sweep(widths=(16,)).members()
    cut = packs(members, 1, starts={members[0].id: 50, members[2].id: 50})
    assert {(len(pack.members), pack.start) for pack in cut} == {(2, 50), (1, 0)}
    with pytest.raises(ValueError, match="pack_size: 0"):
        packs(members, 1, 0)


def test_ten_thousand_members_are_planned_in_seconds():
    large = sweep(widths=(16, 32, 64, 128, 256), seeds=2000)
    cut = packs(validate(large), 64)
    assert sum(len(pack.members) for pack in cut) == 10_000


def test_probe_steps_hold_the_sparse_ones_and_the_ends():
    probe = ProbeConfig()
    for last in (1, 50, 4000):
        steps, sparse, kept = probe.steps(last), probe.sparse_steps(last), probe.weight_steps(last)
        assert {0, last} <= kept <= set(steps)
        assert {0, last} <= sparse <= set(steps)
    assert 4 * math.log10(4000) <= len(probe.sparse_steps(4000)) <= 4 * math.log10(4000) + 3


def test_systems_of_other_packages_have_identities_of_their_own():
    ids = {member_id(dataclasses.replace(MEMBER, system=toy)) for toy in (MaskedToy(), EnumeratedToy(), NoisedToy())}
    assert len(ids) == 3


def test_axes_have_names_that_nothing_else_can_have():
    wide = sweep(axes={"model.heads": (2, 4), "data.seed": (1,), "system.box.width": (1.0,)})
    assert wide.axis_names == ("width", "model.heads", "data.seed", "system.box.width")
    assert validate(wide)[0].point == {"width": 16, "model.heads": 2, "data.seed": 1, "system.box.width": 1.0}
