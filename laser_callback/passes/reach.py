"""What an evaluation step can reach, and so may write to: found by walking, not by a list of names.

From the module, the datamodule, the datasets and the trainer's own callbacks the walk follows attributes (of objects,
of their classes, of functions), items of containers and closures. It stops at what belongs to Lightning itself, at
loggers, at libraries that show progress, and at what only the operating system can copy: threads, files, sockets.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections import UserDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import PreTrainedTokenizerBase

from laser_callback.passes.copies import slots
from laser_callback.passes.places import (
    GENERATORS,
    HOOKS,
    TEXTS,
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
    Variable,
    is_data,
)
from laser_callback.passes.values import ArrayValues, Bytes, PartsValues, TensorValues, is_plain, memory, parts
from laser_callback.passes.witness import QUEUES, Running, runs

# Of what holds data rather than state, a container of more items is one place; its items have none.
_MANY = 1000
_OF_DATA = ("trainer.datamodule", "the dataloaders")
_FED = (*_OF_DATA, "trainer.")  # where threads fill and empty queues at any time

# Kept by Lightning and by the callback itself; a logger is replaced as a whole.
_FOREIGN = (
    *(Fabric, Strategy, Logger, _BaseDataLoaderIter, PreTrainedTokenizerBase, types.ModuleType),
    *(torch.device, torch.dtype, torch.Size),
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


def reachable(roots: Mapping[str, Any], running: list[Running] | None = None) -> list[Place]:
    """The places that can be reached from ``roots``, by the names under which messages speak of them.

    What is there and can only be seen to move on is added to ``running``.
    """
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
        if running is not None and runs(value) and not (isinstance(value, QUEUES) and name.startswith(_FED)):
            running.append(Running(value, name))
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
    if isinstance(value, Tensor):
        yield Attributes(value, name)
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
        if isinstance(value, defaultdict):
            yield value.default_factory, f"{name}.default_factory"
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
    elif isinstance(value, Tensor):
        yield from ((item, f"{name}.{key}") for key, item in vars(value).items())
    elif runs(value):
        yield from ((item, name) for item in gc.get_referents(value))
    elif not isinstance(value, np.memmap):  # whose map is the memory of its elements
        if isinstance(value, np.ndarray) and value.dtype.hasobject and _is_entered(value, name):
            yield from ((item, f"{name}[{i}]") for i, item in enumerate(value.flat))
        elif isinstance(value, logging.Logger):
            yield value.handlers, f"{name}.handlers"
        elif isinstance(value, np.random.Generator):
            yield getattr(value.bit_generator, "seed_seq", None), f"{name}.bit_generator.seed_seq"
        elif isinstance(value, ContextVar):
            yield value.get(None), name
        yield from _attributes(value, name)


def _is_entered(value: Any, name: str) -> bool:
    return (value.size if isinstance(value, np.ndarray) else len(value)) <= _MANY or not name.startswith(_OF_DATA)


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


def _is_users(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] not in _LIBRARIES | _ACTIVE | sys.stdlib_module_names


def _is_object(value: Any) -> bool:
    """Whether it is one whose attributes can be read and put back."""
    if isinstance(value, threading.local):  # of which one sees what this thread has
        return True
    return not isinstance(value, (type, Tensor)) and _is_followed(type(value))


def _is_followed(kind: type) -> bool:
    packages = {str(base.__module__).partition(".")[0] for base in kind.__mro__[:-1]}  # no text in some made with C
    own = str(kind.__module__).partition(".")[0]
    return own not in _STANDARD | _ACTIVE and not packages & {
        "laser_callback",
        "threading",
        "multiprocessing",
        "socket",
    }


def _place_of(value: Any, name: str) -> Place | None:
    """The place of a container, tensor, array or generator; ``None`` for anything else."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or not (is_plain(value) or parts(value)):
            return None
        return TensorValues(value, name) if is_plain(value) else PartsValues(value, name)
    if isinstance(value, np.ndarray):
        return ArrayValues(value, name) if value.flags.writeable else None
    if isinstance(value, (*GENERATORS, *TEXTS)):
        return State(value, name)
    if isinstance(value, dict):
        return Items(value, name)
    if isinstance(value, (list, deque, set)):
        return Elements(value, name)
    if isinstance(value, ContextVar):
        return None if runs(value) else Variable(value, name)
    if isinstance(value, types.CellType):
        return Cell(value, name)
    return Bytes(value, name) if memory(value) is not None else None
