"""No idea at all: what every other strategy has to beat."""

from __future__ import annotations

import random

from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.grid import OnGrid


class AtRandom(OnGrid):
    """The grid in random order, drawn by the search's seed."""

    name = "random"

    def propose(self, context: Context) -> list[Candidate]:
        """The grid, shuffled."""
        draw = random.Random(context.seed)
        return sorted(super().propose(context), key=lambda _: draw.random())
