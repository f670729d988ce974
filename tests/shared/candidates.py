"""Candidates of a search with scores made up."""

from __future__ import annotations

from typing import Any

from laser_callback.plans.kinds import KINDS
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate


def candidate(layer: int | None, kind: str | None, rho: float, score: float | None = None, **more: Any) -> Candidate:
    named = Reduction(layer, kind, rho) if kind in KINDS and layer is not None else Reduction(None, "/x.*/", rho)
    return Candidate(LaserPlan([named]), "laser", layer, kind, rho, score=score, **more)


def proposed(text: str, strategy: str = "laser", **more: Any) -> Candidate:
    """A candidate by its plan's text; one cut of a layer has a place in the map."""
    plan = LaserPlan.parse(text)
    if len(plan) > 1:
        return Candidate(plan, strategy, None, None, None, **more)
    (cut,) = plan
    layer = cut.layer if isinstance(cut.layer, int) else None
    kind = cut.matrix if cut.matrix in KINDS else None
    return Candidate(plan, strategy, layer, kind, cut.rho if isinstance(cut.rho, float) else None, **more)
