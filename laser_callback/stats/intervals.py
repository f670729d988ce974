"""The arithmetic of intervals: arrays and counts in, ends of intervals and p values out.

Contract: one entry per independent unit; float64 throughout; ``level`` is the two-sided confidence, so each end of the
interval at 0.9 is a one-sided 95 % bound. What the numbers mean is said in :mod:`laser_callback.stats.paired`.

Sources:
    Newcombe, R. G. (1998). Interval estimation for the difference between independent proportions: comparison of eleven
    methods. Statistics in Medicine 17, 873-890: method 10.
    Tango, T. (1998). Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design. Statistics in Medicine 17, 891-908.
    Efron, B. (1982). The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3.
    Kish, L. (1965). Survey Sampling, chapter 11.7 (as how many equal weights unequal ones count).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats: TypeAlias = NDArray[np.float64]


def score_interval(gained: float, lost: float, n: float, level: float, df: float = math.inf) -> tuple[float, float]:
    """Tango's (1998) score interval for ``(gained - lost) / n`` of paired units, with a continuity correction of 1/2.

    Of all shares d that the difference may have, those that the score test of "it is d" does not reject. The correction
    is half a step of ``gained - lost``; without it, a one-sided bound at 5 % is crossed by up to 6.9 % of all samples
    (20 to 1,000 units), with it by at most 4.8 %.

    Args:
        gained: units that are 1 in the reduced arm only; of clustered units, what they are worth as independent ones.
        lost: units that are 1 in the original arm only.
        n: units.
        level: confidence.
        df: degrees of freedom behind the variance, where it was estimated.
    """
    z = float(stats.t.ppf((1 + level) / 2, df))
    return -_largest(lost, gained, n, z), _largest(gained, lost, n, z)


def _largest(gained: float, lost: float, n: float, z: float) -> float:
    """The largest difference that the score test does not reject at z."""

    def excess(d: float) -> float:
        # The share lost where the difference is d, by maximum likelihood (Tango 1998, section 3).
        b = (2 * n - gained + lost) * d - gained - lost
        share = (math.sqrt(max(b * b + 8 * n * lost * d * (1 - d), 0.0)) - b) / (4 * n)
        return n * d - (gained - lost) - 0.5 - z * math.sqrt(max(n * (2 * share + d - d * d), 0.0))

    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, (gained - lost) / n, 1.0, xtol=1e-12))


def design_effect_of(values: Floats, labels: NDArray[np.int64]) -> float:
    """By how much the variance of a mean over clustered units exceeds that of independent ones; at least 1.

    Args:
        values: shape (n,), of the units, such as their changes.
        labels: shape (n,), each unit's cluster, from 0.
    """
    n, clusters = len(values), int(labels.max()) + 1
    if clusters == n:
        return 1.0
    residuals = values - values.mean()
    independent = n / (n - 1) * float((residuals**2).sum())
    if clusters < 2 or independent <= 64 * np.finfo(np.float64).eps:  # all that is known is how many there are
        return n / clusters
    clustered = clusters / (clusters - 1) * float((np.bincount(labels, residuals) ** 2).sum())
    return max(1.0, clustered / independent)


def sign_flip_p(differences: NDArray[np.int64]) -> float:
    """Two-sided p value of "each difference might as well have had the other sign", exact.

    Of differences of 1 that is the exact McNemar test; of larger ones, sums over clusters, it is the permutation test
    that exchanges the arms of whole clusters.
    """
    chance = np.ones(1)  # of each sum, in steps of 2 from the lowest
    for size, count in zip(*np.unique(np.abs(differences[differences != 0]), return_counts=True), strict=True):
        flips = np.zeros(size * count + 1)
        flips[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, flips)
    largest = len(chance) - 1
    tail = (largest - abs(int(differences.sum()))) // 2  # sums at least as far out on one side
    return min(1.0, 2 * float(chance[: tail + 1].sum()))


def joined_wilson(ones: tuple[int, int], sizes: tuple[int, int], level: float) -> tuple[float, float]:
    """The second of two independent shares minus the first: each end joins those of both Wilson intervals.

    Args:
        ones: of each group.
        sizes: of each group.
        level: confidence.
    """
    p_before, p_after = (one / size for one, size in zip(ones, sizes, strict=True))
    before, after = (
        stats.binomtest(one, size).proportion_ci(level, method="wilson") for one, size in zip(ones, sizes, strict=True)
    )
    delta = (ones[1] * sizes[0] - ones[0] * sizes[1]) / (sizes[0] * sizes[1])
    lower = delta - math.hypot(p_after - after.low, before.high - p_before)
    upper = delta + math.hypot(after.high - p_after, p_before - before.low)
    return lower, upper


def standard_error(values: Floats, weights: Floats | None, mean: float) -> float:
    """Of a (weighted) mean of two or more values, by the jackknife; NaN where values are not finite.

    With equal weights that is the usual one. A linearised variance of unequal ones is too small: the mean follows the
    heavy values, which then seem not to vary.
    """
    n = len(values)
    share = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return math.sqrt((n - 1) / n * float(((share * (values - mean) / (1 - share)) ** 2).sum()))


@dataclass(frozen=True)
class MeanDifference:
    """A mean difference with its standard error on ``df`` degrees of freedom; both are 0 if no unit differs.

    ``half_step`` is the continuity correction: half of what the smallest step of a unit moves the mean.
    """

    delta: float
    error: float
    df: float
    half_step: float = 0.0

    def interval(self, level: float) -> tuple[float, float]:
        """Student's interval, with the continuity correction."""
        margin = float(stats.t.ppf((1 + level) / 2, self.df)) * self.error + self.half_step
        return self.delta - margin, self.delta + margin

    @property
    def p(self) -> float:
        """Two-sided p value of "no difference", at most 5 % where the 95 % interval leaves 0 out."""
        beyond = max(abs(self.delta) - self.half_step, 0.0)
        return float(2 * stats.t.sf(beyond / self.error, self.df)) if self.error else 1.0


def mean_difference(before: Floats, after: Floats, weights: Floats | None) -> MeanDifference | str:
    """``r = sum(w d) / sum(w)`` with its jackknife variance, on as many degrees of freedom as the weights are worth.

    With equal weights this is exactly the paired t test. Scores of a few values, such as thirds, have a mean that moves
    in steps; without a correction by half a step, a one-sided bound at 5 % is crossed by 6 to 8 % of samples of 20.
    Where there is nothing to test against, the reason is returned instead.
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
    w = np.ones(n) if weights is None else weights
    half_step = common_step(w * difference) / (2 * float(w.sum()))
    df, error = worth(w) - 1, standard_error(difference, weights, delta)
    if not (df > 0 and math.isfinite(error)):
        return "one unit outweighs all others: no variance"
    return MeanDifference(delta, error, df, half_step)


def worth(weights: Floats) -> float:
    """As how many equal weights they count (Kish 1965)."""
    shares = weights / weights.sum()
    return 1 / float((shares**2).sum())


def common_step(values: Floats) -> float:
    """The largest step of which all values are multiples; 0 where it is less than a hundredth of the largest.

    >>> common_step(np.array([0.5, -0.75, 0.0])), common_step(np.array([0.3, 0.1234567]))
    (0.25, 0.0)
    """
    largest = float(np.abs(values).max())
    step, rounding = 0.0, 1e-5 * largest
    for value in np.unique(np.abs(values[values != 0])).tolist():
        while value > rounding:  # Euclid's algorithm
            step, value = value, step % value
            value = 0.0 if step - value < rounding else value
        if step < largest / 100:
            return 0.0
    return step
