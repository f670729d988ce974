"""The report's pictures by matplotlib, for files and experiment loggers; needs the extra ``plots``.

Contract: :func:`figures` draws what there is to draw and nothing else, without a display and without touching
matplotlib's global state; the caller owns the figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from laser_callback.reports.charts import kept_text, visible
from laser_callback.reports.heat_map import short_rho
from laser_callback.reports.panels import STEPS, panels, shading
from laser_callback.reports.row_text import is_share
from laser_callback.reports.search_text import GainText, pictured
from laser_callback.results.candidates import Candidate, finite
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import Row, label_counts
from laser_callback.results.search import SearchResult
from laser_callback.stats.paired import PairedResult
from laser_callback.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result: TypeAlias = "LaserResult | SearchResult"

SHADES = (
    *("#0a4580", "#2e76b1", "#68a2cf", "#a6c9e4", "#d5e5f2"),
    "#eceae5",
    *("#fae4cd", "#f3c08d", "#e39250", "#bf661c", "#823f06"),
)
"""From much better over no change to much worse: told apart also by those who do not see red and green."""
_BETTER, _WORSE, _DIM = SHADES[1], SHADES[-2], "#5c6066"
_SPECTRA = 12
_LABELS = 12


def figures(result: Result, examples: Sequence[Row] | None = None) -> dict[str, Figure]:
    """The pictures of a result by name: ``comparison``, ``spectra``, ``labels``; of a search also ``map``, ``trades``.

    Args:
        result: what to draw.
        examples: per-example outcomes, as in the lines that :meth:`PairedExamples.write` writes; by default those that
            the result holds.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    require_matplotlib()
    search = result if isinstance(result, SearchResult) else None
    compared = result.confirmed if isinstance(result, SearchResult) else result
    drawn: dict[str, Figure | None] = {}
    if search is not None:
        drawn |= {"map": _map(search), "trades": _trades(search)}
    if compared is not None:
        rows = compared.examples.to_rows() if examples is None else examples
        drawn |= {"comparison": _comparison(compared), "spectra": _spectra(compared), "labels": _labels(compared, rows)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_figures(
    result: Result, folder: str | Path, format: str = "png", examples: Sequence[Row] | None = None
) -> list[Path]:
    """Write :func:`figures` as files ``<name>.<format>`` into ``folder``; returns their paths.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    paths = []
    for name, figure in figures(result, examples).items():
        path = Path(folder) / f"{name}.{format}"
        content = io.BytesIO()
        figure.savefig(content, format=format, dpi=150)
        write_atomically(path, content.getvalue())
        paths.append(path)
    return paths


def require_matplotlib() -> None:
    """Say at once what would be said at the end.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'laser-callback[plots]'")


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot, which may want a display

    return Figure(figsize=(width, height), layout="constrained")


# ---- a comparison ----------------------------------------------------------------------------------------------------


def _comparison(result: LaserResult) -> Figure | None:
    """The change of each metric with its interval; one panel for each unit."""
    units: dict[str, list[tuple[str, PairedResult, float]]] = {}
    for name, arm in result.arms.items():
        for row in arm.rows:
            if finite(row.delta) is not None:
                unit, scale = _unit(row)
                label = f"{name}: {row.metric}" if len(result.arms) > 1 else row.metric
                units.setdefault(unit, []).append((label + "*" * (row.metric == result.primary), row, scale))
    if not units:
        return None
    sizes = [len(members) + 1 for members in units.values()]
    figure = _new_figure(7, 1 + 0.32 * sum(sizes))
    axes = figure.subplots(len(units), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axis, (unit, members) in zip(axes, units.items(), strict=True):
        for place, (_, row, scale) in enumerate(members):
            colour = {"better": _BETTER, "worse": _WORSE}.get(row.verdict, _DIM)
            if row.lower is not None and row.upper is not None and math.isfinite(row.lower + row.upper):
                axis.plot([scale * row.lower, scale * row.upper], [place, place], color=colour, linewidth=2)
            axis.plot([scale * row.delta], [place], "o", color=colour)
        axis.axvline(0, color="black", linewidth=0.8)
        _name_rows(axis, [label for label, _, _ in members])
        axis.set_xlabel(f"reduced minus original, {unit}" if unit else "reduced minus original")
    _title(figure, "change with 95 % interval", [arm.plan for arm in result.arms.values()])
    return figure


def _unit(row: PairedResult) -> tuple[str, float]:
    if row.kind == "log_ratio":
        return "% of the original", 100.0
    return ("points", 100.0) if is_share(row) else ("", 1.0)


def _spectra(result: LaserResult) -> Figure | None:
    spectra = [spectrum for arm in result.arms.values() for spectrum in arm.spectra if spectrum.values[0] > 0]
    shown = spectra[:_SPECTRA]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _new_figure(3.6 * columns, 2.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, spectrum in zip(axes, shown, strict=False):
        axis.semilogy([place + 1 for place in spectrum.places], spectrum.values, color="black", linewidth=1.2)
        start, stop = spectrum.removed
        axis.axvspan(start + 0.5, stop + 0.5, color=SHADES[-4], alpha=0.35, linewidth=0)
        axis.set_title(_plain(f"{spectrum.matrix}\n{kept_text(spectrum)}").replace(", ", ",\n"), fontsize=7)
        axis.set_xlabel("number of the singular value", fontsize=7)
        axis.tick_params(which="both", labelsize=7)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _labels(result: LaserResult, examples: Sequence[Row]) -> Figure | None:
    counted = {name: label_counts(examples, name)[:_LABELS] for name in result.arms}
    counted = {name: counts for name, counts in counted.items() if counts}
    if not counted:
        return None
    sizes = [len(counts) for counts in counted.values()]
    figure = _new_figure(6.5, 0.8 + 0.45 * sum(sizes) + 0.4 * len(sizes))
    axes = figure.subplots(len(counted), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axis, (name, counts) in zip(axes, counted.items(), strict=True):
        bars = [
            ("right answer", _DIM, [c.gold for c in counts]),
            ("original", SHADES[-3], [c.original for c in counts]),
            ("reduced", SHADES[1], [c.reduced for c in counts]),
        ]
        for i, (label, colour, values) in enumerate(bars):
            axis.barh([place + 0.27 * (i - 1) for place in range(len(counts))], values, 0.25, color=colour, label=label)
        _name_rows(axis, [visible(c.label) for c in counts])
        axis.set_title(_plain(result[name].plan), fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("examples")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


# ---- a search --------------------------------------------------------------------------------------------------------


def _map(result: SearchResult) -> Figure | None:
    shades, drawn = shading(result), panels(result)
    if shades is None:
        return None
    height = max(2.6, 0.13 * max(len(panel.rows) for panel in drawn) + 1.4)
    figure = _new_figure(0.6 + sum(0.5 + 0.16 * len(panel.rhos) for panel in drawn), height)
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(SHADES)
    norm = BoundaryNorm([step - 0.5 for step in range(-STEPS, STEPS + 2)], len(SHADES))
    axes = figure.subplots(1, len(drawn), squeeze=False, width_ratios=[len(panel.rhos) + 2 for panel in drawn])[0]
    image: Any = None
    for axis, panel in zip(axes, drawn, strict=True):
        levels = [[math.nan] * len(panel.rhos) for _ in panel.rows]
        for (row, rho), candidate in panel.cells.items():
            i, j = panel.rows.index(row), panel.rhos.index(rho)
            level = shades.level(candidate)
            levels[i][j] = math.nan if level is None else level
            if candidate.examples:
                axis.plot(j, i, **_mark(candidate))
        for row, place, candidate in panel.between:
            axis.plot(place - 0.5, panel.rows.index(row), **_mark(candidate))
        image = axis.imshow(levels, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        every = math.ceil(len(panel.rows) / 40)
        axis.set_xticks(range(len(panel.rhos)), [short_rho(rho) for rho in panel.rhos], rotation=90, fontsize=6)
        axis.set_yticks(range(0, len(panel.rows), every), [_plain(row) for row in panel.rows[::every]], fontsize=6)
        axis.set_title(_plain(panel.kind), fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.01, ticks=range(-STEPS, STEPS + 1))
    sizes = [f"{threshold:.3g}" for threshold in shades.thresholds]
    bar.ax.set_yticklabels([*(f"-{size}" for size in sizes[::-1]), "0", *(f"+{size}" for size in sizes)], fontsize=6)
    _title(figure, f"{shades.told}: lower is better; dots were raced, a ring was chosen", [])
    return figure


def _mark(candidate: Candidate) -> dict[str, Any]:
    if candidate.status == "chosen":
        return {"marker": "o", "color": "black", "markersize": 7, "fillstyle": "none"}
    return {"marker": "o", "color": "black", "markersize": 1.5}


def _trades(result: SearchResult) -> Figure | None:
    gain = GainText.of(result)
    shown = pictured(result.trades)
    if not shown:
        return None
    figure = _new_figure(6, 4.2)
    axis = figure.subplots()
    estimates = {str(c.plan): c.gain for c in result.candidates if not c.base}
    for trade in shown:
        x, y = 100 * (trade.fluency or 0.0), gain.scale * trade.gain
        estimate = estimates.get(trade.plan)
        if estimate is not None and estimate.lower is not None and estimate.upper is not None:
            axis.plot([x, x], [gain.scale * estimate.lower, gain.scale * estimate.upper], color=_DIM, linewidth=1)
        axis.plot([x], [y], "o", color=_BETTER if trade.efficient else "white", markeredgecolor="black")
        if trade.efficient or trade.chosen:
            axis.annotate(_plain(trade.plan), (x, y), (5, 5), textcoords="offset points", fontsize=7)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("perplexity, % change")
    axis.set_ylabel(f"gain{f', {gain.unit}' if gain.unit else ''} [95 % interval]")
    _title(figure, "finalists on the race examples; filled: no other is better in both", [])
    return figure


# ---- details ---------------------------------------------------------------------------------------------------------


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _title(figure: Figure, text: str, plans: Sequence[str]) -> None:
    figure.suptitle(
        _plain("\n".join([text, *(plan if len(plan) < 90 else f"{plan[:87]}..." for plan in plans)])), fontsize=9
    )


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
