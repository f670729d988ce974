"""Run a user's evaluation step twice on one batch without the two runs seeing each other.

The user's own pass runs untouched. Everything that a second pass would write to is given to it as a copy of its own and
taken away again afterwards: Lightning's logged results and bookkeeping (:class:`Arm`), the states of the module's
torchmetrics and its plain attributes (:class:`ModuleState`), loggers, and random number generators. What a pass writes
elsewhere (files, globals, attributes of foreign objects) cannot be told apart.

This file is the one place that knows Lightning's private names; ``tests/test_arms.py`` checks them against the
installed version.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

# ---- copies ----------------------------------------------------------------------------------------------------------


def copy_data(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Copy containers and tensors all the way down; anything else is kept by reference.

    Not ``copy.deepcopy``: that would also copy a model or tokenizer held in a list, and whole storages behind views.
    Aliases stay aliases within one ``memo``.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    new: Any
    if isinstance(value, Tensor):
        new = value if isinstance(value, nn.Parameter) else value.detach().clone().requires_grad_(value.requires_grad)
    elif isinstance(value, np.ndarray):
        new = value.copy()
    elif isinstance(value, dict):
        new = copy.copy(value)  # keeps the class, and a defaultdict's factory
        for key, item in value.items():
            dict.__setitem__(new, key, copy_data(item, memo))
    elif isinstance(value, UserDict):  # transformers' BatchEncoding
        new = copy.copy(value)
        new.data = copy_data(value.data, memo)
    elif isinstance(value, list):
        new = copy.copy(value)
        new[:] = [copy_data(item, memo) for item in value]
    elif isinstance(value, tuple):
        items = [copy_data(item, memo) for item in value]
        new = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, deque):
        new = copy.copy(value)
        new.clear()
        new.extend(copy_data(item, memo) for item in value)
    elif isinstance(value, set):
        new = copy.copy(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for item in dataclasses.fields(value):
            if hasattr(value, item.name):
                object.__setattr__(new, item.name, copy_data(getattr(value, item.name), memo))
    elif not isinstance(value, nn.Module) and callable(getattr(value, "clone", None)):  # batches of graph libraries
        new = value.clone()
    else:
        return value
    memo[id(value)] = (value, new)  # the original is kept alive, so that its id stays its own
    return new


class RandomState(NamedTuple):
    """The state of Python's, NumPy's, torch's and CUDA's global generators."""

    states: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """The current state."""
        return cls(_collect_rng_states())

    def set(self) -> None:
        """Make it the current state."""
        _set_rng_states(self.states)


# ---- the module's own state ------------------------------------------------------------------------------------------

_PLAIN = (Tensor, np.ndarray, int, float, complex, str, bytes, type(None), dict, UserDict, list, tuple, set, deque)
# What LightningModule and nn.Module keep about themselves is not the user's state. The cache of metric names is: it
# holds the identities of metrics that one arm may have created and the other not.
_INTERNAL = set(vars(pl.LightningModule())) - {"_metric_attributes"}
_INTERNAL |= {"_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams", "_trainer"}


@dataclasses.dataclass
class _Values:
    """The values of one owner: a LightningModule or a metric."""

    owner: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, Any]

    def copy(self, memo: dict[int, Any]) -> _Values:
        return _Values(self.owner, *({k: copy_data(v, memo) for k, v in d.items()} for d in self._parts()))

    def put(self) -> None:
        vars(self.owner).update(self.attributes)
        self.owner._buffers.update(self.buffers)

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.attributes, self.buffers


class _Snapshot(NamedTuple):
    values: dict[int, _Values]  # by identity: a metric's hash follows its state
    created: dict[str, nn.Module]  # metrics that were not there when the evaluation began


class ModuleState:
    """One arm's own values of everything in ``module`` that an evaluation step may write to.

    These are the plain attributes and buffers of LightningModules, and the states of torchmetrics. Values are swapped,
    not objects: a metric that is also an alias, a member of a collection, or captured in a closure stays the same
    object. A metric that an arm creates is that arm's own.

    Args:
        module: the user's module. Its present state is copied as the state from which this arm starts.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        memo: dict[int, Any] = {}
        values = {id(owner): _values(owner).copy(memo) for owner in _owners(module)}
        self._known = [value.owner for value in values.values()]
        self._mine = _Snapshot(values, {})

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: the module holds this arm's values. Afterwards it holds what it held before."""
        outside = self._take()
        self._put(self._mine, outside)
        try:
            yield
        finally:
            self._mine = self._take()
            self._put(outside, self._mine)

    def _take(self) -> _Snapshot:
        values = {id(owner): _values(owner) for owner in _owners(self._module)}
        known = set(map(id, self._known))
        created: dict[str, nn.Module] = {
            name: child
            for name, child in self._module._modules.items()
            if isinstance(child, (Metric, MetricCollection)) and id(child) not in known
        }
        for value in values.values():
            for name in value.attributes:
                del vars(value.owner)[name]
        for name in created:
            del self._module._modules[name]
        return _Snapshot(values, created)

    def _put(self, snapshot: _Snapshot, other: _Snapshot) -> None:
        self._module._modules.update(snapshot.created)
        for value in snapshot.values.values():
            value.put()
        # A metric that the other arm created inside of a submodule is new to this one: it starts empty.
        reachable = {id(child) for child in self._module.modules()}
        for key in (other.values.keys() - snapshot.values.keys()) & reachable:
            new = other.values[key].copy({})
            new.put()
            assert isinstance(new.owner, (Metric, MetricCollection))
            new.owner.reset()


