"""Degenerate geometry of the members that are done: refined learning coefficients of their heads at the steps at which
weights were kept, gradients, and every estimate of the degree k of each head's effective potential."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from numpy.typing import NDArray
from torch import Tensor

from cluster.analysis import STAYED_NOT, Analysis, Rows, load_analysis
from cluster.encoding import encode
from cluster.intervals import mean_interval
from cluster.pack import probe_batch, to_numpy
from cluster.sweep import MemberConfig, Sweep, digest
from probes.degree import (
    LINE,
    PROFILE,
    Degree,
    degree_from_gradient,
    degree_from_line,
    degree_from_loss,
    degree_from_profile,
    degree_from_score,
    line_points,
    refused,
)
from probes.llc import LLC, LLCSettings, estimate_llcs
from probes.relaxation import Relaxation, fit_relaxation
from probes.words import counted
from sim.checks import require, require_one_of
from sim.generator import Generator, key_of
from sim.pool import Pool
from sim.system import Batch
from train.checkpoint import decode_arrays
from train.config import TrainConfig
from train.loop import even_cuts
from train.refine import HEAD, HeadTarget, LineTarget, head_gradients

Tokens = Literal["all", "related"]
HeadKey = tuple[int, int]
"""(layer, head)"""

VERSION = 4  # raised when a fix changes the numbers
METHODS = ("gradient", "profile", "score", "loss gap", "line coefficient")
TABLES = ("llc", "degrees")
LEAST = 8  # steps from a head's onset on, for its gradients to be taken from there
RECENT = 2.0  # decades of steps before the last, of which every second that is kept is measured
REACH = 3.0  # standard deviations of a localisation in the length of a line
NEAREST, POINTS = 1e-3, 31  # least |x| of a profile in lengths of the line; points a side
ROUNDING = 1e3 * np.finfo(float).eps  # of a mean loss
MEMORY = 1 << 28  # bytes that are kept of what does not move
AT_ONCE = {"cpu": 32, "cuda": 4096}  # chains
NEARBY = {
    "n_beta_third": "n_beta / 3",
    "n_beta_triple": "n_beta x 3",
    "gamma_third": "gamma / 3",
    "gamma_triple": "gamma x 3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is measured of every member. checkpoints: steps, "all", or "recent": every second one kept in the last two
    decades; heads: LAYER.HEAD, None for all. The order in which things are named makes no other request."""

    llc: LLCSettings = field(default_factory=LLCSettings)
    checkpoints: tuple[int, ...] | Literal["all", "recent"] = "recent"
    heads: tuple[str, ...] | None = None
    tokens: tuple[Tokens, ...] = ("all",)
    minibatch: int = 32
    examples: int | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoints", "heads", "tokens"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                require(len(set(value)) == len(value) > 0, name, value, "at least one, each once")
                object.__setattr__(self, name, tuple(sorted(value)))
        for tokens in self.tokens:
            require_one_of("tokens", tokens, get_args(Tokens))
        for head in self.heads or ():
            layer, dot, number = head.partition(".")
            require(
                dot == "." and layer.isdecimal() and number.isdecimal(), "heads", head, "LAYER.HEAD, for example 0.1"
            )
        require(self.minibatch >= 1, "minibatch", self.minibatch, "at least 1")
        require(self.examples is None or self.examples >= 2, "examples", self.examples, "at least 2, or None")

    @property
    def id(self) -> str:
        """By content; names the results on a member's run."""
        return digest([encode(self), VERSION])

    def heads_of(self, config: MemberConfig) -> list[HeadKey]:
        """The heads of a model. ValueError for one that it has not."""
        own = list(np.ndindex(config.model.layers, config.model.n_heads))
        if self.heads is None:
            return own
        names = {f"{layer}.{head}": (layer, head) for layer, head in own}
        for name in self.heads:
            require(name in names, "heads", name, f"one of {', '.join(names)}")
        return sorted(names[name] for name in self.heads)

    def steps_of(self, kept: Iterable[int]) -> list[int]:
        """The steps of a member. ValueError for one at which no weights were kept."""
        kept = sorted(kept)
        if self.checkpoints == "all":
            return kept
        if self.checkpoints == "recent":
            return sorted(step for step in kept[::-2] if step >= kept[-1] / 10**RECENT)
        for step in self.checkpoints:
            require(step in kept, "checkpoints", step, f"one of {', '.join(map(str, kept))}, where weights were kept")
        return list(self.checkpoints)

    def examples_of(self, config: MemberConfig) -> int:
        """How many examples of the probe set. ValueError for more than it has."""
        size = config.probe.replicates * config.probe.examples
        require((self.examples or size) <= size, "examples", self.examples, f"at most {size}, those of the probe set")
        return self.examples or size

    def looks(self, heads: int, steps: int) -> int:
        """Gradients of a chain's loss, for all estimates of so many heads at so many steps."""
        return heads * steps * len(self.tokens) * self.llc.looks


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A finished member and its run, and what its analysis says: heads, rows on the judged relation; best_head: `1.3`,
    or nothing."""

    member_id: str
    run_id: str
    name: str
    config: MemberConfig
    heads: Rows
    best_head: str

    @property
    def facts_id(self) -> str:
        """Of what is known of its heads: what was measured rests on it."""
        return facts_id(self.heads, self.best_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is kept of a member: weights by step and name, and losses by step."""

    weights: Mapping[int, Mapping[str, NDArray[Any]]]
    figures: pd.DataFrame

    @classmethod
    def fetch(cls, client: MlflowClient, run_id: str) -> Kept:
        """From the artifacts of its run."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [
                Path(client.download_artifacts(run_id, name, folder)) for name in ("weights.npz", "figures.parquet")
            ]
            arrays, figures = decode_arrays(paths[0].read_bytes()), pd.read_parquet(paths[1])
        weights: dict[int, dict[str, NDArray[Any]]] = {}
        for path, value in arrays.items():
            step, _, name = path.partition("/")
            weights.setdefault(int(step), {})[name] = value
        return cls(weights=dict(sorted(weights.items())), figures=figures)

    def parameters(self, steps: Sequence[int], device: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Stacked over the steps, `[T, ...]`."""
        names = self.weights[steps[0]]
        stacks = {name: np.stack([self.weights[step][name] for step in steps]) for name in names}
        return {name: torch.from_numpy(stack).to(device, dtype) for name, stack in stacks.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Fixed examples `[n, N, ...]` and, bool `[n, N]`, the tokens that count (None: all real ones)."""

    batch: Batch
    tokens: Tensor | None = None

    def double(self) -> Batch:
        """The batch in float64."""
        return change(self.batch, lambda x: x.double() if x.is_floating_point() else x)


def change(batch: Batch, call: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with a function applied to each tensor; without its geometry."""

    def known(value: Tensor | None) -> Tensor | None:
        return None if value is None else call(value)

    return Batch(
        inputs=call(batch.inputs),
        targets=call(batch.targets),
        mask=known(batch.mask),
        keys=known(batch.keys),
        allowed=known(batch.allowed),
    )


def make_examples(config: MemberConfig, pool: Pool, count: int) -> dict[Tokens, Examples]:
    """The first examples of the probe set, drawn once; for `related` those with a related token, and these tokens."""
    rows = pool.parts["probe"]
    stream = Generator.of("geometry", config.data.seed, device=rows.device)
    made = probe_batch(config, rows.take(slice(0, count)), stream)
    batch, related = cast(Batch, made.batch), made.groups["related"]
    some = related.any(-1)
    return {
        "all": Examples(batch=batch),
        "related": Examples(batch=change(batch, lambda x: x[some]), tokens=related[some]),
    }


class Geometry:
    """Measures one member on a device."""

    def __init__(self, subject: Subject, kept: Kept, request: Request, pool: Pool, device: str) -> None:
        self.subject, self.config, self.kept, self.request, self.device = subject, subject.config, kept, request, device
        self.steps = request.steps_of(kept.weights)
        self.pool, self.examples = pool, make_examples(self.config, pool, request.examples_of(self.config))
        self.layers: dict[int, list[int]] = {}
        for layer, head in request.heads_of(self.config):
            self.layers.setdefault(layer, []).append(head)
        self.facts: dict[HeadKey, Mapping[str, Any]] = {(row["layer"], row["head"]): row for row in subject.heads}

    def coefficients(self) -> pd.DataFrame:
        """The refined coefficient by step, layer, head and tokens."""
        rows: Rows = []
        for tokens in self.request.tokens:
            for layer, heads in self.layers.items():
                for steps in self._together(tokens, len(heads)):
                    rows += self._sample(tokens, layer, heads, steps)
        return pd.DataFrame(rows).sort_values(["tokens", "step", "layer", "head"], ignore_index=True)

    def _together(self, tokens: Tokens, heads: int) -> Iterator[list[int]]:
        """The steps, as many at a time as memory is meant for."""
        inputs, train = self.examples[tokens].batch.inputs, self.config.train
        each = (1 + heads) * math.prod(inputs.shape[:2]) * self.config.model.width * train.dtype.itemsize
        yield from (self.steps[part] for part in even_cuts(len(self.steps), max(1, MEMORY // max(each, 1))))

    def _sample(self, tokens: Tokens, layer: int, heads: Sequence[int], steps: Sequence[int]) -> Rows:
        """Heads of one layer at some steps, all their chains in one stack."""
        data, member = self.examples[tokens], self.subject.member_id
        require(len(data.batch.inputs) > 0, "tokens", tokens, "all, as no example has a related token")
        places = [(t, head) for t in range(len(steps)) for head in heads]
        parameters = self.kept.parameters(steps, self.device)
        system, model = self.config.system, self.config.model
        target = HeadTarget(system, model, parameters, data.batch, places, layer, self.request.minibatch, data.tokens)
        keys = [key_of("llc", member, steps[t], layer, head, tokens) for t, head in places]
        found = estimate_llcs(target, keys, self.request.llc, len(data.batch.inputs), AT_ONCE[self.device])
        return [
            {"step": steps[t], "layer": layer, "head": head, "tokens": tokens, **llc_columns(llc, self.request.llc)}
            for (t, head), llc in zip(places, found, strict=True)
        ]

    def seconds_a_look(self) -> float:
        """Of one gradient by one chain, on the first layer asked for, at the last step."""
        llc = replace(self.request.llc, draws=8, burn_in=2, check_every=0, sensitivity=True)
        short = replace(self.request, llc=llc)
        layer, heads = next(iter(self.layers.items()))
        trial = Geometry(self.subject, self.kept, short, self.pool, self.device)
        took = math.inf
        for _ in range(2):  # the first one brings things into being
            start = time.perf_counter()
            trial._sample(self.request.tokens[0], layer, heads, self.steps[-1:])
            took = min(took, time.perf_counter() - start)
        return took / (len(heads) * llc.looks)

    def gradients(self) -> pd.DataFrame:
        """Mean loss, and the norm of its gradient by each head's weights, in float64 at all steps that are kept."""
        batch, parts = self.examples["all"].double(), []
        for step in self.kept.weights:
            parameters = self.kept.parameters([step], self.device, torch.float64)
            loss, norms = head_gradients(self.config.system, self.config.model, parameters, batch)
            for layer, heads in self.layers.items():
                own = {"layer": layer, "head": heads, "gradient": to_numpy(norms[0, layer, heads])}
                parts.append(pd.DataFrame({"step": step, "loss": float(loss[0]), **own}))
        return pd.concat(parts, ignore_index=True)

    def degrees(self, gradients: pd.DataFrame) -> pd.DataFrame:
        """Every estimate of k, a row by head and method; the loss gap is the whole member's: layer and head -1."""
        rows: Rows = [{"layer": -1, "head": -1, "method": "loss gap", **asdict(self._from_loss())}]
        for layer, heads in self.layers.items():
            along = self._along_lines(layer, heads)
            for head in heads:
                own = gradients[(gradients["layer"] == layer) & (gradients["head"] == head)]
                fact = self.facts.get((layer, head), {})
                found = {"gradient": from_gradient(own, fact.get("onset", math.nan)), "score": self._from_score(fact)}
                rows += [
                    {"layer": layer, "head": head, "method": method, **asdict(degree)}
                    for method, degree in {**found, **along[head]}.items()
                ]
        return pd.DataFrame(rows)

    def _along_lines(self, layer: int, heads: Sequence[int]) -> dict[int, dict[str, Degree]]:
        """From the line of each head's weights, from before it emerged to the end."""
        kept = list(self.kept.weights)
        end, before = kept[-1], {head: self._before(layer, head) for head in heads}
        weights = {step: self.kept.parameters([step], self.device, torch.float64) for step in {end, *before.values()}}

        def moved(head: int, name: str) -> Tensor:
            return (weights[before[head]][f"{layer}.{name}"] - weights[end][f"{layer}.{name}"])[0, head]

        still = [head for head in heads if not any(bool(moved(head, name).any()) for name in HEAD)]
        reason = "the head's weights are the same at both ends of its line"
        nothing = {"profile": refused(PROFILE, reason), "line coefficient": refused(LINE, reason)}
        found = dict.fromkeys(still, nothing)
        going = [head for head in heads if head not in still]
        if not going:
            return found
        direction = {name: torch.stack([moved(head, name) for head in going]) for name in HEAD}
        data, dtype, places = self.examples["all"], self.config.train.dtype, [(0, head) for head in going]

        def line(batch: Batch, dtype: torch.dtype) -> LineTarget:
            end_weights = {name: value.to(dtype) for name, value in weights[end].items()}
            size, system, model = self.request.minibatch, self.config.system, self.config.model
            target = HeadTarget(system, model, end_weights, batch, places, layer, size)
            return LineTarget(target, {name: value.to(dtype) for name, value in direction.items()})

        profiles = from_profiles(line(data.double(), torch.float64))  # near the end their differences are small
        coefficients = from_lines(line(data.batch, dtype), self.request.llc)
        for head, profile, coefficient in zip(going, profiles, coefficients, strict=True):
            found[head] = {"profile": profile, "line coefficient": coefficient}
        return found

    def _before(self, layer: int, head: int) -> int:
        """The last step before the head emerged at which weights are kept; the first one where there is none."""
        kept, start = list(self.kept.weights), self.facts.get((layer, head), {}).get("t10", math.nan)
        return max((step for step in kept if step < start), default=kept[0])

    def _from_score(self, fact: Mapping[str, Any]) -> Degree:
        return self._dynamic(degree_from_score(relaxation_of(fact)))

    def _from_loss(self) -> Degree:
        table = self.kept.figures[["step", "validation_loss"]].dropna()
        time = cumulative_rate(table["step"].to_numpy(float), self.config.train)
        loss = table["validation_loss"].to_numpy(float)
        half = int(np.argmax(loss <= 0.5 * (loss[0] + loss.min())))
        return self._dynamic(degree_from_loss(fit_relaxation(time, loss, (time[half], time[-1]))))

    def _dynamic(self, degree: Degree) -> Degree:
        """An estimate that takes training to be gradient flow."""
        optimizer = self.config.train.optimizer
        words = "" if optimizer == "sgd" else f"descriptive under {optimizer}: "
        return replace(degree, assumption=words + degree.assumption)


def llc_columns(llc: LLC, settings: LLCSettings) -> dict[str, Any]:
    """An estimate as columns of a table; low, high: interval over chains."""
    _, low, high = mean_interval(llc.per_chain.tolist())
    return {
        "llc": llc.mean, "sd": llc.sd, "low": low, "high": high, "acceptance": llc.acceptance, "diverged": llc.diverged,
        "chains": settings.chains, "draws": settings.draws, "n": llc.n, "n_beta": llc.n_beta, "gamma": llc.gamma,
        "sigma": math.nan if llc.sigma is None else llc.sigma,
        **{column: llc.sensitivity.get(name, math.nan) for column, name in NEARBY.items()},
        **{f"{column}_error": llc.sensitivity_error.get(name, math.nan) for column, name in NEARBY.items()},
        "spread": llc.spread, "heating": llc.heating, "slope": llc.gradient,
        "sound": llc.sound, "converged": llc.converged, "reason": llc.reason,
    }  # fmt: skip


def from_gradient(own: pd.DataFrame, onset: float) -> Degree:
    """From the steps since the head's onset, or from all where these are few; `own`: its rows of the gradients."""
    late = own[own["step"] >= onset]
    if len(late) >= LEAST:
        return degree_from_gradient(late["loss"], late["gradient"])
    found = degree_from_gradient(own["loss"], own["gradient"])
    return replace(found, assumption=f"{found.assumption}; at all steps, as under {LEAST} are kept since the onset")


def from_profiles(line: LineTarget) -> list[Degree]:
    """From the loss on both sides of the end of each line, up to the line's own length."""
    unit = np.geomspace(NEAREST, 1.0, POINTS)
    x = to_numpy(line.length)[:, None] * np.concatenate([-unit[::-1], [0.0], unit])
    losses = to_numpy(line.profile(torch.from_numpy(x)))
    return [
        degree_from_profile(at, own, floor=ROUNDING * float(np.abs(own).mean()))
        for at, own in zip(x, losses, strict=True)
    ]


def from_lines(line: LineTarget, llc: LLCSettings) -> list[Degree]:
    """From the learning coefficient along each line at the n_beta of chains; localised by a third of the line's own
    length, gamma = (3 / length)^2, as profiles are: at the gamma of chains most of a line is out of reach."""
    gammas = np.square(REACH / to_numpy(line.length))
    x = np.stack([line_points(gamma) for gamma in gammas])
    losses = to_numpy(line.profile(torch.from_numpy(x)))
    return [
        degree_from_line(at, own, llc.n_beta, float(gamma), scale=llc.scale)
        for at, own, gamma in zip(x, losses, gammas, strict=True)
    ]


def relaxation_of(fact: Mapping[str, Any]) -> Relaxation:
    """The approach to the plateau as a row of the head table has it."""
    nan = float("nan")
    return Relaxation(
        preferred=fact.get("relaxation_law") or "undecided", exponent=fact.get("relaxation", nan),
        low=fact.get("relaxation_low", nan), high=fact.get("relaxation_high", nan), t0=fact.get("relaxation_t0", nan),
        s_inf=fact.get("relaxation_plateau", nan), decades=fact.get("relaxation_decades", nan), memory=nan,
        gap_decades=nan, probes=0, scores={}, refusal=fact.get("relaxation_refusal", STAYED_NOT),
    )  # fmt: skip


def cumulative_rate(steps: NDArray[np.float64], train: TrainConfig) -> NDArray[np.float64]:
    """Sum of the learning rates of all steps so far, in units of the rate after the warm-up."""
    rising = np.minimum(steps, train.warmup)
    return np.asarray(steps - rising + rising * (rising + 1) / (2 * max(train.warmup, 1)))


def facts_id(heads: Rows, best_head: str) -> str:
    """Of what an analysis says of a member's heads: degrees rest on it."""
    facts = [{name: str(value) for name, value in row.items()} for row in heads]
    return digest([facts, best_head])


def head_facts(sweep: Sweep, analysis: Analysis) -> dict[str, tuple[Rows, str]]:
    """Of each analysed run: its heads on the judged relation, and its best head, or nothing."""
    heads = analysis.heads
    judged = heads[heads["relation"] == sweep.system.relation] if len(heads) else heads
    by_run = dict(list(judged.groupby("run_id"))) if len(judged) else {}
    found = {}
    for row in analysis.members.reindex(columns=["run_id", "best_head"]).to_dict("records"):
        own = by_run[row["run_id"]].to_dict("records") if row["run_id"] in by_run else []
        best = row["best_head"] if isinstance(row["best_head"], str) else ""
        found[row["run_id"]] = ([{str(name): value for name, value in each.items()} for each in own], best)
    return found


def with_tables(client: MlflowClient, parent: str, sweep: Sweep, analysis: Analysis) -> Analysis:
    """The analysis with what was measured last, of those runs that still count; without, where nothing was.

    What other versions measured is left out, and so are degrees that rest on an older analysis, with a line on each.
    """
    held = {item.path for item in client.list_artifacts(parent, "analysis")}
    if analysis.members.empty or not held.issuperset(f"analysis/{name}.parquet" for name in TABLES):
        return analysis
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TABLES:
            table = pd.read_parquet(client.download_artifacts(parent, f"analysis/{name}.parquet", folder))
            tables[name] = table[table["run_id"].isin(analysis.members["run_id"])].reset_index(drop=True)
    if all(table.empty for table in tables.values()):
        return analysis
    again = "`headway probe llc` measures them again"
    if any(set(table.get("version", [0])) != {VERSION} for table in tables.values() if len(table)):
        return replace(analysis, left_out=[f"Learning coefficients of another version are left out; {again}."])
    degrees = tables["degrees"]
    now = {run: facts_id(*facts) for run, facts in head_facts(sweep, load_analysis(client, parent)).items()}
    stale = degrees["facts"] != degrees["run_id"].map(now)
    lines = []
    if stale.any():
        members = counted(degrees.loc[stale, "run_id"].nunique(), "member")
        lines.append(f"Estimates of k of {members} rest on an older analysis and are left out; {again}.")
    return replace(analysis, llc=tables["llc"], degrees=degrees[~stale].reset_index(drop=True), left_out=lines)
