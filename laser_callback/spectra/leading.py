"""The leading singular directions alone, of a matrix that is too wide to factorise where few of them are asked for.

Block Krylov (Musco and Musco, 2015, algorithm 2): random vectors and what W'W makes of them, again and again, and in
the space of all of these the best approximations (Rayleigh and Ritz). In float32 but for the small problem, seeded, on
any device. It costs 4 m n operations for each vector in place of 2 m n^2 + 9 n^3 for all.

What comes out is checked. A vector v of value s^2 is the mixture of true directions whose squared values lie about it
with a standard deviation of |W'W v - s^2 v|: those are kept for which that is at most :data:`TOLERANCE` of s^2. And in
what is left of the matrix without them nothing may be larger than the last, as new random vectors tell: of many equal
values a Krylov space has no more than its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laser_callback.spectra.spectrum import Spectrum, refuse_non_finite

TOLERANCE = 0.1
"""A direction is a mixture of such whose squared singular values differ by no more than this share of them."""
VECTORS = 4
"""So many vectors for each direction that is asked for."""
STEPS = 16
"""So often what W'W makes of a block of them is added."""
CHECKS = 4
"""So many steps of the power method look for what was missed."""


def leading(matrix: Tensor, count: int, name: str = "matrix") -> Spectrum | None:
    """The first singular directions, ``count`` of them or fewer: as many as are found within the tolerance.

    Args:
        matrix: W, shape (m, n), any floating dtype, on its own device.
        count: how many are asked for.
        name: for messages.

    Returns:
        A spectrum of these alone, its basis of shape (min(m, n), found), float32 (float64 where the matrix is), or
        ``None`` where not one is found.

    Raises:
        ValueError: if the matrix holds NaN or infinite values.
    """
    refuse_non_finite(matrix, name)
    work = matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    largest = work.abs().max()
    # A power of two, for the same bits at any scale; so that squares are within float32.
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    work = work / scale
    tall = work if work.shape[0] >= work.shape[1] else work.mT
    short = tall.shape[1]
    block = min(max(-(-VECTORS * count // STEPS), 8), short)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(short, block, generator=generator).to(work)

    space: list[Tensor] = []
    images: list[Tensor] = []
    fresh = drawn()
    for _ in range(min(STEPS, short // block)):
        for _ in range(2 if space else 0):  # once leaves rounding behind
            known = torch.cat(space, 1)
            fresh = fresh - known @ (known.mT @ fresh)
        space.append(torch.linalg.qr(fresh)[0])
        fresh = tall.mT @ (tall @ space[-1])
        images.append(fresh)
    vectors, image = torch.cat(space, 1), torch.cat(images, 1)
    small = (vectors.mT @ image).double().cpu()
    squares, mix = torch.linalg.eigh((small + small.mT) / 2)
    squares, mix = squares.flip(0)[:count].clamp_min(0), mix.flip(1)[:, :count].to(work)
    vectors, image = vectors @ mix, image @ mix
    off = (image - vectors * squares.to(work)).norm(dim=0).double().cpu()
    found = _first(off <= TOLERANCE * squares) if squares[0] > 0 else 0

    rest = drawn()
    for _ in range(CHECKS):
        rest = rest - vectors[:, :found] @ (vectors[:, :found].mT @ rest)
        rest = torch.linalg.qr(rest)[0]
        image = tall @ rest
        rest = tall.mT @ image
    most = torch.linalg.matrix_norm(image.double(), 2).square().cpu()
    found = _first(squares[:found] >= (1 - TOLERANCE) * most)
    if not found:
        return None
    values = squares[:found].sqrt() * float(scale)
    return Spectrum(values, vectors[:, :found].contiguous(), (matrix.shape[0], matrix.shape[1]))


def _first(good: Tensor) -> int:
    """How many come ahead of the first that is not."""
    return int(good.long().cumprod(0).sum())
