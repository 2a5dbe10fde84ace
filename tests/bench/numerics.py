"""What arithmetic does to levels, and float noise to weights: `python -m tests.bench.numerics`.

The same members (equal keys: equal initial weights and rows) are trained in several precisions, and once more in
float32 from initial weights whose last bit is off, which shows how much of a shift is mere chaos.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.pack import probe_batch
from cluster.recipes import quick
from cluster.sweep import MemberConfig, part_sizes
from probes.attention import AttentionScores, lift
from probes.emergence import Emergence, fit_emergence, smooth
from sim.generator import Generator, key_of
from sim.pool import Pool
from tests.bench.measure import one_thread, write
from train.config import Precision
from train.loop import Trainer, probe_steps

ROWS_LIFT = 1.5  # least lift over exchanged rows of a head that is called a detector, as in the analysis
PER_DECADE = 20
LOOKED_AT = (1, 10, 100, 1000)  # steps at which weights are compared

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training of some members: attention scores `[T, S, L, H, R]` at `steps`, and weights `[S, P]` by step."""

    steps: tuple[int, ...]
    values: dict[str, NDArray[np.float32]]
    weights: dict[int, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all runs share: the members' config, their pool and their probe, on the device."""

    config: MemberConfig
    pool: Pool
    probe: AttentionScores

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setting:
        """Members as in the quick recipe, of the width, batch and steps asked for."""
        member = replace(quick(), widths=(options.width,), seeds=1).members()[0]
        train = replace(member.config.train, batch_size=options.batch, steps=options.steps)
        config = replace(member.config, train=train, data=replace(member.config.data, rows=options.rows))
        pool = Pool.make(config.system, config.data.seed, part_sizes(config)).to(options.device)
        return cls(config=config, pool=pool, probe=attention_probe(config, pool))

    def run(
        self, keys: Sequence[int], precision: Precision, stops: Sequence[int], nudge: bool = False, probe: bool = True
    ) -> Run:
        """Train members in one pack up to the last of `stops`, looking at heads (if `probe`) and weights there."""
        trains = [replace(self.config.train, precision=precision)] * len(keys)
        trainer = Trainer(self.config.system, self.pool.parts["train"], self.config.model, trains, keys)
        if nudge:
            move_last_bit(trainer.state.weights, keys)
        seen, weights, names = [], {}, ("score", "null_uniform", "null_rows")
        for snapshot in trainer.run(stops):
            if probe:
                seen.append(self.probe.measure(snapshot).values)
            if snapshot.step in LOOKED_AT or snapshot.step == stops[-1]:
                weights[snapshot.step] = trainer.state.weights.detach().clone()
        q = self.probe.relations.index(self.config.system.relation)
        values = {name: np.stack([value[name][:, :, :, q] for value in seen]) for name in names if seen}
        return Run(steps=tuple(stops), values=values, weights=weights)


def move_last_bit(weights: Tensor, keys: Sequence[int]) -> None:
    """Move half of the weights `[S, P]` that are not 0, at random by member, to the next float32 above."""
    with torch.no_grad():
        half = (Generator.stack(keys).fold("nudge").bits(weights.shape[1]) & 1).bool().to(weights.device)
        above = torch.nextafter(weights, torch.full_like(weights, math.inf))
        weights.copy_(torch.where(half & (weights != 0), above, weights))


def attention_probe(config: MemberConfig, pool: Pool) -> AttentionScores:
    """The frozen probe set of a sweep's members, as the attention probe sees it."""
    size, rows = config.probe.examples, pool.parts["probe"]
    stream = Generator.of("probe set", config.data.seed, device=rows.device)
    cut = [rows.take(slice(r * size, (r + 1) * size)) for r in range(config.probe.replicates)]
    return AttentionScores(tuple(probe_batch(config, part, stream.fold(r)) for r, part in enumerate(cut)))


def keys_of(count: int) -> list[int]:
    """The members' keys: the same in every precision and every pack."""
    return [key_of("numerics", seed) for seed in range(count)]


def emergence(run: Run, member: int, layer: int, head: int) -> Emergence | None:
    """The fit of one head's curve; None where fewer than two replicates have any related pair."""
    score = run.values["score"][:, member, layer, head].astype(np.float64)
    null = run.values["null_uniform"][:, member, layer, head].astype(np.float64)
    sound = np.isfinite(score).all(0)
    return fit_emergence(run.steps, score[:, sound].T, null[:, sound].T) if sound.sum() >= 2 else None


def level(run: Run, member: int, head: tuple[int, int]) -> float:
    """Step at which a head reaches lift 2, NaN where it does not."""
    found = emergence(run, member, *head)
    return math.nan if found is None else found.level


def best_head(run: Run, member: int) -> tuple[int, int] | None:
    """The detector whose smoothed lift peaks highest, as the analysis has it; None where the member has none."""
    by_uniform, by_rows = (
        smooth(lift(run.values["score"][:, member], run.values[null][:, member]).transpose(1, 2, 0))
        for null in ("null_uniform", "null_rows")
    )
    best, highest = None, -math.inf
    for layer, head in np.ndindex(by_uniform.shape[:2]):
        peak = int(np.argmax(by_uniform[layer, head]))
        detects = by_rows[layer, head, peak] > ROWS_LIFT and math.isfinite(level(run, member, (layer, head)))
        if detects and by_uniform[layer, head, peak] > highest:
            best, highest = (layer, head), float(by_uniform[layer, head, peak])
    return best


def log_levels(run: Run, heads: Sequence[tuple[int, int] | None], members: Sequence[int]) -> Array:
    """log10 of the level of one head a member, NaN where there is none."""
    found = [math.nan if head is None else level(run, m, head) for m, head in zip(members, heads, strict=True)]
    return np.log10(np.asarray(found, dtype=np.float64))


def spread(values: Array) -> dict[str, object]:
    """Entries for a row: how many members have a value, its mean, standard deviation and largest absolute value."""
    known = values[np.isfinite(values)]
    return {
        "members": len(known),
        "mean": float(known.mean()) if known.size else math.nan,
        "sd": float(known.std(ddof=1)) if known.size > 1 else math.nan,
        "largest": float(np.abs(known).max()) if known.size else math.nan,
    }


def shift_rows(name: str, of: str, run: Run, base: Run, members: Sequence[int]) -> Iterator[dict[str, object]]:
    """log10 of levels over those of the base run (`of`), by member: of each run's best head, and of the base's."""
    in_base = [best_head(base, m) for m in members]
    own = [best_head(run, m) for m in members]
    reference = log_levels(base, in_base, members)
    known = reference[np.isfinite(reference)]
    seeds = float(known.std(ddof=1)) if known.size > 1 else math.nan
    same = sum(a is not None and a == b for a, b in zip(own, in_base, strict=True))
    for which, heads in (("own", own), ("the base's", in_base)):
        ratio = log_levels(run, heads, members) - reference
        yield {
            "what": "log10 of level over the base run's",
            "base": of,
            "run": name,
            "best head": which,
            **spread(ratio),
            "same best head": same,
            "sd of log10 level over members": seeds,
            "log10 ratios": tuple(ratio.tolist()),
            "log10 levels of the base": tuple(reference.tolist()),
        }


def precision_rows(setting: Setting, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Levels of the same members in other arithmetic, against float32."""
    keys, stops = keys_of(options.seeds), probe_steps(options.steps, PER_DECADE)
    base = setting.run(keys, "float32", stops)
    members = range(options.seeds)
    others: tuple[Precision, ...] = ("bf16", "tf32") if options.device == "cuda" else ("bf16",)
    nudged = setting.run(keys, "float32", stops, nudge=True)
    yield from shift_rows("float32, initial weights nudged", "float32", nudged, base, members)
    for precision in others:
        yield from shift_rows(precision, "float32", setting.run(keys, precision, stops), base, members)


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of one member's weights: the largest difference over the root mean square of `a`, and the norms' ratio."""
    difference, scale = (b - a).double(), a.double().square().mean().sqrt()
    return float(difference.abs().max() / scale), float(difference.norm() / a.double().norm())


def noise_rows(setting: Setting, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Float noise on a GPU: the same members alone, alone again, and in packs of 8 and 64."""
    count = min(options.seeds, 8)
    keys = keys_of(64)
    stops = sorted({*probe_steps(options.steps, PER_DECADE), *(s for s in LOOKED_AT if s <= options.steps)})
    base, again = (joined([setting.run([key], "float32", stops) for key in keys[:count]]) for _ in range(2))
    runs = {"alone again": again, **{f"pack of {size}": setting.run(keys[:size], "float32", stops) for size in (8, 64)}}
    for name, run in runs.items():
        yield from weight_rows(name, run, base, count)
        yield from shift_rows(f"float32, {name}", "float32, alone", run, base, range(count))


def joined(runs: Sequence[Run]) -> Run:
    """Runs of members by themselves as one run."""
    values = {name: np.concatenate([run.values[name] for run in runs], axis=1) for name in runs[0].values}
    weights = {step: torch.cat([run.weights[step] for run in runs]) for step in runs[0].weights}
    return Run(steps=runs[0].steps, values=values, weights=weights)


def weight_rows(name: str, run: Run, base: Run, count: int) -> Iterator[dict[str, object]]:
    """How far weights are apart, at each step looked at, over members."""
    for step in sorted(base.weights):
        pairs = [apart(base.weights[step][m], run.weights[step][m]) for m in range(count)]
        largest, norms = (np.asarray(values) for values in zip(*pairs, strict=True))
        yield {
            "what": "weights against those of the member alone",
            "run": name,
            "step": step,
            "members": count,
            "bit-identical": int((largest == 0).sum()),
            "largest difference / rms weight, median": float(np.median(largest)),
            "largest of it": float(largest.max()),
            "norm of difference / norm, median": float(np.median(norms)),
            "by member": tuple(largest.tolist()),
        }


def check_identical(setting: Setting, options: argparse.Namespace) -> str:
    """On a CPU: raise AssertionError unless members' weights are the same bits alone, alone again and in packs."""
    keys, last, count = keys_of(64), min(options.steps, options.check_steps), min(options.seeds, 4)
    stops = sorted({*(step for step in LOOKED_AT if step <= last), last})
    alone, again = (
        joined([setting.run([key], "float32", stops, probe=False) for key in keys[:count]]) for _ in range(2)
    )
    sizes = [size for size in (8, 64) if size <= options.largest_pack]
    packs = [setting.run(keys[:size], "float32", stops, probe=False) for size in sizes]
    for run in (again, *packs):
        for step, weights in alone.weights.items():
            assert torch.equal(run.weights[step][:count], weights), f"not the same bits at step {step}"
    runs = ", ".join(["alone", "alone again", *(f"in a pack of {size}" for size in sizes)])
    looked = ", ".join(map(str, alone.weights))
    return f"Float noise on this CPU: none. Weights of {count} members {runs}: equal bits at steps {looked} (asserted)."


def notes(options: argparse.Namespace) -> list[str]:
    """What the numbers mean."""
    return [
        f"Width {options.width}, batch {options.batch}, {options.steps} steps, {options.rows} rows, else as the quick "
        "recipe. Probes measure in float32 whatever the training.",
        "Level: the first step at lift 2 of a member's best detector (highest peak of lift). `own`: the best in the "
        "run itself; `the base's`: the head that was best in the base run, in both. Members without a level in either "
        "run are not counted. The sd over members is the scale to hold a shift against.",
        "nudged: float32, half of the initial weights, at random, moved to the next float32 above.",
    ] + ([options.note] if options.note else [])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.numerics", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=6, help="members")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16384, help="train rows of the pool")
    parser.add_argument("--check-steps", type=int, default=100, help="steps of the check for equal bits on a CPU")
    parser.add_argument("--largest-pack", type=int, default=64, help="of that check")
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    one_thread()
    setting = Setting.of(options)
    rows = list(precision_rows(setting, options))
    if options.device == "cuda":
        rows += noise_rows(setting, options)
        found = "Float noise: runs against the member trained alone; the packs hold other members too."
    else:
        found = check_identical(setting, options)
    write("numerics", rows, [*notes(options), found], options.device)


if __name__ == "__main__":
    main()
