"""Where in a model a search found something: a map of layers and kinds for the terminal.

Contract: a list of candidates is read and not changed. A map shows the first step, in which every candidate is cut from
the original model; later steps start from a model that is cut already, so their numbers do not belong in the same
picture. A candidate without a rho, such as a plan of several cuts, has no place in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.plans.kinds import KINDS
from laser_callback.reports.search_text import short_rho

if TYPE_CHECKING:  # the page of a comparison needs no torch, as searches do
    from laser_callback.results.candidates import Candidate

SHADES = "░▒▓█"
"""Improvement in four steps, each but the first at twice the change of the one before."""
_NONE, _UNKNOWN, _CHOSEN = "·", "?", "◂"
_MAX_ROWS = 40  # of layers; beyond it neighbours share a row, so that a map stays on one screen
_OTHER = "other"  # column of what has no kind: matrices addressed by name or regex


@dataclass(frozen=True)
class _Cell:
    """The best of one layer (or group of layers) and kind; ``change`` is ``None`` where nothing is known."""

    change: float | None
    rho: float
    chosen: bool


def heat_map(
    candidates: Iterable[Candidate], change: Callable[[Candidate], float | None], unit: str
) -> list[RenderableType]:
    """Layers as rows, kinds as columns; a cell is a shade for the lowest change over rho, and that rho.

    It fits into 80 columns and reads the same without colour. Rows in which nothing improves are drawn together.

    Args:
        candidates: those of one step.
        change: of a candidate: negative is better, ``None`` leaves it out, and what is not finite counts as unknown,
            but for +inf, which is no improvement.
        unit: of the change, for the legend.

    Returns:
        The map and its legend; one sentence if nothing improves, nothing at all if there is nothing to show.
    """
    cells = _cells([(c, c.rho, value) for c in candidates if c.rho is not None and (value := change(c)) is not None])
    if not cells:
        return []
    best = min((cell.change for cell in cells.values() if cell.change is not None), default=0.0)
    if best >= 0:
        return [Text(f"nothing lowers it: none of {len(cells)} cells (layer and kind)", style="dim")]
    top = round_threshold(-best)
    kinds = _columns({kind for _, kind in cells})
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", justify="right", no_wrap=True)
    for kind in kinds:
        table.add_column(Text(kind), no_wrap=True)
    for first, last in _runs(cells, kinds, top):
        row = [cells.get((first, kind)) for kind in kinds]
        table.add_row(_label(first, last), *(_draw(cell, top) for cell in row))
    return [table, _map_legend(cells.values(), top, -best, unit)]


_Rows = tuple[int, int] | None  # first and last layer of a row; None outside of any stack


def _cells(values: list[tuple[Candidate, float, float]]) -> dict[tuple[_Rows, str], _Cell]:
    layers = [candidate.layer for candidate, *_ in values if candidate.layer is not None]
    # Neighbours are grouped from layer 0 on, so that one map's rows are those of the other.
    size = math.ceil((max(layers, default=0) + 1) / _MAX_ROWS)
    last = max(layers, default=0)
    cells: dict[tuple[_Rows, str], _Cell] = {}
    for candidate, rho, value in values:
        start = None if candidate.layer is None else candidate.layer // size * size
        rows = None if start is None else (start, min(start + size - 1, last))
        key = rows, candidate.kind or _OTHER
        known = None if math.isnan(value) or value == -math.inf else value
        new = _Cell(known, rho, candidate.status == "chosen")
        old = cells.get(key)
        if old is None:
            cells[key] = new
            continue
        better = known is not None and (old.change is None or known < old.change)
        chosen = new if better else old
        cells[key] = _Cell(chosen.change, chosen.rho, old.chosen or new.chosen)
    return cells


def _columns(kinds: set[str]) -> list[str]:
    known = [kind for kind in KINDS if kind in kinds]
    unknown = sorted(kinds - {*KINDS, _OTHER})
    return [*known, *unknown, *([_OTHER] if _OTHER in kinds else [])]


def _runs(cells: dict[tuple[_Rows, str], _Cell], kinds: list[str], top: float) -> list[tuple[_Rows, _Rows]]:
    """First and last row of each line: the layers in order, neighbours without any shade together."""
    rows = sorted({row for row, _ in cells}, key=lambda row: (row is None, row or (0, 0)))
    runs: list[tuple[_Rows, _Rows]] = []
    drawn_before: list[str] | None = None
    for row in rows:
        drawn = [_draw(cells.get((row, kind)), top).plain for kind in kinds]
        adjacent = runs and row and runs[-1][1] and runs[-1][1][1] + 1 == row[0]
        if adjacent and drawn == drawn_before and not any(set(cell) - set(f"{_NONE}{_UNKNOWN} ") for cell in drawn):
            runs[-1] = runs[-1][0], row
        else:
            runs.append((row, row))
        drawn_before = drawn
    return runs


def _label(first: _Rows, last: _Rows) -> str:
    if first is None or last is None:
        return "none"
    return str(first[0]) if first[0] == last[1] else f"{first[0]}-{last[1]}"


def _draw(cell: _Cell | None, top: float) -> Text:
    if cell is None:
        return Text()
    mark = (_CHOSEN, "bold") if cell.chosen else ""
    if cell.change is None:
        return Text.assemble((_UNKNOWN, "dim"), mark)
    if cell.change >= 0:
        return Text.assemble((_NONE, "dim"), mark)
    level = sum(-cell.change >= top / 2**halvings for halvings in (2, 1, 0))
    style = "bold green" if level == 3 else "green"
    return Text.assemble((SHADES[level] * 2, style), (f" {short_rho(cell.rho)}", "dim" if level < 2 else ""), mark)


def round_threshold(best: float) -> float:
    """Where the darkest shade starts: 1, 2, 4 or 8 times a power of ten, between 0.36 and 0.75 of the best."""
    power = 10.0 ** math.floor(math.log10(0.75 * best))
    return max(power * digit for digit in (1, 2, 4, 8) if power * digit <= 0.75 * best * (1 + 1e-9))


def _map_legend(cells: Iterable[_Cell], top: float, best: float, unit: str) -> Text:
    drawn = list(cells)
    parts = [f"{SHADES[0]} lower"]
    parts += [f"{SHADES[level]} by {top / 2 ** (3 - level):.4g}" for level in (1, 2, 3)]
    legend = f"{'  '.join(parts)} {unit} or more (best {best:.2g}), at the rho beside it; {_NONE} not lower at any rho"
    if any(cell.change is None for cell in drawn):
        legend += f"; {_UNKNOWN} no number"
    if any(cell.chosen for cell in drawn):
        legend += f"; {_CHOSEN} a cut here was chosen"
    return Text(legend, style="dim")
