"""How often nominal 90% intervals hold what was planted, beside wrong ones: `python -m tests.bench.coverage`.

Every estimator is run on so many planted curves or sweeps; 87 to 93% is asked of the right ones. The wrong ones stand
beside them to show that these numbers can fail.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from scipy.stats import binomtest

from tests import (
    planted_emergence_coverage,
    planted_relaxation_coverage,
    planted_scaling_coverage,
    planted_tails_coverage,
)
from tests.bench.measure import Row, one_thread, write

Coverage = Callable[[int, int], dict[str, tuple[int, int]]]
SOURCES: dict[str, Coverage] = {
    "emergence": planted_emergence_coverage.coverage,
    "relaxation": planted_relaxation_coverage.coverage,
    "scaling": planted_scaling_coverage.coverage,
    "tails": planted_tails_coverage.coverage,
}
LOW, HIGH = 0.87, 0.93


def rows_of(found: dict[str, tuple[int, int]]) -> list[Row]:
    """One row a quantity: how many were covered, the share with its 90% interval, and how many were refused."""
    rows: list[Row] = []
    for name, (covered, attempted) in found.items():
        if name.endswith(": refused") or not attempted:
            continue
        band = binomtest(covered, attempted).proportion_ci(0.9, method="wilson")
        refused = found.get(f"{name}: refused", (0, 0))[0]
        share = covered / attempted
        rows.append(
            {
                "quantity": name,
                "covered": covered,
                "of": attempted,
                "refused": refused,
                "share": f"{share:.1%}",
                "interval": f"{band.low:.1%} to {band.high:.1%}",
                "in 87-93%": None if "p <" in name else "yes" if LOW <= share <= HIGH else "no",
            }
        )
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.coverage", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="planted curves or sweeps of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    options = parser.parse_args()
    one_thread()
    for source in options.only:
        start = time.perf_counter()
        rows = rows_of(SOURCES[source](options.count, options.seed))
        notes = [
            "Share of nominal 90% intervals that held the planted truth, with its own 90% interval (Wilson). Rows "
            "`p < 0.1` count rejections of a true law instead: at most 10% is asked of them.",
            f"{time.perf_counter() - start:.0f} s on one thread.",
        ]
        write(f"coverage-{source}", rows, notes, torch.device("cpu"))


if __name__ == "__main__":
    main()
