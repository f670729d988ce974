"""What goes into each matrix: second moments of its inputs, from one pass over the screen set.

Contract: :class:`MomentsPass` is a Lightning callback for ``trainer.validate``. It changes nothing; afterwards the
module has no hook of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from typing_extensions import override

from laser_callback.compare.measure import Lab
from laser_callback.compare.trainer import PutBack
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.target import Target
from laser_callback.spectra.directions import InputDirections, input_directions
from laser_callback.spectra.spectrum import as_double
from laser_callback.support.interrupts import catch_up, opened, undisturbed

MOMENTS_BYTES = 2**31
"""So many bytes of second moments are held at a time."""


class MomentsPass(PutBack):
    """Sums of x x' over the inputs x of linear layers.

    Every position of every example counts, but for padding: what the ``attention_mask`` that a model of transformers is
    called with leaves out.

    Args:
        matrices: of which the inputs are wanted; those of one module (fused ones) share theirs.

    Attributes:
        moments: after ``trainer.validate()``: by name of a matrix its sum, float64, shape (n, n), on its device.
            Missing is a matrix whose module was not called with one tensor of its n features (experts in one tensor,
            torch's fused attention), or is more than one linear map (recurrent layers).
    """

    def __init__(self, matrices: Sequence[WeightMatrix]) -> None:
        super().__init__()
        self.moments: dict[str, Tensor] = {}
        self._wanted: dict[nn.Module, list[WeightMatrix]] = {}
        for matrix in matrices:
            # What goes into a module goes into its `weight`; what goes into `weight_hh_l0` it makes itself.
            if matrix.attribute == "weight" and matrix.parameter.ndim == 2:
                self._wanted.setdefault(matrix.module, []).append(matrix)
        self._mask: Tensor | None = None  # of the call under way, shape (examples, positions)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moments, self._mask = {}, None
        models = [module for module in pl_module.modules() if isinstance(module, PreTrainedModel)]
        inner = {part for model in models for part in model.modules() if part is not model}
        self._put_in([model for model in models if model not in inner])

    @undisturbed
    def _put_in(self, models: Sequence[nn.Module]) -> None:
        opened(self)
        for model in models:
            self._undo.append(model.register_forward_pre_hook(self._see, with_kwargs=True).remove)
        for module in self._wanted:
            self._undo.append(module.register_forward_pre_hook(partial(self._add, self._wanted[module])).remove)
        catch_up()

    def _see(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @torch.no_grad()
    def _add(self, matrices: Sequence[WeightMatrix], module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = inputs[0] if len(inputs) == 1 else None
        features = matrices[0].shape[1]
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape[-1] != features:
            return
        rows = given.detach()
        if self._mask is not None and rows.shape[:-1] == self._mask.shape:
            rows = rows[self._mask.to(rows.device, torch.bool)]
        rows = as_double(rows).reshape(-1, features)
        product = rows.T @ rows
        for matrix in matrices:  # of one module: they share the tensor
            if matrix.name in self.moments:
                if matrix is matrices[0]:
                    self.moments[matrix.name] += product
            else:
                self.moments[matrix.name] = self.moments.get(matrices[0].name, product)


def input_directions_of(lab: Lab, targets: Sequence[Target], loader: DataLoader[Any]) -> InputDirections:
    """The directions of each matrix in the metric of its inputs, as far as these were seen.

    One part of the model after the other, so that no more than :data:`MOMENTS_BYTES` of moments are held at a time.
    """
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    matrices = [matrix for target in targets for matrix in target.matrices]
    for part in _in_parts(matrices):
        seen = MomentsPass(part)
        lab.validate(loader, seen)
        for matrix in part:
            if matrix.name in seen.moments:
                moments = seen.moments[matrix.name]
                found[matrix.name, "weight"] = input_directions(matrix.value.to(moments.device), moments, matrix.name)
    return InputDirections(found)


def _in_parts(matrices: Sequence[WeightMatrix]) -> list[list[WeightMatrix]]:
    parts: list[list[WeightMatrix]] = []
    room = 0
    for matrix in matrices:
        needed = 8 * matrix.shape[1] ** 2
        if not parts or needed > room:
            parts.append([])
            room = MOMENTS_BYTES
        parts[-1].append(matrix)
        room -= needed
    return parts
