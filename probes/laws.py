"""Least squares by level + amplitude * f(t; place, shape), many curves at once, with noise that remembers.

Variable projection: given `place` and `shape` the rest is linear, so the sum of squares is searched over a grid of
these two (curves that share a window share its columns) and then refined by Levenberg-Marquardt steps on both.
Residuals are AR(1) over the probe index, with variance sigma^2 / (1 - rho^2), and are whitened by rho.

`place` and `shape` are kept as coordinates u, v in [0, 1], logarithmic in the quantities that they stand for, so that
one box serves all windows. Shapes of arrays as in `probes.windows`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from probes.windows import Array, Index, Mask, Windows

Basis = Callable[[Array, Array, Array, Array], Array]  # (tau, span, u, v) -> f
Value = Callable[[Array, Array], Array]  # (coordinate, span) -> quantity, in units of tau

START_MEMORY = 0.4  # rho of the grid search
MEMORIES = np.linspace(-0.35, 0.95, 27)  # rho that is looked at
STEP = 1e-5  # of numerical derivatives, in box coordinates
FLOOR = 1e-9  # smallest noise that is believed, in units of the curve's range


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """One family f(t; place, shape); `place` is None for a family with a shape only."""

    name: str
    basis: Basis
    shape: Value
    place: Value | None
    nodes: tuple[int, int]  # of the grid over u and v

    @property
    def nonlinear(self) -> int:
        """Number of parameters besides level and amplitude."""
        return 1 if self.place is None else 2

    def grid(self) -> tuple[Array, Array]:
        """Coordinates u and v of the grid, each `[G]`; the edges of the box are half a cell away."""
        u, v = ((np.arange(count) + 0.5) / count for count in self.nodes)
        return np.repeat(u, v.size), np.tile(v, u.size)


@dataclass(frozen=True, slots=True)
class Fit:
    """Least squares under one law at memory rho; every field `[N]`, but `curve [N, n]`: the fit over whole windows."""

    u: Array
    v: Array
    rho: Array
    level: Array
    amplitude: Array
    rss: Array  # whitened
    curve: Array

    def take(self, index: Index) -> "Fit":
        """Some of the curves."""
        return Fit(*(getattr(self, field.name)[index] for field in fields(self)))


def log_range(low: float, high: float) -> Value:
    """The quantity that runs from `low` to `high` while its coordinate goes from 0 to 1."""
    return lambda x, span: np.asarray(low * np.exp(x * np.log(high / low)))


def whiten(values: Array, rho: Array, mask: Mask) -> Array:
    """Innovations of AR(1) `values [..., n]` with coefficient `rho [..., 1]`; 0 where masked."""
    out = values.copy()
    out[..., 1:] -= rho * values[..., :-1]
    out[..., :1] *= np.sqrt(1.0 - rho**2)
    return out * mask


def dot(a: Array, b: Array) -> Array:
    """Scalar product over the last axis, which is kept."""
    return np.asarray(np.einsum("...n,...n->...", a, b)[..., None])


def unit(values: Array) -> Array:
    """`values [..., n]` at norm 1; zeros stay zeros."""
    norm = np.sqrt(dot(values, values))
    return np.asarray(values / np.where(norm > 0.0, norm, 1.0))


def search(windows: Windows, law: Law) -> tuple[Array, Array]:
    """u and v of the best grid node of every curve, `[N]`; neighbours with the same times share the grid's columns.

    Weights are left out, as columns could not be shared: this is where refinement starts, no more.
    """
    same = (windows.tau[1:] == windows.tau[:-1]) & (windows.mask[1:] == windows.mask[:-1])
    starts = np.concatenate([[0], np.flatnonzero(~same.all(axis=1)) + 1, [len(windows.tau)]])
    found = [_search(windows.take(np.arange(a, b)), law) for a, b in pairwise(starts)]
    u, v = np.concatenate(found, axis=1)
    return u, v


def _search(windows: Windows, law: Law) -> Array:
    """u and v, `[2, N]`, of the best grid node of curves that all have the same times."""
    u, v = law.grid()
    mask, rho = windows.mask[:1], np.full((1, 1), START_MEMORY)
    columns = whiten(law.basis(windows.tau[:1], windows.span[:1], u[:, None], v[:, None]), rho, mask)
    values = whiten(windows.value, rho, mask)
    if windows.free_level:
        one = unit(whiten(np.ones(mask.shape), rho, mask))
        columns, values = columns - dot(columns, one) * one, values - dot(values, one) * one
    best = np.square(values @ unit(columns).T).argmax(axis=1)
    return np.stack([u[best], v[best]])


@dataclass(frozen=True, slots=True)
class _Projected:
    """Whitened residual `[N, n]` after the linear solve, its sum of squares `[N]`, level and amplitude `[N, 1]`."""

    residual: Array
    rss: Array
    level: Array
    amplitude: Array
    column: Array  # whitened basis, orthogonal to the level, unit length
    one: Array  # whitened level, unit length; zeros where no level is fitted


def _project(windows: Windows, f: Array, rho: Array) -> _Projected:
    """Weighted least squares of values on level and f at memory `rho [N, 1]`."""
    weight, mask = windows.weight, windows.mask
    ones = whiten(weight * windows.free_level, rho, mask)
    one = unit(ones)
    column, values = whiten(weight * f, rho, mask), whiten(weight * windows.value, rho, mask)
    along = dot(column, one)
    column, rest = column - along * one, values - dot(values, one) * one
    size = np.sqrt(dot(column, column))
    size = np.where(size > 0.0, size, 1.0)
    column = column / size
    share = dot(rest, column)
    residual = rest - share * column
    amplitude = share / size
    level_size = np.sqrt(dot(ones, ones))
    level = (dot(values, one) - amplitude * along) / np.where(level_size > 0.0, level_size, 1.0)
    return _Projected(residual, dot(residual, residual)[:, 0], level, amplitude, column, one)


def derivatives(windows: Windows, law: Law, u: Array, v: Array, *, hold_shape: bool = False) -> tuple[Array, Array]:
    """df/du and df/dv, `[N, n]`, at `u, v [N, 1]`, by central differences; 0 for what is absent or held."""

    def difference(du: float, dv: float) -> Array:
        ahead = law.basis(windows.tau, windows.span, u + du, v + dv)
        return np.asarray((ahead - law.basis(windows.tau, windows.span, u - du, v - dv)) / (2.0 * STEP))

    none = np.zeros_like(windows.value)
    return none if law.place is None else difference(STEP, 0.0), none if hold_shape else difference(0.0, STEP)


def _newton_step(
    windows: Windows, law: Law, at: Array, rho: Array, now: _Projected, damping: Array, hold_shape: bool
) -> Array:
    """Damped Gauss-Newton step in (u, v) from `at [N, 2]`, with Kaufman's Jacobian; along u alone if `hold_shape`."""
    slopes = []
    for slope in derivatives(windows, law, at[:, :1], at[:, 1:], hold_shape=hold_shape):
        white = now.amplitude * whiten(windows.weight * slope, rho, windows.mask)
        white = white - dot(white, now.one) * now.one
        slopes.append(white - dot(white, now.column) * now.column)
    (a, b), r = slopes, now.residual
    aa, ab, bb, ar, br = (dot(x, y)[:, 0] for x, y in ((a, a), (a, b), (b, b), (a, r), (b, r)))
    aa, bb = (np.where(x > 0.0, x * (1.0 + damping), 1.0) for x in (aa, bb))
    free = np.maximum(aa * bb - ab**2, 1e-12 * aa * bb)
    return np.stack([bb * ar - ab * br, aa * br - ab * ar], axis=1) / free[:, None]


