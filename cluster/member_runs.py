"""The MLflow runs of one pack's members, as its worker writes them."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from cluster import store
from cluster.store import insist
from cluster.sweep import Member, Pack
from cluster.tracking import BATCH, KIND, PARENT, Place, code_version, is_outage, search, supersede
from sim import system_name


def running_of(client: MlflowClient, place: Place, members: Iterable[str]) -> list[Run]:
    """Runs of these members that an earlier attempt left RUNNING."""
    condition = f"tags.`{PARENT}` = '{place.parent}' and attributes.status = 'RUNNING'"
    wanted = set(members)
    return [run for run in search(client, place.experiment, condition) if run.data.tags.get("member_id") in wanted]


def member_tags(member: Member, pack: Pack, place: Place, device: str) -> dict[str, str]:
    """What member runs are grouped and filtered by."""
    config = member.config
    return {
        PARENT: place.parent,
        KIND: "member",
        **{name: str(value) for name, value in member.point.items()},
        "seed": str(config.seed),
        "member_id": member.id,
        "system": system_name(config.system),
        "code_version": code_version(),
        "device": device,
        "precision": config.train.precision,
        "pack": f"{pack.id} of {len(pack.members)}",
    }


def member_params(member: Member) -> dict[str, str]:
    """The few settings shown as columns; the whole config is an artifact."""
    model, train = member.config.model, member.config.train
    return {
        "width": str(model.width),
        "seed": str(member.config.seed),
        "layers": str(model.layers),
        "heads": str(model.n_heads),
        "parametrization": model.parametrization,
        "learning_rate": f"{train.learning_rate:g}",
        "batch_size": str(train.batch_size),
        "steps": str(train.steps),
    }


class MemberRuns:
    """The MLflow runs of one pack's members, written from a thread of their own so that training never waits.

    A call that fails is tried again for a while, for `patience` seconds where the server is away; what still fails is
    raised by `close`.
    """

    def __init__(self, place: Place, pack: Pack, device: str, patience: float = store.PATIENCE) -> None:
        self.place, self.pack, self.device, self.patience = place, pack, device, patience
        self.client = MlflowClient(tracking_uri=place.uri)
        self.points: list[list[Metric]] = [[] for _ in pack.members]
        self.index = {member.id: index for index, member in enumerate(pack.members)}
        self.last = [-1] * len(pack.members)
        self.runs: list[str] = []
        self._jobs: list[Callable[[], None]] = []
        self._ready = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="member-runs", daemon=True)
        self._thread.start()
        self._submit(self._start)

    def _submit(self, job: Callable[[], None]) -> None:
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: bool(self._jobs) or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.pop(0)
            try:
                self._patiently(job)
            except Exception as error:  # kept for `close`; later jobs would only fail the same way
                self._error = error
                return

    def _patiently(self, job: Callable[[], None]) -> None:
        def patience(error: Exception) -> float:
            return self.patience if is_outage(error, self.place.uri) else min(self.patience, store.PATIENCE)

        insist(job, patience, (MlflowException, OSError))

    def _start(self) -> None:
        """Make the runs that are not made yet: a repeat after a fault goes on where the fault came."""
        for member in self.pack.members[len(self.runs) :]:
            place = {**member.point, "seed": member.config.seed}
            name = " ".join(f"{key}={value}" for key, value in place.items())
            tags = member_tags(member, self.pack, self.place, self.device)
            run = self.client.create_run(self.place.experiment, tags=tags, run_name=name)
            self.runs.append(run.info.run_id)
        by_member = {member.id: run for member, run in zip(self.pack.members, self.runs, strict=True)}
        for member in self.pack.members:
            params = [Param(key, value) for key, value in member_params(member).items()]
            self.client.log_batch(by_member[member.id], params=params)
        for stale in running_of(self.client, self.place, by_member):
            if stale.info.run_id not in self.runs:
                supersede(self.client, stale.info.run_id, by_member[stale.data.tags["member_id"]])

    def require_sound(self) -> None:
        """Raise what could not be written, as soon as that is known."""
        if self._error is not None:
            raise self._error

    def point(self, pack: Pack, step: int, time_ms: int, figures: Mapping[str, Sequence[float]]) -> None:
        """Add one point a member and figure; sent with the next `flush`. Values that are not finite are left out.

        pack: this pack or a piece of it. A step that a member has been at is not told again: its figures are the same.
        """
        for place, member in enumerate(pack.members):
            index = self.index[member.id]
            if step <= self.last[index]:
                continue
            self.last[index] = step
            for name, values in figures.items():
                if math.isfinite(values[place]):
                    self.points[index].append(Metric(name, float(values[place]), time_ms, step))

    def note(self, pack: Pack, text: str) -> None:
        """Put a tag `note` on the runs of these members."""

        def job() -> None:
            for member in pack.members:
                self.client.set_tag(self.runs[self.index[member.id]], "note", text[:4000])

        self._submit(job)

    def flush(self) -> None:
        """Send the points gathered so far, in the background."""
        waiting, self.points = self.points, [[] for _ in self.pack.members]
        for index, points in enumerate(waiting):
            for start in range(0, len(points), BATCH):
                self._submit(lambda i=index, part=points[start : start + BATCH]: self._log(i, part))  # type: ignore[misc]

    def _log(self, index: int, points: Sequence[Metric]) -> None:
        self.client.log_batch(self.runs[index], metrics=points)

    def finish(self, member: Member, files: Mapping[str, bytes], diverged: int = -1) -> None:
        """Upload a member's files, then end its run: FINISHED, or FAILED where it diverged at a step >= 0."""
        self._submit(lambda: self._finish(self.index[member.id], files, diverged))

    def _finish(self, index: int, files: Mapping[str, bytes], diverged: int) -> None:
        run = self.runs[index]
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(run, folder)
        checksums = json.dumps({name: hashlib.sha256(content).hexdigest()[:16] for name, content in files.items()})
        tags = [RunTag("digest", checksums)]
        if diverged >= 0:
            tags += [RunTag("outcome", "diverged"), RunTag("cause", f"diverged at step {diverged}")]
        self.client.log_batch(run, tags=tags)
        self.client.set_terminated(run, "FAILED" if diverged >= 0 else "FINISHED")

    def fail(self, cause: str) -> None:
        """End all runs as FAILED with their cause."""

        def job() -> None:
            for run in self.runs:
                self.client.set_tag(run, "cause", cause[:4000])
                self.client.set_terminated(run, "FAILED")

        self._submit(job)

    def close(self) -> None:
        """Wait until everything is written; raises what could not be."""
        self.abandon()
        self.require_sound()

    def abandon(self) -> None:
        """Wait until what was asked for is written or has failed. May be called again."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()
