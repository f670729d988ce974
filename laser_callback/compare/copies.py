"""Copies of what two passes over one batch would both write to.

A copy holds what its original holds, and shares nothing that can be written to: containers, tensors, generators and
objects of plain values are copied, models, datasets and functions stay the ones that they are.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import UserDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

CONTAINERS = (dict, UserDict, list, tuple, set, frozenset, deque)
_Generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
VALUES = (Tensor, np.ndarray, np.generic, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_UNCHANGING = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device}
PLAIN = (*CONTAINERS, *_Generators, *VALUES)


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
        new = value if isinstance(value, nn.Parameter) else _copy_tensor(value)
    elif isinstance(value, np.ndarray):
        new = value.copy()
    elif isinstance(value, torch.Generator):
        new = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, _Generators):
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
    elif is_record(value):
        new = copy.copy(value)
        memo[id(value)] = (value, new)
        _copy_attributes(new, memo)
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


def _copy_attributes(new: Any, memo: dict[int, Any]) -> None:
    for name, item in getattr(new, "__dict__", {}).items():
        vars(new)[name] = copy_data(item, memo)
