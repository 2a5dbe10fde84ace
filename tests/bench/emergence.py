"""What fitting curves costs, all at once against one by one, by how many there are: `python -m tests.bench.emergence`.

Every planted curve rises, so that none is spared the bootstrap: heads that never emerge cost a fraction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from probes.emergence import fit_emergence, fit_emergences
from probes.relaxation import fit_relaxation, fit_relaxations
from tests.bench.measure import compare, one_thread, quartiles, span, write
from tests.bench.memory import MB, extra
from tests.planted import RISING, USUAL, observe, probe_steps

Array = NDArray[np.float64]
U = 0.1
PER_DECADE = 23  # which makes 80 probe steps with step 0
PLANTED = 500  # curves that are planted; more are these again, in another order
Fit = Callable[[Array, Array], object]  # steps `[T]`, scores `[n, R, T]`


def one_by_one(step: Array, scores: Array) -> object:
    """Emergence of each curve by a call of its own."""
    return [fit_emergence(step, score, U) for score in scores]


def at_once(step: Array, scores: Array) -> object:
    """Emergence of all curves by one call."""
    return fit_emergences(step, scores, U)


def relax_one_by_one(step: Array, scores: Array) -> object:
    """Approach to the plateau of each curve by a call of its own, over windows of one size."""
    return [fit_relaxation(step, score, window(step)) for score in scores]


def relax_at_once(step: Array, scores: Array) -> object:
    """Approach to the plateau of all curves by one call, over windows that start at many steps, as t50 does."""
    starts = np.geomspace(*window(step), 40)[np.arange(len(scores)) % 20]
    return fit_relaxations(step, scores, np.stack([starts, np.full(len(scores), step[-1])], axis=1))


def window(step: Array) -> tuple[float, float]:
    """The last two decades."""
    return 0.01 * float(step[-1]), float(step[-1])


ESTIMATORS: Mapping[str, tuple[Fit, Fit]] = {
    "emergence": (one_by_one, at_once),
    "relaxation": (relax_one_by_one, relax_at_once),
}
"""By what is estimated: its calls curve by curve, and for all curves."""


def curves(step: Array, count: int, replicates: int) -> Array:
    """Scores `[count, R, T]` of rising heads under the usual noise."""
    rng = np.random.default_rng(0)
    heads = [RISING[i % len(RISING)](rng) for i in range(min(count, PLANTED))]
    scores = np.stack([observe(head, step, USUAL, rng, replicates, U) for head in heads])
    return scores if count <= PLANTED else scores[rng.integers(0, PLANTED, count)]


def cost_row(name: str, fit: Fit, step: Array, scores: Array, options: argparse.Namespace) -> dict[str, object]:
    """Milliseconds a curve of one call over all: median and quartiles over calls, fewer of them for many curves."""
    runs = int(np.clip(options.work // len(scores), 1, options.rounds))
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        fit(step, scores)
        found.append(1e3 * (time.perf_counter() - start) / len(scores))
    row: dict[str, object] = {
        "what": f"{name}, all at once",
        "curves": len(scores),
        "ms a curve": float(np.median(found)),
    }
    return row | {"quartiles": span(*quartiles(found)) if runs > 1 else None, "calls": runs, "ms by call": tuple(found)}


def compare_row(name: str, step: Array, scores: Array, options: argparse.Namespace) -> dict[str, object]:
    """One by one against all at once, in turns."""
    single, batched = ESTIMATORS[name]
    found = compare(lambda: single(step, scores), lambda: batched(step, scores), options.rounds, options.seconds)
    n = len(scores)
    row: dict[str, object] = {"what": f"{name}, one by one against all at once", "curves": n}
    for label, timing in (("one by one", found.a), ("at once", found.b)):
        low, high = timing.quartiles
        row |= {f"{label} ms": 1e3 * timing.median / n, f"{label} quartiles": span(1e3 * low / n, 1e3 * high / n)}
    return row | {"times faster": found.ratio, "quartiles of it": span(*found.quartiles), "ratios": found.ratios}


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Costs by number of curves, comparisons where these are few, memory where they are not."""
    step = probe_steps(PER_DECADE, zero=True)
    for name, (_, batched) in ESTIMATORS.items():
        batched(step, curves(step, 10, options.replicates))  # not timed: whatever is made once
        for count in options.curves:
            scores = curves(step, count, options.replicates)
            yield cost_row(name, batched, step, scores, options)
            if count <= options.compared:
                yield compare_row(name, step, scores, options)
            if count <= options.weighed:
                held = extra(lambda fit=batched, of=scores: fit(step, of), torch.device("cpu"))
                sizes = {"scores MB": scores.nbytes / MB, "extra MB": held / MB}
                yield {"what": f"{name}, memory of a call at its peak", "curves": count} | sizes


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.emergence", description=__doc__)
    parser.add_argument("--curves", type=int, nargs="*", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="calls that are timed at most")
    parser.add_argument("--work", type=int, default=10_000, help="curves that are fitted for a row, about")
    parser.add_argument("--compared", type=int, default=100, help="curves at most that are fitted one by one too")
    parser.add_argument("--weighed", type=int, default=1_000, help="curves at most whose memory is measured")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a burst in a comparison")
    parser.add_argument("--note", help="a line to keep with the results")
    options = parser.parse_args()
    one_thread()
    found = []
    for row in rows(options):
        found.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, tuple)}, flush=True)
    count = probe_steps(PER_DECADE, zero=True).size
    notes = [
        f"{count} probe steps, {options.replicates} replicates, usual noise of `tests.planted`; every curve rises. One "
        "process on one CPU thread. ms a curve: wall time of a call over its curves, median and quartiles over calls.",
        "times faster: median and quartiles over rounds of neighbouring bursts. extra: peak of resident memory during "
        "a call beside what was held before it.",
    ]
    write("emergence", found, notes + ([options.note] if options.note else []))


if __name__ == "__main__":
    main()
