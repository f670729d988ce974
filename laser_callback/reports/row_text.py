"""The numbers of a row of a comparison as text, the same in every report: shares in percent, with intervals and p."""

from __future__ import annotations

import math

from laser_callback.stats.outcomes import PairedResult

SHARES = ("accuracy", "robustness", "consistency")
"""A mean whose name holds one of these is a share, shown in percent."""


def is_share(row: PairedResult) -> bool:
    """Whether the metric is a share."""
    return row.kind == "binary" or (row.kind == "mean" and any(word in row.metric for word in SHARES))


def percent(value: float, sign: str = "") -> str:
    """A share in percent; what is no number is no percentage."""
    return f"{value:{sign}.1%}" if math.isfinite(value) else f"{value:{sign}}"


def value_text(row: PairedResult, value: float) -> str:
    """A value of the metric."""
    return percent(value) if is_share(row) else f"{value:#.3g}"


def delta_text(row: PairedResult, value: float) -> str:
    """A change of the metric."""
    return _signed(percent(value, "+") if is_share(row) or row.kind == "log_ratio" else f"{value:+.2g}")


def interval_text(row: PairedResult) -> str:
    """The ends of the 95 % interval of the change; nothing if it was not tested."""
    if row.lower is None or row.upper is None:
        return ""
    if is_share(row) or row.kind == "log_ratio":
        ends = f"{100 * row.lower:+.1f}", f"{100 * row.upper:+.1f}"
    else:
        ends = f"{row.lower:+.2g}", f"{row.upper:+.2g}"
    return ", ".join(map(_signed, ends))


def _signed(number: str) -> str:
    """A number that begins with its sign; zero has none."""
    return number if float(number.rstrip("%")) else number[1:]


def p_text(row: PairedResult) -> str:
    """The p value that the row claims by; nothing if it was not tested."""
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None:
        return ""
    return "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def cell_text(text: object) -> str:
    """Text for a cell of a table in Markdown, from which no markup is read."""
    return " ".join(str(text).translate({ord(mark): f"&#{ord(mark)};" for mark in r"\`*{}[]<>|#&"}).split())


def change_text(row: PairedResult) -> str:
    """The change of the metric with its interval."""
    interval = interval_text(row)
    return f"{delta_text(row, row.delta)}{f' [{interval}]' if interval else ''}"


def claim_text(row: PairedResult) -> str:
    """What was found, in one line."""
    parts = [f"{value_text(row, row.original)} to {value_text(row, row.reduced)}", change_text(row)]
    parts += [f"p {p_text(row)}" if p_text(row).startswith("<") else f"p = {p_text(row)}"] if row.p is not None else []
    return f"{row.metric} {', '.join(parts)}, n = {row.n:,}: {row.verdict}"
