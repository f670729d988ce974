"""What an evaluation step can reach, and so may write to: found by walking, not by a list of names.

From the module, the datamodule, the datasets and the trainer's own callbacks the walk follows attributes (of objects,
of their classes, of functions), items of containers and closures. It stops at what belongs to Lightning itself, at
loggers, at libraries that show progress, and at what only the operating system can copy: threads, files, sockets.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from array import array
from collections import UserDict, deque
from collections.abc import Iterator, Mapping, Sized
from enum import Enum
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from laser_callback.compare.places import (
    GENERATORS,
    HOOKS,
    ArrayValues,
    Attributes,
    Cell,
    ClassAttributes,
    Elements,
    GeneratorState,
    Items,
    ModuleAttributes,
    ParameterAttributes,
    Place,
    Slots,
    TensorValues,
    is_data,
)

# Around the module a container of more items is one place; its items have none. They are data rather than state.
_MANY = 1000

# Kept by Lightning and by the callback itself; a logger is replaced as a whole.
_FOREIGN = (
    *(pl.Trainer, Fabric, Strategy, Logger, Sampler, Optimizer, LRScheduler, PreTrainedTokenizerBase, types.ModuleType),
    *(torch.device, torch.dtype, torch.Size, Enum),
)
_PLAIN = (int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, *GENERATORS)

_MODULE_OWN = {*vars(nn.Module()), "_trainer"}
_STANDARD = sys.stdlib_module_names - {"collections", "types", "argparse", "functools", "random"}
_ACTIVE = {"laser_callback", "tqdm", "rich", "wandb", "mlflow", "neptune", "comet_ml", "aim", "tensorboard"}
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "transformers", "numpy"}


def reachable(roots: Mapping[str, Any]) -> list[Place]:
    """The places that can be reached from ``roots``, by the names under which messages speak of them."""
    places: list[Place] = []
    seen: dict[int, Any] = {}  # keeps alive what was seen, so that its id stays its own
    pending: list[tuple[Any, str]] = [(value, name) for name, value in reversed(list(roots.items()))]
    while pending:
        value, name = pending.pop()
        if (isinstance(value, _PLAIN) and not isinstance(value, GENERATORS)) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, _FOREIGN):
            continue
        places += _places(value, name)
        pending += reversed(list(_inside(value, name)))
    return places


def _places(value: Any, name: str) -> Iterator[Place]:
    if isinstance(value, nn.Module):
        if not isinstance(value, torch.jit.ScriptModule):  # whose attributes live in C++; its tensors are found
            yield ModuleAttributes(value, name)
        return
    if isinstance(value, nn.Parameter):
        yield ParameterAttributes(value, name)
        return
    if isinstance(value, type):
        if _is_users(value.__module__):
            yield ClassAttributes(value, name)
        return
    place = _place_of(value, name)
    if place is not None:
        yield place
    if _is_object(value):
        if getattr(value, "__dict__", None) is not None and not isinstance(value, types.FunctionType):
            yield Attributes(value, name)
        if any("__slots__" in vars(kind) for kind in type(value).__mro__[:-1]):
            yield Slots(value, name)


def _inside(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    """What ``value`` refers to."""
    if isinstance(value, nn.Module):
        yield from ((item, f"{name}.{key}") for key, item in vars(value).items() if key not in _MODULE_OWN)
        children = (
            *value.named_parameters(recurse=False),
            *value.named_buffers(recurse=False),
            *value.named_children(),
        )
        yield from ((item, f"{name}.{key}") for key, item in children)
        yield from ((hook, f"{name}.{key}") for key in HOOKS for hook in vars(value).get(key, {}).values())
        yield from _classes(value)
    elif isinstance(value, type):
        if _is_users(value.__module__):
            yield from (
                (item, f"{value.__qualname__}.{key}") for key, item in vars(value).items() if _may_keep(key, item)
            )
    elif isinstance(value, (dict, UserDict)):
        if isinstance(value, dict) and _is_entered(value, name):
            yield from ((item, f"{name}[{key!r}]") for key, item in dict.items(value))
        yield from _attributes(value, name)
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        if _is_entered(value, name):
            yield from ((item, f"{name}[{i}]") for i, item in enumerate(value))
        yield from _attributes(value, name)
    elif isinstance(value, types.CellType):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield value.cell_contents, name
    elif isinstance(value, types.FunctionType):
        free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((cell, f"{variable} of {value.__qualname__}") for variable, cell in free)
        yield from ((item, f"a default of {value.__qualname__}") for item in value.__defaults__ or ())
        yield value.__kwdefaults__, f"a default of {value.__qualname__}"
        yield value.__dict__, value.__qualname__
    elif isinstance(value, types.MethodType):
        yield value.__self__, name
        yield value.__func__, name
    elif isinstance(value, (classmethod, staticmethod)):
        yield value.__func__, name
    elif isinstance(value, property):
        yield from ((function, name) for function in (value.fget, value.fset))
    elif isinstance(value, functools.partial):
        yield from ((item, name) for item in (value.func, value.args, value.keywords))
    elif isinstance(value, DataLoader):
        yield value.dataset, f"{name}.dataset"
    elif not isinstance(value, Tensor):
        yield from _attributes(value, name)


def _is_entered(value: Sized, name: str) -> bool:
    return len(value) <= _MANY or name.startswith("module")


def _attributes(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    if _is_object(value):
        yield from ((item, f"{name}.{key}") for key, item in getattr(value, "__dict__", {}).items())
        yield from ((item, f"{name}.{key}") for key, item in Slots(value, name).read().items())
        yield from _classes(value)


def _classes(value: Any) -> Iterator[tuple[Any, str]]:
    return ((kind, kind.__qualname__) for kind in type(value).__mro__)


def _may_keep(name: str, value: Any) -> bool:
    """Of a class: what it holds, and its functions, for their closures and defaults."""
    routines = (types.FunctionType, classmethod, staticmethod, property, type)
    return is_data(name, value) or isinstance(value, routines)


def _is_users(module: str) -> bool:
    return module.partition(".")[0] not in _LIBRARIES | _ACTIVE | sys.stdlib_module_names


def _is_object(value: Any) -> bool:
    """Whether it is one whose attributes can be read and put back."""
    return not isinstance(value, (type, Tensor, DataLoader)) and _is_followed(type(value))


def _is_followed(kind: type) -> bool:
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__[:-1]}
    own = kind.__module__.partition(".")[0]
    return own not in _STANDARD | _ACTIVE and not packages & {
        "laser_callback",
        "threading",
        "multiprocessing",
        "socket",
    }


def _place_of(value: Any, name: str) -> Place | None:
    """The place of a container, tensor, array or generator; ``None`` for anything else."""
    if isinstance(value, Tensor):
        plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and not value.is_meta
        plain = plain and value.layout is torch.strided and not value.is_nested
        return TensorValues(value, name) if plain and not isinstance(value, nn.Parameter) else None
    if isinstance(value, np.ndarray):
        return ArrayValues(value, name) if value.flags.writeable else None
    if isinstance(value, GENERATORS):
        return GeneratorState(value, name)
    if isinstance(value, dict):
        return Items(value, name)
    if isinstance(value, (list, deque, set, bytearray, array)):
        return Elements(value, name)
    return Cell(value, name) if isinstance(value, types.CellType) else None
