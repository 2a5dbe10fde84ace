"""`probes.llc`: estimates against exact expectations and closed forms, what is reported with them, and `devinterp`."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from probes.llc import DEPENDS, LLC, UNSURE, LLCSettings, calibrate, estimate_llc, estimate_llcs
from sim.generator import Generator
from tests.planted_losses import (
    REDUCED_RANK,
    Product,
    at_origin,
    at_point,
    crossing,
    expected,
    expected_product,
    expected_quadratic,
    power,
    product_of,
    quadratic,
    reduced_rank_coefficient,
)
from tests.toys import EnumeratedToy
from train.config import ModelConfig
from train.model import forward, initial
from train.refine import HeadTarget

DOUBLE = torch.float64
QUICK = LLCSettings(
    n_beta=100.0, gamma=10.0, step_size=4e-4, chains=256, draws=300, burn_in=150, sensitivity=False, check_every=0
)
FEW = replace(QUICK, chains=4, draws=40, burn_in=10, check_every=4)
SAME = ("mean", "sd", "per_chain", "trace", "acceptance", "diverged", "sensitivity")


def one(target, settings, **more):
    (found,) = estimate_llcs(target, [0], settings, **more)
    return found


def error(found):
    """Standard error of the mean over chains."""
    return found.sd / len(found.per_chain) ** 0.5


def near(found, truth):
    """Within 3%, or 2 standard errors of at most 3%."""
    assert error(found) <= 0.03 * truth
    return found.mean == pytest.approx(truth, abs=max(0.03 * truth, 2.0 * error(found)))


def assert_equal(a, b, names=SAME):
    for name in names:
        np.testing.assert_equal(getattr(a, name), getattr(b, name), err_msg=name)


def square(parameters, batch):
    """Mean square of w . x, half of it."""
    return 0.5 * (batch @ parameters["w"]).square().mean()


# Truth


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
@pytest.mark.parametrize("value", [quadratic(1.0, 2.0), power(3), power(4)])
def test_estimates_are_the_exact_expectation(value, sampler):
    d = 2 if value(np.ones(2)) == 1.5 else 1
    settings = replace(QUICK, sampler=sampler, chains=1536, step_size=4e-4 if d == 2 else 6e-4)
    found = one(at_origin(value, d), settings)
    assert near(found, expected(value, d, 100.0, 10.0, nodes=200))
    assert found.mean == pytest.approx(found.trace.mean())
    np.testing.assert_allclose(found.per_chain, found.trace.mean(axis=1))
    assert found.sd == pytest.approx(found.per_chain.std(ddof=1))
    assert (found.n_beta, found.gamma, found.sigma, found.diverged) == (100.0, 10.0, None, 0)
    assert found.trace.shape == (1536, 300)


def test_closed_forms_of_linear_networks_agree():
    """Reduced-rank regression in its four cases is the two-layer case of networks of any depth."""
    for M, N, H in itertools.product(range(1, 6), repeat=3):
        for r in range(min(M, N, H) + 1):
            deep = Product(widths=(M, H, N), rank=r).coefficient
            assert deep == reduced_rank_coefficient(M, N, H, r)
    assert [reduced_rank_coefficient(*case) for case in REDUCED_RANK.values()] == [2.5, 2.0, 1.5, 1.0]
    assert [Product(widths=(3, 3, 3, 3), rank=r).coefficient for r in range(4)] == [3.0, 4.0, 4.5, 4.5]
    assert Product(widths=(1, 1, 1, 1), rank=0).coefficient == 0.5  # w1^2 w2^2 w3^2


NETWORKS = {case: product_of(case) for case in REDUCED_RANK} | {
    "deep": Product(widths=(1, 1, 1, 1), rank=1),
    "deeper": Product(widths=(2, 2, 2, 2), rank=1),
}


def test_the_expectation_of_a_linear_network_is_that_of_quadrature():
    for widths in ((1, 1, 1), (1, 1, 1, 1)):
        d = len(widths) - 1
        truth = expected(crossing(*[1] * d), d, 50.0, 10.0, nodes=120)  # its loss is half the crossing
        found, error = expected_product(Product(widths=widths, rank=0), 100.0, 10.0, 200_000)
        assert error < 0.01 * truth
        assert found == pytest.approx(truth, abs=3.0 * error)


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_networks_give_the_exact_expectation(name):
    truth, rough = expected_product(NETWORKS[name], 100.0, 40.0, 200_000)
    assert rough < 0.01 * truth
    settings = replace(QUICK, gamma=40.0, step_size=2.5e-4, chains=1000, draws=200, burn_in=300)
    assert near(one(at_point(NETWORKS[name]), settings), truth)


def test_reduced_rank_regression_is_in_the_order_of_its_coefficients():
    """At settings where chains settle; its cases are then in order, and each below half the number of weights."""
    settings = replace(QUICK, n_beta=300.0, gamma=40.0, step_size=1.5e-4, chains=160, draws=200, burn_in=400)
    found = {case: one(at_point(product_of(case)), settings) for case in REDUCED_RANK}
    truth = {case: reduced_rank_coefficient(*REDUCED_RANK[case]) for case in REDUCED_RANK}
    assert sorted(found, key=lambda case: found[case].mean) == sorted(truth, key=truth.get)
    for case, product in ((case, product_of(case)) for case in REDUCED_RANK):
        exact, _ = expected_product(product, 300.0, 40.0, 100_000)
        assert found[case].mean == pytest.approx(exact, abs=0.03 * exact + 3.0 * error(found[case]))
        assert found[case].mean < 0.8 * len(product.point) / 2


def test_deep_linear_networks_are_in_the_order_of_their_ranks():
    settings = replace(QUICK, n_beta=1000.0, step_size=2e-4, chains=48, draws=150, burn_in=150)
    found = [one(at_point(Product(widths=(3, 3, 3, 3), rank=rank)), settings) for rank in range(4)]
    for lower, higher in itertools.pairwise(found):
        assert higher.mean - lower.mean > 4.0 * (error(lower) + error(higher))


def test_degenerate_minima_are_below_regular_ones_of_as_many_weights():
    settings = replace(QUICK, n_beta=1000.0, gamma=5.0, step_size=1e-4, chains=128)
    values = [crossing(2, 1), crossing(1, 1), lambda w: w[..., 0] ** 2, quadratic(1.0, 1.0)]  # 1/4, 1/2 (twice), 1/2, 1
    found = [one(at_origin(value, 2), settings).mean for value in values]
    assert found == sorted(found)
    assert found[0] < 0.5 * found[2]


# A loss of any shape


def test_a_plain_loss_gives_the_closed_form_over_its_batches():
    """w . x over data: curvatures are the eigenvalues of the mean of x x', whatever batch a draw takes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, dtype=DOUBLE, generator=generator)
    h = torch.linalg.eigvalsh(x.T @ x / 64).numpy()
    settings = replace(QUICK, step_size=3e-4, chains=384)
    parameters = {"w": torch.zeros(3, dtype=DOUBLE, requires_grad=True)}
    whole = estimate_llc(square, parameters, [x], settings=settings, n=64)
    assert near(whole, expected_quadratic(h, 100.0, 10.0))
    assert whole.n == 64
    halves = estimate_llc(square, parameters, [x[:32], x[32:]], settings=settings)
    assert halves.mean == pytest.approx(whole.mean, rel=0.05)


