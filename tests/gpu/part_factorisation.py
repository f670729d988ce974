"""Ways to factorise weight matrices on a GPU and beside it: what each takes, and how far its W_k is off.

The ways and the matrices are those of ``bench_spectra.py``; here are the drivers of CUDA, larger shapes, and what the
package does around a factorisation. Errors are |W_k - exact W_k| / |W_k| against LAPACK's SVD in float64 where that is
quick enough, else against the package's own way. A way that would take longer than :data:`PATIENCE`, as its time at a
smaller shape tells, is left out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.bench_spectra import RHOS, errors, gesdd, gram, gram_refined, package, timed, weights
from device import DEVICE, ON_GPU, clock
from on_device import OnDevice
from rows import row
from torch import Tensor

from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.folder import SpectrumFolder, content_hash
from laser_callback.spectra.spectrum import Spectrum

SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096), (8192, 8192)) if ON_GPU else ((96, 96), (192, 128))
PATIENCE = 12.0
"""Seconds that one way may take at one shape."""
SHOWN = (0.01, 0.4)
"""Errors are shown at these of the benchmark's rhos."""


def driver(name: str | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """torch.linalg.svd by one of cuSOLVER's routines; on the CPU there is one."""

    def vectors(matrix: Tensor) -> Tensor:
        return torch.linalg.svd(matrix.to(dtype), full_matrices=False, driver=name if ON_GPU else None)[2].T

    return vectors


def on_cpu(way: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same on the CPU, the copies there and back included."""
    return lambda matrix: way(matrix.cpu()).to(matrix.device)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "the package: Gram, eigh, float64": package,
    "Gram, eigh, float32": gram(torch.float32),
    "Gram, eigh, float32, one step refined": gram_refined,
    "svd gesvda, float32": driver("gesvda", torch.float32),
    "svd gesvdj, float32": driver("gesvdj", torch.float32),
    "svd gesvd, float32": driver("gesvd", torch.float32),
    "svd gesvdj, float64": driver("gesvdj", torch.float64),
    "svd gesvd, float64": driver("gesvd", torch.float64),
    "CPU: the package, one thread": on_cpu(package),
    "CPU: Gram, torch eigh, all threads": on_cpu(gram(torch.float64)),
}


class Patience:
    """Knows from smaller shapes how long a way will take: as the longer side times the square of the shorter."""

    def __init__(self) -> None:
        self._per_operation: dict[str, float] = {}

    def expected(self, way: str, shape: tuple[int, int]) -> float:
        """Seconds; 0 where nothing is known."""
        return self._per_operation.get(way, 0.0) * math.prod(shape) * min(shape)

    def learn(self, way: str, shape: tuple[int, int], seconds: float) -> None:
        """Small shapes are slow for their size, so that estimates err on the long side."""
        self._per_operation[way] = seconds / (math.prod(shape) * min(shape))


def measure(shape: tuple[int, int], patience: Patience) -> None:
    """A row for each way at one shape."""
    matrix = weights(*shape, "slow")
    shown = "x".join(map(str, shape))
    exact, against = reference(matrix, shape, patience)
    for name, way in WAYS.items():
        expected = patience.expected(name, shape)
        if way is not package and expected > PATIENCE:
            row("factorisation", shape=shown, way=name, note=f"left out: about {expected:.0f} s")
            continue
        try:
            way(matrix[:64, :32].contiguous())  # libraries are loaded, handles made
            seconds, vectors = timed(partial(way, matrix), clock, 1 if expected > 1 else 2)
        except RuntimeError as error:  # a driver that cannot, or has no memory
            row("factorisation", shape=shown, way=name, note=str(error).splitlines()[0][:80])
            continue
        patience.learn(name, shape, seconds)
        exact = vectors if exact is None else exact
        found = dict(zip(RHOS, errors(matrix, vectors, exact), strict=True))
        errors_at = {f"error at {rho}": found[rho] for rho in SHOWN}
        row("factorisation", shape=shown, way=name, seconds=seconds, **errors_at, against=against)
        del vectors
    around(matrix, shown)


def reference(matrix: Tensor, shape: tuple[int, int], patience: Patience) -> tuple[Tensor | None, str]:
    """What errors are measured against, and its name; ``None`` for what the first way gives."""
    name = "CPU: svd gesdd, float64, all threads"
    if patience.expected(name, shape) > 2 * PATIENCE:
        return None, "the package"
    seconds, exact = timed(lambda: on_cpu(gesdd)(matrix.double()), clock, 1)
    patience.learn(name, shape, seconds)
    row("factorisation", shape="x".join(map(str, shape)), way=name, seconds=seconds)
    return exact, "LAPACK"


def around(matrix: Tensor, shape: str) -> None:
    """What the package does with a matrix beside factorising it."""

    def step(name: str, work: Callable[[], Any]) -> Any:
        seconds, result = timed(work, clock, 1)
        row("factorisation: around it", shape=shape, step=name, seconds=seconds)
        return result

    spectrum = step("Spectrum.of", lambda: Spectrum.of(matrix))
    step("Spectrum.reduce at 0.01", lambda: spectrum.reduce(matrix, Reduction(layer=0, matrix="fc_in", rho=0.01)))
    step("content_hash, float32", lambda: content_hash("", matrix))
    half = matrix.bfloat16()
    step("content_hash, bfloat16", lambda: content_hash("", half))
    with tempfile.TemporaryDirectory() as folder:
        kept = SpectrumFolder(folder)
        step("SpectrumFolder.write", lambda: kept.write("0" * 64, spectrum))
        step("SpectrumFolder.read, to the device", lambda: kept.read("0" * 64, spectrum.shape).basis.to(DEVICE))


def main() -> None:
    """One shape after the other."""
    patience = Patience()
    with OnDevice(DEVICE):
        for shape in SHAPES:
            measure(shape, patience)


if __name__ == "__main__":
    main()
