"""Where checkpoints lie: a local or shared folder, or an object store by URL (s3://, gs://, ...)."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from train.checkpoint import Files

PAUSE = 0.5  # seconds before a call that failed is tried again, doubling up to 8
PATIENCE = 60.0  # seconds for which a call that a store or a disk refuses is tried again

T = TypeVar("T")


def insist(
    call: Callable[[], T],
    patience: Callable[[Exception], float] = lambda error: PATIENCE,
    errors: tuple[type[Exception], ...] = (OSError,),
) -> T:
    """What the call returns, made again after these errors; the last one is raised `patience` seconds after the first
    try. The call must bear repeating."""
    begun, pause = time.monotonic(), PAUSE
    while True:
        try:
            return call()
        except errors as error:
            if time.monotonic() + pause > begun + patience(error):
                raise
            time.sleep(pause)
            pause = min(2 * pause, 8.0)


class FolderStore:
    """A folder. `put` writes a temporary name, then renames: readers see whole files only."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def put(self, name: str, content: bytes) -> None:
        """Write whole or not at all."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, name: str) -> bytes:
        """Read; FileNotFoundError if there is none."""
        return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """Names (folder included) of the files in the folder, sorted; temporary ones left out."""
        base = self.root / folder
        if not base.is_dir():
            return []
        return sorted(f"{folder}/{path.name}" for path in base.iterdir() if not path.name.startswith("."))

    def delete(self, name: str) -> None:
        """Remove; nothing happens if there is none."""
        (self.root / name).unlink(missing_ok=True)


class ObjectStore:
    """An object store through `pyarrow.fs`; a put of one object is whole or absent by the store's own promise."""

    def __init__(self, url: str) -> None:
        from pyarrow import fs

        self._selector: Any = fs.FileSelector
        self._missing: Any = fs.FileType.NotFound
        self._files, self._root = fs.FileSystem.from_uri(url)

    def put(self, name: str, content: bytes) -> None:
        """Write whole or not at all."""
        if self._files.type_name == "local":
            self._files.create_dir(f"{self._root}/{name}".rpartition("/")[0], recursive=True)
        with self._files.open_output_stream(f"{self._root}/{name}") as stream:
            stream.write(content)

    def get(self, name: str) -> bytes:
        """Read; FileNotFoundError if there is none."""
        with self._files.open_input_stream(f"{self._root}/{name}") as stream:
            content: bytes = stream.read()
            return content

    def names(self, folder: str) -> list[str]:
        """Names (folder included) of the objects in the folder, sorted."""
        found = self._files.get_file_info(self._selector(f"{self._root}/{folder}", allow_not_found=True))
        return sorted(f"{folder}/{item.base_name}" for item in found)

    def delete(self, name: str) -> None:
        """Remove; nothing happens if there is none."""
        path = f"{self._root}/{name}"
        if self._files.get_file_info(path).type != self._missing:
            self._files.delete_file(path)


class Insisting:
    """A store that is asked again for a while where it does not take a file: its disk may be full for a moment."""

    def __init__(self, files: Files) -> None:
        self.files, self.get, self.names, self.delete = files, files.get, files.names, files.delete

    def put(self, name: str, content: bytes) -> None:
        """Write whole or not at all."""
        insist(lambda: self.files.put(name, content))


def open_store(url: str | Path) -> Files:
    """The store at a path or URL."""
    if str(url).startswith("file://"):
        return FolderStore(str(url).removeprefix("file://"))
    return ObjectStore(str(url)) if "://" in str(url) else FolderStore(url)
