"""Sweeps, members and packs: what is trained, under which ids, in which company. Pure: no I/O, no cluster."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import sim.pool
import train.loop
from cluster.encoding import check, encode, encode_field, hints_of, is_system, require_known, set_field
from cluster.outside import find_probe, probe_kinds, results_version
from probes.emergence import MIN_PROBES
from sim import system_name
from sim.checks import require, require_one_of
from sim.generator import key_of
from sim.particles import ParticleSystem
from sim.system import Part, System
from train.config import ModelConfig, TrainConfig
from train.loop import MEMBERS_AT_ONCE, even_cuts, probe_steps, shape_of
from train.model import tensor_specs

Order = Literal["member", "seed"]
SWEPT = ("model", "system", "data", "train", "probe")  # parts of a sweep whose fields can be axes
PROBES_VERSION = 2  # raised when a fix changes the numbers that probes write
INTRODUCED: Mapping[tuple[str, str], object] = {}
"""Defaults that have changed: (class, field) -> the default that the field was introduced with, which ids leave out."""
NO_NUMBERS = {("ProbeConfig", name) for name in ("weights_per_decade", "weights_last", "weights_budget")}
"""(class, field) of what is kept, not measured: ids leave these out at any value."""
ARRAY_BYTES = 320  # of an array's name and form in an .npz, about


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The pool of clean rows that all members of one system share."""

    rows: int = 32768
    """Rows that training batches are drawn from."""
    validation_rows: int = 256
    """Rows for the validation loss and the system's own figures."""
    seed: int = 0
    """Of the pool; the members' seeds are their own."""
    order: Order = "member"
    """Rows and noise that a member sees, step by step: its own, or by `seed` the same for all members of one seed, at
    every width and along every axis that leaves the pool as it is, so that contrasts are paired (common random
    numbers)."""

    def __post_init__(self) -> None:
        require_one_of("order", self.order, get_args(Order))
        for name in ("rows", "validation_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """When heads are measured, and on how much."""

    replicates: int = 8
    """Disjoint groups of examples; their scatter gives intervals."""
    examples: int = 64
    """Examples in each group."""
    sparse_examples: int = 8
    """Examples in each group for the costly probes (ablations, distances)."""
    per_decade: int = 20
    """Probe steps a decade of training steps; step 0 and the last are always among them."""
    sparse_per_decade: int = 4
    """Steps a decade for the costly probes (ablations, distances, system figures); the last is always among them."""

    probes: tuple[str, ...] = ()
    """Further probes, each the `module:Class` of your own; their columns stand beside the others in the tables."""

    weights_per_decade: int = 4
    """Steps a decade at which every member's weights are kept with its tables; the first and last are among them."""
    weights_last: int | None = None
    """Keep weights at the last so many of these steps only. None: at all of them."""
    weights_budget: float | None = None
    """Megabytes of weights a member; the steps are thinned out, their ends kept, until they fit. None: no bound."""

    def __post_init__(self) -> None:
        require(self.weights_per_decade >= 1, "weights_per_decade", self.weights_per_decade, "at least 1")
        last, budget = self.weights_last, self.weights_budget
        require(last is None or last >= 1, "weights_last", last, "at least 1, or None")
        require(budget is None or budget > 0, "weights_budget", budget, "above 0, or None")
        require(self.replicates >= 2, "replicates", self.replicates, "at least 2")
        require(self.examples >= 1, "examples", self.examples, "at least 1")
        require(1 <= self.sparse_examples <= self.examples, "sparse_examples", self.sparse_examples, "in 1..examples")
        require(self.per_decade >= 20, "per_decade", self.per_decade, "at least 20 (coarser steps blur timescales)")
        require(
            1 <= self.sparse_per_decade <= self.per_decade,
            "sparse_per_decade",
            self.sparse_per_decade,
            "in 1..per_decade",
        )

    @property
    def at_once(self) -> int:
        """The most examples that a probe has predicted together: a replicate's, or the costly probes' of all."""
        return max(self.examples, self.replicates * self.sparse_examples)

    def steps(self, last: int) -> tuple[int, ...]:
        """All probe steps."""
        return probe_steps(last, self.per_decade)

    def sparse_steps(self, last: int) -> frozenset[int]:
        """The probe steps at which costly probes run too."""
        return self._nearest(last, self.sparse_per_decade)

    def weight_steps(self, last: int, size: int = 0) -> frozenset[int]:
        """The probe steps at which weights are kept. size: bytes that these take at one step."""
        steps = sorted(self._nearest(last, self.weights_per_decade))[-(self.weights_last or 0) :]
        if self.weights_budget is None or size == 0:
            return frozenset(steps)
        room, least = int(1e6 * self.weights_budget // size), min(2, len(steps))
        allowed = f"at least {math.ceil(least * size / 1e4) / 100:g}, megabytes of the weights at {least} steps"
        require(room >= least, "probe.weights_budget", self.weights_budget, allowed)
        count = min(room, len(steps))
        return frozenset(steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count))

    def _nearest(self, last: int, per_decade: int) -> frozenset[int]:
        steps = self.steps(last)
        return frozenset(min(steps, key=lambda step: abs(step - aim)) for aim in probe_steps(last, per_decade))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberConfig:
    """Everything that one member's numbers depend on."""

    system: System
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    probe: ProbeConfig
    seed: int

    def __post_init__(self) -> None:
        self.model.require_divisible()
        probes = len(self.probe.steps(self.train.steps))
        allowed = f"so many that there are {MIN_PROBES} probe steps (there are {probes})"
        require(probes >= MIN_PROBES, "train.steps", self.train.steps, allowed)
        if self.probe.weights_budget is not None:
            _ = self.weight_steps  # or ValueError

    @property
    def weight_bytes(self) -> int:
        """Of its weights at one step, as they are kept."""
        specs = tensor_specs(self.model, self.system.d_in, self.system.d_out)
        return sum(math.prod(spec.shape) * self.train.dtype.itemsize + ARRAY_BYTES for spec in specs.values())

    @property
    def weight_steps(self) -> frozenset[int]:
        """The steps at which weights are kept."""
        budget = self.probe.weights_budget
        return self.probe.weight_steps(self.train.steps, 0 if budget is None else self.weight_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One model of a sweep. `axes`: its values along the sweep's axes, by dotted field name."""

    id: str
    config: MemberConfig
    axes: Mapping[str, object]

    @property
    def point(self) -> dict[str, object]:
        """Where the member stands along the axes, by the names of `Sweep.axis_names`."""
        return {axis_name(name): value for name, value in self.axes.items()}

    @property
    def key(self) -> int:
        """Names the member's own stream of random numbers."""
        return key_of("member", self.id)

    @property
    def order_key(self) -> int:
        """Names the stream of rows and noise that the member is trained on."""
        data, seed = self.config.data, self.config.seed
        return self.key if data.order == "member" else key_of("order", data.seed, seed)

    @property
    def group(self) -> str:
        """Equal for members that can share a pack."""
        return group_of(replace(self.config, train=shape_of(self.config.train), seed=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Members of equal shape, trained together from `start` (0, or the step of their checkpoints)."""

    members: tuple[Member, ...]
    start: int = 0

    @property
    def id(self) -> str:
        """By content."""
        return digest([[member.id for member in self.members], self.start])

    @property
    def config(self) -> MemberConfig:
        """What the members have in common stands in the first one's config."""
        return self.members[0].config

    def cut(self, pieces: int) -> tuple[Pack, ...]:
        """The same members as `pieces` packs, fewer where there are not so many members."""
        most = -(-len(self.members) // pieces)
        return tuple(replace(self, members=self.members[cut]) for cut in even_cuts(len(self.members), most))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """All members: widths x seeds x any other axis."""

    name: str
    """Names the sweep in MLflow and on disk."""
    widths: tuple[int, ...] = (32,)
    """Values of model.width."""
    seeds: int = 1
    """Members per point: seeds 0, 1, ..., seeds - 1. More seeds extend the same sweep."""
    axes: Mapping[str, tuple[float | int | str | bool | None, ...]] = field(default_factory=dict)
    """Further axes by dotted field name, for example train.learning_rate."""
    system: System = field(default_factory=ParticleSystem)
    """What is learnt."""
    data: DataConfig = field(default_factory=DataConfig)
    """The shared pool of examples."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Every member's model; the width is set by `widths`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Every member's training."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """What is measured, and when."""

    def __post_init__(self) -> None:
        require(self.name != "" and "/" not in self.name, "name", self.name, "a non-empty name without /")
        require(len(self.widths) > 0, "widths", self.widths, "at least one width")
        require(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        for name, values in {"widths": self.widths, **self.axes}.items():
            require(len(values) > 0, name, values, "at least one value")
            require(len(set(values)) == len(values), name, values, "without repeats")
        require("model.width" not in self.axes, "axes", "model.width", "given as widths")
        require("system.relation" not in self.axes, "axes", "system.relation", "one for the whole sweep")
        for name in self.axes:
            require_known(name.partition(".")[0], list(SWEPT), "axes")

    @property
    def id(self) -> str:
        """Of everything but widths, seeds and values along axes: a sweep that grows along them stays the same sweep."""
        config = MemberConfig(
            system=self.system, data=self.data, model=ModelConfig(), train=self.train, probe=self.probe, seed=0
        )
        text = [canonical(config), {**canonical(self.model), "width": None}, sorted(self.axes), versions()]
        return f"{self.name}-{digest(text)[:8]}"

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes in tables and tags: `width`, then dotted field names."""
        return tuple(axis_name(name) for name in ("model.width", *self.axes))

    def members(self) -> tuple[Member, ...]:
        """In a stable order: widths outermost, further axes, seeds innermost. ValueError for an impossible one."""
        return tuple(self._members())

    def _members(self) -> Iterator[Member]:
        for width, *values in itertools.product(self.widths, *self.axes.values()):
            axes: dict[str, object] = {"model.width": width, **dict(zip(self.axes, values, strict=True))}
            # The swept fields are set together: a width alone might not fit the heads that another axis brings.
            model, rest = replace_fields(self.model, "model", axes), {}
            for name in SWEPT[1:]:
                rest[name] = replace_fields(getattr(self, name), name, axes)
            for seed in range(self.seeds):
                config = MemberConfig(model=model, seed=seed, **rest)
                yield Member(id=member_id(config), config=config, axes=axes)


def axis_name(field_name: str) -> str:
    """`width` for model.width; any other field keeps its dotted name, which nothing else can have."""
    return "width" if field_name == "model.width" else field_name


def replace_fields(config: Any, prefix: str, values: Mapping[str, object]) -> Any:
    """The config with the dotted fields under `prefix` set, nested ones too. ValueError for an unknown field."""
    own = {name.removeprefix(prefix + "."): value for name, value in values.items() if name.startswith(prefix + ".")}
    return set_field(config, own, prefix) if own else config


@functools.lru_cache(maxsize=4096)
def group_of(config: MemberConfig) -> str:
    """Digest of what members of one pack have in common."""
    return digest(encode(config))


def digest(value: object) -> str:
    """16 hexadecimal digits of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=4096)
def _canonical_part(config: Any) -> dict[str, Any]:
    return canonical(config)


def canonical(config: Any) -> dict[str, Any]:
    """The config as JSON-able values, without fields that stand at the default they were introduced with, and without
    those that say what is kept."""
    kept: dict[str, Any] = {}
    kind: Any = type(config)
    hints, system = hints_of(kind), is_system(kind)
    for item in fields(config):
        if (type(config).__name__, item.name) in NO_NUMBERS:
            continue
        default: object = item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        default = INTRODUCED.get((type(config).__name__, item.name), default)
        value = getattr(config, item.name)
        if value != default:
            nested = hasattr(value, "__dataclass_fields__")
            kept[item.name] = _canonical_part(value) if nested else encode_field(value, hints[item.name])
    if system:
        kept["type"] = system_name(config)
    own = [kind] if system else []
    if isinstance(config, ProbeConfig):
        own = [find_probe(name) for name in config.probes]
    if told := [version for version in map(results_version, own) if version is not None]:
        kept["results_version"] = told
    return kept


def versions() -> dict[str, int]:
    """Results versions of the modules that make a member's numbers."""
    return {"sim": sim.pool.RESULTS_VERSION, "train": train.loop.RESULTS_VERSION, "probes": PROBES_VERSION}


def member_id(config: MemberConfig) -> str:
    """Identity of a member: of its config and of the results versions, nothing else."""
    return digest([canonical(config), versions()])


def part_sizes(config: MemberConfig) -> dict[Part, int]:
    """Rows of each part of the pool."""
    return {
        "train": config.data.rows,
        "validation": config.data.validation_rows,
        "probe": config.probe.replicates * config.probe.examples,
    }


def validate(sweep: Sweep) -> tuple[Member, ...]:
    """The members of a sweep whose every field has its type and an allowed value; ValueError by name otherwise."""
    check(sweep)
    probe_kinds(sweep.probe.probes)
    members = sweep.members()
    require(
        len({member.id for member in members}) == len(members), "axes", dict(sweep.axes), "such that all members differ"
    )
    for config in {replace(member.config, seed=0) for member in members}:
        check(config)
    return members


def packs(
    members: Sequence[Member],
    workers: int,
    size: int | None = None,
    starts: Mapping[str, int] | None = None,
    most: Callable[[MemberConfig], int] = lambda config: MEMBERS_AT_ONCE,
) -> tuple[Pack, ...]:
    """Cut members into packs of equal shape and starting step, costly packs first.

    size: members a pack; None: such that every worker has work, at most `most` of them. starts: step to go on from by
    member id.
    """
    require(size is None or size >= 1, "pack_size", size, "at least 1, or None")
    starts = starts or {}
    groups: dict[tuple[str, int], list[Member]] = {}
    for member in members:
        groups.setdefault((member.group, starts.get(member.id, 0)), []).append(member)
    cut = []
    for (_, start), group in groups.items():
        step = size or min(most(group[0].config), -(-len(group) // max(workers, 1)))
        cut += [Pack(members=tuple(group[part]), start=start) for part in even_cuts(len(group), step)]
    return tuple(sorted(cut, key=lambda pack: -work(pack)))


def work(pack: Pack) -> float:
    """Relative cost of a pack: steps left x tokens x width (1 + width / 64); only the order matters."""
    config = pack.config
    left = config.train.steps - pack.start
    return (
        len(pack.members)
        * left
        * config.train.batch_size
        * config.model.layers
        * config.model.width
        * (1 + config.model.width / 64)
    )
