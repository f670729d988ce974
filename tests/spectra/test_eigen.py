"""One thread for BLAS while anyone factorises and never after it; a second try where a device fails."""

from __future__ import annotations

import copy
import pickle
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrices import noise
from threadpoolctl import threadpool_info, threadpool_limits
from tiny import tiny_causal_lm
from tracing import interrupted

from laser_callback.plans.reduction import Reduction
from laser_callback.spectra import eigen
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.eigen import gram_eigen
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.swap import reduced


def blas() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def settled() -> list[int]:
    """The number of threads, once those that were left working have ended."""
    end = time.monotonic() + 30
    while eigen._inside and time.monotonic() < end:
        time.sleep(0.001)
    with eigen._lock:  # the last one out is at it
        return blas()


@pytest.fixture(params=[2, 3])
def threads(request) -> list[int]:
    with threadpool_limits(request.param, user_api="blas"):
        yield blas()


def test_one_thread_inside_and_as_many_as_before_outside(threads, monkeypatch):
    seen: list[list[int]] = []
    true = eigen._gram
    monkeypatch.setattr(eigen, "_gram", lambda matrix: (seen.append(blas()), true(matrix))[1])
    gram_eigen(noise(20, 10))
    assert seen == [[1] * len(threads)]
    assert blas() == threads


def test_a_matrix_that_fails_leaves_it_as_it_was(threads, monkeypatch):
    monkeypatch.setattr(eigen, "_gram", lambda matrix: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(MemoryError):
        gram_eigen(noise(20, 10))
    assert blas() == threads


# ---- interrupts ------------------------------------------------------------------------------------------------------


def test_an_interrupt_at_any_line_leaves_it_as_it_was(threads):
    matrix, struck = noise(8, 6), 0
    while interrupted(lambda: gram_eigen(matrix), struck, {eigen.__file__}):
        assert settled() == threads, struck
        struck += 1
    assert struck >= 3
    assert torch.equal(gram_eigen(matrix)[0], gram_eigen(matrix)[0])


def test_real_signals_leave_it_as_it_was(threads):
    def strike(*_: Any) -> None:
        raise KeyboardInterrupt

    matrix, struck, generator = noise(24, 20), 0, random.Random(0)
    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 1e-3))
                for _ in range(4):
                    gram_eigen(matrix)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck > 100
    assert settled() == threads


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_six_threads_share_one_store(tmp_path, threads):
    matrices = [noise(30, 20 + i) for i in range(12)]
    expected = [Spectrum.of(matrix) for matrix in matrices]
    for memory in (2**30, 3 * 8 * 31 * 30):  # room for all, or for three
        spectra = Spectra(tmp_path / str(memory), memory_bytes=memory)

        def work(seed: int, spectra: Spectra = spectra, memory: int = memory) -> None:
            order = random.Random(seed).choices(range(12), k=60) + list(range(12))
            for index in order:
                found = spectra.of(matrices[index], f"m{index}")
                assert torch.equal(found.values, expected[index].values)
                assert torch.equal(found.basis, expected[index].basis)
                assert spectra.held <= memory
                if seed == 0 and index == 3:
                    spectra.forget()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert spectra.factorised == 12  # each once, whoever asks first
        assert spectra.held == sum(s.values.nbytes + s.basis.nbytes for s in spectra._memory.values())
        assert blas() == threads


def test_two_threads_each_with_a_reduced_model(threads):
    def work(seed: int) -> None:
        model = tiny_causal_lm(seed)
        for rho in (0.1, 0.2, 0.3, 0.4):
            with reduced(model, f"*.mlp@{rho}"):
                pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert blas() == threads


def test_a_store_can_be_copied_and_sent():
    spectra = Spectra()
    spectra.of(noise(8, 8))
    for other in (copy.deepcopy(spectra), pickle.loads(pickle.dumps(spectra))):
        assert (other.held, other.factorised) == (spectra.held, 1)


# ---- a device that fails ---------------------------------------------------------------------------------------------


def failing(error: Exception | None) -> Any:
    def eigh(gram: torch.Tensor) -> Any:
        if error is not None:
            raise error
        return torch.full((len(gram),), torch.nan, dtype=gram.dtype), gram

    return eigh


ERRORS = [
    torch.linalg.LinAlgError(
        "linalg.eigh: The algorithm failed to converge because the input matrix is ill-conditioned"
    ),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnXsyevd`"),
    None,
]


@pytest.mark.parametrize("error", ERRORS, ids=["no convergence", "library", "not finite"])
def test_where_a_device_fails_the_cpu_factorises(error, monkeypatch):
    """With the CPU in the place of the device."""
    base = tiny_causal_lm()
    model = copy.deepcopy(base)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight += 0.01 * torch.outer(torch.randn(64), torch.randn(32))  # of rank 1, as LoRA's is
    cuts = [(weight, Reduction(1, "fc_up", 0.1)), (weight, Reduction(1, "fc_up", "energy-0.9"))]
    name = "model.layers.1.mlp.up_proj"

    def found() -> list[torch.Tensor]:
        stores = [Spectra(), Spectra(base=BaseWeights(base, model))]
        values = [stores[0].of(torch.zeros(6, 4), name).values, stores[1].of(weight, name, "delta").values]
        of_delta = [(matrix, replace(cut, cut="delta")) for matrix, cut in cuts]
        return values + [
            store.reduce(matrix, cut, name)
            for store, each in zip(stores, (cuts, of_delta), strict=True)
            for matrix, cut in each
        ]

    expected = found()
    monkeypatch.setattr("laser_callback.spectra.spectrum.gram_eigen", eigen._by_torch)
    monkeypatch.setattr(torch.linalg, "eigh", failing(error))
    with pytest.warns(
        RuntimeWarning, match=r"factorising on the CPU, since cpu cannot: .*(ill-cond|cusolver|not finite)"
    ):
        again = found()
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


def test_memory_that_does_not_suffice_is_said(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        eigen._by_torch(noise(6, 4))
