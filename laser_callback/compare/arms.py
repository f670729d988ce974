"""Run a user's evaluation step twice on one batch without the two runs seeing each other.

The user's own pass runs untouched. Everything that a second pass would write to is given to it as a copy of its own and
taken away again afterwards: Lightning's logged results, bookkeeping and loggers (:class:`Arm`), and whatever the module
keeps (:class:`~laser_callback.passes.state.Own`).

This file is the one place that knows Lightning's private names; ``tests/compare/test_arms.py`` checks them against the
installed version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from laser_callback.passes.silent import Instead, silent
from laser_callback.passes.state import Own, Start
from laser_callback.passes.watch import WritesRefused
from laser_callback.passes.windows import Windows
from laser_callback.results.examples import Logged
from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed, whole
from laser_callback.support.settings import ignoring


class _OfLightning(AbstractContextManager[None]):
    """What one arm has instead of the trainer's own: its results, its bookkeeping, and loggers that tell nobody."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self.results = _ResultCollection(training=False)
        self.connector = _LoggerConnector(trainer)
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
            setattr(self.connector, name, dict(getattr(trainer._logger_connector, name)))
        self.loggers = [silent(logger) for logger in trainer.loggers]
        self._mine: list[Any] = [self.connector, self.results, self.loggers, _save_nothing, None]
        self._before: list[Any] = []  # empty unless in place

    @undisturbed
    def __enter__(self) -> None:
        opened(self, partial(_put, self._trainer, self._module, self._before))
        trainer = self._trainer
        self._before += trainer._logger_connector, trainer._evaluation_loop._results, trainer.loggers
        self._before += vars(trainer).get("save_checkpoint"), self._module._current_fx_name
        _put(trainer, self._module, self._mine)
        catch_up()

    @undisturbed
    def __exit__(self, *_: object) -> None:
        _put(self._trainer, self._module, self._before)
        self._before.clear()
        closed(self)

    @undisturbed
    def suspend(self) -> None:
        """Make room for a signal handler."""
        if self._before:
            self._mine[-1] = self._module._current_fx_name
        _put(self._trainer, self._module, self._before)

    @undisturbed
    def resume(self) -> None:
        """End what :meth:`suspend` began."""
        _put(self._trainer, self._module, self._mine if self._before else [])


def _put(trainer: pl.Trainer, module: pl.LightningModule, values: list[Any]) -> None:
    if len(values) < 5:  # not all were remembered
        return
    trainer._logger_connector, trainer._evaluation_loop._results, trainer.loggers, save, module._current_fx_name = (
        values
    )
    if save is None:
        vars(trainer).pop("save_checkpoint", None)
    else:
        vars(trainer)["save_checkpoint"] = save


def _save_nothing(*_: Any, **__: Any) -> None:
    """In place of ``trainer.save_checkpoint``: the original's own hook has saved what is to be saved."""


