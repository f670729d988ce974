"""How the loss answers to each singular direction of a matrix, and from that to any plan: arithmetic, without a model.

With W = sum_i sigma_i u_i v_i' and G = dL/dW, multiplying the i-th singular value by f_i changes the loss, to first
order, by (f_i - 1) d_i, where d_i = sigma_i u_i' G v_i is the matrix' i-th *sensitivity*. So one gradient and one
factorisation tell the first-order change of every plan that cuts what was factorised: f_i is 0 where a direction is
removed, ``scale`` where it is scaled, and 1 where it stays.

What is factorised of a matrix is a :class:`View` of it: the weight, or its difference to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laser_callback.passes.outer import Outer
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.directions import InputDirections
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.support.journal import Step
from laser_callback.support.reading import typed

SMALL = 2**14
"""A matrix of no more elements is looked at in float64 on a CPU, where that costs nothing."""

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

        Float64 on the CPU, shape (sum of :meth:`sizes`,); of a spectrum of k leading directions those, and then what
        the matrix does in each coordinate of its shorter side, shape (k + min(m, n),).
        """
        if isinstance(gradient, Outer) and self != View():  # not what the layer multiplies by
            gradient = replace(gradient, through=None)
        parts: Sequence[Tensor | Outer] = gradient.tensor_split(self.blocks)
        blocks = zip(parts, self.blocks_of(weight, name, spectra), factors, strict=True)
        return torch.cat([derivatives(*of_block) for of_block in blocks])


Views = Mapping[View, Sequence[WeightMatrix]]
"""Of which matrices each view is wanted."""


