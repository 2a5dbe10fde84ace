"""Local learning coefficients: how degenerate a loss is about a point, by how much it rises under a tempered posterior.

    llc = n_beta (E[L(w)] - L(w*)),   w ~ exp(-n_beta L(w) - gamma/2 |w - w*|^2)

(Lau et al. 2023, arXiv 2308.12108). L is a mean negative log-likelihood; for a squared error, error / (2 sigma^2). To
move a part of the weights gives the weight-refined coefficient, other data the data-refined one (Wang et al. 2024,
arXiv 2410.02984). As n_beta grows and gamma n_beta^-1 falls it tends to the learning coefficient: d/2 at a regular
minimum of d dimensions, 1/k for |x|^k. At finite ones it is another number: for a quadratic of curvatures h it is
1/2 sum n_beta h / (n_beta h + gamma). So every estimate carries its n_beta and gamma, and its values at others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from probes.langevin import Levels, Sampler, Schedule, Streams, Target, Weights, run_chains, seed_of
from probes.words import counted

Array = NDArray[np.float64]
Loss = Callable[[Weights, Any], Tensor]

TOLERANCE = 0.2
"""Of an estimate: by how much its halves, and its values at other n_beta and gamma, may differ from it; by how much
minibatches may heat it, and a gradient at the point lower it; and the standard errors with which these are known."""

SURE = 3.0
"""Standard errors over chains that a drift, or a spread that misses 1, must exceed to count as a fault."""

LEAST_ACCEPTANCE = 0.9
"""Of a Metropolis step: less, and the steps distort the density."""

NEARBY = {"n_beta / 3": (1 / 3, 1.0), "n_beta x 3": (3.0, 1.0), "gamma / 3": (1.0, 1 / 3), "gamma x 3": (1.0, 3.0)}
"""Other settings at which an estimate is looked at: factors of n_beta and gamma."""

DEPENDS = "depends on the settings: "
UNSURE = "cannot tell how it depends on the settings: "
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class LLCSettings:
    """How chains run. ValueError, naming the field, for what is not allowed."""

    n_beta: float = 100.0
    """Inverse temperature: what L counts, in examples."""
    gamma: float = 300.0
    """Strength of the pull back to the point (per squared weight)."""
    step_size: float = 2e-4
    """Variance eps of a step (squared weight)."""
    chains: int = 4
    """Chains of each estimate."""
    draws: int = 100
    """Draws of a chain that count."""
    burn_in: int = 50
    """Draws of a chain before these."""
    sampler: Sampler = "sgld"
    """sgld, or rmsprop: steps by direction, from the gradients of the first half of the burn-in."""
    sigma: float | None = None
    """The loss is a squared error, L = loss / (2 sigma^2); None: it is a negative log-likelihood already."""
    sensitivity: bool = True
    """Whether to estimate at n_beta and gamma x 1/3 and x 3 too, by half the chains: five times the work."""
    check_every: int = 10
    """Draws between looks at the acceptance, each at the cost of a draw; 0 for none."""
    seed: int = 0
    """Of all random numbers."""

    def __post_init__(self) -> None:
        _require("n_beta", self.n_beta, 0.0 < self.n_beta < math.inf, "a finite number above 0")
        _require("gamma", self.gamma, 0.0 <= self.gamma < math.inf, "a finite number, 0 or more")
        _require("step_size", self.step_size, 0.0 < self.step_size < math.inf, "a finite number above 0")
        _require("chains", self.chains, self.chains >= 1, "1 or more")
        _require("draws", self.draws, self.draws >= 2, "2 or more")
        _require("sampler", self.sampler, self.sampler in ("sgld", "rmsprop"), "'sgld' or 'rmsprop'")
        least = 2 if self.sampler == "rmsprop" else 0
        _require("burn_in", self.burn_in, self.burn_in >= least, f"{least} or more with {self.sampler}")
        sound = self.sigma is None or 0.0 < self.sigma < math.inf
        _require("sigma", self.sigma, sound, "None or a finite number above 0")
        _require("check_every", self.check_every, self.check_every >= 0, "0 or more")

    @property
    def looks(self) -> int:
        """Gradients of a chain's loss that one estimate takes."""
        every = [self, *(self.variants().values() if self.sensitivity else ())]
        checks = [-(-each.draws // self.check_every) if self.check_every else 0 for each in every]
        return sum(each.chains * (each.burn_in + each.draws + own) for each, own in zip(every, checks, strict=True))

    def variants(self) -> dict[str, LLCSettings]:
        """At n_beta and gamma x 1/3 and x 3, by half the chains; steps shrink where these grow, so that stiff
        directions bear them. Soft ones relax at a rate of eps gamma / 2 a draw: there chains are longer."""

        def changed(a: float, b: float) -> LLCSettings:
            smaller = max(a, b, 1.0)
            longer = smaller / b
            return replace(
                self, n_beta=self.n_beta * a, gamma=self.gamma * b, step_size=self.step_size / smaller,
                burn_in=math.ceil(self.burn_in * longer), draws=math.ceil(self.draws * longer),
                chains=max(1, self.chains // 2),
            )  # fmt: skip

        return {name: changed(*pair) for name, pair in NEARBY.items()}

    @property
    def scale(self) -> float:
        """What a loss is multiplied with to give L."""
        return 1.0 if self.sigma is None else 0.5 / self.sigma**2

    @property
    def schedule(self) -> Schedule:
        """What all chains have in common."""
        return Schedule(
            draws=self.draws, burn_in=self.burn_in, sampler=self.sampler, check_every=self.check_every, scale=self.scale
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LLC:
    """An estimate, and what it rests on. Chains that diverged count in no mean; if all did, every number is nan."""

    mean: float  # over chains
    sd: float  # between chains
    per_chain: Array  # [chains]
    trace: Array  # [chains, draws]: n_beta (L(w) - L(w*)) after burn-in
    acceptance: float  # mean over looks and chains; nan if never looked at
    diverged: int  # chains
    spread: float  # (w - w*) . grad U / d, mean over chains: 1 once they have reached their density
    spread_error: float  # of that, from the scatter of chains
    heating: float  # by minibatches, as a share of the temperature in the directions of their noise
    gradient: float  # n_beta^2 |grad L(w*)|^2 / gamma: what it lowers the estimate by, were the loss flat but for it
    n: int | None  # examples in the data, if told
    n_beta: float
    gamma: float
    sigma: float | None
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    """The value at `n_beta / 3`, `n_beta x 3`, `gamma / 3` and `gamma x 3`."""
    sensitivity_error: Mapping[str, float] = field(default_factory=dict)
    """Standard error of the difference of each from the mean, as a share of the mean: by the relative scatter of chains
    about their mean, taken to be the same at all settings. inf where no two chains are left at any."""

    @property
    def reason(self) -> str:
        """Why it is not converged, all that is wrong; empty if it is."""
        return "; ".join([*self._faults(), *self._dependence()])

    @property
    def sound(self) -> bool:
        """Nothing shows that it is not what its definition says at its n_beta and gamma, about a point with hardly any
        slope: no chain diverged, steps would be accepted at 90%, no drift of the trace by 20% and no such gap between
        chains' spread and that of their density is sure (3 standard errors over chains), and neither minibatches nor
        the gradient at the point change the mean, which is above 0, by more than 20%. What is known of mean, drift or
        spread by no better than a standard error of 20% is too noisy to tell, and not sound."""
        return not any(self._faults())

    @property
    def converged(self) -> bool:
        """It is sound, and its values at n_beta and gamma x 1/3 and x 3 lie within 20% of the mean too, known to a
        standard error of 20% or less."""
        return not self.reason

    def _faults(self) -> Iterator[str]:
        if self.diverged:
            yield f"{self.diverged} of {counted(len(self.per_chain), 'chain')} diverged"
        if self.mean == 0.0 or math.isnan(self.mean):
            return  # nothing that moves has any effect; or all chains were lost
        if self.mean < 0.0:
            yield f"{self.mean:.3g} is below 0: lower losses lie near by"
        if math.isnan(self.acceptance):
            yield "no look at the acceptance"
        elif self.acceptance < LEAST_ACCEPTANCE:
            yield f"acceptance {self.acceptance:.2f}, under {LEAST_ACCEPTANCE:g}"
        yield from self._noise()
        drift, error = _drift(self.trace)
        if self.mean > 0.0 and _misses(drift, error):
            yield f"the trace drifts by {drift:+.0%} from its first half to its second"
        if _misses(self.spread - 1.0, self.spread_error):
            yield f"chains have {self.spread:.2f} of the spread of their density"
        if math.isnan(self.heating) and not math.isnan(self.acceptance):
            yield "fewer than two looks at how minibatches heat"
        elif self.heating > TOLERANCE:
            yield f"minibatches heat by {self.heating:.0%}"
        if self.gradient > TOLERANCE * abs(self.mean):
            size = f"about {self.gradient / abs(self.mean):.0%}" if self.gamma else "an amount that nothing bounds"
            yield f"the gradient at the point lowers it by {size}"

    def _noise(self) -> Iterator[str]:
        if len(self.per_chain) - self.diverged < 2:
            yield "a single chain says nothing of its own scatter"
            return
        _, drift = _drift(self.trace)
        errors = {"mean": _error(self.per_chain) / abs(self.mean), "drift": drift, "spread": self.spread_error}
        noisy = [f"{name} {size:.0%}" for name, size in errors.items() if not size <= TOLERANCE]
        if noisy:
            yield f"too noisy to tell, by standard errors over chains: {', '.join(noisy)}"

    def _dependence(self) -> Iterator[str]:
        if not self.mean > 0.0:
            return
        if not self.sensitivity:
            yield "no look at other n_beta and gamma"
        moved, unsure = [], []
        for name, value in self.sensitivity.items():
            gap, error = value / self.mean - 1.0, self.sensitivity_error[name]
            surely = not abs(gap) <= TOLERANCE + SURE * error
            if surely or (error <= TOLERANCE and not abs(gap) <= TOLERANCE):
                moved.append(f"{gap:+.0%} at {name}")
            elif not error <= TOLERANCE:
                unsure.append(f"{gap:+.0%} at {name}, error {f'{error:.0%}' if error < math.inf else 'unknown'}")
        if moved:
            yield DEPENDS + ", ".join(moved)
        if unsure:
            yield UNSURE + ", ".join(unsure)


def estimate_llc(
    loss: Loss,
    parameters: Weights,
    batches: Sequence[Any],
    where: Weights | None = None,
    settings: LLCSettings | None = None,
    n: int | None = None,
) -> LLC:
    """The local learning coefficient of any loss at any named tensors.

    `loss(parameters, batch)`: a scalar, the mean over the batch, by means that `torch.func.vmap` knows: all chains are
    one call. `batches`: tensors (or tuples, lists, dicts of them) of one shape; each draw of each chain takes one at
    random. `where`: bool by name, shaped as the parameters: the weights that move (the refined coefficient); names left
    out stay as they are. `n`: examples in the data, to be stated.

    ValueError for no batches, batches of several shapes, parameters that are not floats, and masks of other shapes or
    names.
    """
    settings = settings or LLCSettings()
    _check_masks(parameters, where)
    moving = {name: value for name, value in parameters.items() if where is None or name in where}
    target = _Plain(loss, parameters, moving, batches)
    return estimate_llcs(target, [0], settings, n, where=where)[0]


def estimate_llcs(
    target: Target,
    seeds: Sequence[int],
    settings: LLCSettings,
    n: int | None = None,
    at_once: int = 32,
    where: Weights | None = None,
) -> list[LLC]:
    """The coefficient at each of a target's P points, `seeds [P]` being of each point's own chains.

    At most `at_once` chains run together (those of one point always do): as many as fit a cache on a CPU, all that fit
    the memory of a GPU. No number depends on it, nor on the other points. Values at other n_beta and gamma come from
    half the chains; those that relax three times more slowly are three times as long.
    """
    others = settings.variants() if settings.sensitivity else {}
    slopes = _square(target.gradient(), where) * settings.scale**2
    values: dict[str, list[Array]] = {}
    for schedule in dict.fromkeys(each.schedule for each in others.values()):  # chains of one stack are of one length
        own = {name: each for name, each in others.items() if each.schedule == schedule}
        for chains in _by_point(target, seeds, list(own.values()), at_once, where):
            for name, by_chain in zip(own, chains.trace.mean(axis=2), strict=True):
                values.setdefault(name, []).append(by_chain)
    found = []
    for index, chains in enumerate(_by_point(target, seeds, [settings], at_once, where)):
        trace = chains.trace[0]
        pull = settings.n_beta**2 * slopes[index]
        nearby = {name: values[name][index] for name in others}
        found.append(
            LLC(
                mean=_mean(trace.mean(axis=1)), sd=_sd(trace.mean(axis=1)), per_chain=trace.mean(axis=1), trace=trace,
                acceptance=_mean(chains.acceptance[0]), diverged=int(np.isnan(trace).any(axis=1).sum()),
                spread=_mean(chains.spread[0]), spread_error=_error(chains.spread[0]), heating=_mean(chains.heating[0]),
                gradient=pull / settings.gamma if settings.gamma else math.inf if pull else 0.0, n=n,
                n_beta=settings.n_beta, gamma=settings.gamma, sigma=settings.sigma,
                sensitivity={name: float(by_chain.mean()) for name, by_chain in nearby.items()},  # nan if one was lost
                sensitivity_error=_gap_errors(trace.mean(axis=1), nearby),
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """A grid of step sizes and localisations, one entry a combination, and the one to use.

    Among those where no chain diverged, the mean trace is flat within 20%, the coefficient above 0, and at every point
    acceptance is 90% or more, chains have the spread of their density and minibatches heat by no more than 20%, and
    where the gradient at the points lowers the coefficient by no more than 20%: the least gamma, and with it the
    largest step. `refusal`: why there is none.
    """

    step_size: Array  # [G]
    gamma: Array  # [G]
    llc: Array  # [G]: mean over points and chains
    sd: Array  # [G]: over chains, mean over points
    acceptance: Array  # [G]: the least of any point
    spread: Array  # [G]: that of the point furthest from 1
    heating: Array  # [G]: the most of any point
    drift: Array  # [G]: of the mean trace, from the first half to the second, as a share of the mean
    diverged: NDArray[np.intp]  # [G]: chains
    trace: Array  # [G, draws]: mean over points and chains
    chosen: LLCSettings | None
    refusal: str


def calibrate(
    target: Target,
    seeds: Sequence[int],
    settings: LLCSettings,
    step_sizes: Sequence[float],
    gammas: Sequence[float],
    at_once: int = 32,
) -> Calibration:
    """Try step sizes and localisations on a target's points, all other settings held."""
    for name, values in (("step_sizes", step_sizes), ("gammas", gammas)):
        _require(name, list(values), len(values) > 0, "at least one")
    variants = [replace(settings, gamma=gamma, step_size=eps) for gamma, eps in product(sorted(gammas), step_sizes)]
    found = list(_by_point(target, seeds, variants, at_once, None))
    traces = np.stack([chains.trace for chains in found])  # [P, G, chains, draws]
    mean = _nanmean(traces, (0, 2))
    llc = mean.mean(axis=1)
    drift, drift_error = np.array([_drift(np.concatenate(own)) for own in traces.swapaxes(0, 1)]).T
    acceptance = _nanmean(np.stack([chains.acceptance for chains in found]), (2,)).min(axis=0)
    heating = _nanmean(np.stack([chains.heating for chains in found]), (2,)).max(axis=0)
    by_point = np.stack([chains.spread for chains in found])
    spreads = _nanmean(by_point, (2,))
    missed = [[_misses(_mean(row) - 1.0, _error(row)) for row in point] for point in by_point]
    spread = spreads[np.abs(spreads - 1.0).argmax(axis=0), np.arange(len(variants))]
    diverged = np.isnan(traces).any(axis=3).sum(axis=(0, 2))
    sd = _nanmean(np.array([[_sd(row) for row in point.mean(axis=2)] for point in traces]), (0,))
    slope = _square(target.gradient(), None).mean() * (settings.scale * settings.n_beta) ** 2
    pull = slope / np.maximum([each.gamma for each in variants], np.finfo(float).tiny)
    lacks = {
        "a chain diverged": diverged > 0,
        f"acceptance under {LEAST_ACCEPTANCE:g}": ~(acceptance >= LEAST_ACCEPTANCE),
        "the trace is not flat": np.array([_misses(*pair) for pair in zip(drift, drift_error, strict=True)]),
        "lower losses lie near by": ~(llc > 0.0),
        "chains have not the spread of their density": np.any(missed, axis=0),
        "minibatches heat": heating > TOLERANCE,
        "the gradient at the points lowers it": pull > TOLERANCE * np.abs(llc),
    }
    sound = ~np.any(list(lacks.values()), axis=0)
    ranked = sorted(np.flatnonzero(sound), key=lambda i: (variants[i].gamma, -variants[i].step_size))
    reasons = [f"{text} at {int(bad.sum())} of {bad.size}" for text, bad in lacks.items() if bad.any()]
    return Calibration(
        step_size=np.array([each.step_size for each in variants]), gamma=np.array([each.gamma for each in variants]),
        llc=llc, sd=sd, acceptance=acceptance, spread=spread, heating=heating, drift=drift, diverged=diverged,
        trace=mean, chosen=variants[ranked[0]] if ranked else None, refusal="" if ranked else "; ".join(reasons),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _PointChains:
    """Of one point: trace `[V, chains, draws]`, all else `[V, chains]`, V variants of the settings."""

    trace: Array
    acceptance: Array
    spread: Array
    heating: Array


def _by_point(
    target: Target, seeds: Sequence[int], variants: Sequence[LLCSettings], at_once: int, where: Weights | None
) -> Iterator[_PointChains]:
    """All chains of each point. Variants share their random numbers, so that they differ by their settings only; their
    schedules and numbers of chains are those of the first."""
    points, settings = len(next(iter(target.centre.values()))), variants[0]
    _require("seeds", len(seeds), len(seeds) == points, f"{points}, one for each point")
    shape = (len(variants), settings.chains)
    each = math.prod(shape)
    step = max(1, at_once // each)
    for start in range(0, points, step):
        group = range(start, min(start + step, points))
        own = [seed_of(settings.seed, seeds[point], chain) for point in group for _, chain in np.ndindex(shape)]
        place = torch.repeat_interleave(torch.tensor(group), each)

        def column(name: str, times: int = len(group)) -> Tensor:
            values = [getattr(variant, name) for variant in variants]
            return torch.tensor(values, dtype=torch.float64).repeat_interleave(settings.chains).repeat(times)

        levels = Levels(n_beta=column("n_beta"), gamma=column("gamma"), step_size=column("step_size"))
        chains = run_chains(target, place.to(_device(target)), own, levels, settings.schedule, where)
        trace, *rest = (_cpu(x) for x in (chains.trace, chains.acceptance, chains.spread, chains.heating))
        for index in range(len(group)):
            part = slice(index * each, (index + 1) * each)
            yield _PointChains(trace[part].reshape(*shape, -1), *(values[part].reshape(shape) for values in rest))


class _Plain:
    """A loss of one model as a target of one point."""

    def __init__(self, loss: Loss, parameters: Weights, moving: Weights, batches: Sequence[Any]) -> None:
        self._loss, self._fixed = loss, {k: v.detach() for k, v in parameters.items() if k not in moving}
        self.centre: Weights = {name: value.detach()[None] for name, value in moving.items()}
        self._batches, self._count = _stacked(batches)
        leaves = {name: value.detach().clone().requires_grad_() for name, value in moving.items()}
        values = [loss({**self._fixed, **leaves}, batch) for batch in batches]
        _require("loss", tuple(values[0].shape), values[0].dim() == 0, "a scalar, shape ()")
        self._base, mean = torch.stack(values).detach(), torch.stack(values).mean()
        found = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True, materialize_grads=True)
        self._gradient = {name: value[None] for name, value in zip(leaves, found, strict=True)}

    def at(self, place: Tensor) -> _Plain:
        """One point serves all."""
        return self

    def draw(self, streams: Streams) -> Tensor:
        """Numbers of batches."""
        return streams.integers(self._count, 1)[:, 0]

    def loss(self, weights: Weights, batch: Tensor) -> Tensor:
        """Of all chains in one call."""
        picked = pytree.tree_map(lambda values: values[batch], self._batches)
        found: Tensor = vmap(lambda own, data: self._loss({**self._fixed, **own}, data))(dict(weights), picked)
        return found

    def base(self, batch: Tensor) -> Tensor:
        """Computed once for each batch."""
        return self._base[batch]

    def gradient(self) -> Weights:
        """Of the mean over all batches."""
        return self._gradient


def _stacked(batches: Sequence[Any]) -> tuple[Any, int]:
    """All batches as one, with a leading axis."""
    _require("batches", len(batches), len(batches) > 0, "one or more")
    leaves, shape = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    alike = {
        (str(form), tuple((type(leaf), *getattr(leaf, "shape", ())) for leaf in own))
        for own, form in zip(leaves, shape, strict=True)
    }
    tensors = all(isinstance(leaf, Tensor) for own in leaves for leaf in own)
    _require(
        "batches",
        f"of {len(alike)} shapes",
        len(alike) == 1 and tensors,
        "tensors (in tuples, lists, dicts) of one shape",
    )
    stacked = [torch.stack(list(column)) for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(stacked, shape[0]), len(batches)


def _check_masks(parameters: Weights, where: Weights | None) -> None:
    _require("parameters", dict(parameters), len(parameters) > 0, "one or more tensors")
    for name, value in parameters.items():
        _require(f"parameters[{name!r}]", value.dtype, value.is_floating_point(), "a floating-point tensor")
    _require("where", where, where is None or len(where) > 0, "None, or masks by name")
    for name, mask in (where or {}).items():
        _require("where", name, name in parameters, f"names of parameters: {', '.join(parameters)}")
        shape = tuple(parameters[name].shape)
        _require(f"where[{name!r}]", tuple(mask.shape), mask.shape == shape, f"{shape}, as the parameter has")
        _require(f"where[{name!r}]", mask.dtype, mask.dtype == torch.bool, "bool")


def _require(name: str, value: object, allowed: bool, condition: str) -> None:
    if not allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {condition}")


def _device(target: Target) -> torch.device:
    return next(iter(target.centre.values())).device


def _cpu(value: Tensor) -> Array:
    return np.asarray(value.double().cpu().numpy())


def _drift(trace: Array) -> tuple[float, float]:
    """(mean of the second half - mean of the first) / mean of `trace [chains, draws]`, and its standard error over
    chains; without those that diverged."""
    middle = trace.shape[1] // 2
    by_chain = trace[:, middle:].mean(axis=1) - trace[:, :middle].mean(axis=1)
    level = _mean(trace.mean(axis=1))
    return (_mean(by_chain) / level, _error(by_chain) / abs(level)) if level else (NAN, NAN)


def _misses(gap: float, error: float) -> bool:
    """Whether a share is more than allowed, surely so; true of no number."""
    return math.isnan(gap) or (abs(gap) > TOLERANCE and not abs(gap) <= SURE * error)


def _square(gradient: Weights, where: Weights | None) -> Array:
    """Squared length over what moves: `[P]`."""
    parts = [value if where is None else value * where[name].to(value) for name, value in gradient.items()]
    return _cpu(torch.stack([part.double().flatten(1).square().sum(1) for part in parts]).sum(0))


def _error(values: Array) -> float:
    """Standard error of the mean over what is finite; inf of fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1) / math.sqrt(known.size)) if known.size > 1 else math.inf


def _gap_errors(main: Array, nearby: Mapping[str, Array]) -> dict[str, float]:
    """Standard error of (mean of each of nearby - mean of main) / mean of main, values being by chain; the relative
    scatter of chains is pooled. Chains of one number share their random numbers: if anything, this is too large."""
    kept = {name: by_chain[np.isfinite(by_chain)] for name, by_chain in {"": main, **nearby}.items()}
    degrees = sum(max(by_chain.size - 1, 0) for by_chain in kept.values())
    level = _mean(main)
    if degrees == 0 or not level or not kept[""].size:
        return dict.fromkeys(nearby, math.inf)
    squares = sum(np.square(own / own.mean() - 1.0).sum() for own in kept.values() if own.size > 1)
    scatter = math.sqrt(squares / degrees)

    def error(own: Array) -> float:
        if not own.size:
            return math.inf
        return scatter * math.hypot(own.mean() / level / math.sqrt(own.size), 1.0 / math.sqrt(kept[""].size))

    return {name: error(kept[name]) for name in nearby}


def _mean(values: Array) -> float:
    return float(_nanmean(values, (0,)))


def _sd(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if known.size > 1 else NAN


def _nanmean(values: Array, axes: tuple[int, ...]) -> Array:
    """Mean over what is finite; nan where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=axes)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axes) / np.maximum(count, 1), NAN)
