"""What the LASER paper found to help most, without a look at the model."""

from __future__ import annotations

from laser_callback.plans.kinds import MLP_KINDS
from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.grid import OnGrid


class LateMLP(OnGrid):
    """MLP weights, late layers, small rho (arXiv 2312.13558, section 5).

    Layer by layer from the last, in each all rhos but the zero matrix from the smallest; then the same for the others.
    """

    name = "late-mlp"

    def propose(self, context: Context) -> list[Candidate]:
        """The grid in this order."""

        def place(candidate: Candidate) -> tuple[bool, int, bool, float]:
            layer, rho = candidate.layer, candidate.rho or 0.0
            return candidate.kind not in MLP_KINDS, 1 if layer is None else -layer, rho == 0, rho

        return sorted(super().propose(context), key=place)
