"""Ways to factorise a weight matrix: what each takes, how far its W_k is off: python tests/benchmarks/bench_spectra.py

For each shape: seconds (the fastest of several runs), how many times faster than `torch.linalg.svd` in float32 that is,
and the relative error |W_k - exact W_k| / |W_k| (Frobenius) at each rho, against LAPACK's SVD in float64. Prints
Markdown. On one thread (`--threads 1`) processor time is measured, which other processes disturb less; on several
threads the clock, which needs a quiet machine, and as many matrices at a time as there are threads. The large shape
takes ten minutes, or two for the default alone: `--shapes 4096x11008 --runs 1 --only LAPACK`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import scipy.linalg
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from laser_callback.spectra.eigen import gram_eigen
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.support.hashing import content_hash

SHAPES = ["576x1536", "1024x4096", "2048x2048", "2048x8192"]
RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
SPECTRA = {
    "slow": lambda i, n: (i + 1) ** -0.5,
    "steep": lambda i, n: 10 ** (-4 * i / n),
}
"""Singular values by their place of n: of trained weights (a slow decay), and over four orders of magnitude."""


Vectors = Callable[[Tensor], Tensor]
"""From a tall matrix, shape (m, n), to its leading right singular vectors in columns, shape (n, k)."""


def gesdd(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[2].T


def gesvd(matrix: Tensor) -> Tensor:
    found = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    return torch.from_numpy(found[2]).T


def qr_first(matrix: Tensor) -> Tensor:
    return gesdd(torch.linalg.qr(matrix, mode="r")[1])


def gram(dtype: torch.dtype) -> Vectors:
    def vectors(matrix: Tensor) -> Tensor:
        work = matrix.to(dtype)
        return torch.linalg.eigh(work.T @ work)[1].flip(1)

    return vectors


def gram_refined(matrix: Tensor) -> Tensor:
    """Eigenvectors in float32, then one step in float64 (Ogita and Aishima, JJIAM 2018).

    Only the product with the Gram matrix has to be in float64: what the step corrects is small.
    """
    work = matrix.double()
    product = work.T @ work
    start = torch.linalg.eigh(product.float())[1]
    vectors = start.double()
    image = product @ vectors
    values = (vectors * image).sum(0) / vectors.square().sum(0)
    residual = start.T @ (image - vectors * values).float()
    step = residual.double() / (values - values[:, None])
    step.fill_diagonal_(0)
    vectors = vectors + (start @ step.float()).double()
    return (vectors / vectors.norm(dim=0)).flip(1)


def package(matrix: Tensor) -> Tensor:
    return gram_eigen(matrix.double())[1].flip(1)


def randomised(rho: float, power: int) -> Vectors:
    """Halko, Martinsson and Tropp (SIAM Review 2011), algorithm 4.4: a seeded sketch of twice the rank."""

    def vectors(matrix: Tensor) -> Tensor:
        rank = math.floor(rho * matrix.shape[1])
        sketch = torch.randn(matrix.shape[1], 2 * rank, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix @ sketch)[0]
        for _ in range(power):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        return torch.linalg.svd(basis.T @ matrix, full_matrices=False)[2].T

    return vectors


def block_krylov(rho: float, depth: int) -> Vectors:
    """Musco and Musco (NeurIPS 2015), algorithm 2, with every block orthogonal to those before it."""

    def vectors(matrix: Tensor) -> Tensor:
        rank = math.floor(rho * matrix.shape[1])
        block = torch.randn(matrix.shape[1], rank + 4, generator=torch.Generator().manual_seed(0))
        basis = torch.empty(matrix.shape[1], 0)
        for _ in range(depth + 1):
            block = matrix.T @ (matrix @ block)
            for _ in range(2):  # once is not enough
                block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
            basis = torch.cat([basis, block], 1)
        return basis.double() @ gram_eigen((matrix @ basis).double())[1].flip(1)[:, :rank]

    return vectors


METHODS: dict[str, Vectors] = {
    "`torch.linalg.svd`, float32": gesdd,
    "gesvd, float32": gesvd,
    "QR first, float32": qr_first,
    "Gram, `torch.linalg.eigh`, float32": gram(torch.float32),
    "the same, one step refined": gram_refined,
    "Gram, `torch.linalg.eigh`, float64": gram(torch.float64),
    "**Gram, LAPACK on one thread, float64**": package,
    "randomised, rho 0.01, 2 power iterations": randomised(0.01, 2),
    "block Krylov, rho 0.01, depth 7": block_krylov(0.01, 7),
}


def weights(rows: int, columns: int, spectrum: str) -> Tensor:
    """A tall matrix with known singular values and random singular vectors, float32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(size, columns, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    values = torch.tensor([SPECTRA[spectrum](i, columns) for i in range(columns)], dtype=torch.float64)
    return ((u * values) @ v.T).float()


def timed(work: Callable[[], Any], clock: Callable[[], float], runs: int) -> tuple[float, Any]:
    """The seconds of the fastest run, and what the last one returned."""
    taken = []
    for _ in range(runs):
        begin = clock()
        result = work()
        taken.append(clock() - begin)
    return min(taken), result


def errors(matrix: Tensor, vectors: Tensor, exact: Tensor) -> list[str]:
    """At each rho for which ``vectors``, of 1 % or of all, are enough."""
    work, columns = matrix.double(), matrix.shape[1]
    shown = []
    for rho in RHOS:
        rank = math.floor(rho * columns)
        if vectors.shape[1] < columns and rho > RHOS[0]:
            shown.append("")
            continue
        found, best = ((work @ basis) @ basis.T for basis in (vectors[:, :rank].double(), exact[:, :rank]))
        shown.append(f"{float((found - best).norm() / best.norm()):.0e}")
    return shown


def table(shape: str, spectrum: str, clock: Callable[[], float], runs: int, only: str) -> None:
    short, long = sorted(map(int, shape.split("x")))
    matrix = weights(long, short, spectrum)
    exact = gesdd(matrix.double())
    print(f"\n{shape}, {spectrum} spectrum\n\n| method | seconds | faster |", *(f"{rho} |" for rho in RHOS))
    print("|---|---|---|" + "---|" * len(RHOS))
    reference = 0.0
    for name, method in METHODS.items():
        if method is not gesdd and only not in name:
            continue
        if method is gesvd and short > 1024:
            continue  # minutes
        taken, vectors = timed(partial(method, matrix), clock, runs)
        reference = reference or taken
        row = [name, f"{taken:.3f}", f"{reference / taken:.1f}", *errors(matrix, vectors, exact)]
        print("|", " | ".join(row), "|", flush=True)
    threads = torch.get_num_threads()
    if threads > 1:  # as `Spectra.ahead` does it
        with ThreadPoolExecutor(threads) as pool:
            several = timed(lambda: list(pool.map(package, [matrix] * threads)), clock, runs)[0] / threads
        print(
            f"| the same, {threads} matrices at a time, each | {several:.3f} | {reference / several:.1f} |", flush=True
        )
    factorising, _ = timed(partial(Spectrum.of, matrix), clock, runs)
    hashing, _ = timed(partial(content_hash, "", matrix), clock, runs)
    print(f"\nhashing takes {hashing / factorising:.1%} of the time of a factorisation", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--spectrum", choices=SPECTRA, default="slow")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name contains this, besides `torch.linalg.svd`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"threads: {options.threads}")
    with threadpool_limits(options.threads, user_api="blas"):
        for shape in options.shapes:
            clock = time.process_time if options.threads == 1 else time.perf_counter
            table(shape, options.spectrum, clock, options.runs, options.only)


if __name__ == "__main__":
    main()
