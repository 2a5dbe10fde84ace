"""MLflow: one parent run per sweep, one child run per member, and the ledger that says which members are done.

A member is done when its run is FINISHED, which is set last, after its tables are up; the earliest such run counts.
Runs of diverged members are FAILED with `outcome = diverged` and count as settled: training again would diverge again.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException, RestException

from cluster.encoding import encode
from cluster.store import insist
from cluster.sweep import Sweep
from sim import system_name

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table of a new store
logging.getLogger("alembic").setLevel(logging.WARNING)

EXPERIMENT = "headway"
DEFAULT_URI = "sqlite:///mlflow.db"
SERVER_WAIT = 5.0  # seconds to answer before a tracking server counts as unreachable
HEARTBEAT = 10.0  # seconds between heartbeats of the driver
DEAD_AFTER = 60.0  # a driver whose heartbeat is older than this is dead, ...
SILENT_AFTER = 3600.0  # ... or this, where its process is seen to live: it may be stopped, or wait for a disk
SLACK = 10.0  # seconds by which the clocks of heartbeats and of processes may differ
PAGE = 5000  # runs in one answer
FEW = 64  # members whose runs are looked up one by one
BATCH = 1000  # metrics in one request, MLflow's limit
PARENT, KIND = "mlflow.parentRunId", "kind"
TOLD = "headway: the ledger is told: members that were at work are KILLED"  # a stopped driver's last word on it
NOT_TOLD = "headway: the ledger cannot be told how this ended; the same command does so when it goes on"
SECRETS = re.compile(r"(?i)([?&](?:password|passwd|pwd|token|secret))=[^&#]*")  # in the query of a URI
Result = TypeVar("Result")


class TrackingError(ValueError):
    """The tracking store cannot be used, or another driver holds the sweep; one line says which."""


class BrokenOffError(RuntimeError):
    """Work under way cannot go on, for a reason outside of it; one line says which. The same command goes on later."""


def resolve_uri(uri: str | None) -> str:
    """The tracking URI given, or MLFLOW_TRACKING_URI, or a SQLite file here; its path made absolute for workers."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    prefix = "sqlite:///"
    return prefix + str(Path(uri.removeprefix(prefix)).expanduser().absolute()) if uri.startswith(prefix) else uri


def connect(uri: str, make: bool = True) -> MlflowClient:
    """A client of a store that answers: a server is asked for its health, a SQLite store made. Or TrackingError."""
    scheme = urlsplit(uri).scheme
    if not make and uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise TrackingError(f"tracking_uri: there is no ledger at {shown(uri)!r} yet; `headway sweep` makes one")
    if scheme in ("http", "https"):
        _require_healthy(uri)
    elif scheme != "sqlite" and "+" not in scheme and scheme not in ("postgresql", "mysql", "mssql"):
        raise TrackingError(
            f"tracking_uri: {shown(uri)!r} is not allowed; it must begin with http://, https:// or sqlite:///"
        )
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # any driver's own error: the store cannot be opened
        reason = str(error).strip().splitlines()[0]
        raise TrackingError(f"tracking_uri: {shown(uri)!r} cannot be opened: {reason}") from error
    return client


