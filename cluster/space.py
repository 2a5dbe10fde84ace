"""Spaces: the config fields that a search moves, their ranges and choices, and the sweep that a point is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cluster.analysis import number
from cluster.arguments import WORDS
from cluster.encoding import hints_of, matches, require_known, set_field
from cluster.sweep import SWEPT, Sweep, replace_fields, validate
from sim.checks import require
from train.config import WIDTH_UNIT

WIDTH = "model.width"

LOOKS = 200  # suggestions in a row of which none can be built

SPACE_FORM = "NAME=LOW..HIGH, NAME=LOW..HIGH:log, NAME=LOW..HIGH:STEP (whole numbers) or NAME=VALUE,VALUE,..."


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
    """What every width must be a multiple of, whatever the number of heads; that of any width where a range of these is
    searched."""
    sizes: set[Any] = set()
    for name, value in (("model.heads", sweep.model.heads), ("model.head_dim", sweep.model.head_dim)):
        if name in space and not isinstance(space[name].distribution, CategoricalDistribution):
            return WIDTH_UNIT
        sizes |= set(space[name].ends) if name in space else {value}
    return math.lcm(WIDTH_UNIT, *(int(size) for size in sizes if size is not None))


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


def possible_point(sweep: Sweep, space: Space, name: str) -> Sweep:
    """One drawn at random. ValueError if all are impossible, with the reason of the last."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {item.param: item.distribution for item in space}
    reason = ""
    for _ in range(LOOKS):
        try:
            return point_of(sweep, space, study.ask(distributions).params, name)
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"space: none of {LOOKS} points drawn at random is possible; the last: {reason}")
