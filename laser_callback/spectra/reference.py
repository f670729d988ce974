"""The cut of the paper's code, randomised as it is there: what its numbers were made with.

A reduction with ``of="reference"`` is ``do_low_rank`` of github.com/pratyushasharma/laser: the float32 product of
``torch.svd_lowrank(W, q=k, niter=2)``, which is not the best approximation of rank k but a random one near it; nothing
of it is kept. Reproduced are the number of iterations, the lack of oversampling, and the rank ``int(rho * max_rank)``
in floating point, which may be one lower than that of an exact cut, and 0. Not reproduced is how that code comes by
rho: its ``(10 - 9.9) * 0.1`` gives rank 9 of 1,000, here as there if a plan's rho is that number, but a rho of 0.01
gives 10. Nor is its random stream, which has no seed: here the seed comes from the matrix, and torch's generators are
left as they were. Weights that a model stores transposed (GPT-2's) are sketched from the other side than there, and its
``niter=20`` for RoBERTa is 2 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import need_weights, refuse_non_finite, refuse_out_of_range
from laser_callback.support.hashing import content_hash


def reduce_as_reference(matrix: Tensor, reduction: Reduction, name: str) -> Tensor:
    """``matrix`` after ``reduction``; shape, dtype and device as given.

    Raises:
        ValueError: if it holds NaN or infinite values or none at all, or float32 does not hold its products.
    """
    need_weights(matrix, name)
    rank = reduction.rank(min(matrix.shape))
    refuse_non_finite(matrix, name)
    # Other accelerators than CUDA keep their generators in ways of their own.
    on_cuda = matrix.device.type == "cuda"
    work = matrix.detach().contiguous().to(matrix.device if on_cuda else "cpu")
    refuse_out_of_range(work.float(), f"{name} in single precision, for of='reference'")
    seed = int(content_hash("reference", work)[:15], 16)
    with torch.random.fork_rng(devices=[work.device.index] if on_cuda else []):
        # Not `torch.manual_seed`, which seeds the generators of all devices.
        generator = torch.cuda.default_generators[work.device.index] if on_cuda else torch.default_generator
        generator.manual_seed(seed)
        try:
            u, s, v = torch.svd_lowrank(work.float(), q=rank, niter=2)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"of='reference' computes in float32, which does not hold the products of `{name}`: cut it with "
                "of='rank', or scale its weights down"
            ) from error
    return (u @ torch.diag(s) @ v.T).to(matrix.device, matrix.dtype)
