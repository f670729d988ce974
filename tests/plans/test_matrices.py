from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from families import HandWrittenGPT, make, run
from matrices import best
from torch import nn

from laser_callback.compare.controls import random_plan, zeroed_plan
from laser_callback.plans.kinds import _FAMILIES, KINDS
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.stacks import layer_stacks
from laser_callback.plans.target import targets
from laser_callback.plans.uncut import not_cut
from laser_callback.surgery.swap import reduced

# ---- what is found ---------------------------------------------------------------------------------------------------
# Families of architectures, one by one: test_families.py.


@pytest.mark.parametrize("table", ["names", "in_attention", "outside_attention", "fused"])
def test_the_table_of_families_gives_a_name_once(table):
    names = [name for row in _FAMILIES[table].values() for name in row]
    assert len(set(names)) == len(names)
    assert {kind for kinds in _FAMILIES[table] for kind in kinds.split()} <= set(KINDS)


PLAIN = ["k_proj", "out_proj", "q_proj", "v_proj", "fc_in", "fc_out"]


def test_conv1d_is_read_with_outputs_in_rows():
    model = make("gpt2")
    matrix = next(m for m in find_matrices(model) if m.name == "transformer.h.1.mlp.c_fc")
    assert matrix.shape == (64, 16)
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (16, 64)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("gpt2", "transformer.h.1.attn"),
        ("gpt2-cross", "transformer.h.1.crossattention"),
        ("gpt_neox", "gpt_neox.layers.1.attention"),
        ("bloom", "transformer.h.1.self_attention"),
        ("phi3", "model.layers.1.self_attn"),
        ("phi3-wide", "model.layers.1.self_attn"),
        ("falcon", "transformer.h.1.self_attention"),
        ("falcon-multi-query", "transformer.h.1.self_attention"),
        ("falcon-per-head", "transformer.h.1.self_attention"),
        ("gpt_bigcode", "transformer.h.1.attn"),
        ("gpt_bigcode-per-head", "transformer.h.1.attn"),
        ("codegen", "transformer.h.1.attn"),
        ("persimmon", "model.layers.1.self_attn"),
        ("mpt", "transformer.blocks.1.attn"),
        ("modernbert", "model.layers.1.attn"),
        ("torch", "decoder.layers.1.self_attn"),
        ("timm", "blocks.1.attn"),
        ("hand-written GPT", "blocks.2.attn"),
    ],
)
def test_fused_parts_are_the_q_k_and_v_of_the_models_own_forward(name, attention):
    """Without queries the scores are those without keys; without values nothing is attended: any wrong row shows."""
    if name == "timm" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    model = make(name)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.zero_()
    module = model.get_submodule(attention)
    outputs = []

    def remember(_module, _inputs, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    module.register_forward_hook(remember)
    matrices = find_matrices(model)
    result = {}
    for kind in (None, "q_proj", "k_proj", "v_proj"):
        cut = [m for m in matrices if m.kind == kind and m.name.startswith(f"{attention}.")]
        assert len(cut) == (kind is not None)
        plan = [Reduction(None, f"/{re.escape(m.name)}/", 0) for m in cut]
        with reduced(model, LaserPlan(plan)) if plan else nullcontext():
            run(name, model)
        result[kind] = outputs[-1]  # Bloom's attention adds the residual inside
    residual = result["v_proj"] if name == "bloom" else torch.zeros_like(result["v_proj"])
    assert torch.equal(result["v_proj"], residual)
    torch.testing.assert_close(result["q_proj"], result["k_proj"], rtol=0, atol=1e-6)
    assert not torch.allclose(result["q_proj"], result[None], atol=1e-4)
    assert not torch.allclose(result["q_proj"], residual, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("kind", ["fc_in", "fc_up", "fc_out"])
def test_one_expert_is_cut_as_its_separate_matrix(name, kind):
    model = make(name)
    layer = model.model.layers[1]
    experts = (layer.feed_forward if name == "llama4" else layer.mlp).experts
    attribute = "down_proj" if kind == "fc_out" else "gate_up_proj"
    expected = getattr(experts, attribute).detach().clone()
    part = expected[2]
    if kind != "fc_out":
        axis = 1 if name != "mixtral" else 0
        half = 0 if kind == "fc_in" else 1  # GPT-OSS: gate_up[..., ::2], gate_up[..., 1::2]
        part = part[:, half::2] if name == "gpt_oss" else part.chunk(2, axis)[half]
    assert part.shape in ((16, 24), (24, 16))
    part.copy_(best(part, 4))
    with reduced(model, f"1.{kind}[2]@0.25"):
        torch.testing.assert_close(getattr(experts, attribute), expected, rtol=0, atol=1e-12)
    changed = (getattr(experts, attribute) != expected).flatten(1).any(1)
    assert changed.tolist() == [False, False, True]


def test_gate_and_up_halves_are_those_of_the_forward():
    """Without the gate (silu(0) = 0) and without up the MLP is silent; with the halves confused rank 1 would not be."""
    model = make("phi3")
    mlp = model.model.layers[0].mlp
    x = torch.sin(torch.arange(48.0, dtype=torch.float64)).view(3, 16)
    gate, up = mlp.gate_up_proj.weight.detach().chunk(2)
    expected = (torch.nn.functional.silu(x @ best(gate, 4).T) * (x @ up.T)) @ mlp.down_proj.weight.T
    with reduced(model, "0.fc_in@0.25"):
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-10)


def test_unknown_layouts_are_not_split():
    class MultiQuery(nn.Module):  # 16 + 2 * 4 rows divide by three as well
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 24), "proj": nn.Linear(16, 16)})

    model = nn.ModuleDict({"layers": nn.ModuleList([MultiQuery(), MultiQuery()])})
    assert [(m.kind, m.shape) for m in find_matrices(model) if "qkv" in m.name] == [(None, (24, 16))] * 2


