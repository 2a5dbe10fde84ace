"""Train and probe one pack, on any machine with torch, numpy and scipy: `python -m cluster.pack RECIPE --out DIR`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import curves as tables
from cluster.curves import Curves
from cluster.encoding import encode
from cluster.outside import probe_kinds
from cluster.sizing import Room, require_computable
from cluster.store import FolderStore
from cluster.sweep import Member, MemberConfig, Pack, packs, part_sizes, validate, versions
from probes.probe import Measurement, Probe, ProbeBatch
from sim.checks import require
from sim.generator import Generator
from sim.pool import Arrays, Pool
from sim.system import Batch, Rows, System
from train import checkpoint
from train.checkpoint import Files
from train.loop import Trainer, even_cuts, fitting
from train.model import tensor_specs
from train.neighbours import draw
from train.process import be_worker
from train.snapshot import Snapshot
from train.state import State, join, unflatten

STRIDE = 8  # steps between looks at the clock: parts of a pack take turns no more often

Figures = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often, in seconds, a running pack shows its loss and keeps a checkpoint."""

    progress: float = 10.0
    checkpoint: float = 60.0


class Sink(Protocol):
    """Where a pack's results go."""

    def restore(self, pack: Pack) -> tuple[State, Curves] | None:
        """The furthest point that all members of the pack can go on from; None to start afresh."""

    def progress(self, pack: Pack, step: int, figures: Figures) -> None:
        """Called at every probe step, and every few seconds, with losses `[S]` (and system figures) then known."""

    def note(self, pack: Pack, text: str) -> None:
        """Tell the user that the pack does not go as planned."""

    def save(self, pack: Pack, state: State, curves: Curves) -> None:
        """Keep a checkpoint."""

    def finish(self, pack: Pack, curves: Curves, diverged: Sequence[int]) -> None:
        """Take the whole tables. diverged: the step at which each member was frozen, -1 for sound ones."""


def build_probes(config: MemberConfig, pool: Pool) -> tuple[Probe, ...]:
    """All probes over the frozen probe set: the same for every member that shares the pool and attends as far.

    Costly probes see the first `sparse_examples` of each replicate.
    """
    size, sparse, rows = config.probe.examples, config.probe.sparse_examples, pool.parts["probe"]
    stream = Generator.of("probe set", config.data.seed, device=rows.device)

    def replicates(examples: int) -> tuple[ProbeBatch, ...]:
        return tuple(
            probe_batch(config, rows.take(slice(r * size, r * size + examples)), stream.fold(r))
            for r in range(config.probe.replicates)
        )

    kinds = probe_kinds(config.probe.probes).values()
    made = (kind.build(replicates(size if kind.when == "every" else sparse)) for kind in kinds)
    return tuple(probe for probe in made if probe is not None)


def probe_batch(config: MemberConfig, rows: Rows, generator: Generator) -> ProbeBatch:
    """One replicate; tokens are grouped by whether they have a partner in the relation that the sweep is judged by."""
    system = config.system
    batch = draw(system, config.model, rows, generator)
    relations = system.relations(batch.geometry, batch.keys)
    related = relations[system.relation].any(-1)
    real = torch.ones_like(related) if batch.mask is None else batch.mask
    groups = {"related": related & real, "free": ~related & real}
    ceilings = {name: trivial_loss(system, batch, tokens) for name, tokens in {"all": real, **groups}.items()}
    known = system.floors().without_attention
    return ProbeBatch(
        batch=batch,
        relations=relations,
        distance=system.distance(batch.geometry, batch.keys),
        groups=groups,
        ceilings=ceilings if known is None else {**ceilings, "all": known},
    )


def trivial_loss(system: System, batch: Batch, tokens: Tensor) -> float:
    """Mean loss over the tokens (bool `[B, N]`) of predicting their mean target."""
    mean = batch.targets[tokens].mean(0).expand_as(batch.targets)
    share = tokens.sum(-1) / tokens.sum()
    return float((system.loss(mean, replace(batch, mask=tokens)) * share).sum())


class Clock:
    """Tells when something that happens every `period` seconds is due."""

    def __init__(self, period: float) -> None:
        self.period, self.last = period, time.monotonic()

    def due(self) -> bool:
        """Whether the period has passed since this last answered True."""
        if time.monotonic() - self.last < self.period:
            return False
        self.last = time.monotonic()
        return True


