"""The tables of a page: cells by the heads of their columns, text still unescaped unless it is Markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from markupsafe import Markup

from laser_callback.plans.short import brief
from laser_callback.reports.drawing import visible
from laser_callback.reports.row_text import (
    ahead_text,
    control_text,
    delta_text,
    end_of,
    heads,
    interval_text,
    p_text,
    value_text,
)
from laser_callback.reports.search_text import seconds_text
from laser_callback.reports.svg import printable
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import Flip, Parted, Row, claim_row, flip_metrics, flips, parted
from laser_callback.stats.judgement import Judgement
from laser_callback.stats.outcomes import PairedResult

if TYPE_CHECKING:
    from laser_callback.results.search import Phase  # which needs torch

Columns: TypeAlias = dict[str, list[Any]]

FOR_TEMPLATES = (
    "change",
    "comparison_columns",
    "constraint_columns",
    "control_columns",
    "flip_tables",
    "phase_columns",
)
EXAMPLES = 1000
"""At most so many examples fixed and broken are listed."""
REWRITTEN = 100
"""At most so many that are as right as before are listed beside them."""
PROMPT = 200
"""So much of a prompt is shown, from its end; the rest unfolds."""
_STYLES = dict.fromkeys(("better", "pass", "fixed"), "better") | dict.fromkeys(("worse", "fail", "broken"), "worse")


def foreign(text: str) -> Markup:
    """Text of somebody else, in whatever direction it is written, without effect on its surroundings."""
    return Markup("<bdi>{}</bdi>").format(printable(text))


def code(text: str) -> Markup:
    """A plan's short form, or the name of a matrix."""
    return Markup("<code>{}</code>").format(printable(text))


def in_short(plan: object, short: str | None = None) -> Markup:
    """A plan in its short form, or as it is told apart from others, which unfolds to all of it."""
    short = brief(plan) if short is None else short
    if short == str(plan):
        return code(short)
    whole = printable(plan).replace(", ", ",\n")
    return Markup('<details class="plan"><summary>{}</summary><pre tabindex="0">{}</pre></details>').format(
        code(short), whole
    )


def verdict(text: str) -> Markup:
    """A verdict in its colour."""
    return Markup('<span class="{}">{}</span>').format(_STYLES.get(text, "unsure"), text)


def with_interval(number: str, interval: str) -> Markup:
    """A number with its interval, if it has one."""
    pale = Markup('<span class="interval"> [{}]</span>').format(interval) if interval else ""
    return Markup("{}{}").format(number, pale)


def change(row: PairedResult) -> Markup:
    """The change of a metric with its interval."""
    return with_interval(delta_text(row, row.delta), interval_text(row))


def comparison_columns(result: LaserResult, name: str) -> Columns:
    """A plan against the original, or a run against another."""
    arm, primary = result[name], result.primary
    original, reduced = heads(result.names)
    names = [Markup(",<wbr>").join(map(foreign, row.metric.split(","))) for row in arm.rows]  # as lm-eval names filters
    starred = Markup("<strong>{}*</strong>")
    return {
        "metric": [starred.format(n) if r.metric == primary else n for n, r in zip(names, arm.rows, strict=True)],
        original: [value_text(row, row.original) for row in arm.rows],
        reduced: [value_text(row, row.reduced) for row in arm.rows],
        "change [95 % interval]": [change(row) for row in arm.rows],
        "fixed / broken": ["" if row.fixed is None else f"{row.fixed:,} / {row.broken:,}" for row in arm.rows],
        "p": [p_text(row) for row in arm.rows],
        "n": [f"{row.n:,}" for row in arm.rows],
        "verdict": [verdict(row.verdict) for row in arm.rows],
    }


def control_columns(result: LaserResult, name: str) -> Columns:
    """The claim beside that of each control; empty without controls."""
    claim = claim_row(result, name)
    if claim is None:
        return {}
    found = [("this cut", result[name].plan, claim)]
    ahead = [Markup("")]
    for kind, control in result.controls.get(name, {}).items():
        for row in (row for row in control.rows if row.metric == claim.metric):
            found.append((control_text(kind, control), control.plan.partition("; ")[0], row))
            more = control.ahead_in(claim.metric)
            ahead.append(Markup("") if more is None else Markup("{}: {}").format(ahead_text(more), change(more)))
    return (
        {}
        if len(found) == 1
        else {
            "": [label for label, _, _ in found],
            "plan": [in_short(plan) for _, plan, _ in found],
            claim.metric: [value_text(row, row.reduced) for _, _, row in found],
            "change [95 % interval]": [change(row) for _, _, row in found],
            "this cut minus the control": ahead,
        }
    )