def test_multihead_attention_with_other_key_sizes():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4)})] * 1)})
    assert Counter(m.kind for m in find_matrices(model)) == Counter(["q_proj", "k_proj", "v_proj", "out_proj"])


# ---- stacks, wrappers, ties ------------------------------------------------------------------------------------------


def test_hand_written_gpt_and_blocks_in_a_sequential():
    model = HandWrittenGPT()
    matrices = find_matrices(model)
    assert {m.stack for m in matrices} == {None, "blocks"}
    assert Counter(m.kind for m in matrices if m.layer == 2) == Counter(PLAIN)


def test_a_model_that_is_itself_the_list_of_layers():
    blocks = HandWrittenGPT().blocks
    assert [m.name for m, _ in LaserPlan.parse("-1.fc_in@0.1").resolve(blocks)] == ["2.mlp.c_fc"]
    assert [m.name for m, _ in LaserPlan.parse("1.attn.c_proj@0.1").resolve(blocks)] == ["1.attn.c_proj"]
    assert list(layer_stacks(blocks)) == [""]
    assert layer_stacks(blocks)[""] == list(blocks)


def test_a_recurrent_network_has_matrices_and_no_layers():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 5, 2), "head": nn.Linear(5, 3)})
    matrices = find_matrices(model)
    assert [m.name for m in matrices] == [
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "rnn.weight_ih_l1",
        "rnn.weight_hh_l1",
        "head",
    ]
    assert all(m.stack is None and m.layer is None and m.kind is None for m in matrices)
    x = torch.ones(3, 4)
    before = model["rnn"](x)[0]
    with reduced(model, "/rnn.weight_hh_l1/@0.2"):
        assert not torch.equal(model["rnn"](x)[0], before)
    assert torch.equal(model["rnn"](x)[0], before)
    with pytest.raises(ValueError, match=r"rnn\.weight_ih_l0"):
        LaserPlan.parse("0.fc_in@0.1").resolve(model)
    assert [m.name for m in find_matrices(nn.Linear(2, 3))] == ["weight"]


def test_lightning_module_and_misleading_attribute_names():
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.attention_expert = make("bert")  # `attention` in the path of everything
            self.lazy = nn.LazyLinear(3)

    kinds = {m.name.rpartition("layer.1.")[2]: m.kind for m in find_matrices(Module()) if m.layer == 1}
    assert kinds == {
        "attention.self.query": "q_proj",
        "attention.self.key": "k_proj",
        "attention.self.value": "v_proj",
        "attention.output.dense": "out_proj",
        "intermediate.dense": "fc_in",
        "output.dense": "fc_out",
    }


