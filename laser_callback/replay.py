"""Do not recompute the layers in front of the first cut.

The layers before the first cut of a stack give the same output for both arms. :class:`LayerReplay` records their calls
while the original model runs, and in the reduced pass returns the recorded output instead of running the layer.

A recorded call is used only if running the layer could not be told from it: the layer is in eval mode, every input has
the recorded *value*, grad mode and autocast are the same, the layer drew no random numbers, changed neither its inputs
nor itself, nothing listens inside of it (a forward hook that would stay silent), and the key/value cache it wrote is
one that can be written again. In all other cases the layer runs, and the report counts why. Values are compared rather
than trusted to identity: comparing reads one hidden state per layer, which is below one percent of what a layer
computes.
"""

from __future__ import annotations

import copy
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

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
        self._recorder = _Recorder(self._calls)

    _paused = 0  # of all objects: several callbacks may record at once

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Within: calls are recorded by nobody. For whatever runs the model while another callback may be recording."""
        cls._paused += 1
        try:
            yield
        finally:
            cls._paused -= 1

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within: calls of the layers before the last arm's first cut are recorded, replacing an earlier record."""
        self._calls = {}
        self._recorder = recorder = _Recorder(self._calls, self._recorder.watch_random)
        layers = {layer: _OwnState(list(layer.modules())) for layers in self._layers.values() for layer in layers}
        drawn = _python_random_states()
        with _patched(layers, recorder.wrap):
            yield
        for layer, state in layers.items():
            if not state.still_holds():
                recorder.refuse(layer, "it changes its own attributes or buffers")
        if not recorder.watch_random and drawn != _python_random_states():
            # Somebody draws. From the next batch on, see who: to ask for these states costs more than a small layer.
            recorder.watch_random = True
            for layer in layers:
                recorder.refuse(layer, "random numbers are drawn")

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
                return pytree.tree_unflatten(_fresh(call.output, leaves), call.output_structure)

            return replayed_forward

        with _patched(self._layers[arm], wrap):
            yield

    def forget(self) -> None:
        """Free the record."""
        self._calls = {}


@dataclass(frozen=True)
class _Passed:
    """In a recorded output: the layer passed on its input of this number (T5's position bias)."""

    index: int


@dataclass(frozen=True)
class _Again:
    """In a recorded output: the same object as the output of this number."""

    index: int


def _fresh(output: list[Any], inputs: list[Any]) -> list[Any]:
    """A recorded output for one arm: what follows may change it in place."""
    fresh: list[Any] = []
    for leaf in output:
        if isinstance(leaf, _Passed):
            fresh.append(inputs[leaf.index])
        elif isinstance(leaf, _Again):
            fresh.append(fresh[leaf.index])
        else:
            fresh.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
    return fresh


class _Recorder:
    def __init__(self, calls: dict[nn.Module, list[_Call | str]], watch_random: bool = False) -> None:
        self._calls = calls
        self.watch_random = watch_random  # look at Python's and NumPy's generators around each layer
        self._arguments: dict[int, _Copy] = {}
        self._outputs: dict[int, _Copy] = {}  # of the latest layer: the next one's input

    def wrap(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        modules = list(layer.modules())

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            if LayerReplay._paused:
                return forward(*args, **kwargs)
            calls = self._calls.setdefault(layer, [])
            leaves, structure = _flatten((args, kwargs))
            reason = _unreplayable(modules, leaves)
            if reason:
                calls.append(reason)
                return forward(*args, **kwargs)
            copies = [self._copy(leaf, self._arguments) for leaf in leaves]
            cache = _cache_in(leaves)
            lengths = [_length(entry) for entry in cache.layers] if cache is not None else []
            context = _context(leaves)
            before = _random_states(leaves, self.watch_random)

            output = forward(*args, **kwargs)

            output_leaves, output_structure = _flatten(output)
            entry, reason = _cache_entry(cache, lengths)
            reason = reason or _unreplayable_output(output_leaves, leaves)
            if not reason and not _alike(before, _random_states(leaves, self.watch_random)):
                reason = "it draws random numbers"
            if not reason and any(not c.still_holds() for c in copies if isinstance(c, _Copy)):
                reason = "it changes its inputs in place"
            if reason:
                calls.append(reason)
                return output
            self._outputs = {}
            inputs = [c.value if isinstance(c, _Copy) else c for c in copies]
            recorded = self._output(output_leaves, leaves)
            calls.append(_Call(inputs, structure, context, recorded, output_structure, entry))
            return output

        return recorded_forward

    def refuse(self, layer: nn.Module, reason: str) -> None:
        """Let no call of ``layer`` in this record be replayed."""
        self._calls[layer] = [call if isinstance(call, str) else reason for call in self._calls.get(layer, ())]

    def _output(self, output: list[Any], inputs: list[Any]) -> list[Any]:
        passed: dict[int, Any] = {id(leaf): _Passed(i) for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)}
        recorded: list[Any] = []
        for i, leaf in enumerate(output):
            if not isinstance(leaf, Tensor):
                recorded.append(leaf)
            elif id(leaf) in passed:
                recorded.append(passed[id(leaf)])
            else:
                recorded.append(self._copy(leaf, self._outputs).value)
                passed[id(leaf)] = _Again(i)
        return recorded

    def _copy(self, leaf: Any, memory: dict[int, _Copy]) -> Any:
        """A copy of a tensor; one copy for an object that is passed to many layers (masks, rotary tables)."""
        if not isinstance(leaf, Tensor):
            return leaf
        for known in (self._outputs, self._arguments):
            if id(leaf) in known and known[id(leaf)].still_holds():
                return known[id(leaf)]
        memory[id(leaf)] = _Copy(leaf)
        return memory[id(leaf)]


