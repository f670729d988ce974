"""Several rows, one level: which of them may claim something.

Source: Holm, S. (1979). Scandinavian Journal of Statistics 6, 65-70.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from laser_callback.stats.outcomes import ResultRow


def adjust(results: Sequence[ResultRow], primary: str | None) -> list[ResultRow]:
    """Give every tested row the role in which it may claim something.

    Args:
        results: rows of one comparison.
        primary: name of the metric declared beforehand, which keeps its own p value. The other tested rows share
            level 0.05 among themselves by Holm's step-down procedure; without a primary all tested rows do.

    Returns:
        The rows in the same order. Rows that are not tested keep their role unless one is the primary.

    Raises:
        ValueError: if ``primary`` does not name exactly one row.
    """
    names = [row.metric for row in results]
    if primary is not None and names.count(primary) != 1:
        raise ValueError(f"`primary` must name exactly one row, got {primary!r}; the rows are {names}")
    tested = sorted((row.p, i) for i, row in enumerate(results) if row.p is not None and row.metric != primary)
    adjusted: dict[int, float] = {}
    floor = 0.0
    for rank, (p, i) in enumerate(tested):
        # The running maximum keeps the order of the raw p values: no row may pass after an earlier one has failed.
        floor = adjusted[i] = max(floor, min(1.0, (len(tested) - rank) * p))
    rows = list(results)
    for i, row in enumerate(rows):
        if i in adjusted:
            rows[i] = replace(row, role="holm", p_adjusted=adjusted[i])
        elif row.metric == primary:
            rows[i] = replace(row, role="primary", p_adjusted=None)
    return rows
