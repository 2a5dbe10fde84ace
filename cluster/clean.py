"""`headway clean`: checkpoints and left-over files that may go, by age and budget; it says what, and asks first."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from pyarrow import fs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import tracking
from cluster.arguments import StoreOptions, leading, parse
from cluster.driver import Desk, Settings
from cluster.findings import plural
from cluster.pack import warn
from cluster.store import open_store
from cluster.tracking import Place, TrackingError
from sim.checks import require
from train import checkpoint
from train.checkpoint import FOLDER

DAY = 86_400.0
FRESH = 3_600.0  # seconds for which a file without a manifest may be one that is being written
CLEAN_HELP = """Delete checkpoints that nobody needs (members done, writer dead), and others by age and budget.

A member whose checkpoint goes begins anew when its sweep is run again. Results are no checkpoints: tables, kept
weights and reports stay. Nothing goes of a sweep that a live driver holds, nor the newest of a running member.
"""
DONE, LEFT, OLD, OVER = "members are done", "left over from writing", "older than asked", "over the budget"


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanOptions(StoreOptions):
    """What may go, and whether to ask."""

    store: str | None = None
    """Folder or object-store URL for checkpoints, as given to `headway sweep`. Default: `out`."""
    older_than: float | None = None
    """Days: checkpoints of unfinished members that are older go too."""
    budget: float | None = None
    """Gigabytes that checkpoints of unfinished members may take, of all the sweeps looked at; the oldest go first, and
    never one whose manifest cannot be read."""
    yes: bool = False
    """Do not ask."""

    def __post_init__(self) -> None:
        for name in ("older_than", "budget"):
            value = getattr(self, name)
            require(value is None or (math.isfinite(value) and value >= 0), name, value, "a finite number from 0 on")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What stands or goes as one: a checkpoint (manifest and tensors), or a file by itself.

    files: names in the store of `sweep`; time: of the youngest, Unix seconds; unfinished: members that would lose it as
    their furthest point; kept: a running member needs it; unread: of a checkpoint whose manifest cannot be read.
    """

    sweep: str
    store: str
    files: tuple[str, ...]
    size: int
    time: float
    unfinished: frozenset[str] = frozenset()
    kept: bool = False
    unread: bool = False
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file of a store: its name there, bytes, and when it was last written, Unix seconds."""

    name: str
    size: int
    time: float


def clean_command(arguments: Sequence[str], console: Console) -> int:
    """`headway clean`: 0 also where the answer is no."""
    names, rest = leading(arguments)
    name = names[0] if names else None
    options = parse(CleanOptions, rest, CleanOptions(), "headway clean", CLEAN_HELP)
    settings = Settings(tracking_uri=options.tracking_uri, out=options.out, store=options.store)
    client, uri = ledger(options)
    desk = Desk(client=client, uri=uri, out=options.out.expanduser().absolute(), settings=settings)
    parents = tracking.find_sweeps(client, desk.experiment, name)
    if name is not None and not parents:
        tracking.find_sweep(client, desk.experiment, name)  # says which there are
    found = [item for parent in parents for item in look(desk, parent, console)]
    doomed = choose(found, options, time.time())
    going = {(item.sweep, item.files) for item in doomed}
    unread = [item for item in found if item.unread and (item.sweep, item.files) not in going]
    if options.budget is not None and unread:
        console.print(
            f"{plural(len(unread), 'file')} of checkpoints whose manifest cannot be read "
            f"({sum(item.size for item in unread) / 1e6:.1f} MB): no budget takes these, as they may be sound"
        )
    if not doomed:
        left = sum(item.size for item in found)
        console.print(f"nothing to clean; {plural(len(found), 'checkpoint')} in use, {left / 1e6:.1f} MB")
        return 0
    show(console, found, doomed)
    if not (options.yes or asked(console, doomed)):
        console.print("nothing was deleted")
        return 0
    gone, size = delete(desk, parents, doomed)
    console.print(f"deleted {plural(gone, 'file')}, {size / 1e6:.1f} MB")
    return 0


def ledger(options: CleanOptions) -> tuple[MlflowClient, str]:
    """The ledger that says who is done and who is at work. TrackingError if there is none."""
    uri = tracking.resolve_uri(options.tracking_uri)
    return tracking.connect(uri, make=False), uri


def store_of(desk: Desk, parent: Run) -> str:
    """Where a sweep's checkpoints lie."""
    sweep, study = parent.data.tags["sweep_id"], parent.data.tags.get("study")  # a point of a search lies below that
    below = f"{study}/{sweep}" if study else sweep
    root = desk.settings.store
    return f"{root.rstrip('/')}/{below}" if root else str(desk.out / below)


def look(desk: Desk, parent: Run, console: Console) -> list[Item]:
    """All checkpoints and left-over files of a sweep; none of one that a live driver holds."""
    sweep, store = parent.data.tags["sweep_id"], store_of(desk, parent)
    files = list(listing(store))
    if not files:
        return []
    try:
        tracking.require_free(parent)
    except TrackingError as error:
        console.print(f"passed over: {escape(str(error))}", soft_wrap=True)
        return []
    place = Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    runs = tracking.children(desk.client, place)
    settled = tracking.counted(runs).keys()
    running = {run.data.tags["member_id"] for run in runs if run.info.status == "RUNNING"}
    return items(sweep, store, files, settled, running)


