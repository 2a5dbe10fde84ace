"""Named sweeps: plain functions that return a full config. A variant calls its parent and changes what differs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.encoding import decode, encode
from cluster.outside import find_named, require_system, told
from cluster.sweep import DataConfig, ProbeConfig, Sweep
from sim.active_matter import ActiveMatter, Swimmers
from sim.checks import require
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


def architectures() -> Sweep:
    """Lie and Strang splitting, global and local attention (6 of 16 particles), on the particle box; eight seeds, which
    see the same rows in the same order under all four."""
    parent = quick()
    return replace(
        parent,
        name="architectures",
        widths=(32,),
        seeds=8,
        axes={"model.splitting": ("lie", "strang"), "model.attention": ("global", "local")},
        data=replace(parent.data, order="seed"),
        model=replace(parent.model, neighbours=6),
    )


def active_matter() -> Sweep:
    """Scores of sixteen swimmers in a wide trap, tied by weak springs, whose density is Gaussian, and of sixteen that
    repel each other where they touch, too; four seeds each, some minutes on two cores."""
    swimmers = Swimmers(n=16, speed=0.5, turning=0.1, diffusion=0.1, trap=0.05, spring=0.01, time_step=0.02)
    return Sweep(
        name="active-matter",
        widths=(32,),
        seeds=4,
        axes={"system.swimmers.repulsion": (0.0, 2.5)},
        system=ActiveMatter(swimmers=swimmers, relax=40.0, spacing=4.0, rows_per_trajectory=32),
        data=DataConfig(rows=8192, validation_rows=1024),
        model=ModelConfig(layers=2, heads=4),
        train=TrainConfig(steps=6000, batch_size=64, learning_rate=1e-3),
    )


def active_matter_mips() -> Sweep:
    """4,096 swimmers without diffusion that gather in clusters, each seeing its 64 nearest: for a GPU. Their pool takes
    minutes on a core; its clusters still grow, so that what is zero in a stationary state is not quite."""
    swimmers = Swimmers(
        n=4096,
        packing=0.5,
        speed=0.025,
        turning=1e-4,
        diffusion=0.0,
        trap=0.0,
        spring=0.0,
        repulsion=1.0,
        time_step=0.1,
    )
    return Sweep(
        name="active-matter-mips",
        widths=(64,),
        seeds=2,
        system=ActiveMatter(swimmers=swimmers, noise=0.01, relax=100.0, spacing=5.0, rows_per_trajectory=32),
        data=DataConfig(rows=128, validation_rows=4),
        model=ModelConfig(layers=2, heads=4, attention="local", neighbours=64),
        train=TrainConfig(steps=4000, batch_size=4, learning_rate=3e-4),
        probe=ProbeConfig(replicates=2, examples=1, sparse_examples=1),
    )


RECIPES: dict[str, Callable[[], Sweep]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (quick, width, tiny, architectures, active_matter, active_matter_mips)
}


def load_sweep(source: str) -> Sweep:
    """The sweep of a recipe, or ValueError in one line.

    source: a recipe's name; `module:function` of the user's own package; or a stored config, a path that ends in .json.
    """
    if source.endswith(".json"):
        try:
            body = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"sweep: {source!r} cannot be read: {error}") from error
        sweep: Sweep = decode(Sweep, body, "sweep")
        return sweep
    if ":" in source:
        return own_sweep(source)
    if source not in RECIPES:
        near = difflib.get_close_matches(source, RECIPES, n=1)
        others = f"it must be one of {', '.join(RECIPES)}, module:function of your own, or a .json file"
        raise ValueError(f"recipe: {source!r} is unknown; " + (f"did you mean {near[0]!r}?" if near else others))
    return RECIPES[source]()


def own_sweep(source: str) -> Sweep:
    """What the user's function `module:function` returns, once it is sure that it can be stored and read again."""
    recipe = find_named(source, "recipe")
    require(callable(recipe), "recipe", source, "a function without arguments that returns a Sweep")
    try:
        sweep = recipe()
    except Exception as error:
        raise ValueError(f"recipe: {source!r} fails with {told(error)}") from error
    kind = type(sweep).__name__
    require(isinstance(sweep, Sweep), "recipe", source, f"a function that returns a Sweep (it returns {kind})")
    require_system(type(sweep.system), f"recipe {source}: system")
    try:
        hash(sweep.system)
        text = json.dumps(encode(sweep))
    except TypeError as error:
        raise ValueError(f"recipe {source}: system: its fields must be numbers, texts, tuples ({error})") from error
    stored: Sweep = decode(Sweep, json.loads(text), f"recipe {source}: sweep")
    name = type(sweep.system).__qualname__
    whole = "one that is the same when stored as JSON and read again (numbers, texts, tuples, dataclasses)"
    require(stored.system == sweep.system, f"recipe {source}: system", name, whole)
    return stored
