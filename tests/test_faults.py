"""Sweeps in real processes, struck by faults: what the ledger, tables and workers' notes say is as if nothing had been.

All faults, and each more often: `python -m tests.bench.faults`.
"""

import contextlib
import dataclasses
import json
import random
import shutil
import sqlite3
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.server import require_proxied
from tests import faults
from tests.faults import Scene, Server, inspect, tables_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
SHORT = {"members": 4, "steps": 800, "pack_size": 2, "told": False}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, blank_store):
    """A sweep without faults, by one worker, and its tables."""
    scene = Scene(folder=tmp_path_factory.mktemp("undisturbed"), blank=blank_store, workers=1, **SHORT)
    scene.run()
    tables, repeats = tables_of(scene)
    assert (len(tables), repeats) == (4, 0)
    return scene, tables


def test_the_report_tells_what_is_wrong(undisturbed, tmp_path):
    """Every trace that a fault could leave, planted in a copy."""
    scene, tables = undisturbed
    sound = inspect(scene, tables)
    assert sound.sound
    copy = dataclasses.replace(scene, folder=tmp_path / "copy")
    shutil.copytree(scene.folder, copy.folder)
    attempt = scene.attempts()[0]
    late = {"pid": attempt.pid, "born": attempt.born, "members": attempt.members, "start": 100}
    (copy.store / "meter" / f"{time.time():.6f}-late").write_text(json.dumps(late) + "\n300\n")
    left, doubled, altered = (
        scene.query(f"SELECT run_uuid FROM tags WHERE key = 'member_id' AND value = '{member}'")[0][0]
        for member in sorted(tables)[:3]
    )
    with contextlib.closing(sqlite3.connect(copy.folder / "mlflow.db")) as base, base:
        base.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", [left])
        base.execute("CREATE TEMP TABLE one AS SELECT * FROM metrics WHERE run_uuid = ? LIMIT 1", [doubled])
        base.execute("UPDATE one SET timestamp = timestamp + 1")
        base.execute("INSERT INTO metrics SELECT * FROM one")
    path = copy.folder / "mlartifacts" / altered / "artifacts" / "curves.parquet"
    table = pq.read_table(path).to_pandas()
    place = table["score"].first_valid_index()
    table.loc[place, "score"] = table["score"].to_numpy()[place] * 1.0000002  # one bit of a float32
    pq.write_table(pa.table(dict(table)), path)
    found = inspect(copy, tables)
    assert (found.once, found.running, found.duplicates, found.same) == (3, 1, 1, 2)
    done = [member for member in attempt.members if member not in sorted(tables)[:1]]
    assert (found.again, found.extra) == (len(done), sound.extra + 2 * 200)
    assert found.beyond == 2 * (max(step for step, _, _ in attempt.kept) - 100)
    assert not found.sound


def test_killed_workers_and_drivers_and_spoiled_checkpoints_leave_no_trace(undisturbed, tmp_path, blank_store):
    """Two workers are killed, then the driver, and what it has kept last is spoiled; a second driver refuses."""
    _, tables = undisturbed
    scene, chance = Scene(folder=tmp_path / "struck", blank=blank_store, **SHORT), random.Random(3)
    process = scene.start()
    faults.under_way(scene, process, 0.0)
    assert faults.kill_workers(scene, process, 2, chance, pause=(0.1, 0.3)) == 2
    faults.under_way(scene, process, 0.0, kept=2)
    faults.kill_driver(process)
    time.sleep(2.0)  # its workers end
    first, *more = [path.with_suffix(".npz") for path in faults.newest_checkpoints(scene)]
    faults.flip(first, chance)
    for path in more[:1]:
        faults.truncate(path)
    since, process = time.time(), scene.start()  # at once: the dead driver is seen to be gone
    faults.under_way(scene, process, since)
    with faults.standing_still(scene):
        assert "is held by driver" in scene.run(code=2)
    scene.end(process)
    found = inspect(scene, tables, spoiled=[path.stem for path in (first, *more[:1])])
    assert found.sound, found
    assert found.most_runs > 1


def test_without_a_node_a_sweep_ends_soon_and_goes_on_later(undisturbed, tmp_path):
    """The only node goes for good: one line, nothing left RUNNING; with another node the same command goes on.

    The ledger is a server's, which keeps runs and artifacts in its folder, and ends when told, with all its processes.
    """
    _, tables = undisturbed
    with Server(tmp_path / "server") as server, faults.ray_nodes(0) as cluster:
        node = faults.add_node(cluster)
        options = {**SHORT, "server": server, "address": cluster.address, "more": ["--patience", "5"]}
        scene = Scene(folder=tmp_path / "bare", **options)
        process = scene.start()
        faults.under_way(scene, process, 0.0)
        cluster.remove_node(node, allow_graceful=False)
        said = scene.end(process, code=1, seconds=120)
        assert "headway: no node of the cluster has had CPU 1, GPU 1 for 5 s; the same command goes on" in said
        assert scene.query("SELECT 1 FROM runs WHERE status = 'RUNNING'") == []
        faults.add_node(cluster)
        scene.run()
        assert f"--tracking-uri {server.uri}" in server.end()
        assert not server.answers()
        found = inspect(scene, tables)
        require_proxied(f"sqlite:///{server.folder}/mlflow.db", server.folder)
    assert found.sound, found
