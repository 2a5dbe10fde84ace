"""Searches: spaces, objectives, Optuna's say in Tune, what a broken-off driver leaves behind, and a whole search."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from mlflow.exceptions import MlflowException
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from rich.console import Console

from cluster import dispatch, search_results, tracking, trial
from cluster import search as searches
from cluster import searcher as searching
from cluster import store as stores
from cluster.analysis import analyze_member
from cluster.arguments import parse, sweep_form
from cluster.commands import status_command
from cluster.driver import Desk, Settings
from cluster.objectives import OBJECTIVES, WORST_SECONDS, Verdict, judge, without_pauses
from cluster.recipes import load_sweep, quick, tiny
from cluster.search import held_study, open_study, storage_url
from cluster.search_config import parse_search
from cluster.search_results import winner_command
from cluster.searcher import Searcher, StudySearcher, finished, make_sampler, recover
from cluster.sizing import Room
from cluster.space import parse_space, point_of
from cluster.sweep import Pack, Sweep, validate
from cluster.trial import TrialSink, capped, point_config
from cluster.workshop import Workshop
from tests.test_analysis import STEPS, U, planted_curves, tables_of
from tests.test_pack import MEMBERS
from train.config import WIDTH_UNIT

RATE = "train.learning_rate"
PLACE = tracking.Place(uri="u", experiment="1", parent="p")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def space_of(*items, **changes):
    return parse_space(items, dataclasses.replace(quick(), **changes))


def test_a_space_knows_its_fields_types_and_scales():
    rate, width, batch, clip, mup, box = space_of(
        f"{RATE}=1e-4..1e-2:log", "model.width=16..128:log", "train.batch_size=16,32,64", "train.clip=None,1",
        "model.parametrization=standard,mup", "system.box.restitution=0.5..0.9",
    )  # fmt: skip
    assert rate.distribution == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert (rate.param, rate.ends, rate.log) == (RATE, (1e-4, 1e-2), True)
    # widths split into 4 heads: multiples of 4 alone are suggested
    assert width.distribution == optuna.distributions.IntDistribution(4, 32, log=True)
    assert (width.param, width.ends, width.value({"model.width/4": 7})) == ("model.width/4", (16, 128), 28)
    assert batch.ends == (16, 32, 64)
    assert clip.ends == (None, 1)
    assert mup.ends == ("standard", "mup")
    assert (box.log, box.ends) == (False, (0.5, 0.9))


def test_widths_step_by_all_numbers_of_heads_and_as_told():
    (width, _) = space_of("model.width=24..48", "model.heads=2,4,8")
    assert (width.step, width.ends) == (8, (24, 48))
    assert space_of("model.width=16..64:16")[0].param == "model.width/16"
    assert space_of("model.width=16..64", "model.heads=1..8")[0].step == WIDTH_UNIT
    assert space_of("model.width=16..64", "model.heads=1,2")[0].step == WIDTH_UNIT
    assert space_of("train.steps=100..400:50:log")[0].ends == (100, 400)


BAD_SPACES = [
    ([], "at least one field"),
    ([RATE], "each name once"),
    ([f"{RATE}=1..2", f"{RATE}=1..3"], "each name once"),
    (["trian.steps=1..2"], "space: 'trian' is unknown; did you mean 'train'?"),
    (["train.learning_rat=1..2"], "space: train: 'learning_rat' is unknown; did you mean 'learning_rate'?"),
    (["system.box.m=1..2"], "space: system.box: 'm' is unknown"),
    (["train=1,2"], "it must be a field of train"),
    (["train.steps.more=1,2"], "a field with a value of its own"),
    (["system.relation=near,collision"], "one for the whole search"),
    ([f"{RATE}=2..1"], "from a lower to a higher number"),
    ([f"{RATE}=0..1:log"], "above 0 where it is searched in logarithms"),
    ([f"{RATE}=1..2:linear"], "NAME=LOW..HIGH"),
    ([f"{RATE}=low..high"], "NAME=LOW..HIGH"),
    ([f"{RATE}=0.1..0.2:2"], "without a step"),
    (["train.batch_size=1.5..3"], "a range of what the field takes"),
    (["train.batch_size=8..24:16"], "between multiples of its step, 16"),
    (["model.width=18..64"], "between multiples of its step, 4"),
    (["train.batch_size=16,16"], "without repeats"),
    (["train.batch_size=16"], "more than one value"),
    (["train.optimizer=adam,lion"], "space: train.optimizer: 'lion' is not allowed"),
    ([f"{RATE}=-1..1"], f"space: {RATE} = -1.0: learning_rate: -1.0 is not allowed; it must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("items", "message"), BAD_SPACES, ids=[" ".join(items) for items, _ in BAD_SPACES])
def test_a_wrong_space_is_one_line_that_names_it(items, message):
    with pytest.raises(ValueError) as error:
        space_of(*items)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


BAD_SEARCHES = [
    (["quick", "--space", f"{RATE}=1e-4..1e-2"], "widths: (32, 64) is not allowed; it must be one width, or searched"),
    (["width", "--space", "model.width=16..64"], "axes: 'model.parametrization, train.learning_rate' is not allowed"),
    (["quick", "--space", "model.width=16..64", "--prune", "--objective", "validation_loss", "--seeds", "4",
      "--pack-size", "2"], "pack_size: 2 is not allowed; it must be at least the 4 seeds of a point where --prune"),
    (["quick", "--space", "model.width=16..64", "--prune"],
     "prune: True is not allowed; it must be left out: points are stopped by their validation loss"),
    (["quick", "--space", "model.width=16..64", "--prune", "--objective", "validation_loss", "seconds"],
     "says nothing"),
    (["quick", "--space", "model.width=16..64", "--space", "train.steps=100..4000", "--prune", "--objective",
      "validation_loss"], "train.steps is searched: points share no probe steps"),
    (["quick", "--space", "model.width=16..64", "--points", "0"], "points: 0 is not allowed"),
    (["quick", "--space", "model.width=16..64", "--objective", "loss"], "invalid choice"),
    (["quick", "--space", "model.width=16..64", "--objective", "level", "level"], "without repeats"),
    (["quick", "--space", "model.width=16..64", "--study", "a/b"], "a non-empty name without /"),
    (["quick", "--space", "model.width=16..64", "--redo"], "redo: True is not allowed"),
    (["quick", "--widths", "30", "--model.heads", "5", "--space", "model.heads=4,7"],
     "none of 200 points drawn at random is possible; the last: width: 30 is not allowed"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_SEARCHES, ids=[" ".join(each) for each, _ in BAD_SEARCHES])
def test_a_wrong_search_is_refused_before_anything_starts(arguments, message, tmp_path):
    with pytest.raises(ValueError) as error:
        parse_search(arguments)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_point_is_a_sweep_whose_id_is_its_parameters():
    base = dataclasses.replace(quick(), seeds=2)
    space = space_of(f"{RATE}=1e-4..1e-2:log", "model.width=16..128:log")
    points = [point_of(base, space, {RATE: rate, "model.width/4": units}, "s") for rate, units in
              ((1e-3, 4), (1e-3, 8), (2e-3, 4), (1e-3, 4))]  # fmt: skip
    assert [point.widths for point in points] == [(16,), (32,), (16,), (16,)]
    assert points[2].train.learning_rate == 2e-3
    assert len({point.id for point in points}) == 3
    assert points[0].id == points[3].id
    assert len(points[0].members()) == 2
    assert {member.config.model.width for member in points[1].members()} == {32}
    with pytest.raises(ValueError, match="width: 18 is not allowed; it must be a multiple of 4"):
        point_of(dataclasses.replace(base, widths=(18,)), space[:1], {RATE: 1e-3}, "s")


def planted_row(level):
    """A member's row from planted tables: with its detector, or with every head at uniform attention."""
    curves = planted_curves()
    if not level:
        for values in curves.probes["attention"].values["score"]:
            values[...] = U * (1 + 0.001 * np.random.default_rng(0).standard_normal(values.shape))
    return analyze_member(*tables_of(curves), "collision")[1]


