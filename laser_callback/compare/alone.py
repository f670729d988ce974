"""One model at a time over the same data, and what came of two of them compared as a pair.

For what is no plan of one model, such as its weights at another epoch: they cannot be arms of one loop. Contract: as in
:mod:`laser_callback.compare.run`, the pairs are what the step returns for each example, else the batches' means; the
data must come in the same order each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.results.examples import ORIGINAL, Logged, PairedExamples

ARM = "laser"


@dataclass(frozen=True)
class Run:
    """What one model did.

    Attributes:
        logged: per epoch.
        examples: its outcomes, as those of the arm ``"original"``.
    """

    logged: Mapping[str, Logged]
    examples: PairedExamples

    @property
    def known(self) -> Mapping[str, Logged]:
        """What is logged, or where that is nothing, what the step returns."""
        return self.logged or self.examples.returned(ORIGINAL)


def paired(original: Run, other: Run, name: str, primary: str | None = None) -> LaserResult:
    """The comparison of two runs over the same data, with all statistics; ``other`` is the arm ``"laser"``.

    Args:
        original: what is compared with.
        other: what is compared.
        name: what stands in place of a plan.
        primary: the metric that carries the claim.

    Raises:
        ValueError: if the runs are not over the same examples.
    """
    examples = _beside(original.examples, other.examples)
    before, after = original.known, other.known
    arm = ArmResult(name, examples.rows(ARM, before, after), examples.priors(ARM, before, after), "off", 0.0, 0.0)
    primary = primary if primary in [row.metric for row in arm.rows] else None
    adjust_together([arm], primary)
    return LaserResult({ARM: arm}, {}, primary, 0.0, {}, examples)


def _beside(one: PairedExamples, other: PairedExamples) -> PairedExamples:
    """The examples of one run, with what the original did in the other as the arm :data:`ARM`."""
    sizes = [[batch.size for batch in run.batches] for run in (one, other)]
    if sizes[0] != sizes[1] or len(one.means) != len(other.means):
        raise ValueError(f"both runs must be over the same batches, got {sum(sizes[0])} and {sum(sizes[1])} examples")

    for mine, theirs in zip(one.batches, other.batches, strict=True):
        if any(mine.described[ORIGINAL].get(name) != theirs.described[ORIGINAL].get(name) for name in ("id", "answer")):
            raise ValueError("both runs must be over the same examples in the same order: shuffle none")

    def joined(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        return {**mine, ARM: theirs[ORIGINAL]} if ORIGINAL in theirs else mine

    batches = [
        replace(
            mine,
            outcomes=joined(mine.outcomes, theirs.outcomes),
            described=joined(mine.described, theirs.described),
            unused={**theirs.unused, **mine.unused},
        )
        for mine, theirs in zip(one.batches, other.batches, strict=True)
    ]
    means = [joined(mine, theirs) for mine, theirs in zip(one.means, other.means, strict=True)]
    return PairedExamples(batches, means, one.duplicates)
