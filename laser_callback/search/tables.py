"""Tables of values, each of an arm and a metric: joined, kept in a journal, and read as rows of paired statistics.

Contract: arithmetic on what was measured; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laser_callback.compare.measure import Table, Values
from laser_callback.results.examples import ORIGINAL
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.outcomes import Outcomes, PairedResult
from laser_callback.stats.paired import compare
from laser_callback.support.journal import Step


def joined(seen: Table, fresh: Table) -> Table:
    """The values of the arms of ``seen``, and then those of ``fresh``; all of ``fresh`` where nothing was seen."""
    if not seen:
        return fresh
    return {
        arm: {key: Values.join([seen[arm][key], fresh[arm][key]]) for key in seen[arm]} for arm in fresh if arm in seen
    }


def twins_of(table: Table, ranked: Sequence[str]) -> dict[str, str]:
    """Arms with the very values of one that ranks higher: zero queries or zero keys, say, make the same model."""
    first: dict[tuple[bytes, ...], str] = {}
    twins = {}
    for name in ranked:
        values = tuple(v.values.numpy().tobytes() for v in table[name].values())
        if values in first:
            twins[name] = first[values]
        first.setdefault(values, name)
    return twins


def to_step(table: Table) -> Step:
    """As a step of a journal."""
    kinds = {key: values.kind for key, values in next(iter(table.values())).items()}
    tensors = {
        f"{part}/{key}": torch.stack([getattr(arm[key], part) for arm in table.values()])
        for part in ("values", "weights")
        for key in kinds
    }
    first = next(iter(table.values()))
    # Of all arms; a key that no example has shares them with another.
    tensors |= {f"clusters/{key}": v.clusters.clone() for key, v in first.items() if v.clusters is not None}
    return {"arms": list(table), "kinds": kinds}, tensors


def to_table(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Table:
    """The inverse of :func:`to_step`."""
    return {
        arm: {
            k: Values(tensors[f"values/{k}"][i], tensors[f"weights/{k}"][i], kind, tensors.get(f"clusters/{k}"))
            for k, kind in data["kinds"].items()
        }
        for i, arm in enumerate(data["arms"])
    }


def row_of(key: str, table: Table, arm: str) -> PairedResult:
    """A row of an arm against the base, from measured values."""
    pair = (table[name][key] for name in (ORIGINAL, arm))
    return compare(key, *(Outcomes(values.values, values.weights, values.kind) for values in pair))


def rows_of(keys: Iterable[str], table: Table, arm: str) -> dict[str, PairedResult]:
    """Those of the keys of which arm and base share a unit."""
    shared = {k: ~(torch.isnan(table[arm][k].values) | torch.isnan(table[ORIGINAL][k].values)) for k in keys}
    return {key: row_of(key, table, arm) for key, present in shared.items() if bool(present.any())}


def from_original(row: PairedResult, change: float) -> PairedResult:
    """A row against a base as one against the original, from which the base has changed by ``change``.

    That is a share of the original's value where the row's changes are (perplexity), and a difference elsewhere. Of
    numbers of both models it is an estimate: divergences do not add up.
    """
    relative = row.kind == "log_ratio"

    def whole(further: float) -> float:
        return (1 + change) * (1 + further) - 1 if relative else change + further

    lower, upper = (None if end is None else whole(end) for end in (row.lower, row.upper))
    original = row.original / (1 + change) if relative else row.original - change * (row.kind != "pair")
    return replace(row, original=original, delta=whole(row.delta), lower=lower, upper=upper)


def keeps(bound: Constraint, row: PairedResult) -> bool:
    """Whether the estimate, whatever its error, is within the margin."""
    change = bound.judge(row).change
    return change <= bound.margin if bound.op == "<=" else change >= bound.margin