class _Copy:
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
    layers: Iterable[nn.Module],
    wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replace ``forward`` (not ``__call__``: the layer's own hooks still fire) and put the attribute back exactly."""
    patches: list[_Patch] = []
    try:
        for layer in dict.fromkeys(layers):
            patch = vars(layer).get("forward")
            patches.append(patch if isinstance(patch, _Patch) else _Patch(layer))
            patches[-1].add(wrap)
        yield
    finally:
        for patch in patches:
            patch.remove(wrap)


class _Patch:
    """A layer's ``forward`` while one or more wrappers are around it.

    One object for all of them, since they need not end in the order in which they began: two callbacks of one trainer
    start to record one after the other, and the first to start is the first to stop.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._before = vars(layer).get("forward")
        self._wraps: list[Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]] = []
        self._inner: Callable[..., Any] = layer.forward
        self._outer = self._inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outer(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the layer is not recorded, and computes with its own weights."""
        return copy.deepcopy(self._inner, memo)

    def add(self, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._wraps.append(wrap)
        self._outer = wrap(self._layer, self._outer)
        vars(self._layer)["forward"] = self

    def remove(self, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]) -> None:
        if wrap not in self._wraps:  # interrupted before it was added
            return
        self._wraps.remove(wrap)
        self._outer = self._inner
        for other in self._wraps:
            self._outer = other(self._layer, self._outer)
        if self._wraps or vars(self._layer).get("forward") is not self:
            return
        if self._before is None:
            del vars(self._layer)["forward"]
        else:
            vars(self._layer)["forward"] = self._before


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
        if index < len(cache.layers) and _length(cache.layers[index]):
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


def _unreplayable_output(leaves: list[Any], inputs: list[Any]) -> str:
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


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _context(leaves: list[Any]) -> tuple[Any, ...]:
    """What besides its inputs decides a layer's arithmetic."""
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(kind)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_autocast_dtype(kind)


def _python_random_states() -> list[Any]:
    name, keys, *position = np.random.get_state(legacy=True)
    return [random.getstate(), name, np.asarray(keys).tobytes(), position]


def _random_states(leaves: list[Any], python: bool) -> list[Any]:
    states = [torch.get_rng_state(), *(_python_random_states() if python else ())]
    cuda = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda), None)
    return states if cuda is None else [*states, torch.cuda.get_rng_state(cuda)]


def _alike(before: list[Any], after: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


class _OwnState:
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


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Cache))


def _cache_in(leaves: list[Any]) -> Any:
    return next((leaf for leaf in leaves if isinstance(leaf, Cache)), None)


def _length(entry: Any) -> int:
    return entry.get_seq_length() if hasattr(entry, "get_seq_length") else 0  # convolution states have none


def _cache_entry(cache: Any, lengths: list[int]) -> tuple[tuple[int, Tensor, Tensor] | None, str]:
    """What a layer added to an empty entry of a DynamicCache, or why that cannot be written again."""
    if cache is None:
        return None, ""
    lengths = lengths + [0] * (len(cache.layers) - len(lengths))
    grown = [i for i, entry in enumerate(cache.layers) if _length(entry) != lengths[i]]
    if not grown:
        # Other kinds keep states whose length does not show (convolutions, recurrences).
        odd = [e for e in cache.layers if type(e) not in (DynamicLayer, DynamicSlidingWindowLayer)]
        return None, f"its cache holds a {type(odd[0]).__name__}" if odd else ""
    if len(grown) > 1 or type(cache.layers[grown[0]]) is not DynamicLayer:
        return None, f"its cache entry is a {type(cache.layers[grown[0]]).__name__}"
    if lengths[grown[0]]:
        return None, "its key/value cache is not empty"
    entry = cache.layers[grown[0]]
    return (grown[0], entry.keys.clone(), entry.values.clone()), ""