def test_other_batches_give_the_data_refined_coefficient():
    x = torch.eye(3, dtype=DOUBLE)
    parameters, settings = {"w": torch.zeros(3, dtype=DOUBLE)}, replace(QUICK, chains=768)
    every = estimate_llc(square, parameters, [3**0.5 * x], settings=settings)
    first = estimate_llc(square, parameters, [x[:1]], settings=settings)
    assert near(every, 3 * expected_quadratic([1.0], 100.0, 10.0))
    assert near(first, expected_quadratic([1.0], 100.0, 10.0))


def test_batches_may_be_tuples_and_dicts_of_tensors():
    x = torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    parameters = {"w": torch.zeros(3, dtype=DOUBLE)}
    plain = estimate_llc(square, parameters, [x, 2 * x], settings=FEW)
    for wrap, loss in (
        (lambda x: (x, x.sum()), lambda p, b: square(p, b[0])),
        (lambda x: {"x": x, "more": [x]}, lambda p, b: square(p, b["x"])),
    ):
        assert_equal(estimate_llc(loss, parameters, [wrap(x), wrap(2 * x)], settings=FEW), plain)


# Masks


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_a_mask_of_nothing_gives_exactly_zero(sampler):
    settings = replace(FEW, sampler=sampler, sensitivity=True)
    parameters = {"w": torch.ones(3, dtype=DOUBLE), "v": torch.ones(2, 2, dtype=DOUBLE)}
    where = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in parameters.items()}

    def loss(p, batch):
        return (p["w"].sum() * p["v"].sum() * batch).square()

    found = estimate_llc(loss, parameters, [torch.ones((), dtype=DOUBLE)], where, settings)
    assert found.mean == 0.0
    assert not found.trace.any()
    assert set(found.sensitivity.values()) == {0.0}
    assert found.converged


