"""Show a result in the terminal: one table per plan, the prior checks and controls below it."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from laser_callback.plans.short import brief
from laser_callback.reports.row_text import (
    NO_INTERVAL,
    ahead_text,
    change_text,
    control_text,
    delta_text,
    end_of,
    finding,
    heads,
    in_names,
    interval_text,
    is_adjusted,
    noise_text,
    p_text,
    percent,
    prior_text,
    shown_priors,
    value_text,
    verdict,
    without_variance,
)
from laser_callback.reports.svg import printable
from laser_callback.results.ab_test import ABResult
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.flips import Parted, claim_row, flip_metric, flips, parted
from laser_callback.stats.outcomes import PairedResult
from laser_callback.stats.priors import PriorChecks
from laser_callback.stats.unpaired import UnpairedResult
from laser_callback.support.files import write_atomically

_STYLES = {
    "better": "bold green",
    "in doubt": "bold yellow",
    "worse": "bold red",
    "higher": "yellow",
    "lower": "yellow",
}
_SHORT = {"no difference shown": "not shown", "not tested": "untested"}  # in 80 columns
WIDE = 116
"""From this many columns on, tables have their wide form."""
_AROUND = 120  # characters on each side of where two texts part


def print_report(result: LaserResult, console: Console | None = None) -> None:
    """Print the report, by default where :func:`show` does."""
    console = console or get_console()
    show(render(result, console.width), console=console)


def show(*parts: RenderableType, console: Console | None = None) -> None:
    """Print above any progress bar of Lightning's that is live, so that neither garbles the other.

    Args:
        parts: each begins a line.
        console: Rich's own by default. ``RichProgressBar`` is live on it: any other writes into the bar.
    """
    bars = sys.modules.get("lightning.pytorch.callbacks.progress.tqdm_progress")  # else there is none
    with nullcontext() if bars is None else bars.Tqdm.external_write_mode():
        (console or get_console()).print(*parts, sep="\n")


def plain(result: LaserResult, width: int = 120) -> str:
    """The report as plain text."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(render(result, width))
    return text.getvalue()


def save_picture(result: LaserResult, path: str | Path, width: int = 116) -> None:
    """Write the report as an SVG picture of a terminal."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(result, width))
    write_atomically(Path(path), console.export_svg(title="laser-callback"))


def render(result: LaserResult, width: int) -> RenderableType:
    """The whole report as one Rich renderable for a terminal of ``width`` columns; it fits from 80 on."""
    parts: list[RenderableType] = [*verdicts(result), Text()]
    for name in result.arms:
        parts += [_title(result, name), *comparison(result, name, width), Text()]
    parts += [Text(line, style="dim") for line in [*footnotes(result), *_timing(result)]]
    return Group(*parts)


def verdicts(result: LaserResult) -> list[RenderableType]:
    """A sentence for each plan."""
    told: list[RenderableType] = []
    for name in result.arms:
        row = claim_row(result, name)
        told.append(Text(verdict(result, name), style=_STYLES.get(row.verdict, "bold") if row else "bold"))
    return told


def comparison(result: LaserResult, name: str, width: int) -> list[RenderableType]:
    """The plan ``name`` against the original: its table, and notes, prior checks and controls below it."""
    arm = result[name]
    table = _table(arm, result, wide=width >= WIDE)
    return [table, *_lines(arm, result, name), *_side_by_side(result, name)]


def _side_by_side(result: LaserResult, name: str) -> list[RenderableType]:
    """The first examples fixed and broken whose answers were written, with a mark where the models part."""
    row = flip_metric(result, name)
    found = [] if row is None else [flip for flip in flips(result.examples.to_rows(), name, row) if flip.written_before]
    found = [next(group) for _, group in groupby(found, key=lambda flip: flip.fixed)]
    if row is None or not found:
        return []
    told = Text(f"{row.metric}: {row.fixed:,} fixed, {row.broken:,} broken; the first of each")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline", expand=True)
    for column, ratio in (("", None), *((f"{who} wrote", 1) for who in heads(result.names))):
        table.add_column(column, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for flip in found:
        one, other = parted(flip.written_before, flip.written_after)
        question = end_of(flip.prompt, 2 * _AROUND)
        style = _STYLES["better" if flip.fixed else "worse"]
        asked = [Text(_in_line(question), style="dim"), Text(f"right: {_in_line(flip.answer)}", style="dim")]
        table.add_row(Text(flip.outcome, style=style), *(asked if flip.prompt or flip.answer else ("", "")))
        table.add_row(Text(flip.id, style=style), _window(one), _window(other))
    return [indent(told), indent(table)]


def _window(text: Parted) -> Text:
    """A few lines around the place where a text parts from the other, which is marked."""
    same = f"...{text.same[-_AROUND:]}" if len(text.same) > _AROUND else text.same
    rest = f"{text.rest[:_AROUND]}..." if len(text.rest) > _AROUND else text.rest
    return Text.assemble(
        _in_line(same), (_in_line(text.other) if text.other.strip() else "(end)", "reverse"), _in_line(rest)
    )


def _in_line(text: str) -> str:
    return printable(text.replace("\n", "\u23ce"))


def print_ab(result: ABResult, console: Console | None = None) -> None:
    """Print the table of an A/B test, on standard output by default; it fits from 80 columns on."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("metric", overflow="fold")
    for column in ("orig.", "red.", "delta [95 % interval]", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            Text(f"{row.metric}*" if row.role == "primary" else row.metric),
            value_text(row, row.original),
            value_text(row, row.reduced),
            Text(change_text(row), style=_STYLES.get(row.verdict, "")),
            p_text(row),
            f"{row.n_original}/{row.n_reduced}",
        )
    counts = " and ".join(f"{count:,} by the {arm}" for arm, count in result.examples.items())
    title = Text.assemble("A/B, original against reduced, ", (brief(result.plan), "bold cyan"), f": {counts}")
    clustered = any(row.test == "cluster-robust t" for row in result.rows)
    tests = "Fisher's exact, Welch's or cluster-robust" if clustered else "Fisher's exact or Welch's"
    legend = f"n: of the original/reduced model; p: {tests} test"
    if is_adjusted(result.rows):
        legend += ", Holm-adjusted" + " but for the metric with the star" * any(
            r.role == "primary" for r in result.rows
        )
    rows = sorted(result.rows, key=lambda row: row.role != "primary")
    told = [Text(_ab_finding(row), style=_STYLES.get(row.verdict, "bold")) for row in rows if row.p is not None][:1]
    show(*told, title, table, Text(f"{legend}; intervals are not adjusted", style="dim"), console=console)


