"""Candidates of a search with scores made up."""

from __future__ import annotations

from typing import Any

from laser_callback.plans.kinds import KINDS
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate


def candidate(layer: int | None, kind: str | None, rho: float, score: float | None = None, **more: Any) -> Candidate:
    named = Reduction(layer, kind, rho) if kind in KINDS and layer is not None else Reduction(None, "/x.*/", rho)
    return Candidate(named, layer, kind, rho, score=score, **more)
