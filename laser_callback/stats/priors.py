"""Prior checks: is a gain more than a shift of what is said?

A model that gives the same answer everywhere is right wherever that answer is, and one that names allowed answers at
random is right more often than one that does not answer at all. A cut may gain accuracy only by such a shift. These
checks show what is left of a metric's gain without it, on the metric's own outcomes and units.

Source: the chance of agreement from both margins is that of Cohen, J. (1960). Educational and Psychological Measurement
20, 37-46; its variance that of a contingency table with fixed margins (Mantel, N. (1963). JASA 58, 690-700).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from laser_callback.stats.intervals import Floats, design_effect_of
from laser_callback.stats.outcomes import ALPHA, Outcomes, PairedResult, as_float64
from laser_callback.stats.paired import compare, numbered

MACRO_MIN_UNITS = 5  # gold answers with fewer units are too noisy to average over
GROUP_MIN_UNITS = 5  # groups with fewer units are taken together: nothing is said most in them
SAID_MOST_MIN = 2  # what is said once is said most nowhere


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
        metric: of which this is said.
        n: number of examples.
        delta: the metric of the reduced minus that of the original model, over all examples.
        constant_answer: share right, as the metric weighs examples, of always giving each group's best gold answer: the
            most common one, where all weigh the same.
        majority_excluded: the comparison on examples whose gold answer is not what either arm says most in the
            example's group; ``None`` if no example is left. Of a group that would be left with a single answer, as one
            of two classes is, all examples take part, and its answers count the same: the mean of the answers'
            accuracies is no higher for a model that says one of them more often, whatever it is asked.
        matched: share of examples on which the reduced model says the gold answer, text for text.
        chance: that share if its answers were exchanged at random within each group.
        chance_p: one-sided p value of "it says the gold answer no more often than that".
        macro: the metric averaged over the gold answers with at least 5 examples; ``None`` if there are none.
        entropy: Shannon entropy of each arm's predictions in nats, by "original" and "reduced".
        top_predictions: the five most frequent predictions of each arm with their counts, by "original" and "reduced".
        worth: as how many independent units the changes count if examples of one gold answer ("answer") or of one group
            ("group") change together; what is generalised to is then other answers, or other groups, of which there
            must be several.
        evened: whether there is a group in which the answers count the same.
    """

    metric: str
    n: int
    delta: float
    constant_answer: float
    majority_excluded: PairedResult | None
    matched: float
    chance: float
    chance_p: float
    macro: MacroAccuracy | None
    entropy: dict[str, float]
    top_predictions: dict[str, list[tuple[str, int]]]
    worth: dict[str, float]
    evened: bool = False

    def __post_init__(self) -> None:
        if set(self.entropy) != set(self.top_predictions):
            raise ValueError(f"`entropy` and `top_predictions` must be of the same arms, got {sorted(self.entropy)}")

    @property
    def is_of_labels(self) -> bool:
        """Whether answers repeat, as classes do: nearly all examples (nine tenths) have one that at least 5 have."""
        return self.macro is not None and self.macro.n >= 0.9 * self.n

    @property
    def where(self) -> str:
        """Where a gain has to be shown, too."""
        return _where(self.evened)

    @property
    def prior_shift(self) -> bool:
        """Whether there is a gain, but none shown :attr:`where` no answer is favoured."""
        rest = self.majority_excluded
        return self.delta > 0 and not (rest is not None and rest.p is not None and rest.p <= ALPHA and rest.delta > 0)

    @property
    def worth_less(self) -> dict[str, float]:
        """What of ``worth`` is less than half of the examples, where anything has changed."""
        return {name: worth for name, worth in self.worth.items() if 2 * worth < self.n and self.delta}

    @property
    def format_change(self) -> bool:
        """Whether there is a gain, but the reduced model is not shown to choose better than at random."""
        return self.delta > 0 and self.chance_p > ALPHA / 2

    @property
    def doubt(self) -> str:
        """Why a gain may be no more than another way to answer; empty if there is none, or that is ruled out."""
        if self.format_change and not self.matched:
            return (
                "no answer of the reduced model is the right one, text for text, so that it cannot be checked for a "
                "mere change of form: return both as one text where they mean the same"
            )
        if self.format_change:
            return (
                f"the reduced model is not shown to be right more often ({self.matched:.1%}) than its own answers, "
                f"exchanged at random ({self.chance:.1%}): what changed may be the form of its answers"
            )
        return f"no gain is shown {self.where}" if self.prior_shift else ""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON."""
        excluded = None if self.majority_excluded is None else self.majority_excluded.to_dict()
        return {**asdict(self), "majority_excluded": excluded}


def prior_checks(
    metric: str,
    answers: Sequence[str],
    predictions: tuple[Sequence[str], Sequence[str]],
    outcomes: tuple[Outcomes, Outcomes],
    groups: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> PriorChecks:
    """Check whether a gain may be only a shift of what is said.

    Strings are compared as they are; where one that counts as right is another than the answer by case or spaces only,
    none are told apart by these. Of equally frequent strings the alphabetically
    first counts as the most frequent, so the order of the examples does not matter.

    Args:
        metric: name of what ``outcomes`` are of.
        answers: gold answer of each of n examples.
        predictions: the original's and the reduced model's answer to each example.
        outcomes: the original's and the reduced model's, from 0 (wrong) to 1 (right). Examples absent (NaN) in either
            arm are left out; those with weights count by the original's.
        groups: the example's group, such as its relation; ``None`` puts all in one. So are groups of fewer than 5.
        clusters: as in :func:`~laser_callback.stats.compare`.

    Raises:
        ValueError: if the lengths differ, no example is present, or an outcome is not from 0 to 1.

    Example:
        >>> gold = ["euro"] * 6 + ["yen", "peso", "rand", "lira"]
        >>> generic, all_euro = ["the"] * 10, ["euro"] * 10
        >>> right = (np.zeros(10, bool), np.array([answer == "euro" for answer in gold]))
        >>> checks = prior_checks("accuracy", gold, (generic, all_euro), (Outcomes.of(right[0]), Outcomes.of(right[1])))
        >>> checks.delta, checks.constant_answer, checks.majority_excluded.delta, checks.prior_shift
        (0.6, 0.6, 0.0, True)
        >>> checks.chance, checks.chance_p, checks.format_change
        (0.6, 1.0, True)
        >>> checks.macro
        MacroAccuracy(original=0.0, reduced=1.0, delta=1.0, answers=1, n=6)
        >>> checks.top_predictions["reduced"]
        [('euro', 10)]
    """
    n = len(answers)
    lengths = [*map(len, predictions), *(len(arm.values) for arm in outcomes)]
    lengths += [len(labels) for labels in (groups, clusters) if labels is not None]
    if any(length != n for length in lengths):
        raise ValueError(
            "`answers` must be as long as the predictions and outcomes of both arms, `groups` and `clusters`, got "
            f"{n} answers and lengths {lengths}"
        )
    right = [as_float64(arm.values) for arm in outcomes]
    present = np.flatnonzero(~np.isnan(right[0]) & ~np.isnan(right[1])).tolist()
    if not present:
        raise ValueError("`outcomes` must hold at least one example that is present in both arms, got none")
    right = [values[present] for values in right]
    for values in right:
        if (outside := (values < 0) | (values > 1)).any():
            raise ValueError(f"`outcomes` must be from 0 to 1, got {values[outside][0]:g}")
    answers, before, after = ([texts[i] for i in present] for texts in (answers, *predictions))
    given = zip([*answers] * 2, [*before, *after], np.concatenate(right).tolist(), strict=True)
    if any(value == 1 and answer != text and _folded(answer) == _folded(text) for answer, text, value in given):
        answers, before, after = (list(map(_folded, texts)) for texts in (answers, before, after))
    groups = _pooled([""] * len(present) if groups is None else [groups[i] for i in present])
    kinds = [arm.kind for arm in outcomes]
    weights = None if outcomes[0].weights is None else as_float64(outcomes[0].weights)[present]
    labels = None if clusters is None else [clusters[i] for i in present]

    gold = _count(groups, answers)
    said = [_count(groups, texts) for texts in (before, after)]
    excluded = {group: {_said_most(counts[group]) for counts in said} for group in gold}
    evened = {group for group, counts in gold.items() if _is_closed(counts, excluded[group])}
    shares = _shares(answers, groups, weights, gold, excluded, evened)
    kept = np.flatnonzero(shares)

    def compared(name: str) -> PairedResult:
        of_kept = None if weights is None and not evened else shares[kept]
        # A share of right answers that count differently is no count of right answers.
        arms = (Outcomes(v[kept], of_kept, "mean" if evened else kind) for v, kind in zip(right, kinds, strict=True))
        of_these = None if labels is None else [labels[i] for i in kept]
        return compare(name, *arms, clusters=of_these, higher_is_better=True)

    frequent = {answer: count for answer, count in Counter(answers).items() if count >= MACRO_MIN_UNITS}
    macro = None
    if frequent:
        # The mean over answers of their accuracies is a mean over units, each with weight 1 / count of its answer.
        alike = np.array([1 / frequent[answer] if answer in frequent else 0.0 for answer in answers])
        one, two = (float(np.average(values, weights=alike)) for values in right)
        macro = MacroAccuracy(one, two, two - one, len(frequent), sum(frequent.values()))

    matched, chance, chance_p = _against_chance(answers, after, groups, labels)
    change = right[1] - right[0]
    by: dict[str, Sequence[Hashable]] = {"answer": list(zip(groups, answers, strict=True)), "group": groups}
    by = {name: of for name, of in by.items() if len(set(of)) > 1}  # one tells nothing of others
    predicted = dict(zip(("original", "reduced"), map(Counter, (before, after)), strict=True))
    return PriorChecks(
        metric=metric,
        n=len(answers),
        delta=float(np.average(right[1], weights=weights) - np.average(right[0], weights=weights)),
        constant_answer=constant_share(answers, groups, weights),
        majority_excluded=compared(f"{metric} {_where(bool(evened))}") if kept.size else None,
        matched=matched,
        chance=chance,
        chance_p=chance_p,
        macro=macro,
        entropy={arm: float(stats.entropy(list(count.values()))) for arm, count in predicted.items()},
        top_predictions={arm: _most_common(count, 5) for arm, count in predicted.items()},
        worth={name: len(answers) / design_effect_of(change, numbered(of)) for name, of in by.items()},
        evened=bool(evened),
    )


def _where(evened: bool) -> str:
    return "where each right answer counts the same" if evened else "outside of the answers said most"


def _is_closed(answers: Counter[str], excluded: set[str | None]) -> bool:
    """Whether a group is left with one of its answers, or none, without these; and all of them are frequent."""
    return len(answers) > 1 >= len(answers.keys() - excluded) and min(answers.values()) >= MACRO_MIN_UNITS


def _shares(
    answers: Sequence[str],
    groups: Sequence[str],
    weights: Any,
    gold: Mapping[str, Counter[str]],
    excluded: Mapping[str, set[str | None]],
    evened: Collection[str],
) -> Floats:
    """What each example counts where no answer is favoured: 0 where it is left out; in sum, what its group weighs."""
    shares = np.ones(len(answers)) if weights is None else weights.astype(np.float64)
    totals: defaultdict[Hashable, float] = defaultdict(float)
    for answer, group, share in zip(answers, groups, shares.tolist(), strict=True):
        totals[group] += share
        totals[group, answer] += share
    for i, (answer, group) in enumerate(zip(answers, groups, strict=True)):
        if group in evened:
            own = totals[group, answer]
            shares[i] *= totals[group] / (len(gold[group]) * own) if own else 0.0
        elif answer in excluded[group]:
            shares[i] = 0.0
    return shares


def constant_share(answers: Sequence[str], groups: Sequence[str], weights: Any = None) -> float:
    """The share right of always giving each group's best answer; groups of fewer than 5 are one.

    Args:
        answers: of n examples, the right ones.
        groups: their groups.
        weights: what they count, shape (n,); ``None`` counts all the same.
    """
    counted: Sequence[float] = [1] * len(answers) if weights is None else weights.tolist()
    held: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for group, answer, weight in zip(_pooled(groups), answers, counted, strict=True):
        held[group][answer] += weight
    return sum(max(of_group.values()) for of_group in held.values()) / sum(counted)


def _against_chance(
    answers: Sequence[str], said: Sequence[str], groups: Sequence[str], clusters: Sequence[Hashable] | None
) -> tuple[float, float, float]:
    """Share right; that if what is said were exchanged at random within groups; p of "it is right no more often"."""
    gold, spoken, sizes = _count(groups, answers), _count(groups, said), Counter(groups)
    expected = variance = 0.0
    for group, m in sizes.items():
        # Of each label, how often it is the answer and how often it is said.
        pairs = [(count, spoken[group][label]) for label, count in gold[group].items() if spoken[group][label]]
        products = sum(a * b for a, b in pairs)
        expected += products / m
        if m > 1:
            own = sum(a * b * (m - a) * (m - b) for a, b in pairs)
            joint = products**2 - sum((a * b) ** 2 for a, b in pairs)
            variance += (own + joint) / (m**2 * (m - 1))
    right = np.array([a == b for a, b in zip(answers, said, strict=True)], dtype=np.float64)
    if clusters is not None:
        odds = [spoken[g][a] / sizes[g] for g, a in zip(groups, answers, strict=True)]
        variance *= design_effect_of(right - np.array(odds), numbered(clusters))
    excess = float(right.sum()) - expected - 0.5
    p = float(stats.norm.sf(excess / math.sqrt(variance))) if variance > 0 else 1.0
    return float(right.mean()), expected / len(answers), p


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _pooled(groups: Sequence[str]) -> list[str]:
    """Small groups under one name."""
    sizes = Counter(groups)
    return [group if sizes[group] >= GROUP_MIN_UNITS else "" for group in groups]


def _said_most(count: Counter[str]) -> str | None:
    text, times = _most_common(count, 1)[0]
    return text if times >= SAID_MOST_MIN else None


def _count(groups: Sequence[str], texts: Sequence[str]) -> dict[str, Counter[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group, text in zip(groups, texts, strict=True):
        counts[group][text] += 1
    return counts


def _most_common(count: Counter[str], k: int) -> list[tuple[str, int]]:
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))[:k]
