"""What a part has found out, row by row, in a file: a part that is stopped has then told what it knew."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

ROWS = "LASER_GPU_ROWS"
"""The variable that names the folder."""


def row(table: str, **cells: Any) -> None:
    """Add a row to ``table``; its columns are the names of ``cells``."""
    plain = {
        name: None if isinstance(cell, float) and not math.isfinite(cell) else cell for name, cell in cells.items()
    }
    line = json.dumps({"table": table, "row": plain}, default=str)
    print(line, flush=True)
    if ROWS in os.environ:
        with Path(os.environ[ROWS], f"{part_of(table)}.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def part_of(table: str) -> str:
    """The part that a table belongs to: its first word."""
    return table.split(maxsplit=1)[0].rstrip(":")


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All tables by name, in the order in which they were begun."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_ctime):
        for line in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            tables.setdefault(found["table"], []).append(found["row"])
    return tables
