"""What a search or an inspection goes through: the targets of a model.

A *target* is what one reduction covers: one matrix, or one kind of matrix of all experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.plan import LaserPlan, pieces
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import Catalogue, UncuttableError

RHOS = (0.0, 0.005, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
"""The nine of the paper's reference code (rates 1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95), and the zero matrix."""


@dataclass(frozen=True, eq=False)
class Target:
    """What one reduction covers.

    Attributes:
        matrices: one matrix, or that of each expert.
        address: the fields of a :class:`Reduction` that name them, all but rho.
    """

    matrices: tuple[WeightMatrix, ...]
    address: Mapping[str, Any]

    def at(self, rho: float) -> Reduction:
        """The candidate of this target at ``rho``."""
        return Reduction(rho=rho, **self.address)


def targets(model: nn.Module, within: str = "*.all", without: Iterable[Reduction] = ()) -> list[Target]:
    """The targets of a model, in its order.

    Args:
        model: any module.
        within: where to look: plan text without rho, e.g. ``"*.all"`` or ``"20-29.mlp, *.q_proj"``.
        without: reductions whose matrices are left out, since they are cut already; it may be that none is left.

    Raises:
        ValueError: if ``within`` cannot be read or matches nothing, listing what the model has.
    """
    matrices = Catalogue(find_matrices(model))
    if not any(matrix.kind for matrix in matrices) and within == "*.all":
        raise ValueError("the model has no matrix of a known kind: name some in `within`, e.g. '/.*weight_hh_l0/'")
    wanted: dict[str, WeightMatrix] = {}
    stacks = list(dict.fromkeys(matrix.stack for matrix in matrices if matrix.stack))
    for piece in _places(within):
        # One by one, since here they may overlap.
        wanted |= {matrix.name: matrix for matrix in _named(matrices, Reduction.parse(f"{piece}@0"), stacks)}
    cut = list(without)
    taken = {matrix.name for matrix, _ in LaserPlan(cut).resolve(matrices)} if cut else set()

    by_place: dict[tuple[Any, ...], list[WeightMatrix]] = {}
    for matrix in matrices:
        by_place.setdefault((matrix.stack, matrix.layer, matrix.kind), []).append(matrix)
    stacks_of_kind: dict[str | None, set[str | None]] = {}
    for stack, _, kind in by_place:
        stacks_of_kind.setdefault(kind, set()).add(stack)

    found: list[Target] = []
    for (stack, layer, kind), members in by_place.items():
        chosen = [m for m in members if m.name in wanted and m.name not in taken]
        experts = kind is not None and len(members) > 1 and all(m.expert is not None for m in members)
        unique = kind is not None and stacks_of_kind[kind] - {None} == {stack}
        if chosen == members and kind is not None and stack is not None and (experts or len(members) == 1):
            among = {} if unique or not stack else {"stack": matrices.stack_name(stack)}
            found.append(Target(tuple(members), {**among, "layer": layer, "matrix": kind}))
        else:
            found += [Target((matrix,), by_name(matrix)) for matrix in chosen]
    return found


def by_name(matrix: WeightMatrix) -> dict[str, Any]:
    """The fields of a :class:`Reduction` that name exactly this matrix, by the whole name of its module."""
    pattern = re.escape(re.sub(r"\[\d+\]$", "", matrix.name))
    return {"layer": None, "matrix": f"/{pattern}/", "expert": matrix.expert}


def _named(matrices: Catalogue, reduction: Reduction, stacks: Sequence[str]) -> list[WeightMatrix]:
    """The matrices that a reduction names; unlike in a plan, in every layer stack unless it names one."""
    found = []
    if reduction.stack is None and reduction.layer is not None and len(stacks) > 1:
        for stack in stacks:
            try:
                found += LaserPlan([replace(reduction, stack=stack)]).resolve(matrices)
            except UncuttableError:
                raise
            except ValueError:  # not every stack has what is named
                continue
    return [matrix for matrix, _ in found or LaserPlan([reduction]).resolve(matrices)]


def _places(within: str) -> list[str]:
    places = [piece.strip() for piece in pieces(within)]
    for place in places:
        if "@" in place:
            raise ValueError(f"`within` names matrices without rho, e.g. '*.mlp', got {place!r}")
    if not places:
        raise ValueError("`within` must name matrices, e.g. '*.all', got nothing")
    return places