def _require_healthy(uri: str) -> None:
    parts = urlsplit(uri)
    try:
        request = urllib.request.Request(f"{page_base(uri)}/health")
        if parts.username is not None:
            own = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request.add_header("Authorization", f"Basic {base64.b64encode(own.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=SERVER_WAIT) as answer:
            status = answer.status
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TrackingError(f"tracking_uri: no MLflow server answers at {shown(uri)!r} ({error})") from error
    if status != 200:
        raise TrackingError(f"tracking_uri: the server at {shown(uri)!r} answers its health check with status {status}")


def page_base(uri: str) -> str:
    """A server's address as pages are opened at it: without user and password, and without a slash at its end."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def shown(uri: str) -> str:
    """A URI as it may be shown, without its passwords."""
    secret = urlsplit(uri).password
    uri = uri.replace(f":{secret}@", ":...@") if secret else uri
    return SECRETS.sub(r"\1=...", uri)


def patiently(call: Callable[[], Result], uri: str, patience: float) -> Result:
    """What the call returns, made again where it failed for want of a server; it must bear repeating.

    BrokenOffError once no server has answered for so many seconds. Other errors, and those of other stores, are raised.
    """
    try:
        return insist(call, lambda error: patience if is_outage(error, uri) else 0.0, (MlflowException, OSError))
    except (MlflowException, OSError) as error:
        if is_outage(error, uri):
            raise silent(uri, patience) from error
        raise


def is_outage(error: Exception, uri: str) -> bool:
    """Whether a call failed on its way to a server; not what the server itself, a database or a disk refuses."""
    answered = isinstance(error, RestException) or getattr(error, "errno", None) is not None
    return uri.startswith("http") and not answered


def silent(uri: str, patience: float) -> BrokenOffError:
    """The error of a store that has not answered for so many seconds."""
    return BrokenOffError(
        f"the MLflow store at {shown(uri)} has not answered for {patience:.0f} s; "
        "the same command goes on once it does, from the last checkpoints"
    )


def experiment_id(client: MlflowClient, uri: str) -> str:
    """The experiment that holds all sweeps, made if need be; beside a SQLite file artifacts lie in `mlartifacts`."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None and found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {EXPERIMENT!r} is deleted in {shown(uri)!r}; restore it (`mlflow experiments restore`)"
        )
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


@functools.cache
def code_version() -> str:
    """The distribution's version and a digest of the source of its packages."""
    from importlib.metadata import PackageNotFoundError, version

    root = Path(__file__).resolve().parent.parent
    content = hashlib.blake2b(digest_size=4)
    for path in sorted(path for name in ("sim", "train", "probes", "cluster") for path in (root / name).glob("*.py")):
        content.update(path.read_bytes())
    try:
        number = version("headway")
    except PackageNotFoundError:
        number = "0"
    return f"{number}+{content.hexdigest()}"


def now_ms() -> int:
    """Unix time in milliseconds."""
    return int(time.time() * 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a sweep is logged: what a worker needs to know of the ledger."""

    uri: str
    experiment: str
    parent: str


@dataclass(kw_only=True)
class Ledger:
    """The driver's view of one sweep's runs. Opened by `open_sweep`; `close` in every case."""

    client: MlflowClient
    place: Place
    driver: str
    lost: bool = False
    asked: float | None = None
    """Since when the store has not answered beats, on the clock of `time.monotonic`; None where it has."""
    untold: bool = False
    """Whether runs below could not be told how they ended."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def settle(self, running_too: bool) -> dict[str, Run]:
        """The run that counts for each settled member: the earliest; later ones become KILLED and name it.

        running_too: also end runs left RUNNING by workers that are gone. Call it only while no worker is at work.
        """
        return self.settle_runs(children(self.client, self.place), running_too)

    def settle_runs(self, runs: Iterable[Run], running_too: bool) -> dict[str, Run]:
        """`settle`, of the sweep's runs as they have just been looked up."""
        runs = list(runs)
        kept = counted(runs)
        for run in runs if not self.lost else ():
            member = run.data.tags["member_id"]
            if is_settled(run) and kept[member] is not run:
                supersede(self.client, run.info.run_id, kept[member].info.run_id)
            elif "superseded_by" in run.data.tags and run.info.status == "FINISHED":
                self.client.set_terminated(run.info.run_id, "KILLED")  # by a worker that had been given up
            elif running_too and run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
        return kept

    def beat(self) -> None:
        """Say that this driver is alive; `lost` once another one has taken the sweep over."""
        if self.asked is None:
            self.asked = time.monotonic()
        holder = self.client.get_run(self.place.parent).data.tags.get("heartbeat", "").partition(" ")[2]
        self.lost = holder not in ("", self.driver)
        if not self.lost:
            self._claim()
        self.asked = None

    def _claim(self) -> None:
        self.client.set_tag(self.place.parent, "heartbeat", f"{time.time():.0f} {self.driver}")

    def require_held(self) -> None:
        """Raise BrokenOffError once another driver has taken the sweep over."""
        if self.lost:
            raise BrokenOffError(
                f"another driver has taken over the sweep, as this one was silent for {DEAD_AFTER:.0f} s"
            )

    def require_heard(self, patience: float) -> None:
        """Raise BrokenOffError once the store has not answered for so many seconds."""
        asked = self.asked  # the thread that beats may be answered just now
        if asked is not None and time.monotonic() - asked > patience:
            raise silent(self.place.uri, patience)

    def start_beating(self) -> None:
        """Beat from a thread until `close`."""
        self._claim()

        def loop() -> None:
            pause = HEARTBEAT
            while not self._stop.wait(pause) and not self.lost:
                try:
                    self.beat()
                    pause = HEARTBEAT
                except (MlflowException, OSError):  # the store is away: once it is back, nobody must think us dead
                    pause = HEARTBEAT / 10

        self._thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, status: str) -> None:
        """End the parent run as FINISHED, FAILED or KILLED and let other drivers in; not if another is at work."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=SERVER_WAIT)
        if not self.lost:
            self.client.set_tag(self.place.parent, "heartbeat", "")
            self.client.set_terminated(self.place.parent, status)

    def end(self, status: str, before: Callable[[], object] = lambda: None) -> None:
        """`close` as a driver's last act, after `before`. A store that is away does not hide why a driver ends that has
        not FINISHED. One that was stopped says `TOLD`, once that is so."""
        try:
            before()
            self.close(status)
        except (MlflowException, OSError):
            if status == "FINISHED":
                raise
            self.untold = True
        if self.untold:
            print(NOT_TOLD, file=sys.stderr, flush=True)
        elif status == "KILLED" and not self.lost:
            print(TOLD, file=sys.stderr, flush=True)


def children(client: MlflowClient, place: Place) -> list[Run]:
    """The members' runs of a sweep, deleted ones left out."""
    return search(client, place.experiment, f"tags.`{PARENT}` = '{place.parent}'")


