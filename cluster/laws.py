"""What holds across a sweep: whether and when heads emerge against width, tails, exponents, collapse, and for whom.

All is worked out per *series*: the members that differ in width and seed only. Where a sweep has several learning
rates there is a further series of each width's best rate, by validation loss, so that the choice does not look at what
is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

RATE = "train.learning_rate"
BEST = "each width's best learning rate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Finished members that are compared along width, and their heads on the judged relation."""

    name: str
    members: pd.DataFrame
    heads: pd.DataFrame


def series_of(members: pd.DataFrame, heads: pd.DataFrame, axes: Sequence[str], judged: str) -> list[Series]:
    """One series for each setting of the axes other than width, then one of best rates for each setting of the rest."""
    finished = members[members["outcome"] == "finished"]
    own = heads[heads["relation"] == judged] if len(heads) else heads
    if finished.empty or own.empty:
        return []
    others = [name for name in axes if name != "width"]
    found = [_series(label(others, key), group, own) for key, group in _groups(finished, others)]
    if RATE in others and finished[RATE].nunique() > 1:
        rest = [name for name in others if name != RATE]
        for key, group in _groups(finished, rest):
            name = ", ".join(filter(None, (BEST, label(rest, key))))
            found.append(_series(name, _at_best_rate(group), own))
    return found


def label(names: Sequence[str], values: Sequence[Any]) -> str:
    """`train.learning_rate 0.001, model.parametrization mup`, as points are labelled."""
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def _groups(table: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not names:
        yield (), table
        return
    for key, group in table.groupby([*names], sort=True):
        yield tuple(key), group


def _series(name: str, members: pd.DataFrame, heads: pd.DataFrame) -> Series:
    return Series(name=name, members=members, heads=heads[heads["member_id"].isin(members["member_id"])])


def _at_best_rate(members: pd.DataFrame) -> pd.DataFrame:
    """Of each width the members at the rate of least median validation loss at the end."""
    losses = members.groupby(["width", RATE])["validation_loss"].median()
    best = {width: losses[width].idxmin() for width in members["width"].unique()}
    return members[members[RATE] == members["width"].map(best)]
