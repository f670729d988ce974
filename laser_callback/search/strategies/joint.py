"""Plans about many matrices at once, in few words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from laser_callback.plans.kinds import KINDS
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import Catalogue
from laser_callback.plans.target import Target


def cover(targets: Sequence[Target], matrices: Catalogue) -> list[dict[str, Any]]:
    """The fields of as few reductions as name these targets and nothing else, but for their rho.

    ``*.all`` of a layer stack where the targets are all of its matrices that have a kind, else ``*.kind`` where they
    are all of a kind, else each target.
    """
    wanted = {matrix.name for target in targets for matrix in target.matrices}
    by_stack: dict[str | None, list[WeightMatrix]] = {}
    for matrix in matrices:
        if matrix.kind is not None:
            by_stack.setdefault(matrix.stack, []).append(matrix)
    found: list[dict[str, Any]] = []
    covered: set[str] = set()
    for stack, members in by_stack.items():
        among = {} if stack is None or len(by_stack) == 1 else {"stack": matrices.stack_name(stack)}
        kinds = [kind for kind in KINDS if any(matrix.kind == kind for matrix in members)]
        for word, of_word in (("all", members), *((kind, [m for m in members if m.kind == kind]) for kind in kinds)):
            names = {matrix.name for matrix in of_word}
            if stack is not None and names <= wanted and not names & covered:
                found.append({**among, "layer": "*", "matrix": word})
                covered |= names
    single = [target for target in targets if not {matrix.name for matrix in target.matrices} <= covered]
    return found + [dict(target.address) for target in single]


def at(addresses: Iterable[dict[str, Any]], rho: float | str, **options: Any) -> LaserPlan:
    """The plan that cuts all of them alike."""
    return LaserPlan(Reduction(**{**address, "rho": rho, **options}) for address in addresses)


def each(targets: Iterable[Target]) -> list[tuple[WeightMatrix, dict[str, Any]]]:
    """Every matrix of the targets, with the fields of a reduction that names it alone, but for its rho."""
    return [
        (matrix, {**target.address, **({} if len(target.matrices) == 1 else {"expert": matrix.expert})})
        for target in targets
        for matrix in target.matrices
    ]
