"""A Trainer that says nothing about itself and leaves nothing behind: for runs inside of other work."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from laser_callback.passes.state import RandomState
from laser_callback.support.interrupts import closed, undisturbed, whole
from laser_callback.support.settings import ignoring


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies and devices under which the weights cannot be swapped."""
    strategy = trainer.strategy
    # By exact class: subclasses shard or live on devices whose parameters do not follow a pointer swap.
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise MisconfigurationException(
            f"rank reduction supports single devices and DDP, got {type(strategy).__name__}: parameters that are "
            "sharded or flattened do not follow a swap. Evaluate with `Trainer(devices=1)` or `strategy='ddp'`."
        )
    if strategy.root_device.type not in ("cpu", "cuda"):
        raise MisconfigurationException(
            f"rank reduction supports the CPU and CUDA devices, got {strategy.root_device.type!r}: its sums and "
            "factorisations need float64. Evaluate with `Trainer(accelerator='cpu')`."
        )


def accelerator_of(accelerator: str) -> str:
    """What is meant by "auto": CUDA where there is a device, else the CPU. Lightning would take Apple's GPU."""
    if accelerator != "auto":
        return accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_trainer(accelerator: str = "auto", **options: Any) -> AbstractContextManager[pl.Trainer]:
    """Within: a Trainer on one device, and Lightning introduces neither it nor itself.

    Ctrl-C comes out as KeyboardInterrupt, and may be struck again: Lightning exits the process at the first one, and
    has all further ones ignored. All other signals do what they do outside: Lightning waits with SIGTERM for a batch's
    end, forgets it at that of the last, and exits as if all were well.

    Args:
        accelerator: as in ``Trainer``, but "auto" takes CUDA or the CPU, and "cuda:1" names the device.
        **options: of ``Trainer``; by default it logs, saves and shows nothing.
    """
    name, _, index = accelerator_of(accelerator).partition(":")
    shows = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(shows, False), **options}
    with _quiet(None):
        trainer = pl.Trainer(accelerator=name, devices=[int(index)] if index else 1, **options)
        trainer._signal_connector = _NoHandlers()
    return _quiet(trainer)


@whole
def _quiet(trainer: Any) -> Generator[Any, None, None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    handler = signal.getsignal(signal.SIGINT)
    try:
        logger.setLevel(logging.WARNING)
        with ignoring(".*(does not have many workers|isinstance.treespec, LeafSpec)"):
            yield trainer
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        logger.setLevel(level)
        if handler not in (None, signal.SIG_IGN) and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)


class _NoHandlers:
    """In place of what sets Lightning's handlers of signals, and takes them away."""

    received_sigterm = False

    def register_signal_handlers(self) -> None:
        """As all others this does nothing."""

    def teardown(self) -> None:
        """Nothing."""


class PutBack(pl.Callback):
    """A callback for one validation, whose changes of the module are put back at its end, however that comes.

    A subclass appends to ``_undo`` what undoes each change, between ``opened(self)`` and ``catch_up()``.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []  # what puts back, the latest change last

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._put_back()

    @undisturbed
    def _put_back(self) -> None:
        """Put everything back. Each is forgotten only when it is done, so an interrupt loses none for the next call."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        closed(self)


@whole
def left_as_found(
    trainer: pl.Trainer, module: pl.LightningModule, callbacks: Sequence[pl.Callback]
) -> Generator[None, None, None]:
    """Around a run: the module is in the mode it was in, also where Lightning's loop has not come to its end.

    It has its gradients, too, which Lightning clears ahead of every loop.

    After an exception the generators are where they were, too: Lightning's `isolate_rng` does not see to that.

    Args:
        trainer: of the run.
        module: the module that it runs.
        callbacks: told of an exception, once more where the trainer has come to do so.
    """
    modes = [(part, part.training) for part in module.modules()]
    gradients, rng = torch.is_grad_enabled(), RandomState.now()
    of_parameters = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    try:
        yield
    except BaseException as error:
        rng.set()
        for callback in callbacks:
            callback.on_exception(trainer, module, error)
        raise
    finally:
        torch.set_grad_enabled(gradients)
        for part, mode in modes:
            part.training = mode
        for parameter, gradient in of_parameters:
            gradient.data = gradient.data.to(parameter.device)  # where Lightning has moved the module
            parameter.grad = gradient
