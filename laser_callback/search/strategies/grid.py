"""The grid: every target of a model at every rho, and what lies between and beside its points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context

REFERENCE_RHOS = tuple((10 - rate) * 0.1 for rate in (1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95))
"""The rates of the paper's code as it turns them into shares, in floating point: they decide its ranks."""

DELTA_RHOS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""For the difference to a base: fine-tuning, and LoRA by its making, changes few directions."""


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
    """The neighbours of a cut on the grid, for strategies that propose such cuts."""

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterable[Candidate]:
        """Two steps of the grid each way, or close by: between the grid's rhos."""
        target = target_of(leader, context)
        return between(leader, target, context) if closest else along(leader, target, context)


def target_of(candidate: Candidate, context: Context) -> Target:
    """The target that a candidate of the grid cuts."""
    (reduction,), rho = candidate.plan, candidate.rho
    assert rho is not None
    return next(target for target in context.targets if target.at(rho) == reduction)


def along(candidate: Candidate, target: Target, context: Context) -> list[Candidate]:
    """Two steps of the grid each way; of what lies off the grid nothing."""
    same = grid([target], context.rhos, candidate.strategy, context.base)
    place = next((i for i, other in enumerate(same) if other.plan == candidate.plan), None)
    return [] if place is None else [*same[max(place - 2, 0) : place], *same[place + 1 : place + 3]]


def between(candidate: Candidate, target: Target, context: Context) -> list[Candidate]:
    """Between a candidate and the next lower and higher of the grid's rhos.

    Their rho is the geometric mean of the two, or half of the higher where the lower is 0.
    """
    (reduction,), own = candidate.plan, candidate.rho
    assert own is not None
    max_rank = target.matrices[0].max_rank
    places = sorted({*context.rhos, own})
    place = places.index(own)
    found = []
    for low, high in pairwise(places[max(place - 1, 0) : place + 2]):
        rho = round(math.sqrt(low * high) if low else high / 2, 4)
        middle = replace(reduction, rho=rho)
        if middle.rank(max_rank) not in {replace(reduction, rho=end).rank(max_rank) for end in (low, high)}:
            plan = LaserPlan([middle])
            found.append(Candidate(plan, candidate.strategy, candidate.layer, candidate.kind, rho, candidate.base))
    return found
