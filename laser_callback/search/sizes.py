"""Whether a search has enough examples for what it is asked to show, said before it works."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.utils.data import DataLoader

from laser_callback.compare.measure import Values
from laser_callback.data.sets import ExampleSets
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.outcomes import ALPHA
from laser_callback.stats.power import BROKEN_PER_FIXED, detectable_gain, examples_needed

POWER = 0.8
"""With what probability the confirm set should show the gain that is asked for."""


def by_batches(values: Values, loader: DataLoader[Any]) -> bool:
    """Whether the units of what was measured on ``loader`` are its batches: the step returns no value per example."""
    return len(values.values) <= len(loader) < len(loader.dataset)  # type: ignore[arg-type]  # it is map-style


def is_share_right(values: Values, sign: int) -> bool:
    """Whether a metric can be a share of right (``sign`` 1) or wrong answers, as far as its values tell."""
    present = values.values[~values.values.isnan()]
    few = bool(((present == 0) | (present == 1)).all())
    return values.kind == "mean" and (few or (sign > 0 and bool(((present >= 0) & (present <= 1)).all())))


def confirm_warnings(sets: ExampleSets, min_gain: float, batches: bool = False) -> list[str]:
    """What to say about the size of the confirm set for a share of right answers; nothing if it surely suffices.

    Examples of one subject tell at least as much as one independent example, and at most as much as their number. A
    recommendation also takes a gain outside of what either model says most; that this is each group's most common
    answer is a guess.

    Args:
        sets: those of the search.
        min_gain: the gain that should be shown.
        batches: whether batches are compared. Their means have as little noise as all of their examples, but the t test
            learns how much from a few numbers only.
    """
    examples, subjects = sets.sizes["confirm"], sets.subjects("confirm")
    told = f"{examples:,} example{'s' * (examples != 1)}"
    least, most = subjects, examples
    if batches:
        count = len(sets.loader("confirm"))
        levels = np.array([1 - ALPHA / 2, POWER])
        wider = stats.t.ppf(levels, count - 1).sum() / stats.norm.ppf(levels).sum() if count > 1 else math.inf
        least = most = int(examples / wider**2)
        told += (
            f" in {count} batch{'es' * (count != 1)}, which are what is compared, since `validation_step` returns no "
            "value per example"
        )
    elif subjects < examples:
        told += f" of {subjects:,} subject{'s' * (subjects != 1)}"
    left, need = 1 - sets.constant_answer("confirm"), examples_needed(min_gain, power=POWER)
    least, most = round(least * left), round(most * left)
    if least >= need:
        return []
    if most < examples or least < most:
        told += f", and tells as much as {least:,}{f' to {most:,}' * (least < most)} independent ones"
        told += ", since the prior check may leave out the most common answer of each group" * (left < 1)
    gains = f"{most:,} show {_shown_by(most)}"
    if least < most:
        gains += f" if the examples of a subject change independently, and {least:,} {_shown_by(least)} if together"
    return [
        f"the confirm set has {told}: to confirm a gain of {100 * min_gain:.1f} points with {POWER:.0%} probability "
        f"takes {need:,} if a cut breaks one answer for every three that it fixes; {gains}. Give more "
        f"examples, or a larger share of them to `confirm`"
        f"{', or return a value per example' * batches}"
    ]


def _shown_by(n: int) -> str:
    for told, broken in (("", BROKEN_PER_FIXED), (" of a cut that breaks none", 0.0)):
        gain = detectable_gain(n, power=POWER, broken_per_fixed=broken)
        if math.isfinite(gain):
            return f"gains from {100 * gain:.1f} points on{told}"
    return "no gain, even of a cut that breaks none"


def guard_warnings(sets: ExampleSets, constraints: Iterable[Constraint], measured: Mapping[str, Values]) -> list[str]:
    """What to say of constraints on right and wrong that the guard set is too small to show.

    Args:
        sets: those of the search.
        constraints: of the search.
        measured: values of the original on some examples, by metric; of right and wrong where all are 0 or 1.
    """
    told: list[str] = []
    for constraint in constraints:
        values = measured[constraint.key].values if constraint.key in measured else torch.empty(0)
        present = values[~values.isnan()]
        if len(present) and bool(((present == 0) | (present == 1)).all()):
            told += filter(None, [constraint.too_few(sets.subjects("guard"))])
    return [f"the guard set is small: {reason}" for reason in told]
