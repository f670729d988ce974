from __future__ import annotations

from functools import partial

import matrices
import pytest
import torch

from laser_callback import LaserPlan, reduced
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.entries import reduce_entries
from laser_callback.spectra.store import Spectra

noise = partial(matrices.noise, dtype=torch.float32)


def cut(rho: float, **options) -> Reduction:
    return Reduction(0, "fc_in", rho, of="entries", **options)


def as_the_paper(matrix: torch.Tensor, rate: float) -> torch.Tensor:
    """What its code calls dropout: zeroes all up to the magnitude at ``rate`` tenths of the sorted entries."""
    magnitudes = matrix.abs().flatten().sort().values
    return matrix.where(matrix.abs() > magnitudes[int(rate * 0.1 * len(magnitudes))], 0)


@pytest.mark.parametrize("rate", [1, 2.5, 5, 9, 9.5])
def test_pruning_as_the_papers_code_does(rate):
    matrix = noise(20, 50)
    ours, theirs = reduce_entries(matrix, cut(1 - rate / 10)), as_the_paper(matrix, rate)
    assert int((ours != 0).sum()) == round(1000 * (1 - rate / 10))
    # Theirs removes the one entry at the threshold as well.
    assert int((ours != theirs).sum()) == 1
    assert torch.equal(ours[theirs != 0], theirs[theirs != 0])


def test_equal_magnitudes_go_by_place():
    matrix = torch.tensor([[1.0, -2.0, 2.0], [-1.0, 1.0, 3.0]])
    kept = [reduce_entries(matrix, cut(k / 6)).tolist() for k in range(7)]
    assert kept[0] == [[0, 0, 0], [0, 0, 0]]
    assert kept[2] == [[0, -2, 0], [0, 0, 3]]
    assert kept[4] == [[1, -2, 2], [0, 0, 3]]
    assert kept[6] == matrix.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_options_apply_to_entries_too(dtype):
    matrix = noise(12, 10, dtype=dtype)
    order = matrix.abs().flatten().argsort(descending=True, stable=True)
    for options, removed in (
        ({}, slice(24, 120)),
        ({"keep": "tail"}, slice(0, 24)),
        ({"band": 0.5}, slice(24, 84)),
        ({"scale": 0.5}, slice(24, 120)),
    ):
        expected = matrix.flatten().clone()
        expected[order[removed]] = (expected[order[removed]].double() * options.get("scale", 0.0)).to(dtype)
        result = reduce_entries(matrix, cut(0.2, **options))
        assert result.dtype == dtype
        assert torch.equal(result.flatten(), expected)
        assert not torch.signbit(result[result == 0]).any()


def test_the_matrix_is_left_alone_and_may_be_a_view():
    big = noise(40, 60)
    for matrix in (big[::2, ::3], big.T, big[:, 10:30].T):
        before = matrix.clone()
        assert torch.equal(reduce_entries(matrix, cut(0.3)), reduce_entries(before, cut(0.3)))
        assert torch.equal(matrix, before)


def test_it_needs_no_factorisation_and_goes_through_a_plan():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    weight = model.layers[1].linear1.weight
    expected = reduce_entries(weight.detach(), cut(0.1))
    spectra = Spectra()
    with reduced(model, LaserPlan.parse("1.fc_in@0.1:of=entries"), spectra):
        assert torch.equal(weight, expected)
    assert spectra.factorised == 0
    assert spectra.changes_nothing(weight, cut(1))
    assert not spectra.changes_nothing(weight, cut(0.9999))
    with pytest.raises(ValueError, match="`w` hold NaN or infinite"):
        spectra.reduce(torch.tensor([[1.0, float("nan")]]), cut(0.5), "w")
