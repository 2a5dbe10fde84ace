"""`probes.survival` against lifelines, scipy, and every arrangement gone through by hand."""

import tracemalloc
import warnings
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import CensoredData, ecdf, kstest, linregress, logrank

from probes.survival import kaplan_meier, log_rank_scores, permutation_test
from tests import planted_scaling_coverage as planted
from tests.planted_scaling import sweep

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import KaplanMeierFitter


def drawn(truth=planted.ONE, seed=0):
    return sweep(truth, np.random.default_rng(seed))


# Kaplan-Meier


def test_survival_is_that_of_lifelines_and_scipy():
    found = drawn()
    curve, event = kaplan_meier(found.time, found.status, found.cluster), np.isin(found.status, ("emerged", "at_start"))
    other = KaplanMeierFitter().fit(found.time, event)
    assert curve.survival == pytest.approx(other.survival_function_at_times(curve.times).to_numpy(), abs=1e-12)
    assert curve.median == other.median_survival_time_ or np.isinf(other.median_survival_time_)
    third = ecdf(CensoredData(uncensored=found.time[event], right=found.time[~event])).sf
    assert curve.survival == pytest.approx(third.evaluate(curve.times), abs=1e-12)
    assert curve.at_risk[0] == (found.time >= curve.times[0]).sum()
    assert curve.events.sum() == event.sum()


def test_ties_and_a_plateau_by_hand():
    curve = kaplan_meier(
        [1, 2, 2, 2, 3, 9, 9, 9], ["at_start", "emerged", "transient", "growing", "emerged", *["never"] * 3]
    )
    assert curve.times.tolist() == [1, 2, 3]
    assert curve.survival == pytest.approx([7 / 8, 7 / 8 * 5 / 7, 7 / 8 * 5 / 7 * 3 / 4])
    assert curve.median == 3
    assert (curve.low < curve.survival)[1:].all()
    assert (curve.high > curve.survival)[1:].all()


def test_intervals_are_a_jackknife_over_clusters():
    found = drawn(planted.HALF)
    curve = kaplan_meier(found.time, found.status, found.cluster)
    at = curve.times.size // 2
    left = []
    for c in range(found.cluster.max() + 1):
        rest = found.cluster != c
        less = kaplan_meier(found.time[rest], found.status[rest], found.cluster[rest])
        left.append(less.survival[np.searchsorted(less.times, curve.times[at], side="right") - 1])
    odds = np.log(-np.log(left))
    error = np.sqrt((odds.size - 1) * odds.var())
    half = 0.5 * (np.log(-np.log(curve.low[at])) - np.log(-np.log(curve.high[at])))
    assert half / error == pytest.approx(1.6955, abs=1e-3)  # Student's t, 31 degrees of freedom, 95%


def test_heads_taken_as_independent_give_too_narrow_a_curve():
    found = drawn(replace(planted.HALF, together=0.8))
    honest, naive = kaplan_meier(*found.rows[1:]), kaplan_meier(*found.rows[1:3])
    middle = honest.times.size // 2
    assert (honest.high - honest.low)[middle] > 1.4 * (naive.high - naive.low)[middle]


def test_without_an_interval_any_number_of_clusters_has_a_curve():
    found = drawn()
    curve, plain = (kaplan_meier(found.time, found.status, confidence=level) for level in (0.9, None))
    assert plain.survival.tolist() == curve.survival.tolist()
    assert np.isnan([*plain.low, *plain.high]).all()
    assert kaplan_meier([2.0, 3.0], ["emerged", "never"], [0, 0], confidence=None).median == 2.0