def test_a_mask_gives_the_estimate_on_its_weights_alone():
    x = torch.eye(3, dtype=DOUBLE)
    w, settings = torch.tensor([0.0, 0.3, 0.0], dtype=DOUBLE), replace(QUICK, chains=768)

    def loss(p, batch):
        return square({"w": p["w"] - w}, batch)

    mask = {"w": torch.tensor([True, False, True])}
    parts = estimate_llc(loss, {"w": w}, [3**0.5 * x], mask, settings)
    assert near(parts, 2 * expected_quadratic([1.0], 100.0, 10.0))
    alone = estimate_llc(square, {"w": w[[0, 2]]}, [3**0.5 * x[:, [0, 2]]], settings=settings)
    assert near(alone, parts.mean)


def test_names_left_out_of_a_mask_stay_and_cost_nothing():
    a, b = torch.zeros(2, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)

    def loss(p, batch):
        return batch * (p["a"].square().sum() + 5.0 * p["b"].square().sum() + p["a"].sum() * p["b"].sum())

    batches = [torch.ones((), dtype=DOUBLE)]
    named = estimate_llc(loss, {"a": a, "b": b}, batches, {"b": torch.ones(3, dtype=torch.bool)}, FEW)
    fixed = estimate_llc(lambda p, batch: loss({"a": a, **p}, batch), {"b": b}, batches, settings=FEW)
    assert_equal(named, fixed)


# Invariances


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_the_scale_of_the_loss_goes_with_n_beta_and_with_sigma(sampler):
    base = replace(FEW, sampler=sampler, sensitivity=True)
    plain = one(at_origin(crossing(2, 1), 2), base)
    louder = one(at_origin(crossing(2, 1), 2, (4.0,)), replace(base, n_beta=25.0))
    measured = one(at_origin(crossing(2, 1), 2, (2.0 * 0.25**2,)), replace(base, sigma=0.25))
    odd = one(at_origin(crossing(2, 1), 2, (3.0,)), replace(base, n_beta=100.0 / 3.0))
    names = tuple(name for name in SAME if name != "sensitivity")
    assert_equal(plain, louder, names)
    assert_equal(plain, measured, names)
    assert list(plain.sensitivity.values()) == pytest.approx(list(louder.sensitivity.values()), rel=1e-12)
    np.testing.assert_allclose(odd.trace, plain.trace, rtol=1e-9)
    assert (louder.n_beta, measured.sigma) == (25.0, 0.25)
    wrong = one(at_origin(crossing(2, 1), 2, (4.0,)), base)
    assert abs(wrong.mean / plain.mean - 1.0) > 0.1


def test_points_are_independent_of_company_and_order():
    factors = (1.0, 2.0, 0.5, 4.0, 1.0)
    target = at_origin(quadratic(1.0, 0.5, 2.0), 3, factors)
    settings, seeds = replace(FEW, sensitivity=True), [11, 12, 13, 14, 15]
    together = estimate_llcs(target, seeds, settings, at_once=64)
    for at_once in (1, 45, 1000):
        for a, b in zip(together, estimate_llcs(target, seeds, settings, at_once=at_once), strict=True):
            assert_equal(a, b)
    turned = at_origin(quadratic(1.0, 0.5, 2.0), 3, factors[::-1])
    for a, b in zip(together, estimate_llcs(turned, seeds[::-1], settings)[::-1], strict=True):
        assert_equal(a, b)
    assert_equal(one(at_origin(quadratic(1.0, 0.5, 2.0), 3), replace(settings, seed=0)), estimate_llcs(
        target, [0, 1, 2, 3, 4], settings)[0])  # fmt: skip
    assert together[0].mean != together[4].mean  # by seed alone
    other = estimate_llcs(target, seeds, replace(settings, seed=1))
    assert other[0].mean != together[0].mean


def test_more_chains_leave_the_first_ones_as_they_are():
    few, more = (one(at_origin(power(4), 1), replace(FEW, chains=chains)) for chains in (2, 5))
    np.testing.assert_array_equal(few.trace, more.trace[:2])
    assert np.isnan(one(at_origin(power(4), 1), replace(FEW, chains=1)).sd)


# What is reported


