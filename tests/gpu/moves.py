"""Lightning brings a module to the device when a Trainer begins, and back to the CPU when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
from device import clock
from lightning.pytorch.strategies import SingleDeviceStrategy


@contextmanager
def staying(module: pl.LightningModule) -> Iterator[None]:
    """Within: the end of a Trainer leaves the module on the device."""
    module.cpu = lambda: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.cpu


class Moves:
    """How often, and for how many seconds, modules were brought to the device and back."""

    def __init__(self) -> None:
        self.trainers = 0
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within: moves count."""

        def timed(move: Callable[..., Any], trainers: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = clock()
                result = move(*args, **kwargs)
                self.seconds += clock() - begin
                self.trainers += trainers
                return result

            return call

        there, back = SingleDeviceStrategy.model_to_device, pl.LightningModule.cpu
        with (
            patch.object(SingleDeviceStrategy, "model_to_device", timed(there, 1)),
            patch.object(pl.LightningModule, "cpu", timed(back, 0)),
        ):
            yield
