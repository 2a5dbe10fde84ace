"""Do learning curves of several widths fall onto one when time is scaled by width^g, and how well."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import stdtrit

from probes.cure import Array, Mask, check_confidence
from probes.words import counted

MIN_WIDTHS, MIN_MEMBERS, MIN_POINTS = 3, 4, 8
LEAST_OVERLAP = 0.5  # share of the points that other widths must reach, or the exponent is not searched
COARSE, COARSE_SCORE = 41, 9  # grid points of the search
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapse:
    """Result of `collapse`; all numbers but `S_before` and `points` are nan where `refusal` is not empty."""

    exponent: float = NAN  # g: score against t width^g
    low: float = NAN
    high: float = NAN
    score_exponent: float = NAN  # b: score width^b; 0 unless it was searched
    score_low: float = NAN
    score_high: float = NAN
    S: float = NAN  # at these exponents
    S_before: float = NAN  # at g = b = 0
    points: int = 0  # in the window, all widths together
    overlapping: int = 0  # of these, within reach of another width's curve at these exponents
    leave_one_out: Array  # [W] g without the width at this place; nan where that is refused
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class _Curves:
    """Means `[B, W, T]` over members and their squared errors; batches are leave-one-out samples."""

    log_width: Array  # [W], about its mean
    log_step: Array  # [T]
    mean: Array
    square: Array
    members: Array  # [W]
    inside: Mask  # [T] the window

    def without(self, k: int) -> "_Curves":
        """All widths but the one at place `k`."""
        rest = np.arange(self.log_width.size) != k
        kept = self.mean[:, rest], self.square[:, rest], self.members[rest]
        return _Curves(self.log_width[rest], self.log_step, *kept, self.inside)


def collapse(
    width: ArrayLike,
    step: ArrayLike,
    score: Sequence[ArrayLike],
    *,
    window: tuple[float, float] | None = None,
    scale_score: bool = False,
    shared: bool = False,
    search: tuple[float, float] = (-2.0, 2.0),
    confidence: float = 0.9,
) -> Collapse:
    """Exponents g (and b, if `scale_score`) that make score width^b, against step width^g, one curve; and how well.

    `width [W]`, increasing; `step [T]`, increasing, above 0; `score`, for every width `[members, T]`. In the manner of
    Houdayer and Hartmann 2004, doi:10.1103/PhysRevB.70.014418,

        S = mean over points of (y - Y)^2 / (dy^2 + dY^2):

    y a width's mean score at one step; Y the master curve there from the *other* widths: each interpolated linearly in
    log step, the mean weighted by 1 / squared error; dy, dY standard errors over members. The errors of neighbouring
    points of a curve are taken as equal, as a member's luck lasts (the original takes them as independent, which makes
    dY too small here). Terms are multiplied by (n - 2) / n, n their degrees of freedom, so that S is near 1 for curves
    that do collapse, however few the members. Points are those at steps in `window` (both ends included; all if None),
    whatever the exponents; only those within reach of another width's curve count, and exponents at which less than
    half do are not searched. S shrinks where a window adds points on plateaus that all widths share.

    g and b are where S is least, g within `search`, b within [-1, 1], by grid, then Nelder and Mead. Intervals:
    jackknife over the members of every width (over seeds, if `shared`: member i of all widths has the same data order),
    one Newton step each, on Student's t with Welch's degrees of freedom. S itself has no calibrated distribution here,
    as points of a curve are dependent: compare it with `S_before`, and g with `leave_one_out`.

    Refused: fewer than 3 widths, than 4 members at a width, or than 8 points a curve in the window; members that do not
    differ; exponents at an edge of the search; S that never rises by 1 above its least, so that curves do not tell.
    Raises ValueError, naming argument, value and what is allowed, for wrong shapes, values that are not finite, widths
    or steps that are not above 0 or do not increase, a window or search that is empty, or confidence outside (0, 1).
    """
    check_confidence(confidence)
    widths, steps, scores = _checked(width, step, score, window, search, shared)
    inside = np.ones(steps.size, np.bool_) if window is None else (steps >= window[0]) & (steps <= window[1])
    none = np.full(widths.size, NAN)
    refusal = _too_little(scores, inside)
    if refusal:
        return Collapse(leave_one_out=none, refusal=refusal)
    curves = _curves(widths, steps, scores, inside, shared)
    points = int(inside.sum()) * widths.size
    before = float(_quality(curves, np.zeros(2))[0][0])
    best, refusal = _best(curves, scale_score, search)
    if refusal:
        return Collapse(S_before=before, points=points, leave_one_out=none, refusal=refusal)
    error, freedom = _jackknife(curves, best, scale_score, shared)
    reach = stdtrit(freedom, 0.5 * (1.0 + confidence)) * error
    quality, overlapping = _quality(curves, best)
    others = [_best(curves.without(k), scale_score, search) for k in range(widths.size)]
    return Collapse(
        exponent=float(best[0]), low=float(best[0] - reach[0]), high=float(best[0] + reach[0]),
        score_exponent=float(best[1]), score_low=float(best[1] - reach[1]), score_high=float(best[1] + reach[1]),
        S=float(quality[0]), S_before=before, points=points, overlapping=overlapping,
        leave_one_out=np.array([NAN if why else found[0] for found, why in others]),
    )  # fmt: skip


def _checked(
    width: ArrayLike, step: ArrayLike, score: Sequence[ArrayLike], window: tuple[float, float] | None,
    search: tuple[float, float], shared: bool,
) -> tuple[Array, Array, list[Array]]:  # fmt: skip
    widths, steps = np.asarray(width, dtype=np.float64), np.asarray(step, dtype=np.float64)
    for name, values in (("width", widths), ("step", steps)):
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"{name} has shape {values.shape}; allowed: one axis, not empty")
        for i in np.flatnonzero(~(np.isfinite(values) & (values > 0.0)))[:1]:
            raise ValueError(f"{name}[{i}] is {values[i]:g}; allowed: finite numbers above 0")
        for i in np.flatnonzero(np.diff(values) <= 0.0)[:1] + 1:
            raise ValueError(f"{name}[{i}] is {values[i]:g} after {values[i - 1]:g}; allowed: increasing values")
    scores = [np.asarray(values, dtype=np.float64) for values in score]
    if len(scores) != widths.size:
        raise ValueError(f"score has {len(scores)} widths; allowed: {widths.size}, as width has")
    for k, values in enumerate(scores):
        if values.ndim != 2 or values.shape[1] != steps.size or (shared and values.shape != scores[0].shape):
            rule = "equal numbers of members, " if shared else ""
            raise ValueError(f"score[{k}] has shape {values.shape}; allowed: {rule}[members, {steps.size}]")
        if not np.isfinite(values).all():
            raise ValueError(f"score[{k}] contains {values[~np.isfinite(values)][0]}; allowed: finite numbers")
    for name, pair in (("window", window), ("search", search)):
        if pair is not None and not pair[0] < pair[1]:
            raise ValueError(f"{name} is {pair!r}; allowed: a lower and a higher end")
    return widths, steps, scores


def _too_little(scores: list[Array], inside: Mask) -> str:
    members = min(len(values) for values in scores)
    if len(scores) < MIN_WIDTHS:
        return f"{counted(len(scores), 'width')}, fewer than {MIN_WIDTHS}"
    if members < MIN_MEMBERS:
        return f"{counted(members, 'member')} at a width, fewer than {MIN_MEMBERS}"
    if inside.sum() < MIN_POINTS:
        return f"{counted(int(inside.sum()), 'step')} in the window, fewer than {MIN_POINTS}"
    if any((values.std(axis=0) <= 1e-12 * np.abs(values).max(axis=0)).all() for values in scores):
        return "members of a width do not differ: no errors to judge a collapse by"
    return ""


def _curves(widths: Array, steps: Array, scores: list[Array], inside: Mask, shared: bool) -> _Curves:
    """The whole sample, then every sample without one member (`shared`: without one seed)."""
    counts = [len(values) for values in scores]
    sets = _samples(counts, shared)
    mean, square = (np.empty((len(sets), len(scores), steps.size)) for _ in range(2))
    for k, values in enumerate(scores):
        for b, left_out in enumerate(sets):
            kept = values[np.arange(len(values)) != left_out[k]]
            mean[b, k], square[b, k] = kept.mean(axis=0), kept.var(axis=0, ddof=1) / len(kept)
        square[:, k] = np.maximum(square[:, k], 1e-6 * square[0, k].max())  # members may agree exactly at some steps
    x = np.log(widths)
    return _Curves(x - x.mean(), np.log(steps), mean, square, np.array(counts, dtype=np.float64), inside)


def _samples(counts: list[int], shared: bool) -> list[list[int]]:
    """For every sample, the member that each width does without, -1 for none; the first is whole."""
    none = [-1] * len(counts)
    if shared:
        return [none, *([i] * len(counts) for i in range(counts[0]))]
    return [none, *([*none[:k], i, *none[k + 1 :]] for k, count in enumerate(counts) for i in range(count))]


def _quality(curves: _Curves, at: Array) -> tuple[Array, int]:
    """S of every sample, `[B]`, at exponents `at` = (g, b), and how many points count; nan without any."""
    x = curves.log_step + at[0] * curves.log_width[:, None]
    scale = np.exp(at[1] * curves.log_width)[:, None]
    mean, square = curves.mean * scale, curves.square * scale**2
    total, count = np.zeros(len(mean)), 0
    for k in range(len(x)):
        here = x[k, curves.inside]
        weight, weighted, spread = np.zeros((3, len(mean), here.size))
        for i in range(len(x)):
            if i == k:
                continue
            reach, y, dy = _interpolated(x[i], mean[:, i], square[:, i], here)
            weight += reach / dy
            weighted += reach * y / dy
            spread += reach / dy / (curves.members[i] - 1.0)
        used = weight[0] > 0.0
        weight, weighted, spread = weight[:, used], weighted[:, used], spread[:, used]
        y, dy = mean[:, k][:, curves.inside][:, used], square[:, k][:, curves.inside][:, used]
        error = dy + 1.0 / weight
        freedom = error**2 / (dy**2 / (curves.members[k] - 1.0) + spread / weight**3)
        total += ((y - weighted / weight) ** 2 / error * np.maximum(1.0 - 2.0 / freedom, 0.0)).sum(axis=-1)
        count += int(used.sum())
    return (total / count if count else np.full(len(mean), NAN)), count


def _interpolated(x: Array, mean: Array, square: Array, here: Array) -> tuple[Array, Array, Array]:
    """Whether `here [t]` lies on the curve at `x [T]`, and there mean and squared error, `[B, t]`."""
    left = np.clip(np.searchsorted(x, here, side="right") - 1, 0, x.size - 2)
    share = (here - x[left]) / (x[left + 1] - x[left])
    reach = ((share >= -1e-9) & (share <= 1.0 + 1e-9)).astype(np.float64)
    share = np.clip(share, 0.0, 1.0)
    y, dy = ((1.0 - share) * part[:, left] + share * part[:, left + 1] for part in (mean, square))
    return reach, y, dy


def _best(curves: _Curves, scale_score: bool, search: tuple[float, float]) -> tuple[Array, str]:
    """Exponents (g, b) at which S of the whole sample is least, and why they are refused, or empty."""
    whole = _Curves(
        curves.log_width, curves.log_step, curves.mean[:1], curves.square[:1], curves.members, curves.inside
    )
    least = LEAST_OVERLAP * int(curves.inside.sum()) * curves.log_width.size

    def quality(at: Array) -> float:
        found, count = _quality(whole, np.array([at[0], at[1] if scale_score else 0.0]))
        return float(found[0]) if count >= max(least, 1) else np.inf

    grid = np.linspace(*search, COARSE)
    powers = np.linspace(-1.0, 1.0, COARSE_SCORE) if scale_score else np.zeros(1)
    found = np.array([[quality(np.array([g, b])) for b in powers] for g in grid])
    if not np.isfinite(found).any():
        return np.full(2, NAN), "the curves of different widths do not overlap"
    start = np.unravel_index(int(found.argmin()), found.shape)
    ways = [grid[1] - grid[0], powers[1] - powers[0]] if scale_score else [grid[1] - grid[0]]
    first = np.array([grid[start[0]], powers[start[1]]])[: len(ways)]
    simplex = np.vstack([first, first + np.diag(ways)])
    padded = lambda at: quality(np.append(at, 0.0))  # noqa: E731
    end = minimize(
        padded, first, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-5, "fatol": 1e-8}
    )
    best = np.append(end.x, np.zeros(2 - len(ways)))
    reachable = np.flatnonzero(np.isfinite(found).any(axis=1))
    if not grid[reachable[0]] + ways[0] < best[0] < grid[reachable[-1]] - ways[0]:
        return best, "the exponent of time is at an edge of what was searched"
    if scale_score and not abs(best[1]) < 1.0 - ways[1]:
        return best, "the exponent of the score is at an edge of what was searched"
    if found[np.isfinite(found)].max() < end.fun + 1.0:
        return best, "S never rises by 1 above its least: the curves do not tell exponents apart"
    return best, ""


def _jackknife(curves: _Curves, best: Array, scale_score: bool, shared: bool) -> tuple[Array, Array]:
    """Errors `[2]` of (g, b), and their degrees of freedom `[2]`; 0 error of an exponent that was not searched."""
    axes = 2 if scale_score else 1
    reach = np.array([_reach(curves, best, axis) for axis in range(axes)])
    grid = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, 7)] * axes, indexing="ij"), axis=-1).reshape(-1, axes)
    steps = np.hstack([grid * reach, np.zeros((len(grid), 2 - axes))])
    values = np.stack([_quality(curves, best + step)[0] for step in steps])  # [grid, B]
    pairs = [(i, j) for i in range(axes) for j in range(i, axes)]
    columns = [np.ones(len(grid)), *grid.T, *(grid[:, i] * grid[:, j] for i, j in pairs)]
    fitted = np.linalg.lstsq(np.stack(columns, axis=-1), values)[0]
    bend = np.zeros((axes, axes))
    for (i, j), value in zip(pairs, fitted[1 + axes :, 0], strict=True):
        bend[i, j] += value
        bend[j, i] += value
    moved = -np.linalg.solve(bend, fitted[1 : 1 + axes]).T * reach  # [B, axes]
    counts = [int(curves.members[0])] if shared else curves.members.astype(int).tolist()
    parts = np.split(moved[1:], np.cumsum(counts)[:-1])
    variance = np.array([(len(part) - 1) * part.var(axis=0) for part in parts])  # [groups, axes]
    total = variance.sum(axis=0)
    freedom = total**2 / (variance**2 / (np.array(counts)[:, None] - 1.0)).sum(axis=0)
    pad = 2 - axes
    return np.append(np.sqrt(total), np.zeros(pad)), np.append(freedom, np.ones(pad))


def _reach(curves: _Curves, best: Array, axis: int) -> float:
    """How far from `best` S has risen by 1/4, on average of both sides: beyond, S is no parabola."""
    least, way = float(_quality(curves, best)[0][0]), 0.01
    unit = np.eye(2)[axis]
    while way < 0.5:
        if np.mean([_quality(curves, best + sign * way * unit)[0][0] for sign in (-1.0, 1.0)]) > least + 0.25:
            break
        way *= 1.3
    return way
