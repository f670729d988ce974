"""What must become better, how much worse the rest may become, and whether that has been shown.

Contract: a gate is a demand on one metric's change from the original to the reduced model, and judges rows of
:mod:`laser_callback.stats.paired`. A :class:`Gain` demands that the metric gets better, a :class:`Constraint` that it
does not get worse than by a margin. Passing is a claim and needs evidence: for a gain a significant test, for a
constraint the one-sided 95 % bound on the unfavourable side inside the margin. A mean that looks good, or harmless, on
too few examples is undecided, and what is undecided does not ship.

Source: the fixed-margin method of non-inferiority trials, as in FDA (2016), Non-Inferiority Clinical Trials to
Establish Effectiveness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias, cast

from scipy import stats

from laser_callback.stats.paired import ALPHA, PairedResult
from laser_callback.stats.priors import PriorChecks

Op: TypeAlias = Literal["<=", ">="]
Direction: TypeAlias = Literal["max", "min"]
Verdict: TypeAlias = Literal["pass", "fail", "undecided"]

ENOUGH_UNCHANGED = 59
"""If none of so many units changes, fewer than 5 % of all units do, at 95 % confidence (0.95^59 < 0.05)."""
MOST_TIMES = 1000
"""More than so many times as many examples nobody will collect."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TEXT = re.compile(rf"\s*(\S.*?)\s*(?::\s*(ratio|delta)?\s*)?(<=?|>=?)\s*([+-]?)\s*({_NUMBER})\s*(%?)\s*")
_GAIN = re.compile(rf"\s*(\S.*?)\s*:\s*gain((?:\s*,\s*(?:alpha\s+{_NUMBER}|direction\s+(?:max|min)))*)\s*")
_FORM = (
    "a constraint is `metric <= +margin` or `metric >= -margin`, such as 'perplexity <= +2 %' or 'log_loss <= +0.05', "
    "or says what it bounds: 'perplexity: ratio < 1.02', 'log_loss: delta < 0.05'"
)
_GAIN_FORM = "a gain is `metric: gain`, and may go on with `, alpha 0.05` and `, direction max` (or min)"
_CURES = {
    "perplexity": "perplexity needs running text (`text=`)",
    "paraphrase": "paraphrase metrics need facts with `paraphrases`",
    "choice": "choice metrics need facts with `choices`",
    "refusal": "refusals need probes (`ProbesDataModule`)",
    "answer_rate": "refusals need probes (`ProbesDataModule`)",
}


@dataclass(frozen=True)
class Judgement:
    """Whether a gate is passed.

    Attributes:
        gate: its text.
        key: the metric.
        n: independent units behind the row.
        change: estimated change from original to reduced, relative where the margin is.
        bound: bound of the change on the unfavourable side, on the same scale: one-sided 95 % for a constraint, the end
            of the 95 % interval for a gain; ``None`` without a test.
        verdict: "pass" (shown to be as demanded), "fail" (shown not to be) or "undecided".
        note: what a reader must know, such as how many examples would decide.
        p: of a gain, two-sided.
        relative: ``change`` and ``bound`` are fractions of the original's value; else they are in units of the metric.
    """

    gate: str
    key: str
    n: int
    change: float
    bound: float | None
    verdict: Verdict
    note: str = ""
    p: float | None = None
    relative: bool = False

    def amount(self, value: float | None) -> str:
        """The change or the bound in words."""
        if value is None or math.isnan(value):
            return "-"
        return f"{value:+.1%}" if self.relative else f"{value:+.3f}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON: a number that is not finite becomes ``None``."""
        fields = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Judgement:
        """The inverse of :meth:`to_dict`, but for what was infinite, which becomes NaN."""
        return cls(**{**data, "change": math.nan if data["change"] is None else data["change"]})


