"""What became of each candidate of a search: as objects, and as flat rows.

A *candidate* is a plan that a strategy proposes. Ranks are those of the scores, within one step of the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from laser_callback.plans.plan import LaserPlan
from laser_callback.support.plain_json import finite
from laser_callback.support.reading import shown

_MOST_LAYERS = 10**6  # maps have a row for each
Status = Literal["screened out", "dropped out", "finalist", "rejected", "chosen"]


@dataclass(frozen=True)
class Estimate:
    """A paired difference on race examples: its mean, and a 95 % interval that no choice among candidates is in."""

    delta: float
    lower: float | None = None
    upper: float | None = None


@dataclass
class Candidate:
    """One candidate in one step of the search.

    Attributes:
        plan: what is cut; :attr:`whole` adds what was in place already.
        strategy: the name of what proposed it.
        layer, kind, rho: where it stands in the map of the search. A plan of several matrices may have no layer or kind
            that is that of all; one without a ``rho`` stands nowhere in the map.
        base: the plan in place when it was tried, as text; empty in the first step.
        score: the estimate of how the loss changes (lower is better), or ``None`` where there is none.
        error: its standard error; 0 where it is not known.
        examples: race examples that it was run on.
        gain: change of the objective on these, in the direction that is better, against ``base``.
        loss: change of the loss on these, where there is one.
        status: how far it came.
        reason: why no further.

    Raises:
        ValueError: if ``layer`` is none.
    """

    plan: LaserPlan
    strategy: str
    layer: int | None
    kind: str | None
    rho: float | None
    base: str = ""
    score: float | None = None
    error: float = 0.0
    examples: int = 0
    gain: Estimate | None = None
    loss: Estimate | None = None
    status: Status = "screened out"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.layer is not None and not 0 <= self.layer < _MOST_LAYERS:
            raise ValueError(f"`layer` must be at least 0 and less than {_MOST_LAYERS:,}, got {shown(self.layer)}")

    @property
    def whole(self) -> LaserPlan:
        """The whole plan that was run: ``base`` and ``plan``."""
        return LaserPlan([*(LaserPlan.parse(self.base) if self.base else ()), *self.plan])

    @property
    def helps(self) -> bool:
        """Whether it was better than ``base`` in the race: by the objective, or by the loss where that is the same."""
        gain = 0.0 if self.gain is None else self.gain.delta
        return gain > 0 or (gain == 0 and self.loss is not None and self.loss.delta < 0)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        estimates = {"gain": self.gain, "loss": self.loss}
        return {**vars(self), "plan": str(self.plan), **{name: e and asdict(e) for name, e in estimates.items()}}


def to_rows(candidates: Iterable[Candidate]) -> list[dict[str, Any]]:
    """One flat dictionary per candidate of each step, for CSV files and pictures.

    Keys: ``step`` (from 1), ``base``, ``plan``, ``strategy``, ``layer``, ``kind``, ``rho``, ``score``, ``rank`` (of the
    score in its step, from 1), ``examples``, ``gain``, ``gain_lower``, ``gain_upper``, ``loss``, ``loss_lower``,
    ``loss_upper`` (changes, see :class:`Candidate`), ``status`` and ``reason``. What is unknown or not finite is
    ``None``.
    """
    listed = list(candidates)
    place = ranks(listed)
    step = {base: number for number, base in enumerate(bases(listed), 1)}
    return [
        {
            "step": step[candidate.base],
            "base": candidate.base,
            "plan": str(candidate.plan),
            "strategy": candidate.strategy,
            "layer": candidate.layer,
            "kind": candidate.kind,
            "rho": candidate.rho,
            "score": finite(candidate.score),
            "rank": place.get(id(candidate)),
            "examples": candidate.examples,
            **_flat("gain", candidate.gain),
            **_flat("loss", candidate.loss),
            "status": candidate.status,
            "reason": candidate.reason,
        }
        for candidate in listed
    ]


def bases(candidates: Iterable[Candidate]) -> list[str]:
    """The base of each step, in the order of the steps."""
    return list(dict.fromkeys(candidate.base for candidate in candidates))


def ranks(candidates: Sequence[Candidate]) -> dict[int, int]:
    """By ``id`` of a candidate its place among its step's finite scores: 1 is the lowest, ties keep their order."""
    place: dict[int, int] = {}
    for base in bases(candidates):
        scored = [(finite(c.score), i) for i, c in enumerate(candidates) if c.base == base]
        in_order = sorted((score, i) for score, i in scored if score is not None)
        place |= {id(candidates[i]): number for number, (_, i) in enumerate(in_order, 1)}
    return place


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    ends = (None, None, None) if estimate is None else (estimate.delta, estimate.lower, estimate.upper)
    return dict(zip((name, f"{name}_lower", f"{name}_upper"), map(finite, ends), strict=True))
