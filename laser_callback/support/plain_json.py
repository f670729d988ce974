"""Numbers as JSON has them: it has no word for NaN and infinity."""

from __future__ import annotations

import math
from typing import Any


def finite(value: float | None) -> float | None:
    """The value, or ``None`` in place of what is no number."""
    return value if value is not None and math.isfinite(value) else None


def strict(data: Any) -> Any:
    """Plain data with ``None`` for numbers that JSON has no word for, and lists for tuples."""
    if isinstance(data, dict):
        return {key: strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [strict(value) for value in data]
    return finite(data) if isinstance(data, float) else data
