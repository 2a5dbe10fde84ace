"""`probes.langevin`: chains against exact expectations at the same n_beta and gamma, and against numpy step by step."""

import numpy as np
import pytest
import torch

from probes.langevin import Levels, Schedule, Streams, run_chains, seed_of
from tests.planted_losses import at_origin, crossing, expected, expected_quadratic, power, quadratic

DOUBLE = torch.float64
POWERS = {
    (2, 100.0, 10.0): 2e-4, (2, 30.0, 200.0): 1.5e-4, (2, 1000.0, 5.0): 2e-5,
    (3, 100.0, 10.0): 5e-4, (3, 30.0, 200.0): 1.5e-4, (3, 1000.0, 5.0): 1.5e-4,
    (4, 100.0, 10.0): 8e-4, (4, 300.0, 100.0): 2.5e-4, (4, 1000.0, 5.0): 3e-4,
    (6, 100.0, 10.0): 8e-4, (6, 1e5, 50.0): 1e-4, (6, 1000.0, 5.0): 8e-4,
}  # step size by k, n_beta, gamma  # fmt: skip
EACH = 640  # chains of a case


def run(target, place=0, n_beta=100.0, gamma=10.0, step_size=1e-3, seeds=range(4), where=None, **schedule):
    """Chains with seeds `seeds`; levels and place may be one number or one for each chain."""
    count = len(seeds)
    levels = [torch.as_tensor(x, dtype=DOUBLE).expand(count) for x in (n_beta, gamma, step_size)]
    levels = Levels(n_beta=levels[0], gamma=levels[1], step_size=levels[2])
    schedule = Schedule(**{"draws": 50, "burn_in": 0, "check_every": 0} | schedule)
    return run_chains(target, torch.as_tensor(place).expand(count), list(seeds), levels, schedule, where)


def mean_and_error(trace):
    """Over chains `[C, draws]`, which are independent."""
    per_chain = trace.mean(1)
    return float(per_chain.mean()), float(per_chain.std() / len(per_chain) ** 0.5)


def agrees(trace, truth):
    """Within 3%, or within 2 standard errors that are at most 3%."""
    mean, error = mean_and_error(trace)
    return abs(mean / truth - 1.0) <= (max(0.03, 2.0 * error / truth) if error <= 0.03 * truth else 0.03)


def equal(a, b):
    return all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True))


def fields(chains):
    return chains.trace, chains.acceptance, chains.diverged


# Truth


@pytest.fixture(scope="module")
def powers():
    """Traces of |w|^k by case, all of them chains of one stack."""
    k, n_beta, gamma = (torch.tensor(row, dtype=DOUBLE).repeat_interleave(EACH) for row in zip(*POWERS, strict=True))
    steps = torch.tensor(list(POWERS.values()), dtype=DOUBLE).repeat_interleave(EACH)
    target = at_origin(lambda w: w[..., 0].abs() ** k, 1)
    found = run(target, 0, n_beta, gamma, steps, range(len(k)), draws=900, burn_in=400, check_every=300)
    assert (found.acceptance.unflatten(0, (-1, EACH)).mean(1) > 0.98).all()
    assert not found.diverged.any()
    return dict(zip(POWERS, found.trace.unflatten(0, (-1, EACH)), strict=True))


@pytest.mark.parametrize(("k", "n_beta", "gamma"), POWERS)
def test_powers_give_the_exact_expectation(powers, k, n_beta, gamma):
    assert agrees(powers[k, n_beta, gamma], expected(power(k), 1, n_beta, gamma))


def test_estimates_without_the_localisation_in_mind_are_seen_to_fail(powers):
    """At gamma 200 the coefficient 1/k is off by far, and so is the expectation at a third of gamma."""
    for k in (2, 3):
        trace = powers[k, 30.0, 200.0]
        assert not agrees(trace, 1.0 / k)
        assert not agrees(trace, expected(power(k), 1, 30.0, 200.0 / 3.0))


@pytest.mark.parametrize(("sampler", "burn_in"), [("sgld", 400), ("rmsprop", 800)])
@pytest.mark.parametrize("halves", [(1, 1), (2, 1)])
def test_normal_crossings_give_the_exact_expectation(halves, sampler, burn_in):
    target = at_origin(crossing(*halves), 2)
    found = run(target, 0, 1000.0, 40.0, 5e-4, range(1536), draws=800, burn_in=burn_in, sampler=sampler)
    truth = expected(crossing(*halves), 2, 1000.0, 40.0, nodes=400)
    assert agrees(found.trace, truth)
    assert not agrees(found.trace, 0.5 / max(halves))


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_quadratics_give_the_closed_form(sampler):
    target = at_origin(quadratic(0.2, 1.0, 3.0), 3)
    found = run(target, 0, 100.0, 10.0, 1.5e-4, range(1024), draws=900, burn_in=500, sampler=sampler)
    assert agrees(found.trace, expected_quadratic([0.2, 1.0, 3.0], 100.0, 10.0))


