"""Checkpoints of packs, sliceable by member: one tensor file and one manifest each, written once, manifest last.

A tensor file is an uncompressed .npz without pickle; arrays under `state/` and whatever the caller adds lead with the
member axis or are shared. The manifest names the members in order, the step, the checksum and the results versions.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train.state import State

Arrays = dict[str, NDArray[Any]]
FOLDER = "checkpoints"
KEPT = 2  # the previous one stays until its successor has a successor


class Files(Protocol):
    """Where checkpoints are kept; `cluster.store` has a local folder and an object store."""

    def put(self, name: str, content: bytes) -> None:
        """Write whole or not at all."""

    def get(self, name: str) -> bytes:
        """Read; FileNotFoundError if there is none."""

    def names(self, folder: str) -> list[str]:
        """Names (folder included) below the folder, sorted."""

    def delete(self, name: str) -> None:
        """Remove; nothing happens if there is none."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One checkpoint: its members in order, step, tensor file, checksum (SHA-256) and results versions."""

    members: tuple[str, ...]
    step: int
    file: str
    checksum: str
    versions: Mapping[str, int]

    @property
    def name(self) -> str:
        """The manifest's own file."""
        return self.file.removesuffix(".npz") + ".json"


def to_arrays(state: State) -> Arrays:
    """The state's tensors as arrays, under `state/`."""
    return {f"state/{name}": value.detach().cpu().numpy() for name, value in state.tensors().items()}


def to_state(step: int, arrays: Mapping[str, NDArray[Any]]) -> State:
    """The inverse of `to_arrays`."""
    named = {name: value for name, value in arrays.items() if name.startswith("state/")}
    return State(step=step, **{name[6:]: torch.from_numpy(value.copy()) for name, value in named.items()})


def encode_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def decode_arrays(content: bytes) -> Arrays:
    """The inverse of `encode_arrays`. Raises CheckpointError where the bytes are no such file."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"not a tensor file: {error}") from error


def save(
    files: Files, pack: str, members: Sequence[str], step: int, arrays: Arrays, versions: Mapping[str, int]
) -> None:
    """Write one checkpoint of a pack, then drop those of the same pack that are older than the previous one."""
    content = encode_arrays(arrays)
    name = f"{FOLDER}/{pack}-{step:09d}"
    files.put(f"{name}.npz", content)
    manifest = {
        "members": list(members),
        "step": step,
        "file": f"{name}.npz",
        "checksum": hashlib.sha256(content).hexdigest(),
        "versions": dict(versions),
    }
    files.put(f"{name}.json", json.dumps(manifest).encode())
    drop(files, pack, KEPT)


def drop(files: Files, pack: str, kept: int = 0) -> None:
    """Delete a pack's checkpoints but for the newest `kept`."""
    own = [item for item in files.names(FOLDER) if item.startswith(f"{FOLDER}/{pack}-") and item.endswith(".json")]
    for stale in own[: len(own) - kept]:
        remove(files, stale)


def remove(files: Files, manifest_name: str) -> None:
    """Delete a checkpoint, manifest first: what is left without one is never read."""
    files.delete(manifest_name)
    files.delete(manifest_name.removesuffix(".json") + ".npz")


def manifests(files: Files, versions: Mapping[str, int] | None, report: Callable[[str], None]) -> list[Manifest]:
    """All readable manifests of these results versions (None: of any); others are reported by name and reason."""
    found = []
    for name in files.names(FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            body = json.loads(files.get(name))
            manifest = Manifest(**{**body, "members": tuple(body["members"])})
            if manifest.name != name or f"-{manifest.step:09d}." not in name:
                raise ValueError("it names another file or step than its own name does")
        except FileNotFoundError:  # another pack of this folder has just dropped it
            continue
        except (ValueError, TypeError, KeyError, OSError) as error:
            report(f"checkpoint {name} is not used: unreadable manifest ({error})")
            continue
        if versions is None or dict(manifest.versions) == dict(versions):
            found.append(manifest)
        else:
            report(f"checkpoint {name} is not used: results versions {manifest.versions}, now {dict(versions)}")
    return found


def load(files: Files, manifest: Manifest) -> Arrays:
    """The arrays of a checkpoint. CheckpointError where the file is missing, truncated or not the one written."""
    try:
        content = files.get(manifest.file)
    except OSError as error:
        raise CheckpointError(f"{manifest.file} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != manifest.checksum:
        raise CheckpointError(f"{manifest.file} is truncated or altered: its checksum differs from the manifest's")
    return decode_arrays(content)


def latest_steps(found: Iterable[Manifest]) -> dict[str, int]:
    """The furthest checkpoint step of each member."""
    steps: dict[str, int] = {}
    for manifest in found:
        for member in manifest.members:
            steps[member] = max(steps.get(member, 0), manifest.step)
    return steps


def restore(
    files: Files, members: Sequence[str], versions: Mapping[str, int], report: Callable[[str], None]
) -> tuple[int, list[tuple[Arrays, list[int]]]] | None:
    """The furthest step at which every member has a good slice, and the slices, (arrays, rows), in the members' order.

    Checkpoints that cannot be used are reported and passed over. None: start afresh.
    """
    usable = manifests(files, versions, report)
    for step in sorted({manifest.step for manifest in usable}, reverse=True):
        slices = _slices(files, members, [m for m in usable if m.step == step], report)
        if slices is not None:
            return step, slices
    return None


def _slices(
    files: Files, members: Sequence[str], at_step: Sequence[Manifest], report: Callable[[str], None]
) -> list[tuple[Arrays, list[int]]] | None:
    loaded: dict[str, Arrays | None] = {}
    slices: list[tuple[Arrays, list[int]]] = []
    for member in members:
        for manifest in (m for m in at_step if member in m.members):
            if manifest.file not in loaded:
                loaded[manifest.file] = _load_or_report(files, manifest, report)
            arrays = loaded[manifest.file]
            if arrays is not None:
                slices.append((arrays, [manifest.members.index(member)]))
                break
        else:
            return None
    return slices


def _load_or_report(files: Files, manifest: Manifest, report: Callable[[str], None]) -> Arrays | None:
    try:
        return load(files, manifest)
    except CheckpointError as error:
        report(f"checkpoint is not used: {error}")
        return None
