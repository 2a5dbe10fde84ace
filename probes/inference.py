"""What fits of several laws say: which law is preferred, and the interval of a law's shape.

See `probes.laws` for the fits and `probes.windows` for the shapes of arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from probes.laws import FLOOR, MEMORIES, Fit, Law, derivatives, fit_law, moments, refine, search, sums_of_squares
from probes.windows import Array, Index, Windows

CLEAR = 2.0  # difference in AICc that decides
TAIL_SLACK = 1.1  # held-out errors that differ by less count as equal
HEAD = 2.0 / 3.0  # share of a window's probes from which the rest is foretold
EDGE = 0.01  # this close to 0 or 1 a coordinate is at the edge of the search
FARTHEST = 10.0  # the level lies no more than this many rises (of the fit, over the window) beyond its window
MIN_GAP = 0.7  # decades of |s - level| above the noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How well one law does: its AICc above the best law's, and its held-out error in score units."""

    aicc: float
    tail: float


# Which law


@dataclass(frozen=True, slots=True)
class Compared:
    """N curves under each of several laws, by name, and the law preferred, "undecided" where none is."""

    fits: dict[str, Fit]
    scores: list[dict[str, Score]]
    preferred: list[str]


def compare(windows: Windows, families: tuple[Law, ...]) -> Compared:
    """Fit every law to whole windows and to their heads.

    A law is preferred if its AICc is least by 2 or more, and if its error on the last third of a window's probes,
    foretold from the first two thirds, is at most 1.1 times that of any other law.
    """
    head = windows.head(HEAD)
    fits, criteria, tails = {}, [], []
    for law in families:
        fit = fit_law(windows, law, *search(windows, law))
        early = refine(head, law, *search(head, law), fit.rho)
        criteria.append(aicc(windows, law, fit))
        tails.append(tail_error(windows, head, early))
        fits[law.name] = fit
    aiccs, tail = np.stack(criteria, axis=1), np.stack(tails, axis=1)
    aiccs -= aiccs.min(axis=1, keepdims=True)
    best = aiccs.argmin(axis=1)
    clear = np.sort(aiccs, axis=1)[:, 1] >= CLEAR
    clear &= np.take_along_axis(tail, best[:, None], axis=1)[:, 0] <= TAIL_SLACK * tail.min(axis=1)
    names = list(fits)
    scores = [
        {name: Score(aicc=a, tail=e) for name, a, e in zip(names, row, errors, strict=True)}
        for row, errors in zip(aiccs.tolist(), tail.tolist(), strict=True)
    ]
    return Compared(fits, scores, [names[i] if sure else "undecided" for i, sure in zip(best, clear, strict=True)])


def aicc(windows: Windows, law: Law, fit: Fit) -> Array:
    """Akaike's criterion with its small-sample term; rho and sigma count as parameters."""
    n, k = windows.count, law.nonlinear + 1 + windows.free_level + 2
    spread = np.log(fit.rss / n + (FLOOR * windows.scale) ** 2)
    return np.asarray(n * (spread + np.log(2.0 * np.pi) + 1.0) - np.log1p(-(fit.rho**2)) + 2 * k * n / (n - k - 1))


def tail_error(whole: Windows, head: Windows, fit: Fit) -> Array:
    """Root mean square, `[N]`, of what a fit of `head` gets wrong on the rest of the windows."""
    rest = whole.mask & ~head.mask
    return np.asarray(np.sqrt((np.square(whole.value - fit.curve) * rest).sum(axis=1) / rest.sum(axis=1)))


# Whether a fit can carry a claim


def variance(windows: Windows, law: Law, fit: Fit) -> Array:
    """sigma^2 of the innovations, `[N]`, on n - p degrees of freedom."""
    parameters = law.nonlinear + 1 + windows.free_level
    return np.asarray(fit.rss / (windows.count - parameters) + (FLOOR * windows.scale) ** 2)


def weaknesses(windows: Windows, law: Law, fit: Fit, *, ends_at_level: bool, words: tuple[str, str, str]) -> list[str]:
    """Why each fit cannot carry a claim, empty if it can; `words` name level, place and shape."""
    gaps, beyond = gap_decades(windows, law, fit, ends_at_level=ends_at_level)
    coordinates = ((words[1], fit.u, law.place is not None), (words[2], fit.v, True))
    reasons = []
    for i in range(gaps.size):
        at_edge = [
            f"{name} is at the {'lower' if x[i] < 0.5 else 'upper'} edge of what was searched"
            for name, x, present in coordinates
            if present and not EDGE <= x[i] <= 1.0 - EDGE
        ]
        if beyond[i] > FARTHEST:
            at_edge.append(f"{words[0]} is beyond what was searched, over {FARTHEST:g} rises away")
        if not gaps[i] >= MIN_GAP:
            at_edge.append(f"|s - {words[0]}| above the noise for {gaps[i]:.2f} decades, under {MIN_GAP:g}")
        reasons.append("; ".join(at_edge))
    return reasons


