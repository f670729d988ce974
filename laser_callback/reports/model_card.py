"""The model card of what is shipped: a README.md in Hugging Face's format, with the plan, the numbers, their origin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from laser_callback.reports.row_text import delta_text, interval_text, p_text, value_text
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.stats.constraints import Judgement
from laser_callback.surgery.recipe import Recipe

_PAPER = "[LASER](https://arxiv.org/abs/2312.13558)"


def hub_name(name: str | None) -> str | None:
    """``name`` if it can be one of the hub, and is no folder here."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def model_card(
    recipe: Recipe,
    *,
    title: str,
    usage: str,
    library: str,
    base: str | None = None,
    notes: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> str:
    """The card's text.

    Args:
        recipe: what was cut, and its numbers.
        title: what this is, in a few words.
        usage: how to load it, as Python code.
        library: that loads it.
        base: hub name of the original, if it has one.
        notes: what a user must know besides.
        ranks: ranks of the matrices that became thin layers, by name.
    """
    about: dict[str, Any] = {"library_name": library, "tags": ["laser", "rank-reduction"]}
    if base is not None:
        about["base_model"] = base
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {title}",
        f"Weight matrices{of} were replaced by low-rank approximations ({_PAPER}), without training: `{recipe}`"
        + (f", cutting the difference to the base `{recipe.base}` only." if recipe.base else "."),
        f"```python\n{usage}\n```",
        *notes,
        "## What was cut",
        _matrices(recipe, ranks or {}),
        *_numbers(recipe.numbers),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in recipe.versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _matrices(recipe: Recipe, ranks: Mapping[str, int]) -> str:
    rows = []
    for matrix in recipe.matrices:
        stored = f"rank {ranks[matrix.name]}, thin" if matrix.name in ranks else "dense"
        shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
        cells = f"`{matrix.name}`", f"`{matrix.reduction}`", shape, matrix.dtype, stored, matrix.before, matrix.after
        rows.append([*cells[:5], *(f"`{digest[:12]}`" for digest in cells[5:])])
    table = _table(("matrix", "cut", "shape", "dtype", "stored", "hash before", "hash after"), rows)
    return f"{table}\n\nThe whole hashes are in `laser.json`, from which the cut can be applied to the original again."


def _numbers(numbers: Mapping[str, Any]) -> list[str]:
    if not numbers:
        return ["## Numbers", "None were given: nothing is claimed about this model's quality."]
    result = LaserResult.from_dict(numbers["comparison"])
    name, arm = next(iter(result.arms.items()))
    parts = ["## Numbers"]
    if "verdict" in numbers:
        parts.append(f"{numbers['verdict'][0].upper()}{numbers['verdict'][1:]}.")
    parts.append(_rows(arm, result.primary))
    legend = "Change: reduced minus original on the same examples; intervals are not adjusted, p is Holm-adjusted"
    if result.primary is not None:
        legend += f", but for {result.primary}, which was declared beforehand and carries the claim"
    parts.append(f"{legend}.")
    if "sets" in numbers:
        sizes = ", ".join(f"{size:,} {name}" for name, size in numbers["sets"].items())
        parts.append(
            f"The numbers are from the confirm set, which no earlier step had seen. Examples: {sizes}; dealt with seed "
            f"{numbers['seed']}, no subject in two sets."
        )
    checks = arm.prior_checks
    if checks is not None and checks.majority_excluded is not None:
        rest = checks.majority_excluded
        parts.append(
            f"Without the answers that either model says most: {value_text(rest, rest.original)} to "
            f"{value_text(rest, rest.reduced)} [{interval_text(rest)}], n = {rest.n}."
        )
    metric = result.primary or arm.rows[0].metric
    for kind, control in result.controls.get(name, {}).items():
        label = "the same matrices zeroed" if kind == "zeroed" else "random matrices cut at the same rho"
        parts += [f"Control, {label}: {metric} {value_text(r, r.reduced)}." for r in control.rows if r.metric == metric]
    if numbers.get("judgements"):
        judged = [Judgement.from_dict(judgement) for judgement in numbers["judgements"]]
        rows = [(f"`{j.gate}`", j.amount(j.change), j.amount(j.bound), j.verdict) for j in judged]
        parts.append(_table(("constraint", "change", "95 % bound", "verdict"), rows))
    parts += [f"Note: {warning}." for warning in numbers.get("warnings", ())]
    return parts


def _rows(arm: ArmResult, primary: str | None) -> str:
    rows = []
    for row in arm.rows:
        interval = f" [{interval_text(row)}]" if row.lower is not None else ""
        flips = "" if row.fixed is None else f"{row.fixed} / {row.broken}"
        name = f"**{row.metric}**" if row.metric == primary else row.metric
        values = value_text(row, row.original), value_text(row, row.reduced), f"{delta_text(row, row.delta)}{interval}"
        rows.append((name, *values, p_text(row), flips, f"{row.n:,}"))
    return _table(("metric", "original", "reduced", "change [95 % interval]", "p", "fixed / broken", "n"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
