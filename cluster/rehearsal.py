"""A system or probe that nobody has seen at work does everything once, on a few rows, before a sweep of it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from cluster.outside import find_probe, told
from cluster.pack import PackRun, build_probes, make_pool
from cluster.plan import Nowhere
from cluster.sweep import Member, MemberConfig, Pack
from probes.probe import Probe
from sim import SYSTEMS
from sim.checks import require
from sim.generator import Generator
from sim.system import Rows
from train.snapshot import Snapshot

ROWS = 32
BATCH = 4


def rehearse(members: Sequence[Member]) -> None:
    """One model of each system and set of probes takes a step and is measured, unless all of these are headway's own.

    ValueError in one line for what is wrong with one.
    """
    for (system, probe), config in {(each.config.system, each.config.probe): each.config for each in members}.items():
        if probe.probes or type(system) not in SYSTEMS.values():
            _rehearse(config)


def _rehearse(config: MemberConfig) -> None:
    torch.set_num_threads(1)
    small = replace(
        config,
        data=replace(config.data, rows=ROWS, validation_rows=BATCH),
        train=replace(config.train, batch_size=BATCH, precision="float32", compiled=False),
        seed=0,
    )
    system = type(small.system).__name__
    with named(f"system: {system}"):
        pool = make_pool(small)
        small.system.floors()
    own = {find_probe(name).name: name for name in config.probe.probes}
    with named("probe.probes: one of them" if own else f"system: {system}"):
        probes = build_probes(small, pool)
    with named(f"system: {system}"):
        require_shapes(small, pool.parts["train"].take(slice(BATCH)))
        run = PackRun(Pack(members=(Member(id="0" * 16, config=small, axes={}),)), pool, probes, Nowhere())
        run.trainer.advance()
        snapshot = run.trainer.snapshot()
        figures = run.measure_figures(snapshot, sparse=True)
        for name, values in figures.items():
            require(values.shape == (1,), f"diagnose[{name!r}]", values.shape, "one number for each member")
    for probe in probes:
        with named(f"probe.probes: {own[probe.name]}" if probe.name in own else f"system: {system}"):
            require_dense(probe, run, snapshot)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Errors of other people's code as ValueError in one line that names it."""
    try:
        yield
    except Exception as error:
        checked = isinstance(error, ValueError) and "is not allowed; it must be" in str(error)
        raise ValueError(f"{what}: {error}" if checked else f"{what} fails with {told(error)}") from error


def require_shapes(config: MemberConfig, rows: Rows) -> None:
    """Raise ValueError where a batch is not of the form that the system's own figures promise."""
    system = config.system
    batch = system.draw(rows, Generator.of("rehearsal"))
    (n, tokens), shape = batch.inputs.shape[:2], tuple(batch.inputs.shape)
    require(shape == (n, tokens, system.d_in), "inputs", shape, f"[B, N, d_in] with d_in = {system.d_in}")
    shape = tuple(batch.targets.shape)
    require(shape == (n, tokens, system.d_out), "targets", shape, f"[{n}, {tokens}, d_out] with d_out = {system.d_out}")
    relations = system.relations(batch.geometry, batch.keys)
    require(system.relation in relations, "relation", system.relation, f"one of {', '.join(relations)}")
    keys = tokens if batch.keys is None else batch.keys.shape[-1]
    for name, pairs in relations.items():
        sound = pairs.dtype == torch.bool and tuple(pairs.shape) == (n, tokens, keys)
        form = f"{pairs.dtype} {tuple(pairs.shape)}"
        require(sound, f"relations[{name!r}]", form, f"bool [{n}, {tokens}, {keys}]")
    shape = tuple(system.loss(torch.zeros_like(batch.targets), batch).shape)
    require(shape == (n,), "loss", shape, f"[{n}], one number for each example")


def require_dense(probe: Probe, run: PackRun, snapshot: Snapshot) -> None:
    """Raise ValueError unless a probe measures what its columns and relations promise."""
    found = run.measure(probe, snapshot)
    require(
        set(found.values) == set(probe.columns), "columns", sorted(found.values), f"those it names, {probe.columns}"
    )
    require(tuple(found.relations) == tuple(probe.relations), "relations", found.relations, f"{probe.relations}")
    config = run.pack.config
    grid = (1, config.model.layers, config.model.n_heads, len(probe.relations), config.probe.replicates)
    for name, values in found.values.items():
        sound = isinstance(values, np.ndarray) and values.shape == grid
        require(sound, name, getattr(values, "shape", type(values).__name__), f"an array [S, L, H, Q, R] = {grid}")
