"""How often intervals of `probes.tails` and of wrong estimators cover a planted exponent, and false positives."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import numpy as np
import powerlaw
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from probes.tails import Tail, fit_tail
from tests import planted_tails as planted

Array = NDArray[np.float64]
Generator = np.random.Generator
Given = dict[str, NDArray]
Tally = dict[str, tuple[int, int]]
ALPHA = 2.5
N_BOOTSTRAP = 300


def pure(rng: Generator) -> Given:
    return {"times": planted.pareto(rng, 300, ALPHA)}


def bent(rng: Generator) -> Given:
    return {"times": planted.bent(rng, 400, ALPHA)}


def random_end(rng: Generator) -> Given:
    times, censored = planted.at_random(rng, planted.bent(rng, 600, ALPHA), 12.0)
    return {"times": times, "censored": censored}


def common_end(rng: Generator) -> Given:
    times, censored = planted.at_once(planted.bent(rng, 500, ALPHA), 20.0)
    return {"times": times, "censored": censored}


def heads(rng: Generator) -> Given:
    times, members = planted.heads(rng, 80, 8, ALPHA, 0.8)
    return {"times": times, "clusters": members}


def hidden_heads(rng: Generator) -> Given:
    times, members = planted.heads(rng, 60, 8, ALPHA)
    times, censored = planted.at_once(times, 15.0)
    return {"times": times, "censored": censored, "clusters": members}


def textbook(given: Given, fit: Tail, n_bootstrap: int) -> tuple[float, float]:
    """Standard error (alpha - 1) / sqrt(events), as if xmin had been known."""
    half = 1.6449 * (fit.alpha - 1.0) / np.sqrt(fit.n_events)
    return fit.alpha - half, fit.alpha + half


def dropped(given: Given, fit: Tail, n_bootstrap: int) -> tuple[float, float]:
    """Only what was seen."""
    seen = ~given["censored"]
    rest = {name: values[seen] for name, values in given.items() if name != "censored"}
    again = fit_tail(**rest, n_bootstrap=n_bootstrap)
    return again.low, again.high


def independent(given: Given, fit: Tail, n_bootstrap: int) -> tuple[float, float]:
    """Heads of one member taken as independent."""
    again = fit_tail(**{name: values for name, values in given.items() if name != "clusters"}, n_bootstrap=n_bootstrap)
    return again.low, again.high


Wrong = Callable[[Given, Tail, int], tuple[float, float]]
SCENARIOS: dict[str, tuple[Callable[[Generator], Given], dict[str, Wrong]]] = {
    "alpha, pure": (pure, {"textbook error": textbook}),
    "alpha, with body": (bent, {"textbook error": textbook}),
    "alpha, random ends": (random_end, {"censored dropped": dropped}),
    "alpha, common end": (common_end, {"censored dropped": dropped}),
    "alpha, heads": (heads, {"heads independent": independent}),
    "alpha, heads and common end": (hidden_heads, {"heads independent": independent}),
}


def coverage(count: int, seed: int, only: tuple[str, ...] = tuple(SCENARIOS), n_bootstrap: int = N_BOOTSTRAP) -> Tally:
    """(covered, attempted) of nominal 90% intervals of alpha with xmin unknown, (refused, count) of "...: refused".

    Beside each, wrong estimators on the same samples, and the rejections by p < 0.1, as (rejected, attempted).
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for number, name in enumerate(SCENARIOS):
        make, wrong = SCENARIOS[name]
        rng = np.random.default_rng((seed, number))
        for _ in range(count if name in only else 0):
            given = make(rng)
            fit = fit_tail(**given, n_bootstrap=n_bootstrap, seed=int(rng.integers(2**31)))
            hits[f"{name}: refused"].append(bool(fit.refusal))
            if fit.refusal:
                continue
            hits[name].append(fit.low <= ALPHA <= fit.high)
            hits[f"{name}: p < 0.1"].append(fit.p_value < 0.1)
            for label, interval in wrong.items():
                low, high = interval(given, fit, n_bootstrap)
                hits[f"{name} ({label}, wrong)"].append(low <= ALPHA <= high)
    return {name: (int(np.sum(found)), len(found)) for name, found in hits.items()}


def straight_line(times: Array) -> bool:
    """A line through log rank against log time over the upper half has R^2 above 0.95."""
    x = np.sort(times)[times.size // 2 :]
    return bool(np.corrcoef(np.log(x), np.log(np.arange(x.size, 0, -1)))[0, 1] ** 2 > 0.95)


@contextmanager
def quiet_package() -> Iterator[None]:
    """Without what the `powerlaw` package prints, and its warnings of its own ways."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Standard error for the MLE", DeprecationWarning)
        warnings.filterwarnings("ignore", category=OptimizeWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="powerlaw")
        warnings.filterwarnings("ignore", category=UserWarning, module="powerlaw")
        yield


def package(times: Array) -> tuple[bool, bool]:
    """Whether the `powerlaw` package prefers the power law to the lognormal, and to the exponential: ratio above 0."""
    with quiet_package():
        fit = powerlaw.Fit(times, verbose=0)
        ratios = [fit.distribution_compare("power_law", name)[0] for name in ("lognormal", "exponential")]
    return ratios[0] > 0.0, ratios[1] > 0.0


NOT_POWER_LAWS: dict[str, Callable[[Generator], Array]] = {
    "lognormal, sigma 1": lambda rng: planted.lognormal(rng, 300),
    "lognormal, sigma 2": lambda rng: planted.lognormal(rng, 300, 2.0),
    "exponential": lambda rng: planted.exponential(rng, 300),
    "stretched exponential": lambda rng: planted.stretched(rng, 300),
}


def preferences(
    rng: Generator, make: Callable[[Generator], Array], count: int, packages: int
) -> Iterator[tuple[str, bool]]:
    for i in range(count):
        times = make(rng)
        fit = fit_tail(times, n_bootstrap=N_BOOTSTRAP, seed=i)
        yield "ours", fit.verdict == "power law"
        yield "ours, refused", bool(fit.refusal)
        yield "log-log line", straight_line(times)
        if i < packages:
            over_lognormal, over_exponential = package(times)
            yield "powerlaw, R > 0 over lognormal", over_lognormal
            yield "powerlaw, R > 0 over exponential", over_exponential


def false_positives(count: int, seed: int, packages: int | None = None) -> Tally:
    """(how often "power law" was preferred, of how many) by kind of times and method; `packages`: of the slow one."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for number, (kind, make) in enumerate(NOT_POWER_LAWS.items()):
        rng = np.random.default_rng((seed, number))
        for method, preferred in preferences(rng, make, count, count if packages is None else packages):
            hits[f"{kind}: {method}"].append(preferred)
    return {name: (int(np.sum(found)), len(found)) for name, found in hits.items()}
