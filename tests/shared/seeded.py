"""What is random, from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """What ``build`` makes from this seed; who draws next draws what they would have drawn without it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
