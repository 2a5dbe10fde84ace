"""What all benchmarks share: interleaved timing, a description of the machine, and result files."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from train.process import be_worker

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], object]
Row = Mapping[str, object]


def one_thread() -> None:
    """Let this process be as a worker is, with one CPU thread between operations too."""
    be_worker()
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def synchronise() -> None:
    """Wait until the GPU, where there is one in use, has nothing left to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def burst(call: Call, count: int) -> float:
    """Seconds a call, over `count` calls after one that is not timed."""
    call()
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise()
    return (time.perf_counter() - start) / count


def calls_within(call: Call, seconds: float) -> int:
    """How many calls take about `seconds`, at least 1; found by doubling until a tenth of them has passed."""
    count = 1
    while (each := burst(call, count)) * count < seconds / 10:
        count *= 2
    return max(1, round(seconds / each))


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds a call, one number a burst."""

    bursts: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Median over bursts."""
        return float(np.median(self.bursts))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over bursts."""
        return quartiles(self.bursts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two callables timed in turns; the ratio of a round is of two neighbouring bursts."""

    a: Timing
    b: Timing

    @property
    def ratios(self) -> tuple[float, ...]:
        """Seconds of `a` over seconds of `b`, by round: how many times faster `b` is."""
        return tuple(x / y for x, y in zip(self.a.bursts, self.b.bursts, strict=True))

    @property
    def ratio(self) -> float:
        """Median over rounds."""
        return float(np.median(self.ratios))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratio over rounds."""
        return quartiles(self.ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.75))
    return float(low), float(high)


def timed(call: Call, rounds: int, seconds: float) -> Timing:
    """`rounds` bursts of about `seconds` each, every burst begun by a call that is not timed."""
    count = calls_within(call, seconds)
    return Timing(bursts=tuple(burst(call, count) for _ in range(rounds)), calls=count)


def compare(a: Call, b: Call, rounds: int, seconds: float) -> Comparison:
    """`rounds` times a burst of `a`, then one of `b`, each of about `seconds` and begun by a call that is not timed.

    Taken in turns, so that what slows the machine for a while slows both. Every other round begins with `b`. Where a
    single call takes longer than that, so do the bursts of both: a machine may be quicker for a moment than it lasts.
    """
    seconds = max(seconds, burst(a, 1), burst(b, 1))
    counts = calls_within(a, seconds), calls_within(b, seconds)
    found: tuple[list[float], list[float]] = [], []
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            found[which].append(burst((a, b)[which], counts[which]))
    first, second = (Timing(bursts=tuple(found[which]), calls=counts[which]) for which in (0, 1))
    return Comparison(a=first, b=second)


def hardware(device: torch.device) -> dict[str, object]:
    """The CPU's model name and cores, and the GPU's name where one is used."""
    found: dict[str, object] = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def cpu_name() -> str:
    """The model name that /proc/cpuinfo gives, or what Python knows of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, object]:
    """Of Python, torch and numpy; CUDA's where torch is built for it."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` where tracked files differ from it; None where git does not say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def circumstances(name: str, device: torch.device) -> dict[str, object]:
    """Where, when, of what and by which command a benchmark was run."""
    return {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"tests.bench.{name.partition('-')[0]}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": versions(),
    }


def write(name: str, rows: Sequence[Row], notes: Sequence[str], device: torch.device | str = "cpu") -> Path:
    """Keep rows and notes as results/NAME-<cpu|gpu>.json and .md, and print the table; answers the path of the latter.

    Entries of a row that are lists or tuples (the single bursts) stand in the JSON file only.
    """
    device = torch.device(device)
    about = circumstances(name, device)
    stem = f"{name}-{'gpu' if device.type == 'cuda' else 'cpu'}"
    body = {**about, "notes": list(notes), "rows": [{key: jsonable(row[key]) for key in row} for row in rows]}
    text = page(about, rows, notes)
    put(RESULTS / f"{stem}.json", json.dumps(body, indent=1, allow_nan=False) + "\n")
    put(RESULTS / f"{stem}.md", text)
    print(text, flush=True)
    return RESULTS / f"{stem}.md"


def put(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def jsonable(value: object) -> object:
    """The value as JSON knows it: numbers that are not finite become None."""
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def page(about: Row, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The Markdown page: circumstances, a table (one for each value of `what`, where rows have it), notes."""
    lines = [f"# {about['benchmark']}", "", f"`{about['command']}`", ""]
    where = {**as_mapping(about["hardware"]), **as_mapping(about["versions"])}
    facts = [f"{key} {value}" for key, value in where.items()]
    lines += [", ".join([*facts, f"commit {about['commit'] or 'unknown'}", str(about["date"])]) + ".", ""]
    for what in dict.fromkeys(row.get("what") for row in rows):
        some = [{key: row[key] for key in row if key != "what"} for row in rows if row.get("what") == what]
        lines += [*([f"## {what}", ""] if what is not None else []), table(some), ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


def as_mapping(value: object) -> Row:
    """The value, known to be a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"value: got {type(value).__name__}, need a mapping")
    return value


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table over all scalar keys, in the order in which they first appear; gaps are dashes."""
    keys = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (list, tuple)))
    )
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows)])


def cell(value: object) -> str:
    """One entry: three significant digits for floats, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return short(value) if isinstance(value, float) else str(value)


def short(value: float) -> str:
    """Three significant digits, without an exponent between 0.001 and ten million."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def span(low: float, high: float) -> str:
    """Two quartiles as one entry."""
    return f"{short(low)} to {short(high)}"