def refine(
    windows: Windows, law: Law, u: Array, v: Array, rho: Array, *, steps: int = 12, hold_shape: bool = False
) -> Fit:
    """Levenberg-Marquardt from `u, v [N]` at fixed `rho [N]`, inside the box; with `hold_shape` over u alone."""
    at, memory = np.stack([u, v], axis=1), rho[:, None]
    f = law.basis(windows.tau, windows.span, at[:, :1], at[:, 1:])
    now, damping = _project(windows, f, memory), np.full(u.size, 1e-3)
    for _ in range(0 if hold_shape and law.place is None else steps):
        move = _newton_step(windows, law, at, memory, now, damping, hold_shape)
        tried = np.clip(at + np.clip(move, -0.2, 0.2), 0.0, 1.0)
        f_tried = law.basis(windows.tau, windows.span, tried[:, :1], tried[:, 1:])
        then = _project(windows, f_tried, memory)
        better = (then.rss < now.rss)[:, None]
        at, f = np.where(better, tried, at), np.where(better, f_tried, f)
        now = _Projected(*(np.where(better, new, old) if new.ndim > 1 else np.where(better[:, 0], new, old)
                           for new, old in zip(_parts(then), _parts(now), strict=True)))  # fmt: skip
        damping = np.where(better[:, 0], 0.1 * damping, 10.0 * damping + 1e-6)
    curve = now.level + now.amplitude * f
    return Fit(at[:, 0], at[:, 1], rho, now.level[:, 0], now.amplitude[:, 0], now.rss, curve)


