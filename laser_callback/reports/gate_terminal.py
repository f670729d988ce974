"""Show what gates said, in the terminal: one table of judgements, the log of a rollout, and a cleanup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.plans.short import brief
from laser_callback.reports.terminal import WIDE, indent, show
from laser_callback.results.cleanup import CleanupResult
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
            judgement.amount(judgement.change),
            judgement.amount(judgement.bound),
            *[p] * gains,
            f"{judgement.n:,}",
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
    """Print the verdict, and what each mode found, where :func:`~laser_callback.reports.show` does."""
    table = Table("mode", "plan", "as trained", "cut", "95 % interval", "p after Holm", "accepted")
    for mode, search in result.searches.items():
        row = result.row(mode)
        numbers = ["-"] * 4
        if row is not None:
            ends = "-" if row.lower is None or row.upper is None else f"{row.lower:+.4g} .. {row.upper:+.4g}"
            numbers = [f"{row.original:.4g}", f"{row.reduced:.4g}", ends, f"{result.p_adjusted[mode]:.2g}"]
        table.add_row(
            Text(mode),
            Text("-" if search.found is None else brief(search.found)),
            *numbers,
            "yes" if mode == result.mode else "no",
        )
    lines = [f"cleaned: {result.source}", f"report: {result.report}"]
    lines += [] if result.checkpoint is None else [f"checkpoint: {result.checkpoint}"]
    style = "bold green" if result.mode else "bold yellow"
    parts: list[RenderableType] = [
        Text(result.verdict, style=style),
        table,
        *(Text(line, style="dim") for line in lines),
    ]
    show(Group(*parts), console=console)
