"""The outcomes of one metric, and what they are about: picked from the batches of two arms, and joined."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from laser_callback.results.returned import ORIGINAL, Returned, of_metric
from laser_callback.stats.intervals import Floats
from laser_callback.stats.outcomes import Kind, Outcomes

ROUNDING = 1e-3
"""Relative: a logged value this close to a mean is that mean, in single or half precision. Tables show three digits."""


@dataclass(eq=False)
class Batch(Returned):
    """One batch, all arms."""

    dataloader_idx: int | None = None


class Said(NamedTuple):
    """What a metric's outcomes are about, one per example."""

    answers: list[str]
    before: list[str]
    after: list[str]
    groups: list[str]


class Selected(NamedTuple):
    """Both arms' outcomes of a metric, one per example."""

    before: Outcomes
    after: Outcomes
    clusters: list[Hashable] | None
    doubt: str
    said: Said | None


def said_of(batches: Iterable[Batch], arm: str, metric: str) -> Said | None:
    """The answers and predictions of a metric; ``None`` where a batch has none."""
    found = Said([], [], [], [])
    for batch in batches:
        before, after = batch.described[ORIGINAL], batch.described.get(arm, {})
        parts = [
            of_metric(*place, metric) for place in ((before, "answer"), (before, "prediction"), (after, "prediction"))
        ]
        parts.append(before.get("group", [""] * batch.size))
        for listed, part in zip(found, parts, strict=True):
            if part is None or None in part:
                return None
            listed.extend(map(str, part))
    return found


def shares_right(
    outcomes: tuple[Outcomes, Outcomes], said: Said, higher_is_better: bool | None
) -> tuple[Outcomes, Outcomes] | None:
    """The outcomes from wrong to right, turned round where they are of errors; ``None`` if they are neither."""
    values = np.concatenate([arm.values for arm in outcomes])
    if not (np.isin(values, (0, 1)) | np.isnan(values)).all():
        inside = ((values >= 0) & (values <= 1) | np.isnan(values)).all()
        return outcomes if outcomes[0].kind == "mean" and higher_is_better is True and inside else None
    if outcomes[0].kind in ("log_ratio", "pair"):
        return None
    if higher_is_better is None:  # what it gives to an answer that is right word for word tells which of them it is
        texts = zip([*said.answers] * 2, [*said.before, *said.after], values.tolist(), strict=True)
        given = [value for answer, text, value in texts if answer == text and not math.isnan(value)]
        higher_is_better = 2 * sum(given) >= len(given)
    if higher_is_better:
        return outcomes
    before, after = (replace(arm, values=1 - arm.values) for arm in outcomes)
    return before, after


def subset(batch: Batch, positions: list[int]) -> Batch:
    """Those of a batch's examples that stand at these positions."""
    outcomes = {
        arm: {
            name: replace(o, values=o.values[positions], weights=None if o.weights is None else o.weights[positions])
            for name, o in by_name.items()
        }
        for arm, by_name in batch.outcomes.items()
    }
    described = {
        arm: {name: [values[i] for i in positions] for name, values in by_name.items()}
        for arm, by_name in batch.described.items()
    }
    return replace(batch, size=len(positions), outcomes=outcomes, described=described)


def joined(parts: list[Outcomes], kind: Kind) -> Outcomes:
    """Batches one after the other; those without weights weigh each example as one where others have some."""
    weights = None
    if any(part.weights is not None for part in parts):
        weights = np.concatenate([weights_of(part) for part in parts])
    return Outcomes(np.concatenate([part.values for part in parts]), weights, kind, parts[0].unit)


def weights_of(outcomes: Outcomes) -> Floats:
    """Of each example its weight, one where there are none."""
    return np.ones_like(outcomes.values) if outcomes.weights is None else outcomes.weights


def clusters_of(batches: list[Batch]) -> tuple[list[Hashable] | None, str]:
    """Each example's cluster, ``None`` if the step returned none; and what to tell of batches without any."""
    labels = [b.described[ORIGINAL].get("cluster") for b in batches]
    without = labels.count(None)
    if without == len(labels):
        return None, ""
    found: list[Hashable] = []
    for b, given in zip(batches, labels, strict=True):
        found += [object() for _ in range(b.size)] if given is None else given
    told = f"{without} of {len(labels)} batches came without `cluster`: their examples count as independent"
    return found, told if without else ""


def seen_twice(batches: list[Batch], before: Outcomes, after: Outcomes) -> list[Hashable] | None:
    """Clusters, where two dataloaders have the same examples: the same ids, and all else that is known of these too."""
    if len({b.dataloader_idx for b in batches}) < 2 or not all("id" in b.described[ORIGINAL] for b in batches):
        return None
    names = [
        name for name in ("id", "group", "prompt", "answer") if all(name in b.described[ORIGINAL] for b in batches)
    ]
    known = [row for b in batches for row in zip(*(b.described[ORIGINAL][name] for name in names), strict=True)]
    loaders = [b.dataloader_idx for b in batches for _ in range(b.size)]
    first: dict[Hashable, int] = {}
    labels = [first.setdefault(row[0], i) for i, row in enumerate(known)]
    pairs = [(i, one) for i, one in enumerate(labels) if loaders[i] != loaders[one]]
    values = np.stack([before.values, after.values], 1)
    left, right = (values[[pair[side] for pair in pairs]] for side in (0, 1))
    same = np.allclose(left, right, rtol=ROUNDING, atol=1e-6, equal_nan=True)
    if not pairs or not same or any(known[i] != known[one] for i, one in pairs):
        return None  # ids that are running numbers of each dataloader's own
    return [one if loaders[i] != loaders[one] else i for i, one in enumerate(labels)]
