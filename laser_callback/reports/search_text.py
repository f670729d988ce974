"""The numbers of a search as text, the same in every report: units, names, and the order of what is listed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_callback.plans.short import brief
from laser_callback.reports.row_text import SHARES
from laser_callback.support.plain_json import finite

if TYPE_CHECKING:  # the page of a comparison needs no torch, as searches do
    from laser_callback.results.candidates import Candidate, Estimate
    from laser_callback.results.cleanup import Contender
    from laser_callback.results.other_tasks import FourParts
    from laser_callback.results.search import SearchResult, Trade

_OWN_UNIT = "units of the loss"  # that the user's step returns
REACHED = {"chosen": 0, "finalist": 1, "rejected": 1, "dropped out": 2, "screened out": 3}
"""How far a candidate of each status came."""


class GainText:
    """How a change of the objective is written: shares in points.

    Args:
        keys: of the objective.
        binary: the one key is known to be a share.
    """

    def __init__(self, keys: Sequence[str], binary: bool = False) -> None:
        self.told = f"{'mean ' * (len(keys) > 1)}change of {' and '.join(keys) or 'the objective'}"
        share = binary or (bool(keys) and all(any(word in key for word in SHARES) for key in keys))
        self.scale = 100.0 if share else 1.0
        self.decimals = 1 if share else None
        self.unit = "points" if share else _loss_unit(keys[0]) if len(keys) == 1 else ""

    @classmethod
    def of(cls, result: SearchResult) -> GainText:
        """Of a search, whose confirmed rows may tell that the objective is a share."""
        keys, arms = result.objective, {} if result.confirmed is None else result.confirmed.arms
        rows = [row for arm in arms.values() for row in arm.rows if (row.metric,) == keys]
        return cls(keys, any(row.kind == "binary" for row in rows))


def _loss_unit(key: str) -> str:
    if any(word in key for word in ("log_loss", "nll", "cross_entropy")):
        return "nats"
    return "soft error" if key == "soft_error" else ""


def score_name(result: SearchResult) -> str:
    """What the scores are."""
    unit = change_unit(result)
    return f"estimated change of the loss{f' in {unit}' * (unit != _OWN_UNIT)}"


def with_strategy(result: SearchResult) -> bool:
    """Whether it is worth saying who has proposed a candidate."""
    return len({candidate.strategy for candidate in result.candidates}) > 1


@dataclass(frozen=True)
class OfStrategy:
    """What a strategy has brought.

    Attributes:
        name: its name.
        proposed: candidates, of all steps; neighbours of leaders are among them.
        raced: those that were run.
        best: of these the one that came furthest, if any was run.
    """

    name: str
    proposed: int
    raced: int
    best: Candidate | None

    @property
    def gain(self) -> Estimate | None:
        """Of the best."""
        return None if self.best is None else self.best.gain


def by_strategy(result: SearchResult) -> list[OfStrategy]:
    """What each strategy has brought, in the order in which they were asked."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in result.candidates:
        groups.setdefault(candidate.strategy, []).append(candidate)
    raced = {name: sorted((c for c in of_it if c.examples), key=merit) for name, of_it in groups.items()}
    return [OfStrategy(name, len(groups[name]), len(run), next(iter(run), None)) for name, run in raced.items()]


def not_raced(result: SearchResult) -> list[str]:
    """Of which strategies nothing has raced, and why: a line for each reason."""
    raced = {candidate.strategy for candidate in result.candidates if candidate.examples}
    idle: dict[str, list[str]] = {}
    for candidate in result.candidates:
        if candidate.strategy not in raced:
            why = candidate.reason or "others were ahead of these in the order of the race"
            if why.startswith("the same cut as"):
                why = "they are cuts that another has proposed"
            of = idle.setdefault(candidate.strategy, [])
            of += [why] * (why not in of)
    by_reasons: dict[str, list[str]] = {}
    for strategy, reasons in idle.items():
        by_reasons.setdefault("; or ".join(reasons), []).append(strategy)
    return [f"nothing of {', '.join(strategies)} raced: {why}" for why, strategies in by_reasons.items()]


def off_the_map(result: SearchResult) -> list[Candidate]:
    """Candidates of the first step that have no place in a map of layers, kinds and rhos, the best first."""
    found = [candidate for candidate in result.candidates if not candidate.base and candidate.rho is None]
    return sorted(found, key=lambda candidate: (*merit(candidate)[:2], _by_score(candidate), *merit(candidate)[2:]))


OFF_THE_MAP = "they cut several matrices at once, or single directions, or at a rank and no rho"
"""Why candidates have no place in it."""


def change_unit(result: SearchResult) -> str:
    """Of changes of the loss."""
    key = result.settings.get("loss")
    if key is None:  # what the step returns
        return "nats" if any(candidate.loss for candidate in result.candidates) else _OWN_UNIT
    return _loss_unit(str(key)) or f"units of {key}"


def short_rho(rho: float) -> str:
    """A rho without what it does not need: ``.05``."""
    text = f"{rho:.4g}"
    return text[1:] if text.startswith("0.") else text


