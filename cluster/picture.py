"""One example with one head's attention drawn as lines, early and late in training, from a member's kept weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray
from torch import Tensor

from cluster.figures import INK, TITLE, Array, HeadKey, new_figure, plain
from sim.generator import Generator
from sim.system import Batch, System
from train.config import ModelConfig
from train.model import visible_keys
from train.neighbours import draw
from train.snapshot import Snapshot

EXAMPLES, TRAIN_ROWS = 32, 256  # drawn afresh: examples to choose from, rows to standardise with
PAIRS = 3  # related pairs that an example should have: something to see, and no crowd
MOST_TOKENS = 256  # that a picture still shows one by one
MOST_LINES = 4000  # of attention in one panel
LEAST_WEIGHT = 0.02  # of attention that is drawn
BLUE, RELATED, FREE, BAND = "#0B4F8A", "#FCE7BC", "#F1F3F4", "#F6C667"


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
    """The fresh example whose number of related pairs is closest to 3, chosen before the attention is known.

    None where the system's tokens have no place in the plane or are too many, or no example has a related pair.
    """
    stream = Generator.of("report", 0)
    statistics = system.statistics(system.rows("train", TRAIN_ROWS, stream))
    rows = replace(system.rows("probe", EXAMPLES, stream), statistics=statistics)
    dtype = torch.as_tensor(next(iter(weights.values()))).dtype
    batch = draw(system, model, rows.to("cpu", dtype), stream.fold("draw"))
    positions = batch.geometry.get("positions")
    if positions is None or positions.dim() != 3 or positions.shape[-1] != 2:
        return None
    if positions.shape[-2] > MOST_TOKENS:
        return None
    links = system.relations(batch.geometry, batch.keys)[relation].sum((1, 2))
    if not links.any():
        return None
    links = torch.where(links > 0, links, torch.iinfo(links.dtype).max // 4)
    batch = one_example(batch, int((links - 2 * PAIRS).abs().argmin()))
    return _scene(system, batch, relation, list(_attention(system, model, weights, head, batch)))


def one_example(batch: Batch, index: int) -> Batch:
    """A batch of one example out of a batch without a member axis."""

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


def _attention(
    system: System, model: ModelConfig, weights: Mapping[str, NDArray[Any]], head: HeadKey, batch: Batch
) -> Iterator[tuple[int, Tensor]]:
    """Step and attention `[N, K]` of one head, for the first and the last kept weights."""
    steps = sorted({int(name.partition("/")[0]) for name in weights})
    for step in dict.fromkeys((steps[0], steps[-1])):
        parts = ((name.partition("/"), value) for name, value in weights.items())
        parameters = {name: torch.as_tensor(value)[None] for (at, _, name), value in parts if int(at) == step}
        snapshot = Snapshot(step=step, system=system, model=model, parameters=parameters)
        yield step, snapshot.attention(batch)[0, head[0], head[1], 0]


def _scene(system: System, batch: Batch, relation: str, attention: Sequence[tuple[int, Tensor]]) -> Scene:
    """Everything about one example between its real tokens."""
    n = batch.inputs.shape[1]
    keys = torch.arange(n).expand(n, n) if batch.keys is None else batch.keys[0]
    real = np.ones(n, dtype=bool) if batch.mask is None else batch.mask[0].numpy()

    def between(values: Tensor) -> Array:
        """`[N, K]` at keys as `[N, N]` between real tokens."""
        square = torch.zeros(n, n, dtype=torch.float64).scatter_add(1, keys, values.double())
        return np.asarray(square.numpy()[np.ix_(real, real)])

    visible = visible_keys(batch)
    seen = between(torch.ones_like(keys) if visible is None else visible[0].expand_as(keys)).sum(1)
    related = between(system.relations(batch.geometry, batch.keys)[relation][0]) > 0
    asked = related.any(1)
    positions = batch.geometry["positions"][0].double().numpy()[real]
    plane = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    distance = system.distance(batch.geometry, batch.keys)
    near = plane if distance is None else between(distance[0])
    box: Any = getattr(system, "box", None)
    return Scene(
        positions=positions,
        related=related,
        attention=tuple((step, between(values)) for step, values in attention),
        uniform=float((related.sum(1) / seen)[asked].mean()) if asked.any() else math.nan,
        size=(box.width, box.height) if hasattr(box, "width") and hasattr(box, "height") else None,
        radius=getattr(box, "radius", None),
        wrap=(near > 0) & (near < plane * (1 - 1e-4)),
    )


def draw_box(scene: Scene, title: str) -> Figure:
    """The example early and late: discs, tinted where related to another, and attention as tapering lines."""
    low, high = scene.positions.min(0), scene.positions.max(0)
    edge = 0.06 * float((high - low).max())
    (left, bottom), (right, top) = ((0.0, 0.0), scene.size) if scene.size else (low - edge, high + edge)
    tall = float((top - bottom) / (right - left))
    figure, axes = new_figure(1, len(scene.attention), min(4.9 * tall + 0.7, 9.0))
    figure.suptitle(plain(title), **TITLE)
    asked = scene.related.any(1)
    for ax, (step, attention) in zip(axes.flat, scene.attention, strict=True):
        ax.set_aspect("equal")
        ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(visible=True, color=INK, linewidth=0.9)
        _discs(ax, scene, attention, scene.radius or 0.012 * float(right - left))
        _attention_lines(ax, scene, attention)
        partners = float((attention * scene.related).sum(1)[asked].mean())
        words = f"step {step:,}: {partners:.0%} on partners (uniform: {scene.uniform:.0%})"
        ax.set_title(words, fontsize=10, loc="left", color=INK)
    return figure


def _discs(ax: Axes, scene: Scene, attention: Array, radius: float) -> None:
    """Tokens as discs; related pairs joined by a broad band; a core as dark as the attention to oneself."""
    pairs = np.argwhere(np.triu(scene.related | scene.related.T) & ~scene.wrap)
    ax.add_collection(LineCollection(list(scene.positions[pairs]), colors=BAND, linewidths=7, zorder=1.2))
    fill = np.where(scene.related.any(1), RELATED, FREE).tolist()
    discs = [Circle((x, y), radius) for x, y in scene.positions]
    ax.add_collection(PatchCollection(discs, facecolors=fill, edgecolors="#5F6368", linewidths=1.0, zorder=1))
    cores = [Circle((x, y), 0.42 * radius) for x, y in scene.positions]
    dark = [to_rgba(BLUE, float(np.clip(weight, 0, 1))) for weight in attention.diagonal()]
    ax.add_collection(PatchCollection(cores, facecolors=dark, edgecolors="none", zorder=1.5))


def _attention_lines(ax: Axes, scene: Scene, attention: Array) -> None:
    """Attention between tokens, the strongest on top: lines bend to the left and taper towards the token looked at."""
    pairs = np.argwhere(~np.eye(len(attention), dtype=bool) & (attention > LEAST_WEIGHT))
    order = np.argsort(attention[pairs[:, 0], pairs[:, 1]])[-MOST_LINES:]
    along = np.linspace(0.0, 1.0, 13)[:, None]
    segments, widths, colours = [], [], []
    for i, j in pairs[order]:
        step = scene.positions[j] - scene.positions[i]
        if scene.wrap[i, j] and scene.size is not None:
            step = step - np.round(step / np.array(scene.size)) * np.array(scene.size)
        path = scene.positions[i] + along * step + 0.4 * along * (1 - along) * np.array([-step[1], step[0]])
        weight = float(attention[i, j])
        segments += list(np.stack([path[:-1], path[1:]], 1))
        widths += list(8.0 * weight**0.75 * (1.15 - along[:-1, 0]))
        colours += [to_rgba(BLUE, min(0.95, 0.15 + 1.3 * weight))] * (len(along) - 1)
    ax.add_collection(LineCollection(segments, linewidths=widths, colors=colours, zorder=2, capstyle="butt"))