class Arm:
    """One reduced arm of a running evaluation loop: the user's hooks, with Lightning's arithmetic on separate results.

    Args:
        trainer: with an evaluation loop that has just started.
        module: the user's module.
        stage: ``"validation"`` or ``"test"``, as in the names of the hooks.
        start: what the arm's steps may write to.
        windows: what others write between the module's hooks.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: str, start: Start, windows: Windows
    ) -> None:
        self._trainer = trainer
        self.module = module
        self._stage = stage
        self._windows = windows
        self._lightning = _OfLightning(trainer, module)
        self._own = Own(start, Instead(self._lightning.loggers) if trainer.loggers else None)
        self._dataloader_idx: int | None = None
        self.hook = ""  # the latest that was called
        self.has_started = False  # with hooks of the module's own
        self.results = self._lightning.results
        self._connector = self._lightning.connector

    def beginner(self) -> Arm:
        """An arm that starts where this one has started."""
        return Arm(self._trainer, self.module, self._stage, self._own.start, self._windows)

    def twin(self) -> Arm:
        """Within :meth:`active`: an arm inside of this one, which starts where this one is, and leaves it there."""
        twin = Arm(self._trainer, self.module, self._stage, self._own.start.again(), self._windows)
        twin._dataloader_idx = self._dataloader_idx
        return twin

    @whole
    def active(self) -> Generator[None, None, None]:
        """Within: the module and the trainer hold what is this arm's."""
        self._own.start.refuse_cut()
        with self._own, self._lightning:
            yield

    def start(self) -> None:
        """The module's hooks at the start of an evaluation. This and what follows: within :meth:`active`."""
        self.has_started = True
        with WritesRefused(self.module):
            for hook in (f"on_{self._stage}_start", f"on_{self._stage}_epoch_start"):
                self._hook(hook)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> Any:
        """The module's hooks and its step on one batch, through the strategy (autocast and wrappers apply)."""
        loop = self._trainer._evaluation_loop
        kwargs = loop._build_kwargs(batch, batch_idx, dataloader_idx)
        if self._dataloader_idx is not None and dataloader_idx != self._dataloader_idx:
            self._close_dataloader()
        self._dataloader_idx = dataloader_idx
        self._connector.on_batch_start(batch, dataloader_idx)
        self._hook(f"on_{self._stage}_batch_start", *kwargs.values())
        self.hook = name = f"{self._stage}_step"
        self.module._current_fx_name = name
        output = getattr(self._trainer.strategy, name)(*loop._build_step_args_from_hook_kwargs(kwargs, name))
        self._hook(f"on_{self._stage}_batch_end", output, *kwargs.values())
        self._connector.on_batch_end()
        return output

    def end(self) -> dict[str, Logged]:
        """The module's hook at the end of the epoch. Returns what this arm logged per epoch."""
        self._close_dataloader()
        self._connector._evaluation_epoch_end()
        with WritesRefused(self.module):
            self._hook(f"on_{self._stage}_epoch_end")
        self._connector.on_epoch_end()
        return logged(self.results)

    def _close_dataloader(self) -> None:
        self._connector.epoch_end_reached()
        self._connector.update_eval_epoch_metrics()

    def _hook(self, name: str, *args: Any) -> None:
        self.hook = name
        self._windows.repeat(name)
        self.module._current_fx_name = name
        getattr(self.module, name)(*args)


def _by_key(results: _ResultCollection) -> dict[str, Any]:
    """What has been logged per epoch so far, under the key that ``trainer.validate()`` returns it.

    Each dataloader has a dictionary of its own there, so that two of them may share a key: here the later one has its
    index behind it.
    """
    items: dict[str, Any] = {}
    for item in results.values():
        if item.has_reset or not item.meta.on_epoch:
            continue
        _, key = results._forked_name(item, on_step=False)
        index = item.meta.dataloader_idx
        if key in items and index is not None and items[key].meta.dataloader_idx not in (None, index):
            key += results.DATALOADER_SUFFIX.format(index)
        items[key] = item
    return items


def logged(results: _ResultCollection) -> dict[str, Logged]:
    """Everything in ``results`` that was logged per epoch, by key."""
    values: dict[str, Logged] = {}
    for key, item in _by_key(results).items():
        value = results._get_cache(item, on_step=False)
        if isinstance(value, Tensor):
            short, long = results._forked_name(item, on_step=False)
            meta = item.meta
            also = short if short != long else None
            better = None if item.is_tensor else item.value.higher_is_better
            values[key] = Logged(
                value.detach().clone(), meta.name, meta.dataloader_idx, also, meta.logger, meta.prog_bar, better
            )
    return values


def logged_metrics(results: _ResultCollection) -> dict[str, Metric]:
    """The torchmetrics objects that were logged per epoch themselves, by key."""
    return {key: item.value for key, item in _by_key(results).items() if not item.is_tensor}


