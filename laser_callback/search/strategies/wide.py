"""What is not factorised whole: of matrices for which that would cost more than all else, the leading directions alone.

They tell what a cut to a small rank does: what is removed is all that a matrix does, <G, W>, without what its first
directions do. Which of them are worth more is then known well enough to factorise those few whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.search.candidates import CAUTION
from laser_callback.search.sensitivities import Sensitivities, View, Views
from laser_callback.search.strategies.components import SHARES
from laser_callback.spectra.folder import size_for

WHOLE_FLOPS = 5e12
"""So much work goes into matrices that are factorised whole ahead of all that is known of them: 40 s of two cores."""
LEADING = 0.05
"""Share of a wide matrix' directions that is factorised."""
PICKED = 32
"""So many wide matrices are then factorised whole; about as many race."""

Key = tuple[View, str]


def flops(shape: tuple[int, int]) -> float:
    """Operations for a Gram matrix and its eigenvectors."""
    short, long = sorted(shape)
    return 2.0 * long * short**2 + 9.0 * short**3


def count_of(shape: tuple[int, int]) -> int:
    """How many directions of a wide matrix are asked for."""
    return max(int(LEADING * min(shape)), 1)


def wide(wanted: Views) -> set[Key]:
    """The matrices to factorise in part: the dearest, where all of them would take too long."""
    found: set[Key] = set()
    by_cost: dict[float, list[Key]] = {}
    for view, matrices in wanted.items():
        for matrix in matrices:
            if (view.metric, view.blocks) == ("none", 1):
                by_cost.setdefault(flops(matrix.shape), []).append((view, matrix.name))
    spent = 0.0
    for cost in sorted(by_cost):
        spent += cost * len(by_cost[cost])
        if spent > WHOLE_FLOPS:
            found.update(by_cost[cost])
    return found


def bytes_of(key: Key, matrix: WeightMatrix, in_part: Collection[Key]) -> int:
    """What is kept of a factor."""
    return 8 * count_of(matrix.shape) * min(matrix.shape) if key in in_part else size_for(matrix.shape)


def promising(wanted: Views, known: Sensitivities, coordinates: Mapping[Key, Tensor]) -> dict[View, list[WeightMatrix]]:
    """The wide matrices to factorise whole: those that promise most, with caution and without by turns.

    A matrix promises what the best cut to few of its directions does, or what it does to leave out the coordinates of
    its shorter side by whose removal the loss falls. Its singular directions are another basis of the same space, and
    what the best of one basis promise tells what those of another do: on SmolLM2 the two orders of the matrices have a
    rank correlation of 0.79 to 0.95.

    Args:
        wanted: what was looked at.
        known: the sensitivities of leading directions.
        coordinates: of each wide matrix what it does in each coordinate, by batch: shape (batches, min(m, n)).
    """
    promises: dict[Key, list[tuple[float, float]]] = {}
    for (view, name), each in coordinates.items():
        falling = int((known.over_examples(each) > 0).sum())
        of_head = known.heads.get(view, {}).get(name)
        promises[view, name] = [
            *(known.without_largest(each, count) for count in {max(round(share * falling), 1) for share in SHARES}),
            *(known.mean_and_error((-tail).tolist()) for tail in (() if of_head is None else known.tails(of_head).T)),
        ]
    orders = [
        sorted(promises, key=lambda key: min(mean + caution * error for mean, error in promises[key]))
        for caution in (CAUTION, 0.0)
    ]
    picked = {*list(dict.fromkeys(key for turn in zip(*orders, strict=True) for key in turn))[:PICKED]}
    return {view: chosen for view, of in wanted.items() if (chosen := [m for m in of if (view, m.name) in picked])}
