"""One example with one head's attention drawn as lines, early and late in training, from a member's kept weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray
from torch import Tensor

from cluster.figures import INK, Array, HeadKey, new_figure
from sim.generator import Generator
from sim.system import Batch, System
from train.config import ModelConfig
from train.snapshot import Snapshot

EXAMPLES, TRAIN_ROWS = 32, 256  # drawn afresh: examples to choose from, rows to standardise with
ENOUGH_PAIRS = 3  # related pairs that make an example worth looking at
MOST_LINES = 4000  # of attention in one box


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One example and one head. positions `[N, 2]`; related bool `[N, N]`; attention: (step, `[N, N]`) by time.

    uniform: attention on partners if it were even, mean over queries with a partner. size, radius: where known.
    wrap bool `[N, N]`: the pair is nearest through the walls of a periodic box.
    """

    positions: Array
    related: NDArray[np.bool_]
    attention: tuple[tuple[int, Array], ...]
    uniform: float
    size: tuple[float, float] | None
    radius: float | None
    wrap: NDArray[np.bool_]


def make_scene(
    system: System, model: ModelConfig, weights: Mapping[str, NDArray[Any]], head: HeadKey, relation: str
) -> Scene | None:
    """The first fresh example with at least 3 related pairs (or the most), chosen before the attention is known.

    None where the system's tokens have no place in the plane or no example has a related pair.
    """
    stream = Generator.of("report", 0)
    train = system.rows("train", TRAIN_ROWS, stream)
    rows = replace(system.rows("probe", EXAMPLES, stream), statistics=system.statistics(train))
    dtype = torch.as_tensor(next(iter(weights.values()))).dtype
    batch = system.draw(rows.to("cpu", dtype), stream.fold("draw"))
    positions = batch.geometry.get("positions")
    if positions is None or positions.dim() != 3 or positions.shape[-1] != 2:
        return None
    pairs = system.relations(batch.geometry, batch.keys)[relation].sum((1, 2))
    if not pairs.any():
        return None
    enough = (pairs >= 2 * ENOUGH_PAIRS).nonzero()
    return _scene(system, model, weights, head, relation, one_example(batch, int(enough[0] if len(enough) else pairs.argmax())))


def one_example(batch: Batch, index: int) -> Batch:
    """A batch of one example of a batch without a member axis."""

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[index : index + 1]

    return Batch(
        inputs=batch.inputs[index : index + 1],
        targets=batch.targets[index : index + 1],
        mask=cut(batch.mask),
        keys=cut(batch.keys),
        allowed=cut(batch.allowed),
        geometry={name: value[index : index + 1] for name, value in batch.geometry.items()},
    )


def _scene(
    system: System, model: ModelConfig, weights: Mapping[str, NDArray[Any]], head: HeadKey, relation: str, batch: Batch
) -> Scene:
    n = batch.inputs.shape[1]
    keys = torch.arange(n).expand(n, n) if batch.keys is None else batch.keys[0]

    def spread_out(values: Tensor) -> Array:
        """`[N, K]` as `[N, N]`."""
        return torch.zeros(n, n, dtype=torch.float64).scatter_add(1, keys, values.double()).numpy()

    real = np.ones(n, dtype=bool) if batch.mask is None else batch.mask[0].numpy()
    both = np.ix_(real, real)
    related = spread_out(system.relations(batch.geometry, batch.keys)[relation][0])[both] > 0
    positions = batch.geometry["positions"][0].double().numpy()[real]
    distance = system.distance(batch.geometry, batch.keys)
    plane = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    near = plane if distance is None else spread_out(distance[0])[both]
    box = getattr(system, "box", None)
    asked = related.any(1)
    steps = sorted({int(name.partition("/")[0]) for name in weights})
    attention = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        named = {name.partition("/")[2]: torch.as_tensor(v)[None] for name, v in weights.items() if name.startswith(f"{step}/")}
        snapshot = Snapshot(step=step, system=system, model=model, parameters=named)
        attention.append((step, spread_out(snapshot.attention(batch)[0, head[0], head[1], 0])[both]))
    seen = keys.shape[1] if batch.mask is None else int(real.sum())
    return Scene(
        positions=positions,
        related=related,
        attention=tuple(attention),
        uniform=float(related.sum(1)[asked].mean() / seen) if asked.any() else math.nan,
        size=(box.width, box.height) if hasattr(box, "width") and hasattr(box, "height") else None,
        radius=getattr(box, "radius", None),
        wrap=(near > 0) & (near < plane * (1 - 1e-6) - 1e-6),
    )


