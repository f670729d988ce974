"""Copies of what two passes over one batch would both write to.

A copy holds what its original holds, and shares nothing that can be written to: containers, tensors, generators and
objects of plain values are copied, models, datasets and functions stay the ones that they are.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import enum
import io
import random
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from uuid import UUID

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

CONTAINERS = (dict, UserDict, list, tuple, set, frozenset, deque)
_Generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_BYTES = (bytearray, array)
_KINDS: tuple[Any, ...] = (OrderedDict, defaultdict, dict, list, set, deque)
_ALIGNED = 16  # bytes: the largest dtype's
VALUES = (
    Tensor,
    np.ndarray,
    np.generic,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    type(...),
)
_UNCHANGING = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, type(...)}
PLAIN = (*CONTAINERS, *_Generators, *VALUES)
# What both passes over a batch may have: it cannot change, or is no data.
_SHARED: tuple[Any, ...] = (
    type,
    enum.Enum,
    range,
    slice,
    PurePath,
    date,
    time,
    timedelta,
    tzinfo,
    Decimal,
    Fraction,
    UUID,
    re.Pattern,
    np.generic,
    np.dtype,
    nn.Module,
    Dataset,
)
_SHARED += (DataLoader, Sampler, PreTrainedTokenizerBase, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
_SHARED += tuple(_UNCHANGING)


class _Part:
    """Some of a device's memory that tensors, arrays and byte arrays of one batch use, and its copy."""

    def __init__(self, begin: int, end: int, of: Any) -> None:
        self.begin = begin
        self.end = end
        self.all = [of]
        self._copy: Tensor | None = None

    def owner(self) -> Any:
        """What has this memory, if it is one that cannot be given another."""
        return next((value for value in self.all if isinstance(value, _BYTES)), None)

    def copied(self) -> tuple[Tensor, int]:
        """The copy, and at which of its bytes the part begins: there both have the same alignment."""
        if self._copy is None:
            self._copy = self._copied()
        return self._copy, 0 if self.owner() is not None else self.begin % _ALIGNED

    def _copied(self) -> Tensor:
        if self.owner() is not None:
            return torch.frombuffer(copy.copy(self.owner()), dtype=torch.uint8)
        first = self.all[0]
        device = first.device if isinstance(first, Tensor) else "cpu"
        new = torch.empty(self.begin % _ALIGNED + self.end - self.begin, dtype=torch.uint8, device=device)
        if isinstance(first, Tensor) and not first.is_cpu:
            everything = torch.empty(0, dtype=torch.uint8, device=device).set_(first.untyped_storage())
            begin = self.begin - everything.data_ptr()
            held = everything[begin : begin + self.end - self.begin]
        else:
            held = torch.frombuffer(
                (ctypes.c_uint8 * (self.end - self.begin)).from_address(self.begin), dtype=torch.uint8
            )
        new[self.begin % _ALIGNED :] = held
        return new


