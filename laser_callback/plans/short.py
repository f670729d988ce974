"""A plan in a line, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


def told_apart(plans: Sequence[object]) -> list[str]:
    """:func:`brief` of each plan; where different plans are the same in short, with what tells them apart, or a number.

    >>> told_apart([", ".join(f"{layer}.fc_in@0.01" for layer in range(last)) for last in (9, 10)])[1]
    '0.fc_in@0.01, 1.fc_in@0.01, 2.fc_in@0.01, 3.fc_in@0.01, and 6 more'
    >>> many = ", ".join(f"{layer}.fc_in@0.01" for layer in range(9))
    >>> told_apart([f"{many}, 9.fc_in@{rho}" for rho in (0.1, 0.2)])[1]
    '0.fc_in@0.01, 1.fc_in@0.01, 2.fc_in@0.01, 3.fc_in@0.01, and 6 more, with 9.fc_in@0.2'
    """
    wholes = [str(plan) for plan in plans]
    shorts = dict(zip(wholes, map(brief, plans), strict=True))
    for alike in _alike(shorts):
        parts = {whole: whole.split(", ") for whole in alike}
        common = set.intersection(*map(set, parts.values()))
        for whole, reductions in parts.items():
            own = [reduction for reduction in reductions if reduction not in common]
            if common and own:
                shorts[whole] += f", with {brief(', '.join(own))}"
    for alike in _alike(shorts):
        for number, whole in enumerate(alike, 1):
            shorts[whole] += f" ({number})"
    return [shorts[whole] for whole in wholes]


def _alike(shorts: Mapping[str, str]) -> list[list[str]]:
    """The plans that are the same in short as another."""
    by_short: dict[str, list[str]] = {}
    for whole, short in shorts.items():
        by_short.setdefault(short, []).append(whole)
    return [alike for alike in by_short.values() if len(alike) > 1]


def _counted(match: re.Match[str]) -> str:
    listed = match[1]
    if len(listed) <= _LONGEST_LIST:
        return match[0]
    ends = [[int(end) for end in run.split("-")] for run in listed.split("+")]
    return f"@places({sum(run[-1] - run[0] + 1 for run in ends):,})"


def _ends(match: re.Match[str]) -> str:
    name, half = match[0], _LONGEST_NAME // 2 - 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]} ... {name[-half:]}"  # no name holds a space
