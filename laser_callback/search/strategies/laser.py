"""The paper's search space, every matrix at every rho, put in order by the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Literal

from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import do_the_same
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.grid import OnGrid, grid, target_of


class Laser(OnGrid):
    """Every target at every rho (arXiv 2312.13558), scored by the first-order change of the loss.

    A leader's neighbours are other rhos of its matrix, and at last the matrices that it acts with as a product: what
    helps by taking a product's noise away may help more on its other side.
    """

    name = "laser"
    needs = frozenset[Literal["gradient"]]({"gradient"})

    def propose(self, context: Context) -> list[Candidate]:
        """The grid."""
        return [candidate for target in context.targets for candidate in _scored(target, context)]

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterable[Candidate]:
        """Two steps of the grid each way, or close by: between the grid's rhos, and on the other sides of a product."""
        found = super().neighbours(leader, context, closest)
        return chain(found, partners(leader, context)) if closest else found


def partners(candidate: Candidate, context: Context) -> list[Candidate]:
    """Candidates of the matrices with which this one acts as a product, at its rho and the next ones of the grid.

    The gradient tells which these are: to zero one is to zero the other, for then only their product acts (queries and
    keys, values and output).
    """
    near = [target for target in context.targets if target.matrices[0].layer == candidate.layer]
    rows = {target: _scored(target, context) for target in near}
    own = rows.pop(target_of(candidate, context))
    place = next((i for i, other in enumerate(own) if other.plan == candidate.plan), None)
    if place is None:  # off the grid
        return []
    rhos = {other.rho for other in own[max(place - 1, 0) : place + 2]} - {0.0}  # that would be this matrix's own zero
    others = [row for row in rows.values() if row and do_the_same(own[0], row[0])]
    return [other for row in others for other in row if other.rho in rhos]


def _scored(target: Target, context: Context) -> list[Candidate]:
    """A row of the grid."""
    row = grid([target], context.rhos, Laser.name, context.base)
    for candidate in row:
        candidate.score, candidate.error = context.estimate(candidate.plan) or (None, 0.0)
    return row
