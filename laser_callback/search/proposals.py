"""The candidates of one step of a search: what strategies propose, in the order in which it races.

Contract: each cut races once, whoever proposes it and in whatever words; and none that does nothing, or that cuts what
is cut already. What a strategy proposes is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, cast

from laser_callback.compare.measure import Lab
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import OF_THE_MEDIAN
from laser_callback.plans.short import brief
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import cut_by, in_turns
from laser_callback.search.sensitivities import View, Views
from laser_callback.search.strategies.base import Context, Strategy
from laser_callback.support.reading import shown


class Proposals:
    """The candidates of one step.

    Args:
        candidates: what the strategies propose.
        strategies: these.
        context: what they have been told.
        lab: where their plans run.
        base: what is in place.
        listed: all candidates of the search, to which new ones are added.
        in_order: whether they race in the order in which they are proposed, and not by turns and scores.

    Attributes:
        ranked: each cut that may race once, in the order in which they do.
        first: the strategies whose candidates come ahead of all others.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        strategies: Sequence[Strategy],
        context: Context,
        lab: Lab,
        base: LaserPlan | None,
        listed: list[Candidate],
        *,
        in_order: bool = False,
    ) -> None:
        self._strategies = {strategy.name: strategy for strategy in strategies}
        self._context, self._lab, self._base, self._listed = context, lab, base, listed
        self._in_place = {matrix.name for matrix, _ in context.resolve(base)} if base else set()
        self._known: dict[Hashable, Candidate] = {}
        racing = list(filter(self._may_race, candidates))
        self.first = [name for name, strategy in self._strategies.items() if getattr(strategy, "races_first", False)]
        for candidate in racing if in_order else in_turns(racing, self._strategies, self.first):
            same = self._known.setdefault(cut_by(context.resolve(candidate.plan)), candidate)
            if same is not candidate:
                candidate.reason = f"the same cut as {brief(same.plan)} of {same.strategy}"
        self.ranked = list(self._known.values())

    def around(self, leader: Candidate, *, closest: bool) -> list[Candidate]:
        """What its strategy proposes around a leader, as far as it has not raced and may; new ones are listed."""
        strategy = self._strategies[leader.strategy]
        with self._lab.base(self._base):
            given = checked(strategy, strategy.neighbours(leader, self._context, closest), self._context)
        found: dict[int, Candidate] = {}
        for candidate, cut in given:
            known = self._known.setdefault(cut, candidate)
            if known is candidate:
                self._listed.append(candidate)
            if not known.examples and self._may_race(known):
                found[id(known)] = known
        return list(found.values())

    def say_who_was_first(self, places: int) -> None:
        """Where strategies that race first have taken all the places, the reason of those that have not raced."""
        raced = {candidate.strategy for candidate in self.ranked if candidate.examples}
        if not raced or not raced <= {*self.first}:
            return
        who = " and ".join(name for name in self.first if name in raced)
        taken = f"took all {places:,} places" if places > 1 else "took the one place"
        for candidate in self.ranked:
            if not candidate.examples:
                candidate.reason = f"{who} came first, ahead of all others, and {taken}"

    def _may_race(self, candidate: Candidate) -> bool:
        if any(matrix.name in self._in_place for matrix, _ in self._context.resolve(candidate.plan)):
            candidate.reason = "it cuts what is cut already"
            return False
        if not self._lab.alters(candidate.plan):
            candidate.reason = "it keeps everything"
            if any(cut.cut == "delta" and cut.rho in OF_THE_MEDIAN for cut in candidate.plan):
                candidate.reason += (
                    ": of a change of low rank, as LoRA makes it, most singular values are 0, and so is their median, "
                    "which the rule goes by; `energy-0.9` cuts it"
                )
            return False
        return True


def views_for(strategies: Iterable[Strategy], context: Context) -> Views:
    """What the strategies need the gradient of."""
    wanted: dict[View, dict[str, WeightMatrix]] = {}
    for strategy in strategies:
        if "gradient" not in strategy.needs:
            continue
        if hasattr(strategy, "views"):
            views: Views = strategy.views(context)
        else:
            views = _of_targets(context, "base" in strategy.needs)
        for view, matrices in views.items():
            wanted.setdefault(view, {}).update({matrix.name: matrix for matrix in matrices})
    return {view: list(matrices.values()) for view, matrices in wanted.items() if matrices}


def _of_targets(context: Context, delta: bool) -> Views:
    """Of each target what is cut of it: its weight, or the difference to the base."""
    wanted: dict[View, list[WeightMatrix]] = {}
    for target in context.targets:
        cut = "delta" if delta else target.at(0.0).cut
        wanted.setdefault(View(cast("Any", cut)), []).extend(target.matrices)
    return wanted


def checked(strategy: Strategy, candidates: Iterable[Candidate], context: Context) -> list[tuple[Candidate, Hashable]]:
    """What a strategy proposes, each candidate with what stands for its cut (:func:`cut_by`).

    Raises:
        TypeError: for what is no candidate, or nothing that gives some.
        ValueError: for a candidate that does not say whose it is or what it is added to, or whose plan is lost in its
            text form, does not fit the model, or has a score that is not finite.
    """
    if not isinstance(candidates, Iterable):
        raise TypeError(f"the strategy {strategy.name!r} must propose candidates, got {shown(candidates)}")
    found = []
    for candidate in candidates:
        if not isinstance(candidate, Candidate):
            raise TypeError(
                f"the strategy {strategy.name!r} proposes {shown(candidate)}: it must be a candidate, "
                "`context.candidate(self, plan)`"
            )
        what = f"the strategy {strategy.name!r} proposes {brief(candidate.plan)}"
        for name, wanted in (("strategy", strategy.name), ("base", context.base)):
            if getattr(candidate, name) != wanted:
                raise ValueError(f"{what}: its `{name}` must be {wanted!r}, got {getattr(candidate, name)!r}")
        for name in ("score", "error"):
            value = getattr(candidate, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{what}: its `{name}` must be finite, got {value}")
        if LaserPlan.parse(str(candidate.plan)) != candidate.plan:
            raise ValueError(f"{what}, which is read back as {brief(LaserPlan.parse(str(candidate.plan)))}")
        try:
            found.append((candidate, cut_by(context.resolve(candidate.plan))))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    return found
