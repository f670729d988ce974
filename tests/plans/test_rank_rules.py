from __future__ import annotations

import math

import pytest
import torch
from matrices import noise

from laser_callback.plans.rank_rules import (
    energy_rank,
    entropy_rank,
    gavish_donoho_rank,
    laser_rmt_rank,
    marchenko_pastur_rank,
    rank_by,
)
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import Spectrum

ALL = ("entropy", "gavish-donoho", "marchenko-pastur", "laser-rmt", "energy-0.9")
SHAPES = [(200, 200), (150, 405), (120, 420), (405, 150), (100, 400), (400, 100), (101, 101)]


def planted_in_noise(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    """``rank`` singular values of 2 to 5 times the noise's largest."""
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    u = torch.linalg.qr(noise(shape[0], rank, seed=seed + 10))[0]
    v = torch.linalg.qr(noise(shape[1], rank, seed=seed + 20))[0]
    signal = (u * torch.linspace(2.0, 5.0, rank, dtype=torch.float64) * edge) @ v.T
    return (0.02 * (signal + noise(*shape, seed=seed))).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deviation", [1.0, 0.02])
def test_pure_noise_has_rank_zero(shape, deviation):
    for seed in range(8):
        values = torch.linalg.svdvals(noise(*shape, seed=seed) * deviation)
        assert gavish_donoho_rank(values, shape) == 0
        assert marchenko_pastur_rank(values, shape) == 0
        assert entropy_rank(values, shape) > 0.7 * min(shape)  # entropy sees the spectrum's evenness, not noise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("planted", [1, 3, 10])
def test_planted_signals_are_counted(shape, planted):
    for seed in range(3):
        matrix = planted_in_noise(shape, planted, seed)
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        spectrum = Spectrum.of(matrix)
        for rule in ("gavish-donoho", "marchenko-pastur"):
            assert spectrum.rank(Reduction(0, "fc_in", rule)) == planted
            result = spectrum.reduce(matrix, Reduction(0, "fc_in", rule))
            expected = (u[:, :planted] * s[:planted]) @ v[:planted]
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "omega"), [(1.0, 2.8582), (0.5, 2.1711), (0.2, 1.7650), (0.05, 1.5194)])
def test_gavish_donoho_coefficients(beta, omega):
    """Table IV of the paper: omega(beta) is the threshold in units of the median singular value."""
    values = torch.ones(1000, dtype=torch.float64)
    for factor, kept in ((0.999, 0), (1.001, 1)):
        values[0] = omega * factor
        assert gavish_donoho_rank(values, (1000, round(1000 / beta))) == kept


@pytest.mark.parametrize(
    ("shape", "share"), [((400, 400), 0.24), ((400, 1075), 0.84), ((1400, 400), 0.98), ((400, 1600), 1.0)]
)
def test_the_edge_of_laser_rmt_takes_noise_for_signal(shape, share):
    """1:1, 4096:11008, 4096:14336 and 1:4. The right answer is 0."""
    values = torch.linalg.svdvals(noise(*shape))
    assert laser_rmt_rank(values, shape) / min(shape) == pytest.approx(share, abs=0.015)
    assert marchenko_pastur_rank(values, shape) == 0


def test_entropy_rank_of_known_spectra():
    for count in (1, 4, 10):
        values = torch.zeros(10, dtype=torch.float64)
        values[:count] = 3.0
        assert entropy_rank(values, (10, 10)) == count
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    assert entropy_rank(p, (3, 3)) == math.ceil(math.exp(-sum(x * math.log(x) for x in p.tolist())))


def test_energy_is_the_fewest_values_that_reach_the_share():
    values = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # energies 16, 4, 4, 1 of 25
    for share, rank in ((1e-9, 1), (0.64, 1), (0.641, 2), (0.8, 2), (0.96, 3), (0.961, 4), (1 - 1e-15, 4)):
        assert energy_rank(values, share) == rank, share
    spectrum = torch.linalg.svdvals(noise(60, 40))
    for share in (0.01, 0.5, 0.9, 0.99, 0.999999):
        rank = rank_by(f"energy-{share!r}", spectrum, (60, 40))
        kept = spectrum.square().cumsum(0) / spectrum.square().sum()
        assert kept[rank - 1] >= share
        assert rank == 1 or kept[rank - 2] < share


@pytest.mark.parametrize("rule", ALL)
def test_zero_has_rank_zero(rule):
    for shape in ((4, 4), (7, 3), (3, 7), (1, 1)):
        assert rank_by(rule, torch.zeros(min(shape), dtype=torch.float64), shape) == 0


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("shape", [(40, 40), (20, 60)])
def test_scale_does_not_matter(rule, shape):
    values = torch.linalg.svdvals(noise(*shape) + 3)
    assert len({rank_by(rule, values * scale, shape) for scale in (1e-30, 0.02, 1, 1e30)}) == 1