def test_sensitivity_is_the_value_at_other_settings():
    value, settings = quadratic(1.0, 0.2), replace(QUICK, sensitivity=True, chains=2048, burn_in=300, draws=500)
    found = one(at_origin(value, 2), settings)
    truth = {
        "n_beta / 3": (100.0 / 3.0, 10.0),
        "n_beta x 3": (300.0, 10.0),
        "gamma / 3": (100.0, 10.0 / 3.0),
        "gamma x 3": (100.0, 30.0),
    }
    assert list(found.sensitivity) == list(truth)
    for name, pair in truth.items():
        assert found.sensitivity[name] == pytest.approx(expected_quadratic([1.0, 0.2], *pair), rel=0.04), name
    assert one(at_origin(value, 2), FEW).sensitivity == {}


def test_converged_is_said_of_a_regular_minimum_and_not_of_a_degenerate_one():
    settings = replace(
        QUICK, n_beta=3000.0, gamma=3.0, step_size=1e-5, chains=64, burn_in=200, draws=300, check_every=20,
        sensitivity=True,
    )  # fmt: skip
    regular = one(at_origin(quadratic(1.0, 1.0), 2), settings)
    assert (regular.converged, regular.reason) == (True, "")
    assert regular.mean == pytest.approx(1.0, rel=0.1)
    degenerate = one(at_origin(crossing(1, 1), 2), replace(settings, n_beta=30.0, gamma=200.0, step_size=1e-4))
    assert not degenerate.converged
    assert "depends on the settings" in degenerate.reason
    for name in ("n_beta / 3", "n_beta x 3", "gamma / 3", "gamma x 3"):
        assert f"% at {name}" in degenerate.reason


def test_errors_of_other_settings_are_those_of_repeats():
    """Estimates of one quadratic by few chains: how they scatter about the truth, against the errors they are given."""
    settings = replace(FEW, n_beta=1.0, gamma=0.5, step_size=0.2, chains=4, burn_in=40, draws=40, sensitivity=True)
    target = at_origin(quadratic(*np.linspace(0.5, 2.0, 8)), 8, (1.0,) * 120)
    found = estimate_llcs(target, range(120), settings)
    for name in ("n_beta / 3", "n_beta x 3", "gamma / 3", "gamma x 3"):
        gaps = np.array([each.sensitivity[name] / each.mean - 1.0 for each in found])
        told = np.sqrt(np.mean([each.sensitivity_error[name] ** 2 for each in found]))
        assert 0.4 * told < gaps.std() < 1.3 * told, name  # chains share random numbers: differences scatter less
        assert 0.02 < told < 0.5
    alone = estimate_llcs(target, range(120), replace(settings, chains=1))
    assert {error for each in alone for error in each.sensitivity_error.values()} == {math.inf}


def made(**changes):
    """An estimate that is converged, but for the changes."""
    sensitivity = {"n_beta / 3": 0.9, "n_beta x 3": 1.1, "gamma / 3": 1.1, "gamma x 3": 0.9}
    trace = np.full((4, 10), 1.0)
    fields = {
        "mean": 1.0, "sd": 0.0, "per_chain": trace.mean(axis=1), "trace": trace, "acceptance": 0.95, "diverged": 0,
        "spread": 1.1, "spread_error": 0.01, "heating": 0.1, "gradient": 0.1,
        "n": None, "n_beta": 1.0, "gamma": 1.0, "sigma": None, "sensitivity": sensitivity,
        "sensitivity_error": dict.fromkeys(sensitivity, 0.05),
    }  # fmt: skip
    return LLC(**fields | changes)


