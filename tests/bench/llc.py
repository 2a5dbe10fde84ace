"""Learning coefficients: bias by n_beta and gamma, cost against `devinterp`, agreement: `python -m tests.bench.llc`.

Cost: every head of all members at one checkpoint, four chains of 200 draws each. Each source of the gain is switched on
by itself, from chains that run alone and differentiate the whole model to `HeadTarget` with all chains in one stack.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from probes.langevin import Streams
from probes.llc import LLCSettings, estimate_llcs
from sim.generator import Generator
from sim.particles import ParticleSystem
from sim.system import Batch
from tests.bench.measure import Row, one_thread, quartiles, short, span, synchronise, write
from tests.planted_losses import Product as LinearNetwork
from tests.planted_losses import (
    Value,
    crossing,
    expected,
    expected_product,
    power,
    product_of,
    quadratic,
)
from tests.stock import StockTransformer, stacked
from train.config import ModelConfig
from train.model import forward
from train.refine import HEAD, HeadTarget

MODEL = ModelConfig(width=32, layers=2, heads=4)
N_BETAS, GAMMAS = (30.0, 1000.0, 30_000.0), (200.0, 10.0, 1.0)
WEIGHTED = 200_000  # weighted draws of a linear network
ROUGH = 0.02  # standard error of a value, as a share, that is marked
SETTINGS = LLCSettings(
    n_beta=30.0, gamma=200.0, step_size=1e-3, chains=4, draws=200, burn_in=0, sensitivity=False, check_every=0
)
MINIBATCH, EXAMPLES = 32, 1024
CURVED = 256  # examples whose Hessian is taken
NUDGE, TOGETHER = 1e-4, 32
DEVINTERP, WHOLE, FULL, KEPT = (
    "devinterp",
    "whole model, all gradients",
    "whole model, head's gradient",
    "prefix kept, head's gradient",
)

# Bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A loss of known coefficient; `value` of d weights by quadrature, or a linear network."""

    coefficient: float
    value: Value | LinearNetwork
    d: int


def known() -> Mapping[str, Known]:
    """By name."""
    found = {"quadratic, 2 weights": Known(coefficient=1.0, value=quadratic(1.0, 1.0), d=2)}
    found |= {f"|x|^{k}": Known(coefficient=1 / k, value=power(k), d=1) for k in (2, 3, 4, 6)}
    found["w1^2 w2^2"] = Known(coefficient=0.5, value=crossing(1, 1), d=2)
    found["w1^4 w2^2"] = Known(coefficient=0.25, value=crossing(2, 1), d=2)
    for case in "1234":
        network = product_of(case)
        found[f"reduced rank, case {case}"] = Known(coefficient=network.coefficient, value=network, d=0)
    for widths, rank in (((1, 1, 1, 1), 0), ((2, 2, 2, 2), 1)):
        network = LinearNetwork(widths=widths, rank=rank)
        name = f"linear network {'-'.join(map(str, widths))}, rank {rank}"
        found[name] = Known(coefficient=network.coefficient, value=network, d=0)
    return found


def exact(loss: Known, n_beta: float, gamma: float) -> str:
    """The expectation that chains tend to, and how far it is from the coefficient."""
    if isinstance(loss.value, LinearNetwork):
        value, error = expected_product(loss.value, n_beta, gamma, WEIGHTED)
    else:
        value, error = expected(loss.value, loss.d, n_beta, gamma, nodes=1000, sharp=18.0), 0.0
    mark = " ~" if error > ROUGH * value else ""
    return f"{short(value)} ({value / loss.coefficient - 1.0:+.0%}){mark}"


def bias_rows() -> Iterator[Row]:
    """A row for each loss, a column for each pair of settings."""
    for name, loss in known().items():
        row: dict[str, object] = {"what": "expectation of the estimate, distance from the coefficient", "loss": name}
        row["coefficient"] = loss.coefficient
        yield row | {f"n_beta {b:g}, gamma {g:g}": exact(loss, b, g) for b, g in product(N_BETAS, GAMMAS)}


# Cost


