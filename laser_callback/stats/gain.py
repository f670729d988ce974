"""Superiority: a metric must be shown to get better.

Contract: a gain passes by a significant test in its direction, and in no other way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import numpy as np
from scipy import stats

from laser_callback.stats.judgement import (
    MOST_TIMES,
    NUMBER,
    Judgement,
    Verdict,
    amount_text,
    check_key,
    check_row,
    extrapolate,
    gate_text,
    two_digits,
)
from laser_callback.stats.outcomes import ALPHA, PairedResult
from laser_callback.stats.priors import PriorChecks

Direction: TypeAlias = Literal["max", "min"]

_TEXT = re.compile(rf"\s*(\S.*?)\s*:\s*gain((?:\s*,\s*(?:alpha\s+{NUMBER}|direction\s+(?:max|min)))*)\s*")
A_GAIN = "a gain is `metric: gain`, and may go on with `, alpha 0.05` and `, direction max` (or min)"
_UNCHECKED = "not checked for a shift of what is said, for want of answers and predictions beside outcomes per example"


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
        check_key(self.key)
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
        text = gate_text(text)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{A_GAIN}; got {text!r}")
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
            prior: prior checks of this metric. A gain that may be a shift of what is said and no more is undecided.

        Raises:
            ValueError: if the row is of another metric, or it is not known which direction is better.
        """
        check_row(self.key, row)
        if prior is not None and prior.metric != row.metric:
            raise ValueError(f"`prior` must be of {row.metric!r}, got one of {prior.metric!r}")
        sign = self.sign(row)
        bound = row.lower if sign > 0 else row.upper
        relative = row.kind == "log_ratio"
        if row.p is None or bound is None:
            note = f"not tested: {row.note or 'the row has no test'}"
            return Judgement(str(self), self.key, row.n, row.delta, None, "undecided", note, None, relative, row.sample)
        verdict: Verdict = "undecided"
        best = row.upper if sign > 0 else row.lower
        note = "no gain is shown"
        if best is not None and best * sign > 0:
            note += f", and one above {amount_text(abs(best), relative)} is ruled out at 95 % confidence"
        if row.p <= self.alpha and row.delta * sign < 0:
            verdict, note = "fail", "it is shown to get worse"
        elif row.p <= self.alpha and prior is not None and prior.doubt:
            note = prior.doubt
        elif row.p <= self.alpha:
            verdict = "pass"
            right_or_wrong = row.kind == "binary" or row.test.startswith("exact") or row.higher_is_better
            is_checked = prior is not None and prior.delta > 0  # else it is of errors taken for right answers
            note = _UNCHECKED if right_or_wrong and not is_checked else ""
        elif row.delta * sign > 0 and self.alpha == ALPHA:  # the interval's level
            needed = _shown_from(row, bound, self.alpha)
            if needed is not None:
                number = f"about {needed:,} {row.units} in place of {row.n:,}"
                note = f"{note}; {number} would show one if the change stays so"
        return Judgement(str(self), self.key, row.n, row.delta, bound, verdict, note, row.p, relative, row.sample)

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


def _shown_from(row: PairedResult, bound: float, alpha: float) -> int | None:
    """Units from which on a row's change would be significant if it stays so; of right and wrong by the exact test."""
    if row.fixed is None or row.broken is None or row.test != "exact McNemar":
        return extrapolate(row.n, abs(row.delta - bound), abs(row.delta))
    scales = np.geomspace(1.02, MOST_TIMES, 350)
    gained, lost = np.round(scales * row.fixed), np.round(scales * row.broken)
    shown = np.flatnonzero(2 * stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5) <= alpha)
    return two_digits(float(scales[shown[0]]) * row.n) if len(shown) else None
