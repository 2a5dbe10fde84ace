"""Jobs on a cluster: what is sent, what is refused, whose exit code it is; with a stand-in for Ray, and with Ray."""

import asyncio
import contextlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.job_submission import JobStatus, JobType
from rich.console import Console

from cluster import jobs, server, tracking
from cluster import nodes as node_checks
from cluster.cli import main
from cluster.driver import Settings
from cluster.search import storage_url
from cluster.search_config import parse_search

ROOT = Path(__file__).resolve().parent.parent
URL = "http://127.0.0.1:8265"
SEARCHED = ["--widths", "8", "--space", "train.learning_rate=1e-3..1e-2:log"]
PLACE = ["--out", "/shared/out", "--tracking-uri", "http://ledger:5000"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A fresh folder and home, and no settings of Ray's or MLflow's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
                 "RAY_AUTH_TOKEN_PATH", "HEADWAY_STORAGE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def console():
    return Console(width=200, highlight=False)


def info(status, code=None, **more):
    return SimpleNamespace(status=JobStatus(status), driver_exit_code=code, message=None, **more)


class Client:
    """Stand-in for Ray's client: a job whose log comes in pieces over connections that may break."""

    def __init__(self, last=None, connections=(("one\n", "two\n"),)):
        self.last, self.connections, self.stopped, self.sent = last, list(connections), [], {}
        self.refusals = []

    def get_address(self):
        return URL

    def submit_job(self, **request):
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        self.sent = request
        folder = request["runtime_env"].get("working_dir")
        self.files = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*")) if folder else None
        return "job1"

    def get_job_info(self, job):
        return self.last if not self.connections else info("RUNNING")

    def get_job_logs(self, job):
        return f"one\n{tracking.TOLD}\nheadway: stopped; the ledger says what is done\n"

    def stop_job(self, job):
        self.stopped.append(job)
        return True

    async def tail_job_logs(self, job):
        for piece in self.connections.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            if piece is signal.SIGINT:
                os.kill(os.getpid(), piece)
                await asyncio.sleep(30)
            yield piece


@pytest.fixture
def client(monkeypatch):
    """The stand-in in place of Ray's client, and no pauses."""
    stand_in = Client(last=info("SUCCEEDED", 0))
    monkeypatch.setattr(jobs, "open_jobs", lambda address: stand_in)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    return stand_in


def test_a_sweep_is_sent_with_its_packages_and_nothing_else_is_touched(client, console, capsys, elsewhere):
    code = jobs.submit_command(["tiny", "--widths", "16", "32", *PLACE, "--seeds", "3", "--address", URL], console)
    assert code == 0
    assert client.sent["entrypoint"] == ("python -m cluster.cli sweep tiny --widths 16 32 --seeds 3 --out /shared/out")
    assert client.sent["metadata"]["sweep"].startswith("tiny-")
    assert client.sent["runtime_env"]["env_vars"] == {
        "MLFLOW_TRACKING_URI": "http://ledger:5000", "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip
    assert {name.split("/")[0] for name in client.files} == {*jobs.PACKAGES, "pyproject.toml"}
    assert {"cluster/cli.py", "cluster/report.html.j2", "sim/box.py"} <= set(client.files)
    assert not any("__pycache__" in name for name in client.files)
    assert not Path(client.sent["runtime_env"]["working_dir"]).exists()
    assert list(elsewhere.iterdir()) == []
    assert "one\ntwo\n" in capsys.readouterr().out


def test_a_search_is_sent_likewise_and_its_code_is_the_jobs_own(client, console, capsys):
    client.last = info("FAILED", 1)
    assert jobs.submit_command(["search", "tiny", *SEARCHED, *PLACE, "--points", "3"], console) == 1
    assert shlex.split(client.sent["entrypoint"]) == [
        "python", "-m", "cluster.cli", "search", "tiny", *SEARCHED, "--points", "3", "--out", "/shared/out",
    ]  # fmt: skip
    assert jobs.STORAGE not in client.sent["runtime_env"]["env_vars"]
    assert client.sent["metadata"]["sweep"].startswith("tiny-search-")
    assert {name.split("/")[0] for name in client.files} == {*jobs.PACKAGES, "pyproject.toml"}
    said = capsys.readouterr().out
    assert re.search(r"job job1: search tiny-search-\w+, 3 points", said)
    assert "job job1: failed, exit code 1" in said
    assert jobs.submit_command(["sweep", "tiny", *PLACE, "--no-wait"], console) == 0
    assert client.sent["entrypoint"] == "python -m cluster.cli sweep tiny --out /shared/out"


@pytest.mark.parametrize("how", ["--storage URL", "--storage=URL", "variable"])
def test_a_password_of_a_search_is_in_no_command(client, console, capsys, monkeypatch, elsewhere, how):
    """What the job's own process makes of what it is sent: its command line and its variables."""
    url = "postgresql://user:secret@host/optuna"
    if how == "variable":
        monkeypatch.setenv("HEADWAY_STORAGE", url)
    flags = how.replace("URL", url).split() if how != "variable" else []
    assert jobs.submit_command(["search", "tiny", *flags, *SEARCHED, *PLACE, "--points", "3"], console) == 0
    sent = client.sent
    assert shlex.split(sent["entrypoint"])[3:] == [
        "search", "tiny", *SEARCHED, "--points", "3", "--out", "/shared/out",
    ]  # fmt: skip
    assert "secret" not in str({**sent, "runtime_env": {}}) + capsys.readouterr().out
    monkeypatch.setenv("HEADWAY_STORAGE", "")
    for name, value in sent["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    search = parse_search(shlex.split(sent["entrypoint"])[4:])
    assert storage_url(search.settings, search.options.storage, "http://ledger:5000") == url
    assert jobs.submit_command(["tiny", *PLACE, "--no-wait"], console) == 0  # a sweep has no such database
    assert "secret" not in str(client.sent)


def test_a_cluster_that_has_just_begun_is_asked_again(client, console, capsys):
    wait = "Request failed with status code 500: No available agent to submit job, please try again later.."
    client.refusals = [wait, wait]
    assert jobs.submit_command(["tiny", *PLACE, "--address", URL], console) == 0
    assert client.sent
    client.refusals = ["Request failed with status code 500: no"]
    with pytest.raises(ValueError, match=r"refused .*no"):
        jobs.submit_command(["tiny", *PLACE, "--address", URL], console)


def test_what_is_sent_is_named_by_its_content_so_that_ray_sends_it_once():
    with jobs.staged([], False) as first, jobs.staged([], False) as second:
        assert first != second
        uris = {get_uri_for_directory(str(folder), include_gitignore=True, excludes=[]) for folder in (first, second)}
        assert len(uris) == 1


def test_the_installed_headway_is_run_without_sending_any(client, console):
    assert jobs.submit_command(["tiny", "--installed", *PLACE, "--no-wait"], console) == 0
    assert "working_dir" not in client.sent["runtime_env"]
    assert client.files is None


def test_a_stored_sweep_and_ones_own_files_go_along(client, console, elsewhere):
    from cluster.encoding import encode
    from cluster.recipes import tiny

    (elsewhere / "mine").mkdir()
    (elsewhere / "mine" / "recipes.py").write_text("")
    (elsewhere / "stored.json").write_text(json.dumps(encode(tiny())))
    stored = str(elsewhere / "stored.json")
    assert jobs.submit_command([stored, "--installed", "--ship", "mine", *PLACE, "--no-wait"], console) == 0
    assert client.files == ["mine", "mine/recipes.py", "stored.json"]
    assert shlex.split(client.sent["entrypoint"])[4] == "stored.json"


def test_without_waiting_the_user_is_told_how_to_follow_and_stop(client, console, capsys):
    assert jobs.submit_command(["tiny", *PLACE, "--no-wait"], console) == 0
    said = capsys.readouterr().out
    assert f"headway jobs job1 --address {URL}" in said
    assert f"headway stop job1 --address {URL}" in said
    assert "one" not in said


REFUSED = [
    (["tiny", "--tracking-uri", "http://x:5000"], "out: None is not allowed; it must be an absolute path"),
    (["tiny", "--out", "here", "--tracking-uri", "http://x:5000"], "out: 'here' is not allowed"),
    (["tiny", "--out", "s3://bucket/x", "--tracking-uri", "http://x:5000"], "out: 's3://bucket/x' is not allowed"),
    (["tiny", "--out", "/x"], "tracking_uri: None is not allowed; it must be http://HOST:PORT or sqlite:////ABSOLUTE"),
    (["tiny", "--out", "/x", "--tracking-uri", "sqlite:///here.db"], "tracking_uri: 'sqlite:///here.db' is not"),
    (["tiny", "--out", "/x", "--tracking-uri", "mlruns"], "tracking_uri: 'mlruns' is not allowed"),
    (["tiny", *PLACE, "--store", "here"], "store: 'here' is not allowed; it must be an absolute path or a URL"),
    (["tiny", *PLACE, "--train.stepz", "9"], "Unrecognized options: --train.stepz"),
    (["tiny", *PLACE, "--train.steps", "0"], "steps: 0 is not allowed"),
    (["tiny", *PLACE, "--workers", "2"], "workers: 2 is not allowed; it must be left out for a job"),
    (["tiny", *PLACE, "--dry-run"], "dry_run: True is not allowed"),
    (["tiny", *PLACE, "--address"], "Missing value for argument '--address'"),
    (["tiyn", *PLACE], "recipe: 'tiyn' is unknown; did you mean 'tiny'?"),
    (["tiny", *PLACE, "--ship", "nothing"], "ship: 'nothing' is not allowed; it must be a file or folder that exists"),
    (["tiny", *PLACE, "--ship", str(ROOT / "sim")], "of a name that nothing else sent has"),
    ([], "submit: it takes a recipe: headway submit RECIPE"),
    (["search", *PLACE], "search: it takes a recipe: headway submit search RECIPE"),
    (["search", "tiny", *PLACE], "space: () is not allowed"),
    (
        ["search", "tiny", *SEARCHED, *PLACE, "--workers", "2"],
        "workers: 2 is not allowed; it must be left out for a job",
    ),
    (["search", "tiny", *SEARCHED, *PLACE, "--storage", "sqlite:///o.db"], "storage: 'sqlite:///o.db' is not allowed"),
    (
        ["tiny", *PLACE, "--storage", "postgresql://u:secret@h/o"],
        "storage: 'postgresql://u:...@h/o' is not allowed; it must be left out but for a search",
    ),
    (["search", "tiny", *SEARCHED, "--tracking-uri", "http://x:5000"], "out: None is not allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments[-3:]) for arguments, _ in REFUSED])
def test_a_job_that_could_not_work_is_refused_in_one_line_before_it_is_sent(client, console, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        jobs.submit_command(arguments, console)
    assert "\n" not in str(refused.value)
    assert client.sent == {}


@pytest.mark.parametrize("uri", ["http://x:5000", "https://x", "sqlite:////shared/mlflow.db"])
def test_lasting_places_are_taken_from_the_flags_or_the_environment(client, console, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    store = ["--store", "s3://bucket/x"]
    assert jobs.submit_command(["tiny", "--out", "/x", *store, "--no-wait"], console) == 0
    assert client.sent["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == uri
    assert uri not in client.sent["entrypoint"]  # it may hold a password, and commands are shown to all
    assert client.sent["entrypoint"].endswith("--out /x --store s3://bucket/x")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", 130, 130), ("FAILED", -9, 137),
     ("FAILED", None, 1), ("STOPPED", None, 130), ("SUCCEEDED", None, 0)],
)  # fmt: skip
def test_the_exit_code_is_the_jobs_own(client, console, capsys, status, driver, code):
    client.last = info(status, driver)
    assert jobs.submit_command(["tiny", *PLACE], console) == code
    assert f"job job1: {status.lower()}, exit code {code}" in capsys.readouterr().out


def test_why_a_job_never_ran_is_told(client, console, capsys):
    client.last = info("FAILED")
    client.last.message = "runtime_env setup failed: no such package"
    assert jobs.submit_command(["tiny", *PLACE], console) == 1
    assert "it never ran: runtime_env setup failed: no such package" in capsys.readouterr().out


def test_a_broken_connection_is_taken_up_where_the_log_stood(client, console, capsys):
    client.connections = [("one\ntw", RuntimeError("closed")), (OSError("refused"),), ("one\n", "two\nthree\n"), ()]
    assert jobs.follow(client, "job1", console) == 0
    assert capsys.readouterr().out.startswith("one\ntwo\nthree\njob job1: succeeded")


def test_a_connection_that_stays_broken_ends_the_following_not_the_job(client, console, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    client.connections = [("one\n", RuntimeError("closed"))] + [(OSError("refused"),)] * 100
    assert jobs.follow(client, "job1", console) == 1
    said = capsys.readouterr().out
    assert "lost sight of job job1 (refused); it may go on" in said
    assert "headway jobs job1" in said
    assert client.stopped == []
    assert len(client.connections) > 50


def test_an_interrupt_leaves_the_job_running(client, console, capsys):
    client.connections = [("one\n", signal.SIGINT)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert jobs.follow(client, "job1", console) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().out
    assert "job job1 goes on" in said
    assert "headway stop job1" in said
    assert client.stopped == []


def test_a_stop_waits_for_the_end_and_says_whether_the_ledger_knows(client, console, capsys):
    client.last = info("STOPPED")
    states = iter([info("RUNNING"), info("RUNNING")])
    client.get_job_info = lambda job: next(states, client.last)
    assert jobs.stop_command(["job1", "--address", URL], console) == 0
    said = capsys.readouterr().out
    assert client.stopped == ["job1"]
    assert re.search(r"job job1: stopped in \d", said)
    assert "KILLED in the ledger" in said
    # what the command itself says at its end is no word of the ledger, nor is what somebody's recipe prints
    for log in ("one\n", "headway: stopped; the ledger says what is done\n", f"says: {tracking.TOLD}\n"):
        client.get_job_logs = lambda job, log=log: log
        assert jobs.stop_command(["job1"], console) == 0
        assert "could not tell it; the same command again puts that right" in capsys.readouterr().out


def test_jobs_are_listed_with_sweep_status_and_code(client, console, capsys):
    begun = 1_700_000_000_000
    rows = [
        info("SUCCEEDED", 0, submission_id="late", type=JobType.SUBMISSION, start_time=begun + 9000,
             end_time=begun + 12_000, metadata={"sweep": "tiny-1"}),
        info("RUNNING", submission_id="early", type=JobType.SUBMISSION, start_time=begun, end_time=None, metadata=None),
        info("RUNNING", submission_id=None, type=JobType.DRIVER, start_time=begun, end_time=None, metadata=None),
    ]  # fmt: skip
    client.list_jobs = lambda: rows
    assert jobs.jobs_command([], console) == 0
    said = capsys.readouterr().out
    assert said.index("early") < said.index("late")
    assert re.search(r"late .*tiny-1 .*succeeded .*3 s .*0 ", said)
    assert "None" not in said


@contextlib.contextmanager
def dashboard(token=None, version="2.60.0"):
    """A server that answers as a dashboard does, and notes the tokens that it was shown."""
    shown = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers.get("Authorization")
            shown.append(given)
            status = 200 if token is None or given == f"Bearer {token}" else 403 if given else 401
            body = json.dumps({"version": "4", "ray_version": version, "ray_commit": ""} if status == 200 else "no")
            if status == 200 and self.path.startswith("/api/jobs/"):
                status, body = 404, "Job x does not exist"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", shown
    finally:
        server.shutdown()
        server.server_close()


def test_a_token_goes_only_to_a_cluster_that_asks_for_it(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    # Ray's own client adds what an earlier cluster of this process has left in it
    monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", lambda headers: {})
    with dashboard() as (url, shown), monkeypatch.context() as unread:
        unread.setattr(jobs, "find_token", lambda: pytest.fail("the token was read"))
        jobs.open_jobs(url)
        assert set(shown) == {None}
    with dashboard("secret") as (url, shown):
        jobs.open_jobs(url)
        assert shown[0] is None
        assert set(shown[1:]) == {"Bearer secret"}


@pytest.mark.parametrize("place", ["variable", "path", "home"])
def test_the_token_is_found_where_ray_finds_it(monkeypatch, elsewhere, place):
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    file = elsewhere / "token" if place == "path" else elsewhere / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("secret\n" if place != "variable" else "another")
    if place == "path":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert jobs.find_token() == "secret"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "does not take this token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, "asks for a token"),
    ],
)
def test_a_cluster_that_lets_nobody_in_is_one_line_that_says_what_to_set(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with dashboard("secret") as (url, _), pytest.raises(ValueError, match=message) as refused:
        jobs.open_jobs(url)
    assert "\n" not in str(refused.value)


def test_the_address_given_is_the_one_asked_whatever_rays_variables_say(monkeypatch):
    with dashboard() as (url, shown), dashboard() as (other, not_asked):
        monkeypatch.setenv("RAY_ADDRESS", other)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other)
        assert jobs.open_jobs(url).get_address() == url
        assert os.environ["RAY_ADDRESS"] == other
        assert shown
        assert not not_asked
        assert jobs.open_jobs(None).get_address() == other


@pytest.mark.parametrize("address", [None, "auto", "ray://127.0.0.1:10001", "127.0.0.1:6379", "http://"])
def test_an_address_that_is_no_dashboards_is_refused(address):
    with pytest.raises(ValueError, match="it must be the URL of a cluster's dashboard"):
        jobs.open_jobs(address)


def test_a_silent_address_and_an_unknown_job_are_one_line(console):
    with pytest.raises(ValueError, match=r"address: no Ray dashboard answers at 'http://127.0.0.1:9' \(.*refused"):
        jobs.open_jobs("http://127.0.0.1:9")
    with dashboard() as (url, _), pytest.raises(ValueError, match="job: it is unknown at") as refused:
        jobs.jobs_command(["x", "--address", url], console)
    assert "\n" not in str(refused.value)


NODES = [{"NodeID": "a", "NodeManagerAddress": "10.0.0.1"}, {"NodeID": "b", "NodeManagerAddress": "10.0.0.2"}]


@pytest.fixture
def in_turn(monkeypatch):
    """Nodes that are this process; `elsewhere`: those that see other folders, `deaf`: those that reach no server."""
    apart = {"elsewhere": set(), "deaf": set()}

    def ask(nodes, root, mark, uri):
        reached = {}
        for node in nodes:
            monkeypatch.setattr(tracking, "connect", unreachable if node in apart["deaf"] else lambda uri: None)
            seen = f"{root}-of-{node}" if node in apart["elsewhere"] else root
            reached[node] = node_checks.look_around(seen, mark, f"{mark}-{node}", uri)
        return reached

    def unreachable(uri):
        raise tracking.TrackingError(f"tracking_uri: no MLflow server answers at {uri!r}")

    monkeypatch.setattr(node_checks, "_ask_nodes", ask)
    return apart


def test_one_node_may_do_as_it_likes():
    node_checks.require_shared(NODES[:1], Settings())


def test_several_nodes_need_a_server(in_turn, elsewhere):
    with pytest.raises(
        ValueError, match=r"tracking_uri: 'sqlite:.*must be an MLflow server .* the cluster has 2 nodes"
    ):
        node_checks.require_shared(NODES, Settings())
    settings = Settings(tracking_uri="postgresql://me:secret@host/db")
    with pytest.raises(ValueError, match=r"tracking_uri: 'postgresql://...' is not allowed"):
        node_checks.require_shared(NODES, settings)
    assert list(elsewhere.iterdir()) == []


def test_a_node_that_joins_later_has_to_share_too(in_turn, elsewhere):
    settings = Settings(tracking_uri="http://ledger:5000", out=elsewhere / "shared")
    there = [NODES[:1]]
    look = node_checks.Newcomers(settings, lambda: there[-1])
    look()
    there.append(NODES)
    look()
    assert look.known == {"a", "b"}
    there.append(NODES[:1])  # one that goes, and comes again, is known
    look()
    alone = node_checks.Newcomers(Settings(), lambda: there[-1])
    alone()
    there.append(NODES)
    with pytest.raises(tracking.BrokenOffError, match=r"a node has joined that cannot .*: tracking_uri: 'sqlite"):
        alone()
    in_turn["elsewhere"].add("b")
    unsteady = node_checks.Newcomers(settings, iter([NODES[:1], NODES, NODES[:1], NODES, NODES]).__next__)
    unsteady()  # gone while it was asked
    with pytest.raises(tracking.BrokenOffError, match=r"10\.0\.0\.2 cannot read what this one writes"):
        unsteady()


@pytest.mark.parametrize("name", ["out", "store"])
def test_several_nodes_need_a_folder_in_common_and_no_trace_is_left(in_turn, elsewhere, name):
    folder = elsewhere / "shared"
    places = {"out": folder} if name == "out" else {"out": elsewhere / "own", "store": str(folder)}
    settings = Settings(tracking_uri="http://ledger:5000", **places)
    node_checks.require_shared(NODES, settings)
    assert list(folder.iterdir()) == []
    in_turn["elsewhere"].add("b")
    with pytest.raises(ValueError, match=f"^{name}: .*all nodes reach.*node 10.0.0.2 cannot read what this one writes"):
        node_checks.require_shared(NODES, settings)
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []


def test_every_node_must_reach_the_server(in_turn, elsewhere):
    in_turn["deaf"].add("b")
    settings = Settings(tracking_uri="http://127.0.0.1:5000", out=elsewhere / "shared")
    with pytest.raises(
        ValueError, match=r"no MLflow server answers at 'http://127.0.0.1:5000', seen from node 10.0.0.2"
    ):
        node_checks.require_shared(NODES, settings)


@contextlib.contextmanager
def ledger_stub():
    """A server that answers what `tracking.connect` asks of MLflow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"experiments": []}')

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.answer()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_nodes_of_a_real_cluster_are_asked(elsewhere, monkeypatch, capsys):
    """Two nodes on this machine: they share its folders, except the one that means another to every process."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("nodes", "driver"):
        (elsewhere / name).mkdir()
    monkeypatch.chdir(elsewhere / "nodes")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.chdir(elsewhere / "driver")
        few = ["--data.rows", "64", "--probe.examples", "16", "--system.box.n", "6", "--tracking-uri", "sqlite:///x.db"]
        cluster.add_node(num_cpus=3)  # more than this machine may have
        assert main(["sweep", "tiny", "--dry-run", "--address", cluster.address, "--seeds", "4", *few]) == 0
        assert "8 packs on 4 workers" in capsys.readouterr().out
        assert list((elsewhere / "driver").iterdir()) == []
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
        nodes = [node for node in ray.nodes() if node["Alive"]]
        assert len(nodes) == 3
        with ledger_stub() as uri:
            node_checks.require_shared(nodes, Settings(tracking_uri=uri, out=elsewhere / "shared"))
            assert list((elsewhere / "shared").iterdir()) == []
            apart = Settings(tracking_uri=uri, store="/proc/self/cwd/checkpoints", out=elsewhere / "shared")
            with pytest.raises(ValueError, match=r"store: '/proc/self/cwd/checkpoints' is not allowed.* cannot read"):
                node_checks.require_shared(nodes, apart)
        with pytest.raises(ValueError, match=r"no MLflow server answers at 'http://127.0.0.1:9'.*, seen from node"):
            node_checks.require_shared(nodes, Settings(tracking_uri="http://127.0.0.1:9", out=elsewhere / "shared"))
    finally:
        ray.shutdown()
        cluster.shutdown()


def free_ports(count):
    """Ports that nobody listens on; the system gives them from above those that Ray keeps for its workers."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition, seconds, process=None):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.3)


def status_of(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except OSError as error:
        return getattr(error, "code", None)


TOKEN = "a-token-of-the-tests-own-0123456789"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "ray-client-server-port", "metrics-export-port", "runtime-env-agent-port")  # fmt: skip
SMALL = ["--data.rows", "128", "--data.validation-rows", "16", "--probe.examples", "8", "--probe.sparse-examples", "4",
         "--system.box.n", "6", "--system.box.radius", "0.1", "--widths", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(blank_store):
    """A head node of its own with token authentication: the dashboard's URL, and a folder for what jobs leave."""
    folder = Path(tempfile.mkdtemp(prefix="hw-", dir="/tmp"))  # Ray's sockets need short names
    shutil.copy(blank_store, folder)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HOME": str(folder),
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
               "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}",
               *(f"--{name}={port}" for name, port in ports.items())]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{ports['dashboard-port']}"
        wait_for(lambda: status_of(f"{url}/api/version") == 401, 120, process)
        yield url, folder
    finally:
        process.send_signal(signal.SIGTERM)  # it ends the node's other processes, and no other node's
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def job(cluster, monkeypatch):
    """Where a job goes: its flags. The token is there, and nothing says that the cluster wants it."""
    url, folder = cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return ["--address", url, "--out", str(folder / "out"), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]


class Ledger:
    """What MLflow has of one sweep."""

    def __init__(self, folder, sweep):
        self.uri, self.sweep = f"sqlite:///{folder}/mlflow.db", sweep
        self.client = tracking.connect(self.uri)

    def statuses(self):
        experiment = self.client.get_experiment_by_name(tracking.EXPERIMENT)
        found = tracking.find_sweeps(self.client, experiment.experiment_id, self.sweep) if experiment else []
        if not found:
            return None, []
        place = tracking.Place(uri=self.uri, experiment=experiment.experiment_id, parent=found[0].info.run_id)
        runs = tracking.children(self.client, place)
        return found[0].info.status, sorted(run.info.status for run in runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's client, of aiohttp
def test_a_job_on_a_real_cluster_ends_with_its_own_code(cluster, job, console, capsys, monkeypatch, elsewhere):
    from cluster.encoding import encode
    from cluster.recipes import tiny

    (elsewhere / "stored.json").write_text(json.dumps(encode(tiny())))
    assert jobs.submit_command(["stored.json", *SMALL, "--seeds", "1", "--train.steps", "20", *job], console) == 0
    said = capsys.readouterr().out
    sweep = re.search(r"sweep (tiny-\w+), 1 member\n", said).group(1)
    assert "1 member trained in this call, 1 member in the sweep" in said  # the job's own log
    assert re.search(r"job raysubmit_\w+: succeeded, exit code 0", said)
    assert Ledger(cluster[1], sweep).statuses() == ("FINISHED", ["FINISHED"])
    assert (cluster[1] / "out" / sweep / "report" / "report.html").is_file()
    assert [path.name for path in elsewhere.iterdir()] == ["stored.json"]

    assert jobs.submit_command(["tiny", *SMALL, "--gpus", "3", *job], console) == 2
    said = capsys.readouterr().out
    assert "headway: gpus: 3.0 is not allowed; it must be at most 0, all that one node has" in said
    assert said.rstrip().endswith("failed, exit code 2")

    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(ValueError, match="asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        jobs.submit_command(["tiny", *SMALL, *job], console)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's client, of aiohttp
def test_a_job_that_is_stopped_tells_the_ledger(cluster, job, console, capsys):
    long = ["--seeds", "2", "--pack-size", "2", "--train.steps", "300000"]
    assert jobs.submit_command(["tiny", *SMALL, *long, *job, "--no-wait"], console) == 0
    said = capsys.readouterr().out
    name, sweep = re.search(r"job (\w+): sweep (\S+), 2 members", said).groups()
    ledger = Ledger(cluster[1], sweep)
    wait_for(lambda: ledger.statuses()[1] == ["RUNNING"] * 2, 240)
    assert jobs.stop_command([name, *job[:2]], console) == 0
    said = capsys.readouterr().out
    assert "members at work are KILLED in the ledger" in said
    assert ledger.statuses() == ("KILLED", ["KILLED"] * 2)
    assert jobs.jobs_command([*job[:2]], console) == 0
    assert re.search(rf"{name}.*{sweep}.*stopped.* 130 ", capsys.readouterr().out)
    assert jobs.jobs_command([name, *job[:2]], console) == 130
    assert "headway: stopped; the ledger says what is done" in capsys.readouterr().out
    assert jobs.stop_command([name, *job[:2]], console) == 0
    assert "had ended already: stopped" in capsys.readouterr().out


def test_a_server_takes_no_folder_of_local_sweeps_and_no_port_in_use(elsewhere, console, monkeypatch, blank_store):
    monkeypatch.setattr(server.os, "execve", lambda *args: pytest.fail("a server was started"))
    uri = f"sqlite:///{shutil.copy(blank_store, elsewhere)}"
    tracking.experiment_id(tracking.connect(uri), uri)
    with pytest.raises(ValueError, match=r"folder: .*one of the server's own: the ledger here keeps artifacts"):
        server.server_command(["--folder", str(elsewhere), "--port", "0"], console)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            ValueError, match=r"port: \d+ on '127.0.0.1' cannot be listened on \(Address already in use"
        ):
            server.server_command(["--port", str(taken.getsockname()[1])], console)
    with pytest.raises(ValueError, match=r"folder: .*cannot be made"):
        server.server_command(["--folder", "/dev/null/x", "--port", "0"], console)


def test_the_server_that_is_started_listens_on_loopback_with_one_worker(elsewhere, console, monkeypatch):
    started = []
    monkeypatch.setattr(server.os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(server, "require_proxied", lambda uri, folder: None)
    (port,) = free_ports(1)
    server.server_command(["--port", str(port), "--allowed-hosts", "mlflow:5000", "head:5000"], console)
    ((_, command, environment),) = started
    flags = dict(zip(command[4::2], command[5::2], strict=True))
    assert flags == {
        "--host": "127.0.0.1", "--port": str(port), "--workers": "1", "--allowed-hosts": "mlflow:5000,head:5000",
        "--artifacts-destination": (elsewhere / "headway-server" / "artifacts").as_uri(),
    }  # fmt: skip
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{elsewhere}/headway-server/mlflow.db"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
