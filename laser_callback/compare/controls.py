"""Three controls beside every cut: is it this matrix, is it its rank, or does any change of this size do the same?

If zeroing the matrices (rho = 0) helps as much as truncating them, the gain is not in what was kept; a plan that
zeroes them itself, such as a dropped layer, has no such control. If cutting other matrices at the same rho helps as
much, it is not in where the cut was made. If Gaussian noise of the same size helps as much, it is not in the singular
directions: random changes of weights can raise accuracy, too (arXiv 2603.12228).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import listed_places, mean_rank, places_rule
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.plans.target import by_name
from laser_callback.spectra.delta import BaseWeights

NOISES = 3
"""So many times noise is drawn: their mean is the control."""


class TooFewMatricesError(ValueError):
    """A plan leaves too few matrices for the random control."""


def control_plans(model: nn.Module, plan: LaserPlan, seed: int, base: BaseWeights | None) -> dict[str, LaserPlan]:
    """The plans of all controls by the names of their passes: ``zeroed``, ``random``, ``noise 1`` to ``noise 3``.

    The random one is, if the difference to a ``base`` is cut, among the matrices that differ from it; it is missing
    where the plan leaves too few others. The zeroed one is missing where it would be the plan itself.
    """
    among = base.changed if base is not None and plan.cuts_delta else lambda matrix: True
    try:
        others = {"random": random_plan(model, plan, seed, among)}
    except TooFewMatricesError:
        others = {}
    # As a plan's text takes them: from 0 on, of at most nine digits.
    noises = {f"noise {number}": noise_plan(plan, (NOISES * seed + number) % 10**9) for number in range(1, NOISES + 1)}
    zeroed = {} if all(map(_is_zero, plan)) else {"zeroed": zeroed_plan(plan)}
    return {**zeroed, **others, **noises}


def why_missing(plan: LaserPlan, controls: Mapping[str, LaserPlan]) -> dict[str, str]:
    """Of the controls that a plan does not have, by what they are called in a report, why."""
    reasons = {
        "zeroed": "the plan itself sets its matrices to zero",
        "random": "the plan leaves too few other matrices",
    }
    return {f"{control} control of {brief(plan)}": why for control, why in reasons.items() if control not in controls}


def _is_zero(reduction: Reduction) -> bool:
    """Whether nothing is left of what it cuts."""
    keeps_none = reduction.rho in (0, "k0") and reduction.keep == "head" and reduction.band == 1
    return keeps_none and reduction.scale == 0 and reduction.noise is None


def zeroed_plan(plan: LaserPlan) -> LaserPlan:
    """The same matrices at rho = 0."""
    return LaserPlan(
        Reduction(r.layer, r.matrix, 0.0, stack=r.stack, expert=r.expert, cut=r.cut, bias=r.bias) for r in plan
    )


def noise_plan(plan: LaserPlan, seed: int) -> LaserPlan:
    """The same matrices with Gaussian noise added in place of each cut, of the Frobenius norm of what it removes."""
    return LaserPlan(replace(reduction, noise=seed) for reduction in plan)


def random_plan(
    model: nn.Module, plan: LaserPlan, seed: int, among: Callable[[WeightMatrix], bool] = lambda matrix: True
) -> LaserPlan:
    """As many other matrices, drawn without replacement ``among`` those of all kinds, each cut like one of the plan's.

    From the plan's own layer stacks where these have enough: text does not go through a vision tower.

    Raises:
        TooFewMatricesError: if the model has too few matrices outside of the plan.
    """
    matrices = find_matrices(model)
    resolved = [pair for pair in plan.resolve(matrices) if not pair[0].is_bias]
    planned = {matrix.name for matrix, _ in resolved}
    others = [m for m in matrices if not m.obstacle and m.kind is not None and m.name not in planned and among(m)]
    if any(mean_rank(reduction.rho) is not None for reduction in plan):
        others = [m for m in others if m.parameter.ndim == 2]  # a pattern can name no single expert of a tensor
    if len(others) < len(resolved):
        raise TooFewMatricesError(
            f"it needs {len(resolved)} matrices that the plan leaves alone, and the model has {len(others)}"
        )
    stacks = {matrix.stack for matrix, _ in resolved}
    near = [matrix for matrix in others if matrix.stack in stacks]
    others = near if len(near) >= len(resolved) else others
    drawn = random.Random(seed).sample(others, len(resolved))
    reductions: list[Reduction] = []
    joint: dict[Reduction, list[WeightMatrix]] = {}
    for matrix, (_, reduction) in zip(drawn, resolved, strict=True):
        if mean_rank(reduction.rho) is None:
            reductions.append(_on(matrix, reduction, matrices))
        else:
            joint.setdefault(reduction, []).append(matrix)
    for reduction, members in joint.items():  # one threshold for all of them, as in the plan
        pattern = "|".join(re.escape(matrix.name) for matrix in members)
        reductions.append(replace(reduction, layer=None, stack=None, expert=None, matrix=f"/{pattern}/"))
    return LaserPlan(reductions)


def _on(matrix: WeightMatrix, reduction: Reduction, matrices: list[WeightMatrix]) -> Reduction:
    """``reduction`` of another matrix: by its layer and kind, or where two matrices share these, by its whole name.

    Places that it has not are left out; nothing is known of the metric of its inputs.
    """
    reduction = replace(reduction, metric="none")
    if (listed := listed_places(reduction.rho)) is not None:
        places = [place for run in listed for place in range(*run) if place < matrix.max_rank]
        reduction = replace(reduction, rho=places_rule(places) or "k1")
    at = (matrix.layer, matrix.kind, matrix.expert)
    namesakes = [m for m in matrices if (m.layer, m.kind, m.expert) == at]
    elsewhere = any(m.kind == matrix.kind and m.stack not in (None, matrix.stack) for m in matrices)
    if namesakes == [matrix] and matrix.kind is not None and not elsewhere:
        return replace(reduction, layer=matrix.layer, matrix=matrix.kind, stack=None, expert=matrix.expert)
    return replace(reduction, stack=None, **by_name(matrix))
