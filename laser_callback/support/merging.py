"""Adapters of PEFT folded into the weights under them, for a while.

A cut of a weight under an adapter would leave out what the adapter adds. ``with merged(model): ...`` makes the model's
effective weights its weights, so that they can be searched and cut like any; on the way out weights and adapters are
what they were, bit for bit (PEFT's own ``unmerge`` subtracts, and leaves a rounding error). :func:`put_effective` is
for where the adapters stay: it writes such weights into a state dict, under adapters that then add nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers in ``model``: those that wrap a layer and add to it."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # a model has such layers only if PEFT has been imported
    if peft is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer)]


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the active adapters of ``model`` are merged; nothing happens to a model without adapters.

    Args:
        model: any module with PEFT's layers somewhere in it.

    Raises:
        ValueError: from PEFT, where an adapter cannot be merged.
    """
    layers = [layer for _, layer in adapted_layers(model) if not layer.merged]
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            for parameter in layer.get_base_layer().parameters():
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()  # PEFT adds in place
            layer.merge()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters = []


def refuse_other_than_lora(model: nn.Module) -> None:
    """What :func:`put_effective` needs.

    Raises:
        ValueError: if ``model`` has adapters that do not add nothing when their last matrix is zero.
    """
    for name, layer in adapted_layers(model):
        plain = hasattr(layer, "lora_B") and not layer.lora_variant and not any(layer.lora_bias.values())
        if not plain:
            raise ValueError(
                f"`{name}` has an adapter that is more than W + BA ({type(layer).__name__}): cut weights cannot be put "
                "under it. Use LoRA without variants and bias, or merge the adapter into the model after training"
            )


def put_effective(state: MutableMapping[str, Any], model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put effective weights, by parameter name, into a state dict of ``model``, and silence the LoRA over them."""
    state.update(weights)
    for name, layer in adapted_layers(model):
        if any(key.startswith(f"{name}.base_layer.") for key in weights):
            for adapter in layer.active_adapters:
                key = f"{name}.lora_B.{adapter}.weight"
                if key in state:
                    state[key] = torch.zeros_like(state[key])
