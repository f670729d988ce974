"""Plans about many matrices at once, in few words."""

from __future__ import annotations

import re
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
    are all of a kind, and ``12.all`` of a layer, else each target.
    """
    wanted = {matrix.name for target in targets for matrix in target.matrices}
    by_stack: dict[str | None, list[WeightMatrix]] = {}
    for matrix in matrices:
        if matrix.kind is not None:
            by_stack.setdefault(matrix.stack, []).append(matrix)
    found: list[dict[str, Any]] = []
    covered: set[str] = set()

    def add(address: dict[str, Any], members: Sequence[WeightMatrix]) -> None:
        names = {matrix.name for matrix in members}
        if names <= wanted and not names & covered:
            found.append(address)
            covered.update(names)

    for stack, members in by_stack.items():
        if stack is None:
            continue
        among = {} if len(by_stack) == 1 else {"stack": matrices.stack_name(stack)}
        add({**among, "layer": "*", "matrix": "all"}, members)
        for kind in KINDS:
            if of_kind := [matrix for matrix in members if matrix.kind == kind]:
                add({**among, "layer": "*", "matrix": kind}, of_kind)
        for layer in sorted({matrix.layer for matrix in members if matrix.layer is not None}):
            add({**among, "layer": layer, "matrix": "all"}, [matrix for matrix in members if matrix.layer == layer])
    single = [target for target in targets if not {matrix.name for matrix in target.matrices} <= covered]
    return found + [dict(target.address) for target in single]


def at(addresses: Iterable[dict[str, Any]], rho: float | str, **options: Any) -> LaserPlan:
    """The plan that cuts all of them alike."""
    return LaserPlan(Reduction(**{**address, "rho": rho, **options}) for address in addresses)


def one_name(targets: Sequence[Target]) -> dict[str, Any] | None:
    """The fields of one reduction that names all of these; ``None`` where a part of a tensor has no such name."""
    members = [matrix for target in targets for matrix in target.matrices]
    names = dict.fromkeys(re.sub(r"\[.*", "", matrix.name) for matrix in members)
    if any(matrix.parameter.ndim != 2 for matrix in members):
        return None
    return {"layer": None, "matrix": f"/{'|'.join(map(re.escape, names))}/"}


def each(targets: Iterable[Target]) -> list[tuple[WeightMatrix, dict[str, Any]]]:
    """Every matrix of the targets, with the fields of a reduction that names it alone, but for its rho."""
    return [
        (matrix, {**target.address, **({} if len(target.matrices) == 1 else {"expert": matrix.expert})})
        for target in targets
        for matrix in target.matrices
    ]
