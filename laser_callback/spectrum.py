"""Factorise a matrix once, truncate it to any rank, and pick ranks from the spectrum alone.

One factorisation serves every rho. For a matrix W of shape (m, n) with m >= n the right singular vectors V and the
singular values come from the eigen-decomposition of the Gram matrix W'W, in float64, and the truncated SVD is the
projection W_k = W V_k V_k' (the left side when m < n). Forming a Gram matrix squares the condition number; in float64
that costs accuracy only in directions whose singular values are below 1e-8 of the largest, which float32 weights do not
resolve either. Against `torch.linalg.svd` in float32 it is both faster and closer to the exact result.
Deterministic: the same weights give the same result on the same machine and thread count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laser_callback.plan import Reduction


@dataclass(frozen=True)
class Spectrum:
    """The factorisation of one matrix W of shape (m, n).

    Attributes:
        values: singular values, descending, float64, shape (min(m, n),).
        basis: singular vectors of the shorter side in columns, float64, shape (min(m, n), min(m, n)).
        shape: (m, n).
    """

    values: Tensor
    basis: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor, name: str = "matrix") -> Spectrum:
        """Factorise ``matrix``, shape (m, n), any floating dtype, on its own device.

        Raises:
            ValueError: if it holds NaN or infinite values, naming it.
        """
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"the weights of `{name}` hold NaN or infinite values: there is nothing to factorise")
        work = _as_double(matrix)
        gram = work.T @ work if work.shape[0] >= work.shape[1] else work @ work.T
        eigenvalues, vectors = torch.linalg.eigh(gram)  # ascending
        values = eigenvalues.flip(0)
        # What the Gram matrix cannot tell from zero is zero, or a rank rule would count rounding noise.
        resolution = len(values) * torch.finfo(torch.float64).eps * values[:1]
        values = torch.where(values > resolution, values, 0).sqrt_()
        return cls(values, vectors.flip(1).contiguous(), (matrix.shape[0], matrix.shape[1]))

    def truncate(self, matrix: Tensor, rank: int) -> Tensor:
        """W_k, the best approximation of ``matrix`` of rank ``rank`` (Eckart-Young), float64, shape (m, n)."""
        work = _as_double(matrix)
        if rank >= len(self.values):
            return work.clone()
        head = self.basis[:, :rank]
        return (work @ head) @ head.T if self.shape[0] >= self.shape[1] else head @ (head.T @ work)

    def rank(self, reduction: Reduction) -> int:
        """The rank that a reduction keeps: from its rho, or from the rule it names."""
        if not isinstance(reduction.rho, str):
            return reduction.rank(min(self.shape))
        return {
            "entropy": self.entropy_rank,
            "gavish-donoho": self.gavish_donoho_rank,
            "marchenko-pastur": self.marchenko_pastur_rank,
        }[reduction.rho]()

    def reduce(self, matrix: Tensor, reduction: Reduction) -> Tensor:
        """``matrix`` after ``reduction``, in ``matrix``' dtype, rounded once at the end; shape (m, n).

        Kept is the head (or the tail); what is removed is multiplied by ``reduction.scale``.
        """
        head = self.truncate(matrix, self.rank(reduction))
        tail = _as_double(matrix) - head
        kept, removed = (head, tail) if reduction.keep == "head" else (tail, head)
        result = kept + reduction.scale * removed if reduction.scale else kept
        return result.to(device=matrix.device, dtype=matrix.dtype)

    # ---- rules ------------------------------------------------------------------------------------------------------
    # Heuristics: they separate a low-rank signal from i.i.d. noise, and a trained weight is not that sum.

    def entropy_rank(self) -> int:
        """Effective rank exp(H(p)), p = sigma / sum(sigma), rounded up (Roy and Vetterli, EUSIPCO 2007)."""
        if self.values[0] == 0:
            return 0
        p = self.values / self.values.sum()
        return min(math.ceil(math.exp(float(torch.special.entr(p).sum()))), len(self.values))

    def gavish_donoho_rank(self) -> int:
        """Singular values above the optimal hard threshold for unknown noise (Gavish and Donoho, IEEE T-IT 2014).

        The threshold is omega(beta) times the median singular value with omega = lambda(beta) / sqrt(mu(beta)): lambda
        from their equation 11, mu the median of the Marchenko-Pastur distribution.
        """
        beta = min(self.shape) / max(self.shape)
        root = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
        threshold = root / math.sqrt(_marchenko_pastur_median(beta)) * self._median
        return int((self.values > threshold).sum())

    def marchenko_pastur_rank(self) -> int:
        """Singular values above the edge s * (sqrt(m) + sqrt(n)) of a noise matrix with entries of deviation s.

        The deviation is estimated from the median singular value, which a signal of rank below half does not move
        much: s = median / sqrt(max(m, n) * mu(beta)). The edge is widened by four times the Tracy-Widom scale
        (Johnstone, Ann. Stat. 2001), which covers the estimate of s too: noise alone exceeds it in about 1 of 1,000
        matrices from 100 rows and columns on (simulated), and in about 1 of 100 at 20.
        """
        longer, shorter = float(max(self.shape)), float(min(self.shape))
        s = self._median / math.sqrt(longer * _marchenko_pastur_median(shorter / longer))
        root = math.sqrt(longer) + math.sqrt(shorter)
        tracy_widom = root * (1 / math.sqrt(longer) + 1 / math.sqrt(shorter)) ** (1 / 3)
        return int((self.values > s * math.sqrt(root**2 + 4 * tracy_widom)).sum())

    @property
    def _median(self) -> float:
        return float(self.values.quantile(0.5))  # `Tensor.median` is the lower of the two in the middle


def _as_double(matrix: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return matrix.to(device="cpu" if matrix.device.type == "mps" else matrix.device, dtype=torch.float64)


def _marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur distribution with ratio ``beta`` in (0, 1] and unit variance, by quadrature."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # With x = low + (high - low) sin^2(t) the density's square roots turn into a smooth integrand.
    t = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    x = low + (high - low) * torch.sin(t) ** 2
    mass = ((high - low) * torch.sin(t) * torch.cos(t)) ** 2 / x.clamp_min(1e-300)
    cumulative = torch.cumulative_trapezoid(mass, t)
    return float(x[1:][torch.searchsorted(cumulative, cumulative[-1] / 2)])
