"""What a cluster of several nodes needs: one MLflow server, one store, both within reach of all."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import tracking
from cluster.store import open_store
from sim.checks import require

if TYPE_CHECKING:
    from cluster.driver import Settings

NODE_WAIT = 120.0  # seconds for a node to look at the store; it may have to unpack the job's code first
ANSWER_WAIT = 5.0  # seconds for an answer that should be there


def require_shared(nodes: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Raise ValueError unless all nodes, where there are several, share one MLflow server and one store.

    nodes: those of `ray.nodes()` that are alive. What this process writes to the store every node must read, and what a
    node writes this process; and every node must reach the server.
    """
    if len(nodes) < 2:
        return
    many, uri = f"where the cluster has {len(nodes)} nodes", tracking.resolve_uri(settings.tracking_uri)
    server = urlsplit(uri).scheme in ("http", "https")
    shown = uri if uri.startswith("sqlite:") else f"{urlsplit(uri).scheme}://..."
    require(server, "tracking_uri", shown, f"an MLflow server (http://...; `headway server` starts one) {many}")
    name = "out" if settings.store is None else "store"
    root = settings.store or str(settings.out.expanduser().absolute())
    shared = f"{name}: {root!r} is not allowed; it must be a folder or object store that all nodes reach {many}"
    if settings.store is None:
        shared += " (or give --store)"
    files, mark = open_store(root), f".shared-{uuid.uuid4().hex}"
    by_id = {str(node["NodeID"]): str(node.get("NodeManagerAddress", "")) for node in nodes}
    try:
        files.put(mark, mark.encode())
        for node, (cause, reached) in _ask_nodes(list(by_id), root, mark, uri).items():
            if not reached:
                raise ValueError(f"{shared}: node {by_id[node]} cannot read what this one writes ({cause})")
            if cause:
                raise ValueError(f"{cause}, seen from node {by_id[node]}")
            try:
                files.get(f"{mark}-{node}")
            except (OSError, ValueError) as error:
                raise ValueError(f"{shared}: this node cannot read what {by_id[node]} writes") from error
    finally:
        for written in (mark, *(f"{mark}-{node}" for node in by_id)):
            files.delete(written)


class Newcomers:
    """Raises BrokenOffError once a node has joined that does not share server and store: packs would be lost there.

    alive: looks at the nodes that there are. Those of now are checked at once: ValueError as of `require_shared`.
    """

    def __init__(self, settings: Settings, alive: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self.settings, self.alive = settings, alive
        nodes = alive()
        require_shared(nodes, settings)
        self.known = {node["NodeID"] for node in nodes}

    def __call__(self) -> None:
        """Look now."""
        nodes = self.alive()
        now = {node["NodeID"] for node in nodes}
        if now <= self.known:
            return
        try:
            require_shared(nodes, self.settings)
        except ValueError as error:
            if {node["NodeID"] for node in self.alive()} != now:
                return  # one may have gone meanwhile: asked again at the next look
            raise tracking.BrokenOffError(f"a node has joined that cannot take part: {error}") from error
        self.known |= now


def _ask_nodes(nodes: Sequence[str], root: str, mark: str, uri: str) -> dict[str, tuple[str, bool]]:
    """`look_around` on every node, by node. ValueError for one that does not answer."""
    task: Any = ray.remote(num_cpus=0)(look_around)
    refs: dict[str, Any] = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        refs[node] = task.options(scheduling_strategy=there).remote(root, mark, f"{mark}-{node}", uri)
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=NODE_WAIT)
    try:
        return {node: ray.get(ref, timeout=ANSWER_WAIT) for node, ref in refs.items()}
    except RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise ValueError(f"address: a node does not answer within {NODE_WAIT:.0f} s ({cause})") from error


def look_around(root: str, mark: str, own: str, uri: str) -> tuple[str, bool]:
    """On a node: why it cannot take part (empty if it can), and whether it found the mark, and left its own, there."""
    try:
        files = open_store(root)
        files.get(mark)
        files.put(own, b"")
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error).splitlines()[0], False
    try:
        tracking.connect(uri)
    except tracking.TrackingError as error:
        return str(error), True
    return "", True