@dataclass(frozen=True, kw_only=True)
class Plain:
    """What `HeadTarget` is, without what it remembers: every draw passes through the whole model.

    whole: gradients and noise for all weights of the model, masked (`where`) to the head's, as with a mask of
    `devinterp`; else the head's four tensors alone.
    """

    system: ParticleSystem
    parameters: Mapping[str, Tensor]
    batch: Batch
    places: list[tuple[int, int]]
    layer: int
    whole: bool

    @property
    def centre(self) -> dict[str, Tensor]:
        """`[P, ...]`."""
        member, head = (torch.tensor(column) for column in zip(*self.places, strict=True))
        if self.whole:
            return {name: value[member] for name, value in self.parameters.items()}
        return {name: self.parameters[f"{self.layer}.{name}"][member, head] for name in HEAD}

    @property
    def where(self) -> dict[str, Tensor] | None:
        """The first place's head, which all places have."""
        if not self.whole:
            return None
        masks = {name: torch.zeros_like(value[0], dtype=torch.bool) for name, value in self.parameters.items()}
        for name in HEAD:
            masks[f"{self.layer}.{name}"][self.places[0][1]] = True
        return masks

    def gradient(self) -> dict[str, Tensor]:
        """Of no interest to the clock."""
        return {name: torch.zeros_like(value) for name, value in self.centre.items()}

    def at(self, place: Tensor) -> PlacedPlain:
        """For chains at `place [C]`."""
        member, head = (torch.tensor(column)[place.cpu()] for column in zip(*self.places, strict=True))
        return PlacedPlain(self, {name: value[member] for name, value in self.parameters.items()}, head)


