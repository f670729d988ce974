"""The places that a pass may write to: each can be looked at, and put back.

A place is one mutable thing and what it holds: the attributes of an object, the items of a list, the elements of a
tensor. What it *holds* is swapped, never the thing itself, so that every alias (a metric in a collection, a list in a
closure, a view of a tensor) sees the same. Contents are shallow: what they refer to has a place of its own.
"""

from __future__ import annotations

import io
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from laser_callback.passes.copies import slots

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
TEXTS = (io.StringIO, io.BytesIO)

_VERY_MANY = 1_000_000


class Place:
    """One mutable thing. ``name`` says where it is found.

    Attributes:
        start: what it held when the evaluation began.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.start: Any = None

    def begin(self) -> None:
        """Remember what it holds now as the start."""
        self.start = self.read()

    def read(self) -> Any:
        """What it holds, as a value that later writes do not change."""
        raise NotImplementedError

    def holds(self, content: Any) -> bool:
        """Whether it holds just that. False where this cannot be seen."""
        raise NotImplementedError

    def write(self, content: Any) -> None:
        """Make it hold that again."""
        raise NotImplementedError


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    # Not `a == b`: tensors and metrics are compared element by element, or into a new metric. In the order of the
    # dicts, since a dict that was not touched has kept it, and this is done thousands of times per pass.
    return len(a) == len(b) and all(map(operator.is_, a.values(), b.values())) and all(map(operator.is_, a, b))


def _looked_at(items: Collection[Any]) -> Iterable[Any]:
    """All of them, a million in 10 ms; of more the first, since that would take longer than the pass."""
    return items if len(items) <= _VERY_MANY else islice(items, _VERY_MANY // 100)


class Attributes(Place):
    """The ``__dict__`` of an object."""

    def _held(self) -> dict[str, Any]:
        return vars(self.owner)

    @override
    def read(self) -> Any:
        return dict(self._held())

    @override
    def holds(self, content: Any) -> bool:
        return _same(self._held(), content)

    @override
    def write(self, content: Any) -> None:
        _fill(vars(self.owner), content)


class ClassAttributes(Attributes):
    """What a class holds beside its methods."""

    _set: Any = staticmethod(setattr)
    _delete: Any = staticmethod(delattr)

    @override
    def _held(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.owner).items() if is_data(name, value)}

    @override
    def write(self, content: Any) -> None:
        held = self._held()
        for name in held.keys() - content.keys():
            self._delete(self.owner, name)
        for name, value in content.items():
            if held.get(name, self) is not value:
                self._set(self.owner, name, value)


def is_data(name: str, value: Any) -> bool:
    """Whether a class attribute is no nested class, no method or other descriptor of Python's, and not Python's own."""
    if (name.startswith("__") and name.endswith("__")) or name == "_abc_impl" or isinstance(value, type):
        return False
    kind = type(value)  # a descriptor of the user's own may keep anything
    return not hasattr(kind, "__get__") or kind.__module__.partition(".")[0] not in sys.stdlib_module_names


class Slots(ClassAttributes):
    """The ``__slots__`` of an object."""

    _set: Any = staticmethod(object.__setattr__)
    _delete: Any = staticmethod(object.__delattr__)

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__(owner, name)
        self.names = slots(owner)

    @override
    def _held(self) -> dict[str, Any]:
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}


class Items(Place):
    """The items of a dict, by the methods of the class that keeps them: subclasses may do more than to store."""

    def __init__(self, owner: Any, name: str) -> None:
        self._kind: Any = OrderedDict if isinstance(owner, OrderedDict) else dict
        super().__init__(owner, name)

    @override
    def read(self) -> Any:
        return dict(self._kind.items(self.owner))

    @override
    def holds(self, content: Any) -> bool:
        kind, owner = self._kind, self.owner
        values = map(operator.is_, _looked_at(kind.values(owner)), _looked_at(content.values()))
        keys = map(operator.is_, _looked_at(kind.keys(owner)), _looked_at(content))
        return len(owner) == len(content) and all(values) and all(keys)

    @override
    def write(self, content: Any) -> None:
        self._kind.clear(self.owner)
        for key, value in content.items():
            self._kind.__setitem__(self.owner, key, value)


class Elements(Place):
    """The elements of a list, deque or set."""

    @override
    def read(self) -> Any:
        return list(self.owner)

    @override
    def holds(self, content: Any) -> bool:
        same = map(operator.is_, _looked_at(self.owner), _looked_at(content))
        return len(self.owner) == len(content) and all(same)

    @override
    def write(self, content: Any) -> None:
        owner = self.owner
        if isinstance(owner, list):
            list.__setitem__(owner, slice(None), content)
        else:
            kind: Any = deque if isinstance(owner, deque) else set
            kind.clear(owner)
            (kind.extend if kind is deque else kind.update)(owner, content)


def _holds_metrics(child: nn.Module | None) -> bool:
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # MetricCollection and MetricTracker are such containers
        return any(_holds_metrics(grandchild) for grandchild in child._modules.values())
    return isinstance(child, Metric)


HOOKS = (
    *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class ModuleContent(NamedTuple):
    """Of a module."""

    attributes: dict[str, Any]
    buffers: dict[str, Any]
    children: dict[str, nn.Module | None]
    hooks: list[dict[int, Any]] | None


class ModuleAttributes(Place):
    """What a module holds beside its parameters: attributes, buffers, children and forward hooks.

    The dicts of buffers, children and hooks stay the same objects: others refer to them. A metric that one arm creates
    is its own; any other new child belongs to all.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__(owner, name)
        self._kind = type(owner)

    @override
    def read(self) -> Any:
        held = vars(self.owner)
        return ModuleContent(dict(held), dict(held["_buffers"]), dict(held["_modules"]), self._hooks())

    def _hooks(self) -> list[dict[int, Any]] | None:
        held = vars(self.owner)
        return [dict(held[name]) for name in HOOKS] if any(map(held.__getitem__, HOOKS)) else None

    @override
    def holds(self, content: Any) -> bool:
        held = vars(self.owner)
        if type(self.owner) is not self._kind:  # a lazy layer has been made real: it is so for all
            return True
        if not (
            _same(held, content.attributes)
            and _same(held["_buffers"], content.buffers)
            and _same(held["_modules"], content.children)
        ):
            return False
        hooks = self._hooks()
        if hooks is None or content.hooks is None:
            return hooks is content.hooks
        return all(map(_same, hooks, content.hooks))

    @override
    def write(self, content: Any) -> None:
        held = vars(self.owner)
        _fill(held, content.attributes)
        if not _same(held["_buffers"], content.buffers):
            _replace(held["_buffers"], content.buffers)
        if not _same(held["_modules"], content.children):
            known = content.children
            shared = {k: v for k, v in held["_modules"].items() if k not in known and not _holds_metrics(v)}
            _replace(held["_modules"], known | shared)
        for name, hooks in zip(HOOKS, content.hooks or [{}] * len(HOOKS), strict=True):
            _replace(held[name], hooks)


