"""The commands on sweeps: train, look, analyse and report again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import tracking
from cluster.analysis import load_analysis, load_sweep_config
from cluster.arguments import StoreOptions, leading, make_sweep, named, open_named, parse, sweep_form
from cluster.dispatch import find_room, is_local, ray_cluster, settle_resources, slots
from cluster.display import Terminal, count, duration, show_plan, width_summary
from cluster.driver import Outcome, Settings, analyze_again, make_report, run_sweep
from cluster.plan import make_plan
from cluster.recipes import RECIPES, load_sweep
from cluster.server import serve_mlflow
from cluster.sizing import Room, require_computable
from cluster.sweep import Sweep, packs, validate
from cluster.tracking import PARENT

SWEEP_HELP = """Train a sweep, measure every head as it learns, and write a report.

Every member (width x seed) is a run in MLflow under one parent. Running the same sweep again trains only what is
missing; more seeds or widths extend it. Any field of the recipe can be overridden, for example

  headway sweep quick --widths 16 32 64 --seeds 8 --train.steps 4000
  headway sweep quick --axis train.learning_rate=0.0005,0.001,0.002 --dry-run
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeOptions(StoreOptions):
    """Where the ledger and the reports are, and what works on them."""

    address: str | None = None
    """Ray cluster. Default: RAY_ADDRESS, or a local one on this machine's cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UiOptions(StoreOptions):
    """Where the ledger is, and where its pages are served."""

    host: str = "127.0.0.1"
    """Address to serve on; the pages have no password, so think before you widen it."""
    port: int = 5000
    """Port to serve on."""


def sweep_command(arguments: Sequence[str], console: Console) -> int:
    """`headway sweep`."""
    if not arguments or arguments[0].startswith("-"):
        print(SWEEP_HELP)
        recipes_command([], console)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    default = load_sweep(arguments[0])
    form, filled = sweep_form(default)
    options = parse(form, arguments[1:], filled, f"headway sweep {arguments[0]}", SWEEP_HELP)
    sweep = make_sweep(options, default)
    if options.dry_run:
        return dry_run(sweep, options.settings, console)
    with Terminal(console) as display:
        outcome = run_sweep(sweep, options.settings, display)
    show_outcome(console, sweep, options.settings, outcome)
    return 1 if outcome.failed or (outcome.analysis.members["outcome"] == "not analysed").any() else 0


def dry_run(sweep: Sweep, settings: Settings, console: Console) -> int:
    """Print what the sweep would train and cost. Reads the ledger, makes none."""
    members, done = validate(sweep), set()
    uri = tracking.resolve_uri(settings.tracking_uri)
    if not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists():
        client = tracking.connect(uri)
        done = tracking.settled_members(client, uri, sweep)
    workers, room = workers_and_room(settings)
    for member in members:
        require_computable(member.config, room.device)
    cut = packs([m for m in members if m.id not in done], workers, settings.pack_size, most=room.most)
    plan = make_plan(cut, workers, len(members) - sum(len(p.members) for p in cut), room)
    show_plan(console, sweep, plan, asked=settings.pack_size)
    return 0


def workers_and_room(settings: Settings) -> tuple[int, Room]:
    """How many workers take packs at once, and the room of each: of the cluster that is named, else of this machine."""
    if not is_local(settings.address):
        with ray_cluster(settings.address):
            resources = settle_resources(settings.gpus)
            return slots(resources), find_room(resources)
    workers, gpus = settings.workers or os.cpu_count() or 1, 1.0 if settings.gpus is None else settings.gpus
    if gpus > 0 and torch.cuda.is_available():
        workers = min(workers, max(1, int(torch.cuda.device_count() / gpus)))
    return workers, Room.here(workers, gpus)


def show_outcome(console: Console, sweep: Sweep, settings: Settings, outcome: Outcome) -> None:
    """The closing table, what failed, and where to look next."""
    axes = sweep.axis_names
    if len(outcome.analysis.widths):
        console.print(width_summary(outcome.analysis.widths, sweep.system.relation, axes))
    members = outcome.analysis.members
    for _, row in members[members["outcome"] != "finished"].iterrows() if len(members) else ():
        where = " ".join(f"{axis}={row[axis]}" for axis in [*axes, "seed"])
        console.print(f"[red]{row['outcome']}[/red]: {where}: {escape(row['cause'])}")
    console.print(
        f"{count(outcome.trained, 'member')} trained in this call, {count(len(members), 'member')} in the sweep; "
        f"{duration(outcome.seconds)}"
    )
    console.print(f"report:  {outcome.report}")
    given = ["--tracking-uri", tracking.shown(settings.tracking_uri)] if settings.tracking_uri else []
    uri = tracking.resolve_uri(settings.tracking_uri)
    link = tracking.comparison_path(outcome.place)
    if uri.startswith("http"):
        console.print(f"compare: {tracking.page_base(uri)}{link}", soft_wrap=True)
    else:
        console.print(f"compare: run  {' '.join(['headway', 'ui', *given])}  and open", soft_wrap=True)
        console.print(f"         http://127.0.0.1:5000{link}", soft_wrap=True)


def analyze_command(arguments: Sequence[str], console: Console) -> int:
    """`headway analyze`."""
    text = "Work out timescales again, from the tables of the members that are done, and write the report again."
    (name,), options = named(arguments, AnalyzeOptions(), "headway analyze", text)
    settings = Settings(tracking_uri=options.tracking_uri, out=options.out, address=options.address)
    desk, parent, sweep = open_named(name, settings)
    with Terminal(console) as display:
        outcome = analyze_again(desk, parent, sweep, display)
    show_outcome(console, sweep, settings, outcome)
    return 0


def report_command(arguments: Sequence[str], console: Console) -> int:
    """`headway report`."""
    (name,), options = named(
        arguments, StoreOptions(), "headway report", "Write the report again from the last analysis."
    )
    desk, parent, sweep = open_named(name, Settings(tracking_uri=options.tracking_uri, out=options.out))
    place = tracking.Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    path = make_report(desk, sweep, place, load_analysis(desk.client, place.parent))
    console.print(f"report:  {path}")
    return 0


def status_command(arguments: Sequence[str], console: Console) -> int:
    """`headway status`."""
    names, rest = leading(arguments)
    options = parse(
        StoreOptions,
        rest,
        StoreOptions(),
        "headway status",
        "Sweeps and searches in the ledger, or members or points of one.",
    )
    uri = tracking.resolve_uri(options.tracking_uri)
    client = tracking.connect(uri, make=False)
    experiment = tracking.experiment_id(client, uri)
    if not names:
        show_list(console, listed(client, experiment))
        return 0
    for run, points in tracking.find_searches(client, experiment).values():
        if names[0] in (run.data.tags["sweep_id"], run.info.run_id):
            console.print(f"[bold]{escape(run.data.tags['sweep_id'])}[/bold]")
            show_list(console, [(point, None) for point in points])
            return 0
    parent = tracking.find_sweep(client, experiment, *names)
    sweep = load_sweep_config(client, parent.info.run_id)
    place = tracking.Place(uri=uri, experiment=experiment, parent=parent.info.run_id)
    show_members(console, sweep, tracking.children(client, place))
    return 0


def listed(client: MlflowClient, experiment: str) -> list[tuple[Run, int | None]]:
    """Sweeps, and searches with the number of their points, which are no entries of their own; newest first."""
    searches = tracking.find_searches(client, experiment)
    sweeps = [run for run in tracking.find_sweeps(client, experiment) if run.data.tags.get(PARENT) not in searches]
    found = [(run, None) for run in sweeps] + [(run, len(points)) for run, points in searches.values()]
    return sorted(found, key=lambda each: -each[0].info.start_time)


def entry_name(run: Run, points: int | None) -> str:
    """`quick-1234abcd`, or of a search `NAME (24 points)`."""
    return escape(run.data.tags["sweep_id"] + ("" if points is None else f" ({count(points, 'point')})"))


def show_list(console: Console, entries: Sequence[tuple[Run, int | None]]) -> None:
    """Sweeps and searches, a row each."""
    several = any(points is not None for _, points in entries)
    table = Table("sweep or search" if several else "sweep", "system", "status", "begun", "code")
    for run, points in entries:
        tags = run.data.tags
        table.add_row(entry_name(run, points), tags["system"], run.info.status, when(run), tags["code_version"])
    console.print(table)


def when(run: Run) -> str:
    """Start of a run in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000))


