"""Screens that look at no data: what a gradient has to beat.

Contract: each is a function of targets, rhos, spectra and a seed that returns a score for every candidate of
``candidates.grid``, lower is better, as :class:`~laser_callback.search.GradientScreen` does.
Only the order of the scores means something.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

from laser_callback.plans.kinds import MLP_KINDS
from laser_callback.plans.rank_rules import rank_by, unit
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target
from laser_callback.search.candidates import grid
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra

Screen = Callable[[Sequence[Target], Sequence[float], Spectra, int], dict[Reduction, float]]


def random_screen(
    targets: Sequence[Target], rhos: Sequence[float], spectra: Spectra, seed: int
) -> dict[Reduction, float]:
    """Candidates in random order."""
    draw = random.Random(seed)
    return {candidate.reduction: draw.random() for candidate in grid(targets, rhos)}


def late_mlp_screen(
    targets: Sequence[Target], rhos: Sequence[float], spectra: Spectra, seed: int
) -> dict[Reduction, float]:
    """What the LASER paper (arXiv 2312.13558, section 5) found to help most: MLP weights, late layers, small rho.

    Layer by layer from the last, in each all rhos but the zero matrix from the smallest; then the same for the others.
    """
    candidates = grid(targets, rhos)

    def place(i: int) -> tuple[bool, float, bool, float]:
        candidate = candidates[i]
        layer = -1 if candidate.layer is None else candidate.layer
        return candidate.kind not in MLP_KINDS, -layer, candidate.rho == 0, candidate.rho

    position = {i: float(rank) for rank, i in enumerate(sorted(range(len(candidates)), key=place))}
    return {candidate.reduction: position[i] for i, candidate in enumerate(candidates)}


def spectrum_screen(kind: Literal["gavish-donoho", "entropy", "laser-rmt-snr"]) -> Screen:
    """A screen that knows the singular values only.

    ``"gavish-donoho"`` and ``"entropy"`` prefer, for each matrix, ranks near what the rule keeps (on a log scale), and
    among these the matrices of which the rule removes most energy, as a share. ``"laser-rmt-snr"`` prefers the matrices
    with the lowest signal-to-noise ratio as laserRMT computes it, and ranks near its threshold.

    Raises:
        ValueError: for another ``kind``.
    """
    if kind not in ("gavish-donoho", "entropy", "laser-rmt-snr"):
        raise ValueError(f"`kind` must be 'gavish-donoho', 'entropy' or 'laser-rmt-snr', got {kind!r}")

    def screen(targets: Sequence[Target], rhos: Sequence[float], spectra: Spectra, seed: int) -> dict[Reduction, float]:
        scores: dict[Reduction, float] = {}
        for target in targets:
            judged = []
            for matrix in target.matrices:
                weight = matrix.value
                judged.append(_judge(kind, spectra.of(weight, matrix.name)))
            rank = sum(rank for rank, _ in judged) / len(judged)
            preference = sum(preference for _, preference in judged) / len(judged)
            for candidate in grid([target], rhos):
                kept = candidate.reduction.rank(target.matrices[0].max_rank)
                scores[candidate.reduction] = preference + abs(math.log((kept + 1) / (rank + 1)))
        return scores

    return screen


def _judge(kind: str, spectrum: Spectrum) -> tuple[int, float]:
    """The rank that a rule keeps, and its preference among matrices, lower is better."""
    if kind == "laser-rmt-snr":
        rank, ratio = laser_rmt(spectrum)
        return rank, math.log(ratio + 1e-12)
    rank = rank_by(kind, spectrum.values, spectrum.shape)
    energy = (spectrum.values / unit(spectrum.values)) ** 2
    return rank, -float(energy[rank:].sum() / energy.sum().clamp_min(1e-300))


def laser_rmt(spectrum: Spectrum) -> tuple[int, float]:
    """The rank and the signal-to-noise ratio of laserRMT (`rmt_laser_snr.py`).

    The ratio is the sum of the singular values above the threshold of
    :func:`~laser_callback.plans.rank_rules.laser_rmt_rank` over the sum of those below.
    """
    rank = rank_by("laser-rmt", spectrum.values, spectrum.shape)
    values = spectrum.values / unit(spectrum.values)
    signal, noise = (float(part.sum()) for part in (values[:rank], values[rank:]))
    return rank, signal / noise if noise else math.inf


SCREENS: dict[str, Screen] = {
    "gavish-donoho": spectrum_screen("gavish-donoho"),
    "entropy": spectrum_screen("entropy"),
    "laser-rmt-snr": spectrum_screen("laser-rmt-snr"),
    "late-mlp": late_mlp_screen,
    "random": random_screen,
}
"""Screens that look at no data."""
