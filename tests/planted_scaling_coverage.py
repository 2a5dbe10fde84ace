"""How often intervals of `probes.scaling`, `survival` and `collapse` cover planted truth, beside wrong estimators."""

from collections import Counter
from dataclasses import replace

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import linregress

from probes.collapse import collapse
from probes.cure import maximise, model
from probes.scaling import censored_regression, fit_width_law
from probes.survival import kaplan_meier
from tests.planted_scaling import Sweep, Truth, curves, gamma_times, sweep, weibull

THREE, FOUR, FIVE = (16.0, 32.0, 64.0), (16.0, 32.0, 64.0, 128.0), (8.0, 16.0, 32.0, 64.0, 128.0)
FALLING = Truth(widths=THREE, shares=(), exponent=0.0).with_slope(0.5, -1.06)  # .68, .5, .32
HALF = Truth(widths=FOUR, shares=(0.6,) * 4, exponent=0.5, constant=2000.0, together=0.8)
ONE = Truth(
    widths=FIVE, shares=(), exponent=1.0, constant=8000.0, first=60.0, slow=1.5, end=1600.0
).with_slope(0.6, -0.4)  # fmt: skip
SHARED = replace(FALLING, exponent=0.5, constant=2000.0, shared=True)
LATE = replace(FALLING, exponent=0.5, constant=2000.0, end=600.0)  # a fifth of `never` at the smallest width is late
FEW = replace(FALLING, exponent=0.5, constant=2000.0, seeds=3, heads=8)
SKEWED = replace(FALLING, exponent=0.5, constant=2000.0, quantile=weibull)
GAMMA = replace(ONE, quantile=gamma_times)
SWEEPS = {
    "share falls, g = 0": FALLING, "g = 1/2": HALF, "g = 1, at_start, growing": ONE, "seeds shared": SHARED,
    "many late": LATE, "3 seeds": FEW, "Weibull times": SKEWED, "gamma times": GAMMA,
}  # fmt: skip
EXPONENTIAL = Truth(widths=FIVE, shares=(0.6,) * 5, exponent=0.0, rate=0.015, constant=1000.0)
WRONG = ", wrong)"
Table = dict[str, tuple[int, int]]


def coverage(count: int, seed: int) -> Table:
    """Name -> (covered, attempted) of nominal 90% intervals over `count` sweeps of every kind; refusals as said."""
    covered, attempted = Counter(), Counter()
    for place, (name, truth) in enumerate(SWEEPS.items()):
        for i in range(count):
            found = sweep(truth, np.random.default_rng((seed, place, i)))
            for quantity, inside in one(name, truth, found, i).items():
                covered[quantity] += bool(inside)
                attempted[quantity] += 1
    for i in range(count):
        for quantity, inside in others(np.random.default_rng((seed, 99, i)), i).items():
            covered[quantity] += bool(inside)
            attempted[quantity] += 1
    return {quantity: (covered[quantity], n) for quantity, n in attempted.items()}


def one(name: str, truth: Truth, found: Sweep, i: int) -> dict[str, bool]:
    law = fit_width_law(*found.rows)
    inside = {f"exponent ({name}): refused": bool(law.refusal)}
    if law.refusal:
        return inside
    shares, held = law.shares, law.held_out
    inside[f"exponent ({name})"] = law.low <= truth.exponent <= law.high
    inside[f"share slope ({name}): refused"] = bool(shares.refusal)
    if not shares.refusal:
        inside[f"share slope ({name})"] = shares.slope_low <= truth.share_slope <= shares.slope_high
        inside[f"first share ({name})"] = shares.low[0] <= truth.shares[0] <= shares.high[0]
        inside[f"last share ({name})"] = shares.low[-1] <= truth.shares[-1] <= shares.high[-1]
    if not held.refusal:
        inside[f"held out ({name})"] = held.low <= held.observed <= held.high
    if truth is FALLING:
        plain = censored_regression(*found.rows)
        inside["exponent (never as late" + WRONG] = plain.low <= truth.exponent <= plain.high
    if truth is HALF:
        low, high = independent(found)
        inside["exponent (heads independent" + WRONG] = low <= truth.exponent <= high
    if truth is FEW:
        low, high = percentile(found, np.random.default_rng(i))
        inside["exponent (3 seeds, percentile bootstrap" + WRONG] = low <= truth.exponent <= high
    return inside


