"""Cut a matrix by the magnitude of its entries instead of its singular values: what the paper's code calls pruning."""

from __future__ import annotations

from torch import Tensor

from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import as_double


def reduce_entries(matrix: Tensor, reduction: Reduction) -> Tensor:
    """``matrix`` without the entries that ``reduction`` removes, or with them scaled; shape, dtype and device as given.

    The entries are in order of their magnitude from the largest on; of equal ones that in the earlier row, then column,
    comes first. The paper's code (``prune`` of its ``matrix_utils.py``) differs in that it removes all entries that are
    as small as the largest one removed.
    """
    entries = matrix.flatten()
    order, result = entries.abs().argsort(descending=True, stable=True), entries.clone()
    for start, stop in reduction.removed(reduction.rank(len(entries)), len(entries)):
        chosen = order[start:stop]
        scaled = as_double(entries[chosen]) * reduction.scale + 0.0  # no -0.0
        result[chosen] = scaled.to(device=matrix.device, dtype=matrix.dtype)
    return result.view(matrix.shape)
