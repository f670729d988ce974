"""Layers in front of the first cut, over all tokens that a model reads one after the other.

While the original writes, it calls each layer once for the prompt, and then once for every token. :class:`Front` keeps
what went into the first layer and what came out of the last ones that are in front of a cut, and has the keys and
values in between from the model's own cache. A reduced model that reads the same tokens again, many in one call, is
then given the same, and computes only what is behind its first cut.

That is :mod:`laser_callback.surgery.replay` for calls that are cut up otherwise than they were recorded, and it holds
to the same: in eval mode, with the same values of what goes in and of all that a layer can reach, without hooks that
would stay silent. That a layer's output at a token is a function of the tokens up to it, whether they come one by one
or at once, is what a cache of keys and values is built on. The cache must be the plain one, that forgets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from laser_callback.surgery.held import Held
from laser_callback.surgery.interception import Forward, Watch, why_not_in_place
from laser_callback.surgery.replay import Answered, Recorded
from laser_callback.surgery.replayable import (
    cache_in,
    cached_length,
    context_of,
    flatten,
    random_states,
    same_states,
    why_not_call,
)


def is_plain(cache: Any) -> bool:
    """Whether a cache keeps keys and values of every token in every layer, and nothing else."""
    return type(cache) is DynamicCache and all(type(entry) is DynamicLayer for entry in cache.layers)


class Front:
    """The record of one continuation.

    Args:
        passes: of the original, that are being recorded.

    Attributes:
        trouble: why it is of no use; empty if it is.
    """

    def __init__(self, passes: Sequence[Recorded]) -> None:
        self._arms = [list(layers) for one in passes for layers in one.layers.values()]
        self._stacks = passes[0].stacks
        self._held = passes[0].held
        self.trouble = ""
        self._stack: set[nn.Module] = set()
        self._order: list[nn.Module] = []  # as they are called
        self._entries: dict[nn.Module, int] = {}  # of the cache
        self._own: dict[nn.Module, Held] = {}
        self._nothing: dict[nn.Module, int | None] = {}  # how often that is returned beside hidden states in a tuple
        self._last: dict[int, nn.Module] = {}  # of each arm the last one that was called in front of its cut
        self._context: tuple[Any, ...] = ()
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: dict[nn.Module, list[Tensor]] = {}
        self._states: list[Any] = []
        self._cache: Any = None

    # ---- the original -----------------------------------------------------------------------------------------------

    def watching(self, tokens: Tensor) -> Watch:
        """Within: the original reads ``tokens`` and writes."""
        self._states = random_states([tokens], python=True)
        return Watch({id(layer): layer for layers in self._arms for layer in layers}.values(), self._see)

    def _see(
        self, layer: nn.Module, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._order:  # what another stack is given may come from behind a cut in this one
            stack = next(stack for stack in self._stacks if layer in stack)
            self._arms = [[one for one in layers if one in stack] for layers in self._arms]
            self._stack = set(stack)
        if self.trouble or layer not in self._stack:
            return forward(*args, **kwargs)
        first = not self._order or layer is self._order[0]
        self._calls += first
        if self._calls > 1 and layer not in self._own:
            self.trouble = "its layers are not called in the same way for each token"
        ends = layer in self._outputs
        if self._calls > 1 and not first and not ends:
            return forward(*args, **kwargs)
        leaves, _, containers = flatten((args, kwargs))
        hidden = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if len(containers) > 1:  # than its keywords
            reason = reason or "it is given a container, which it may fill"
        if first and hidden is not None:
            self._inputs.append(hidden.detach().clone())
        if self._calls == 1:
            return self._meet(layer, reason, leaves, lambda: forward(*args, **kwargs))
        output = forward(*args, **kwargs)
        if ends:
            self._outputs[layer].append(_hidden(output).detach().clone())
        return output

    def _meet(self, layer: nn.Module, reason: str, leaves: list[Any], run: Forward) -> Any:
        """The first call of a layer, for the prompt."""
        cache, own = cache_in(leaves), Held(layer) if layer not in self._held else self._held[layer]
        if not own.still_holds():
            own = Held(layer)
        lengths = [cached_length(entry) for entry in cache.layers] if cache is not None else []
        reason = reason or why_not_call(list(layer.modules()), leaves)
        reason = reason or (f"it holds a {own.unseen} that cannot be compared" if own.unseen else "")
        reason = reason or ("it is called twice for a token" if layer in self._own else "")
        output = run()
        lengths += [0] * (len(cache.layers) - len(lengths)) if cache is not None else []
        grown = [i for i, length in enumerate(lengths) if cached_length(cache.layers[i]) != length]
        if len(grown) != 1 or not is_plain(cache):
            reason = reason or "its key/value cache is not one that keeps every token"
        nothing = None if isinstance(output, Tensor) else len(output) - 1
        if nothing is not None and (type(output) is not tuple or any(part is not None for part in output[1:])):
            reason = reason or "it returns more than its hidden states"
        self._held[layer] = self._own[layer] = own
        self._context = self._context or context_of(leaves)
        self._order.append(layer)
        self._entries[layer], self._nothing[layer] = (grown or [0])[0], nothing
        self._last |= {number: layer for number, layers in enumerate(self._arms) if layer in layers}
        self.trouble = self.trouble or reason
        if not self.trouble:
            self._outputs[layer] = [_hidden(output).detach().clone()]
            self._outputs = {one: of for one, of in self._outputs.items() if one in self._last.values()}
        return output

    def finish(self, cache: Any) -> None:
        """The original has written, and this is its cache, to which nobody adds any more."""
        if not self._order:
            self.trouble = self.trouble or "none of its layers is called"
        elif not is_plain(cache):
            self.trouble = self.trouble or "its key/value cache is not one that keeps every token"
        elif not same_states(self._states, random_states([self._inputs[0]], python=True)):
            self.trouble = self.trouble or "random numbers are drawn"
        elif not all(own.still_holds() for own in self._own.values()):
            self.trouble = self.trouble or "a layer changes what it holds"
        self._cache = cache
        if not self.trouble:
            self._read = torch.cat(self._inputs, 1)  # (B, S, D)
            self._written = {layer: torch.cat(of, 1) for layer, of in self._outputs.items()}
        self._inputs, self._outputs = [], {}

    # ---- a reduced model --------------------------------------------------------------------------------------------

    def of(self, arm: Answered, head: set[int]) -> AnsweredFront | None:
        """What answers for the layers in front of an arm's first cut; ``None``, and counted why, if nothing can.

        Args:
            arm: that runs, with its weights in place.
            head: parameters that nothing but the output reads, by ``id``.
        """
        called = [layer for layer in self._order if layer in arm.layers]  # of one stack, from its first layer on
        reason = self.trouble
        if not reason and arm.outside - head:
            reason = "what is cut is read ahead of the layers, too"
        for layer in called if not reason else ():
            own = self._own[layer]
            reason = reason or why_not_in_place(layer) or why_not_call(list(layer.modules()), [])
            if not reason and not own.still_holds() and not Held(layer).same_as(own):
                reason = "what it holds differs between the arms"
        if reason and arm.layers:
            arm.report.reasons[f"written tokens: {reason}"] += 1
        return AnsweredFront(self, arm, called) if called and not reason else None

    def same_input(self, hidden: Tensor, rows: Tensor, start: int, stop: int, mask: Tensor) -> bool:
        """Whether the first layer is given what it was given, at all tokens that are none of padding."""
        before = self._read[rows, start:stop]
        alike = hidden.shape == before.shape and hidden.dtype == before.dtype and hidden.device == before.device
        return alike and bool((hidden == before).all(-1)[mask.bool()].all())


class AnsweredFront:
    """The layers in front of one arm's first cut, answered."""

    def __init__(self, front: Front, arm: Answered, layers: list[nn.Module]) -> None:
        self._front, self._arm, self._layers = front, arm, layers

    def answering(self, rows: Tensor, start: int, stop: int, mask: Tensor) -> Watch:
        """Within: one call of the model over some of the tokens.

        Args:
            rows: (R,) int64, which rows of the batch.
            start: of the tokens.
            stop: of the tokens.
            mask: (R, stop - start), nonzero at tokens that are none of padding.
        """
        front, runs = self._front, False

        def see(layer: nn.Module, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal runs
            leaves, _, _ = flatten((args, kwargs))
            hidden: Tensor = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            if layer is self._layers[0]:  # here it is decided for all of them
                reason = reason or ("" if context_of(leaves) == front._context else "it is called with other arguments")
                same = not reason and front.same_input(hidden, rows, start, stop, mask)
                runs = not same
                if runs:
                    self._arm.report.reasons[f"written tokens: {reason or 'its inputs differ between the arms'}"] += 1
            if runs:
                self._arm.report.run += 1
                return forward(*args, **kwargs)
            self._arm.report.replayed += 1
            entry = front._cache.layers[front._entries[layer]]
            cache: Cache = cache_in(leaves)
            cache.update(entry.keys[rows, :, start:stop], entry.values[rows, :, start:stop], front._entries[layer])
            output = front._written[layer][rows, start:stop] if layer is self._layers[-1] else hidden
            nothing = front._nothing[layer]
            return output if nothing is None else (output, *[None] * nothing)

        return Watch(self._layers, see)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
