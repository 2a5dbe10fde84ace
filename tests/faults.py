"""Faults for a real sweep in processes of its own, and what the ledger, tables and the workers' own notes say after.

A sweep runs as `headway sweep` does, but for a meter around its trainable: every attempt at a pack notes its process,
its members, the step it begins at, every step it comes to and every checkpoint it keeps, in a file that outlives it.
It may leave out analysis and report, which take longer than the training of a few short members.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from cluster import tracking
from cluster.analysis import Analysis
from cluster.sweep import Pack
from cluster.trial import TrialContext, train_pack
from train.checkpoint import decode_arrays

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["tiny", "--widths", "8", "--data.rows", "128", "--data.validation-rows", "16", "--probe.examples", "8",
         "--probe.sparse-examples", "4", "--probe.replicates", "2", "--model.layers", "1", "--model.heads", "2",
         "--system.box.n", "6", "--system.box.radius", "0.1", "--checkpoint-every", "0.5"]  # fmt: skip
UNTOLD = "untold-sweep"
SERVER_START = 90.0  # seconds for an MLflow server to answer


# ---- the meter, on a worker


def metered_pack(config: Mapping[str, Any], context: TrialContext) -> None:
    """The trainable of a sweep, with every attempt noted in the folder `meter` beside its checkpoints."""
    from cluster import trial

    if not hasattr(trial.run_pack, "folder"):
        trial.run_pack = Metered(trial.run_pack, Path(context.store) / "meter")  # type: ignore[assignment]
    train_pack(config, context)


class Metered:
    """`run_pack`, under which every `PackRun` writes a `Meter`."""

    def __init__(self, real: Callable[..., None], folder: Path) -> None:
        from cluster import pack

        self.real, self.folder = real, folder
        folder.mkdir(parents=True, exist_ok=True)
        began = pack.PackRun.__init__

        def begin(run: Any, of: Pack, pool: Any, probes: Any, sink: Any, pace: Any = None) -> None:
            began(run, of, pool, probes, sink, pace)
            note_steps(folder / f"{time.time():.6f}-{uuid.uuid4().hex[:6]}", run)

        pack.PackRun.__init__ = begin  # type: ignore[method-assign]

    def __call__(self, *arguments: Any) -> None:
        """Run the pack."""
        self.real(*arguments)


def note_steps(path: Path, run: Any) -> None:
    """Have the attempt note what it comes to: written at once, so that a killed one has told too."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    header = {
        "pid": os.getpid(),
        "born": born(os.getpid()),
        "members": [m.id for m in run.pack.members],
        "start": run.trainer.state.step,
    }
    os.write(file, json.dumps(header).encode() + b"\n")
    trainer, sink, advance, save = run.trainer, run.sink, run.trainer.advance, run.sink.save

    def advanced(count: int = 1) -> None:
        advance(count)
        os.write(file, f"{trainer.state.step}\n".encode())

    def saved(pack: Pack, state: Any, curves: Any) -> None:
        save(pack, state, curves)
        if pack is run.pack:
            os.write(file, f"kept {state.step} {pack.id}-{state.step:09d} {time.time():.6f}\n".encode())

    trainer.advance, sink.save = advanced, saved


@dataclass(kw_only=True)
class Attempt:
    """What a meter has noted. born: of its process (see `born`); kept: (step, name, Unix seconds) of checkpoints."""

    pid: int
    born: int
    members: list[str]
    begun: float
    start: int
    last: int
    kept: list[tuple[int, str, float]]

    @property
    def alive(self) -> bool:
        """Whether its process is; not another one that has been given its number."""
        return self.born == born(self.pid) > 0

    @classmethod
    def read(cls, path: Path) -> Attempt | None:
        """None for one that is only just being made."""
        lines = path.read_text().splitlines()
        if not lines:
            return None
        last, kept = 0, []
        for words in map(str.split, lines[1:]):
            if words[0] == "kept":
                kept.append((int(words[1]), words[2], float(words[3])))
            else:
                last = int(words[0])
        header = json.loads(lines[0])
        return cls(**header | {"begun": float(path.name.partition("-")[0]), "last": last or header["start"]}, kept=kept)


# ---- a sweep in a folder


