from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from laser_callback.plan import RANK_RULES, Reduction
from laser_callback.spectrum import Spectrum

SHAPES = [(24, 24), (40, 17), (17, 40), (1, 9), (9, 1), (1, 1)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def decaying(rows: int, columns: int) -> torch.Tensor:
    """Singular values over six orders of magnitude."""
    u, _, v = torch.linalg.svd(noise(rows, columns), full_matrices=False)
    return (u * torch.logspace(2, -4, min(rows, columns), dtype=torch.float64)) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [noise, decaying])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_is_the_truncated_svd(shape, make, dtype):
    matrix = make(*shape).to(dtype)
    spectrum = Spectrum.of(matrix)
    scale = float(torch.linalg.matrix_norm(matrix.double(), 2))
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(matrix.double()), rtol=0, atol=1e-8 * scale)
    assert spectrum.shape == shape
    for rank in range(min(shape) + 1):
        reduced = spectrum.truncate(matrix, rank)
        assert reduced.dtype == torch.float64
        torch.testing.assert_close(reduced, best(matrix, rank), rtol=0, atol=1e-8 * scale)
        removed = spectrum.values[rank] if rank < min(shape) else 0.0
        assert float(torch.linalg.matrix_norm(matrix - reduced, 2)) == pytest.approx(float(removed), abs=1e-8 * scale)
    assert torch.equal(spectrum.truncate(matrix, min(shape)), matrix.double())
    assert not spectrum.truncate(matrix, 0).any()


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96)])
def test_same_weights_same_bits(shape):
    matrix = noise(*shape, dtype=torch.float32)
    first, second = Spectrum.of(matrix), Spectrum.of(matrix.clone())
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.basis, second.basis)
    for rho in (0.01, 0.3, 0.9):
        reduction = Reduction(0, "fc_in", rho)
        assert torch.equal(first.reduce(matrix, reduction), second.reduce(matrix.clone(), reduction))


def test_one_factorisation_serves_all_rhos():
    matrix = noise(30, 20)
    spectrum = Spectrum.of(matrix)
    for rho in (0, 0.05, 0.1, 0.5, 0.95, 1):
        expected = best(matrix, Reduction(0, "fc_in", rho).rank(20))
        torch.testing.assert_close(spectrum.reduce(matrix, Reduction(0, "fc_in", rho)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)])
@pytest.mark.parametrize("scale", [0.0, 0.5, -0.25, 1.0])
def test_tail_and_scale(shape, scale):
    matrix = noise(*shape)
    spectrum = Spectrum.of(matrix)
    for rho in (0, 0.25, 1):
        head = best(matrix, round(20 * rho))
        tail = matrix - head
        keep_head = spectrum.reduce(matrix, Reduction(0, "fc_in", rho, scale=scale))
        keep_tail = spectrum.reduce(matrix, Reduction(0, "fc_in", rho, keep="tail", scale=scale))
        torch.testing.assert_close(keep_head, head + scale * tail, rtol=0, atol=1e-12)
        torch.testing.assert_close(keep_tail, tail + scale * head, rtol=0, atol=1e-12)
    assert not spectrum.reduce(matrix, Reduction(0, "fc_in", 1, keep="tail")).any()  # nothing at all, no residue
    assert not spectrum.reduce(matrix, Reduction(0, "fc_in", 0)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 20), (20, 33)])
def test_half_precision_is_rounded_once_at_the_end(dtype, shape):
    matrix = noise(*shape).to(dtype)
    spectrum = Spectrum.of(matrix)
    for rho in (0.1, 0.5, 0.9):
        for keep, scale in (("head", 0.0), ("tail", 0.0), ("head", 0.3)):
            reduction = Reduction(0, "fc_in", rho, keep=keep, scale=scale)
            exact = best(matrix, reduction.rank(20))
            removed = matrix.double() - exact
            exact, removed = (exact, removed) if keep == "head" else (removed, exact)
            result = spectrum.reduce(matrix, reduction)
            assert result.dtype == dtype
            assert torch.equal(result, (exact + scale * removed).to(dtype))


def test_the_matrix_is_left_alone():
    matrix = noise(20, 30)
    before = matrix.clone()
    Spectrum.of(matrix).reduce(matrix, Reduction(0, "fc_in", 0.3))
    Spectrum.of(matrix).reduce(matrix, Reduction(0, "fc_in", 1.0)).zero_()
    assert torch.equal(matrix, before)


def test_strided_and_transposed_matrices():
    big = noise(40, 60)
    for matrix in (big[::2, ::3], big.T, big[:, 10:30].T, big[3:23]):
        reduction = Reduction(0, "fc_in", 0.25)
        result = Spectrum.of(matrix).reduce(matrix, reduction)
        torch.testing.assert_close(result, best(matrix, reduction.rank(min(matrix.shape))), rtol=0, atol=1e-12)