def _ab_finding(row: UnpairedResult) -> str:
    """What an A/B test shows, in which no example has two answers to compare."""
    text = finding(row)
    unchecked = row.verdict == "better" and row.higher_is_better
    return f"{text}; not checked for a mere shift of what is said" if unchecked else text


def footnotes(result: LaserResult) -> list[str]:
    """What a reader of the tables must know: which p carries the claim, and what was left out."""
    lines = [_legend(result)]
    if any(map(without_variance, _shown_rows(result))):
        lines.append(NO_INTERVAL)
    if result.is_one_look_of_several:
        lines.append(
            "exploratory: each validation of `fit` is another look, and p is not corrected for their number; what is "
            "to be claimed is compared once, in `trainer.validate()` or `test()`"
        )
    if result.not_compared:
        listed = "; ".join(f"{key} ({reason})" for key, reason in result.not_compared.items())
        lines.append(f"not compared: {listed}")
    if result.examples.duplicates:
        lines.append(f"{result.examples.duplicates} duplicates of the distributed sampler removed")
    return lines


def _shown_rows(result: LaserResult) -> Iterator[PairedResult]:
    """The rows of whose changes the tables and the lines below them tell."""
    for arm in (*result.arms.values(), *(arm for of in result.controls.values() for arm in of.values())):
        yield from (*arm.rows, *arm.ahead)
        yield from (rest for checks in arm.prior_checks.values() if (rest := checks.majority_excluded) is not None)


def _title(result: LaserResult, name: str) -> Text:
    arm, of = result[name], f"{name}: " if name != "laser" else ""
    if result.is_of_runs:
        return Text.assemble(f"{result.names[0]} against ", (result.names[1], "bold cyan"))
    return Text.assemble(f"{of}original against reduced, ", (brief(arm.plan), "bold cyan"))


