"""Do not recompute the layers in front of the first cut.

The layers before the first cut of a stack give the same output for both arms. :class:`LayerReplay` records their calls
while the original model runs, and in the reduced pass returns the recorded output instead of running the layer.

A recorded call is used only if running the layer could not be told from it: the layer is in eval mode, every input has
the recorded *value*, and so has whatever else the layer can reach; grad mode and autocast are the same, the layer drew
no random numbers, changed nothing that it was given or can reach, nothing listens inside of it (a forward hook that
would stay silent), and the key/value cache it wrote is one that can be written again. In all other cases the layer
runs, and the report counts why. Values are compared rather than trusted to identity: comparing reads one hidden state
per layer, which is below one percent of what a layer computes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.stacks import layer_stacks
from laser_callback.support.interrupts import whole
from laser_callback.surgery.held import Held
from laser_callback.surgery.interception import Forward, Watch, paused
from laser_callback.surgery.replayable import (
    GOES_ON,
    CacheEntry,
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
        further: what those have to tell who use :func:`answered`, each by its name.
    """

    replayed: int = 0
    run: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    further: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.replayed} of {self.replayed + self.run} layer calls before the first cut were replayed"
        text += "".join(f"; {count} run: {reason}" for reason, count in self.reasons.most_common())
        return "; ".join([text, *map(str, self.further.values())])


@dataclass
class _Call:
    """One recorded call of a layer, or the reason why it cannot be replayed."""

    leaves: list[Any]
    structure: pytree.TreeSpec
    context: tuple[Any, ...]
    output: list[Any]
    output_structure: pytree.TreeSpec
    cache_entry: CacheEntry | None
    own: Held


@dataclass(frozen=True, eq=False)
class Recorded:
    """The original's pass over a batch, as those see it who leave something for the reduced passes of the batch.

    Attributes:
        layers: by arm those in front of its first cut.
        stacks: the stacks that they are in.
        kept: to be filled; freed with the record.
        held: what layers hold, as it was last seen.
    """

    layers: Mapping[str, Sequence[nn.Module]]
    stacks: Sequence[Sequence[nn.Module]]
    held: dict[nn.Module, Held]
    kept: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Answered:
    """A reduced pass over the same batch.

    Attributes:
        layers: those in front of the arm's first cut.
        outside: the parameters that it cuts in no layer of a stack, by ``id``.
        kept: what the original's pass has left.
        report: where calls are counted.
        has_aside: whether layers were called :func:`aside`.
    """

    layers: Sequence[nn.Module]
    outside: frozenset[int]
    kept: Mapping[Hashable, Any]
    report: ReplayReport
    has_aside: bool = False


_recorded: list[Recorded] = []
_answered: list[Answered] = []
_aside: list[object] = []


def recorded() -> list[Recorded]:
    """The passes that are being recorded now: of several callbacks each has its own."""
    return [] if paused() else list(_recorded)


def answered() -> Answered | None:
    """The reduced pass that is running now, if one is."""
    return _answered[-1] if _answered else None


@whole
def aside() -> Generator[None, None, None]:
    """Within: layers are called by whoever records and answers these calls otherwise, or knows that none can be."""
    mark = object()
    _aside.append(mark)
    for one in _answered:
        one.has_aside = True
    try:
        yield
    finally:
        _aside.remove(mark)


