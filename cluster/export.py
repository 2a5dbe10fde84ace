"""`headway export`: all that is known of a sweep as one folder of plain files, for those who have no ledger."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich.console import Console

from cluster import tracking
from cluster.analysis import Analysis, load_analysis, member_axes
from cluster.arguments import StoreOptions, named, open_named
from cluster.display import count
from cluster.driver import Desk, Settings
from cluster.encoding import encode
from cluster.geometry import with_tables
from cluster.glossary import explain
from cluster.report import swap
from cluster.sweep import Sweep, versions
from sim.checks import require

EXPORT_HELP = (
    "Write all tables of a sweep, the curves of all its members, its config, report and figures into a folder, with a "
    "manifest that says what each file and column is. An older export in that folder is replaced as a whole."
)
MANIFEST, KIND = "manifest.json", "headway export"
TABLES = ("members", "heads", "widths", "detectors", "llc", "degrees")
ABOUT = {
    "sweep.json": "the config; `headway sweep sweep.json` runs it again",
    "laws.json": "what holds across the sweep, with windows, intervals and refusals; counts by outcome and status",
    "members.parquet": "one row a member: outcome, level of its best detector, losses and figures at the end",
    "heads.parquet": "one row a member, head and relation: status, times with intervals, worth",
    "widths.parquet": "one row a point of the sweep and relation, over members",
    "detectors.parquet": "lift of every member's best detector by step",
    "llc.parquet": "refined local learning coefficients of heads at kept steps",
    "degrees.parquet": "every estimate of the degree of each head's potential",
    "curves.parquet": "one row group a finished member: what every probe measured, by step, relation, head, replicate",
    "figures.parquet": "one row group a finished member: losses and system figures by step",
}
LIBRARIES = ("headway", "torch", "numpy", "scipy", "pyarrow", "ray", "mlflow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written. `lacking`: what there was not, in words."""

    folder: Path
    files: int
    size: int
    members: int
    lacking: Sequence[str]


def export_command(arguments: Sequence[str], console: Console) -> int:
    """`headway export`."""
    (name, target), options = named(
        arguments, StoreOptions(), "headway export", EXPORT_HELP, ("SWEEP", "DIR"), "a sweep and a folder"
    )
    folder = Path(target).expanduser().absolute()
    require_own(folder)
    desk, parent, sweep = open_named(name, Settings(tracking_uri=options.tracking_uri, out=options.out))
    done = export_sweep(desk, parent, sweep, folder)
    for text in done.lacking:
        console.print(f"left out: {text}")
    console.print(f"export:  {done.folder}", soft_wrap=True)
    console.print(f"         {count(done.files, 'file')}, {done.size / 1e6:.1f} MB, {count(done.members, 'member')}")
    return 0


def require_own(folder: Path) -> None:
    """ValueError unless the folder is absent, empty, or an older export with nothing else in it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    allowed = "new, empty, or an older export"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = {MANIFEST, *(entry["file"] for entry in manifest["files"])} if manifest["kind"] == KIND else set()
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} if listed else set()
    strange = sorted(names - listed)
    require(bool(listed), "export", str(folder), allowed)
    require(not strange, "export", str(folder), f"{allowed} (it holds {', '.join(strange[:3])})")


def export_sweep(desk: Desk, parent: Run, sweep: Sweep, folder: Path) -> Exported:
    """Write an export under a temporary name, then rename it. ValueError if the sweep was not analysed yet."""
    client, place = desk.client, tracking.Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    analysis = with_tables(client, place.parent, sweep, load_analysis(client, place.parent))
    runs = tracking.counted(tracking.children(client, place)).values()
    finished = [run for run in runs if run.info.status == "FINISHED"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh, lacking = Path(work) / "new", list[str]()
        fresh.mkdir()
        (fresh / "sweep.json").write_text(json.dumps(encode(sweep), indent=1) + "\n")
        write_tables(fresh, analysis)
        keys = member_axes(finished, sweep, analysis)
        for name in ("curves", "figures"):
            if not write_members(client, fresh / f"{name}.parquet", keys, Path(work)):
                lacking.append(f"{name}.parquet: no member has finished")
        if not copy_folder(client, place.parent, "report", fresh):
            lacking.append("report: there is none yet; `headway report` makes one")
        lacking += [line.removesuffix(".") for line in analysis.left_out]
        lacking += unlike(analysis, {run.info.run_id for run in finished})
        fetch(client, place.parent, "analysis/sweep.json", Path(work)).rename(fresh / "laws.json")
        entries = describe(fresh, sweep)
        (fresh / "README.txt").write_text(readme(sweep, entries, lacking))
        entries.append(entry_of(fresh, "README.txt", sweep))
        (fresh / MANIFEST).write_text(json.dumps(manifest(sweep, parent, entries), indent=1) + "\n")
        require_own(folder)  # it may have been filled meanwhile
        swap(fresh, folder, Path(work) / "old")
    size = sum(int(entry["bytes"]) for entry in entries)
    return Exported(folder=folder, files=len(entries) + 1, size=size, members=len(finished), lacking=lacking)


def unlike(analysis: Analysis, finished: Collection[str]) -> list[str]:
    """What tables lack of each other, in words: the analysis, the geometry and the curves of members were written at
    different times. finished: runs that the ledger counts now, whose curves are written."""
    members, found = analysis.members, list[str]()
    known, done = (set[str](table["run_id"]) if len(table) else set[str]() for table in
                   (members, members[members["outcome"] == "finished"] if len(members) else members))  # fmt: skip
    measured = set(analysis.llc["run_id"]) if len(analysis.llc) else set()
    if later := set(finished) - known:
        found.append(
            f"{count(len(later), 'member')} in all tables but curves and figures: finished after the analysis; "
            "`headway analyze` adds them"
        )
    if gone := done - set(finished):
        found.append(
            f"{count(len(gone), 'member')} in curves and figures: the analysis is of runs that no longer count, as the "
            "members were trained again; `headway analyze` puts that right"
        )
    if not measured and not analysis.left_out:
        found.append("llc.parquet, degrees.parquet: `headway probe llc` has measured none")
    elif measured and (rest := done - measured):
        found.append(
            f"{len(rest):,} of {count(len(done), 'member')} in llc and degrees: not measured, or measured before they "
            "were trained again; `headway probe llc` adds them"
        )
    return found


def write_tables(folder: Path, analysis: Analysis) -> None:
    """Those that have rows."""
    for name in TABLES:
        table: pd.DataFrame = getattr(analysis, name)
        if len(table.columns):
            table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")


def write_members(client: MlflowClient, path: Path, keys: Mapping[str, Mapping[str, Any]], work: Path) -> bool:
    """One table of all members, a row group each, with what names them in front; False where there is none.

    Columns that a member lacks are null in its rows.
    """
    found = {run: fetch(client, run, path.name, work / "members" / run) for run in keys}
    if not found:
        return False
    fields = pa.unify_schemas(
        [pq.read_schema(file).remove_metadata() for file in found.values()], promote_options="permissive"
    )
    first = pa.Table.from_pandas(pd.DataFrame(list(keys.values())), preserve_index=False).schema.remove_metadata()
    schema = pa.schema([*first, *(field for field in fields if field.name not in first.names)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for run, file in found.items():
            table = pq.read_table(file)
            columns = [
                pa.array([keys[run][field.name]] * len(table), field.type)
                if field.name in keys[run]
                else table[field.name].cast(field.type)
                if field.name in table.column_names
                else pa.nulls(len(table), field.type)
                for field in schema
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(len(table), 1))
            file.unlink()
    return True


def fetch(client: MlflowClient, run: str, name: str, folder: Path) -> Path:
    """An artifact of a run, or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run, name, str(folder)))
    except (MlflowException, OSError) as error:
        raise ValueError(f"export: {name} of run {run} cannot be read ({str(error).splitlines()[0]})") from error


