"""Parts of pages: templates, sections of words and pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from cluster import figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure on the page. name: of its PNG; src: the same PNG as a data URL."""

    name: str
    caption: str
    alt: str
    panels: int
    src: str


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page: words, findings line by line, then pictures, or in their place the reason for none."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    missing: str = ""
    lines: list[str] = field(default_factory=list)


def template(name: str) -> jinja2.Template:
    """A page's template, which lies beside this file; values are escaped, and one that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def take_picture(folder: Path, name: str, figure: Figure, caption: str, alt: str) -> Picture:
    """Write a figure into the folder, and take it into the page."""
    path = folder / f"{name}.png"
    panels = figures.save(figure, path)
    src = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return Picture(name=path.name, caption=caption, alt=alt, panels=panels, src=src)
