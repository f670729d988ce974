"""Copies of a model's weights, and whether it has them still."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether its state is this one, bit for bit and in this order."""
    state = model.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
