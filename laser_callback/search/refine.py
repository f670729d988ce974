"""What strategies propose around a race's leaders, tried ahead of its last round.

Which rho of a matrix is best is what a derivative tells worst, since it knows of small changes only. So the strategies
of the best candidates of the first few families are asked for neighbours further away; then those of where that led,
and for the closest at the leader.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from laser_callback.compare.measure import Table
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import family
from laser_callback.search.proposals import Proposals
from laser_callback.search.race import choose, order
from laser_callback.search.steps import Steps
from laser_callback.search.tables import joined

REFINED = 3
"""So many families, those of the best candidates, try others of their own."""

NEAR = 20
"""About so many candidates that makes on a grid: four each at first, then some from where that led."""


@dataclass
class Refinement:
    """What enters a race besides the screen's best; called by :meth:`Steps.race`.

    Attributes:
        steps: those of the search.
        proposals: of the step of the search, which new candidates are added to.
    """

    steps: Steps
    proposals: Proposals

    def __call__(
        self, step: str, alive: dict[str, Candidate], table: Table, seen: Sequence[Sequence[int]], keep: int
    ) -> dict[str, Candidate]:
        """Try them on the examples that all others have seen by now: the best of all, as many as may go on."""
        alive, objective = dict(alive), self.steps.objective
        objective = objective.by_loss if self.steps.by_loss else objective
        examples = sum(map(len, seen))

        def run(name: str, found: Sequence[Candidate]) -> None:
            if not found:
                return
            values: Table = {}
            for number, positions in enumerate(seen):  # the same batches as in the race, for pairs may be batches
                loader = self.steps.sets.loader("race", positions, writes=not self.steps.by_loss)
                plans = [candidate.plan for candidate in found]
                fresh = self.steps.measure(f"{name}-{number}", "refine", plans, loader)
                values = joined(values, fresh)
            for candidate in found:
                arm = str(candidate.plan)
                alive[arm], table[arm] = candidate, values[arm]
                candidate.examples, candidate.status = examples, "finalist"
                gain, candidate.loss = objective.estimates(table, arm)
                candidate.gain = None if self.steps.by_loss else gain

        heads: dict[Hashable, str] = {}
        for arm in order(objective, table, list(alive)):
            heads.setdefault(family(alive[arm].plan), arm)
        around = self.proposals.around
        along = {arm: around(alive[arm], closest=False) for arm in list(heads.values())[:REFINED]}
        run(f"{step}-refine-along", [candidate for found in along.values() for candidate in found])
        led = [choose(objective, table, [arm, *(str(c.plan) for c in found)]) for arm, found in along.items()]
        further = [candidate for arm in led if arm not in along for candidate in around(alive[arm], closest=False)]
        leader = alive[choose(objective, table, list(alive))]
        run(f"{step}-refine-further", [*further, *around(leader, closest=True)])
        ranked = order(objective, table, list(alive))
        for place, arm in enumerate(ranked[keep:], keep + 1):
            alive[arm].status = "dropped out"
            alive[arm].reason = f"place {place} of {len(ranked)} after {examples} examples, neighbours included"
            del table[arm]
        return {arm: alive[arm] for arm in ranked[:keep]}