def test_a_curve_of_many_heads_takes_little_memory():
    rng = np.random.default_rng(0)
    tracemalloc.start()
    kaplan_meier(rng.random(5000) + 1.0, ["emerged"] * 5000, np.arange(5000) % 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7


@pytest.mark.parametrize(("status", "clusters", "reason"), [("never", 5, "no event"), ("emerged", 3, "3 clusters")])
def test_a_curve_is_refused(status, clusters, reason):
    curve = kaplan_meier([5.0] * 6, [status] * 6, np.arange(6) % clusters)
    assert reason in curve.refusal
    assert np.isnan(curve.median)
    assert curve.survival.size == 0


def test_malformed_times_are_named():
    with pytest.raises(ValueError, match=r"time\[1\] is nan; allowed: finite numbers above 0"):
        kaplan_meier([1.0, np.nan], ["emerged"] * 2)


# Permutation tests


def test_every_arrangement_of_members_is_counted():
    rng = np.random.default_rng(0)
    width, value = np.repeat([16.0, 32.0, 64.0], [3, 2, 2]), rng.normal(size=7)
    slopes = np.array([linregress(np.log(w), value).slope for w in set(permutations(width))])
    found = permutation_test(width, value, np.arange(7))
    assert (found.exact, found.arrangements, found.paired) == (True, 210, False)
    assert len(slopes) == 210
    assert found.statistic == pytest.approx(linregress(np.log(width), value).slope)
    assert found.p_value == pytest.approx((np.abs(slopes) >= abs(found.statistic) - 1e-12).mean())


def test_every_arrangement_within_seeds_is_counted():
    rng = np.random.default_rng(1)
    x, value = np.log([8.0, 16.0, 32.0]), rng.normal(size=(4, 3)) + rng.normal(size=(4, 1))
    slopes = [linregress(np.concatenate(p), value.ravel()).slope for p in product(permutations(x), repeat=4)]
    found = permutation_test(np.tile([8.0, 16.0, 32.0], 4), value.ravel(), np.repeat(np.arange(4), 3))
    assert (found.exact, found.arrangements, found.paired) == (True, 1296, True)
    assert found.p_value == pytest.approx((np.abs(slopes) >= abs(found.statistic) - 1e-12).mean())


def test_seeds_that_lack_a_width_are_left_out():
    width, value = np.tile([8.0, 16.0, 32.0], 4), np.random.default_rng(1).normal(size=12)
    seeds = np.repeat(["d", "a", "b", "c"], 3)
    some = np.arange(12) != 1
    found = permutation_test(width[some], value[some], seeds[some])
    whole = permutation_test(width[3:], value[3:], seeds[3:])
    assert (found.left_out, found.paired, found.arrangements) == (1, True, 216)
    assert (found.statistic, found.p_value, whole.left_out) == (whole.statistic, whole.p_value, 0)


def test_heads_are_averaged_before_and_random_arrangements_agree_with_all():
    rng = np.random.default_rng(2)
    width = np.repeat([16.0, 32.0, 64.0], 3)
    value = rng.normal(size=9) - 0.5 * np.log(width)
    exact = permutation_test(width, value, np.arange(9), statistic="spread")
    rows = permutation_test(
        np.tile(width, 2), np.concatenate([value - 1, value + 1]), np.tile(np.arange(9), 2), statistic="spread"
    )
    assert rows.p_value == exact.p_value
    many = permutation_test(np.repeat(width, 4), np.repeat(value, 4), np.arange(36))
    assert not many.exact
    assert many.p_value >= 1 / 10_000


def test_random_arrangements_agree_with_all(monkeypatch):
    rng = np.random.default_rng(3)
    width, value = np.repeat([16.0, 32.0, 64.0], 3), rng.normal(size=9) - 0.3 * np.repeat([0, 1, 2], 3)
    exact = permutation_test(width, value, np.arange(9))
    monkeypatch.setattr("probes.survival.EXACT", 100)
    drawn = permutation_test(width, value, np.arange(9))
    assert (exact.exact, drawn.exact) == (True, False)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * np.sqrt(exact.p_value / 9999))
    seeds = np.repeat(np.arange(3), 3)
    paired = permutation_test(np.tile([16.0, 32.0, 64.0], 3), value, seeds)
    monkeypatch.undo()
    assert paired.p_value == pytest.approx(
        permutation_test(np.tile([16.0, 32.0, 64.0], 3), value, seeds).p_value, abs=0.02
    )


def test_scores_of_two_groups_make_the_log_rank_test():
    found = drawn(replace(planted.HALF, widths=(16.0, 32.0), shares=(0.6, 0.6)))
    score, event = log_rank_scores(found.time, found.status), found.status == "emerged"
    assert score.sum() == pytest.approx(0.0, abs=1e-9)
    data = [
        CensoredData(uncensored=found.time[event & (found.width == w)], right=found.time[~event & (found.width == w)])
        for w in (16.0, 32.0)
    ]
    numerator = score[found.width == 16.0].sum()  # observed less expected
    statistic = logrank(*data).statistic
    assert np.sign(statistic) == np.sign(numerator)
    assert abs(numerator / statistic) == pytest.approx(np.sqrt((score**2).sum() / 4), rel=0.2)  # its standard error


def test_p_values_are_uniform_without_a_difference_and_heads_as_members_are_not():
    truth = replace(planted.HALF, exponent=0.0, constant=300.0, together=0.6, seeds=5, heads=4)
    ours, wrong = [], []
    for seed in range(100):
        found = drawn(truth, seed)
        score = log_rank_scores(found.time, found.status)
        ours.append(permutation_test(found.width, score, found.cluster, draws=199, seed=seed).p_value)
        wrong.append(permutation_test(found.width, score, np.arange(score.size), draws=199, seed=seed).p_value)
    assert kstest(ours, "uniform").pvalue > 0.01
    assert np.mean(np.array(wrong) < 0.1) > 0.2


@pytest.mark.parametrize(("width", "value", "cluster", "reason"), [
    ([16] * 6, range(6), range(6), "one width"),
    ([16, 32, 64, 16, 32, 64], range(6), [0, 0, 1, 1, 2, 3], "neither"),
    ([16, 16, 32], range(3), range(3), "3 clusters, fewer than 4"),
    ([16, 32], range(2), [0, 0], "1 cluster at all widths, fewer than 2"),
    ([16, 16, 32, 32], [1] * 4, range(4), "equal"),
])  # fmt: skip
def test_a_test_is_refused(width, value, cluster, reason):
    found = permutation_test(width, value, cluster)
    assert reason in found.refusal
    assert np.isnan([found.statistic, found.p_value]).all()


def test_malformed_arguments_of_a_test_are_named():
    with pytest.raises(ValueError, match=r"value\[2\] is nan; allowed: finite numbers"):
        permutation_test([16, 32, 64], [1, 2, np.nan], [0, 1, 2])
    with pytest.raises(ValueError, match="statistic is 'rank'; allowed: slope, spread"):
        permutation_test([16, 32], [1, 2], [0, 1], statistic="rank")
