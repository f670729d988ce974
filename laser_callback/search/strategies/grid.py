"""The grid: every target of a model at every rho, and what lies between and beside its points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context, Need


def grid(found: Sequence[Target], rhos: Sequence[float], strategy: str, base: str = "") -> list[Candidate]:
    """Every target at every rho, each rank once, but for the whole rank."""
    candidates = []
    for target in found:
        matrix = target.matrices[0]
        ranks = {matrix.max_rank}
        for rho in rhos:
            reduction = target.at(rho)
            rank = reduction.rank(matrix.max_rank)
            if rank not in ranks:
                ranks.add(rank)
                candidates.append(Candidate(LaserPlan([reduction]), strategy, matrix.layer, matrix.kind, rho, base))
    return candidates


class OnGrid:
    """Every target at every rho, for strategies that propose such cuts, in an order or of a sort of their own.

    Attributes:
        options: what each of its reductions says besides its matrix and rho.
    """

    name: str
    needs: frozenset[Need] = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})

    def propose(self, context: Context) -> Iterable[Candidate]:
        """The grid, target by target; where a gradient scores it, as far as that tells."""
        every = chain.from_iterable(self.row(target, context) for target in self.targets(context))
        scored = "gradient" in self.needs and context.sensitivities.batches
        return (candidate for candidate in every if candidate.score is not None) if scored else every

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterable[Candidate]:
        """Two steps of the grid each way, or close by: between the grid's rhos."""
        target = self.target_of(leader, context)
        return self.between(leader, target, context) if closest else self.along(leader, target, context)

    def targets(self, context: Context) -> list[Target]:
        """What may be cut."""
        return [Target(target.matrices, {**target.address, **self.options}) for target in context.targets]

    def rhos(self, context: Context) -> Sequence[float]:
        """At which."""
        return context.rhos

    def row(self, target: Target, context: Context) -> list[Candidate]:
        """A target at every rho; with scores, if the strategy needs the gradient."""
        return self._scored(grid([target], self.rhos(context), self.name, context.base), context)

    def target_of(self, candidate: Candidate, context: Context) -> Target:
        """The target that a candidate of the grid cuts."""
        (reduction,) = candidate.plan
        return next(t for t in self.targets(context) if t.at(0.0) == replace(reduction, rho=0.0))

    def along(self, candidate: Candidate, target: Target, context: Context) -> list[Candidate]:
        """Two steps of the grid each way; of what lies off the grid nothing."""
        row = self.row(target, context)
        place = next((i for i, other in enumerate(row) if other.plan == candidate.plan), None)
        return [] if place is None else [*row[max(place - 2, 0) : place], *row[place + 1 : place + 3]]

    def between(self, candidate: Candidate, target: Target, context: Context) -> list[Candidate]:
        """Between a candidate and the next lower and higher of the grid's rhos.

        Their rho is the geometric mean of the two, or half of the higher where the lower is 0.
        """
        (reduction,), own = candidate.plan, candidate.rho
        assert own is not None
        max_rank = target.matrices[0].max_rank
        places = sorted({*self.rhos(context), own})
        place = places.index(own)
        found = []
        for low, high in pairwise(places[max(place - 1, 0) : place + 2]):
            rho = round(math.sqrt(low * high) if low else high / 2, 4)
            middle = replace(reduction, rho=rho)
            if middle.rank(max_rank) not in {replace(reduction, rho=end).rank(max_rank) for end in (low, high)}:
                plan, where = LaserPlan([middle]), (candidate.layer, candidate.kind, rho)
                found.append(Candidate(plan, self.name, *where, context.base))
        return found

    def _scored(self, row: list[Candidate], context: Context) -> list[Candidate]:
        if "gradient" in self.needs:
            for candidate in row:
                candidate.score, candidate.error = context.estimate(candidate.plan) or (None, 0.0)
        return row
