"""Loggers that a reduced arm sees in the place of the user's: of the same class, with the same values, but mute.

A step may ask for ``isinstance(self.logger, TensorBoardLogger)``, ``self.logger.experiment.log_dir`` or
``self.logger.version``: what is read is answered from the user's logger. What is called does nothing and returns
``None``, as on the ranks that do not log; what is set is the arm's own; and paths within the logger's folder lead into
one of the arm's, where the step may write files.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from datetime import date, time, timedelta
from enum import Enum
from functools import cache, cached_property, partial
from numbers import Number
from pathlib import PurePath
from tempfile import TemporaryDirectory
from types import MethodType, ModuleType
from typing import Any, cast
from uuid import UUID
from weakref import WeakValueDictionary

import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils._pytree import tree_map

from laser_callback.passes.copies import copy_data

_FOLDERS = ("save_dir", "root_dir", "log_dir")
_SOURCE = "_laser_source"
_NUMBERS = (Number, Tensor, np.ndarray, np.generic, torch.dtype, torch.device)
_VALUES = (*_NUMBERS, bytes, set, frozenset, date, time, timedelta, UUID, Enum, type, ModuleType, type(None))


def silent(logger: Logger) -> Logger:
    """A mute stand-in for ``logger``."""
    return cast("Logger", _Source(logger).stand_in(logger))


class Instead:
    """What one arm has in the place of loggers and of what they hold, such as their experiments.

    Args:
        mute: the stand-ins of the trainer's loggers.
    """

    def __init__(self, mute: Iterable[Logger]) -> None:
        self._found: dict[int, tuple[Any, Any]] = {}  # keeps alive what is stood in for, so that its id stays its own
        for stand_in in mute:
            source, logger = _own(stand_in)[_SOURCE]
            self._found[id(logger)] = logger, stand_in
            for value in getattr(logger, "__dict__", {}).values():  # not by its properties, which may begin a run
                if not isinstance(value, (*_VALUES, str, PurePath, dict, list, tuple)):
                    self._found.setdefault(id(value), (value, source.answer(value)))

    def __call__(self, value: Any) -> Any:
        """The stand-in for ``value``, or where there is none ``value`` itself."""
        if id(value) in self._found:
            return self._found[id(value)][1]
        return _nothing if type(value) is MethodType and id(value.__self__) in self._found else value


class _Source:
    """What the stand-ins for one logger, and for the objects that are read from it, have in common."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._stand_ins: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the id of what each refers to

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="laser-", ignore_cleanup_errors=True)

    def stand_in(self, value: Any) -> Any:
        """The one stand-in for an object, by its identity."""
        new = self._stand_ins.get(id(value))
        if new is None:
            new = object.__new__(_stand_in_class(type(value)))  # type: ignore[arg-type]  # a type is hashable
            _own(new)[_SOURCE] = self, value
            self._stand_ins[id(value)] = new
        return new

    def answer(self, value: Any) -> Any:
        """What a step gets to see of a value of the logger's, which may be a container."""
        return tree_map(self._answer, value)

    def _answer(self, value: Any) -> Any:
        if isinstance(value, (str, PurePath)):
            return self._moved(value)
        if isinstance(value, _VALUES):
            return copy_data(value)
        return _nothing if inspect.isroutine(value) or isinstance(value, partial) else self.stand_in(value)

    def _moved(self, path: Any) -> Any:
        """The text itself, or where it is a path in the logger's folder, its place in the arm's."""
        for name in _FOLDERS:
            folder = getattr(self._logger, name, None)
            root = str(folder).rstrip(os.sep) if isinstance(folder, (str, PurePath)) else ""
            if root and (str(path).rstrip(os.sep) == root or str(path).startswith(root + os.sep)):
                moved = os.path.join(self._folder.name, str(path)[len(root) :].strip(os.sep)).rstrip(os.sep)
                os.makedirs(os.path.dirname(moved) if os.path.isfile(path) else moved, exist_ok=True)
                return type(path)(moved)
        return path


class _StandIn:
    """In front of the class that it stands in for; what is read goes the way of :meth:`_Source.answer`."""

    def __getattribute__(self, name: str) -> Any:
        own = _own(self)
        if name in own:
            return own[name]
        source, value = own[_SOURCE]
        if name == "__class__":
            return type(value)
        if name.startswith("__") and name.endswith("__"):
            return object.__getattribute__(self, name)
        return source.answer(getattr(value, name))

    def __setattr__(self, name: str, value: Any) -> None:
        _own(self)[name] = value

    def __delattr__(self, name: str) -> None:
        _own(self).pop(name, None)

    def __getitem__(self, key: Any) -> Any:
        source, value = _own(self)[_SOURCE]
        return source.answer(value[key])

    def __iter__(self) -> Iterator[Any]:
        source, value = _own(self)[_SOURCE]
        return map(source.answer, value)

    def __enter__(self) -> Any:
        return self


def _own(stand_in: Any) -> dict[str, Any]:
    own: dict[str, Any] = object.__getattribute__(stand_in, "__dict__")
    return own


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


for _name in ("__call__", "__setitem__", "__delitem__", "__exit__", "__del__"):
    setattr(_StandIn, _name, _nothing)


@cache
def _stand_in_class(kind: type) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    try:
        found = type(kind)(kind.__name__, (_StandIn, kind), names)
        object.__new__(found)  # past its own `__new__`, which may give away the one instance that there is
    except TypeError:  # no such class, or no such object, can be made; `isinstance` asks for `__class__` as well
        return type(kind.__name__, (_StandIn,), names)
    return found
