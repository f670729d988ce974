"""Matrices cut in the metric of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from laser_callback.plans.target import Target
from laser_callback.search.sensitivities import View, Views
from laser_callback.search.strategies.base import Context, Need
from laser_callback.search.strategies.grid import OnGrid
from laser_callback.spectra.directions import InputDirections


class Whitened(OnGrid):
    """Every target at every rho, cut so that its outputs change least (SVD-LLM, arXiv 2403.07378, section 3.1).

    The metric is that of the second moments of the inputs on the screen set. What is kept cannot be found in the
    weights again: a plan of this strategy is used with the recipe that the search makes.
    """

    name = "whitened"
    needs: frozenset[Need] = frozenset({"gradient", "activations"})
    options: Mapping[str, Any] = MappingProxyType({"metric": "inputs"})

    def views(self, context: Context) -> Views:
        """Of each matrix whose inputs were seen, its directions in their metric."""
        return {View(metric="inputs"): [matrix for target in self.targets(context) for matrix in target.matrices]}

    @override
    def rhos(self, context: Context) -> Sequence[float]:
        return [rho for rho in context.rhos if rho]  # zero is zero in any metric

    @override
    def targets(self, context: Context) -> list[Target]:
        known = context.spectra.directions
        if not isinstance(known, InputDirections):
            return []
        return [t for t in super().targets(context) if all(known.knows(matrix.name) for matrix in t.matrices)]
