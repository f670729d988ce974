"""One backward pass that serves every candidate: how the loss answers to each singular direction of each matrix.

Contract: :class:`GradientScreen` is a Lightning callback for ``trainer.validate``. It takes the loss of the user's own
validation step, runs it backwards, and leaves in ``sensitivities`` what tells how the mean loss changes under a plan:
lower is better. Afterwards the module is as before: weights, ``requires_grad``, ``.grad`` and hooks.

A linear layer gives the factors of its weight's gradient, which itself is never made (``passes/outer.py``). Of what
else there is, each parameter is read inside the gradient's own hook and its gradient dropped. So beside the model and
the activations of one batch only one gradient and one factorisation are in memory, whatever the number of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from laser_callback.compare.measure import Lab
from laser_callback.compare.trainer import PutBack
from laser_callback.passes.copies import copy_batch
from laser_callback.passes.outer import Outer, is_plain, watch
from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.selection import Catalogue
from laser_callback.results.returned import ORIGINAL, read_returned
from laser_callback.search.sensitivities import Factor, Sensitivities, View, Views, in_parts, prepared
from laser_callback.search.strategies.wide import Key, bytes_of, count_of, promising, wide
from laser_callback.spectra.leading import leading
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Outcomes
from laser_callback.support.interrupts import catch_up, opened, undisturbed

LossFn = Callable[[pl.LightningModule, Any], Tensor]
ENOUGH = 0.2
"""Share of the leading directions asked for that must be found, or a matrix is factorised whole."""


class GradientScreen(PutBack):
    """The estimated change of the loss under any plan, from one backward pass per batch.

    The step runs with gradients on, as in training but in eval mode. A step that cannot (it calls ``.numpy()`` on what
    depends on weights, say) runs as usual when ``loss`` is given, which then has a forward pass of its own.

    Args:
        matrices: what plans may cut, of those that :func:`~laser_callback.plans.find_matrices` finds in the module that
            is validated; or those of which each view is wanted.
        spectra: asked once per matrix and batch. It should keep what it has factorised (on disk, or in a memory that
            holds all of the model's spectra) where there is more than one batch.
        loss: function of the module and a batch that returns the loss: a scalar, or one number per example. By
            default it is what the step returns: a scalar, or in a mapping under ``loss``, ``key`` or ``log_loss`` a
            scalar, a 1-D tensor or :class:`~laser_callback.stats.Outcomes`.
        key: a name under which the step returns its loss.
        in_part: by view and name, the matrices of which only the leading directions are factorised.

    Attributes:
        sensitivities: what :meth:`estimate` follows from; empty before ``trainer.validate()``.
        coordinates: of those in part what they do in each coordinate of their shorter side, (batches, min(m, n)).

    Raises:
        MisconfigurationException: outside of ``trainer.validate``, under inference mode, on several devices, or if
            there is no loss with a gradient.
        ValueError: if a loss or gradient is not finite, or there is no batch.

    Example::

        screen = GradientScreen(find_matrices(module), Spectra())
        Trainer(inference_mode=False, devices=1, callbacks=[screen]).validate(module, loader)
        change, standard_error = screen.estimate("27.fc_in@0.01")
    """

    def __init__(
        self,
        matrices: Sequence[WeightMatrix] | Views,
        spectra: Spectra,
        *,
        loss: LossFn | None = None,
        key: str = "loss",
        in_part: Collection[Key] = (),
    ) -> None:
        super().__init__()
        self.sensitivities = Sensitivities()
        self.coordinates: dict[Key, Tensor] = {}
        self._in_part = in_part
        self._wanted = matrices if isinstance(matrices, Mapping) else {View(): matrices}
        self._spectra = spectra
        self._loss = loss
        self._key = key
        self._grad_mode = False
        self._under_way = False  # the backward pass

    def estimate(self, plan: LaserPlan | str) -> tuple[float, float] | None:
        """The estimated change of the mean loss over examples under ``plan``, and its standard error.

        Returns:
            ``None`` if the plan cuts what the pass has not looked at, or in another way than by singular directions.
            The standard error is from the variance between batches: 0 where there is one batch only.
        """
        cuts = LaserPlan.of(plan).resolve(self._matrices)
        return self.sensitivities.estimate(cuts, self._spectra)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "validate":
            raise MisconfigurationException(f"GradientScreen runs in `trainer.validate`, not in {stage!r}")
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"GradientScreen runs on one device, got {trainer.world_size}: use Trainer(devices=1)"
            )
        self._put_back()
        # Now, since Lightning clears the gradients ahead of its loop.
        self._undo += [partial(_set_gradient, p, p.grad) for p in pl_module.parameters() if p.grad is not None]

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.is_inference_mode_enabled():
            raise MisconfigurationException("GradientScreen needs gradients: use Trainer(inference_mode=False)")
        self.sensitivities, self.coordinates = Sensitivities(), {}
        self._matrices = Catalogue(find_matrices(pl_module))
        self._batches: list[dict[tuple[View, str], Tensor]] = [{}]  # the last one is under way
        self._weights: list[float] = []
        self._places: dict[int, dict[tuple[View, str], WeightMatrix]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for view, matrices in self._wanted.items():
            for matrix in matrices:
                if matrix.parameter.is_inference():
                    raise MisconfigurationException(
                        f"`{matrix.name}` was made under torch.inference_mode and cannot have a gradient: load the "
                        "model outside of it"
                    )
                self._places.setdefault(id(matrix.parameter), {})[view, matrix.name] = matrix
                parameters[id(matrix.parameter)] = matrix.parameter
        wanted = {key: matrix for places in self._places.values() for key, matrix in places.items()}
        # No weight changes here: what memory has room for is not looked up by its content again in every batch.
        self._found: dict[tuple[View, str], list[Factor]] = {}
        needed = sum(bytes_of(key, matrix, self._in_part) for key, matrix in wanted.items())
        self._keeps = needed <= self._spectra.memory_bytes
        one = [(view, m) for (view, name), m in wanted.items() if view in (View(), View("delta"))]
        self._spectra.ahead([(m.value, m.name, view.cut) for view, m in one if (view, m.name) not in self._in_part])
        self._put_in(pl_module, parameters)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._grad_mode = torch.is_grad_enabled()
        if self._loss is None:
            torch.set_grad_enabled(True)
            return
        # Ahead of the step, which may edit the batch.
        with torch.enable_grad(), trainer.precision_plugin.val_step_context():
            found = self._loss(pl_module, copy_batch(batch))
        self._pending = self._backward(found, "`screen_loss`")

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        torch.set_grad_enabled(self._grad_mode)
        weight = self._pending if self._loss is not None else self._backward(*returned_loss(outputs, self._key))
        if weight is None:
            weight = float(read_returned({ORIGINAL: outputs}, batch).size)
        self._weights.append(weight)
        self._batches.append({})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()
        self._found.clear()
        if not self._weights:
            raise ValueError("the screen set has no batch")
        batches = self._batches[:-1]
        reached = dict.fromkeys(key for batch in batches for key in batch)
        wanted = {key: matrix for places in self._places.values() for key, matrix in places.items()}
        views: dict[View, dict[str, Tensor]] = {}
        heads: dict[View, dict[str, Tensor]] = {}
        for view, name in dict.fromkeys([*reached, *wanted]):
            size = sum(view.sizes(wanted[view, name].shape))
            each = [batch.get((view, name)) for batch in batches]
            none = torch.zeros(max((len(of) for of in each if of is not None), default=size), dtype=torch.float64)
            found = torch.stack([none if of is None else of for of in each])
            if (known := found.shape[1] - size) > 0:
                found, self.coordinates[view, name] = found[:, :known], found[:, known:]
                rest = self.coordinates[view, name].sum(1, keepdim=True) - found.sum(1, keepdim=True)
                heads.setdefault(view, {})[name] = torch.cat([found, rest], 1)
            else:
                views.setdefault(view, {})[name] = found
        self.sensitivities = Sensitivities(self._weights, views, heads)
        names = list(dict.fromkeys(name for _, name in wanted))
        missed = [name for name in names if not any(name == of for _, of in reached)]
        if missed:
            shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
            rank_zero_warn(
                f"no gradient reached {len(missed)} of {len(names)} matrices, whose cuts score 0: {shown}. Either the "
                "loss does not depend on them, and `within` can leave them out, or they run under no_grad or reentrant "
                "checkpointing"
            )

    # ---- details ----------------------------------------------------------------------------------------------------

    @undisturbed
    def _put_in(self, module: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
        opened(self)
        for parameter in module.parameters():
            self._undo.append(partial(_set_flag, parameter, parameter.requires_grad))
            parameter.requires_grad_(id(parameter) in parameters)
        for parameter in parameters.values():
            self._undo.append(parameter.register_post_accumulate_grad_hook(self._drop).remove)
        layers = [layer for layer in module.modules() if is_plain(layer) and id(layer.weight) in parameters]
        watched = watch(layers, self._take)
        watched.__enter__()
        self._undo.append(partial(watched.__exit__, None, None, None))
        catch_up()

    def _backward(self, value: Any, source: str) -> float | None:
        """Run the loss backwards. Returns the weight of the batch, or ``None`` where it is the number of examples."""
        with torch.enable_grad():
            loss, weight = _mean_loss(value, source)
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"the loss from {source} has no gradient: it is detached, made under no_grad, or depends on no target. "
                f"{_CURE}"
            )
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss from {source} is {float(loss.detach())} on a batch of the screen set")
        self._under_way = True
        try:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        finally:
            self._under_way = False
        return weight

    def _drop(self, parameter: Tensor) -> None:
        """Gradient hook: read what the matrices of a parameter are worth, and drop its gradient."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # else a layer has given it away
            self._collect(parameter, gradient if gradient.layout == torch.strided else gradient.to_dense())

    def _take(self, parameter: nn.Parameter, gradient: Outer) -> bool:
        """The same where a linear layer gives the factors of its weight's gradient; refused is what a step asks for."""
        if self._under_way:
            self._collect(parameter, gradient)
        return self._under_way

    @torch.no_grad()
    def _collect(self, parameter: Tensor, gradient: Tensor | Outer) -> None:
        batch = self._batches[-1]
        for (view, name), matrix in self._places[id(parameter)].items():
            weight = matrix.read(parameter.data)
            factors = self._found.get((view, name))
            if factors is None:
                factors = [prepared(factor, weight) for factor in self._factors(view, name, matrix, weight)]
                if self._keeps:
                    self._found[view, name] = factors
            of_matrix = gradient.of(matrix) if isinstance(gradient, Outer) else matrix.read(gradient)
            found = view.derivatives(of_matrix, weight, name, self._spectra, factors)
            if not bool(found.isfinite().all()):
                raise ValueError(f"the gradient of `{name}` holds NaN or infinite values")
            batch[view, name] = batch[view, name] + found if (view, name) in batch else found

    def _factors(self, view: View, name: str, matrix: WeightMatrix, weight: Tensor) -> Sequence[Factor]:
        """The leading directions where no more is wanted, and as many are found as the smallest cut leaves."""
        if (view, name) in self._in_part:
            operand = self._spectra.operand(weight, name, view.cut)
            found = leading(operand, count_of(matrix.shape), name)
            if found is not None and len(found.values) >= count_of(matrix.shape) * ENOUGH:
                return [found]
        return view.factors(weight, name, self._spectra)


def sense(
    lab: Lab, wanted: Views, loader: DataLoader[Any], *, loss: LossFn | None = None, key: str = "loss"
) -> Sensitivities:
    """Run :class:`GradientScreen` over a loader, and once more for what is factorised whole after all.

    Where all factors are more than can be kept from one batch to the next, one part of the model after the other is
    looked at: passes over a hundred examples are cheaper than to factorise again for every batch.
    """
    coordinates: dict[Key, Tensor] = {}

    def passes(wanted: Views, in_part: Collection[Key] = ()) -> list[Sensitivities]:
        found = []
        capacity = lab.spectra.memory_bytes if in_part else lab.spectra.capacity
        parts = in_parts(wanted, capacity, lambda view, m: bytes_of((view, m.name), m, in_part))
        for part in parts if len(loader) > 1 else [wanted]:
            screen = GradientScreen(part, lab.spectra, loss=loss, key=key, in_part=in_part)
            lab.validate(loader, screen, inference_mode=False)
            found.append(screen.sensitivities)
            coordinates.update(screen.coordinates)
        return found

    found = passes(wanted, wide(wanted))
    if coordinates:
        picked = promising(wanted, Sensitivities.join(found), coordinates)
        coordinates.clear()
        found += passes(picked)
    return Sensitivities.join(found)


_CURE = (
    "Let `validation_step` return its loss (a scalar, or a mapping with `loss`, or with what `loss=` names, one number "
    "per example), or give `screen_loss=`, a function of the module and a batch"
)


def returned_loss(outputs: Any, key: str) -> tuple[Any, str]:
    """The loss in what a validation step returned, and its name for messages.

    Raises:
        MisconfigurationException: if there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs, "the validation step"
    if isinstance(outputs, Mapping):
        for name in dict.fromkeys(("loss", key, "log_loss")):
            if outputs.get(name) is not None:
                return outputs[name], f"`{name}` of the validation step"
        returned = f"a mapping with {', '.join(map(repr, outputs)) or 'no keys'}"
    else:
        returned = "nothing" if outputs is None else f"a {type(outputs).__name__}"
    raise MisconfigurationException(f"the screen has no loss: the validation step returned {returned}. {_CURE}")


def _mean_loss(value: Any, source: str) -> tuple[Tensor, float | None]:
    """The mean loss of a batch, and the weight that it stands for if its values say so."""
    weights = None
    if isinstance(value, Outcomes):
        present = ~torch.isnan(value.values)  # NaN means that the example has no such outcome
        weights = None if value.weights is None else value.weights[present]
        value = value.values[present] if bool(present.any()) else value.values
    if not isinstance(value, Tensor) or not value.is_floating_point() or (value.ndim != 1 and value.numel() != 1):
        shape = f" of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise MisconfigurationException(
            f"the loss from {source} must be a scalar or one number per example, got {type(value).__name__}{shape}. "
            f"{_CURE}"
        )
    if value.numel() == 1 and weights is None:
        return value.reshape(()), None
    if len(value) == 0:
        raise ValueError(f"the loss from {source} is empty on a batch of the screen set")
    weights = torch.ones_like(value) if weights is None else weights.to(value)
    return (value * weights).sum() / weights.sum(), float(weights.detach().sum())


def _set_flag(parameter: nn.Parameter, requires_grad: bool) -> None:
    parameter.grad = None  # of a backward pass that was interrupted
    parameter.requires_grad_(requires_grad)


def _set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient.data = gradient.data.to(parameter.device)  # where Lightning has moved the module
    parameter.grad = gradient
