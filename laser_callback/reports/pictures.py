"""The pictures of a result: for files and experiment loggers here, for the page one by one.

Contract: what there is to draw is drawn and nothing else, without a display and without touching matplotlib's global
state; the caller owns the figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from laser_callback.plans.short import brief, told_apart
from laser_callback.reports import drawing
from laser_callback.reports.panels import STEPS, panels, shading
from laser_callback.reports.row_text import is_share
from laser_callback.reports.search_text import GainText, Teller, numbered, pictured
from laser_callback.reports.svg import SHADES, printable, standalone
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import Row, label_counts
from laser_callback.stats.outcomes import PairedResult
from laser_callback.support.files import write_atomically
from laser_callback.support.plain_json import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from laser_callback.results.cleanup import CleanupResult
    from laser_callback.results.search import SearchResult  # which needs torch

Result: TypeAlias = "LaserResult | SearchResult | CleanupResult"

SPECTRA = 12
"""At most so many spectra are drawn."""
LABELS = 12
"""So many labels have bars."""


def figures(result: Result, examples: Sequence[Row] | None = None) -> dict[str, Figure]:
    """The pictures of a result by name: ``comparison``, ``spectra``, ``labels``; of a search ``map``, ``trades``.

    Args:
        result: what to draw.
        examples: per-example outcomes, as in the lines that :meth:`PairedExamples.write` writes; by default those that
            the result holds.
    """
    search, compared = _parts(result)
    drawn: dict[str, Figure | None] = {}
    with drawing.styled():
        if search is not None:
            drawn |= {"map": _map(search), "trades": _trades(search)}
        if compared is not None:
            rows = compared.examples.to_rows() if examples is None else examples
            drawn |= {
                "comparison": _changes(compared),
                "spectra": _spectra(compared),
                "labels": _labels(compared, rows),
            }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _parts(result: Result) -> tuple[SearchResult | None, LaserResult | None]:
    """The search, and the comparison that claims something."""
    if isinstance(result, LaserResult):
        return None, result
    from laser_callback.results.cleanup import CleanupResult

    return (result.search if isinstance(result, CleanupResult) else result), result.confirmed


def save_figures(
    result: Result, folder: str | Path, format: str = "png", examples: Sequence[Row] | None = None
) -> list[Path]:
    """Write :func:`figures` as files ``<name>.<format>`` into ``folder``; returns their paths."""
    paths = []
    for name, figure in figures(result, examples).items():
        path = Path(folder) / f"{name}.{format}"
        save_figure(figure, path)
        paths.append(path)
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` in the format that the ending of ``path`` names, atomically."""
    content = io.BytesIO()
    with drawing.styled():
        if path.suffix == ".svg":
            content.write(standalone(figure).encode())
        else:
            figure.savefig(content, format=path.suffix[1:], dpi=150)
    write_atomically(path, content.getvalue())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot, which may want a display

    return Figure(figsize=(width, height), layout="constrained")


def one(width: float, height: float, draw: Callable[..., None], *what: Any) -> Figure:
    """A figure with one chart, in inches."""
    figure = new_figure(width, height)
    draw(figure.subplots(), *what)
    return figure


# ---- a comparison ----------------------------------------------------------------------------------------------------