def draw_box(scene: Scene) -> Figure:
    """One example early and late: discs (tinted where related to another) and attention as tapering lines."""
    low, high = scene.positions.min(0), scene.positions.max(0)
    edge = 0.06 * float((high - low).max())
    span = ((0.0, scene.size[0]), (0.0, scene.size[1])) if scene.size else tuple(zip(low - edge, high + edge, strict=True))
    tall = (span[1][1] - span[1][0]) / (span[0][1] - span[0][0])
    figure, axes = new_figure(1, len(scene.attention), min(4.9 * tall + 0.5, 9.0))
    for ax, (step, attention) in zip(axes.flat, scene.attention, strict=True):
        ax.set_aspect("equal")
        ax.set_xlim(*span[0])
        ax.set_ylim(*span[1])
        ax.spines[:].set_visible(True)
        ax.set_xticks([])
        ax.set_yticks([])
        _discs(ax, scene, span)
        _attention_lines(ax, scene, attention)
        asked = scene.related.any(1)
        on_partners = float((attention * scene.related).sum(1)[asked].mean()) if asked.any() else math.nan
        ax.set_title(
            f"step {step:,}: {on_partners:.0%} of attention on partners (uniform: {scene.uniform:.0%})",
            fontsize=10, loc="left", color=INK,
        )  # fmt: skip
    return figure


def _discs(ax: Axes, scene: Scene, span: Sequence[tuple[float, float]]) -> None:
    """Tokens as discs of their radius (small dots where it is not known); related pairs joined by a broad band."""
    radius = scene.radius or 0.012 * (span[0][1] - span[0][0])
    pairs = np.argwhere(np.triu(scene.related | scene.related.T) & ~scene.wrap)
    ax.add_collection(LineCollection(list(scene.positions[pairs]), colors="#F6C667", linewidths=9, zorder=0.5))
    circles = [Circle((x, y), radius) for x, y in scene.positions]
    fill = ["#FCE7BC" if one else "#F1F3F4" for one in scene.related.any(1)]
    ax.add_collection(PatchCollection(circles, facecolors=fill, edgecolors="#5F6368", linewidths=1.0, zorder=1))


def _attention_lines(ax: Axes, scene: Scene, attention: Array) -> None:
    """Strongest attention as lines that bend to the left and taper from the token that looks to the one looked at."""
    pairs = np.argwhere(~np.eye(len(attention), dtype=bool) & (attention > 0.02))
    order = np.argsort(attention[pairs[:, 0], pairs[:, 1]])[-MOST_LINES:]
    along = np.linspace(0.0, 1.0, 13)[:, None]
    segments, widths, colours = [], [], []
    for i, j in pairs[order]:
        start, step = scene.positions[i], scene.positions[j] - scene.positions[i]
        if scene.wrap[i, j] and scene.size is not None:
            step = step - np.round(step / np.array(scene.size)) * np.array(scene.size)
        path = start + along * step + 0.24 * along * (1 - along) * np.array([-step[1], step[0]]) * 2
        weight = float(attention[i, j])
        segments += list(np.stack([path[:-1], path[1:]], 1))
        widths += list(5.0 * weight**0.75 * (1.15 - along[:-1, 0]))
        colours += [(0.0, 0.32, 0.62, min(0.95, 0.12 + weight))] * (len(along) - 1)
    ax.add_collection(LineCollection(segments, linewidths=widths, colors=colours, zorder=2, capstyle="butt"))
