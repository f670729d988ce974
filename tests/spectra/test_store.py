from __future__ import annotations

import math
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Barrier

import matrices
import pytest
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info

from laser_callback.cli import stock
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.eigen import gram_eigen
from laser_callback.spectra.folder import SpectrumFolder
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.support.hashing import content_hash

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


noise = partial(matrices.noise, dtype=torch.float32)


def cut(rho: float | str, **options) -> Reduction:
    return Reduction(layer=0, matrix="fc_in", rho=rho, **options)


def same(one: Spectrum, other: Spectrum) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.basis, other.basis) and one.shape == other.shape


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


@pytest.fixture(autouse=True)
def _errors_on_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


# ---- the same bits ---------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda w: w,
    "transposed": lambda w: w.T,
    "rows": lambda w: w[8:24],
    "columns": lambda w: w[:, 5:30],
    "columns, transposed": lambda w: w[:, 5:30].T,
    "every third row": lambda w: w[::3],
    "expert": lambda w: w.reshape(2, 24, 40)[1].mT,
    "one column": lambda w: w[:, 3:4],
    "one row": lambda w: w[3:4],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_same_bits_from_memory_disk_and_factorisation(tmp_path, view, dtype):
    matrix = VIEWS[view](noise(48, 40, dtype=dtype))
    before = matrix.clone()
    expected, reductions = Spectrum.of(matrix), [cut(0.3), cut("entropy"), cut(0.5, keep="tail", scale=0.5)]
    cold, warm = Spectra(tmp_path), Spectra(tmp_path)
    for spectra in (Spectra(), Spectra(memory_bytes=0), cold, cold, warm, warm):
        assert same(spectra.of(matrix), expected)
        for reduction in reductions:
            reduced = spectra.reduce(matrix, reduction)
            assert reduced.dtype == dtype
            assert torch.equal(reduced, expected.reduce(matrix, reduction))
    assert (cold.factorised, cold.loaded) == (1, 0)
    assert (warm.factorised, warm.loaded) == (0, 1)
    assert len(files(tmp_path)) == 1
    assert torch.equal(matrix, before)


def test_every_matrix_of_a_model_warm(tmp_path):
    from tiny import tiny_causal_lm  # not above: it brings transformers, for which the processes below would wait

    matrices = [m for m in find_matrices(tiny_causal_lm()) if m.kind]
    cold, warm = Spectra(tmp_path), Spectra(tmp_path)
    made = [cold.of(m.read(m.parameter), m.name) for m in matrices]
    read = [warm.of(m.read(m.parameter), m.name) for m in matrices]
    assert all(map(same, made, read))
    assert (cold.factorised, warm.factorised, warm.loaded) == (len(matrices), 0, len(matrices))
    assert cold.seconds > 0 < warm.seconds


def test_the_key_is_the_content_not_the_name_or_the_object(tmp_path):
    spectra, matrix = Spectra(tmp_path), noise(16, 12)
    spectra.of(matrix, "a")
    spectra.of(matrix.clone(), "b")
    assert spectra.factorised == 1
    parameter = torch.nn.Parameter(matrix)
    version = parameter._version
    parameter.data[0, 0] += 1  # which no version counter sees
    assert parameter._version == version
    assert same(spectra.of(parameter), Spectrum.of(parameter.detach()))
    assert spectra.factorised == 2
    # Equal bytes that mean something else.
    zeros = [
        torch.zeros(6, 8),
        torch.zeros(8, 6),
        torch.zeros(6, 8).half(),
        torch.zeros(6, 16).half(),
        torch.zeros(8, 6).T,
    ]
    for matrix in zeros:
        assert same(spectra.of(matrix), Spectrum.of(matrix))
    assert spectra.factorised == 2 + len(zeros)


