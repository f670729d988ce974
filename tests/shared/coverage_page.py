"""The table in docs/coverage.md, proven row by row: each family is built, cut, compared with float64, and restored.

Rewrite the table with ``python tests/shared/coverage_page.py``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from families import FAMILIES, make, run
from matrices import best
from torch import nn
from weights import same, weights

from laser_callback import LaserPlan, Reduction, WeightMatrix, find_matrices, reduced
from laser_callback.plans.kinds import KINDS
from laser_callback.plans.uncut import not_cut
from laser_callback.surgery.replay import LayerReplay

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEADER = (
    "| family | class | layers | kinds | fused | replay | cut by name only, or not at all |\n"
    "|---|---|---|---|---|---|---|\n"
)
RHO = 0.25


def page() -> tuple[str, list[str], str]:
    """The page up to the table's rows, the rows, and what follows."""
    head, header, rest = PAGE.read_text(encoding="utf-8").partition(HEADER)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()))
    return head + header, rows, rest[sum(len(row) + 1 for row in rows) :]


def prove(name: str) -> str:
    """Cut each kind in the last layers that have it; returns the family's row of the table."""
    model = make(name)
    matrices = find_matrices(model)
    before = run(name, model)
    untouched = weights(model)
    for kind in KINDS:
        targets = last_of_each_stack(matrix for matrix in matrices if matrix.kind == kind)
        if not targets:
            continue
        plan = plan_of(kind, targets)
        assert {m.name for m, _ in plan.resolve(model)} == {m.name for m in targets}
        expected = cut_by_hand(name, model, kind, targets)
        with reduced(model, plan):
            inside = run(name, model)
            for key, parameter in model.named_parameters():
                torch.testing.assert_close(parameter, expected.get_parameter(key), rtol=0, atol=1e-12)
        reference = run(name, expected)
        change = (inside - before).abs().max()
        assert change > 1e-4, f"{kind} does not move the output"
        # Some models normalise in float32 whatever their dtype.
        assert (inside - reference).abs().max() < 1e-4 * change, kind
        assert torch.equal(run(name, model), before)
        assert same(model, untouched)
    return " | ".join(
        [
            f"| {name}",
            f"`{FAMILIES[name].name}`",
            _layers(matrices),
            " ".join(kind for kind in KINDS if any(m.kind == kind for m in matrices)),
            _fused(matrices),
            replay_of(name, model, matrices),
            _not_cut(model) + " |",
        ]
    )


def plan_of(kind: str, targets: list[WeightMatrix]) -> LaserPlan:
    layers = {(matrix.stack, matrix.layer) for matrix in targets}
    return LaserPlan(Reduction(layer, kind, RHO, stack=stack or None) for stack, layer in layers)


def last_of_each_stack(matrices: Iterable[WeightMatrix]) -> list[WeightMatrix]:
    """Of each stack, those in the last layer that has any."""
    found = list(matrices)
    last: dict[str | None, int] = {}
    for matrix in found:
        last[matrix.stack] = max(last.get(matrix.stack, 0), matrix.layer or 0)
    return [matrix for matrix in found if matrix.layer == last[matrix.stack]]


def cut_by_hand(name: str, model: nn.Module, kind: str, targets: list[WeightMatrix]) -> nn.Module:
    """A copy with truncated SVDs made here, of slices that are written here."""
    twin = copy.deepcopy(model)
    for key in {matrix.parameter_names[0] for matrix in targets}:
        weight = twin.get_parameter(key).data
        parts = [views for end, views in FAMILIES[name].parts.items() if key.endswith(f".{end}")]
        part = parts[0](weight)[kind] if parts else weight
        matrices = part if weight.ndim == 3 else part.reshape(-1, part.shape[-1])  # of each expert, or one
        part.copy_(best(matrices, int(RHO * min(matrices.shape[-2:]))).view_as(part))
    return twin


# ---- what a row says -------------------------------------------------------------------------------------------------


def _layers(matrices: list[WeightMatrix]) -> str:
    stacks: dict[str, list[WeightMatrix]] = {}
    for matrix in matrices:
        if matrix.stack is not None:
            stacks.setdefault(matrix.stack, []).append(matrix)
    texts = [f"`{stack}` {1 + max(m.layer or 0 for m in members)}" for stack, members in stacks.items()]
    passes = max(matrix.passes for matrix in matrices)
    return ", ".join(texts) + (f", run {passes} times" if passes > 1 else "")


def _fused(matrices: list[WeightMatrix]) -> str:
    parts: dict[str, list[str]] = {}
    for matrix in matrices:
        if matrix.kind and f"[{matrix.kind}]" in matrix.name:
            kinds = parts.setdefault(matrix.name.partition("[")[0].rpartition(".")[2], [])
            kinds += [matrix.kind] if matrix.kind not in kinds else []
    texts = [f"`{name}`: {' '.join(kinds)}" for name, kinds in parts.items()]
    experts = 1 + max((matrix.expert for matrix in matrices if matrix.expert is not None), default=-1)
    return "; ".join(texts + ([f"{experts} experts"] if experts else []))


def replay_of(name: str, model: nn.Module, matrices: list[WeightMatrix]) -> str:
    """Cut the last stack's last layer; what is replayed must be, bit for bit, what is computed."""
    cut = last_of_each_stack(matrix for matrix in matrices if matrix.kind)[-1:]
    reduction = Reduction(cut[0].layer, str(cut[0].kind), RHO, stack=cut[0].stack)
    plan = reduced(model, LaserPlan([reduction]))

    def report(**more: bool) -> tuple[int, int, str]:
        replay = LayerReplay(model, {"arm": cut})
        with replay.record():
            run(name, model, **more)
        with plan:
            expected = run(name, model, **more)
            with replay.replay("arm"):
                assert torch.equal(run(name, model, **more), expected)
        found = replay.reports["arm"]
        return found.replayed, found.run, ", ".join(found.reasons)

    replayed, computed, reasons = report()
    if computed and "use_cache" in inspect.signature(model.forward).parameters:
        replayed, computed, without = report(use_cache=False)
        if not computed:
            return f"with `use_cache=False` (else: {reasons})"
        reasons += f" (with `use_cache=False`: {without})"
    if computed:
        return f"{replayed} of {replayed + computed}: {reasons}"
    return "yes" if replayed else "nothing comes before the cut"


def _not_cut(model: nn.Module) -> str:
    names: dict[str, dict[str, None]] = {}
    for each in not_cut(model):
        short = re.sub(r"\.\d+\.", ".*.", each.name.removesuffix(".weight"))
        short = ".".join(short.rpartition("*.")[2].split(".")[-2:])
        names.setdefault(each.reason + ("" if each.by_name else " (not cut)"), {})[f"`{short}`"] = None
    return "; ".join(f"{reason}: {', '.join(shown)}" for reason, shown in names.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    before, _, after = page()
    PAGE.write_text(before + "".join(f"{prove(name)}\n" for name in FAMILIES) + after, encoding="utf-8")