def own_children(client: MlflowClient, place: Place, members: Collection[str]) -> list[Run]:
    """The runs of a few members of a sweep, in a look-up for each: a store finds these far sooner than it tells of ten
    thousand; where there are more than `FEW`, of all."""
    if len(members) > FEW:
        return [run for run in children(client, place) if run.data.tags["member_id"] in members]
    own = f"tags.`{PARENT}` = '{place.parent}' and tags.member_id = "
    return [run for member in members for run in search(client, place.experiment, f"{own}'{member}'")]


def counted(runs: Iterable[Run]) -> dict[str, Run]:
    """The run that counts for each settled member: the one that ended first."""
    kept: dict[str, Run] = {}
    for run in sorted(filter(is_settled, runs), key=lambda run: (run.info.end_time or 0, run.info.start_time)):
        kept.setdefault(run.data.tags["member_id"], run)
    return kept


def settled_members(client: MlflowClient, uri: str, sweep: Sweep) -> set[str]:
    """Members of the sweep that the ledger counts as done, without touching it."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = find_sweeps(client, str(experiment.experiment_id), sweep.id) if experiment else []
    places = [Place(uri=uri, experiment=run.info.experiment_id, parent=run.info.run_id) for run in found]
    return {run.data.tags["member_id"] for place in places for run in children(client, place) if is_settled(run)}


def is_settled(run: Run) -> bool:
    """Whether a run's member need not be trained again."""
    if "superseded_by" in run.data.tags:
        return False
    return run.info.status == "FINISHED" or run.data.tags.get("outcome") == "diverged"


def supersede(client: MlflowClient, run_id: str, by: str) -> None:
    """Take a run out of the count, naming the one that counts."""
    client.set_tag(run_id, "superseded_by", by)
    client.set_terminated(run_id, "KILLED")


def search(client: MlflowClient, experiment: str, condition: str) -> list[Run]:
    """All runs that fulfil MLflow's condition, page after page."""
    runs, token = list[Run](), None
    with unhindered():
        while True:
            page = client.search_runs([experiment], condition, max_results=PAGE, page_token=token)
            runs += list(page)
            token = page.token
            if not token:
                return runs


