"""Directions of the fine-tuned weights that the base did not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import places_rule
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context, Need
from laser_callback.search.strategies.joint import each
from laser_callback.spectra.spectrum import Spectrum, as_double

TOP = 10
"""So many leading directions of a matrix are looked at, as in PEFT's ``reduce_intruder_dimension``."""
COSINES = (0.5, 0.3)
"""A direction with no cosine of this size to any of the base's is an intruder; the first is PEFT's."""
SCALES = (0.75, 0.5, 0.0)
"""What is left of an intruder: the first is PEFT's ``mitigation_lambda``."""


class Intruders:
    """Shrink the singular directions that fine-tuning has brought in (arXiv 2410.21228, section 5).

    With u_j the left singular vectors of the fine-tuned W and w_i those of W_base, j is an intruder if it is among the
    first ten and max_i ``|u_j' w_i|`` is less than a threshold. What is proposed is
    W + (scale - 1) sum_j sigma_j u_j v_j' over all intruders of the whole model at once; PEFT's function does the same
    to an adapter, and then takes the difference back to the adapter's rank.

    Which directions they are is written into the plan, so that no base is needed to use it.
    """

    name = "intruders"
    needs: frozenset[Need] = frozenset({"base"})

    def propose(self, context: Context) -> Iterator[Candidate]:
        """Each threshold at each scale."""
        base = context.spectra.base
        assert base is not None
        changed = [(m, address) for m, address in each(context.targets) if base.changed(m)]
        cosines = [(address, largest_cosines(matrix, context)) for matrix, address in changed]
        seen: set[LaserPlan] = set()
        for scale in SCALES:
            for threshold in COSINES:
                lists = [(a, places_rule(torch.nonzero(found < threshold).flatten().tolist())) for a, found in cosines]
                cuts = [Reduction(rho=rule, keep="tail", scale=scale, **a) for a, rule in lists if rule is not None]
                if cuts and (plan := LaserPlan(cuts)) not in seen:
                    seen.add(plan)
                    yield context.candidate(self, plan)

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterator[Candidate]:
        """The same directions, shrunk a little less and more."""
        gap = 0.05 if closest else 0.1
        scale = next(iter(leader.plan)).scale
        for other in (scale - gap, scale + gap):
            if 0 <= other < 1:
                yield context.candidate(self, LaserPlan(replace(r, scale=round(other, 3)) for r in leader.plan))


def largest_cosines(matrix: WeightMatrix, context: Context) -> Tensor:
    """Of each leading left singular vector of a matrix the largest cosine, in size, to any of its base's.

    Returns:
        Float64, shape (min(TOP, m, n),). A direction of singular value 0 is like all.
    """
    spectra, tuned = context.spectra, matrix.value
    assert spectra.base is not None
    base = spectra.base.matrix(matrix.name, tuned)
    own = left_vectors(tuned, spectra.of(tuned, matrix.name))[:, :TOP]
    others = left_vectors(base, spectra.of(base, f"{matrix.name} of the base"))
    largest = (own.T @ others).abs().amax(1)
    return torch.where(own.norm(dim=0) > 0, largest, 1.0)


def left_vectors(matrix: Tensor, spectrum: Spectrum) -> Tensor:
    """Left singular vectors in columns, float64, shape (m, min(m, n)); 0 where the singular value is."""
    if matrix.shape[0] < matrix.shape[1]:
        return torch.where(spectrum.values > 0, spectrum.basis, 0.0)
    return torch.where(spectrum.values > 0, as_double(matrix) @ spectrum.basis / spectrum.values, 0.0)
