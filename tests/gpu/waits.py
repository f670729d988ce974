"""Which lines make the host wait for the device, and how often.

On CUDA these are the operations that torch's own ``set_sync_debug_mode`` warns of: copies to the host that are waited
for, and operations whose result's size is data (``nonzero``, masks as indices). On the CPU nobody waits; counted there
are, as a rehearsal, the operations that would wait on CUDA.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from device import ON_GPU
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).parents[2]
_WARNING = "called a synchronizing CUDA operation"
_WOULD_WAIT = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Within: waits are counted under the line that they are for. To be left after the device is idle."""
    counts: Counter[str] = Counter()
    with _cuda(counts) if ON_GPU else _Operations(counts):
        yield counts


@contextmanager
def _cuda(counts: Counter[str]) -> Iterator[None]:
    def note(message: Any, *_: Any, **__: Any) -> None:
        if _WARNING in str(message):
            counts[_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _WOULD_WAIT:
            self._counts[_line()] += 1
        return func(*args, **kwargs or {})


def _line() -> str:
    """The package's line that is being run, and what it called; or, where the package is not, whoever called torch."""
    frame: Any = sys._getframe(2)
    called = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("laser_callback"):
            return f"{_place(frame)}{f' > {called}' if called else ''}"
        if not called and name.partition(".")[0] not in ("torch", "warnings", "contextlib", __name__):
            called = _place(frame)
        frame = frame.f_back
    return called


def _place(frame: Any) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-2:])
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"