def test_an_alias_of_the_layers_is_no_second_stack():
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make("llama")
            self.layers = self.model.model.layers
            self.upper = self.model.model.layers[1:]

    module = Module()
    assert {m.stack for m in find_matrices(module)} == {None, "model.model.layers"}
    assert {stack: len(layers) for stack, layers in layer_stacks(module).items()} == {"model.model.layers": 2}
    (matrix, _), *rest = LaserPlan.parse("-1.fc_in@0.1").resolve(module)
    assert not rest
    assert "layers.1.mlp.gate_proj.weight" in matrix.parameter_names
    assert "upper.0.mlp.gate_proj.weight" in matrix.parameter_names


def test_shared_layers_keep_their_own_numbers():
    first, second = HandWrittenGPT.Block(), HandWrittenGPT.Block()
    model = nn.ModuleDict({"layers": nn.ModuleList([first, first, second])})
    (matrix, _), *rest = LaserPlan.parse("2.fc_in@0.1").resolve(model)
    assert not rest
    assert (matrix.layer, matrix.path_in_layer, matrix.module) == (2, "mlp.c_fc", second.mlp.c_fc)
    (shared, _), *rest = LaserPlan.parse("0.fc_in@0.1").resolve(model)
    assert not rest
    assert shared.parameter_names == ("layers.0.mlp.c_fc.weight", "layers.1.mlp.c_fc.weight")
    assert shared.passes == 2
    albert = make("albert")
    assert Counter(m.kind for m in find_matrices(albert) if m.kind) == Counter(PLAIN)
    with pytest.raises(ValueError, match=r"layers 0\.\.0 \(shared: one runs 3 times\)"):
        LaserPlan.parse("2.fc_in@0.1").resolve(albert)


