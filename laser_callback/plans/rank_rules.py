"""Pick a rank from the singular values alone: energy, entropy, and three thresholds between signal and noise.

Contract: a rule is a function of the singular values (descending, float64) and the shape of the matrix, and returns how
many of them to keep. It looks at no data. The thresholds separate a low-rank signal from i.i.d. noise; a trained weight
is not that sum, and its small singular values may matter (arXiv 2410.17770): for weights every rule is a heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def energy_rank(values: Tensor, share: float) -> int:
    """The fewest singular values whose squares sum to at least ``share`` of the squared Frobenius norm."""
    energy = values.square().cumsum(0)
    # At most those that are not zero: the sum's own rounding must not ask for more.
    return min(int((energy < share * energy[-1]).sum()) + 1, int((values > 0).sum()))


def entropy_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Effective rank exp(H(p)), p = sigma / sum(sigma), rounded up (Roy and Vetterli, EUSIPCO 2007)."""
    if values[0] == 0:
        return 0
    p = values / values.sum()
    return min(math.ceil(math.exp(float(torch.special.entr(p).sum()))), len(values))


def gavish_donoho_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Singular values above the optimal hard threshold for unknown noise (Gavish and Donoho, IEEE T-IT 2014).

    The threshold is omega(beta) times the median singular value with omega = lambda(beta) / sqrt(mu(beta)): lambda from
    their equation 11, mu the median of the Marchenko-Pastur distribution.
    """
    beta = min(shape) / max(shape)
    root = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    threshold = root / math.sqrt(_marchenko_pastur_median(beta)) * _quantile(values, 0.5)
    return int((values > threshold).sum())


def marchenko_pastur_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Singular values above the edge s * (sqrt(m) + sqrt(n)) of a noise matrix with entries of deviation s.

    The deviation is estimated from the median singular value, which a signal of rank below half does not move much:
    s = median / sqrt(max(m, n) * mu(beta)). The edge is widened by four times the Tracy-Widom scale (Johnstone, Ann.
    Stat. 2001), which covers the estimate of s too: noise alone exceeds it in about 1 of 1,000 matrices from 100 rows
    and columns on (simulated), and in about 1 of 100 at 20.
    """
    longer, shorter = float(max(shape)), float(min(shape))
    s = _quantile(values, 0.5) / math.sqrt(longer * _marchenko_pastur_median(shorter / longer))
    root = math.sqrt(longer) + math.sqrt(shorter)
    tracy_widom = root * (1 / math.sqrt(longer) + 1 / math.sqrt(shorter)) ** (1 / 3)
    return int((values > s * math.sqrt(root**2 + 4 * tracy_widom)).sum())


def laser_rmt_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Singular values above the threshold of laserRMT (`rmt_laser_snr.py`), for comparison with it.

    It is sigma (1 + sqrt(beta)) with sigma = IQR(singular values) / 1.349 and beta = short side / long side. That is
    not the Marchenko-Pastur edge, whose sigma is the deviation of the entries: of pure noise it keeps 24 % of a square
    matrix, and everything at 1:4.
    """
    deviation = (_quantile(values, 0.75) - _quantile(values, 0.25)) / 1.349
    return int((values > deviation * (1 + math.sqrt(min(shape) / max(shape)))).sum())


_RULES: dict[str, Callable[[Tensor, tuple[int, int]], int]] = {
    "entropy": entropy_rank,
    "gavish-donoho": gavish_donoho_rank,
    "marchenko-pastur": marchenko_pastur_rank,
    "laser-rmt": laser_rmt_rank,
}
_ENERGY = "energy-"

RANK_RULES = (*_RULES, f"{_ENERGY}SHARE")
"""What may stand in place of a number for rho; SHARE is a number between 0 and 1, as in ``energy-0.99``."""


def canonical_rule(text: str) -> str | None:
    """The name of a rule as plans write it, or ``None`` if it is none.

    >>> canonical_rule("energy-.990"), canonical_rule("energy-2")
    ('energy-0.99', None)
    """
    if text in _RULES:
        return text
    if not text.startswith(_ENERGY):
        return None
    try:
        share = float(text.removeprefix(_ENERGY))
    except ValueError:
        return None
    return f"{_ENERGY}{share!r}" if 0 < share < 1 else None


def rank_by(rule: str, values: Tensor, shape: tuple[int, int]) -> int:
    """The rank that ``rule`` keeps.

    Args:
        rule: one of :data:`RANK_RULES`.
        values: singular values, descending, float64, shape (min(m, n),).
        shape: (m, n) of the matrix.
    """
    if not len(values):
        return 0  # of a matrix without rows or columns
    values = values / unit(values)
    if rule.startswith(_ENERGY):
        return energy_rank(values, float(rule.removeprefix(_ENERGY)))
    return _RULES[rule](values, shape)


def unit(values: Tensor) -> float:
    """A power of two to divide ``values`` by, so that their squares and sums stay in the range of float64.

    It is 1 for all that are in that range as they are, so that nothing changes for them.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0 or 1e-100 < largest < 1e100:
        return 1.0
    return 2.0 ** min(max(math.frexp(largest)[1], -1022), 1023)


def _quantile(values: Tensor, q: float) -> float:
    return float(values.quantile(q))  # `Tensor.median` is the lower of the two in the middle


@cache  # a model has few shapes
def _marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur distribution with ratio ``beta`` in (0, 1] and unit variance, by quadrature."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # With x = low + (high - low) sin^2(t) the density's square roots turn into a smooth integrand.
    t = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    x = low + (high - low) * torch.sin(t) ** 2
    mass = ((high - low) * torch.sin(t) * torch.cos(t)) ** 2 / x.clamp_min(1e-300)
    cumulative = torch.cumulative_trapezoid(mass, t)
    return float(x[1:][torch.searchsorted(cumulative, cumulative[-1] / 2)])
