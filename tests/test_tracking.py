"""The ledger, on a real SQLite store: who is done, who counts, who holds a sweep."""

import base64
import dataclasses
import errno
import functools
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException, RestException

from cluster import store as stores
from cluster import tracking
from cluster.member_runs import MemberRuns
from cluster.sweep import Pack, Sweep, validate
from cluster.tracking import BrokenOffError, TrackingError
from train.config import TrainConfig

SWEEP = Sweep(name="ledger", widths=(16, 32), seeds=2, train=TrainConfig(steps=9))
MEMBERS = validate(SWEEP)
FILES = {"curves.parquet": b"curves", "config.json": b"{}"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A client and its URI; one store for the file, as making one takes seconds."""
    uri = tracking.resolve_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    return tracking.connect(uri), uri


@pytest.fixture
def ledger(store, request):
    own = dataclasses.replace(SWEEP, name=request.node.name.replace("/", "_"))
    ledger = tracking.open_sweep(*store, own)
    yield ledger
    ledger.close("FINISHED")


def logged(ledger, members=MEMBERS[:2], diverged=-1, figures=None):
    runs = MemberRuns(ledger.place, Pack(members=tuple(members)), "cpu")
    runs.point(runs.pack, 0, 1000, figures or {"train_loss": [1.0] * len(members)})
    runs.flush()
    for member in members:
        runs.finish(member, FILES, diverged)
    runs.close()
    return runs.runs


def test_a_finished_member_has_its_tags_params_points_and_files(store, ledger):
    client, _ = store
    run_id = logged(ledger)[1]
    run = client.get_run(run_id)
    tags = run.data.tags
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "width=16 seed=1"
    assert (tags["width"], tags["seed"], tags["member_id"]) == ("16", "1", MEMBERS[1].id)
    assert (tags["system"], tags["precision"], tags["device"]) == ("particles", "float32", "cpu")
    assert tags["mlflow.parentRunId"] == ledger.place.parent
    assert tags["code_version"] == tracking.code_version()
    assert set(json.loads(tags["digest"])) == set(FILES)
    assert len(run.data.params) <= 8
    assert run.data.params["learning_rate"] == "0.001"
    assert {item.path for item in client.list_artifacts(run_id)} == set(FILES)
    assert ledger.settle(running_too=True).keys() == {MEMBERS[0].id, MEMBERS[1].id}


def test_points_that_are_not_finite_are_left_out_and_repeats_are_one_point(store, ledger):
    client, _ = store
    figures = {"train_loss": [float("nan"), 2.0], "validation_loss": [3.0, float("inf")]}
    runs = MemberRuns(ledger.place, Pack(members=MEMBERS[:2]), "cpu")
    for _ in range(2):
        runs.point(runs.pack, 7, 123_000, figures)
        runs.flush()
    runs.close()
    history = {name: client.get_metric_history(runs.runs[1], name) for name in figures}
    assert [(m.step, m.value, m.timestamp) for m in history["train_loss"]] == [(7, 2.0, 123_000)]
    assert history["validation_loss"] == []
    assert [m.value for m in client.get_metric_history(runs.runs[0], "validation_loss")] == [3.0]


def test_many_points_are_cut_into_batches(store, ledger):
    client, _ = store
    runs = MemberRuns(ledger.place, Pack(members=MEMBERS[:1]), "cpu")
    for step in range(1500):
        runs.point(runs.pack, step, step, {"train_loss": [float(step)]})
    runs.flush()
    runs.close()
    assert len(client.get_metric_history(runs.runs[0], "train_loss")) == 1500


def test_the_earliest_finished_run_counts(store, ledger):
    client, _ = store
    first, second = logged(ledger, MEMBERS[:1])[0], logged(ledger, MEMBERS[:1])[0]
    assert ledger.settle(running_too=False)[MEMBERS[0].id].info.run_id == first
    late = client.get_run(second)
    assert late.info.status == "KILLED"
    assert late.data.tags["superseded_by"] == first
    client.set_terminated(second, "FINISHED")  # a zombie worker ends once more
    assert ledger.settle(running_too=False)[MEMBERS[0].id].info.run_id == first
    assert client.get_run(second).info.status == "KILLED"


def test_runs_left_running_become_killed_and_their_members_are_missing(store, ledger):
    client, _ = store
    runs = MemberRuns(ledger.place, Pack(members=MEMBERS[:1]), "cpu")
    runs.close()
    assert ledger.settle(running_too=False) == {}
    assert client.get_run(runs.runs[0]).info.status == "RUNNING"
    assert ledger.settle(running_too=True) == {}
    assert client.get_run(runs.runs[0]).info.status == "KILLED"


def test_a_new_attempt_supersedes_what_the_last_one_left(store, ledger, monkeypatch):
    client, _ = store
    MemberRuns(ledger.place, Pack(members=MEMBERS[:2]), "cpu").close()
    second = logged(ledger)
    runs = tracking.children(client, ledger.place)
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]
    assert {run.data.tags.get("superseded_by") for run in runs if run.info.status == "KILLED"} == set(second)
    ids = [member.id for member in MEMBERS[:2]]
    for own in (ids[:1], ids, [], ["nobody"]):
        expected = {run.info.run_id for run in runs if run.data.tags["member_id"] in own}
        for few in (64, 0):  # in a look-up for each, or in one for all
            monkeypatch.setattr(tracking, "FEW", few)
            assert {run.info.run_id for run in tracking.own_children(client, ledger.place, own)} == expected


def test_a_diverged_member_is_failed_with_its_cause_and_settled(store, ledger):
    client, _ = store
    run = client.get_run(logged(ledger, MEMBERS[:1], diverged=31)[0])
    assert run.info.status == "FAILED"
    assert run.data.tags["cause"] == "diverged at step 31"
    assert MEMBERS[0].id in ledger.settle(running_too=True)


def test_failed_members_have_their_cause_and_stay_missing(store, ledger):
    client, _ = store
    runs = MemberRuns(ledger.place, Pack(members=MEMBERS[:2]), "cpu")
    runs.fail("ValueError: too bad (loop.py:3)")
    runs.close()
    assert {client.get_run(run).info.status for run in runs.runs} == {"FAILED"}
    assert client.get_run(runs.runs[0]).data.tags["cause"].startswith("ValueError: too bad")
    assert ledger.settle(running_too=True) == {}


def test_a_call_that_keeps_failing_is_raised_at_the_end(store, ledger):
    runs = MemberRuns(
        dataclasses.replace(ledger.place, experiment="999"), Pack(members=MEMBERS[:1]), "cpu", patience=0.1
    )
    with pytest.raises(Exception, match="999"):
        runs.close()


def test_a_server_that_is_away_is_waited_for_longer_than_what_it_refuses(store, ledger, monkeypatch):
    """How long depends on the error: a disk that is full is not waited for as a server is."""
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
    place = dataclasses.replace(ledger.place, uri="http://127.0.0.1:9")
    for faults, error, outcome in (("YYN", OSError("reset"), 3), ("YYN", OSError(errno.ENOSPC, "full"), 1)):
        calls, ahead = [], iter(faults)

        def call(*args, calls=calls, ahead=ahead, error=error):
            calls.append(1)
            if next(ahead) == "Y":
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(MemberRuns, "_start", call)
            runs = MemberRuns(place, Pack(members=MEMBERS[:1]), "cpu", patience=5.0)
            runs.abandon()
        assert (len(calls), runs._error) == (outcome, None if outcome == 3 else error)


def test_passing_faults_of_the_store_are_waited_out(store, ledger, monkeypatch):
    """Every call fails now and then, before or after the first runs are made: two members end FINISHED, once each."""
    client, _ = store
    with monkeypatch.context() as patch:
        patch.setattr(stores, "PAUSE", 0.01)
        for name, faults in (
            ("create_run", "YNYNN"),
            ("log_batch", "NYNYYN"),
            ("search_runs", "YN"),
            ("log_artifacts", "YN"),
        ):
            patch.setattr(tracking.MlflowClient, name, shaky(getattr(tracking.MlflowClient, name), faults))
        made = logged(ledger, MEMBERS[:2])
    assert len(made) == 2
    assert {client.get_run(run).info.status for run in made} == {"FINISHED"}
    assert set(ledger.settle(running_too=True)) == {member.id for member in MEMBERS[:2]}
    assert len(tracking.children(client, ledger.place)) == 2


def shaky(real, faults):
    """The call, failing where `faults` has a Y."""
    ahead = iter(faults)

    def call(self, *args, **kwargs):
        if next(ahead, "N") == "Y":
            raise OSError("connection reset")
        return real(self, *args, **kwargs)

    return call


def test_one_driver_holds_a_sweep_until_it_closes_or_dies(store):
    client, uri = store
    own = dataclasses.replace(SWEEP, name="held")
    first = tracking.open_sweep(client, uri, own)
    with pytest.raises(TrackingError, match="is held by driver") as caught:
        tracking.open_sweep(client, uri, own)
    assert "\n" not in str(caught.value)
    first._stop.set()
    long_ago = time.time() - tracking.DEAD_AFTER - 1
    client.set_tag(first.place.parent, "heartbeat", f"{long_ago:.0f} {first.driver}")  # of this process, which knows
    second = tracking.open_sweep(client, uri, own)
    assert second.place.parent == first.place.parent
    second.close("KILLED")
    assert client.get_run(second.place.parent).info.status == "KILLED"
    third = tracking.open_sweep(client, uri, dataclasses.replace(own, seeds=9, widths=(16, 64)))
    assert third.place.parent == first.place.parent
    assert client.get_run(third.place.parent).info.status == "RUNNING"
    third.close("FINISHED")


def driver_of(process, space=None):
    return f"{socket.gethostname()}:{process.pid}:{tracking.process_space() if space is None else space}:abc123"


def test_a_driver_of_this_machine_is_dead_as_soon_as_its_process_is(store):
    """Killed, and before anybody has asked how it ended; not where process numbers mean others than here."""
    client, uri = store
    own = dataclasses.replace(SWEEP, name="killed")
    first = tracking.open_sweep(client, uri, own)
    first._stop.set()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        now = time.time()
        assert tracking.lives_here(driver_of(process), now) is True
        assert tracking.lives_here(driver_of(process), now - 60.0) is False  # a later process of the same number
        client.set_tag(first.place.parent, "heartbeat", f"{time.time():.0f} {driver_of(process)}")
        with pytest.raises(TrackingError, match="is held by driver"):
            tracking.open_sweep(client, uri, own)
        process.kill()
        wait_for(lambda: tracking.lives_here(driver_of(process), now) is False)
        second = tracking.open_sweep(client, uri, own)
    assert second.place.parent == first.place.parent
    second.close("FINISHED")
    assert tracking.lives_here(driver_of(process), now) is False
    assert tracking.lives_here(driver_of(process, space="elsewhere"), now) is None
    assert tracking.lives_here(driver_of(process, space=""), now) is None
    for odd in ("", "host", f"host:{process.pid}:abc123", f"host:x:{tracking.process_space()}:abc"):
        assert tracking.lives_here(odd, now) is None


def test_a_silent_driver_whose_process_is_seen_to_live_is_left_its_sweep_for_an_hour(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(tracking, "last_boot", lambda: -1e9)  # as if it had been begun long ago
        for space, age, held in ((None, 70, True), (None, 3700, False), ("elsewhere", 70, False), ("", 50, True)):
            tags = {"heartbeat": f"{time.time() - age:.0f} {driver_of(process, space)}", "sweep_id": "s"}
            parent = SimpleNamespace(data=SimpleNamespace(tags=tags))
            if held:
                with pytest.raises(TrackingError, match="sweep s is held by driver") as caught:
                    tracking.require_free(parent)
                lives = f"its process {process.pid} lives on this machine); end that process, or wait until it has"
                assert (lives in str(caught.value)) == (age == 70)
                assert "\n" not in str(caught.value)
            else:
                tracking.require_free(parent)
        process.kill()


def test_a_heart_that_the_store_did_not_hear_beats_again_at_once(store, monkeypatch):
    client, uri = store
    monkeypatch.setattr(tracking, "HEARTBEAT", 0.5)
    monkeypatch.setattr(tracking.MlflowClient, "get_run", shaky(tracking.MlflowClient.get_run, "YYY"))
    ledger = tracking.open_sweep(client, uri, dataclasses.replace(SWEEP, name="unheard"))
    ledger.require_heard(0.0)  # no beat is due yet
    wait_for(lambda: ledger.asked is not None)
    start = time.monotonic()
    ledger.asked -= 100.0
    with pytest.raises(BrokenOffError, match="has not answered for 90 s; the same command goes on once it does"):
        ledger.require_heard(90.0)
    ledger.require_heard(110.0)
    wait_for(lambda: ledger.asked is None)
    assert time.monotonic() - start < 1.0  # three whole pauses would be 1.5 s
    ledger.require_heard(0.0)
    ledger.close("FINISHED")


def answers(*errors):
    """A call that raises these, one after another, then answers 7."""
    ahead = iter(errors)

    def call():
        error = next(ahead, None)
        if error is not None:
            raise error
        return 7

    return call


def test_a_server_that_is_away_is_waited_for_and_nothing_else(monkeypatch):
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: None)
    away, refused = MlflowException("API request failed: connection refused"), RestException({"error_code": "BAD"})
    full = OSError(errno.ENOSPC, "No space left on device")
    assert tracking.patiently(answers(away, OSError("reset"), away), "http://me:pw@host", 60.0) == 7
    for error, uri in ((refused, "http://host"), (full, "http://host"), (away, "sqlite:///x.db")):
        with pytest.raises(type(error)):
            tracking.patiently(answers(error), uri, 60.0)
    with pytest.raises(BrokenOffError, match=r"the MLflow store at http://me:\.\.\.@host has not answered for 0 s"):
        tracking.patiently(answers(away, away), "http://me:pw@host", 0.0)


def test_the_heart_beats_until_the_end(store, monkeypatch):
    client, uri = store
    monkeypatch.setattr(tracking, "HEARTBEAT", 0.05)
    ledger = tracking.open_sweep(client, uri, dataclasses.replace(SWEEP, name="beating"))
    client.set_tag(ledger.place.parent, "heartbeat", f"0 {ledger.driver}")
    wait_for(lambda: client.get_run(ledger.place.parent).data.tags["heartbeat"] != f"0 {ledger.driver}")
    ledger.require_held()
    ledger.close("FINISHED")
    assert client.get_run(ledger.place.parent).data.tags["heartbeat"] == ""


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_driver_that_was_taken_over_stops_and_touches_nothing(store, monkeypatch):
    client, uri = store
    monkeypatch.setattr(tracking, "HEARTBEAT", 0.05)
    ledger = tracking.open_sweep(client, uri, dataclasses.replace(SWEEP, name="taken over"))
    taken = f"{time.time():.0f} somebody-else:1:abc"
    client.set_tag(ledger.place.parent, "heartbeat", taken)
    wait_for(lambda: ledger.lost)
    with pytest.raises(RuntimeError, match="another driver has taken over"):
        ledger.require_held()
    theirs = MemberRuns(ledger.place, Pack(members=MEMBERS[:1]), "cpu")
    theirs.close()
    ledger.settle(running_too=True)
    ledger.close("FAILED")
    parent = client.get_run(ledger.place.parent)
    assert (parent.info.status, parent.data.tags["heartbeat"]) == ("RUNNING", taken)
    assert client.get_run(theirs.runs[0]).info.status == "RUNNING"


def test_a_driver_says_that_all_is_told_only_when_it_is(store, monkeypatch, capsys):
    client, uri = store
    ledger = tracking.open_sweep(client, uri, dataclasses.replace(SWEEP, name="told"))
    runs = MemberRuns(ledger.place, Pack(members=MEMBERS[:1]), "cpu")
    runs.close()
    settle = functools.partial(ledger.settle, running_too=True)
    with monkeypatch.context() as away:
        away.setattr(tracking.MlflowClient, "set_terminated", lambda *given, **more: (_ for _ in ()).throw(OSError()))
        ledger.end("KILLED", settle)
        assert capsys.readouterr().err == f"{tracking.NOT_TOLD}\n"
        ledger.untold = False
        with pytest.raises(OSError):
            ledger.end("FINISHED", settle)
    ledger.end("KILLED", settle)
    assert capsys.readouterr().err == f"{tracking.TOLD}\n"
    assert client.get_run(runs.runs[0]).info.status == "KILLED"
    ledger.end("FINISHED")
    ledger.lost = True  # somebody else's to tell
    ledger.end("KILLED")
    assert capsys.readouterr().err == ""


def test_sweeps_are_found_by_name_and_id(store, ledger):
    client, uri = store
    experiment = tracking.experiment_id(client, uri)
    parent = client.get_run(ledger.place.parent)
    for name in (parent.data.tags["sweep"], parent.data.tags["sweep_id"], parent.info.run_id):
        assert tracking.find_sweep(client, experiment, name).info.run_id == parent.info.run_id
    with pytest.raises(ValueError, match="sweep: 'nothing' is not in the ledger"):
        tracking.find_sweep(client, experiment, "nothing")


def test_a_plan_looks_at_the_ledger_without_making_one(store, ledger):
    client, uri = store
    unknown = dataclasses.replace(SWEEP, name="never begun")
    assert tracking.settled_members(client, uri, unknown) == set()
    experiment = tracking.experiment_id(client, uri)
    assert tracking.find_sweeps(client, experiment, unknown.id) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", "no MLflow server answers at 'http://127.0.0.1:9'"),
        ("http://me:hunter2@127.0.0.1:9", "no MLflow server answers at 'http://me:...@127.0.0.1:9'"),
        ("ftp://me:hunter2@somewhere", "'ftp://me:...@somewhere' is not allowed"),
        ("ftp://somewhere", "it must begin with http://, https:// or sqlite:///"),
        ("sqlite:////dev/null/mlflow.db", "cannot be opened"),
    ],
)
def test_stores_that_cannot_be_used_are_refused_in_one_line_and_soon(uri, message):
    start = time.monotonic()
    with pytest.raises(TrackingError, match=message) as caught:
        tracking.connect(uri)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_password_goes_to_the_server_and_into_no_link(monkeypatch):
    asked = []

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"'http://me:\.\.\.@127.0.0.1:.*' cannot be opened"):
        tracking.connect(f"http://me:p%40ss@127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()
    assert asked[0] == ("/health", "Basic " + base64.b64encode(b"me:p@ss").decode())
    assert tracking.page_base("https://me:p%40ss@host:5000/x/") == "https://host:5000/x"
    assert tracking.page_base("http://host") == "http://host"


@pytest.mark.parametrize("begun", [False, True], ids=["a new sweep", "one taken up"])
def test_of_two_drivers_in_the_same_moment_one_has_the_sweep(store, monkeypatch, request, begun):
    client, uri = store
    own = dataclasses.replace(SWEEP, name=f"same-moment-{begun}")
    other = f"elsewhere:1:{uuid.uuid4().hex}:x"
    experiment = tracking.experiment_id(client, uri)
    if begun:
        tracking.open_sweep(client, uri, own).close("FINISHED")
        (parent,) = tracking.find_sweeps(client, experiment, own.id)
        real = tracking.Ledger.start_beating

        def outdone(ledger):
            real(ledger)
            client.set_tag(parent.info.run_id, "heartbeat", f"{time.time():.0f} {other}")

        monkeypatch.setattr(tracking.Ledger, "start_beating", outdone)
    else:
        first = tracking.open_sweep(client, uri, own)
        first._stop.set()
        client.set_tag(first.place.parent, "heartbeat", f"{time.time():.0f} {other}")
        looks, find = [], tracking.find_sweeps
        monkeypatch.setattr(tracking, "find_sweeps", lambda *args: find(*args) if looks else looks.append(1) or [])
    with pytest.raises(TrackingError, match=rf"{own.id} was begun by another driver in the same moment"):
        tracking.open_sweep(client, uri, own)
    monkeypatch.undo()
    runs = tracking.search(client, experiment, f"tags.sweep_id = '{own.id}'")
    assert [run.data.tags["heartbeat"].partition(" ")[2] for run in runs] == [other]
    assert runs[0].info.status == "RUNNING"
    client.set_terminated(runs[0].info.run_id, "KILLED")


def test_a_server_that_never_answers_is_given_up_after_a_while(monkeypatch):
    monkeypatch.setattr(tracking, "SERVER_WAIT", 0.3)

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(2)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(TrackingError, match="no MLflow server answers"):
        tracking.connect(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("https://me:pa%40ss@host/x", "https://me:...@host/x"),
        (
            "postgresql://host/x?user=me&password=pa.ss&sslmode=require",
            "postgresql://host/x?user=me&password=...&sslmode=require",
        ),
        ("mysql://me:one@host/x?Passwd=two", "mysql://me:...@host/x?Passwd=..."),
    ],
)
def test_passwords_are_not_shown(uri, shown):
    assert tracking.shown(uri) == shown


def test_uris_come_from_the_flag_then_the_environment_then_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert tracking.resolve_uri("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    assert tracking.resolve_uri(None) == "http://elsewhere"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_width_aggregates_are_logged_once(store, ledger):
    client, _ = store
    for _ in range(2):
        tracking.log_points(client, ledger.place.parent, {"near/level": {16: 300.0, 32: 250.0}}, 5000)
    history = client.get_metric_history(ledger.place.parent, "near/level")
    assert sorted((m.step, m.value) for m in history) == [(16, 300.0), (32, 250.0)]


def test_the_comparison_is_a_shared_view_grouped_by_the_axes(store):
    client, uri = store
    ledger = tracking.open_sweep(
        client, uri, dataclasses.replace(SWEEP, name="v", axes={"train.learning_rate": (0.1,)})
    )
    path = tracking.comparison_path(ledger.place)
    key = path.partition("viewStateShareKey=")[2].partition("&")[0]
    tags = client.get_experiment(ledger.place.experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    assert [item["groupByData"] for item in view["groupBy"]["groupByKeys"]] == ["width", "train.learning_rate"]
    logged(ledger, MEMBERS[:1])
    found = client.search_runs([ledger.place.experiment], view["searchFilter"])
    assert [run.data.tags["member_id"] for run in found] == [MEMBERS[0].id]
    ledger.close("FINISHED")
