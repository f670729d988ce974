"""The layer stacks of a model: where they are, which layers they have, and how parts of a model are named.

A stack is an outermost list of layers; what a layer lists in turn (experts, T5's sub-layers) is part of it.
"""

from __future__ import annotations

import re

from torch import nn

from laser_callback.plans.packed import packed_buffers


def layer_stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The model's layer stacks: path (as in :attr:`WeightMatrix.stack`) -> its layers in order, each layer once."""
    owners: dict[nn.Module, str] = {}
    for path, stack in stacks_by_path(model).items():
        for layer in _layers(stack).values():
            owners.setdefault(layer, clean_name(path))
    stacks: dict[str, list[nn.Module]] = {}
    for layer, path in owners.items():
        stacks.setdefault(path, []).append(layer)
    return stacks


def stacks_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of layers: a ModuleList inside a layer (experts, T5's sub-layers) is part of that layer."""
    if _is_stack(model):
        return {"": model}
    stacks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        stacks |= {f"{name}.{path}".rstrip("."): stack for path, stack in stacks_by_path(child).items()}
    return stacks


def _layers(stack: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in order; unlike ``named_children`` also the second time that one is used."""
    return {name: layer for name, layer in stack._modules.items() if layer is not None}


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    layers = list(_layers(module).values())
    if not layers or not all(map(_has_weights, layers)):
        return False
    composite = all(any(True for _ in layer.children()) for layer in layers)
    alike = len({type(layer) for layer in layers}) == 1
    if isinstance(module, nn.Sequential):  # a Sequential is a stack (timm) only when it repeats one composite block
        return alike and composite and len(layers) > 1
    return alike or composite


def _has_weights(layer: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in layer.parameters()) or any(map(packed_buffers, layer.modules()))


def place_of(path: str, stacks: dict[str, nn.Module]) -> tuple[str | None, int | None]:
    """The stack and the layer that a part of the model is in, by its path; ``None`` outside of all."""
    for stack, module in stacks.items():
        prefix = f"{stack}." if stack else ""
        if path.startswith(prefix) and path != stack:
            index = path.removeprefix(prefix).split(".", 1)[0]
            return clean_name(stack), list(_layers(module)).index(index)
    return None, None


def passes_through(model: nn.Module, stack: str, parameter_names: tuple[str, ...]) -> int:
    """In how many layers a parameter is, by its names; ALBERT runs each of its groups of layers several times."""
    prefix = f"{stack}." if stack else ""
    layers = {name.removeprefix(prefix).partition(".")[0] for name in parameter_names if name.startswith(prefix)}
    config = getattr(submodule(model, stack.rpartition(".")[0]), "config", None)
    groups = getattr(config, "num_hidden_groups", None)
    return len(layers) * (config.num_hidden_layers // groups if config is not None and groups else 1)


# ---- names -----------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """The name of a module or parameter without what ``torch.compile`` and PEFT put into it."""
    return re.sub(r"\.base_layer\b", "", clean_name(name))


def submodule(model: nn.Module, path: str) -> nn.Module:
    """``model.get_submodule`` for a cleaned path."""
    module = model
    for part in filter(None, path.split(".")):
        module = getattr(getattr(module, "_orig_mod", module), part)
    return getattr(module, "_orig_mod", module)


def clean_name(name: str) -> str:
    """The name as the user wrote the model: without the wrapper that ``torch.compile`` puts in."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