def test_quadrature_gives_the_closed_form_and_the_published_numbers():
    assert expected(quadratic(0.2, 1.0, 3.0), 3, 100.0, 10.0, nodes=120) == pytest.approx(
        expected_quadratic([0.2, 1.0, 3.0], 100.0, 10.0), rel=1e-6
    )
    assert expected(power(2), 1, 30.0, 200.0) == pytest.approx(3 / 26)
    assert expected(power(4), 1, 30.0, 200.0) == pytest.approx(0.0022, abs=5e-5)
    assert expected(crossing(1, 1), 2, 6000.0, 1.0) == pytest.approx(0.408, abs=5e-4)


@pytest.mark.parametrize("large", [0.5, 1.0, 2.0])
def test_large_steps_have_the_bias_that_theory_gives(large):
    """Unadjusted steps on a quadratic of stiffness a leave the variance 1 / (a (1 - eps a / 4)) instead of 1 / a."""
    stiffness = 110.0
    found = run(at_origin(quadratic(1.0), 1), step_size=large / stiffness, seeds=range(2048), draws=60, burn_in=30)
    mean, error = mean_and_error(found.trace)
    truth = expected_quadratic([1.0], 100.0, 10.0)
    assert mean == pytest.approx(truth / (1.0 - large / 4.0), abs=4.0 * error)
    assert not agrees(found.trace, truth)


def test_draws_before_the_chain_has_spread_are_too_low():
    """Chains begin at the minimum itself: an average from the first draw on is the wrong one."""
    found = run(at_origin(quadratic(1.0), 1), step_size=4e-4, seeds=range(2048), draws=600)
    truth = expected_quadratic([1.0], 100.0, 10.0)
    assert float(found.trace[:, :50].mean()) < 0.7 * truth
    assert not agrees(found.trace[:, :200], truth)
    assert agrees(found.trace[:, 300:], truth)
    later = run(at_origin(quadratic(1.0), 1), step_size=4e-4, seeds=range(2048), draws=300, burn_in=300)
    assert torch.equal(later.trace, found.trace[:, 300:])


def test_rmsprop_allows_steps_that_are_too_large_for_sgld_where_curvatures_differ():
    target, truth = at_origin(quadratic(1.0, 30.0), 2), expected_quadratic([1.0, 30.0], 100.0, 1.0)
    plain, shaped = (
        run(target, 0, 100.0, 1.0, 1.5e-4, range(1024), draws=600, burn_in=500, check_every=20, sampler=sampler)
        for sampler in ("sgld", "rmsprop")
    )
    assert not agrees(plain.trace, truth)
    assert agrees(shaped.trace, truth)
    assert float(shaped.acceptance.mean()) > float(plain.acceptance.mean())


def test_one_weight_has_one_direction_and_rmsprop_is_sgld():
    target = at_origin(power(4), 1)
    plain, shaped = (run(target, burn_in=20, sampler=name, check_every=5) for name in ("sgld", "rmsprop"))
    torch.testing.assert_close(plain.trace, shaped.trace)
    torch.testing.assert_close(plain.acceptance, shaped.acceptance)


# Against numpy


def slow_chain(seed, curvatures, n_beta, gamma, eps, draws):
    """Trace and acceptance of one chain on a quadratic, by densities written out; the same normal numbers."""
    h = np.array(curvatures)
    w, stream, trace, accepted = np.zeros(h.size), Streams([seed], "cpu"), [], []

    def energy(w):
        return n_beta * (0.5 * h * w**2).sum() + 0.5 * gamma * (w**2).sum()

    def log_proposal(new, old):
        mean = old - 0.5 * eps * (n_beta * h * old + gamma * old)
        return -((new - mean) ** 2).sum() / (2.0 * eps)

    for _ in range(draws):
        trace.append(n_beta * (0.5 * h * w**2).sum())
        noise = stream.normal(h.size, DOUBLE)[0].numpy()
        new = w - 0.5 * eps * (n_beta * h * w + gamma * w) + np.sqrt(eps) * noise
        ratio = energy(w) - energy(new) + log_proposal(w, new) - log_proposal(new, w)
        accepted.append(min(1.0, np.exp(ratio)))
        w = new
    return np.array(trace), np.array(accepted)


