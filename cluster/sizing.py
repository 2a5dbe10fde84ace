"""How many members a pack should hold: as many as gain from it, and no more than memory holds. Needs no cluster."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cluster.outside import probe_kinds
from cluster.sweep import MemberConfig, part_sizes
from sim.checks import require
from sim.compiling import can_compile
from sim.generator import Generator
from sim.system import Rows, System
from train.config import ModelConfig
from train.loop import CACHE, MEMBERS_AT_ONCE, free_memory, kept_bytes
from train.model import count_parameters, tensor_specs
from train.neighbours import tokens_and_keys

SAFE = 0.5  # share of the free memory that a pack is sized to: sizes below are estimates
MOST = {"cpu": MEMBERS_AT_ONCE, "cuda": 4096}
"""Members a pack: a CPU takes no more of them at once; a GPU is full long before."""
RELATIONS = 2  # of most systems: tables are sized with them

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What one worker has for its packs: the kind of its device, and bytes of that device's memory."""

    device: Device
    memory: int

    @classmethod
    def here(cls, workers: int = 1, gpus: float = 1.0) -> Room:
        """On this machine: a share `gpus` of its GPU; where it has none or gpus is 0, its memory shared by workers."""
        if gpus > 0 and torch.cuda.is_available():
            return cls(device="cuda", memory=int(free_memory(torch.device("cuda")) * min(1.0, gpus)))
        return cls(device="cpu", memory=available_memory() // max(workers, 1))

    def most(self, config: MemberConfig) -> int:
        """Members of this shape that a pack here should hold at most; at least 1."""
        one, two = (pack_bytes(config, members, self.device) for members in (1, 2))
        return max(1, min(MOST[self.device], 1 + int((SAFE * self.memory - one) // (two - one))))

    def reason(self, config: MemberConfig, share: int) -> str:
        """Why a pack of this shape is as large as it is, where each worker's share of such members is `share`."""
        most = self.most(config)
        if share <= most:
            return "every worker has work"
        return "as many as gain from it" if most == MOST[self.device] else "as many as memory holds"


def available_memory() -> int:
    """Bytes that programs can still take on this machine."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:  # a container's own limit
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def require_computable(config: MemberConfig, device: Device) -> None:
    """Raise ValueError where the device does not know the arithmetic that the config names."""
    only = "float32, float64 or bf16 where packs have no GPU"
    require(device == "cuda" or config.train.precision != "tf32", "train.precision", config.train.precision, only)
    compiles = not config.train.compiled or can_compile(torch.device(device))
    require(compiles, "train.compiled", True, "False where there is no C++ compiler (g++, clang++ or that of CXX)")


def pack_bytes(config: MemberConfig, members: int, device: Device = "cpu") -> int:
    """What a pack takes beside torch itself, about. A CPU works on as many members at a time as its cache holds."""
    active = members * activation_bytes(config)
    if device == "cpu":
        active = max(CACHE, activation_bytes(config))
    return active + members * member_bytes(config) + pool_bytes(config)


def member_bytes(config: MemberConfig) -> int:
    """What each member of a pack needs, whatever is at work on it.

    Parameters, two moments, gradient and direction of a step; weights kept; tables; and while a checkpoint is made a
    copy of the first three, of the weights kept and two of the tables.
    """
    specs = tensor_specs(config.model, config.system.d_in, config.system.d_out)
    weights = count_parameters(specs.values()) * config.train.dtype.itemsize
    kept = len(config.weight_steps)
    return (5 + 3 + 2 * kept) * weights + 3 * table_bytes(config)


def table_bytes(config: MemberConfig) -> int:
    """Of a member's curves in memory: float32 cells of every probe, about."""
    last, grid = config.train.steps, config.model.layers * config.model.n_heads * config.probe.replicates
    frequent, sparse = len(config.probe.steps(last)), len(config.probe.sparse_steps(last))
    kinds = probe_kinds(config.probe.probes).values()
    cells = sum(8 * RELATIONS * (frequent if kind.when == "every" else sparse) for kind in kinds)
    return 4 * grid * cells


@functools.lru_cache(maxsize=256)
def _example(system: System) -> Rows:
    """One training row of a system."""
    rows = system.rows("train", 1, Generator.of("example"))
    return Rows(columns=rows.columns, statistics=system.statistics(rows))


@functools.lru_cache(maxsize=4096)
def _shape_of(system: System, model: ModelConfig) -> tuple[int, int | None]:
    """Tokens and keys of a batch as the model sees it."""
    return tokens_and_keys(system, model, _example(system))  # type: ignore[arg-type]  # systems are frozen dataclasses


def activation_bytes(config: MemberConfig) -> int:
    """What one member keeps for the backward pass of a batch, or for the predictions of a probe."""
    tokens, keys = _shape_of(config.system, config.model)  # type: ignore[arg-type]
    examples = max(config.train.batch_size, config.probe.at_once)
    return kept_bytes(config.model, config.train, examples, tokens, keys)


def pool_bytes(config: MemberConfig) -> int:
    """Of the pool on the worker, and once more while it is taken from the object store."""
    example = _example(config.system)  # type: ignore[arg-type]
    row = sum(value.nbytes for value in example.columns.values())
    return 2 * sum(part_sizes(config).values()) * row
