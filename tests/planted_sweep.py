"""A planted sweep as tables: members at widths and rates whose heads emerge, or not, by a known law."""

import dataclasses

import numpy as np

from cluster.analysis import series_of_sweep, tabulate
from cluster.laws import RATE, laws_of

WIDTHS, RATES = (16, 24, 40, 64), (0.001, 0.004)
LAST, STEPS = 4000.0, np.unique(np.geomspace(1, 4000, 80).astype(int))
AXES = ("width", RATE)


def planted_sweep(exponents=(0.5, 0.5), share=0.8, seeds=8, seed=0, widths=WIDTHS, rates=RATES):
    """Level = C width^-exponent by rate; the second rate ends at the lower validation loss at widths below 40 only."""
    rng = np.random.default_rng(seed)
    heads, members, lines = [], [], []
    for width in widths:
        for rate, exponent in zip(rates, exponents, strict=False):
            for number in range(seeds):
                keys = {"member_id": f"{width}-{rate}-{number}", "run_id": "r", "width": width, RATE: rate}
                keys["seed"] = number
                member_heads = [head(rng, width, exponent, share, index) for index in range(8)]
                heads += [{**keys, **row} for row in member_heads]
                best = min((row["level"] for row in member_heads if row["detector"]), default=np.nan)
                better = (rate == rates[-1]) == (width < 40)
                row = {"outcome": "finished", "cause": "", "level": best, "last_step": LAST, "heads_that_matter": 2}
                members.append({**keys, **row, "validation_loss": 0.1 + 0.1 * (not better) + 0.01 * rng.random()})
                if np.isfinite(best):
                    lift = 1 + 3 / (1 + (best / STEPS) ** 2) + 0.05 * rng.standard_normal()
                    lines += [{**keys, "step": int(t), "lift": float(y)} for t, y in zip(STEPS, lift, strict=True)]
    return tabulate(heads, members, list(AXES), lines)


def with_laws(sweep, analysis):
    """As `analyze_sweep` adds them, without a cluster."""
    return dataclasses.replace(analysis, laws=[laws_of(each) for each in series_of_sweep(sweep, analysis)])


def head(rng, width, exponent, share, index):
    """A head on relation `collision`."""
    row = {"relation": "collision", "layer": index // 4, "head": index % 4, "lift_peak": 3.0 + rng.random()}
    nothing = {"relaxation": np.nan, "relaxation_low": np.nan, "relaxation_high": np.nan, "relaxation_law": ""} | {
        "growth_law": ""
    }
    if rng.random() > share:
        empty = {"status": "never", "detector": False, "level": np.nan, "t50": np.nan}
        return row | empty | nothing | {"relaxation_refusal": "it did not rise and stay"}
    time = 300 * (width / 32) ** -exponent * np.exp(0.25 * rng.standard_normal())
    a = np.exp(0.1 * rng.standard_normal())
    return row | {
        "status": "emerged", "detector": True, "level": time, "t50": 1.2 * time, "relaxation": a,
        "relaxation_low": 0.8 * a, "relaxation_high": 1.2 * a, "relaxation_law": "power", "relaxation_refusal": "",
        "growth_law": "critical",
    }  # fmt: skip
