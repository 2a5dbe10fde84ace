"""`headway search`: Optuna decides, Ray Tune trains, MLflow is the ledger; each point is a sweep of seeds."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import socket
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import optuna
import ray
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster import tracking
from cluster.analysis import Analyst, read_tables
from cluster.arguments import parse, sweep_form
from cluster.dispatch import find_room, open_shelf, ray_cluster, run_points, settle_resources, slots
from cluster.display import LINE_EVERY, count, duration
from cluster.driver import Desk, Settings, require_writable
from cluster.encoding import encode
from cluster.figures import COLOURS, GREY, INK, TITLE, new_figure, plain, save
from cluster.pack import Pace, warn
from cluster.recipes import load_sweep
from cluster.searcher import (
    OBJECTIVES,
    UNTOLD,
    WIDTH,
    Direction,
    ObjectiveName,
    PruneStopper,
    Sampler,
    Space,
    StudySearcher,
    Verdict,
    finished,
    judge,
    make_sampler,
    parse_space,
    point_of,
    recover,
    require_feasible,
    require_one_point,
    require_prunable,
    without_pauses,
)
from cluster.sizing import Room, require_computable
from cluster.store import FolderStore, open_store
from cluster.sweep import Member, Sweep, digest, packs, validate, versions
from cluster.tracking import KIND, PARENT, Ledger, Place
from cluster.trial import Report, SearchContext, drop_checkpoints, forget_attempts, point_config
from sim import system_name
from sim.checks import require
from sim.generator import Generator
from train import checkpoint
from train.checkpoint import Files

SHOWN = 10  # points in the closing table
LEAST_COMPLETE = 4  # points below which fields have no importance
HELP = """Search config fields with Optuna. Every point is a sweep of several seeds at one setting, trained as one pack.