def _table(arm: ArmResult, result: LaserResult, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold underline")
    primary = result.primary
    short = heads(result.names, 9) if result.is_of_runs else ("orig.", "red.")
    wide_columns = (*heads(result.names), "delta", "95 % interval", "fixed/broken", "p", "n")
    table.add_column("metric", overflow="fold")  # long names go on in the next line, never into an ellipsis
    for column in wide_columns if wide else (*short, "delta [95 % interval]", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in arm.rows:
        is_primary = row.metric == primary
        name = Text(f"{row.metric}*" if is_primary else row.metric, style="bold" if is_primary else "")
        claim = Text(
            row.verdict if wide else _SHORT.get(row.verdict, row.verdict), style=_STYLES.get(row.verdict, "dim")
        )
        if wide:
            flips = "" if row.fixed is None else f"{row.fixed}/{row.broken}"
            cells = [delta_text(row, row.delta), interval_text(row), flips]
        else:
            cells = [change_text(row)]
        table.add_row(
            name, value_text(row, row.original), value_text(row, row.reduced), *cells, p_text(row), str(row.n), claim
        )
    return table


def _legend(result: LaserResult) -> str:
    if result.is_one_look_of_several:
        return "neither p nor the intervals are adjusted; delta = reduced - original"
    delta = f"delta = {result.names[1]} - {result.names[0]}"
    others = [row for arm in result.arms.values() for row in arm.rows if row.metric != result.primary]
    told = [f"p{' of the others' * (result.primary is not None)} is Holm-adjusted, the intervals are not"]
    told = [*told * is_adjusted(others), delta]
    if result.primary is not None:
        several = " (Holm-adjusted over the plans)" if len(result.arms) > 1 else ""
        declared = "" if result.is_of_runs else "was declared beforehand and "  # a log does not say when
        told.insert(0, f"* {result.primary} {declared}carries the claim{several}")
    return "; ".join(told)


def _lines(arm: ArmResult, result: LaserResult, name: str) -> list[RenderableType]:
    metric = result.primary or _first_tested(arm)
    notes: dict[str, list[str]] = {}
    for row in arm.rows:
        if row.note:
            notes.setdefault(in_names(row.note, result.names), []).append(row.metric)
    lines: list[RenderableType] = [
        indent(Text(f"{', '.join(metrics)}: {note}", style="dim")) for note, metrics in notes.items()
    ]
    shown = shown_priors(arm, metric)
    for checks in shown:
        lines += _prior_lines(arm[checks.metric], checks, result.names)
    lines += _doubts(arm, {checks.metric for checks in shown}, result.names)
    if noise := noise_text(result, name):
        lines.append(indent(Text(noise)))
    for kind, control in result.controls.get(name, {}).items():
        of = "" if control.passes else f" ({brief(control.plan)})"
        for row in (row for row in control.rows if row.metric == metric):
            told = f"{row.metric} {value_text(row, row.reduced)}, delta {change_text(row)}"
            if kind == "noise" and (ahead := control.ahead_in(metric)) is not None:  # what the others leave open
                told += f"; {ahead_text(ahead)}: {change_text(ahead)}"
            lines.append(indent(Text(f"control, {control_text(kind, control)}{of}: {told}")))
    return lines


def _doubts(arm: ArmResult, told: Collection[str], names: tuple[str, str]) -> list[RenderableType]:
    """Why gains are in doubt whose prior check is not shown."""
    doubts: dict[str, list[str]] = {}
    for row in arm.rows:
        if row.doubt and row.verdict in ("in doubt", "higher", "lower") and row.metric not in told:
            doubts.setdefault(in_names(row.doubt, names), []).append(row.metric)
    return [indent(Text(f"in doubt, {', '.join(metrics)}: {why}")) for why, metrics in doubts.items()]


def _prior_lines(row: PairedResult, checks: PriorChecks, names: tuple[str, str]) -> list[RenderableType]:
    flag = Text(f"prior check of {checks.metric}: ")
    flag.append(prior_text(row, checks, names), style=_STYLES.get(row.verdict, ""))
    parts = [
        f"best constant answer per group {percent(checks.constant_answer)}",
        f"{in_names('the reduced model', names)} says the right answer {percent(checks.matched)}, its answers "
        f"exchanged at random {percent(checks.chance)}",
    ]
    parts += [
        f"the changes go by {name}: the examples are worth {worth:.0f} independent ones for a claim about other {name}s"
        for name, worth in checks.worth_less.items()
    ]
    rest, macro = checks.majority_excluded, checks.macro
    if rest is not None:
        interval = f" [{interval_text(rest)}], n = {rest.n}"
        parts.append(f"{checks.where} {percent(rest.original)} to {percent(rest.reduced)}{interval}")
    if macro is not None:
        parts.append(f"macro over {macro.answers} answers {percent(macro.original)} to {percent(macro.reduced)}")
    for arm, top in checks.top_predictions.items():
        said = ", ".join(f"{quoted(text)} {count}" for text, count in top)
        parts.append(f"{in_names(arm, names)} says most: {said}  (entropy {checks.entropy[arm]:.2f} nats)")
    return [indent(flag), *(indent(Text(part), 4) for part in parts)]


def quoted(answer: str) -> str:
    """An answer in quotes, since it may be a quotation mark; without outer spaces, if they are not all there is."""
    return repr(answer.strip() or answer)


def indent(text: RenderableType, columns: int = 2) -> Padding:
    """A paragraph or table set in by ``columns``."""
    return Padding(text, (0, 0, 0, columns))


def _timing(result: LaserResult) -> list[str]:
    if result.is_of_runs:
        return []
    lines = [f"passes of the original: {result.original_seconds:.1f} s"]
    for name, arm in result.arms.items():
        times = f"{arm.seconds:.1f} s, and {arm.factorise_seconds:.2f} s to factorise"
        lines.append(f"passes of {'the reduced model' if name == 'laser' else name}: {times}; {arm.replay}")
    return lines


def _first_tested(arm: ArmResult) -> str | None:
    return next((row.metric for row in arm.rows if row.test != "not tested"), None)
