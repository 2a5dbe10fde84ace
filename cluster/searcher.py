"""What a search tries and how it is judged: spaces over config fields, objectives, and Optuna's say in Ray Tune."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, get_args

import optuna
from mlflow.exceptions import MlflowException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher
from ray.tune.stopper import NoopStopper

from cluster.analysis import number
from cluster.arguments import WORDS
from cluster.encoding import hints_of, matches, require_known, set_field
from cluster.sweep import SWEPT, Sweep, replace_fields, validate
from cluster.tracking import TrackingError
from cluster.trial import capped
from probes.emergence import STEP_ZERO
from sim.checks import require

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it tells of every study and trial

WIDTH = "model.width"
LOOKS = 200  # suggestions in a row of which none can be built
PATIENCE = 120.0  # seconds that the ledger may be away while a point is begun
WORST_SECONDS = 1e6  # wall time that a diverged member counts as: the objective has no worst value of its own
SPACE_FORM = "NAME=LOW..HIGH, NAME=LOW..HIGH:log, NAME=LOW..HIGH:STEP (whole numbers) or NAME=VALUE,VALUE,..."
UNTOLD = (MlflowException, OSError)  # the ledger is away for the moment


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A config field that is searched. `param`: its name in Optuna, NAME/STEP where that counts steps of a range."""

    name: str
    distribution: BaseDistribution
    step: int = 1

    @property
    def param(self) -> str:
        """The name in Optuna's database."""
        return self.name if self.step == 1 else f"{self.name}/{self.step}"

    @property
    def log(self) -> bool:
        """Whether the range is searched in logarithms."""
        return bool(getattr(self.distribution, "log", False))

    def value(self, params: Mapping[str, Any]) -> Any:
        """The field's value, from a trial's parameters."""
        return params[self.param] * self.step if self.step > 1 else params[self.param]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The ends of its range, or all its choices."""
        if isinstance(self.distribution, CategoricalDistribution):
            return tuple(self.distribution.choices)
        low, high = getattr(self.distribution, "low"), getattr(self.distribution, "high")  # noqa: B009
        return (low * self.step, high * self.step) if self.step > 1 else (low, high)


Space = tuple[Field, ...]


def parse_space(items: Sequence[str], sweep: Sweep) -> Space:
    """The fields of `--space` options. ValueError names what is unknown, of a wrong type or out of range.

    The range of model.width steps by what widths split into, unless it says otherwise.
    """
    require(len(items) > 0, "space", tuple(items), "at least one field, as " + SPACE_FORM)
    texts: dict[str, str] = {}
    for option in items:
        name, equals, text = option.partition("=")
        require(bool(name and equals and text) and name not in texts, "space", option, f"{SPACE_FORM}, each name once")
        texts[name] = text
    space: Space = ()
    for name, text in texts.items():
        hint = hint_of(sweep, name)
        space += (parse_range(name, text, hint) if ".." in text else parse_choices(name, text, hint),)
    unit = width_unit(sweep, {item.name: item for item in space})
    space = tuple(stepped(item, unit) if item.name == WIDTH and unit > 1 else item for item in space)
    for item in space:
        for value in item.ends:
            owner, _, rest = item.name.partition(".")
            try:
                set_field(getattr(sweep, owner), {rest: value}, owner)
            except ValueError as error:
                raise ValueError(f"space: {item.name} = {value!r}: {error}") from error
    return space


def hint_of(sweep: Sweep, name: str) -> Any:
    """The annotation of a dotted field of members' configs."""
    owner, *rest = name.split(".")
    require_known(owner, list(SWEPT), "space")
    require(len(rest) > 0, "space", name, f"a field of {owner}")
    require(name != "system.relation", "space", name, "one for the whole search: it is what points are judged by")
    config = getattr(sweep, owner)
    for depth, part in enumerate(rest):
        where = f"space: {'.'.join([owner, *rest[:depth]])}"
        require(hasattr(config, "__dataclass_fields__"), "space", name, "a field with a value of its own")
        require_known(part, [item.name for item in fields(config)], where)
        hint, config = hints_of(type(config))[part], getattr(config, part)
    return hint