class PackRun:
    """One pack from its start (or its checkpoint) to its last step."""

    def __init__(self, pack: Pack, pool: Pool, probes: Sequence[Probe], sink: Sink, pace: Pace | None = None) -> None:
        pace = pace or Pace()
        self.pack, self.probes, self.sink = pack, probes, sink
        self.progress, self.checkpoint = Clock(pace.progress), Clock(pace.checkpoint)
        config = pack.config
        resumed = sink.restore(pack)
        state, self.curves = resumed or (None, Curves(members=len(pack.members)))
        trains = [member.config.train for member in pack.members]
        keys = [member.key for member in pack.members]
        orders = [member.order_key for member in pack.members]
        rows = pool.parts["train"]
        self.trainer = Trainer(config.system, rows, config.model, trains, keys, orders=orders, state=state)
        self.stops = config.probe.steps(config.train.steps)
        self.sparse = config.probe.sparse_steps(config.train.steps)
        self.kept = config.weight_steps
        before = self.curves.weights  # an earlier attempt may have been told to keep others
        self.curves.weights = {step: before[step] for step in before if step in self.kept}
        at_once = fitting(config.system, rows, config.model, config.train, config.probe.at_once)
        self.cuts = even_cuts(len(pack.members), at_once)
        self.validation = pool.parts["validation"]
        self.stream = Generator.of("validation", config.data.seed, device=self.validation.device)
        self.validation_batch = draw(config.system, config.model, self.validation, self.stream)

    def run(self) -> None:
        """Train, probe at every probe step not yet on record, hand the tables to the sink."""
        for stop in self.stops:
            if stop <= self.curves.last_step:
                continue
            while self.trainer.state.step < stop:
                self.trainer.advance(min(STRIDE, stop - self.trainer.state.step))
                self._between(stop)
            self._probe()
        self.sink.finish(self.pack, self.curves, self.trainer.state.diverged.tolist())

    def _between(self, stop: int) -> None:
        """Show the loss and keep a checkpoint where due; at a probe step that waits until the probes are done."""
        if self.trainer.state.step == stop:
            return
        if self.progress.due():
            state = self.trainer.state
            self.sink.progress(self.pack, state.step, {"train_loss": to_numpy(state.loss_sum / state.loss_count)})
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self.checkpoint.due():
            self.sink.save(self.pack, self.trainer.state, self.curves)

    def _probe(self) -> None:
        snapshot = self.trainer.snapshot()
        now, sparse = snapshot.time, snapshot.step in self.sparse
        due = {"every": True, "sparse": sparse, "checkpoints": snapshot.step in self.kept}
        figures = {"train_loss": to_numpy(self.trainer.take_loss())} | self.measure_figures(snapshot, sparse)
        for probe in self.probes:
            if due[probe.when]:
                self.curves.add(probe.name, snapshot.step, now, self.measure(probe, snapshot))
        if snapshot.step in self.kept:
            self.curves.weights[snapshot.step] = self.trainer.state.weights.detach().cpu().numpy().copy()
        self.curves.add_figures(snapshot.step, now, figures)
        self.sink.progress(self.pack, snapshot.step, figures)
        self._save_if_due()

    def measure(self, probe: Probe, snapshot: Snapshot) -> Measurement:
        """A probe's rows of all members, seen a few members at a time: that bounds memory and suits the cache."""
        return Measurement.join([probe.measure(snapshot.part(cut)) for cut in self.cuts])

    def measure_figures(self, snapshot: Snapshot, sparse: bool) -> Figures:
        """Validation loss, at sparse steps the system's own figures too; noise is the same at every step."""
        parts = [self._figures(snapshot.part(cut), sparse) for cut in self.cuts]
        return {name: np.concatenate([to_numpy(part[name]) for part in parts]) for name in parts[0]}

    def _figures(self, snapshot: Snapshot, sparse: bool) -> dict[str, Tensor]:
        batch = self.validation_batch
        figures = {"validation_loss": snapshot.loss(snapshot.predict(batch), batch).mean(-1)}
        if sparse:
            system, stream = self.pack.config.system, self.stream.fold("diagnose")
            figures |= system.diagnose(snapshot.predict, self.validation, stream)
        return figures