@dataclass(frozen=True)
class Gain:
    """Superiority: a metric must be shown to get better.

    Args:
        key: the metric, as the row of the comparison is named.
        alpha: level of the two-sided test.
        direction: "max" or "min", whichever is better; needed where the metric does not say so itself.

    Raises:
        ValueError: if a field is not as stated.
    """

    key: str
    alpha: float = ALPHA
    direction: Direction | None = None

    def __post_init__(self) -> None:
        _check_key(self.key)
        if not 0 < self.alpha < 1:
            raise ValueError(f"`alpha` must be between 0 and 1, got {self.alpha}")
        if self.direction not in (None, "max", "min"):
            raise ValueError(f"`direction` must be 'max', 'min' or None, got {self.direction!r}")

    @classmethod
    def parse(cls, text: str) -> Gain:
        """Read a gain; ``str()`` writes it.

        Raises:
            ValueError: if the text is none.

        >>> Gain.parse("val_loss: gain, alpha 0.01, direction min")
        Gain(key='val_loss', alpha=0.01, direction='min')
        >>> str(Gain.parse("answer_accuracy: gain, alpha 0.05"))
        'answer_accuracy: gain'
        """
        match = _GAIN.fullmatch(text)
        if match is None:
            raise ValueError(f"{_GAIN_FORM}; got {text!r}")
        named = [option.split() for option in match[2].split(",")[1:]]
        options = dict(named)
        if len(options) < len(named):
            raise ValueError(f"an option comes twice in {text!r}")
        return cls(match[1], float(options.get("alpha", ALPHA)), cast("Direction | None", options.get("direction")))

    def __str__(self) -> str:
        alpha = "" if self.alpha == ALPHA else f", alpha {self.alpha!r}"
        return f"{self.key}: gain{alpha}{f', direction {self.direction}' if self.direction else ''}"

    def judge(self, row: PairedResult, prior: PriorChecks | None = None) -> Judgement:
        """Judge the gain of a metric by the row's own p value: the gates are what was declared beforehand.

        Args:
            row: the comparison of the metric on examples that nothing was chosen by.
            prior: prior checks of the same examples. A gain that they do not show outside of the answers said most is
                undecided: it may be a shift of what is said and no more.

        Raises:
            ValueError: if the row is of another metric, or it is not known which direction is better.
        """
        _check_row(self.key, row)
        sign = self.sign(row)
        bound = row.lower if sign > 0 else row.upper
        relative = row.kind == "log_ratio"
        if row.p is None or bound is None:
            note = f"not tested: {row.note or 'the row has no test'}"
            return Judgement(str(self), self.key, row.n, row.delta, None, "undecided", note, None, relative)
        verdict: Verdict = "undecided"
        note = "no gain is shown"
        if row.p <= self.alpha and row.delta * sign < 0:
            verdict, note = "fail", "it is shown to get worse"
        elif row.p <= self.alpha and prior is not None and prior.prior_shift and math.isclose(row.delta, prior.delta):
            note = "no gain is shown outside of the answers said most"
        elif row.p <= self.alpha:
            verdict, note = "pass", ""
        elif row.delta * sign > 0 and self.alpha == ALPHA:  # the interval's level
            needed = _shown_from(row, bound, self.alpha)
            if needed is not None:
                note = f"{note}; about {needed:,} examples in place of {row.n:,} would show one if the change stays so"
        return Judgement(str(self), self.key, row.n, row.delta, bound, verdict, note, row.p, relative)

    def sign(self, row: PairedResult) -> int:
        """1 where the metric is better high, -1 where low.

        Raises:
            ValueError: if that is not known.
        """
        if self.direction is None and row.higher_is_better is None:
            raise ValueError(
                f"the gate '{self}' must say which direction is better, since {self.key!r} is logged as a plain "
                f"number: '{self}, direction max' or '{self}, direction min'"
            )
        return 1 if self.direction == "max" or (self.direction is None and row.higher_is_better) else -1


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
        _check_key(self.key)
        if self.op not in ("<=", ">="):
            raise ValueError(f"`op` must be '<=' or '>=', got {self.op!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"`margin` must be finite, got {self.margin}")

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read a constraint; ``str()`` writes it. ``<`` and ``<=`` are the same: it is a bound that is compared.

        Raises:
            ValueError: if the text is no constraint, or its margin has no sign and so could be meant as a value.

        >>> Constraint.parse("perplexity <= +2 %")
        Constraint(key='perplexity', op='<=', margin=0.02, relative=True)
        >>> Constraint.parse("perplexity: ratio < 1.02") == Constraint.parse("perplexity <= +2 %")
        True
        >>> str(Constraint.parse("paraphrase_robustness: delta > -0.020"))
        'paraphrase_robustness >= -0.02'
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{_FORM}; got {text!r}")
        key, what, op, sign, number, percent = match.groups()
        op = f"{op[0]}="
        # Decimal moves the point without rounding, so that text and number agree to the last digit.
        margin = Decimal(sign + number)
        if what:
            if percent or (what == "ratio" and sign):
                raise ValueError(f"a {what} is a {'plain' if what == 'ratio' else 'signed'} number, got {text!r}")
            return cls(key, cast("Op", op), float(margin - (what == "ratio")), what == "ratio")
        if not sign:
            raise ValueError(
                f"the margin in {text!r} must have a sign, because it bounds the change from the original and not the "
                f"value: '{key} {op} {'+' if op == '<=' else '-'}{number}{' %' if percent else ''}'"
            )
        return cls(key, cast("Op", op), float(margin.scaleb(-2 if percent else 0)), bool(percent))

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
        _check_row(self.key, row)
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
        if favourable == unfavourable and row.n < ENOUGH_UNCHANGED:
            reason = f"none of {row.n} units changed; {ENOUGH_UNCHANGED} would show that few do"
            return self._judged(row, change, bound, "undecided", reason)
        note = "relative to the original's value, taken as known" if self.relative and row.kind != "log_ratio" else ""
        if unfavourable <= margin:
            return self._judged(row, change, bound, "pass", note)
        if favourable > margin:
            return self._judged(row, change, bound, "fail", note)
        inside = estimate < margin
        needed = _extrapolate(row.n, unfavourable - estimate if inside else estimate - favourable, margin - estimate)
        reason = "the change is too close to the margin to tell"
        if needed is not None:
            outcome = "pass" if inside else "fail"
            reason = f"about {needed:,} examples in place of {row.n:,} would decide ({outcome}) if the change stays so"
        return self._judged(row, change, bound, "undecided", "; ".join(filter(None, [reason, note])))

    def _scale(self, row: PairedResult) -> float:
        """What turns the row's delta into the constraint's; NaN if nothing does."""
        if self.relative == (row.kind == "log_ratio"):
            return 1.0
        if not self.relative:
            return row.original
        return 1 / abs(row.original) if row.original and math.isfinite(row.original) else math.nan

    def _judged(self, row: PairedResult, change: float, bound: float | None, verdict: Verdict, note: str) -> Judgement:
        return Judgement(str(self), self.key, row.n, change, bound, verdict, note, None, self.relative)


Gate: TypeAlias = Gain | Constraint


def parse_gate(text: str) -> Gate:
    """Read a gate, a :class:`Gain` or a :class:`Constraint`.

    Raises:
        ValueError: if the text is neither.

    >>> parse_gate("accuracy: gain"), parse_gate("log_loss: delta < 0.05")
    (Gain(key='accuracy', alpha=0.05, direction=None), Constraint(key='log_loss', op='<=', margin=0.05, relative=False))
    """
    gain = re.search(r"[:\s]\s*gain\b(?!.*[<>])", text)  # also without the colon, for what its error says
    return Gain.parse(text) if gain else Constraint.parse(text)


def judge_all(gates: Sequence[Gate], rows: Sequence[PairedResult], prior: PriorChecks | None = None) -> list[Judgement]:
    """Judge each gate by the row of its metric.

    All must pass for a plan to ship, so no adjustment for their number is needed: an intersection-union test keeps its
    level (Berger 1982, Technometrics 24, 295-300).

    Raises:
        ValueError: if a gate's metric has no row, naming those that exist.
    """
    by_key = {row.metric: row for row in rows}
    for gate in gates:
        if gate.key not in by_key:
            cure = next((cure for word, cure in _CURES.items() if word in gate.key), "log it in `validation_step`")
            raise ValueError(
                f"the gate '{gate}' has no row to be judged by; there are {', '.join(by_key) or 'none'}. "
                f"Name one of these, or: {cure}"
            )
    return [
        gate.judge(by_key[gate.key], prior) if isinstance(gate, Gain) else gate.judge(by_key[gate.key])
        for gate in gates
    ]


def _check_key(key: str) -> None:
    if not key or key != key.strip():
        raise ValueError(f"`key` must be the name of a metric, got {key!r}")


def _check_row(key: str, row: PairedResult) -> None:
    if row.metric != key:
        raise ValueError(f"`row` must be of {key!r}, got {row.metric!r}")


def _shown_from(row: PairedResult, bound: float, alpha: float) -> int | None:
    """Units from which on a row's change would be significant if it stays so; of right and wrong by the exact test."""
    if row.fixed is None or row.broken is None:
        return _extrapolate(row.n, abs(row.delta - bound), abs(row.delta))
    scale = 1.0
    while scale < MOST_TIMES:
        scale *= 1.02
        gained, lost = round(scale * row.fixed), round(scale * row.broken)
        if stats.binomtest(gained, gained + lost).pvalue <= alpha:
            return _two_digits(scale * row.n)
    return None


def _extrapolate(n: int, width: float, distance: float) -> int | None:
    """Units at which half the interval's ``width`` has shrunk to ``distance``: it does with the root of their number.

    Rounded up to two digits; ``None`` where there is no such number, or more than anyone would collect.
    """
    times = (width / distance) ** 2 if distance else math.inf
    return _two_digits(n * times, n + 1) if times < MOST_TIMES else None


def _two_digits(number: float, least: int = 0) -> int:
    """Rounded up."""
    step = 10 ** max(math.floor(math.log10(max(number, 1))) - 1, 0)
    return max(math.ceil(number / step) * step, least)