def gap_decades(windows: Windows, law: Law, fit: Fit, *, ends_at_level: bool) -> tuple[Array, Array]:
    """Decades from the far end's |fit - level| to the near end's, or to the noise; and the near end's, in rises."""
    end = windows.count.astype(np.intp)[:, None] - 1
    curve, weight = (
        np.concatenate([x[:, :1], np.take_along_axis(x, end, axis=1)], axis=1) for x in (fit.curve, windows.weight)
    )
    if ends_at_level:
        curve, weight = curve[:, ::-1], weight[:, ::-1]
    (near, far), rise = np.abs(curve - fit.level[:, None]).T, np.abs(curve[:, 1] - curve[:, 0])
    noise = np.sqrt(variance(windows, law, fit) / (1.0 - fit.rho**2)) / weight[:, 0]
    smallest = np.maximum(near, noise)
    return np.log10(np.maximum(far, smallest) / smallest), near / np.where(rise > 0.0, rise, 1e-300)


# Interval of the shape


def settle(windows: Windows, law: Law, fit: Fit) -> Fit:
    """The fit at the rho of greatest restricted likelihood (see `gls`): plain likelihood finds noise too forgetful."""
    rho = _linearised(windows, law, fit, 0.5)[0]
    return refine(windows, law, fit.u, fit.v, rho, steps=6)


def shape_interval(
    windows: Windows, law: Law, fit: Fit, confidence: float, standing: Index
) -> tuple[Array, Array, Array]:
    """Shape v and the ends of its interval, `[N]` each, of a settled fit; nan but for the curves `standing`.

    An end is where sqrt((RSS(v) - RSS) / sigma^2), RSS(v) being least over place, level and amplitude, is the T of
    `gls`. It is 0 or 1 where the edge of the search is inside.
    """
    out = np.full((3, fit.u.size), np.nan)
    if standing.size:
        some, mine = windows.take(standing), fit.take(standing)
        _, _, se, reach = _linearised(some, law, mine, confidence)
        out[:, standing] = mine.v, *profile_interval(some, law, mine, se, reach)
    return out[0], out[1], out[2]


def _linearised(windows: Windows, law: Law, fit: Fit, confidence: float) -> tuple[Array, Array, Array, Array]:
    """`gls` of the residuals on the derivatives by level, place, amplitude and shape; standard errors are of v."""
    f = law.basis(windows.tau, windows.span, fit.u[:, None], fit.v[:, None])
    along_u, along_v = derivatives(windows, law, fit.u[:, None], fit.v[:, None])
    columns = [np.ones_like(f)] if windows.free_level else []
    columns += [f, along_u][: law.nonlinear]
    amplitude = np.where(fit.amplitude == 0.0, 1.0, fit.amplitude)[:, None]
    columns += [amplitude * along_v, windows.value - fit.curve]
    stacked = np.stack(columns, axis=1) * (windows.weight * windows.mask)[:, None]
    return gls(stacked, windows.count, confidence, FLOOR * windows.scale)


def gls(columns: Array, count: Array, confidence: float, floor: Array) -> tuple[Array, Array, Array, Array]:
    """Regression of the last of `columns [N, p + 1, n]` on the others, with AR(1) noise whose rho is not known.

    Answers, for the coefficient of the last regressor, `[N]` each: rho, estimate, standard error, and how many standard
    errors an interval goes to either side. The restricted log likelihood of rho is, over MEMORIES,
    -[(n - p) log RSS - log(1 - rho^2) + log|X' V^-1 X|] / 2; the number T solves
    sum_rho w(rho) F_{n-p}(T se / se(rho)) = (1 + confidence) / 2 with w that likelihood, normed, and F Student's t: a
    plain t would take rho for known. `floor [N]` is the least noise that is believed.
    """
    products, p = moments(columns, count), columns.shape[1] - 1
    design, cross, rest = products[..., :p, :p], products[..., :p, p:], products[..., p, p]
    diagonal = np.einsum("...ii->...i", design)
    norm = np.sqrt(np.where(diagonal > 0.0, diagonal, 1.0))
    design = design / (norm[..., :, None] * norm[..., None, :]) + 1e-10 * np.eye(p)
    cross, inverse = cross / norm[..., None], np.linalg.inv(design)
    solved, dof = inverse @ cross, count[:, None] - p
    rss = rest - (cross * solved).sum(axis=(2, 3))
    rss = np.maximum(rss, 0.0) + dof * (floor**2)[:, None]
    error = np.sqrt(rss / dof * inverse[..., -1, -1]) / norm[..., -1]
    determinant = np.linalg.slogdet(design)[1] + 2.0 * np.log(norm).sum(axis=-1)
    likelihood = -0.5 * (dof * np.log(rss) - np.log1p(-(MEMORIES**2)) + determinant)
    weight = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    best = likelihood.argmax(axis=1)
    estimate, se = ((x[np.arange(len(x)), best]) for x in (solved[..., -1, 0] / norm[..., -1], error))
    weight /= weight.sum(axis=1, keepdims=True)
    return MEMORIES[best], estimate, se, _reach(weight, error / se[:, None], dof, confidence)


