"""A pytest plugin (``-p on_device``): the tests that were written for the CPU, on another device.

The tests stay as they are. What *they* make without naming a device is made on the device, models included, and a
Trainer that they ask for on the CPU runs there. What the package makes stays where it puts it: that is what is tested.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from cpu_only import CPU_ONLY
from device import DEVICE, ON_GPU
from torch import Tensor
from torch.utils._device import DeviceContext, _device_constructors

# The package is under test; loaders and their samplers work on the CPU whoever runs them.
_LEFT_ALONE = ("laser_callback", "torch.utils.data", "lightning")
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)


class OnDevice(DeviceContext):
    """As ``with torch.device(...)``, but by who calls, and with generators of the CPU: their numbers are moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _caller().startswith(_LEFT_ALONE):
            return func(*args, **kwargs)
        if func in _device_constructors() and kwargs.get("device") is None:
            if kwargs.get("generator") is None:
                return func(*args, **kwargs | {"device": self.device})
            return func(*args, **kwargs).to(self.device)
        if func in _TO_NUMPY:
            return func(args[0].cpu(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name == "__torch_function__":  # another mode passes it on
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")


@contextmanager
def trainers_on_device() -> Iterator[None]:
    """Within: a Trainer on the CPU runs on the device, and leaves its module there when it ends, as it does here."""
    make = pl.Trainer.__init__

    @functools.wraps(make)  # command lines read the arguments off it
    def moved(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("accelerator") == "cpu":
            kwargs |= {"accelerator": DEVICE.type, "devices": kwargs.get("devices", 1)}
        make(self, *args, **kwargs)

    with patch.object(pl.Trainer, "__init__", moved), patch.object(pl.LightningModule, "cpu", lambda self: self):
        yield


def pytest_configure(config: pytest.Config) -> None:
    if not ON_GPU:
        return  # everything is there already
    # Tests ask for the same bits twice.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Before modules of tests are imported: some make their inputs at once.
    config.stash[_ENTERED] = [OnDevice(DEVICE), trainers_on_device()]
    for context in config.stash[_ENTERED]:
        context.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    for context in reversed(config.stash.get(_ENTERED, [])):
        context.__exit__(None, None, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if ON_GPU else ():
        why = next((why for part, why in CPU_ONLY.items() if part in item.nodeid), None)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the CPU: {why}"))


_ENTERED = pytest.StashKey[list[Any]]()
