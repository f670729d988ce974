"""What a cleanup found: both searches, what they confirmed under one level, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.gates import GateVerdict
from laser_callback.results.search import SearchResult
from laser_callback.stats.holm import adjust
from laser_callback.stats.outcomes import ALPHA, PairedResult
from laser_callback.surgery.recipe import Recipe


@dataclass
class CleanupResult:
    """The outcome of :class:`~laser_callback.shipping.LaserCleanup`.

    Attributes:
        source: the checkpoint that was cleaned, or ``"last"``.
        searches: by mode.
        p_adjusted: by mode, Holm-adjusted over the modes; a mode that confirmed nothing counts as p = 1.
        gates: what the gates said, for the modes that came that far.
        mode, plan: what was accepted; ``None`` keeps the model as trained.
        recipe: the plan with hashes and numbers.
        checkpoint: the cleaned checkpoint, if there is one.
        report: the file with all of this as JSON.
    """

    source: str
    searches: dict[str, SearchResult]
    p_adjusted: dict[str, float] = field(default_factory=dict)
    gates: dict[str, GateVerdict] = field(default_factory=dict)
    mode: str | None = None
    plan: LaserPlan | None = None
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    report: Path | None = None

    def row(self, mode: str) -> PairedResult | None:
        """The confirmed change of the first objective."""
        search = self.searches[mode]
        return None if search.confirmed is None else search.confirmed["laser"][search.objective[0]]

    def adjust(self) -> None:
        """Give the modes their share of one level."""
        rows = []
        for mode in self.searches:
            row = self.row(mode)
            p = 1.0 if row is None or row.p is None else row.p
            rows.append(PairedResult(mode, None, 0, math.nan, math.nan, math.nan, p=p))
        self.p_adjusted = {row.metric: float(row.p_adjusted or 0.0) for row in adjust(rows, None)}

    def candidates(self) -> list[str]:
        """Modes whose search recommends its plan and whose gain holds after adjustment, the largest gain first."""
        found = {}
        for mode, search in self.searches.items():
            row = self.row(mode)
            if search.plan is not None and row is not None and self.p_adjusted[mode] <= ALPHA:
                found[mode] = abs(row.delta)
        return sorted(found, key=lambda mode: -found[mode])

    def reason(self, mode: str) -> str:
        """Why a mode was accepted or not."""
        search = self.searches[mode]
        if mode == self.mode or search.plan is None:
            return search.reason
        if self.p_adjusted[mode] > ALPHA:
            return f"not significant beside the other mode (p = {self.p_adjusted[mode]:.2g} after Holm)"
        if mode in self.gates and not self.gates[mode].accepted:
            return self.gates[mode].reason
        return f"the mode {self.mode} gains more"

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        if self.mode is not None:
            return f"cleaned by {brief(self.plan)} in {self.mode} mode: {self.reason(self.mode)}"
        return "keep the model as trained: " + "; ".join(f"{mode}: {self.reason(mode)}" for mode in self.searches)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "verdict": self.verdict,
            "source": self.source,
            "mode": self.mode,
            "plan": None if self.plan is None else str(self.plan),
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "p_adjusted": self.p_adjusted,
            "gates": {mode: verdict.to_dict() for mode, verdict in self.gates.items()},
            "searches": {mode: search.to_dict() for mode, search in self.searches.items()},
        }
