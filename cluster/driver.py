"""The main job: from a sweep's config to its report, taking up whatever the ledger already has."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import ray
from mlflow import MlflowClient
from mlflow.entities import Run

from cluster import analysis as analyses
from cluster import tracking
from cluster.analysis import Analysis
from cluster.dispatch import alive, find_room, make_pools, ray_cluster, run_packs, settle_resources, slots
from cluster.geometry import with_tables
from cluster.nodes import Newcomers
from cluster.pack import Pace, drop_checkpoints, warn
from cluster.rehearsal import rehearse
from cluster.report import MemberData, require_replaceable, write_report
from cluster.sizing import require_computable
from cluster.store import open_store
from cluster.sweep import Member, Pack, Sweep, packs, validate, versions
from cluster.tracking import Ledger, Place
from cluster.trial import Report, TrialContext, forget_attempts
from sim.checks import require
from sim.generator import Generator
from train import checkpoint
from train.checkpoint import decode_arrays
from train.config import ModelConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where and how a sweep runs; nothing here changes a number."""

    tracking_uri: str | None = None
    """MLflow store or server. Default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in this folder."""
    address: str | None = None
    """Ray cluster. Default: RAY_ADDRESS, or a local one on this machine's cores."""
    out: Path = Path("headway-out")
    """Folder for reports and, unless `store` is given, checkpoints."""
    store: str | None = None
    """Folder or object-store URL for checkpoints; several nodes need one that all can reach."""
    workers: int | None = None
    """CPU cores of a local cluster, one for each pack at work. Default: all."""
    gpus: float | None = None
    """GPUs a pack takes, a fraction to share one. Default: 1 where the cluster has GPUs, else 0."""
    pack_size: int | None = None
    """Members trained together. Default: such that every worker has work, and no more than gain or fit (--dry-run)."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints of a running pack."""
    patience: float = 300.0
    """Seconds to wait for an MLflow server that is away, or for a node to train on, before the sweep is broken off."""
    redo: bool = False
    """Train members again that are done; their old runs leave the count. Broken off, the same command goes on."""

    def __post_init__(self) -> None:
        for name in ("gpus", "workers", "pack_size", "checkpoint_every", "patience"):
            value = getattr(self, name)
            allowed = value is None or (math.isfinite(value) and (value > 0 or (name, value) == ("gpus", 0)))
            require(allowed, name, value, "a finite number above 0")
        require(
            self.workers is None or self.address is None, "workers", self.workers, "left out where address is given"
        )


class Display(Protocol):
    """What a user sees while a sweep runs."""

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""

    def packs(self, packs: Sequence[Pack]) -> None:
        """These packs will be trained."""

    def progress(self, report: Report) -> None:
        """A pack has come to a step, has failed for good, or does not go as planned."""

    def analyzed(self, done: int, total: int) -> None:
        """Members analysed so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a sweep ended with. failed: how many members are left without a settled run."""

    place: Place
    analysis: Analysis
    report: Path
    trained: int
    failed: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """Everything a command needs of the outside, checked before anything starts."""

    client: MlflowClient
    uri: str
    out: Path
    settings: Settings = field(default_factory=Settings)

    @classmethod
    def open(cls, settings: Settings, make: bool = True) -> Desk:
        """Connect to the store and try the output folder. ValueError in one line if either fails."""
        out, uri = settings.out.expanduser().absolute(), tracking.resolve_uri(settings.tracking_uri)
        if make:  # neither a store nor a folder is made where the other cannot be
            require_writable("out", out)
        client = tracking.connect(uri, make)
        require_writable("out", out)
        return cls(client=client, uri=uri, out=out, settings=settings)

    @property
    def experiment(self) -> str:
        """MLflow's id of the experiment that holds all sweeps."""
        return tracking.experiment_id(self.client, self.uri)

    def store(self, sweep: Sweep) -> str:
        """Where the sweep's checkpoints lie."""
        root = self.settings.store
        return f"{root.rstrip('/')}/{sweep.id}" if root else str(self.out / sweep.id)


def require_writable(name: str, url: str | Path) -> None:
    """Raise ValueError unless a file can be written and deleted there."""
    try:
        files = open_store(url)
        files.put(".probe", b"")
        files.delete(".probe")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{name}: {str(url)!r} cannot be written ({reason})") from error