Points are parent runs in MLflow under one run of the search; the study lies in a database of its own, which
optuna-dashboard opens. The same command goes on where it was stopped, with more --points too. For example

  headway search quick --widths 32 --space train.learning_rate=1e-4..1e-2:log --points 20
  headway search quick --space model.width=16..128:log --space train.batch_size=16,32,64 --objective level seconds
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What is searched, for what, and how."""

    space: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field to search: NAME=LOW..HIGH[:log][:STEP] or NAME=VALUE,VALUE,...; may be given several times."""
    objective: tuple[ObjectiveName, ...] = ("level",)
    """What points are judged by: level of the best detector (a member without one counts as twice the last step),
    validation_loss (median), heads_that_matter (mean, the more the better), seconds. Several: their Pareto front."""
    points: int = 30
    """Points in all, those of earlier calls included. The number of seeds of each is --seeds."""
    sampler: Sampler = "tpe"
    """Optuna's sampler."""
    sampler_seed: int = 0
    """Of the sampler; members' seeds are their own."""
    prune: bool = False
    """Stop points early whose validation loss is above the median of the others at the same step (never in the first
    quarter of training, nor the first five points). For validation_loss alone."""
    study: str | None = None
    """Name of the study. Default: of the recipe, and a digest of all that makes its points."""
    storage: str | None = None
    """Optuna's database, apart from MLflow's. Default: optuna.db beside the output folder."""

    def __post_init__(self) -> None:
        require(self.points >= 1, "points", self.points, "at least 1")
        require(len(self.objective) > 0, "objective", self.objective, "at least one of " + ", ".join(OBJECTIVES))
        require(len(set(self.objective)) == len(self.objective), "objective", self.objective, "without repeats")
        named = self.study is None or (self.study != "" and "/" not in self.study)
        require(named, "study", self.study, "a non-empty name without /")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search whose every part has been checked. `source`: the recipe as the user named it."""

    source: str
    sweep: Sweep
    space: Space
    options: SearchOptions
    settings: Settings

    @classmethod
    def of(cls, source: str, sweep: Sweep, options: SearchOptions, settings: Settings) -> Search:
        """ValueError in one line where anything in it is not allowed."""
        require(not settings.redo, "redo", True, "left out: a search made anew has another --study")
        space = parse_space(options.space, sweep)
        require_one_point(sweep, space)
        if options.prune:
            require_prunable(options.objective, space)
        own = cls(source=source, sweep=replace(sweep, axes={}), space=space, options=options, settings=settings)
        require_feasible(own.sweep, space, own.name)
        return own

    @property
    def spec(self) -> dict[str, Any]:
        """What makes its points and their values, as JSON."""
        widths = None if any(item.name == WIDTH for item in self.space) else list(self.sweep.widths)
        return {
            "space": {item.param: optuna.distributions.distribution_to_json(item.distribution) for item in self.space},
            "objectives": list(self.options.objective),
            "sweep": {**encode(self.sweep), "widths": widths},
            "versions": versions(),
        }

    @property
    def name(self) -> str:
        """Of the study."""
        return self.options.study or f"{self.sweep.name}-search-{digest(self.spec)[:6]}"

    @property
    def directions(self) -> list[Direction]:
        """By objective."""
        return [OBJECTIVES[name].direction for name in self.options.objective]


def storage_url(settings: Settings, given: str | None, ledger: str) -> str:
    """Optuna's database: the one given, or `optuna.db` beside the output folder. ValueError if it is MLflow's."""
    out = settings.out.expanduser().absolute()
    url = tracking.resolve_uri(given or f"sqlite:///{out.parent / 'optuna.db'}")
    prefix = "sqlite:///"
    same = url == ledger or (
        url.startswith(prefix)
        and ledger.startswith(prefix)
        and Path(url.removeprefix(prefix)).resolve() == Path(ledger.removeprefix(prefix)).resolve()
    )
    require(not same, "storage", url, "a database of its own, not MLflow's")
    require("://" in url, "storage", url, "a database URL such as sqlite:///optuna.db or postgresql://...")
    return url


def open_study(search: Search, url: str) -> optuna.Study:
    """The study, made or opened again. ValueError if the database cannot be opened, or the study is another search."""
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
        known = search.name in optuna.study.get_all_study_names(storage)
    except Exception as error:  # any driver's own error: the database cannot be opened
        raise ValueError(f"storage: {url!r} cannot be opened ({str(error).strip().splitlines()[0]})") from error
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if search.options.prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=search.sweep.train.steps // 4)
    if known:
        study = optuna.load_study(study_name=search.name, storage=storage, pruner=pruner)
        found = study.user_attrs.get("search", search.spec)
        differs = [name for name, value in search.spec.items() if found.get(name) != value]
        require(
            not differs, "study", search.name,
            f"that of the same search (its {' and '.join(differs)} differ), or a new name with --study",
        )  # fmt: skip
    else:
        study = optuna.create_study(
            study_name=search.name, storage=storage, pruner=pruner, directions=search.directions
        )
    if "search" not in study.user_attrs:
        study.set_user_attr("search", search.spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(search.options.objective))  # for the dashboard; nothing here reads them
    study.sampler = make_sampler(search.options.sampler, search.options.sampler_seed, len(study.trials))
    return study


def driver_name() -> str:
    """Of this process, in heartbeats."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