def test_compiled_models_have_the_names_of_the_model():
    plain = [m.name for m in find_matrices(make("gpt_neox"))]
    assert [m.name for m in find_matrices(torch.compile(make("gpt_neox")))] == plain
    layers = make("gpt_neox")
    for i, layer in enumerate(layers.gpt_neox.layers):
        layers.gpt_neox.layers[i] = torch.compile(layer)
    assert [m.name for m in find_matrices(layers)] == plain
    assert [m.kind for m in find_matrices(layers)] == [m.kind for m in find_matrices(make("gpt_neox"))]
    module = nn.ModuleDict({"net": torch.compile(make("mpt"))})
    found = LaserPlan.parse("0.fc_in@0.1").resolve(module)  # `up_proj` looks for its sibling `gate_proj`
    assert [m.name for m, _ in found] == ["net.transformer.blocks.0.ffn.up_proj"]
    assert all("_orig_mod" not in name for m in find_matrices(module) for name in m.parameter_names)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("gpt_neox", ["query_key_value"]),
        ("bloom", ["query_key_value", "dense"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gpt2", ["c_attn"]),
    ],
)
def test_lora_leaves_the_matrices_as_they_were(name, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    model = make(name)
    plain = [(m.kind, m.layer, m.shape, m.index) for m in find_matrices(model) if m.kind]
    wrapped = peft.get_peft_model(model, config)
    matrices = find_matrices(wrapped)
    found = [(m.kind, m.layer, m.shape, m.index) for m in matrices if m.kind]
    assert str(found) == str(plain)  # the rows of an interleaved part are tensors
    assert all(m.kind is None for m in matrices if "lora_" in m.name)
    assert any("lora_A" in m.name for m in matrices)
    if name == "llama":  # the names of the unwrapped model still work
        by_kind = LaserPlan.parse("1.fc_out@0.1").resolve(wrapped)
        by_name = LaserPlan.parse("1.mlp.down_proj@0.1").resolve(wrapped)
        assert [m.name for m, _ in by_kind] == [m.name for m, _ in by_name]
        assert by_kind[0][0].name.endswith("layers.1.mlp.down_proj.base_layer")


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_tied_weights_appear_once_with_all_names(name):
    model = make(name)
    matrices = find_matrices(model)
    assert len({id(m.parameter) for m in matrices if m.stack is None}) == len([m for m in matrices if m.stack is None])
    (tied,) = [m for m in matrices if len(m.parameter_names) > 1]
    head = {"gpt2": "lm_head", "bert": "cls.predictions.decoder", "t5": "lm_head"}[name]
    assert f"{head}.weight" in tied.parameter_names
    for selector in (head, tied.name):
        with pytest.raises(ValueError, match="tied weight") as error:
            LaserPlan.parse(f"/{selector}/@0.5").resolve(model)
        assert all(each.removesuffix(".weight") in str(error.value) for each in tied.parameter_names)
    # Who names it by all of its names means it; the error says how.
    pattern = str(error.value).rpartition("name them all, ")[2]
    assert [m for m, _ in LaserPlan.parse(f"{pattern}@0.5").resolve(matrices)] == [tied]
    before = run(name, model)
    with reduced(model, f"{pattern}@0.5"):
        assert not torch.equal(run(name, model), before)
        assert torch.linalg.matrix_rank(model.get_parameter(f"{head}.weight")) == 8
    assert torch.equal(run(name, model), before)


def test_untied_head_and_router_are_cut_when_named_only():
    model = make("mixtral")
    assert all(m.kind for m, _ in LaserPlan.parse("*.all@0.5").resolve(model))
    assert [m.name for m, _ in LaserPlan.parse("/lm_head/@0.5").resolve(model)] == ["lm_head"]
    assert [m.name for m, _ in LaserPlan.parse("1.mlp.gate@0.5").resolve(model)] == ["model.layers.1.mlp.gate"]


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.int8, "holds integers.*packed, load the model without a quantization config"),
        (torch.uint8, "holds integers"),
        (torch.int64, "holds integers"),
        (torch.bool, "holds truth values"),
        (torch.complex64, "is complex.*not supported"),
        (torch.complex128, "is complex.*not supported"),
        (torch.float8_e4m3fn, r"packed.*FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_what_is_no_real_matrix_is_refused_where_a_plan_names_it(dtype, told):
    model = HandWrittenGPT()
    weight = nn.Parameter(torch.zeros(64, 16).to(dtype), requires_grad=False)
    model.blocks[1].mlp.c_fc.weight = weight
    model.blocks[0].attn.table = nn.Parameter(torch.zeros(4, 3, 2, 2).to(dtype), requires_grad=False)
    model.blocks[0].mlp.c_fc.mask = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    matrices = find_matrices(model)
    for cuttable in (model, matrices):
        for plan in ("1.fc_in@0.1", "*.mlp@0.1", r"/blocks\.1\.mlp\.c_fc/@0.1"):
            with pytest.raises(TypeError, match=rf"blocks\.1\.mlp\.c_fc\.weight.*{told}") as refused:
                LaserPlan.parse(plan).resolve(cuttable)
            assert isinstance(refused.value, ValueError)  # a plan that does not fit
        assert len(LaserPlan.parse("0.mlp@0.1, 1.fc_out@0.1, *.attn@0.1").resolve(cuttable)) == 15
    with reduced(model, "0.fc_in@0.1"):
        pass
    (listed,) = [each for each in not_cut(model) if each.name == "blocks.1.mlp.c_fc.weight"]
    assert not listed.by_name
    assert told.partition(".*")[0] in listed.reason
    with pytest.raises(TypeError, match=told):
        targets(model)
    assert len(targets(model, "0.mlp")) == 2
    assert all(
        not matrix.obstacle for matrix, _ in random_plan(model, LaserPlan.parse("0.fc_in@0.1"), 0).resolve(model)
    )


class Wrapped(torch.Tensor):
    """A tensor subclass, as quantisation libraries make them."""


def test_subclasses_and_sharded_weights_are_refused():
    model = HandWrittenGPT()
    model.blocks[0].mlp.c_fc.weight = nn.Parameter(torch.zeros(64, 16).as_subclass(Wrapped))
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp\.c_fc\.weight.*packed or sharded \(Wrapped of"):
        reduced(model, "0.fc_in@0.1")


def test_dtensor_is_refused(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if distributed.is_initialized():
        pytest.skip("a process group is up")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = HandWrittenGPT()
        weight = model.blocks[0].mlp.c_fc.weight
        model.blocks[0].mlp.c_fc.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"packed or sharded.*gather sharded weights"):
            reduced(model, "0.fc_in@0.1")
    finally:
        distributed.destroy_process_group()


# ---- selectors -------------------------------------------------------------------------------------------------------


def names(model: nn.Module, text: str) -> list[str]:
    return [matrix.name for matrix, _ in LaserPlan.parse(text).resolve(model)]


def test_selectors():
    model = make("llama")
    gate = "model.layers.{}.mlp.gate_proj"
    assert names(model, "1.fc_in@0.1") == names(model, "-1.fc_in@0.1") == [gate.format(1)]
    assert names(model, "-2.fc_in@0.1") == [gate.format(0)]
    assert names(model, "*.fc_in@0.1") == names(model, "0-1.fc_in@0.1") == [gate.format(0), gate.format(1)]
    assert names(model, "1-1.fc_in@0.1") == [gate.format(1)]
    assert names(model, "0.mlp.gate_proj@0.1") == names(model, "0.gate_proj@0.1") == [gate.format(0)]
    assert names(model, r"/.*\.1\.mlp\.(gate|up)_proj/@0.1") == [gate.format(1), "model.layers.1.mlp.up_proj"]
    assert names(model, "layers.1.fc_in@0.1") == names(model, "model.layers.1.fc_in@0.1") == [gate.format(1)]
    assert len(names(model, "0.attn@0.1")) == 4
    assert len(names(model, "0.mlp@0.1")) == 3
    assert len(names(model, "*.all@0.1")) == 14
    assert len(names(model, "1.mlp@0.1, 0.attn@0.1")) == 7


@pytest.mark.parametrize(
    "text",
    [
        "2.fc_in@0.1",
        "-3.fc_in@0.1",
        "1-2.fc_in@0.1",
        "0.c_fc@0.1",
        "0.roj@0.1",
        "encoder.0.fc_in@0.1",
        "0.fc_in[0]@0.1",
        "/mlp/@0.1",
        "0.lm_head@0.1",
    ],
)
def test_a_selector_that_matches_nothing_lists_what_exists(text):
    model = make("llama")
    with pytest.raises(ValueError, match="matches no matrix") as error:
        LaserPlan.parse(text).resolve(model)
    assert "model.layers: layers 0..1, kinds q_proj, k_proj, v_proj, out_proj, fc_in, fc_up, fc_out" in str(error.value)
    assert "mlp.gate_proj" in str(error.value)
    assert "lm_head" in str(error.value)


def test_experts_are_selected_one_by_one_or_together():
    model = make("mixtral")
    assert names(model, "1.fc_out[2]@0.1") == ["model.layers.1.mlp.experts.down_proj[2]"]
    assert len(names(model, "1.fc_in@0.1")) == 3
    assert len(names(model, r"/.*\.1\.mlp\.experts\.gate_up_proj\[fc_in\]/@0.1")) == 3
    assert len(names(model, "1.experts.gate_up_proj@0.1")) == len(names(model, "/.*1.*gate_up_proj/@0.1")) == 6
    with pytest.raises(ValueError, match="matches no matrix"):
        names(model, "1.fc_out[3]@0.1")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = {"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4)}
            self.experts = nn.ModuleList(nn.ModuleDict(copy.deepcopy(expert)) for _ in range(3))

    listed = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    assert names(listed, "1.fc_out[2]@0.1") == ["layers.1.experts.2.w2"]
    assert len(names(listed, "1.fc_out@0.1")) == 3


def test_two_stacks_need_the_stacks_name():
    model = make("t5")
    with pytest.raises(ValueError, match=r"several layer stacks \(decoder\.block, encoder\.block\)") as error:
        names(model, "1.fc_in@0.1")
    hint = str(error.value).rpartition("e.g. ")[2]
    assert names(model, hint) == names(model, "decoder.1.fc_in@0.1") == ["decoder.block.1.layer.2.DenseReluDense.wi"]
    assert names(model, "encoder.block.1.fc_in@0.1") == ["encoder.block.1.layer.1.DenseReluDense.wi"]
    assert len(names(model, "decoder.1.q_proj@0.1")) == 2  # its own and the cross-attention
    assert names(model, "decoder.1.EncDecAttention.q@0.1") == ["decoder.block.1.layer.1.EncDecAttention.q"]
    assert names(model, "decoder.1.layer.1.EncDecAttention.q@0.1") == names(model, "decoder.1.EncDecAttention.q@0.1")
    # A stack's name that fits both: the hint is a plan that works.
    with pytest.raises(ValueError, match="several layer stacks") as error:
        names(model, "block.1.fc_in@0.1")
    assert names(model, str(error.value).rpartition("e.g. ")[2]) == names(model, hint)


def test_stacks_inside_of_a_sequential_can_be_named():
    towers = [nn.Sequential(*[HandWrittenGPT.Block() for _ in range(2)]) for _ in range(2)]
    model = nn.ModuleDict({"net": nn.Sequential(nn.Embedding(32, 16), *towers, nn.Linear(16, 2))})
    assert names(model, "net.2.1.fc_in@0.1") == ["net.2.1.mlp.c_fc"]
    with pytest.raises(ValueError, match="several layer stacks") as error:
        names(model, "1.fc_in@0.1")
    assert names(model, str(error.value).rpartition("e.g. ")[2]) == ["net.1.1.mlp.c_fc"]


def test_overlaps_after_expansion_are_errors():
    model = make("gpt2")
    for text in (
        "1.fc_in@0.1, *.mlp@0.5",
        "-1.fc_in@0.1, 1.fc_in@0.5",
        "0-1.attn@0.1, 1.q_proj@0.5",
        "0.c_attn@0.1, 0.v_proj@0.5",
        r"1.mlp.c_fc@0.1, /transformer\.h\.1\.mlp\.c_fc/@0.5",
    ):
        with pytest.raises(ValueError, match=r"both cut `transformer\.h\."):
            LaserPlan.parse(text).resolve(model)


def test_resolve_is_in_the_models_order_and_fast_on_many_experts():
    model = make("llama")
    assert names(model, "1.fc_in@0.1, 0.fc_in@0.1, 1.q_proj@0.5") == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
    ]
    config = hf.GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=128,
    )
    with torch.device("meta"):
        big = hf.GptOssForCausalLM(config)
    assert len(LaserPlan.parse("*.mlp@0.1").resolve(big)) == 12 * 128 * 3


# ---- controls --------------------------------------------------------------------------------------------------------


def test_zeroed_control():
    plan = LaserPlan.parse("1.fc_in@0.1, 0.attn@entropy:keep=tail,scale=0.5")
    assert zeroed_plan(plan) == LaserPlan.parse("1.fc_in@0, 0.attn@0")


def transformer() -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, 24, batch_first=True)


