r"""Original against reduced by any metric of pooled states, such as F1 or AUROC: no unit has a value of its own.

Contract: all that is known of the metric is a function of how often each state counts in the pool; it is asked what
becomes of it without a unit, and where a unit's two arms change places. A row of kind "pooled" comes out.

Sources:
    Efron, B. (1982). The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3.
    Efron, B. and Tibshirani, R. J. (1993). An Introduction to the Bootstrap, chapters 11 (jackknife) and 15
    (permutation tests, and how many are drawn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from laser_callback.stats.intervals import Floats
from laser_callback.stats.outcomes import ALPHA, PairedResult, not_tested

MOST_GROUPS = 100
"""More units than these are taken together, those that follow each other, so that the metric is computed 400 times."""
DRAWS = 9_999
"""Exchanges that are drawn where there are more than can be listed; the smallest p is then 1 in 10,000."""
LISTED = 14
"""Of so many units all exchanges are listed: 2^13, since the opposite of each is as far out."""
FEW = 1e-3
"""Where no p can be below it, that is told."""
ROUNDING = 5e-7
"""Of a metric in float32, relative: smaller changes are none."""

Pool = Callable[[Floats, Floats], float]
"""The metric of a pool in which the states count so often, shape (m,) of each arm, in steps of one half."""


def compare_pooled(
    metric: str,
    pool: Pool,
    labels: NDArray[np.int64],
    *,
    unit: str = "batch",
    most: int = MOST_GROUPS,
    seed: int = 0,
    higher_is_better: bool | None = None,
) -> PairedResult:
    r"""Compare two arms by a metric of everything that they did.

    - The interval is Student's, with the jackknife's variance :math:`\frac{G-1}{G} \sum_g (\delta_{-g} - \delta)^2` on
      G - 1 degrees of freedom; :math:`\delta_{-g}` is the difference of the arms without unit g. Of a mean with weights
      that is the variance of :func:`~laser_callback.stats.compare`.
    - p is that of a permutation test, which exchanges the arms of whole units. In the pool of both arms, in which each
      state counts one half, :math:`s_g` is by how much the arms differ if unit g alone is told apart. It has the other
      sign where the unit's arms are exchanged, and does not change with those of others: so the test that flips the
      signs of the :math:`s_g`, with their sum as statistic, is exact for any metric, where the arms of a unit might as
      well be exchanged. To second order the sum is the difference of the arms.

    An interval leaves 0 out only where the test does. A percentile or BCa bootstrap of the units would be too narrow
    where there are few of them.

    Args:
        metric: name for the row.
        pool: the metric.
        labels: shape (m,), each state's unit, from 0, in the order of the units.
        unit: what the units are.
        most: groups that are made of more units.
        seed: of the exchanges that are drawn.
        higher_is_better: direction of the metric.

    Returns:
        A row of role "exploratory"; a metric that has no value without some unit is not tested.

    Example:
        >>> before, after = np.array([[3, 8], [2, 8], [5, 8]]), np.array([[5, 8], [4, 8], [6, 8]])  # right, of so many
        >>> def accuracy(original, reduced):
        ...     right, n = original @ before + reduced @ after
        ...     return right / n
        >>> row = compare_pooled("accuracy", accuracy, np.arange(3))
        >>> f"{row.delta:.3f} [{row.lower:.3f}, {row.upper:.3f}], p = {row.p}"
        '0.208 [0.000, 0.388], p = 0.25'
    """
    n, groups = int(labels.max()) + 1, min(int(labels.max()) + 1, most)
    members = [labels * groups // n == group for group in range(groups)]
    all_, none = np.ones(len(labels)), np.zeros(len(labels))
    before, after = pool(all_, none), pool(none, all_)
    units = {"batch": "batches"}.get(unit, f"{unit}s")
    told = f"{n:,} {units} in {groups} groups" if groups < n else f"unit: the {unit}"
    notes = ["" if told == "unit: the example" else told, "permutation test, interval by the jackknife"]
    row = replace(not_tested(metric, before, after, n, "", higher_is_better, "pooled"), unit=unit)

    def noted(*more: str) -> PairedResult:
        return replace(row, note="; ".join(filter(None, more)))

    if groups < 2:
        return noted(f"one {unit} has no variance")
    without, swaps = np.empty(groups), np.empty(groups)
    for group, member in enumerate(members):
        rest, half = 1.0 - member, member / 2
        without[group] = pool(none, rest) - pool(rest, none)
        swaps[group] = pool(0.5 - half, 0.5 + half) - pool(0.5 + half, 0.5 - half)
    if not (np.isfinite([before, after]).all() and np.isfinite(without).all() and np.isfinite(swaps).all()):
        return noted(notes[0], f"without some of the {units} it has no value")
    rounding = ROUNDING * max(abs(before), abs(after))
    changes = without - row.delta
    if float(np.abs(changes).max()) <= rounding < abs(row.delta):
        return noted(notes[0], "all units differ by the same amount: no variance")
    error = math.sqrt((groups - 1) / groups * float((changes**2).sum()))
    error = error if error > rounding else 0.0
    p = flipped_p(np.where(np.abs(swaps) > rounding, swaps, 0.0), seed)
    ends = []
    for level in (1 - ALPHA, 1 - 2 * ALPHA):
        margin = float(stats.t.ppf((1 + level) / 2, groups - 1)) * error
        lower, upper = row.delta - margin, row.delta + margin
        if p > 1 - level:  # no end passes 0 before the exact test does
            lower, upper = min(lower, 0.0), max(upper, 0.0)
        ends.append((lower, upper))
    (lower, upper), (lower90, upper90) = ends
    row = replace(row, lower=lower, upper=upper, lower90=lower90, upper90=upper90, p=p, test="paired permutation")
    least = 2.0 ** (1 - groups)
    few = f"{groups} {units}: this test cannot show less than p = {f'{least:.2g}'.lstrip('0')}" if least > FEW else ""
    return noted(*notes, few)


def flipped_p(differences: Floats, seed: int) -> float:
    """Two-sided p value of "each difference might as well have had the other sign", of their sum.

    All signs are listed where that is possible, else drawn; those that are drawn count the observed ones among them.

    >>> flipped_p(np.array([0.5, 0.25, 1.0]), seed=0)
    0.25
    """
    observed = abs(float(differences.sum())) - 1e-9 * float(np.abs(differences).sum())  # ties come with rounding
    if not differences.any():
        return 1.0
    size = len(differences)
    if size <= LISTED:
        bits = np.arange(2 ** (size - 1))[:, None] >> np.arange(size) & 1  # the last one keeps its sign
        return float((np.abs((1 - 2 * bits) @ differences) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (DRAWS, size), dtype=np.int8)
    return float((1 + (np.abs(signs @ differences) >= observed).sum()) / (1 + DRAWS))
