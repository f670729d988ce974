"""What a user may have meant, and what was said, in a line."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def closest(name: str, known: Collection[str]) -> str:
    """``, did you mean `...`?`` if a known name is close to ``name``, else nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f", did you mean `{found[0]}`?" if found else ""


def clipped(text: object, most: int = 300) -> str:
    """``text`` for a message: one line, whose middle is left out where it has more than ``most`` characters."""
    line = " ".join(str(text).split()) if len(str(text)) <= most else str(text)
    half = (most - 3) // 2
    return line if len(line) <= most else " ".join(f"{line[:half]}...{line[-half:]}".split())
