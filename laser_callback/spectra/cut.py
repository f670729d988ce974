"""The singular values of a cut matrix, and which of them were cut: little enough to be kept with a result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # whoever reads a result needs no torch
    from laser_callback.plans.matrices import WeightMatrix
    from laser_callback.plans.reduction import Reduction
    from laser_callback.spectra.spectrum import Spectrum
    from laser_callback.spectra.store import Spectra

POINTS = 160
"""At most about so many singular values are kept of each matrix."""


@dataclass(frozen=True)
class CutSpectrum:
    """A matrix' singular values and its cut.

    Attributes:
        matrix: its name in the model.
        reduction: the cut, as text.
        shape: (m, n).
        removed: runs [start, stop) of the singular values that were removed, counted from 0, the largest first.
        energy: share of the squared singular values that is kept where ``scale`` is 0, in [0, 1]; 1 for a zero matrix.
        places: of the singular values in ``values``, ascending: all of a short spectrum, else the head densely.
        values: singular values, descending.

    Raises:
        ValueError: if the fields do not fit each other.
    """

    matrix: str
    reduction: str
    shape: tuple[int, int]
    removed: tuple[tuple[int, int], ...]
    energy: float
    places: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        count = min(self.shape)
        if not all(0 <= start < stop <= count for start, stop in self.removed) or not all(
            0 <= place < count for place in self.places
        ):
            raise ValueError(f"`removed` and `places` must be within the {count} of a {self.shape} matrix")
        if len(self.values) != len(self.places) or not all(0 <= value < math.inf for value in self.values):
            raise ValueError(f"`values` must be a finite value for each of {len(self.places)} places")

    @classmethod
    def of(cls, spectrum: Spectrum, matrix: str, reduction: Reduction) -> CutSpectrum:
        """From the whole spectrum of the matrix ``matrix``, cut as ``reduction`` says."""
        from laser_callback.plans.rank_rules import unit

        values = spectrum.values.cpu().numpy()
        removed = spectrum.removed(reduction)
        squares = (values / unit(spectrum.values)) ** 2
        gone = sum(float(squares[start:stop].sum()) for start, stop in removed)
        energy = 1 - gone / float(squares.sum()) if squares.any() else 1.0
        places = _places(len(values))
        return cls(
            matrix,
            str(reduction),
            spectrum.shape,
            removed,
            min(max(energy, 0.0), 1.0),
            places,
            tuple(float(f"{values[place]:.6g}") for place in places),
        )


def cut_spectra(matrices: list[tuple[WeightMatrix, Reduction]], spectra: Spectra) -> list[CutSpectrum]:
    """Of the matrices of a resolved plan, those whose own singular directions were cut.

    Left out is what has no such spectrum: entries, blocks of rows, biases, the reference's cuts, and noise.
    """
    return [
        CutSpectrum.of(spectra.of(matrix.value, matrix.name, reduction.cut), matrix.name, reduction)
        for matrix, reduction in spectra.settled(matrices)
        if reduction.is_spectral and reduction.noise is None and not matrix.is_bias
    ]


def _places(count: int) -> tuple[int, ...]:
    """Places to keep of ``count``: evenly spread over the places and over their logarithms, with both ends."""
    if count <= POINTS:
        return tuple(range(count))
    linear = np.linspace(0, count - 1, POINTS // 2)
    logarithmic = np.geomspace(1, count, POINTS // 2) - 1
    return tuple(np.unique(np.concatenate([linear, logarithmic]).round().astype(int)).tolist())
