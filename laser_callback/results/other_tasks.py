"""What fine-tuning and a cleanup did to other tasks: damaged and healed, improved and kept.

Source of the four questions: DG-Hard (arXiv 2605.20296), which asks of a cleaned model what it heals, keeps, leaves
unharmed, and whether the target is retained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from laser_callback.stats.outcomes import ALPHA, PairedResult

TARGET = "target"
"""The name of what was fine-tuned for, on the confirm set."""


@dataclass(frozen=True)
class OtherTask:
    """One task under the base, the fine-tuned and the cleaned model, by the first objective.

    Attributes:
        name: of its data; :data:`TARGET` for what was fine-tuned for.
        tuning: from the base (``original``) to the fine-tuned model (``reduced``).
        cleaning: from the fine-tuned model to what went to confirmation; ``None`` if nothing did.
        sign: 1 where the metric is better high, -1 where it is better low.
    """

    name: str
    tuning: PairedResult
    cleaning: PairedResult | None
    sign: int

    @property
    def effect(self) -> Literal["damaged", "improved", "unchanged"]:
        """What fine-tuning is shown to have done, by the test of this task alone."""
        shown = _shown(self.tuning, self.sign)
        return "unchanged" if not shown else "improved" if shown > 0 else "damaged"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``effect`` follows from the rest."""
        cleaning = None if self.cleaning is None else self.cleaning.to_dict()
        return {
            "name": self.name,
            "effect": self.effect,
            "tuning": self.tuning.to_dict(),
            "cleaning": cleaning,
            "sign": self.sign,
        }


@dataclass(frozen=True)
class FourParts:
    """Four questions about a cleaned model, over all tasks.

    Attributes:
        damaged, improved, unchanged: the tasks by what fine-tuning is shown to have done to them, without the target.
        healed: of what fine-tuning took from the damaged tasks, the share that is back; ``None`` without any.
        kept: of what it gave to the improved tasks, the share that is still there.
        harmed: unchanged tasks that are shown to be worse after the cleanup.
        retained: of what it gave to the target, the share that is still there; ``None`` if it is not shown to have
            given anything. More than 1 where the cleanup improves it.
    """

    damaged: list[str]
    improved: list[str]
    unchanged: list[str]
    healed: float | None
    kept: float | None
    harmed: list[str]
    retained: float | None


def four_parts(tasks: Sequence[OtherTask]) -> FourParts:
    """The four parts of what a cleanup did.

    Sums over tasks: a task that lost much counts more than one that lost little.
    """
    others = [task for task in tasks if task.name != TARGET]
    damaged, improved, unchanged = (
        [task for task in others if task.effect == effect] for effect in ("damaged", "improved", "unchanged")
    )
    target = [task for task in tasks if task.name == TARGET and task.effect == "improved"]
    return FourParts(
        damaged=[task.name for task in damaged],
        improved=[task.name for task in improved],
        unchanged=[task.name for task in unchanged],
        healed=_share_back(damaged),
        kept=_share_left(improved),
        harmed=[t.name for t in unchanged if t.cleaning is not None and _shown(t.cleaning, t.sign) < 0],
        retained=_share_left(target),
    )


def _shown(row: PairedResult, sign: int) -> int:
    """1 for a change that is shown to be for the better, -1 for the worse, else 0."""
    if row.p is None or row.p > ALPHA or row.delta == 0:
        return 0
    return 1 if row.delta * sign > 0 else -1


def _share_back(tasks: Sequence[OtherTask]) -> float | None:
    """Of what fine-tuning changed, the share that the cleanup undoes."""
    cleaned = [(task.tuning.delta, task.cleaning.delta) for task in tasks if task.cleaning is not None]
    changed = sum(abs(tuning) for tuning, _ in cleaned)
    return -sum(cleaning * (1 if tuning > 0 else -1) for tuning, cleaning in cleaned) / changed if changed else None


def _share_left(tasks: Sequence[OtherTask]) -> float | None:
    undone = _share_back(tasks)
    return None if undone is None else 1 - undone
