"""What became of a staged rollout: its stages, what the gates said to each, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.gates import GateVerdict
from laser_callback.stats.gain import Gain
from laser_callback.stats.gates import Gate
from laser_callback.support.files import write_json

GainAt = Literal["each", "last"]
Outcome = Literal["kept", "went on", "went back"]


@dataclass
class Stage:
    """One stage of a rollout.

    Attributes:
        verdict: what the gates said to its plan.
        outcome: "kept" (it is the last good stage now), "went on" (the constraints hold, and a gain is demanded of the
            last stage only) or "went back".
        seconds: time of the comparisons.
    """

    verdict: GateVerdict
    outcome: Outcome
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"outcome": self.outcome, "seconds": self.seconds, **self.verdict.to_dict()}


@dataclass
class RolloutResult:
    """The outcome of a rollout.

    Attributes:
        plan: the last good stage; ``None`` keeps the original.
        complete: whether that is the last stage that was declared.
        declared: the plans of all stages.
        stages: those that were run.
        interrupted: whether the rollout was stopped from outside.
        settings: all arguments, versions and the seed.
    """

    plan: LaserPlan | None
    complete: bool
    declared: tuple[LaserPlan, ...]
    stages: list[Stage] = field(default_factory=list)
    interrupted: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, verdict: GateVerdict, gates: Sequence[Gate], gain_at: GainAt, seconds: float = 0.0) -> bool:
        """Decide on the next stage.

        Args:
            verdict: what the gates say to its plan.
            gates: that were judged, in the order of the judgements.
            gain_at: demand the gains of each stage, or of the last only.
            seconds: that the stage took.

        Returns:
            Whether the rollout goes on, if there are stages left.
        """
        last = len(self.stages) + 1 == len(self.declared)
        outcome: Outcome = "kept" if verdict.accepted else "went back"
        if gain_at == "last" and not last:
            judged = zip(gates, verdict.judgements, strict=not verdict.failure)
            held = not verdict.failure and all(j.verdict == "pass" for gate, j in judged if not isinstance(gate, Gain))
            outcome = "went on" if held else "went back"
        if outcome == "kept":
            self.plan, self.complete = verdict.plan, last
        self.stages.append(Stage(verdict, outcome, seconds))
        return outcome != "went back"

    @property
    def log(self) -> list[str]:
        """What happened, a sentence per stage, and the verdict."""
        lines = []
        kept = "the original"
        for number, stage in enumerate(self.stages, 1):
            plan = brief(stage.verdict.plan)
            done = {"kept": f"kept {plan}", "went on": "went on", "went back": f"went back to {kept}"}[stage.outcome]
            kept = plan if stage.outcome == "kept" else kept
            lines.append(f"stage {number} of {len(self.declared)}, {plan}: {done}: {stage.verdict.reason}")
        return [*lines, self.verdict]

    @property
    def verdict(self) -> str:
        """The recommendation, in one line."""
        if self.complete:
            return f"use {brief(self.plan)}: every stage passed"
        left = len(self.declared) - len(self.stages)
        why = "interrupted" if self.interrupted else f"stage {len(self.stages)} of {len(self.declared)} did not pass"
        why += f", {left} not tried" * bool(left)
        return f"{'keep the original' if self.plan is None else f'use {brief(self.plan)}, a part of the plan'}: {why}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "complete": self.complete,
            "interrupted": self.interrupted,
            "verdict": self.verdict,
            "log": self.log,
            "declared": [str(plan) for plan in self.declared],
            "stages": [stage.to_dict() for stage in self.stages],
            "settings": self.settings,
        }

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        write_json(path, self.to_dict())