def test_every_reason_is_given():
    rising = np.tile(np.linspace(0.5, 1.5, 10), (4, 1))
    four = np.array([0.2, 0.6, 1.4, 1.8])
    swings = np.where(np.arange(10) < 5, 1.0, -1.0) * np.array([-0.4, -0.2, 0.2, 0.4])[:, None]
    lost = np.where(np.arange(4)[:, None] < 1, np.nan, np.ones((4, 10)))
    cases = {
        "": made(),
        "1 of 4 chains diverged": made(diverged=1, trace=lost),
        "1 of 1 chain diverged": made(diverged=1, per_chain=np.array([np.nan]), mean=np.nan),
        "-0.2 is below 0: lower losses lie near by": made(mean=-0.2, gradient=0.01),
        "-0.2 is below 0: lower losses lie near by; acceptance 0.85, under 0.9; the gradient at the point lowers it by "
        "about 50%": made(mean=-0.2, acceptance=0.85),
        "the gradient at the point lowers it by an amount that nothing bounds": made(gamma=0.0, gradient=float("inf")),
        "a single chain says nothing of its own scatter": made(per_chain=np.ones(1), trace=np.ones((1, 10))),
        "acceptance 0.85, under 0.9": made(acceptance=0.85),
        "the trace drifts by +56% from its first half to its second": made(trace=rising),
        "the trace drifts by -56% from its first half to its second": made(trace=rising[:, ::-1]),
        "chains have 0.70 of the spread of their density": made(spread=0.7, spread_error=0.09),
        "chains have 1.30 of the spread of their density": made(spread=1.3),
        "minibatches heat by 25%": made(heating=0.25),
        "fewer than two looks at how minibatches heat": made(heating=float("nan")),
        "no look at the acceptance": made(heating=float("nan"), acceptance=float("nan")),
        "too noisy to tell, by standard errors over chains: mean 37%": made(
            per_chain=four, trace=np.repeat(four[:, None], 10, 1)
        ),
        "too noisy to tell, by standard errors over chains: drift 37%": made(trace=1.0 + swings),
        "too noisy to tell, by standard errors over chains: spread 25%": made(spread_error=0.25),
        "cannot tell how it depends on the settings: +30% at gamma x 3, error 40%": made(
            sensitivity={"gamma x 3": 1.3, "n_beta x 3": 1.1},
            sensitivity_error={"gamma x 3": 0.4, "n_beta x 3": 0.1},
        ),
        "depends on the settings: +150% at gamma x 3; cannot tell how it depends on the settings: -10% at gamma / 3, "
        "error unknown": made(
            sensitivity={"gamma x 3": 2.5, "gamma / 3": 0.9},
            sensitivity_error={"gamma x 3": 0.4, "gamma / 3": math.inf},
        ),
        "the gradient at the point lowers it by about 30%": made(mean=0.99, gradient=0.297),
        "no look at other n_beta and gamma": made(sensitivity={}),
        "depends on the settings: +30% at gamma x 3, nan% at gamma / 3": made(
            sensitivity={"gamma x 3": 1.3, "n_beta x 3": 1.19, "gamma / 3": float("nan")}
        ),
        "acceptance 0.85, under 0.9; no look at other n_beta and gamma": made(acceptance=0.85, sensitivity={}),
    }
    for reason, found in cases.items():
        assert found.reason == reason.replace("nan%", "+nan%")
        assert found.converged == (not reason)
        assert found.sound == (not reason or reason.startswith(("no look at other", DEPENDS, UNSURE)))
    assert made(spread=0.7, spread_error=0.2).converged  # one direction's spread is known to no better
    assert made(mean=0.0, trace=np.zeros((4, 10)), sensitivity={"gamma x 3": 0.0}).converged


def test_a_chain_that_diverges_is_counted_and_the_mean_is_of_the_others():
    """A steep quartic: some chains leave for good at this step; a point of its own does not notice."""
    target = at_origin(power(4), 1, (1.0, 40.0))
    settings = replace(FEW, chains=16, draws=200, step_size=0.0035, check_every=10)
    mild, steep = estimate_llcs(target, [1, 2], settings)
    assert 0 < steep.diverged < 16
    gone = np.isnan(steep.per_chain)
    assert gone.sum() == steep.diverged
    assert steep.mean == pytest.approx(steep.per_chain[~gone].mean())
    assert steep.sd == pytest.approx(steep.per_chain[~gone].std(ddof=1))
    assert f"{steep.diverged} of 16 chains diverged" in steep.reason
    assert mild.diverged == 0
    assert_equal(mild, one_of(at_origin(power(4), 1), 1, settings))
    everything = one(at_origin(power(4), 1, (1e4,)), settings)
    assert everything.diverged == 16
    assert np.isnan([everything.mean, everything.sd, everything.acceptance]).all()
    assert everything.reason == "16 of 16 chains diverged"


def one_of(target, seed, settings):
    (found,) = estimate_llcs(target, [seed], settings)
    return found


# Calibration