@contextmanager
def unhindered() -> Iterator[None]:
    """Without Python's search for cycles: it goes through the hundred thousands of rows that a look-up makes again and
    again, for more than half of the time, and finds nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def find_sweeps(client: MlflowClient, experiment: str, name: str | None = None) -> list[Run]:
    """Parent runs, newest first; `name` is a sweep's id, its name (all sweeps so called), or a run id.

    Should two drivers have begun a sweep in the same moment, the parent that was first is the sweep's.
    """
    begun = sorted(search(client, experiment, f"tags.{KIND} = 'sweep'"), key=lambda run: -run.info.start_time)
    runs = list({run.data.tags["sweep_id"]: run for run in begun}.values())
    if name is not None:
        runs = [r for r in runs if name in (r.data.tags["sweep_id"], r.data.tags["sweep"], r.info.run_id)]
    return sorted(runs, key=lambda run: -run.info.start_time)


def find_searches(client: MlflowClient, experiment: str) -> dict[str, tuple[Run, list[Run]]]:
    """Searches by run id: their own runs, and those of their points, each a sweep, oldest first."""
    found = {run.info.run_id: (run, list[Run]()) for run in search(client, experiment, f"tags.{KIND} = 'search'")}
    for point in reversed(find_sweeps(client, experiment)) if found else ():
        if point.data.tags.get(PARENT) in found:
            found[point.data.tags[PARENT]][1].append(point)
    return found


def last_runs(runs: Iterable[Run]) -> dict[str, Run]:
    """The latest run of each member."""
    return {run.data.tags["member_id"]: run for run in sorted(runs, key=lambda run: run.info.start_time)}


def find_sweep(client: MlflowClient, experiment: str, name: str) -> Run:
    """The newest parent run of that name. ValueError if there is none."""
    found = find_sweeps(client, experiment, name)
    if not found:
        known = sorted({run.data.tags["sweep_id"] for run in find_sweeps(client, experiment)})
        raise ValueError(f"sweep: {name!r} is not in the ledger; it must be one of {', '.join(known) or '(none yet)'}")
    return found[0]


def open_sweep(client: MlflowClient, uri: str, sweep: Sweep) -> Ledger:
    """The sweep's parent run, made or opened again, held by this driver. TrackingError if another driver holds it."""
    experiment = experiment_id(client, uri)
    found = find_sweeps(client, experiment, sweep.id)
    if found:
        parent = found[0]
        require_free(parent)
        previous, code = parent.data.tags.get("code_version"), code_version()
        if previous != code:
            client.set_tag(parent.info.run_id, "code_version", code)
        client.update_run(parent.info.run_id, status="RUNNING")
    else:
        tags = {
            KIND: "sweep",
            "sweep": sweep.name,
            "sweep_id": sweep.id,
            "system": system_name(sweep.system),
            "code_version": code_version(),
        }
        parent = client.create_run(experiment, tags=tags, run_name=sweep.id)
    place = Place(uri=uri, experiment=experiment, parent=parent.info.run_id)
    ledger = Ledger(client=client, place=place, driver=driver_name())
    client.log_dict(place.parent, encode(sweep), "sweep.json")
    share_view(client, place, sweep)
    ledger.start_beating()
    require_first(ledger, sweep)
    return ledger


def require_first(ledger: Ledger, sweep: Sweep) -> None:
    """Raise TrackingError if another driver has begun the sweep, or taken it up, in the same moment and holds it."""
    first = find_sweeps(ledger.client, ledger.place.experiment, sweep.id)[0]
    holder = first.data.tags.get("heartbeat", "").partition(" ")[2]
    own = first.info.run_id == ledger.place.parent
    if own and holder == ledger.driver:
        return
    ledger.lost = own  # then the other one says how it ends
    ledger.close("KILLED")
    if not own:
        ledger.client.delete_run(ledger.place.parent)  # nothing lies under it
    raise TrackingError(f"sweep {sweep.id} was begun by another driver in the same moment; wait for it")