@contextlib.contextmanager
def held_study(desk: Desk, search: Search, study: optuna.Study) -> Iterator[Ledger]:
    """The search's own run in MLflow, under which its points lie, held by this driver. TrackingError if another has it.

    The study names its run, so that it cannot go on with another ledger.
    """
    run = study.user_attrs.get("run")
    if run is None:
        tags = {KIND: "search", "sweep": study.study_name, "sweep_id": study.study_name}
        tags |= {"system": system_name(search.sweep.system), "code_version": tracking.code_version()}
        run = desk.client.create_run(desk.experiment, tags=tags, run_name=study.study_name).info.run_id
        study.set_user_attr("run", run)
    try:
        parent = desk.client.get_run(run)
    except MlflowException as error:
        allowed = "one whose points are in this ledger; another --tracking-uri has them, or --study names a new one"
        raise ValueError(f"study: {study.study_name!r} is not allowed; it must be {allowed}") from error
    tracking.require_free(parent)
    desk.client.update_run(run, status="RUNNING")
    place = Place(uri=desk.uri, experiment=parent.info.experiment_id, parent=run)
    ledger, status = Ledger(client=desk.client, place=place, driver=driver_name()), "FAILED"
    ledger.start_beating()
    try:
        if study.user_attrs["run"] != run:
            raise tracking.TrackingError(f"study {study.study_name} was begun by another driver in the same moment")
        yield ledger
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        ledger.close(status)


