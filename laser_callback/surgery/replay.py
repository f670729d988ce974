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
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from laser_callback.plans.matrices import WeightMatrix, layer_stacks
from laser_callback.support.interrupts import whole
from laser_callback.surgery.replayable import (
    CacheEntry,
    OwnState,
    TensorCopy,
    added_to_cache,
    cache_in,
    cached_length,
    context_of,
    flatten,
    is_compiled,
    python_random_states,
    random_states,
    same_states,
    same_value,
    why_not_call,
    why_not_output,
)


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
    cache_entry: CacheEntry | None


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
        if any(is_compiled(module) for module in model.modules()):
            self._layers = {arm: [] for arm in cuts}  # a patched `forward` would force a recompilation
            for report in self.reports.values():
                report.reasons["the model is compiled"] += 1
        self._calls: dict[nn.Module, list[_Call | str]] = {}
        self._watch: bool | None = None  # Python's and NumPy's generators around each layer; None: for now

    _paused = 0  # of all objects: several callbacks may record at once

    @classmethod
    @whole
    def paused(cls) -> Generator[None, None, None]:
        """Within: calls are recorded by nobody. For whatever runs the model while another callback may be recording."""
        cls._paused += 1
        try:
            yield
        finally:
            cls._paused -= 1

    @whole
    def record(self) -> Generator[None, None, None]:
        """Within: calls of the layers before the last arm's first cut are recorded, replacing an earlier record."""
        self._calls = {}
        recorder = _Recorder(self._calls, watch=self._watch is not False)
        layers = {layer: None for layers in self._layers.values() for layer in layers}
        with _patched(layers, recorder.wrap):
            yield
        # To look at these generators costs as much as a small layer. Once no layer was seen to draw, look only whether
        # anybody did, and go back to each layer for good if so.
        if self._watch is None:
            self._watch = recorder.drawn
        elif not self._watch and recorder.start is not None and recorder.start != python_random_states():
            self._watch = True
            for layer, calls in self._calls.items():
                self._calls[layer] = [call if isinstance(call, str) else "random numbers are drawn" for call in calls]

    @whole
    def replay(self, arm: str) -> Generator[None, None, None]:
        """Within: calls that match the record return its outputs."""
        position: Counter[nn.Module] = Counter()
        report = self.reports[arm]

        def wrap(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            modules = list(layer.modules())

            def replayed_forward(*args: Any, **kwargs: Any) -> Any:
                calls = self._calls.get(layer, [])
                call = calls[position[layer]] if position[layer] < len(calls) else "no call was recorded"
                position[layer] += 1
                leaves, structure = flatten((args, kwargs))
                reason = _why_not(call, modules, leaves, structure)
                if isinstance(call, str) or reason:
                    report.run += 1
                    report.reasons[reason] += 1
                    return forward(*args, **kwargs)
                report.replayed += 1
                if call.cache_entry is not None:
                    call.cache_entry.add_to(cache_in(leaves))
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
    def __init__(self, calls: dict[nn.Module, list[_Call | str]], watch: bool) -> None:
        self._calls = calls
        self._watch = watch  # Python's and NumPy's generators around each layer
        self.drawn = False
        self.start: list[Any] | None = None  # their states ahead of the first layer
        self._arguments: dict[int, TensorCopy] = {}
        self._outputs: dict[int, TensorCopy] = {}  # of the latest layer: the next one's input

    def wrap(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        modules = list(layer.modules())

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            if LayerReplay._paused:
                return forward(*args, **kwargs)
            calls = self._calls.setdefault(layer, [])
            leaves, structure = flatten((args, kwargs))
            reason = why_not_call(modules, leaves)
            if reason:
                calls.append(reason)
                return forward(*args, **kwargs)
            copies = [self._copy(leaf, self._arguments) for leaf in leaves]
            cache = cache_in(leaves)
            lengths = [cached_length(entry) for entry in cache.layers] if cache is not None else []
            context = context_of(leaves)
            if self.start is None:
                self.start = python_random_states()
            before, own = random_states(leaves, self._watch), OwnState(modules)

            output = forward(*args, **kwargs)

            output_leaves, output_structure = flatten(output)
            entry, reason = added_to_cache(cache, lengths)
            reason = reason or why_not_output(output_leaves, leaves)
            if not same_states(before, random_states(leaves, self._watch)):
                self.drawn, reason = True, reason or "it draws random numbers"
            if not reason and not own.still_holds():
                reason = "it changes its own attributes or buffers"
            if not reason and any(not c.still_holds() for c in copies if isinstance(c, TensorCopy)):
                reason = "it changes its inputs in place"
            if reason:
                calls.append(reason)
                return output
            self._outputs = {}
            inputs = [c.value if isinstance(c, TensorCopy) else c for c in copies]
            recorded = self._output(output_leaves, leaves)
            calls.append(_Call(inputs, structure, context, recorded, output_structure, entry))
            return output

        return recorded_forward

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

    def _copy(self, leaf: Any, memory: dict[int, TensorCopy]) -> Any:
        """A copy of a tensor; one copy for an object that is passed to many layers (masks, rotary tables)."""
        if not isinstance(leaf, Tensor):
            return leaf
        for known in (self._outputs, self._arguments):
            if id(leaf) in known and known[id(leaf)].still_holds():
                return known[id(leaf)]
        memory[id(leaf)] = TensorCopy(leaf)
        return memory[id(leaf)]


def _why_not(call: _Call | str, modules: list[nn.Module], leaves: list[Any], structure: pytree.TreeSpec) -> str:
    """Why this call cannot be answered from ``call``; empty when it can."""
    if isinstance(call, str):
        return call
    reason = why_not_call(modules, leaves)
    if reason:
        return reason
    if structure != call.structure or context_of(leaves) != call.context:
        return "it is called with other arguments"
    if not all(same_value(new, old) for new, old in zip(leaves, call.leaves, strict=True)):
        return "its inputs differ between the arms"
    cache = cache_in(leaves)
    if cache is not None and call.cache_entry is not None:
        index = call.cache_entry.index
        if index < len(cache.layers) and cached_length(cache.layers[index]):
            return "its key/value cache is not empty"
    return ""


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


@whole
def _patched(
    layers: Iterable[nn.Module],
    wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Generator[None, None, None]:
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
