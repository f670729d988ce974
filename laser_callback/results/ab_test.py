"""What an A/B test has found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_callback.stats.outcomes import row_named
from laser_callback.stats.unpaired import UnpairedResult
from laser_callback.support.files import write_json


@dataclass
class ABResult:
    """What an A/B test has found.

    Attributes:
        plan: the plan's text.
        fraction: share of all ids that the reduced model gets.
        seed: of the routing.
        examples: number of examples by arm.
        rows: one per metric.
    """

    plan: str
    fraction: float
    seed: int
    examples: dict[str, int]
    rows: list[UnpairedResult]

    def __getitem__(self, metric: str) -> UnpairedResult:
        return row_named(metric, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        write_json(path, self.to_dict())