def _fill(held: dict[str, Any], content: dict[str, Any]) -> None:
    """At no moment without an attribute that belongs there: other threads may look."""
    for name in held.keys() - content.keys():
        del held[name]
    held.update(content)


def _replace(held: dict[Any, Any], content: dict[Any, Any]) -> None:
    if held or content:
        held.clear()
        held.update(content)


class Cell(Place):
    """A variable that a function shares with the one around it."""

    _EMPTY = object()

    @override
    def read(self) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:
            return self._EMPTY

    @override
    def holds(self, content: Any) -> bool:
        return self.read() is content

    @override
    def write(self, content: Any) -> None:
        if content is self._EMPTY:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = content


class Variable(Place):
    """A ``ContextVar`` that has a value; without one it could not be made so again."""

    @override
    def read(self) -> Any:
        return self.owner.get()

    @override
    def holds(self, content: Any) -> bool:
        return self.owner.get() is content

    @override
    def write(self, content: Any) -> None:
        self.owner.set(content)


class ParameterAttributes(Place):
    """What a parameter has beside its elements."""

    @override
    def read(self) -> Any:
        return self.owner.grad, self.owner.requires_grad, dict(vars(self.owner))

    @override
    def holds(self, content: Any) -> bool:
        grad, requires_grad, attributes = content
        owner = self.owner
        return owner.grad is grad and owner.requires_grad == requires_grad and _same(vars(owner), attributes)

    @override
    def write(self, content: Any) -> None:
        self.owner.grad, self.owner.requires_grad, attributes = content
        _fill(vars(self.owner), attributes)


class State(Place):
    """What can be read and set as a whole: a random number generator, a text that is kept in memory."""

    @override
    def read(self) -> Any:
        owner = self.owner
        if isinstance(owner, TEXTS):
            return None if owner.closed else (owner.getvalue(), owner.tell())
        if isinstance(owner, (torch.Generator, np.random.RandomState)):
            return owner.get_state()
        return owner.getstate() if isinstance(owner, random.Random) else _bits(owner).state

    @override
    def holds(self, content: Any) -> bool:
        now = self.read()
        if isinstance(self.owner, TEXTS):
            return bool(now == content)
        return bool(torch.equal(now, content) if isinstance(now, Tensor) else str(now) == str(content))

    @override
    def write(self, content: Any) -> None:
        owner = self.owner
        if isinstance(owner, TEXTS):
            if content is not None and not owner.closed:
                owner.seek(0)
                owner.truncate()
                owner.write(content[0])
                owner.seek(content[1])
        elif isinstance(owner, (torch.Generator, np.random.RandomState)):
            owner.set_state(content)
        elif isinstance(owner, random.Random):
            owner.setstate(content)
        else:
            _bits(owner).state = content


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", generator)