def test_a_member_that_never_gets_there_counts_as_twice_the_last_step_and_is_flagged():
    sweep = dataclasses.replace(quick(), train=dataclasses.replace(quick().train, steps=STEPS[-1]))
    there, never = planted_row(True), planted_row(False)
    assert math.isnan(never["level"])
    expected = 100 / 3 ** (1 / 3)  # see tests/test_analysis.py
    found = judge(["level"], [there, never], sweep)
    assert found.values[0] == pytest.approx(math.sqrt(expected * 2 * 3000), rel=0.03)
    assert found.attrs == {"never": 1, "diverged": 0}
    assert judge(["level"], [never, never], sweep).values == (pytest.approx(6000.0),)
    assert judge(["level"], [{**there, "level": 0.0}], sweep).values == (pytest.approx(0.5),)  # step 0 on the log axis


def test_diverged_members_take_the_worst_value_of_every_objective_and_all_are_finite():
    sweep, gone = quick(), {"diverged": True}
    row = {"level": 100.0, "validation_loss": 0.2, "heads_that_matter": 3, "seconds": 40.0}
    names = list(OBJECTIVES)
    assert judge(names, [row, row | {"seconds": 50.0}], sweep).values == pytest.approx((100.0, 0.2, 3.0, 50.0))
    trivial = sweep.system.floors().trivial
    found = judge(names, [gone, gone], sweep)
    assert found.values == pytest.approx((2 * sweep.train.steps, trivial, 0.0, WORST_SECONDS))
    assert found.attrs == {"never": 0, "diverged": 2}
    assert judge(["seconds"], [row | {"level": math.nan}], sweep).attrs == {"diverged": 0}
    one = judge(names, [row, gone, row], sweep)
    assert one.values == pytest.approx(((100.0**2 * 8000) ** (1 / 3), 0.2, 2.0, WORST_SECONDS))
    assert [capped(loss, sweep.system) for loss in (0.3, 7.0, math.nan, math.inf)] == [0.3, trivial, trivial, trivial]


