"""Packs as Ray Tune trials: resources, the tuner, and progress on its way to the driver."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C reaches the driver, which then tells the ledger
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # tracebacks of trials that nobody waits for any more
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.pack import pool_arrays, warn
from cluster.sizing import Room
from cluster.sweep import MemberConfig, digest
from cluster.tracking import BrokenOffError
from cluster.trial import Report, SearchContext, TrialContext, pool_name, train_pack, train_point
from sim.checks import require

LOST = "the worker kept failing"
RETRIES = 100  # of one trial, that a pack may lose many spot machines; where it makes no progress it gives up by itself
ROOM_WAIT = 30.0  # seconds for a GPU to become free that is to say how much memory it has
LOOK_EVERY = 1.0  # seconds between looks at whether trials can go on

UNWATCHED = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}
"""Of a cluster of our own: what Ray gathers for a dashboard that it has not, a hundredth of a core."""

OnReport = Callable[[Report], None]
Watch = Callable[[], None]


class Places:
    """Raises BrokenOffError once no node has had room for a trial for `patience` seconds: Tune would wait for ever."""

    def __init__(self, resources: Mapping[str, float], patience: float) -> None:
        self.resources, self.patience, self.seen = resources, patience, time.monotonic()

    def __call__(self) -> None:
        """Look now."""
        if slots(self.resources):
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > self.patience:
            wanted = ", ".join(f"{name} {amount:g}" for name, amount in self.resources.items())
            raise BrokenOffError(
                f"no node of the cluster has had {wanted} for {self.patience:.0f} s; "
                "the same command goes on once one has, from the last checkpoints"
            )


def is_local(address: str | None) -> bool:
    """Whether neither `address` nor RAY_ADDRESS names a cluster: there is then but one of our own, on this machine."""
    return address is None and not os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_cluster(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """A connection to the cluster at `address` or RAY_ADDRESS, or else a local one of this machine's cores."""
    environment = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    options: dict[str, Any] = {"address": address or "auto"}
    if is_local(address):  # "local": never a cluster that somebody else has left running on this machine
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_system_config": UNWATCHED}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": environment}, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"address: no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS')!r} ({error})"
        ) from error
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints tracebacks; the ledger keeps the causes
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's handler would end us with the ledger untold
    try:
        yield
    finally:
        ray.shutdown()


def settle_resources(wanted: float | None) -> dict[str, float]:
    """What each trial asks for: one CPU and the GPUs wanted (None: one where there are any). Or ValueError."""
    most = max((node.get("GPU", 0.0) for node in nodes()), default=0.0)
    gpus = wanted if wanted is not None else min(1.0, most)
    require(gpus <= most, "gpus", gpus, f"at most {most:g}, all that one node has")
    require(gpus <= 1 or gpus == int(gpus), "gpus", gpus, "at most 1, or a whole number")
    resources = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
    found = "; ".join(", ".join(f"{name} {node.get(name, 0.0):g}" for name in ("CPU", "GPU")) for node in nodes())
    if not gpus and not slots(resources):
        raise ValueError(
            f"address: no node there has a CPU for packs (the nodes have {found}); where machines come on demand, "
            "have one stand ready (min_workers: 1)"
        )
    require(
        slots(resources) > 0, "gpus", gpus, f"such that one node has it and a CPU beside it (the nodes have {found})"
    )
    return resources


def nodes() -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in alive()]


def alive() -> list[dict[str, Any]]:
    """What Ray tells of each node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def slots(resources: Mapping[str, float]) -> int:
    """How many trials the cluster can run at once: the sum over nodes, as no trial spans two."""
    return sum(slots_on(node, resources) for node in nodes())


def slots_on(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many trials one node can run at once."""
    return int(min(node.get(name, 0.0) / amount for name, amount in resources.items()) + 1e-9)


def find_room(resources: Mapping[str, float]) -> Room:
    """The room for packs: memory of the smallest of the nodes' places; of GPUs what workers find free on each node."""
    if resources.get("GPU") and (rooms := [room for room in _gpu_rooms(resources) if room.device == "cuda"]):
        return min(rooms, key=lambda room: room.memory)
    places = [(node.get("memory"), slots_on(node, resources)) for node in nodes()]
    known = [memory / count for memory, count in places if count and memory is not None]
    return Room(device="cpu", memory=int(min(known))) if known else Room.here(slots(resources), gpus=0)


def _gpu_rooms(resources: Mapping[str, float]) -> list[Room]:
    """What a worker finds on each node that has room for one.

    Nodes that fail, and those whose GPUs are in use for longer than `ROOM_WAIT`, are named and left out; only if no
    other has answered by then is the first of them waited for. Raises BrokenOffError where every node fails.
    """
    gpus, asked = resources["GPU"], {}
    task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_gpu_room)
    for node in alive():
        if slots_on(node["Resources"], resources):
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=True)  # elsewhere, should it be lost
            asked[task.options(scheduling_strategy=there).remote(gpus)] = node.get("NodeManagerAddress", node["NodeID"])
    done, busy = ray.wait(list(asked), num_returns=len(asked), timeout=ROOM_WAIT)
    found = _answers(done, asked)
    while busy and not found:
        done, busy = ray.wait(busy, num_returns=1)
        found = _answers(done, asked)
    if asked and not found:
        raise BrokenOffError("no node of the cluster says what room its GPUs have")
    for answer in busy:
        warn(f"the GPUs of node {asked[answer]} are in use: packs are sized by those of other nodes")
        ray.cancel(answer)
    return found


