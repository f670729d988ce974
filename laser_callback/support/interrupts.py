"""Contexts whose two ends no signal handler can break in two.

Python runs signal handlers between any two steps of the main thread. One that raises, as Ctrl-C does, at the first step
of an ``__exit__`` leaves undone what that would have undone; one that runs there sees a world half put back. While a
context of this file is open, the handlers that are written in Python are wrapped:

- one that strikes inside of a function marked :func:`undisturbed` waits until that function has ended;
- any other runs at once, and the contexts that have a ``suspend`` and a ``resume`` step aside for it: a handler that
  writes a checkpoint in the middle of a reduced pass finds the original weights, loggers and results.

Nothing is swallowed: a handler that waits is run a few microseconds later. In other threads no handler ever runs.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` looks each number up in an enum: 100 times slower
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import _GeneratorContextManager
from functools import wraps
from itertools import starmap
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_CATCHABLE = [int(number) for number in sorted(signal.valid_signals())]
_undisturbed: set[CodeType] = set()


def undisturbed(function: F) -> F:
    """Mark a function, short and without a wait, whose lines belong together: handlers wait until it has ended.

    This holds while a context is open (:func:`opened`), and is the function itself, not a wrapper: a wrapper would have
    a first line of its own.
    """
    _undisturbed.add(function.__code__)
    return function


class _Handlers:
    """The handlers of this process, wrapped while any context is open."""

    def __init__(self) -> None:
        self._contexts: dict[int, weakref.ref[Any]] = {}  # by id, in the order in which they were opened
        self._originals: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._running = False

    def open(self, context: object, dropped: Callable[[], None] | None) -> None:
        key = id(context)

        # A weak reference and not `__del__`: an exception that strikes in that is swallowed, and it runs always.
        @undisturbed
        def gone(_: Any) -> None:
            if dropped is not None:
                dropped()
            self.close(key)

        self._contexts[key] = weakref.ref(context, gone)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _CATCHABLE:
            handler = _signal.getsignal(number)
            if callable(handler) and handler != self._called:
                self._originals[number] = handler
                _signal.signal(number, self._called)

    def close(self, key: int) -> None:
        self._contexts.pop(key, None)
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._contexts:
            ours = [item for item in self._originals.items() if _signal.getsignal(item[0]) == self._called]
            try:
                deque(starmap(_signal.signal, ours), maxlen=0)
            except BaseException:  # a handler just put back has run at once: the others all the same
                deque(starmap(_signal.signal, ours), maxlen=0)
                raise
        self.run_waiting()

    def run_waiting(self) -> None:
        """Called at the end of an undisturbed function: run what has waited for it, unless another one is around it."""
        while self._waiting:
            this = _undisturbed_from(sys._getframe())
            if this is not None and _undisturbed_from(this.f_back) is not None:
                return
            self._run(self._waiting.pop(0), this)

    def _called(self, number: int, frame: FrameType | None) -> None:
        if _undisturbed_from(frame) is not None:
            self._waiting.append(number)
        else:
            self._run(number, frame)

    def _run(self, number: int, frame: FrameType | None) -> None:
        handler = self._originals[number]
        contexts = [ref() for ref in self._contexts.values()]
        aside: list[Any] = [context for context in contexts if hasattr(context, "suspend")]
        if handler is signal.default_int_handler or not aside or self._running:
            handler(number, frame)
            return
        self._running = True
        try:
            for context in reversed(aside):
                context.suspend()
            handler(number, frame)
            for context in aside:  # not after an exception: it closes them
                context.resume()
        finally:
            self._running = False


_handlers = _Handlers()


def opened(context: object, dropped: Callable[[], None] | None = None) -> None:
    """Called by a context, in an undisturbed function, before it puts anything in place.

    Args:
        context: if it has the methods ``suspend`` and ``resume``, they are called around handlers.
        dropped: called when nobody refers to ``context`` any more, and it has not been :func:`closed`.
    """
    _handlers.open(context, dropped)


def closed(context: object) -> None:
    """Called by a context, last in an undisturbed function, once it has put everything back."""
    _handlers.close(id(context))


def catch_up() -> None:
    """Called last in an undisturbed function that does not end with :func:`closed`: runs what has waited for it."""
    _handlers.run_waiting()


def _undisturbed_from(frame: FrameType | None) -> FrameType | None:
    """The first frame, from this one outwards, of an undisturbed function."""
    while frame is not None and frame.f_code not in _undisturbed:
        frame = frame.f_back
    return frame


class _Whole(_GeneratorContextManager[T]):
    @undisturbed
    def __enter__(self) -> T:
        try:
            opened(self)
            value = super().__enter__()
            catch_up()
            return value
        except BaseException:
            self.close()
            catch_up()
            raise

    @undisturbed
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return super().__exit__(kind, error, traceback)
        finally:
            self.close()
            catch_up()

    @undisturbed
    def close(self) -> None:
        """Leave the context, in whatever state it is."""
        try:
            self.gen.close()
        finally:
            closed(self)


def whole(function: Callable[P, Generator[T, None, None]]) -> Callable[P, _Whole[T]]:
    """As :func:`contextlib.contextmanager`, but no handler interrupts what stands before and after the ``yield``.

    Both parts should be short; whatever takes time belongs into the caller.
    """

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> _Whole[T]:
        return _Whole(function, args, kwargs)

    return make
