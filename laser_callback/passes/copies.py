"""Copies of what two passes over one batch would both write to.

A copy holds what its original holds, and shares nothing that can be written to: containers, tensors, generators and
objects of plain values are copied, models, datasets and functions stay the ones that they are.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import io
import random
import re
from collections import UserDict, deque
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
_Generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
VALUES = (Tensor, np.ndarray, np.generic, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_UNCHANGING = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device}
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


class _Batch(dict[int, Any]):
    """A memo of copies within one batch: which part of each storage its tensors use, and the copies of these parts."""

    def __init__(self) -> None:
        self.spans: dict[int, list[Any]] = {}  # by storage: first and last byte, number of tensors
        self.parts: dict[int, Tensor] = {}

    def look(self, value: Any, where: str, seen: dict[int, Any]) -> None:
        """Find the tensors; raise at what can be used up or written to, and cannot be copied."""
        if isinstance(value, _SHARED) or id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if _is_plain(value):
                begin: Any = value.storage_offset() * value.itemsize
                end = (
                    begin + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) * value.itemsize
                )
                span = self.spans.setdefault(value.untyped_storage().data_ptr(), [begin, end, 0])
                span[:] = min(span[0], begin), max(span[1], end + value.itemsize), span[2] + 1
            return
        if (
            isinstance(value, (np.ndarray, *_Generators))
            or callable(getattr(value, "clone", None))
            or _is_picture(value)
        ):
            return
        held = _attributes(value)
        opaque = not held and not hasattr(value, "__dict__") and type(value) is not object
        if isinstance(value, (Iterator, io.IOBase)) or (opaque and not isinstance(value, (*CONTAINERS, bytearray))):
            raise MisconfigurationException(
                f"`{where}` is a {type(value).__name__}. Two passes run over each batch, and this cannot be copied for "
                "the second: let the dataset or `collate_fn` give a list, an array or a tensor in its place"
            )
        if isinstance(value, (dict, UserDict)):
            held = {f"[{key!r}]": item for key, item in value.items()}
        elif isinstance(value, CONTAINERS):
            held = {f"[{i}]": item for i, item in enumerate(value)}
        else:
            held = {f".{name}": item for name, item in held.items()}
        for name, item in held.items():
            self.look(item, where + name, seen)

    def copy_tensor(self, value: Tensor) -> Tensor:
        """Views of one storage stay views of one storage; of a large one, only the part that is used is copied."""
        storage = value.untyped_storage()
        begin, end, count = self.spans.get(storage.data_ptr(), (0, 0, 0))
        if count < 2 and 0 not in value.stride():
            return _copy_tensor(value)
        begin -= begin % 16  # of the largest dtype
        if storage.data_ptr() not in self.parts:
            everything = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self.parts[storage.data_ptr()] = everything[begin:end].clone()
        new = torch.empty(0, dtype=value.dtype, device=value.device)
        offset = value.storage_offset() - begin // value.itemsize
        part = self.parts[storage.data_ptr()].untyped_storage()
        new.set_(part, offset, value.shape, value.stride())
        return new.requires_grad_() if value.requires_grad else new


def copy_batch(batch: Any) -> Any:
    """A copy of a batch for one more pass over it.

    Raises:
        MisconfigurationException: if the batch holds what the first pass would use up and nobody can copy, such as an
            iterator or an open file.
    """
    memo = _Batch()
    memo.look(batch, "batch", {})
    return copy_data(batch, memo)


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
    new: Any
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or (isinstance(memo, _Returned) and value.numel() > memo.largest):
            new = value
        else:
            new = memo.copy_tensor(value) if isinstance(memo, _Batch) and _is_plain(value) else _copy_tensor(value)
    elif isinstance(value, np.ndarray):
        new = copy.deepcopy(value) if value.dtype.hasobject else value.copy()
    elif isinstance(value, torch.Generator):
        new = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, (bytearray, *_Generators)):
        new = copy.deepcopy(value)
    elif isinstance(value, dict):
        new = copy.copy(value)  # keeps the class, and a defaultdict's factory
        memo[id(value)] = (value, new)
        for key, item in value.items():
            dict.__setitem__(new, key, copy_data(item, memo))
        _copy_attributes(new, memo)  # a ModelOutput holds each value as an attribute, too
    elif isinstance(value, UserDict):  # transformers' BatchEncoding
        new = copy.copy(value)
        memo[id(value)] = (value, new)
        new.data = copy_data(value.data, memo)
    elif isinstance(value, list):
        new = copy.copy(value)
        memo[id(value)] = (value, new)
        new[:] = [copy_data(item, memo) for item in value]
        _copy_attributes(new, memo)
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
        memo[id(value)] = (value, new)
        for item in dataclasses.fields(value):
            if hasattr(value, item.name):
                object.__setattr__(new, item.name, copy_data(getattr(value, item.name), memo))
    elif not isinstance(value, nn.Module) and callable(getattr(value, "clone", None)):  # batches of graph libraries
        new = value.clone()
    elif _is_picture(value):
        new = value.copy()
    elif is_record(value) or (isinstance(memo, _Batch) and not isinstance(value, _SHARED)):
        new = copy.copy(value)
        memo[id(value)] = (value, new)
        for name, item in _attributes(new).items():
            object.__setattr__(new, name, copy_data(item, memo))
    else:
        return value
    memo[id(value)] = (value, new)  # the original is kept alive, so that its id stays its own
    return new


def is_record(value: Any) -> bool:
    """Whether ``value`` is an object that holds plain values and nothing else, such as a hand-written meter."""
    if isinstance(value, (type, nn.Module, Dataset, DataLoader, Sampler, *PLAIN)) or not hasattr(value, "__dict__"):
        return False
    return bool(vars(value)) and all(isinstance(item, PLAIN) or is_record(item) for item in vars(value).values())


def _copy_tensor(value: Tensor) -> Tensor:
    new = value.detach().clone()
    return new.requires_grad_() if value.requires_grad else new


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


def _copy_attributes(new: Any, memo: dict[int, Any]) -> None:
    for name, item in getattr(new, "__dict__", {}).items():
        vars(new)[name] = copy_data(item, memo)
