"""Signal handlers at the two ends of a context, and in the middle of it."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed, whole

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")


@pytest.fixture
def raising() -> Iterator[Any]:
    """SIGALRM raises, as Ctrl-C does."""

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield handler
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_context_is_entered_and_left_whole_whenever_a_handler_raises(raising: Any) -> None:
    inside: list[int] = []

    @whole
    def context() -> Generator[None, None, None]:
        inside.append(1)
        try:
            yield
        finally:
            inside.pop()

    hits, rng, ctrl_c = 0, random.Random(0), signal.getsignal(signal.SIGINT)
    for _ in range(2000):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4))
            with context(), context():
                pass
            time.sleep(1e-4)
        except KeyboardInterrupt:
            hits += 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            hits += 1
        assert inside == []
        assert signal.getsignal(signal.SIGALRM) is raising
        assert signal.getsignal(signal.SIGINT) == ctrl_c
    assert hits > 1500


def test_what_strikes_in_an_undisturbed_function_comes_after_it(raising: Any) -> None:
    done: list[str] = []

    class Context:
        @undisturbed
        def __enter__(self) -> None:
            opened(self)
            os.kill(os.getpid(), signal.SIGALRM)
            done.append("entered")
            catch_up()

        @undisturbed
        def __exit__(self, *_: object) -> None:
            done.append("left")
            closed(self)

    context = Context()
    with pytest.raises(KeyboardInterrupt):
        context.__enter__()
    context.__exit__()
    assert done == ["entered", "left"]
    assert signal.getsignal(signal.SIGALRM) is raising


def test_contexts_step_aside_for_a_handler_and_come_back() -> None:
    heard: list[str] = []

    class Aside:
        def __init__(self) -> None:
            self.state = "outside"

        @undisturbed
        def __enter__(self) -> Aside:
            opened(self)
            self.state = "inside"
            return self

        def suspend(self) -> None:
            self.state = "aside"

        def resume(self) -> None:
            self.state = "inside"

        @undisturbed
        def __exit__(self, *_: object) -> None:
            self.state = "outside"
            closed(self)

    aside = Aside()

    def handler(*_: Any) -> None:
        heard.append(aside.state)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with aside:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert aside.state == "inside"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == ["aside", "outside"]


def test_a_context_that_is_dropped_is_closed(raising: Any) -> None:
    class Context:
        pass

    context, dropped = Context(), []
    opened(context, lambda: dropped.append(True))
    assert signal.getsignal(signal.SIGALRM) is not raising
    del context
    gc.collect()
    assert dropped == [True]
    assert signal.getsignal(signal.SIGALRM) is raising


def test_handlers_that_are_set_inside_stay(raising: Any) -> None:
    @whole
    def context() -> Generator[None, None, None]:
        yield

    def mine(*_: Any) -> None:
        pass

    with context():
        signal.signal(signal.SIGALRM, mine)
    assert signal.getsignal(signal.SIGALRM) is mine


def test_other_threads_may_use_it(raising: Any) -> None:
    seen: list[Any] = []

    @whole
    def context() -> Generator[None, None, None]:
        yield

    def work() -> None:
        with context():
            seen.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [raising]


def test_a_handler_composed_of_the_one_that_was_there_runs_once_and_goes(raising: Any) -> None:
    """As Lightning does: it puts its own in front of the user's while a context is open, and then the user's back."""
    struck: list[str] = []

    def user(*_: Any) -> None:
        struck.append("user")

    signal.signal(signal.SIGALRM, user)

    @whole
    def context() -> Generator[None, None, None]:
        yield

    with context():
        there = signal.getsignal(signal.SIGALRM)
        assert callable(there)

        def composed(number: int, frame: Any) -> None:
            struck.append("composed")
            there(number, frame)

        signal.signal(signal.SIGALRM, composed)
        with context():
            os.kill(os.getpid(), signal.SIGALRM)
        assert struck == ["composed", "user"]
        signal.signal(signal.SIGALRM, there)
    assert signal.getsignal(signal.SIGALRM) is user
