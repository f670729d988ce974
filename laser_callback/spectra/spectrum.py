"""Factorise a matrix once, and truncate it to any rank.

One factorisation serves every rho. For a matrix W of shape (m, n) with m >= n the right singular vectors V and the
singular values come from the eigen-decomposition of the Gram matrix W'W, in float64, and the truncated SVD is the
projection W_k = W V_k V_k' (the left side when m < n). Forming a Gram matrix squares the condition number; in float64
that costs accuracy only in directions whose singular values are below 1e-8 of the largest, which float32 weights do not
resolve either. Against `torch.linalg.svd` in float32 it is both faster and closer to the exact result: docs/spectra.md
compares the ways. Deterministic: the same weights give the same factorisation on the same machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laser_callback.plans.rank_rules import Run, rank_by, unit
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.eigen import gram_eigen


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
            ValueError: if it holds NaN or infinite values, or has singular values beyond float64, naming it.
        """
        refuse_non_finite(matrix, name)
        work = as_double(matrix)
        scale = unit(work)
        eigenvalues, vectors = gram_eigen(work / scale if work is matrix else work.div_(scale))
        values = eigenvalues.flip(0)
        # What the Gram matrix cannot tell from zero is zero, or a rank rule would count rounding noise.
        resolution = len(values) * torch.finfo(torch.float64).eps * values[:1]
        values = torch.where(values > resolution, values, 0).sqrt_() * scale
        refuse_out_of_range(values, f"singular values of {name}")
        return cls(values, vectors.flip(1).contiguous(), (matrix.shape[0], matrix.shape[1]))

    def truncate(self, matrix: Tensor, rank: int) -> Tensor:
        """W_k, the best approximation of ``matrix`` of rank ``rank`` (Eckart-Young), float64, shape (m, n)."""
        work = as_double(matrix)
        if rank >= len(self.values):
            return work.clone()
        head = self.basis[:, :rank]
        return (work @ head) @ head.T if self.shape[0] >= self.shape[1] else head @ (head.T @ work)

    def rank(self, reduction: Reduction) -> int:
        """The rank k of a reduction: from its rho, or from the rule it names.

        Raises:
            ValueError: for a rule about all matrices of a reduction, which `Spectra.settled` knows.
        """
        if reduction.is_ruled:
            return rank_by(str(reduction.rho), self.values, self.shape)
        return reduction.rank(min(self.shape))

    def removed(self, reduction: Reduction) -> tuple[Run, ...]:
        """The runs of singular directions that a reduction removes, from 0, the largest first."""
        return reduction.removed(self.rank(reduction), len(self.values))

    def gains(self, reduction: Reduction) -> Tensor:
        """What ``reduction`` multiplies each singular value by, float64, shape (min(m, n),)."""
        gains = torch.ones_like(self.values)
        for start, stop in self.removed(reduction):
            gains[start:stop] = reduction.scale
        if reduction.norm == "whole":
            values = self.values / unit(self.values)
            gains *= _ratio(values, gains * values)
        return gains

    def reduce(self, matrix: Tensor, reduction: Reduction) -> Tensor:
        """``matrix`` without the singular directions that ``reduction`` removes, or with them scaled; shape (m, n).

        In ``matrix``' dtype, rounded once at the end.
        """
        work = as_double(matrix)
        work = work / (scale := unit(work))
        if len(removed := self.removed(reduction)) <= 1:
            start, stop = removed[0] if removed else (len(self.values),) * 2
            kept = self.truncate(work, start)  # and in place what can be: of a large matrix each float64 copy counts
            if stop < len(self.values):
                tail = self.truncate(work, stop)
                kept.add_(torch.sub(work, tail, out=tail))
            else:
                kept.add_(0.0)  # -0 becomes 0, as where nothing is added to it
        else:
            gone = torch.cat([self.basis[:, start:stop] for start, stop in removed], 1)
            kept = work - ((work @ gone) @ gone.T if self.shape[0] >= self.shape[1] else gone @ (gone.T @ work))
        result = kept + reduction.scale * (work - kept) if reduction.scale else kept
        if reduction.norm == "whole" and bool((self.gains(reduction) * self.values).any()):  # else it is rounding
            result = result * _ratio(work, result)
        return result.mul_(scale).to(device=matrix.device, dtype=matrix.dtype)


def _ratio(whole: Tensor, part: Tensor) -> Tensor:
    """How much larger the one is than the other in the Frobenius norm; 1 where there is no other."""
    ratio = whole.norm() / part.norm()
    return torch.where(ratio.isfinite(), ratio, 1.0)


def as_double(matrix: Tensor) -> Tensor:
    """``matrix`` in float64, on its own device where that can be."""
    # Apple's GPUs have no float64.
    return matrix.to(device="cpu" if matrix.device.type == "mps" else matrix.device, dtype=torch.float64)


def refuse_non_finite(matrix: Tensor, name: str) -> None:
    """Raise where ``matrix`` holds NaN or infinite values, naming it."""
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the weights of `{name}` hold NaN or infinite values: there is nothing to cut")


def refuse_out_of_range(made: Tensor, name: str) -> None:
    """Raise where what was made of finite weights has values that its dtype cannot hold, naming it."""
    if not bool(torch.isfinite(made).all()):
        raise ValueError(
            f"`{name}` would have values beyond {made.dtype}, whose largest is {torch.finfo(made.dtype).max:.6g}: "
            "convert the model to a dtype with a wider range (`model.bfloat16()`, `model.float()`), or leave this "
            "matrix out of the plan, or of `within`"
        )


def need_weights(matrix: Tensor, name: str) -> None:
    """Raise where ``matrix`` has no elements, naming it."""
    if not matrix.numel():
        raise ValueError(f"`{name}` is {matrix.shape[0]} x {matrix.shape[1]}, without any weights: leave it out")
