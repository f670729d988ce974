"""Adapters of PEFT folded into the weights under them, for a while.

A cut of a weight under an adapter would leave out what the adapter adds. ``with merged(model): ...`` makes the model's
effective weights its weights, so that they can be searched and cut like any; on the way out weights and adapters are
what they were, bit for bit (PEFT's own ``unmerge`` subtracts, and leaves a rounding error). :func:`put_effective` is
for where the adapters stay: it writes such weights into a state dict, under adapters that then add nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.support.interrupts import whole


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers in ``model``: those that wrap a layer and add to it."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # a model has such layers only if PEFT has been imported
    if peft is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer)]


def unmerged_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Those of :func:`adapted_layers` that compute something else than their base layer does.

    Left out is a layer whose adapters are merged already, switched off, or not among the active ones.
    """
    return [(name, layer) for name, layer in adapted_layers(model) if not layer.merged and _adds(layer)]


def merged(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which the active adapters of ``model`` are merged; nothing happens to a model without adapters.

    Args:
        model: any module with PEFT's layers somewhere in it.

    Raises:
        ValueError: if a weight under an adapter is tied to another module's or quantised, or PEFT cannot merge it.
            The model is then untouched.
    """
    refuse_unmergeable(model)
    layers = [layer for _, layer in unmerged_layers(model)]
    return _merged(layers, _Kept(layers))


@whole
def _merged(layers: Sequence[Any], kept: _Kept) -> Generator[None, None, None]:
    try:
        kept.make_room()
        for layer in layers:
            layer.merge()
        yield
    finally:
        try:
            kept.put_back()
        except BaseException:  # Ctrl-C in the middle: finish, then let it through
            kept.put_back()
            raise


class _Kept:
    """What PEFT's ``merge`` writes to, as it was: it adds in place, exchanges layers, and takes notes."""

    def __init__(self, layers: Sequence[Any]) -> None:
        modules = list(dict.fromkeys(module for layer in layers for module in layer.modules()))
        self._registered = [(registry, dict(registry)) for module in modules for registry in _registries(module)]
        self._notes = [(layer, list(layer.merged_adapters)) for layer in layers]
        weights = [tensor for layer in layers for _, tensor in _weights_under(layer)]
        self._data = [(tensor, tensor.data, tensor.data.clone()) for tensor in weights]

    def make_room(self) -> None:
        for tensor, _, copy in self._data:
            tensor.data = copy

    def put_back(self) -> None:
        for registry, content in self._registered:
            registry.clear()
            registry.update(content)
        for tensor, data, _ in self._data:
            tensor.data = data
        for layer, names in self._notes:
            layer.merged_adapters = names


def _registries(module: Any) -> Iterator[dict[str, Any]]:
    yield module._modules
    if isinstance(getattr(module, "_caches", None), dict):
        yield module._caches


def _weights_under(layer: Any) -> list[tuple[str, Tensor]]:
    """With buffers, in which some keep what is not trained."""
    return [*layer.get_base_layer().named_parameters(), *layer.get_base_layer().named_buffers()]


# ---- what cannot be merged -------------------------------------------------------------------------------------------


def refuse_unmergeable(model: nn.Module) -> None:
    """What :func:`merged` needs.

    Raises:
        ValueError: if a weight under an adapter is tied to another module's, which would change with it; is quantised,
            and would be rounded again; or is not the same object for long.
    """
    layers = unmerged_layers(model)
    for name, layer in layers:
        for own, tensor in _weights_under(layer):
            if "weight" in own and not _is_ordinary(tensor):
                shown = f"{type(tensor).__name__} of {tensor.dtype}"
                raise ValueError(
                    f"the adapter of `{name}` cannot be merged for a while: `{own}` under it is quantised or sharded "
                    f"({shown}). Load the model without a quantization config, on one device"
                )
        if not set(layer.parameters()) == set(layer.parameters()):
            raise ValueError(
                f"the adapter of `{name}` cannot be merged for a while: PEFT makes the weights under it anew whenever "
                f"they are listed ({type(layer).__name__}). Adapt its linear layers, or merge for good: "
                "`model.merge_and_unload()`"
            )
    if (tie := _tie(model, [layer for _, layer in layers])) is not None:
        adapted, other = tie
        raise ValueError(
            f"the adapter of `{adapted}` cannot be merged: its weight is tied to that of `{other}`, which would change "
            "with it. Leave both out of the adapter's `target_modules`, or untie them (a copy of the weight, and "
            "`tie_word_embeddings=False` in the config) before the adapter is added"
        )


def _adds(layer: Any) -> bool:
    own = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    held = {key for each in own if isinstance(each, (nn.ModuleDict, nn.ParameterDict)) for key in each}
    return not layer.disable_adapters and not held.isdisjoint(layer.active_adapters)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and tensor.is_floating_point() and tensor.element_size() >= 2


def _tie(model: nn.Module, layers: Sequence[Any]) -> tuple[str, str] | None:
    """The names of one of ``layers`` and of another module whose weights share memory, if any do.

    All names of a module are looked at: T5 calls its embedding by three, and an adapter stands at one of them.
    """
    own = {id(layer) for layer in layers}
    under = {id(module) for layer in layers for module in layer.get_base_layer().modules()}
    users: dict[str, tuple[nn.Module, str]] = {}  # by the name of a module: the layer with an adapter that it is in
    spans: list[tuple[str, int, int, nn.Module, str]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        user = users.get(path.rpartition(".")[0])
        if user is None and id(module) in own:
            user = module, path
        if user is not None:
            users[path] = user
            if id(module) not in under:  # adapters may share what they add
                continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if type(tensor) in (nn.Parameter, Tensor) and tensor.numel() and tensor.data_ptr():
                last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                stop = start + (last + 1) * tensor.element_size()
                spans.append((str(tensor.device), start, stop, *(user or (module, path))))
    spans.sort(key=lambda span: span[:3])
    furthest = ("", 0, 0, model, "")  # if a span overlaps with any before it, then with the one that goes furthest
    for span in spans:
        if span[0] == furthest[0] and span[1] < furthest[2] and span[3] is not furthest[3]:
            if id(span[3]) in own:
                return span[4], furthest[4]
            if id(furthest[3]) in own:
                return furthest[4], span[4]
        if span[0] != furthest[0] or span[2] > furthest[2]:
            furthest = span
    return None


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
