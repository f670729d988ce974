"""Weights near the ends of their dtype's range: what can be computed is, what cannot be held is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrices import best, noise
from torch import nn

from laser_callback import reduced
from laser_callback.plans.rank_rules import rank_by, unit
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.inspection import RULES, inspect_model
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra

HALF = Reduction(0, "fc_in", 0.5)


def _linear(weight: torch.Tensor) -> nn.ModuleDict:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return nn.ModuleDict({"only": layer})


@pytest.mark.parametrize("power", [600, 1000, -600, -1000])
def test_float64_beyond_the_root_of_its_range_is_cut_as_it_is_within(power):
    matrix = noise(20, 12).double()
    scale = 2.0**power
    spectrum, far = Spectrum.of(matrix), Spectrum.of(matrix * scale)
    torch.testing.assert_close(far.values / scale, spectrum.values)
    torch.testing.assert_close(far.reduce(matrix * scale, HALF) / scale, best(matrix, 6), rtol=1e-9, atol=1e-9)
    assert [rank_by(rule, far.values, (20, 12)) for rule in RULES] == [
        rank_by(rule, spectrum.values, (20, 12)) for rule in RULES
    ]
    energies = [CutSpectrum.of(s, "w", HALF).energy for s in (spectrum, far)]
    assert energies[0] == pytest.approx(energies[1])
    model = _linear(matrix * scale)
    (inspected,) = inspect_model(model, "/only/").matrices
    assert 0 < inspected.energy(0.5) < 1
    assert inspected.to_dict()["norm"] == pytest.approx(float(matrix.norm()) * scale)


def test_nothing_changes_for_what_is_in_range():
    for values in (noise(3, 3), torch.zeros(2), torch.zeros(0), torch.full((2,), 1e99, dtype=torch.float64)):
        assert unit(values) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cut_that_its_dtype_cannot_hold_is_refused_by_name_and_nothing_is_in_place(dtype):
    shape = torch.ones(3, 3, dtype=torch.float64)
    shape[0, 0] = 0  # the best approximation of rank 1 has 1.08 where this has 1
    model = _linear((shape * torch.finfo(dtype).max).to(dtype))
    before = model["only"].weight.clone()
    # Of float64 not even the singular values have room.
    wanted = "singular values of only" if dtype == torch.float64 else r"only after /only/@0\.5"
    with (
        pytest.raises(ValueError, match=f"`{wanted}` would have values beyond {dtype}, whose largest is"),
        reduced(model, "/only/@0.5"),
    ):
        pass
    assert torch.equal(model["only"].weight, before)
    with reduced(_linear((shape * torch.finfo(dtype).max / 8).to(dtype)), "/only/@0.5") as cut:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in cut.prepare())


def test_the_reference_cut_says_that_it_works_in_single_precision():
    matrix = noise(6, 5).double() * 1e100
    with pytest.raises(ValueError, match="`w in single precision, for of='reference'` would have values beyond"):
        Spectra().reduce(matrix, replace(HALF, of="reference"), "w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_of_large_weights_is_known_to_be_small(dtype):
    size = {torch.float32: 1e25, torch.float64: 1e200}[dtype]
    base = _linear(noise(8, 8).to(dtype) * size)
    tuned = _linear(base["only"].weight.data * (1 + 1e-3))
    assert BaseWeights(base, tuned).digest
