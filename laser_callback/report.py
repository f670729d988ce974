"""Show a result in the terminal: one table per plan, the prior checks and controls below it."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_callback.comparison import PairedResult
from laser_callback.priors import PriorChecks
from laser_callback.result import ArmResult, LaserResult

_STYLES = {"better": "bold green", "worse": "bold red", "higher": "yellow", "lower": "yellow"}
_SHORT = {"no difference shown": "not shown", "not tested": "untested"}  # in 80 columns
_WIDE = 112
_SHARES = ("accuracy", "robustness", "consistency")


def print_report(result: LaserResult, progress_bar: Any = None, console: Console | None = None) -> None:
    """Print the report.

    Args:
        result: what to show.
        progress_bar: a live Lightning progress bar to print through, so that neither garbles the other.
        console: where to print otherwise; standard output by default.
    """
    console = console or Console()
    if progress_bar is None or not hasattr(progress_bar, "print"):
        console.print(render(result, console.width))
        return
    progress_bar.print(plain(result, console.width))


def plain(result: LaserResult, width: int = 120) -> str:
    """The report as plain text."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(render(result, width))
    return text.getvalue()


def render(result: LaserResult, width: int) -> RenderableType:
    """The whole report as one Rich renderable for a terminal of ``width`` columns; it fits from 80 on."""
    parts: list[RenderableType] = []
    for name, arm in result.arms.items():
        parts += [_title(name, arm), _table(arm, result.primary, wide=width >= _WIDE)]
        parts += _lines(arm, result.controls.get(name, {}), result.primary or _first_tested(arm))
        parts.append(Text())
    parts.append(Text(_legend(result), style="dim"))
    if result.not_compared:
        listed = "; ".join(f"{key} ({reason})" for key, reason in result.not_compared.items())
        parts.append(Text(f"not compared: {listed}", style="dim"))
    if result.examples.duplicates:
        parts.append(Text(f"{result.examples.duplicates} duplicates of the distributed sampler removed", style="dim"))
    parts += [Text(line, style="dim") for line in _timing(result)]
    return Group(*parts)


def _title(name: str, arm: ArmResult) -> Text:
    plan = arm.plan if len(arm.plan) <= 200 else f"{arm.plan[:200]}..."
    return Text.assemble(
        f"{name}: " if name != "laser" else "", ("original against reduced, ", ""), (plan, "bold cyan")
    )


def _table(arm: ArmResult, primary: str | None, wide: bool) -> Table:
    table = (
        Table(box=box.SIMPLE_HEAD, show_edge=False) if wide else Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    )
    wide_columns = ("original", "reduced", "delta", "95 % interval", "fixed/broken", "p", "n")
    table.add_column("metric", no_wrap=True)
    for column in wide_columns if wide else ("orig.", "red.", "delta [95 % interval]", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in arm.rows:
        is_primary = row.metric == primary
        name = Text(f"{row.metric}*" if is_primary else row.metric, style="bold" if is_primary else "")
        verdict = Text(
            row.verdict if wide else _SHORT.get(row.verdict, row.verdict), style=_STYLES.get(row.verdict, "dim")
        )
        if wide:
            flips = "" if row.fixed is None else f"{row.fixed}/{row.broken}"
            cells = [_delta(row, row.delta), _interval(row), flips]
        else:
            cells = [
                f"{_delta(row, row.delta)} [{_interval(row)}]" if row.lower is not None else _delta(row, row.delta)
            ]
        table.add_row(name, _value(row, row.original), _value(row, row.reduced), *cells, _p(row), str(row.n), verdict)
    return table


def _legend(result: LaserResult) -> str:
    star = f"* {result.primary} was declared before and carries the claim; p" if result.primary else "p"
    several = " (Holm over the plans)" if result.primary and len(result.arms) > 1 else ""
    return (
        f"{star}{several}{' of the others is' if result.primary else ' is'} Holm-adjusted; delta = reduced - original"
    )


def _lines(arm: ArmResult, controls: dict[str, ArmResult], metric: str | None) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for row in arm.rows:
        if row.note:
            lines.append(Text(f"  {row.metric}: {row.note}", style="dim"))
    if arm.prior_checks is not None:
        lines += _prior_lines(arm.prior_checks)
    for kind, control in controls.items():
        for row in (row for row in control.rows if row.metric == metric):
            label = "same matrix zeroed" if kind == "zeroed" else "random matrix, same rho"
            interval = f" [{_interval(row)}]" if row.lower is not None else ""
            lines.append(
                Text(
                    f"  control, {label} ({control.plan}): {row.metric} {_value(row, row.reduced)}, "
                    f"delta {_delta(row, row.delta)}{interval}"
                )
            )
    return lines


def _prior_lines(checks: PriorChecks) -> list[RenderableType]:
    excluded = checks.majority_excluded
    lines: list[RenderableType] = []
    flag = Text("  prior check: ")
    if checks.prior_shift:
        flag.append("the gain is not shown outside of the most predicted answers", style="bold yellow")
    elif checks.delta > 0:
        flag.append("the gain holds outside of the most predicted answers", style="green")
    else:
        flag.append("no gain in the first token to explain")
    lines.append(flag)
    parts = [f"best constant answer per group {checks.constant_answer:.1%}"]
    if excluded is not None and excluded.lower is not None and excluded.upper is not None:
        parts.append(
            f"without the most predicted answers {excluded.original:.1%} -> {excluded.reduced:.1%} "
            f"[{100 * excluded.lower:+.1f}, {100 * excluded.upper:+.1f}], n = {excluded.n}"
        )
    if checks.macro is not None:
        parts.append(
            f"macro over {checks.macro.answers} answers {checks.macro.original:.1%} -> {checks.macro.reduced:.1%}"
        )
    lines += [Text(f"    {part}") for part in parts]
    for arm, top in checks.top_predictions.items():
        said = ", ".join(f"{text.strip() or repr(text)} {count}" for text, count in top)
        lines.append(Text(f"    {arm} says most: {said}  (entropy {checks.entropy[arm]:.2f} nats)"))
    return lines


def _timing(result: LaserResult) -> list[str]:
    lines = [f"passes of the original: {result.original_seconds:.1f} s"]
    for name, arm in result.arms.items():
        times = f"{arm.seconds:.1f} s, and {arm.factorise_seconds:.2f} s to factorise"
        lines.append(f"passes of {'the reduced model' if name == 'laser' else name}: {times}; {arm.replay}")
    return lines


def _first_tested(arm: ArmResult) -> str | None:
    return next((row.metric for row in arm.rows if row.test != "not tested"), None)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _is_share(row: PairedResult) -> bool:
    return row.kind == "binary" or (row.kind == "mean" and any(word in row.metric for word in _SHARES))


def _value(row: PairedResult, value: float) -> str:
    return f"{value:.1%}" if _is_share(row) else f"{value:.3g}"


def _delta(row: PairedResult, value: float) -> str:
    return f"{value:+.1%}" if _is_share(row) or row.kind == "log_ratio" else f"{value:+.2g}"


def _interval(row: PairedResult) -> str:
    if row.lower is None or row.upper is None:
        return ""
    if _is_share(row) or row.kind == "log_ratio":
        return f"{100 * row.lower:+.1f}, {100 * row.upper:+.1f}"
    return f"{row.lower:+.2g}, {row.upper:+.2g}"


def _p(row: PairedResult) -> str:
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None:
        return ""
    return "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"
