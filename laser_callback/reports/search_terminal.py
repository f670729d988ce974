"""Show a search in the terminal: the verdict first, then the evidence, then the way to it.

Contract: :func:`render` reads a :class:`SearchResult` and nothing else; whatever a search did not get to is left out or
said to be missing. Text that comes from users (plans, metrics, reasons) is never read as Rich markup.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief, told_apart
from laser_callback.plans.words import in_words
from laser_callback.reports import terminal as report
from laser_callback.reports.gate_terminal import judgement_table
from laser_callback.reports.heat_map import SHADES, heat_map
from laser_callback.reports.search_text import (
    OFF_THE_MAP,
    REACHED,
    GainText,
    aligned,
    by_strategy,
    change_unit,
    kl_texts,
    merit,
    not_raced,
    off_the_map,
    score_name,
    seconds_text,
    trade_order,
    unbeaten_text,
    with_strategy,
)
from laser_callback.results.candidates import Candidate, Estimate, bases, ranks
from laser_callback.results.search import Phase, SearchResult, Trade
from laser_callback.support.plain_json import finite
from laser_callback.support.suggest import clipped

_LONGEST_NAME = 20
_TOP = 10  # rows in the tables of the race and of the trades
_LEADERS = 3
_MARKS = {"chosen": "✓", "rejected": "✗", "finalist": "•", "dropped out": "·", "screened out": " "}
_ASCII = str.maketrans(f"{SHADES}·✓✗•◂●○→", "1234.+xo<*o>")


def print_search(result: SearchResult, console: Console | None = None) -> None:
    """Print the report, on standard output by default; with digits for shades where a terminal has no Unicode."""
    console = console or Console()
    if console.options.ascii_only:
        text = plain(result, console.width).translate(_ASCII)
        console.print(Text(text.encode("ascii", "replace").decode("ascii")), end="")
    else:
        console.print(Group(*render(result, console.width)))


def plain(result: SearchResult, width: int = 120) -> str:
    """The report as plain text."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(Group(*render(result, width)))
    return text.getvalue()


def render(result: SearchResult, width: int = 80) -> list[RenderableType]:
    """The whole report as Rich renderables for a terminal of ``width`` columns; they fit from 80 on."""
    wide = width >= report.WIDE
    sections: list[list[RenderableType]] = [
        _verdict(result),
        _confirmed(result, width),
        _constraints(result, wide),
        _strategies(result, wide),
        _race(result, wide),
        _trades(result.trades, GainText.of(result)),
        *_maps(result),
        _time(result.phases, result.sets),
        [Text(f"! {warning}", style="yellow") for warning in result.warnings],
    ]
    parts: list[RenderableType] = []
    for section in sections:
        if section:
            parts += [*([Text()] if parts else []), *section]
    return parts


# ---- what is claimed -------------------------------------------------------------------------------------------------


def _verdict(result: SearchResult) -> list[RenderableType]:
    if result.plan is not None:
        of = "" if result.needed_base is None else f" on the difference to the base {result.base}"
        verdict = Text.assemble((f"use {brief(result.plan)}{of}", "bold green"), f": {result.reason}")
    else:
        verdict = Text.assemble(("keep the original", "bold yellow"), f": {result.reason}")
    count = len(result.warnings)
    if count:
        verdict.append(f"  ({count} warning{'s' * (count > 1)} below)", style="yellow")
    return [verdict, *map(_dim, _about(result.found))]


def _about(found: LaserPlan | None) -> list[str]:
    """What a reader may not see in the text of the found plan."""
    if found is None:
        return []
    told = []
    if words := in_words(found):
        told.append(f"what the plan does: {words}")
    if brief(found) != str(found):
        size = f", of {len(found):,} reductions," if len(found) > 1 else ""
        told.append(f"the whole plan{size} is `found` in the JSON file")
    if found.needs_directions:
        told.append("what it keeps is not in the weights: wherever a plan is asked for give `recipe`, in the JSON file")
    return told


