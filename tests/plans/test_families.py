"""Families of architectures: what docs/coverage.md says of each, half precision, accelerators."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from coverage_page import RHO, cut_by_hand, last_of_each_stack, page, plan_of, prove, replay_of
from families import FAMILIES, make, run
from packaging.version import Version
from versions import TRANSFORMERS
from weights import same, weights

from laser_callback import find_matrices, reduced

# Of each way to hold weights one: plain, fused, transposed, experts, shared, other blocks, other libraries.
QUICK = {"llama", "mixtral", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "gpt_bigcode-per-head", "gpt_oss"}
QUICK |= {"deepseek_v3", "mamba", "albert", "t5", "vit", "torch", "hand-written GPT"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_family(name: str) -> None:
    if name == "timm" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    row = prove(name)
    # The table is of the newest transformers that this runs with; others name some parts differently.
    if Version("5.20") <= TRANSFORMERS:
        assert row in page()[1], "python tests/shared/coverage_page.py rewrites the table"


def test_the_table_has_no_other_rows() -> None:
    _, rows, _ = page()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """What is put in is the truncated SVD, made in float64 of the weights as they are, in the nearest numbers."""
    model = make(name, dtype)
    untouched = weights(model)
    for kind in ("q_proj", "fc_in", "fc_out"):
        targets = last_of_each_stack(matrix for matrix in find_matrices(model) if matrix.kind == kind)
        exact = cut_by_hand(name, copy.deepcopy(model).double(), kind, targets)
        with reduced(model, f"1.{kind}@{RHO}"):
            for key, parameter in model.named_parameters():
                other = parameter != exact.get_parameter(key).to(dtype)
                assert other.float().mean() < 1e-3, key  # a tie in float64 may go either way
                assert parameter.dtype == dtype
        assert same(model, untouched)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "t5", "vit"])
def test_on_an_accelerator_as_on_the_cpu(name: str) -> None:
    here, there = make(name, torch.float32), make(name, torch.float32).to(torch.accelerator.current_accelerator())
    before = run(name, there)
    for kind in ("k_proj", "fc_in"):
        plan = plan_of(kind, last_of_each_stack(matrix for matrix in find_matrices(here) if matrix.kind == kind))
        with reduced(here, plan), reduced(there, plan):
            for a, b in zip(here.parameters(), there.parameters(), strict=True):
                torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
            torch.testing.assert_close(run(name, here), run(name, there).cpu(), rtol=1e-3, atol=1e-3)
    assert torch.equal(run(name, there), before)
    replay_of(name, there, find_matrices(there))