class _Batch(dict[int, Any]):
    """A memo of copies within one batch, and of the memory that is used in it."""

    def __init__(self, batch: Any) -> None:
        self._parts: dict[str, list[_Part]] = {}
        self._look(batch, "batch", {})
        for device, found in self._parts.items():
            found.sort(key=lambda part: part.begin)
            merged = found[:1]
            for part in found[1:]:
                if part.begin < merged[-1].end:
                    merged[-1].end = max(part.end, merged[-1].end)
                    merged[-1].all += part.all
                else:
                    merged.append(part)
            self._parts[device] = merged

    def _look(self, value: Any, where: str, seen: dict[int, Any]) -> None:
        """Find what uses memory; raise at what can be used up or written to, and cannot be copied."""
        if isinstance(value, _SHARED) or id(value) in seen:
            return
        seen[id(value)] = value
        extent = _extent(value)
        if extent is not None:
            device, begin, end = extent
            self._parts.setdefault(device, []).append(_Part(begin, end, value))
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            for i, item in enumerate(value.flat):
                self._look(item, f"{where}[{i}]", seen)
        if isinstance(value, (Tensor, np.ndarray, *_BYTES, *_Generators)) or _clones(value) or _is_picture(value):
            return
        held = _attributes(value)
        opaque = not held and not hasattr(value, "__dict__") and type(value) is not object
        if not isinstance(value, CONTAINERS) and (
            isinstance(value, (Iterator, io.IOBase)) or opaque or _made(value) is None
        ):
            raise MisconfigurationException(
                f"`{where}` is a {type(value).__name__}. Two passes run over each batch, and this cannot be copied for "
                "the second: let the dataset or `collate_fn` give a list, an array or a tensor in its place"
            )
        held = {f".{name}": item for name, item in held.items()} if not isinstance(value, UserDict) else {}
        if isinstance(value, (dict, UserDict)):
            held |= {f"[{key!r}]": item for key, item in value.items()}
        elif isinstance(value, CONTAINERS):
            held |= {f"[{i}]": item for i, item in enumerate(value)}
        for name, item in held.items():
            self._look(item, where + name, seen)

    def copy_in_part(self, value: Any) -> Any:
        """A copy that shares memory with those of what ``value`` shares memory with; ``None`` if it has its own."""
        device, begin, _ = _extent(value) or ("", 0, 0)
        parts = self._parts.get(device, [])
        i = bisect_right(parts, begin, key=lambda part: part.begin) - 1
        if i < 0 or (len(parts[i].all) < 2 and (isinstance(value, _BYTES) or 0 not in _steps(value))):
            return None
        memory, offset = parts[i].copied()
        if isinstance(value, _BYTES):
            return memory.numpy().base if value is parts[i].owner() else None
        offset += (value.data_ptr() if isinstance(value, Tensor) else value.ctypes.data) - parts[i].begin
        if isinstance(value, np.ndarray):
            view: Any = np.ndarray(value.shape, value.dtype, memory.numpy(), offset, value.strides)
            view.flags.writeable = value.flags.writeable
            return view.view(type(value))
        if offset % value.itemsize:  # a view of bytes that begins anywhere
            return None
        new = torch.empty(0, dtype=value.dtype, device=value.device)
        new.set_(memory.untyped_storage(), offset // value.itemsize, value.shape, value.stride())
        new = new.conj() if value.is_conj() else new
        new = new._neg_view() if value.is_neg() else new
        return new.requires_grad_() if value.requires_grad else new


def _steps(value: Any) -> tuple[int, ...]:
    return value.stride() if isinstance(value, Tensor) else value.strides


def _extent(value: Any) -> tuple[str, int, int] | None:
    """On which device, and from which byte of its memory to which, ``value`` has its elements."""
    if isinstance(value, Tensor):
        if not _is_plain(value):
            return None
        device, begin, size = str(value.device), value.data_ptr(), value.itemsize
        steps = [step * size for step in value.stride()]
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject or not value.size or isinstance(value, np.ma.MaskedArray):
            return None
        device, begin, size, steps = "cpu", value.ctypes.data, value.itemsize, list(value.strides)
    elif isinstance(value, _BYTES) and len(value):
        view = np.asarray(memoryview(value).cast("B"))
        return "cpu", view.ctypes.data, view.ctypes.data + view.nbytes
    else:
        return None
    reaches = [(n - 1) * step for n, step in zip(value.shape, steps, strict=True)]
    return device, begin + sum(min(0, reach) for reach in reaches), begin + sum(max(0, r) for r in reaches) + size


def copy_batch(batch: Any) -> Any:
    """A copy of a batch for one more pass over it.

    Raises:
        MisconfigurationException: if the batch holds what the first pass would use up and nobody can copy, such as an
            iterator or an open file.
    """
    return copy_data(batch, _Batch(batch))


class _Returned(dict[int, Any]):
    """A memo of copies of what a step has returned; tensors of more elements than this stay: logits, no outcomes."""

    largest = 2**20


def kept(output: Any) -> Any:
    """What a step has returned, as it is now, if it goes on writing to that: a list that it keeps, a buffer."""
    return copy_data(output, _Returned())


def copy_data(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Copy containers, tensors and objects that hold nothing else; anything else is kept by reference.

    Not ``copy.deepcopy``: that would also copy a model or tokenizer held in a list, and whole storages behind views.
    Aliases stay aliases within one ``memo``.
    """
    if type(value) in _UNCHANGING:
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    new: Any = memo.copy_in_part(value) if isinstance(memo, _Batch) and _extent(value) is not None else None
    if isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and isinstance(memo, _Returned) and value.numel() > memo.largest
    ):
        return value
    if isinstance(value, (Tensor, np.ndarray, *_BYTES, *_Generators)):
        new = _copy_elements(value, memo) if new is None else new
    elif isinstance(value, (dict, list, set, deque)):
        kind = next(kind for kind in _KINDS if isinstance(value, kind))
        new = kind.__new__(type(value))  # whatever it takes to make one
        memo[id(value)] = (value, new)
        if isinstance(value, dict):
            for key, item in kind.items(value):
                kind.__setitem__(new, key, copy_data(item, memo))
        elif isinstance(value, set):
            set.update(new, value)
        else:
            if kind is deque:
                deque.__init__(new, (), value.maxlen)  # type: ignore[union-attr]
            kind.extend(new, [copy_data(item, memo) for item in kind.__iter__(value)])
        if isinstance(value, defaultdict):
            new.default_factory = value.default_factory
    elif isinstance(value, UserDict):  # transformers' BatchEncoding
        new = copy.copy(value)
        memo[id(value)] = (value, new)
        new.data = copy_data(value.data, memo)
        return new
    elif isinstance(value, tuple):
        items = [copy_data(item, memo) for item in value]
        if id(value) in memo:  # by way of a list that holds it
            return memo[id(value)][1]
        try:
            new = tuple.__new__(type(value), items)
        except TypeError:  # of C's
            new = type(value)(items)
    elif _is_picture(value):
        return memo.setdefault(id(value), (value, value.copy()))[1]
    elif (new := _clones(value)) is not None:  # batches of graph libraries
        memo[id(value)] = (value, new)
        return new
    elif is_record(value) or _is_dataclass(value) or (isinstance(memo, _Batch) and not isinstance(value, _SHARED)):
        new = _made(value)
    if new is None:
        return value
    memo[id(value)] = (value, new)  # the original is kept alive, so that its id stays its own
    for name, item in _attributes(value).items():
        # What the copy of a tensor or array has by itself describes that copy.
        if not (isinstance(value, (Tensor, np.ndarray)) and name in vars(new)):
            object.__setattr__(new, name, copy_data(item, memo))
    return new


def _copy_elements(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach().clone()
        return tensor.requires_grad_() if value.requires_grad else tensor
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if not isinstance(value, np.ndarray) or (value.dtype.hasobject and value.dtype.names):
        return copy.deepcopy(value)
    new = value.copy(order="K")
    if value.dtype.hasobject:
        memo[id(value)] = (value, new)
        for i, item in enumerate(value.flat):
            new.flat[i] = copy_data(item, memo)
    new.flags.writeable = value.flags.writeable
    return new


def _made(value: Any) -> Any:
    """A new object of the same class, still without attributes of its own; ``None`` where none can be made."""
    try:
        return object.__new__(type(value))
    except TypeError:  # of a class of C's
        try:
            return copy.copy(value)
        except Exception:
            return None


def _clones(value: Any) -> Any:
    """A copy by a method of the object's class; ``None`` where there is none that gives one."""
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module)) or not callable(getattr(kind, "clone", None)):
        return None
    try:
        new = value.clone()
    except Exception:
        return None
    return new if type(new) is kind and new is not value else None


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_record(value: Any) -> bool:
    """Whether ``value`` is an object that holds plain values and nothing else, such as a hand-written meter."""
    callables = (type, FunctionType, MethodType, nn.Module)
    if isinstance(value, (*callables, Dataset, DataLoader, Sampler, *PLAIN)) or not hasattr(value, "__dict__"):
        return False
    return bool(vars(value)) and all(isinstance(item, PLAIN) or is_record(item) for item in vars(value).values())


def _is_picture(value: Any) -> bool:
    return any(cls.__module__ == "PIL.Image" for cls in type(value).__mro__)


def _is_plain(tensor: Tensor) -> bool:
    strided = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
    return strided and not tensor.is_meta and tensor.numel() > 0


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included."""
    found = dict(getattr(value, "__dict__", {}))
    found |= {name: getattr(value, name) for name in slots(value) if hasattr(value, name)}
    return found


def slots(value: Any) -> list[str]:
    """The names in ``__slots__`` of an object's class and its bases, as they are kept."""
    return _slots(type(value))  # type: ignore[arg-type]  # a type is hashable


@lru_cache(maxsize=1000)
def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]