def test_pauses_between_attempts_are_no_wall_time():
    times = [0.0, 1.0, 3.0, 3.5, 903.5, 905.5, 906.5]
    assert without_pauses(times, 0) == 906.5
    assert without_pauses(times, 1) == 6.5 + 2  # the gap of 900 s counts as the next longest, 2 s
    assert without_pauses([5.0], 3) == without_pauses([], 1) == 0.0
    assert without_pauses([0.0, 2.0, 9.0], 5) == 4.0


class Bench:
    """Points that are trained at once, in the head. bad: of the points that end, which fail; away: calls that do."""

    def __init__(self, rooms=1, bad=(), impossible=lambda params: False):
        self.rooms, self.bad, self.impossible = rooms, set(bad), impossible
        self.begun, self.done, self.away, self.ended = [], {}, 0, 0

    def room(self):
        return self.rooms

    def identity(self, params):
        if self.impossible(params):
            raise ValueError("it does not fit")
        return json.dumps(params)

    def begin(self, params, number):
        if self.away:
            self.away -= 1
            raise MlflowException("away")
        if json.dumps(params) in self.done:
            return None
        self.begun.append(dict(params))
        return {"point": json.dumps(params)}

    def end(self, params, pruned=False):
        if self.away:
            self.away -= 1
            raise MlflowException("away")
        self.ended += 1
        if self.ended in self.bad:
            return Verdict(cause="bad weather")
        if pruned:
            return Verdict(cause="pruned")
        self.done[json.dumps(params)] = True
        return Verdict(values=(value_of(params),), attrs={"never": 0})


def value_of(params):
    return sum(math.log(value) ** 2 if isinstance(value, float) else float(value) for value in params.values())


SPACE = (f"{RATE}=1e-4..1e-2:log", "train.batch_size=16..64")


def study_of(tmp_path=None, sampler="tpe", **options):
    storage = f"sqlite:///{tmp_path}/optuna.db" if tmp_path else None
    return optuna.create_study(study_name="s", storage=storage, sampler=make_sampler(sampler, 3, 0), **options)


def tune(searcher, at_once=1):
    """The part of Tune that matters to a searcher: trials end in the order in which they began."""
    live, number = [], 0
    while True:
        number += 1
        config = searcher.suggest(f"t{number}")
        if config not in (None, Searcher.FINISHED):
            live.append(f"t{number}")
            if len(live) < at_once:
                continue
        if config == Searcher.FINISHED and not live:
            return
        if live:
            searcher.on_trial_complete(live.pop(0), {"step": 1})


def searcher_of(study, bench, points, items=SPACE, patience=60.0):
    told = []
    return StudySearcher(study, space_of(*items), points, bench, lambda n, verdict: told.append(n), patience), told


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_suggestions_are_those_of_a_plain_loop_with_the_same_seed(sampler):
    study, bench = study_of(sampler=sampler), Bench()
    searcher, told = searcher_of(study, bench, points=14)
    tune(searcher)
    plain = study_of(sampler=sampler)
    distributions = {item.param: item.distribution for item in space_of(*SPACE)}
    for _ in range(14):
        asked = plain.ask(distributions)
        plain.tell(asked, value_of(asked.params))
    assert [one.params for one in study.trials] == [one.params for one in plain.trials]
    assert study.best_value == plain.best_value
    assert bench.begun == [one.params for one in plain.trials]
    assert told == list(range(14))


