"""Do not recompute the layers in front of the first cut.

The layers before the first cut of a stack give the same output for both arms. :class:`LayerReplay` records their calls
while the original model runs, and in the reduced pass returns the recorded output instead of running the layer.

A recorded call is used only if running the layer could not be told from it: the layer is in eval mode, every input has
the recorded *value*, grad mode and autocast are the same, the layer drew no random numbers, nothing listens inside of
it (a forward hook that would stay silent), and the key/value cache it wrote is one that can be written again. In all
other cases the layer runs, and the report counts why. Values are compared rather than trusted to identity: comparing
reads one hidden state per layer, which is below one percent of what a layer computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from laser_callback.matrices import WeightMatrix, layer_stacks

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


@dataclass
class ReplayReport:
    """What happened to the layer calls of the reduced passes that lie before the first cut.

    Attributes:
        replayed: calls answered from the record.
        run: calls that had to be computed, and ``reasons`` counts why.
    """

    replayed: int = 0
    run: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.replayed} of {self.replayed + self.run} layer calls before the first cut were replayed"
        return text + "".join(f"; {count} run: {reason}" for reason, count in self.reasons.most_common())


@dataclass
class _Call:
    """One recorded call of a layer, or the reason why it cannot be replayed."""

    leaves: list[Any]
    structure: pytree.TreeSpec
    context: tuple[Any, ...]
    output: list[Any]
    output_structure: pytree.TreeSpec
    cache_entry: tuple[int, Tensor, Tensor] | None


class LayerReplay:
    """Record layer calls in the original pass, replay them in the reduced passes of the same batch.

    Args:
        model: the model whose layers are patched while recording or replaying.
        cuts: for each arm the matrices it cuts. An arm replays, in each layer stack, the layers before its first cut.
    """

    def __init__(self, model: nn.Module, cuts: Mapping[str, Sequence[WeightMatrix]]) -> None:
        self.reports = {arm: ReplayReport() for arm in cuts}
        stacks = layer_stacks(model)
        self._layers = {arm: _layers_before(stacks, matrices) for arm, matrices in cuts.items()}
        if any(_is_compiled(module) for module in model.modules()):
            self._layers = {arm: [] for arm in cuts}  # a patched `forward` would force a recompilation
            for report in self.reports.values():
                report.reasons["the model is compiled"] += 1
        self._calls: dict[nn.Module, list[_Call | str]] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within: calls of the layers before the last arm's first cut are recorded, replacing an earlier record."""
        self._calls = {}
        recorder = _Recorder(self._calls)
        layers = {layer: None for layers in self._layers.values() for layer in layers}
        with _patched(layers, recorder.wrap):
            yield

    @contextmanager
    def replay(self, arm: str) -> Iterator[None]:
        """Within: calls that match the record return its outputs."""
        position: Counter[nn.Module] = Counter()
        report = self.reports[arm]

        def wrap(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            modules = list(layer.modules())

            def replayed_forward(*args: Any, **kwargs: Any) -> Any:
                calls = self._calls.get(layer, [])
                call = calls[position[layer]] if position[layer] < len(calls) else "no call was recorded"
                position[layer] += 1
                leaves, structure = _flatten((args, kwargs))
                reason = _why_not(call, modules, leaves, structure)
                if isinstance(call, str) or reason:
                    report.run += 1
                    report.reasons[reason] += 1
                    return forward(*args, **kwargs)
                report.replayed += 1
                if call.cache_entry is not None:
                    index, keys, values = call.cache_entry
                    _cache_in(leaves).update(keys, values, index)
                # A copy for each arm: what follows may change it in place.
                output = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.output]
                return pytree.tree_unflatten(output, call.output_structure)

            return replayed_forward

        with _patched(self._layers[arm], wrap):
            yield

    def forget(self) -> None:
        """Free the record."""
        self._calls = {}


