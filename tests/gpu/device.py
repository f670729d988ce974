"""The device that everything here runs on, and clocks and memory that are right on it.

``LASER_TEST_DEVICE`` names it: "cuda", or "cpu" (the default), where the same code runs at small sizes.
"""

from __future__ import annotations

import os
import time

import torch

DEVICE = torch.device(os.environ.get("LASER_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"


def clock() -> float:
    """Seconds, with all work that the device was given done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak() -> None:
    """From now on the peak of the device's memory counts."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The most GiB that tensors have taken since, with what was there before; nothing is known of the CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
