"""What a sweep will cost, before it starts: measured on this machine, one short trial of each shape."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.pack import PackRun, build_probes, pools
from cluster.sizing import Device, Room, pack_bytes
from cluster.sweep import Member, MemberConfig, Pack
from sim import system_name
from sim.pool import Pool
from train.loop import WARM
from train.process import be_worker

WARM_UP, TIMED = WARM + 1, 8  # steps before (on a GPU the last of them is recorded) and during a measurement
TRIAL_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PackCost:
    """Seconds of a step and of a round of frequent and costly probes; members that take a step at once (None: not
    known here); bytes in memory, of a member's artifacts and of a checkpoint."""

    step: float
    probe: float
    sparse: float
    at_once: int | None
    memory: int
    artifacts: int
    checkpoint: int

    def seconds(self, pack: Pack) -> float:
        """Of the whole pack from its start."""
        config, last = pack.config, pack.config.train.steps
        frequent = sum(step >= pack.start for step in config.probe.steps(last))
        sparse = sum(step >= pack.start for step in config.probe.sparse_steps(last))
        return (last - pack.start) * self.step + frequent * self.probe + sparse * self.sparse


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A sweep's packs and their cost as `measured_on` a device here. `workers` run at once, with `room` each; `done`
    members are in the ledger."""

    packs: tuple[Pack, ...]
    costs: Mapping[str, PackCost]
    workers: int
    done: int
    room: Room
    measured_on: Device

    def reason(self, pack: Pack) -> str:
        """Why a pack is as large as it is."""
        alike = (other for other in self.packs if other.start == pack.start)
        group = sum(len(other.members) for other in alike if other.members[0].group == pack.members[0].group)
        return self.room.reason(pack.config, -(-group // self.workers))

    @property
    def seconds(self) -> float:
        """Until the last worker is through, packs handed out in their order to whoever is free; pools left out."""
        busy = [0.0] * self.workers
        for pack in self.packs:
            busy[busy.index(min(busy))] += self.costs[shape_name(pack)].seconds(pack)
        return max(busy, default=0.0)

    @property
    def memory(self) -> int:
        """Bytes that the largest pack needs beside torch itself."""
        return max((self.costs[shape_name(pack)].memory for pack in self.packs), default=0)

    @property
    def weights(self) -> dict[tuple[int, ...], list[int]]:
        """Bytes of kept weights of each member, by the steps at which they are kept."""
        found: dict[tuple[int, ...], list[int]] = {}
        for config in (member.config for pack in self.packs for member in pack.members):
            found.setdefault(tuple(sorted(config.weight_steps)), []).append(weight_bytes(config))
        return found

    @property
    def disk(self) -> int:
        """Bytes of all members' artifacts, and of the two checkpoints that each running pack keeps."""
        artifacts = sum(self.costs[shape_name(pack)].artifacts * len(pack.members) for pack in self.packs)
        kept = sorted((self.costs[shape_name(pack)].checkpoint for pack in self.packs), reverse=True)
        return artifacts + 2 * sum(kept[: self.workers])


def shape_name(pack: Pack) -> str:
    """Equal for packs that cost the same."""
    return f"{pack.members[0].group} x {len(pack.members)}"


def make_plan(packs: Sequence[Pack], workers: int, done: int, room: Room) -> Plan:
    """Measure one pack of each shape and add up; where workers have GPUs, on what there is here of such."""
    device = room.device if torch.cuda.is_available() else "cpu"
    be_worker()
    shapes = {shape_name(pack): on_trial(pack) for pack in packs}
    tried = {name: pack if room.device == "cpu" else stand_in(pack, device) for name, pack in shapes.items()}
    costs = {}
    for trial, pool in pools(list(tried.values()), device):
        name = next(name for name, pack in tried.items() if pack is trial)
        whole = shapes[name]
        cost = measure(trial, pool, pack_bytes(whole.config, len(whole.members), room.device))
        costs[name] = cost if trial is whole else scaled(cost, len(whole.members) / len(trial.members))
    return Plan(packs=tuple(packs), costs=costs, workers=workers, done=done, room=room, measured_on=device)


