"""How many examples a comparison of right and wrong answers needs, and what it can show with those there are.

Of a gain, that is a question of probability; of a drop that is to be ruled out, first of whether it can be at all.

The test is the exact two-sided McNemar test of :mod:`laser_callback.stats.paired`. Of ``n`` examples, a cut fixes a
share f and breaks a share b = r f; the gain is f - b, and only the f + b discordant examples say anything. Given
m of them, the number fixed is binomial with 1 / (1 + r); m itself is binomial with n and f + b. Power is the sum over
both.

Source: Connor, R. J. (1987). Sample size for testing differences in proportions for the paired-sample design.
Biometrics 43, 207-211 (the normal approximation, which is where the exact count starts).
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from laser_callback.stats.intervals import score_interval
from laser_callback.stats.outcomes import ALPHA

BROKEN_PER_FIXED = 1 / 3
"""Answers that a useful cut breaks for each that it fixes."""

_LOOKAHEAD = 32


def exact_power(gain: float, n: int, *, alpha: float = 0.05, broken_per_fixed: float = BROKEN_PER_FIXED) -> float:
    """Probability that ``n`` examples show a true gain as a gain.

    Args:
        gain: true difference of the shares of right answers, reduced minus original.
        n: independent examples.
        alpha: two-sided level.
        broken_per_fixed: r, broken answers per fixed one.

    Raises:
        ValueError: if the numbers describe no cut, such as a gain of 0.6 when a third as many break: 1.2 of all change.
    """
    discordant = _discordant(gain, alpha, broken_per_fixed)
    spread = 9 * math.sqrt(n * discordant * (1 - discordant)) + 9  # what lies farther out has less than 1e-15
    m = np.arange(max(0, math.floor(n * discordant - spread)), min(n, math.ceil(n * discordant + spread)) + 1)
    # The most that may be broken in a significant result, -1 if none is: P(B <= most | m, 1/2) <= alpha / 2.
    most = stats.binom.ppf(alpha / 2, m, 0.5)
    most = np.where(stats.binom.cdf(most, m, 0.5) > alpha / 2, most - 1, most)
    shown = stats.binom.cdf(most, m, broken_per_fixed / (1 + broken_per_fixed))
    return float((stats.binom.pmf(m, n, discordant) * shown).sum())


def examples_needed(
    gain: float, *, power: float = 0.8, alpha: float = 0.05, broken_per_fixed: float = BROKEN_PER_FIXED
) -> int:
    r"""Examples with which a true gain is shown with probability ``power``.

    Connor's :math:`n = (z_{1-\alpha/2} \sqrt\psi + z_{power} \sqrt{\psi - gain^2})^2 / gain^2` with :math:`\psi` the
    discordant share, then corrected by :func:`exact_power`: the exact test needs a little more. Its power falls back
    slightly between steps as ``n`` grows; the number returned is one from which on it stays above.

    Raises:
        ValueError: as :func:`exact_power`, and for a power that is not between 0 and 1.

    >>> examples_needed(0.05), examples_needed(0.02)
    (337, 843)
    """
    if not 0 < power < 1:
        raise ValueError(f"`power` must be between 0 and 1, got {power}")
    discordant = _discordant(gain, alpha, broken_per_fixed)
    z_alpha, z_power = (float(stats.norm.ppf(level)) for level in (1 - alpha / 2, power))
    connor = (z_alpha * math.sqrt(discordant) + z_power * math.sqrt(max(discordant - gain**2, 0))) ** 2 / gain**2

    def enough(n: int) -> bool:
        return exact_power(gain, n, alpha=alpha, broken_per_fixed=broken_per_fixed) >= power

    below, above = 0, max(1, math.ceil(connor))
    while not enough(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    while dips := [n for n in range(above + 1, above + _LOOKAHEAD) if not enough(n)]:
        above = dips[-1] + 1
    return above


def detectable_gain(
    n: int, *, power: float = 0.8, alpha: float = 0.05, broken_per_fixed: float = BROKEN_PER_FIXED
) -> float:
    """The smallest true gain that ``n`` examples show with probability ``power``; infinity if there is none.

    Raises:
        ValueError: as :func:`examples_needed`, and if ``n`` is negative.

    >>> round(detectable_gain(337), 3), detectable_gain(3)
    (0.05, inf)
    """
    if n < 0:
        raise ValueError(f"`n` must not be negative, got {n}")
    if not 0 < power < 1:
        raise ValueError(f"`power` must be between 0 and 1, got {power}")
    below, above = 0.0, (1 - broken_per_fixed) / (1 + broken_per_fixed)  # at most, every example is discordant

    def enough(gain: float) -> bool:
        return exact_power(gain, n, alpha=alpha, broken_per_fixed=broken_per_fixed) >= power

    if not enough(above):
        return math.inf
    while above - below > 1e-4 * above:
        middle = (below + above) / 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above


def drop_ruled_out(n: int) -> float:
    """The smallest drop of a share of right answers that ``n`` independent examples rule out if none of them changes.

    At one-sided 95 % confidence, as constraints are judged.

    >>> [round(drop_ruled_out(n), 3) for n in (60, 300)]
    [0.058, 0.012]
    """
    return -score_interval(0, 0, n, 1 - 2 * ALPHA)[0] if n else 1.0


def examples_to_rule_out(drop: float) -> int:
    """The fewest examples that rule out a drop, if none of them changes.

    Raises:
        ValueError: if ``drop`` is not above 0 and at most 1.

    >>> examples_to_rule_out(0.05), examples_to_rule_out(0.02)
    (70, 180)
    """
    if not 0 < drop <= 1:
        raise ValueError(f"`drop` must be above 0 and at most 1, got {drop}")
    below, above = 0, 1
    while drop_ruled_out(above) > drop:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if drop_ruled_out(middle) <= drop else (middle, above)
    return above


def _discordant(gain: float, alpha: float, broken_per_fixed: float) -> float:
    """Share of examples that a cut fixes or breaks, of arguments that make sense."""
    if not 0 < alpha < 1:
        raise ValueError(f"`alpha` must be between 0 and 1, got {alpha}")
    if not 0 <= broken_per_fixed < 1:
        raise ValueError(
            f"`broken_per_fixed` must be at least 0 and below 1, else nothing is gained; got {broken_per_fixed}"
        )
    largest = (1 - broken_per_fixed) / (1 + broken_per_fixed)
    if not 0 < gain <= largest + 1e-12:
        raise ValueError(
            f"`gain` must be above 0 and at most {largest:.3g} if {broken_per_fixed:.3g} answers break per fixed one, "
            f"got {gain}"
        )
    return min(gain / largest, 1.0)
