"""What a search found: best points, importance of fields, the command to go on with, numbers and tables."""

from __future__ import annotations

import json
import math
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from cluster import tracking
from cluster.display import count, duration
from cluster.driver import Desk, Settings
from cluster.encoding import encode
from cluster.objectives import OBJECTIVES
from cluster.recipes import load_sweep
from cluster.search_config import Search
from cluster.space import point_of
from cluster.store import FolderStore

SHOWN = 10  # points in the closing table

LEAST_COMPLETE = 4  # points below which fields have no importance


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
            words += [f"--{item.name.replace('_', '-')}", tracking.shown(str(value))]
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
    console.print(f"dashboard: optuna-dashboard {shlex.quote(tracking.shown(found.url))}", soft_wrap=True)
    if found.command:
        console.print(f"more seeds at point {front[0].number}:\n  {found.command}", soft_wrap=True)