def _parts(now: _Projected) -> tuple[Array, ...]:
    return now.residual, now.rss, now.level, now.amplitude, now.column, now.one


def moments(columns: Array, count: Array) -> Array:
    """Whitened products `[N, R, c, c]` of masked columns `[N, c, n]` at all of MEMORIES.

    The product at rho is S - rho L + rho^2 (S - E): S of the columns, L of neighbours, E of the first and last probe.
    """
    last = np.take_along_axis(columns, (count.astype(np.intp) - 1)[:, None, None], axis=2)
    first = columns[:, :, :1]
    own = columns @ columns.transpose(0, 2, 1)
    lag = columns[:, :, 1:] @ columns[:, :, :-1].transpose(0, 2, 1)
    ends = first @ first.transpose(0, 2, 1) + last @ last.transpose(0, 2, 1)
    rho = MEMORIES[:, None, None]
    return np.asarray(own[:, None] - rho * (lag + lag.transpose(0, 2, 1))[:, None] + rho**2 * (own - ends)[:, None])


def likeliest_memory(windows: Windows, fit: Fit) -> Array:
    """rho `[N]` among MEMORIES of greatest likelihood, given the residuals of a fit."""
    residual = windows.weight * (windows.value - fit.curve) * windows.mask
    rss = moments(residual[:, None], windows.count)[..., 0, 0] + (FLOOR * windows.scale[:, None]) ** 2
    deviance = windows.count[:, None] * np.log(rss) - np.log1p(-(MEMORIES**2))
    return np.asarray(MEMORIES[deviance.argmin(axis=1)])


def fit_law(windows: Windows, law: Law, u: Array, v: Array) -> Fit:
    """Least squares from grid nodes `u, v [N]`, with rho by maximum likelihood: the two in turns, three times."""
    rho = np.full(u.size, START_MEMORY)
    for steps in (10, 6):
        fit = refine(windows, law, u, v, rho, steps=steps)
        u, v, rho = fit.u, fit.v, likeliest_memory(windows, fit)
    return refine(windows, law, u, v, rho, steps=6)


def sums_of_squares(windows: Windows, law: Law, u: Array, v: Array, rho: Array) -> Array:
    """Whitened sums of squares `[N]` at `u, v, rho [N]`."""
    return _project(windows, law.basis(windows.tau, windows.span, u[:, None], v[:, None]), rho[:, None]).rss
