"""``laser-callback inspect``: a model's layers, kinds and spectra, what each rank rule keeps, and what is not cut."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.cli.command import Answer, notes
from laser_callback.plans.uncut import NotCut
from laser_callback.reports.inspection import check_picture, save_spectra
from laser_callback.spectra.inspection import RULES, InspectedMatrix, Inspection, inspect_model
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import need_writable
from laser_callback.support.in_files import open_pretrained
from laser_callback.support.progress import PhaseProgress

_SHOWN_RHOS = (0.01, 0.1, 0.5)
_WIDE = 120
"""A terminal with so many columns has room for ranges beside medians."""


def inspect(
    model: str,
    within: str = "*.all",
    each: bool = False,
    picture: Path | None = None,
    cache: bool = True,
    allow_missing: bool = False,
) -> Answer:
    """Show a model's weight matrices by layer and kind, their spectra, what each rank rule keeps, and what is not cut.

    Args:
        model: a folder, a hub name, or a .gguf file.
        within: which matrices, as plan text without rho, e.g. "20-29.mlp, *.q_proj".
        each: one row per matrix instead of one per kind and shape.
        picture: where to draw the energy curves (.svg, .png or .pdf).
        cache: look up factorisations on disk and keep them there for later commands.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
    """
    if picture is not None:
        check_picture(picture)
        need_writable(picture=picture)
    with notes():
        opened = open_pretrained(model, allow_missing)
    spectra = (Spectra.default() if cache else Spectra()).sparing(opened)
    found = inspect_model(opened, within, spectra, PhaseProgress())
    if picture is not None:
        save_spectra(found, picture)
    console = Console(highlight=False)
    console.print(render(found, each, ranges=console.width >= _WIDE))
    return Answer({"model": model, "within": within, **found.to_dict()})


def render(found: Inspection, each: bool = False, ranges: bool = True) -> RenderableType:
    """The inspection as tables: spectra by kind and shape (or of each matrix), then what is not cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 1 + ranges, 0, 0), header_style="bold")
    for heading in ("matrix" if each else "kind", "layers", "shape"):
        table.add_column(heading, overflow="fold")
    for rho in _SHOWN_RHOS:
        table.add_column(f"norm²\n{rho:.0%}", justify="right")
    for rule in RULES:
        table.add_column(rule.replace("-", "\n", 1), justify="right")
    for group in [[m] for m in found.matrices] if each else _groups(found.matrices):
        first = group[0]
        label = first.name if each or first.kind is None else _kind(first, found.matrices)
        shares = [_spread([m.energy(rho) for m in group], ranges) for rho in _SHOWN_RHOS]
        ranks = [_spread([m.ranks[rule] / max(m.max_rank, 1) for m in group], ranges) for rule in RULES]
        table.add_row(Text(label), _layers(group), "x".join(map(str, first.shape)), *shares, *ranks)
    notes = [
        "norm²: % of the squared norm that is left at so many % of the rank. Others: % of the maximum rank that a rule "
        f"keeps; `entropy` is the effective rank. Median{' (lowest-highest)' * ranges}. Rules see no data and are "
        "heuristics.",
        f"{len(found.matrices)} matrices in {found.seconds:.1f} s, of which {found.factorising:.1f} s factorising"
        + (f" ({found.loaded} read from disk)" if found.loaded else ""),
    ]
    return Group(table, Text(), *_not_cut(found.not_cut), *(Text(note, style="dim") for note in notes))


def _groups(matrices: Iterable[InspectedMatrix]) -> list[list[InspectedMatrix]]:
    """Matrices of one stack, kind and shape; one without a kind stands alone."""
    groups: dict[tuple[object, ...], list[InspectedMatrix]] = {}
    for matrix in matrices:
        alone = matrix.name if matrix.kind is None else ""
        groups.setdefault((matrix.stack, matrix.kind, matrix.shape, alone), []).append(matrix)
    return list(groups.values())


def _kind(matrix: InspectedMatrix, among: Sequence[InspectedMatrix]) -> str:
    several = len({m.stack for m in among if m.stack is not None}) > 1
    return f"{matrix.stack}: {matrix.kind}" if several else str(matrix.kind)


def _layers(group: Sequence[InspectedMatrix]) -> str:
    layers = sorted({m.layer for m in group if m.layer is not None})
    if not layers:
        return "-"
    span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    whole = len(layers) == layers[-1] - layers[0] + 1
    return span if whole else f"{len(layers)} of {span}"


def _spread(shares: Sequence[float], ranges: bool) -> str:
    """Median (lowest-highest) in percent, or the median alone."""
    values = [100 * share for share in shares]
    middle = f"{statistics.median(values):.0f}"
    return middle if len(values) == 1 or not ranges else f"{middle} ({min(values):.0f}-{max(values):.0f})"


def _not_cut(left: Sequence[NotCut]) -> list[RenderableType]:
    """What is not cut: parameters that differ in a number only share a row."""
    if not left:
        return []
    groups: dict[tuple[object, ...], list[NotCut]] = {}
    for item in left:
        groups.setdefault((re.sub(r"\d+", "*", item.name), item.shape, item.reason, item.by_name), []).append(item)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("not cut", "shape", "why"):
        table.add_column(heading, overflow="fold")
    for (pattern, _, reason, by_name), items in groups.items():
        name = f"{pattern} ({len(items)})" if len(items) > 1 else items[0].name
        why = f"{reason}; only when named" if by_name else f"{reason}"
        table.add_row(Text(name), "x".join(map(str, items[0].shape)) or "?", Text(why))
    return [table, Text()]