def others(rng: np.random.Generator, i: int) -> dict[str, bool]:
    """Kaplan-Meier at the median time of those that emerge, every time; collapse of curves every fifth time."""
    truth = replace(HALF, widths=(16.0,), shares=(0.6,), seeds=12)
    found = sweep(truth, rng)
    curve = kaplan_meier(found.time, found.status, found.cluster)
    inside = {}
    for name, at in (("median", 1.0), ("upper quartile", float(np.exp(truth.spread * ndtri(0.75))))):
        place = np.searchsorted(curve.times, truth.median(16.0) * at, side="right") - 1
        right = 1.0 - 0.6 * ndtr(np.log(at) / truth.spread)
        inside[f"survival at the {name}"] = bool(curve.low[place] <= right <= curve.high[place])
    if i % 5 == 0:
        fit = collapse(FOUR, *curves(0.5, np.array(FOUR), 8, rng))
        inside["exponent of a collapse: refused"] = bool(fit.refusal)
        if not fit.refusal:
            inside["exponent of a collapse"] = fit.low <= 0.5 <= fit.high
    return inside


def built(found: Sweep):
    """The model that `fit_width_law` fits, of sweeps without growing heads, and its maximum."""
    from probes.cure import checked

    heads = checked(*found.rows)
    x = np.log(heads.width) - np.log(np.unique(heads.width)).mean()
    one = np.ones_like(x)
    made = model(heads, [one, x], [one, x], [one], np.zeros(x.size, bool), False)
    event = np.log(heads.time[heads.event])
    return made, maximise(made, [np.array([0.0, 0.0, event.mean(), 0.0, np.log(event.std())])])


def independent(found: Sweep) -> tuple[float, float]:
    """Wrong: heads of a member are no more alike than heads of different members."""
    _, fit = built(found)
    error = np.sqrt(np.linalg.inv(fit.information.sum(axis=0))[3, 3])
    return -fit.theta[3] + ndtri(0.05) * error, -fit.theta[3] + ndtri(0.95) * error


def percentile(found: Sweep, rng: np.random.Generator, draws: int = 79) -> tuple[float, float]:
    """Wrong under 30 clusters: quantiles of g over bootstrap samples of members, drawn anew at every width."""
    made, fit = built(found)
    count = found.cluster.max() + 1
    width_of = np.array([found.width[found.cluster == c][0] for c in range(count)])
    drawn = []
    for _ in range(draws):
        weight = np.zeros(count)
        for width in np.unique(width_of):
            members = np.flatnonzero(width_of == width)
            weight += np.bincount(rng.choice(members, members.size), minlength=count)
        drawn.append(-maximise(made, [fit.theta], weight).theta[3])
    low, high = np.quantile(drawn, (0.05, 0.95))
    return float(low), float(high)


def false_power_laws(count: int, seed: int) -> Table:
    """How often a power of width is claimed where there is none: (claims, sweeps).

    `line`: a least-squares line through log median time of emerged heads against log width, claimed at p < 0.1 of its
    slope or at R^2 > 0.9, as is often done.
    """
    claims: Counter[str] = Counter()
    for name, truth in (("no dependence", FALLING), ("exponential", EXPONENTIAL)):
        for i in range(count):
            found = sweep(truth, np.random.default_rng((seed, i)))
            law = fit_width_law(*found.rows)
            claims[f"{name}: ours"] += int(law.preferred == "power law")
            claims[f"{name}: ours, g is not 0"] += int(law.preferred not in ("", "no dependence"))
            event = found.status == "emerged"
            medians = [np.median(found.time[event & (found.width == w)]) for w in truth.widths]
            line = linregress(np.log(truth.widths), np.log(medians))
            claims[f"{name}: line, R^2 > 0.9"] += int(line.rvalue**2 > 0.9)
            heads = linregress(np.log(found.width[event]), np.log(found.time[event]))
            claims[f"{name}: line through heads, p < 0.1"] += int(heads.pvalue < 0.1)
    return {name: (n, count) for name, n in claims.items()}
