"""See the calls of chosen layers, and leave no trace on the layers.

While any :class:`Watch` is open, ``nn.Module.__call__`` is a function that looks for the called module among those that
are watched. Nothing is put on a layer or its class: inside of the user's step a layer is pickled, copied, scripted and
inspected as ever, its ``forward`` is its own, and the guards of compiled code hold. (``torch.fx`` takes the same way.)

A layer's own hooks fire around what a watch does in place of ``forward``. Code under compilation or tracing sees
nothing of this file, and neither does a direct call of ``layer.forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import TracebackType
from typing import Any

import torch
import torch._dynamo.variables.nn_module  # remembers at its import what `nn.Module.__call__` is
from torch import nn
from torch.nn.modules import module as torch_module
from typing_extensions import override

from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed

Forward = Callable[..., Any]
See = Callable[[nn.Module, str, Forward, tuple[Any, ...], dict[str, Any]], Any]

_GLOBAL = [f"_global_{kind}_hooks" for kind in ("forward_pre", "forward", "backward_pre", "backward")]

_open: dict[int, tuple[dict[int, nn.Module], See | None]] = {}  # by the id of the watch; without `See`: a pause
_before: Forward = nn.Module.__call__  # what ours has replaced, or replaced last
_installed = False


class Watch(AbstractContextManager[None]):
    """While it is open, ``see(layer, reason, forward, args, kwargs)`` takes the place of the forward of each layer.

    Of several, the last that was opened is the outermost; they may end in any order. Whatever interrupts a watch, it
    ends at the latest when nobody refers to it.

    Args:
        layers: the layers to watch.
        see: returns what the layer returns. With a ``reason`` (why nothing can take the forward's place) it must return
            ``forward(*args, **kwargs)``, which then is the whole call of the layer. Without ``see`` it is a pause: see
            :func:`paused`.
    """

    def __init__(self, layers: Iterable[nn.Module] = (), see: See | None = None) -> None:
        self._entry = {id(layer): layer for layer in layers}, see

    @override
    @undisturbed
    def __enter__(self) -> None:
        try:
            opened(self, partial(_end, id(self)))
            _open[id(self)] = self._entry
            _settle()
            catch_up()
        except BaseException:
            _end(id(self))
            closed(self)
            raise

    @override
    @undisturbed
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _end(id(self))
        closed(self)


def paused() -> bool:
    """Whether a watch without layers is open: what runs now is not to be recorded by anybody."""
    return any(see is None for _, see in tuple(_open.values()))


def _end(key: int) -> None:
    _open.pop(key, None)
    _settle()


def _settle() -> None:
    """Let ``nn.Module.__call__`` be what the open watches need. Wherever it is interrupted, the next call mends it."""
    global _before, _installed
    if _open and not _installed:
        if nn.Module.__call__ is not _call:
            _before = nn.Module.__call__
            nn.Module.__call__ = _call  # type: ignore[method-assign]
        _installed = True
    elif not _open and nn.Module.__call__ is _call:  # else someone is around ours, which lets everything through
        _installed = False
        nn.Module.__call__ = _before  # type: ignore[method-assign]


@wraps(nn.Module.__call__)
def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        sees = [see for layers, see in tuple(_open.values()) if see is not None and id(self) in layers]
        if sees:
            reason = why_not_in_place(self)
            forward: Forward = partial(_before, self) if reason else self.forward
            for see in sees:
                forward = _seen(see, self, reason, forward)
            if not reason and (self._forward_hooks or self._forward_pre_hooks):
                return nn.Module._call_impl(_Hooked(self, forward), *args, **kwargs)  # type: ignore[arg-type]
            return forward(*args, **kwargs)
    return _before(self, *args, **kwargs)


def _seen(see: See, layer: nn.Module, reason: str, forward: Forward) -> Forward:
    return lambda *args, **kwargs: see(layer, reason, forward, args, kwargs)


def why_not_in_place(layer: nn.Module) -> str:
    """Why nothing can take the place of the layer's forward in a call of the layer."""
    if layer._compiled_call_impl is not None or isinstance(layer, torch.jit.ScriptModule):
        return "it is compiled"
    if torch._C._get_tracing_state() is not None:
        return "it is traced"
    if any(vars(torch_module)[hooks] for hooks in _GLOBAL):
        return "a global hook listens"
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "a backward hook listens"
    plain = _before is nn.Module._wrapped_call_impl and type(layer)._call_impl is nn.Module._call_impl
    return "" if plain else "its calls are intercepted by others"


class _Hooked:
    """A layer as ``nn.Module._call_impl`` sees it: with its own hooks, and another forward."""

    def __init__(self, layer: nn.Module, forward: Forward) -> None:
        self._layer = layer
        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            return {key: partial(_tell, hook, self._layer) for key, hook in value.items()}
        return value


def _tell(hook: Forward, layer: nn.Module, _: Any, *rest: Any) -> Any:
    return hook(layer, *rest)