def share_view(client: MlflowClient, place: Place, sweep: Sweep) -> None:
    """Store the view that `comparison_path` opens: this sweep's members as charts, grouped by its axes; without
    runs that were broken off.

    MLflow's pages keep a shared view as a tag of the experiment; parts left out stand at their defaults.
    """
    keys = [{"mode": "tag", "groupByData": name} for name in sweep.axis_names]
    view = {
        "searchFilter": f"tags.`{PARENT}` = '{place.parent}' and tags.{KIND} = 'member' and status != 'KILLED'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": keys},
    }
    client.set_experiment_tag(place.experiment, f"mlflow.sharedViewState.{place.parent}", json.dumps(view))


def comparison_path(place: Place) -> str:
    """The page of MLflow that compares the sweep's members, below the address of its server."""
    return f"/#/experiments/{place.experiment}/runs?viewStateShareKey={place.parent}&compareRunsMode=CHART"


def run_path(place: Place) -> str:
    """The page of MLflow of the parent run itself."""
    return f"/#/experiments/{place.experiment}/runs/{place.parent}"


@functools.cache
def process_space() -> str:
    """Names the machine since its last start, and the space of process numbers that this process sees there (that of a
    container, where it is in one). Empty where the system does not tell."""
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.blake2b(f"{boot} {space}".encode(), digest_size=4).hexdigest()


def driver_name() -> str:
    """Of this process, in heartbeats: host, process number, `process_space`, and something unique."""
    return f"{socket.gethostname()}:{os.getpid()}:{process_space()}:{uuid.uuid4().hex[:6]}"


def lives_here(driver: str, beat: float) -> bool | None:
    """Whether a driver that was heard at the Unix time `beat` is a living process of this very machine; False where it
    was one and is no more, None where that cannot be known from here.

    A host's name does not say as much: two containers may share it and have process numbers of their own. A process
    that was begun after the beat only has the number of the driver.
    """
    parts = driver.split(":")
    if len(parts) != 4 or not parts[2] or parts[2] != process_space():
        return None
    try:
        fields = Path(f"/proc/{int(parts[1])}/stat").read_text().rpartition(")")[2].split()
        dead = fields[0] in "ZX"  # Z: its parent has not asked how it ended
        return not dead and last_boot() + int(fields[19]) / os.sysconf("SC_CLK_TCK") < beat + SLACK
    except (OSError, ValueError, IndexError):  # hidden from us, where it is somebody else's: a signal of 0 is not
        return None if process_lives(parts[1]) else False


@functools.cache
def last_boot() -> float:
    """Unix time of the machine's last start, from which the kernel counts processes' times. ValueError if untold."""
    told = dict(line.split(maxsplit=1) for line in Path("/proc/stat").read_text().splitlines())
    return float(told.get("btime", ""))


def process_lives(number: str) -> bool:
    """Whether there is a process of this number, whoever's it is; True where that cannot be known."""
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def require_free(parent: Run) -> None:
    """Raise TrackingError while another driver holds the sweep: its process is not known to be gone, and its heartbeat
    is fresh. For another process that is seen to live on this machine, an hour is fresh."""
    beat = parent.data.tags.get("heartbeat", "")
    if not beat:
        return
    when, _, driver = beat.partition(" ")
    age, lives = time.time() - float(when), lives_here(driver, float(when))
    number = driver.split(":")[1] if lives else ""
    if lives is False or age >= (SILENT_AFTER if lives and number != str(os.getpid()) else DEAD_AFTER):
        return
    held = f"sweep {parent.data.tags['sweep_id']} is held by driver {driver} (heartbeat {age:.0f} s ago"
    if age < DEAD_AFTER:
        raise TrackingError(f"{held}); wait for it, or {DEAD_AFTER:.0f} s after its last heartbeat")
    raise TrackingError(
        f"{held}, but its process {number} lives on this machine); end that process, or wait until it has been silent "
        f"for {SILENT_AFTER / 60:.0f} min"
    )


def log_points(client: MlflowClient, run_id: str, points: Mapping[str, Mapping[int, float]], time_ms: int) -> None:
    """Aggregates of a parent run: by name, value by step (the width). Repeats at the same time are one point."""
    metrics = [Metric(name, value, time_ms, step) for name, series in points.items() for step, value in series.items()]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
