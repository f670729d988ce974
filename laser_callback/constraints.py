"""How much worse a metric may become, and whether it has been shown that it does not become worse than that.

Contract: a :class:`Constraint` bounds a metric's change from the original to the reduced model, and judges rows of
:mod:`laser_callback.comparison`. Passing is a claim ("not worse than the margin") and needs evidence like any other:
the one-sided 95 % bound on the unfavourable side must lie inside the margin. A mean that looks harmless on too few
examples is undecided, and what is undecided does not ship.

Source: the fixed-margin method of non-inferiority trials, as in FDA (2016), Non-Inferiority Clinical Trials to
Establish Effectiveness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias, cast

from laser_callback.comparison import PairedResult

Op: TypeAlias = Literal["<=", ">="]

ENOUGH_UNCHANGED = 59
"""If none of so many units changes, fewer than 5 % of all units do, at 95 % confidence (0.95^59 < 0.05)."""

_TEXT = re.compile(r"\s*(\S.*?)\s*(<=|>=)\s*([+-]?)\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*")
_FORM = (
    "a constraint is `metric <= +margin` or `metric >= -margin`, such as 'perplexity <= +2 %' or 'log_loss <= +0.05'"
)
_CURES = {
    "perplexity": "perplexity needs running text (`text=`)",
    "paraphrase": "paraphrase metrics need facts with `paraphrases`",
    "choice": "choice metrics need facts with `choices`",
}


@dataclass(frozen=True)
class Judgement:
    """Whether a constraint holds.

    Attributes:
        constraint: its text.
        key: the metric.
        n: independent units behind the row.
        change: estimated change from original to reduced, relative where the margin is.
        bound: one-sided 95 % bound of the change on the unfavourable side, on the same scale; ``None`` without a test.
        verdict: "pass" (shown to be inside the margin), "fail" (shown to be outside) or "undecided".
        note: what a reader must know, such as how many examples would decide.
    """

    constraint: str
    key: str
    n: int
    change: float
    bound: float | None
    verdict: Literal["pass", "fail", "undecided"]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON: a number that is not finite becomes ``None``."""
        fields = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


