"""What ten thousand members ask of the ledger: pages, and nothing for each of them."""

import dataclasses
import gc
import io
import math
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console

from cluster import driver, tracking
from cluster.commands import show_members
from cluster.driver import Settings
from cluster.sweep import Sweep, validate

PLACE = tracking.Place(uri="sqlite:///x.db", experiment="1", parent="p")
CALLS = ("set_tag", "set_terminated", "get_run", "get_metric_history", "log_batch", "list_artifacts", "log_dict")


class Counting:
    """A client of a store with these runs, that counts what is asked of it."""

    def __init__(self, runs):
        self.runs, self.calls = runs, Counter()
        for name in CALLS:
            setattr(self, name, lambda *args, name=name, **kwargs: self.calls.update([name]))

    def search_runs(self, experiments, condition, max_results, page_token):
        assert not gc.isenabled()
        self.calls["search_runs"] += 1
        start = int(page_token or 0)
        page = self.runs[start : start + max_results]
        after = str(start + max_results) if start + max_results < len(self.runs) else None
        return type("Page", (list,), {"token": after})(page)


def finished(member, number):
    info = SimpleNamespace(run_id=f"r{number}", status="FINISHED", start_time=number, end_time=number + 1, run_name="")
    return SimpleNamespace(info=info, data=SimpleNamespace(tags={"member_id": member.id}))


@pytest.mark.parametrize("count", [40, 80])
def test_a_resume_asks_for_pages_and_nothing_by_member(monkeypatch, count):
    monkeypatch.setattr(tracking, "PAGE", 10)
    sweep = Sweep(name="s", widths=(8,), seeds=count)
    members = validate(sweep)
    client = Counting([finished(member, number) for number, member in enumerate(members)])
    ledger = tracking.Ledger(client=client, place=PLACE, driver="d")
    pages = math.ceil(count / 10)
    assert len(ledger.settle(running_too=True)) == count
    assert client.calls == {"search_runs": pages}
    show_members(Console(file=io.StringIO()), sweep, tracking.children(client, PLACE))
    assert client.calls == {"search_runs": 2 * pages}
    assert gc.isenabled()


def test_a_call_looks_the_ledger_up_once_before_training_and_once_after(monkeypatch, tmp_path):
    """Once where nothing is missing; the analysis is told what was found, and asks for nothing again."""
    sweep = Sweep(name="s", widths=(8,), seeds=4)
    members = validate(sweep)
    told, quiet = [], SimpleNamespace(stage=print, packs=lambda cut: None, progress=print)
    room = SimpleNamespace(most=lambda config: 8)
    for name, value in (("make_pools", {}), ("find_room", room), ("slots", 1), ("run_packs", None)):
        monkeypatch.setattr(driver, name, lambda *given, value=value: value)
    monkeypatch.setattr(driver, "analyze", lambda *given: told.append(given[3:5]) or (None, None))
    for done, looks in ((4, 1), (3, 2)):
        client = Counting([finished(member, number) for number, member in enumerate(members[:done])])
        ledger = tracking.Ledger(client=client, place=PLACE, driver="d")
        desk = SimpleNamespace(settings=Settings(), uri="sqlite:///x.db", store=lambda sweep: str(tmp_path))
        outcome = driver._run(driver.Job(desk, sweep, members, ledger, {"CPU": 1.0}, quiet))
        assert client.calls == {"search_runs": looks}
        assert (outcome.failed, len(told[-1][0]), told[-1][1]) == (4 - done, done, [])


def test_configs_that_members_share_are_encoded_once(monkeypatch):
    """Identity costs a look at each member's own fields, not at every field of its model, training and data."""
    from cluster import sweep as module

    seen = Counter()
    real = module.encode_field
    monkeypatch.setattr(module, "encode_field", lambda value, hint: seen.update(["field"]) or real(value, hint))
    for seeds in (10, 100):
        module._canonical_part.cache_clear()
        seen.clear()
        validate(dataclasses.replace(Sweep(name="s", widths=(8, 12)), seeds=seeds))
        assert seen["field"] <= 2 * seeds + 20
