"""The eigenvectors of a Gram matrix, in float64.

On the CPU by SciPy's LAPACK on one thread, whatever else is allowed: a factorisation is a long row of small steps that
threads must wait for each other in, and where another process takes one of their cores, two threads need many times as
long as one. It also makes the result the same for every number of threads. On other devices by torch.
"""

from __future__ import annotations

from functools import cache

import torch
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from threadpoolctl import ThreadpoolController
from torch import Tensor


def gram_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the smaller of W'W and W W'.

    Args:
        matrix: W, float64, shape (m, n).

    Returns:
        Eigenvalues, ascending, shape (min(m, n),), and eigenvectors in columns, shape (min(m, n), min(m, n)).
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
        return values, vectors
    with _libraries().limit(limits=1, user_api="blas"):
        # BLAS reads columns: to it a matrix in rows is its transpose. It computes, and `eigh` reads, the lower half.
        gram = dsyrk(1.0, matrix.detach().contiguous().numpy().T, trans=not tall, lower=True)
        values, vectors = eigh(gram, lower=True, driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
