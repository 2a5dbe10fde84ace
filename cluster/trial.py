"""A pack's life on a Ray worker: from the object store's pool to the ledger, with its failures counted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from mlflow import MlflowClient
from ray import tune
from ray.exceptions import RayTaskError

from cluster.curves import Columns, Curves
from cluster.encoding import decode, encode
from cluster.member_runs import MemberRuns
from cluster.pack import (
    Clock,
    Figures,
    Pace,
    build_probes,
    drop_checkpoints,
    finite_mean,
    member_files,
    restore_checkpoint,
    run_pack,
    save_checkpoint,
    warn,
)
from cluster.store import PATIENCE, Insisting, open_store
from cluster.sweep import MemberConfig, Pack, Sweep, part_sizes, versions
from cluster.tracking import Place, counted, own_children, patiently
from probes.probe import Probe
from sim.pool import Pool, digest_of
from sim.system import System
from train import checkpoint
from train.checkpoint import Files
from train.process import be_worker
from train.state import State

GIVE_UP = 3  # failures at the same step after which a pack's members are FAILED
REPORT_EVERY = 1.0  # seconds between reports to the driver
FLUSH_EVERY = 10.0  # seconds between metric batches to MLflow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialContext:
    """What all trials of a sweep share. `pools`: object references of pool arrays by `pool_name`; `gpus`: a pack's;
    `watched`: the driver is told the validation loss of every probe step; `patience`: seconds that work waits for a
    store, or a node, that is away."""

    packs: tuple[Pack, ...]
    pools: Mapping[str, Any]
    place: Place
    store: str
    pace: Pace
    gpus: float = 0.0
    watched: bool = False
    patience: float = PATIENCE


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchContext:
    """What all trials of a search share. `shelf`: the actor that has the pools; the rest as in `TrialContext`."""

    shelf: Any
    pace: Pace
    gpus: float = 0.0
    watched: bool = False
    patience: float = PATIENCE


def pool_name(config: MemberConfig) -> str:
    """Names the pool that a member trains on."""
    return digest_of(config.system, config.data.seed, part_sizes(config))


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a trial tells the driver: its pack's id, the mean step and training loss of its members; why it has failed
    for good, and what does not go as planned, both empty where all is well. `validation`: where it is watched, the
    median validation loss of a probe step, which `step` then is; NaN between them."""

    pack: str
    step: int
    loss: float = float("nan")
    failed: str = ""
    note: str = ""
    validation: float = float("nan")

    def send(self) -> None:
        """To the driver, through Tune."""
        tune.report(asdict(self))


def train_pack(config: Mapping[str, Any], context: TrialContext) -> None:
    """The Tune trainable of a sweep: trains pack number `config["pack"]`."""
    train_here(context.packs[config["pack"]], context)


def train_point(config: Mapping[str, Any], context: SearchContext) -> None:
    """The Tune trainable of a search: trains the packs of the point that `point_config` has told."""
    body = json.loads(config["point"])
    sweep: Sweep = decode(Sweep, body["sweep"], "sweep")
    members = {member.id: member for member in sweep.members()}
    for each in body["packs"]:
        pack = Pack(members=tuple(members[name] for name in each["members"]), start=each["start"])
        place = Place(**body["place"])
        try:
            arrays = ray.get(context.shelf.find.remote(pack.config))[0]
        except RayTaskError as error:  # it would fail as often as it is tried
            runs = MemberRuns(place, pack, "", context.patience)
            give_up(runs, pack, f"its examples cannot be made: {error.cause}")
            runs.close()
            return
        own = TrialContext(
            packs=(pack,),
            pools={pool_name(pack.config): arrays},
            place=place,
            store=body["store"],
            pace=context.pace,
            gpus=context.gpus,
            watched=context.watched and len(pack.members) == len(members),
            patience=context.patience,
        )
        train_here(pack, own)


def point_config(sweep: Sweep, packs: Sequence[Pack], place: Place, store: str) -> dict[str, str]:
    """What `train_point` is told: a sweep of one point, and the packs that are left of it."""
    left = [{"members": [member.id for member in pack.members], "start": pack.start} for pack in packs]
    body = {"sweep": encode(sweep), "packs": left, "place": asdict(place), "store": store}
    return {"point": json.dumps(body)}


