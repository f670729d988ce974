"""What a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def closest(name: str, known: Collection[str]) -> str:
    """``, did you mean `...`?`` if a known name is close to ``name``, else nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f", did you mean `{found[0]}`?" if found else ""
