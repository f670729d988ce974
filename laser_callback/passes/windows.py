"""What others than the module write in the middle of an evaluation, so that each arm can be given it.

Between the module's own hooks and its step lie windows, in which callbacks have their turn and the next batch is
loaded and transferred. What changes in a window belongs to all arms, and what changes within the module's hooks belongs
to the pass that runs them. A change is kept as the step from what was there to what is there now, and each arm takes
this step at the same point of its own pass, ahead of the same hook:

- An attribute or the item of a dict that was set or deleted is set or deleted; the arm keeps its others.
- What was appended to a list is appended to the arm's, and so for a set what was added and removed.
- Any other change of a list, and that of a tensor, array, closure or generator, gives the arm what is there now, also
  if it had contents of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from laser_callback.passes.places import HOOKS, Cell, Place, State
from laser_callback.passes.state import Start
from laser_callback.passes.values import TensorValues, Values, is_in_place, same_elements

_OF_LIGHTNING = "_current_fx_name"  # which hook runs


class Change(NamedTuple):
    """What a place held when a window opened, and when it closed."""

    place: Place
    before: Any
    now: Any


class Windows:
    """The windows of one evaluation. The first is open from the beginning.

    Args:
        start: what the evaluation can write to.
        listens: whether there is anybody to write in the windows; if not, this costs nothing.

    Attributes:
        heard: what was changed ahead of each hook, the last time that it was run.
    """

    def __init__(self, start: Start, listens: bool) -> None:
        self.heard: dict[str, list[Change]] = {}
        self._start = start
        self._listens = listens
        self._held: dict[Place, Any] = {}

    def open(self) -> None:
        """Others have their turn from now on."""
        if self._listens:
            self._look()

    def close(self, hook: str) -> None:
        """Their turn is over: ``hook`` of the module follows."""
        if not self._listens:
            return
        self.heard[hook] = changes = self._look()
        for place, before, now in changes:
            # What callbacks collect for themselves is not entered: predictions of a whole epoch would be copied.
            if place.name.startswith("module") and not isinstance(place, (Values, State)):
                known = {id(value) for value in _values(before)}
                values = [value for value in _values(now) if id(value) not in known]
                if any(not isinstance(value, (int, float, str, type(None))) for value in values):
                    self._start.also(place.name, values)

    def repeat(self, hook: str) -> None:
        """Within an arm, ahead of its own ``hook``: do to what is in place what was done in the window."""
        for place, before, now in self.heard.get(hook, ()):
            place.write(_after(place, before, now, place.read()))

    def _look(self) -> list[Change]:
        """What is held otherwise than at the last look."""
        held: dict[Place, Any] = {}
        changes: list[Change] = []
        for place in self._start.places:
            before = held[place] = self._held.get(place, place.start)
            if not place.holds(before):
                now = held[place] = place.read()
                if _differ(place, before, now):
                    changes.append(Change(place, before, now))
        self._held = held
        return changes


def _differ(place: Place, before: Any, now: Any) -> bool:
    """Whether it does so indeed: a place may only have been put back, or not tell what it holds."""
    if isinstance(place, TensorValues):
        return not (is_in_place(place.owner, before.data) and same_elements(now.value, before.value))
    if isinstance(place, (Cell, Values, State)) or isinstance(now, list):
        return True
    olds, news = _parts(before), _parts(now)
    return any(
        old is not new and not (isinstance(new, dict) and _same(old, new)) for old, new in zip(olds, news, strict=True)
    )


def _same(before: dict[Any, Any], now: dict[Any, Any]) -> bool:
    keys = (before.keys() | now.keys()) - {_OF_LIGHTNING}
    return all(key in before and key in now and before[key] is now[key] for key in keys)


def _parts(content: Any) -> tuple[Any, ...]:
    """Of a content that is made of several dicts and values; hooks of a module are `None` where it has none."""
    if isinstance(content, tuple):
        *parts, last = content
        return (*parts, *(last or [{}] * len(HOOKS))) if hasattr(content, "hooks") else content
    return (content,)


def _after(place: Place, before: Any, now: Any, mine: Any) -> Any:
    """What becomes of ``mine`` by the step from ``before`` to ``now``."""
    if isinstance(place, (Values, Cell, State)):
        return now
    if isinstance(place.owner, set):
        return [*({*mine} - ({*before} - {*now}) | ({*now} - {*before}))]
    if isinstance(now, list):
        appended = len(now) >= len(before) and all(map(operator.is_, before, now))
        return [*mine, *now[len(before) :]] if appended else now
    steps = zip(_parts(before), _parts(now), _parts(mine), strict=True)
    parts = [_merged(*step) if isinstance(step[1], dict) else step[2 if step[0] is step[1] else 1] for step in steps]
    if not isinstance(now, tuple):
        return parts[0]
    n = len(now) - 1
    kind: Any = type(now)
    return kind(*parts[:n], parts[n:]) if hasattr(now, "hooks") else tuple(parts)


def _merged(before: dict[Any, Any], now: dict[Any, Any], mine: dict[Any, Any]) -> dict[Any, Any]:
    kept = {key: value for key, value in mine.items() if key in now or key not in before}
    return kept | {key: value for key, value in now.items() if key not in before or before[key] is not value}


def _values(content: Any) -> Iterator[Any]:
    """What a content refers to."""
    for part in _parts(content):
        yield from part.values() if isinstance(part, dict) else part if isinstance(part, list) else [part]
