"""Command-line arguments as dataclasses, and every bad one as a ValueError of one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from mlflow.entities import Run

from cluster import tracking
from cluster.analysis import load_sweep_config, number
from cluster.driver import Desk, Settings
from cluster.sweep import Sweep

WORDS: dict[str, bool | None] = {"None": None, "True": True, "False": False}
AXIS_HELP = "A further axis, NAME=VALUE,VALUE,...; may be given several times."


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """Where the ledger and the reports are."""

    tracking_uri: str | None = None
    """MLflow store or server. Default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in this folder."""
    out: Path = Path("headway-out")
    """Folder for reports."""


STORAGE = "HEADWAY_STORAGE"  # the variable of a search's database, whose URL may hold a password


def parse(kind: Any, arguments: Sequence[str], default: Any, prog: str, description: str) -> Any:
    """A dataclass from command-line arguments, or ValueError in one line. `--help` prints and ends the process."""
    options = {"default": default, "prog": prog, "description": description}
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(kind, args=["--help"], **options)
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured), wide_terminal():
        try:
            return tyro.cli(kind, args=list(arguments), **options)
        except SystemExit:
            raise ValueError(one_line(captured.getvalue())) from None


@contextlib.contextmanager
def wide_terminal() -> Iterator[None]:
    """tyro wraps its messages to the terminal; here they become one line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def one_line(message: str) -> str:
    """The text of tyro's box of an error, without the box and without what `--help` says anyway."""
    text = [line.strip("│| \t") for line in message.splitlines()]
    kept = [line for line in text[1:] if line.strip("╰╯─+-") and "full helptext" not in line]
    return "; ".join(kept).replace(":; ", ": ")


def sweep_form(default: Sweep) -> tuple[Any, Any]:
    """A dataclass with a flag for every field of the sweep, those of its own system included, and the default."""
    hidden = tyro.conf.Suppress[Mapping[str, Any]]
    annotations = {"system": type(default.system), "axes": hidden}
    body = {"__annotations__": annotations, "__module__": Sweep.__module__, "__doc__": "The sweep."}
    kind: Any = dataclass(frozen=True, kw_only=True)(
        type("SweepForm", (Sweep,), {**body, "system": default.system, "axes": field(default_factory=dict)})
    )
    options = tyro.conf.arg(name="")
    form = make_dataclass(
        "Options",
        [
            ("sweep", Annotated[kind, options]),
            ("settings", Annotated[Settings, options]),
            ("axis", Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help=AXIS_HELP)], ()),
            (
                "dry_run",
                Annotated[
                    bool,
                    tyro.conf.arg(help="Print the plan for the workers there are, measured here, and start nothing."),
                ],
                False,
            ),
        ],
        kw_only=True,
    )
    values = {item.name: getattr(default, item.name) for item in fields(default)}
    return form, form(sweep=kind(**values), settings=Settings())


def parse_axes(items: Sequence[str]) -> dict[str, tuple[float | int | str | bool | None, ...]]:
    """`train.learning_rate=0.001,0.002` as a name and its values. ValueError for another form, or a repeated name."""
    axes: dict[str, tuple[float | int | str | bool | None, ...]] = {}
    for item in items:
        name, equals, values = item.partition("=")
        if not (name and equals and values) or name in axes:
            raise ValueError(f"axis: {item!r} is not allowed; it must be NAME=VALUE,VALUE,..., each name once")
        axes[name] = tuple(WORDS.get(value, number(value)) for value in values.split(","))
    return axes


def make_sweep(options: Any, default: Sweep) -> Sweep:
    """The sweep of a filled form; axes given there stand beside the recipe's own, or in their place."""
    values = {item.name: getattr(options.sweep, item.name) for item in fields(Sweep)}
    return Sweep(**{**values, "axes": {**default.axes, **parse_axes(options.axis)}})


def leading(arguments: Sequence[str], most: int = 1) -> tuple[list[str], list[str]]:
    """The names that stand before all flags, at most so many, and what comes after."""
    names = list(itertools.takewhile(lambda text: not text.startswith("-"), arguments[:most]))
    return names, list(arguments[len(names) :])


def require_names(
    arguments: Sequence[str], prog: str, places: Sequence[str], takes: str
) -> tuple[list[str], list[str]]:
    """The names that come first, one for each place, and what comes after; ValueError where one is missing, unless help
    is asked for."""
    names, rest = leading(arguments, len(places))
    if len(names) < len(places) and not {"-h", "--help"} & set(rest):
        raise ValueError(f"{prog.rsplit(maxsplit=1)[-1]}: it takes {takes}: {prog} {' '.join(places)}")
    return names, rest


def named(
    arguments: Sequence[str], options: Any, prog: str, description: str, places: Sequence[str] = ("SWEEP",),
    takes: str = "a sweep, by name or id",
) -> tuple[list[str], Any]:  # fmt: skip
    """The names that come first, one for each place, and the options after them."""
    names, rest = require_names(arguments, prog, places, takes)
    return names, parse(type(options), rest, options, " ".join([prog, *names, *places[len(names) :]]), description)


def open_named(name: str, settings: Settings) -> tuple[Desk, Run, Sweep]:
    """The desk, the parent run and the config of a sweep in the ledger."""
    desk = Desk.open(settings, make=False)
    parent = tracking.find_sweep(desk.client, desk.experiment, name)
    return desk, parent, load_sweep_config(desk.client, parent.info.run_id)
