"""The eigenvectors of a Gram matrix, in float64.

On the CPU by NumPy's LAPACK on one thread, whatever else is allowed: a factorisation is a long row of small steps that
threads must wait for each other in, and where another process takes one of their cores, two threads need many times as
long as one. It also makes the result the same for every number of threads. What uses more cores is several matrices at
a time, in threads: NumPy lets go of the interpreter meanwhile. On other devices by torch.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


def gram_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the smaller of W'W and W W'.

    Threads may call it side by side, within a :data:`ONE_THREAD` of the thread that waits for them.

    Args:
        matrix: W, float64, shape (m, n).

    Returns:
        Eigenvalues, ascending, shape (min(m, n),), and eigenvectors in columns, shape (min(m, n), min(m, n)).
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
        return values, vectors
    work = matrix.detach().contiguous().numpy()  # BLAS may sum gaps in another order
    with ONE_THREAD:
        values, vectors = np.linalg.eigh(work.T @ work if tall else work @ work.T)
    return torch.from_numpy(values), torch.from_numpy(vectors)


class _OneThread:
    """BLAS on one thread while anyone is inside.

    The setting belongs to the process, and threadpoolctl (from 3.8 on) lets only one thread at a time change it: the
    one that enters first must leave last, or the setting stays.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = _libraries().limit(limits=1, user_api="blas")
                self._limit.__enter__()  # without which this thread would keep all others from it for good
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.__exit__(None, None, None)


ONE_THREAD = _OneThread()


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
