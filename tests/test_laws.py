"""Laws across a planted sweep, and what the report says of them."""

import dataclasses
import json

import numpy as np
import pytest

from cluster import claims
from cluster.laws import (
    BEST,
    HEADS,
    MEMBERS,
    RATE,
    Series,
    at_best_rate,
    head_times,
    laws_of,
    member_times,
    plain,
    series_of,
)
from tests.planted_sweep import AXES, LAST, RATES, WIDTHS, planted_sweep


def series_from(analysis, cluster="member_id"):
    return series_of(analysis.members, analysis.heads, analysis.detectors, AXES, "collision", cluster)


@pytest.fixture(scope="module")
def falling():
    """The same law at both rates."""
    return planted_sweep()


@pytest.fixture(scope="module")
def laws(falling):
    return [laws_of(each) for each in series_from(falling)]


def test_a_series_for_each_rate_and_one_of_best_rates(falling):
    found = series_from(falling)
    assert [each.name for each in found] == [f"{RATE} 0.001", f"{RATE} 0.004", BEST]
    for each, rate in zip(found, RATES, strict=False):
        assert set(each.members[RATE]) == {rate}
        assert set(each.heads["member_id"]) == set(each.members["member_id"])
    best = found[-1].members.groupby("width")[RATE].unique().map(list).to_dict()
    assert best == {16: [0.004], 24: [0.004], 40: [0.001], 64: [0.001]}


def test_best_rates_are_chosen_by_loss_and_not_by_level(falling):
    members = falling.members.copy()
    members["level"] = np.random.default_rng(0).permutation(members["level"])
    assert at_best_rate(members)["member_id"].tolist() == at_best_rate(falling.members)["member_id"].tolist()


def test_without_other_axes_there_is_one_series(falling):
    one = falling.members[falling.members[RATE] == RATES[0]]
    (found,) = series_of(one, falling.heads, falling.detectors, ("width",), "collision", "seed")
    assert (found.name, found.cluster, found.widths) == ("", "seed", list(WIDTHS))
    assert len(found.heads) == 8 * len(one)
    assert series_of(one, falling.heads, falling.detectors, ("width",), "near", "seed") == []
    assert (
        series_of(one.assign(outcome="failed"), falling.heads, falling.detectors, ("width",), "collision", "seed") == []
    )


def test_times_are_levels_or_the_last_step():
    analysis = planted_sweep(seeds=1, widths=(16,), rates=(0.001,))
    heads = analysis.heads.iloc[:3].assign(level=[100.0, np.nan, 0.5])
    (series,) = series_from(dataclasses.replace(analysis, heads=heads))
    times = head_times(series)
    assert times.status.tolist() == ["emerged", "never", "at_start"]
    assert times.time.tolist() == [100, LAST, 0.5]
    for level, status, time in ((np.nan, "never", LAST), (0.5, "at_start", 0.5), (70.0, "emerged", 70.0)):
        own = member_times(dataclasses.replace(series, members=analysis.members.assign(level=[level])))
        assert (own.status.tolist(), own.time.tolist()) == ([status], [time])


def test_the_planted_law_is_found(laws):
    for found in laws:
        law = found[HEADS]["law"]
        assert law["refusal"] == ""
        assert law["low"] - 0.05 < 0.5 < law["high"] + 0.05
        assert law["high"] - law["low"] < 0.3
        assert all(low < 0.8 < high for low, high in zip(law["shares"]["low"], law["shares"]["high"], strict=True))
        assert found[HEADS]["log_rank"]["p_value"] < 0.01
        assert found["collapse"]["low"] - 0.1 < 0.5 < found["collapse"]["high"] + 0.1
        assert found["collapse"]["S"] < 0.3 * found["collapse"]["S_before"]
        assert found["relaxation"]["one_value"]["p_value"] > 0.01
        assert found["matter"]["16"] == [2.0, 2.0, 2.0]
    assert laws[0]["members"] == 32 and laws[0]["heads"] == 256 and laws[0]["clusters"] == 32
    assert "In each of 3 series" in claims.verdict(laws, HEADS)
    assert "falls" in claims.verdict(laws, HEADS)


def test_no_law_is_claimed_whose_sign_changes():
    found = [laws_of(each) for each in series_from(planted_sweep((0.6, -0.6)))]
    assert "its sign differs" in claims.verdict(found, HEADS)


def test_no_law_is_claimed_that_holds_in_one_series_only():
    found = [laws_of(each) for each in series_from(planted_sweep((0.6, 0.0), seed=3))]
    assert "No general law" in claims.verdict(found, HEADS)


def test_few_members_carry_nothing_and_the_words_say_why():
    small = series_from(planted_sweep(seeds=2, widths=(16, 24), rates=(0.001,)))
    found = [laws_of(each) for each in small]
    assert claims.verdict(found, MEMBERS).startswith("Nothing is claimed")
    for line in (claims.law_line, claims.survival_line, claims.tail_line, claims.collapse_line, claims.relaxation_line):
        text = line(found[0], MEMBERS) if line is claims.law_line else line(found[0])
        assert "nan" not in text and "None" not in text
    assert "2 widths, fewer than 3" in claims.law_line(found[0], MEMBERS)
    assert len(claims.law_rows(found).rows) == 2


def test_laws_are_strict_json_and_their_words_are_those_of_what_was_stored(laws):
    text = json.dumps(laws, allow_nan=False)
    again = json.loads(text)
    for line in (
        claims.survival_line,
        claims.tail_line,
        claims.collapse_line,
        claims.relaxation_line,
        claims.matter_line,
    ):
        assert [line(found) for found in again] == [line(found) for found in laws]
    assert claims.law_rows(again).rows == claims.law_rows(laws).rows


def test_words_name_window_method_interval_and_numbers(laws):
    text = claims.law_line(laws[0], HEADS)
    for part in (
        "90% interval",
        "mixture-cure",
        "256 heads",
        "32 clusters",
        "widths 16 to 64 (0.60 decades)",
        "Held out",
    ):
        assert part in text, part
    assert "g = 0." in claims.collapse_line(laws[0])


def test_plain_leaves_nothing_that_json_lacks():
    value = {"a": np.float64(1.5), 2: np.array([np.nan, 1]), "c": (np.int64(3), float("inf")), "d": None, "e": np.True_}
    assert plain(value) == {"a": 1.5, "2": [None, 1.0], "c": [3, None], "d": None, "e": True}


def test_best_rates_are_shown_first(laws):
    assert [found["series"] for found in claims.ordered(laws, 2)] == [BEST, f"{RATE} 0.001"]


def test_a_series_is_named_even_where_nothing_else_is_swept():
    assert claims.named({"series": ""}) == "all members"
    assert Series.__slots__
