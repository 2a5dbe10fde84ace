"""The `headway` command."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import tracking
from cluster.analysis import load_analysis, load_sweep_config
from cluster.arguments import make_sweep, parse, sweep_form
from cluster.calibration import Grid, calibrate_sweep, calibration_table
from cluster.display import Terminal, count, duration, show_plan, width_summary
from cluster.driver import Desk, Outcome, Settings, analyze_again, make_report, run_sweep
from cluster.encoding import require_known
from cluster.geometry import Request, Tokens
from cluster.jobs import jobs_command, stop_command, submit_command
from cluster.measuring import measure_geometry
from cluster.plan import make_plan
from cluster.recipes import RECIPES, load_sweep
from cluster.search import search_command
from cluster.server import serve_mlflow, server_command
from cluster.sizing import Room, require_computable
from cluster.sweep import Sweep, packs, validate
from probes.llc import LLCSettings
from sim.checks import require

USAGE = """\
headway COMMAND ...

  recipes               the named sweeps, one line each
  sweep RECIPE ...      train a sweep, measure every head, write a report; run again to go on where it stopped
  status [SWEEP]        sweeps in the ledger, or the members of one
  probe calibrate SWEEP step size and localisation for that, tried on one member
  probe llc SWEEP       learning coefficients of every head at the kept steps, and degrees of their potentials
  analyze SWEEP         work out timescales again from the tables of the members that are done
  report SWEEP          write the report again from the last analysis
  ui                    MLflow's pages on this machine, with a link to the comparison
  server                an MLflow server on this machine, for a cluster's workers
  search RECIPE ...     let Optuna look for the best values of any fields
  submit RECIPE ...     `sweep` as a job of a Ray cluster
  jobs [JOB]            a cluster's jobs, or one followed
  stop JOB              stop a job; the ledger is told, the same sweep goes on later

`headway COMMAND --help` tells more. RECIPE is a name, or the .json of a stored sweep; SWEEP is a name or an id."""

NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
ON_CLUSTER = ("workers", "gpus", "redo")
SWEEP_HELP = """Train a sweep, measure every head as it learns, and write a report.

Every member (width x seed) is a run in MLflow under one parent. Running the same sweep again trains only what is
missing; more seeds or widths extend it. Any field of the recipe can be overridden, for example

  headway sweep quick --widths 16 32 64 --seeds 8 --train.steps 4000
  headway sweep quick --axis train.learning_rate=0.0005,0.001,0.002 --dry-run
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """Where the ledger and the reports are."""

    tracking_uri: str | None = None
    """MLflow store or server. Default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in this folder."""
    out: Path = Path("headway-out")
    """Folder for reports."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateOptions(StoreOptions):
    """What is tried, and on which member."""

    grid: Annotated[Grid, tyro.conf.arg(name="")] = field(default_factory=Grid)
    """The grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOptions(AnalyzeOptions):
    """Which members are measured, where, on what, and how."""

    workers: int | None = None
    """CPU cores of a local cluster, one for each member at work. Default: all."""
    gpus: float | None = None
    """GPUs a member takes, a fraction to share one. Default: 1 where the cluster has GPUs, else 0."""
    checkpoints: tuple[str, ...] = ("all",)
    """Steps, of those at which weights were kept, or all."""
    heads: tuple[str, ...] = ("all",)
    """Heads as LAYER.HEAD, or all."""
    widths: tuple[int, ...] = ()
    """Widths of the members to measure. Default: all."""
    seeds: tuple[int, ...] = ()
    """Seeds of the members to measure. Default: all."""
    tokens: tuple[Tokens, ...] = ("all",)
    """Over which tokens the loss is taken: all, or those related to another (the data-refined coefficient); or both."""
    minibatch: int = 32
    """Examples a draw, with replacement."""
    examples: int | None = None
    """Examples of the probe set in the data. Default: all."""
    redo: bool = False
    """Measure members again that are done with these settings."""
    llc: Annotated[LLCSettings, tyro.conf.arg(name="")] = field(default_factory=LLCSettings)
    """How chains run."""

    @property
    def request(self) -> Request:
        """What is measured of every member. ValueError for what cannot be read."""
        steps = None if self.checkpoints == ("all",) else tuple(map(parse_step, self.checkpoints))
        heads = None if self.heads == ("all",) else self.heads
        return Request(
            llc=self.llc, checkpoints=steps, heads=heads, tokens=self.tokens, minibatch=self.minibatch,
            examples=self.examples,
        )  # fmt: skip