class Sensitivities:
    """The sensitivities of matrices on each batch of examples.

    Args:
        weights: of the batches, the number of their examples.
        views: by view and name of a matrix, in the order in which gradients came: float64, shape (batches, min(m, n)).
            By default there are none.
        heads: the same of matrices of which only the first k directions are known: shape (batches, k + 1), the last
            being all others together.
    """

    def __init__(
        self,
        weights: Sequence[float] = (),
        views: Mapping[View, Mapping[str, Tensor]] | None = None,
        heads: Mapping[View, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.weights = tuple(weights)
        self.views = views or {}
        self.heads = heads or {}
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
            ``None`` if a cut is of something that no view has, or ends behind the known directions of a matrix.
        """
        changes: dict[tuple[View, str], Tensor] = {}
        for matrix, reduction in spectra.settled(list(cuts)):
            view = View.of(reduction)
            change = None if view is None else self._change(view, matrix, reduction, spectra)
            if view is None or change is None:
                return None
            changes[view, matrix.name] = change
        total = torch.zeros(self.batches, dtype=torch.float64)
        # In the order in which gradients came, on which the last bits of a sum depend.
        every = ((view, name) for known in (self.views, self.heads) for view, of in known.items() for name in of)
        for key in every if len(changes) > 1 else changes:
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
        return None if found is None else self.over_examples(found, without)

    def over_examples(self, found: Tensor, without: int | None = None) -> Tensor:
        """The mean over examples of what was found on each batch, shape (batches, ...)."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if without is not None:
            weights[without] = 0.0
        return weights @ found / weights.sum()

    def without_largest(self, found: Tensor, count: int) -> tuple[float, float]:
        """What it changes to take out the ``count`` largest, and its standard error, where others have chosen them.

        The largest are those that chance has made large, too: by the batches that have chosen them they promise more
        than they keep. So each batch is asked about those that the others would choose. Of a single batch there are no
        others, and all that is known is what it promises.

        Args:
            found: sensitivities on each batch, shape (batches, directions).
            count: how many are taken out.
        """
        if self.batches == 1:
            return self.mean_and_error([-float(found[0].topk(count).values.sum())])
        changes = []
        for batch in range(self.batches):
            order = self.over_examples(found, without=batch).argsort(descending=True, stable=True)[:count]
            changes.append(-float(found[batch, order].sum()))
        return self.mean_and_error(changes)

    def _change(self, view: View, matrix: WeightMatrix, reduction: Reduction, spectra: Spectra) -> Tensor | None:
        """Of each batch, what the removed directions add up to times what becomes of them; shape (batches,)."""
        if matrix.name not in self.views.get(view, {}):
            return self._change_by_head(view, matrix, reduction)
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

    def _change_by_head(self, view: View, matrix: WeightMatrix, reduction: Reduction) -> Tensor | None:
        """The same where the first k directions are known, and all others together."""
        found = self.heads.get(view, {}).get(matrix.name)
        if found is None or reduction.norm == "whole" or reduction.is_ruled:
            return None
        tails, known = self.tails(found), found.shape[1] - 1
        change = torch.zeros(self.batches, dtype=torch.float64)
        for ends in reduction.removed(reduction.rank(matrix.max_rank), matrix.max_rank):
            if any(known < end < matrix.max_rank for end in ends):
                return None
            start, stop = (-1 if end == matrix.max_rank else end for end in ends)
            change += (reduction.scale - 1) * (tails[:, start] - tails[:, stop])
        return change

    def tails(self, found: Tensor) -> Tensor:
        """Of each batch the sums from each direction on to the last, shape (batches, directions + 1)."""
        return torch.nn.functional.pad(found.flip(1).cumsum(1).flip(1), (0, 1))

    def _tails_of(self, view: View, name: str, sizes: Sequence[int]) -> list[Tensor]:
        """Of each batch and block the sums from each direction on to the last, shape (batches, size + 1)."""
        if (view, name) not in self._tails:
            self._tails[view, name] = list(map(self.tails, self.views[view][name].split(list(sizes), 1)))
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
        """Those of parts of a model, on the same batches, as one; what is known whole counts, not its head."""
        views, heads = _merged([part.views for part in parts]), _merged([part.heads for part in parts])
        heads = {view: {n: t for n, t in of.items() if n not in views.get(view, {})} for view, of in heads.items()}
        return cls(parts[0].weights if parts else (), views, heads)

    def to_step(self) -> Step:
        """As a step of a journal."""
        known = {"views": self.views, "heads": self.heads}
        names = {what: [[asdict(view), list(of)] for view, of in each.items()] for what, each in known.items()}
        tensors = {
            f"{what}/{i}/{name}": tensor
            for what, each in known.items()
            for i, of in enumerate(each.values())
            for name, tensor in of.items()
        }
        return {"weights": list(self.weights), **names}, tensors

    @classmethod
    def from_step(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sensitivities:
        """The inverse of :meth:`to_step`."""
        known = {what: typed(list[tuple[View, list[str]]], data[what]) for what in ("views", "heads")}
        made = [
            {view: {name: tensors[f"{what}/{i}/{name}"] for name in names} for i, (view, names) in enumerate(each)}
            for what, each in known.items()
        ]
        return cls(data["weights"], *made)


def _merged(parts: Iterable[Mapping[View, Mapping[str, Tensor]]]) -> dict[View, dict[str, Tensor]]:
    merged: dict[View, dict[str, Tensor]] = {}
    for part in parts:
        for view, of_view in part.items():
            merged.setdefault(view, {}).update(of_view)
    return merged


def derivatives(gradient: Tensor | Outer, matrix: Tensor, factor: Factor) -> Tensor:
    """The sensitivities d_i = sigma_i u_i' G v_i of a matrix.

    Args:
        gradient: G = dL/dW, shape (m, n), or its factors.
        matrix: what was factorised, shape (m, n). The work is done in float64 if its dtype is
            float64 or it is :data:`SMALL`, else in float32: a relative error of 1e-6.
        factor: its spectrum, or orthonormal columns u_i, shape (m, r): then d_i = u_i' G W' u_i.

    Returns:
        Float64 on the CPU, shape (min(m, n),). Of a spectrum of k leading directions those, and then v_j' A'B v_j of
        the coordinates v_j in their place, whose sum is that of all directions: shape (k + min(m, n),).
    """
    # W - W_k is W projected on the tail of the shorter side's basis; so <G, W - W_k> is the sum over the tail of
    # v_i' G'W v_i, or of u_i' G W' u_i. Both are v_i' A'B v_i, where A'B is either product.
    right = isinstance(factor, Spectrum) and matrix.shape[0] >= matrix.shape[1]
    basis, w = _like(factor.basis if isinstance(factor, Spectrum) else factor, matrix), _like(matrix, matrix)
    if isinstance(gradient, Tensor):
        g = _like(gradient, matrix)
        a, b = (g, w) if right else (g.T, w.T)
    else:
        inputs, outputs = _like(gradient.inputs, matrix), _like(gradient.outputs, matrix)
        if right:
            a, b = inputs, outputs @ w if gradient.through is None else _like(gradient.through, matrix)
        else:
            a, b = outputs, inputs @ w.T
    (rows, short), columns = a.shape, basis.shape[1]
    if columns < short and isinstance(factor, Spectrum):
        return torch.cat([(x * y).sum(0, dtype=torch.float64).cpu() for x, y in ((a @ basis, b @ basis), (a, b))])
    if 2 * rows * columns <= (rows + columns) * short:  # whichever multiplies fewer numbers
        return ((a @ basis) * (b @ basis)).sum(0, dtype=torch.float64).cpu()
    return (basis * ((a.T @ b) @ basis)).sum(0, dtype=torch.float64).cpu()


def prepared(factor: Factor, matrix: Tensor) -> Factor:
    """A factor as :func:`derivatives` works with it, which then need not make it so for each batch."""
    return _like(factor, matrix) if isinstance(factor, Tensor) else replace(factor, basis=_like(factor.basis, matrix))


def _like(tensor: Tensor, matrix: Tensor) -> Tensor:
    in_double = matrix.dtype == torch.float64 or (matrix.numel() <= SMALL and matrix.device.type == "cpu")
    return tensor.to(matrix.device, torch.float64 if in_double else torch.float32)


def in_parts(wanted: Views, capacity: int, size: Callable[[View, WeightMatrix], int]) -> list[Views]:
    """What is wanted in as few parts as have factors of ``capacity`` bytes at most, or of a single matrix more."""
    by_matrix: dict[str, list[tuple[View, WeightMatrix]]] = {}
    for view, matrices in wanted.items():
        for matrix in matrices:
            by_matrix.setdefault(matrix.name, []).append((view, matrix))
    parts: list[dict[View, list[WeightMatrix]]] = []
    room = 0
    for of_matrix in by_matrix.values():
        needed = sum(size(view, matrix) for view, matrix in of_matrix)
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