def train_here(pack: Pack, context: TrialContext) -> None:
    """Train a pack on this worker, from the pool to the ledger."""
    be_worker()
    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
    attempts = Attempts(Insisting(open_store(context.store)), pack)
    left = unsettled(pack, context) if attempts.begun else pack
    if not left.members:
        end(attempts, pack)
        return
    runs = MemberRuns(context.place, left, device_name(device), context.patience)
    try:
        try:
            cause = attempts.begin(progress_of(attempts.files, pack))
        except OSError as error:  # not even a count of failures can be kept: Tune would try again and again
            cause = f"nothing can be written beside the checkpoints: {error}"
        if cause is not None:
            give_up(runs, pack, cause)
            return
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(1.0, context.gpus))
        sink = TrialSink(attempts.files, runs, context.watched and left is pack, pack.id)
        if (pieces := attempts.pieces) > 1:
            sink.note(left, f"lost its worker, perhaps for want of memory: goes on in {pieces} pieces")
        run_pack(left, *pool_and_probes(pack.config, context.pools, device), sink, context.pace, pieces)
        runs.close()
        end(attempts, pack, sink.loss)
    except Exception as error:
        attempts.note(error)
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            os._exit(1)  # the device context is lost; a reused worker would fail every later pack
        raise
    finally:
        runs.abandon()


def give_up(runs: MemberRuns, pack: Pack, cause: str) -> None:
    """End a pack's members as FAILED, and tell the driver."""
    runs.fail(cause)
    Report(pack=pack.id, step=pack.start, failed=cause).send()


def unsettled(pack: Pack, context: TrialContext) -> Pack:
    """The pack without settled members: a worker may be lost while it tells the ledger of one after another."""
    client = MlflowClient(tracking_uri=context.place.uri)
    own = {member.id for member in pack.members}
    found = patiently(lambda: own_children(client, context.place, own), context.place.uri, context.patience)
    done = counted(found)
    left = tuple(member for member in pack.members if member.id not in done)
    return pack if len(left) == len(pack.members) else replace(pack, members=left)


def end(attempts: Attempts, pack: Pack, loss: float = float("nan")) -> None:
    """Drop what only an unfinished pack needs, and tell the driver."""
    drop_checkpoints(attempts.files, {member.id for member in pack.members})
    attempts.end()
    Report(pack=pack.id, step=pack.config.train.steps, loss=loss).send()


def progress_of(files: Files, pack: Pack) -> int:
    """Steps of a pack's members on record, added up."""
    latest = checkpoint.latest_steps(checkpoint.manifests(files, versions(), warn))
    return sum(latest.get(member.id, 0) for member in pack.members)


_kept: dict[tuple[Any, ...], tuple[Pool, tuple[Probe, ...]]] = {}


def pool_and_probes(config: MemberConfig, pools: Mapping[str, Any], device: str) -> tuple[Pool, tuple[Probe, ...]]:
    """The pool on the device and the probes over its probe set; a worker keeps the last ones for its next pack."""
    key = (pool_name(config), config.probe, config.model.reach, config.train.dtype, device)
    if key not in _kept:
        _kept.clear()
        pool = Pool.from_arrays(ray.get(pools[key[0]])).to(device, config.train.dtype)
        _kept[key] = (pool, build_probes(config, pool))
    return _kept[key]


def device_name(device: str) -> str:
    """`cpu`, or the GPU's own name."""
    return torch.cuda.get_device_name() if device == "cuda" else device


ATTEMPTS = "attempts"


def forget_attempts(files: Files) -> None:
    """Count from nothing: a driver that was stopped is no failure of its packs."""
    for name in files.names(ATTEMPTS):
        files.delete(name)


class Attempts:
    """Counts failures of a pack without progress; kept in the store, so that a killed worker counts too.

    progress: steps of all members on record, added up. A worker that died without a word may have been killed for its
    memory: the pack is then cut into twice as many `pieces`, and only when those are single members does that count.
    """

    def __init__(self, files: Files, pack: Pack) -> None:
        self.files, self.name, self.members = files, f"{ATTEMPTS}/{pack.id}.json", len(pack.members)

    def _read(self) -> dict[str, Any]:
        blank = {"progress": -1, "failures": 0, "pieces": 1, "cause": "", "running": False}
        try:
            return {**blank, **json.loads(self.files.get(self.name))}
        except (OSError, ValueError):
            return blank

    def _write(self, body: Mapping[str, Any]) -> None:
        self.files.put(self.name, json.dumps(body).encode())

    @property
    def begun(self) -> bool:
        """Whether the pack was begun before, under this driver."""
        return bool(self._read()["progress"] >= 0)

    @property
    def pieces(self) -> int:
        """Into how many packs this one should be cut."""
        return int(self._read()["pieces"])

    def begin(self, progress: int) -> str | None:
        """Note a start. Returns the cause for giving up once the limit of failures without progress is reached."""
        body = self._read()
        if progress > body["progress"]:
            body |= {"progress": progress, "failures": 0, "cause": ""}
        elif body["running"] and body["pieces"] < self.members:
            body["pieces"] = min(2 * body["pieces"], self.members)
        elif body["running"]:
            body["failures"] += 1
        if body["failures"] >= GIVE_UP:
            self.end()  # the next run of the sweep may try again
            step = progress // self.members
            return f"failed {GIVE_UP} times from step {step}: {body['cause'] or 'the worker died'}"
        self._write({**body, "running": True})
        return None

    def note(self, error: BaseException) -> None:
        """Keep a failure and its cause."""
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"({os.path.basename(frame.filename)}:{frame.lineno})" for frame in frames[-1:]]  # noqa: PTH119
        cause = " ".join([f"{type(error).__name__}: {error}", *where])
        with contextlib.suppress(OSError):  # where the store itself is at fault, the error on its way says so
            body = self._read()
            self._write({**body, "failures": body["failures"] + 1, "cause": cause, "running": False})

    def end(self) -> None:
        """Forget."""
        self.files.delete(self.name)


