"""Members on another system: what is measured there, in whose units, and what is refused."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cluster.cli import main
from cluster.geometry import Kept
from cluster.pack import make_pool
from cluster.recipes import RECIPES
from cluster.sweep import DataConfig, ProbeConfig, Sweep
from cluster.transfer import Stock, Transferred, draw_transfer, measure, moved, parse_changes, point_table, write
from sim.active_matter import ActiveMatter
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from tests.test_swimmers import BOX
from train.config import ModelConfig, TrainConfig
from train.model import initial

SWEEP = Sweep(
    name="t",
    widths=(8,),
    system=ParticleSystem(box=ParticleBox(n=6, radius=0.1)),
    data=DataConfig(rows=64, validation_rows=32),
    model=ModelConfig(layers=2, heads=2),
    train=TrainConfig(steps=60, batch_size=4, precision="float64"),
    probe=ProbeConfig(replicates=4, examples=8, sparse_examples=4),
)
CONFIG = SWEEP.members()[0].config


@pytest.fixture(scope="module")
def pool():
    return make_pool(CONFIG).parts


def kept(config=CONFIG, scale=1.0):
    model, system = config.model, config.system
    named = initial(model, system.d_in, system.d_out, Generator.stack([3]), torch.float64)
    weights = {name: (scale * value[0]).numpy() for name, value in named.items()}
    return Kept(weights={0: {}, 60: weights}, figures=pd.DataFrame())


def test_the_same_system_is_the_same_here_and_there(pool):
    (here, there), heads = measure(CONFIG, CONFIG, pool, pool, kept(), 32)
    assert here | {"place": "there"} == there
    assert here["step"] == 60
    assert [(row["layer"], row["head"]) for row in heads if row["relation"] == "collision"] == list(np.ndindex(2, 2))
    assert all(row["lift_here"] == row["lift_there"] for row in heads)


def test_a_network_that_says_nothing_has_the_loss_of_the_mean_square_target(pool):
    """In units of what was trained on: those of the other system's own would be others."""
    other = moved(CONFIG, {"box.n": 10, "box.radius": 0.06})
    there = Stock(32).there(CONFIG, other)
    own = pool["train"].statistics
    assert {name: value.tolist() for name, value in there["validation"].statistics.items()} == {
        name: value.tolist() for name, value in own.items()
    }
    assert there["validation"].columns["state"].shape[1] == 10
    (_, found), heads = measure(CONFIG, other, pool, there, kept(scale=0.0), 32)
    batch = other.system.draw(there["validation"], Generator.of("transfer", 0))
    assert found["loss"] == pytest.approx(float(batch.targets.square().mean()))
    assert found["trivial"] == pytest.approx(float(batch.targets.var(dim=(0, 1), correction=0).mean()))
    assert all(row["lift_there"] == pytest.approx(1.0) for row in heads)  # attention is uniform


def test_members_of_two_systems_that_go_to_one_keep_their_own_rows_and_units():
    """One of them goes to where it is at home."""
    stock, homes = Stock(16), [moved(CONFIG, {"box.n": n}) for n in (4, 6)]
    others = [moved(home, {"box.n": 6}) for home in homes]
    away = [stock.there(home, other) for home, other in zip(homes, others, strict=True)]
    for home, there in zip(homes, away, strict=True):
        here = stock.here(home)
        assert set(here) == {"train", "validation", "probe"}
        assert here["train"].columns["state"].shape[1] == home.system.box.n
        assert there["probe"].columns["state"].shape[:2] == (16, 6)
        assert there["probe"].statistics is here["train"].statistics
    assert stock.there(homes[0], others[0]) is away[0]


def test_local_attention_sees_as_many_neighbours_there():
    system = ActiveMatter(swimmers=BOX, noise=0.02, relax=0.2, spacing=0.1, rows_per_trajectory=8)
    model = ModelConfig(layers=1, heads=2, attention="local", neighbours=5)
    config = replace(SWEEP, system=system, model=model).members()[0].config
    stock, other = Stock(32), moved(config, {"swimmers.n": 20, "swimmers.packing": 0.2})
    (here, there), _ = measure(config, other, stock.here(config), stock.there(config, other), kept(config), 32)
    assert {name for name in here if name.startswith("balance_")} == {name for name in there if "balance" in name}
    assert here["entropy_production_expected"] != there["entropy_production_expected"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"box.m": 3}, "to.box: 'm' is unknown"),
    ({"box.n": 3.5}, "to.box.n: 3.5 is not allowed; it must be a whole number"),
])  # fmt: skip
def test_a_system_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moved(CONFIG, changes)


def test_a_network_of_two_dimensions_does_not_go_to_three():
    swimmers = RECIPES["active-matter"]().members()[0].config
    with pytest.raises(
        ValueError, match=r"to \(d_in\): 6 is not allowed; it must be 4, the numbers of a token that go in"
    ):
        moved(swimmers, {"swimmers.dimension": 3})


def test_bad_changes_are_refused_before_anything_is_looked_up(tmp_path, monkeypatch, capsys):
    assert parse_changes(["box.n=10", "box.radius=0.05"]) == {"box.n": 10, "box.radius": 0.05}
    for items in ([], ["box.n"], ["box.n=1", "box.n=2"], ["=3"]):
        with pytest.raises(ValueError, match=r"to: .* is not allowed; it must be .*NAME=VALUE"):
            parse_changes(items)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["probe", "transfer"]) == 2
    assert "it takes a sweep, by name or id" in capsys.readouterr().err
    assert main(["probe", "transfer", "quick", "--to", "box.n=10"]) == 2
    assert "there is no ledger at" in capsys.readouterr().err


def test_members_are_told_by_point_and_written_whole(pool, tmp_path):
    figures, heads = measure(CONFIG, CONFIG, pool, pool, kept(), 32)
    members = [{"member_id": f"m{i}", "run_id": f"r{i}", "width": 8, "seed": i} for i in range(2)]
    tables = {name: pd.DataFrame([{**member, **row} for member in members for row in rows])
              for name, rows in (("figures", figures), ("heads", heads))}  # fmt: skip
    figure = draw_transfer(tables["figures"], tables["heads"], "collision")
    write(tmp_path / "transfer-x", tables, figure)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "figures.parquet", "heads.parquet", "transfer.png",
    ]  # fmt: skip
    table = point_table(Transferred(**tables, folder=tmp_path), SWEEP)
    cells = {row[0]: list(row) for row in zip(*(column.cells for column in table.columns), strict=True)}
    value = f"{figures[0]['loss']:.3g}"
    assert cells["loss"] == ["loss", "8", "2", f"{value} ({value} to {value})", f"{value} ({value} to {value})"]
    assert "energy_error" in cells
    assert "highest lift of a head, collision" in cells