def flip_tables(result: LaserResult, name: str, examples: Sequence[Row]) -> list[dict[str, Any]]:
    """The examples fixed and broken, a table with a caption for each task that has some."""
    tables = []
    for row in flip_metrics(result, name, examples):
        if found := flips(examples, name, row, rewritten=True):
            counts = Counter(flip.outcome for flip in found)
            changed = counts["fixed"] + counts["broken"]
            caption = f"By {row.metric}: {counts['fixed']:,} fixed, {counts['broken']:,} broken"
            if alike := len(found) - changed:
                caption += f"; {alike:,} as right as before, but written otherwise"
            shown = [*found[:changed][:EXAMPLES], *found[changed:][:REWRITTEN]]
            columns = _flip_columns(shown, heads(result.names))
            more = len(found) > len(shown)
            tables.append({"caption": caption, "columns": columns, "outcomes": list(counts), "more": more})
    return tables


def _flip_columns(shown: Sequence[Flip], names: tuple[str, str]) -> Columns:
    columns: Columns = {"outcome": [verdict(flip.outcome) for flip in shown]}
    original, reduced = names
    said = {"answer": "right answer", "before": f"{original} said", "after": f"{reduced} said"}
    for field, head in {"prompt": "prompt", **said, "group": "group", "id": "id"}.items():
        texts = [getattr(flip, field) for flip in shown]
        if any(texts):  # what the step has returned for no example is left out
            cell = _said if field in said else _prompt if field == "prompt" else foreign
            columns[head] = list(map(cell, texts))
    if any(flip.written_before or flip.written_after for flip in shown):
        pairs = [parted(flip.written_before, flip.written_after) for flip in shown]
        for side, who in enumerate(names):
            columns[f"{who} wrote"] = [_marked(pair[side]) for pair in pairs]
    return columns


def _said(text: str) -> Markup:
    return foreign(visible(text)) if text else Markup('<span class="unsure">(nothing)</span>')


def _prompt(text: str) -> Markup:
    """A prompt with its lines; of a long one the end, which unfolds to all of it."""
    if len(text) <= PROMPT:
        return Markup('<bdi class="lines">{}</bdi>').format(printable(text))
    fold = '<details class="prompt"><summary><bdi class="lines">{}</bdi></summary><bdi class="lines">{}</bdi></details>'
    return Markup(fold).format(printable(end_of(text, PROMPT)), printable(text))


def _marked(text: Parted) -> Markup:
    """What was written, with a mark on the first word that the other model has not written."""
    mark = Markup("<mark>{}</mark>").format(printable(text.other if text.other.strip() else "(end)"))
    return Markup('<bdi class="lines wrote">{}{}{}</bdi>').format(printable(text.same), mark, printable(text.rest))


def constraint_columns(judgements: Sequence[Judgement]) -> Columns:
    """The gates on the guard set."""
    columns: Columns = {
        "constraint": [foreign(j.gate) for j in judgements],
        "change": [j.amount(j.change) for j in judgements],
        "95 % bound": [j.amount(j.bound) for j in judgements],
        "n": [j.counted for j in judgements],
        "verdict": [verdict(j.verdict) for j in judgements],
    }
    return columns | ({"note": [j.note for j in judgements]} if any(j.note for j in judgements) else {})


def phase_columns(phases: Sequence[Phase]) -> Columns:
    """Where time went."""
    return {
        "phase": [foreign(phase.name) for phase in phases],
        "time": [seconds_text(phase.seconds) for phase in phases],
        "passes": [f"{phase.passes:,}" for phase in phases],
        "whole passes": [f"{phase.whole_passes:,.0f}" for phase in phases],
    }


def flat(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Nested settings as lines."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield key, ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            yield key, ", ".join(map(str, value)) or "none"
        else:
            yield key, "none" if value is None else str(value)