def parse_step(text: str) -> int:
    """A step from the command line, or ValueError."""
    require(text.isdecimal(), "checkpoints", text, "a step, or all")
    return int(text)


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
    workers, gpus = settings.workers or os.cpu_count() or 1, 1.0 if settings.gpus is None else settings.gpus
    if gpus > 0 and torch.cuda.is_available():
        workers = min(workers, max(1, int(torch.cuda.device_count() / gpus)))
    room = Room.here(workers, gpus)
    for member in members:
        require_computable(member.config, room.device)
    cut = packs([m for m in members if m.id not in done], workers, settings.pack_size, most=room.most)
    plan = make_plan(cut, workers, len(members) - sum(len(p.members) for p in cut), room)
    show_plan(console, sweep, plan, asked=settings.pack_size)
    return 0


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
    ui = ["headway", "ui"] + (["--tracking-uri", settings.tracking_uri] if settings.tracking_uri else [])
    uri = tracking.resolve_uri(settings.tracking_uri)
    link = tracking.comparison_path(outcome.place)
    if uri.startswith("http"):
        console.print(f"compare: {uri.rstrip('/')}{link}", soft_wrap=True)
    else:
        console.print(f"compare: run  {' '.join(ui)}  and open", soft_wrap=True)
        console.print(f"         http://127.0.0.1:5000{link}", soft_wrap=True)


def named(arguments: Sequence[str], options: Any, prog: str, description: str) -> tuple[str, Any]:
    """The sweep's name, which comes first, and the options after it."""
    if not arguments or arguments[0].startswith("-"):
        parse(type(options), ["--help"] if {"-h", "--help"} & set(arguments) else [], options, prog, description)
        raise ValueError(f"sweep: none given; it must be a name or an id: {prog} SWEEP")
    return arguments[0], parse(type(options), arguments[1:], options, f"{prog} {arguments[0]}", description)


def open_named(name: str, settings: Settings) -> tuple[Desk, Run, Sweep]:
    """The desk, the parent run and the config of a sweep in the ledger."""
    desk = Desk.open(settings, make=False)
    parent = tracking.find_sweep(desk.client, desk.experiment, name)
    return desk, parent, load_sweep_config(desk.client, parent.info.run_id)


def analyze_command(arguments: Sequence[str], console: Console) -> int:
    """`headway analyze`."""
    text = "Work out timescales again, from the tables of the members that are done, and write the report again."
    name, options = named(arguments, AnalyzeOptions(), "headway analyze", text)
    settings = Settings(tracking_uri=options.tracking_uri, out=options.out, address=options.address)
    desk, parent, sweep = open_named(name, settings)
    with Terminal(console) as display:
        outcome = analyze_again(desk, parent, sweep, display)
    show_outcome(console, sweep, settings, outcome)
    return 0


