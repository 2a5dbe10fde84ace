"""Named sweeps: plain functions that return a full config. A variant calls its parent and changes what differs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.encoding import decode
from cluster.sweep import DataConfig, Sweep
from train.config import ModelConfig, TrainConfig


def quick() -> Sweep:
    """Two widths x four seeds of the particle box: collision heads come alive, in a few minutes on two cores."""
    return Sweep(
        name="quick",
        widths=(32, 64),
        seeds=4,
        data=DataConfig(rows=16384),
        model=ModelConfig(layers=2, heads=4),
        train=TrainConfig(steps=4000, batch_size=32, learning_rate=1e-3),
    )


def width() -> Sweep:
    """Whether and when heads emerge against width: four widths, four rates, standard and mup, eight seeds each.

    A wider net at one Adam rate simply moves faster under `standard`, so a law of width is read at every rate, at each
    width's best rate and under maximal-update rules. About 65 minutes on two cores.
    """
    parent = quick()
    return replace(
        parent,
        name="width",
        widths=(16, 24, 40, 64),
        seeds=8,
        axes={"train.learning_rate": (2.5e-4, 1e-3, 4e-3, 1.6e-2), "model.parametrization": ("standard", "mup")},
    )


def tiny() -> Sweep:
    """Two widths x two seeds for a few dozen steps: shows in seconds that an installation works, and nothing else."""
    parent = quick()
    return replace(
        parent,
        name="tiny",
        seeds=2,
        data=DataConfig(rows=512, validation_rows=64),
        train=replace(parent.train, steps=60),
    )


RECIPES: dict[str, Callable[[], Sweep]] = {recipe.__name__: recipe for recipe in (quick, width, tiny)}


def load_sweep(source: str) -> Sweep:
    """The sweep of a recipe's name, or of a stored config (a path that ends in .json). ValueError if there is none."""
    if source.endswith(".json"):
        try:
            body = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"sweep: {source!r} cannot be read: {error}") from error
        sweep: Sweep = decode(Sweep, body, "sweep")
        return sweep
    if source not in RECIPES:
        near = difflib.get_close_matches(source, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(RECIPES)}, or a .json file"
        raise ValueError(f"recipe: {source!r} is unknown; {hint}")
    return RECIPES[source]()
