"""Non-inferiority: a metric must be shown not to get worse than by a margin.

Contract: a constraint passes if the one-sided 95 % bound on the unfavourable side is inside of the margin.

Source: the fixed-margin method of non-inferiority trials, as in FDA (2016), Non-Inferiority Clinical Trials to
Establish Effectiveness.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias, cast

from laser_callback.stats.judgement import NUMBER, Judgement, Verdict, check_key, check_row, extrapolate, gate_text
from laser_callback.stats.outcomes import PairedResult
from laser_callback.stats.power import drop_ruled_out, examples_to_rule_out

Op: TypeAlias = Literal["<=", ">="]

ENOUGH_UNCHANGED = 59
"""If none of so many units changes, fewer than 5 % of all units do, at 95 % confidence (0.95^59 < 0.05)."""

DIVERGENCES = ("kl", "answer_kl")
"""Of these the original has 0 by definition, so that a bound on the change is one on the value."""

_TEXT = re.compile(rf"\s*(\S.*?)\s*(?::\s*(ratio|delta)?\s*)?(<=?|>=?)\s*([+-]?)\s*({NUMBER})\s*(%?)\s*")
A_CONSTRAINT = (
    "a constraint is `metric <= +margin` or `metric >= -margin`, such as 'perplexity <= +2 %' or 'log_loss <= +0.05', "
    "or says what it bounds: 'perplexity: ratio < 1.02', 'log_loss: delta < 0.05'"
)


@dataclass(frozen=True)
class Constraint:
    """A non-inferiority bound: how far a metric may move from its value in the original model.

    Args:
        key: the metric, as the row of the comparison is named.
        op: "<=" where higher is worse, ">=" where lower is worse.
        margin: the most (or least) that the change may be.
        relative: the margin is a fraction of the original's value (of its magnitude, so that ``<=`` bounds the metric
            from above whatever its sign); else it is in units of the metric.
        of_value: the margin bounds the value itself, which is the change where the original has 0 by definition.

    Raises:
        ValueError: if a field is not as stated.
    """

    key: str
    op: Op
    margin: float
    relative: bool = False
    of_value: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.op not in ("<=", ">="):
            raise ValueError(f"`op` must be '<=' or '>=', got {self.op!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"`margin` must be finite, got {self.margin}")

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read a constraint; ``str()`` writes it. ``<`` and ``<=`` are the same: it is a bound that is compared.

        Raises:
            ValueError: if the text is no constraint, or its margin has no sign and so could be meant as a value, other
                than of a divergence.

        >>> Constraint.parse("perplexity <= +2 %")
        Constraint(key='perplexity', op='<=', margin=0.02, relative=True)
        >>> Constraint.parse("perplexity: ratio < 1.02") == Constraint.parse("perplexity <= +2 %")
        True
        >>> str(Constraint.parse("paraphrase_robustness: delta > -0.020")), str(Constraint.parse("kl < 0.020"))
        ('paraphrase_robustness >= -0.02', 'kl <= 0.02')
        """
        text = gate_text(text)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{A_CONSTRAINT}; got {text!r}")
        key, what, op, sign, number, percent = match.groups()
        op = f"{op[0]}="
        # Decimal moves the point without rounding, so that text and number agree to the last digit.
        try:
            margin = Decimal(sign + number).scaleb(-2 if percent else 0)
        except ArithmeticError as error:
            raise ValueError(f"the margin in {text!r} is beyond what can be computed with") from error
        if what:
            if percent or (what == "ratio" and sign):
                raise ValueError(f"a {what} is a {'plain' if what == 'ratio' else 'signed'} number, got {text!r}")
            return cls(key, cast("Op", op), float(margin - (what == "ratio")), what == "ratio")
        if not sign and not percent and op == "<=" and key.rpartition("/")[2] in DIVERGENCES:
            return cls(key, "<=", float(margin), of_value=True)
        if not sign:
            raise ValueError(
                f"the margin in {text!r} must have a sign, because it bounds the change from the original and not the "
                f"value: '{key} {op} {'+' if op == '<=' else '-'}{number}{' %' if percent else ''}'"
            )
        return cls(key, cast("Op", op), float(margin), bool(percent))

    def __str__(self) -> str:
        margin = Decimal(repr(self.margin)).scaleb(2 if self.relative else 0).normalize()
        number = f"{margin:f}" if self.of_value else f"{margin:+f}"
        return f"{self.key} {self.op} {number}{' %' if self.relative else ''}"

    def too_few(self, n: int) -> str:
        """Why ``n`` independent examples of right and wrong cannot show that it holds, unless it gets better.

        Empty if they can, and for a relative margin, about which nothing is known ahead of the work.
        """
        drop = self.margin if self.op == "<=" else -self.margin
        if self.relative or not 0 < drop <= 1 or drop_ruled_out(n) <= drop:
            return ""
        return (
            f"{n:,} independent examples, none of which changes, leave a {'rise' if self.op == '<=' else 'drop'} of "
            f"{100 * drop_ruled_out(n):.1f} points possible, so that '{self}' stays undecided; "
            f"{examples_to_rule_out(drop):,} would do"
        )

    def judge(self, row: PairedResult) -> Judgement:
        """Judge the change of a metric.

        A relative change of a row that is not a ratio already is the difference over the original's value on the same
        examples, which is taken as known: its own sampling error is left out, and is second to that of the difference
        for margins of a few percent. An absolute change of a ratio is converted the same way.

        Args:
            row: the comparison of the metric on examples that nothing was chosen by.

        Raises:
            ValueError: if the row is of another metric, or the original has more than 0 of a bound value.
        """
        check_row(self.key, row)
        if self.of_value and row.kind != "pair" and row.original:
            raise ValueError(
                f"the margin in '{self}' must have a sign, because the original has {row.original:g} of {self.key!r}, "
                f"and what is bounded is the change from it: '{self.key} <= +{self.margin:g}'"
            )
        scale = self._scale(row)
        if not math.isfinite(scale):
            reason = f"the original's value is {row.original:g}, from which no change can be told on this scale"
            return self._judged(row, math.nan, None, "undecided", reason)
        change = row.delta * scale
        if math.isfinite(row.original) and not math.isfinite(row.reduced):
            reason = f"the reduced model's value is {row.reduced:g}"
            return self._judged(row, change, None, "fail", reason)
        if row.lower90 is None or row.upper90 is None:
            return self._judged(row, change, None, "undecided", f"not tested: {row.note or 'the row has no interval'}")

        # From here on as if higher were worse.
        sign = 1 if self.op == "<=" else -1
        ends = [sign * end * scale for end in (row.lower90, row.upper90)]
        estimate, favourable, unfavourable, margin = sign * change, min(ends), max(ends), sign * self.margin
        bound = sign * unfavourable
        if any(map(math.isnan, (estimate, *ends))):
            return self._judged(row, change, None, "undecided", "the interval is not a number")
        if favourable == unfavourable and row.n < ENOUGH_UNCHANGED:  # never of right and wrong: a score has a width
            reason = f"none of {row.n} {row.units} changed; {ENOUGH_UNCHANGED} would show that few do"
            return self._judged(row, change, bound, "undecided", reason)
        note = "relative to the original's value, taken as known" if self.relative and row.kind != "log_ratio" else ""
        if unfavourable <= margin:
            return self._judged(row, change, bound, "pass", note)
        if favourable > margin:
            return self._judged(row, change, bound, "fail", note)
        inside = estimate < margin
        needed = extrapolate(row.n, unfavourable - estimate if inside else estimate - favourable, margin - estimate)
        reason = "the change is too close to the margin to tell"
        if needed is not None:
            outcome = "pass" if inside else "fail"
            number = f"about {needed:,} {row.units} in place of {row.n:,}"
            reason = f"{number} would decide ({outcome}) if the change stays so"
        return self._judged(row, change, bound, "undecided", "; ".join(filter(None, [reason, note])))

    def _scale(self, row: PairedResult) -> float:
        """What turns the row's delta into the constraint's; NaN if nothing does."""
        if self.relative == (row.kind == "log_ratio"):
            return 1.0
        if not self.relative:
            return row.original
        return 1 / abs(row.original) if row.original and math.isfinite(row.original) else math.nan

    def _judged(self, row: PairedResult, change: float, bound: float | None, verdict: Verdict, note: str) -> Judgement:
        return Judgement(
            str(self), self.key, row.n, change, bound, verdict, note, None, self.relative, row.sample, self.margin
        )
