"""Sections of the report on a user's own probes: what they measured of every head, over training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cluster.figures import Portrait, all_heads, mean_band, on_axis, plain, portrait_panels, step_axis
from cluster.outside import find_probe
from cluster.page import Section, take_picture

MEMBERS = 2  # shown of each column
COLUMNS = 4  # shown, of all probes together
OWN_PANELS = MEMBERS * COLUMNS


def own_sections(folder: Path, probes: Sequence[str], portraits: Sequence[Portrait]) -> list[Section]:
    """One section for each probe that the sweep names beside those that every sweep has."""
    sections, room = [], COLUMNS
    for name in probes:
        kind = find_probe(name)
        about = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ").replace("`", "")
        section = Section(title=f"Probe “{kind.name}”", text=about or f"Measured by {name}.")
        shown = [portrait for portrait in portraits if portrait.curve(kind.name) is not None][:MEMBERS]
        columns = kind.columns[:room] if shown else ()
        room -= len(columns)
        for column in columns:
            relation = relation_of(shown[0], kind)
            caption = (
                f"{column} by {name}, on “{relation}”: mean over the replicates of the probe set, and two standard "
                "errors. The strongest heads as above; solid in layer 0, dashed in layer 1, and so on; others pale."
            )
            figure = draw_own(shown, kind.name, column, relation)
            picture = take_picture(folder, f"own_{kind.name}_{column}", figure, caption, f"{column} over training")
            section.pictures.append(picture)
        if not section.pictures:
            section.missing = "It has no picture here; its columns are in every member's curves.parquet."
        sections.append(section)
    return sections


def relation_of(portrait: Portrait, kind: Any) -> str:
    """The judged relation where the probe has it, else its first name along that axis."""
    curve = portrait.curve(kind.name)
    assert curve is not None
    return portrait.relation if portrait.relation in curve.relations else curve.relations[0]


def draw_own(portraits: Sequence[Portrait], probe: str, column: str, relation: str) -> Figure:
    """A column over log step; one panel a portrait."""
    figure, panels = portrait_panels(portraits)
    for ax, portrait in zip(panels, portraits, strict=False):
        curve = portrait.curve(probe)
        assert curve is not None
        mean, error = mean_band(curve.values[column][:, :, :, curve.relations.index(relation)])
        step_axis(ax, float(curve.steps[-1]))
        ends = {key: f"{mean[-1][key]:.3g}" for key in np.ndindex(mean.shape[1:])}
        known = mean[np.isfinite(mean)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        margin = 0.06 * (high - low) or 0.5
        ax.set_ylim(low - margin, high + margin)
        values, errors = np.moveaxis(mean, 0, -1), np.moveaxis(error, 0, -1)
        all_heads(ax, on_axis(curve.steps), values, errors, portrait, "head: at the end", ends)
        ax.set_ylabel(plain(column), fontsize=9.5)
    return figure