class _Recorder:
    def __init__(self, calls: dict[nn.Module, list[_Call | str]]) -> None:
        self._calls = calls
        self._arguments: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (the tensor, kept alive; its copy)
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}  # of the latest layer: the next one's input

    def wrap(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        modules = list(layer.modules())

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = _flatten((args, kwargs))
            reason = _unreplayable(modules, leaves)
            inputs = [] if reason else [self._copy(leaf, self._arguments) for leaf in leaves]
            cache = _cache_in(leaves)
            lengths = [entry.get_seq_length() for entry in cache.layers] if cache is not None and not reason else []
            rng = _rng_states(leaves)

            output = forward(*args, **kwargs)

            output_leaves, output_structure = _flatten(output)
            entry, cache_reason = _cache_entry(cache, lengths) if not reason else (None, "")
            reason = reason or cache_reason or _unreplayable_output(output_leaves)
            if not reason and any(not torch.equal(a, b) for a, b in zip(rng, _rng_states(leaves), strict=True)):
                reason = "it draws random numbers"
            calls = self._calls.setdefault(layer, [])
            if reason:
                calls.append(reason)
                return output
            self._outputs = {}
            copies = [self._copy(leaf, self._outputs) for leaf in output_leaves]
            calls.append(_Call(inputs, structure, _context(leaves), copies, output_structure, entry))
            return output

        return recorded_forward

    def _copy(self, leaf: Any, memory: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """A copy of a tensor; one copy for an object that is passed to many layers (masks, rotary tables)."""
        if not isinstance(leaf, Tensor):
            return leaf
        for known in (self._outputs, self._arguments):
            if id(leaf) in known:
                return known[id(leaf)][1]
        memory[id(leaf)] = (leaf, leaf.clone())
        return memory[id(leaf)][1]


# ---- which layers ----------------------------------------------------------------------------------------------------


def _layers_before(stacks: Mapping[str, list[nn.Module]], matrices: Sequence[WeightMatrix]) -> list[nn.Module]:
    """The layers in front of each stack's first cut. A stack without a cut counts whole: its inputs decide."""
    cut = {id(matrix.parameter) for matrix in matrices}
    layers: list[nn.Module] = []
    for stack in stacks.values():
        for layer in stack:
            # By parameter, not by name: a tied weight cuts every layer that shares it.
            if any(id(parameter) in cut for parameter in layer.parameters()):
                break
            layers.append(layer)
    return layers


@contextmanager
def _patched(
    layers: Sequence[nn.Module] | Mapping[nn.Module, None],
    wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replace ``forward`` (not ``__call__``: the layer's own hooks still fire) and put the attribute back exactly."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers:
            before.append((layer, vars(layer).get("forward")))
            vars(layer)["forward"] = wrap(layer, layer.forward)
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


# ---- when a call may be replayed -------------------------------------------------------------------------------------


def _why_not(call: _Call | str, modules: list[nn.Module], leaves: list[Any], structure: pytree.TreeSpec) -> str:
    """Why this call cannot be answered from ``call``; empty when it can."""
    if isinstance(call, str):
        return call
    reason = _unreplayable(modules, leaves)
    if reason:
        return reason
    if structure != call.structure or _context(leaves) != call.context:
        return "it is called with other arguments"
    if not all(_same(new, old) for new, old in zip(leaves, call.leaves, strict=True)):
        return "its inputs differ between the arms"
    cache = _cache_in(leaves)
    if cache is not None and call.cache_entry is not None:
        index = call.cache_entry[0]
        if index < len(cache.layers) and cache.layers[index].get_seq_length():
            return "its key/value cache is not empty"
    return ""


def _same(new: Any, old: Any) -> bool:
    if isinstance(new, Tensor):
        alike = isinstance(old, Tensor) and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        return alike and torch.equal(new, old)
    return isinstance(new, Cache) or (type(new) is type(old) and new == old)


def _unreplayable(modules: list[nn.Module], leaves: list[Any]) -> str:
    """Why a call of the layer made of ``modules`` (itself first) must run, whatever the record says."""
    if any(module.training for module in modules):
        return "it is in train mode"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "a global forward hook listens"
    for module in modules[1:]:
        if any(_is_active(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
            return "a forward hook listens inside of it"
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided or leaf.is_nested:
                return f"it takes a {type(leaf).__name__} that cannot be compared"
        elif isinstance(leaf, Cache):
            if type(leaf) is not DynamicCache:
                return f"its cache is a {type(leaf).__name__}"
        elif not isinstance(leaf, _PLAIN):
            return f"it takes a {type(leaf).__name__} that cannot be compared"
    if sum(isinstance(leaf, Cache) for leaf in leaves) > 1:
        return "it takes several caches"
    return ""


def _unreplayable_output(leaves: list[Any]) -> str:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return "autograd runs through it"
            if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_nested:
                return f"it returns a {type(leaf).__name__} that cannot be copied"
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


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _context(leaves: list[Any]) -> tuple[Any, ...]:
    """What besides its inputs decides a layer's arithmetic."""
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(kind)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_autocast_dtype(kind)


def _rng_states(leaves: list[Any]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    cuda = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda), None)
    return states if cuda is None else [*states, torch.cuda.get_rng_state(cuda)]


# ---- key/value caches ------------------------------------------------------------------------------------------------


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Cache))


def _cache_in(leaves: list[Any]) -> Any:
    return next((leaf for leaf in leaves if isinstance(leaf, Cache)), None)


def _cache_entry(cache: Any, lengths: list[int]) -> tuple[tuple[int, Tensor, Tensor] | None, str]:
    """What a layer added to an empty entry of a DynamicCache, or why that cannot be written again."""
    if cache is None:
        return None, ""
    lengths = lengths + [0] * (len(cache.layers) - len(lengths))
    grown = [i for i, entry in enumerate(cache.layers) if entry.get_seq_length() != lengths[i]]
    if not grown:
        return None, ""
    if len(grown) > 1 or type(cache.layers[grown[0]]) is not DynamicLayer:
        return None, f"its cache entry is a {type(cache.layers[grown[0]]).__name__}"
    if lengths[grown[0]]:
        return None, "its key/value cache is not empty"
    entry = cache.layers[grown[0]]
    return (grown[0], entry.keys, entry.values), ""
