"""The leading directions alone, against LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_callback.spectra.leading import TOLERANCE, leading

COUNT = 25


def made(shape: tuple[int, int], values: Tensor) -> Tensor:
    """A matrix of these singular values, in random directions."""
    generator = torch.Generator().manual_seed(1)
    sides = [torch.linalg.qr(torch.randn(n, len(values), generator=generator).double())[0] for n in shape]
    return (sides[0] * values) @ sides[1].T


def squares_off(matrix: Tensor, basis: Tensor) -> Tensor:
    """Of each vector, how far W'W moves it out of its direction, in its own squared value."""
    w = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    v = basis.double()
    image = w.T @ (w @ v)
    squares = (v * image).sum(0)
    return (image - v * squares).norm(dim=0) / squares


SLOW = torch.arange(1, 401).double() ** -0.5
FLAT = torch.cat([torch.tensor([50.0, 40, 30, 20, 10]), torch.linspace(1, 0.1, 395)]).double()


@pytest.mark.parametrize("shape", [(600, 400), (400, 600), (400, 400)], ids=str)
@pytest.mark.parametrize("values", [SLOW, FLAT], ids=["slow", "planted in a flat spectrum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_found_is_within_the_tolerance(shape, values, dtype):
    matrix = made(shape, values).to(dtype)
    found = leading(matrix, COUNT)
    count = len(found.values)
    exact = torch.linalg.svdvals(matrix.double())[:count]
    assert 5 <= count <= COUNT
    assert found.basis.shape == (min(shape), count)
    assert (squares_off(matrix, found.basis) <= TOLERANCE * 1.01).all()
    assert torch.allclose(found.values, exact, rtol=TOLERANCE / 2, atol=0)
    gram = found.basis.double().T @ found.basis.double()
    assert torch.allclose(gram, torch.eye(count).double(), atol=1e-5)


def test_planted_directions_are_exact():
    matrix = made((600, 400), FLAT).float()
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)[2][:5].T
    found = leading(matrix, COUNT)
    assert torch.allclose((exact.T @ found.basis.double()).abs(), torch.eye(5, len(found.values)).double(), atol=1e-3)
    assert torch.allclose(found.values[:5], FLAT[:5], rtol=1e-5)


def test_of_equal_values_none_is_passed_over():
    """Of twenty equal ones a block of eight gives eight: what comes behind them may not count as next."""
    values = torch.cat([torch.full((20,), 3.0), torch.linspace(1, 0.1, 380)]).double()
    found = leading(made((600, 400), values).float(), COUNT)
    if found is not None:
        assert (found.values - values[: len(found.values)]).abs().max() < 0.05


@pytest.mark.parametrize("matrix", [torch.zeros(40, 30), made((60, 40), torch.tensor([1.0]).double())])
def test_where_nothing_is_sure_the_whole_is_left_to_others(matrix):
    found = leading(matrix, 8)
    assert found is None or len(found.values) <= 1


def test_the_same_matrix_has_the_same_bits_and_any_scale():
    matrix = made((600, 400), SLOW).float()
    first, again, large = leading(matrix, COUNT), leading(matrix, COUNT), leading(matrix * 2.0**100, COUNT)
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(large.basis, first.basis)
    assert torch.equal(large.values, first.values * 2.0**100)


def test_what_is_not_finite_is_named():
    with pytest.raises(ValueError, match="`mlp` hold NaN"):
        leading(torch.full((30, 20), torch.nan), 3, "mlp")
