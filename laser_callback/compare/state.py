"""Everything that an evaluation step may write to, kept apart for two passes over one batch.

:class:`RandomState` holds the global generators, :class:`ModuleState` one arm's own
values of whatever the user's module keeps. What a pass writes elsewhere (files, globals, attributes of foreign objects
that hold more than plain values) cannot be told apart.

This file knows torch and torchmetrics, but nothing of Lightning's loops.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torchmetrics import Metric

from laser_callback.compare.copies import CONTAINERS, PLAIN, VALUES, copy_data, is_record

# A tensor in an ordinary submodule with more elements than this is a constant (packed weights, masks, tables), which is
# not worth a copy per arm.
_LARGEST_STATE = 2**20


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

# What LightningModule and nn.Module keep about themselves is not the user's state. The cache of metric names is: it
# holds the identities of metrics that one arm may have created and the other not.
_INTERNAL = set(vars(pl.LightningModule())) - {"_metric_attributes"}
_INTERNAL |= {"_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams", "_trainer"}

_HOOKS = [f"_forward_{kind}" for kind in ("hooks", "hooks_with_kwargs", "hooks_always_called")]
_HOOKS += [f"_forward_{kind}" for kind in ("pre_hooks", "pre_hooks_with_kwargs")]


@dataclasses.dataclass
class _State:
    """What one owner holds: a module, or an object of plain values that a module refers to."""

    owner: Any
    attributes: dict[str, Any]
    buffers: dict[str, Any]
    children: dict[str, nn.Module | None]
    hooks: dict[str, dict[int, Any]]

    @classmethod
    def of(cls, owner: Any) -> _State:
        if not isinstance(owner, nn.Module):
            return cls(owner, dict(vars(owner)), {}, {}, {})
        attributes = {
            name: value
            for name, value in vars(owner).items()
            if name not in _INTERNAL and (not callable(value) or isinstance(value, PLAIN))
        }
        hooks = {name: dict(vars(owner)[name]) for name in _HOOKS if vars(owner)[name]}
        return cls(owner, attributes, dict(owner._buffers), dict(owner._modules), hooks)

    def copy(self, memo: dict[int, Any]) -> _State:
        whole = not isinstance(self.owner, nn.Module) or isinstance(self.owner, (pl.LightningModule, Metric))

        def copy_value(value: Any) -> Any:
            constant = isinstance(value, Tensor) and value.numel() > _LARGEST_STATE and not whole
            return value if constant else copy_data(value, memo)

        attributes = {name: copy_value(value) for name, value in self.attributes.items()}
        buffers = {name: copy_value(value) for name, value in self.buffers.items()}
        return _State(self.owner, attributes, buffers, self.children, self.hooks)

    def put(self, now: _State) -> None:
        """Make this the owner's state, which is ``now``."""
        if not _same_objects(self.attributes, now.attributes):
            vars(self.owner).update(self.attributes)
            for name in now.attributes.keys() - self.attributes.keys():
                del vars(self.owner)[name]
        if not _same_objects(self.buffers, now.buffers):
            self.owner._buffers.clear()
            self.owner._buffers.update(self.buffers)
        if self.hooks or now.hooks:
            for name in _HOOKS:
                registered = getattr(self.owner, name)  # stays the same object: a hook's handle refers to it
                registered.clear()
                registered.update(self.hooks.get(name, {}))
        if not _same_objects(self.children, now.children):
            # A metric that the other arm has created is its own; any other module belongs to both.
            shared = {k: v for k, v in now.children.items() if k not in self.children and not _holds_metrics(v)}
            self.owner._modules.clear()
            self.owner._modules.update(self.children | shared)


def _same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    # Not `a == b`: tensors and metrics are compared element by element, or into a new metric.
    return len(a) == len(b) and all(map(operator.is_, a.values(), b.values())) and a.keys() == b.keys()


class ModuleState:
    """One arm's own values of everything in ``module`` that an evaluation step may write to.

    These are the attributes, buffers and forward hooks of all its modules, the states of torchmetrics, also of those
    kept in plain containers, and the generators and meters that a module owns. Values are swapped, not objects: a
    metric that is also an alias, a member of a collection, or captured in a closure stays the same object. A metric
    that an arm creates is that arm's own.

    Args:
        module: the user's module. Its present state is copied as the state from which this arm starts.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._apart = _outside_of_the_tree(module)
        memo: dict[int, Any] = {id(owner): (owner, owner) for owner in self._apart}  # swapped, not copied
        self._mine = {key: state.copy(memo) for key, state in self._take().items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: the module holds this arm's values. Afterwards it holds what it held before."""
        outside = self._take()
        try:
            _swap(self._mine, outside)
            yield
        finally:
            self._mine = self._take()
            _swap(outside, self._mine)

    def _take(self) -> dict[int, _State]:
        owners: dict[int, Any] = {id(owner): owner for owner in (self._module, *self._apart)}
        pending = list(owners.values())
        for owner in pending:  # as `Module.modules()`, which is ten times slower
            if isinstance(owner, nn.Module):
                new = [child for child in owner._modules.values() if child is not None and id(child) not in owners]
                owners.update((id(child), child) for child in new)
                pending += new
        return {key: _State.of(owner) for key, owner in owners.items()}


def _swap(new: dict[int, _State], now: dict[int, _State]) -> None:
    """Put ``new`` in place; owners that it does not know are unreachable from it, or shared."""
    for key, state in new.items():
        # An owner that only the other arm has replaced is not in `now`: nothing has changed it, or it would be.
        state.put(now[key] if key in now else _State.of(state.owner))


def _holds_metrics(child: nn.Module | None) -> bool:
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # MetricCollection and MetricTracker are such containers
        return any(_holds_metrics(grandchild) for grandchild in child._modules.values())
    return isinstance(child, Metric)


def _outside_of_the_tree(module: nn.Module) -> list[Any]:
    """The metrics and records that modules keep in plain attributes and containers, at any depth."""
    inside = set(module.modules())
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending: list[Any] = [value for child in inside for value in _State.of(child).attributes.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, VALUES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, CONTAINERS):
            pending.extend(value.values() if isinstance(value, (dict, UserDict)) else value)
        elif isinstance(value, nn.Module):
            if value not in inside and any(isinstance(child, Metric) for child in value.modules()):
                for child in value.modules():
                    found[id(child)] = child
                    pending.extend(_State.of(child).attributes.values())
        elif is_record(value):
            found[id(value)] = value
            pending.extend(vars(value).values())
    return list(found.values())
