"""Where points of a search become sweeps in the ledger, and what came of them is looked up."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from optuna.trial import FrozenTrial

from cluster import tracking
from cluster.analysis import Analyst, read_tables
from cluster.dispatch import find_room, slots
from cluster.driver import Desk
from cluster.objectives import Verdict, judge, without_pauses
from cluster.pack import drop_checkpoints, warn
from cluster.search_config import Search
from cluster.searcher import UNTOLD
from cluster.sizing import Room, require_computable
from cluster.space import point_of
from cluster.store import open_store
from cluster.sweep import Member, Sweep, packs, validate, versions
from cluster.tracking import PARENT, Ledger, Place
from cluster.trial import forget_attempts, point_config
from train import checkpoint
from train.checkpoint import Files


class Workshop:
    """Where points become sweeps in the ledger, and what came of them is looked up. `open`: those at work, by id."""

    def __init__(self, desk: Desk, search: Search, study: Ledger) -> None:
        self.search, self.study, self.settings = search, study, desk.settings
        root = desk.settings.store
        own = replace(desk.settings, store=f"{root.rstrip('/')}/{search.name}" if root else None)
        self.desk = replace(desk, out=desk.out / search.name, settings=own)
        self.open: dict[str, Ledger] = {}
        self.resources: Mapping[str, float] = {"CPU": 1.0}
        self.memory: Room | None = None

    def use(self, resources: Mapping[str, float]) -> None:
        """Train on this cluster from now on, a point with so much of it."""
        self.resources, self.memory = resources, find_room(resources)

    def room(self) -> int:
        """How many points can be trained at once."""
        self.study.require_held()
        return slots(self.resources)

    def point(self, params: Mapping[str, Any]) -> Sweep:
        """The sweep of a point. ValueError where no member can be built so."""
        return point_of(self.search.sweep, self.search.space, params, self.search.name)

    def identity(self, params: Mapping[str, Any]) -> str:
        """Its id."""
        sweep = self.point(params)
        for member in sweep.members():
            require_computable(member.config, "cuda" if "GPU" in self.resources else "cpu")
        return sweep.id

    def files(self, sweep: Sweep) -> Files:
        """Checkpoints of a point."""
        return open_store(self.desk.store(sweep))

    def begin(self, params: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """Open the point in the ledger; what is left of it, for a worker. None where every member is settled."""
        sweep = self.point(params)
        if sweep.id not in self.open:  # else this call is a repeat: the ledger was away before all was told
            self.open[sweep.id] = tracking.open_sweep(self.desk.client, self.desk.uri, sweep)
        ledger = self.open[sweep.id]
        tags = {PARENT: self.study.place.parent, "study": self.search.name, "optuna_trial": str(number)}
        shown = [Param(item.name, str(item.value(params))) for item in self.search.space]
        own = [RunTag(name, value) for name, value in tags.items()]
        self.desk.client.log_batch(ledger.place.parent, params=shown, tags=own)
        counted = ledger.settle(running_too=True)
        missing = [member for member in validate(sweep) if member.id not in counted]
        return self.left(sweep, missing, ledger.place) if missing else None

    def left(self, sweep: Sweep, missing: Sequence[Member], place: Place) -> dict[str, Any]:
        """The packs of members that are missing, from their furthest checkpoints: one, unless they differ in these."""
        files = self.files(sweep)
        forget_attempts(files)
        starts = checkpoint.latest_steps(checkpoint.manifests(files, versions(), warn))
        assert self.memory is not None
        cut = packs(missing, 1, self.settings.pack_size, starts, self.memory.most)
        return dict(point_config(sweep, cut, place, self.desk.store(sweep)))

    def end(self, params: Mapping[str, Any], pruned: bool = False) -> Verdict:
        """Close the point, and what came of it. A server that is away is waited for."""
        sweep = self.point(params)
        settle = functools.partial(self.settle, sweep, self.open[sweep.id], pruned)
        verdict = tracking.patiently(settle, self.desk.uri, self.settings.patience)
        del self.open[sweep.id]
        return verdict

    def settled(self, params: Mapping[str, Any]) -> Verdict | None:
        """The verdict on a point that no driver is at work on; None where members of it are missing."""
        sweep = self.point(params)
        found = tracking.find_sweeps(self.desk.client, self.desk.experiment, sweep.id)
        if not found:
            return None
        place = replace(self.study.place, parent=found[0].info.run_id)
        counted = tracking.counted(tracking.children(self.desk.client, place))
        if any(member.id not in counted for member in sweep.members()):
            return None
        return self.settle(
            sweep, Ledger(client=self.desk.client, place=place, driver=tracking.driver_name()), pruned=False
        )

    def require_free(self, trials: Sequence[FrozenTrial]) -> None:
        """Raise TrackingError if a driver is at work on one of these points."""
        for trial in trials:
            for parent in tracking.find_sweeps(self.desk.client, self.desk.experiment, self.point(trial.params).id):
                tracking.require_free(parent)

    def settle(self, sweep: Sweep, ledger: Ledger, pruned: bool) -> Verdict:
        """Judge a point by its runs, while no worker is at work on it, and end its own run."""
        runs, members = tracking.children(self.desk.client, ledger.place), sweep.members()
        counted = ledger.settle_runs(runs, running_too=True)
        missing = [member for member in members if member.id not in counted]
        flags = {"point": sweep.id, "run": ledger.place.parent, "interrupted": len(runs) > len(members)}
        if missing:
            last = tracking.last_runs(runs)
            causes = [last[each.id].data.tags.get("cause", "") for each in missing if each.id in last]
            cause = next(filter(None, causes), "its worker was stopped")
            verdict, status = Verdict(cause="pruned" if pruned else cause), "KILLED" if pruned else "FAILED"
        else:
            begun = Counter(run.data.tags["member_id"] for run in runs)
            rows = [self.row(counted[each.id], ledger.place, restarts=begun[each.id] - 1) for each in members]
            verdict, status = judge(self.search.options.objective, rows, sweep), "FINISHED"
            values = zip(self.search.options.objective, verdict.values or (), strict=True)
            at = counted[members[0].id].info.end_time or 0  # of the run, not of now: a repeat is the same point
            metrics = [Metric(name, value, at, 0) for name, value in values]
            self.desk.client.log_batch(ledger.place.parent, metrics=metrics)
        over = {member.id for member in members} if pruned else counted.keys()
        drop_checkpoints(self.files(sweep), over)
        ledger.close(status)
        return replace(verdict, attrs={**verdict.attrs, **flags})

    def row(self, run: Run, place: Place, restarts: int) -> Mapping[str, Any]:
        """A settled member's row, worked out as in the analysis of a sweep, but for its seconds."""
        if run.info.status != "FINISHED":
            return {"diverged": True}
        row = Analyst(place, self.search.sweep.system.relation).analyze(run.info.run_id)[1]
        if restarts and "seconds" in self.search.options.objective:
            times = read_tables(self.desk.client, run.info.run_id)[1]["wall_time"]
            row["seconds"] = without_pauses(times.tolist(), restarts)
        return row

    def leave(self) -> None:
        """Tell the truth of points that were at work when their workers were stopped."""
        for ledger in self.open.values():
            ledger.lost |= self.study.lost  # then another driver has them
            try:
                ledger.settle(running_too=True)
                ledger.close("KILLED")
            except UNTOLD:
                self.study.untold = True
        self.open.clear()
