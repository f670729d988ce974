"""What gates say to a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from laser_callback.plans.plan import LaserPlan
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.judgement import Judgement


@dataclass
class GateVerdict:
    """What the gates say to a plan.

    Attributes:
        plan: the plan that was judged; ``None`` if it was another checkpoint.
        judgements: one per gate.
        results: the comparisons behind them, by the name of the data; ``""`` is the main one.
        failure: why the plan could not be judged, such as an exception of its passes; empty if it was.
    """

    plan: LaserPlan | None
    judgements: list[Judgement]
    results: dict[str, LaserResult] = field(repr=False)
    failure: str = ""

    @property
    def accepted(self) -> bool:
        """Whether every gate passes."""
        return not self.failure and all(judgement.verdict == "pass" for judgement in self.judgements)

    @property
    def reason(self) -> str:
        """Why the plan is accepted, or what keeps the original."""
        if self.failure:
            return self.failure
        if self.accepted:
            return f"every gate passes: {'; '.join(judgement.sentence for judgement in self.judgements)}"
        return "; ".join(judgement.sentence for judgement in self.judgements if judgement.verdict != "pass")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "accepted": self.accepted,
            "reason": self.reason,
            "failure": self.failure,
            "judgements": [judgement.to_dict() for judgement in self.judgements],
            "results": {name: result.to_dict() for name, result in self.results.items()},
        }