def items(
    sweep: str, store: str, files: Sequence[File], settled: Collection[str], running: Collection[str]
) -> list[Item]:
    """Checkpoints of the store, whatever results versions made them, and what belongs to none."""
    left, found = {file.name: file for file in files}, list[Item]()
    manifests = checkpoint.manifests(open_store(store), None, warn)
    furthest = checkpoint.latest_steps(manifests)
    for manifest in manifests:
        own = [left.pop(name) for name in (manifest.name, manifest.file) if name in left]
        if not own:
            continue
        unfinished = [member for member in manifest.members if member not in settled]
        newest = frozenset(member for member in unfinished if furthest[member] == manifest.step)
        found.append(Item(
            sweep=sweep, store=store, files=tuple(file.name for file in own), size=sum(file.size for file in own),
            time=max(file.time for file in own), unfinished=newest, kept=bool(newest & set(running)),
            why="" if unfinished else DONE,
        ))  # fmt: skip
    known = {file.name for file in files}
    for file in left.values():  # a manifest that cannot be read now, and its tensors, may be sound: they stay until old
        paired = {f"{file.name.rpartition('.')[0]}{ending}" for ending in (".json", ".npz")} <= known
        unread = paired or (file.name.endswith(".json") and not temporary(file.name))
        found.append(Item(
            sweep=sweep, store=store, files=(file.name,), size=file.size, time=file.time, unread=unread,
            why="" if unread else LEFT,
        ))  # fmt: skip
    return found


def temporary(name: str) -> bool:
    """Whether a file was never given its own name."""
    return name.rpartition("/")[2].startswith(".")


def listing(store: str) -> Iterator[File]:
    """Checkpoints and unfinished writes of a store, temporary ones too; reports and attempts are left out."""
    if "://" in store:
        system, root = fs.FileSystem.from_uri(store)
    else:
        system, root = fs.LocalFileSystem(), str(Path(store).expanduser().absolute())
    selector = fs.FileSelector(f"{root}/{FOLDER}", allow_not_found=True)
    for info in system.get_file_info(selector):
        if info.type == fs.FileType.File:
            yield File(name=f"{FOLDER}/{info.base_name}", size=info.size, time=info.mtime.timestamp())


def choose(found: Sequence[Item], options: CleanOptions, now: float) -> list[Item]:
    """What goes, each with its reason. Within the budget the youngest stay; what running members need counts too, and
    so does what cannot be read: no budget takes either."""
    doomed, rest = list[Item](), list[Item]()
    for item in found:
        if item.kept:
            rest.append(item)
        elif item.why == DONE or (item.why == LEFT and now - item.time > FRESH):
            doomed.append(item)
        elif item.why == LEFT:
            continue
        elif options.older_than is not None and now - item.time > options.older_than * DAY:
            doomed.append(replace(item, why=OLD))
        else:
            rest.append(item)
    if options.budget is not None:
        staying = [item for item in rest if item.kept or item.unread]
        left = options.budget * 1e9 - sum(item.size for item in staying)
        for item in sorted((item for item in rest if item not in staying), key=lambda item: -item.time):
            left -= item.size
            if left < 0:
                doomed.append(replace(item, why=OVER))
    return doomed


def show(console: Console, found: Sequence[Item], doomed: Sequence[Item]) -> None:
    """What would go, by sweep and reason, and what stays."""
    table = Table("sweep", "why", "files", "MB", "oldest", "members that would begin anew")
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in doomed:
        groups.setdefault((item.sweep, item.why), []).append(item)
    for (sweep, why), own in groups.items():
        oldest = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(item.time for item in own)))
        anew = len(frozenset().union(*(item.unfinished for item in own)))
        size, files = sum(item.size for item in own), sum(len(item.files) for item in own)
        table.add_row(escape(sweep), why, f"{files:,}", f"{size / 1e6:.1f}", oldest, str(anew))
    console.print(table)
    stays = [
        item for item in found if not any(item.files == other.files and item.sweep == other.sweep for other in doomed)
    ]
    console.print(
        f"to go: {sum(item.size for item in doomed) / 1e6:.1f} MB; "
        f"{plural(len(stays), 'checkpoint')} of {sum(item.size for item in stays) / 1e6:.1f} MB would stay"
    )


def asked(console: Console, doomed: Sequence[Item], ask: Callable[[], str] = input) -> bool:
    """The user's answer. ValueError where nobody is there to answer."""
    if not sys.stdin.isatty():
        raise ValueError("yes: False is not allowed; it must be given (--yes) where there is no terminal to ask on")
    console.print(f"delete {plural(sum(len(item.files) for item in doomed), 'file')}? [y/N] ", end="")
    return ask().strip().lower() in ("y", "yes")


def delete(desk: Desk, parents: Sequence[Run], doomed: Sequence[Item]) -> tuple[int, int]:
    """Delete, manifests first; files and bytes gone. A sweep that a driver has taken up meanwhile is passed over."""
    gone = size = 0
    for parent in parents:
        own = [item for item in doomed if item.sweep == parent.data.tags["sweep_id"]]
        if not own:
            continue
        try:
            tracking.require_free(desk.client.get_run(parent.info.run_id))
        except TrackingError as error:
            warn(str(error))
            continue
        files = open_store(own[0].store)
        for item in own:
            for name in item.files:
                files.delete(name)
            gone, size = gone + len(item.files), size + item.size
    return gone, size
