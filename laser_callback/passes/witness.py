"""What no reduced pass should change, since it cannot be given back, and what tells cheaply whether one has."""

from __future__ import annotations

import copy
import gc
import io
import operator
import queue
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter
from typing_extensions import override

from laser_callback.passes.values import memory, parts, tensor_version

_PYTHONS = sys.stdlib_module_names | {"numpy"}
QUEUES = (queue.Queue, queue.SimpleQueue)


class Witness:
    """Something that all passes share. ``name`` says where it is found.

    Attributes:
        text: what a pass has changed, if it has changed this.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text

    def look(self) -> None:
        """Ahead of the reduced passes."""
        raise NotImplementedError

    def has_moved(self) -> bool:
        """After a pass."""
        raise NotImplementedError

    def has_a_copy(self) -> bool:
        """Whether ``isolate`` can be a cure."""
        return True


class Unmoved(Witness):
    """A tensor, array or memory that no reduced pass should change.

    What tells is a tensor's version, and some of the elements for what is written behind torch's back. One whose
    version the user's own pass moves, as that of a code book, is copied ahead of the reduced passes, compared, and put
    back.
    """

    def __init__(self, name: str, owner: Any, text: str) -> None:
        super().__init__(name, text)
        self._owner = owner
        self._version = _version(owner)
        self._some = _some(owner)
        self._total = _total(owner)
        self._copy: Tensor | None = None
        self._looks = 0

    @override
    def look(self) -> None:
        version = _version(self._owner)
        if version != self._version:
            self._version, self._copy, self._some = version, self._owner.detach().clone(), _some(self._owner)

    @override
    def has_moved(self) -> bool:
        version, self._looks = _version(self._owner), self._looks + 1
        rarely = self._looks & (self._looks - 1) == 0
        if version is not None and version == self._version and not rarely:
            return False
        if self._copy is not None and version != self._version:
            moved = not torch.equal(self._owner.detach(), self._copy)
            if moved:
                self._owner.data.copy_(self._copy)
            return moved
        if rarely and _total(self._owner) != self._total:
            return True
        some = _some(self._owner)
        return some.device == self._some.device and not torch.equal(some, self._some)


def _version(owner: Any) -> int | None:
    return tensor_version(owner) if isinstance(owner, Tensor) and not parts(owner) else None


def _total(owner: Any) -> int:
    """The sum of all elements of an array or memory, which has no version; 0 where to read it would take long."""
    if isinstance(owner, Tensor):
        return 0
    array = np.asarray(owner if isinstance(owner, np.ndarray) else memory(owner))
    if array.dtype.hasobject or not array.flags.forc or array.nbytes > 2**30:
        return 0
    return int(array.ravel("K").view(np.uint8)[: array.nbytes // 8 * 8].view(np.uint64).sum())


def _some(owner: Any) -> Tensor:
    """A few of its elements, as bytes."""
    if not isinstance(owner, Tensor):
        view = owner if isinstance(owner, np.ndarray) else memory(owner)
        owner = np.zeros(0) if view is None else np.asarray(view)
        if owner.dtype.hasobject or not owner.size:
            return torch.zeros(0)
        flat = owner.reshape(-1) if owner.flags.forc else owner[:1].reshape(-1)
        return torch.frombuffer(bytearray(flat[:: max(1, flat.size // 256)].tobytes()), dtype=torch.uint8)
    if parts(owner):
        return torch.cat([_some(part) for part in parts(owner)])
    if owner.is_meta or owner.layout is not torch.strided or not owner.numel():
        return torch.zeros(0)
    flat = owner.detach().reshape(-1) if owner.is_contiguous() else owner.detach()[:1].reshape(-1)
    return flat[:: max(1, flat.numel() // 256)].clone().view(torch.uint8)


class Running(Witness):
    """An iterator, a running generator, a queue: it can be seen to move on, and not be brought back."""

    def __init__(self, owner: Any, name: str) -> None:
        kind = type(owner).__name__
        super().__init__(name, f"`{name}`, {'an' if kind[0] in 'aeiou' else 'a'} {kind} that cannot be brought back")
        self._owner = owner
        self._seen = self._see()

    def _see(self) -> list[Any]:
        owner = self._owner
        if isinstance(owner, QUEUES):
            return [owner.qsize(), getattr(owner, "unfinished_tasks", 0)]
        if isinstance(owner, _BaseDataLoaderIter):
            return [owner._num_yielded]
        if isinstance(owner, GeneratorType):
            state: list[Any] = [owner.gi_frame and owner.gi_frame.f_lasti]
        elif isinstance(owner, ContextVar):
            return [owner.get(None)]
        else:  # `count` and `repeat` show where they are, those over a sequence how much is left
            state = [operator.length_hint(owner, -1), repr(owner)]
            state += [getattr(owner, name, 0) for name in ("index", "n_children_spawned")]  # of NumPy's
        # Tuples are taken apart, since some iterators use one again.
        held = (item if isinstance(item, tuple) else (item,) for item in gc.get_referents(owner))
        return [*state, *(item for items in held for item in items)]

    @override
    def look(self) -> None:
        self._seen = self._see()

    @override
    def has_moved(self) -> bool:
        now = self._see()
        return len(now) != len(self._seen) or not all(map(_same, now, self._seen))

    @override
    def has_a_copy(self) -> bool:
        try:
            copy.deepcopy(self._owner)
        except (TypeError, ValueError, NotImplementedError):
            return False
        return not isinstance(self._owner, _BaseDataLoaderIter)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in (int, float, str) and bool(a == b))


def runs(value: Any) -> bool:
    """Whether it is used up by whoever uses it, and keeps to itself how far it is."""
    if isinstance(value, (*QUEUES, _BaseDataLoaderIter, GeneratorType, np.random.SeedSequence)):
        return True
    if isinstance(value, ContextVar):
        return value.get(runs) is runs  # else it has a place
    module = getattr(type(value), "__module__", "")
    iterates = isinstance(value, Iterator) or module == "itertools"
    is_followed = type(value).__dictoffset__ != 0  # its attributes are; to ask a mock for one would make it
    return iterates and not is_followed and module.partition(".")[0] in _PYTHONS and not isinstance(value, io.IOBase)