@pytest.mark.parametrize("of", ["rank", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_mode_and_autograd(tmp_path, of, dtype):
    with torch.inference_mode():
        matrix = noise(24, 16, dtype=dtype)
        spectra = Spectra(tmp_path)
        inside = spectra.reduce(matrix, cut(0.5, of=of))
    outside = spectra.reduce(matrix, cut(0.5, of=of))  # an inference tensor
    parameter = torch.nn.Parameter(noise(24, 16, dtype=dtype))
    with torch.enable_grad():
        plain = spectra.reduce(parameter, cut(0.5, of=of))
    assert torch.equal(inside, outside)
    assert torch.equal(inside, plain)
    assert not plain.requires_grad
    assert not plain.is_inference()
    if of == "rank":
        assert spectra.factorised == 1
        kept = spectra.of(parameter)
        assert not kept.basis.is_inference()
        (kept.basis * torch.ones(16, 16, dtype=torch.float64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["rank", "reference"])
def test_weights_that_are_not_finite(tmp_path, of, value):
    matrix = noise(8, 8)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=r"`3\.mlp` hold NaN"):
        Spectra(tmp_path).reduce(matrix, cut(0.5, of=of), "3.mlp")
    assert files(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", ["rank", "reference"])
def test_values_beyond_the_dtype_are_refused(dtype, of):
    matrix = (noise(5, 6).sign() * torch.finfo(dtype).max).to(dtype)
    name = str(dtype).removeprefix("torch.")
    beyond = rf"`3\.mlp after .*` would have values beyond torch\.{name}, whose largest is"
    with pytest.raises(ValueError, match=rf"{beyond}|of='reference' computes in float32, .* of `3\.mlp`: cut it"):
        Spectra().reduce(matrix, cut(0.4, of=of), "3.mlp")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_matrix_without_weights_is_named(shape):
    for ask in (Spectra().reduce, Spectra().changes_nothing):
        for of in ("rank", "entries", "reference"):
            with pytest.raises(ValueError, match=rf"`3\.mlp` is {shape[0]} x {shape[1]}, without any weights"):
                ask(torch.zeros(shape), cut(0.4, of=of), "3.mlp")


@pytest.mark.parametrize(
    ("reduction", "answer"),
    [(cut(1), True), (cut(0.95), False), (cut(0.99, scale=1), True), (cut(0, keep="tail"), True), (cut(0), False)],
)
def test_changes_nothing_needs_no_spectrum_for_a_number(reduction, answer):
    spectra = Spectra()
    assert spectra.changes_nothing(noise(20, 30), reduction) is answer
    assert spectra.factorised == 0


def test_changes_nothing_for_a_rule():
    spectra = Spectra()
    assert spectra.changes_nothing(torch.eye(16), cut("entropy"))
    assert not spectra.changes_nothing(noise(16, 16), cut("entropy"))
    assert spectra.factorised == 2


def test_the_hash_does_not_depend_on_threads_and_sees_every_byte():
    matrix = noise(700, 1000)  # of several chunks
    hashes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.append(content_hash("a", matrix))
    torch.set_num_threads(1)
    assert hashes[0] == hashes[1] != content_hash("b", matrix)
    for place in (0, 2**18 - 1, 2**18, -1):
        other = matrix.clone()
        other.view(-1)[place] *= 1 + 1e-6
        assert content_hash("a", other) != hashes[0]


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_memory_never_exceeds_its_bound_and_drops_the_least_recently_used():
    size = 8 * (10 + 10 * 10)
    spectra = Spectra(memory_bytes=3 * size + 7)
    matrices = [noise(10, 12, seed=seed) for seed in range(20)]
    for matrix in matrices:
        spectra.of(matrix)
        assert spectra.held == sum(s.values.nbytes + s.basis.nbytes for s in spectra._memory.values()) <= 3 * size + 7
    for index in (17, 18, 19, 17):  # the last three are there
        spectra.of(matrices[index])
    assert spectra.factorised == 20
    spectra.of(matrices[0])  # takes the place of 18
    spectra.of(matrices[17])
    spectra.of(matrices[19])
    assert spectra.factorised == 21
    spectra.of(matrices[18])
    assert spectra.factorised == 22
    spectra.of(noise(40, 40))  # too large: the others stay
    assert (spectra.factorised, spectra.held) == (23, 3 * size)


def test_the_folder_never_exceeds_its_bound_and_drops_the_least_recently_used(tmp_path):
    first = Spectra(tmp_path)
    first.of(noise(10, 12))
    size = files(tmp_path)[0].stat().st_size
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10 * size)  # not ours
    spectra = Spectra(tmp_path, memory_bytes=0, disk_bytes=3 * size)
    matrices = [noise(10, 12, seed=seed) for seed in range(6)]

    def ours() -> int:
        return sum(stat.st_size for _, stat in SpectrumFolder(tmp_path).files())

    for age, matrix in enumerate(matrices[:3]):
        spectra.of(matrix)
        newest = max(SpectrumFolder(tmp_path).files(), key=lambda file: file[1].st_mtime_ns)[0]
        os.utime(newest, (1000 + age, 1000 + age))
    spectra.of(matrices[0])  # read: now the most recently used
    assert (spectra.loaded, spectra.factorised) == (2, 2)
    spectra.of(matrices[3])
    assert ours() == 3 * size
    spectra.of(matrices[0])
    spectra.of(matrices[2])
    assert (spectra.loaded, spectra.factorised) == (4, 3)
    spectra.of(matrices[1])  # was the one to go
    assert spectra.factorised == 4
    spectra.of(noise(60, 60))  # larger than the bound
    assert ours() == 3 * size
    assert (tmp_path / "model.safetensors").exists()


# ---- a folder in a bad state -----------------------------------------------------------------------------------------


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def other_tensors(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def no_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def another_matrix(path: Path) -> None:
    Spectra(path.parent / "other").of(noise(12, 16, seed=9))
    os.replace(files(path.parent / "other")[0], path)
    (path.parent / "other").rmdir()


def another_shape(path: Path) -> None:
    Spectra(path.parent / "other").of(noise(12, 17))
    os.replace(files(path.parent / "other")[0], path)
    (path.parent / "other").rmdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit at {position}": flip(position) for position in (0.0, 0.05, 0.1, 0.3, 0.6, 1.0)},
    "empty": lambda path: path.write_bytes(b""),
    "cut off in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "text": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9),
    "other tensors": other_tensors,
    "no metadata": no_metadata,
    "another matrix": another_matrix,
    "another shape": another_shape,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_made_again_with_one_warning(tmp_path, damage):
    matrices = [noise(12, 16), noise(12, 16, seed=1)]
    for matrix in matrices:
        Spectra(tmp_path).of(matrix)
    for path in files(tmp_path):
        DAMAGES[damage](path)
    spectra = Spectra(tmp_path)
    with pytest.warns(RuntimeWarning, match="is damaged .* factorising anew") as caught:
        assert [same(spectra.of(matrix), Spectrum.of(matrix)) for matrix in matrices] == [True, True]
    assert len(caught) == 1
    assert (spectra.factorised, spectra.loaded) == (2, 0)
    again = Spectra(tmp_path)
    assert all(same(again.of(matrix), Spectrum.of(matrix)) for matrix in matrices)
    assert again.loaded == 2


def serves(spectra: Spectra, *shapes: tuple[int, int]) -> None:
    assert all(same(spectra.of(noise(*shape)), Spectrum.of(noise(*shape))) for shape in shapes)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        spectra = Spectra(folder)
        with pytest.warns(RuntimeWarning, match="cannot write spectra to .* going on without") as caught:
            serves(spectra, (8, 9), (8, 9), (8, 10))
        assert len(caught) == 1
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write_is_still_read(tmp_path):
    Spectra(tmp_path).of(noise(8, 9))
    tmp_path.chmod(0o500)
    spectra = Spectra(tmp_path)
    spectra.of(noise(8, 9))
    assert spectra.loaded == 1
    with pytest.warns(RuntimeWarning, match="cannot write spectra") as caught:
        serves(spectra, (8, 9), (8, 10), (8, 11))
    assert len(caught) == 1
    tmp_path.chmod(0o700)


def test_a_full_disk(tmp_path):
    Spectra(tmp_path).of(noise(8, 9))
    spectra = Spectra(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # writing more than that fails as on a full disk
    try:
        with pytest.warns(RuntimeWarning, match="cannot write spectra") as caught:
            serves(spectra, (20, 30), (20, 31), (20, 32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(caught) == 1
    spectra.of(noise(8, 9))
    assert (spectra.factorised, spectra.loaded) == (3, 1)  # what is there is still read
    assert len(files(tmp_path)) == 1  # and nothing half written


def _work(folder: Path, seed: int, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    matrices = [noise(20, 24, seed=index) for index in range(12)]
    expected = [Spectrum.of(matrix) for matrix in matrices]
    counts = [0, 0]
    bound = 5 * 4000  # of twelve files of about 3,600 bytes: readers, writers and evictions meet all the time
    for _ in range(10):
        spectra = Spectra(folder, memory_bytes=0, disk_bytes=bound)
        assert all(same(spectra.of(matrices[index]), expected[index]) for index in order)
        counts[0] += spectra.factorised
        counts[1] += spectra.loaded
    results.put(counts)


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_work, args=(tmp_path, seed, results)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 3  # no error, no warning, no wrong bit
    counts = [results.get() for _ in workers]
    assert all(factorised + loaded == 120 for factorised, loaded in counts)
    assert sum(loaded for _, loaded in counts) > 0
    kept = SpectrumFolder(tmp_path).files()
    assert len(kept) == len(files(tmp_path)) > 0  # no temporary file is left
    assert sum(stat.st_size for _, stat in kept) <= 5 * 4000


# ---- the cut of the paper's code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rho", "rank"), [(0.01, 1), ((10 - 9.9) * 0.1, 0), (0.29, 28), (0.3, 30), (0.005, 0), (0.0, 0), (1.0, 100)]
)
def test_reference_is_svd_lowrank_under_a_seed_of_its_own(monkeypatch, rho, rank, dtype):
    seeds: list[int] = []
    original = torch.svd_lowrank

    def spy(*args, **kwargs):
        seeds.append(torch.initial_seed())
        return original(*args, **kwargs)

    matrix, spectra = noise(100, 120, dtype=dtype), Spectra()
    reduction = cut(rho, of="reference")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "svd_lowrank", spy)
        result = spectra.reduce(matrix, reduction)
        torch.rand(3)
        assert torch.equal(spectra.reduce(matrix.clone(), reduction), result)
        spectra.reduce(noise(100, 120, seed=1, dtype=dtype), reduction)
    assert torch.initial_seed() == 5
    torch.set_rng_state(state)
    spectra.reduce(matrix, reduction)
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds[0] == seeds[1] != seeds[2]

    torch.manual_seed(seeds[0])
    u, s, v = torch.svd_lowrank(matrix.float(), q=rank, niter=2)
    assert result.dtype == dtype
    assert torch.equal(result, (u @ torch.diag(s) @ v.T).to(dtype))
    assert spectra.changes_nothing(matrix, reduction) is (rank == 100)


def test_nothing_of_a_reference_cut_is_kept(tmp_path):
    spectra = Spectra(tmp_path)
    spectra.reduce(noise(20, 20), cut(0.5, of="reference"))
    assert (spectra.factorised, spectra.loaded, spectra.held, files(tmp_path)) == (0, 0, 0, [])


# ---- arguments, the command ------------------------------------------------------------------------------------------


def test_bad_arguments():
    for argument in ("memory_bytes", "disk_bytes"):
        with pytest.raises(ValueError, match=f"`{argument}` must be"):
            Spectra(**{argument: -1})


def test_cache_command_shows_and_clears_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path))
    stock.ls()
    assert "0 spectra, 0 bytes of 8.6 GB" in capsys.readouterr().out
    for seed in range(2):
        Spectra.default().of(noise(10, 12, seed=seed))
    folder = tmp_path / "spectra"
    (folder / "model.safetensors").write_bytes(b"a user's own")
    (fresh := folder / f".{'0' * 64}.1.{'0' * 8}.tmp").write_bytes(b"being written")
    (stale := folder / f".{'1' * 64}.1.{'0' * 8}.tmp").write_bytes(b"of a crashed process")
    os.utime(stale, (1, 1))
    assert stock.ls().data["spectra"] == 2
    output = capsys.readouterr().out
    assert "2 spectra" in output
    assert time.strftime("%Y-%m-%d") in output
    stock.clear()
    assert "removed 2 spectra" in capsys.readouterr().out
    assert files(folder) == sorted([folder / "model.safetensors", fresh])


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_side_by_side_is_the_same_and_leaves_the_threads_of_blas(tmp_path, monkeypatch):
    matrices = [(noise(90, 60 + i), f"m{i}", "weight") for i in range(9)]
    alone = [Spectrum.of(matrix) for matrix, *_ in matrices]
    inside = Barrier(3)

    def together(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside.wait(timeout=60)  # three are in at once, or this raises
        return gram_eigen(matrix)

    monkeypatch.setattr("laser_callback.spectra.spectrum.gram_eigen", together)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before = [library["num_threads"] for library in threadpool_info()]
    spectra = Spectra(tmp_path)
    spectra.ahead(matrices)
    assert [library["num_threads"] for library in threadpool_info()] == before
    assert (spectra.factorised, len(spectra.folder.files())) == (9, 9)
    for (matrix, name, _), expected in zip(matrices, alone, strict=True):
        found = spectra.of(matrix, name)
        assert same(found, expected)
    assert (spectra.factorised, spectra.loaded) == (9, 0)
    again = Spectra(tmp_path)
    again.ahead(matrices)
    assert (again.factorised, again.loaded) == (0, 9)


def test_nothing_ahead_where_memory_would_not_keep_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    matrices = [(noise(8, 8), "a", "weight"), (noise(8, 8, seed=1), "b", "weight")]
    one = 8 * 8 * 9
    for memory, factorised in ((2 * one, 2), (2 * one - 1, 0)):
        spectra = Spectra(memory_bytes=memory)
        spectra.ahead(matrices)
        assert (spectra.factorised, spectra.held) == (factorised, factorised * one)
    matrices[1][0][0, 0] = math.nan
    with pytest.raises(ValueError, match="the weights of `b` hold NaN"):
        Spectra().ahead(matrices)
