"""Score every candidate cut by one backward pass: which are worth a race.

Contract: :class:`GradientScreen` is a Lightning callback for ``trainer.validate``. It takes the loss of the user's own
validation step, runs it backwards, and leaves in ``scores`` an estimate of how the mean loss changes under every cut:
lower is better. Afterwards the module is as before: weights, ``requires_grad``, ``.grad`` and hooks.

With W = sum_i sigma_i u_i v_i' and G = dL/dW, keeping the first k singular directions changes the loss, to first order,
by <G, W_k - W> = -sum_{i > k} d_i with d_i = sigma_i u_i' G v_i: one gradient and one factorisation serve every rho.
Inside the gradient's own hook each parameter is scored and its gradient dropped, so that beside the model and the
activations of one batch only one gradient and one factorisation are in memory, whatever the number of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from laser_callback.passes.copies import copy_batch
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target
from laser_callback.results.returned import ORIGINAL, read_returned
from laser_callback.search.candidates import grid
from laser_callback.spectra.folder import size_for
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Outcomes
from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed

LossFn = Callable[[pl.LightningModule, Any], Tensor]


class GradientScreen(pl.Callback):
    """Estimated change of the loss under every cut, from one backward pass per batch.

    The step runs with gradients on, as in training but in eval mode. A step that cannot (it calls ``.numpy()`` on what
    depends on weights, say) runs as usual when ``loss`` is given, which then has a forward pass of its own.

    Args:
        targets: what may be cut.
        rhos: at which each target is scored; those that keep the whole rank are left out, as in
            ``candidates.grid``.
        spectra: asked once per matrix and batch. It should keep what it has factorised (on disk, or in a memory that
            holds all of the model's spectra) where there is more than one batch.
        loss: function of the module and a batch that returns the loss: a scalar, or one number per example. By
            default it is what the step returns: a scalar, or in a mapping under ``loss``, ``key`` or ``log_loss`` a
            scalar, a 1-D tensor or :class:`~laser_callback.stats.Outcomes`.
        key: a name under which the step returns its loss.

    Attributes:
        scores: after ``trainer.validate()``: each candidate's estimated change of the mean loss over examples.
        errors: standard errors of these, from the variance between batches; 0 where there is one batch only. Half the
            mean square over examples of <G_n, W_k - W> in their place (the empirical Fisher matrix for the Hessian)
            lost the best cut on the benchmark.

    Raises:
        MisconfigurationException: outside of ``trainer.validate``, under inference mode, on several devices, or if
            there is no loss with a gradient.
        ValueError: if a loss or gradient is not finite, or there is no batch.

    Example::

        screen = GradientScreen(targets(module), RHOS, Spectra())
        Trainer(inference_mode=False, devices=1, callbacks=[screen]).validate(module, loader)
        best = min(screen.scores, key=screen.scores.get)
    """

    def __init__(
        self,
        targets: Sequence[Target],
        rhos: Sequence[float],
        spectra: Spectra,
        *,
        loss: LossFn | None = None,
        key: str = "loss",
    ) -> None:
        self.scores: dict[Reduction, float] = {}
        self.errors: dict[Reduction, float] = {}
        self._reductions: list[Reduction] = []
        self._cuts: list[tuple[Target, slice]] = []  # a target's reductions are this part of all
        for target in targets:
            begin = len(self._reductions)
            self._reductions += [candidate.reduction for candidate in grid([target], rhos)]
            self._cuts.append((target, slice(begin, len(self._reductions))))
        self._spectra = spectra
        self._loss = loss
        self._key = key
        self._undo: list[Callable[[], Any]] = []  # what puts back, the latest change last
        self._grad_mode = False

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
        self.scores, self.errors = {}, {}
        self._reached: set[str] = set()
        self._batch = self._zeros()
        self._sum, self._square, self._weight, self._batches = self._zeros(), self._zeros(), 0.0, 0
        self._places: dict[int, list[tuple[slice, WeightMatrix]]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for target, part in self._cuts:
            for matrix in target.matrices:
                if matrix.parameter.is_inference():
                    raise MisconfigurationException(
                        f"`{matrix.name}` was made under torch.inference_mode and cannot have a gradient: load the "
                        "model outside of it"
                    )
                self._places.setdefault(id(matrix.parameter), []).append((part, matrix))
                parameters[id(matrix.parameter)] = matrix.parameter
        wanted = [matrix for places in self._places.values() for _, matrix in places]
        cut = self._reductions[0].cut if self._reductions else "weight"
        self._spectra.ahead([(matrix.value, matrix.name, cut) for matrix in wanted])
        # No weight changes here: what memory has room for is not looked up by its content again in every batch.
        self._found: dict[str, Spectrum] = {}
        self._keeps = sum(size_for(matrix.shape) for matrix in wanted) <= self._spectra.memory_bytes
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
        self._sum += weight * self._batch
        self._square += weight * self._batch**2
        self._weight += weight
        self._batches += 1
        self._batch = self._zeros()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()
        self._found.clear()
        mean, error = self._estimate()
        self.scores = dict(zip(self._reductions, mean.tolist(), strict=True))
        self.errors = dict(zip(self._reductions, error.tolist(), strict=True))
        names = [matrix.name for places in self._places.values() for _, matrix in places]
        missed = [name for name in names if name not in self._reached]
        if missed:
            shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
            rank_zero_warn(
                f"no gradient reached {len(missed)} of {len(names)} matrices, whose cuts score 0: {shown}. Either the "
                "loss does not depend on them, and `within` can leave them out, or they run under no_grad or reentrant "
                "checkpointing"
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._put_back()

    # ---- details ----------------------------------------------------------------------------------------------------

    @undisturbed
    def _put_in(self, module: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
        opened(self)
        for parameter in module.parameters():
            self._undo.append(partial(_set_flag, parameter, parameter.requires_grad))
            parameter.requires_grad_(id(parameter) in parameters)
        for parameter in parameters.values():
            self._undo.append(parameter.register_post_accumulate_grad_hook(self._collect).remove)
        catch_up()

    @undisturbed
    def _put_back(self) -> None:
        """Put everything back. Each is forgotten only when it is done, so an interrupt loses none for the next call."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        closed(self)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._reductions), dtype=torch.float64)

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
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        return weight

    @torch.no_grad()
    def _collect(self, parameter: Tensor) -> None:
        """Gradient hook: score the matrices of a parameter, and drop its gradient."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradient = gradient if gradient.layout == torch.strided else gradient.to_dense()
        for part, matrix in self._places[id(parameter)]:
            weight = matrix.read(parameter.data)
            ranks = [reduction.rank(matrix.max_rank) for reduction in self._reductions[part]]
            cut = self._reductions[part][0].cut
            spectrum = self._found.get(matrix.name) or self._spectra.of(weight, matrix.name, cut)
            if self._keeps:
                self._found[matrix.name] = spectrum
            operand = self._spectra.operand(weight, matrix.name, cut)
            changes = loss_changes(matrix.read(gradient), operand, spectrum, ranks)
            if not bool(changes.isfinite().all()):
                raise ValueError(f"the gradient of `{matrix.name}` holds NaN or infinite values")
            self._batch[part] += changes
            self._reached.add(matrix.name)

    def _estimate(self) -> tuple[Tensor, Tensor]:
        """Each candidate's mean change and its standard error."""
        if self._batches == 0:
            raise ValueError("the screen set has no batch")
        mean = self._sum / self._weight
        # A batch of w examples has the variance of one example divided by w.
        variance = (self._square - self._weight * mean**2).clamp_min(0) / max(self._batches - 1, 1)
        return mean, (variance / self._weight).sqrt() * (self._batches > 1)


def loss_changes(gradient: Tensor, matrix: Tensor, spectrum: Spectrum, ranks: Sequence[int]) -> Tensor:
    """First-order change of the loss when ``matrix`` is cut to each rank: <G, W_k - W>.

    Args:
        gradient: dL/dW, shape (m, n).
        matrix: W, shape (m, n). The work is done in float64 if its dtype is float64, else in float32.
        spectrum: of ``matrix``.
        ranks: each k, from 0 to min(m, n).

    Returns:
        Float64 on the CPU, shape (len(ranks),).
    """
    work = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    w, g, basis = (x.to(work).to(matrix.device) for x in (matrix, gradient, spectrum.basis))
    # W - W_k is W projected on the tail of the shorter side's basis; so <G, W - W_k> is the sum over the tail of
    # v_i' G'W v_i, or of u_i' G W' u_i.
    inner = g.T @ w if w.shape[0] >= w.shape[1] else g @ w.T
    derivatives = (basis * (inner @ basis)).sum(0).cpu().double()
    tails = torch.zeros(len(derivatives) + 1, dtype=torch.float64)
    tails[:-1] = derivatives.flip(0).cumsum(0).flip(0)
    return -tails[list(ranks)]


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
