"""Show what gates said, in the terminal: one table of judgements, the log of a rollout, and a cleanup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.plans.short import brief
from laser_callback.plans.words import in_words
from laser_callback.reports.row_text import change_text, percent, value_text
from laser_callback.reports.search_text import (
    CONTENDERS_LEGEND,
    GainText,
    contender_kind,
    contender_name,
    four_parts_text,
)
from laser_callback.reports.terminal import WIDE, indent, show
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.other_tasks import OtherTask, four_parts
from laser_callback.results.rollout import RolloutResult
from laser_callback.stats.judgement import Judgement

_VERDICTS = {"pass": "bold green", "fail": "bold red", "undecided": "yellow"}
_LEGEND = "95 % bound: on the unfavourable side, one-sided; a bound on a metric passes if it keeps it"
_GAIN_LEGEND = "of a gain the end of the 95 % interval, and p decides"


def judgement_table(judgements: Sequence[Judgement], wide: bool) -> list[RenderableType]:
    """A row per gate; notes in a column of their own where there is room, else below."""
    gains = any(judgement.p is not None for judgement in judgements)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("gate", overflow="fold")
    for column in ("change", "95 % bound", *["p"] * gains, "n"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if wide:
        table.add_column("note", overflow="fold")
    notes: dict[str, list[str]] = {}
    for judgement in judgements:
        p = "" if judgement.p is None else f"{judgement.p:.2g}"
        table.add_row(
            Text(judgement.gate, overflow="fold"),
            Text(judgement.amount(judgement.change)),
            Text(judgement.amount(judgement.bound)),
            *[p] * gains,
            Text(judgement.counted),
            Text(judgement.verdict, style=_VERDICTS[judgement.verdict]),
            *[Text(judgement.note, style="dim")] * wide,
        )
        if judgement.note and not wide:
            notes.setdefault(judgement.note, []).append(judgement.gate)
    lines = [indent(Text(f"{', '.join(gates)}: {note}", style="dim")) for note, gates in notes.items()]
    return [table, *lines, Text(f"{_LEGEND}{f'; {_GAIN_LEGEND}' * gains}", style="dim")]


_OUTCOMES = {"kept": "bold green", "went on": "green", "went back": "bold yellow"}


def print_rollout(result: RolloutResult, console: Console | None = None) -> None:
    """Print the verdict, and the stages with what the gates said, on standard output by default."""
    console = console or Console()
    parts: list[RenderableType] = [Text(result.verdict, style="bold green" if result.complete else "bold yellow")]
    for number, stage in enumerate(result.stages, 1):
        parts += [
            Text(),
            Text.assemble(
                (f"stage {number} of {len(result.declared)}: ", "bold"),
                (brief(stage.verdict.plan), "bold cyan"),
                ", ",
                (stage.outcome, _OUTCOMES[stage.outcome]),
                f"  ({stage.seconds:.0f} s)",
            ),
            *judgement_table(stage.verdict.judgements, console.width >= WIDE),
        ]
    console.print(Group(*parts))


def print_cleanup(result: CleanupResult, console: Console | None = None) -> None:
    """Print the verdict, and what was held against what, where :func:`~laser_callback.reports.show` does."""
    classes = any(row.said_most is not None for row in result.contenders)
    share = classes or GainText(result.search.objective).scale == 100
    columns = ["race", "n", "confirm", *["says most", "balanced"] * classes]
    table = Table("", "what", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.contenders:
        told = [_number(row.said_most, True), _number(row.balanced, True)] * classes
        style = "bold" if row.confirmed else ""
        table.add_row(
            contender_kind(row),
            Text(contender_name(row), overflow="fold"),
            _number(row.gain, share, "+"),
            f"{row.examples:,}" if row.gain is not None else "",
            _number(row.value, share) + ("" if row.confirmed or row.kind == "as trained" else "*"),
            *told,
            style=style,
        )
    words = "" if result.plan is None else in_words(result.plan)
    parts: list[RenderableType] = [
        Text(result.verdict, style="bold green" if result.checkpoint else "bold yellow"),
        *[Text(f"what the plan does: {words}", style="dim")] * bool(words),
        Text(),
        table,
        Text(CONTENDERS_LEGEND, style="dim"),
        Text("* exploratory: nothing is claimed of it, nothing was chosen by it; bold: confirmed", style="dim"),
    ]
    if result.others:
        parts += [Text(), *_other_tasks(result.others)]
    lines = [*result.notes, f"searched: {result.source}"]
    lines += [] if result.report is None else [f"report: {result.report}"]
    if result.checkpoint is not None:
        lines.append(f"{'another epoch' if result.plan is None else 'cleaned'}: {result.checkpoint}")
    show(Group(*parts, Text(), *(Text(line, style="dim") for line in lines)), console=console)


def _number(value: float | None, share: bool, sign: str = "") -> str:
    return "" if value is None else percent(value, sign) if share else f"{value:{sign}.4g}"


def _other_tasks(tasks: Sequence[OtherTask]) -> list[RenderableType]:
    """A row per task, and the four parts of what was done to them."""
    columns = ("task", "base", "fine-tuned", "cleaned", "cleaned - fine-tuned, 95 %", "by fine-tuning")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for task in tasks:
        row, cells = task.cleaning, ["", ""]
        if row is not None:
            cells = [value_text(row, row.reduced), change_text(row)]
        before, tuned = (value_text(task.tuning, value) for value in (task.tuning.original, task.tuning.reduced))
        table.add_row(Text(task.name), before, tuned, *cells, task.effect)
    return [table, Text(four_parts_text(four_parts(tasks)), style="bold")]