class Teller:
    """Tells all about a candidate of the first step."""

    def __init__(self, result: SearchResult) -> None:
        from laser_callback.results.candidates import ranks

        self._gain, self._unit, self._place = GainText.of(result), change_unit(result), ranks(result.candidates)
        self._with_strategy = with_strategy(result)
        self._ranked = sum(not candidate.base and id(candidate) in self._place for candidate in result.candidates)

    def __call__(self, candidate: Candidate) -> str:
        """In one line of text."""
        parts = [brief(candidate.plan), *[f"proposed by {candidate.strategy}"] * self._with_strategy]
        score = finite(candidate.score)
        if score is not None:
            parts.append(f"screen {score:+.3g}, rank {self._place[id(candidate)]:,} of {self._ranked:,}")
        if candidate.examples:
            parts.append(f"raced on {candidate.examples:,} examples")
        if candidate.gain is not None:
            parts.append(f"gain {_estimate(candidate.gain, self._gain.scale)} {self._gain.unit}".rstrip())
        if candidate.loss is not None:
            parts.append(f"loss {_estimate(candidate.loss, 1)} {self._unit}")
        if candidate.examples:
            parts.append(candidate.status + (f": {candidate.reason}" if candidate.reason else ""))
        return "; ".join(parts)


def _estimate(estimate: Estimate, scale: float) -> str:
    interval = ""
    if finite(estimate.lower) is not None and finite(estimate.upper) is not None:
        interval = f" [{scale * (estimate.lower or 0):+.3g}, {scale * (estimate.upper or 0):+.3g}]"
    return f"{scale * estimate.delta:+.3g}{interval}"


def merit(candidate: Candidate) -> tuple[Any, ...]:
    """How far it came, then what it gave; the text last, so that the order is always the same."""
    gain, loss = (finite(e.delta) if e else None for e in (candidate.gain, candidate.loss))
    return (
        REACHED[candidate.status],
        -candidate.examples,
        math.inf if gain is None else -gain,
        math.inf if loss is None else loss,
        candidate.base,
        str(candidate.plan),
    )


def _by_score(candidate: Candidate) -> float:
    score = None if candidate.examples else finite(candidate.score)
    return math.inf if score is None else score


def trade_order(trade: Trade) -> tuple[float, float, str]:
    """The most gain first; of equal gains the least loss of fluency."""
    gain, fluency = finite(trade.gain), finite(trade.fluency)
    return math.inf if gain is None else -gain, math.inf if fluency is None else fluency, trade.plan


def numbered(trades: Sequence[Trade]) -> dict[int, Trade]:
    """The trades in order, with the numbers that a picture has for them."""
    return dict(enumerate(sorted(trades, key=trade_order), 1))


def pictured(trades: Mapping[int, Trade]) -> dict[int, Trade]:
    """Those of :func:`numbered` that share a picture: what is far worse than all that one would choose flattens it."""
    known = {i: t for i, t in trades.items() if finite(t.gain) is not None and finite(t.fluency) is not None}
    choice = [trade for trade in known.values() if trade.efficient or trade.chosen] or list(known.values())
    worst = 3 * max((abs(trade.fluency or 0) for trade in choice), default=0.0)
    least = -3 * max((abs(trade.gain) for trade in choice), default=0.0)
    return {i: trade for i, trade in known.items() if (trade.fluency or 0) <= worst and trade.gain >= least}


def unbeaten_text(trades: Sequence[Trade]) -> str:
    """What :attr:`Trade.efficient` says, by what was measured."""
    if any(finite(trade.kl) is not None for trade in trades):
        return "no other finalist is better in gain, perplexity or kl and at least as good in the rest"
    return "no other finalist is better in gain or perplexity and at least as good in the other"


def kl_texts(trades: Sequence[Trade]) -> list[str]:
    """The divergence of each; ``-`` where it was not measured."""
    return ["-" if finite(trade.kl) is None else f"{trade.kl:.3g}" for trade in trades]


_KINDS = {"joint rule": "one rule for all", "single": "one matrix"}
CONTENDERS_LEGEND = "race: change of the objective on n examples; the loss decides between near-equals"


def contender_kind(row: Contender) -> str:
    """What a contender of a cleanup is, in a list of them."""
    return _KINDS.get(row.kind, row.strategy if row.kind == "strategy" else row.kind)


def contender_name(row: Contender) -> str:
    """Its plan in short, or the file of its checkpoint."""
    return Path(row.name).name if row.kind in ("checkpoint", "as trained") else brief(row.name)


def four_parts_text(parts: FourParts) -> str:
    """What a cleanup did to the other tasks and the target, in a sentence without its full stop."""
    said = [
        f"healed {parts.healed:.0%} of what {len(parts.damaged)} damaged lost" if parts.healed is not None else "",
        f"kept {parts.kept:.0%} of what {len(parts.improved)} improved gained" if parts.kept is not None else "",
        f"harmed {len(parts.harmed)} of {len(parts.unchanged)} unchanged" if parts.unchanged else "",
        f"target: {parts.retained:.0%} retained" if parts.retained is not None else "",
    ]
    return "; ".join(filter(None, said))


def seconds_text(seconds: float) -> str:
    """A time span, in the largest unit that fits."""
    if not 60 <= seconds < math.inf:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def aligned(values: Sequence[float | None], decimals: int | None = None) -> list[str]:
    """Signed numbers with as many decimals as show two digits of the largest; ``-`` for what is missing."""
    known = [abs(value) for value in map(finite, values) if value is not None]
    if decimals is None:
        largest = max(known, default=0.0)
        decimals = 1 if largest >= 10 else 2 if largest >= 0.1 or not largest else 4
    return ["-" if finite(value) is None else f"{value:+.{decimals}f}" for value in values]
