"""Work over real Ray actors: every item once, whatever becomes of the actors."""

import os
from collections import Counter
from pathlib import Path

import pytest

from cluster.crew import TURNS, spread_out

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_cpus():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def hand_out(items, folder, workers=2):
    """Squares, by actors that note every try in the folder. 13 kills its actor always, 7 at its first turn; 5 fails."""

    class Squarer:
        def square(self, item):
            tries = len(list(Path(folder).glob(f"{item}-*")))
            Path(folder, f"{item}-{tries}").touch()
            if item == 13 or (item == 7 and tries == 0):
                os._exit(1)
            if item == 5:
                raise ValueError("five is refused")
            return item * item

    kind = ray.remote(num_cpus=1)(Squarer)
    return list(spread_out(kind.remote, lambda actor, item: actor.square.remote(item), items, workers))


def tries(folder):
    return Counter(int(path.name.split("-")[0]) for path in Path(folder).iterdir())


def test_every_item_comes_back_once(two_cpus, tmp_path):
    found = hand_out(list(range(5)), str(tmp_path))
    assert sorted(found) == [(i, i * i) for i in range(5)]
    assert set(tries(tmp_path).values()) == {1}
    assert hand_out([], str(tmp_path)) == []


def test_a_lost_actor_is_replaced_and_its_item_done_again(two_cpus, tmp_path):
    found = hand_out([0, 1, 7, 8, 9, 10], str(tmp_path))
    assert sorted(found) == [(i, i * i) for i in (0, 1, 7, 8, 9, 10)]
    assert tries(tmp_path)[7] == 2


def test_what_kills_every_actor_is_given_up_and_the_rest_is_done(two_cpus, tmp_path):
    found = dict(hand_out([13, 0, 5, 1, 2], str(tmp_path), workers=1))
    assert {item: found[item] for item in (0, 1, 2)} == {0: 0, 1: 1, 2: 4}
    assert isinstance(found[13], ray.exceptions.RayActorError)
    assert isinstance(found[5], ray.exceptions.RayTaskError) and "five is refused" in str(found[5])
    # an actor that dies may take the answer of the item before with it, which is then the one that is blamed
    assert TURNS <= tries(tmp_path)[13] <= TURNS + 2
    assert tries(tmp_path)[5] == 1