def _confirmed(result: SearchResult, width: int) -> list[RenderableType]:
    confirmed = result.confirmed
    if confirmed is None:
        why = "no plan came out of the race" if result.found is None else f"{brief(result.found)} was not run on it"
        return [_heading("not confirmed", f"{why}; nothing has seen the confirm set")]
    parts: list[RenderableType] = []
    for name, arm in confirmed.arms.items():
        count = result.sets.get("confirm") or max((row.n for row in arm.rows), default=0)
        parts.append(
            Text.assemble(
                ("confirmed", "bold"),
                f" on {count:,} example{'s' * (count != 1)} that no earlier step has seen: original against ",
                (brief(arm.plan), "bold cyan"),
            )
        )
        parts += report.comparison(confirmed, name, width)
    return [*parts, *map(_dim, report.footnotes(confirmed))]


def _constraints(result: SearchResult, wide: bool) -> list[RenderableType]:
    if not result.judgements:
        return []
    count = result.sets.get("guard")
    on = f"on {count:,} guard examples" if count else "on the guard set"
    return [_heading("constraints", on), *judgement_table(result.judgements, wide)]


# ---- how it was found ------------------------------------------------------------------------------------------------


def _strategies(result: SearchResult, wide: bool) -> list[RenderableType]:
    if not with_strategy(result):
        return []
    gain, found = GainText.of(result), by_strategy(result)
    titles = ("strategy", "proposed", "raced", "best of these", f"gain [95 %]\n{gain.unit}")
    right = [title for title in titles if title not in ("strategy", "best of these")]
    table = _table(*titles, right=right, gap=2 if wide else 1)
    gains = _estimates([of.gain for of in found], gain.scale, +1, gain.decimals)
    for of, cell in zip(found, gains, strict=True):
        best = Text("-", style="dim") if of.best is None else _plan(brief(of.best.plan))
        table.add_row(_named(of.name), f"{of.proposed:,}", f"{of.raced:,}", best, cell)
    notes = map(_dim, not_raced(result))
    return [_heading("strategies", "who proposed what, and how it did in the race"), table, *notes]


def _named(strategy: str) -> Text:
    return Text(clipped(strategy, _LONGEST_NAME))  # one of a user's own may be of any length


def _race(result: SearchResult, wide: bool) -> list[RenderableType]:
    run = [candidate for candidate in result.candidates if candidate.examples or candidate.gain or candidate.loss]
    if not run:
        return [_heading("race", f"none of {len(result.candidates):,} candidates was run")]
    gain, place, steps = GainText.of(result), ranks(result.candidates), bases(result.candidates)
    run.sort(key=merit)
    best = run[:_TOP]
    columns: list[tuple[str, list[Text]]] = [
        ("", [Text(_MARKS[c.status], style="bold green" if c.status == "chosen" else "dim") for c in best]),
        ("plan", list(map(_plan, told_apart([c.plan for c in best])))),
    ]
    several = with_strategy(result)
    in_full = wide or not several  # 80 columns have no room for who proposed it and for all numbers
    if several:
        columns.append(("strategy", [_named(c.strategy) for c in best]))
    if len(steps) > 1:
        columns.append(("step", [Text(str(steps.index(c.base) + 1)) for c in best]))
    if in_full and any(finite(c.score) is not None for c in best):
        scores = [finite(c.score) for c in best]
        columns.append(("rank", [Text(f"{place[id(c)]:,}" if id(c) in place else "-") for c in best]))
        columns.append(("screen", [Text(cell) for cell in aligned(scores)]))
    columns.append(("n", [Text(f"{c.examples:,}") for c in best]))
    columns.append((f"gain [95 %]\n{gain.unit}", _estimates([c.gain for c in best], gain.scale, +1, gain.decimals)))
    if any(c.loss for c in best):
        losses = _estimates([c.loss for c in best], 1, -1, intervals=in_full)
        columns.append((f"loss change{' [95 %]' * in_full}\n{change_unit(result)}", losses))
    if wide and not several:
        columns.append(("outcome", [Text(f"{c.status}{': ' * bool(c.reason)}{c.reason}", style="dim") for c in best]))
    left = ("", "plan", "strategy", "outcome")
    table = _table(
        *(title for title, _ in columns),
        right=[title for title, _ in columns if title not in left],
        gap=2 if wide else 1,
    )
    for i in range(len(best)):
        table.add_row(*(cells[i] for _, cells in columns))
    counts = {status: sum(c.status == status for c in run) for status in REACHED}
    told = ", ".join(f"{_plural(n, status)}" for status, n in counts.items() if n and status != "screened out")
    heading = _heading("race", f"{len(run):,} of {len(result.candidates):,} candidates run: {told}")
    parts: list[RenderableType] = [heading, table, *([_dim(result.race)] if result.race else [])]
    if not wide or several:
        parts += _reasons(best)
    parts += [
        _dim(f"step {number} adds to {brief(base)} and is compared with it")
        for number, base in enumerate(steps, 1)
        if base
    ]
    return [*parts, *map(_dim, _race_legend(result, gain, run, [title for title, _ in columns]))]