class LayerReplay:
    """Record layer calls in the original pass, replay them in the reduced passes of the same batch.

    Args:
        model: the model whose layers are patched while recording or replaying.
        cuts: for each arm the matrices it cuts. An arm replays, in each layer stack, the layers before its first cut.
    """

    def __init__(self, model: nn.Module, cuts: Mapping[str, Sequence[WeightMatrix]]) -> None:
        self.reports = {arm: ReplayReport() for arm in cuts}
        stacks = layer_stacks(model)
        self._stacks = list(stacks.values())
        self._layers = {arm: _layers_before(stacks, matrices) for arm, matrices in cuts.items()}
        inside = {id(p) for layers in stacks.values() for layer in layers for p in layer.parameters()}
        self._outside = {
            arm: frozenset(id(m.parameter) for m in of if id(m.parameter) not in inside) for arm, of in cuts.items()
        }
        self._kept: Mapping[Hashable, Any] = {}
        if any(is_compiled(module) for module in model.modules()):
            self._layers = {arm: [] for arm in cuts}
            for report in self.reports.values():
                report.reasons["the model is compiled"] += 1
        self._calls: dict[nn.Module, list[_Call | str]] = {}
        self._held: dict[nn.Module, Held] = {}  # as it was last seen
        self._watch: bool | None = None  # Python's and NumPy's generators around each layer; None: for now

    @staticmethod
    def paused() -> Watch:
        """Within: calls are recorded by nobody. For whatever runs the model while another callback may be recording."""
        return Watch()

    @whole
    def record(self) -> Generator[None, None, None]:
        """Within: calls of the layers before the last arm's first cut are recorded, replacing an earlier record.

        A record that is not finished, for whatever reason, is none.
        """
        self._calls, self._kept = {}, {}
        recorder = _Recorder(self._held, watch=self._watch is not False)
        here = Recorded(self._layers, self._stacks, self._held)
        _recorded.append(here)
        try:
            with Watch([layer for layers in self._layers.values() for layer in layers], recorder.see):
                yield
        finally:
            _recorded.remove(here)
        # To look at these generators costs as much as a small layer. Once no layer was seen to draw, look only whether
        # anybody did, and go back to each layer for good if so.
        if self._watch is None:
            self._watch = recorder.drawn
        elif not self._watch and recorder.start is not None and recorder.start != python_random_states():
            self._watch = True
            for layer, calls in recorder.calls.items():
                recorder.calls[layer] = [c if isinstance(c, str) else "random numbers are drawn" for c in calls]
        self._calls, self._kept = recorder.calls, here.kept

    @whole
    def replay(self, arm: str, report: ReplayReport | None = None) -> Generator[None, None, None]:
        """Within: calls that match the record return its outputs. The record is lost if this is interrupted.

        Args:
            arm: whose layers.
            report: where the calls are counted; by default with the arm's others.
        """
        record, self._calls = self._calls, {}
        position: Counter[nn.Module] = Counter()
        report = self.reports[arm] if report is None else report

        def see(layer: nn.Module, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _aside:
                return forward(*args, **kwargs)
            calls = record.get(layer, [])
            call = calls[position[layer]] if position[layer] < len(calls) else "no call was recorded"
            position[layer] += 1
            leaves, structure, _ = flatten((args, kwargs))
            reason = reason or self._why_not(call, layer, leaves, structure)
            if isinstance(call, str) or reason:
                report.run += 1
                report.reasons[reason] += 1
                return forward(*args, **kwargs)
            report.replayed += 1
            if call.cache_entry is not None:
                call.cache_entry.add_to(cache_in(leaves))
            return pytree.tree_unflatten(_fresh(call.output, leaves), call.output_structure)

        here = Answered(self._layers[arm], self._outside[arm], self._kept, report)
        _answered.append(here)
        try:
            with Watch(self._layers[arm], see):
                yield
        except Exception:  # of the step, which may have others to follow
            self._calls = record
            raise
        finally:
            _answered.remove(here)
        if self._layers[arm] and not position and not here.has_aside:
            report.reasons["no call of a layer is seen, as in compiled code"] += 1
        self._calls = record

    def _why_not(self, call: _Call | str, layer: nn.Module, leaves: list[Any], structure: pytree.TreeSpec) -> str:
        """Why this call cannot be answered from ``call``; empty when it can."""
        if isinstance(call, str):
            return call
        reason = why_not_call(list(layer.modules()), leaves)
        if reason:
            return reason
        if structure != call.structure or context_of(leaves) != call.context:
            return "it is called with other arguments"
        if not all(same_value(new, old) for new, old in zip(leaves, call.leaves, strict=True)):
            return "its inputs differ between the arms"
        if not call.own.still_holds() and not _held(self._held, layer).same_as(call.own):
            return "what it holds differs between the arms"
        cache = cache_in(leaves)
        if cache is not None and call.cache_entry is not None:
            index = call.cache_entry.index
            if index < len(cache.layers) and cached_length(cache.layers[index]):
                return GOES_ON
        return ""

    def forget(self) -> None:
        """Free the record."""
        self._calls, self._kept = {}, {}


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


def _held(known: dict[nn.Module, Held], layer: nn.Module) -> Held:
    """What ``layer`` holds now: what is known, if that still holds."""
    if layer not in known or not known[layer].still_holds():
        known[layer] = Held(layer)
    return known[layer]


class _Recorder:
    def __init__(self, held: dict[nn.Module, Held], watch: bool) -> None:
        self.calls: dict[nn.Module, list[_Call | str]] = {}
        self._held = held
        self._watch = watch  # Python's and NumPy's generators around each layer
        self.drawn = False
        self.start: list[Any] | None = None  # their states ahead of the first layer
        self._arguments: dict[int, TensorCopy] = {}
        self._outputs: dict[int, TensorCopy] = {}  # of the latest layer: the next one's input

    def see(
        self, layer: nn.Module, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer, and remember what it was given and what came out, or why that cannot come out again."""
        if paused() or _aside:
            return forward(*args, **kwargs)
        calls = self.calls.setdefault(layer, [])
        leaves, structure, given = flatten((args, kwargs))
        reason = reason or why_not_call(list(layer.modules()), leaves)
        if not reason:
            own = _held(self._held, layer)
            reason = f"it holds a {own.unseen} that cannot be compared" if own.unseen else ""
        if reason:
            calls.append(reason)
            return forward(*args, **kwargs)
        copies = [self._copy(leaf, self._arguments) for leaf in leaves]
        cache = cache_in(leaves)
        lengths = [cached_length(entry) for entry in cache.layers] if cache is not None else []
        context = context_of(leaves)
        if self.start is None:
            self.start = python_random_states()
        before = random_states(leaves, self._watch)

        output = forward(*args, **kwargs)

        output_leaves, output_structure, returned = flatten(output)
        entry, reason = added_to_cache(cache, lengths)
        reason = reason or why_not_output(output_leaves, leaves, own.storages)
        if not same_states(before, random_states(leaves, self._watch)):
            self.drawn, reason = True, reason or "it draws random numbers"
        if not own.still_holds():
            del self._held[layer]  # with what it held then
            reason = reason or "it changes what it holds"
        now, structure_now, _ = flatten((args, kwargs))
        same = structure == structure_now and all(map(operator.is_, leaves, now))
        if not same or any(not c.still_holds() for c in copies if isinstance(c, TensorCopy)):
            reason = reason or "it changes its inputs in place"
        if len({*map(id, given), *map(id, returned)}) < len({*map(id, given)}) + len(returned) or any(
            container in own for container in returned
        ):
            reason = reason or "it returns a container that it was given or holds"
        if reason:
            calls.append(reason)
            return output
        self._outputs = {}
        inputs = [c.value if isinstance(c, TensorCopy) else c for c in copies]
        recorded = self._output(output_leaves, leaves)
        calls.append(_Call(inputs, structure, context, recorded, output_structure, entry, own))
        return output

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
