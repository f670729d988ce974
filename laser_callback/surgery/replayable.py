"""When a layer's call may be answered from a record, and how to tell.

Contract: each function here looks, and changes nothing. Reasons are sentences for the report; an empty one means that
nothing speaks against it.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


# ---- calls -----------------------------------------------------------------------------------------------------------


def same_value(new: Any, old: Any) -> bool:
    """Whether two leaves of a call's arguments cannot be told apart. Caches are looked at elsewhere."""
    if isinstance(new, Tensor):
        alike = isinstance(old, Tensor) and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        return alike and torch.equal(new, old)
    return isinstance(new, Cache) or (type(new) is type(old) and new == old)


def why_not_call(modules: list[nn.Module], leaves: list[Any]) -> str:
    """Why a call of the layer made of ``modules`` (itself first) must run, whatever the record says."""
    if any(module.training for module in modules):
        return "it is in train mode"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "a global forward hook listens"
    for module in modules[1:]:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_is_active, hooks)) or _is_captured(module):
            return "a forward hook listens inside of it"
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided or leaf.is_nested:
                return f"it takes a {type(leaf).__name__} that cannot be compared"
            if leaf.requires_grad and torch.is_grad_enabled():
                return "autograd runs through it"
        elif isinstance(leaf, Cache):
            if type(leaf) is not DynamicCache:
                return f"its cache is a {type(leaf).__name__}"
        elif not isinstance(leaf, _PLAIN):
            return f"it takes a {type(leaf).__name__} that cannot be compared"
    if sum(isinstance(leaf, Cache) for leaf in leaves) > 1:
        return "it takes several caches"
    return ""


def why_not_output(leaves: list[Any], inputs: list[Any]) -> str:
    """Why what a layer returned cannot be returned again."""
    given = {leaf.untyped_storage().data_ptr(): leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.numel()}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return "autograd runs through it"
            if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_nested:
                return f"it returns a {type(leaf).__name__} that cannot be copied"
            if given.get(leaf.untyped_storage().data_ptr(), leaf) is not leaf:
                return "it returns a part of its input"
        elif not isinstance(leaf, _PLAIN):
            return f"it returns a {type(leaf).__name__} that cannot be copied"
    return ""


def _is_active(hook: Callable[..., Any]) -> bool:
    """False for transformers' output capturing while nothing is captured: it then returns at once."""
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return True
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    captured = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)).get("key")
    return collected is not None and (captured is None or captured.cell_contents in collected)


def _is_captured(module: nn.Module) -> bool:
    """Before 5.2 transformers captures by a `forward` that it puts around the module's own while the model runs."""
    around = getattr(vars(module).get("forward"), "__globals__", {})
    return around.get("__name__") == "transformers.utils.generic"


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been applied to the module itself."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def context_of(leaves: list[Any]) -> tuple[Any, ...]:
    """What besides its inputs decides a layer's arithmetic."""
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(kind)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_autocast_dtype(kind)


def python_random_states() -> list[Any]:
    """The states of Python's and NumPy's global generators."""
    name, keys, *position = np.random.get_state(legacy=True)
    return [random.getstate(), name, np.asarray(keys).tobytes(), position]


def random_states(leaves: list[Any], python: bool) -> list[Any]:
    """The states of torch's global generators that a call may draw from; on request also Python's and NumPy's."""
    states = [torch.get_rng_state(), *(python_random_states() if python else ())]
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "cpu"), None)
    if device is None:
        return states
    get_state = getattr(getattr(torch, device.type, None), "get_rng_state", None)  # of torch.cuda, torch.mps, torch.xpu
    if get_state is None:
        return states
    return [*states, get_state() if device.type == "mps" else get_state(device)]


def same_states(before: list[Any], after: list[Any]) -> bool:
    """Whether nobody has drawn in between."""
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


# ---- values that may change in place ---------------------------------------------------------------------------------


class TensorCopy:
    """A tensor's value at one time. The tensor is kept alive, so that its id stays its own."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = _version(tensor)
        self.value = tensor.detach().clone()

    def still_holds(self) -> bool:
        """Whether the tensor still has that value."""
        if self._version is not None:
            return self._version == _version(self._tensor)
        return torch.equal(self._tensor, self.value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class OwnState:
    """What shows that a layer's attributes or buffers were rebound, appended to, or changed in place."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._values, self._marks = self._look()

    def still_holds(self) -> bool:
        """Whether nothing has changed since."""
        values, marks = self._look()
        same = len(values) == len(self._values) and all(map(operator.is_, values, self._values))
        return same and marks == self._marks

    def _look(self) -> tuple[list[Any], list[Any]]:
        # The values themselves, not their ids: an id is used again once its object is gone.
        values = [v for module in self._modules for name, v in vars(module).items() if name != "forward"]
        values += [buffer for module in self._modules for buffer in module._buffers.values()]
        marks: list[Any] = [len(value) for value in values if type(value) in (list, dict, set)]
        marks += [_version(value) for value in values if isinstance(value, Tensor)]
        return values, marks


# ---- key/value caches ------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of arguments or outputs; a cache counts as one."""
    return pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Cache))


def cache_in(leaves: list[Any]) -> Any:
    """The key/value cache among a call's arguments, or ``None``."""
    return next((leaf for leaf in leaves if isinstance(leaf, Cache)), None)


def cached_length(entry: Any) -> int:
    """The number of positions that one layer's entry of a cache holds."""
    return entry.get_seq_length() if hasattr(entry, "get_seq_length") else 0  # convolution states have none


@dataclass(frozen=True)
class CacheEntry:
    """What one layer added to its own, empty entry of a DynamicCache."""

    index: int
    keys: Tensor
    values: Tensor
    length: int

    def add_to(self, cache: DynamicCache) -> None:
        """Add the same to another cache, whose entry is empty too."""
        cache.update(self.keys, self.values, self.index)
        entry = cache.layers[self.index]
        if isinstance(entry, DynamicSlidingWindowLayer):
            entry.cumulative_length = self.length  # with what has left the window


def added_to_cache(cache: Any, lengths: list[int]) -> tuple[CacheEntry | None, str]:
    """What a layer added to a cache whose entries had these lengths, or why that cannot be added again."""
    if cache is None:
        return None, ""
    lengths = lengths + [0] * (len(cache.layers) - len(lengths))
    grown = [i for i, entry in enumerate(cache.layers) if cached_length(entry) != lengths[i]]
    if not grown:
        # Other kinds keep states whose length does not show (convolutions, recurrences).
        odd = [e for e in cache.layers if type(e) not in (DynamicLayer, DynamicSlidingWindowLayer)]
        return None, f"its cache holds a {type(odd[0]).__name__}" if odd else ""
    entry = cache.layers[grown[0]]
    if len(grown) > 1 or type(entry) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None, f"its cache entry is a {type(entry).__name__}"
    if lengths[grown[0]]:
        return None, "its key/value cache is not empty"
    return CacheEntry(grown[0], entry.keys.clone(), entry.values.clone(), cached_length(entry)), ""