def run_sweep(sweep: Sweep, settings: Settings, display: Display) -> Outcome:
    """Train what is missing, analyse everything, write the report. Ctrl-C and failures leave a truthful ledger."""
    members = validate(sweep)
    desk = Desk.open(settings)
    if settings.store is not None:
        require_writable("store", settings.store)
    require_replaceable(desk.out / sweep.id / "report")
    for config in {replace(member.config, model=ModelConfig(), train=TrainConfig(), seed=0) for member in members}:
        config.system.rows("train", 1, Generator.of("can it be made at all"))
    rehearse(members)
    redo = ""
    for parent in tracking.find_sweeps(desk.client, desk.experiment, sweep.id):
        tracking.require_free(parent)
        warn_of_code(parent)
        redo = parent.data.tags.get(REDO, "")
    display.stage("starting Ray")
    with ray_cluster(settings.address, settings.workers):
        newcomers = Newcomers(settings, alive)
        resources = settle_resources(settings.gpus)
        for member in members:
            require_computable(member.config, "cuda" if "GPU" in resources else "cpu")
        with held_ledger(desk, sweep) as ledger:
            return _run(Job(desk, sweep, members, ledger, resources, display, redo, newcomers))


@contextmanager
def held_ledger(desk: Desk, sweep: Sweep) -> Iterator[Ledger]:
    """The sweep's ledger; at the end the workers are stopped first, then runs they left behind are told truthfully."""
    ledger, status = tracking.open_sweep(desk.client, desk.uri, sweep), "FAILED"
    try:
        yield ledger
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    except ValueError as error:  # the input was good: this is a failure of the work
        raise RuntimeError(f"the sweep was broken off by {error!r}") from error
    finally:
        ray.shutdown()
        ledger.end(status, functools.partial(ledger.settle, running_too=True))


@dataclass(frozen=True, slots=True)
class Job:
    """One call of `run_sweep` on its way. redo: what the tag `REDO` said at its beginning.
    newcomers: looks at nodes that have joined."""

    desk: Desk
    sweep: Sweep
    members: Sequence[Member]
    ledger: Ledger
    resources: Mapping[str, float]
    display: Display
    redo: str = ""
    newcomers: Callable[[], None] = lambda: None


def _run(job: Job) -> Outcome:
    start = time.monotonic()
    if job.desk.settings.redo:
        retire(job)
    counted, last = settled(job)
    missing = [member for member in job.members if member.id not in counted]
    if missing:
        counted, last = train(job, missing)
    lost = {member.id for member in job.members} - counted.keys()
    if not lost and (job.redo or job.desk.settings.redo):
        job.desk.client.delete_tag(job.ledger.place.parent, REDO)
    over = [run for member, run in last.items() if member not in counted]  # FAILED, or KILLED by now
    analysis, report = tracking.patiently(
        lambda: analyze(job.desk, job.sweep, job.ledger.place, counted, over, job.display),
        job.desk.uri,
        job.desk.settings.patience,
    )
    return Outcome(
        place=job.ledger.place,
        analysis=analysis,
        report=report,
        trained=len(missing) - len(lost),
        failed=len(lost),
        seconds=time.monotonic() - start,
    )


def settled(job: Job) -> tuple[dict[str, Run], dict[str, Run]]:
    """The run that counts for each settled member, and the last of every member as it was found; all others are told
    truthfully. One look-up. No worker may be at work."""

    def settle() -> tuple[dict[str, Run], dict[str, Run]]:
        runs = tracking.children(job.ledger.client, job.ledger.place)
        return job.ledger.settle_runs(runs, running_too=True), tracking.last_runs(runs)

    return tracking.patiently(settle, job.desk.uri, job.desk.settings.patience)


def analyze(
    desk: Desk, sweep: Sweep, place: Place, counted: Mapping[str, Run], lost: Sequence[Run], display: Display
) -> tuple[Analysis, Path]:
    """Tables over all counted members, and over those of which every run failed (`lost`: the last); and the report."""
    display.stage("analysing heads")
    analysis = analyses.analyze_sweep(desk.client, place, sweep, counted, lost, display.analyzed)
    display.stage("writing the report")
    return analysis, make_report(desk, sweep, place, analysis)


