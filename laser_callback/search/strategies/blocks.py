"""Row blocks of a matrix, each cut like a matrix of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from typing_extensions import override

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.target import Target
from laser_callback.search.sensitivities import View, Views
from laser_callback.search.strategies.base import Context, Need
from laser_callback.search.strategies.grid import OnGrid

GROUPS = 4
"""Groups of rows of a matrix without heads."""
_OF_HEADS = ("q_proj", "k_proj", "v_proj")


class Blocks(OnGrid):
    """Cut the rows of each head, or each quarter of the rows of a matrix, apart.

    One factorisation of a whole matrix keeps what its heads have in common; cut apart, each keeps its own (Compress to
    Impress, arXiv 2510.20800; TensorLLM, arXiv 2501.15674, shares factors between heads instead). Queries, keys and
    values are cut by heads where the model's config tells their size; all others in four.
    """

    name = "blocks"
    needs: frozenset[Need] = frozenset({"gradient"})

    def views(self, context: Context) -> Views:
        """Of each matrix its blocks."""
        wanted: dict[View, list[WeightMatrix]] = {}
        for target in self.targets(context):
            wanted.setdefault(View(blocks=target.address["blocks"]), []).extend(target.matrices)
        return wanted

    @override
    def rhos(self, context: Context) -> Sequence[float]:
        return [rho for rho in context.rhos if rho]  # zero is zero in any blocks

    @override
    def targets(self, context: Context) -> list[Target]:
        size = head_size(context.module)
        counted = [(target, _count(target.matrices[0], size)) for target in context.targets]
        return [Target(t.matrices, {**t.address, "blocks": count}) for t, count in counted if count > 1]


def head_size(model: nn.Module) -> int | None:
    """Features of one attention head, if the configs in the model say so, and all say the same."""
    found = set(_head_sizes(model))
    return found.pop() if len(found) == 1 else None


def _head_sizes(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        config = getattr(module, "config", None)
        heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
        size = getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)
        if isinstance(size, int):
            yield size


def _count(matrix: WeightMatrix, size: int | None) -> int:
    rows = matrix.shape[0]
    if matrix.kind in _OF_HEADS:
        return rows // size if size and rows % size == 0 else 1
    return GROUPS if rows >= GROUPS else 1
