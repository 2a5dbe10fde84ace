"""Faults against outcome, on sweeps of 64 short members in packs: `python -m tests.bench.faults`.

Every fault strikes a real sweep in processes of its own (`tests.faults`), which is held against an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import faults
from tests.bench.measure import Row, write
from tests.faults import Scene, Server, wait_for

QUICK_DEATH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 8,
}


@dataclass(kw_only=True)
class Stage:
    """Where faults are staged. reference: tables of the undisturbed sweep, which took `undisturbed` seconds."""

    folder: Path
    members: int
    steps: int
    chance: random.Random
    reference: dict[str, str] = field(default_factory=dict)
    undisturbed: float = 0.0

    def scene(self, name: str, **options: Any) -> Scene:
        """A sweep in a folder of its own."""
        return Scene(folder=self.folder / name, **{"members": self.members, "steps": self.steps, **options})

    def row(self, fault: str, times: int, scene: Scene, seconds: float, **options: Any) -> Row:
        """What became of a sweep."""
        found = faults.inspect(scene, self.reference, **options)
        return {
            "fault": fault,
            "times": times,
            "members": found.members,
            "FINISHED once": found.once,
            "runs left RUNNING": found.running,
            "duplicate points": found.duplicates,
            "curves bit for bit": found.same,
            "trained again when done": found.again,
            "runs of a member, most": found.most_runs,
            "extra steps": f"{found.extra / (found.members * self.steps):.2%}",
            "of them before the last checkpoint": found.beyond,
            "wall s": seconds,
            "over undisturbed": seconds / self.undisturbed if found.members == self.members else None,
        }


def undisturbed(stage: Stage) -> Row:
    """The sweep that all others are held against."""
    scene, start = stage.scene("undisturbed"), time.monotonic()
    scene.run()
    stage.undisturbed = time.monotonic() - start
    stage.reference, _ = faults.tables_of(scene)
    return stage.row("none", 0, scene, stage.undisturbed)


def workers_killed(stage: Stage) -> Row:
    """A random worker at random moments."""
    scene, start = stage.scene("workers"), time.monotonic()
    process = scene.start()
    times = faults.kill_workers(scene, process, 20, stage.chance)
    scene.end(process)
    return stage.row("a random worker killed", times, scene, time.monotonic() - start)


def driver_killed(stage: Stage) -> Row:
    """The driver, and the same command at once."""
    scene, start = stage.scene("driver"), time.monotonic()
    for _ in range(5):
        since, process = time.time(), scene.start()
        faults.under_way(scene, process, since, kept=4)
        faults.kill_driver(process)
    scene.run()
    return stage.row("the driver killed, the same command at once", 5, scene, time.monotonic() - start)


def second_driver(stage: Stage) -> Row:
    """The same command beside one that is at work."""
    scene, start = stage.scene("second"), time.monotonic()
    process = scene.start()
    faults.under_way(scene, process, 0.0)
    said = scene.run(code=2)
    assert "is held by driver" in said, said
    scene.end(process)
    return stage.row("a second driver beside the first: it refuses", 1, scene, time.monotonic() - start)


def node_removed(stage: Stage) -> Row:
    """One of two nodes, and a new one some seconds later."""
    with Server(stage.folder / "node-server") as server, faults.ray_nodes(1) as cluster:
        gone = faults.add_node(cluster)
        scene = stage.scene("node", server=server, address=cluster.address)
        start = time.monotonic()
        process = scene.start()
        wait_for(lambda: len(scene.busy()) > 1 and all(attempt.kept for attempt in scene.busy()), 300, process)
        cluster.remove_node(gone, allow_graceful=False)
        time.sleep(10.0)
        faults.add_node(cluster)
        scene.end(process)
        return stage.row("a node of two removed, one added after 10 s", 1, scene, time.monotonic() - start)


def server_down(stage: Stage) -> Row:
    """The MLflow server, for 30 s."""
    with Server(stage.folder / "down-server") as server:
        scene, start = stage.scene("down", server=server), time.monotonic()
        process = scene.start()
        faults.under_way(scene, process, 0.0)
        server.kill()
        time.sleep(30.0)
        server.start()
        scene.end(process)
        return stage.row("the MLflow server down for 30 s", 1, scene, time.monotonic() - start)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """A file system of its own in a folder (root only); what is yielded makes room there."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={kilobytes}k", "headway-faults", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def is_full(folder: Path) -> bool:
    """Whether less than 16 kB are left."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize < 16384


def disk_full(stage: Stage) -> Row:
    """The artifact path has room for a third of the members; there is more after 15 s."""
    return fill(stage, given_up=False)


def disk_full_given_up(stage: Stage) -> Row:
    """The same, and nobody makes room until the sweep has ended by itself."""
    return fill(stage, given_up=True)


def fill(stage: Stage, given_up: bool) -> Row:
    """`disk_full`, or `disk_full_given_up`."""
    size = sum(path.stat().st_size for path in (stage.folder / "undisturbed" / "mlartifacts").rglob("*.*"))
    room = size * (16 if given_up else stage.members) // stage.members // 3 // 1024
    scene = stage.scene("given-up", members=16, more=["--patience", "15"]) if given_up else stage.scene("full")
    with small_disk(scene.folder / "mlartifacts", room) as make_room:
        start = time.monotonic()
        process = scene.start()
        if given_up:
            told = scene.end(process, code=1)
            assert "No space left on device" in told, told
            lasted = time.monotonic() - start
        wait_for(lambda: is_full(scene.folder / "mlartifacts"), 300)
        if not given_up:
            time.sleep(15.0)
        make_room()
        if given_up:
            scene.run()
            name = f"artifact path full until it gave up ({lasted:.0f} s), the same command after room was made"
        else:
            scene.end(process)
            name = "artifact path full, room made after 15 s"
        return stage.row(name, 1, scene, time.monotonic() - start)


def checkpoints_spoiled(stage: Stage) -> Row:
    """The newest checkpoints of a broken off sweep: a bit of the tensors, half of the file, a bit of the manifest."""
    scene, start, spoiled = stage.scene("spoiled"), time.monotonic(), list[str]()
    for spoil in (
        lambda path: faults.flip(path.with_suffix(".npz"), stage.chance),
        lambda path: faults.truncate(path.with_suffix(".npz")),
        lambda path: faults.flip(path, stage.chance),
    ):
        since, process = time.time(), scene.start()
        faults.under_way(scene, process, since, kept=4)
        faults.kill_driver(process)
        time.sleep(3.0)  # its workers end
        for path in faults.newest_checkpoints(scene):
            spoil(path)
            spoiled.append(path.stem)
    scene.run()
    seconds = time.monotonic() - start
    return stage.row("a checkpoint's bit flipped, or half of it cut", len(spoiled), scene, seconds, spoiled=spoiled)


def zombie(stage: Stage) -> Row:
    """A worker is stopped while it ends its runs, its node given up; it goes on once its pack is run elsewhere."""
    with Server(stage.folder / "zombie-server") as server, faults.ray_nodes(2, **QUICK_DEATH) as cluster:
        scene = stage.scene("zombie", server=server, address=cluster.address)
        start = time.monotonic()
        process = scene.start()
        late = faults.stop_while_ending(scene, process)
        raylet, stopped = faults.parent_of(late.pid), time.time()
        try:
            wait_for(
                lambda: [a for a in scene.attempts() if a.begun > stopped and set(a.members) & set(late.members)],
                300, process,
            )  # fmt: skip
            resumed = time.time()
            os.kill(late.pid, signal.SIGCONT)
            scene.end(process)
        finally:
            os.kill(raylet, signal.SIGCONT)
        seconds = time.monotonic() - start
        told = scene.query(
            "SELECT count(*) FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'member_id' "
            f"WHERE r.end_time > {resumed * 1000:.0f} AND r.start_time < {stopped * 1000:.0f} "
            f"AND t.value IN ({', '.join(repr(member) for member in late.members)})"
        )[0][0]
        return stage.row(f"a worker given up goes on and ends {told} runs late", 1, scene, seconds)


def no_node(stage: Stage) -> Row:
    """The only node goes and none comes; then one does, and the same command."""
    with Server(stage.folder / "bare-server") as server, faults.ray_nodes(0) as cluster:
        node = faults.add_node(cluster)
        more = ["--patience", "20"]
        scene = stage.scene("bare", members=16, server=server, address=cluster.address, more=more)
        start = time.monotonic()
        process = scene.start()
        faults.under_way(scene, process, 0.0)
        cluster.remove_node(node, allow_graceful=False)
        gone = time.monotonic()
        told = scene.end(process, code=1, seconds=200)
        assert "no node of the cluster has had" in told, told
        lasted = time.monotonic() - gone
        faults.add_node(cluster)
        scene.run()
        name = f"no node left: given up after {lasted:.0f} s (--patience 20), a node, the same command"
        return stage.row(name, 1, scene, time.monotonic() - start)


def no_server(stage: Stage) -> Row:
    """The MLflow server goes and does not come back; then it does, and the same command."""
    with Server(stage.folder / "gone-server") as server:
        scene = stage.scene("gone", members=16, server=server, more=["--patience", "20"])
        start = time.monotonic()
        process = scene.start()
        faults.under_way(scene, process, 0.0)
        server.kill()
        gone = time.monotonic()
        told = scene.end(process, code=1, seconds=400)
        assert "has not answered for 20 s" in told, told
        lasted = time.monotonic() - gone
        server.start()
        scene.run()
        name = f"no MLflow server: given up after {lasted:.0f} s (--patience 20), the server, the same command"
        return stage.row(name, 1, scene, time.monotonic() - start)


FAULTS = {item.__name__: item for item in (
    undisturbed, second_driver, workers_killed, driver_killed, checkpoints_spoiled, disk_full, disk_full_given_up,
    server_down, no_server, node_removed, no_node, zombie,
)}  # fmt: skip


def notes(stage: Stage) -> list[str]:
    """What the numbers mean."""
    return [
        f"Members of width 8, {stage.steps} steps, packs of 8, a checkpoint every half second, two workers: "
        "`headway sweep` from its start to its report, with a meter in the workers that notes steps and checkpoints. "
        "All on one machine; its nodes have one CPU and one pretended GPU each, which the packs ask for. "
        "The artifact path is a file system of its own in memory.",
        "FINISHED once: members of which exactly one run is FINISHED, and counts. Curves bit for bit: members whose "
        "curves, figures and kept weights are those of the undisturbed sweep, wall times apart. Trained again when "
        "done: attempts at members that begin after their run was FINISHED. Extra steps: member-steps trained over "
        "those needed, as a share; of them before the last checkpoint: those that a sound one would have saved. "
        "Duplicate points: of MLflow (run, name, step) and rows of curves.",
        "Where a fault cannot be saved (no node, no server, no room), the sweep of 16 members ends by itself with exit "
        "code 1 and one line, and the same command goes on.",
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.faults", description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), help="these, again where there are rows of them")
    parser.add_argument("--folder", type=Path, help="kept, with all rows, for a later call with --only")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places at which faults strike")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headway-faults-", ignore_cleanup_errors=True) as temporary:
        folder = options.folder or Path(temporary)
        stage = Stage(folder=folder, members=options.members, steps=options.steps, chance=random.Random(options.seed))
        rows = kept_rows(stage)
        for name, fault in FAULTS.items():
            if name in (options.only or FAULTS) or not rows:
                rows[name] = fault(stage)
                (folder / "rows.json").write_text(json.dumps([rows, stage.reference, stage.undisturbed]))
                print(rows[name], flush=True)
    write("faults", [rows[name] for name in FAULTS if name in rows], notes(stage))


def kept_rows(stage: Stage) -> dict[str, Row]:
    """Rows of an earlier call in the same folder, by fault."""
    path = stage.folder / "rows.json"
    if not path.exists():
        return {}
    rows, stage.reference, stage.undisturbed = json.loads(path.read_text())
    return dict(rows)


if __name__ == "__main__":
    main()
