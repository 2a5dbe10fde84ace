"""What the terminal shows: stages, progress, plans and closing tables; plain lines at intervals where none is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cluster.geometry import Request, Subject
from cluster.plan import Plan, describe, shape_name
from cluster.sweep import Pack, Sweep
from cluster.trial import Report
from probes.emergence import STATUSES

LINE_EVERY = 15.0  # seconds between plain lines
SHOWN = 6  # packs with a bar of their own at one time


class Live:
    """A console, and bars that stand on it while it is open; plain lines where it is no terminal."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.console, self.last_line = console, -math.inf
        text = TextColumn("{task.description}")
        self.bars = Progress(text, *columns, console=console, disable=not console.is_terminal, transient=True)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")


def loss_text(loss: float) -> str:
    """`, loss 0.1234`, or nothing before there is one."""
    return f", loss {loss:.4f}" if math.isfinite(loss) else ""


class Terminal(Live):
    """Live progress: one bar for all member-steps, one for each running pack with its loss."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.total: TaskID | None = None
        self.tasks: dict[str, TaskID] = {}
        self.by_id: dict[str, Pack] = {}
        self.steps: dict[str, int] = {}
        self.lost: dict[str, str] = {}

    def stage(self, text: str) -> None:
        """A new part of the job has begun."""
        for task in (self.total, *self.tasks.values()):
            if task is not None:
                self.bars.update(task, visible=False)
        super().stage(text)

    def packs(self, packs: Sequence[Pack]) -> None:
        """These packs will be trained."""
        self.by_id = {pack.id: pack for pack in packs}
        self.steps = {pack.id: pack.start for pack in packs}
        members = sum(len(pack.members) for pack in packs)
        self.stage(f"training {count(members, 'member')} in {count(len(packs), 'pack')}")
        self.total = self.bars.add_task("all", total=self._work_total(), note="workers are starting")

    def _work_total(self) -> int:
        return sum(len(p.members) * (p.config.train.steps - p.start) for p in self.by_id.values())

    def _work_done(self) -> int:
        return sum(len(p.members) * (self.steps[p.id] - p.start) for p in self.by_id.values())

    def progress(self, report: Report) -> None:
        """A pack has come to a step, has failed for good, or does not go as planned."""
        pack, step, loss = report.pack, report.step, report.loss
        if report.failed and pack not in self.lost:
            self.lost[pack] = report.failed
            self.console.print(f"[red]pack {pack} failed[/red]: {escape(report.failed)}")
        if report.note:
            self.console.print(f"[yellow]pack {pack}[/yellow] {escape(report.note)}")
        self.steps[pack] = max(step, self.steps.get(pack, 0))
        if self.console.is_terminal:
            self._draw(pack, loss)
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            share = self._work_done() / max(self._work_total(), 1)
            self.console.print(f"{share:4.0%} of all steps; pack {pack} at step {step:,}{loss_text(loss)}")

    def _draw(self, pack: str, loss: float) -> None:
        if self.total is not None:
            self.bars.update(self.total, completed=self._work_done(), note="")
        last = self.by_id[pack].config.train.steps
        over = [name for name in self.tasks if self.steps[name] >= self.by_id[name].config.train.steps]
        if pack not in self.tasks:
            for name in over[: max(0, len(self.tasks) - SHOWN + 1)]:
                self.bars.remove_task(self.tasks.pop(name))
            first = self.by_id[pack].members[0]
            title = " ".join(f"{name} {value}" for name, value in first.point.items())
            seeds = ",".join(dict.fromkeys(str(member.config.seed) for member in self.by_id[pack].members))
            plural = "s" if "," in seeds else ""
            self.tasks[pack] = self.bars.add_task(f"  {title} seed{plural} {seeds}", total=last, note="")
        note = loss_text(loss).removeprefix(", ")
        self.bars.update(self.tasks[pack], completed=self.steps[pack], note=note)

    def analyzed(self, done: int, total: int) -> None:
        """Members analysed so far."""
        if self.console.is_terminal and done == 1:
            self.total = self.bars.add_task("members", total=total, note="")
        if self.console.is_terminal and self.total is not None:
            self.bars.update(self.total, completed=done)

    def measures(
        self, request: Request, members: Sequence[Subject], steps: Sequence[int], estimates: int, seconds: float
    ) -> None:
        """So many estimates will be made of these members, at these steps, in about so many seconds."""
        llc = request.llc
        time = f"about {duration(seconds)}, by one short trial" if math.isfinite(seconds) else "the trial failed"
        self.stage(f"measuring {count(len(members), 'member')}: {time}")
        variants = ", and at n_beta and gamma x 1/3 and x 3" if llc.sensitivity else ""
        self.console.print(
            f"{count(estimates, 'estimate')} of heads at {count(len(steps), 'step')} "
            f"({', '.join(f'{step:,}' for step in steps)}), each of {count(llc.chains, 'chain')} x {llc.draws:,} draws "
            f"after {llc.burn_in:,}{variants}"
        )

    def measured(self, done: int, total: int, member: str, cause: str) -> None:
        """Members whose geometry was measured so far; the last of them, and the cause where it failed."""
        if cause:
            self.console.print(f"[red]{escape(member)} failed[/red]: {escape(cause)}")
        if not self.console.is_terminal:
            self.console.print(f"{done:,} of {count(total, 'member')} measured: {member}")
        else:
            self.analyzed(done, total)


def count(number: int, noun: str) -> str:
    """`1 member`, `2 members`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_plan(console: Console, sweep: Sweep, plan: Plan, asked: int | None = None) -> None:
    """The plan of a dry run. asked: the size of packs that the user wants."""
    members = sum(len(pack.members) for pack in plan.packs)
    console.print(
        f"[bold]{escape(sweep.id)}[/bold]: {describe(plan.packs[0].config) if plan.packs else 'nothing to train'}"
    )
    table = Table("packs", "members each", "why", "at once", *sweep.axis_names, "steps", "ms a step", "minutes a pack")
    for name in dict.fromkeys(map(shape_name, plan.packs)):
        alike = [pack for pack in plan.packs if shape_name(pack) == name]
        cost, first = plan.costs[name], alike[0]
        points = [member.point for pack in alike for member in pack.members]
        values = [", ".join(dict.fromkeys(str(point[axis]) for point in points)) for axis in points[0]]
        steps, minutes = f"{first.start:,}..{first.config.train.steps:,}", cost.seconds(first) / 60
        table.add_row(
            str(len(alike)),
            str(len(first.members)),
            "--pack-size" if asked is not None else plan.reason(first),
            "-" if cost.at_once is None else str(cost.at_once),
            *values,
            steps,
            f"{1000 * cost.step:.1f}",
            f"{minutes:.1f}",
        )
    console.print(table)
    for at, sizes in plan.weights.items():
        each = " to ".join(dict.fromkeys(map(size, (min(sizes), max(sizes)))))
        console.print(
            f"kept weights: {each} a member x {count(len(sizes), 'member')}, {size(sum(sizes))} in all, at "
            f"{count(len(at), 'step')}: {', '.join(f'{step:,}' for step in at)}"
        )
    elsewhere = "" if plan.measured_on == plan.room.device else " on a CPU, where workers have GPUs"
    console.print(
        f"{count(members, 'member')} to train ({plan.done:,} done), {count(len(plan.packs), 'pack')} on "
        f"{count(plan.workers, 'worker')}: about {duration(plan.seconds)}, measured here on short trials{elsewhere};\n"
        f"memory of the largest pack {size(plan.memory)} (a worker takes 0.5 GB before that, and has "
        f"{size(plan.room.memory)}), disk {size(plan.disk)}. Nothing was started."
    )


def duration(seconds: float) -> str:
    """`40 s`, `3.2 min`, `5.0 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """`3.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def width_summary(widths: pd.DataFrame, relation: str, axes: Iterable[str]) -> Table:
    """What emerged at each point of the sweep, for the relation that it is judged by."""
    axes = list(axes)
    table = Table(
        *axes, "members", "heads", *STATUSES, "detectors a member", "level (90% interval)", "without detector"
    )
    for _, row in widths[widths["relation"] == relation].iterrows():
        table.add_row(
            *(f"{row[axis]:g}" if isinstance(row[axis], int | float) else str(row[axis]) for axis in axes),
            *(str(row[name]) for name in ("members", "heads", *STATUSES)),
            f"{row['detectors_per_member']:.1f}",
            interval(row["level"], row["level_low"], row["level_high"]),
            str(row["members_without_detector"]),
        )
    table.title = f"heads by status on relation {relation!r}; level: first step at twice uniform attention"
    return table


def interval(value: float, low: float, high: float) -> str:
    """`320 (280..366)`, or a dash."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f} ({low:.0f}..{high:.0f})" if math.isfinite(low) else f"{value:.0f}"
