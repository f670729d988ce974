"""The strategies that have a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_args

from laser_callback.search.strategies.at_random import AtRandom
from laser_callback.search.strategies.base import Need, Strategy
from laser_callback.search.strategies.blocks import Blocks
from laser_callback.search.strategies.components import Components
from laser_callback.search.strategies.delta import Delta, DeltaMatrices
from laser_callback.search.strategies.drop import Drop
from laser_callback.search.strategies.intruders import Intruders
from laser_callback.search.strategies.laser import Laser
from laser_callback.search.strategies.late_mlp import LateMLP
from laser_callback.search.strategies.reference import Reference
from laser_callback.search.strategies.rules import Entropy, GavishDonoho, LaserRMT
from laser_callback.search.strategies.whitened import Whitened
from laser_callback.support.reading import shown
from laser_callback.support.suggest import closest

_CLASSES: Sequence[Callable[[], Strategy]] = (
    Laser,
    Drop,
    Delta,
    partial(Delta, besides=True),
    DeltaMatrices,
    Intruders,
    Components,
    partial(Components, "delta"),
    Whitened,
    Blocks,
    Reference,
    LateMLP,
    LaserRMT,
    GavishDonoho,
    Entropy,
    AtRandom,
)

STRATEGIES: dict[str, Callable[[], Strategy]] = {made().name: made for made in _CLASSES}
"""By name the class of each strategy that can be named in place of an object."""


def strategies_of(given: str | Iterable[str | Strategy]) -> list[Strategy]:
    """The strategies that are named, or given as objects.

    Args:
        given: names or objects; text is names between commas.

    Raises:
        ValueError: for an unknown name, with the known ones; for none; for two of one name.
        TypeError: for an object that is no strategy, with what it lacks.
    """
    parts = [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else list(given)
    found = [_named(part) if isinstance(part, str) else _checked(part) for part in parts]
    names = [strategy.name for strategy in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`strategies` must be one or more, each of a name of its own, got {', '.join(names) or 'none'}"
        )
    return found


def _named(name: str) -> Strategy:
    if name not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise ValueError(f"`strategies` must be of {known}, or objects, got {shown(name)}{closest(name, STRATEGIES)}")
    return STRATEGIES[name]()


def _checked(strategy: Any) -> Strategy:
    what = f"`strategies` must be names or objects, got {shown(strategy)}"
    if isinstance(strategy, type):
        raise TypeError(f"{what}: give an object, {strategy.__name__}()")
    if lacking := [name for name in ("name", "needs", "propose", "neighbours") if not hasattr(strategy, name)]:
        raise TypeError(f"{what}: it has no {' and no '.join(f'`{name}`' for name in lacking)}")
    if not isinstance(strategy.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", strategy.name):
        raise TypeError(f"{what}: its `name` must be letters, digits and hyphens, got {shown(strategy.name)}")
    if isinstance(strategy.needs, str) or not set(strategy.needs) <= set(get_args(Need)):
        known = ", ".join(get_args(Need))
        raise TypeError(f"{what}: its `needs` must be a set of {known}, got {shown(strategy.needs)}")
    return strategy
