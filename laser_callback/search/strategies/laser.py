"""The paper's search space, every matrix at every rho, put in order by the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import do_the_same
from laser_callback.search.strategies.base import Context, Need
from laser_callback.search.strategies.grid import OnGrid


class Laser(OnGrid):
    """Every target at every rho (arXiv 2312.13558), scored by the first-order change of the loss.

    A leader's neighbours are other rhos of its matrix, and at last the matrices that it acts with as a product: what
    helps by taking a product's noise away may help more on its other side.
    """

    name = "laser"
    needs: frozenset[Need] = frozenset({"gradient"})

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterable[Candidate]:
        """Two steps of the grid each way, or close by: between the grid's rhos, and on the other sides of a product."""
        found = super().neighbours(leader, context, closest)
        return chain(found, self.partners(leader, context)) if closest else found

    def partners(self, candidate: Candidate, context: Context) -> list[Candidate]:
        """Candidates of the matrices with which this one acts as a product, at its rho and the next ones of the grid.

        The gradient tells which these are: to zero one is to zero the other, for then only their product acts (queries
        and keys, values and output).
        """
        rows = [self.row(t, context) for t in self.targets(context) if t.matrices[0].layer == candidate.layer]
        own = next((row for row in rows if any(other.plan == candidate.plan for other in row)), None)
        if own is None:  # off the grid
            return []
        place = next(i for i, other in enumerate(own) if other.plan == candidate.plan)
        near = {_rho(other) for other in own[max(place - 1, 0) : place + 2] if other.rho}  # not the matrix's own zero
        others = [row for row in rows if row and row is not own and do_the_same(own[0], row[0])]
        return [other for row in others for other in row if _rho(other) in near]


def _rho(candidate: Candidate) -> float | str:
    (reduction,) = candidate.plan
    return reduction.rho
