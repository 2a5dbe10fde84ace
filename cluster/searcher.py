"""Optuna's say in Ray Tune: what is tried next, what came of it, and what a broken-off driver left behind."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import optuna
from mlflow.exceptions import MlflowException
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher
from ray.tune.stopper import NoopStopper

from cluster.objectives import Verdict
from cluster.space import LOOKS, Space
from cluster.store import insist
from cluster.tracking import BrokenOffError, TrackingError

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it tells of every study and trial

UNTOLD = (MlflowException, OSError, StorageInternalError)  # ledger, or study, is away for the moment
T = TypeVar("T")


class Points(Protocol):
    """Where points are trained and looked up."""

    def room(self) -> int:
        """How many points can be trained at once."""

    def identity(self, params: Mapping[str, Any]) -> str:
        """The point's id. ValueError where no member can be built so."""

    def begin(self, params: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """What a worker is told to train; None where every member is settled already."""

    def end(self, params: Mapping[str, Any], pruned: bool = False) -> Verdict:
        """What came of it, by the ledger."""


@dataclass(slots=True)
class Live:
    """A point on a worker: the Optuna trials that wait for it (more than one where they are equal)."""

    point: str
    trials: list[optuna.Trial]
    step: int = -1
    pruned: bool = False


class StudySearcher(Searcher):
    """Hands Optuna's suggestions to Tune and tells Optuna what came of them; it stays behind when Tune pickles.

    points: how many COMPLETE or PRUNED trials the study shall have in all. Trials that FAIL in this call are not
    replaced in it; suggestions that cannot be built are, and are kept as FAIL with their cause.
    patience: seconds that the ledger may be away while a point is begun, or one that is done is looked up, or the
    study's database, then BrokenOffError.
    """

    def __init__(
        self, study: optuna.Study, space: Space, points: int, bench: Points,
        on_verdict: Callable[[int, Verdict], None], patience: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.study, self.points, self.bench, self.on_verdict = study, points, bench, on_verdict
        self.patience = patience
        self.distributions = {item.param: item.distribution for item in space}
        self.live: dict[str, Live] = {}
        self.failed = 0
        self.waiting: optuna.Trial | None = None
        self.since = math.inf

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return Searcher, ()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Tune has no say in space and objectives."""
        return True

    @property
    def left(self) -> int:
        """How many more trials may be begun in this call."""
        begun = sum(len(live.trials) for live in self.live.values()) + (self.waiting is not None)
        return self.points - finished(self.study) - self.failed - begun

    def ask(self, call: Callable[[], T]) -> T:
        """What the study answers; its database may be away for a while."""
        try:
            return insist(call, lambda error: self.patience, (StorageInternalError,))
        except StorageInternalError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise BrokenOffError(
                f"the study's database has taken nothing for {self.patience:.0f} s ({reason}); "
                "the same command goes on later"
            ) from error

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Tune's call: a point to train; None while there is no room, FINISHED when there are none left."""
        reason = ""
        for _ in range(LOOKS):
            if len(self.live) >= max(1, self.bench.room()):
                return None
            if self.waiting is None and self.ask(lambda: self.left) <= 0:
                return str(Searcher.FINISHED)
            trial, self.waiting = self.waiting or self.ask(lambda: self.study.ask(self.distributions)), None
            try:
                identity = self.bench.identity(trial.params)
            except ValueError as error:
                reason = str(error)
                self.ask(functools.partial(refuse, self.study, trial, reason))
                continue
            twin = next((live for live in self.live.values() if live.point == identity), None)
            if twin is not None:
                twin.trials.append(trial)
                return None
            try:
                config = self.bench.begin(trial.params, trial.number)
                if config is not None:
                    self.since = math.inf
                    self.live[trial_id] = Live(identity, [trial])
                    return config
                self._tell([trial], self.bench.end(trial.params))
                self.since = math.inf
                return None
            except TrackingError as error:  # somebody else is at work on the point
                self._tell([trial], Verdict(cause=str(error)))
                self.since = math.inf
                return None
            except UNTOLD as away:
                self.since = min(self.since, time.monotonic())
                if time.monotonic() - self.since > self.patience:
                    reason = (str(away) or repr(away)).splitlines()[0]
                    raise BrokenOffError(
                        f"no point could be begun or ended for {self.patience:.0f} s ({reason}); "
                        "the same command goes on later"
                    ) from away
                self.waiting = trial
                time.sleep(1.0)
                return None
        raise RuntimeError(f"{LOOKS} suggestions in a row were impossible; the last: {reason}. Narrow the space")

    def prune(self, trial_id: str, report: Mapping[str, Any]) -> bool:
        """Whether to stop a trial after this report."""
        live, value, step = self.live.get(trial_id), report.get("validation", math.nan), int(report.get("step", 0))
        if live is None or not math.isfinite(value) or step <= live.step:
            return False
        live.step = step
        with contextlib.suppress(StorageInternalError):  # the next report may say the same
            live.trials[0].report(value, step)
            live.pruned = live.trials[0].should_prune()
        return live.pruned

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's call: whatever it thinks, the ledger says what came of the point."""
        live = self.live.pop(trial_id, None)
        if live is None:
            return
        try:
            self._tell(live.trials, self.bench.end(live.trials[0].params, live.pruned), live.pruned)
        except (*UNTOLD, BrokenOffError) as away:  # the trial stays RUNNING: `recover` tells it later
            self.failed += len(live.trials)
            self.on_verdict(live.trials[0].number, Verdict(cause=f"not told yet: {away}"))

    def _tell(self, trials: Sequence[optuna.Trial], verdict: Verdict, pruned: bool = False) -> None:
        for trial in trials:
            state = self.ask(functools.partial(tell, self.study, trial, verdict, pruned))
            self.failed += state == TrialState.FAIL
            self.on_verdict(trial.number, verdict)


def refuse(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    """End a trial of which no member can be built."""
    trial.set_user_attr("infeasible", reason)
    study.tell(trial, state=TrialState.FAIL)


def tell(study: optuna.Study, trial: optuna.Trial | FrozenTrial, verdict: Verdict, pruned: bool = False) -> TrialState:
    """Write a verdict into the study: flags first, the end last."""
    for name, value in {**verdict.attrs, **({"cause": verdict.cause} if verdict.cause else {})}.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)  # a Trial made anew would draw random numbers
    if verdict.values is not None:
        study.tell(trial.number, list(verdict.values))
        return TrialState.COMPLETE
    state = TrialState.PRUNED if pruned else TrialState.FAIL
    study.tell(trial.number, state=state)
    return state


class PruneStopper(Stopper):
    """Stops trials that the study's pruner gives up."""

    def __init__(self, searcher: StudySearcher) -> None:
        self.searcher = searcher

    def __reduce__(self) -> tuple[type[Stopper], tuple[()]]:
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune's call at every report."""
        return self.searcher.prune(trial_id, result)

    def stop_all(self) -> bool:
        """Never."""
        return False


def finished(study: optuna.Study) -> int:
    """How many trials of the study count as points."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


RETRY = "goes_on_with"


def is_chosen(trial: FrozenTrial, space: Space) -> bool:
    """Whether the study has the trial's value of every field: Optuna writes one after the other."""
    return all(item.param in trial.params for item in space)


def recover(
    study: optuna.Study, space: Space, settled: Callable[[Mapping[str, Any]], Verdict | None]
) -> tuple[int, int]:
    """End trials that a driver left RUNNING: told where all members are settled, else FAIL and enqueued again.

    One whose driver was killed while it was chosen has trained nothing, and what it was enqueued with, if it was, is
    enqueued again. Returns how many were told and enqueued. Broken off anywhere and called again, it loses and repeats
    none: a trial in the queue names the one that it goes on with. Call it only while no driver is at work.
    """
    told = again = 0
    trials = study.get_trials(deepcopy=False)
    queued = {trial.user_attrs.get(RETRY) for trial in trials}
    for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
        chosen = is_chosen(trial, space)
        verdict = settled(trial.params) if chosen else None
        if verdict is not None:
            tell(study, trial, verdict)
            told += 1
            continue
        given = trial.params if chosen else trial.system_attrs.get("fixed_params", {})
        if given and trial.number not in queued:
            study.enqueue_trial(dict(given), user_attrs={RETRY: trial.number})
            again += 1
        end = "; enqueued again" if given else " as it was chosen"
        tell(study, trial, Verdict(cause=f"its driver was stopped{end}"))
    return told, again


Sampler = Literal["tpe", "random", "qmc", "gp", "nsgaii"]


def make_sampler(name: Sampler, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler. trials: how many the study has: a search that goes on does not draw its first points again.

    Suggestions are the same again for a new study with one worker; with more they depend on who is done first.
    """
    own = random.Random(f"{seed} {trials}").getrandbits(32) if trials else seed
    made: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=own, constant_liar=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=own),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
        "gp": lambda: optuna.samplers.GPSampler(seed=own),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=own),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return made[name]()
