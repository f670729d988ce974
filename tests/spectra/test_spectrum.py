from __future__ import annotations

import math

import pytest
import torch
from matrices import best, noise
from threadpoolctl import threadpool_info, threadpool_limits

from laser_callback import reduced
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra

SHAPES = [(24, 24), (40, 17), (17, 40), (1, 9), (9, 1), (1, 1)]


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


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_same_bits_on_any_number_of_threads_which_stays_as_it_was(shape):
    matrix = noise(*shape, dtype=torch.float32)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            before = [library["num_threads"] for library in threadpool_info()]
            found.append(Spectrum.of(matrix))
            assert [library["num_threads"] for library in threadpool_info()] == before
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].basis, found[1].basis)


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


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_band_in_the_middle(shape, scale):
    matrix = noise(*shape)
    for rho, band, (start, stop) in ((0.1, 0.5, (2, 12)), (0, 0.25, (0, 5)), (0.9, 0.5, (18, 20))):
        middle = best(matrix, stop) - best(matrix, start)
        result = Spectrum.of(matrix).reduce(matrix, Reduction(0, "fc_in", rho, band=band, scale=scale))
        torch.testing.assert_close(result, matrix - (1 - scale) * middle, rtol=0, atol=1e-12)
        values = torch.linalg.svdvals(result)
        assert int((values > 1e-10).sum()) == (20 if scale else 20 - (stop - start))


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
@pytest.mark.parametrize("rho", [0, 0.5, 1, "entropy", "energy-0.9"])
def test_zero_matrix(shape, rho):
    matrix = torch.zeros(shape)
    spectrum = Spectrum.of(matrix)
    assert torch.equal(spectrum.values, torch.zeros(min(shape), dtype=torch.float64))
    assert not spectrum.reduce(matrix, Reduction(0, "fc_in", rho)).any()


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_rank_deficient_matrix(shape, rank):
    matrix = noise(shape[0], rank, seed=1) @ noise(rank, shape[1], seed=2)
    spectrum = Spectrum.of(matrix)
    assert int((spectrum.values > 0).sum()) == rank  # rounding noise is not a singular value
    for rule in ("gavish-donoho", "marchenko-pastur", "energy-0.9999999999"):
        assert spectrum.rank(Reduction(0, "fc_in", rule)) == rank
    assert spectrum.rank(Reduction(0, "fc_in", "entropy")) <= rank
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


# ---- blocks of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"keep": "tail"}, {"band": 0.3}, {"scale": 0.5}, {"of": "entries"}])
@pytest.mark.parametrize(("shape", "blocks"), [((24, 10), 3), ((25, 10), 4), ((6, 40), 6), ((12, 7), 1)])
def test_blocks_of_rows_are_cut_like_matrices_of_their_own(shape, blocks, options):
    matrix = noise(*shape)
    whole = Spectra().reduce(matrix, Reduction(0, "fc_in", 0.4, blocks=blocks, **options))
    parts = [Spectra().reduce(rows, Reduction(0, "fc_in", 0.4, **options)) for rows in matrix.tensor_split(blocks)]
    assert len(parts) == blocks
    assert torch.equal(whole, torch.cat(parts))


def test_each_block_has_its_own_rank():
    """One of noise, one of rank 2: a rule keeps nothing of the first and all of the second."""
    matrix = torch.cat([noise(100, 100), 50 * noise(100, 2, seed=1) @ noise(2, 100, seed=2)])
    result = Spectra().reduce(matrix, Reduction(0, "fc_in", "marchenko-pastur", blocks=2))
    assert not result[:100].any()
    torch.testing.assert_close(result[100:], matrix[100:], rtol=0, atol=1e-9)


def test_blocks_through_a_plan_and_what_they_refuse():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    weight = model.layers[1].linear1.weight  # 16 x 8
    with reduced(model, "1.fc_in@0.25:blocks=4"):
        ranks = [int(torch.linalg.matrix_rank(rows, atol=1e-5)) for rows in weight.tensor_split(4)]
    assert ranks == [1, 1, 1, 1]
    spectra = Spectra()
    assert spectra.changes_nothing(weight, Reduction(0, "fc_in", 1, blocks=4))
    assert not spectra.changes_nothing(weight, Reduction(0, "fc_in", 0.75, blocks=4))
    with pytest.raises(ValueError, match=r"`blocks` of 1\.fc_in@0\.25:blocks=17.*rows of `layers\.1\.linear1`, 16"):
        reduced(model, "1.fc_in@0.25:blocks=17").prepare()
