"""Prior checks: is a gain more than a shift of what is said most?

A model that gives the same answer everywhere is right wherever that answer is. A cut may gain accuracy only by moving a
model towards, or away from, such an answer; these checks show what is left of the gain without it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from laser_callback.stats.outcomes import Array, Outcomes, PairedResult, as_float64
from laser_callback.stats.paired import compare

MACRO_MIN_UNITS = 5  # gold answers with fewer units are too noisy to average over


@dataclass(frozen=True)
class MacroAccuracy:
    """Accuracy averaged over gold answers, each counting the same: of ``answers`` answers with ``n`` units together."""

    original: float
    reduced: float
    delta: float
    answers: int
    n: int


@dataclass(frozen=True)
class PriorChecks:
    """What each arm says most, and what is left of the gain without it.

    Attributes:
        n: number of units.
        delta: accuracy of the reduced minus that of the original model, over all units.
        constant_answer: accuracy of always giving each group's most common gold answer.
        majority_excluded: the comparison on units whose gold answer is not what either arm predicts most in the unit's
            group; ``None`` if no unit is left.
        macro: accuracy averaged over the gold answers with at least 5 units; ``None`` if there are none.
        entropy: Shannon entropy of each arm's predictions in nats, by "original" and "reduced".
        top_predictions: the five most frequent predictions of each arm with their counts, by "original" and "reduced".
        prior_shift: there is a gain, but none shown outside of the answers said most: ``delta > 0`` and the interval
            of ``majority_excluded`` reaches down to 0 or there is none.
    """

    n: int
    delta: float
    constant_answer: float
    majority_excluded: PairedResult | None
    macro: MacroAccuracy | None
    entropy: dict[str, float]
    top_predictions: dict[str, list[tuple[str, int]]]
    prior_shift: bool

    def __post_init__(self) -> None:
        if set(self.entropy) != set(self.top_predictions):
            raise ValueError(f"`entropy` and `top_predictions` must be of the same arms, got {sorted(self.entropy)}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON."""
        excluded = None if self.majority_excluded is None else self.majority_excluded.to_dict()
        return {**asdict(self), "majority_excluded": excluded}


def prior_checks(
    answers: Sequence[str],
    original_predictions: Sequence[str],
    reduced_predictions: Sequence[str],
    original_correct: Array | Sequence[float],
    reduced_correct: Array | Sequence[float],
    groups: Sequence[str] | None = None,
) -> PriorChecks:
    """Check whether a gain in accuracy may be only a shift of what is said most.

    Strings are compared as they are: normalise case and spaces before. Of equally frequent strings the alphabetically
    first counts as the most frequent, so the order of the units does not matter.

    Args:
        answers: gold answer of each unit.
        original_predictions: the original model's answer for each unit.
        reduced_predictions: the reduced model's answer for each unit.
        original_correct: shape ``(n,)``, 0 or 1: whether the original model is right.
        reduced_correct: shape ``(n,)``, 0 or 1: whether the reduced model is right.
        groups: the unit's group, such as its relation; ``None`` puts all units in one.

    Raises:
        ValueError: if the lengths differ, there are no units, or correctness is not 0 or 1.

    Example:
        >>> gold = ["euro"] * 6 + ["yen", "peso", "rand", "lira"]
        >>> generic, all_euro = ["the"] * 10, ["euro"] * 10
        >>> checks = prior_checks(gold, generic, all_euro, [0] * 10, [answer == "euro" for answer in gold])
        >>> checks.delta, checks.constant_answer, checks.majority_excluded.delta, checks.prior_shift
        (0.6, 0.6, 0.0, True)
        >>> checks.macro
        MacroAccuracy(original=0.0, reduced=1.0, delta=1.0, answers=1, n=6)
        >>> checks.top_predictions["reduced"]
        [('euro', 10)]
    """
    n = len(answers)
    groups = [""] * n if groups is None else groups
    right = {"original": as_float64(original_correct), "reduced": as_float64(reduced_correct)}
    predictions = {"original": original_predictions, "reduced": reduced_predictions}
    lengths = [*map(len, predictions.values()), *(len(x) for x in right.values()), len(groups)]
    if n == 0 or any(length != n for length in lengths):
        raise ValueError(
            "`answers` must be non-empty and as long as the predictions, the correctness of both arms and `groups`, "
            f"got {n} answers and lengths {lengths}"
        )
    if any(np.isnan(x).any() for x in right.values()):
        raise ValueError("`original_correct` and `reduced_correct` must be 0 or 1, got NaN; leave absent units out")
    outcomes = {arm: Outcomes(x, kind="binary") for arm, x in right.items()}
    overall = compare("accuracy", outcomes["original"], outcomes["reduced"])

    gold = _count(groups, answers)
    said = [_count(groups, predicted) for predicted in predictions.values()]
    excluded = {group: {_most_common(counts[group], 1)[0][0] for counts in said} for group in gold}
    kept = np.array([answer not in excluded[group] for answer, group in zip(answers, groups, strict=True)])
    rest = None
    if kept.any():
        rest = compare(
            "accuracy without the answers said most",
            *(Outcomes(x[kept], kind="binary") for x in right.values()),
        )

    frequent = {answer: count for answer, count in Counter(answers).items() if count >= MACRO_MIN_UNITS}
    macro = None
    if frequent:
        # The mean over answers of their accuracies is a mean over units, each with weight 1 / count of its answer.
        weights = np.array([1 / frequent[answer] if answer in frequent else 0.0 for answer in answers])
        before, after = (float(np.average(x, weights=weights)) for x in right.values())
        macro = MacroAccuracy(before, after, after - before, len(frequent), sum(frequent.values()))

    predicted_counts = {arm: Counter(predicted) for arm, predicted in predictions.items()}
    return PriorChecks(
        n=n,
        delta=overall.delta,
        constant_answer=sum(max(counts.values()) for counts in gold.values()) / n,
        majority_excluded=rest,
        macro=macro,
        entropy={arm: float(stats.entropy(list(count.values()))) for arm, count in predicted_counts.items()},
        top_predictions={arm: _most_common(count, 5) for arm, count in predicted_counts.items()},
        prior_shift=overall.delta > 0 and (rest is None or rest.lower is None or rest.lower <= 0),
    )


def _count(groups: Sequence[str], texts: Sequence[str]) -> dict[str, Counter[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group, text in zip(groups, texts, strict=True):
        counts[group][text] += 1
    return counts


def _most_common(count: Counter[str], k: int) -> list[tuple[str, int]]:
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))[:k]
