"""A pack on a worker, without a cluster: its ledger entries, its failures counted, its restart from a checkpoint."""

import dataclasses
import errno
import io
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from ray.exceptions import RayTaskError

from cluster import dispatch, driver, tracking, trial
from cluster import store as stores
from cluster.dispatch import settle_resources, slots
from cluster.member_runs import MemberRuns
from cluster.pack import Pace, PackRun, make_pool
from cluster.store import FolderStore
from cluster.sweep import Pack
from cluster.tracking import BrokenOffError
from cluster.trial import ATTEMPTS, GIVE_UP, Attempts, TrialContext, forget_attempts, pool_name, to_parquet, train_pack
from tests.test_pack import MEMBERS, SWEEP, SmallDevice

PACK = Pack(members=MEMBERS[:2])


@pytest.fixture(scope="module")
def store(tmp_path_factory, blank_store):
    uri = f"sqlite:///{shutil.copy(blank_store, tmp_path_factory.mktemp('store'))}"
    return tracking.connect(uri), uri


@pytest.fixture(scope="module")
def arrays():
    return make_pool(PACK.config).to_arrays()


@pytest.fixture
def worker(store, arrays, tmp_path, monkeypatch, request):
    """`run()` trains the pack as Tune would; what it reports is in `reports`."""
    client, uri = store
    ledger = tracking.open_sweep(client, uri, dataclasses.replace(SWEEP, name=request.node.name))
    context = TrialContext(
        packs=(PACK,),
        pools={pool_name(PACK.config): "the pool"},
        place=ledger.place,
        store=str(tmp_path / "store"),
        pace=Pace(progress=0.0, checkpoint=0.0),
    )
    frozen = {name: np.array(value) for name, value in arrays.items()}
    for value in frozen.values():
        value.setflags(write=False)  # as the object store hands them out
    reports = []
    monkeypatch.setattr(trial.ray, "get", {"the pool": frozen}.__getitem__)
    monkeypatch.setattr(trial.tune, "report", reports.append)
    monkeypatch.setattr(trial, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(trial, "_kept", {})

    class Worker:
        def __init__(self):
            self.client, self.ledger, self.reports = client, ledger, reports
            self.files = FolderStore(tmp_path / "store")

        def run(self):
            train_pack({"pack": 0}, context)

        def runs(self):
            return tracking.children(client, ledger.place)

    yield Worker()
    ledger.close("FINISHED")


def test_a_pack_goes_from_the_pool_to_the_ledger(worker):
    worker.run()
    assert sorted(run.info.status for run in worker.runs()) == ["FINISHED", "FINISHED"]
    assert [report["step"] for report in worker.reports] == sorted(report["step"] for report in worker.reports)
    assert worker.reports[-1]["step"] == 14
    assert np.isfinite(worker.reports[-1]["loss"])
    assert worker.files.names(ATTEMPTS) == []
    run = worker.runs()[0]
    assert len(worker.client.get_metric_history(run.info.run_id, "validation_loss")) == len(SWEEP.probe.steps(14))


def test_a_point_whose_examples_cannot_be_made_is_failed_by_its_own_cause(worker, monkeypatch):
    """At once: it would fail as often as it is tried."""
    error = RayTaskError("find", "", ValueError("box.n: 90 is not allowed; boxes jammed"))
    monkeypatch.setattr(trial.ray, "get", lambda reference: (_ for _ in ()).throw(error))
    shelf = SimpleNamespace(find=SimpleNamespace(remote=lambda config: None))
    context = trial.SearchContext(shelf=shelf, pace=Pace())
    trial.train_point(trial.point_config(SWEEP, [PACK], worker.ledger.place, "nowhere"), context)
    causes = [run.data.tags["cause"] for run in worker.runs() if run.info.status == "FAILED"]
    assert causes == ["its examples cannot be made: box.n: 90 is not allowed; boxes jammed"] * 2
    assert worker.reports[-1]["failed"] == causes[0]


class Full(FolderStore):
    """A store on a full disk that takes `small` bytes at most; `room` calls later it has room again."""

    small, room = 10_000, math.inf

    def put(self, name, content):
        self.room -= 1
        if len(content) > self.small and self.room >= 0:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        super().put(name, content)


@pytest.fixture
def full(worker, tmp_path, monkeypatch):
    full = Full(tmp_path / "store")
    monkeypatch.setattr(trial, "open_store", lambda url: full)
    monkeypatch.setattr(stores, "PAUSE", 0.001)
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    return full


def test_a_full_store_of_checkpoints_is_waited_for(worker, full):
    full.room = 5
    worker.run()
    assert sorted(run.info.status for run in worker.runs()) == ["FINISHED", "FINISHED"]
    assert full.room < 0


def test_a_store_that_stays_full_is_given_up_by_its_own_name(worker, full):
    """Where small files still fit, failures are counted; where nothing does, the first one is the last."""
    for _ in range(GIVE_UP):
        with pytest.raises(OSError, match="No space left"):
            worker.run()
    worker.run()
    assert worker.reports[-1]["failed"].startswith(f"failed {GIVE_UP} times from step 0: OSError: [Errno 28] No space")
    full.small = 0
    worker.run()
    assert worker.reports[-1]["failed"].startswith("nothing can be written beside the checkpoints: [Errno 28] No space")
    last = max(worker.runs(), key=lambda run: run.info.start_time)
    assert (last.info.status, "No space left" in last.data.tags["cause"]) == ("FAILED", True)


def test_training_again_that_was_broken_off_goes_on(worker, tmp_path):
    """Its first call takes all runs out of the count and drops checkpoints; the next one keeps what was begun since."""
    client, place = worker.client, worker.ledger.place
    members = SWEEP.members()

    def call():
        tags = client.get_run(place.parent).data.tags
        desk = SimpleNamespace(client=client, store=lambda sweep: str(tmp_path / "store"))
        driver.retire(driver.Job(desk, SWEEP, members, worker.ledger, {}, None, tags.get(driver.REDO, "")))
        return len(tracking.counted(worker.runs()))

    worker.run()
    assert len(tracking.counted(worker.runs())) == 2
    assert call() == 0
    time.sleep(0.002)  # runs are told apart by milliseconds
    worker.run()
    assert call() == 2
    assert call() == 2
    client.set_tag(place.parent, driver.REDO, "1 other-code")
    assert call() == 0


def test_a_restarted_pack_logs_no_point_twice_and_no_table_changes(worker, monkeypatch):
    worker.run()
    whole = dict(tables_without_time(worker.client, run.info.run_id) for run in worker.runs())
    for run in worker.runs():
        tracking.supersede(worker.client, run.info.run_id, "redo")
    real, calls = trial.save_checkpoint, []

    def save_and_die(files, pack, state, curves):
        real(files, pack, state, curves)
        calls.append(state.step)
        if len(calls) == 5:
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(trial, "save_checkpoint", save_and_die)
        with pytest.raises(OSError, match="killed"):
            worker.run()
    assert "OSError: killed (test_trial.py:" in worker.files.get(worker.files.names(ATTEMPTS)[0]).decode()
    worker.run()
    last = [run for run in worker.runs() if run.info.status == "FINISHED"][:2]
    for run in last:
        history = worker.client.get_metric_history(run.info.run_id, "validation_loss")
        assert [point.step for point in history] == list(SWEEP.probe.steps(14))
        times = [point.timestamp for point in history]
        assert times == sorted(times)
    again = dict(tables_without_time(worker.client, run.info.run_id) for run in last)
    assert set(again) == set(whole)
    for member, table in again.items():
        pd.testing.assert_frame_equal(table, whole[member])


def tables_without_time(client, run_id):
    member = client.get_run(run_id).data.tags["member_id"]
    return member, pd.read_parquet(client.download_artifacts(run_id, "curves.parquet")).drop(columns="wall_time")


def test_three_failures_at_the_same_step_give_up_with_the_cause(worker, monkeypatch):
    def fail(*args):
        raise RuntimeError("bad weather")

    monkeypatch.setattr(trial, "run_pack", fail)
    for _ in range(GIVE_UP):
        with pytest.raises(RuntimeError, match="bad weather"):
            worker.run()
    worker.run()  # gives up: returns, so that Tune does not try again
    assert "failed 3 times from step 0: RuntimeError: bad weather (test_trial.py" in worker.reports[-1]["failed"]
    worker.ledger.settle(running_too=True)
    statuses = sorted(run.info.status for run in worker.runs())
    assert statuses == ["FAILED"] * 2 + ["KILLED"] * 2 * GIVE_UP
    failed = next(run for run in worker.runs() if run.info.status == "FAILED")
    assert "bad weather" in failed.data.tags["cause"]
    assert worker.ledger.settle(running_too=True) == {}
    monkeypatch.undo()


def begin(attempts, *progress):
    """Starts with this much on record, each of which dies without a word; the last one's answer."""
    return [attempts.begin(steps) for steps in progress][-1]


def test_failures_without_progress_count_and_within_one_driver(tmp_path):
    files = FolderStore(tmp_path)
    attempts, error = Attempts(files, PACK), RuntimeError("bad weather")
    for progress in (0, 0, 6, 6, 8, 8):
        assert attempts.begin(progress) is None
        attempts.note(error)
    assert attempts.begin(8) is None
    attempts.note(error)
    assert "failed 3 times from step 4: RuntimeError: bad weather" in attempts.begin(8)
    for _ in range(3):
        Attempts(files, PACK).note(error)
    forget_attempts(files)
    assert Attempts(files, PACK).begin(0) is None


def test_workers_that_die_leave_ever_more_pieces_until_members_are_alone(tmp_path):
    attempts = Attempts(FolderStore(tmp_path), dataclasses.replace(PACK, members=MEMBERS * 2))
    found = []
    for progress in (0, 0, 0, 500, 500):  # more is on record at the fourth start: the death before it is forgiven
        assert attempts.begin(progress) is None
        found.append(attempts.pieces)
    assert found == [1, 2, 4, 4, 6]
    assert begin(attempts, 500, 500) is None
    assert attempts.pieces == 6
    assert "failed 3 times from step 83: the worker died" in attempts.begin(500)


def test_a_failure_before_the_start_is_no_death(tmp_path):
    attempts = Attempts(FolderStore(tmp_path), PACK)
    attempts.note(OSError("the store hiccups"))
    assert begin(attempts, 0) is None
    assert attempts.pieces == 1
    assert begin(attempts, 0) is None
    assert attempts.pieces == 2


def test_a_pack_short_of_memory_goes_on_in_halves_and_says_so(worker, monkeypatch):
    SmallDevice(monkeypatch, most=1, since=5)
    worker.run()
    assert {run.info.status for run in worker.runs()} == {"FINISHED"}
    for run in worker.runs():
        assert "ran out of memory with 2 members" in run.data.tags["note"]
        history = worker.client.get_metric_history(run.info.run_id, "validation_loss")
        assert [point.step for point in history] == list(SWEEP.probe.steps(14))
    assert [bool(report["note"]) for report in worker.reports].count(True) == 1
    steps = [report["step"] for report in worker.reports]
    assert steps[-1] == 14
    assert worker.files.names(ATTEMPTS) == []


def test_a_pack_whose_worker_was_killed_goes_on_in_pieces(worker, monkeypatch):
    sizes = []
    real = PackRun.run
    monkeypatch.setattr(PackRun, "run", lambda run: (sizes.append(len(run.pack.members)), real(run)))
    Attempts(worker.files, PACK).begin(0)  # and nothing more was heard of it
    worker.run()
    assert sizes == [1, 1]
    assert "lost its worker" in next(report["note"] for report in worker.reports if report["note"])


def test_a_worker_lost_while_it_ended_its_runs_leaves_only_the_others_to_train(worker, monkeypatch):
    trained = []
    real = PackRun.run
    monkeypatch.setattr(PackRun, "run", lambda run: (trained.append([m.id for m in run.pack.members]), real(run)))
    done, left = PACK.members
    Attempts(worker.files, PACK).begin(0)
    runs = MemberRuns(worker.ledger.place, PACK, "cpu")
    runs.finish(done, {"curves.parquet": b"curves"})
    runs.close()
    worker.run()
    assert trained == [[left.id]]
    assert worker.reports[-1] | {"loss": 0} == worker.reports[-1] | {"loss": 0, "pack": PACK.id, "step": 14}
    assert {report["pack"] for report in worker.reports} == {PACK.id}
    statuses = sorted((run.data.tags["member_id"] == done.id, run.info.status) for run in worker.runs())
    assert statuses == [(False, "FINISHED"), (False, "KILLED"), (True, "FINISHED")]
    Attempts(worker.files, PACK).begin(0)  # lost after its last run, before it could say so
    worker.reports.clear()
    worker.run()
    assert trained == [[left.id]]
    assert [(report["pack"], report["step"]) for report in worker.reports] == [(PACK.id, 14)]
    assert len(worker.runs()) == 3
    assert worker.files.names(ATTEMPTS) == worker.files.names("checkpoints") == []


def test_a_lost_device_ends_the_worker(worker, monkeypatch):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(trial.os, "_exit", leave)
    for error, ended in (
        (torch.AcceleratorError("illegal address"), Ended),
        (torch.OutOfMemoryError("full"), RuntimeError),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(trial, "run_pack", fail)
        with pytest.raises(ended):
            worker.run()


def test_parquet_keeps_types_and_values():
    table = {"step": np.array([1, 2]), "relation": np.array(["near", "near"]), "x": np.array([0.5, np.nan], np.float32)}
    found = pd.read_parquet(io.BytesIO(to_parquet(table)))
    assert list(found["relation"]) == ["near", "near"]
    np.testing.assert_array_equal(found["x"].to_numpy(), table["x"])
    assert found["x"].dtype == np.float32


NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 2.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected", "workers"),
    [
        (NODES, None, {"CPU": 1.0, "GPU": 1.0}, 2),
        (NODES, 0.5, {"CPU": 1.0, "GPU": 0.5}, 3),  # the GPU node has 3 CPUs
        (NODES, 0.0, {"CPU": 1.0}, 7),
        (NODES, 2.0, {"CPU": 1.0, "GPU": 2.0}, 1),
        (NODES[:1], None, {"CPU": 1.0}, 4),
    ],
)
def test_packs_take_gpus_where_there_are_any(monkeypatch, nodes, wanted, expected, workers):
    monkeypatch.setattr(dispatch.ray, "nodes", lambda: nodes)
    assert settle_resources(wanted) == expected
    assert slots(expected) == workers


def test_a_cluster_without_a_place_is_waited_for_and_given_up(monkeypatch):
    there, now = [], [0.0]
    monkeypatch.setattr(dispatch.ray, "nodes", lambda: there)
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now[0])
    look = dispatch.Places({"CPU": 1.0, "GPU": 1.0}, patience=20.0)
    progress = dispatch._Progress(print, print, [look])
    for now[0], there[:] in ((15.0, []), (19.0, NODES), (30.0, NODES[:1]), (38.0, [])):
        progress.on_step_begin(0, [])
    now[0] = 39.5  # 20.5 s after the last look that found one
    with pytest.raises(BrokenOffError, match="no node of the cluster has had CPU 1, GPU 1 for 20 s; the same command"):
        progress.on_step_begin(0, [])
    progress.on_step_begin(0, [])  # it has only just looked


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (3.0, "gpus: 3.0 is not allowed; it must be at most 2, all that one node has"),
        (1.5, "gpus: 1.5 is not allowed; it must be at most 1, or a whole number"),
    ],
)
def test_what_no_node_has_is_refused(monkeypatch, wanted, message):
    monkeypatch.setattr(dispatch.ray, "nodes", lambda: NODES)
    with pytest.raises(ValueError, match=message):
        settle_resources(wanted)


