"""Run a user's evaluation step twice on one batch without the two runs seeing each other.

The user's own pass runs untouched. Everything that a second pass would write to is given to it as a copy of its own and
taken away again afterwards: Lightning's logged results, bookkeeping and loggers (:class:`Arm`), and whatever the module
keeps (:class:`~laser_callback.compare.state.ModuleState`).

This file is the one place that knows Lightning's private names; ``tests/compare/test_arms.py`` checks them against the
installed version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from laser_callback.compare.silent import silent
from laser_callback.compare.state import ModuleState
from laser_callback.results.examples import Logged


class Arm:
    """One reduced arm of a running evaluation loop: the user's hooks, with Lightning's arithmetic on separate results.

    Args:
        trainer: with an evaluation loop that has just started.
        module: the user's module.
        stage: ``"validation"`` or ``"test"``, as in the names of the hooks.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._module = module
        self._stage = stage
        self._state = ModuleState(module)
        self._dataloader_idx: int | None = None
        self._loggers: list[Logger] = [silent(logger) for logger in trainer.loggers]
        self.results = _ResultCollection(training=False)
        self._connector = _LoggerConnector(trainer)
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
            setattr(self._connector, name, dict(getattr(trainer._logger_connector, name)))

    def start(self) -> None:
        """The module's hooks at the start of an evaluation."""
        hooks = [f"on_{self._stage}_start", f"on_{self._stage}_epoch_start"]
        if not any(is_overridden(hook, self._module) for hook in hooks):
            return
        with self._active():
            for hook in hooks:
                self._hook(hook)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> Any:
        """The module's hooks and its step on one batch, through the strategy (autocast and wrappers apply)."""
        loop = self._trainer._evaluation_loop
        kwargs = loop._build_kwargs(batch, batch_idx, dataloader_idx)
        with self._active():
            if self._dataloader_idx is not None and dataloader_idx != self._dataloader_idx:
                self._close_dataloader()
            self._dataloader_idx = dataloader_idx
            self._connector.on_batch_start(batch, dataloader_idx)
            self._hook(f"on_{self._stage}_batch_start", *kwargs.values())
            name = f"{self._stage}_step"
            self._module._current_fx_name = name
            output = getattr(self._trainer.strategy, name)(*loop._build_step_args_from_hook_kwargs(kwargs, name))
            self._hook(f"on_{self._stage}_batch_end", output, *kwargs.values())
            self._connector.on_batch_end()
        return output

    def end(self) -> dict[str, Logged]:
        """The module's hook at the end of the epoch. Returns what this arm logged per epoch."""
        with self._active():
            self._close_dataloader()
            self._connector._evaluation_epoch_end()
            self._hook(f"on_{self._stage}_epoch_end")
            self._connector.on_epoch_end()
            return logged(self.results)

    def _close_dataloader(self) -> None:
        self._connector.epoch_end_reached()
        self._connector.update_eval_epoch_metrics()

    def _hook(self, name: str, *args: Any) -> None:
        self._module._current_fx_name = name
        getattr(self._module, name)(*args)

    @contextmanager
    def _active(self) -> Iterator[None]:
        trainer, module, loop = self._trainer, self._module, self._trainer._evaluation_loop
        before = trainer._logger_connector, loop._results, trainer.loggers, module._current_fx_name
        with self._state.active():
            try:
                trainer._logger_connector = self._connector
                loop._results = self.results
                trainer.loggers = self._loggers
                yield
            finally:
                trainer._logger_connector, loop._results, trainer.loggers, module._current_fx_name = before


