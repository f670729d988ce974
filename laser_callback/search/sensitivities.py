"""How the loss answers to each singular direction of a matrix, and from that to any plan: arithmetic, without a model.

With W = sum_i sigma_i u_i v_i' and G = dL/dW, multiplying the i-th singular value by f_i changes the loss, to first
order, by (f_i - 1) d_i, where d_i = sigma_i u_i' G v_i is the matrix' i-th *sensitivity*. So one gradient and one
factorisation tell the first-order change of every plan that cuts what was factorised: f_i is 0 where a direction is
removed, ``scale`` where it is scaled, and 1 where it stays.

What is factorised of a matrix is a :class:`View` of it: the weight, or its difference to the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.folder import size_for
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.support.journal import Step
from laser_callback.support.reading import typed

_OTHER = {"of": "rank", "blocks": 1, "metric": "none", "noise": None}
"""What a reduction must not change, to be a factor for each direction of a view."""


@dataclass(frozen=True)
class View:
    """What of a matrix is factorised.

    Attributes:
        cut: ``"weight"``: the matrix itself; ``"delta"``: its difference to the base.
    """

    cut: Literal["weight", "delta"] = "weight"

    @classmethod
    def of(cls, reduction: Reduction) -> View | None:
        """The view whose directions a reduction multiplies; ``None`` if it does anything else."""
        multiplies = all(getattr(reduction, name) == value for name, value in _OTHER.items())
        return cls(cast("Any", reduction.cut)) if multiplies else None


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
        self._tails: dict[tuple[View, str], Tensor] = {}

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
        return self._mean_and_error(total.tolist())

    def _change(self, view: View, matrix: WeightMatrix, reduction: Reduction, spectra: Spectra) -> Tensor:
        """Of each batch, what the removed directions add up to times what becomes of them; shape (batches,)."""
        if reduction.norm == "whole":  # which changes those that stay, too
            gains = spectra.of(matrix.value, matrix.name, view.cut).gains(reduction).cpu()
            return self.views[view][matrix.name] @ (gains - 1)
        if reduction.is_ruled:
            removed = spectra.of(matrix.value, matrix.name, view.cut).removed(reduction)
        else:
            removed = reduction.removed(reduction.rank(matrix.max_rank), matrix.max_rank)
        tails = self._tails_of(view, matrix.name)
        gone = torch.zeros(self.batches, dtype=torch.float64)
        for start, stop in removed:
            gone += tails[:, start] - tails[:, stop]
        return (reduction.scale - 1) * gone

    def _tails_of(self, view: View, name: str) -> Tensor:
        """Of each batch the sums from each direction on to the last, shape (batches, min(m, n) + 1)."""
        if (view, name) not in self._tails:
            derivatives = self.views[view][name]
            tails = torch.zeros(len(derivatives), derivatives.shape[1] + 1, dtype=torch.float64)
            tails[:, :-1] = derivatives.flip(1).cumsum(1).flip(1)
            self._tails[view, name] = tails
        return self._tails[view, name]

    def _mean_and_error(self, changes: Sequence[float]) -> tuple[float, float]:
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


def derivatives(gradient: Tensor, matrix: Tensor, spectrum: Spectrum) -> Tensor:
    """The sensitivities d_i = sigma_i u_i' G v_i of a matrix.

    Args:
        gradient: dL/dW, shape (m, n).
        matrix: what was factorised, shape (m, n). The work is done in float64 if its dtype is float64, else in float32.
        spectrum: of ``matrix``.

    Returns:
        Float64 on the CPU, shape (min(m, n),).
    """
    work = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    w, g, basis = (x.to(work).to(matrix.device) for x in (matrix, gradient, spectrum.basis))
    # W - W_k is W projected on the tail of the shorter side's basis; so <G, W - W_k> is the sum over the tail of
    # v_i' G'W v_i, or of u_i' G W' u_i.
    inner = g.T @ w if w.shape[0] >= w.shape[1] else g @ w.T
    return (basis * (inner @ basis)).sum(0).cpu().double()


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