def test_calibrate_takes_the_least_gamma_and_with_it_the_largest_step_that_are_sound():
    target = at_origin(quadratic(1.0, 1.0, 1.0, 1.0), 4, (1.0, 2.0))
    settings = replace(FEW, chains=32, draws=120, burn_in=80, check_every=4)
    steps, gammas = [3e-4, 1e-3, 2.5e-3, 8e-3, 0.1], [100.0, 1.0, 10.0]
    found = calibrate(target, [0, 1], settings, steps, gammas)
    assert sorted(zip(found.gamma, found.step_size, strict=True)) == sorted(itertools.product(gammas, steps))
    assert found.trace.shape == (15, 120)
    for i in np.flatnonzero(found.gamma == 10.0):
        at = estimate_llcs(target, [0, 1], replace(settings, gamma=10.0, step_size=found.step_size[i]))
        assert found.diverged[i] == sum(each.diverged for each in at)
        if not found.diverged[i]:
            assert found.llc[i] == pytest.approx(np.mean([each.mean for each in at]))
            assert found.sd[i] == pytest.approx(np.mean([each.sd for each in at]))
            assert found.acceptance[i] == pytest.approx(min(each.acceptance for each in at))
            assert found.spread[i] in [pytest.approx(each.spread) for each in at]
            assert found.heating[i] == pytest.approx(max(each.heating for each in at))
            trace = np.mean([each.trace.mean(axis=0) for each in at], axis=0)
            np.testing.assert_allclose(found.trace[i], trace)
            assert found.drift[i] == pytest.approx((trace[60:].mean() - trace[:60].mean()) / trace.mean())
    sound = (found.diverged == 0) & (found.acceptance >= 0.9) & (np.abs(found.drift) <= 0.2)
    assert 0 < sound.sum() < sound.size
    least = found.gamma[sound].min()
    assert found.refusal == ""
    assert found.chosen.gamma == least
    assert found.chosen.step_size == found.step_size[sound & (found.gamma == least)].max()
    assert found.chosen == replace(settings, gamma=least, step_size=found.chosen.step_size)
    assert found.diverged[found.step_size == 0.1].all()


def test_calibrate_refuses_with_reasons():
    target = at_origin(quadratic(*[1.0] * 4), 4)
    found = calibrate(target, [0], replace(FEW, draws=200), [8e-3, 0.1], [1.0, 10.0])
    assert found.chosen is None
    reasons = found.refusal.split("; ")
    assert reasons[:2] == ["a chain diverged at 2 of 4", "acceptance under 0.9 at 4 of 4"]
    slow = calibrate(target, [0], replace(FEW, burn_in=0, draws=200, chains=64), [1e-7], [10.0])
    assert slow.refusal == "the trace is not flat at 1 of 1; chains have not the spread of their density at 1 of 1"