def logged(results: _ResultCollection) -> dict[str, Logged]:
    """Everything in ``results`` that was logged per epoch, under the key that ``trainer.validate()`` returns it."""
    values: dict[str, Logged] = {}
    for item in results.values():
        if item.has_reset or not item.meta.on_epoch:
            continue
        value = results._get_cache(item, on_step=False)
        if isinstance(value, Tensor):
            short, key = results._forked_name(item, on_step=False)
            meta = item.meta
            also = short if short != key else None
            better = None if item.is_tensor else item.value.higher_is_better
            values[key] = Logged(
                value.detach().clone(), meta.name, meta.dataloader_idx, also, meta.logger, meta.prog_bar, better
            )
    return values


def logged_on_step_only(results: _ResultCollection) -> list[str]:
    """Names that were logged per step and not per epoch: there is no epoch value to compare."""
    return sorted({item.meta.name for item in results.values() if not item.has_reset and not item.meta.on_epoch})


def logged_keys(results: _ResultCollection) -> list[str]:
    """The keys of what has been logged per epoch so far, each once; nothing is computed for it."""
    items = [item for item in results.values() if not item.has_reset and item.meta.on_epoch]
    return list(dict.fromkeys(results._forked_name(item, on_step=False)[1] for item in items))


def running_means(results: _ResultCollection) -> dict[str, tuple[float, float]]:
    """(weighted sum, weight) so far of each value that Lightning averages over batches, by key."""
    means: dict[str, tuple[float, float]] = {}
    for item in results.values():
        if item.has_reset or not item.is_tensor or not item.meta.on_epoch or not item.meta.is_mean_reduction:
            continue
        _, key = results._forked_name(item, on_step=False)
        means[key] = float(item.value), float(item.cumulated_batch_size)
    return means


def publish(trainer: pl.Trainer, module: pl.LightningModule, name: str, value: Tensor, like: str, meta: Logged) -> None:
    """Log ``value`` where the user's key ``like`` goes. To be called within ``on_*_epoch_end``.

    Lightning has closed each dataloader's results by then and would put a late key into every dataloader's dictionary;
    a key that belongs to one dataloader is therefore added beside the user's own.
    """
    connector = trainer._logger_connector
    if meta.also is not None:
        connector._callback_metrics[name.removesuffix(like) + meta.also] = value
    if meta.dataloader_idx is None:
        with warnings.catch_warnings():
            # Lightning warns about keys without a logger or synchronisation; of the user's own it has said so.
            warnings.filterwarnings("ignore", message=".*(but have no logger configured|sync_dist=True)")
            module.log(name, value, logger=meta.logger, prog_bar=meta.prog_bar, add_dataloader_idx=False, batch_size=1)
            results = trainer._results
            assert results is not None
            # The warning about synchronisation comes when the value is computed; it is kept from then on.
            results._get_cache(results[f"{module._current_fx_name}.{name}"], on_step=False)
        return
    connector._callback_metrics[name] = value
    if meta.logger:
        connector._logged_metrics[name] = value
        for outputs in trainer._evaluation_loop._logged_outputs:
            if like in outputs:
                outputs[name] = value


def uses_dataloader_iter(trainer: pl.Trainer) -> bool:
    """Whether the running loop hands the step an iterator instead of batches."""
    return type(trainer._evaluation_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def sequential_dataloader_idx(trainer: pl.Trainer, dataloader_idx: int) -> int | None:
    """The index as the loop passes it to the step: ``None`` when there is a single loader."""
    loop = trainer._evaluation_loop
    return dataloader_idx if loop._is_sequential and loop.num_dataloaders > 1 else None


def call_after_hook(module: pl.LightningModule, name: str, then: Callable[[], None]) -> Callable[[], None]:
    """Call ``then`` once, right after the module's own hook ``name`` has run. Returns a function that undoes this.

    Callbacks run before the module's hook of the same name, so this is how to see what that hook logs, while logging is
    still allowed.
    """
    before = vars(module).get(name)
    hook = getattr(module, name)

    def undo() -> None:
        if vars(module).get(name) is wrapped:
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        undo()
        result = hook(*args, **kwargs)
        then()
        return result

    vars(module)[name] = wrapped
    return undo
