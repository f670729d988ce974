"""What the pages of a search and a cleanup show of the way to a plan: contenders, map, race, gain against fluency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from laser_callback.plans.short import told_apart
from laser_callback.plans.words import in_words
from laser_callback.reports.drawing import heat_map, trade_off
from laser_callback.reports.page_columns import Columns, change, code, flat, foreign, in_short, with_interval
from laser_callback.reports.panels import Panel, Shading, panels, shading
from laser_callback.reports.pictures import one, trade_offs
from laser_callback.reports.search_text import (
    CONTENDERS_LEGEND,
    OFF_THE_MAP,
    GainText,
    Teller,
    aligned,
    by_strategy,
    change_unit,
    contender_kind,
    contender_name,
    four_parts_text,
    kl_texts,
    merit,
    numbered,
    off_the_map,
    unbeaten_text,
    with_strategy,
)
from laser_callback.reports.svg import inline
from laser_callback.results.candidates import Candidate, Estimate, bases, ranks
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.comparison import LaserResult
from laser_callback.results.search import SearchResult
from laser_callback.support.plain_json import finite

RACERS = 12
"""So many rows has the table of the race."""


def context_of(result: SearchResult | CleanupResult) -> tuple[str, dict[str, Any]]:
    """The template of the page, and everything that it shows."""
    if isinstance(result, SearchResult):
        return "search.html", _of_search(result, result.confirmed)
    files = {"searched": result.source, "another epoch" if result.plan is None else "cleaned": result.checkpoint}
    files["report"] = result.report
    return "cleanup.html", _of_search(result.search, result.confirmed) | {
        "cleanup": result,
        "contenders": _contenders(result),
        "others": _others(result),
        "files": [(name, str(file)) for name, file in files.items() if file is not None],
    }


def _of_search(result: SearchResult, confirmed: LaserResult | None) -> dict[str, Any]:
    shades, drawn = shading(result), panels(result)
    tell = Teller(result)
    found = {} if confirmed is None else confirmed.provenance
    settings = {name: value for name, value in result.settings.items() if value is not None or name not in found}
    return {
        "result": result,
        "confirmed": confirmed,
        "steps": bases(result.candidates),
        "shades": shades,
        "panels": [] if shades is None else [_picture(panel, shades, tell) for panel in drawn],
        "in_words": in_words,
        "best": {} if shades is None else _best(drawn, shades),
        "strategies": _strategies(result),
        "off_the_map": _off_the_map(result),
        "race": _race(result),
        "trades": _trades(result),
        "provenance": list(flat({**found, "examples": result.sets, **settings})),
    }


def _picture(panel: Panel, shades: Shading, tell: Teller) -> Markup:
    width = 0.35 + 0.07 * max(min(len(row), 16) for row in panel.rows) + 0.2 * len(panel.rhos)
    height = 0.75 + len(panel.rows) * min(0.2, max(0.06, 6 / len(panel.rows)))
    told = f"{panel.kind}: {len(panel.rows)} layers by {len(panel.rhos)} rhos; the arrow keys go from cell to cell"
    return inline(one(width, height, heat_map, panel, shades, tell), told, **{"class": "map", "tabindex": "0"})


def _best(drawn: Sequence[Panel], shades: Shading) -> Columns:
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
    cells = {panel.kind: [of_row.get(panel.kind, "") for of_row in best.values()] for panel in drawn}
    return {"layer": [foreign(row) for row in best], **cells}


def _strategies(result: SearchResult) -> Columns:
    """What each strategy has brought; empty if there is one only."""
    if not with_strategy(result):
        return {}
    gain, found = GainText.of(result), by_strategy(result)
    unit = f", {gain.unit}" if gain.unit else ""
    return {
        "strategy": [code(of.name) for of in found],
        "proposed": [f"{of.proposed:,}" for of in found],
        "raced": [f"{of.raced:,}" for of in found],
        "best of these": ["-" if of.best is None else in_short(of.best.plan) for of in found],
        f"gain [95 % interval]{unit}": _estimates([of.gain for of in found], gain.scale, gain.decimals),
    }


def _off_the_map(result: SearchResult) -> dict[str, Any] | None:
    """The candidates that have no place in the maps, the best first; ``None`` if all have one."""
    found = off_the_map(result)
    if not found:
        return None
    shown = found[:RACERS]
    first = sum(not candidate.base for candidate in result.candidates)
    columns = _plans(shown)
    if with_strategy(result):
        columns["strategy"] = [code(candidate.strategy) for candidate in shown]
    if any(finite(candidate.score) is not None for candidate in found):
        columns["screen"] = aligned([finite(candidate.score) for candidate in shown])
    columns["n"] = [f"{candidate.examples:,}" if candidate.examples else "-" for candidate in shown]
    told = f"{len(found):,} of {first:,} candidates have no place in a map: {OFF_THE_MAP}"
    caption = f"What has no place in a map{f', the best {len(shown)}' if len(found) > len(shown) else ''}"
    return {"told": told, "caption": caption, "columns": columns}


def _race(result: SearchResult) -> dict[str, Any] | None:
    """The candidates that were run, the best first; ``None`` if none was."""
    run = sorted((c for c in result.candidates if c.examples), key=merit)
    if not run:
        return None
    gain, place, steps = GainText.of(result), ranks(result.candidates), bases(result.candidates)
    shown = run[:RACERS]
    columns = _plans(shown)
    if with_strategy(result):
        columns["strategy"] = [code(candidate.strategy) for candidate in shown]
    if len(steps) > 1:
        columns["step"] = [steps.index(candidate.base) + 1 for candidate in shown]
    if any(candidate.score is not None for candidate in shown):
        columns["rank"] = [f"{place[id(c)]:,}" if id(c) in place else "-" for c in shown]
        columns["screen"] = aligned([finite(candidate.score) for candidate in shown])
    columns["n"] = [f"{candidate.examples:,}" for candidate in shown]
    unit = f", {gain.unit}" if gain.unit else ""
    columns[f"gain [95 % interval]{unit}"] = _estimates([c.gain for c in shown], gain.scale, gain.decimals)
    if any(candidate.loss for candidate in shown):
        columns[f"loss [95 % interval], {change_unit(result)}"] = _estimates([c.loss for c in shown], 1, None)
    caption = f"{len(run):,} of {len(result.candidates):,} candidates were run"
    caption += f", the best {len(shown)}" if len(run) > len(shown) else ""
    return {"caption": caption, "columns": columns, "gain": gain.told}


def _contenders(result: CleanupResult) -> dict[str, Any]:
    """What a cleanup held against the model as trained."""
    rows = result.contenders
    numbers: Columns = {
        "race": ["" if row.gain is None else f"{row.gain:+.4g}" for row in rows],
        "n": ["" if row.gain is None else f"{row.examples:,}" for row in rows],
        "confirm": [
            _number(row.value) + ("" if row.confirmed or row.kind == "as trained" else "*" * (row.value is not None))
            for row in rows
        ],
    }
    if any(row.said_most is not None for row in rows):
        numbers["says most"] = [_number(row.said_most) for row in rows]
        numbers["balanced"] = [_number(row.balanced) for row in rows]
    plans = {"as trained", "checkpoint"}
    columns: Columns = {
        "contender": [contender_kind(row) for row in rows],
        "what": [foreign(contender_name(row)) if row.kind in plans else in_short(row.name) for row in rows],
        **numbers,
        "outcome": ["went to confirmation" if row.confirmed else "" for row in rows],
    }
    objective = next(iter(result.search.objective), "the objective")
    return {"columns": columns, "numbers": [*numbers], "told": CONTENDERS_LEGEND, "objective": objective}


def _others(result: CleanupResult) -> dict[str, Any] | None:
    """What fine-tuning and the cleanup did to other tasks; ``None`` without any."""
    if result.four_parts is None:
        return None
    cleaned = [task.cleaning for task in result.others]
    columns: Columns = {
        "task": [foreign(task.name) for task in result.others],
        "base": [_number(task.tuning.original) for task in result.others],
        "fine-tuned": [_number(task.tuning.reduced) for task in result.others],
        "cleaned": ["" if row is None else _number(row.reduced) for row in cleaned],
        "cleaned - fine-tuned [95 % interval]": ["" if row is None else change(row) for row in cleaned],
        "by fine-tuning": [task.effect for task in result.others],
    }
    return {"told": four_parts_text(result.four_parts), "columns": columns}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plans(shown: Sequence[Candidate]) -> Columns:
    """The columns of a table of candidates that a reader must see: each plan, and beside it what became of it."""
    plans = [candidate.plan for candidate in shown]
    return {
        "plan": list(map(in_short, plans, told_apart(plans))),
        "outcome": [f"{c.status}: {c.reason}" if c.reason else c.status for c in shown],
    }


def _trades(result: SearchResult) -> dict[str, Any] | None:
    """The finalists' gain against their fluency: pictures and a table; ``None`` where fluency was not measured."""
    listed, drawn = numbered(result.trades), trade_offs(result)
    if not drawn:
        return None
    gain, trades = GainText.of(result), list(listed.values())
    by_plan = {str(candidate.whole): candidate.gain for candidate in result.candidates if not candidate.base}
    estimates = [by_plan.get(trade.plan) or Estimate(trade.gain) for trade in trades]
    marks = [["unbeaten"] * t.efficient + ["went to confirmation"] * t.chosen for t in trades]
    plans = [trade.plan for trade in trades]
    diverged = kl_texts(trades)
    return {
        "pictures": [
            inline(one(5, 3.6, trade_off, what), f"gain against {what.fluency}, {len(what.trades)} points")
            for what in drawn
        ],
        "unbeaten": unbeaten_text(trades),
        "left_out": len(drawn[0].trades) < len(trades),
        "columns": {
            "plan": [
                Markup("{}. {}").format(number, in_short(plan, short))
                for number, plan, short in zip(listed, plans, told_apart(plans), strict=True)
            ],
            f"gain [95 % interval]{f', {gain.unit}' if gain.unit else ''}": _estimates(
                estimates, gain.scale, gain.decimals
            ),
            "perplexity, % change": aligned([None if t.fluency is None else 100 * t.fluency for t in trades], 1),
            **({"kl, nats per token": diverged} if any(cell != "-" for cell in diverged) else {}),
            "": [", ".join(of_trade) for of_trade in marks],
        },
    }


def _estimates(estimates: Sequence[Estimate | None], scale: float, decimals: int | None) -> list[Markup]:
    ends = [(None, None, None) if e is None else (e.delta, e.lower, e.upper) for e in estimates]
    texts = aligned([None if value is None else scale * value for row in ends for value in row], decimals)
    cells = []
    for i, (_, lower, upper) in enumerate(ends):
        delta, low, high = texts[3 * i : 3 * i + 3]
        known = finite(lower) is not None and finite(upper) is not None
        cells.append(with_interval(delta, f"{low}, {high}" if known else ""))
    return cells