def copy_folder(client: MlflowClient, run: str, name: str, folder: Path) -> bool:
    """A folder of a run's artifacts into `folder`, under its own name; False where there is none."""
    if name not in {item.path for item in client.list_artifacts(run)}:
        return False
    client.download_artifacts(run, name, str(folder))
    return True


def describe(folder: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """Every file of the export, with its digest, and of tables the columns with type, unit and meaning."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [entry_of(folder, name, sweep) for name in names]


def entry_of(folder: Path, name: str, sweep: Sweep) -> dict[str, Any]:
    """One file of the export."""
    path = folder / name
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    about = ABOUT.get(name, "")
    if name.startswith("report/"):
        about = "the report, one page with everything in it" if name.endswith(".html") else "a figure of the report"
    entry = {"file": name, "bytes": path.stat().st_size, "sha256": checksum, "about": about or "what is in this folder"}
    if path.suffix == ".parquet":
        schema = pq.read_schema(path)
        entry["rows"] = pq.read_metadata(path).num_rows
        columns = []
        for field in schema:
            unit, meaning = explain(path.stem, field.name, sweep.axis_names)
            columns.append({"name": field.name, "type": str(field.type), "unit": unit, "about": meaning})
        entry["columns"] = columns
    return entry


def manifest(sweep: Sweep, parent: Run, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What stands in manifest.json."""
    return {
        "kind": KIND,
        "sweep": sweep.id,
        "run": parent.info.run_id,
        "system": parent.data.tags.get("system", ""),
        "judged by": sweep.system.relation,
        "code": parent.data.tags.get("code_version", ""),
        "results versions": versions(),
        "written with": {"python": platform.python_version(), **dict(installed())},
        "files": list(entries),
    }


def installed() -> Iterator[tuple[str, str]]:
    """Versions of what made the numbers and files."""
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed as a distribution"


def readme(sweep: Sweep, entries: Sequence[Mapping[str, Any]], lacking: Sequence[str]) -> str:
    """What stands in README.txt."""
    lines = [
        f"Sweep {sweep.id}, as exported by headway.",
        "",
        "Every member is one small transformer; every head of it was watched over training. manifest.json names each",
        "file's digest (SHA-256) and each column's type, unit and meaning. Tables are Parquet (pandas.read_parquet).",
        f"Heads are judged by the relation {sweep.system.relation!r}. Members are known by member_id, and by their",
        f"places along the axes of the sweep: {', '.join(sweep.axis_names)}; and seed.",
        "",
    ]
    shown = [entry for entry in entries if not str(entry["file"]).endswith(".png")]
    wide = max(len(str(entry["file"])) for entry in shown)
    for entry in shown:
        rows = f" ({entry['rows']:,} rows)" if "rows" in entry else ""
        lines.append(f"{entry['file']:<{wide}}  {entry['about']}{rows}")
    figures = len(entries) - len(shown)
    if figures:
        lines.append(f"{'report/*.png':<{wide}}  {count(figures, 'figure')} of the report")
    lines += ["", *(f"Left out: {text}." for text in lacking)]
    return "\n".join(lines).rstrip() + "\n"