class Workshop:
    """Where points become sweeps in the ledger, and what came of them is looked up. `open`: those at work, by id."""

    def __init__(self, desk: Desk, search: Search, study: Ledger) -> None:
        self.search, self.study, self.settings = search, study, desk.settings
        root = desk.settings.store
        own = replace(desk.settings, store=f"{root.rstrip('/')}/{search.name}" if root else None)
        self.desk = replace(desk, out=desk.out / search.name, settings=own)
        self.open: dict[str, Ledger] = {}
        self.resources: Mapping[str, float] = {"CPU": 1.0}
        self.memory: Room | None = None

    def use(self, resources: Mapping[str, float]) -> None:
        """Train on this cluster from now on, a point with so much of it."""
        self.resources, self.memory = resources, find_room(resources)

    def room(self) -> int:
        """How many points can be trained at once."""
        self.study.require_held()
        return slots(self.resources)

    def point(self, params: Mapping[str, Any]) -> Sweep:
        """The sweep of a point. ValueError where no member can be built so."""
        return point_of(self.search.sweep, self.search.space, params, self.search.name)

    def identity(self, params: Mapping[str, Any]) -> str:
        """Its id."""
        sweep = self.point(params)
        for member in sweep.members():
            require_computable(member.config, "cuda" if "GPU" in self.resources else "cpu")
        return sweep.id

    def files(self, sweep: Sweep) -> Files:
        """Checkpoints of a point."""
        return open_store(self.desk.store(sweep))

    def begin(self, params: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """Open the point in the ledger; what is left of it, for a worker. None where every member is settled."""
        sweep = self.point(params)
        ledger = tracking.open_sweep(self.desk.client, self.desk.uri, sweep)
        try:
            tags = {PARENT: self.study.place.parent, "study": self.search.name, "optuna_trial": str(number)}
            shown = [Param(item.name, str(item.value(params))) for item in self.search.space]
            own = [RunTag(name, value) for name, value in tags.items()]
            self.desk.client.log_batch(ledger.place.parent, params=shown, tags=own)
            counted = ledger.settle(running_too=True)
            missing = [member for member in validate(sweep) if member.id not in counted]
            self.open[sweep.id] = ledger
            return self.left(sweep, missing, ledger.place) if missing else None
        except BaseException:
            self.open.pop(sweep.id, None)
            with contextlib.suppress(Exception):
                ledger.close("FAILED")
            raise

    def left(self, sweep: Sweep, missing: Sequence[Member], place: Place) -> dict[str, Any]:
        """The packs of members that are missing, from their furthest checkpoints: one, unless they differ in these."""
        files = self.files(sweep)
        forget_attempts(files)
        starts = checkpoint.latest_steps(checkpoint.manifests(files, versions(), warn))
        assert self.memory is not None
        cut = packs(missing, 1, self.settings.pack_size, starts, self.memory.most)
        return dict(point_config(sweep, cut, place, self.desk.store(sweep)))

    def end(self, params: Mapping[str, Any], pruned: bool = False) -> Verdict:
        """Close the point, and what came of it."""
        sweep = self.point(params)
        verdict = self.settle(sweep, self.open[sweep.id], pruned)
        del self.open[sweep.id]
        return verdict

    def settled(self, params: Mapping[str, Any]) -> Verdict | None:
        """The verdict on a point that no driver is at work on; None where members of it are missing."""
        sweep = self.point(params)
        found = tracking.find_sweeps(self.desk.client, self.desk.experiment, sweep.id)
        if not found:
            return None
        place = replace(self.study.place, parent=found[0].info.run_id)
        counted = tracking.counted(tracking.children(self.desk.client, place))
        if any(member.id not in counted for member in sweep.members()):
            return None
        return self.settle(sweep, Ledger(client=self.desk.client, place=place, driver=driver_name()), pruned=False)

    def require_free(self, trials: Sequence[FrozenTrial]) -> None:
        """Raise TrackingError if a driver is at work on one of these points."""
        for trial in trials:
            for parent in tracking.find_sweeps(self.desk.client, self.desk.experiment, self.point(trial.params).id):
                tracking.require_free(parent)

    def settle(self, sweep: Sweep, ledger: Ledger, pruned: bool) -> Verdict:
        """Judge a point by its runs, while no worker is at work on it, and end its own run."""
        counted, members = ledger.settle(running_too=True), sweep.members()
        runs = tracking.children(self.desk.client, ledger.place)
        missing = [member for member in members if member.id not in counted]
        flags = {"point": sweep.id, "run": ledger.place.parent, "interrupted": len(runs) > len(members)}
        if missing:
            last = tracking.last_runs(runs)
            causes = [last[each.id].data.tags.get("cause", "") for each in missing if each.id in last]
            cause = next(filter(None, causes), "its worker was stopped")
            verdict, status = Verdict(cause="pruned" if pruned else cause), "KILLED" if pruned else "FAILED"
        else:
            begun = Counter(run.data.tags["member_id"] for run in runs)
            rows = [self.row(counted[each.id], ledger.place, restarts=begun[each.id] - 1) for each in members]
            verdict, status = judge(self.search.options.objective, rows, sweep), "FINISHED"
            values = zip(self.search.options.objective, verdict.values or (), strict=True)
            at = counted[members[0].id].info.end_time or 0  # of the run, not of now: a repeat is the same point
            metrics = [Metric(name, value, at, 0) for name, value in values]
            self.desk.client.log_batch(ledger.place.parent, metrics=metrics)
        over = {member.id for member in members} if pruned else counted.keys()
        drop_checkpoints(self.files(sweep), over)
        ledger.close(status)
        return replace(verdict, attrs={**verdict.attrs, **flags})

    def row(self, run: Run, place: Place, restarts: int) -> Mapping[str, Any]:
        """A settled member's row, worked out as in the analysis of a sweep, but for its seconds."""
        if run.info.status != "FINISHED":
            return {"diverged": True}
        row = Analyst(place, self.search.sweep.system.relation).analyze(run.info.run_id)[1]
        if restarts and "seconds" in self.search.options.objective:
            times = read_tables(self.desk.client, run.info.run_id)[1]["wall_time"]
            row["seconds"] = without_pauses(times.tolist(), restarts)
        return row

    def leave(self) -> None:
        """Tell the truth of points that were at work when their workers were stopped."""
        for ledger in self.open.values():
            ledger.lost |= self.study.lost  # then another driver has them
            with contextlib.suppress(*UNTOLD):
                ledger.settle(running_too=True)
                ledger.close("KILLED")
        self.open.clear()


class Board:
    """What a user sees meanwhile: a line for each point, and a bar."""

    def __init__(self, console: Console, search: Search, study: optuna.Study) -> None:
        self.console, self.search, self.study, self.last_line = console, search, study, -math.inf
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.bar = self.bars.add_task("points", total=search.options.points, completed=finished(study))

    def __enter__(self) -> Board:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")

    def progress(self, report: Report) -> None:
        """A pack's report."""
        if report.note:
            self.console.print(f"[yellow]pack {report.pack}[/yellow] {escape(report.note)}")
        if not self.console.is_terminal and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            done = f"{finished(self.study):,} of {count(self.search.options.points, 'point')}"
            self.console.print(f"{done}; a pack at step {report.step:,}, loss {report.loss:.4f}")

    def verdict(self, number: int, verdict: Verdict) -> None:
        """What came of a point."""
        trial = self.study.get_trials(deepcopy=False)[number]
        where = " ".join(f"{item.name}={shown(item.value(trial.params))}" for item in self.search.space)
        if verdict.values is None:
            self.console.print(f"[yellow]point {number}[/yellow] {escape(where)}: {escape(verdict.cause)}")
        else:
            values = zip(self.search.options.objective, verdict.values, strict=True)
            said = ", ".join(f"{name} {shown(value)}" for name, value in values)
            self.console.print(f"point {number} {escape(where)}: {said}{escape(flags_of(verdict.attrs))}")
        self.bars.update(self.bar, completed=finished(self.study))


def shown(value: object) -> str:
    """Four digits of a number; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flags_of(attrs: Mapping[str, Any]) -> str:
    """` (1 never, 2 diverged)`, or nothing."""
    words = [f"{attrs[name]} {name}" for name in ("never", "diverged") if attrs.get(name)]
    words += ["interrupted"] if attrs.get("interrupted") else []
    return f" ({', '.join(words)})" if words else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search ended with. failed: points of this call without an outcome; folder: of figures and numbers."""

    study: optuna.Study
    url: str
    folder: Path
    command: str
    failed: int
    seconds: float


def run_search(search: Search, console: Console) -> Found:
    """Train points until the study has as many as it shall; figures and numbers on disk and in MLflow.

    Ctrl-C and failures leave a truthful ledger and study, and the same call goes on.
    """
    start = time.monotonic()
    desk = Desk.open(search.settings)
    if search.settings.store is not None:
        require_writable("store", search.settings.store)
    search.sweep.system.rows("train", 1, Generator.of("can it be made at all"))
    url = storage_url(search.settings, search.options.storage, desk.uri)
    study = open_study(search, url)
    with held_study(desk, search, study) as ledger, Board(console, search, study) as board:
        workshop, failed = Workshop(desk, search, ledger), 0
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        workshop.require_free([trial for trial in running if trial.params])
        told, again = recover(study, workshop.settled)
        if told or again:
            board.stage(f"of points that were at work, {told} are done by the ledger, {again} go on")
        if finished(study) < search.options.points:
            failed = train_points(search, study, workshop, board)
        board.stage("drawing figures")
        folder, command = desk.out / search.name, winner_command(search, study, desk)
        write_results(search, study, folder, url, command)
        for path in sorted(folder.iterdir()):
            if path.suffix in (".png", ".json"):
                desk.client.log_artifact(ledger.place.parent, str(path))
    seconds = time.monotonic() - start
    return Found(study=study, url=url, folder=folder, command=command, failed=failed, seconds=seconds)


def train_points(search: Search, study: optuna.Study, workshop: Workshop, board: Board) -> int:
    """Let Tune train what Optuna suggests. Returns how many points of this call failed."""
    board.stage("starting Ray")
    try:
        with ray_cluster(search.settings.address, search.settings.workers):
            workshop.use(settle_resources(search.settings.gpus))
            searcher = StudySearcher(study, search.space, search.options.points, workshop, board.verdict)
            context = SearchContext(
                shelf=open_shelf(),
                pace=Pace(checkpoint=search.settings.checkpoint_every),
                gpus=workshop.resources.get("GPU", 0.0),
                watched=search.options.prune,
            )
            board.stage(f"training points, {count(slots(workshop.resources), 'point')} at a time")
            stopper = PruneStopper(searcher) if search.options.prune else None
            run_points(context, workshop.resources, board.progress, searcher, stopper)
            return searcher.failed
    except ValueError as error:  # the input was good: this is a failure of the work
        if isinstance(error, tracking.TrackingError) or not ray.is_initialized():
            raise
        raise RuntimeError(f"the search was broken off by {error!r}") from error
    finally:
        ray.shutdown()
        workshop.leave()
        if not workshop.study.lost:
            with contextlib.suppress(*UNTOLD):  # the next call will tell
                recover(study, workshop.settled)


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with values."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best(search: Search, study: optuna.Study) -> list[FrozenTrial]:
    """All complete trials, best first; of several objectives the Pareto front, sorted by the first of them."""
    several = len(search.directions) > 1
    trials = study.best_trials if several and complete(study) else complete(study)
    sign = 1 if search.directions[0] == "minimize" else -1
    return sorted(trials, key=lambda trial: (sign * trial.values[0], trial.number))


def importances(search: Search, study: optuna.Study) -> dict[str, dict[str, float]] | str:
    """Share of an objective's variance that goes with each field, by objective; or why there is none."""
    trials = complete(study)
    if len(search.space) < 2:
        return "a single field is searched"
    if len(trials) < LEAST_COMPLETE:
        return f"{count(len(trials), 'complete point')}, fewer than {LEAST_COMPLETE}"
    found: dict[str, dict[str, float]] = {}
    for index, name in enumerate(search.options.objective):
        values = {trial.values[index] for trial in trials}
        if len(values) < 2:
            return f"all points have the same {name}"
        log = OBJECTIVES[name].log and min(values) > 0

        def target(trial: FrozenTrial, index: int = index, log: bool = log) -> float:
            return math.log(trial.values[index]) if log else float(trial.values[index])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            share = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
        found[name] = {item.name: float(share.get(item.param, 0.0)) for item in search.space}
    return found


def winner_command(search: Search, study: optuna.Study, desk: Desk) -> str:
    """The command that trains more seeds at the best point (by the first objective), beside those it has."""
    front = best(search, study)
    if not front:
        return ""
    winner = point_of(search.sweep, search.space, front[0].params, search.name)
    recipe = load_sweep(search.source)
    words = ["headway", "sweep"]
    if recipe.axes:  # a point has none, and no flag takes them away
        path = desk.out / search.name / "winner.json"
        FolderStore(path.parent).put(path.name, json.dumps(encode(winner), indent=1).encode())
        words += [str(path)]
    else:
        words += [search.source, *flags(encode(recipe), {**encode(winner), "seeds": recipe.seeds})]
    words += ["--seeds", str(max(8, 2 * winner.seeds))]
    for item in fields(Settings):
        value = getattr(search.settings, item.name)
        if value != item.default and item.name in ("tracking_uri", "address", "out", "store"):
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def flags(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Flags that turn one encoded config into the other."""
    words: list[str] = []
    for name, value in after.items():
        flag = f"--{prefix}{name.replace('_', '-')}"
        if value == before[name]:
            continue
        if isinstance(value, Mapping):
            words += flags(before[name], value, f"{prefix}{name.replace('_', '-')}.")
        elif isinstance(value, bool) and isinstance(before[name], bool):
            words += [flag if value else f"--{prefix}no-{name.replace('_', '-')}"]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def write_results(search: Search, study: optuna.Study, folder: Path, url: str, command: str) -> None:
    """`search.json` and the figures."""
    front = [trial.number for trial in best(search, study)]
    body = {
        "study": study.study_name,
        "storage": url,
        "sampler": search.options.sampler,
        **search.spec,
        "directions": search.directions,
        "best": front[:1] if len(search.directions) == 1 else front,
        "importance": importances(search, study),
        "command": command,
        "points": [
            {
                "number": trial.number,
                "state": trial.state.name,
                "fields": {item.name: item.value(trial.params) for item in search.space if item.param in trial.params},
                "values": trial.values if trial.state == TrialState.COMPLETE else None,
                **trial.user_attrs,
            }
            for trial in study.get_trials(deepcopy=False)
        ],
    }
    FolderStore(folder).put("search.json", json.dumps(body, indent=1).encode())
    if not complete(study):
        return
    drawn = {"history": draw_history(search, study), "slices": draw_slices(search, study)}
    if len(search.directions) == 2:
        drawn["pareto"] = draw_pareto(search, study)
    for name, figure in drawn.items():
        temporary = folder / f".{name}.png"
        save(figure, temporary)
        temporary.replace(folder / f"{name}.png")


def log_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """A log scale with plain numbers, also where it spans less than a decade."""
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    axis = ax.yaxis if which == "y" else ax.xaxis
    narrow = max(values) < 10 * min(values)
    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def value_axis(ax: Axes, search: Search, index: int, values: Sequence[float], which: str = "y") -> None:
    """Name and scale of an objective's axis."""
    objective = OBJECTIVES[search.options.objective[index]]
    log = objective.log and min(values) > 0
    if log:
        log_axis(ax, which, values)
    label = objective.text + (", log scale" if log else "")
    (ax.set_ylabel if which == "y" else ax.set_xlabel)(label, fontsize=9.5)


def draw_history(search: Search, study: optuna.Study) -> Figure:
    """Each objective by point (dots; open: some members took a worst value), and the best so far (line)."""
    trials, names = complete(study), search.options.objective
    figure, axes = new_figure(len(names), 1, 2.9 * len(names))
    figure.suptitle(f"{plain(study.study_name)}: points and the best so far", **TITLE)
    for index, ax in enumerate(axes[:, 0]):
        values = [trial.values[index] for trial in trials]
        better = min if search.directions[index] == "minimize" else max
        so_far = [better(values[: end + 1]) for end in range(len(values))]
        numbers = [trial.number for trial in trials]
        ax.step(numbers, so_far, where="post", color=COLOURS[0], lw=1.6)
        faces = [
            "white" if trial.user_attrs.get("never") or trial.user_attrs.get("diverged") else INK for trial in trials
        ]
        ax.scatter(numbers, values, s=26, c=faces, edgecolors=INK, linewidths=1.0, zorder=3)
        value_axis(ax, search, index, values)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("point (open: members without a detector, or diverged)", fontsize=9.5)
    return figure


def draw_slices(search: Search, study: optuna.Study) -> Figure:
    """Each objective against each field; darker points came later."""
    trials, names = complete(study), search.options.objective
    columns = min(len(search.space), 3)
    deep = math.ceil(len(search.space) / columns)
    figure, axes = new_figure(len(names) * deep, columns, 2.9 * len(names) * deep)
    figure.suptitle(f"{plain(study.study_name)}: objectives by field (darker: later)", **TITLE)
    for index in range(len(names)):
        values = [trial.values[index] for trial in trials]
        panels = list(axes[index * deep : (index + 1) * deep].flat)
        for spare in panels[len(search.space) :]:
            spare.set_visible(False)
        for ax, item in zip(panels, search.space, strict=False):
            x = [item.value(trial.params) for trial in trials]
            if isinstance(item.distribution, CategoricalDistribution):
                ax.set_xticks(range(len(item.ends)), list(map(str, item.ends)))
                x = [item.ends.index(value) for value in x]
                ax.set_xlim(-0.5, len(item.ends) - 0.5)
            elif item.log:
                log_axis(ax, "x", x)
            ax.scatter(x, values, c=range(len(trials)), cmap="Blues", vmin=-len(trials) / 2, s=30,
                       edgecolors=GREY, linewidths=0.8)  # fmt: skip
            value_axis(ax, search, index, values)
            ax.set_xlabel(item.name + (", log scale" if item.log else ""), fontsize=9.5)
    return figure


def draw_pareto(search: Search, study: optuna.Study) -> Figure:
    """Two objectives against each other, the front in colour."""
    figure, ((ax,),) = new_figure(1, 1, 4.2)
    figure.suptitle(f"{plain(study.study_name)}: Pareto front", **TITLE)
    every, front = complete(study), best(search, study)
    ax.scatter(*zip(*(trial.values for trial in every), strict=True), s=26, color=GREY)
    ax.step(*zip(*(trial.values for trial in front), strict=True), where="post", color=COLOURS[1], lw=1.2)
    ax.scatter(*zip(*(trial.values for trial in front), strict=True), s=36, color=COLOURS[1], zorder=3)
    for trial in front:
        ax.annotate(f" {trial.number}", trial.values, fontsize=8.5, color=INK, va="bottom")
    for index, which in enumerate("xy"):
        value_axis(ax, search, index, [trial.values[index] for trial in every], which)
    return figure


def show_found(console: Console, search: Search, found: Found) -> None:
    """The closing tables, and where to go from here."""
    names, front = search.options.objective, best(search, found.study)
    table = Table("point", *names, *(item.name for item in search.space), "worst values taken")
    table.title = "Pareto front" if len(names) > 1 else "best points"
    for trial in front[:SHOWN]:
        cells = [shown(item.value(trial.params)) for item in search.space]
        flagged = flags_of(trial.user_attrs).strip(" ()")
        table.add_row(str(trial.number), *map(shown, trial.values), *cells, flagged)
    console.print(table)
    share = importances(search, found.study)
    if isinstance(share, str):
        console.print(f"importance of fields: none ({share})")
    else:
        shares = Table("field", *share)
        shares.title = "importance: share of the objective's variance (fANOVA)"
        for item in search.space:
            shares.add_row(item.name, *(f"{share[name][item.name]:.0%}" for name in share))
        console.print(shares)
    states = [trial.state for trial in found.study.get_trials(deepcopy=False)]
    counts = {state.name.lower(): states.count(state) for state in TrialState if state in states}
    console.print(f"trials: {', '.join(f'{n} {name}' for name, n in counts.items())}; {duration(found.seconds)}")
    console.print(f"figures:   {found.folder}", soft_wrap=True)
    console.print(f"dashboard: optuna-dashboard {shlex.quote(found.url)}", soft_wrap=True)
    if found.command:
        console.print(f"more seeds at point {front[0].number}:\n  {found.command}", soft_wrap=True)


def search_form(default: Sweep) -> tuple[Any, Any]:
    """A dataclass with a flag for every field of the sweep, the settings and the search, and the default."""

    filled = sweep_form(default)[1]
    whole = tyro.conf.arg(name="")
    form = make_dataclass(
        "SearchForm",
        [
            ("sweep", Annotated[type(filled.sweep), whole]),
            ("settings", Annotated[Settings, whole]),
            ("search", Annotated[SearchOptions, whole], field(default_factory=SearchOptions)),
        ],
        kw_only=True,
    )
    return form, form(sweep=filled.sweep, settings=filled.settings)


def parse_search(arguments: Sequence[str]) -> Search:
    """A search from command-line arguments, the recipe first. ValueError in one line where anything is wrong."""

    default = load_sweep(arguments[0])
    form, filled = search_form(default)
    options = parse(form, arguments[1:], filled, f"headway search {arguments[0]}", HELP)
    values = {item.name: getattr(options.sweep, item.name) for item in fields(Sweep)}
    return Search.of(arguments[0], Sweep(**{**values, "axes": default.axes}), options.search, options.settings)


def search_command(arguments: Sequence[str], console: Console) -> int:
    """`headway search`."""
    if not arguments or arguments[0].startswith("-"):
        print(HELP)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    search = parse_search(arguments)
    found = run_search(search, console)
    show_found(console, search, found)
    return 1 if found.failed or finished(found.study) < search.options.points else 0
