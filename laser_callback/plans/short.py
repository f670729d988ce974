"""A plan in a line, for people."""

from __future__ import annotations

import re

from laser_callback.support.suggest import clipped

MOST = 80
"""Characters of a short form, or a few more for the number of reductions that it leaves out."""
_LONGEST_LIST, _LONGEST_NAME = 16, 40
_PLACES = re.compile(r"@places-([\d+-]+)")
_REGEX = re.compile(r"^/[^/]+/")


def brief(plan: object) -> str:
    """A plan for a sentence or a cell of a table: what fits into a line, and how many reductions more there are.

    A long list of places is told by its length, a long name by its ends. What is not whole cannot be read as a plan, so
    that it is not taken for one.

    Args:
        plan: a plan, a reduction, or the text of one (:class:`LaserPlan` and :class:`Reduction`).

    >>> brief("27.fc_in@0.01, 28.fc_in@0.01")
    '27.fc_in@0.01, 28.fc_in@0.01'
    >>> brief(", ".join(f"{layer}.fc_out@places-0-9+12-30+33-50+52:keep=tail" for layer in range(30)))
    '0.fc_out@places(48):keep=tail, 1.fc_out@places(48):keep=tail, and 28 more'
    """
    reductions = [clipped(_PLACES.sub(_counted, _REGEX.sub(_ends, text)), MOST) for text in str(plan).split(", ")]
    shown = ", ".join(reductions)
    if len(shown) <= MOST:
        return shown
    count = 1
    while len(", ".join(reductions[: count + 1])) <= MOST - len(", and 999 more"):
        count += 1
    more = len(reductions) - count
    return f"{', '.join(reductions[:count])}{f', and {more:,} more' if more else ''}"


def _counted(match: re.Match[str]) -> str:
    listed = match[1]
    if len(listed) <= _LONGEST_LIST:
        return match[0]
    ends = [[int(end) for end in run.split("-")] for run in listed.split("+")]
    return f"@places({sum(run[-1] - run[0] + 1 for run in ends):,})"


def _ends(match: re.Match[str]) -> str:
    name, half = match[0], _LONGEST_NAME // 2 - 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]} ... {name[-half:]}"  # no name holds a space