@pytest.mark.parametrize("eps", [1e-4, 3e-3, 2e-2])
def test_steps_and_acceptance_are_those_of_a_slow_chain(eps):
    curvatures, seeds = (0.5, 1.0, 2.0), [3, 1 << 40]
    found = run(at_origin(quadratic(*curvatures), 3), 0, 50.0, 10.0, eps, seeds, draws=80, burn_in=17, check_every=4)
    for row, acceptance, seed in zip(found.trace, found.acceptance, seeds, strict=True):
        trace, accepted = slow_chain(seed, curvatures, 50.0, 10.0, eps, 97)
        np.testing.assert_allclose(row, trace[17:], rtol=1e-9)
        assert float(acceptance) == pytest.approx(accepted[17::4].mean(), rel=1e-9)


def test_acceptance_is_near_one_for_small_steps_and_one_half_for_large_ones():
    """Steps on a quadratic are reversible about a density of their own, so log ratios are symmetric about 0: the mean
    of min(1, ratio) tends to 1/2, not to 0, as steps and dimensions grow.
    """
    steps = torch.tensor([1e-5, 3e-4, 1e-3, 3e-3, 1.7e-2], dtype=DOUBLE).repeat_interleave(32)
    target = at_origin(lambda w: 0.5 * w.square().sum(-1), 200)
    rates = run(target, 0, 200.0, 10.0, steps, range(160), draws=100, burn_in=100, check_every=1).acceptance
    rates = rates.unflatten(0, (5, 32)).mean(1)
    assert (rates.diff() < 0.0).all()
    assert float(rates[0]) > 0.99
    assert float(rates[-1]) == pytest.approx(0.5, abs=0.02)
    assert torch.isnan(run(target).acceptance).all()


# Chains that are lost


def test_chains_that_diverge_are_counted_and_leave_the_others_alone():
    target, small, large = at_origin(power(4), 1), 1e-4, 0.2
    steps = [small, large, small, large, small]
    found = run(target, step_size=steps, seeds=range(5), draws=400, check_every=10)
    assert found.diverged.tolist() == [False, True, False, True, False]
    assert torch.isnan(found.trace[found.diverged]).all()
    assert torch.isnan(found.acceptance[found.diverged]).all()
    alone = run(target, step_size=small, seeds=[0, 2, 4], draws=400, check_every=10)
    assert equal((found.trace[::2], found.acceptance[::2]), (alone.trace, alone.acceptance))
    assert torch.isfinite(alone.trace).all()


def test_a_loss_that_is_not_finite_loses_the_chain():
    wall = at_origin(lambda w: torch.where(w[..., 0].abs() > 0.3, torch.nan, w[..., 0] ** 2), 1)
    found = run(wall, seeds=range(16), n_beta=1.0, gamma=0.0, step_size=1e-2, draws=30)
    assert found.diverged.any()
    assert not found.diverged.all()
    assert torch.equal(torch.isnan(found.trace).any(1), found.diverged)


# Minibatches


def rows(n, d, slope, level, seed=0):
    """Of mean 0."""
    generator = torch.Generator().manual_seed(seed)
    found = [size * torch.randn(n, k, dtype=DOUBLE, generator=generator) for size, k in ((slope, d), (level, 1))]
    slopes, levels = (values - values.mean(0) for values in found)
    return slopes, levels[:, 0]


@pytest.mark.parametrize("minibatch", [1, 8])
def test_noise_of_minibatches_heats_the_chain_as_theory_says(minibatch):
    """Slopes of variance v in the loss, redrawn each step, add eps n_beta^2 v / 4 to the noise, and no bias else."""
    eps, stiffness = 2e-3, 60.0
    data = rows(400, 1, 0.5, 3.0)
    target = at_origin(quadratic(1.0), 1, rows=data, minibatch=minibatch)
    found = run(target, 0, 50.0, 10.0, eps, range(2048), draws=400, burn_in=100)
    variance = float(data[0].square().mean()) / minibatch
    heat = (1.0 + eps * 50.0**2 * variance / 4.0) / (1.0 - eps * stiffness / 4.0)
    mean, error = mean_and_error(found.trace)
    assert mean == pytest.approx(heat * expected_quadratic([1.0], 50.0, 10.0), abs=4.0 * error)
    assert error < 0.02 * mean


