"""Put a plan into a live model and take it out again, bit for bit.

``with reduced(model, plan): ...`` is the one way in which this package changes weights. Inside of the block the planned
parameters point at reduced tensors; on the way out they point at their own storage again. No copy is made of the model
or of the original weights, no version counter moves, and an optimizer's state stays attached to the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.store import SIDE_BY_SIDE, Spectra


class reduced(AbstractContextManager["reduced"]):  # noqa: N801 - reads as a verb, like contextlib.suppress
    """Context in which ``model`` is reduced as ``plan`` says.

    The first entry factorises; the object can be entered again and then only swaps pointers. It cannot be entered while
    it is open. If the model's weights change between two entries, make a new object: the reduced tensors are those of
    the first entry.

    Args:
        model: any module, or the matrices that :func:`find_matrices` has found in it.
        plan: a :class:`LaserPlan`, or anything that :meth:`LaserPlan.of` takes.
        spectra: where factorisations are looked up and kept, for those who cut the same matrices again and again.

    Attributes:
        matrices: the planned matrices with their reductions, in the model's order.

    Raises:
        ValueError: if the plan does not fit the model, or weights are not finite. The model is then untouched.
        TypeError: if a weight is packed, sharded or without storage.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        >>> x = torch.ones(1, 3, 8)
        >>> with torch.no_grad():
        ...     before = model(x)
        ...     with reduced(model, "1.mlp@0.1, 0.q_proj@0.5"):
        ...         inside = model(x)
        ...     after = model(x)
        >>> torch.equal(before, inside), torch.equal(before, after)
        (False, True)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[WeightMatrix],
        plan: LaserPlan | str | Mapping[str, Any],
        spectra: Spectra | None = None,
    ) -> None:
        self.plan = LaserPlan.of(plan)
        self._spectra = spectra
        self.matrices: list[tuple[WeightMatrix, Reduction]] = self.plan.resolve(model)
        self._swaps: list[tuple[nn.Parameter, Tensor]] | None = None
        self._originals: list[tuple[nn.Parameter, Tensor]] = []

    def prepare(self) -> list[Tensor]:
        """Factorise now, unless that has been done. Returns the reduced tensors, one per changed parameter."""
        if self._swaps is None:
            with torch.no_grad():
                self._swaps = _reduced_parameters(self.matrices, self._spectra or Spectra())
        return [tensor for _, tensor in self._swaps]

    def forget(self) -> None:
        """Free the reduced tensors; the next entry makes them again, from the model's weights at that time."""
        if self._originals:
            raise RuntimeError("this reduction is in place; leave its `with` block before forgetting it")
        self._swaps = None

    def __enter__(self) -> reduced:
        if self._originals:
            raise RuntimeError("this reduction is already in place; leave its `with` block before entering it again")
        self.prepare()
        try:
            # One expression: once the call has returned, no signal can strike before `__exit__` is due.
            return self._swap_in()
        except BaseException:
            self.restore()
            raise

    def _swap_in(self) -> reduced:
        for parameter, tensor in self._swaps or []:
            # Remember first, then swap: an interrupt between the two lines restores a parameter to itself.
            self._originals.append((parameter, parameter.data))
            parameter.data = tensor
        return self

    def keep(self) -> None:
        """Leave the reduced weights in place for good; what was there is freed."""
        self._originals.clear()
        self._swaps = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.restore()
        except BaseException:  # Ctrl-C in the middle: finish, then let it through
            self.restore()
            raise

    def restore(self) -> None:
        """Put the original weights back. Does nothing when they are in place; goes on where an interrupt stopped it."""
        while self._originals:
            parameter, data = self._originals[-1]
            parameter.data = data
            self._originals.pop()


def _reduced_parameters(
    matrices: list[tuple[WeightMatrix, Reduction]], spectra: Spectra
) -> list[tuple[nn.Parameter, Tensor]]:
    """One reduced tensor per parameter that changes; several matrices of a fused parameter share it."""
    tensors: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for i, (matrix, reduction) in enumerate(matrices):
        if i % SIDE_BY_SIDE == 0:
            spectra.ahead(_factorised_whole(matrices[i : i + SIDE_BY_SIDE]))
        parameter = matrix.parameter
        if parameter.device.type == "meta":
            raise TypeError(_without_storage(matrix))
        # Normal tensors also inside of inference mode, since a later `fit` may run autograd while one is in place; for
        # a parameter that was itself made in inference mode, again such a tensor: torch cannot mix the two.
        with torch.inference_mode(parameter.is_inference()):
            original = matrix.value
            if spectra.changes_nothing(original, reduction, matrix.name):
                continue
            if id(parameter) not in tensors:
                tensors[id(parameter)] = parameter, parameter.data.clone(memory_format=torch.preserve_format)
            matrix.write(tensors[id(parameter)][1], spectra.reduce(original, reduction, matrix.name))
    return list(tensors.values())


def _factorised_whole(matrices: list[tuple[WeightMatrix, Reduction]]) -> list[tuple[Tensor, str]]:
    return [
        (matrix.value, matrix.name)
        for matrix, reduction in matrices
        if reduction.of == "rank" and reduction.blocks == 1 and 1 not in (reduction.rho, reduction.scale)
    ]


def _without_storage(matrix: WeightMatrix) -> str:
    if hasattr(matrix.module, "_hf_hook"):
        return (
            f"the weight of `{matrix.name}` is offloaded by accelerate, which brings it in only for its own forward: "
            "load the model without a `device_map` that offloads, or bring it back with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`"
        )
    return f"the weight of `{matrix.name}` is on the meta device: load it before cutting"