@dataclass(frozen=True)
class PlacedPlain:
    """The loss of C chains by full passes."""

    target: Plain
    fixed: Mapping[str, Tensor]
    head: Tensor

    def draw(self, streams: Streams) -> Tensor:
        """Rows `[C, B]`."""
        return streams.integers(len(self.target.batch.inputs), MINIBATCH)

    def loss(self, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """`[C]`."""
        t = self.target
        own = dict(weights)
        if not t.whole:
            own = dict(self.fixed)
            for name in HEAD:
                key, chains = f"{t.layer}.{name}", torch.arange(len(rows))
                own[key] = own[key].index_put((chains, self.head), weights[name])
        batch = Batch(inputs=t.batch.inputs[rows], targets=t.batch.targets[rows])
        return t.system.loss(forward(own, MODEL, batch), batch).mean(-1)

    def base(self, rows: Tensor) -> Tensor:
        """`[C]`; of no interest to the clock."""
        return torch.zeros(len(rows), device=rows.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Members after some steps, and the data."""

    system: ParticleSystem
    nets: list[StockTransformer]
    batch: Batch

    @property
    def parameters(self) -> dict[str, Tensor]:
        """`[S, ...]`."""
        return stacked(self.nets)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Places of a layer."""
        return list(product(range(len(self.nets)), range(MODEL.n_heads)))

    def target(self, layer: int, places: list[tuple[int, int]] | None = None) -> HeadTarget:
        """The one to be measured."""
        return HeadTarget(self.system, MODEL, self.parameters, self.batch, places or self.heads, layer, MINIBATCH)

    def plain(self, layer: int, whole: bool, places: list[tuple[int, int]] | None = None) -> Plain:
        """Without what it remembers."""
        own = places or self.heads
        return Plain(
            system=self.system, parameters=self.parameters, batch=self.batch, places=own, layer=layer, whole=whole
        )


def checkpoint(members: int, steps: int, device: torch.device) -> Checkpoint:
    """Stock transformers of `members` seeds, trained for some steps on the examples that are sampled on."""
    system = ParticleSystem()
    rows = system.rows("train", EXAMPLES, Generator.of("llc"))
    batch = system.draw(replace(rows, statistics=system.statistics(rows)), Generator.of("draw"))
    batch = Batch(inputs=batch.inputs.contiguous().to(device), targets=batch.targets.contiguous().to(device))
    nets = []
    for seed in range(members):
        torch.manual_seed(seed)
        net = StockTransformer(MODEL, system.d_in, system.d_out).to(device)
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(steps):
            index = torch.randint(EXAMPLES, (128,), device=device)
            optimiser.zero_grad()
            functional.mse_loss(net(batch.inputs[index]), batch.targets[index]).backward()
            optimiser.step()
        nets.append(net)
    return Checkpoint(system=system, nets=nets, batch=batch)


def masks_of(net: StockTransformer, layer: int, head: int) -> dict[str, Tensor]:
    """By parameter of the module: what belongs to the head."""
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in net.named_parameters()}
    size = MODEL.width // MODEL.n_heads
    own = slice(head * size, (head + 1) * size)
    for start in range(0, 3 * MODEL.width, MODEL.width):
        masks[f"blocks.{layer}.qkv.weight"][start + own.start : start + own.stop] = True
    masks[f"blocks.{layer}.o.weight"][:, own] = True
    return masks


def devinterp(
    at: Checkpoint, member: int, layer: int, head: int, settings: LLCSettings, minibatch: int, seed: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses `[chains, draws]` of one head by `devinterp` 1.3.2, less the loss at the centre."""
    from devinterp.optim import SGLD
    from devinterp.slt.sampler import LLCEstimator, sample

    net, data = at.nets[member], torch.utils.data.TensorDataset(at.batch.inputs, at.batch.targets)
    picks = torch.utils.data.RandomSampler(data, replacement=True, num_samples=(settings.draws + 50) * minibatch)
    whole = minibatch == len(data)
    loader = torch.utils.data.DataLoader(data, batch_size=minibatch, sampler=None if whole else picks)
    with torch.no_grad():
        start = float(functional.mse_loss(net(at.batch.inputs), at.batch.targets))
    device = at.batch.inputs.device
    estimator = LLCEstimator(settings.chains, settings.draws, start, device=device, nbeta=settings.n_beta)
    kwargs = {"lr": settings.step_size, "nbeta": settings.n_beta, "localization": settings.gamma}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(
            net, loader, [estimator], lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
            sampling_method=SGLD, optimizer_kwargs=kwargs, num_draws=settings.draws, num_chains=settings.chains,
            num_burnin_steps=settings.burn_in, init_loss=start, seed=seed, device=device, verbose=False,
            optimize_over_per_model_param=masks_of(net, layer, head),
        )  # fmt: skip
    found: np.ndarray[Any, np.dtype[np.float64]] = estimator.get_results()["loss/trace"].astype(np.float64) - start
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to run chains: what one call does in one layer, and how many draws of one chain these are."""

    name: str
    call: Callable[[int], object]
    draws: int


def ways(at: Checkpoint, at_once: int, draws: int) -> list[Way]:
    """From `devinterp` to all at once; stacks without a prefix are run for a tenth of the draws."""
    alone = replace(SETTINGS, chains=1, draws=draws)
    one, places = [(0, 1)], at.heads
    few = [(member, 1) for member in range(len(at.nets))]  # one mask serves them all
    stack, brief = replace(SETTINGS, draws=draws), replace(SETTINGS, draws=max(2, draws // 10))
    kept = [at.target(layer, one) for layer in range(MODEL.layers)]

    def whole(layer: int, own: list[tuple[int, int]], settings: LLCSettings) -> object:
        target = at.plain(layer, True, own)
        return estimate_llcs(target, [0] * len(own), settings, at_once=at_once, where=target.where)

    def full(layer: int, own: list[tuple[int, int]], settings: LLCSettings) -> object:
        return estimate_llcs(at.plain(layer, False, own), [0] * len(own), settings, at_once=at_once)

    def cached(layer: int) -> object:
        return estimate_llcs(at.target(layer), range(len(places)), stack, at_once=at_once)

    few_draws, all_draws = 4 * len(few) * brief.draws, 4 * len(places) * draws
    brief_draws = 4 * len(places) * brief.draws
    return [
        Way(name=DEVINTERP, draws=4 * draws, call=lambda i: devinterp(at, 0, i, 1, stack, MINIBATCH, 0)),
        Way(name=f"alone, {WHOLE}", draws=draws, call=lambda i: whole(i, one, alone)),
        Way(name=f"alone, {FULL}", draws=draws, call=lambda i: full(i, one, alone)),
        Way(name=f"alone, {KEPT}", draws=draws, call=lambda i: estimate_llcs(kept[i], [0], alone)),
        Way(name=f"stacked, {WHOLE}", draws=few_draws, call=lambda i: whole(i, few, brief)),
        Way(name=f"stacked, {FULL}", draws=brief_draws, call=lambda i: full(i, places, brief)),
        Way(name=f"stacked, {KEPT}", draws=all_draws, call=cached),
    ]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call: of this process on a CPU that others use too, of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronise()
    start = clock()
    call()
    synchronise()
    return clock() - start


def cost_rows(at: Checkpoint, options: argparse.Namespace) -> list[Row]:
    """Microseconds a draw of a chain by each way, rounds in turns; the mean of both layers, as heads are spread."""
    found: dict[str, list[float]] = {}
    device = at.batch.inputs.device
    full = ways(at, options.at_once, options.draws)
    for way in ways(at, options.at_once, 10):
        way.call(0)  # not timed: whatever is made once
    by_layer: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for way in full:
            each = [seconds(lambda way=way, i=i: way.call(i), device) / way.draws for i in range(MODEL.layers)]
            found.setdefault(way.name, []).append(1e6 * float(np.mean(each)))
            for layer, value in enumerate(each):
                by_layer.setdefault((way.name, layer), []).append(1e6 * value)
            print(f"{way.name}: {found[way.name][-1]:.0f} us", flush=True)
    total = 4 * SETTINGS.draws * MODEL.layers * len(at.heads)
    rows: list[Row] = []
    for way in full:
        middle = float(np.median(found[way.name]))
        ratios = [a / b for a, b in zip(found[DEVINTERP], found[way.name], strict=True)]
        row: dict[str, object] = {"what": "microseconds a draw of a chain", "way": way.name, "us a draw": middle}
        row |= {"quartiles": span(*quartiles(found[way.name]))}
        row |= {f"layer {i}": float(np.median(by_layer[way.name, i])) for i in range(MODEL.layers)}
        row |= {"seconds for all heads": 1e-6 * middle * total, "times faster than devinterp": float(np.median(ratios))}
        rows.append(row | {"of it": span(*quartiles(ratios)), "us by round": tuple(found[way.name])})
    return rows + share_rows(found)


def share_rows(found: Mapping[str, list[float]]) -> list[Row]:
    """Each source of the gain by itself: a factor, and its share of the logarithm of the whole."""
    steps = {
        "overhead per draw": (DEVINTERP, f"alone, {WHOLE}"),
        "head-only backward": (f"alone, {WHOLE}", f"alone, {FULL}"),
        "prefix caching": (f"alone, {FULL}", f"alone, {KEPT}"),
        "stacking": (f"alone, {KEPT}", f"stacked, {KEPT}"),
        "all": (DEVINTERP, f"stacked, {KEPT}"),
    }
    off = {
        "head-only backward": (f"stacked, {WHOLE}", f"stacked, {FULL}"),
        "prefix caching": (f"stacked, {FULL}", f"stacked, {KEPT}"),
    }

    def factor(pair: tuple[str, str]) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(found[pair[0]], found[pair[1]], strict=True))

    whole = np.log(np.median(factor(steps["all"])))
    rows: list[Row] = []
    for name, pair in steps.items():
        values = factor(pair)
        row: dict[str, object] = {"what": "sources of the gain", "source": name, "factor": float(np.median(values))}
        row |= {
            "quartiles": span(*quartiles(values)),
            "share of the logarithm": float(np.log(np.median(values)) / whole),
        }
        rows.append(row | {"factor within the stack": float(np.median(factor(off[name]))) if name in off else None})
    return rows


# Curvature


def curvature_rows(at: Checkpoint, chains: int) -> Iterator[Row]:
    """What chains measure beside what the exact Hessian of the head would make of it, at several distances."""
    for layer, head in ((0, 0), (1, 0)):
        gradient, curvature = derivatives(at, layer, head)
        values, vectors = np.linalg.eigh(curvature)
        slopes = np.square(vectors.T @ gradient)
        target = at.target(layer, [(0, head)])
        for gamma in (100.0, 300.0, 1000.0, 10_000.0):
            n_beta, eps = gamma / 3.0, 0.09 / gamma  # the same balance of loss and localisation at every distance
            settings = LLCSettings(
                n_beta=n_beta, gamma=gamma, step_size=eps, chains=chains, draws=200, burn_in=100, sensitivity=False
            )
            found = estimate_llcs(target, [0], settings, at_once=1 << 10)[0]
            h = n_beta * values
            stiff = h + gamma
            quadratic = float(0.5 * (h / stiff).sum()) if stiff.min() > 0 else None
            slope = float((slopes * n_beta**2 * (1.0 / stiff - 0.5 * h / stiff**2)).sum()) if stiff.min() > 0 else None
            row: dict[str, object] = {"what": "curvature", "head": f"{layer}.{head}", "gamma": gamma, "n_beta": n_beta}
            row |= {"distance": float((len(values) / gamma) ** 0.5), "measured": found.mean}
            row |= {"standard error": found.sd / chains**0.5, "by the Hessian": quadratic, "its gradient takes": slope}
            row |= {"largest curvature": float(values[-1]), "least": float(values[0]), "spread": found.spread}
            yield row | {"sound": found.sound}


def derivatives(at: Checkpoint, layer: int, head: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Gradient `[d]` and Hessian `[d, d]` of the mean loss by one head's weights of the first member, in float64, the
    latter by central differences of gradients."""
    parameters = {name: value[:1].double() for name, value in at.parameters.items()}
    batch = Batch(inputs=at.batch.inputs.double(), targets=at.batch.targets.double())
    target = HeadTarget(at.system, MODEL, parameters, batch, [(0, head)], layer, MINIBATCH)
    shapes = {name: value.shape[1:] for name, value in target.centre.items()}
    centre = torch.cat([value.flatten() for value in target.centre.values()])

    def gradients(points: Tensor) -> Tensor:
        parts = points.split([shape.numel() for shape in shapes.values()], dim=1)
        own = {
            name: part.reshape(-1, *shape).requires_grad_()
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        rows = torch.arange(target.examples, device=points.device).expand(len(points), -1)
        place = torch.zeros(len(points), dtype=torch.long, device=points.device)
        loss = target.at(place).loss(own, rows)
        return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), list(own.values()))], dim=1)

    nudges = torch.eye(len(centre), dtype=centre.dtype, device=centre.device).mul(NUDGE).split(TOGETHER)
    hessian = torch.cat([(gradients(centre + some) - gradients(centre - some)) / (2 * NUDGE) for some in nudges])
    return gradients(centre[None])[0].cpu().numpy(), (0.5 * (hessian + hessian.T)).cpu().numpy()


# Agreement


def agreement_rows(at: Checkpoint, chains: int) -> Iterator[Row]:
    """Some heads of one member by both, over one window; minibatches of 32 and all examples of a few."""
    small = Checkpoint(
        system=at.system, nets=at.nets[:1], batch=Batch(inputs=at.batch.inputs[:64], targets=at.batch.targets[:64])
    )
    settings = replace(SETTINGS, chains=chains, burn_in=50)
    for (name, where, minibatch), layer in product((("32 of 1,024", at, 32), ("all of 64", small, 64)), (0, 1)):
        trace = settings.n_beta * devinterp(where, 0, layer, 0, settings, minibatch, 0)
        theirs = trace.mean(axis=1)
        target = HeadTarget(at.system, MODEL, where.parameters, where.batch, [(0, 0)], layer, MINIBATCH)
        ours = estimate_llcs(Whole(target) if minibatch == 64 else target, [0], settings)[0]
        error = float(np.hypot(theirs.std(ddof=1), ours.sd) / chains**0.5)
        row: dict[str, object] = {"what": "agreement", "minibatch": name, "head": f"{layer}.0"}
        row |= {"devinterp": float(theirs.mean()), "its sd": float(theirs.std(ddof=1))}
        row |= {"headway": ours.mean, "sd": ours.sd}
        yield row | {"difference, standard errors": (ours.mean - float(theirs.mean())) / error}


class Whole:
    """A head's loss over all examples in each draw."""

    def __init__(self, target: HeadTarget) -> None:
        self._target, self.centre, self.gradient = target, target.centre, target.gradient

    def at(self, place: Tensor) -> Any:
        """The same, its draws being all rows."""
        placed, examples = self._target.at(place), self._target.examples
        rows = torch.arange(examples, device=place.device).expand(len(place), -1)
        placed.draw = lambda streams: rows  # type: ignore[method-assign]
        return placed


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.llc", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("bias", "curvature", "cost", "agreement"),
        default=["bias", "curvature", "cost", "agreement"],
    )
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="of training before the checkpoint")
    parser.add_argument("--draws", type=int, default=200, help="of a chain that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chains", type=int, default=8, help="of each head in the agreement")
    parser.add_argument("--at-once", type=int, help="chains at most in one stack; 32 on a CPU, all on a GPU")
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    one_thread()
    device = torch.device(options.device)
    options.at_once = options.at_once or (32 if device.type == "cpu" else 1 << 20)
    extra = [options.note] if options.note else []
    if "bias" in options.parts:
        write("llc-bias", list(bias_rows()), notes(options)[:1] + extra, device)
    rows: list[Row] = []
    if "curvature" in options.parts:
        whole = checkpoint(1, options.steps, device)
        few = Batch(inputs=whole.batch.inputs[:CURVED], targets=whole.batch.targets[:CURVED])
        found = list(curvature_rows(replace(whole, batch=few), 2 * options.chains))
        write("llc-curvature", found, [CURVATURE, *extra], device)
    if {"cost", "agreement"} & set(options.parts):
        at = checkpoint(options.members, options.steps, device)
        rows += cost_rows(at, options) if "cost" in options.parts else []
        rows += list(agreement_rows(at, options.chains)) if "agreement" in options.parts else []
        write("llc", rows, notes(options)[1:] + extra, device)


CURVATURE = (
    "One member of width 32 after some hundred steps, 256 of its examples. gamma and n_beta grow together, so that the "
    "balance of loss and localisation is the same and chains look at a ball that shrinks (distance: root of d / "
    "gamma). `by the Hessian`: 1/2 sum n_beta h / (n_beta h + gamma) over all d curvatures h, exact where the loss is "
    "quadratic within the ball (none where a negative h outweighs gamma); `its gradient takes`: by how much the slope "
    "at the point lowers it."
)


def notes(options: argparse.Namespace) -> list[str]:
    """What the tables say."""
    heads = options.members * MODEL.layers * MODEL.n_heads
    return [
        "Expectation of the estimate: by quadrature; of linear networks with the last layer integrated out and "
        f"{WEIGHTED:,} weighted draws of the others (~: standard error above {ROUGH:.0%}). No sampler is in it: it is "
        "what chains of infinite length and small steps give. Coefficients: Aoyagi and Watanabe 2005, Aoyagi 2024.",
        f"Cost: {options.members} members x {MODEL.layers} layers x {MODEL.n_heads} heads = {heads} heads of width "
        f"{MODEL.width}, 16 tokens, 4 chains x {SETTINGS.draws} draws, minibatch {MINIBATCH} of {EXAMPLES} examples, "
        f"no burn-in and no look at the acceptance; timed over {options.draws} draws of a chain, {options.rounds} "
        "rounds in turns; CPU time of one thread (on a GPU, wall time). `seconds for all heads` is the "
        "time a draw times their number.",
        "`devinterp` 1.3.2 runs one head of one member (four chains, one after another), its SGLD with a mask over the "
        "parameters of a stock module; all heads have the same shapes, so its time a draw is extrapolated to all. "
        "It reads from a DataLoader, as it asks for. What is kept of the prefix is made within the last way's time "
        "and, for the chain alone, before it.",
        "Sources of the gain: each step switches on one thing, chains running alone until the last. `factor within the "
        "stack`: the same step where chains run together. Overhead per draw: `devinterp`'s loop against ours with "
        "the same passes through the model. Prefix caching: lower layers, other heads' outputs and the losses at the "
        "centre kept, and kernels written for one head.",
        "Agreement: same member, head, window (50 draws before, 200 counted) and minibatch size; random numbers are "
        "each's own. sd: between chains.",
    ]


if __name__ == "__main__":
    main()
