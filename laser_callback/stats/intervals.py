"""The arithmetic of intervals: arrays and counts in, ends of intervals and p values out.

Contract: one entry per independent unit; float64 throughout; ``level`` is the two-sided confidence, so each end of the
interval at 0.9 is a one-sided 95 % bound. What the numbers mean is said in :mod:`laser_callback.stats.paired`.

Sources:
    Newcombe, R. G. (1998). Interval estimation for the difference between independent proportions: comparison of eleven
    methods. Statistics in Medicine 17, 873-890: method 10.
    Newcombe, R. G. (1998). Improved confidence intervals for the difference between binomial proportions based on
    paired data. Statistics in Medicine 17, 2635-2650: method 10.
    Cochran, W. G. (1977). Sampling Techniques, 3rd ed., chapter 6 (linearised variance of a ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats: TypeAlias = NDArray[np.float64]


def newcombe(both: int, gained: int, lost: int, n: int, level: float) -> tuple[float, float]:
    """Newcombe's (1998) method 10 for ``(gained - lost) / n`` of paired units.

    Args:
        both: units that are 1 in both arms.
        gained: units that are 1 in the reduced arm only.
        lost: units that are 1 in the original arm only.
        n: units.
        level: confidence.
    """
    ones_after, ones_before = both + gained, both + lost
    # Python integers: the product of the margins passes int64 from about 55,000 units.
    margins = ones_after * (n - ones_after) * ones_before * (n - ones_before)
    cross = float(both * (n - both - gained - lost) - gained * lost)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)  # the continuity correction, for positive association only
    phi = cross / math.sqrt(margins) if margins else 0.0
    return joined_wilson((ones_before, ones_after), (n, n), level, phi)


def joined_wilson(ones: tuple[int, int], sizes: tuple[int, int], level: float, phi: float = 0.0) -> tuple[float, float]:
    """The second of two shares minus the first: each end is that of the Wilson intervals of both, joined by phi.

    Args:
        ones: of each group.
        sizes: of each group.
        level: confidence.
        phi: correlation of the groups; 0 where they are independent.
    """
    p_before, p_after = (one / size for one, size in zip(ones, sizes, strict=True))
    before, after = (
        stats.binomtest(one, size).proportion_ci(level, method="wilson") for one, size in zip(ones, sizes, strict=True)
    )

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    delta = (ones[1] * sizes[0] - ones[0] * sizes[1]) / (sizes[0] * sizes[1])
    lower = delta - distance(p_after - after.low, before.high - p_before)
    upper = delta + distance(after.high - p_after, p_before - before.low)
    return lower, upper


def standard_error(values: Floats, weights: Floats | None, mean: float) -> float:
    """Of a (weighted) mean of two or more values, linearised (Cochran 1977); NaN where values are not finite."""
    n = len(values)
    w = np.ones(n) if weights is None else weights
    with np.errstate(invalid="ignore"):
        return math.sqrt(n / (n - 1) * float(((w * (values - mean)) ** 2).sum())) / float(w.sum())


@dataclass(frozen=True)
class MeanDifference:
    """A mean difference with its standard error on ``df`` degrees of freedom; both are 0 if no unit differs."""

    delta: float
    error: float
    df: int

    def interval(self, level: float) -> tuple[float, float]:
        """Student's interval."""
        margin = float(stats.t.ppf((1 + level) / 2, self.df)) * self.error
        return self.delta - margin, self.delta + margin

    @property
    def p(self) -> float:
        """Two-sided p value of "no difference"."""
        return float(2 * stats.t.sf(abs(self.delta) / self.error, self.df)) if self.error else 1.0


def mean_difference(before: Floats, after: Floats, weights: Floats | None) -> MeanDifference | str:
    """``r = sum(w d) / sum(w)`` with the linearised variance of a ratio (Cochran 1977).

    With equal weights this is exactly the paired t test. Where there is nothing to test against, the reason is returned
    instead.
    """
    n = len(before)
    if n < 2:
        return "one independent unit has no variance"
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return "infinite outcomes have no difference"
    difference = after - before
    delta = float(np.average(difference, weights=weights))
    # A constant difference shows up in float64 with the rounding of its operands, not with variance zero.
    rounding = 64 * np.finfo(np.float64).eps * float(max(np.abs(before).max(), np.abs(after).max()))
    if float(np.abs(difference - delta).max()) <= rounding:
        if abs(delta) > rounding:
            return "all units differ by the same amount: no variance"
        return MeanDifference(delta, 0.0, n - 1)
    return MeanDifference(delta, standard_error(difference, weights, delta), n - 1)
