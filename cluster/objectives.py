"""What points of a search are judged by: numbers from their members' analysis that are always finite."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.space import Space
from cluster.sweep import Sweep
from cluster.trial import capped
from probes.emergence import STEP_ZERO
from sim.checks import require

WORST_SECONDS = 1e6  # wall time that a diverged member counts as: the objective has no worst value of its own

Row = Mapping[str, Any]
"""A member's row as `analyze_member` makes it; `{"diverged": True}` for one that diverged."""

ObjectiveName = Literal["level", "validation_loss", "heads_that_matter", "seconds"]

Direction = Literal["minimize", "maximize"]


def never(row: Row) -> bool:
    """Whether a member that finished has no detector."""
    return not row.get("diverged") and not math.isfinite(row["level"])


def level(rows: Sequence[Row], sweep: Sweep) -> float:
    """Geometric mean over members of the best detector's level; without one, or diverged, twice the last step."""
    last = 2.0 * sweep.train.steps
    times = [last if row.get("diverged") or never(row) else max(row["level"], STEP_ZERO) for row in rows]
    return math.exp(statistics.fmean(map(math.log, times)))


def validation_loss(rows: Sequence[Row], sweep: Sweep) -> float:
    """Median over members of the loss at the end; at most that of predicting nothing, as which divergence counts."""
    return statistics.median(capped(row.get("validation_loss", math.inf), sweep.system) for row in rows)


def heads_that_matter(rows: Sequence[Row], sweep: Sweep) -> float:
    """Mean over members; none where a member diverged."""
    return statistics.fmean(0 if row.get("diverged") else row["heads_that_matter"] for row in rows)


def seconds(rows: Sequence[Row], sweep: Sweep) -> float:
    """Wall time from the first to the last probe step of the slowest member, pauses taken out."""
    return max(WORST_SECONDS if row.get("diverged") else row["seconds"] for row in rows)


def without_pauses(times: Sequence[float], restarts: int) -> float:
    """Seconds from the first to the last of these times; the longest gaps, one a restart, count as the next longest."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    usual = sorted(gaps)[max(0, len(gaps) - 1 - restarts)] if gaps else 0.0
    return sum(min(gap, usual) for gap in gaps)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a point is judged by: a number from its members' rows, which is always finite; `log`: how it is drawn."""

    value: Callable[[Sequence[Row], Sweep], float]
    direction: Direction
    text: str
    log: bool = False


OBJECTIVES: Mapping[str, Objective] = {
    "level": Objective(level, "minimize", "level (steps)", log=True),
    "validation_loss": Objective(validation_loss, "minimize", "validation loss", log=True),
    "heads_that_matter": Objective(heads_that_matter, "maximize", "heads that matter, a member"),
    "seconds": Objective(seconds, "minimize", "wall time (s)", log=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of a point: a value for each objective, or None and the cause. attrs: flags kept with the trial."""

    values: tuple[float, ...] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""


def judge(names: Sequence[str], rows: Sequence[Row], sweep: Sweep) -> Verdict:
    """The verdict over all members of a point; `diverged`, and `never` for levels, count those at a worst value."""
    values = tuple(float(OBJECTIVES[name].value(rows, sweep)) for name in names)
    flags = {"diverged": sum(bool(row.get("diverged")) for row in rows)}
    if "level" in names:
        flags["never"] = sum(map(never, rows))
    return Verdict(values=values, attrs=flags)


def require_prunable(objectives: Sequence[str], space: Space) -> None:
    """Raise ValueError where stopping a point by its validation loss on the way would bias what is searched for."""
    reason = (
        "left out: points are stopped by their validation loss on the way, which says nothing of "
        "when heads emerge, whether they matter, or how long it takes"
    )
    require(tuple(objectives) == ("validation_loss",), "prune", True, f"{reason} (objectives: {', '.join(objectives)})")
    moving = [item.name for item in space if item.name == "train.steps" or item.name.startswith("probe.")]
    require(not moving, "prune", True, f"left out where {', '.join(moving)} is searched: points share no probe steps")
