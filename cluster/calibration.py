"""`headway probe calibrate`: which step size and localisation Langevin chains can bear, on one member of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.table import Table

from cluster import tracking
from cluster.analysis import load_analysis
from cluster.driver import Desk
from cluster.figures import COLOURS, DASHES, INK, new_figure, save
from cluster.geometry import AT_ONCE, Kept, Subject, make_examples
from cluster.measuring import find_subjects
from cluster.pack import make_pool
from cluster.sweep import Sweep
from cluster.tracking import Place
from probes.langevin import Sampler
from probes.llc import LEAST_ACCEPTANCE, Calibration, LLCSettings, calibrate
from sim.checks import require
from sim.generator import key_of
from train.refine import HeadTarget


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Which member, at which step, and what is tried on its heads."""

    width: int | None = None
    """Width of the member. Default: the smallest."""
    seed: int | None = None
    """Its seed. Default: the lowest."""
    checkpoint: int | None = None
    """The step, of those at which weights were kept. Default: the last, where losses are most curved."""
    layer: int | None = None
    """The layer whose heads move. Default: the last."""
    minibatch: int = 32
    """Examples a draw, with replacement."""
    step_sizes: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Step sizes to try."""
    gammas: tuple[float, ...] = (100.0, 300.0, 1000.0)
    """Localisations to try."""
    n_beta: float = LLCSettings().n_beta
    """Inverse temperature: what the loss counts, in examples."""
    chains: int = 2
    """Chains of each head and combination."""
    draws: int = LLCSettings().draws
    """Draws of a chain that count."""
    burn_in: int = LLCSettings().burn_in
    """Draws of a chain before these."""
    sampler: Sampler = "sgld"
    """sgld, or rmsprop."""
    sigma: float | None = None
    """As for `headway probe llc`."""

    @property
    def settings(self) -> LLCSettings:
        """Of chains, with what is tried left at its default. ValueError for what is not allowed."""
        return LLCSettings(
            n_beta=self.n_beta, chains=self.chains, draws=self.draws, burn_in=self.burn_in, sampler=self.sampler,
            sigma=self.sigma, sensitivity=False,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What was found, on what, and where the figure lies."""

    found: Calibration
    member: str
    figure: Path


def calibrate_sweep(desk: Desk, parent: Run, sweep: Sweep, grid: Grid) -> Calibrated:
    """Try a grid of settings on the heads of one layer of one finished member, in this process.

    ValueError, before anything is computed, for a setting that is not allowed or a width or seed that does not exist.
    """
    _ = grid.settings
    place = Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    counted = tracking.counted(tracking.children(desk.client, place))
    which = {name: [] if value is None else [value] for name, value in (("widths", grid.width), ("seeds", grid.seed))}
    subjects = find_subjects(desk.client, sweep, load_analysis(desk.client, place.parent), counted, which)
    subject = min(subjects, key=lambda each: (each.config.model.width, each.config.seed))
    found = calibrate_member(desk.client, subject, grid)
    path = desk.out / sweep.id / "calibration.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(draw_calibration(found), path)
    return Calibrated(found=found, member=subject.name, figure=path)


def calibrate_member(client: MlflowClient, subject: Subject, grid: Grid) -> Calibration:
    """The same for a member. ValueError for a layer or step that it does not have."""
    config, kept = subject.config, Kept.fetch(client, subject.run_id)
    steps, layers = list(kept.weights), config.model.layers
    step = steps[-1] if grid.checkpoint is None else grid.checkpoint
    require(step in steps, "checkpoint", step, f"one of {', '.join(map(str, steps))}, where weights were kept")
    layer = layers - 1 if grid.layer is None else grid.layer
    require(0 <= layer < layers, "layer", layer, f"in 0..{layers - 1}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = make_pool(config, device)
    batch = make_examples(config, pool, config.probe.replicates * config.probe.examples)["all"].batch
    heads = [(0, head) for head in range(config.model.n_heads)]
    parameters = kept.parameters([step], device)
    target = HeadTarget(config.system, config.model, parameters, batch, heads, layer, grid.minibatch)
    seeds = [key_of("calibrate", subject.member_id, step, layer, head) for _, head in heads]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small products
    try:
        return calibrate(target, seeds, grid.settings, grid.step_sizes, grid.gammas, AT_ONCE[device])
    finally:
        torch.set_num_threads(threads)


def calibration_table(found: Calibration) -> Table:
    """A row for each combination, acceptance, spread and heating being those of the worst head; the chosen in bold."""
    names = ("gamma", "step size", "coefficient", "sd", "acceptance", "spread", "heating", "drift", "chains lost")
    table = Table(*names)
    chosen = (found.chosen.gamma, found.chosen.step_size) if found.chosen else None
    rows = zip(
        found.gamma, found.step_size, found.llc, found.sd, found.acceptance, found.spread, found.heating, found.drift,
        found.diverged, strict=True,
    )  # fmt: skip
    for gamma, eps, llc, sd, acceptance, spread, heating, drift, lost in rows:
        sampled = (f"{acceptance:.2f}", f"{spread:.2f}", f"{heating:.0%}", f"{drift:+.0%}", str(lost))
        cells = (f"{gamma:g}", f"{eps:g}", f"{llc:.3g}", f"{sd:.2g}", *sampled)
        table.add_row(*cells, style="bold" if (gamma, eps) == chosen else "")
    return table


def draw_calibration(found: Calibration) -> Figure:
    """Coefficient and acceptance against step size, a line a gamma, and the traces of the largest step of each."""
    figure, axes = new_figure(1, 3, 3.4)
    value, acceptance, trace = axes[0]
    for index, gamma in enumerate(sorted(set(found.gamma.tolist()))):
        own = np.flatnonzero(found.gamma == gamma)
        own = own[np.argsort(found.step_size[own])]
        style = {"color": COLOURS[index % len(COLOURS)], "ls": DASHES[index % len(DASHES)], "lw": 1.4}
        x = found.step_size[own]
        value.errorbar(x, found.llc[own], found.sd[own], marker="o", ms=4, capsize=0, label=f"gamma {gamma:g}", **style)
        acceptance.plot(x, found.acceptance[own], marker="o", ms=4, **style)
        good = own[found.acceptance[own] >= LEAST_ACCEPTANCE]
        for at in good[-1:]:
            trace.plot(np.arange(1, found.trace.shape[1] + 1), found.trace[at], color=style["color"], lw=1)
    acceptance.axhline(LEAST_ACCEPTANCE, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
    if found.chosen is not None:
        for ax in (value, acceptance):
            ax.axvline(found.chosen.step_size, color=INK, lw=0.8, zorder=0)
    for ax, name in ((value, "coefficient"), (acceptance, "acceptance")):
        ax.set_xscale("log")
        ax.set_xlabel("step size", fontsize=9.5)
        ax.set_ylabel(name, fontsize=9.5)
    trace.set_xlabel("draw", fontsize=9.5)
    trace.set_ylabel("n_beta (L - L*), mean over chains", fontsize=9.5)
    trace.set_title("largest step with 90% acceptance", fontsize=9, loc="left", color=INK)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower left", ncols=4)
    return figure
