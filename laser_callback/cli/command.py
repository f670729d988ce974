"""What a command is, and how one is run.

A command is a plain typed function; its options are made in ``options.py``. What it prints is for people; what scripts
need it returns as an :class:`Answer`. Nothing here imports torch or jsonargparse, so that help is quick.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

from laser_callback.support.suggest import clipped

_WIDEST, _LONGEST = 2_000, 60
"""Characters of a line of a message, and lines of it."""


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0  # and where a verdict is asked for: the plan is recommended
    CRASHED = 1
    MISUSED = 2  # a bad option, plan or file
    KEPT_ORIGINAL = 3  # all went well, and the verdict is to keep the original model
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    Attributes:
        data: what ``--json`` writes: strings, finite numbers, booleans, ``None``, lists and mappings of these. ``None``
            writes nothing, as on all ranks but the first.
        code: the exit code.
    """

    data: Any = None
    code: int = Exit.DONE


def run(work: Callable[[], Answer | int | None], prog: str, *, as_json: bool, debug: bool) -> int:
    """Do a command's work, write its answer, and tell a mistake of the user without a traceback.

    Args:
        work: calls the command.
        prog: the command as it was typed, ahead of an error.
        as_json: write the answer's data to stdout, and whatever is printed to stderr.
        debug: let exceptions through.

    Returns:
        The exit code.
    """
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            answer = work()
    except KeyboardInterrupt as error:
        how = Exit.TERMINATED if isinstance(error, Terminated) else Exit.INTERRUPTED
        print(f"{prog}: {how.name.lower()}", file=sys.stderr)
        return how
    except Exception as error:
        if debug or not is_mistake(error):
            raise
        print(f"{prog}: error: {in_lines(error)}", file=sys.stderr)
        return Exit.MISUSED
    if not isinstance(answer, Answer):
        answer = Answer(code=answer or Exit.DONE)
    if as_json and answer.data is not None:
        print(json.dumps(answer.data, indent=2, ensure_ascii=False, allow_nan=False))
    return int(answer.code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends work as Ctrl-C does."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within: SIGTERM is :class:`Terminated`, so that what is known is written, and no file is half there."""

    def strike(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # no other can set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def notes() -> Iterator[None]:
    """Within: of a warning is shown the sentence, and not where in the code it was said."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        yield


def in_lines(message: object) -> str:
    """A message for a person: whatever it repeats of what was given, no line of it is longer than can be read."""
    lines = str(message).strip().split("\n")
    shown = [clipped(line, _WIDEST) if len(line) > _WIDEST else line for line in lines[:_LONGEST]]
    return "\n".join([*shown, *(["..."] if len(lines) > _LONGEST else [])])


def is_mistake(error: BaseException) -> bool:
    """Whether the user can mend it. By kind: all of the package's own complaints are of these."""
    if isinstance(error, (ArgumentError, ValueError, OSError, ModuleNotFoundError)):
        return True
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


def json_numbers(numbers: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers or scalar tensors as JSON has them: what is not finite becomes ``None``."""
    values = {name: float(number) for name, number in numbers.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