class TrialSink:
    """Checkpoints to the store, points and tables to MLflow, progress to Tune.

    watched: see `TrialContext`. pack_id: of the pack that the driver knows, of which only some members may be left.
    """

    def __init__(self, files: Files, runs: MemberRuns, watched: bool, pack_id: str) -> None:
        self.files, self.runs, self.watched, self.pack_id, self.loss = files, runs, watched, pack_id, float("nan")
        self.validation: dict[int, dict[str, float]] = {}
        self.report, self.flush = Clock(REPORT_EVERY), Clock(FLUSH_EVERY)
        self.steps = dict.fromkeys(runs.index, runs.pack.start)

    def restore(self, pack: Pack) -> tuple[State, Curves] | None:
        """What was found in the store; points already measured are logged again with their own wall times."""
        restored = restore_checkpoint(self.files, pack)
        if restored is not None:
            curves = restored[1]
            for t, step in enumerate(curves.figure_steps):
                figures = live({name: values[t] for name, values in curves.figures.items()})
                self.runs.point(pack, step, int(curves.figure_times[t][0] * 1000), figures)
        return restored

    def note(self, pack: Pack, text: str) -> None:
        """To the driver, and a tag of the members' runs."""
        self.runs.note(pack, text)
        self._report(text)

    def _report(self, note: str = "") -> None:
        step = sum(self.steps.values()) // len(self.steps)
        Report(pack=self.pack_id, step=step, loss=self.loss, note=note).send()

    def progress(self, pack: Pack, step: int, figures: Figures) -> None:
        """Points for MLflow; every second or so a report to the driver. Raises what MLflow could not take."""
        self.runs.require_sound()
        self.runs.point(pack, step, int(time.time() * 1000), live(figures))
        self.steps |= {member.id: step for member in pack.members}
        self.loss = finite_mean(figures["train_loss"])
        if self.flush.due():
            self.runs.flush()
        if self.watched and "validation_loss" in figures:
            self._watch(pack, step, figures["validation_loss"].tolist())
        if self.report.due():
            self._report()

    def _watch(self, pack: Pack, step: int, losses: Sequence[float]) -> None:
        """Tell the driver the median validation loss of a step, once all members have come there, piece by piece."""
        system, seen = pack.config.system, self.validation.setdefault(step, {})
        seen |= {member.id: capped(loss, system) for member, loss in zip(pack.members, losses, strict=True)}
        if len(seen) == len(self.runs.index):
            median = statistics.median(self.validation.pop(step).values())
            Report(pack=self.pack_id, step=step, loss=self.loss, validation=median).send()

    def save(self, pack: Pack, state: State, curves: Curves) -> None:
        """To the store."""
        save_checkpoint(self.files, pack, state, curves)

    def finish(self, pack: Pack, curves: Curves, diverged: Sequence[int]) -> None:
        """Tables and config of every member, then its run's end."""
        self.runs.flush()
        for index, member in enumerate(pack.members):
            files = member_files(member, index, curves) | {
                "curves.parquet": to_parquet(curves.head_table(index)),
                "figures.parquet": to_parquet(curves.figure_table(index)),
            }
            self.runs.finish(member, files, diverged[index])


def capped(loss: float, system: System) -> float:
    """A loss no worse than that of the trivial predictor, as which a loss that is not finite counts too."""
    trivial = system.floors().trivial
    return min(loss, trivial) if math.isfinite(loss) else trivial


def live(figures: Figures) -> dict[str, list[float]]:
    """The figures that MLflow shows while a member trains."""
    return {name: figures[name].tolist() for name in ("train_loss", "validation_loss") if name in figures}


def to_parquet(columns: Columns) -> bytes:
    """A Parquet file of equally long columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
