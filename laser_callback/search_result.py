"""What a search found, and what it looked at on the way: for programs, files and reports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laser_callback.candidates import Candidate
from laser_callback.comparison import ALPHA
from laser_callback.constraints import Judgement
from laser_callback.files import write_atomically
from laser_callback.plan import LaserPlan
from laser_callback.result import LaserResult


@dataclass
class Phase:
    """Where time went.

    Attributes:
        name: such as "screen", "race" or "confirm".
        seconds: wall time.
        passes: evaluations of one example by (a part of) the model: examples times arms.
        whole_passes: the same, each counted by the share of the model's layers that were computed.
    """

    name: str
    seconds: float = 0.0
    passes: int = 0
    whole_passes: float = 0.0


@dataclass
class Trade:
    """A finalist's gain on race examples against its fluency: one point of the Pareto table.

    Attributes:
        plan: the finalist's whole plan, as text.
        gain: change of the objective, in the direction that is better.
        fluency: relative change of ``key``, 0.02 is 2 % more; ``None`` where it was not measured.
        efficient: no other finalist has both more gain and better fluency.
        chosen: this one went to confirmation.
    """

    plan: str
    gain: float
    fluency: float | None
    efficient: bool = False
    chosen: bool = False


def mark_efficient(trades: list[Trade]) -> None:
    """Mark the trades that no other beats in one respect without losing in the other."""
    for trade in trades:
        trade.efficient = trade.fluency is not None and not any(
            other.fluency is not None
            and other.gain >= trade.gain
            and other.fluency <= trade.fluency
            and (other.gain, other.fluency) != (trade.gain, trade.fluency)
            for other in trades
        )


@dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
        plan: what is recommended; ``None`` recommends the original model.
        found: the plan that went to confirmation, recommended or not; ``None`` if no candidate was better in the race.
        reason: why ``plan`` is what it is, in one sentence.
        objective: the keys that were improved, the first of which carries the claim.
        candidates: all candidates of all steps.
        trades: the finalists' gain against fluency.
        confirmed: original against ``found`` on the confirm set, which nothing before has seen. The only result.
        guard: original against ``found`` on the guard set.
        judgements: one per constraint, on the guard set.
        phases: time and passes.
        sets: examples in each set.
        settings: all arguments, versions and the seed.
        warnings: what a reader must know.
    """

    plan: LaserPlan | None
    found: LaserPlan | None
    reason: str
    objective: tuple[str, ...]
    candidates: list[Candidate]
    trades: list[Trade] = field(default_factory=list)
    confirmed: LaserResult | None = None
    guard: LaserResult | None = None
    judgements: list[Judgement] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    sets: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The recommendation and its reason, in one line."""
        return f"{'keep the original' if self.plan is None else f'use {self.plan}'}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "found": None if self.found is None else str(self.found),
            "reason": self.reason,
            "objective": list(self.objective),
            "confirmed": None if self.confirmed is None else self.confirmed.to_dict(),
            "guard": None if self.guard is None else self.guard.to_dict(),
            "judgements": [judgement.to_dict() for judgement in self.judgements],
            "trades": [asdict(trade) for trade in self.trades],
            "phases": [asdict(phase) for phase in self.phases],
            "sets": self.sets,
            "settings": self.settings,
            "warnings": self.warnings,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def decide(result: SearchResult, sign: int) -> None:
    """Recommend the confirmed plan or the original, and say why.

    The plan is recommended if the first objective's gain is significant, if there is a gain outside of what is said
    most, and if every constraint is shown to hold.

    Args:
        result: with ``found``, ``confirmed`` and ``judgements``; ``plan`` and ``reason`` are set.
        sign: 1 where the first objective is better high, -1 where it is better low.
    """
    assert result.confirmed is not None
    arm, key = result.confirmed["laser"], result.objective[0]
    row, prior = arm[key], arm.prior_checks
    gain = f"{key} {row.original:.4g} to {row.reduced:.4g} on {row.n} unseen examples"
    gain += f", p = {row.p:.2g}" if row.p is not None else f", {row.test}"
    broken = [f"{j.constraint} ({j.verdict})" for j in result.judgements if j.verdict != "pass"]
    if row.p is None or row.p > ALPHA or row.delta * sign <= 0:
        result.reason = f"a gain of {result.found} is not confirmed ({gain})"
    elif prior is not None and prior.prior_shift:
        shift = "there is no gain shown outside of the most predicted answers"
        result.reason = f"of {result.found} {shift} ({gain})"
    elif broken:
        result.reason = f"{result.found} improves ({gain}), but not shown is {'; '.join(broken)}"
    else:
        result.plan = result.found
        result.reason = f"it improves {gain}"