def probe_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe llc` and `headway probe calibrate`."""
    kind, *rest = arguments or [""]
    if kind.startswith("-"):
        kind, rest = "llc", list(arguments)
    commands = {"llc": llc_command, "calibrate": calibrate_command}
    require_known(kind, list(commands), "probe")
    return commands[kind](rest, console)


def calibrate_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe calibrate`: a grid on one member, a table, a figure, and the flags to go on with."""
    text = (
        "Try step sizes and localisations of Langevin chains on the heads of one layer of one member, on this machine, "
        "and pick by acceptance and flatness of the trace: the least gamma, and with it the largest step."
    )
    name, options = named(arguments, CalibrateOptions(), "headway probe calibrate", text)
    desk, parent, sweep = open_named(name, Settings(tracking_uri=options.tracking_uri, out=options.out))
    done = calibrate_sweep(desk, parent, sweep, options.grid)
    console.print(f"{escape(done.member)}; n_beta = {options.grid.n_beta:g}")
    console.print(calibration_table(done.found))
    console.print(f"figure:  {done.figure}")
    if done.found.chosen is None:
        console.print(f"none will do: {done.found.refusal}")
        return 1
    chosen = done.found.chosen
    flags = f"--n-beta {chosen.n_beta:g} --gamma {chosen.gamma:g} --step-size {chosen.step_size:g}"
    console.print(f"next:    headway probe llc {name} {flags}", soft_wrap=True)
    return 0


def llc_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe llc`."""
    text = (
        "Refined learning coefficients of every head at the steps at which weights were kept, and every estimate of "
        "the degree of its potential; the report is written again. The same command goes on where it was stopped."
    )
    name, options = named(arguments, ProbeOptions(), "headway probe llc", text)
    settings = Settings(**{item: getattr(options, item) for item in ("tracking_uri", "out", "address", *ON_CLUSTER)})
    request, which = options.request, {"widths": options.widths, "seeds": options.seeds}
    desk, parent, sweep = open_named(name, settings)
    with Terminal(console) as display:
        measured = measure_geometry(desk, parent, sweep, request, which, display)
    for member, cause in measured.failed.items():
        console.print(f"[red]failed[/red]: {escape(member)}: {escape(cause)}")
    console.print(
        f"{count(measured.now, 'member')} measured in this call, {count(measured.total, 'member')} in all with these "
        f"settings; {duration(measured.seconds)}"
    )
    console.print(f"report:  {measured.report}")
    return 1 if measured.failed else 0


def report_command(arguments: Sequence[str], console: Console) -> int:
    """`headway report`."""
    name, options = named(arguments, StoreOptions(), "headway report", "Write the report again from the last analysis.")
    desk, parent, sweep = open_named(name, Settings(tracking_uri=options.tracking_uri, out=options.out))
    place = tracking.Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    path = make_report(desk, sweep, place, load_analysis(desk.client, place.parent))
    console.print(f"report:  {path}")
    return 0


def status_command(arguments: Sequence[str], console: Console) -> int:
    """`headway status`."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = arguments[1:] if name else arguments
    options = parse(StoreOptions, rest, StoreOptions(), "headway status", "Sweeps in the ledger, or members of one.")
    uri = tracking.resolve_uri(options.tracking_uri)
    client = tracking.connect(uri, make=False)
    experiment = tracking.experiment_id(client, uri)
    if name is None:
        table = Table("sweep", "system", "status", "begun", "code")
        for run in tracking.find_sweeps(client, experiment):
            tags = run.data.tags
            table.add_row(tags["sweep_id"], tags["system"], run.info.status, when(run), tags["code_version"])
        console.print(table)
        return 0
    parent = tracking.find_sweep(client, experiment, name)
    sweep = load_sweep_config(client, parent.info.run_id)
    place = tracking.Place(uri=uri, experiment=experiment, parent=parent.info.run_id)
    show_members(console, sweep, tracking.children(client, place))
    return 0


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
    base = uri.rstrip("/") if uri.startswith("http") else f"http://{options.host}:{options.port}"
    for run in tracking.find_sweeps(client, experiment)[:10]:
        place = tracking.Place(uri=uri, experiment=experiment, parent=run.info.run_id)
        console.print(f"{run.data.tags['sweep_id']}: {base}{tracking.comparison_path(place)}", soft_wrap=True)
    if not uri.startswith("http"):
        serve_mlflow(uri, options.host, options.port)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str], Console], int]] = {
    "sweep": sweep_command,
    "probe": probe_command,
    "analyze": analyze_command,
    "report": report_command,
    "status": status_command,
    "recipes": recipes_command,
    "ui": ui_command,
    "server": server_command,
    "search": search_command,
    "submit": submit_command,
    "jobs": jobs_command,
    "stop": stop_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: some members failed; 2: bad input, nothing started; 130: interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"headway {version('headway')}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            require_known(command, list(COMMANDS), "command")
        return COMMANDS[command](rest, console)
    except ValueError as error:
        print(f"headway: {error}", file=sys.stderr)
        return 2
    except tracking.BrokenOffError as error:
        print(f"headway: {error}", file=sys.stderr)
        return 1
    except MlflowException as error:
        print(f"headway: MLflow: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough (`headway ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in NO_DISK:
            raise
        print(f"headway: {error}; the same command goes on once that is mended", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = (
            "; the ledger says what is done, the same command goes on from there"
            if command in ("sweep", "probe", "search")
            else ""
        )
        print(f"headway: stopped{goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
