"""Measurements of heads: scores, ablations, and when and how they emerged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from probes.ablation import HeadAblation
from probes.attention import AttentionScores
from probes.distance import DistanceCorrelation
from probes.probe import Probe, ProbeBatch, When


class Kind(NamedTuple):
    """How a probe is made from the replicates of a probe set (None: not for this set), and its `when`."""

    build: Callable[[tuple[ProbeBatch, ...]], Probe | None]
    when: When


PROBES: dict[str, Kind] = {
    AttentionScores.name: Kind(AttentionScores, AttentionScores.when),
    HeadAblation.name: Kind(HeadAblation, HeadAblation.when),
    DistanceCorrelation.name: Kind(DistanceCorrelation.over_shells, DistanceCorrelation.when),
}
"""The probes by name: the one place that lists them."""
