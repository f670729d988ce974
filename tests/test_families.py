"""The table in docs/coverage.md, proven row by row: each family is built, cut, compared with float64, and restored.

Rewrite the table with ``python tests/test_families.py``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make, run
from torch import nn

from laser_callback import LaserPlan, Reduction, WeightMatrix, find_matrices, reduced
from laser_callback.plans.kinds import KINDS
from laser_callback.plans.uncut import not_cut
from laser_callback.surgery.replay import LayerReplay

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
HEADER = (
    "| family | class | layers | kinds | fused | replay | cut by name only, or not at all |\n"
    "|---|---|---|---|---|---|---|\n"
)
RHO = 0.25


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    if name == "timm" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    assert prove(name) in _page()[1], "python tests/test_families.py rewrites the table"


def test_the_table_has_no_other_rows() -> None:
    _, rows, _ = _page()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)


def _page() -> tuple[str, list[str], str]:
    """The page up to the table's rows, the rows, and what follows."""
    head, header, rest = PAGE.read_text(encoding="utf-8").partition(HEADER)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()))
    return head + header, rows, rest[sum(len(row) + 1 for row in rows) :]


def prove(name: str) -> str:
    """Cut each kind in the last layers that have it; returns the family's row of the table."""
    model = make(name)
    matrices = find_matrices(model)
    before = run(name, model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for kind in KINDS:
        targets = _last(matrix for matrix in matrices if matrix.kind == kind)
        if not targets:
            continue
        plan = _plan(kind, targets)
        assert {m.name for m, _ in plan.resolve(model)} == {m.name for m in targets}
        expected = _cut_by_hand(name, model, kind, targets)
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
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    return " | ".join(
        [
            f"| {name}",
            f"`{FAMILIES[name].name}`",
            _layers(matrices),
            " ".join(kind for kind in KINDS if any(m.kind == kind for m in matrices)),
            _fused(matrices),
            _replay(name, model, matrices),
            _not_cut(model) + " |",
        ]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """What is put in is the truncated SVD, made in float64 of the weights as they are, in the nearest numbers."""
    model = make(name, dtype)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for kind in ("q_proj", "fc_in", "fc_out"):
        targets = _last(matrix for matrix in find_matrices(model) if matrix.kind == kind)
        exact = _cut_by_hand(name, copy.deepcopy(model).double(), kind, targets)
        with reduced(model, f"1.{kind}@{RHO}"):
            for key, parameter in model.named_parameters():
                other = parameter != exact.get_parameter(key).to(dtype)
                assert other.float().mean() < 1e-3, key  # a tie in float64 may go either way
                assert parameter.dtype == dtype
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "t5", "vit"])
def test_on_an_accelerator_as_on_the_cpu(name: str) -> None:
    here, there = make(name, torch.float32), make(name, torch.float32).to(torch.accelerator.current_accelerator())
    before = run(name, there)
    for kind in ("k_proj", "fc_in"):
        plan = _plan(kind, _last(matrix for matrix in find_matrices(here) if matrix.kind == kind))
        with reduced(here, plan), reduced(there, plan):
            for a, b in zip(here.parameters(), there.parameters(), strict=True):
                torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
            torch.testing.assert_close(run(name, here), run(name, there).cpu(), rtol=1e-3, atol=1e-3)
    assert torch.equal(run(name, there), before)
    _replay(name, there, find_matrices(there))


def _plan(kind: str, targets: list[WeightMatrix]) -> LaserPlan:
    layers = {(matrix.stack, matrix.layer) for matrix in targets}
    return LaserPlan(Reduction(layer, kind, RHO, stack=stack or None) for stack, layer in layers)


def _last(matrices: Iterable[WeightMatrix]) -> list[WeightMatrix]:
    """Of each stack, those in the last layer that has any."""
    found = list(matrices)
    last: dict[str | None, int] = {}
    for matrix in found:
        last[matrix.stack] = max(last.get(matrix.stack, 0), matrix.layer or 0)
    return [matrix for matrix in found if matrix.layer == last[matrix.stack]]


def _cut_by_hand(name: str, model: nn.Module, kind: str, targets: list[WeightMatrix]) -> nn.Module:
    """A copy with truncated SVDs made here, of slices that are written here."""
    twin = copy.deepcopy(model)
    for key in {matrix.parameter_names[0] for matrix in targets}:
        weight = twin.get_parameter(key).data
        parts = [views for end, views in FAMILIES[name].parts.items() if key.endswith(f".{end}")]
        part = parts[0](weight)[kind] if parts else weight
        matrices = part if weight.ndim == 3 else part.reshape(-1, part.shape[-1])  # of each expert, or one
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        rank = int(RHO * s.shape[-1])
        part.copy_(((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).view_as(part))
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


def _replay(name: str, model: nn.Module, matrices: list[WeightMatrix]) -> str:
    """Cut the last stack's last layer; what is replayed must be, bit for bit, what is computed."""
    cut = _last(matrix for matrix in matrices if matrix.kind)[-1:]
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
    before, _, after = _page()
    PAGE.write_text(before + "".join(f"{prove(name)}\n" for name in FAMILIES) + after, encoding="utf-8")
