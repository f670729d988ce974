"""What must become better, how much worse the rest may become, and whether that has been shown.

Contract: a gate is a demand on one metric's change from the original to the reduced model, and judges rows of
:mod:`laser_callback.stats.paired`. A :class:`Gain` demands that the metric gets better, a :class:`Constraint` that it
does not get worse than by a margin. Passing is a claim and needs evidence: for a gain a significant test, for a
constraint the one-sided 95 % bound on the unfavourable side inside the margin. A mean that looks good, or harmless, on
too few examples is undecided, and what is undecided does not ship.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from laser_callback.stats.constraint import A_CONSTRAINT, Constraint
from laser_callback.stats.gain import A_GAIN, Gain
from laser_callback.stats.judgement import Judgement, gate_text
from laser_callback.stats.outcomes import PairedResult
from laser_callback.stats.priors import PriorChecks

Gate: TypeAlias = Gain | Constraint


def parse_gate(text: str) -> Gate:
    """Read a gate, a :class:`Gain` or a :class:`Constraint`.

    Raises:
        ValueError: if the text is neither.

    >>> parse_gate("accuracy: gain"), parse_gate("log_loss: delta < 0.05")
    (Gain(key='accuracy', alpha=0.05, direction=None), Constraint(key='log_loss', op='<=', margin=0.05, relative=False))
    """
    text = gate_text(text)
    if not re.search(r"[<>]|\bgain\b", text):
        raise ValueError(f"{A_GAIN}; {A_CONSTRAINT}; got {text!r}")
    gain = re.search(r"[:\s]\s*gain\b(?!.*[<>])", text)  # also without the colon, for what its error says
    return Gain.parse(text) if gain else Constraint.parse(text)


def judge_all(
    gates: Sequence[Gate],
    rows: Sequence[PairedResult],
    priors: Mapping[str, PriorChecks] | None = None,
    *,
    cures: Mapping[str, str] | None = None,
) -> list[Judgement]:
    """Judge each gate by the row of its metric.

    All must pass for a plan to ship, so no adjustment for their number is needed: an intersection-union test keeps its
    level (Berger 1982, Technometrics 24, 295-300).

    Args:
        gates: to judge.
        rows: of one comparison.
        priors: prior checks of the same examples, by metric; see :meth:`Gain.judge`.
        cures: what to do about a metric without a row, by a part of its name: the first that fits is told.

    Raises:
        ValueError: if a gate's metric has no row, naming those that exist, and the cure.
    """
    by_key = {row.metric: row for row in rows}
    for gate in gates:
        if gate.key not in by_key:
            cure = next((f", or: {cure}" for part, cure in (cures or {}).items() if part in gate.key), "")
            raise ValueError(
                f"the gate '{gate}' has no row to be judged by; there are {', '.join(by_key) or 'none'}. "
                f"Name one of these{cure}"
            )
    return [
        gate.judge(by_key[gate.key], (priors or {}).get(gate.key))
        if isinstance(gate, Gain)
        else gate.judge(by_key[gate.key])
        for gate in gates
    ]