def show_members(console: Console, sweep: Sweep, runs: Sequence[Run]) -> None:
    """How many members of the sweep stand where, and the cause of every failure that still stands."""
    counted, last = tracking.counted(runs), tracking.last_runs(runs)
    state = {member: run.info.status.lower() for member, run in last.items() if run.info.status != "KILLED"}
    state |= {member: run.data.tags.get("outcome", "finished") for member, run in counted.items()}
    columns = ["finished", "running", "diverged", "failed", "missing"]
    table = Table(*sweep.axis_names, "members", *columns)
    points: dict[tuple[str, ...], list[str]] = {}
    for member in sweep.members():
        points.setdefault(tuple(map(str, member.point.values())), []).append(state.get(member.id, "missing"))
    for point, states in points.items():
        table.add_row(*point, str(len(states)), *(str(states.count(column)) for column in columns))
    console.print(f"[bold]{escape(sweep.id)}[/bold]")
    console.print(table)
    for run in {**last, **counted}.values():
        if run.info.status == "FAILED":
            console.print(
                f"[red]{escape(run.info.run_name)}[/red]: {escape(run.data.tags.get('cause', 'no cause kept'))}"
            )


def recipes_command(arguments: Sequence[str], console: Console) -> int:
    """`headway recipes`."""
    table = Table("recipe", "members", "what it is")
    for name, recipe in RECIPES.items():
        table.add_row(name, str(len(recipe().members())), (recipe.__doc__ or "").strip())
    console.print(table)
    return 0


def ui_command(arguments: Sequence[str], console: Console) -> int:
    """`headway ui`: serves until Ctrl-C."""
    text = "Serve MLflow's pages of a local store on this machine and print the link to the comparison."
    options = parse(UiOptions, arguments, UiOptions(), "headway ui", text)
    uri = tracking.resolve_uri(options.tracking_uri)
    client = tracking.connect(uri, make=False)
    experiment = tracking.experiment_id(client, uri)
    base = tracking.page_base(uri) if uri.startswith("http") else f"http://{options.host}:{options.port}"
    for run, points in listed(client, experiment)[:10]:
        place = tracking.Place(uri=uri, experiment=experiment, parent=run.info.run_id)
        path = tracking.comparison_path(place) if points is None else tracking.run_path(place)
        console.print(f"{entry_name(run, points)}: {base}{path}", soft_wrap=True)
    if not uri.startswith("http"):
        serve_mlflow(uri, options.host, options.port)
    return 0