def analyze_again(desk: Desk, parent: Run, sweep: Sweep, display: Display) -> Outcome:
    """Analysis and report of what the ledger has, whether or not a driver is at work."""
    start = time.monotonic()
    place = Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    runs = tracking.children(desk.client, place)
    counted, last = tracking.counted(runs), tracking.last_runs(runs)
    lost = [run for member, run in last.items() if member not in counted and run.info.status in ("FAILED", "KILLED")]
    with ray_cluster(desk.settings.address, desk.settings.workers):
        analysis, report = analyze(desk, sweep, place, counted, lost, display)
    return Outcome(place=place, analysis=analysis, report=report, trained=0, failed=0, seconds=time.monotonic() - start)


REDO = "redo_since"  # tag of a sweep that is being trained again: since when (ms), by which code


def retire(job: Job) -> None:
    """Take the runs of this sweep's members out of the count, and drop their checkpoints. Where that has been broken
    off, and the code is the same, those begun since then are kept."""
    client, parent, now = job.desk.client, job.ledger.place.parent, tracking.code_version()
    since, _, code = job.redo.partition(" ")
    if code != now:
        files = open_store(job.desk.store(job.sweep))
        for manifest in checkpoint.manifests(files, versions(), warn):
            checkpoint.remove(files, manifest.name)
        since = str(tracking.now_ms())
        client.set_tag(parent, REDO, f"{since} {now}")
    wanted = {member.id for member in job.members}
    for run in tracking.children(client, job.ledger.place):
        before = run.info.start_time < int(since)
        if before and run.data.tags["member_id"] in wanted and tracking.is_settled(run):
            tracking.supersede(client, run.info.run_id, "redo")


def train(job: Job, missing: Sequence[Member]) -> tuple[dict[str, Run], dict[str, Run]]:
    """Pack what is missing, from the furthest checkpoints, and run the packs; what is `settled` then."""
    store = job.desk.store(job.sweep)
    files = open_store(store)
    forget_attempts(files)
    starts = checkpoint.latest_steps(checkpoint.manifests(files, versions(), warn))
    cut = packs(missing, slots(job.resources), job.desk.settings.pack_size, starts, find_room(job.resources).most)
    job.display.stage("making the pool of examples")
    pools = make_pools(pack.config for pack in cut)
    job.display.packs(cut)
    context = TrialContext(
        packs=cut,
        pools=pools,
        place=job.ledger.place,
        store=store,
        pace=Pace(checkpoint=job.desk.settings.checkpoint_every),
        gpus=job.resources.get("GPU", 0.0),
        patience=job.desk.settings.patience,
    )

    def watch() -> None:
        job.newcomers()
        job.ledger.require_held()
        job.ledger.require_heard(context.patience)

    run_packs(context, job.resources, job.display.progress, watch)
    counted, last = settled(job)
    drop_checkpoints(files, counted.keys())
    return counted, last


def warn_of_code(parent: Run) -> None:
    """Say so where the sweep was begun by other code."""
    known, now = parent.data.tags.get("code_version"), tracking.code_version()
    if known != now:
        warn(f"this sweep was last run by code {known}, now {now}; members done are kept (--redo trains them again)")


def load_member(client: MlflowClient, run_id: str) -> MemberData:
    """A finished member's tables and kept weights."""
    curves, figures = analyses.read_tables(client, run_id)
    with tempfile.TemporaryDirectory() as folder:
        weights = decode_arrays(Path(client.download_artifacts(run_id, "weights.npz", folder)).read_bytes())
    return MemberData(curves=curves, figures=figures, weights=weights)


def make_report(desk: Desk, sweep: Sweep, place: Place, analysis: Analysis) -> Path:
    """Write the report on disk and put it up as artifacts of the parent run."""
    analysis = with_tables(desk.client, place.parent, sweep, analysis)
    folder = desk.out / sweep.id / "report"
    links = {"MLflow": comparison_hint(desk, place)}
    path = write_report(folder, sweep, analysis, lambda run_id: load_member(desk.client, run_id), links)
    desk.client.log_artifacts(place.parent, str(folder), "report")
    return path


def comparison_hint(desk: Desk, place: Place) -> str:
    """The link to the comparison on a server, or the command that opens one on a local store."""
    if desk.uri.startswith("http"):
        return tracking.page_base(desk.uri) + tracking.comparison_path(place)
    return f"headway ui --tracking-uri {tracking.shown(desk.uri)}"