def test_the_centre_on_the_same_minibatch_takes_the_examples_own_level_away():
    slopes, levels = rows(400, 1, 0.0, 3.0)
    flat = at_origin(quadratic(1.0), 1, rows=(slopes, 0.0 * levels), minibatch=4)
    paired = at_origin(quadratic(1.0), 1, rows=(slopes, levels), minibatch=4)
    apart = at_origin(quadratic(1.0), 1, rows=(slopes, levels), minibatch=4, paired=False)
    exact, good, bad = (run(target, seeds=range(64), draws=200).trace for target in (flat, paired, apart))
    torch.testing.assert_close(good, exact, rtol=0.0, atol=1e-10)
    assert float(bad.var()) > 100.0 * float(good.var())


# Whether chains have reached their density


@pytest.mark.parametrize("burn_in", [0, 30, 400])
def test_spread_grows_to_1_as_directions_widen(burn_in):
    """w <- (1 - eps k / 2) w + N(0, eps) has variance eps (1 - a^2t) / (1 - a^2) at draw t; one h is negative."""
    h, n_beta, gamma, eps, draws = np.array([0.0, 2.0, -0.05]), 100.0, 10.0, 2e-3, 100
    k = n_beta * h + gamma
    a = 1.0 - 0.5 * eps * k
    t = burn_in + np.arange(draws)[:, None]
    exact = (k * eps * (1.0 - a ** (2 * t)) / (1.0 - a**2)).mean()
    found = run(at_origin(quadratic(*h), 3), 0, n_beta, gamma, eps, range(2000), draws=draws, burn_in=burn_in).spread
    assert float(found.mean()) == pytest.approx(exact, abs=4.0 * float(found.std()) / 2000**0.5)
    assert exact < 0.75 if burn_in == 0 else exact > 0.99 if burn_in == 400 else 0.75 < exact < 0.99


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_heating_is_that_of_the_minibatches(sampler):
    """Of four directions two are noisy: their covariance is that of a row's slopes by the size of a minibatch, and the
    loss along these rises by as much more as heating says."""
    slopes, levels = rows(2000, 4, 2.0, 0.0)
    slopes[:, 2:] = 0.0
    n_beta, gamma, eps, h = 100.0, 100.0, 2e-4, 10.0
    target = at_origin(quadratic(h, h, 0.0, 0.0), 4, rows=(slopes, levels), minibatch=4)
    settings = {"draws": 1200, "burn_in": 300, "check_every": 6, "sampler": sampler}
    found = run(target, 0, n_beta, gamma, eps, range(100), **settings)
    cold = run(at_origin(quadratic(h, h, 0.0, 0.0), 4), 0, n_beta, gamma, eps, range(100), **settings)
    assert torch.equal(cold.heating, torch.zeros_like(cold.heating))
    heating, error = float(found.heating.mean()), float(found.heating.std()) / 10.0
    if sampler == "sgld":
        C = np.cov(slopes.numpy().T, bias=True) / 4
        exact = 0.25 * eps * n_beta**2 * np.trace(C @ C) / np.trace(C)
        assert heating == pytest.approx(exact, abs=4.0 * error)
        assert 0.3 < exact < 1.0
        assert float(found.trace.mean() / cold.trace.mean()) - 1.0 == pytest.approx(exact, rel=0.15)
    assert heating > 0.05


def test_heating_with_a_look_at_every_draw_counts_no_minibatch_twice():
    target = at_origin(quadratic(1.0, 1.0), 2, rows=rows(500, 2, 1.0, 0.0), minibatch=2)
    often, seldom = (
        run(target, step_size=1e-4, seeds=range(64), draws=600, check_every=every).heating for every in (1, 4)
    )
    assert float(often.mean()) == pytest.approx(float(seldom.mean()), rel=0.15)


# Independence, masks


