"""Other rhos of a race's leading matrices, tried ahead of its last rung.

Which rho of a matrix is best is what a derivative tells worst, since it knows of small changes only. So from the best
candidate of each of the first few matrices the search looks along the grid; then from where that led, and at the
leader's closest: between the grid's rhos, and the matrices with which it acts as a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from laser_callback.compare.measure import Table
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import neighbours, partners
from laser_callback.search.race import choose, order
from laser_callback.search.steps import Steps
from laser_callback.search.tables import joined

REFINED = 3
"""So many matrices, those of the best candidates, try other rhos."""

NEAR = 20
"""About so many candidates that makes: four each at first, then some from where that led."""


@dataclass
class Refinement:
    """What enters a race besides the screen's best; called by :meth:`Steps.race`.

    Attributes:
        steps: those of the search.
        targets: what may be cut.
        candidates: each target at each rho of the grid.
        added: candidates between the grid's rhos are added here.
        rhos: the grid.
    """

    steps: Steps
    targets: Sequence[Target]
    candidates: Sequence[Candidate]
    added: list[Candidate]
    rhos: Sequence[float]

    def __call__(
        self, step: str, alive: dict[str, Candidate], table: Table, seen: Sequence[Sequence[int]], keep: int
    ) -> dict[str, Candidate]:
        """Try them on the examples that all others have seen by now: the best of all, as many as may go on."""
        alive, objective = dict(alive), self.steps.objective
        examples = sum(map(len, seen))

        def run(name: str, found: Sequence[Candidate]) -> None:
            if not found:
                return
            values: Table = {}
            for number, positions in enumerate(seen):  # the same batches as in the race, for pairs may be batches
                loader = self.steps.sets.loader("race", positions)
                cuts = [candidate.reduction for candidate in found]
                fresh = self.steps.measure(f"{name}-{number}", "refine", cuts, loader)
                values = joined(values, fresh)
            for candidate in found:
                arm = str(candidate.reduction)
                alive[arm], table[arm] = candidate, values[arm]
                candidate.examples, candidate.status = examples, "finalist"
                candidate.gain, candidate.loss = objective.estimates(table, arm)

        heads: dict[Reduction, str] = {}
        for arm in order(objective, table, list(alive)):
            heads.setdefault(replace(alive[arm].reduction, rho=0.0), arm)
        along = {arm: self.along(alive[arm]) for arm in list(heads.values())[:REFINED]}
        run(f"{step}-refine-along", [candidate for found in along.values() for candidate in found])
        led = [choose(objective, table, [arm, *(str(c.reduction) for c in found)]) for arm, found in along.items()]
        further = [candidate for arm in led if arm not in along for candidate in self.along(alive[arm])]
        leader = alive[choose(objective, table, list(alive))]
        run(f"{step}-refine-further", [*further, *self.around(leader)])
        ranked = order(objective, table, list(alive))
        for place, arm in enumerate(ranked[keep:], keep + 1):
            alive[arm].status = "dropped"
            alive[arm].reason = f"place {place} of {len(ranked)} after {examples} examples, other rhos included"
            del table[arm]
        return {arm: alive[arm] for arm in ranked[:keep]}

    def along(self, candidate: Candidate) -> list[Candidate]:
        """Two steps of the grid each way."""
        same = [c for c in self.candidates if c.reduction == replace(candidate.reduction, rho=c.rho)]
        place = same.index(candidate)
        return self._new(same[max(place - 2, 0) : place + 3])

    def around(self, candidate: Candidate) -> list[Candidate]:
        """Between the grid's rhos, and on the other sides of a product."""
        target = next(t for t in self.targets if t.at(candidate.rho) == candidate.reduction)
        between = neighbours(candidate, self.rhos, target.matrices[0].max_rank)
        self.added += between
        return self._new(between + partners(candidate, self.candidates))

    def _new(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [c for c in candidates if not c.examples and self.steps.lab.alters(c)]
