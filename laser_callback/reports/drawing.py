"""The report's charts, each drawn onto an axis of matplotlib: for files, experiment loggers and the page alike.

Contract: numbers in, marks out; a mark knows what it says when it is pointed at. To be called, like the saving of what
was drawn, within :func:`styled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laser_callback.plans.short import told_apart
from laser_callback.reports.panels import STEPS, Panel, Shading
from laser_callback.reports.row_text import percent
from laser_callback.reports.search_text import GainText, short_rho
from laser_callback.reports.svg import BETTER, DIM, INK, LINE, PAPER, SHADES, WORSE, printable, told
from laser_callback.results.flips import LabelCount
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.stats.outcomes import PairedResult

if TYPE_CHECKING:  # searches need torch, and the page of a comparison none
    from matplotlib.axes import Axes

    from laser_callback.results.candidates import Candidate, Estimate
    from laser_callback.results.search import Trade

_EDGES = 8  # of what was removed: more of them are no lines but a hatching

STYLE: Any = {
    "font.size": 9,
    "axes.labelcolor": DIM,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": LINE,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "laser_callback",
}


def styled() -> AbstractContextManager[None]:
    """Context in which the charts are drawn and saved as they should be."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


# ---- a comparison ----------------------------------------------------------------------------------------------------


def changes(axis: Axes, rows: Sequence[tuple[str, PairedResult]], scale: float, unit: str) -> None:
    """The change of each metric with its 95 % interval, under its label."""
    for place, (_, row) in enumerate(rows):
        colour = {"better": BETTER, "worse": WORSE}.get(row.verdict, DIM)
        if row.lower is not None and row.upper is not None and math.isfinite(row.lower + row.upper):
            axis.plot([scale * row.lower, scale * row.upper], [place, place], color=colour, linewidth=2)
        axis.plot([scale * row.delta], [place], "o", color=colour)
    axis.axvline(0, color=DIM, linewidth=0.8)
    _name_rows(axis, [label for label, _ in rows])
    axis.set_xlabel(f"reduced minus original, {unit}" if unit else "reduced minus original")


