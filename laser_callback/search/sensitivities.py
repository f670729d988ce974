"""How the loss answers to each singular direction of a matrix, and from that to any plan: arithmetic, without a model.

With W = sum_i sigma_i u_i v_i' and G = dL/dW, multiplying the i-th singular value by f_i changes the loss, to first
order, by (f_i - 1) d_i, where d_i = sigma_i u_i' G v_i is the matrix' i-th *sensitivity*. So one gradient and one
factorisation tell the first-order change of every plan that cuts what was factorised: f_i is 0 where a direction is
removed, ``scale`` where it is scaled, and 1 where it stays.

What is factorised of a matrix is a :class:`View` of it: the weight, or its difference to the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.reduction import Reduction
from laser_callback.search.outer import Outer
from laser_callback.spectra.directions import InputDirections
from laser_callback.spectra.folder import size_for
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.support.journal import Step
from laser_callback.support.reading import typed

Factor = Spectrum | Tensor
"""What is known of a block: its spectrum, or its left singular vectors alone, shape (m, r)."""


@dataclass(frozen=True)
class View:
    """What of a matrix is factorised.

    Attributes:
        cut: ``"weight"``: the matrix itself; ``"delta"``: its difference to the base.
        metric: ``"inputs"``: in the metric of its inputs.
        blocks: so many groups of its rows, each by itself.
    """

    cut: str = "weight"
    metric: str = "none"
    blocks: int = 1

    @classmethod
    def of(cls, reduction: Reduction) -> View | None:
        """The view whose directions a reduction removes or scales; ``None`` if it does anything else."""
        if reduction.of != "rank" or reduction.noise is not None:
            return None
        return cls(reduction.cut, reduction.metric, reduction.blocks)

    def sizes(self, shape: tuple[int, int]) -> list[int]:
        """How many directions each block of a matrix of this shape has."""
        rows = [len(block) for block in torch.empty(shape[0], 0).tensor_split(self.blocks)]
        return [min(size, shape[1]) for size in rows]

    def blocks_of(self, weight: Tensor, name: str, spectra: Spectra) -> tuple[Tensor, ...]:
        """What is factorised of the matrix ``name``, each of shape (rows, n)."""
        return spectra.operand(weight, name, self.cut).tensor_split(self.blocks)

    def factors(self, weight: Tensor, name: str, spectra: Spectra) -> list[Factor]:
        """Of each block its spectrum; in the metric of the inputs the left singular vectors."""
        if self.metric == "inputs":
            return [_known_inputs(spectra).of(name, self.cut)[1]]
        return [spectra.of(block, name) for block in self.blocks_of(weight, name, spectra)]

    def ranks(self, matrix: WeightMatrix, reduction: Reduction, spectra: Spectra) -> list[int]:
        """What a reduction keeps of each block."""
        if not reduction.is_ruled:
            return [reduction.rank(size) for size in self.sizes(matrix.shape)]
        if self.metric == "inputs":
            return [_known_inputs(spectra).rank(matrix.name, reduction)]
        blocks = self.blocks_of(matrix.value, matrix.name, spectra)
        return [spectra.of(block, matrix.name).rank(reduction) for block in blocks]

    def derivatives(
        self, gradient: Tensor | Outer, weight: Tensor, name: str, spectra: Spectra, factors: Sequence[Factor]
    ) -> Tensor:
        """The sensitivities of the directions of all blocks, one block after the other.

        Float64 on the CPU, shape (sum of :meth:`sizes`,).
        """
        if isinstance(gradient, Outer) and self != View():  # not what the layer multiplies by
            gradient = replace(gradient, through=None)
        blocks = zip(gradient.tensor_split(self.blocks), self.blocks_of(weight, name, spectra), factors, strict=True)
        return torch.cat([derivatives(*of_block) for of_block in blocks])


Views = Mapping[View, Sequence[WeightMatrix]]
"""Of which matrices each view is wanted."""


class Sensitivities:
    """The sensitivities of matrices on each batch of examples.

    Args:
        weights: of the batches, the number of their examples.
        views: by view and name of a matrix, in the order in which gradients came: float64, shape (batches, min(m, n)).
            By default there are none.
    """

    def __init__(self, weights: Sequence[float] = (), views: Mapping[View, Mapping[str, Tensor]] | None = None) -> None:
        self.weights = tuple(weights)
        self.views = views or {}
        self._tails: dict[tuple[View, str], list[Tensor]] = {}

    @property
    def batches(self) -> int:
        """How many batches there were."""
        return len(self.weights)

    def estimate(self, cuts: Iterable[tuple[WeightMatrix, Reduction]], spectra: Spectra) -> tuple[float, float] | None:
        """How the mean loss over examples changes, and the standard error of that, from the variance between batches.

        The standard error is 0 where there is one batch only. Half the mean square over examples of <G_n, W_k - W> in
        its place (the empirical Fisher matrix for the Hessian) lost the best cut on the benchmark.

        Args:
            cuts: of a resolved plan.
            spectra: asked for the rank that a rule keeps.

        Returns:
            ``None`` if a cut is of something that no view has.
        """
        changes: dict[tuple[View, str], Tensor] = {}
        for matrix, reduction in spectra.settled(list(cuts)):
            view = View.of(reduction)
            if view is None or matrix.name not in self.views.get(view, {}):
                return None
            changes[view, matrix.name] = self._change(view, matrix, reduction, spectra)
        total = torch.zeros(self.batches, dtype=torch.float64)
        # In the order in which gradients came, on which the last bits of a sum depend.
        in_order = (
            ((view, name) for view, names in self.views.items() for name in names) if len(changes) > 1 else changes
        )
        for key in in_order:
            if key in changes:
                total += changes[key]
        return self.mean_and_error(total.tolist())

    def mean(self, view: View, name: str, without: int | None = None) -> Tensor | None:
        """The mean sensitivities over examples of the matrix ``name``, float64; ``None`` if the view has none of it.

        Args:
            view: what of it.
            name: of the matrix.
            without: a batch that is left out.
        """
        found = self.views.get(view, {}).get(name)
        if found is None:
            return None
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if without is not None:
            weights[without] = 0.0
        return weights @ found / weights.sum()

    def _change(self, view: View, matrix: WeightMatrix, reduction: Reduction, spectra: Spectra) -> Tensor:
        """Of each batch, what the removed directions add up to times what becomes of them; shape (batches,)."""
        if reduction.norm == "whole":  # which changes those that stay, too
            blocks = view.blocks_of(matrix.value, matrix.name, spectra)
            gains = torch.cat([spectra.of(block, matrix.name).gains(reduction).cpu() for block in blocks])
            return self.views[view][matrix.name] @ (gains - 1)
        change = torch.zeros(self.batches, dtype=torch.float64)
        sizes, ranks = view.sizes(matrix.shape), view.ranks(matrix, reduction, spectra)
        for tails, size, rank in zip(self._tails_of(view, matrix.name, sizes), sizes, ranks, strict=True):
            for start, stop in reduction.removed(rank, size):
                change += (reduction.scale - 1) * (tails[:, start] - tails[:, stop])
        return change

    def _tails_of(self, view: View, name: str, sizes: Sequence[int]) -> list[Tensor]:
        """Of each batch and block the sums from each direction on to the last, shape (batches, size + 1)."""
        if (view, name) not in self._tails:
            self._tails[view, name] = [
                torch.nn.functional.pad(of_block.flip(1).cumsum(1).flip(1), (0, 1))
                for of_block in self.views[view][name].split(list(sizes), 1)
            ]
        return self._tails[view, name]

    def mean_and_error(self, changes: Sequence[float]) -> tuple[float, float]:
        """The mean over examples of what changes by so much in each batch, and the standard error between batches."""
        total = square = weight = 0.0  # not `sum`, which rounds in another way from Python 3.12 on
        for of_batch, change in zip(self.weights, changes, strict=True):
            total += of_batch * change
            square += of_batch * (change * change)
            weight += of_batch
        mean = total / weight
        # A batch of w examples has the variance of one example divided by w.
        variance = max(square - weight * (mean * mean), 0.0) / max(self.batches - 1, 1)
        return mean, float(torch.tensor(variance / weight, dtype=torch.float64).sqrt()) if self.batches > 1 else 0.0

    # ---- parts, and a journal ---------------------------------------------------------------------------------------

    @classmethod
    def join(cls, parts: Sequence[Sensitivities]) -> Sensitivities:
        """Those of parts of a model, on the same batches, as one."""
        views: dict[View, dict[str, Tensor]] = {}
        for part in parts:
            for view, of_view in part.views.items():
                views.setdefault(view, {}).update(of_view)
        return cls(parts[0].weights if parts else (), views)

    def to_step(self) -> Step:
        """As a step of a journal."""
        views = [[asdict(view), list(of_view)] for view, of_view in self.views.items()]
        tensors = {f"{i}/{name}": t for i, of_view in enumerate(self.views.values()) for name, t in of_view.items()}
        return {"weights": list(self.weights), "views": views}, tensors

    @classmethod
    def from_step(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sensitivities:
        """The inverse of :meth:`to_step`."""
        views = typed(list[tuple[View, list[str]]], data["views"])
        return cls(data["weights"], {v: {n: tensors[f"{i}/{n}"] for n in names} for i, (v, names) in enumerate(views)})


def derivatives(gradient: Tensor | Outer, matrix: Tensor, factor: Factor) -> Tensor:
    """The sensitivities d_i = sigma_i u_i' G v_i of a matrix.

    Args:
        gradient: G = dL/dW, shape (m, n), or its factors.
        matrix: what was factorised, shape (m, n). The work is done in float64 if its dtype is float64, else in float32.
        factor: its spectrum, or orthonormal columns u_i, shape (m, r): then d_i = u_i' G W' u_i.

    Returns:
        Float64 on the CPU, shape (min(m, n),).
    """
    work = torch.float64 if matrix.dtype == torch.float64 else torch.float32

    def at_work(tensor: Tensor) -> Tensor:
        return tensor.to(matrix.device, work)

    # W - W_k is W projected on the tail of the shorter side's basis; so <G, W - W_k> is the sum over the tail of
    # v_i' G'W v_i, or of u_i' G W' u_i. Both are v_i' A'B v_i, where A'B is either product.
    right = isinstance(factor, Spectrum) and matrix.shape[0] >= matrix.shape[1]
    w, basis = at_work(matrix), at_work(factor.basis if isinstance(factor, Spectrum) else factor)
    if isinstance(gradient, Tensor):
        g = at_work(gradient)
        a, b = (g, w) if right else (g.T, w.T)
    elif right:
        through = gradient.through
        a, b = at_work(gradient.inputs), at_work(gradient.outputs) @ w if through is None else at_work(through)
    else:
        a, b = at_work(gradient.outputs), at_work(gradient.inputs) @ w.T
    (rows, short), columns = a.shape, basis.shape[1]
    if 2 * rows * columns <= (rows + columns) * short:  # whichever multiplies fewer numbers
        return ((a @ basis) * (b @ basis)).sum(0).cpu().double()
    return (basis * ((a.T @ b) @ basis)).sum(0).cpu().double()


def in_parts(wanted: Views, capacity: int) -> list[Views]:
    """What is wanted in as few parts as have spectra of ``capacity`` bytes at most, or of a single matrix more."""
    by_matrix: dict[str, list[tuple[View, WeightMatrix]]] = {}
    for view, matrices in wanted.items():
        for matrix in matrices:
            by_matrix.setdefault(matrix.name, []).append((view, matrix))
    parts: list[dict[View, list[WeightMatrix]]] = []
    room = 0
    for of_matrix in by_matrix.values():
        needed = sum(size_for(matrix.shape) for _, matrix in of_matrix)
        if not parts or needed > room:
            parts.append({})
            room = capacity
        for view, matrix in of_matrix:
            parts[-1].setdefault(view, []).append(matrix)
        room -= needed
    return list(parts)


def _known_inputs(spectra: Spectra) -> InputDirections:
    if not isinstance(spectra.directions, InputDirections):
        raise ValueError('nothing is known of the inputs: a strategy that needs them has "activations" in its `needs`')
    return spectra.directions
