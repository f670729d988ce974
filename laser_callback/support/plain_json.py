"""Data as JSON has it: it has no word for NaN and infinity, and knows neither dates nor identifiers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Set
from enum import Enum
from typing import Any


def finite(value: float | None) -> float | None:
    """The value, or ``None`` in place of what is no number."""
    return value if value is not None and math.isfinite(value) else None


def plain(data: Any) -> Any:
    """Whatever it is as what JSON can hold.

    ``None`` for numbers that JSON has no word for, lists for tuples, arrays and tensors, an enumeration's value, the
    text of bytes, and of everything else what ``str`` makes of it.

    >>> from pathlib import Path
    >>> from decimal import Decimal
    >>> plain({1: (float("nan"), b"bytes", Path("a/b"), Decimal("0.10"))})
    {'1': [None, 'bytes', 'a/b', '0.10']}
    """
    if data is None or type(data) in (str, int, bool):
        return data
    if isinstance(data, Enum):
        return plain(data.value)
    if isinstance(data, float):
        return finite(float(data))
    if isinstance(data, (str, int)):
        return str(data) if isinstance(data, str) else int(data)
    if isinstance(data, Mapping):
        return {key if type(key) is str else text_of(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, Set):
        return sorted(map(plain, data), key=str)
    if callable(getattr(data, "tolist", None)):  # of NumPy and torch
        return plain(data.tolist())
    return text_of(data)


def label(value: Any) -> Hashable:
    """``value`` as a label: hashable, and of a type that JSON has."""
    # Each NaN is another, as in Python, where one object is equal to itself in a dictionary, though.
    found = (float("nan") if math.isnan(value) else value) if isinstance(value, float) else plain(value)
    return str(found) if isinstance(found, (list, dict)) else found


def text_of(value: Any) -> str:
    """``value`` in words: bytes by what they spell, and what fails to say it by its class and address."""
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "backslashreplace")
    try:
        return str(value)
    except Exception:
        return object.__repr__(value)