def to_numpy(value: Tensor) -> NDArray[np.float64]:
    """A float64 array on the host."""
    return value.detach().double().cpu().numpy()


def finite_mean(values: NDArray[np.float64]) -> float:
    """Mean over the members that have a value; NaN where none has."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def run_pack(
    pack: Pack, pool: Pool, probes: Sequence[Probe], sink: Sink, pace: Pace | None = None, pieces: int = 1
) -> None:
    """Train and probe a pack to its end; everything it finds goes to the sink.

    pieces: how many packs to make of it, trained one after the other. Where memory runs out a pack is halved, again and
    again if need be; its halves go on from its last checkpoint, and the sink is told.
    """
    waiting = list(pack.cut(pieces))
    while waiting:
        piece = waiting.pop(0)
        if (lack := _lack_of_memory(piece, pool, probes, sink, pace)) is not None:
            sink.note(piece, f"ran out of memory with {len(piece.members)} members, goes on in halves: {lack}")
            waiting[:0] = piece.cut(2)


def _lack_of_memory(pack: Pack, pool: Pool, probes: Sequence[Probe], sink: Sink, pace: Pace | None) -> str | None:
    """Run a pack; what it lacked where memory ran out, all of it given back. A single member's lack is an error."""
    try:
        PackRun(pack, pool, probes, sink, pace).run()
        return None
    except Exception as error:
        lack = out_of_memory(error)
        if lack is None or len(pack.members) == 1:
            raise
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return lack


NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In errors of torch that are of no type of their own."""


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of the lack of memory behind an error, None where it has another cause."""
    while error is not None:
        text = str(error).partition("\n")[0]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY):
            return f"{type(error).__name__}: {text}"
        error = error.__cause__ or error.__context__
    return None


def save_checkpoint(files: Files, pack: Pack, state: State, curves: Curves) -> None:
    """Keep state and tables of a running pack."""
    arrays = checkpoint.to_arrays(state) | {f"curves/{name}": value for name, value in curves.to_arrays().items()}
    checkpoint.save(files, pack.id, [member.id for member in pack.members], state.step, arrays, versions())


def restore_checkpoint(files: Files, pack: Pack) -> tuple[State, Curves] | None:
    """State and tables that all members of the pack can go on from, cut from whatever packs they were in."""
    found = checkpoint.restore(files, [member.id for member in pack.members], versions(), warn)
    if found is None:
        return None
    step, slices = found
    states = [checkpoint.to_state(step, arrays).take(rows) for arrays, rows in slices]
    parts = [tables.take(only_curves(arrays), rows) for arrays, rows in slices]
    return join(states), Curves.from_arrays(tables.join(parts))


def drop_checkpoints(files: Files, settled: Collection[str]) -> None:
    """Drop checkpoints of which every member is settled."""
    for manifest in checkpoint.manifests(files, versions(), warn):
        if all(member in settled for member in manifest.members):
            checkpoint.remove(files, manifest.name)


def only_curves(arrays: Mapping[str, NDArray[np.generic]]) -> tables.Columns:
    """The tables among a checkpoint's arrays."""
    return {name[7:]: value for name, value in arrays.items() if name.startswith("curves/")}


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"headway: {message}", file=sys.stderr, flush=True)


def member_files(member: Member, index: int, curves: Curves) -> dict[str, bytes]:
    """What every sink keeps of a member beside its tables: weights by step and name, and the config."""
    config = member.config
    specs = tensor_specs(config.model, config.system.d_in, config.system.d_out)
    weights = {
        f"{step}/{name}": value[0].numpy()
        for step, rows in sorted(curves.weights.items())
        for name, value in unflatten(torch.from_numpy(rows[index : index + 1]), specs).items()
    }
    return {
        "weights.npz": checkpoint.encode_arrays(weights),
        "config.json": json.dumps(encode(config), indent=1).encode(),
    }


