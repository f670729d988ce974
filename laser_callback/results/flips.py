"""Which examples a cut has fixed and broken, and how often each label is said: read from per-example outcomes.

An outcome row is one line of what :meth:`~laser_callback.results.PairedExamples.write` writes, as a mapping.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from laser_callback.results.comparison import LaserResult
from laser_callback.results.examples import ORIGINAL
from laser_callback.results.returned import of_metric
from laser_callback.stats.outcomes import PairedResult

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Flip:
    """An example on which the two models differ: in being right, or in what they have written.

    Attributes:
        fixed: wrong in the original and right in the reduced model, or the other way round; ``None`` if neither.
        right: whether the reduced model is right.
        id, group, prompt, answer: what the step returned about it; empty where it did not.
        before, after: what each model predicted.
        written_before, written_after: what each has written, where answers are written.
    """

    fixed: bool | None
    right: bool
    id: str
    group: str
    prompt: str
    answer: str
    before: str
    after: str
    written_before: str = ""
    written_after: str = ""

    @property
    def outcome(self) -> str:
        """What became of the example: "fixed", "broken", "still right" or "still wrong"."""
        kind = "right" if self.right else "wrong"
        return f"still {kind}" if self.fixed is None else "fixed" if self.fixed else "broken"


class Parted(NamedTuple):
    """A text beside another: what both begin with, where this one parts from the other, and the rest."""

    same: str
    other: str
    rest: str


def parted(before: str, after: str) -> tuple[Parted, Parted]:
    """Two texts, each up to the first word that is another one, that word, and what follows.

    A word is letters and digits, or one other sign. Where a text ends there the word is empty.

    >>> parted("It is 4 + 31 = 35.", "It is 4 + 38.")[1]
    Parted(same='It is 4 + ', other='38', rest='.')
    """
    start = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    inside = re.search(r"\w*\Z", before[:start])
    if inside and any(re.match(r"\w", text[start:]) for text in (before, after)):
        start = inside.start()

    def part(text: str) -> Parted:
        word = re.match(r"\s*(?:\w+|\S)?", text[start:])
        end = start + (word.end() if word else 0)
        return Parted(text[:start], text[start:end], text[end:])

    return part(before), part(after)


@dataclass(frozen=True)
class LabelCount:
    """How often a label is the right answer, and is said by each model."""

    label: str
    gold: int
    original: int
    reduced: int


def claim_row(result: LaserResult, name: str) -> PairedResult | None:
    """The row that speaks for the plan ``name``: of the primary metric, tested or not, else the first that was."""
    rows = result[name].rows
    declared = [row for row in rows if row.metric == result.primary]
    return next(iter(declared or [row for row in rows if row.test != "not tested"]), None)


def flip_metric(result: LaserResult, name: str) -> PairedResult | None:
    """The row whose flips are shown: of the claim if it counts right and wrong, else the first that does."""
    claim = claim_row(result, name)
    counted = [row for row in result[name].rows if row.fixed is not None]
    return claim if claim in counted else next(iter(counted), None)


def flip_metrics(result: LaserResult, name: str, rows: Sequence[Row]) -> list[PairedResult]:
    """The rows whose flips are shown: :func:`flip_metric`, and for each task of other examples the first that counts.

    Metrics of the same examples, as those of one task, are one look at them.
    """
    first = flip_metric(result, name)
    if first is None:
        return []
    found: list[PairedResult] = []
    seen: set[int] = set()
    for row in (first, *(row for row in result[name].rows if row.fixed is not None)):
        here = {i for i, example in enumerate(rows) if _outcome(example, ORIGINAL, row.metric) is not None}
        if here and not here & seen:
            found.append(row)
            seen |= here
    return found


def flips(rows: Iterable[Row], arm: str, row: PairedResult, rewritten: bool = False) -> list[Flip]:
    """The examples fixed and broken by ``arm`` as ``row`` counts them; fixed first, else in the order of ``rows``.

    With ``rewritten`` also those at last that are no more and no less right, but to which something else is written,
    the wrong ones first.
    """
    metric = _returned_as(row.metric)[0]
    found = []
    for example in rows:
        before, after = (_outcome(example, name, row.metric) for name in (ORIGINAL, arm))
        written = [str(example[name].get("continuation") or "") for name in (ORIGINAL, arm) if name in example]
        if before is None or after is None or (before == after and not (rewritten and len(set(written)) > 1)):
            continue
        described = {name: str(example.get(name, "")) for name in ("id", "group", "prompt")}
        described["answer"] = str(of_metric(example, "answer", metric) or "")
        said = {
            side: str(of_metric(example[name], "prediction", metric) or "")
            for side, name in (("before", ORIGINAL), ("after", arm))
        }
        said |= dict(zip(("written_before", "written_after"), written, strict=True))
        right = (after > 0) == (row.higher_is_better is not False)
        found.append(Flip(right if before != after else None, right, **described, **said))
    order = ("fixed", "broken", "still wrong", "still right")
    return sorted(found, key=lambda flip: order.index(flip.outcome))


def _returned_as(metric: str) -> tuple[str, str]:
    """The name under which the step returns a metric, and the number of its dataloader, empty if it has none."""
    name, _, loader = metric.partition("/dataloader_idx_")
    return name, loader


def _is_of(example: Row, loader: str) -> bool:
    return not loader or str(example.get("dataloader_idx", loader)) == loader


def _outcome(example: Row, arm: str, metric: str) -> float | None:
    """What an arm has of a metric; ``None`` where it is another dataloader's example."""
    outcomes, (name, loader) = example.get(arm), _returned_as(metric)
    return outcomes.get(name) if isinstance(outcomes, Mapping) and _is_of(example, loader) else None


def label_counts(rows: Iterable[Row], arm: str, metric: str = "") -> list[LabelCount]:
    """Of every label that is an answer of ``metric`` or is said, the most frequent first."""
    metric, loader = _returned_as(metric)
    gold: Counter[str] = Counter()
    said: dict[str, Counter[str]] = {ORIGINAL: Counter(), arm: Counter()}
    for example in (row for row in rows if _is_of(row, loader)):
        predictions = [of_metric(example.get(name, {}), "prediction", metric) for name in said]
        answer = of_metric(example, "answer", metric)
        if answer is not None and None not in predictions:
            gold[str(answer)] += 1
            for count, prediction in zip(said.values(), predictions, strict=True):
                count[str(prediction)] += 1
    labels = {*gold, *said[ORIGINAL], *said[arm]}
    counts = [LabelCount(label, gold[label], said[ORIGINAL][label], said[arm][label]) for label in labels]
    return sorted(counts, key=lambda c: (-max(c.gold, c.original, c.reduced), c.label))
