"""Models inside of other libraries: PEFT adapters, torch.compile, accelerate's offloading, packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import make, run
from matrices import best
from torch import nn
from versions import EXACT

from laser_callback import find_matrices, reduced

# ---- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(name: str, **where: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(make(name), config).eval()


def test_a_cut_of_the_base_leaves_the_adapter_on_top() -> None:
    model = adapted("llama", target_modules=["up_proj"])
    before, twin = run("llama", model), copy.deepcopy(model)
    weight = twin.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight
    weight.data = best(weight, 4)
    with reduced(model, "1.up_proj@0.25"):
        inside = run("llama", model)
    torch.testing.assert_close(inside, run("llama", twin), rtol=0, atol=1e-6)
    assert (inside - before).abs().max() > 1e-3
    assert torch.equal(run("llama", model), before)


def test_a_cut_of_the_merged_weight() -> None:
    model = adapted("llama", target_modules=["up_proj"])
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    plain = copy.deepcopy(model).merge_and_unload()
    plain.model.layers[1].mlp.up_proj.weight.data = best(merged, 4)
    model.merge_adapter()
    before = run("llama", model)
    with reduced(model, "1.up_proj@0.25"):
        inside = run("llama", model)
    torch.testing.assert_close(inside, run("llama", plain), rtol=0, atol=1e-6)
    assert (inside - before).abs().max() > 1e-3
    assert torch.equal(run("llama", model), before)


def test_adapters_on_stacked_experts() -> None:
    model = adapted("mixtral", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    plain = [(m.kind, m.layer, m.expert, m.shape) for m in find_matrices(make("mixtral")) if m.kind]
    assert [(m.kind, m.layer, m.expert, m.shape) for m in find_matrices(model) if m.kind] == plain
    before, twin = run("mixtral", model), copy.deepcopy(model)
    experts = next(m.module for m in find_matrices(twin) if m.layer == 1 and m.kind == "fc_out")
    experts.down_proj.data = best(experts.down_proj, 4)
    with reduced(model, "1.experts.down_proj@0.25"):
        inside = run("mixtral", model)
    torch.testing.assert_close(inside, run("mixtral", twin), rtol=0, atol=1e-6)
    assert (inside - before).abs().max() > 1e-3
    assert torch.equal(run("mixtral", model), before)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "each layer"])
def test_a_compiled_model_is_cut_without_compiling_again(whole: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = make("llama", torch.float32), CompileCounter()
    before = run("llama", model)
    with reduced(model, "1.mlp@0.25"):
        expected = run("llama", model)
    compiled = torch.compile(model, backend=counter) if whole else model
    if not whole:
        for layer in model.model.layers:
            layer.compile(backend=counter)
    # Before torch 2.7 a graph rounds some scalars in another way than the model it was made from.
    tolerance = 0.0 if EXACT else 1e-5
    torch.testing.assert_close(run("llama", compiled), before, rtol=0, atol=tolerance)
    before = run("llama", compiled)
    assert torch.equal(run("llama", compiled), before)
    graphs = counter.frame_count
    cut = reduced(compiled, "1.mlp@0.25")
    for _ in range(2):
        with cut:
            torch.testing.assert_close(run("llama", compiled), expected, rtol=0, atol=tolerance)
        assert torch.equal(run("llama", compiled), before)
    assert counter.frame_count == graphs > 0
    torch._dynamo.reset()


# ---- accelerate ------------------------------------------------------------------------------------------------------


def test_offloaded_weights_are_refused_until_they_are_back() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make("llama")
    before = run("llama", model)
    with reduced(model, "1.fc_in@0.25"):
        expected = run("llama", model)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run("llama", model), before)
    cut = reduced(model, "1.fc_in@0.25")
    with pytest.raises(TypeError, match=r"gate_proj` is offloaded by accelerate.*remove_hook_from_module"), cut:
        pytest.fail("entered")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with cut:
        assert torch.equal(run("llama", model), expected)
    assert torch.equal(run("llama", model), before)


def test_dispatched_weights_that_stay_in_place_are_cut() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make("llama")
    before = run("llama", model)
    with reduced(model, "1.fc_in@0.25"):
        expected = run("llama", model)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with reduced(model, "1.fc_in@0.25"):
        assert torch.equal(run("llama", model), expected)
    assert torch.equal(run("llama", model), before)


# ---- quantisers ------------------------------------------------------------------------------------------------------


def _gguf() -> nn.Module:
    gguf = pytest.importorskip("transformers.integrations.gguf.utils", reason="newer transformers keep GGUF packed")
    return gguf.GgufLinear(256, 8, ggml_type=8)  # Q8_0


def _mxfp4() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return Mxfp4GptOssExperts(hf.GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2))


def _fp8() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    return FP8Linear(32, 32, block_size=(16, 16))


def _bitnet() -> nn.Module:
    from transformers.integrations.bitnet import BitLinear

    return BitLinear(16, 16, bias=False)


def _bitsandbytes_8() -> nn.Module:
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    return layer.to("cpu")


def _bitsandbytes_4() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")


def _torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def _gptq() -> nn.Module:
    """The buffers of GPTQ's and AWQ's layers, as their checkpoints hold them; the layers themselves need kernels."""
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    layer.register_buffer("qzeros", torch.zeros(1, 8, dtype=torch.int32))
    layer.register_buffer("scales", torch.ones(1, 64, dtype=torch.float16))
    return layer


@pytest.mark.parametrize(
    ("layer", "cure"),
    [
        (_gguf, r"GgufConfig\(dequantize=True\)"),
        (_mxfp4, r"Mxfp4Config\(dequantize=True\)"),
        (_fp8, r"FineGrainedFP8Config\(dequantize=True\)"),
        (_bitnet, "checkpoint that it was quantised from"),
        (_bitsandbytes_8, r"model\.dequantize\(\)"),
        (_bitsandbytes_4, r"model\.dequantize\(\)"),
        (_torchao, "checkpoint that it was quantised from"),
        (_gptq, "checkpoint that it was quantised from"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_packed_weights_are_refused_with_their_cure(layer: Callable[[], nn.Module], cure: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": layer()})])})
    with pytest.raises(TypeError, match=rf"the weight `layers\.0\.q_proj\..*packed.*: .*{cure}"):
        reduced(model, "0.q_proj@0.1")


def test_buffers_that_are_no_weights_are_no_reason_to_refuse() -> None:
    model = make("hand-written GPT")
    model.blocks[0].attn.register_buffer("bias", torch.ones(8, 8, dtype=torch.uint8).tril())  # a causal mask
    model.blocks[0].attn.register_buffer("index", torch.zeros(8, 8, dtype=torch.int64))
    assert len([m for m in find_matrices(model) if m.kind]) == 18