def on_trial(pack: Pack) -> Pack:
    """The pack from step 0 on a pool of few rows."""

    def shrink(member: Member) -> Member:
        return replace(member, config=replace(member.config, data=replace(member.config.data, rows=TRIAL_ROWS)))

    return Pack(members=tuple(map(shrink, pack.members)))


def stand_in(pack: Pack, device: Device) -> Pack:
    """As many members of a pack for GPUs as this machine's own takes, the pack itself where that is all of them; as
    many as its CPU takes at once where it has none, to be trained eagerly: there may be no compiler."""
    most = Room.here(gpus=float(device == "cuda")).most(pack.config)

    def eager(member: Member) -> Member:
        return replace(member, config=replace(member.config, train=replace(member.config.train, compiled=False)))

    if device == "cuda":
        return pack if len(pack.members) <= most else Pack(members=pack.members[:most])
    return Pack(members=tuple(map(eager, pack.members[:most])))


def scaled(cost: PackCost, times: float) -> PackCost:
    """The cost of a pack so many times as large, elsewhere."""
    return replace(
        cost,
        step=times * cost.step,
        probe=times * cost.probe,
        sparse=times * cost.sparse,
        at_once=None,
        checkpoint=round(times * cost.checkpoint),
    )


class Nowhere:
    """A sink that keeps nothing."""

    def restore(self, pack: Pack) -> None:
        """Start afresh."""

    def progress(self, *ignored: object) -> None:
        """Nothing."""

    def note(self, *ignored: object) -> None:
        """Nothing."""

    def save(self, *ignored: object) -> None:
        """Nothing."""

    def finish(self, *ignored: object) -> None:
        """Nothing."""


def measure(pack: Pack, pool: Pool, memory: int) -> PackCost:
    """Cost of a pack from a few steps, where the pool lies; `memory` is known. The sizes of tables follow from their
    shapes."""
    run = PackRun(pack, pool, build_probes(pack.config, pool), Nowhere())
    for _ in range(WARM_UP):
        run.trainer.advance()
    start = now(run)
    for _ in range(TIMED):
        run.trainer.advance()
    step = (now(run) - start) / TIMED
    artifacts = artifact_bytes(pack.config, run)
    return PackCost(
        step=step,
        probe=_seconds(run, sparse=False),
        sparse=_seconds(run, sparse=True),
        memory=memory,
        at_once=max(cut.stop - cut.start for cut in run.trainer.cuts),
        artifacts=artifacts,
        checkpoint=3 * run.trainer.state.weights.nbytes + artifacts * len(pack.members),
    )


def now(run: PackRun) -> float:
    """Seconds on a clock, once the run's device has done all that it was given."""
    if run.trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(run: PackRun, sparse: bool) -> float:
    probes = [probe for probe in run.probes if (probe.when == "sparse") == sparse]
    snapshot = run.trainer.snapshot()
    start = now(run)
    for probe in probes:
        run.measure(probe, snapshot)
    run.measure_figures(snapshot, sparse)
    return now(run) - start


def artifact_bytes(config: MemberConfig, run: PackRun) -> int:
    """Of one member: table cells at about 2.5 bytes compressed (measured on particles), and its kept weights."""
    last = config.train.steps
    grid = config.model.layers * config.model.n_heads * config.probe.replicates
    cells = 0
    for probe in run.probes:
        steps = config.probe.steps(last) if probe.when == "every" else config.probe.sparse_steps(last)
        cells += len(steps) * grid * len(probe.columns) * len(probe.relations)
    return int(2.5 * cells) + weight_bytes(config)


def weight_bytes(config: MemberConfig) -> int:
    """Of one member's kept weights."""
    return len(config.weight_steps) * config.weight_bytes


def describe(config: MemberConfig) -> str:
    """One line on what is trained."""
    model, train = config.model, config.train
    arithmetic = train.precision + (", compiled" if train.compiled else "")
    return (
        f"{system_name(config.system)}; {model.layers} layers x {model.n_heads} heads, {train.steps:,} steps of "
        f"{train.batch_size} at {train.learning_rate:g} ({train.optimizer}, {arithmetic})"
    )