@dataclass(kw_only=True)
class Scene:
    """A sweep in a folder of its own. server: an MLflow server that it logs to; address: of a Ray cluster, or else
    workers: of one that it starts.

    blank: an empty MLflow store to begin with; told: with analysis and report.
    """

    folder: Path
    members: int
    steps: int
    pack_size: int = 8
    server: Server | None = None
    address: str | None = None
    workers: int = 2
    more: Sequence[str] = ()
    blank: Path | None = None
    told: bool = True
    logs: dict[int, Path] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        """The folder of the ledger's SQLite file and artifacts."""
        return self.server.folder if self.server else self.folder

    @property
    def command(self) -> list[str]:
        """Of the sweep; the same every time."""
        own = ["--seeds", self.members, "--train.steps", self.steps, "--pack-size", self.pack_size]
        place = ["--address", self.address] if self.address else ["--workers", self.workers]
        server = ["--tracking-uri", self.server.uri] if self.server else []
        start = [sys.executable, "-m", "tests.faults", "sweep" if self.told else UNTOLD]
        return [*start, *SHORT, *map(str, [*own, *place, *server]), *self.more]

    def start(self) -> subprocess.Popen[str]:
        """The sweep, in a session of its own; what it says goes to a log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.blank and not (self.folder / "mlflow.db").exists():
            shutil.copy(self.blank, self.folder)
        path = self.folder / f"log-{len(self.logs)}"
        with path.open("w") as log:
            streams = {"stdout": log, "stderr": log, "text": True}
            process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment(), start_new_session=True, **streams
            )
        self.logs[process.pid] = path
        return process

    def end(self, process: subprocess.Popen[str], seconds: float = 900.0, code: int = 0) -> str:
        """Wait for its end. Its last words; AssertionError for another exit code, or a traceback."""
        try:
            found = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        said = self.logs[process.pid].read_text()
        assert found == code, f"exit code {found}, not {code}: {said[-3000:]}"
        assert "\nTraceback" not in said, said[-3000:]
        return said

    def run(self, code: int = 0) -> str:
        """The sweep, from the start to its end."""
        return self.end(self.start(), code=code)

    # -- what it is at

    @property
    def store(self) -> Path:
        """Where its checkpoints and meters lie."""
        return next(iter(self.folder.glob("headway-out/tiny-*")))

    def attempts(self) -> list[Attempt]:
        """All attempts at packs so far, the earliest first."""
        paths = sorted(self.folder.glob("headway-out/tiny-*/meter/*"), key=lambda path: float(path.name.split("-")[0]))
        return [attempt for path in paths if (attempt := Attempt.read(path)) is not None]

    def busy(self) -> list[Attempt]:
        """The attempts of workers that are alive and in the middle of a pack."""
        latest = {attempt.pid: attempt for attempt in self.attempts()}
        return [a for a in latest.values() if a.last < self.steps and a.alive]

    def query(self, text: str) -> list[tuple[Any, ...]]:
        """Rows of the ledger's database."""
        path = self.ledger / "mlflow.db"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as base:
            try:
                return base.execute(text).fetchall()
            except sqlite3.OperationalError:  # it has no tables yet
                return []

    def finished(self) -> list[str]:
        """Members of runs that are FINISHED, one entry a run."""
        return [row[0] for row in self.query(
            "SELECT t.value FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'member_id' "
            "WHERE r.status = 'FINISHED'"
        )]  # fmt: skip


def environment() -> dict[str, str]:
    """Of every process of a sweep."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return {**kept, **own, "RAY_worker_niceness": "0"}  # Ray's 15 would leave them next to nothing on a busy machine


def status_of(pid: int) -> list[str]:
    """The words of /proc/PID/stat from the state on; none for a process that is no more."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if words[0] in "ZX" else words


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it is no more."""
    return int((status_of(pid) or ["", "0"])[1])


def born(pid: int) -> int:
    """When a process began, in ticks since the machine did; 0 if it is no more."""
    words = status_of(pid)
    return int(words[19]) if words else 0


def members_of(group: int) -> list[int]:
    """The processes of a group that are alive."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if (words := status_of(pid)) and int(words[2]) == group]