def leaders(candidates: Sequence[Candidate], keys: Sequence[str], loss: str | None) -> RenderableType:
    """The best of a race that is running, the best first; raced by the metrics ``keys`` and by ``loss``."""
    best = candidates[:_LEADERS]
    gain = GainText(keys)
    titles = ("best so far", "n", f"gain [95 %]\n{gain.unit}", f"{loss} change [95 %]")
    cells = [
        list(map(_plan, told_apart([candidate.plan for candidate in best]))),
        [Text(f"{candidate.examples:,}") for candidate in best],
        _estimates([candidate.gain for candidate in best], gain.scale, +1, gain.decimals),
        *([_estimates([candidate.loss for candidate in best], 1, -1)] if loss else []),
    ]
    table = _table(*titles[: len(cells)], right=titles[1:])
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def _reasons(best: Iterable[Candidate]) -> list[RenderableType]:
    """One paragraph per status, and in it each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for candidate in best:
        if candidate.reason:
            reasons.setdefault(candidate.status, {}).setdefault(candidate.reason, []).append(brief(candidate.plan))
    told = {status: [f"{', '.join(who)}: {why}" for why, who in by.items()] for status, by in reasons.items()}
    return [report.indent(_dim(f"{_MARKS[status]} {'; '.join(lines)}")) for status, lines in told.items()]


def _race_legend(result: SearchResult, gain: GainText, run: Sequence[Candidate], titles: list[str]) -> list[str]:
    marks = "" if "outcome" in titles else "✓ chosen  ✗ rejected  • finalist  · dropped out"
    more = f"{len(run) - _TOP:,} more are in the JSON file" if len(run) > _TOP else ""
    legend = [f"gain: {gain.told} on n race examples, + is better"]
    shown = [(brief(candidate.plan), str(candidate.plan)) for candidate in run[:_TOP]]
    if any("places(" in short for short, _ in shown):
        legend.append("places(9): nine single directions of a matrix")
    if any(short != whole for short, whole in shown):
        legend.append("plans in full are in the JSON file")
    if "screen" in titles:
        legend.append(f"screen: {score_name(result)}, and its rank among all candidates of the step")
    return [*filter(None, ["; ".join(filter(None, [marks, more]))]), "; ".join(legend)]


def _trades(trades: Sequence[Trade], gain: GainText) -> list[RenderableType]:
    trades = [trade for trade in trades if trade.fluency is not None]
    if not trades:
        return []
    # What one would choose from comes before what only has more gain.
    first = sorted(trades, key=lambda trade: (not trade.chosen, not trade.efficient, *trade_order(trade)))
    shown = sorted(first[:_TOP], key=trade_order)
    diverged = kl_texts(shown)
    numbers = [f"gain\n{gain.unit}", "perplexity\n% change"]
    numbers += ["kl\nnats/token"] if any(cell != "-" for cell in diverged) else []
    table = _table("", "plan", *numbers, "", right=numbers)
    gains = aligned([gain.scale * trade.gain for trade in shown], gain.decimals)
    fluency = aligned([None if trade.fluency is None else 100 * trade.fluency for trade in shown], 1)
    plans = told_apart([trade.plan for trade in shown])
    for trade, plan, *cells in zip(shown, plans, gains, fluency, diverged, strict=True):
        mark = Text("●" if trade.efficient else "○", style="green" if trade.efficient else "dim")
        table.add_row(mark, _plan(plan), *cells[: len(numbers)], "→ confirm" * trade.chosen)
    legend = f"● {unbeaten_text(trades)}; → confirm: went to confirmation"
    more = f"; {len(trades) - _TOP:,} more are in the JSON file" if len(trades) > _TOP else ""
    return [_heading("gain against fluency", "finalists on race examples"), table, _dim(legend + more)]


def _maps(result: SearchResult) -> list[list[RenderableType]]:
    first = [candidate for candidate in result.candidates if not candidate.base]
    screen = heat_map(first, lambda c: c.score, change_unit(result))
    race = heat_map(first, lambda c: c.loss.delta if c.loss else None, change_unit(result))
    if (screen or race) and (others := off_the_map(result)):
        where = "in the map" if not (screen and race) else "in the maps"
        (race or screen).append(
            _dim(f"{len(others):,} of {len(first):,} candidates have no place {where}: {OFF_THE_MAP}")
        )
    return [
        [_heading("map of the screen", score_name(result)), *screen] if screen else [],
        [_heading("map of the race", "measured change of the loss; empty where nothing was run"), *race]
        if race
        else [],
    ]


def _time(phases: Sequence[Phase], sets: dict[str, int]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if phases:
        numbers = ("time", "passes", "whole passes")
        table = _table("phase", *numbers, right=numbers)
        total = Phase(
            "total",
            sum(phase.seconds for phase in phases),
            sum(phase.passes for phase in phases),
            sum(phase.whole_passes for phase in phases),
        )
        for phase in [*phases, *([total] if len(phases) > 1 else [])]:
            style = "bold" if phase is total else ""
            cells = (seconds_text(phase.seconds), f"{phase.passes:,}", f"{phase.whole_passes:,.0f}")
            table.add_row(Text(phase.name), *map(Text, cells), style=style)
        legend = "passes: examples times arms; whole passes: each counted by the share of the layers that was computed"
        parts += [_heading("time", ""), table, _dim(legend)]
    if sets:
        parts.append(_dim(f"examples: {', '.join(f'{name} {count:,}' for name, count in sets.items())}"))
    return parts


# ---- cells -----------------------------------------------------------------------------------------------------------


def _heading(title: str, rest: str) -> Text:
    return Text.assemble((title, "bold"), f": {rest}" if rest else "")


def _plan(short: str) -> Text:
    return Text(short, style="cyan", overflow="fold")


def _dim(text: str) -> Text:
    return Text(text, style="dim")


def _plural(count: int, status: str) -> str:
    return f"{count:,} {status}{'s' * (status == 'finalist' and count != 1)}"


def _table(*titles: str, right: Iterable[str], gap: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for title in titles:
        fold = title in ("plan", "outcome", "best so far", "best of these")
        head, _, unit = title.partition("\n")
        table.add_column(
            Text.assemble(head, (f"\n{unit}" if unit else "", "dim not bold")),
            justify="right" if title in right else "left",
            no_wrap=not fold,
            overflow="fold",
        )
    return table


def _estimates(
    estimates: Sequence[Estimate | None], scale: float, better: int, decimals: int | None = None, intervals: bool = True
) -> list[Text]:
    """``+5.0 [+1.2, +8.8]``, each of the three numbers right-aligned over all rows; green where the
    interval lies on the ``better`` side of 0, red on the other; without ``intervals`` the first number alone.
    """
    ends = [(None, None, None) if e is None else (e.delta, e.lower, e.upper) for e in estimates]
    scaled = [None if value is None else scale * value for row in ends for value in row]
    texts = aligned(scaled, decimals)
    widths = [max(map(len, texts[i::3]), default=0) for i in range(3)]
    cells = []
    for i, (_, lower, upper) in enumerate(ends):
        delta, low, high = (text.rjust(width) for text, width in zip(texts[3 * i : 3 * i + 3], widths, strict=True))
        cell = Text(delta)
        if lower is not None and upper is not None and math.isfinite(lower) and math.isfinite(upper):
            sign = 1 if lower > 0 else -1 if upper < 0 else 0
            cell.stylize({1: "green", -1: "red"}.get(sign * better, ""))
            cell.append(f" [{low}, {high}]" * intervals, style="dim")
        elif intervals and any(finite(row[1]) is not None for row in ends):
            cell.append(" " * (widths[1] + widths[2] + 5))  # keeps the column of deltas straight
        cells.append(cell)
    return cells
