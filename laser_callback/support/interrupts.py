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
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Generator
from contextlib import _GeneratorContextManager
from dataclasses import dataclass
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


@dataclass
class _Wrapped:
    """A handler in its place. Whoever remembers and sets it meanwhile, as Lightning does, sets this very handler."""

    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _handlers.called(self.handler, number, frame)


class _Handlers:
    """The handlers of this process, wrapped while any context is open."""

    def __init__(self) -> None:
        # By id, in the order in which they were opened; and whether in the main thread.
        self._contexts: dict[int, tuple[weakref.ref[Any], bool]] = {}
        self._waiting: list[tuple[Any, int]] = []
        self._running = False

    def open(self, context: object, dropped: Callable[[], None] | None) -> None:
        key = id(context)

        # A weak reference and not `__del__`: an exception that strikes in that is swallowed, and it runs always.
        @undisturbed
        def gone(_: Any) -> None:
            if dropped is not None:
                dropped()
            self.close(key)

        main = threading.current_thread() is threading.main_thread()
        self._contexts[key] = weakref.ref(context, gone), main
        if not main:
            return
        for number in _CATCHABLE:
            handler = _signal.getsignal(number)
            if callable(handler) and type(handler) is not _Wrapped:
                _signal.signal(number, _Wrapped(handler))

    def close(self, key: int) -> None:
        self._contexts.pop(key, None)
        if threading.current_thread() is not threading.main_thread():
            return
        if not any(main for _, main in list(self._contexts.values())):
            found = [(number, _signal.getsignal(number)) for number in _CATCHABLE]
            ours = [(number, wrapped.handler) for number, wrapped in found if type(wrapped) is _Wrapped]
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
            self._run(*self._waiting.pop(0), this)

    def called(self, handler: Any, number: int, frame: FrameType | None) -> None:
        """In place of ``handler``."""
        if _undisturbed_from(frame) is not None:
            self._waiting.append((handler, number))
        else:
            self._run(handler, number, frame)

    def _run(self, handler: Any, number: int, frame: FrameType | None) -> None:
        contexts = [ref() for ref, _ in list(self._contexts.values())]
        aside: list[Any] = [context for context in contexts if hasattr(context, "suspend")]
        if handler is signal.default_int_handler or not aside or self._running:
            _marked(handler, number, frame)
            return
        self._running = True
        try:
            for context in reversed(aside):
                context.suspend()
            _marked(handler, number, frame)
        finally:
            for context in aside:  # also after an exception: not every one arrives (some strike in a finalizer)
                context.resume()
            self._running = False


_handlers = _Handlers()


def _marked(handler: Any, number: int, frame: FrameType | None) -> None:
    try:
        handler(number, frame)
    except Exception as error:
        error.__dict__["of_a_signal_handler"] = True
        raise


def is_of_handler(error: BaseException) -> bool:
    """Whether a signal handler has raised it: it is no failure of the code in which it comes out."""
    return "of_a_signal_handler" in vars(error)


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


@undisturbed
def elsewhere(work: Callable[[], T]) -> T:
    """What ``work`` returns, done in a thread of its own, where no signal handler can strike.

    For what has no ends of its own to guard: locks and pools of Python's, settings of C libraries. As during any call
    of C code, handlers wait until it has ended; long work ends early where :func:`is_awaited`.
    """
    found: list[T | BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)
        finally:
            ended.set()

    opened(ended)
    try:
        start_new_thread(run, ())
        ended.wait()
    finally:
        closed(ended)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def is_awaited() -> bool:
    """Whether a handler waits for what is going on."""
    return bool(_handlers._waiting)


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
