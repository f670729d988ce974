"""Random matrices, and the best approximation of a rank, by LAPACK and independent of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The truncated SVD in float64, of a matrix or of each in a stack."""
    u, s, v = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
