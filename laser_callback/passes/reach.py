"""What an evaluation step can reach, and so may write to: found by walking, not by a list of names.

From the module, the datamodule, the datasets and the trainer's own callbacks the walk follows attributes (of objects,
of their classes, of functions), items of containers and closures. It stops at what belongs to Lightning itself, at
loggers, at libraries that show progress, and at what only the operating system can copy: threads, files, sockets.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
import weakref
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
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import PreTrainedTokenizerBase

from laser_callback.passes.copies import slots
from laser_callback.passes.places import (
    GENERATORS,
    HOOKS,
    TEXTS,
    ArrayValues,
    Attributes,
    Cell,
    ClassAttributes,
    Elements,
    Items,
    ModuleAttributes,
    ParameterAttributes,
    Place,
    Slots,
    State,
    TensorValues,
    is_data,
)

# Of what holds data rather than state, a container of more items is one place; its items have none.
_MANY = 1000
_OF_DATA = ("trainer.datamodule", "the dataloaders")

# Kept by Lightning and by the callback itself; a logger is replaced as a whole.
_FOREIGN = (
    *(Fabric, Strategy, Logger, _BaseDataLoaderIter, PreTrainedTokenizerBase, types.ModuleType),
    *(torch.device, torch.dtype, torch.Size, Enum),
)
_ATOMS = {bool, int, float, str, type(None)}  # most of what there is
_PLAIN = (int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, *GENERATORS)

# What these hold is neither copied nor counted, but handed on; and it is all that the collector sees in them.
_WRAPPERS = (
    *(types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, types.MappingProxyType, types.CellType),
    *(classmethod, staticmethod, property, functools.partial),
)

_MODULE_OWN = {*vars(nn.Module()), "_trainer"}
_STANDARD = sys.stdlib_module_names - {
    *("collections", "types", "argparse", "functools", "random", "weakref", "_weakrefset"),
}
_ACTIVE = {"laser_callback", "tqdm", "rich", "wandb", "mlflow", "neptune", "comet_ml", "aim", "tensorboard"}
_LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
_LIBRARIES = {"torch", *_LIGHTNING, "torchmetrics", "transformers", "numpy"}


def reachable(roots: Mapping[str, Any]) -> list[Place]:
    """The places that can be reached from ``roots``, by the names under which messages speak of them."""
    places: list[Place] = []
    seen: dict[int, Any] = {}  # keeps alive what was seen, so that its id stays its own
    pending: list[tuple[Any, str]] = [(value, name) for name, value in reversed(list(roots.items()))]
    while pending:
        value, name = pending.pop()
        if type(value) in _ATOMS:
            continue
        value = _referent(value)
        if (isinstance(value, _PLAIN) and not isinstance(value, GENERATORS)) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, _FOREIGN):
            continue
        places += _places(value, name)
        pending += reversed(list(_inside(value, name)))
    return places


def _referent(value: Any) -> Any:
    """What a weak reference refers to; anything else is itself."""
    if type(value) in weakref.ProxyTypes:  # which answer as what they refer to
        try:
            return value.__sizeof__.__self__
        except ReferenceError:
            return None
    return value() if isinstance(value, weakref.ref) else value


def _places(value: Any, name: str) -> Iterator[Place]:
    if isinstance(value, torch.jit.ScriptModule):  # whose attributes live in C++; its tensors are found
        return
    if isinstance(value, nn.Module):
        yield ModuleAttributes(value, name)
        yield from _slots(value, name)
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
        yield from _slots(value, name)


def _slots(value: Any, name: str) -> Iterator[Place]:
    if slots(value):
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
        yield from ((getattr(value, key, None), f"{name}.{key}") for key in slots(value))
        yield from _classes(value)
    elif isinstance(value, type):
        if _is_users(value.__module__):
            yield from (
                (item, f"{value.__qualname__}.{key}") for key, item in vars(value).items() if _may_keep(key, item)
            )
            yield from _classes(value)
    elif isinstance(value, (dict, UserDict)):
        if isinstance(value, dict) and _is_entered(value, name):
            yield from ((item, f"{name}[{key!r}]") for key, item in dict.items(value))
        yield from _attributes(value, name)
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        if _is_entered(value, name):
            yield from ((item, f"{name}[{i}]") for i, item in enumerate(value))
        yield from _attributes(value, name)
    elif isinstance(value, types.FunctionType):
        free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((cell, f"{variable} of {value.__qualname__}") for variable, cell in free)
        yield from ((item, f"a default of {value.__qualname__}") for item in value.__defaults__ or ())
        yield value.__kwdefaults__, f"a default of {value.__qualname__}"
        yield value.__dict__, value.__qualname__
    elif isinstance(value, _WRAPPERS):
        yield from ((item, name) for item in gc.get_referents(value))
    elif isinstance(value, (pl.Trainer, _Loop)):  # by the name that they have for all
        for key, item in vars(value).items():
            if isinstance(item, _Loop) or type(item).__module__.partition(".")[0] not in _LIGHTNING:
                yield item, f"trainer.{key}"
        yield from _classes(value)
    elif not isinstance(value, Tensor):
        yield from _attributes(value, name)


def _is_entered(value: Sized, name: str) -> bool:
    return len(value) <= _MANY or not name.startswith(_OF_DATA)


def _attributes(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    if _is_object(value):
        attributes = getattr(value, "__dict__", {}).items()
        # What an optimizer has of each parameter is as large as the model, and changes only in training.
        left_out = "state" if isinstance(value, Optimizer) else None
        yield from ((item, f"{name}.{key}") for key, item in attributes if key != left_out)
        yield from ((getattr(value, key, None), f"{name}.{key}") for key in slots(value))
        yield from _classes(value)


def _classes(value: Any) -> Iterator[tuple[Any, str]]:
    return ((kind, kind.__qualname__) for kind in type(value).__mro__)


def _may_keep(name: str, value: Any) -> bool:
    """Of a class: what it holds, and its functions and other descriptors, for their closures and defaults."""
    return hasattr(type(value), "__get__") or isinstance(value, type) or is_data(name, value)


def _is_users(module: str) -> bool:
    return module.partition(".")[0] not in _LIBRARIES | _ACTIVE | sys.stdlib_module_names


def _is_object(value: Any) -> bool:
    """Whether it is one whose attributes can be read and put back."""
    if isinstance(value, threading.local):  # of which one sees what this thread has
        return True
    return not isinstance(value, (type, Tensor)) and _is_followed(type(value))


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
        return TensorValues(value, name) if is_plain(value) and not isinstance(value, nn.Parameter) else None
    if isinstance(value, np.ndarray):
        return ArrayValues(value, name) if value.flags.writeable else None
    if isinstance(value, (*GENERATORS, *TEXTS)):
        return State(value, name)
    if isinstance(value, dict):
        return Items(value, name)
    if isinstance(value, (list, deque, set, bytearray, array)):
        return Elements(value, name)
    return Cell(value, name) if isinstance(value, types.CellType) else None


def is_plain(tensor: Tensor) -> bool:
    """Whether its elements can be read and written as those of any tensor."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(tensor)
    return plain and not tensor.is_meta and tensor.layout is torch.strided and not tensor.is_nested