def _changes(result: LaserResult) -> Figure | None:
    """One panel for each unit."""
    units: dict[tuple[str, float], list[tuple[str, PairedResult]]] = {}
    for name, arm in result.arms.items():
        for row in arm.rows:
            if finite(row.delta) is not None:
                label = f"{name}: {row.metric}" if len(result.arms) > 1 else row.metric
                units.setdefault(_unit(row), []).append((label + "*" * (row.metric == result.primary), row))
    if not units:
        return None
    sizes = [len(members) + 1 for members in units.values()]
    figure = new_figure(7, 1 + 0.32 * sum(sizes))
    axes = figure.subplots(len(units), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axis, ((unit, scale), members) in zip(axes, units.items(), strict=True):
        drawing.changes(axis, members, scale, unit)
    _title(figure, "change with 95 % interval", [arm.plan for arm in result.arms.values()])
    return figure


def _unit(row: PairedResult) -> tuple[str, float]:
    if row.kind == "log_ratio":
        return "% of the original", 100.0
    return ("points", 100.0) if is_share(row) else ("", 1.0)


def _spectra(result: LaserResult) -> Figure | None:
    shown = [
        spectrum
        for arm in result.arms.values()
        for spectrum in arm.spectra
        if any(value > 0 for value in spectrum.values)
    ][:SPECTRA]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(3.6 * columns, 2.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, spectrum in zip(axes, shown, strict=False):
        drawing.spectrum(axis, spectrum)
        title = f"{spectrum.matrix}\n{drawing.kept_text(spectrum)}"
        axis.set_title(printable(title).replace(", ", ",\n"), fontsize=7)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _labels(result: LaserResult, examples: Sequence[Row]) -> Figure | None:
    counted = {}
    for name, arm in result.arms.items():
        checks = arm.prior(result.primary)
        counted[name] = label_counts(examples, name, checks.metric if checks else "")[:LABELS]
    counted = {name: counts for name, counts in counted.items() if counts}
    if not counted:
        return None
    sizes = [len(counts) for counts in counted.values()]
    figure = new_figure(6.5, 0.8 + 0.45 * sum(sizes) + 0.4 * len(sizes))
    axes = figure.subplots(len(counted), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axis, (name, counts) in zip(axes, counted.items(), strict=True):
        drawing.labels(axis, counts)
        axis.set_title(printable(brief(result[name].plan)))
    axes[0].legend(frameon=False)
    return figure


# ---- a search --------------------------------------------------------------------------------------------------------


def _map(result: SearchResult) -> Figure | None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades, drawn, tell = shading(result), panels(result), Teller(result)
    if shades is None or not drawn:
        return None
    height = max(2.6, 0.13 * max(len(panel.rows) for panel in drawn) + 1.4)
    figure = new_figure(0.6 + sum(0.5 + 0.16 * len(panel.rhos) for panel in drawn), height)
    axes = figure.subplots(1, len(drawn), squeeze=False, width_ratios=[len(panel.rhos) + 2 for panel in drawn])[0]
    for axis, panel in zip(axes, drawn, strict=True):
        drawing.heat_map(axis, panel, shades, tell)
    norm = BoundaryNorm([step - 0.5 for step in range(-STEPS, STEPS + 2)], len(SHADES))
    colours = ScalarMappable(norm, ListedColormap(SHADES))
    bar = figure.colorbar(colours, ax=list(axes), shrink=0.8, pad=0.01, ticks=range(-STEPS, STEPS + 1))
    sizes = [f"{threshold:.3g}" for threshold in shades.thresholds]
    bar.ax.set_yticklabels([*(f"-{size}" for size in sizes[::-1]), "0", *(f"+{size}" for size in sizes)])
    _title(figure, f"{shades.told}: lower is better; dots were raced, a ring was chosen", [])
    return figure


def trade_offs(result: SearchResult) -> list[drawing.TradeOff]:
    """The finalists' gain against their perplexity, and their divergence; of these what was measured."""
    shown = pictured(numbered(result.trades))
    gains = {str(candidate.whole): candidate.gain for candidate in result.candidates if not candidate.base}
    diverged = {number: trade for number, trade in shown.items() if finite(trade.kl) is not None}
    drawn = [
        drawing.TradeOff(of, gains, GainText.of(result), by_kl) for of, by_kl in ((shown, False), (diverged, True))
    ]
    return [what for what in drawn if what.trades]


def _trades(result: SearchResult) -> Figure | None:
    """All of :func:`trade_offs`, with the plans' names below."""
    drawn = trade_offs(result)
    if not drawn:
        return None
    named = drawn[0].trades
    plans = told_apart([trade.plan for trade in named.values()])
    figure = new_figure(6 * len(drawn), 4.2 + 0.15 * len(named))
    for axis, what in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        drawing.trade_off(axis, what)
    lines = [f"{number}. {printable(plan)}" for number, plan in zip(named, plans, strict=True)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8)
    return figure


def _title(figure: Figure, text: str, plans: Sequence[str]) -> None:
    lines = [text, *map(brief, plans)]
    figure.suptitle("\n".join(map(printable, lines)), fontsize=9)
