"""The toys through the whole house but Ray and MLflow: packed, trained, probed, analysed, and put on a page."""

import dataclasses
import shutil

import pandas as pd
import pytest

from cluster.analysis import analyze_member, tabulate
from cluster.cli import main
from cluster.pack import Pace, build_probes, make_pool, run_pack
from cluster.plan import make_plan
from cluster.report import MemberData, write_report
from cluster.sizing import Room
from cluster.sweep import DataConfig, ProbeConfig, Sweep, packs, validate
from tests.planted_sweep import with_laws
from tests.test_pack import Memory
from tests.toys import EnumeratedToy, MaskedToy, NoisedToy
from train.config import ModelConfig, TrainConfig


def sweep_of(system, precision="float32", **model):
    return Sweep(
        name="toy",
        widths=(8,),
        seeds=2,
        system=system,
        data=DataConfig(rows=64, validation_rows=8),
        model=ModelConfig(heads=2, layers=2, **model),
        train=TrainConfig(steps=12, batch_size=4, precision=precision),
        probe=ProbeConfig(replicates=3, examples=8, sparse_examples=4),
    )


LOCAL = {"attention": "local", "neighbours": 3}


@pytest.mark.parametrize(
    ("system", "precision", "model"),
    [
        (MaskedToy(), "float32", {}),
        (EnumeratedToy(), "float64", {}),
        (NoisedToy(), "float32", {}),
        (NoisedToy(), "float64", LOCAL),
        (MaskedToy(), "float32", {**LOCAL, "splitting": "strang"}),
    ],
)
def test_a_toy_sweep_ends_on_a_page(system, precision, model, tmp_path):
    sweep = sweep_of(system, precision, **model)
    (pack,) = packs(validate(sweep), workers=1)
    pool, sink = make_pool(pack.config), Memory()
    run_pack(pack, pool, build_probes(pack.config, pool), sink, Pace(progress=1e9, checkpoint=1e9))
    heads, members, lines, data = [], [], [], {}
    for member in pack.members:
        curves, figures, diverged = sink.finished[member.id]
        assert diverged == -1
        data[member.id] = MemberData(curves=pd.DataFrame(curves), figures=pd.DataFrame(figures), weights={})
        rows, row, line = analyze_member(data[member.id].curves, data[member.id].figures, system.relation)
        keys = {"member_id": member.id, "run_id": member.id, **member.point, "seed": member.config.seed}
        heads += [{**keys, **head} for head in rows]
        lines += [{**keys, **each} for each in line]
        members.append({**keys, "outcome": "finished", "cause": "", **row})
    analysis = with_laws(sweep, tabulate(heads, members, sweep.axis_names, lines))
    assert set(analysis.heads["relation"]) >= {system.relation}
    assert len(analysis.heads) % (2 * 2 * 2) == 0  # members, layers, heads
    page = write_report(tmp_path / "report", sweep, analysis, data.__getitem__, {}).read_text()
    assert "2 of 2 members finished" in page


def test_a_toy_is_planned(tmp_path):
    sweep = dataclasses.replace(sweep_of(MaskedToy()), widths=(8, 16))
    plan = make_plan(packs(validate(sweep), workers=2), workers=2, done=0, room=Room.here(2, gpus=0))
    assert plan.seconds > 0
    assert plan.memory > 0
    assert plan.disk > 0
    assert len(plan.costs) == 2


def test_an_empty_plan_says_so(capsys, tmp_path, monkeypatch, blank_store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.tracking.settled_members", lambda client, uri, sweep: {m.id for m in sweep.members()})
    few = ["--data.rows", "64", "--data.validation-rows", "16", "--probe.examples", "16", "--system.box.n", "6"]
    assert main(["sweep", "tiny", "--dry-run", "--tracking-uri", f"sqlite:///{tmp_path}/x.db", *few]) == 0
    shutil.copy(blank_store, tmp_path / "y.db")
    assert main(["sweep", "tiny", "--dry-run", "--tracking-uri", f"sqlite:///{tmp_path}/y.db"]) == 0
    assert "0 members to train (4 done)" in capsys.readouterr().out
