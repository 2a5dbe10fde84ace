"""A search, every part of it checked: a recipe, a space, objectives, and how Optuna goes about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Annotated, Any

import optuna
import tyro

from cluster.arguments import parse, sweep_form
from cluster.driver import Settings
from cluster.encoding import encode
from cluster.objectives import (
    OBJECTIVES,
    Direction,
    ObjectiveName,
    require_prunable,
)
from cluster.recipes import load_sweep
from cluster.searcher import Sampler
from cluster.space import WIDTH, Space, parse_space, possible_point, require_one_point
from cluster.sweep import Sweep, digest, versions
from sim.checks import require

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
    """Optuna's database, apart from MLflow's. Default: HEADWAY_STORAGE, which no listing of processes shows as it does
    a password given here, or optuna.db beside the output folder."""

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
            whole = settings.pack_size is None or settings.pack_size >= sweep.seeds
            allowed = f"at least the {sweep.seeds} seeds of a point where --prune is given: all must be at one step"
            require(whole, "pack_size", settings.pack_size, allowed)
        own = cls(source=source, sweep=replace(sweep, axes={}), space=space, options=options, settings=settings)
        possible_point(own.sweep, space, own.name)
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