def parse_range(name: str, text: str, hint: Any) -> Field:
    """`LOW..HIGH`, with `:log` and for whole numbers `:STEP` after it."""
    span, *options = text.split(":")
    low, high = (number(end) for end in span.partition("..")[::2])
    steps = [number(option) for option in options if option != "log"]
    step = steps[0] if steps else 1
    shape = len(steps) <= 1 and len(options) - len(steps) <= 1 and isinstance(step, int) and step >= 1
    ends = isinstance(low, int | float) and isinstance(high, int | float) and math.isfinite(low) and math.isfinite(high)
    require(shape and ends, "space", f"{name}={text}", SPACE_FORM)
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    assert isinstance(step, int)
    log = "log" in options
    require(low < high, "space", f"{name}={text}", "from a lower to a higher number")
    require(low > 0 or not log, "space", f"{name}={text}", "above 0 where it is searched in logarithms")
    if float in (hint, *get_args(hint)):
        require(not steps, "space", f"{name}={text}", "without a step: the field is a real number")
        return Field(name=name, distribution=FloatDistribution(float(low), float(high), log=log))
    whole = int in (hint, *get_args(hint)) and isinstance(low, int) and isinstance(high, int)
    require(whole, "space", f"{name}={text}", f"a range of what the field takes ({hint})")
    distribution = IntDistribution(int(low), int(high), log=log)
    found = Field(name=name, distribution=distribution)
    return stepped(found, step) if step > 1 else found


def parse_choices(name: str, text: str, hint: Any) -> Field:
    """`VALUE,VALUE,...`, each of the field's type."""
    choices = tuple(WORDS.get(value, number(value)) for value in text.split(","))
    require(len(set(choices)) == len(choices), "space", f"{name}={text}", "without repeats")
    require(
        len(choices) > 1, "space", f"{name}={text}", f"more than one value ({SPACE_FORM}); a single one is --{name}"
    )
    for value in choices:
        require(matches(value, hint), f"space: {name}", value, f"what the field takes ({hint})")
    return Field(name=name, distribution=CategoricalDistribution(choices))


