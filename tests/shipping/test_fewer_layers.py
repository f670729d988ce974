from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from left_out import outcome, table
from seeded import seeded
from tiny import tiny_causal_lm
from torch import Tensor, nn
from versions import EXACT
from weights import Snapshot

from laser_callback.plans.stacks import layer_stacks
from laser_callback.shipping.export import save_reduced
from laser_callback.shipping.fewer_layers import CannotLeaveOutError, _check_settings, dropped_layers
from laser_callback.shipping.undo import restore
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.swap import reduced

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3, 4], [9, 8, 3, 10, 11, 3, 5, 5, 6]])
TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = TOKENS | {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = PLAIN | {"num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT = TOKENS | {"n_embd": 16, "n_layer": 5, "n_head": 4, "n_positions": 32}
T5 = TOKENS | {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "decoder_start_token_id": 0}
SLIDING, FULL = "sliding_attention", "full_attention"
DEEPSEEK = PLAIN | {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6},
    **{"moe_intermediate_size": 12, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
}


def model(kind: str, settings: Mapping[str, Any], **more: Any) -> hf.PreTrainedModel:
    """With biases and weights large enough that each layer, and its place, shows in the output."""
    found = getattr(hf, kind)
    made = seeded(lambda: found(found.config_class(**{**settings, **more})).eval())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def said(one: nn.Module, **inputs: Tensor) -> list[Tensor]:
    """The logits, and what is generated with a cache, with its logits."""
    inputs = inputs or {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        logits = one(**inputs).logits
        if not one.can_generate():
            return [logits]
        encoded = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        new = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
        found = one.generate(**encoded, **new, output_logits=True, return_dict_in_generate=True)
    return [logits, found.sequences, *found.logits]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# The config's settings that must be there afterwards, with layers 0 and 3 of five left out.
CASES: dict[str, tuple[hf.PreTrainedModel, dict[str, Any]]] = {
    "llama": (lambda: model("LlamaForCausalLM", GROUPED), {"num_hidden_layers": 3}),
    "mistral": (lambda: model("MistralForCausalLM", GROUPED, sliding_window=4), {"num_hidden_layers": 3}),
    "mixtral": (lambda: model("MixtralForCausalLM", GROUPED | EXPERTS), {"num_hidden_layers": 3}),
    "qwen2": (
        lambda: model("Qwen2ForCausalLM", GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2),
        {"layer_types": [FULL, SLIDING, SLIDING], "max_window_layers": 1},
    ),
    "qwen3": (
        lambda: model("Qwen3ForCausalLM", GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=3),
        {"layer_types": [FULL, FULL, SLIDING], "max_window_layers": 2},
    ),
    "qwen3_moe": (
        lambda: model("Qwen3MoeForCausalLM", GROUPED | EXPERTS, mlp_only_layers=[1, 3]),
        {"mlp_only_layers": [0]},
    ),
    "gemma2": (
        lambda: model("Gemma2ForCausalLM", GROUPED, sliding_window=4),
        {"layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "gemma3": (
        lambda: model("Gemma3ForCausalLM", GROUPED, sliding_window=4, layer_types=[SLIDING, FULL, FULL, FULL, SLIDING]),
        {"layer_types": [FULL, FULL, SLIDING]},
    ),
    "gpt_oss": (
        lambda: model("GptOssForCausalLM", GROUPED | EXPERTS, sliding_window=4),
        {"layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "smollm3": (
        lambda: model("SmolLM3ForCausalLM", GROUPED, no_rope_layers=[1, 0, 1, 1, 0]),
        {"no_rope_layers": [0, 1, 0]},
    ),
    "deepseek_v3": (
        lambda: model("DeepseekV3ForCausalLM", DEEPSEEK, first_k_dense_replace=2),
        {"first_k_dense_replace": 1},
    ),
    "gpt2": (lambda: model("GPT2LMHeadModel", GPT), {"n_layer": 3}),
    "gpt_neo": (
        lambda: model(
            "GPTNeoForCausalLM", PLAIN, num_layers=5, num_heads=4, window_size=4, max_position_embeddings=32,
            attention_types=[[["global", "local"], 2], [["local"], 1]],
        ),
        {"attention_layers": ["local", "global", "local"]},
    ),
    "gpt_neox": (lambda: model("GPTNeoXForCausalLM", PLAIN), {"num_hidden_layers": 3}),
    "opt": (
        lambda: model("OPTForCausalLM", PLAIN, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
        {"num_hidden_layers": 3},
    ),
    "phi": (lambda: model("PhiForCausalLM", PLAIN), {"num_hidden_layers": 3}),
    "falcon": (lambda: model("FalconForCausalLM", PLAIN, bias=True), {"num_hidden_layers": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_the_dropped_layers_gives_the_same(name, tmp_path):
    make, settings = CASES[name]
    original = make()
    before, plan = Snapshot(original), "0.writes@0:bias=cut, 3.writes@0:bias=cut"
    (stack,) = layer_stacks(original)
    recipe = save_reduced(original, plan, tmp_path / "new")
    assert before.is_restored()
    assert recipe.left_out == {stack: [0, 3]}
    assert {key: config_of(tmp_path / "new").get(key) for key in settings} == settings
    loaded = type(original).from_pretrained(tmp_path / "new")
    if original.config._experts_implementation != loaded.config._experts_implementation:
        loaded.set_experts_implementation(original.config._experts_implementation)
    assert len(layer_stacks(loaded)[stack]) == 3
    with reduced(original, plan):
        expected = said(original)
    assert all(map(torch.equal, said(loaded), expected))
    assert not torch.equal(said(original)[0], expected[0])
    assert not (tmp_path / "new" / "model.safetensors").is_dir()
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "laser.json", "model.safetensors")
    }


@pytest.mark.parametrize("gated", [{}, {"feed_forward_proj": "gated-gelu"}])
@pytest.mark.parametrize(
    ("plan", "encoder", "decoder"),
    [
        ("encoder.0.writes@0", [1, 2, 3], [0, 1, 2, 3]),
        ("encoder.1-3.writes@0", [0], [0, 1, 2, 3]),
        ("decoder.0.writes@0, decoder.2.writes@0", [0, 1, 2, 3], [1, 3]),
        ("encoder.0.writes@0, decoder.0.writes@0, decoder.3.writes@0", [1, 2, 3], [1, 2]),
    ],
)
def test_encoder_and_decoder_each_have_their_number(plan, encoder, decoder, gated, tmp_path):
    original = model("T5ForConditionalGeneration", T5, num_layers=4, **gated)
    recipe = save_reduced(original, plan, tmp_path / "new")
    assert [i for i in range(4) if i not in recipe.left_out.get("encoder.block", [])] == encoder
    assert [i for i in range(4) if i not in recipe.left_out.get("decoder.block", [])] == decoder
    config = config_of(tmp_path / "new")
    assert (config["num_layers"], config["num_decoder_layers"]) == (len(encoder), len(decoder))
    loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS[:, :3]}
    with reduced(original, plan):
        expected = said(original, **inputs)
    assert all(map(torch.equal, said(loaded, **inputs), expected))


def test_layers_of_images_are_left_out(tmp_path):
    settings = {key: value for key, value in PLAIN.items() if key not in TOKENS} | {"image_size": 8, "patch_size": 4}
    original = model("ViTForImageClassification", settings)
    plan = "1.writes@0:bias=cut, 2.writes@0:bias=cut"
    recipe = save_reduced(original, plan, tmp_path / "new")
    assert list(recipe.left_out.values()) == [[1, 2]]
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    pixels = torch.sin(torch.arange(2 * 3 * 64.0)).view(2, 3, 8, 8)
    with reduced(original, plan):
        expected = said(original, pixel_values=pixels)
    assert torch.equal(said(loaded, pixel_values=pixels)[0], expected[0])
    assert config_of(tmp_path / "new")["num_hidden_layers"] == 3


# ---- what cannot be left out -----------------------------------------------------------------------------------------


def exported(original: nn.Module, plan: str, folder: Path) -> tuple[Recipe, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = save_reduced(original, plan, folder)
    texts = [str(warning.message) for warning in caught if "could not be left out" in str(warning.message)]
    return recipe, "; ".join(texts)


def is_the_cut_model(folder: Path, original: nn.Module, plan: str) -> bool:
    loaded = type(original).from_pretrained(folder)
    with reduced(original, plan):
        expected = original.state_dict()
        return all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_where_the_place_of_a_layer_matters_it_stays_and_that_is_said(tmp_path):
    original = model("GPT2LMHeadModel", GPT, scale_attn_by_inverse_layer_idx=True)
    recipe, text = exported(original, "1.writes@0:bias=cut", tmp_path / "new")
    assert recipe.left_out == {}
    assert text.startswith(
        "layer 1 of transformer.h could not be left out: in its new place `transformer.h.2` would have attn.scaling="
    )
    assert is_the_cut_model(tmp_path / "new", original, "1.writes@0:bias=cut")
    assert config_of(tmp_path / "new")["n_layer"] == 5
    assert text[1:] in (tmp_path / "new" / "README.md").read_text()
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "laser.json", "model.safetensors")
    }
    # Behind the last layer there is none that would move.
    assert exported(original, "4.writes@0:bias=cut", tmp_path / "last")[0].left_out == {"transformer.h": [4]}


def test_a_norm_behind_the_sum_is_named(tmp_path):
    original = model("BertForMaskedLM", PLAIN)
    recipe, text = exported(original, "1.writes@0:bias=cut, 0.fc_in@0.5", tmp_path / "new")
    assert recipe.left_out == {}
    assert "`bert.encoder.layer.1` does not hand on what it is given: a norm stands behind its sum" in text
    assert is_the_cut_model(tmp_path / "new", original, "1.writes@0:bias=cut, 0.fc_in@0.5")


def test_one_layer_must_be_left(tmp_path):
    _, text = exported(tiny_causal_lm(), "*.writes@0", tmp_path / "new")
    assert "no layer of `model.layers` would be left" in text


def test_a_layer_that_would_be_of_another_sort_stays(tmp_path):
    """Every second layer has experts, counted from the first on."""
    original = model("Qwen3MoeForCausalLM", GROUPED | EXPERTS, decoder_sparse_step=2)
    recipe, text = exported(original, "2.writes@0", tmp_path / "new")
    assert recipe.left_out == {}
    assert "the smaller model would need `model.layers." in text
    assert exported(original, "2-3.writes@0", tmp_path / "even")[0].left_out == {"model.layers": [2, 3]}


def test_a_window_that_a_short_pass_does_not_reach_is_compared_too():
    kinds = [SLIDING, FULL, SLIDING, FULL, SLIDING]
    large = model("Gemma3ForCausalLM", GROUPED, sliding_window=4096, layer_types=kinds)
    small = model("Gemma3ForCausalLM", GROUPED, sliding_window=4096, num_hidden_layers=3, layer_types=kinds[:3])
    _check_settings(small, large, {"model.layers": [0, 1, 2]})
    _check_settings(small, large, {"model.layers": [0, 3, 4]})
    with pytest.raises(CannotLeaveOutError, match=r"`model.layers.1` would have \S+=.* instead of"):
        _check_settings(small, large, {"model.layers": [1, 2, 3]})


# ---- what is a drop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "dropped"),
    [
        ("2.out_proj@0:bias=cut", {}),
        ("2.fc_out@0:bias=cut", {}),
        ("2.writes@0", {}),  # the biases still write
        ("2.writes@0.5", {}),
        ("2.writes@0:scale=0.5", {}),
        ("2.all@0:bias=cut", {"transformer.h": [2]}),
        ("2.out_proj@0:bias=cut, 2.fc_out@0:bias=cut, 1.fc_out@0:bias=cut", {"transformer.h": [2]}),
        ("1-2.writes@0:bias=cut", {"transformer.h": [1, 2]}),
    ],
)
def test_a_drop_takes_all_that_writes(plan, dropped):
    original = model("GPT2LMHeadModel", GPT)
    with reduced(original, plan) as cut:
        assert dropped_layers(original, [matrix for matrix, _ in cut.matrices]) == dropped


def test_a_layer_that_wrote_nothing_before_is_not_the_plans(tmp_path):
    original = tiny_causal_lm()
    for name, parameter in original.model.layers[1].named_parameters():
        parameter.data.mul_(0 if "o_proj" in name or "down_proj" in name else 1)
    recipe, text = exported(original, "2.fc_in@0.5", tmp_path / "new")
    assert (recipe.left_out, text) == ({}, "")


def test_a_model_in_training_stays_in_training_and_no_random_number_is_drawn(tmp_path):
    original = model("LlamaForCausalLM", GROUPED, attention_dropout=0.5).train()
    original.model.layers[2].eval()
    modes = [module.training for module in original.modules()]
    state = torch.get_rng_state()
    assert save_reduced(original, "1.writes@0", tmp_path / "new").left_out
    assert [module.training for module in original.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("as_trained", ["frozen", "partly frozen", "checkpointing"])
def test_what_training_has_switched_is_no_reason(as_trained, tmp_path):
    original = model("LlamaForCausalLM", GROUPED)
    if as_trained == "checkpointing":
        original.gradient_checkpointing_enable()
    for parameter in {"frozen": original, "partly frozen": original.model.layers[4]}.get(
        as_trained, nn.Module()
    ).parameters():
        parameter.requires_grad_(False)
    recipe, text = exported(original, "1.writes@0", tmp_path / "new")
    assert (recipe.left_out, text) == ({"model.layers": [1]}, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_come_through(dtype, tmp_path):
    original = model("LlamaForCausalLM", GROUPED).to(dtype)
    assert save_reduced(original, "1.writes@0", tmp_path / "new").left_out == {"model.layers": [1]}
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == dtype


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_recipe_and_card_say_which_layers_are_left_out(tmp_path):
    original = tiny_causal_lm()
    recipe = save_reduced(original, "1.writes@0, 3.fc_in@0.5", tmp_path / "new")
    read = Recipe.from_file(tmp_path / "new" / "laser.json")
    assert isinstance(read, Recipe)
    assert read.left_out == recipe.left_out == {"model.layers": [1]}
    text = (tmp_path / "new" / "README.md").read_text()
    assert "Left out: layer 1 of model.layers, as the original counts them." in text
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `model")}
    assert "left out" in rows["model.layers.1.mlp.down_proj"]
    assert "dense" in rows["model.layers.3.mlp.gate_proj"]
    again = save_reduced(original, read, tmp_path / "again")
    assert again.left_out == {"model.layers": [1]}
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()


def test_what_is_left_out_cannot_be_restored(tmp_path):
    original = tiny_causal_lm()
    save_reduced(original, "1.writes@0", tmp_path / "new")
    save_reduced(original, "1.writes@0", tmp_path / "undo.safetensors", "undo")
    with pytest.raises(ValueError, match="others than those that this was made for"):
        restore(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tmp_path / "undo.safetensors")


@pytest.mark.skipif(not EXACT, reason="the page is of the newest versions")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_is_found(name):
    _, rows, _ = table()
    assert name in rows[outcome(name)].split(", ")
    assert sum(name in families.split(", ") for families in rows.values()) == 1