# Refusals


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("n_beta", 0.0, "a finite number above 0"),
        ("n_beta", float("inf"), "a finite number above 0"),
        ("gamma", -1.0, "a finite number, 0 or more"),
        ("step_size", 0.0, "a finite number above 0"),
        ("step_size", float("nan"), "a finite number above 0"),
        ("chains", 0, "1 or more"),
        ("draws", 1, "2 or more"),
        ("burn_in", -1, "0 or more with sgld"),
        ("sampler", "hmc", "'sgld' or 'rmsprop'"),
        ("sigma", 0.0, "None or a finite number above 0"),
        ("check_every", -1, "0 or more"),
    ],
)
def test_settings_that_are_not_allowed_name_field_value_and_what_is(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; allowed: {allowed}$"):
        LLCSettings(**{field: value})


def test_rmsprop_needs_a_burn_in():
    with pytest.raises(ValueError, match=r"^burn_in is 1; allowed: 2 or more with rmsprop$"):
        LLCSettings(sampler="rmsprop", burn_in=1)


W, X = {"w": torch.zeros(3)}, torch.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_llc(square, {}, [X]), r"parameters is \{\}; allowed: one or more tensors"),
        (lambda: estimate_llc(square, {"w": X[0].long()}, [X]), r"parameters\['w'\] is torch.int64; allowed: a float"),
        (lambda: estimate_llc(square, W, []), "batches is 0; allowed: one or more"),
        (lambda: estimate_llc(square, W, [X, X[:2]]), "batches is 'of 2 shapes'; allowed: tensors .* of one shape"),
        (lambda: estimate_llc(square, W, [(X, 1)]), "batches is 'of 1 shapes'; allowed: tensors"),
        (lambda: estimate_llc(lambda p, b: b @ p["w"], W, [X]), r"loss is \(3,\); allowed: a scalar, shape \(\)"),
        (lambda: estimate_llc(square, W, [X], {}), r"where is \{\}; allowed: None, or masks by name"),
        (lambda: estimate_llc(square, W, [X], {"v": X > 0}), "where is 'v'; allowed: names of parameters: w"),
        (lambda: estimate_llc(square, W, [X], {"w": X > 0}), r"where\['w'\] is \(3, 3\); allowed: \(3,\), as the"),
        (lambda: estimate_llc(square, W, [X], {"w": X[0]}), r"where\['w'\] is torch.float32; allowed: bool"),
        (lambda: estimate_llcs(at_origin(power(2), 1), [1, 2], FEW), "seeds is 2; allowed: 1, one for each point"),
        (lambda: calibrate(at_origin(power(2), 1), [1], FEW, [], [1.0]), r"step_sizes is \[\]; allowed: at least one"),
        (lambda: calibrate(at_origin(power(2), 1), [1], FEW, [1.0], []), r"gammas is \[\]; allowed: at least one"),
        (lambda: calibrate(at_origin(power(2), 1), [1], FEW, [0.0], [1.0]), "step_size is 0.0; allowed"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Heads of a model


def test_permuting_heads_permutes_their_coefficients():
    model, system = ModelConfig(width=8, layers=2, heads=4), EnumeratedToy()
    batch = system.draw(system.rows("train", 40, Generator.of("rows")), Generator.of("draw"))
    parameters = initial(model, system.d_in, system.d_out, Generator.stack([1, 2]), DOUBLE)
    order, places = [2, 0, 3, 1], [(member, head) for member in range(2) for head in range(4)]
    turned = {name: value[:, order] if name in {"1.Wq", "1.Wk", "1.Wv", "1.Wo"} else value
              for name, value in parameters.items()}  # fmt: skip
    seeds = np.arange(8).reshape(2, 4)
    settings = replace(FEW, n_beta=30.0, gamma=200.0)
    first, second = (
        estimate_llcs(HeadTarget(system, model, own, batch, places, 1, 8), list(own_seeds.flatten()), settings)
        for own, own_seeds in ((parameters, seeds), (turned, seeds[:, order]))
    )
    a, b = (np.array([each.trace for each in found]).reshape(2, 4, 4, 40) for found in (first, second))
    np.testing.assert_allclose(a[:, order], b, rtol=1e-7, atol=1e-12)
    assert len({each.mean for each in first}) == 8


def test_a_head_within_a_small_ball_has_what_its_gradient_and_hessian_give():
    """L ~ g x + x H x / 2 has E[L] = g m + m H m / 2 + tr(H S) / 2 under N(m, S), S^-1 = n_beta H + gamma and
    m = -n_beta S g; H by differences of gradients, after some training."""
    system, model = EnumeratedToy(), ModelConfig(width=8, layers=2, heads=2)
    rows = system.rows("train", 12, Generator.of("rows"))
    batch = system.draw(rows, Generator.of("draw"))
    batch = replace(batch, inputs=batch.inputs.double(), targets=batch.targets.double())
    parameters = initial(model, system.d_in, system.d_out, Generator.stack([3]), DOUBLE)
    optimiser = torch.optim.Adam([value.requires_grad_() for value in parameters.values()], lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        system.loss(forward(parameters, model, batch), batch).mean().backward()
        optimiser.step()
    parameters = {name: value.detach() for name, value in parameters.items()}
    for layer, head in ((0, 1), (1, 0)):
        target = HeadTarget(system, model, parameters, batch, [(0, head)], layer, 6)
        centre = {name: value[0] for name, value in target.centre.items()}
        flat = torch.cat([value.flatten() for value in centre.values()])

        def gradients(points, target=target, centre=centre):
            parts = points.split([value.numel() for value in centre.values()], dim=1)
            leaves = {
                name: part.reshape(-1, *value.shape).requires_grad_()
                for part, (name, value) in zip(parts, centre.items(), strict=True)
            }
            every = torch.arange(12).expand(len(points), -1)
            loss = target.at(torch.zeros(len(points), dtype=torch.long)).loss(leaves, every)
            return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), list(leaves.values()))], dim=1)

        nudges = 1e-4 * torch.eye(len(flat), dtype=DOUBLE)
        hessian = (gradients(flat + nudges) - gradients(flat - nudges)) / 2e-4
        g, n_beta, gamma = gradients(flat[None])[0], 3000.0, 10_000.0
        hessian = 0.5 * (hessian + hessian.T)
        cover = torch.linalg.inv(n_beta * hessian + gamma * torch.eye(len(flat), dtype=DOUBLE))
        m = -n_beta * cover @ g
        exact = n_beta * float(g @ m + 0.5 * m @ hessian @ m + 0.5 * (hessian * cover).sum())
        settings = replace(QUICK, n_beta=n_beta, gamma=gamma, step_size=5e-6, chains=64, draws=300, burn_in=100)
        found = estimate_llcs(target, [0], settings, 12, at_once=64)[0]
        assert found.gradient == pytest.approx(n_beta**2 * float(g @ g) / gamma)
        assert found.mean == pytest.approx(exact, abs=max(0.03 * abs(exact), 3.0 * error(found)))
        assert error(found) < 0.1 * abs(exact)
        assert found.spread == pytest.approx(1.0, abs=0.03)


