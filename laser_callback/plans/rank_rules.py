"""Pick a rank from the singular values alone: energy, entropy, and three thresholds between signal and noise.

Contract: a rule is a function of the singular values (descending, float64) and the shape of the matrix, and returns how
many of them to keep. It looks at no data. The thresholds separate a low-rank signal from i.i.d. noise; a trained weight
is not that sum, and its small singular values may matter (arXiv 2410.17770): for weights every rule is a heuristic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from laser_callback.support.suggest import clipped

_MOST_PLACES = 10**6


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
OF_THE_MEDIAN = ("gavish-donoho", "marchenko-pastur")
"""Rules that take the median singular value for one of noise. Where it is 0 they keep everything that is not."""

_ENERGY, _GLOBAL, _PLACES = "energy-", "global-", "places-"
_RANK = re.compile(r"k(\d{1,9})")
_LIST = re.compile(r"\d{1,9}(-\d{1,9})?(\+\d{1,9}(-\d{1,9})?)*")

RANK_RULES = (*_RULES, f"{_ENERGY}SHARE", "kRANK", f"{_GLOBAL}RANK", f"{_PLACES}LIST")
"""What may stand in place of a number for rho: SHARE is a number between 0 and 1, as in ``energy-0.99``; RANK a number
of singular directions, ``k2`` for each matrix, ``global-0.5`` on average over all matrices that the reduction names, by
one threshold; LIST says which directions, counted from 0, the largest first, as in ``places-0-4+7``."""

Run = tuple[int, int]
"""Components from the first number to before the second."""


def canonical_rule(text: str) -> str | None:
    """The name of a rule as plans write it, or ``None`` if it is none.

    >>> canonical_rule("energy-.990"), canonical_rule("energy-2"), canonical_rule("k02"), canonical_rule("global-1")
    ('energy-0.99', None, 'k2', 'global-1')
    >>> canonical_rule("places-7+0-2+3")
    'places-0-3+7'
    """
    if text in _RULES:
        return text
    if rank := _RANK.fullmatch(text):
        return f"k{int(rank[1])}"
    if text.startswith(_PLACES) and _LIST.fullmatch(listed := text.removeprefix(_PLACES)):
        places = _read_places(listed)
        return None if places is None else places_rule(places)
    for prefix, most in ((_ENERGY, 1.0), (_GLOBAL, math.inf)):
        if text.startswith(prefix):
            try:
                number = float(text.removeprefix(prefix))
            except ValueError:
                return None
            return f"{prefix}{int(number) if number.is_integer() else number!r}" if 0 < number < most else None
    return None


def places_rule(places: Iterable[int]) -> str | None:
    """The rule that counts the components at these places, from 0; ``None`` for none.

    >>> places_rule([7, 0, 1, 2])
    'places-0-2+7'
    """
    runs: list[list[int]] = []
    for place in sorted({*places}):
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    text = "+".join(f"{start}-{stop - 1}" if stop - start > 1 else f"{start}" for start, stop in runs)
    return f"{_PLACES}{text}" if text else None


@lru_cache(maxsize=1024)  # a list of hundreds is read again wherever a candidate is looked at
def listed_places(rule: float | str) -> tuple[Run, ...] | None:
    """The runs of components that a rule lists, ascending; ``None`` if it is no list."""
    if not isinstance(rule, str) or not rule.startswith(_PLACES):
        return None
    parts = (part.partition("-") for part in rule.removeprefix(_PLACES).split("+"))
    return tuple((int(first), int(last or first) + 1) for first, _, last in parts)


def fixed_rank(rule: float | str) -> int | None:
    """The rank that a rule asks of any matrix; ``None`` if it is not such a rule."""
    match = _RANK.fullmatch(rule) if isinstance(rule, str) else None
    return None if match is None else int(match[1])


def mean_rank(rule: float | str) -> float | None:
    """The mean rank over its matrices that a rule asks for; ``None`` if it is not such a rule."""
    is_one = isinstance(rule, str) and rule.startswith(_GLOBAL)
    return float(str(rule).removeprefix(_GLOBAL)) if is_one else None


def global_ranks(values: Sequence[Tensor], mean: float) -> list[int]:
    """The rank of each of several matrices when one threshold keeps ``mean`` directions of a matrix on average.

    The largest singular values of all matrices together are kept, ``round(mean * len(values))`` of them, at least one;
    of equal ones those of the earlier matrix. None that is 0 is kept.

    Args:
        values: singular values of each matrix, descending, float64.
        mean: directions per matrix.

    >>> global_ranks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])], 1)
    [1, 1]
    >>> global_ranks([torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.5])], 1)
    [2, 0]
    """
    owner = torch.cat([torch.full((len(each),), i) for i, each in enumerate(values)])
    count = min(max(round(mean * len(values)), 1), len(owner))
    together = torch.cat([each.cpu() for each in values])
    first = together.argsort(descending=True, stable=True)[:count]
    first = first[together[first] > 0]
    return torch.bincount(owner[first], minlength=len(values)).tolist()


def _read_places(text: str) -> list[int] | None:
    """The places of a list; ``None`` if it has a run from a place to an earlier one."""
    runs = [part.partition("-") for part in text.split("+")]
    ends = [(int(first), int(last or first)) for first, _, last in runs]
    if any(last < first for first, last in ends):
        return None
    if sum(last - first for first, last in ends) > _MOST_PLACES:
        raise ValueError(f"a list of places may count at most {_MOST_PLACES:,}, got {clipped(text)}")
    return [place for first, last in ends for place in range(first, last + 1)]


def rank_by(rule: str, values: Tensor, shape: tuple[int, int]) -> int:
    """The rank that ``rule`` keeps.

    Args:
        rule: one of :data:`RANK_RULES` that knows a rank from one matrix alone.
        values: singular values, descending, float64, shape (min(m, n),).
        shape: (m, n) of the matrix.

    Raises:
        ValueError: for one that needs more than this matrix.
    """
    if mean_rank(rule) is not None:
        raise ValueError(f"{rule} is one threshold for all matrices of a reduction: of one alone there is no rank")
    if (rank := fixed_rank(rule)) is not None:
        return min(rank, len(values))
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
