"""The singular directions of a matrix in the metric of its inputs: what a cut keeps, if it is to change outputs least.

With C = E[x x'] the second moments of a layer's inputs and S S' = C, the outputs change by E|(W - V) x|^2 =
||(W - V) S||_F^2, so that of all V of rank k that is least for which V S is the truncated SVD of W S (Eckart-Young):
V = U_k U_k' W, with U_k the first k left singular vectors of W S. This is the truncation of SVD-LLM (arXiv 2403.07378,
section 3.1, there by S^-1) and of ASVD (arXiv 2312.05821, where S is diagonal).

Contract: U is a matter of the data, and cannot be found in the weights again. It is kept in float32, here and in a
recipe, and everything that is cut is cut by these very numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from laser_callback.plans.matrices import known_as
from laser_callback.plans.rank_rules import rank_by
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.spectra.spectrum import Spectrum, as_double, refuse_non_finite

DAMPING = 0.01
"""Of the mean second moment of an input, added to each: directions that no example has used are not free."""


class Directions(Protocol):
    """Knows which directions of a matrix' outputs a reduction with ``metric="inputs"`` keeps."""

    def kept(self, name: str, reduction: Reduction) -> Tensor:
        """Orthonormal columns, float32, shape (m, k); k is the matrix' whole rank where nothing is removed.

        Raises:
            ValueError: if nothing is known of the matrix.
        """


class InputDirections:
    """All directions of each matrix, by name and by what of it is cut.

    Args:
        found: (name, cut) -> (singular values of W S, descending, float64, shape (r,); U, shape (m, r)).
    """

    def __init__(self, found: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> None:
        self._found = {key: (values, left.float()) for key, (values, left) in found.items()}

    def joined(self, others: InputDirections) -> InputDirections:
        """These, and of what is not among them the others'."""
        return InputDirections({**others._found, **self._found})

    def knows(self, name: str, cut: str = "weight") -> bool:
        """Whether anything is known of the matrix."""
        return self._key(name, cut) is not None

    def of(self, name: str, cut: str = "weight") -> tuple[Tensor, Tensor]:
        """Singular values, float64, and U, float32.

        Raises:
            ValueError: if nothing is known of the matrix.
        """
        key = self._key(name, cut)
        if key is None:
            raise ValueError(
                f"nothing is known of the inputs of `{name}`: no example has gone through it on the way here"
            )
        return self._found[key]

    def _key(self, name: str, cut: str) -> tuple[str, str] | None:
        known = known_as(name, (known for known, part in self._found if part == cut))
        return None if known is None else (known, cut)

    def rank(self, name: str, reduction: Reduction) -> int:
        """What rho counts: from the singular values, where it is a rule."""
        values, left = self.of(name, reduction.cut)
        if reduction.is_ruled:
            return rank_by(str(reduction.rho), values, (len(left), len(values)))
        return reduction.rank(len(values))

    def kept(self, name: str, reduction: Reduction) -> Tensor:
        """See :class:`Directions`."""
        values, left = self.of(name, reduction.cut)
        rank = self.rank(name, reduction)
        stays = torch.ones(len(values), dtype=torch.bool)
        for start, stop in reduction.removed(rank, len(values)):
            stays[start:stop] = False
        return left[:, stays.to(left.device)]


class StoredDirections:
    """What a recipe has kept of them: the kept columns of each of its matrices.

    Args:
        stored: name -> columns, float32, shape (m, k).
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = dict(stored)

    def kept(self, name: str, reduction: Reduction) -> Tensor:
        """See :class:`Directions`; of whatever reduction, for a recipe knows one for each matrix."""
        known = known_as(name, self._stored)
        if known is None:
            raise ValueError(
                f"the recipe has no directions of `{name}` for {brief(reduction)}: it is damaged, or of another plan"
            )
        return self._stored[known]


def input_directions(matrix: Tensor, moments: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor]:
    """Singular values and left singular vectors of W S, with S S' the damped second moments of the inputs.

    Args:
        matrix: W, shape (m, n).
        moments: sum or mean of x x' over inputs x, shape (n, n).
        name: of the matrix, for errors.

    Returns:
        Float64, of shapes (r,) and (m, r) with r = min(m, n). Where a singular value is 0 the column is 0.

    Raises:
        ValueError: if ``matrix`` or ``moments`` hold NaN or infinite values, or all inputs were 0.
    """
    refuse_non_finite(matrix, name)
    refuse_non_finite(moments, f"inputs of {name}")
    work, squares = as_double(matrix), as_double(moments)
    mean = float(squares.diagonal().mean())
    if mean <= 0:
        raise ValueError(f"all inputs of `{name}` were 0: there is no metric in them")
    damped = squares / mean + DAMPING * torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
    product = work @ torch.linalg.cholesky(damped) * mean**0.5
    spectrum = Spectrum.of(product, name)
    if matrix.shape[0] < matrix.shape[1]:
        return spectrum.values, spectrum.basis
    left = product @ spectrum.basis / spectrum.values
    return spectrum.values, torch.where(spectrum.values > 0, left, 0.0)


def cut_in_directions(operand: Tensor, kept: Tensor, reduction: Reduction) -> Tensor:
    """What ``reduction`` leaves of ``operand``, shape (m, n), where it keeps the directions ``kept``, shape (m, k).

    In float64, on the device of ``operand``.
    """
    work = as_double(operand)
    columns = as_double(kept).to(work.device)
    head = columns @ (columns.T @ work)
    return head + reduction.scale * (work - head) if reduction.scale else head


def to_text(columns: Tensor) -> str:
    """Columns of float32 as text: base64 of their bytes, row by row, the lowest byte first."""
    return base64.b64encode(columns.cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def from_text(text: str, rows: int) -> Tensor:
    """The inverse of :func:`to_text` for columns of so many rows.

    Raises:
        ValueError: if it is no such text.
    """
    try:
        content = base64.b64decode(text, validate=True)
        return torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(rows, -1) if content else _none(rows)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"`directions` must be base64 of float32 columns of {rows} rows: {error}") from error


def _none(rows: int) -> Tensor:
    return torch.empty(rows, 0)
