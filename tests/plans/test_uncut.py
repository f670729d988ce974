from __future__ import annotations

import pytest
import torch
from families import FAMILIES, WIDTH, make
from torch import nn

from laser_callback import LaserPlan, find_matrices
from laser_callback.plans.uncut import NotCut, not_cut


def reasons(model: nn.Module) -> dict[str, str]:
    return {each.name: each.reason for each in not_cut(model)}


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "xlnet", "mamba2", "clip", "albert", "torch"])
def test_every_parameter_is_cut_by_kind_or_listed(name: str) -> None:
    model = make(name)
    listed = not_cut(model)
    of_kind = {id(matrix.parameter) for matrix in find_matrices(model) if matrix.kind}
    left = {id(model.get_parameter(each.name)) for each in listed}
    assert len(left) == len(listed)
    assert not of_kind & left
    assert of_kind | left == {id(p) for p in model.parameters() if p.ndim >= 2}
    for each in listed:
        assert each.shape == model.get_parameter(each.name).shape
        # What is said to be cut by its name is; what is not cannot be.
        pattern = each.name.removesuffix(".weight").replace(".", r"\.")
        names = [m.parameter_names for m in find_matrices(model) if each.name in m.parameter_names]
        if each.by_name and len(names[0]) == 1:
            assert LaserPlan.parse(f"/{pattern}/@0.5").resolve(model)
        assert bool(names) == each.by_name


def test_reasons() -> None:
    mixtral = reasons(make("mixtral"))
    assert mixtral["model.embed_tokens.weight"] == "an embedding"
    assert mixtral["lm_head.weight"] == "outside of the layers"
    assert mixtral["model.layers.0.mlp.gate.weight"] == "a router or gate"
    gpt_oss = reasons(make("gpt_oss"))
    assert gpt_oss["model.layers.1.mlp.experts.gate_up_proj_bias"] == "biases"
    assert gpt_oss["model.layers.1.mlp.router.weight"] == "a router or gate"
    assert reasons(make("xlnet"))["transformer.layer.0.rel_attn.q"] == "3 dimensions"
    assert reasons(make("mamba2"))["backbone.layers.0.mixer.in_proj.weight"] == "no known kind"
    assert reasons(make("deepseek_v3"))["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == "no known kind"


def test_odd_parameters() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 7)})
            self.scale = nn.Parameter(torch.ones(1, 4))
            self.later = nn.LazyLinear(3)

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    assert {name.removeprefix("layers.1."): reason for name, reason in reasons(model).items() if ".1." in name} == {
        "fc1.parametrizations.weight.original": "behind a parametrization",
        "attn.qkv.weight": "fused in an order that is not known",
        "scale": "a vector",
        "later.weight": "not initialised yet",
        "later.bias": "not initialised yet",
    }
    assert NotCut("layers.0.scale", (1, 4), "a vector", by_name=True) in not_cut(model)


def test_nothing_is_left_of_a_bare_stack() -> None:
    assert not_cut(make("hand-written GPT").blocks) == []
    assert FAMILIES["hand-written GPT"].make().blocks[0].attn.c_proj.weight.shape == (WIDTH, WIDTH)