def _answers(done: Iterable[Any], asked: Mapping[Any, str]) -> list[Room]:
    """The rooms of tasks that are done; who failed is told."""
    found = []
    for answer in done:
        try:
            found.append(ray.get(answer))
        except RayError as error:
            cause = str(error).strip().splitlines()[-1]
            warn(f"node {asked[answer]} does not say what room its GPUs have: {cause}")
    return found


def _gpu_room(gpus: float) -> Room:
    return Room.here(gpus=gpus)


def make_pools(configs: Iterable[MemberConfig]) -> dict[str, Any]:
    """The pools of members, each made once by a Ray task and left in the object store: references by `pool_name`."""
    wanted = {pool_name(config): config for config in configs}
    task = ray.remote(num_cpus=1, max_retries=2, num_returns=2)(pool_arrays)  # whose module loads no Ray and no MLflow
    made: dict[str, Any] = {name: task.remote(config) for name, config in wanted.items()}
    ray.get(
        [done for _, done in made.values()]
    )  # the small half: it brings errors, and leaves the arrays where they are
    return {name: arrays for name, (arrays, _) in made.items()}


class PoolShelf:
    """Pools made when they are first asked for, kept in the object store; the body of a Ray actor that takes no CPU,
    as all of these may be held by the trials that wait for it."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def find(self, config: MemberConfig) -> list[Any]:
        """The object reference of the pool's arrays, in a list, so that it arrives as a reference."""
        name = pool_name(config)
        if name not in self.made:
            self.made[name] = ray.put(pool_arrays(config)[0])
        return [self.made[name]]


def open_shelf() -> Any:
    """A `PoolShelf` on the cluster; a lost one begins anew."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(PoolShelf).remote()


class _Progress(Callback):
    """Hands trial reports to the driver's own function, which holds the terminal and stays behind when Tune pickles.

    lost: what is reported of a trial, by its config, that has used up its retries. watches: called every second, they
    raise BrokenOffError where trials cannot go on.
    """

    def __init__(
        self, on_report: OnReport, lost: Callable[[Mapping[str, Any]], Report], watches: Sequence[Watch] = ()
    ) -> None:
        self.on_report, self.lost, self.watches = on_report, lost, watches
        self.looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's hook, called several times a second."""
        if time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked = time.monotonic()
        for watch in self.watches:
            watch()

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        return Callback, ()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tune's hook."""
        self.on_report(Report(**{item.name: result[item.name] for item in fields(Report)}))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune's hook: the trial has used up its retries."""
        self.on_report(self.lost(trial.config))


def run_packs(
    context: TrialContext, resources: Mapping[str, float], on_report: OnReport, watch: Watch = lambda: None
) -> None:
    """Run one trial per pack and wait for all. Failures are told through `on_report`; the ledger has their causes.

    watch: called every second, to raise BrokenOffError where nothing can go on. So does a cluster without a place for
    packs.
    """

    def lost(config: Mapping[str, Any]) -> Report:
        pack = context.packs[config["pack"]]
        return Report(pack=pack.id, step=pack.start, failed=LOST)

    run_trials(
        tune.with_parameters(train_pack, context=context),
        resources,
        _Progress(on_report, lost, (watch, Places(resources, context.patience))),
        TuneConfig(reuse_actors=True),
        param_space={"pack": tune.grid_search(list(range(len(context.packs))))},
    )


def run_points(
    context: SearchContext,
    resources: Mapping[str, float],
    on_report: OnReport,
    searcher: Searcher,
    stopper: Stopper | None = None,
    watch: Watch = lambda: None,
) -> None:
    """Run one trial for each point that the searcher suggests, until it has none left. watch: as in `run_packs`."""

    def lost(config: Mapping[str, Any]) -> Report:
        first = json.loads(config["point"])["packs"][0]
        return Report(pack=digest([first["members"], first["start"]]), step=first["start"], failed=LOST)

    run_trials(
        tune.with_parameters(train_point, context=context),
        resources,
        _Progress(on_report, lost, (watch, Places(resources, context.patience))),
        TuneConfig(reuse_actors=True, search_alg=searcher, num_samples=-1),
        stop=stopper,
    )


def run_trials(
    trainable: Any,
    resources: Mapping[str, float],
    progress: _Progress,
    how: TuneConfig,
    param_space: Mapping[str, Any] | None = None,
    stop: Stopper | None = None,
) -> None:
    """Run trials until there are none left; Tune keeps nothing but a temporary folder, and says nothing."""
    trainable = tune.with_resources(trainable, {name.lower(): amount for name, amount in resources.items()})
    with tempfile.TemporaryDirectory(prefix="headway-tune-") as folder:
        tuner = Tuner(
            trainable,
            param_space=dict(param_space or {}),
            tune_config=how,
            run_config=RunConfig(
                name="packs",
                storage_path=folder,
                verbose=0,
                failure_config=FailureConfig(max_failures=RETRIES),
                callbacks=[progress],
                stop=stop,
            ),
        )
        tuner.fit()
