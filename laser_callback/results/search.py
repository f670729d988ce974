"""What a search found, and what it looked at on the way: for programs, files and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.candidates import Candidate
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.judgement import Judgement
from laser_callback.support.files import write_json
from laser_callback.support.plain_json import plain
from laser_callback.support.reading import Seconds, built, read_plain, shown
from laser_callback.surgery.recipe import Recipe


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
    seconds: Seconds = 0.0
    passes: int = 0
    whole_passes: float = 0.0


@dataclass
class Trade:
    """A finalist's gain on race examples against its fluency: one point of the Pareto table.

    Attributes:
        plan: the finalist's whole plan, as text.
        gain: change of the objective, in the direction that is better.
        fluency: relative change of the perplexity, 0.02 is 2 % more; ``None`` where it was not measured.
        efficient: no other finalist is better in gain, perplexity or ``kl`` and at least as good in the rest.
        chosen: this one went to confirmation.
        kl: divergence from the original in nats per token of text; ``None`` where it was not measured.
    """

    plan: str
    gain: float
    fluency: float | None
    efficient: bool = False
    chosen: bool = False
    kl: float | None = None


def mark_efficient(trades: list[Trade]) -> None:
    """Mark the trades that no other beats in one respect without losing in the other."""
    known = [trade for trade in trades if trade.fluency is not None]
    costs = [(-trade.gain, trade.fluency or 0.0, trade.kl or 0.0) for trade in known]
    for trade, own in zip(known, costs, strict=True):
        trade.efficient = not any(
            all(one <= two for one, two in zip(other, own, strict=True)) and other != own for other in costs
        )


@dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
        plan: what is recommended; ``None`` recommends the original model. With a ``base`` it is for the difference.
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
        base: the digest of the base's weights, if one was given.
        race: what candidates raced by, where that was not the objective.
        recipe: where ``found`` cuts in the metric of the inputs the same, with the directions that a plan's text does
            not say: give it wherever a plan is asked for.
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
    base: str | None = None
    recipe: Recipe | None = None
    race: str = ""

    @property
    def needed_base(self) -> str | None:
        """The digest of the base that ``found`` needs; ``None`` if it does not cut the difference to one."""
        return self.base if self.found is not None and self.found.cuts_delta else None

    @property
    def verdict(self) -> str:
        """The recommendation and its reason, in one line."""
        of = "" if self.needed_base is None else f" on the difference to the base {self.base}"
        return f"{'keep the original' if self.plan is None else f'use {brief(self.plan)}{of}'}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON: a number that is not finite becomes ``None``."""
        data = {
            "plan": None if self.plan is None else str(self.plan),
            "found": None if self.found is None else str(self.found),
            "base": self.base,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "reason": self.reason,
            "race": self.race,
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
        return plain(data)

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchResult:
        """The inverse of :meth:`to_dict`: all numbers, and no examples.

        Raises:
            ValueError: naming the place of what is missing, unknown or of another type.
        """
        result: SearchResult = built(cls, data)
        if result.recipe is not None:
            result.found = result.recipe
            result.plan = result.plan and result.recipe
        return result

    @classmethod
    def from_json(cls, path: str | Path) -> SearchResult:
        """Read what :meth:`to_json` has written; see :meth:`from_dict`."""
        return read_plain(path, "path", cls.from_dict)


def result_of(data: Any) -> LaserResult | SearchResult:
    """The result whose :meth:`to_dict` has given ``data``.

    Raises:
        ValueError: if it is of something else, or as from :meth:`SearchResult.from_dict`.
    """
    keys = [*data] if isinstance(data, Mapping) else []
    if "candidates" in keys:
        return SearchResult.from_dict(data)
    if "arms" in keys:
        return LaserResult.from_dict(data)
    raise ValueError(
        "it is no result: expected what `LaserCallback(report='....json')` or `laser-callback search` writes, with "
        f"'arms' or 'candidates' in it, got {shown(keys or data)}"
    )
