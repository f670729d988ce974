"""When a layer's call may be answered from a record, and how to tell.

Contract: each function here looks, and changes nothing. Reasons are sentences for the report; an empty one means that
nothing speaks against it.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from laser_callback.surgery.held import alike, version

GOES_ON = "it goes on from earlier tokens, as `generate` lets it (its key/value cache is not empty)"
"""Why a call is not answered from a record."""
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_CONTAINERS = {list, dict, OrderedDict, defaultdict, deque}


# ---- calls -----------------------------------------------------------------------------------------------------------


class Onlooker(TorchDispatchMode):
    """A mode that wants to see nothing of the layers in front of a cut."""


def same_value(new: Any, old: Any) -> bool:
    """Whether two leaves of a call's arguments cannot be told apart. Caches are looked at elsewhere."""
    if isinstance(new, Tensor):
        return isinstance(old, Tensor) and alike(new, old) and torch.equal(new, old)
    return isinstance(new, Cache) or (type(new) is type(old) and new == old)


def bit_sums(tensor: Tensor) -> Tensor:
    """Two sums over the bits, shape (2,), int64: others for nearly every other content."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = flat[: len(flat) // 4 * 4].view(torch.int32)
    return torch.stack([whole.sum(dtype=torch.int64), flat.sum(dtype=torch.int64)])


def why_not_call(modules: list[nn.Module], leaves: list[Any]) -> str:
    """Why a call of the layer made of ``modules`` (itself first) must run, whatever the record says."""
    if any(module.training for module in modules):
        return "it is in train mode"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms it"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode autograd runs through it"
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    for mode in modes:
        if not isinstance(mode, (DeviceContext, Onlooker)):  # the first is of torch.set_default_device
            return f"a {type(mode).__name__} listens"
    for module in modules[1:]:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_is_active, hooks)) or _is_captured(module):
            return "a forward hook listens inside of it"
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter) or not _is_dense(leaf):
                return f"it takes a {_kind(leaf)} that cannot be compared"
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


def why_not_output(leaves: list[Any], inputs: list[Any], held: set[int]) -> str:
    """Why what a layer returned cannot be returned again. ``held`` is where the tensors lie that it holds."""
    where = {leaf.untyped_storage().data_ptr(): leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.numel()}
    given = set(where)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return "autograd runs through it"
            if type(leaf) is not Tensor or not _is_dense(leaf):
                return f"it returns a {_kind(leaf)} that cannot be copied"
            place = leaf.untyped_storage().data_ptr()
            if where.setdefault(place, leaf) is not leaf and leaf.numel():
                return f"it returns {'a part of its input' if place in given else 'several parts of one tensor'}"
            if place in held and place not in given:
                return "it returns a tensor that it holds"
        elif not isinstance(leaf, _PLAIN):
            return f"it returns a {type(leaf).__name__} that cannot be copied"
    return ""


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    if type(tensor) is not Tensor:
        return type(tensor).__name__
    return "nested tensor" if tensor.is_nested else "tensor without data" if tensor.is_meta else "sparse tensor"


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
    """Whether torch.compile or TorchScript has been applied to the module itself or to a method of it."""
    if module._compiled_call_impl is not None:
        return True
    if isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule)):
        return True
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values() if callable(value))


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
        self._version = version(tensor)
        self.value = tensor.detach().clone()

    def still_holds(self) -> bool:
        """Whether the tensor still has that value."""
        if self._version is not None:
            return self._version == version(self._tensor)
        return torch.equal(self._tensor, self.value)


# ---- key/value caches ------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec, list[Any]]:
    """The leaves of arguments or outputs, and the containers among them that can be written to. A cache is one leaf."""
    containers: list[Any] = []

    def is_leaf(node: Any) -> bool:
        if type(node) in _CONTAINERS or isinstance(node, ModelOutput):
            containers.append(node)
            return False
        return not isinstance(node, tuple)  # what others have registered may hold more than its leaves

    leaves, structure = pytree.tree_flatten(tree, is_leaf=is_leaf)
    return leaves, structure, containers


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
        return None, GOES_ON
    return CacheEntry(grown[0], entry.keys.clone(), entry.values.clone(), cached_length(entry)), ""
