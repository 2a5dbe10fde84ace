"""Clean rows, made once for a (system, seed, sizes) and shared by every member that learns from them.

A pool is addressed by what it is made of: two processes that ask for the same one agree on its digest without talking.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim import system_name
from sim.generator import Generator
from sim.system import PARTS, Part, Rows, System

RESULTS_VERSION = 2
"""Raised when a fix changes the numbers of a pool."""

Arrays = dict[str, NDArray[np.generic]]


def digest_of(system: System, seed: int, sizes: Mapping[Part, int]) -> str:
    """Address of the pool that `Pool.make` would make, 32 hexadecimal digits."""
    config = asdict(system)  # type: ignore[call-overload]  # a System is a frozen dataclass, which no type says
    asked = {"system": system_name(system), "config": config, "seed": seed, "sizes": dict(sizes)}
    text = json.dumps(asked | {"version": RESULTS_VERSION}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Rows by part, all carrying the statistics of the train rows; and the digest that addresses them."""

    digest: str
    parts: Mapping[Part, Rows]

    @classmethod
    def make(cls, system: System, seed: int, sizes: Mapping[Part, int], device: torch.device | str = "cpu") -> Pool:
        """Simulate or enumerate `sizes[part]` rows of each part. `seed` is the data seed, shared by all members."""
        if "train" not in sizes or not set(sizes) <= set(PARTS) or min(sizes.values()) < 1:
            raise ValueError(f"sizes: {dict(sizes)} is not allowed; it must give train, only {PARTS}, 1 or more each")
        generator = Generator.of("pool", seed, device=device)
        rows = {part: system.rows(part, sizes[part], generator) for part in PARTS if part in sizes}
        statistics = system.statistics(rows["train"])
        parts = {part: Rows(columns=clean.columns, statistics=statistics) for part, clean in rows.items()}
        return cls(digest=digest_of(system, seed, sizes), parts=parts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pool:
        """On another device, floating-point tensors cast to `dtype` if it is given."""
        return Pool(digest=self.digest, parts={part: rows.to(device, dtype) for part, rows in self.parts.items()})

    def to_arrays(self) -> Arrays:
        """As numpy arrays by name (`digest`, `statistics/<name>`, `<part>/<column>`), for Ray's object store."""
        statistics = self.parts["train"].statistics
        named = {f"statistics/{name}": value for name, value in statistics.items()}
        for part, rows in self.parts.items():
            named |= {f"{part}/{name}": value for name, value in rows.columns.items()}
        return {"digest": np.array(self.digest)} | {name: value.cpu().numpy() for name, value in named.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Pool:
        """From `to_arrays`. Copies, since arrays from an object store are read-only and torch would warn."""
        groups: dict[str, dict[str, Tensor]] = {}
        for path, array in arrays.items():
            group, _, name = path.partition("/")
            if name:
                groups.setdefault(group, {})[name] = torch.from_numpy(np.array(array))
        if "digest" not in arrays or "train" not in groups:
            raise ValueError(f"arrays: {sorted(arrays)} are not those of a pool; they lack 'digest' or 'train/...'")
        statistics = groups.pop("statistics", {})
        parts = {part: Rows(columns=groups[part], statistics=statistics) for part in PARTS if part in groups}
        return cls(digest=str(arrays["digest"]), parts=parts)

    def save(self, path: Path) -> None:
        """Write `path` (.npz, no pickle): under a temporary name, then renamed, so that readers see all or nothing."""
        arrays = self.to_arrays()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, checksum=np.array(_checksum(arrays)), **arrays)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> Pool:
        """Read `path`, written by `save`; with `digest`, only if it is that pool. A ValueError says what is wrong."""
        try:
            # np.load leaves a file open that it opened itself and cannot read
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # a broken zip fails in a dozen ways
            raise ValueError(f"{path}: cannot be read as a pool ({error}); delete it and make it again") from error
        if str(arrays.pop("checksum", "")) != _checksum(arrays):
            raise ValueError(f"{path}: is no pool, or its contents fail their checksum; delete it and make it again")
        pool = cls.from_arrays(arrays)
        if digest is not None and pool.digest != digest:
            raise ValueError(f"{path}: holds pool {pool.digest}; {digest} is wanted")
        return pool


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Of names, dtypes, shapes and bytes, whatever the order."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()