def logged_on_step_only(results: _ResultCollection) -> list[str]:
    """Names that were logged per step and not per epoch: there is no epoch value to compare."""
    return sorted({item.meta.name for item in results.values() if not item.has_reset and not item.meta.on_epoch})


def logged_keys(results: _ResultCollection) -> list[str]:
    """The keys of what has been logged per epoch so far, each once; nothing is computed for it."""
    return list(_by_key(results))


def running_means(results: _ResultCollection) -> dict[str, tuple[float, float]]:
    """(weighted sum, weight) so far of each value that Lightning averages over batches, by key."""
    return {
        key: (float(item.value), float(item.cumulated_batch_size))
        for key, item in _by_key(results).items()
        if item.is_tensor and item.meta.is_mean_reduction
    }


def growth(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """What one batch has added to :func:`running_means`."""
    zero = (0.0, 0.0)
    return {key: (s - before.get(key, zero)[0], w - before.get(key, zero)[1]) for key, (s, w) in after.items()}


def others_keys(trainer: pl.Trainer, key_prefix: str) -> tuple[str, ...]:
    """How the keys begin that the other LaserCallbacks of this trainer publish."""
    prefixes = {getattr(other, "key_prefix", key_prefix) for other in trainer.callbacks}
    return tuple(f"{prefix}/" for prefix in prefixes - {key_prefix})


def own_logged(metrics: MetricCollection | None, taken: Collection[str] = ()) -> dict[str, Logged]:
    """What the metrics of :class:`LaserCallback` itself have found, as if the module had logged them."""
    if metrics is None:
        return {}
    directions = {name: metric.higher_is_better for name, metric in metrics.items()}
    values = {name: torch.as_tensor(value) for name, value in metrics.compute().items()}
    for name, value in values.items():
        if name in taken:
            raise MisconfigurationException(f"`metrics` has the name {name!r}, which the module logs itself")
        if value.numel() != 1:
            raise MisconfigurationException(
                f"`metrics` must compute one number each, or a mapping of them, but {name!r} is of shape "
                f"{tuple(value.shape)}: average it, or wrap it in torchmetrics.ClasswiseWrapper"
            )
    return {name: Logged(value, name, None, None, True, False, directions.get(name)) for name, value in values.items()}


def publish(trainer: pl.Trainer, module: pl.LightningModule, name: str, value: Tensor, like: str, meta: Logged) -> None:
    """Log ``value`` where the user's key ``like`` goes. To be called within ``on_*_epoch_end``.

    Lightning has closed each dataloader's results by then and would put a late key into every dataloader's dictionary;
    a key that belongs to one dataloader is therefore added beside the user's own.
    """
    if trainer.barebones:  # keeps nothing that is logged
        return
    connector = trainer._logger_connector
    if meta.also is not None:
        connector._callback_metrics[name.removesuffix(like) + meta.also] = value
    if meta.dataloader_idx is None:
        # Lightning warns about keys without a logger or synchronisation; of the user's own it has said so.
        with ignoring(".*(but have no logger configured|sync_dist=True)"):
            module.log(name, value, logger=meta.logger, prog_bar=meta.prog_bar, add_dataloader_idx=False, batch_size=1)
            results = trainer._results
            assert results is not None
            # The warning about synchronisation comes when the value is computed; it is kept from then on.
            results._get_cache(results[f"{module._current_fx_name}.{name}"], on_step=False)
        return
    connector._callback_metrics[name] = value
    if meta.logger:
        connector._logged_metrics[name] = value
        shared = like.removesuffix(_ResultCollection.DATALOADER_SUFFIX.format(meta.dataloader_idx))
        for index, outputs in enumerate(trainer._evaluation_loop._logged_outputs):
            if like in outputs:
                outputs[name] = value
            elif shared in outputs and index == meta.dataloader_idx:
                outputs[name.removesuffix(like) + shared] = value


def uses_dataloader_iter(trainer: pl.Trainer) -> bool:
    """Whether the running loop hands the step an iterator instead of batches."""
    return type(trainer._evaluation_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def sequential_dataloader_idx(trainer: pl.Trainer, dataloader_idx: int) -> int | None:
    """The index as the loop passes it to the step: ``None`` when there is a single loader."""
    loop = trainer._evaluation_loop
    return dataloader_idx if loop._is_sequential and loop.num_dataloaders > 1 else None


class Moments:
    """Tells of the moments right ahead of and right behind each of the module's own hooks, and of its step.

    Lightning runs each of them, and nothing else, as one action of ``trainer.profiler``: all callbacks have had their
    turn before the module's hook begins, and none has it before the step has been told to be over. So neither the
    module nor the order of the callbacks has to be changed to know whose code runs.

    Args:
        trainer: with an evaluation loop that is running.
        module: the user's module.
        stage: ``"validation"`` or ``"test"``.
        ahead: hears the name of the hook or step that begins.
        behind: hears the name of the one that has ended.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        ahead: Callable[[str], None],
        behind: Callable[[str], None],
    ) -> None:
        hooks = [f"on_{stage}_{hook}" for hook in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")]
        self.names = {f"[LightningModule]{type(module).__name__}.{hook}": hook for hook in hooks}
        self.names[f"[Strategy]{type(trainer.strategy).__name__}.{stage}_step"] = f"{stage}_step"
        self.ahead = ahead
        self.behind = behind
        self._profiler = trainer.profiler

    def install(self) -> None:
        """From now on. :meth:`remove` undoes it at any time, also where an interrupt has come in between."""
        profile = vars(self._profiler).get("profile")
        told = profile if isinstance(profile, _Profile) else _Profile(self._profiler)
        told.all.append(self)
        vars(self._profiler)["profile"] = told

    def remove(self) -> None:
        """Put back what was there, unless that has been done or others still listen."""
        told = vars(self._profiler).get("profile")
        if isinstance(told, _Profile) and self in told.all:
            told.all.remove(self)
            if not told.all:
                told.remove()


class _Profile:
    """In the place of a profiler's ``profile``: the same, and each of the :class:`Moments` is told."""

    def __init__(self, profiler: Any) -> None:
        self.all: list[Moments] = []
        self._profiler = profiler
        self._before = vars(profiler).get("profile")
        self._profile = profiler.profile

    def remove(self) -> None:
        if self._before is None:
            del vars(self._profiler)["profile"]
        else:
            vars(self._profiler)["profile"] = self._before

    def __call__(self, action_name: str) -> Any:
        told = [(moments, moments.names[action_name]) for moments in self.all if action_name in moments.names]
        return self._telling(action_name, told) if told else self._profile(action_name)

    @contextmanager
    def _telling(self, action_name: str, told: list[tuple[Moments, str]]) -> Iterator[Any]:
        for moments, hook in told:
            moments.ahead(hook)
        with self._profile(action_name) as profiled:
            yield profiled
        for moments, hook in told:
            moments.behind(hook)


def around(trainer: pl.Trainer) -> dict[str, Any]:
    """What a step can reach beside the module."""
    loaders = [trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders]
    strategy = trainer.strategy
    return {
        "trainer.datamodule": trainer.datamodule,
        "the dataloaders": pytree.tree_leaves(loaders),
        "trainer.optimizers": [strategy._optimizers, strategy._lightning_optimizers, strategy.lr_scheduler_configs],
        "trainer": trainer,
    }


def others_write(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether code of the user's runs between the module's own hooks: callbacks, or the transfer of a batch."""
    for other in trainer.callbacks:
        lightnings = type(other).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        if not hasattr(other, "key_prefix") and (not lightnings or isinstance(other, LambdaCallback)):
            return True
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = [owner for owner in (module, trainer.datamodule) if owner is not None]
    return any(is_overridden(hook, owner) for owner in owners for hook in hooks)
