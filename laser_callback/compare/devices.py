"""On what devices, and under what strategies of Lightning's, weights can be swapped."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies and devices under which the weights cannot be swapped."""
    strategy = trainer.strategy
    # By exact class: subclasses shard or live on devices whose parameters do not follow a pointer swap.
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise MisconfigurationException(
            f"rank reduction supports single devices and DDP, got {type(strategy).__name__}: parameters that are "
            "sharded or flattened do not follow a swap. Evaluate with `Trainer(devices=1)` or `strategy='ddp'`."
        )
    if strategy.root_device.type not in ("cpu", "cuda"):
        raise MisconfigurationException(
            f"rank reduction supports the CPU and CUDA devices, got {strategy.root_device.type!r}: its sums and "
            "factorisations need float64. Evaluate with `Trainer(accelerator='cpu')`."
        )


def accelerator_of(accelerator: str) -> str:
    """What is meant by "auto": CUDA where there is a device, else the CPU. Lightning would take Apple's GPU."""
    if accelerator != "auto":
        return accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"