def wait_for(condition: Callable[[], Any], seconds: float, process: subprocess.Popen[str] | None = None) -> Any:
    """What the condition answers once that is true; AssertionError if it is not in time, or the process has ended."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        assert process is None or process.poll() is None, "the sweep has ended"
        time.sleep(0.05)
    return answer


# ---- what is around it


class Server:
    """`headway server` on a port of its own; may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = ["--folder", str(self.folder), "--port", str(self.port)]
        command = [sys.executable, "-m", "cluster.cli", "server", *place]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        wait_for(self.answers, SERVER_START)

    def answers(self) -> bool:
        """Whether it does."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def end(self) -> str:
        """Tell it to end, and wait until all of its processes have. What it has said."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        wait_for(lambda: not members_of(self.process.pid), 30)
        return (self.folder / "log").read_text()

    def kill(self) -> None:
        """Kill it and all of its processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


@contextlib.contextmanager
def ray_nodes(count: int, **system: Any) -> Iterator[Any]:
    """A Ray cluster of processes here: a head without a CPU, and nodes of one CPU and one pretended GPU each."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(environment())
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def add_node(cluster: Any) -> Any:
    """One more node of `ray_nodes`."""
    return cluster.add_node(num_cpus=1, num_gpus=1)


# ---- faults


def kill_workers(
    scene: Scene,
    process: subprocess.Popen[str],
    times: int,
    chance: random.Random,
    pause: tuple[float, float] = (1.0, 4.0),
) -> int:
    """SIGKILL a worker in the middle of a pack, at random moments, until it was done so often or the sweep is over.

    Three of four have kept a checkpoint: a pack whose workers die again and again before they have is given up. pause:
    the least and the most seconds between two.
    """
    done = 0
    while done < times and process.poll() is None:
        time.sleep(chance.uniform(*pause))
        if busy := [attempt for attempt in scene.busy() if attempt.kept or done % 4 == 0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(busy).pid, signal.SIGKILL)
                done += 1
    return done


def under_way(scene: Scene, process: subprocess.Popen[str], since: float, kept: int = 1) -> None:
    """Wait until a worker has kept so many checkpoints since then (Unix seconds) and is in the middle of a pack."""

    def some() -> bool:
        fresh = [a for a in scene.busy() if a.begun > since]
        return sum(len(attempt.kept) for attempt in fresh) >= kept

    wait_for(some, 180, process)


@contextlib.contextmanager
def standing_still(scene: Scene) -> Iterator[None]:
    """SIGSTOP the workers in the middle of a pack, and have them go on at the end: so long the sweep is not over."""
    pids = [attempt.pid for attempt in scene.busy()]
    assert pids, "no worker is in the middle of a pack"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL the driver alone."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def flip(path: Path, chance: random.Random, count: int = 1) -> None:
    """Flip bits of random bytes of a file."""
    content = bytearray(path.read_bytes())
    for place in chance.sample(range(len(content)), count):
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    """Leave half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def newest_checkpoints(scene: Scene) -> list[Path]:
    """The newest manifest of every pack."""
    found = {path.name.rpartition("-")[0]: path for path in sorted(scene.store.glob("checkpoints/*.json"))}
    return list(found.values())


def stop_while_ending(scene: Scene, process: subprocess.Popen[str]) -> Attempt:
    """SIGSTOP a worker, and its node's raylet, while it ends its members' runs one after another."""

    def ending() -> Attempt | None:
        done = set(scene.finished())
        for attempt in scene.attempts():
            told = sum(member in done for member in attempt.members)
            if attempt.last == scene.steps and 0 < told < len(attempt.members) - 1 and attempt.alive:
                return attempt
        return None

    attempt: Attempt = wait_for(ending, 300, process)
    os.kill(attempt.pid, signal.SIGSTOP)
    os.kill(parent_of(attempt.pid), signal.SIGSTOP)
    return attempt


# ---- what is left


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a sweep's ledger, tables and meters say.

    once: members with one FINISHED run, the one that counts. running: runs left RUNNING, the parent too. duplicates:
    points of MLflow and rows of curves that stand more than once. same: members whose tables and weights are those of
    the reference bit for bit. again: attempts at members that were done before. extra: member-steps trained more than
    once. beyond: those of them that lay before the furthest sound checkpoint. most_runs: of one member.
    """

    members: int
    once: int
    running: int
    duplicates: int
    same: int
    again: int
    extra: int
    beyond: int
    most_runs: int

    @property
    def sound(self) -> bool:
        """Whether the faults have left no trace."""
        whole = self.once == self.same == self.members
        return whole and not (self.running or self.duplicates or self.again or self.beyond)


