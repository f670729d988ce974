"""Copies of a model's weights, and whether it has them still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether its state is this one, bit for bit and in this order."""
    state = model.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


class Snapshot:
    """Everything about a model's parameters that must be as before: objects, storage, versions, values, flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.facts = self._facts()
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.state_names = list(model.state_dict())

    def _facts(self) -> dict[str, tuple[Any, ...]]:
        # `_version` of an inference tensor does not exist.
        facts: dict[str, tuple[Any, ...]] = {}
        for name, p in self.model.named_parameters():
            version, gradient = None if p.is_inference() else p._version, None if p.grad is None else p.grad.data_ptr()
            flags = p.dtype, p.requires_grad, p.is_leaf, p.is_inference()
            facts[name] = (id(p), p.data_ptr(), version, p.stride(), gradient, *flags)
        return facts

    def is_restored(self) -> bool:
        return (
            self._facts() == self.facts
            and all(torch.equal(self.values[name], p) for name, p in self.model.named_parameters())
            and list(self.model.state_dict()) == self.state_names
        )