# Against devinterp


class Small(nn.Module):
    """2 - 6 - 1, tanh."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(2, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


@pytest.fixture(scope="module")
def small():
    """A network, and data that it fits but for noise."""
    torch.manual_seed(0)
    net, x = Small(), torch.randn(256, 2)
    return net, x, net(x).detach() + 0.3 * torch.randn(256, 1)


def theirs(net, x, y, minibatch, settings, where):
    """Coefficient of each chain by `devinterp`; its own warnings (of how to use it) are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from devinterp.optim import SGLD
        from devinterp.slt.sampler import LLCEstimator, sample

        data = torch.utils.data.TensorDataset(x, y)
        picks = torch.utils.data.RandomSampler(data, replacement=True, num_samples=1000 * minibatch)
        whole = minibatch == len(x)
        loader = torch.utils.data.DataLoader(data, batch_size=minibatch, sampler=None if whole else picks)
        start = float((net(x) - y).square().mean())
        estimator = LLCEstimator(settings.chains, settings.draws, start, nbeta=settings.n_beta)
        sample(
            net, loader, [estimator], lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
            sampling_method=SGLD, num_draws=settings.draws, num_chains=settings.chains, init_loss=start, seed=0,
            num_burnin_steps=settings.burn_in, verbose=False, optimize_over_per_model_param=where,
            optimizer_kwargs={
                "lr": settings.step_size, "nbeta": settings.n_beta, "localization": settings.gamma
            },
        )  # fmt: skip
    return estimator.get_results()["loss/trace"], start


@pytest.mark.parametrize(("minibatch", "part"), [(256, False), (32, True)])
def test_devinterp_finds_the_same_within_the_chains_spread(small, minibatch, part):
    net, x, y = small
    settings = LLCSettings(
        n_beta=200.0, gamma=20.0, step_size=1.5e-3, chains=5, draws=200, burn_in=50, sensitivity=False, check_every=0
    )
    where = {name: torch.full(p.shape, not part or "hidden" in name) for name, p in net.named_parameters()}
    trace, start = theirs(net, x, y, minibatch, settings, where)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(p, batch):
        return (functional_call(net, p, (batch[0],)) - batch[1]).square().mean()

    order = torch.randint(256, (400, minibatch), generator=torch.Generator().manual_seed(0))
    batches = [(x, y)] if minibatch == 256 else [(x[rows], y[rows]) for rows in order]
    ours = estimate_llc(loss, parameters, batches, where, replace(settings, chains=24))
    other = settings.n_beta * (trace.astype(np.float64).mean(axis=1) - start)
    spread = float(np.hypot(other.std(ddof=1) / 5**0.5, error(ours)))
    assert spread < 0.15 * ours.mean
    assert other.mean() == pytest.approx(ours.mean, abs=3.0 * spread)


def test_a_head_masked_out_of_the_forward_pass_has_coefficient_zero():
    """Two heads of attention, one of them multiplied by 0: exactly 0 for its weights, above 0 for the other's."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 5, 6, generator=generator, dtype=DOUBLE)
    own = {name: torch.randn(2, 6, 3, generator=generator, dtype=DOUBLE) for name in ("q", "k", "v")}
    own["o"] = torch.randn(2, 3, 6, generator=generator, dtype=DOUBLE)
    mask = torch.tensor([1.0, 0.0], dtype=DOUBLE)

    def look(weights):
        q, k, v = (torch.einsum("bni,hid->bhnd", x, weights[name]) for name in ("q", "k", "v"))
        read = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return torch.einsum("bhnd,hdi,h->bni", read, weights["o"], mask)

    aim = look(own)

    def loss(weights, batch):
        return (look(weights) - aim).square().mean() + 0.0 * batch.sum()

    found = []
    for head in range(2):
        where = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in own.items()}
        for value in where.values():
            value[head] = True
        found.append(estimate_llc(loss, own, [torch.zeros(1)], where, replace(FEW, sensitivity=True)))
    assert found[0].mean > 0.1
    assert not found[1].trace.any()
    assert set(found[1].sensitivity.values()) == {0.0}
    assert found[1].reason == ""