def inspect(scene: Scene, reference: Mapping[str, str], spoiled: Sequence[str] = ()) -> Report:
    """Look at everything a sweep has left. reference: `tables_of` an undisturbed one; spoiled: names of checkpoints."""
    uri = f"sqlite:///{scene.ledger}/mlflow.db"
    client = tracking.connect(uri)
    experiment = tracking.experiment_id(client, uri)
    (parent,) = tracking.find_sweeps(client, experiment)
    runs = tracking.children(client, tracking.Place(uri=uri, experiment=experiment, parent=parent.info.run_id))
    counted = tracking.counted(runs)
    finished = Counter(run.data.tags["member_id"] for run in runs if run.info.status == "FINISHED")
    tables, repeats = tables_of(scene)
    points = scene.query("SELECT count(*) FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1")
    attempts = scene.attempts()
    ended = {member: run.info.end_time / 1000 for member, run in counted.items()}
    again = [m for a in attempts for m in a.members if a.begun > ended.get(m, float("inf"))]
    trained = sum(len(attempt.members) * (attempt.last - attempt.start) for attempt in attempts)
    return Report(
        members=scene.members,
        once=sum(finished[m] == 1 and run.info.status == "FINISHED" for m, run in counted.items()),
        running=len(scene.query("SELECT 1 FROM runs WHERE status = 'RUNNING'")),
        duplicates=len(points) + repeats,
        same=sum(reference.get(member) == digest for member, digest in tables.items()),
        again=len(again),
        extra=trained - scene.members * scene.steps,
        beyond=sum(lost_before(attempts, attempt, spoiled) for attempt in attempts),
        most_runs=max(Counter(run.data.tags["member_id"] for run in runs).values()),
    )


def lost_before(attempts: Sequence[Attempt], attempt: Attempt, spoiled: Sequence[str]) -> int:
    """Member-steps between where an attempt began and where its members' checkpoints stood at that moment."""
    total = 0
    for member in attempt.members:
        kept = [
            step
            for other in attempts
            for step, name, when in other.kept
            if member in other.members and when < attempt.begun and name not in spoiled
        ]
        total += max([0, *(step - attempt.start for step in kept)])
    return total


def tables_of(scene: Scene) -> tuple[dict[str, str], int]:
    """A digest of the counted run's tables (without wall times) and weights by member; how many rows are repeats."""
    uri = f"sqlite:///{scene.ledger}/mlflow.db"
    client = tracking.connect(uri)
    experiment = tracking.experiment_id(client, uri)
    (parent,) = tracking.find_sweeps(client, experiment)
    place = tracking.Place(uri=uri, experiment=experiment, parent=parent.info.run_id)
    found, repeats = {}, 0
    for member, run in tracking.counted(tracking.children(client, place)).items():
        folder = next(path for path in scene.ledger.rglob(run.info.run_id) if (path / "artifacts").is_dir())
        content = hashlib.sha256()
        for name in ("curves", "figures"):
            table = pq.read_table(folder / "artifacts" / f"{name}.parquet").to_pandas()
            keys = [key for key in ("step", "probe", "relation", "layer", "head", "replicate") if key in table]
            repeats += int(table.duplicated(keys).sum())
            for column in sorted(set(table) - {"wall_time"}):
                values = table[column].to_numpy()
                content.update(f"{name} {column} {values.dtype}".encode())
                content.update("\n".join(values).encode() if values.dtype.kind in "OTU" else values.tobytes())
        for name, array in sorted(decode_arrays((folder / "artifacts" / "weights.npz").read_bytes()).items()):
            content.update(name.encode() + array.tobytes())
        found[member] = content.hexdigest()
    return found, repeats


def main() -> None:
    """`headway`, with its sweeps metered; `untold-sweep` is a sweep that ends once all is trained and settled."""
    from cluster import cli, dispatch, driver

    dispatch.train_pack = metered_pack
    if sys.argv[1] == UNTOLD:
        sys.argv[1] = "sweep"
        driver.analyze = tell_nothing
    sys.exit(cli.main())


def tell_nothing(*what: object) -> tuple[Analysis, Path]:
    """In place of a sweep's analysis and report."""
    nothing = pd.DataFrame({"outcome": []})
    return Analysis(heads=nothing, members=nothing, widths=nothing), Path("no report")


if __name__ == "__main__":
    from tests.faults import main as importable_main  # workers find the trainable by its module

    importable_main()
