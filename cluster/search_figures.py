"""Figures of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from optuna.distributions import CategoricalDistribution

from cluster.figures import COLOURS, GREY, INK, TITLE, new_figure, plain
from cluster.objectives import OBJECTIVES
from cluster.search_config import Search
from cluster.search_results import best, complete


def log_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """A log scale with plain numbers, also where it spans less than a decade."""
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    axis = ax.yaxis if which == "y" else ax.xaxis
    narrow = max(values) < 10 * min(values)
    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def value_axis(ax: Axes, search: Search, index: int, values: Sequence[float], which: str = "y") -> None:
    """Name and scale of an objective's axis."""
    objective = OBJECTIVES[search.options.objective[index]]
    log = objective.log and min(values) > 0
    if log:
        log_axis(ax, which, values)
    label = objective.text + (", log scale" if log else "")
    (ax.set_ylabel if which == "y" else ax.set_xlabel)(label, fontsize=9.5)


def draw_history(search: Search, study: optuna.Study) -> Figure:
    """Each objective by point (dots; open: some members took a worst value), and the best so far (line)."""
    trials, names = complete(study), search.options.objective
    figure, axes = new_figure(len(names), 1, 2.9 * len(names))
    figure.suptitle(f"{plain(study.study_name)}: points and the best so far", **TITLE)
    for index, ax in enumerate(axes[:, 0]):
        values = [trial.values[index] for trial in trials]
        better = min if search.directions[index] == "minimize" else max
        so_far = [better(values[: end + 1]) for end in range(len(values))]
        numbers = [trial.number for trial in trials]
        ax.step(numbers, so_far, where="post", color=COLOURS[0], lw=1.6)
        faces = [
            "white" if trial.user_attrs.get("never") or trial.user_attrs.get("diverged") else INK for trial in trials
        ]
        ax.scatter(numbers, values, s=26, c=faces, edgecolors=INK, linewidths=1.0, zorder=3)
        value_axis(ax, search, index, values)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("point (open: members without a detector, or diverged)", fontsize=9.5)
    return figure


def draw_slices(search: Search, study: optuna.Study) -> Figure:
    """Each objective against each field; darker points came later."""
    trials, names = complete(study), search.options.objective
    columns = min(len(search.space), 3)
    deep = math.ceil(len(search.space) / columns)
    figure, axes = new_figure(len(names) * deep, columns, 2.9 * len(names) * deep)
    figure.suptitle(f"{plain(study.study_name)}: objectives by field (darker: later)", **TITLE)
    for index in range(len(names)):
        values = [trial.values[index] for trial in trials]
        panels = list(axes[index * deep : (index + 1) * deep].flat)
        for spare in panels[len(search.space) :]:
            spare.set_visible(False)
        for ax, item in zip(panels, search.space, strict=False):
            x = [item.value(trial.params) for trial in trials]
            if isinstance(item.distribution, CategoricalDistribution):
                ax.set_xticks(range(len(item.ends)), list(map(str, item.ends)))
                x = [item.ends.index(value) for value in x]
                ax.set_xlim(-0.5, len(item.ends) - 0.5)
            elif item.log:
                log_axis(ax, "x", x)
            ax.scatter(x, values, c=range(len(trials)), cmap="Blues", vmin=-len(trials) / 2, s=30,
                       edgecolors=GREY, linewidths=0.8)  # fmt: skip
            value_axis(ax, search, index, values)
            ax.set_xlabel(item.name + (", log scale" if item.log else ""), fontsize=9.5)
    return figure


def draw_pareto(search: Search, study: optuna.Study) -> Figure:
    """Two objectives against each other, the front in colour."""
    figure, ((ax,),) = new_figure(1, 1, 4.2)
    figure.suptitle(f"{plain(study.study_name)}: Pareto front", **TITLE)
    every, front = complete(study), best(search, study)
    ax.scatter(*zip(*(trial.values for trial in every), strict=True), s=26, color=GREY)
    ax.step(*zip(*(trial.values for trial in front), strict=True), where="post", color=COLOURS[1], lw=1.2)
    ax.scatter(*zip(*(trial.values for trial in front), strict=True), s=36, color=COLOURS[1], zorder=3)
    for trial in front:
        ax.annotate(f" {trial.number}", trial.values, fontsize=8.5, color=INK, va="bottom")
    for index, which in enumerate("xy"):
        value_axis(ax, search, index, [trial.values[index] for trial in every], which)
    return figure
