"""What a layer reads and writes besides its arguments, and whether it is still the same.

A layer may count in a dict, add an auxiliary loss to an object that all layers share, or append to a list in its class.
Nothing of this shows in what it returns. :class:`Held` therefore follows everything that a layer's code can name: the
attributes, parameters and buffers of its modules, objects and containers among them at any depth, closures, class
attributes, and the globals that the code of its own classes mentions. What cannot be looked into (an iterator, a file,
an object of an extension) is reported, so that such a layer can be computed.

Not followed are the globals and classes of libraries that are known to keep no results there, and what is outside of
Python: files, processes, devices.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import inspect
import logging
import operator
import pathlib
import pickle
import random
import re
import sys
import threading
import types
import uuid
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LARGEST = 2**20  # bytes of an array that is kept to be compared
_MOST = 2000  # objects within reach of a layer; more take as long as the layer

_LIBRARIES = {"torch", "transformers", "numpy", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric"}
_LIBRARIES |= {"peft", "accelerate", "kernels", "triton", "flash_attn", "lightning_utilities", *sys.stdlib_module_names}

_INTERNAL = set(vars(nn.Module()))
_CELL = object()  # stands for a closure's variable that has no value yet

_UNCHANGING = (
    *(type(None), bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType, types.CodeType),
    *(type(Ellipsis), type(NotImplemented), types.GenericAlias, types.UnionType),
    *(enum.Enum, re.Pattern, pathlib.PurePath, uuid.UUID, fractions.Fraction, decimal.Decimal),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
    *(np.generic, np.dtype, np.ufunc),
    # What is written to these is not read back: locks and logs.
    *(logging.Logger, logging.LoggerAdapter, type(threading.Lock()), type(threading.RLock())),
)
_EXACT = {None.__class__, bool, int, float, complex, str, bytes, torch.dtype, torch.device}  # the frequent ones


def mark_of(tensor: Tensor) -> tuple[int | None, int]:
    """What is another one after a tensor was changed in place or given other data."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return version(tensor), tensor.data_ptr() if plain else 0


def version(tensor: Tensor) -> int | None:
    """Grows with each change in place; ``None`` for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


class Held:
    """Everything that can change within reach of ``layer``, as it is now.

    Attributes:
        unseen: the type of something that cannot be looked into; empty if there is nothing such.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.unseen = ""
        self._nodes: list[tuple[Any, Callable[[Any], Any], Any]] = []  # an object, how to look at it, what was there
        self._index: dict[int, int] = {}
        self._values: dict[int, Tensor] = {}  # copies of tensors that count no changes
        pending = [layer]
        for value in pending:
            if id(value) in self._index or _is_unchanging(value):
                continue
            look = _how_to_look_at(value)
            if look is None or len(self._nodes) == _MOST or len(pending) > 50 * _MOST:
                self.unseen = type(value).__name__ if look is None else "great number of objects"
                return
            self._index[id(value)] = len(self._nodes)
            found = look(value)
            self._nodes.append((value, look, found))
            if type(found) is list:
                pending += found
            elif isinstance(value, Tensor) and found[0] is None and not isinstance(value, nn.Parameter):
                self._values[id(value)] = value.detach().clone()

    def still_holds(self) -> bool:
        """Whether nothing has changed since."""
        for value, look, before in self._nodes:
            now = look(value)
            if type(before) is list:
                if len(now) != len(before) or not all(map(operator.is_, now, before)):
                    return False
            elif now != before:
                return False
        return all(torch.equal(self._nodes[self._index[key]][0], copy) for key, copy in self._values.items())

    def same_as(self, other: Held) -> bool:
        """Whether a layer cannot tell one from the other, though the objects need not be the same."""
        if len(self._nodes) != len(other._nodes):
            return False
        return all(self._same_node(node, old, other) for node, old in zip(self._nodes, other._nodes, strict=True))

    @functools.cached_property
    def storages(self) -> set[int]:
        """Where the tensors within reach lie."""
        tensors = (value for value, _, found in self._nodes if isinstance(value, Tensor) and found[-1])
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __contains__(self, value: object) -> bool:
        return id(value) in self._index

    def _same_node(self, node: tuple[Any, ...], old: tuple[Any, ...], other: Held) -> bool:
        (value, look, found), (before, _, seen) = node, old
        if type(value) is not type(before):
            return False
        if type(found) is list:
            return len(found) == len(seen) and all(self._alike(a, b, other) for a, b in zip(found, seen, strict=True))
        if not isinstance(value, Tensor):
            return bool(found == seen)
        if look(before) != seen:
            return False  # it has changed since: its value is gone
        was = other._values.get(id(before), before)
        return value is was or (alike(value, was) and torch.equal(value, was))

    def _alike(self, a: Any, b: Any, other: Held) -> bool:
        index = self._index.get(id(a))
        if index is not None or id(b) in other._index:
            return index == other._index.get(id(b))
        return a is b or (type(a) is type(b) and type(a) in _EXACT and a == b)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether both have one shape, dtype and device."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


# ---- how to look at an object: a list of the objects that it refers to, or a value that can be compared --------------