def _owners(module: nn.Module) -> list[nn.Module]:
    """The modules whose state is per arm: LightningModules and metrics, also metrics kept in plain containers."""
    owners: list[nn.Module] = []
    pending: list[Any] = [module]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, UserDict, list, tuple, set, deque)):
            pending.extend(value.values() if isinstance(value, (dict, UserDict)) else value)
        elif isinstance(value, nn.Module) and (value is module or isinstance(value, (Metric, MetricCollection))):
            for child in value.modules():
                if isinstance(child, (pl.LightningModule, Metric, MetricCollection)) and id(child) not in seen:
                    seen.add(id(child))
                    owners.append(child)
                    pending.extend(_plain(child).values())
    return owners


def _values(owner: nn.Module) -> _Values:
    return _Values(owner, _plain(owner), dict(owner._buffers))


def _plain(owner: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in _INTERNAL and isinstance(value, _PLAIN) and not isinstance(value, nn.Parameter)
    }


# ---- Lightning's state -----------------------------------------------------------------------------------------------


class Logged(NamedTuple):
    """One value that a run logged per epoch, under the key that the user sees."""

    value: Tensor
    name: str  # as in `self.log(name, ...)`
    dataloader_idx: int | None
    logger: bool
    prog_bar: bool
    higher_is_better: bool | None  # known where a torchmetrics object was logged


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
        self.results = _ResultCollection(training=False)
        self._connector = _LoggerConnector(trainer)
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
            setattr(self._connector, name, dict(getattr(trainer._logger_connector, name)))

    def start(self) -> None:
        """The module's hooks at the start of an evaluation."""
        with self._active():
            self._hook(f"on_{self._stage}_start")
            self._hook(f"on_{self._stage}_epoch_start")

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
                trainer.loggers = [DummyLogger() for _ in before[2]]
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
            _, key = results._forked_name(item, on_step=False)
            meta = item.meta
            index = meta.dataloader_idx if meta.add_dataloader_idx else None
            better = None if item.is_tensor else item.value.higher_is_better
            values[key] = Logged(value.detach().clone(), meta.name, index, meta.logger, meta.prog_bar, better)
    return values


def logged_on_step_only(results: _ResultCollection) -> list[str]:
    """Names that were logged per step and not per epoch: there is no epoch value to compare."""
    return sorted({item.meta.name for item in results.values() if not item.has_reset and not item.meta.on_epoch})


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
    if meta.dataloader_idx is None:
        module.log(name, value, logger=meta.logger, prog_bar=meta.prog_bar, add_dataloader_idx=False, batch_size=1)
        return
    connector = trainer._logger_connector
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


def gather(columns: Any) -> Sequence[Any]:
    """``columns`` of every rank, in rank order, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [columns]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, columns)
    return gathered
