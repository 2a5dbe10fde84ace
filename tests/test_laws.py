"""Laws across a planted sweep, and what the report says of them."""

import dataclasses
import json

import numpy as np
import pytest

from cluster import claims
from cluster.law_sections import LAW_PANELS, LawSections
from cluster.laws import (
    BEST,
    HEADS,
    MEMBERS,
    RATE,
    Series,
    best_rates,
    head_times,
    laws_of,
    laws_or_cause,
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
    assert best_rates(members) == best_rates(falling.members) == {16: 0.004, 24: 0.004, 40: 0.001, 64: 0.001}


def test_a_rate_at_which_most_members_diverge_is_not_the_best(falling):
    members = falling.members.copy()
    worse = members.index[(members["width"] == 16) & (members[RATE] == 0.004)][:5]
    members.loc[worse, ["outcome", "validation_loss"]] = ["diverged", np.nan]
    assert best_rates(members)[16] == 0.001
    members["validation_loss"] = members["validation_loss"].where(members["width"] != 24)
    assert set(best_rates(members)) == {16, 40, 64}
    found = series_from(dataclasses.replace(falling, members=members))[-1]
    assert found.widths == [16, 40, 64]
    assert (found.members["outcome"] == "finished").all()


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
    assert "In each of 2 settings, and at each width's best learning rate, the level of heads falls" in claims.verdict(
        laws, HEADS
    )
    assert "this is no law of width" in claims.verdict(laws[:1], HEADS)
    assert "width 16: 0.004" in claims.rates_line(laws[-1], RATES)
    assert "at the edge" in claims.rates_line(laws[-1], RATES)


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


def sections(analysis, folder):
    found = series_from(analysis)
    laws = [laws_of(each) for each in found]
    return LawSections(folder=folder, laws=laws, series={each.name: each for each in found}).all()


def test_sections_of_a_planted_sweep(falling, tmp_path):
    found = {section.title: section for section in sections(falling, tmp_path)}
    pictures = {title: len(section.pictures) for title, section in found.items()}
    assert pictures == {
        "Laws of width": 1, "Heads that have not emerged yet": 1, "Approach to the plateau": 1, "Late heads": 0,
        "Collapse": 1, "Heads that matter": 0,
    }  # fmt: skip
    assert all(len(section.lines) >= 3 for section in found.values())
    assert sum(picture.panels for section in found.values() for picture in section.pictures) <= LAW_PANELS


@pytest.mark.parametrize("widths", [(16,), (16, 24), WIDTHS])
def test_sections_where_nothing_emerges(widths, tmp_path):
    analysis = planted_sweep(share=0.0, widths=widths)
    found = sections(analysis, tmp_path)
    text = " ".join(line for section in found for line in section.lines)
    assert ("Nothing is claimed" in text) is (len(widths) > 1)  # one width is not asked for a law of width
    assert len(widths) > 1 or "No curve is drawn: no event" in text
    assert "nan" not in text and "None" not in text


def test_exponents_are_of_heads_that_prefer_a_power_law(falling):
    heads = falling.heads.copy()
    others = heads.index[heads["relaxation_law"] == "power"][::2]
    heads.loc[others, "relaxation_law"] = "exponential"
    whole, half = (
        laws_of(series_from(dataclasses.replace(falling, heads=table))[0])["relaxation"]
        for table in (falling.heads, heads)
    )
    assert 0.4 < half["told"] / whole["told"] < 0.6
    assert half["heads"] == whole["heads"]


def test_reasons_are_counted_whatever_their_figures(falling):
    heads = falling.heads.copy()
    risen = heads.index[heads["relaxation_law"] == "power"]
    heads.loc[risen, "relaxation_refusal"] = [f"{i / 100:.2f} decades, under 1" for i in range(len(risen))]
    found = laws_of(series_from(dataclasses.replace(falling, heads=heads))[0])
    assert list(found["relaxation"]["refusals"]) == ["… decades, under …"]
    assert "No head has a power law" in claims.relaxation_line(found)


def test_a_share_that_a_few_members_decide_is_no_trend(falling):
    heads = falling.heads.assign(status="emerged", level=falling.heads["level"].fillna(200.0))
    heads.loc[heads["member_id"] == "24-0.001-0", "level"] = np.nan
    found = laws_of(series_from(dataclasses.replace(falling, heads=heads))[0])
    assert "too few members to speak of a trend" in claims.share_line(found, HEADS) or "cannot" in claims.share_line(
        found, HEADS
    )
    assert not claims.trend_told(found, HEADS)


def test_a_tail_cut_off_by_the_end_of_the_runs_is_not_held_against_a_power_law():
    """Pareto times over three decades, seen to the end of the runs only."""
    rng = np.random.default_rng(0)
    analysis = planted_sweep(share=1.0, seeds=60, widths=(16,), rates=(0.001,))
    level = 10 * (1 - rng.random(len(analysis.heads))) ** -1.0
    heads = analysis.heads.assign(level=np.where(level < LAST, level, np.nan))
    heads.loc[heads["level"].isna(), "status"] = "never"
    found = laws_of(series_from(dataclasses.replace(analysis, heads=heads))[0])["tail"]
    assert found["refusal"] == ""
    assert found["verdict"] != "not a power law"
    assert min(found["survival"]) < 0.01


def test_a_series_that_fails_does_not_take_the_others_with_it(falling, tmp_path, monkeypatch):
    found = series_from(falling)
    broken = dataclasses.replace(found[0], curves=found[0].curves.drop(columns="lift"))
    laws = [laws_or_cause(each) for each in (broken, found[1])]
    assert "failed" in laws[0] and "failed" not in laws[1]
    failed = {laws[0]["series"]: laws[0]["failed"]}
    series = {each.name: each for each in found}
    first = LawSections(folder=tmp_path, laws=claims.sound_laws(laws), series=series, failed=failed).all()[0]
    assert any("could not be worked out: KeyError" in line for line in first.lines)
