"""One JSON file of all that the parts have said so far, and a table of each of a part's: summary.py ROWS OUTPUT PART"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rows import part_of, read

WIDTH = 150


def outcomes(report: Path) -> dict[str, Any]:
    """How many tests passed, and which did not, of one of pytest's reports."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {
        f"{case.get('classname')}::{case.get('name')}": (mark.get("message") or mark.tag)[:300]
        for case in cases
        for mark in case
        if mark.tag in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, "failures": bad}


def collect(rows: Path) -> dict[str, Any]:
    """Everything, in the order in which it was found."""
    parts = [line.split() for line in (rows / "parts.txt").read_text().splitlines()]
    return {
        "parts": {name: {"exit": int(code), "seconds": int(seconds)} for name, code, seconds in parts},
        "tests": {report.stem: outcomes(report) for report in sorted(rows.glob("*.xml"))},
        "tables": read(rows),
    }


def shown(cell: Any) -> str:
    """A cell as text: numbers with three digits."""
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """With the columns of all rows, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    drawn = Table(*(name.replace("_", " ") for name in columns), title=title, title_justify="left")
    for row in rows:
        drawn.add_row(*(shown(row.get(name)) for name in columns))
    return drawn


def main(rows: Path, output: Path, part: str) -> None:
    """Write the file, and print the part's tables."""
    found = collect(rows)
    output.write_text(json.dumps(found, indent=1))
    card = found["tables"]["machine"][0]["device"]
    console = Console(width=WIDTH)
    if part == "tests":
        counts = [
            {"tests": name, **{k: v for k, v in of.items() if k != "failures"}} for name, of in found["tests"].items()
        ]
        console.print(table(f"tests, {card}", counts))
        for of in found["tests"].values():
            for name, message in of["failures"].items():
                console.print(f"FAILED {name}: {message.splitlines()[0]}", markup=False)
    for title, values in found["tables"].items():
        if part_of(title) == part:
            console.print(table(f"{title}, {card}", values))
    console.print(f"{part}: exit {found['parts'][part]['exit']} after {found['parts'][part]['seconds']} s\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
