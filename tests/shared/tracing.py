"""An interrupt at a line of one's choice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where it struck: the function, and which of its lines."""

    function: str
    line: int


def interrupted(work: Callable[[], object], event: int, watched: set[CodeType | str]) -> Place | None:
    """Run ``work`` with KeyboardInterrupt at the ``event``-th line, from 0, of some functions or files.

    Args:
        work: what is run.
        event: which of the lines that run.
        watched: codes of functions, and names of files.

    Returns:
        Where it struck, None if fewer lines run.
    """
    struck: list[Place] = []
    left = event

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if code not in watched and code.co_filename not in watched:
            return None
        if kind == "line" and not struck:
            left -= 1
            if left < 0:
                struck.append(Place(code.co_name, frame.f_lineno - code.co_firstlineno))
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        if not struck:
            raise
    finally:
        sys.settrace(before)
    return struck[0] if struck else None