def stepped(item: Field, step: int) -> Field:
    """A range of whole numbers at multiples of `step`; any other field as it is."""
    distribution = item.distribution
    if not isinstance(distribution, IntDistribution) or item.step > 1:
        return item
    low, high = distribution.low, distribution.high
    text = f"{item.name}={low}..{high}"
    require(low % step == 0 and high % step == 0, "space", text, f"between multiples of its step, {step}")
    require(low > 0 or not distribution.log, "space", text, "above 0 where it is searched in logarithms")
    inner = IntDistribution(low // step, high // step, log=distribution.log)
    return replace(item, distribution=inner, step=step)


def width_unit(sweep: Sweep, space: Mapping[str, Field]) -> int:
    """What every width must be a multiple of, whatever the number of heads; 1 where a range of these is searched."""
    sizes: set[Any] = set()
    for name, value in (("model.heads", sweep.model.heads), ("model.head_dim", sweep.model.head_dim)):
        if name in space and not isinstance(space[name].distribution, CategoricalDistribution):
            return 1
        sizes |= set(space[name].ends) if name in space else {value}
    return math.lcm(*(int(size) for size in sizes if size is not None))


def point_of(sweep: Sweep, space: Space, params: Mapping[str, Any], name: str) -> Sweep:
    """The sweep of one point: the recipe with the searched fields set, one width, no axes. ValueError where impossible.

    Its id differs from that of every other point of the search, and is the same whenever the parameters are.
    """
    values = {item.name: item.value(params) for item in space}
    width = values.get(WIDTH, sweep.widths[0])
    others = {name: value for name, value in values.items() if name != WIDTH}
    swept = {part: replace_fields(getattr(sweep, part), part, others) for part in SWEPT}
    point = replace(sweep, **swept, name=f"{name}-w{width}", widths=(width,), axes={})
    validate(point)
    return point


def require_one_point(sweep: Sweep, space: Space) -> None:
    """Raise ValueError where the recipe has widths or axes of its own that are not searched."""
    searched = {item.name for item in space}
    allowed = f"one width, or searched: --widths {sweep.widths[0]} or --space {WIDTH}=..."
    require(len(sweep.widths) == 1 or WIDTH in searched, "widths", sweep.widths, allowed)
    left = sorted(set(sweep.axes) - searched)
    require(not left, "axes", ", ".join(left), "among the fields that are searched: a point has no axes of its own")


def require_feasible(sweep: Sweep, space: Space, name: str) -> None:
    """Raise ValueError if points drawn at random all are impossible, with the reason of the last."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {item.param: item.distribution for item in space}
    reason = ""
    for _ in range(LOOKS):
        try:
            point_of(sweep, space, study.ask(distributions).params, name)
            return
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"space: none of {LOOKS} points drawn at random is possible; the last: {reason}")


Row = Mapping[str, Any]
"""A member's row as `analyze_member` makes it; `{"diverged": True}` for one that diverged."""
ObjectiveName = Literal["level", "validation_loss", "heads_that_matter", "seconds"]
Direction = Literal["minimize", "maximize"]


def never(row: Row) -> bool:
    """Whether a member that finished has no detector."""
    return not row.get("diverged") and not math.isfinite(row["level"])


def level(rows: Sequence[Row], sweep: Sweep) -> float:
    """Geometric mean over members of the best detector's level; without one, or diverged, twice the last step."""
    last = 2.0 * sweep.train.steps
    times = [last if row.get("diverged") or never(row) else max(row["level"], STEP_ZERO) for row in rows]
    return math.exp(statistics.fmean(map(math.log, times)))


def validation_loss(rows: Sequence[Row], sweep: Sweep) -> float:
    """Median over members of the loss at the end; at most that of predicting nothing, as which divergence counts."""
    return statistics.median(capped(row.get("validation_loss", math.inf), sweep.system) for row in rows)


def heads_that_matter(rows: Sequence[Row], sweep: Sweep) -> float:
    """Mean over members; none where a member diverged."""
    return statistics.fmean(0 if row.get("diverged") else row["heads_that_matter"] for row in rows)


def seconds(rows: Sequence[Row], sweep: Sweep) -> float:
    """Wall time from the first to the last probe step of the slowest member, pauses taken out."""
    return max(WORST_SECONDS if row.get("diverged") else row["seconds"] for row in rows)


def without_pauses(times: Sequence[float], restarts: int) -> float:
    """Seconds from the first to the last of these times; the longest gaps, one a restart, count as the next longest."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    usual = sorted(gaps)[max(0, len(gaps) - 1 - restarts)] if gaps else 0.0
    return sum(min(gap, usual) for gap in gaps)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a point is judged by: a number from its members' rows, which is always finite; `log`: how it is drawn."""

    value: Callable[[Sequence[Row], Sweep], float]
    direction: Direction
    text: str
    log: bool = False


OBJECTIVES: Mapping[str, Objective] = {
    "level": Objective(level, "minimize", "level (steps)", log=True),
    "validation_loss": Objective(validation_loss, "minimize", "validation loss", log=True),
    "heads_that_matter": Objective(heads_that_matter, "maximize", "heads that matter, a member"),
    "seconds": Objective(seconds, "minimize", "wall time (s)", log=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of a point: a value for each objective, or None and the cause. attrs: flags kept with the trial."""

    values: tuple[float, ...] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""


def judge(names: Sequence[str], rows: Sequence[Row], sweep: Sweep) -> Verdict:
    """The verdict over all members of a point; `diverged`, and `never` for levels, count those at a worst value."""
    values = tuple(float(OBJECTIVES[name].value(rows, sweep)) for name in names)
    flags = {"diverged": sum(bool(row.get("diverged")) for row in rows)}
    if "level" in names:
        flags["never"] = sum(map(never, rows))
    return Verdict(values=values, attrs=flags)


def require_prunable(objectives: Sequence[str], space: Space) -> None:
    """Raise ValueError where stopping a point by its validation loss on the way would bias what is searched for."""
    reason = (
        "left out: points are stopped by their validation loss on the way, which says nothing of "
        "when heads emerge, whether they matter, or how long it takes"
    )
    require(tuple(objectives) == ("validation_loss",), "prune", True, f"{reason} (objectives: {', '.join(objectives)})")
    moving = [item.name for item in space if item.name == "train.steps" or item.name.startswith("probe.")]
    require(not moving, "prune", True, f"left out where {', '.join(moving)} is searched: points share no probe steps")


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
    """

    def __init__(
        self, study: optuna.Study, space: Space, points: int, bench: Points, on_verdict: Callable[[int, Verdict], None]
    ) -> None:
        super().__init__()
        self.study, self.points, self.bench, self.on_verdict = study, points, bench, on_verdict
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

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Tune's call: a point to train; None while there is no room, FINISHED when there are none left."""
        reason = ""
        for _ in range(LOOKS):
            if len(self.live) >= max(1, self.bench.room()):
                return None
            if self.waiting is None and self.left <= 0:
                return str(Searcher.FINISHED)
            trial, self.waiting = self.waiting or self.study.ask(self.distributions), None
            try:
                identity = self.bench.identity(trial.params)
            except ValueError as error:
                reason = str(error)
                trial.set_user_attr("infeasible", reason)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            twin = next((live for live in self.live.values() if live.point == identity), None)
            if twin is not None:
                twin.trials.append(trial)
                return None
            try:
                config = self.bench.begin(trial.params, trial.number)
                self.since = math.inf
                if config is not None:
                    self.live[trial_id] = Live(identity, [trial])
                    return config
                self._tell([trial], self.bench.end(trial.params))
                return None
            except TrackingError as error:  # somebody else is at work on the point
                self._tell([trial], Verdict(cause=str(error)))
                return None
            except UNTOLD:
                self.since = min(self.since, time.monotonic())
                if time.monotonic() - self.since > PATIENCE:
                    raise
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
        live.trials[0].report(value, step)
        live.pruned = live.trials[0].should_prune()
        return live.pruned

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's call: whatever it thinks, the ledger says what came of the point."""
        live = self.live.pop(trial_id, None)
        if live is None:
            return
        try:
            verdict = self.bench.end(live.trials[0].params, live.pruned)
        except UNTOLD as away:  # the trial stays RUNNING: `recover` tells it later
            self.failed += len(live.trials)
            self.on_verdict(live.trials[0].number, Verdict(cause=f"not told yet: {away}"))
            return
        self._tell(live.trials, verdict, live.pruned)

    def _tell(self, trials: Sequence[optuna.Trial], verdict: Verdict, pruned: bool = False) -> None:
        for trial in trials:
            state = tell(self.study, trial, verdict, pruned)
            self.failed += state == TrialState.FAIL
            self.on_verdict(trial.number, verdict)


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


def recover(study: optuna.Study, settled: Callable[[Mapping[str, Any]], Verdict | None]) -> tuple[int, int]:
    """End trials that a driver left RUNNING: told where all members are settled, else FAIL and enqueued again.

    Returns how many were told and enqueued. Broken off anywhere and called again, it loses and repeats none: a trial in
    the queue names the one that it goes on with. Call it only while no driver is at work.
    """
    told = again = 0
    trials = study.get_trials(deepcopy=False)
    queued = {trial.user_attrs.get(RETRY) for trial in trials}
    for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
        verdict = settled(trial.params) if trial.params else None
        if verdict is not None:
            tell(study, trial, verdict)
            told += 1
            continue
        if trial.params and trial.number not in queued:
            study.enqueue_trial(dict(trial.params), user_attrs={RETRY: trial.number})
            again += 1
        tell(study, trial, Verdict(cause="its driver was stopped; enqueued again"))
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
