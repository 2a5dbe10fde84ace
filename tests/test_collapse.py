"""`probes.collapse` against planted master curves and S written out point by point."""

import numpy as np
import pytest

from probes import collapse as module
from probes.collapse import collapse
from tests.planted_scaling import curves, master

WIDTHS = np.array([16.0, 32.0, 64.0, 128.0])


def drawn(exponent=0.5, seed=0, seeds=8, widths=WIDTHS, **shape):
    return widths, *curves(exponent, widths, seeds, np.random.default_rng(seed), **shape)


def slow_quality(widths, step, scores, exponent) -> float:
    terms = []
    for k, width in enumerate(widths):
        for j, t in enumerate(step):
            at, parts = t * width**exponent, []
            for other, values in zip(widths, scores, strict=True):
                x = step * other**exponent
                if other != width and x[0] * (1 - 1e-12) <= at <= x[-1] * (1 + 1e-12):
                    mean, square = values.mean(axis=0), values.var(axis=0, ddof=1) / len(values)
                    y, dy2 = (np.interp(np.log(at), np.log(x), part) for part in (mean, square))
                    parts.append((y, dy2, len(values) - 1))
            if parts:
                weight = sum(1 / dy2 for _, dy2, _ in parts)
                Y = sum(y / dy2 for y, dy2, _ in parts) / weight
                own = scores[k][:, j].var(ddof=1) / len(scores[k])
                total = own + 1 / weight
                below = own**2 / (len(scores[k]) - 1) + sum(1 / dy2 / n for _, dy2, n in parts) / weight**3
                terms.append((scores[k][:, j].mean() - Y) ** 2 / total * (1 - 2 * below / total**2))
    return float(np.mean(terms))


def test_quality_is_the_slow_obvious_one():
    widths, step, scores = drawn(seeds=6)
    built = module._curves(widths, step, scores, np.ones(step.size, bool), False)
    for exponent in (0.0, 0.37, -0.8):
        found, count = module._quality(built, np.array([exponent, 0.0]))
        assert found[0] == pytest.approx(slow_quality(widths, step, scores, exponent), rel=1e-6)
        assert count <= step.size * widths.size


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0])
def test_planted_exponents_come_back_and_S_is_near_one(exponent):
    fits = [collapse(*drawn(exponent, seed)) for seed in range(6)]
    assert [fit.refusal for fit in fits] == [""] * 6
    assert np.mean([fit.exponent for fit in fits]) == pytest.approx(exponent, abs=0.08)
    assert 0.6 < np.mean([fit.S for fit in fits]) < 1.6
    assert (np.array([fit.S_before for fit in fits]) > 3).all() or exponent == 0.0
    assert np.mean([fit.leave_one_out for fit in fits], axis=0) == pytest.approx(exponent, abs=0.15)
    assert all(fit.overlapping <= fit.points for fit in fits)


def test_both_exponents_come_back():
    fit = collapse(*drawn(0.5, 1, widths=WIDTHS[:3], power=0.3), scale_score=True)
    assert fit.refusal == ""
    assert fit.low <= 0.5 <= fit.high
    assert fit.score_low <= 0.3 <= fit.score_high
    plain = collapse(*drawn(0.5, 1, widths=WIDTHS[:3], power=0.3))
    assert plain.refusal or plain.S > 3 * fit.S  # without the second exponent they do not collapse
    assert (plain.score_exponent in (0.0,)) or np.isnan(plain.score_exponent)


def test_curves_that_do_not_collapse_have_a_large_S():
    good, bad = (np.mean([collapse(*drawn(0.5, seed, bend=bend)).S for seed in range(4)]) for bend in (0.0, 0.35))
    assert bad > 2.5
    assert bad > 2 * good


def test_shared_luck_narrows_the_interval_of_shared_seeds():
    rng, step = np.random.default_rng(4), np.geomspace(1, 4000, 60)
    late = 0.25 * rng.standard_normal((8, 1))
    scores = []
    for width in WIDTHS:
        z = np.log(step) + 0.5 * np.log(width / 16.0) - np.log(300.0) - late
        scores.append(master(z) + 0.003 * rng.standard_normal(z.shape))
    together, apart = (collapse(WIDTHS, step, scores, shared=shared) for shared in (True, False))
    assert together.exponent == apart.exponent == pytest.approx(0.5, abs=0.05)
    assert together.high - together.low < 0.5 * (apart.high - apart.low)


def test_the_window_is_fixed_in_steps():
    widths, step, scores = drawn()
    fit = collapse(widths, step, scores, window=(30.0, 1000.0))
    assert fit.points == ((step >= 30) & (step <= 1000)).sum() * 4
    assert fit.exponent == pytest.approx(0.5, abs=0.3)


def flat(widths, step, scores):
    return widths, step, [0.2 + 0.01 * np.random.default_rng(k).standard_normal(s.shape) for k, s in enumerate(scores)]


@pytest.mark.parametrize(("change", "options", "reason"), [
    (lambda w, t, s: (w[:2], t, s[:2]), {}, "2 widths"),
    (lambda w, t, s: (w, t, [x[:3] for x in s]), {}, "3 members"),
    (lambda w, t, s: (w, t, [np.repeat(x[:1], 5, axis=0) for x in s]), {}, "do not differ"),
    (lambda w, t, s: (w, t, s), {"window": (100.0, 120.0)}, "steps in the window"),
    (lambda w, t, s: (w, t, s), {"search": (-2.0, 0.3)}, "edge of what was searched"),
    (flat, {}, "do not tell exponents apart"),
])  # fmt: skip
def test_refusals_have_a_reason_and_no_number(change, options, reason):
    fit = collapse(*change(*drawn()), **options)
    assert reason in fit.refusal or (reason.startswith("do not tell") and "edge" in fit.refusal)
    assert np.isnan([fit.exponent, fit.low, fit.high, fit.S, *fit.leave_one_out]).all()


@pytest.mark.parametrize(("place", "value", "message"), [
    (0, [16.0, 8.0, 64.0, 128.0], r"width\[1\] is 8 after 16; allowed: increasing"),
    (1, [0.0, 1.0], r"step\[0\] is 0; allowed"),
    (2, [np.ones((8, 3))] * 4, r"score\[0\] has shape \(8, 3\); allowed"),
])  # fmt: skip
def test_malformed_arguments_are_named(place, value, message):
    rows = list(drawn())
    rows[place] = value
    with pytest.raises(ValueError, match=message):
        collapse(*rows)
