"""Whole sweeps through real Ray and real MLflow: the command a user types, again, extended, and broken off."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cluster import driver, tracking
from cluster.analysis import load_analysis
from cluster.cli import main
from cluster.pack import main as bare_main
from cluster.recipes import tiny
from tests.faults import tell_nothing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("plain_environment")]
SMALL = ["--data.rows", "128", "--data.validation-rows", "16", "--probe.examples", "8", "--probe.sparse-examples", "4",
         "--system.box.n", "6", "--system.box.radius", "0.1"]  # fmt: skip


def start(folder, *arguments):
    """`headway ...` in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=hear_interrupts)  # noqa: PLW1509  # fmt: skip


def hear_interrupts():
    """What a shell starts in the background, tests too, ignores SIGINT and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def headway(folder, *arguments, code=0):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    assert "Traceback" not in err, err
    return out, err


class Ledger:
    """What MLflow has of the only sweep in a folder."""

    def __init__(self, folder):
        uri = tracking.resolve_uri(f"sqlite:///{folder}/mlflow.db")
        self.client = tracking.connect(uri)
        experiment = tracking.experiment_id(self.client, uri)
        (self.parent,) = tracking.find_sweeps(self.client, experiment)
        place = tracking.Place(uri=uri, experiment=experiment, parent=self.parent.info.run_id)
        self.runs = tracking.children(self.client, place)
        self.counted = tracking.counted(self.runs)

    def statuses(self):
        return sorted(run.info.status for run in self.runs)

    def table(self, run, name, folder):
        folder.mkdir(exist_ok=True)
        return pd.read_parquet(self.client.download_artifacts(run.info.run_id, name, str(folder)))


def test_a_sweep_extended_done_anew_and_again(tmp_path, capsys, monkeypatch):
    """The first command is a user's own, in an empty folder; the others run in this process, with one worker, and the
    last two leave out the analysis."""

    def again(*arguments):
        assert main_in(tmp_path, ["sweep", "tiny", *SMALL, "--workers", "1", *arguments]) == 0
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out

    out, _ = headway(tmp_path, "sweep", "tiny", *SMALL, "--seeds", "1")
    assert "2 members trained in this call, 2 members in the sweep" in out
    report = Path(re.search(r"report:\s+(\S+)", out).group(1))
    assert report.is_file()
    assert "headway ui" in out
    assert "compareRunsMode=CHART" in out
    first = Ledger(tmp_path)
    assert first.parent.info.status == "FINISHED"
    assert first.statuses() == ["FINISHED"] * 2
    assert {member.id for member in tiny().members()}.isdisjoint(first.counted)  # the overrides are other members
    artifacts = {item.path for item in first.client.list_artifacts(first.parent.info.run_id)}
    assert artifacts == {"sweep.json", "analysis", "report"}
    analysis = load_analysis(first.client, first.parent.info.run_id)
    assert len(analysis.heads) == 2 * 2 * 8  # members, relations, heads
    assert set(analysis.detectors.get("member_id", ())) == set(analysis.members.dropna(subset="level")["member_id"])
    (law,) = analysis.laws
    assert (law["series"], law["members"], law["heads"]) == ("", 2, 2 * 8)
    assert law["head_level"]["law"]["refusal"] == "2 widths, fewer than 3"
    for run in first.runs:
        names = {item.path for item in first.client.list_artifacts(run.info.run_id)}
        assert names == {"curves.parquet", "figures.parquet", "weights.npz", "config.json"}
        assert len(run.data.params) <= 8
        assert len(run.data.metrics) <= 12
        assert len(first.client.get_metric_history(run.info.run_id, "validation_loss")) > 20
    digests = {member: run.data.tags["digest"] for member, run in first.counted.items()}

    assert "2 members trained in this call, 4 members in the sweep" in again()
    extended = Ledger(tmp_path)
    assert extended.parent.info.run_id == first.parent.info.run_id
    assert extended.statuses() == ["FINISHED"] * 4
    assert len(load_analysis(extended.client, extended.parent.info.run_id).members) == 4
    assert {m: run.data.tags["digest"] for m, run in extended.counted.items() if m in digests} == digests

    monkeypatch.setattr(driver, "analyze", tell_nothing)
    assert "2 members trained in this call" in again("--seeds", "1", "--redo")
    redone = Ledger(tmp_path)
    assert driver.REDO not in redone.parent.data.tags
    assert redone.statuses() == ["FINISHED"] * 4 + ["KILLED"] * 2
    assert len(redone.counted) == 4
    for member, run in redone.counted.items():
        before = extended.counted[member]
        if run.info.run_id != before.info.run_id:
            first_table, second_table = (
                extended.table(r, "curves.parquet", tmp_path / r.info.run_id) for r in (before, run)
            )
            columns = list(first_table.columns.drop("wall_time"))
            pd.testing.assert_frame_equal(first_table[columns], second_table[columns])

    assert "0 members trained in this call" in again()
    assert Ledger(tmp_path).statuses() == redone.statuses()

    for command in (["status", "tiny"], ["report", "tiny"], ["status"]):
        assert main_in(tmp_path, command) == 0


def main_in(folder, arguments):
    """The command in this process."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(arguments)
    finally:
        os.chdir(before)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_broken_off_and_gone_on_with_the_tables_are_those_of_an_undisturbed_run(tmp_path, capsys, blank_store):
    """SIGINT in the middle, then the same command: resumed from checkpoints, bit for bit; one rate diverges."""
    folder = tmp_path / "service"
    folder.mkdir()
    shutil.copy(blank_store, folder)
    sweep = ["tiny", *SMALL, "--widths", "8", "--train.steps", "1500", "--axis", "train.learning_rate=0.001,1e9",
             "--checkpoint-every", "0.5", "--pack-size", "2"]  # fmt: skip
    process = start(folder, "sweep", *sweep)
    checkpoints = lambda: list(folder.glob("headway-out/*/checkpoints/*.json"))  # noqa: E731
    furthest = lambda: max((int(path.stem.rpartition("-")[2]) for path in checkpoints()), default=0)  # noqa: E731
    wait_for(lambda: furthest() > 0 or process.poll() is not None, 240)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("headway: stopped")
    broken = Ledger(folder)
    assert broken.parent.info.status == "KILLED"
    assert "RUNNING" not in broken.statuses()
    assert len(broken.counted) < 4
    assert furthest() > 0

    assert main_in(folder, ["sweep", *sweep, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    done = Ledger(folder)
    assert "RUNNING" not in done.statuses()
    assert len(done.counted) == 4
    outcomes = {(run.data.tags["train.learning_rate"], run.info.status) for run in done.counted.values()}
    assert outcomes == {("0.001", "FINISHED"), ("1000000000.0", "FAILED")}
    assert len(re.findall(r"diverged: width=8 .* diverged at step \d+", out)) == 2
    assert not checkpoints()

    stored = Path(done.client.download_artifacts(done.parent.info.run_id, "sweep.json", str(tmp_path)))
    assert bare_main([str(stored), "--out", str(tmp_path / "bare"), "--device", "cpu", "--size", "4"]) == 0
    for member, run in done.counted.items():
        for name in ("curves", "figures"):
            found = done.table(run, f"{name}.parquet", tmp_path)
            with np.load(tmp_path / "bare" / "members" / member / f"{name}.npz") as expected:
                assert set(found) == set(expected.files)
                for column in set(found) - {"wall_time"}:
                    np.testing.assert_array_equal(found[column].to_numpy(), expected[column], err_msg=column)
