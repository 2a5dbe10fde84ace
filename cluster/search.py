"""`headway search`: Optuna decides, Ray Tune trains, MLflow is the ledger; each point is a sweep of seeds."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
import ray
from mlflow.exceptions import MlflowException
from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from cluster import tracking
from cluster.arguments import STORAGE
from cluster.dispatch import alive, open_shelf, ray_cluster, run_points, settle_resources, slots
from cluster.display import LINE_EVERY, Live, count, loss_text
from cluster.driver import Desk, Settings, require_writable
from cluster.figures import save
from cluster.nodes import Newcomers
from cluster.objectives import Verdict
from cluster.pack import Pace
from cluster.rehearsal import rehearse
from cluster.search_config import HELP, Search, parse_search
from cluster.search_figures import draw_history, draw_pareto, draw_slices
from cluster.search_results import (
    Found,
    best,
    complete,
    flags_of,
    importances,
    show_found,
    shown,
    winner_command,
)
from cluster.searcher import UNTOLD, PruneStopper, StudySearcher, finished, is_chosen, make_sampler, recover
from cluster.space import possible_point
from cluster.store import FolderStore
from cluster.tracking import KIND, Ledger, Place
from cluster.trial import Report, SearchContext
from cluster.workshop import Workshop
from sim import system_name
from sim.checks import require
from sim.generator import Generator


def storage_url(settings: Settings, given: str | None, ledger: str) -> str:
    """Optuna's database: the one given, or HEADWAY_STORAGE, or `optuna.db` beside the output folder. ValueError if it
    is MLflow's."""
    out = settings.out.expanduser().absolute()
    url = tracking.resolve_uri(given or os.environ.get(STORAGE) or f"sqlite:///{out.parent / 'optuna.db'}")
    prefix = "sqlite:///"
    same = url == ledger or (
        url.startswith(prefix)
        and ledger.startswith(prefix)
        and Path(url.removeprefix(prefix)).resolve() == Path(ledger.removeprefix(prefix)).resolve()
    )
    require(not same, "storage", tracking.shown(url), "a database of its own, not MLflow's")
    require("://" in url, "storage", url, "a database URL such as sqlite:///optuna.db or postgresql://...")
    return url


def open_study(search: Search, url: str) -> optuna.Study:
    """The study, made or opened again. ValueError if the database cannot be opened, or the study is another search."""
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
        known = search.name in optuna.study.get_all_study_names(storage)
    except Exception as error:  # any driver's own error: the database cannot be opened
        raise ValueError(
            f"storage: {tracking.shown(url)!r} cannot be opened ({str(error).strip().splitlines()[0]})"
        ) from error
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
    ledger, status = Ledger(client=desk.client, place=place, driver=tracking.driver_name()), "FAILED"
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
        ledger.end(status)


class Board(Live):
    """What a user sees meanwhile: a line for each point, and a bar."""

    def __init__(self, console: Console, search: Search, study: optuna.Study) -> None:
        super().__init__(console, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.search, self.study = search, study
        self.bar = self.bars.add_task("points", total=search.options.points, completed=finished(study))

    def progress(self, report: Report) -> None:
        """A pack's report."""
        if report.note:
            self.console.print(f"[yellow]pack {report.pack}[/yellow] {escape(report.note)}")
        if not self.console.is_terminal and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            done = f"{finished(self.study):,} of {count(self.search.options.points, 'point')}"
            self.console.print(f"{done}; a pack at step {report.step:,}{loss_text(report.loss)}")

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


def run_search(search: Search, console: Console) -> Found:
    """Train points until the study has as many as it shall; figures and numbers on disk and in MLflow.

    Ctrl-C and failures leave a truthful ledger and study, and the same call goes on.
    """
    start = time.monotonic()
    desk = Desk.open(search.settings)
    if search.settings.store is not None:
        require_writable("store", search.settings.store)
    search.sweep.system.rows("train", 1, Generator.of("can it be made at all"))
    rehearse(possible_point(search.sweep, search.space, search.name).members())
    url = storage_url(search.settings, search.options.storage, desk.uri)
    study = open_study(search, url)
    with held_study(desk, search, study) as ledger, Board(console, search, study) as board:
        workshop, failed = Workshop(desk, search, ledger), 0
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        workshop.require_free([trial for trial in running if is_chosen(trial, search.space)])
        told, again = recover(study, search.space, workshop.settled)
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


def write_results(search: Search, study: optuna.Study, folder: Path, url: str, command: str) -> None:
    """`search.json` and the figures."""
    front = [trial.number for trial in best(search, study)]
    body = {
        "study": study.study_name,
        "storage": tracking.shown(url),
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
        save(figure, folder / f"{name}.png")


def train_points(search: Search, study: optuna.Study, workshop: Workshop, board: Board) -> int:
    """Let Tune train what Optuna suggests. Returns how many points of this call failed."""
    board.stage("starting Ray")
    try:
        with ray_cluster(search.settings.address, search.settings.workers):
            newcomers = Newcomers(search.settings, alive)
            workshop.use(settle_resources(search.settings.gpus))
            searcher = StudySearcher(
                study, search.space, search.options.points, workshop, board.verdict, search.settings.patience
            )
            context = SearchContext(
                shelf=open_shelf(),
                pace=Pace(checkpoint=search.settings.checkpoint_every),
                gpus=workshop.resources.get("GPU", 0.0),
                watched=search.options.prune,
                patience=search.settings.patience,
            )

            def watch() -> None:
                newcomers()
                workshop.study.require_held()
                workshop.study.require_heard(context.patience)

            board.stage(f"training points, {count(slots(workshop.resources), 'point')} at a time")
            stopper = PruneStopper(searcher) if search.options.prune else None
            try:
                run_points(context, workshop.resources, board.progress, searcher, stopper, watch)
            except tracking.TrackingError:
                raise
            except ValueError as error:  # the input was good: this is a failure of the work
                raise RuntimeError(f"the search was broken off by {error!r}") from error
            return searcher.failed
    finally:
        ray.shutdown()
        workshop.leave()
        if not workshop.study.lost:
            with contextlib.suppress(*UNTOLD):  # the next call will tell
                recover(study, search.space, workshop.settled)


def search_command(arguments: Sequence[str], console: Console) -> int:
    """`headway search`."""
    if not arguments or arguments[0].startswith("-"):
        print(HELP)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    search = parse_search(arguments)
    found = run_search(search, console)
    show_found(console, search, found)
    return 1 if found.failed or finished(found.study) < search.options.points else 0
