"""What is said of a demand on a metric: passed, failed or undecided, and how many examples would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from laser_callback.stats.outcomes import PairedResult, plain_fields

Verdict: TypeAlias = Literal["pass", "fail", "undecided"]

MOST_TIMES = 1000
"""More than so many times as many examples nobody will collect."""
LONGEST = 500
"""Characters in the text of a gate."""
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
"""A number without a sign, in the text of a gate."""


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
        sample: what was looked at, such as "300 examples in 120 clusters".
        margin: of a constraint, on the scale of ``change``.
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
    sample: str = ""
    margin: float | None = None

    @property
    def sentence(self) -> str:
        """What was found, as a sentence without its full stop."""
        says = {"pass": "passes", "fail": "fails", "undecided": "is undecided"}[self.verdict]
        told = f"'{self.gate}' {says}: the change is {self.amount(self.change)}"
        if self.bound is not None:
            side = "at least" if self.bound <= self.change else "at most"
            told += f", {side} {self.amount(self.bound)} at 95 % confidence"
        told += "" if self.p is None else f" (p = {self.p:.2g})"
        told += f", on {self.sample or f'{self.n:,} examples'}"
        return f"{told}; {self.note}" if self.note else told

    def amount(self, value: float | None) -> str:
        """The change or the bound in words, with digits enough to tell it from the margin."""
        return "-" if value is None or math.isnan(value) else amount_text(value, self.relative, "+", self.margin)

    @property
    def counted(self) -> str:
        """How many independent units there are, such as "120 clusters"."""
        return self.sample.rpartition(" in ")[2] or f"{self.n:,} examples"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON: a number that is not finite becomes ``None``."""
        return plain_fields(self)


def amount_text(value: float, relative: bool, sign: str = "", margin: float | None = None) -> str:
    """A change in units of the metric, or as a share of the original's value; never rounded to the ``margin``."""
    forms = [f"{sign}.{digits}{'%' if relative else 'f'}" for digits in range(1 if relative else 3, 9)]
    texts = [format(value, form) for form in forms]
    apart = (t for t, form in zip(texts, forms, strict=True) if margin is None or t != format(margin, form))
    return texts[0] if value == margin else next(apart, texts[-1])


def gate_text(text: str) -> str:
    """The text of a gate without outer spaces.

    Raises:
        ValueError: if it is longer than any gate is: reading takes the square of its length.
    """
    if len(found := text.strip()) > LONGEST:
        raise ValueError(f"a gate has at most {LONGEST:,} characters, got {len(found):,}: {found[:40]!r}...")
    return found


def check_key(key: str) -> None:
    """Refuse what is no name of a metric."""
    if not key or key != key.strip():
        raise ValueError(f"`key` must be the name of a metric, got {key!r}")


def check_row(key: str, row: PairedResult) -> None:
    """Refuse the row of another metric."""
    if row.metric != key:
        raise ValueError(f"`row` must be of {key!r}, got {row.metric!r}")


def extrapolate(n: int, width: float, distance: float) -> int | None:
    """Units at which half the interval's ``width`` has shrunk to ``distance``: it does with the root of their number.

    Rounded up to two digits; ``None`` where there is no such number, or more than anyone would collect.
    """
    times = (width / distance) ** 2 if distance else math.inf
    return two_digits(n * times, n + 1) if times < MOST_TIMES else None


def two_digits(number: float, least: int = 0) -> int:
    """Rounded up."""
    step = 10 ** max(math.floor(math.log10(max(number, 1))) - 1, 0)
    return max(math.ceil(number / step) * step, least)