def test_a_gpu_on_a_node_without_a_free_cpu_is_no_place(monkeypatch):
    apart = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {"GPU": 1.0}}]
    monkeypatch.setattr(dispatch.ray, "nodes", lambda: apart)
    with pytest.raises(ValueError, match="such that one node has it and a CPU beside it"):
        settle_resources(1.0)
    monkeypatch.setattr(dispatch.ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1e9}}])
    with pytest.raises(ValueError, match=r"address: no node there has a CPU for packs \(the nodes have CPU 0, GPU 0\)"):
        settle_resources(None)


def test_a_worker_keeps_its_pool_for_the_next_pack(worker, monkeypatch):
    worker.run()
    monkeypatch.setattr(trial.Pool, "from_arrays", None)  # not asked again
    worker.run()
    assert worker.files.names("checkpoints") == []


@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [(None, None, "local"), ("ray://head:1", None, "ray://head:1"), (None, "head:6379", "auto")],
)
def test_a_local_ray_is_our_own_and_any_other_is_the_one_named(monkeypatch, address, environment, expected):
    """Without an address ray.init would join whatever cluster was left running on this machine."""
    asked = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(dispatch.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(dispatch.ray, "shutdown", lambda: None)
    monkeypatch.setattr(dispatch.signal, "signal", lambda *args: None)
    with dispatch.ray_cluster(address, cpus=None):
        assert asked["address"] == expected
    assert ("num_cpus" in asked) == (expected == "local")
