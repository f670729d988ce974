"""The paper's cuts, as its code makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from laser_callback.plans.target import RHOS
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.late_mlp import LateMLP

REFERENCE_RHOS = tuple((10 - rate) * 0.1 for rate in (1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95))
"""The rates of the paper's code as it turns them into shares, in floating point: they decide its ranks."""


class Reference(LateMLP):
    """Every target at the nine rates of the paper's code, cut by ``torch.svd_lowrank`` as there.

    The paper tries them all (``method="paper"``). Here they race in the order of what it found to help most.
    """

    name = "reference"
    options: Mapping[str, Any] = MappingProxyType({"of": "reference"})

    def rhos(self, context: Context) -> Sequence[float]:
        """The nine rates, unless the search is given others."""
        return REFERENCE_RHOS if tuple(context.rhos) == RHOS else context.rhos