@dataclass(frozen=True)
class Constraint:
    """A non-inferiority bound: how far a metric may move from its value in the original model.

    Args:
        key: the metric, as the row of the comparison is named.
        op: "<=" where higher is worse, ">=" where lower is worse.
        margin: the most (or least) that the change may be.
        relative: the margin is a fraction of the original's value (of its magnitude, so that ``<=`` bounds the metric
            from above whatever its sign); else it is in units of the metric.

    Raises:
        ValueError: if a field is not as stated.
    """

    key: str
    op: Op
    margin: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.key or self.key != self.key.strip():
            raise ValueError(f"`key` must be the name of a metric, got {self.key!r}")
        if self.op not in ("<=", ">="):
            raise ValueError(f"`op` must be '<=' or '>=', got {self.op!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"`margin` must be finite, got {self.margin}")

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read a constraint; ``str()`` writes it.

        Raises:
            ValueError: if the text is no constraint, or its margin has no sign and so could be meant as a value.

        >>> Constraint.parse("perplexity <= +2 %")
        Constraint(key='perplexity', op='<=', margin=0.02, relative=True)
        >>> str(Constraint.parse("paraphrase_robustness >= -0.020"))
        'paraphrase_robustness >= -0.02'
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{_FORM}; got {text!r}")
        key, op, sign, number, percent = match.groups()
        if not sign:
            raise ValueError(
                f"the margin in {text!r} must have a sign, because it bounds the change from the original and not the "
                f"value: '{key} {op} {'+' if op == '<=' else '-'}{number}{' %' if percent else ''}'"
            )
        # Decimal moves the point without rounding, so that text and number agree to the last digit.
        margin = float(Decimal(sign + number).scaleb(-2 if percent else 0))
        return cls(key, cast("Op", op), margin, bool(percent))

    def __str__(self) -> str:
        margin = Decimal(repr(self.margin)).scaleb(2 if self.relative else 0).normalize()
        return f"{self.key} {self.op} {margin:+f}{' %' if self.relative else ''}"

    def judge(self, row: PairedResult) -> Judgement:
        """Judge the change of a metric.

        A relative change of a row that is not a ratio already is the difference over the original's value on the same
        examples, which is taken as known: its own sampling error is left out, and is second to that of the difference
        for margins of a few percent. An absolute change of a ratio is converted the same way.

        Args:
            row: the comparison of the metric on examples that nothing was chosen by.

        Raises:
            ValueError: if the row is of another metric.
        """
        if row.metric != self.key:
            raise ValueError(f"`row` must be of {self.key!r}, got {row.metric!r}")
        scale = self._scale(row)
        if not math.isfinite(scale):
            reason = f"the original's value is {row.original:g}, from which no change can be told on this scale"
            return self._undecided(row, math.nan, None, reason)
        change = row.delta * scale
        if math.isfinite(row.original) and not math.isfinite(row.reduced):
            reason = f"the reduced model's value is {row.reduced:g}"
            return Judgement(str(self), self.key, row.n, change, None, "fail", reason)
        if row.lower90 is None or row.upper90 is None:
            return self._undecided(row, change, None, f"not tested: {row.note or 'the row has no interval'}")

        # From here on as if higher were worse.
        sign = 1 if self.op == "<=" else -1
        ends = [sign * end * scale for end in (row.lower90, row.upper90)]
        estimate, favourable, unfavourable, margin = sign * change, min(ends), max(ends), sign * self.margin
        bound = sign * unfavourable
        if any(map(math.isnan, (estimate, *ends))):
            return self._undecided(row, change, None, "the interval is not a number")
        if favourable == unfavourable and row.n < ENOUGH_UNCHANGED:
            reason = f"none of {row.n} units changed; {ENOUGH_UNCHANGED} would show that few do"
            return self._undecided(row, change, bound, reason)
        note = "relative to the original's value, taken as known" if self.relative and row.kind != "log_ratio" else ""
        if unfavourable <= margin:
            return Judgement(str(self), self.key, row.n, change, bound, "pass", note)
        if favourable > margin:
            return Judgement(str(self), self.key, row.n, change, bound, "fail", note)
        inside = estimate < margin
        needed = _extrapolate(row.n, unfavourable - estimate if inside else estimate - favourable, margin - estimate)
        reason = "the change is too close to the margin to tell"
        if needed is not None:
            outcome = "pass" if inside else "fail"
            reason = f"about {needed:,} examples in place of {row.n:,} would decide ({outcome}) if the change stays so"
        return self._undecided(row, change, bound, "; ".join(filter(None, [reason, note])))

    def _scale(self, row: PairedResult) -> float:
        """What turns the row's delta into the constraint's; NaN if nothing does."""
        if self.relative == (row.kind == "log_ratio"):
            return 1.0
        if not self.relative:
            return row.original
        return 1 / abs(row.original) if row.original and math.isfinite(row.original) else math.nan

    def _undecided(self, row: PairedResult, change: float, bound: float | None, note: str) -> Judgement:
        return Judgement(str(self), self.key, row.n, change, bound, "undecided", note)


def judge_all(constraints: Sequence[Constraint], rows: Sequence[PairedResult]) -> list[Judgement]:
    """Judge each constraint by the row of its metric.

    All must pass for a plan to ship, so no adjustment for their number is needed: an intersection-union test keeps its
    level (Berger 1982, Technometrics 24, 295-300).

    Raises:
        ValueError: if a constraint's metric has no row, naming those that exist.
    """
    by_key = {row.metric: row for row in rows}
    for constraint in constraints:
        if constraint.key not in by_key:
            cure = next(
                (cure for word, cure in _CURES.items() if word in constraint.key), "log it in `validation_step`"
            )
            raise ValueError(
                f"the constraint '{constraint}' has no row to be judged by; there are {', '.join(by_key) or 'none'}. "
                f"Constrain one of these, or: {cure}"
            )
    return [constraint.judge(by_key[constraint.key]) for constraint in constraints]


def _extrapolate(n: int, width: float, distance: float) -> int | None:
    """Units at which half the interval's ``width`` has shrunk to ``distance``: it does with the root of their number.

    Rounded up to two digits; ``None`` where there is no such number, or none that anyone could collect.
    """
    needed = n * (width / distance) ** 2 if distance else math.inf
    if not needed < 1e9:
        return None
    step = 10.0 ** max(math.floor(math.log10(max(needed, 1))) - 1, 0)
    return max(math.ceil(needed / step) * int(step), n + 1)
