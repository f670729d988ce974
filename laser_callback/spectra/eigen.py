"""The eigenvectors of a Gram matrix, in float64.

On the CPU by NumPy's LAPACK on one thread, whatever else is allowed: a factorisation is a long row of small steps that
threads must wait for each other in, and where another process takes one of their cores, two threads need many times as
long as one. It also makes the result the same for every number of threads. What uses more cores is several matrices at
a time, in threads: NumPy lets go of the interpreter meanwhile. On other devices by torch, and on the CPU where that
fails: cuSOLVER does at times, on matrices of low rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from laser_callback.support.interrupts import elsewhere

T = TypeVar("T")


def gram_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the smaller of W'W and W W'. Threads may call it side by side.

    Args:
        matrix: W, float64, shape (m, n).

    Returns:
        Eigenvalues, ascending, shape (min(m, n),), and eigenvectors in columns, shape (min(m, n), min(m, n)).
    """
    return _by_numpy(matrix) if matrix.device.type == "cpu" else _by_torch(matrix)


def _by_torch(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(_gram(matrix))
        if not bool(torch.isfinite(values).all()):
            raise RuntimeError("linalg.eigh: eigenvalues that are not finite")
    except RuntimeError as error:  # LinAlgError, or what the device's library says otherwise
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"factorising on the CPU, since {matrix.device} cannot: {reason}", RuntimeWarning, stacklevel=2)
        values, vectors = (found.to(matrix.device) for found in _by_numpy(matrix.cpu()))
    return values, vectors


def _by_numpy(matrix: Tensor) -> tuple[Tensor, Tensor]:
    work = matrix.detach().contiguous().numpy()  # BLAS may sum gaps in another order
    # Elsewhere, so that Ctrl-C cannot strike before BLAS is as it was.
    values, vectors = elsewhere(lambda: _one_thread(lambda: np.linalg.eigh(_gram(work))))
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _gram(matrix: Any) -> Any:
    return matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T


# ---- one thread ------------------------------------------------------------------------------------------------------

_lock = Lock()
_inside: set[object] = set()
_before: list[tuple[Any, int]] = []
"""Each library of BLAS, and its number of threads from before anyone was inside."""


def _one_thread(work: Callable[[], T]) -> T:
    """What ``work`` returns, with BLAS on one thread while anyone is inside: the setting belongs to the process."""
    me = object()
    try:
        _enter(me)
        return work()
    finally:
        _leave(me)


def _enter(who: object) -> None:
    with _lock:
        if not _inside:
            _before[:] = [(library, library.get_num_threads()) for library in _libraries()]
        _inside.add(who)
        for library, _ in _before:
            if library.get_num_threads() != 1:
                _set(library, 1)


def _leave(who: object) -> None:
    with _lock:
        _inside.discard(who)
        if not _inside:
            for library, number in _before:
                _set(library, number)
            _before.clear()


def _set(library: Any, number: int) -> None:
    # From 3.8 on, threadpoolctl does nothing for a thread where another one has been before.
    getattr(library, "_real_set_num_threads", library.set_num_threads)(number)


@cache
def _libraries() -> list[Any]:
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]
