"""`headway probe`: what is measured of finished members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from cluster.arguments import StoreOptions, named, open_named
from cluster.calibration import Grid, calibrate_sweep, calibration_table
from cluster.commands import AnalyzeOptions
from cluster.display import Terminal, count, duration
from cluster.driver import Settings
from cluster.encoding import require_known
from cluster.geometry import Request, Tokens
from cluster.measuring import measure_geometry
from cluster.transfer import transfer_command
from probes.llc import LLCSettings
from sim.checks import require

ON_CLUSTER = ("workers", "gpus", "redo")


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
    checkpoints: tuple[str, ...] = ("recent",)
    """Steps, of those at which weights were kept; `all` of them; or `recent`: every second one in the last two
    decades."""
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
        named: dict[tuple[str, ...], Literal["all", "recent"]] = {("all",): "all", ("recent",): "recent"}
        steps = named.get(self.checkpoints) or tuple(map(parse_step, self.checkpoints))
        heads = None if self.heads == ("all",) else self.heads
        return Request(
            llc=self.llc, checkpoints=steps, heads=heads, tokens=self.tokens, minibatch=self.minibatch,
            examples=self.examples,
        )  # fmt: skip


def parse_step(text: str) -> int:
    """A step from the command line, or ValueError."""
    require(text.isdecimal(), "checkpoints", text, "steps, or all, or recent")
    return int(text)


def probe_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe llc`, `headway probe calibrate` and `headway probe transfer`."""
    kind, *rest = arguments or [""]
    if kind.startswith("-"):
        kind, rest = "llc", list(arguments)
    commands = {"llc": llc_command, "calibrate": calibrate_command, "transfer": transfer_command}
    require_known(kind, list(commands), "probe")
    return commands[kind](rest, console)


def calibrate_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe calibrate`: a grid on one member, a table, a figure, and the flags to go on with."""
    text = (
        "Try step sizes and localisations of Langevin chains on the heads of one layer of one member, on this machine, "
        "and pick by acceptance and flatness of the trace: the least gamma, and with it the largest step."
    )
    (name,), options = named(arguments, CalibrateOptions(), "headway probe calibrate", text)
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
    (name,), options = named(arguments, ProbeOptions(), "headway probe llc", text)
    settings = Settings(**{item: getattr(options, item) for item in ("tracking_uri", "out", "address", *ON_CLUSTER)})
    request, which = options.request, {"widths": options.widths, "seeds": options.seeds}
    desk, parent, sweep = open_named(name, settings)
    with Terminal(console) as display:
        measured = measure_geometry(desk, parent, sweep, request, which, display)
    for name, cause in measured.failed.values():
        console.print(f"[red]failed[/red]: {escape(name)}: {escape(cause)}")
    console.print(
        f"{count(measured.now, 'member')} measured in this call, {count(measured.total, 'member')} in all with these "
        f"settings; {duration(measured.seconds)}"
    )
    console.print(f"report:  {measured.report}")
    return 1 if measured.failed else 0