def test_a_chain_is_the_same_in_any_company():
    target = at_origin(quadratic(1.0, 2.0, 0.5, 3.0, 1.0), 5, (1.0, 2.0, 0.5), rows=rows(50, 5, 0.1, 1.0), minibatch=3)
    order = np.random.default_rng(0).permutation(64)
    place, seeds = np.arange(64) % 3, [seed_of("chain", i) for i in range(64)]
    schedule = {"draws": 90, "burn_in": 10, "check_every": 7, "sampler": "rmsprop"}
    full = run(target, torch.tensor(place), seeds=seeds, **schedule)
    turned = run(target, torch.tensor(place[order]), seeds=[seeds[i] for i in order], **schedule)
    assert equal([value[order] for value in fields(full)], fields(turned))
    for i in (0, 17, 63):
        alone = run(target, int(place[i]), seeds=[seeds[i]], **schedule)
        assert equal([value[i : i + 1] for value in fields(full)], fields(alone))
        for name in ("spread", "heating"):
            torch.testing.assert_close(getattr(full, name)[i : i + 1], getattr(alone, name))


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_nothing_moves_under_a_mask_of_nothing(sampler):
    mask = {"w": torch.zeros(3, dtype=torch.bool)}
    found = run(at_origin(quadratic(1.0, 2.0, 3.0), 3), where=mask, burn_in=10, check_every=5, sampler=sampler)
    assert torch.equal(found.trace, torch.zeros_like(found.trace))
    assert torch.equal(found.acceptance, torch.ones_like(found.acceptance))
    assert not found.diverged.any()


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_masked_weights_stay_and_the_others_move_as_without_them(sampler):
    """A loss that is infinite as soon as the masked weight moves; the rest has its own expectation."""

    def value(w):
        return quadratic(1.0, 2.0)(w[..., :2]) + torch.where(w[..., 2] == 0.0, 0.0, torch.inf)

    mask = {"w": torch.tensor([True, True, False])}
    found = run(
        at_origin(value, 3), step_size=2e-4, seeds=range(1024), where=mask, draws=600, burn_in=300,
        check_every=200, sampler=sampler,
    )  # fmt: skip
    assert agrees(found.trace, expected_quadratic([1.0, 2.0], 100.0, 10.0))
    assert float(found.acceptance.min()) > 0.98


# Random numbers


def test_streams_have_the_moments_of_what_they_say():
    streams = Streams(range(100), "cpu")
    normal = torch.stack([streams.normal(20, DOUBLE) for _ in range(130)]).flatten().numpy()
    error = normal.size**-0.5
    assert abs(normal.mean()) < 4.0 * error
    assert abs(normal.var() - 1.0) < 4.0 * 2.0**0.5 * error
    assert abs((normal**4).mean() - 3.0) < 4.0 * 96.0**0.5 * error
    whole = torch.stack([streams.integers(7, 20) for _ in range(130)]).flatten()
    counts = torch.bincount(whole, minlength=7).numpy()
    assert counts.size == 7
    assert ((counts - whole.numel() / 7) ** 2 / (whole.numel() / 7)).sum() < 22.5  # chi^2, 6 degrees, 0.1%


def test_streams_of_neighbouring_seeds_and_draws_are_not_correlated():
    streams = Streams(range(40), "cpu")
    drawn = torch.stack([streams.normal(50, DOUBLE) for _ in range(80)], dim=1)  # [C, draws, size]
    by_seed = np.corrcoef(drawn.flatten(1).numpy())
    by_draw = np.corrcoef(drawn.transpose(0, 1).flatten(1).numpy())
    for found in (by_seed, by_draw):
        apart = found[np.triu_indices(len(found), 1)]
        count = drawn.numel() / len(found)
        assert np.abs(apart).max() < 5.0 / count**0.5
        assert apart.std() == pytest.approx(count**-0.5, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_stream_is_its_seeds_alone(dtype):
    def drawn(seeds):
        streams = Streams(seeds, "cpu")
        return [(streams.normal(3, dtype), streams.integers(10, 5)) for _ in range(150)]

    together, turned = drawn([5, 6, 7]), drawn([7, 5])
    for (a, b), (c, d) in zip(together, turned, strict=True):
        assert (a.dtype, a.shape, b.dtype, b.shape) == (dtype, (3, 3), torch.int64, (3, 5))
        assert torch.equal(a[[2, 0]], c)
        assert torch.equal(b[[2, 0]], d)
    assert len({float(a[0, 0]) for a, _ in together}) == 150


def test_what_a_stream_gives_does_not_depend_on_how_it_is_used():
    """Blocks ahead are a matter of speed: a draw is not changed in place, and sizes do not mix."""
    streams = Streams([1], "cpu")
    first = streams.normal(4, DOUBLE)
    kept = first.clone()
    others = [streams.normal(4, DOUBLE) for _ in range(100)]
    assert torch.equal(first, kept)
    assert not any(torch.equal(first, other) for other in others)
    assert streams.normal(9, DOUBLE).shape == (1, 9)
    assert streams.normal(1 << 17, torch.float32).shape == (1, 1 << 17)


def test_seeds_are_those_of_their_parts():
    assert seed_of("a", 1) == seed_of("a", 1)
    seeds = [seed_of(*parts) for parts in (("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), (1, "a"))]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)