def _is_unchanging(value: Any) -> bool:
    if type(value) in _EXACT or value is _CELL:
        return True
    if isinstance(value, type):
        return _of_library(value)
    if isinstance(value, _UNCHANGING) or type(value) is object:
        return True
    if isinstance(value, types.BuiltinFunctionType):  # `list.append` of one list is one, too
        return value.__self__ is None or isinstance(value.__self__, (type, types.ModuleType))
    if type(value).__module__ in ("typing", "typing_extensions", "_abc"):
        return True
    opaque = not isinstance(value, (nn.Module, Tensor, torch.Generator, torch.ScriptObject, dict, list, set))
    return opaque and type(value).__module__.split(".")[0] == "torch"  # operators, streams


_of_library: Callable[[type], bool] = functools.lru_cache(maxsize=10000)(lambda cls: _library(cls))


def _library(thing: Any) -> bool:
    """Whether a class, a function or a module belongs to Python or to one of the known libraries."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return str(name).split(".")[0] in _LIBRARIES


def _how_to_look_at(value: Any) -> Callable[[Any], Any] | None:
    """A function that looks at ``value``, or ``None``."""
    if isinstance(value, np.ndarray):
        return _array if value.nbytes <= _LARGEST else None
    for kinds, look in _LOOKS.items():
        if isinstance(value, kinds):
            return look
    # Written in Python, as far as one can see: it has no parts but its attributes.
    kind: Any = type(value)
    written = all(cls is object or cls.__flags__ & 1 << 9 for cls in kind.__mro__)
    return _attributes if written and (hasattr(value, "__dict__") or _slots(kind)) else None


def _attributes(value: Any) -> list[Any]:
    cls: Any = type(value)
    attributes = getattr(value, "__dict__", {})
    slots = [getattr(value, name) for name in _slots(cls) if hasattr(value, name)]
    return [*attributes, *attributes.values(), *slots, *([] if _of_library(cls) else [cls])]


@functools.cache
def _slots(cls: Any) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return names


def _module(module: nn.Module) -> list[Any]:
    held = vars(module)
    cls = type(module)
    found = [value for name, value in held.items() if name not in _INTERNAL]
    found += held["_parameters"].values()
    found += held["_buffers"].values()
    found += held["_modules"].values()
    return found if _of_library(cls) else [*found, cls]


def _mapping(value: Any) -> list[Any]:
    found = [*value.keys(), *value.values()]
    return found if type(value) is dict else found + _attributes(value)


def _items(value: Iterable[Any]) -> list[Any]:
    return [*value] if type(value) in (list, tuple) else [*value, *_attributes(value)]


def _class(cls: type) -> list[Any]:
    """What the code of a class may write to: its attributes, and what its functions close over and name."""
    found: list[Any] = []
    for base in cls.__mro__:
        if not _of_library(base):
            found += [v for k, v in vars(base).items() if not hasattr(v, "__get__") and not k.startswith("__")]
    return found + _functions(cls)


@functools.lru_cache(maxsize=1000)
def _functions(cls: Any) -> list[types.FunctionType]:
    """The functions of a class that run when it is called: of a module `forward`, and what is named from there on."""
    bases = [vars(base) for base in cls.__mro__ if not _of_library(base)]
    names = ["forward", "__getattr__", "__setattr__"] if issubclass(cls, nn.Module) else [n for b in bases for n in b]
    names = list(dict.fromkeys(names))
    found: dict[types.FunctionType, None] = {}
    for name in names:
        for base in bases:
            member = base.get(name)
            parts = [member, getattr(member, "__func__", None)]  # class methods and static methods
            parts += [getattr(member, end, None) for end in ("fget", "fset", "func", "__wrapped__")]  # properties
            for part in parts:
                if isinstance(part, types.FunctionType) and part not in found:
                    found[part] = None
                    names += [n for n in _names(part.__code__) if n not in names]
    return list(found)


@functools.lru_cache(maxsize=10000)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Every global and attribute that code names, that of the functions within included."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _function(function: types.FunctionType) -> list[Any]:
    found: list[Any] = [function.__code__, *(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(_CELL)
    found += [*(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    if _library(function):
        return found
    names, known = _names(function.__code__), function.__globals__
    for name in names:
        if name in known:
            value = known[name]
            found.append(value)
            if isinstance(value, types.ModuleType) and not _library(value):
                found += [vars(value)[attribute] for attribute in names if attribute in vars(value)]
    return found


def _array(value: np.ndarray) -> Any:
    return value.ravel().tolist() if value.dtype.hasobject else (value.dtype, value.shape, value.tobytes())


def _state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    return pickle.dumps(generator.getstate() if isinstance(generator, random.Random) else generator.get_state())


_LOOKS: dict[Any, Callable[[Any], Any]] = {
    Tensor: mark_of,
    nn.Module: _module,
    (dict, types.MappingProxyType): _mapping,
    (list, tuple, set, frozenset, deque): _items,
    type: _class,
    types.FunctionType: _function,
    types.MethodType: lambda method: [method.__self__, method.__func__],
    types.BuiltinFunctionType: lambda method: [method.__self__],
    functools.partial: lambda partial: [partial.func, *partial.args, *partial.keywords, *partial.keywords.values()],
    functools._lru_cache_wrapper: lambda function: [inspect.unwrap(function)],
    types.SimpleNamespace: _attributes,
    weakref.ref: lambda reference: [reference()],
    (bytearray, array): bytes,
    (torch.Generator, random.Random, np.random.Generator, np.random.RandomState): _state,
}