def spectrum(axis: Axes, cut: CutSpectrum) -> None:
    """Singular values on a logarithmic axis; what was removed is shaded."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    values = [value for value in cut.values if value > 0]
    floor = max(values[-1], values[0] * 1e-6)  # what is below is rounding, and would flatten the rest
    count = min(cut.shape)
    axis.semilogy([place + 0.5 for place in cut.places], [max(v, floor) for v in cut.values], color=INK, linewidth=1.5)
    for start, stop in cut.removed:
        axis.axvspan(start, stop, color=SHADES[-4], alpha=0.35, linewidth=0)
    edges = {edge for run in cut.removed for edge in run} - {0, count}
    for edge in edges if len(edges) <= _EDGES else ():
        axis.axvline(edge, color=WORSE, linewidth=1.2, linestyle="--")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values[0] < 200 * floor else (1,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y")
    axis.set(xlim=(0, count), xlabel="number of the singular value", ylabel="singular value")


def kept_text(cut: CutSpectrum) -> str:
    """How much of a cut matrix is kept."""
    count = min(cut.shape)
    kept = f"{count - sum(stop - start for start, stop in cut.removed):,} of {count:,} directions kept"
    return f"{kept}, {percent(cut.energy)} of the squared singular values"


def labels(axis: Axes, counts: Sequence[LabelCount]) -> None:
    """Three bars per label: how often it is right, said by the original, and said by the reduced model."""
    bars = {"right answer": (DIM, "gold"), "original": (SHADES[-3], "original"), "reduced": (SHADES[1], "reduced")}
    for i, (name, (colour, field)) in enumerate(bars.items()):
        values = [getattr(count, field) for count in counts]
        places = [place + 0.27 * (i - 1) for place in range(len(counts))]
        drawn = axis.barh(places, values, 0.25, color=colour, label=name)
        axis.bar_label(drawn, [f"{value:,}" for value in values], padding=2, fontsize=8, color=DIM)
    _name_rows(axis, [visible(count.label) for count in counts])
    axis.spines[:].set_visible(False)
    axis.set_xticks([])


def visible(label: str) -> str:
    """A label whose outer spaces can be seen, if they are all there is; else without them."""
    return label.strip() or repr(label)


# ---- a search --------------------------------------------------------------------------------------------------------


_DOT: Any = {"marker": "o", "color": INK, "markersize": 2, "markeredgecolor": PAPER, "markeredgewidth": 0.5}


def heat_map(axis: Axes, panel: Panel, shading: Shading, tell: Callable[[Candidate], str]) -> None:
    """One kind of matrix: rows are layers, columns rhos; what was run has a dot, what was chosen a ring.

    Args:
        axis: to draw on.
        panel: what to draw.
        shading: how a candidate is shaded.
        tell: all about a candidate.
    """
    from matplotlib.collections import PolyCollection

    rows, rhos = ({name: i for i, name in enumerate(names)} for names in (panel.rows, panel.rhos))
    places = [(rows[row], rhos[rho]) for row, rho in panel.cells]
    levels = [shading.level(candidate) for candidate in panel.cells.values()]
    cells = PolyCollection(
        [[(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)] for i, j in places],
        facecolors=["none" if level is None else SHADES[level + STEPS] for level in levels],
        edgecolors=[LINE if level is None else PAPER for level in levels],
        linewidths=0.6,
    )
    of_each = {"data-row": [i for i, _ in places], "data-column": [j for _, j in places]}
    told(cells, [*map(tell, panel.cells.values())], **of_each, **{"class": ["cell"] * len(places)})
    axis.add_collection(cells, autolim=False)
    raced = [(j + 0.5, i + 0.5) for (i, j), c in zip(places, panel.cells.values(), strict=True) if c.examples]
    axis.plot(*zip(*raced, strict=True), linestyle="none", **_DOT) if raced else None
    for row, lower, candidate in panel.between:
        (mark,) = axis.plot(lower, rows[row] + 0.5, **_DOT | {"markersize": 3.5})
        told(mark, tell(candidate), **{"class": "cell"})
    chosen = [(rhos[rho] + 0.5, rows[row] + 0.5, c) for (row, rho), c in panel.cells.items()]
    chosen += [(lower, rows[row] + 0.5, c) for row, lower, c in panel.between]
    for x, y, candidate in chosen:
        if candidate.status == "chosen":
            (mark,) = axis.plot(x, y, "o", color=INK, markersize=8, fillstyle="none", markeredgewidth=1.5)
            told(mark, tell(candidate), **{"class": "ring"})
    every = math.ceil(len(panel.rows) / 40)
    axis.set(xlim=(0, len(panel.rhos)), ylim=(len(panel.rows), 0), title=_short(panel.kind), xlabel="rho")
    axis.set_xticks([j + 0.5 for j in range(len(panel.rhos))], [short_rho(rho) for rho in panel.rhos], rotation=90)
    axis.set_yticks([i + 0.5 for i in range(0, len(panel.rows), every)], [_short(r) for r in panel.rows[::every]])
    axis.spines[:].set_visible(False)


@dataclass(frozen=True)
class TradeOff:
    """The finalists' gain against their fluency, as one picture.

    Attributes:
        trades: by the numbers that stand beside them.
        gains: by plan, for the intervals.
        gain: what it is of.
        by_kl: fluency is the divergence, and not the change of the perplexity.
    """

    trades: Mapping[int, Trade]
    gains: Mapping[str, Estimate | None]
    gain: GainText
    by_kl: bool

    @property
    def fluency(self) -> str:
        """What fluency is here, with its unit."""
        return "kl, nats per token" if self.by_kl else "perplexity, % change"


def trade_off(axis: Axes, what: TradeOff) -> None:
    """A numbered point for each trade; filled is what no other beats, large what was chosen."""
    gain, trades, points = what.gain, list(what.trades.values()), []
    for trade, plan in zip(trades, told_apart([trade.plan for trade in trades]), strict=True):
        x = (trade.kl if what.by_kl else 100 * (trade.fluency or 0.0)) or 0.0
        y = gain.scale * trade.gain
        points.append((x, y))
        estimate = what.gains.get(trade.plan)
        if estimate is not None and estimate.lower is not None and estimate.upper is not None:
            axis.plot([x, x], [gain.scale * estimate.lower, gain.scale * estimate.upper], color=DIM, linewidth=1)
        fill = SHADES[2] if trade.efficient else PAPER
        (point,) = axis.plot([x], [y], "o", color=fill, markeredgecolor=INK, markersize=9 if trade.chosen else 6)
        fluency = f"kl {x:.3g}" if what.by_kl else f"perplexity {x:+.1f} %"
        told(point, f"{plan}: gain {y:+.3g} {gain.unit}, {fluency}")
    axis.axhline(0, color=DIM, linewidth=0.8)
    axis.axvline(0, color=DIM, linewidth=0.8)
    axis.margins(0.12)
    _number(axis, dict(zip(what.trades, points, strict=True)))
    axis.set_xlabel(what.fluency)
    axis.set_ylabel(f"gain{f', {gain.unit}' if gain.unit else ''} [95 % interval]")


def _number(axis: Axes, points: Mapping[int, tuple[float, float]]) -> None:
    """Write beside each point its number; points that nearly meet share a place for theirs."""
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    together: list[tuple[float, float, list[int]]] = []
    for number, (x, y) in sorted(points.items(), key=lambda point: point[1]):
        if together and x - together[-1][0] < 0.05 * (high - low) and abs(y - together[-1][1]) < 0.07 * (top - bottom):
            together[-1] = (x, y, [*together[-1][2], number])
        else:
            together.append((x, y, [number]))
    paper: Any = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
    for x, y, numbers in together:
        text = ", ".join(map(str, sorted(numbers)))
        axis.annotate(text, (x, y), (6, 5), textcoords="offset points", bbox=paper)


# ---- details ---------------------------------------------------------------------------------------------------------


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [_short(name, 28) for name in names], color=INK)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _short(text: str, length: int = 16) -> str:
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