@pytest.mark.parametrize("make_model", [lambda: make("t5"), lambda: make("mixtral"), lambda: make("gpt2"), transformer])
def test_random_control_cuts_one_other_matrix_for_each(make_model):
    model = make_model()
    stack = max((m.stack for m in find_matrices(model) if m.stack), key=len)
    plan = LaserPlan.parse(f"{stack}.1.fc_in@0.25, {stack}.0.out_proj@entropy:keep=tail")
    planned = plan.resolve(model)
    drawn = set()
    for seed in range(40):
        control = random_plan(model, plan, seed)
        assert control == random_plan(model, plan, seed)
        assert LaserPlan.parse(str(control)) == control
        resolved = control.resolve(model)
        assert len(resolved) == len(planned)
        assert not {m.name for m, _ in resolved} & {m.name for m, _ in planned}
        assert sorted(str((r.rho, r.keep)) for _, r in resolved) == sorted(str((r.rho, r.keep)) for _, r in planned)
        assert all(m.kind in KINDS for m, _ in resolved)
        drawn |= {m.name for m, _ in resolved}
    assert len(drawn) > 6


def test_random_control_needs_other_matrices():
    with pytest.raises(ValueError, match="leaves alone, and the model has"):
        random_plan(make("llama"), LaserPlan.parse("*.all@0.1"), 0)