def test_a_search_that_goes_on_does_not_draw_its_first_points_again():
    drawn = []
    for trials in (0, 7, 9):
        study = optuna.create_study(sampler=make_sampler("random", 3, trials))
        drawn.append(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"])
    assert len(set(drawn)) == 3


def test_no_more_points_than_asked_for_and_failures_are_not_replaced_in_one_call():
    study, bench = study_of(), Bench(rooms=3, bad={1})
    searcher, _ = searcher_of(study, bench, points=6)
    tune(searcher, at_once=3)
    states = Counter(one.state.name for one in study.trials)
    assert states == {"COMPLETE": 5, "FAIL": 1}
    assert {one.user_attrs.get("cause") for one in study.trials if one.state == TrialState.FAIL} == {"bad weather"}
    again, _ = searcher_of(study, Bench(), points=6)
    tune(again)
    assert finished(study) == 6
    tune(searcher_of(study, Bench(), points=6)[0])
    assert finished(study) == 6


def test_no_point_is_begun_beyond_the_room():
    searcher, _ = searcher_of(study_of(), Bench(rooms=2), points=5)
    assert [searcher.suggest(f"t{i}") is None for i in range(4)] == [False, False, True, True]


def test_what_cannot_be_built_is_suggested_anew_and_kept_with_its_cause():
    study, bench = study_of(sampler="random"), Bench(impossible=lambda params: params["train.batch_size"] % 2)
    tune(searcher_of(study, bench, points=5)[0])
    assert finished(study) == 5
    refused = [one for one in study.trials if one.state == TrialState.FAIL]
    assert {one.user_attrs["infeasible"] for one in refused} == {"it does not fit"}
    assert len(refused) > 0
    with pytest.raises(RuntimeError, match="200 suggestions in a row were impossible; the last: it does not fit"):
        tune(searcher_of(study_of(), Bench(impossible=lambda params: True), points=1)[0])


def test_equal_points_are_trained_once_whether_at_work_or_done():
    study, bench = study_of(sampler="random"), Bench(rooms=2)
    items = ("train.batch_size=16,32",)
    tune(searcher_of(study, bench, points=9, items=items)[0], at_once=2)
    assert finished(study) == 9
    assert len(bench.begun) == 2
    assert {(one.params["train.batch_size"], one.value) for one in study.trials} == {(16, 16.0), (32, 32.0)}


class Away(optuna.storages.InMemoryStorage):
    """A study's database that refuses every third write, or all of them."""

    writes, gone = 0, False

    def _refuse(self):
        self.writes += 1
        if self.gone or self.writes % 3 == 0:
            raise StorageInternalError("An exception is raised during the commit.") from OSError("the server closed")

    def create_new_trial(self, *args, **named):
        self._refuse()
        return super().create_new_trial(*args, **named)

    def set_trial_state_values(self, *args, **named):
        self._refuse()
        return super().set_trial_state_values(*args, **named)

    def set_trial_intermediate_value(self, *args, **named):
        raise StorageInternalError("no report is taken")


def test_a_database_that_is_away_for_a_moment_costs_no_point(monkeypatch):
    monkeypatch.setattr(stores, "PAUSE", 0.001)
    storage, bench = Away(), Bench()
    study = optuna.create_study(study_name="s", storage=storage, sampler=make_sampler("random", 3, 0))
    searcher, told = searcher_of(study, bench, points=8, patience=5.0)
    first = searcher.suggest("first")
    assert not searcher.prune("first", {"validation": 0.5, "step": 10})
    searcher.on_trial_complete("first")
    tune(searcher)
    assert (finished(study), len(bench.begun), sorted(told)) == (8, 8, list(range(8)))
    assert json.dumps(bench.begun[0]) == first["point"]
    assert storage.writes > 16
    storage.gone = True
    searcher, _ = searcher_of(study, bench, points=9, patience=0.01)
    with pytest.raises(tracking.BrokenOffError, match=r"database has taken nothing for 0 s \(the server closed\)"):
        searcher.suggest("last")


def test_a_ledger_that_is_away_for_a_moment_costs_no_point(monkeypatch):
    monkeypatch.setattr(searching.time, "sleep", lambda seconds: None)
    study, bench = study_of(), Bench()
    bench.away = 3
    tune(searcher_of(study, bench, points=4)[0])
    assert [one.state for one in study.trials] == [TrialState.COMPLETE] * 4
    bench.away = 10**9
    with pytest.raises(
        tracking.BrokenOffError, match=r"no point could be begun or ended for 0 s \(away\); the same command"
    ):
        tune(searcher_of(study, bench, points=5, patience=0.0)[0])


def test_patience_holds_for_a_point_that_is_done_and_cannot_be_looked_up(monkeypatch):
    """`begin` finds it settled and `end` fails, for four tries or each time; a second passes between tries."""
    clock = SimpleNamespace(now=100.0, tries=0)
    monkeypatch.setattr(searching.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    monkeypatch.setattr(searching.time, "monotonic", lambda: clock.now)
    study, bench, away = study_of(), Bench(), OSError("disk away")
    told = bench.end

    def end(params, pruned=False):
        clock.tries += 1
        if clock.tries % 5 or len(study.trials) > 2:
            raise away
        return told(params, pruned)

    monkeypatch.setattr(bench, "begin", lambda params, number: None)
    monkeypatch.setattr(bench, "end", end)
    tune(searcher_of(study, bench, points=2, patience=5.0)[0])  # 8 s in all, but never more than 4 in a row
    assert (finished(study), clock.tries, clock.now) == (2, 10, 108.0)
    searcher, _ = searcher_of(study, bench, points=3, patience=5.0)
    with pytest.raises(tracking.BrokenOffError, match=r"no point could be begun or ended for 5 s \(disk away\)"):
        for _ in range(20):
            searcher.suggest("t")
    assert clock.now == 114.0
    assert study.trials[2].state == TrialState.RUNNING  # `recover` tells it later


def test_patience_goes_from_the_command_line_to_all_that_wait(monkeypatch):
    """To the searcher, to whoever looks for a node, to every member's runs, and to the watch over the study's own."""
    search = search_of("--patience", "7")
    seen = {}

    class Shop:
        resources = {"CPU": 1.0}  # noqa: RUF012
        study = tracking.Ledger(client=None, place=PLACE, driver="d", asked=time.monotonic() - 8)

        def use(self, resources):
            pass

        def leave(self):
            pass

        def settled(self, params):
            pass

    class Board:
        def __getattr__(self, name):
            return lambda *given: None

    def run_trials(trainable, resources, progress, how, **more):
        seen.update(watches=progress.watches, searcher=how.search_alg)

    monkeypatch.setattr(searches, "ray_cluster", lambda *given: contextlib.nullcontext())
    for name, value in (("settle_resources", Shop.resources), ("open_shelf", None), ("slots", 1), ("alive", [])):
        monkeypatch.setattr(searches, name, lambda *given, value=value: value)
    monkeypatch.setattr(dispatch.tune, "with_parameters", lambda call, context: seen.update(context=context))
    monkeypatch.setattr(dispatch, "run_trials", run_trials)
    study = study_of()
    searches.train_points(search, study, Shop(), Board())
    watch, places = seen["watches"]
    assert (seen["searcher"].patience, places.patience, seen["context"].patience) == (7.0, 7.0, 7.0)
    with pytest.raises(tracking.BrokenOffError, match="has not answered for 7 s"):
        watch()
    monkeypatch.setattr(trial, "train_here", lambda pack, context: seen.update(own=context))
    monkeypatch.setattr(trial.ray, "get", lambda given: [None])
    context = dataclasses.replace(seen["context"], shelf=SimpleNamespace(find=SimpleNamespace(remote=lambda given: 0)))
    point = point_of(tiny(), space_of("model.width=8..64"), {"model.width/4": 3}, "s")
    trial.train_point(point_config(point, [Pack(members=validate(point))], PLACE, "store"), context)
    assert seen["own"].patience == 7.0


def test_what_cannot_be_told_stays_at_work_for_the_next_look():
    study, bench = study_of(), Bench()
    searcher, _ = searcher_of(study, bench, points=1)
    searcher.suggest("t")
    bench.away = 1
    searcher.on_trial_complete("t")
    assert study.trials[0].state == TrialState.RUNNING
    assert searcher.suggest("u") == Searcher.FINISHED
    assert recover(study, space_of(*SPACE), bench.end) == (1, 0)
    assert study.trials[0].value == value_of(study.trials[0].params)


def test_points_above_the_median_are_stopped_and_never_before_the_warm_up():
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=10)
    study, bench = study_of(pruner=pruner), Bench()
    searcher, _ = searcher_of(study, bench, points=3)

    def report(trial_id, losses):
        return [searcher.prune(trial_id, {"step": step, "validation": loss}) for step, loss in losses]

    for name in ("a", "b"):
        searcher.suggest(name)
        assert report(name, [(0, 9.0), (5, 0.5), (20, 0.2), (40, 0.1)]) == [False] * 4
        searcher.on_trial_complete(name)
    searcher.suggest("c")
    assert report("c", [(0, 9.0), (5, 8.0), (5, 8.0), (20, math.nan), (20, 0.7)]) == [False] * 4 + [True]
    searcher.on_trial_complete("c")
    assert [one.state.name for one in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert study.trials[2].intermediate_values == {0: 9.0, 5: 8.0, 20: 0.7}
    assert searcher.suggest("d") == Searcher.FINISHED  # a pruned point is a point


def test_a_watched_pack_tells_its_median_loss_once_all_pieces_are_there(monkeypatch):
    told = []
    monkeypatch.setattr(trial.tune, "report", told.append)
    pack = Pack(members=MEMBERS)

    class Runs:
        index = {member.id: i for i, member in enumerate(MEMBERS)}  # noqa: RUF012

        def __getattr__(self, name):
            return lambda *args: None

    runs = Runs()
    runs.pack = pack
    sink = TrialSink(None, runs, watched=True, pack_id="p")
    first, second = pack.cut(2)
    sizes, train = (len(first.members), len(second.members)), {"train_loss": np.array([0.1])}
    sink.progress(first, 7, train | {"validation_loss": np.full(sizes[0], 0.2)})
    sink.progress(first, 8, train)
    assert told == []
    sink.progress(second, 7, train | {"validation_loss": np.full(sizes[1], math.inf)})
    trivial = pack.config.system.floors().trivial
    expected = np.median([0.2] * sizes[0] + [trivial] * sizes[1])
    assert [(report["step"], report["validation"]) for report in told] == [(7, expected)]


def planted_running(tmp_path):
    """A study on disk: one point complete, and three at work, of which number 2 is done by the ledger."""
    study = study_of(tmp_path)
    distributions = {item.param: item.distribution for item in space_of(*SPACE)}
    trials = [study.ask(distributions) for _ in range(4)]
    study.tell(trials[0], 1.0)
    return study, [one.params for one in trials]


def reopened(tmp_path):
    return optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/optuna.db")


def test_points_left_at_work_are_told_by_the_ledger_or_queued_none_lost_or_repeated(tmp_path):
    study, params = planted_running(tmp_path)
    ledger = lambda given: Verdict(values=(7.0,), attrs={"never": 1}) if given == params[2] else None  # noqa: E731
    assert recover(study, space_of(*SPACE), ledger) == (1, 2)
    study = reopened(tmp_path)
    assert [one.state.name for one in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "WAITING", "WAITING"]
    assert (study.trials[2].value, study.trials[2].user_attrs["never"]) == (7.0, 1)
    assert recover(study, space_of(*SPACE), ledger) == (0, 0)
    bench = Bench()
    tune(searcher_of(study, bench, points=4)[0])
    assert bench.begun == [params[1], params[3]]
    assert finished(study) == 4


def test_a_driver_killed_while_a_point_is_chosen_leaves_a_study_that_goes_on(tmp_path):
    """Optuna writes a trial, then its fields one by one: fresh ones are drawn anew, what was queued is queued again."""
    study, space = study_of(tmp_path), space_of(*SPACE)
    some = {space[0].param: space[0].distribution}
    study.ask(some)  # the second field was never written
    study.ask()  # nor was any of this one
    queued = {space[0].param: 3e-4, space[1].param: 48}
    study.enqueue_trial(queued)
    study.ask()
    study.enqueue_trial(queued | {space[1].param: 24})
    study.ask(some)

    def settled(given):
        raise AssertionError("nothing was trained")

    assert recover(reopened(tmp_path), space, settled) == (0, 2)
    assert recover(reopened(tmp_path), space, settled) == (0, 0)
    study = reopened(tmp_path)
    causes = [trial.user_attrs.get("cause") for trial in study.trials]
    chosen, again = "its driver was stopped as it was chosen", "its driver was stopped; enqueued again"
    assert causes == [chosen, chosen, again, again, None, None]
    bench = Bench()
    tune(searcher_of(study, bench, points=2)[0])
    assert bench.begun == [queued, queued | {space[1].param: 24}]


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_taking_up_may_itself_be_broken_off_anywhere(tmp_path, monkeypatch, calls):
    """Killed after so many writes to the queue, or just before its trial is ended: the queue has each point once."""
    study, params = planted_running(tmp_path)
    real, left = searching.tell, [calls]

    def die_later(*args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "tell", die_later)
        with pytest.raises(KeyboardInterrupt):
            recover(study, space_of(*SPACE), lambda given: None)
    study = reopened(tmp_path)
    recover(study, space_of(*SPACE), lambda given: None)
    bench = Bench()
    tune(searcher_of(study, bench, points=4)[0])
    assert sorted(map(str, bench.begun)) == sorted(map(str, params[1:]))
    assert finished(study) == 4


def search_of(*arguments):
    return parse_search(["tiny", "--widths", "8", "--space", f"{RATE}=1e-4..1e-2:log", *arguments])


def test_a_study_goes_on_only_with_the_search_that_made_it(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    first = search_of("--study", "mine", "--points", "3")
    open_study(first, url)
    assert open_study(search_of("--study", "mine", "--points", "9", "--sampler", "random"), url).trials == []
    for other in (["--train.steps", "70"], ["--seeds", "3"], ["--objective", "seconds"], ["--widths", "16"]):
        with pytest.raises(ValueError, match="study: 'mine' is not allowed; it must be that of the same search"):
            open_study(search_of("--study", "mine", *other), url)
    assert search_of().name != search_of("--seeds", "3").name
    assert search_of().name == search_of("--points", "9", "--workers", "1").name
    with pytest.raises(ValueError, match=r"storage: 'sqlite:////dev/null/x\.db' cannot be opened"):
        open_study(first, "sqlite:////dev/null/x.db")


def test_optuna_and_mlflow_never_share_a_file(tmp_path):
    mlflow = tracking.resolve_uri(None)
    assert storage_url(Settings(), None, mlflow) == f"sqlite:///{tmp_path}/optuna.db"
    for given in ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/../{tmp_path.name}/mlflow.db"):
        with pytest.raises(ValueError, match="a database of its own, not MLflow's"):
            storage_url(Settings(), given, mlflow)
    with pytest.raises(ValueError, match="a database URL such as"):
        storage_url(Settings(), "optuna.db", mlflow)


def test_one_driver_a_study_and_one_ledger(tmp_path, monkeypatch, blank_store):
    for name in ("mlflow.db", "other.db"):
        shutil.copy(blank_store, tmp_path / name)
    search = search_of()
    study = open_study(search, f"sqlite:///{tmp_path}/optuna.db")
    desk = Desk.open(search.settings)
    with held_study(desk, search, study):
        with pytest.raises(tracking.TrackingError, match=f"{search.name} is held by driver"):
            held_study(desk, search, study).__enter__()
        run = desk.client.get_run(study.user_attrs["run"])
        assert run.info.status == "RUNNING"
    with held_study(desk, search, study) as held:
        workshop = Workshop(desk, search, held)
        workshop.memory = Room(device="cpu", memory=8 << 30)
        with monkeypatch.context() as patch:  # the ledger is away just when a point's parent has been opened
            patch.setattr(tracking.MlflowClient, "log_batch", lambda *given, **more: (_ for _ in ()).throw(OSError()))
            with pytest.raises(OSError):
                workshop.begin({RATE: 1e-3}, 0)
        assert workshop.begin({RATE: 1e-3}, 0) is not None  # it is not held by another driver, but by this one
        workshop.leave()
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
        with console.file:
            for name in ([], [search.name]):
                assert status_command([*name, "--tracking-uri", desk.uri], console) == 0
        said = console.export_text()
        point = workshop.point({RATE: 1e-3}).id
        assert f"{search.name} (1 point)" in said  # a search is listed once, and its points when it is named
        assert said.index(search.name) < said.index(point)
        assert said.count(point) == 1
        (parent,) = tracking.find_sweeps(desk.client, desk.experiment)
        assert (parent.info.status, parent.data.tags["heartbeat"]) == ("KILLED", "")
    run = desk.client.get_run(study.user_attrs["run"])
    assert (run.info.status, run.data.tags["kind"], run.data.tags["heartbeat"]) == ("FINISHED", "search", "")
    other = Desk.open(dataclasses.replace(search.settings, tracking_uri=f"sqlite:///{tmp_path}/other.db"))
    with pytest.raises(ValueError, match="one whose points are in this ledger"), held_study(other, search, study):
        pass


def planted_search(*arguments, points=8):
    """A search of rate and batch size whose objective falls with the rate, in a study in memory."""
    search = parse_search(
        ["tiny", "--widths", "8", *(word for item in SPACE for word in ("--space", item)), *arguments]
    )
    study = optuna.create_study(directions=search.directions, sampler=make_sampler("random", 0, 0))
    for number in range(points):
        asked = study.ask({item.param: item.distribution for item in search.space})
        values = [1 / asked.params[RATE], float(number)][: len(search.directions)]
        asked.set_user_attr("never", number % 2)
        study.tell(asked, values)
    return search, study


def test_the_winners_command_is_its_point_with_more_seeds(tmp_path):
    search, study = planted_search("--train.steps", "70", "--tracking-uri", "sqlite:///a b.db")
    desk = Desk(client=None, uri="", out=tmp_path)
    words = shlex.split(winner_command(search, study, desk))
    assert words[:3] == ["headway", "sweep", "tiny"]
    assert "--model.width" not in words
    form, filled = sweep_form(load_sweep("tiny"))
    options = parse(form, words[3:], filled, "x", "y")
    found = Sweep(**{item.name: getattr(options.sweep, item.name) for item in dataclasses.fields(Sweep)})
    winner = point_of(search.sweep, search.space, study.best_params, search.name)
    assert dataclasses.replace(found, seeds=winner.seeds) == winner
    assert found.seeds == 8
    assert found.id == winner.id  # so that the seeds it has are not trained again
    assert options.settings.tracking_uri == "sqlite:///a b.db"


def test_the_winners_command_sets_flags_of_every_kind(tmp_path):
    arguments = ["quick", "--space", "model.width=16..64", "--space", "train.clip=None,2", "--space",
                 "train.compiled=True,False", "--space", "model.head_dim=2,4", "--model.heads", "None"]  # fmt: skip
    search = parse_search([*arguments, "--model.head-dim", "4"])
    for chosen in ({"train.clip": 2, "train.compiled": True}, {"train.clip": None, "train.compiled": False}):
        study = optuna.create_study()
        study.enqueue_trial({**chosen, "model.head_dim": 2, "model.width/4": 9})
        study.tell(study.ask({item.param: item.distribution for item in search.space}), 1.0)
        words = shlex.split(winner_command(search, study, Desk(client=None, uri="", out=tmp_path)))
        form, filled = sweep_form(load_sweep("quick"))
        found = parse(form, words[3:], filled, "x", "y").sweep
        assert (found.train.clip, found.train.compiled) == (chosen["train.clip"], chosen["train.compiled"])
        assert (found.model.heads, found.model.head_dim, found.widths) == (None, 2, (36,))


def test_a_recipe_with_axes_ends_in_a_stored_winner(tmp_path):
    spaces = [f"{RATE}=1e-4..1e-2:log", "model.parametrization=standard,mup", "model.width=16..64"]
    search = parse_search(["width", *(word for item in spaces for word in ("--space", item))])
    study = optuna.create_study()
    study.tell(study.ask({item.param: item.distribution for item in search.space}), 1.0)
    words = shlex.split(winner_command(search, study, Desk(client=None, uri="", out=tmp_path)))
    winner = load_sweep(words[2])
    assert winner == point_of(search.sweep, search.space, study.best_params, search.name)
    assert validate(winner)


def test_importance_finds_the_field_that_matters_or_says_why_not():
    search, study = planted_search(points=20)
    found = search_results.importances(search, study)
    assert found["level"][RATE] > 0.8
    assert sum(found["level"].values()) == pytest.approx(1)
    assert search_results.importances(*planted_search(points=3)) == "3 complete points, fewer than 4"
    assert search_results.importances(search_of(), study) == "a single field is searched"


@pytest.mark.parametrize("objectives", [["level"], ["level", "seconds"]])
def test_figures_numbers_and_tables(tmp_path, objectives):
    search, study = planted_search("--objective", *objectives)
    folder = tmp_path / "out"
    searches.write_results(search, study, folder, "postgresql://user:secret@host/x", "headway sweep ...")
    names = {"search.json", "history.png", "slices.png"} | ({"pareto.png"} if len(objectives) == 2 else set())
    assert {path.name for path in folder.iterdir()} == names
    body = json.loads((folder / "search.json").read_text())
    assert len(body["points"]) == 8
    assert body["storage"] == "postgresql://user:...@host/x"
    # level falls with the rate; seconds is the number of the point, so each point of the front beats those before it
    values = {each["number"]: each["values"] for each in body["points"]}
    expected = [n for n in values if all(values[n][0] < values[m][0] for m in range(n))]
    if len(objectives) == 1:
        assert body["best"] == [study.best_trial.number]
    else:
        assert sorted(body["best"]) == expected
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        found = search_results.Found(
            study=study, url="postgresql://user:secret@host/x", folder=folder, command="do it", failed=0, seconds=3.0
        )
        search_results.show_found(console, search, found)
    said = console.export_text()
    assert ("Pareto front" in said) == (len(objectives) == 2)
    assert "optuna-dashboard postgresql://user:...@host/x" in said
    assert "do it" in said
    assert "trials: 8 complete" in said


def test_a_point_travels_to_its_worker_as_text():
    sweep = point_of(tiny(), space_of("model.width=8..64"), {"model.width/4": 3}, "s")
    members = validate(sweep)
    body = json.loads(point_config(sweep, [Pack(members=members[:1], start=5)], PLACE, "store")["point"])
    assert body["packs"] == [{"members": [members[0].id], "start": 5}]
    assert trial.decode(Sweep, body["sweep"]).members() == members


ROOT = Path(__file__).resolve().parent.parent
COMMAND = "import sys; from cluster import cli; sys.exit(cli.main(sys.argv[1:]))"
SMALL = ["--data.rows", "128", "--data.validation-rows", "16", "--probe.examples", "8", "--probe.sparse-examples", "4",
         "--system.box.n", "6", "--system.box.radius", "0.1", "--seeds", "2", "--widths", "8"]  # fmt: skip


def start(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # noqa: PLW1509  # fmt: skip


def points_in(folder):
    """The points' own runs, and their members' runs."""
    uri = tracking.resolve_uri(f"sqlite:///{folder}/mlflow.db")
    client = tracking.connect(uri)
    experiment = tracking.experiment_id(client, uri)
    parents = tracking.find_sweeps(client, experiment)
    places = [tracking.Place(uri=uri, experiment=experiment, parent=run.info.run_id) for run in parents]
    return client, parents, [tracking.children(client, place) for place in places]


def wait_for(condition, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_interrupted_and_killed_goes_on_and_trains_nothing_twice(tmp_path, blank_store, monkeypatch):
    """SIGINT within one point, kill -9 within another, then to the end: every point once, every member once."""
    command = ["search", "tiny", *SMALL, "--space", f"{RATE}=1e-3..1e-2:log", "--space", "train.batch_size=4,8",
               "--train.steps", "400", "--points", "3", "--objective", "level", "seconds", "--workers", "1",
               "--checkpoint-every", "0.5", "--study", "s"]  # fmt: skip
    url = f"sqlite:///{tmp_path}/optuna.db"
    shutil.copy(blank_store, tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))

    def study():
        return optuna.load_study(study_name="s", storage=url)

    def at_work(points):
        checkpoints = list(tmp_path.glob("headway-out/s/*/checkpoints/*.json"))
        return checkpoints and finished(study()) == points

    quiet = Console(width=200, record=True, file=(tmp_path / "said").open("w"))
    for points, signum in ((0, signal.SIGINT), (1, signal.SIGKILL)):
        process = start(tmp_path, *command)
        wait_for(lambda p=process, n=points: p.poll() is not None or at_work(n))
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), err
        states = [one.state.name for one in study().trials]
        assert states[-1] == ("WAITING" if signum == signal.SIGINT else "RUNNING"), states
    client, parents, _ = points_in(tmp_path)
    done = {run.info.run_id for run in parents if run.info.status == "FINISHED"}
    study_run = study().user_attrs["run"]
    beat = client.get_run(study_run).data.tags["heartbeat"]
    client.set_tag(study_run, "heartbeat", f"{beat.partition(' ')[0]} elsewhere:1::abcdef")  # whose end cannot be seen
    with pytest.raises(tracking.TrackingError, match="s is held by driver"):
        searches.search_command(command[1:], quiet)
    client.set_tag(study_run, "heartbeat", beat)  # of a process of this machine, which is gone

    assert searches.search_command(command[1:], quiet) == 0
    assert "Pareto front" in (said := quiet.export_text(clear=True))
    assert "training points" in said
    trials = study().trials
    assert Counter(one.state.name for one in trials) == {"COMPLETE": 3, "FAIL": 2}
    complete = [one for one in trials if one.state == TrialState.COMPLETE]
    assert all(math.isfinite(value) for one in complete for value in one.values)
    for one in trials:
        if one.state == TrialState.FAIL:  # goes on elsewhere, with the same parameters
            (again,) = [two for two in trials if two.user_attrs.get("goes_on_with") == one.number]
            assert again.params == one.params
    client, parents, members = points_in(tmp_path)
    assert len(parents) == len({str(one.params) for one in complete})
    assert {run.info.status for run in parents} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in parents} == {study().user_attrs["run"]}
    assert done <= {run.info.run_id for run in parents}
    for runs in members:
        finished_runs = [run for run in runs if run.info.status == "FINISHED"]
        assert len(finished_runs) == len({run.data.tags["member_id"] for run in finished_runs}) == 2
        assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert {run.data.tags["optuna_trial"] for run in parents} <= {str(one.number) for one in complete}
    trained = sum(len(runs) for runs in members)

    assert searches.search_command(command[1:], quiet) == 0
    assert "training points" not in quiet.export_text()
    assert sum(len(runs) for runs in points_in(tmp_path)[2]) == trained
    quiet.file.close()
    names = {path.name for path in (tmp_path / "headway-out" / "s").iterdir() if path.is_file()}
    assert names == {"search.json", "history.png", "slices.png", "pareto.png"}