# ---- odd matrices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7), (1, 1), (1, 5)])
@pytest.mark.parametrize("rho", [0, 0.5, 1, *RANK_RULES])
def test_zero_matrix(shape, rho):
    matrix = torch.zeros(shape)
    spectrum = Spectrum.of(matrix)
    assert torch.equal(spectrum.values, torch.zeros(min(shape), dtype=torch.float64))
    assert not spectrum.reduce(matrix, Reduction(0, "fc_in", rho)).any()
    if isinstance(rho, str):
        assert spectrum.rank(Reduction(0, "fc_in", rho)) == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_rank_deficient_matrix(shape, rank):
    matrix = noise(shape[0], rank, seed=1) @ noise(rank, shape[1], seed=2)
    spectrum = Spectrum.of(matrix)
    assert int((spectrum.values > 0).sum()) == rank  # rounding noise is not a singular value
    assert spectrum.gavish_donoho_rank() == spectrum.marchenko_pastur_rank() == rank
    assert spectrum.entropy_rank() <= rank
    for kept in range(rank + 1):
        torch.testing.assert_close(spectrum.truncate(matrix, kept), best(matrix, kept), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales(scale):
    matrix = (noise(20, 12) * scale).float()
    spectrum = Spectrum.of(matrix)
    torch.testing.assert_close(spectrum.truncate(matrix, 5) / scale, best(matrix, 5) / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named(value, dtype):
    matrix = noise(5, 4).to(dtype)
    matrix[3, 2] = value
    with pytest.raises(ValueError, match=r"`model\.layers\.3\.mlp` hold NaN or infinite"):
        Spectrum.of(matrix, "model.layers.3.mlp")


# ---- rank rules ------------------------------------------------------------------------------------------------------

RATIOS = [(200, 200), (150, 405), (120, 420), (405, 150), (100, 400), (400, 100), (101, 101)]


@pytest.mark.parametrize("shape", RATIOS)
@pytest.mark.parametrize("deviation", [1.0, 0.02])
def test_pure_noise_has_rank_zero(shape, deviation):
    for seed in range(8):
        spectrum = Spectrum.of(noise(*shape, seed=seed) * deviation)
        assert spectrum.gavish_donoho_rank() == 0
        assert spectrum.marchenko_pastur_rank() == 0
        assert spectrum.entropy_rank() > 0.7 * min(shape)  # entropy sees the spectrum's evenness, not noise


@pytest.mark.parametrize("shape", RATIOS)
@pytest.mark.parametrize("planted", [1, 3, 10])
def test_planted_signals_are_counted(shape, planted):
    for seed in range(3):
        edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
        u = torch.linalg.qr(noise(shape[0], planted, seed=seed + 10))[0]
        v = torch.linalg.qr(noise(shape[1], planted, seed=seed + 20))[0]
        signal = (u * torch.linspace(2.0, 5.0, planted, dtype=torch.float64) * edge) @ v.T
        matrix = (0.02 * (signal + noise(*shape, seed=seed))).float()
        spectrum = Spectrum.of(matrix)
        assert spectrum.gavish_donoho_rank() == planted
        assert spectrum.marchenko_pastur_rank() == planted
        for rule in ("gavish-donoho", "marchenko-pastur"):
            result = spectrum.reduce(matrix, Reduction(0, "fc_in", rule))
            torch.testing.assert_close(result.double(), best(matrix, planted), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "omega"), [(1.0, 2.8582), (0.5, 2.1711), (0.2, 1.7650), (0.05, 1.5194)])
def test_gavish_donoho_coefficients(beta, omega):
    """Table IV of the paper: omega(beta) is the threshold in units of the median singular value."""
    short, median = 1000, 1.0
    values = torch.full((short,), median, dtype=torch.float64)
    for factor, kept in ((0.999, 0), (1.001, 1)):
        values[0] = omega * factor
        spectrum = Spectrum(values, torch.empty(0), (short, round(short / beta)))
        assert spectrum.gavish_donoho_rank() == kept


def test_entropy_rank_of_known_spectra():
    for count in (1, 4, 10):
        values = torch.zeros(10, dtype=torch.float64)
        values[:count] = 3.0
        assert Spectrum(values, torch.empty(0), (10, 10)).entropy_rank() == count
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    expected = math.ceil(math.exp(-sum(x * math.log(x) for x in p.tolist())))
    assert Spectrum(p, torch.empty(0), (3, 3)).entropy_rank() == expected
