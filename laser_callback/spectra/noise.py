"""Noise as large as a cut: what any change of this size does to a matrix, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_callback.plans.rank_rules import unit
from laser_callback.spectra.spectrum import as_double
from laser_callback.support.hashing import content_hash


def noisy(matrix: Tensor, reduced: Tensor, seed: int) -> Tensor:
    """``matrix`` plus Gaussian noise with the Frobenius norm of what was taken from it; seeded by the matrix, too."""
    work = as_double(matrix.detach())
    removed = work - as_double(reduced)
    scale = unit(removed)
    size = (removed / scale).norm()
    generator = torch.Generator().manual_seed(int(content_hash(f"noise {seed}", matrix.detach().contiguous())[:15], 16))
    noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(work.device)
    return (work + noise * (size / noise.norm()) * scale).to(matrix.device, matrix.dtype)
