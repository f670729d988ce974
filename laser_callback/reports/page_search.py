"""The parts of a page that show a search: constraints, map, race, gain against fluency, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laser_callback.reports.charts import Point, legend, panel_chart, scatter
from laser_callback.reports.markup import Markup, foreign, joined, table, tag
from laser_callback.reports.page_comparison import verdict
from laser_callback.reports.panels import Panel, Shading, panels, shading
from laser_callback.reports.search_text import (
    GainText,
    aligned,
    change_unit,
    merit,
    pictured,
    seconds_text,
    trade_order,
)
from laser_callback.results.candidates import Candidate, Estimate, bases, finite, ranks
from laser_callback.results.search import SearchResult, Trade

RACERS = 12
"""So many rows has the table of the race."""


def constraints_part(result: SearchResult) -> Markup:
    """The gates on the guard set."""
    noted = any(j.note for j in result.judgements)
    heads = ["constraint", "change", "95 % bound", "n", "verdict", *["note"] * noted]
    rows = [
        [foreign(j.gate), j.amount(j.change), j.amount(j.bound), f"{j.n:,}", verdict(j.verdict), *[j.note] * noted]
        for j in result.judgements
    ]
    told = "The bound is one-sided, on the unfavourable side. A constraint passes if the bound keeps it."
    count = result.sets.get("guard")
    caption = f"Constraints, on {count:,} guard examples" if count else "Constraints, on the guard set"
    return joined([table(caption, heads, rows, numbers=heads[1:4]), tag("p", told, class_="note")])


# ---- map -------------------------------------------------------------------------------------------------------------


def map_part(result: SearchResult) -> Markup | None:
    """The heat map of the first step; ``None`` if nothing is known of any candidate."""
    shades = shading(result)
    if shades is None:
        return None
    drawn, place = panels(result), ranks(result.candidates)
    tell = _Teller(result, place)
    figures = [
        tag("figure", tag("figcaption", foreign(panel.kind)), panel_chart(panel, shades, tell)) for panel in drawn
    ]
    readout = tag(
        "output", "Point at a cell, or go through a map with the arrow keys.", class_="readout", aria_live="polite"
    )
    steps = len(bases(result.candidates))
    told = f"Shaded is the {shades.told}, for each layer, kind of matrix and rho"
    told += f" of the first of {steps} steps." if steps > 1 else "."
    return joined(
        [
            tag("p", told),
            legend(shades),
            tag("div", tag("div", *figures, class_="figures"), readout, class_="maps"),
            tag("details", tag("summary", "As numbers: the best rho of each layer and kind"), _best(drawn, shades)),
        ]
    )


class _Teller:
    """All about a candidate of the first step, in one line of text."""

    def __init__(self, result: SearchResult, place: Mapping[int, int]) -> None:
        self.gain, self.unit, self.place = GainText.of(result), change_unit(result), place
        self.ranked = sum(not candidate.base and id(candidate) in place for candidate in result.candidates)

    def __call__(self, candidate: Candidate) -> str:
        parts = [str(candidate.reduction)]
        score = finite(candidate.score)
        if score is not None:
            parts.append(f"screen {score:+.3g}, rank {self.place[id(candidate)]:,} of {self.ranked:,}")
        if candidate.examples:
            parts.append(f"raced on {candidate.examples:,} examples")
        if candidate.gain is not None:
            parts.append(f"gain {self._estimate(candidate.gain, self.gain.scale)} {self.gain.unit}".rstrip())
        if candidate.loss is not None:
            parts.append(f"loss {self._estimate(candidate.loss, 1)} {self.unit}")
        if candidate.examples:
            parts.append(candidate.status + (f": {candidate.reason}" if candidate.reason else ""))
        return "; ".join(parts)

    @staticmethod
    def _estimate(estimate: Estimate, scale: float) -> str:
        interval = ""
        if finite(estimate.lower) is not None and finite(estimate.upper) is not None:
            interval = f" [{scale * (estimate.lower or 0):+.3g}, {scale * (estimate.upper or 0):+.3g}]"
        return f"{scale * estimate.delta:+.3g}{interval}"


def _best(drawn: list[Panel], shades: Shading) -> Markup:
    """The lowest change of each row and kind, and its rho."""
    best: dict[str, dict[str, str]] = {}
    for panel in drawn:
        for row in panel.rows:
            known = [
                (change, rho)
                for rho in panel.rhos
                if (row, rho) in panel.cells and (change := finite(shades.change(panel.cells[row, rho]))) is not None
            ]
            if known:
                change, rho = min(known)
                best.setdefault(row, {})[panel.kind] = f"{change:+.2g} at {rho:.4g}"
    heads = ["layer", *(panel.kind for panel in drawn)]
    rows = [[foreign(row), *(cells.get(kind, "") for kind in heads[1:])] for row, cells in best.items()]
    return table(f"Lowest {shades.told}", heads, rows, numbers=heads[1:])


# ---- race ------------------------------------------------------------------------------------------------------------


def race_part(result: SearchResult) -> Markup | None:
    """The candidates that were run, the best first; ``None`` if none was."""
    run = sorted((c for c in result.candidates if c.examples), key=merit)
    if not run:
        return None
    gain, place, steps = GainText.of(result), ranks(result.candidates), bases(result.candidates)
    shown = run[:RACERS]
    scores = aligned([finite(candidate.score) for candidate in shown])
    gains = _estimates([candidate.gain for candidate in shown], gain.scale, gain.decimals)
    losses = _estimates([candidate.loss for candidate in shown], 1, None)
    gain_head = f"gain [95 % interval]{f', {gain.unit}' if gain.unit else ''}"
    loss_head = f"loss [95 % interval], {change_unit(result)}"
    columns: dict[str, list[Any]] = {"reduction": [tag("code", str(candidate.reduction)) for candidate in shown]}
    if len(steps) > 1:
        columns["step"] = [steps.index(candidate.base) + 1 for candidate in shown]
    if any(candidate.score is not None for candidate in shown):
        columns["rank"] = [f"{place[id(c)]:,}" if id(c) in place else "-" for c in shown]
        columns["screen"] = list(scores)
    columns["n"] = [f"{candidate.examples:,}" for candidate in shown]
    columns[gain_head] = gains
    if any(candidate.loss for candidate in shown):
        columns[loss_head] = losses
    columns["outcome"] = [joined([c.status, f": {c.reason}" if c.reason else ""]) for c in shown]
    heads = list(columns)
    caption = f"{len(run):,} of {len(result.candidates):,} candidates were run"
    caption += f", the best {len(shown)}" if len(run) > len(shown) else ""
    rows = zip(*columns.values(), strict=True)
    told = f"Gain is the {gain.told} on n race examples; + is better. These numbers chose the plan and claim nothing."
    return joined(
        [
            table(caption, heads, rows, numbers=[head for head in heads if head not in ("reduction", "outcome")]),
            tag("p", told, class_="note"),
            *(
                tag("p", f"Step {number} adds to ", tag("code", base), " and is compared with it.", class_="note")
                for number, base in enumerate(steps, 1)
                if base
            ),
        ]
    )


def _estimates(estimates: Sequence[Estimate | None], scale: float, decimals: int | None) -> list[Markup]:
    ends = [(None, None, None) if e is None else (e.delta, e.lower, e.upper) for e in estimates]
    texts = aligned([None if value is None else scale * value for row in ends for value in row], decimals)
    cells = []
    for i, (_, lower, upper) in enumerate(ends):
        delta, low, high = texts[3 * i : 3 * i + 3]
        known = finite(lower) is not None and finite(upper) is not None
        cells.append(joined([delta, tag("span", f" [{low}, {high}]", class_="interval") if known else None]))
    return cells


# ---- gain against fluency --------------------------------------------------------------------------------------------


def trades_part(result: SearchResult) -> Markup:
    """The finalists' gain against their fluency: a picture where fluency was measured, and a table."""
    gain = GainText.of(result)
    trades = sorted(result.trades, key=trade_order)
    by_plan = {str(candidate.plan): candidate.gain for candidate in result.candidates if not candidate.base}
    shown = pictured(trades)
    points = [_point(trade, gain, by_plan.get(trade.plan)) for trade in shown]
    unit = f", {gain.unit}" if gain.unit else ""
    estimates = [by_plan.get(trade.plan) or Estimate(trade.gain) for trade in trades]
    gains = _estimates(estimates, gain.scale, gain.decimals)
    fluency = aligned([None if trade.fluency is None else 100 * trade.fluency for trade in trades], 1)
    heads = ["plan", f"gain [95 % interval]{unit}", "perplexity, % change", ""]
    rows = []
    for trade, *numbers in zip(trades, gains, fluency, strict=True):
        marks = ["no other is better in both"] * trade.efficient + ["went to confirmation"] * trade.chosen
        rows.append([tag("code", trade.plan), *numbers, ", ".join(marks)])
    told = "Finalists on the race examples. Filled: no other finalist has both more gain and better fluency. "
    told += "Bars are 95 % intervals of the gain that do not allow for the choice among candidates."
    if len(shown) < len(trades):
        told += " What is far worse, or was not measured, is in the table only."
    picture = scatter(points, "perplexity, % change", f"gain{unit}") if points else None
    return joined(
        [
            tag("p", told, class_="note") if points else None,
            tag("figure", picture) if points else None,
            table("The finalists on race examples", heads, rows, numbers=heads[1:3]),
        ]
    )


def _point(trade: Trade, gain: GainText, estimate: Estimate | None) -> Point:
    fluency = trade.fluency or 0.0
    style = "chosen" if trade.chosen else "efficient" if trade.efficient else "other"
    ends = (None, None) if estimate is None else (finite(estimate.lower), finite(estimate.upper))
    low, high = (None if end is None else gain.scale * end for end in ends)
    told = f"{trade.plan}: gain {gain.scale * trade.gain:+.3g} {gain.unit}, perplexity {fluency:+.1%}"
    label = trade.plan if style != "other" else ""
    return Point(100 * fluency, gain.scale * trade.gain, low, high, label, told, style)


# ---- time ------------------------------------------------------------------------------------------------------------


def time_part(result: SearchResult) -> Markup:
    """Where time went."""
    rows = [
        [foreign(p.name), seconds_text(p.seconds), f"{p.passes:,}", f"{p.whole_passes:,.0f}"] for p in result.phases
    ]
    heads = ["phase", "time", "passes", "whole passes"]
    told = "Passes are examples times arms; whole passes count each by the share of the layers that was computed."
    return joined([table("Time of each phase", heads, rows, numbers=heads[1:]), tag("p", told, class_="note")])
