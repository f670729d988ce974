"""What a cleanup found: the search, what it was held against, what was confirmed, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.comparison import LaserResult
from laser_callback.results.gates import GateVerdict
from laser_callback.results.other_tasks import FourParts, OtherTask, four_parts
from laser_callback.results.search import SearchResult
from laser_callback.stats.judgement import Judgement
from laser_callback.support.plain_json import plain
from laser_callback.support.reading import built, read_plain, typed
from laser_callback.surgery.recipe import Recipe

ContenderKind = Literal["as trained", "checkpoint", "WiSE-FT", "joint rule", "single", "strategy"]


@dataclass(frozen=True)
class Contender:
    """One row of the table: the model as trained, or the best of its kind.

    Attributes:
        kind: ``"as trained"``; ``"checkpoint"`` of another epoch; of the plans ``"WiSE-FT"`` (the whole change made
            smaller), ``"joint rule"`` (the whole change under another rule), ``"single"`` (one matrix), and
            ``"strategy"`` for all others.
        name: the plan as text, or the checkpoint's path.
        strategy: what proposed the plan.
        gain: change of the objective on race examples, in the direction that is better; what is chosen is chosen by it.
        examples: so many race examples.
        value: of the first objective on the confirm set.
        said_most: there, the share of its own most frequent answer; ``None`` where the step returns no predictions.
        balanced: there, the share right averaged over the answers.
        confirmed: this one went to confirmation. All other values on the confirm set are for information: nothing is
            claimed of them, and nothing was chosen by them.
    """

    kind: ContenderKind
    name: str
    strategy: str = ""
    gain: float | None = None
    examples: int = 0
    value: float | None = None
    said_most: float | None = None
    balanced: float | None = None
    confirmed: bool = False


@dataclass
class CleanupResult:
    """The outcome of :class:`~laser_callback.shipping.LaserCleanup`.

    Attributes:
        source: the checkpoint that was cleaned, or ``"last"``.
        search: for a plan, on the weights of ``source``.
        contenders: one of each kind of cut, and the checkpoints of other epochs. What was found is the one of its kind,
            of the others it is what gained most.
        tried: what was held against ``source`` on the confirm set: a plan as text, or another checkpoint; ``None`` if
            nothing was better in the race.
        confirmed: that comparison, the one that claims anything.
        judgements: of the constraints on the guard set, in it.
        gates: what the gates said, if it came that far.
        others: other tasks, with the target first.
        notes: what a reader must know besides ``search.warnings``.
        reason: why the outcome is what it is, in one sentence.
        plan: the plan that was accepted, if it was one.
        recipe: the plan with hashes and numbers.
        checkpoint: what to use in place of ``source``: the cleaned checkpoint, or that of another epoch; ``None`` keeps
            the model as trained.
        report: the file with all of this as JSON.
    """

    source: str
    search: SearchResult
    contenders: list[Contender] = field(default_factory=list)
    tried: str | None = None
    confirmed: LaserResult | None = None
    judgements: list[Judgement] = field(default_factory=list)
    gates: GateVerdict | None = None
    others: Sequence[OtherTask] = ()
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    plan: LaserPlan | None = None
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    report: Path | None = None

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        if self.plan is not None:
            return f"cleaned by {brief(self.plan)}: {self.reason}"
        if self.checkpoint is not None:
            return f"use the checkpoint {self.checkpoint}: {self.reason}"
        return f"keep the model as trained: {self.reason}"

    @property
    def four_parts(self) -> FourParts | None:
        """What it did to the other tasks; ``None`` without any."""
        return four_parts(self.others) if self.others else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON: a number that is not finite becomes ``None``."""
        data = {
            "verdict": self.verdict,
            "source": self.source,
            "plan": None if self.plan is None else str(self.plan),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "tried": self.tried,
            "contenders": [asdict(contender) for contender in self.contenders],
            "confirmed": None if self.confirmed is None else self.confirmed.to_dict(),
            "judgements": [judgement.to_dict() for judgement in self.judgements],
            "gates": None if self.gates is None else self.gates.to_dict(),
            "others": [task.to_dict() for task in self.others],
            "four_parts": None if self.four_parts is None else asdict(self.four_parts),
            "notes": self.notes,
            "reason": self.reason,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "search": self.search.to_dict(),
        }
        return plain(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CleanupResult:
        """The inverse of :meth:`to_dict`: all numbers, and no examples.

        Raises:
            ValueError: naming the place of what is missing, unknown or of another type.
        """
        fields = typed(dict[str, Any], data)
        checkpoint = typed(str | None, fields.pop("checkpoint", None))
        return built(cls, fields, checkpoint=None if checkpoint is None else Path(checkpoint))

    @classmethod
    def from_json(cls, path: str | Path) -> CleanupResult:
        """Read the report of a cleanup; see :meth:`from_dict`."""
        result: CleanupResult = read_plain(path, "path", cls.from_dict)
        result.report = Path(path)
        return result