def _reach(weight: Array, ratio: Array, dof: Array, confidence: float) -> Array:
    """T `[N]` with sum_j weight_j F_dof(T / ratio_j) = (1 + confidence) / 2, by the secant method."""
    target = 0.5 * (1.0 + confidence)

    def excess(reach: Array) -> Array:
        return np.asarray((weight * stdtr(dof, reach[:, None] / ratio)).sum(axis=1) - target)

    before = stdtrit(dof[:, 0], target)
    at = before * np.sqrt((weight * ratio**2).sum(axis=1)) * 1.001
    was = excess(before)
    for _ in range(5):
        now = excess(at)
        slope = np.where(np.abs(now - was) > 1e-14, now - was, np.inf)
        at, before, was = at - now * (at - before) / slope, at, now
    return np.asarray(at)


def profile(windows: Windows, law: Law, v: Array, rho: Array, u: Array | None = None) -> Fit:
    """Least squares at given shape `v [N]`, over place, level and amplitude; from `u [N]`, else from the best of 12."""
    if law.place is None or u is not None:
        return refine(windows, law, np.full(v.size, 0.5) if u is None else u, v, rho, steps=4, hold_shape=True)
    starts = (np.arange(12) + 0.5) / 12.0
    rss = np.stack([sums_of_squares(windows, law, np.full(v.size, start), v, rho) for start in starts])
    return refine(windows, law, starts[rss.argmin(axis=0)], v, rho, steps=6, hold_shape=True)


def profile_interval(windows: Windows, law: Law, fit: Fit, se: Array, reach: Array) -> tuple[Array, Array]:
    """Ends of the profile interval in v, by regula falsi (Illinois) from the fit outwards."""
    noise = np.sqrt(variance(windows, law, fit))

    def excess(v: Array, u: Array | None = None) -> tuple[Array, Array]:
        found = profile(windows, law, v, fit.rho, u)
        return np.asarray(np.sqrt(np.maximum(found.rss - fit.rss, 0.0)) / noise - reach), found.u

    low, high = (_crossing(excess, fit, reach, edge, (2.0 * edge - 1.0) * reach * se) for edge in (0.0, 1.0))
    return low, high


def _crossing(excess: Callable[..., tuple[Array, Array]], fit: Fit, reach: Array, edge: float, step: Array) -> Array:
    """Where `excess`, -reach at the fit, goes through 0 on the way to `edge`; `edge` where it does not. `[N]`.

    The place is followed from the nearer of the two brackets.
    """
    near, far, u_near = fit.v, np.full(fit.v.size, edge), fit.u
    above, u_far = excess(far)
    below, never, side = -reach, above <= 0.0, np.zeros(far.size)
    tried = np.where(np.abs(step) < np.abs(far - near), near + step, 0.5 * (near + far))
    for _ in range(7):
        share = (tried - near) / np.where(far == near, 1.0, far - near)
        value, u = excess(tried, np.where(share < 0.5, u_near, u_far))
        now = np.sign(value)
        again = np.where(now == side, 0.5, 1.0)  # an end that stays twice counts half
        out, side = now > 0.0, now
        below, above = np.where(out, again * below, value), np.where(out, value, again * above)
        near, far = np.where(out, near, tried), np.where(out, tried, far)
        u_near, u_far = np.where(out, u_near, u), np.where(out, u, u_far)
        tried = near + (far - near) * below / np.where(below == above, -1.0, below - above)
    return np.where(never, edge, tried)
