"""Work handed out to Ray actors as they come free; a lost actor is replaced, and its items have another turn."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import ray

Item = TypeVar("Item", bound=Hashable)
TURNS = 3  # of an item whose actor dies each time: it may be what kills them
AHEAD = 2  # items on each actor: the next one is there when it has done with one


def spread_out(
    make: Callable[[], Any], call: Callable[[Any, Item], Any], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Any]]:
    """Results as they come, each item once: `ray.get(call(actor, item))`, or the Exception in its place.

    make: a new actor; call: its work on one item, a reference. At most `workers` actors live at a time.
    """
    crew = [make() for _ in range(min(workers, len(items)))]
    waiting, idle = deque(items), deque(list(range(len(crew))) * AHEAD)
    turns: Counter[Item] = Counter()
    under_way: dict[Any, tuple[Item, int]] = {}  # in the order of the calls
    while waiting or under_way:
        while waiting and idle:
            item, place = waiting.popleft(), idle.popleft()
            under_way[call(crew[place], item)] = (item, place)
        (ready,), _ = ray.wait(list(under_way), num_returns=1)
        item, place = under_way[ready]
        result = _result(ready)
        if isinstance(result, ray.exceptions.RayActorError):
            own = [ref for ref, (_, at) in under_way.items() if at == place]
            lost = [ref for ref in own if isinstance(_result(ref), ray.exceptions.RayActorError)]
            # calls are worked on in turn, so the first is at fault
            (item, _), *behind = [under_way.pop(ref) for ref in lost]
            waiting.extendleft(other for other, _ in reversed(behind))
            idle.extend([place] * len(lost))
            crew[place] = make()
            turns[item] += 1
            if turns[item] < TURNS:
                waiting.append(item)
                continue
        else:
            del under_way[ready]
            idle.append(place)
        yield item, result


def _result(reference: Any) -> Any:
    """What came of a call, or the exception."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return error