class FolderSink:
    """Tables as .npz in a folder, one sub-folder a member; nothing but numpy."""

    def __init__(self, folder: Path) -> None:
        self.files = FolderStore(folder)

    def done(self, member_id: str) -> bool:
        """Whether the member's tables are there (they are written last)."""
        return (self.files.root / "members" / member_id / "member.json").exists()

    def restore(self, pack: Pack) -> tuple[State, Curves] | None:
        """From the folder's checkpoints."""
        return restore_checkpoint(self.files, pack)

    def note(self, pack: Pack, text: str) -> None:
        """To standard error."""
        warn(f"pack {pack.id} {text}")

    def progress(self, pack: Pack, step: int, figures: Figures) -> None:
        """A line to standard output."""
        losses = {name: finite_mean(value) for name, value in figures.items() if name.endswith("loss")}
        print(f"step {step}", *(f"{name} {value:.4f}" for name, value in losses.items()), flush=True)

    def save(self, pack: Pack, state: State, curves: Curves) -> None:
        """To the folder's checkpoints."""
        save_checkpoint(self.files, pack, state, curves)

    def finish(self, pack: Pack, curves: Curves, diverged: Sequence[int]) -> None:
        """`members/ID/...`: curves.npz, figures.npz, weights.npz, config.json, and last member.json. Then the pack's
        checkpoints go."""
        for index, member in enumerate(pack.members):
            files = member_files(member, index, curves) | {
                "curves.npz": checkpoint.encode_arrays(curves.head_table(index)),
                "figures.npz": checkpoint.encode_arrays(curves.figure_table(index)),
                "member.json": json.dumps({"axes": member.axes, "diverged": diverged[index]}).encode(),
            }
            for name, content in files.items():
                self.files.put(f"members/{member.id}/{name}", content)
        known = (name.removeprefix("members/") for name in self.files.names("members"))
        drop_checkpoints(self.files, {member for member in known if self.done(member)})


def pools(members: Sequence[Pack], device: str) -> Iterator[tuple[Pack, Pool]]:
    """Each pack with its pool; one pool is held at a time."""
    pool: Pool | None = None
    made_for: object = None
    for pack in members:
        config = pack.config
        wanted = (config.system, config.data, part_sizes(config), config.train.dtype)
        if pool is None or wanted != made_for:
            pool, made_for = make_pool(config, device), wanted
        yield pack, pool


def make_pool(config: MemberConfig, device: str = "cpu") -> Pool:
    """The pool of a member's system, in its precision, on the device."""
    pool = Pool.make(config.system, config.data.seed, part_sizes(config))
    return pool.to(device, config.train.dtype)


def pool_arrays(config: MemberConfig) -> tuple[Arrays, None]:
    """The arrays of a member's pool as it is made, for all precisions; beside them nothing, to wait for."""
    be_worker()
    return Pool.make(config.system, config.data.seed, part_sizes(config)).to_arrays(), None


def take_device(name: str) -> str:
    """The kind of the device `cpu`, `cuda` or `cuda:N`, which becomes the current one; ValueError for any other."""
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = name == "cpu" or (kind == "cuda" and int(index if index.isdecimal() else "0") < count)
    allowed = "cpu" + "".join(f", cuda:{n}" for n in range(count))
    require(known and (index == "" or index.isdecimal()), "--device", name, f"one of {allowed}")
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))
    return kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m cluster.pack`."""
    from cluster.recipes import load_sweep

    parser = argparse.ArgumentParser(prog="python -m cluster.pack", description=__doc__)
    parser.add_argument("sweep", help="a recipe's name, module:function, or a stored .json")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and checkpoints")
    parser.add_argument("--only", type=int, help="train this pack only, by its number")
    parser.add_argument("--size", type=int, help="members a pack (default: as many as gain from it and fit)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        sweep = load_sweep(options.sweep)
        if options.steps is not None:
            sweep = replace(sweep, train=replace(sweep.train, steps=options.steps))
        room = Room.here(gpus=0.0 if take_device(options.device) == "cpu" else 1.0)
        todo = packs(validate(sweep), workers=1, size=options.size, most=room.most)
        for pack in todo:
            require_computable(pack.config, room.device)
        if options.only is not None and not 0 <= options.only < len(todo):
            raise ValueError(f"--only: {options.only} is not allowed; it must be in 0..{len(todo) - 1}")
    except ValueError as error:
        parser.error(str(error))
    be_worker()
    sink = FolderSink(options.out)
    chosen = todo if options.only is None else todo[options.only : options.only + 1]
    missing = [replace(p, members=tuple(m for m in p.members if not sink.done(m.id))) for p in chosen]
    for pack, pool in pools([pack for pack in missing if pack.members], options.device):
        run_pack(pack, pool, build_probes(pack.config, pool), sink)
    print(f"tables are in {options.out / 'members'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
