"""bias=cut: the layer's bias goes with its matrix, in every layout, and comes back; and in all that ships it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, make
from torch import Tensor, nn
from toy import Toy, make_data
from trainers import quiet_trainer
from weights import Snapshot, same, weights

from laser_callback import LaserCallback, find_matrices, save_reduced
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.stacks import layer_stacks
from laser_callback.shipping.factored_file import load_factored
from laser_callback.shipping.thin import factored
from laser_callback.shipping.undo import restore, save_undo
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import apply, recorded
from laser_callback.surgery.swap import reduced

peft = pytest.importorskip("peft")
SILENT = "*.writes@0:bias=cut"


def with_biases(model: nn.Module) -> nn.Module:
    """Models begin with biases of 0, which would hide that one is kept."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    return with_biases(make("gpt2", dtype))


def silent(model: nn.Module, *arguments: Any, **named: Any) -> list[bool]:
    """Of each layer, whether it gives exactly what it is given."""
    found: list[bool] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        found.append(torch.equal(given, output[0] if isinstance(output, tuple) else output))

    layers = [layer for stack in layer_stacks(model).values() for layer in stack]
    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(*arguments, **named)
    for hook in hooks:
        hook.remove()
    return found


# ---- layouts ---------------------------------------------------------------------------------------------------------

RESIDUAL = ["phi", "gptj", "gpt2", "gpt2-cross", "gpt_neo", "gpt_neox", "gpt_bigcode", "codegen", "opt", "bloom",
            "falcon-multi-query", "persimmon", "starcoder2", "gpt_oss", "whisper", "vit", "clip",
            "decision_transformer", "timm", "hand-written GPT"]  # fmt: skip


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_block_that_writes_nothing_gives_its_residual_input(name):
    model = with_biases(make(name))
    snapshot, inputs = Snapshot(model), FAMILIES[name].inputs()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    stacks = [f"{stack}." for stack in layer_stacks(model)]
    plan = ", ".join(f"{stack}{SILENT}" for stack in stacks)
    with reduced(model, plan.replace("bias=cut", "bias=kept")):
        assert not any(silent(model, **inputs))
    with reduced(model, plan) as cut:
        assert any(matrix.is_bias for matrix, _ in cut.matrices)
        assert all(silent(model, **inputs))
    assert snapshot.is_restored()


FUSED = [
    ("gpt2", "c_attn.weight", "c_attn.bias", True),
    ("gpt_neox", "query_key_value.weight", "query_key_value.bias", False),
    ("bloom", "query_key_value.weight", "query_key_value.bias", False),
    ("falcon-multi-query", "query_key_value.weight", "query_key_value.bias", False),
    ("gpt_bigcode", "c_attn.weight", "c_attn.bias", False),
    ("gpt_oss", "gate_up_proj", "gate_up_proj_bias", True),
]


@pytest.mark.parametrize(("name", "weight", "bias", "transposed"), FUSED)
def test_of_a_fused_bias_the_matrix_s_own_part_is_cut(name, weight, bias, transposed):
    """The parts are those of the family's forward code: a bias is split as a weight with one input."""
    model = with_biases(make(name))
    split = FAMILIES[name].parts[weight]
    (parameter,) = [p for n, p in model.named_parameters() if n.endswith(bias) and ".1." in n]

    def parts() -> dict[str, Tensor]:
        column = parameter.data[..., None, :] if transposed else parameter.data[..., None]
        return {kind: part.clone() for kind, part in split(column).items()}

    before = parts()
    for kind in before:
        with reduced(model, f"1.{kind}@0:bias=cut"):
            after = parts()
            assert before[kind].all()
            assert not after[kind].any()
            assert all(torch.equal(after[other], before[other]) for other in before if other != kind)


@pytest.mark.parametrize("fast", [True, False])
def test_multihead_attention_of_torch(fast):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = with_biases(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(not fast)
    snapshot, x = Snapshot(model), torch.randn(2, 3, 8)
    with reduced(model, "*.writes@0"):
        assert not any(silent(model, x))
    with reduced(model, SILENT):
        assert all(silent(model, x))
    with reduced(model, "0.v_proj@0:bias=cut"):
        bias = model.layers[0].self_attn.in_proj_bias
        assert bias[:16].all()
        assert not bias[16:].any()
    assert snapshot.is_restored()


def test_three_weights_of_torch_share_one_bias():
    attention = with_biases(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    snapshot, inputs = Snapshot(model), (torch.randn(1, 3, 8), torch.randn(1, 5, 4), torch.randn(1, 5, 6))
    for place, kind in enumerate(("q_proj", "k_proj", "v_proj")):
        with reduced(model, f"0.{kind}@0:bias=cut") as cut:
            assert [matrix.name for matrix, _ in cut.matrices][1:] == [f"layers.0.self_attn.{kind}_weight.bias"]
            rows = attention.in_proj_bias.detach().view(3, 8).any(1).tolist()
            assert rows == [other != place for other in range(3)]
            if kind == "v_proj":  # then nothing is left but the bias of the output
                output = attention(*inputs)[0]
                torch.testing.assert_close(output, attention.out_proj.bias.expand_as(output))
    assert snapshot.is_restored()


def test_single_experts():
    model = with_biases(make("gpt_oss"))
    experts = model.model.layers[1].mlp.experts
    before = experts.down_proj_bias.detach().clone()
    with reduced(model, "1.fc_out[2]@0:bias=cut"):
        assert not experts.down_proj_bias[2].any()
        assert not experts.down_proj[2].any()
        kept = [i for i in range(len(before)) if i != 2]
        assert torch.equal(experts.down_proj_bias[kept], before[kept])
    assert torch.equal(experts.down_proj_bias, before)


def test_a_model_under_adapters_and_a_compiled_one():
    tokens = torch.arange(6)[None]
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_proj", "c_fc"], fan_in_fan_out=True))
    compiled = torch.compile(gpt2(), backend="eager")
    for model in (adapted.eval(), compiled):
        with reduced(model, SILENT) as cut:
            biases = [matrix for matrix, _ in cut.matrices if matrix.is_bias]
            assert len(biases) == 4
            assert not any("_orig_mod" in name for matrix in biases for name in (matrix.name, *matrix.parameter_names))
            assert all(silent(getattr(model, "_orig_mod", model), tokens))


def test_a_matrix_without_bias_has_none_and_one_that_is_no_parameter_is_refused():
    layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 6, bias=False)}) for _ in "ab")
    model = nn.ModuleDict({"layers": layers})
    with reduced(model, "*.fc_in@0:bias=cut") as cut:
        assert len(cut.matrices) == 2
    layers[1]["fc1"].__dict__.pop("bias", None)
    del layers[1]["fc1"]._parameters["bias"]
    layers[1]["fc1"].register_buffer("bias", torch.ones(6))
    with pytest.raises(TypeError, match=r"cuts `layers\.1\.fc1\.bias`: .* is no parameter with one number .*bias=kept"):
        LaserPlan.parse("*.fc_in@0:bias=cut").resolve(model)
    LaserPlan.parse("*.fc_in@0").resolve(model)  # which does not ask for it


# ---- in a comparison -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["1.writes@0:bias=cut", "0.mlp@0:bias=cut", "1.v_proj@0:bias=cut,scale=0.5"])
def test_the_comparison_is_the_evaluation_of_the_cut_module(plan):
    module = with_biases(Toy())
    snapshot, laser = Snapshot(module), LaserCallback(plan, report=False, controls=True)
    logged = quiet_trainer(laser).validate(module, make_data(), verbose=False)[0]
    with reduced(module, plan):
        alone = quiet_trainer().validate(module, make_data(), verbose=False)[0]
    kept = LaserCallback(plan.replace("bias=cut", "bias=kept"), report=False)
    without = quiet_trainer(kept).validate(module, make_data(), verbose=False)[0]
    assert {key: logged[f"laser/{key}"] for key in ("acc", "loss")} == pytest.approx(alone)
    assert without["laser/loss"] != logged["laser/loss"]
    assert snapshot.is_restored()


class Saves(Toy):
    """A step that saves by itself, in the middle of a pass."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def validation_step(self, batch: Any, batch_idx: int, *rest: Any) -> Any:
        torch.save(self.state_dict(), self.folder / f"{len(list(self.folder.iterdir()))}.pt")
        return super().validation_step(batch, batch_idx, *rest)


def test_who_saves_in_the_middle_of_a_pass_saves_the_biases_of_the_original(tmp_path):
    module = with_biases(Saves(tmp_path))
    before = weights(module)
    quiet_trainer(LaserCallback("1.writes@0:bias=cut", report=False)).validate(module, make_data(), verbose=False)
    states = [torch.load(path) for path in tmp_path.iterdir()]
    assert len(states) >= 2 * len(make_data())
    assert all(torch.equal(state[name], value) for state in states for name, value in before.items())


# ---- recipes, undo files, exports ------------------------------------------------------------------------------------

PLAN = "1.mlp@0:bias=cut, 0.q_proj@0.3, 0.out_proj@0:bias=cut,scale=0.5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recipe_knows_the_biases(dtype, tmp_path):
    model = gpt2(dtype)
    with recorded(model, PLAN) as (_, recipe):
        inside = weights(model)
    names = [matrix.name for matrix in recipe.matrices]
    assert sum(name.endswith(".bias") for name in names) == 3
    assert names.index("transformer.h.1.mlp.c_fc.bias") == names.index("transformer.h.1.mlp.c_fc") + 1
    recipe.to_file(tmp_path / "laser.json")
    for plan in (Recipe.of(json.loads(json.dumps(recipe.to_dict()))), Recipe.from_file(tmp_path / "laser.json")):
        again = gpt2(dtype)
        assert apply(again, plan).matrices == recipe.matrices
        assert same(again, inside)
        with pytest.raises(ValueError, match="is already what this would make of it"):
            apply(again, plan)
    other = gpt2(dtype)
    other.transformer.h[1].mlp.c_proj.bias.data[3] += 1
    before = weights(other)
    with pytest.raises(ValueError, match=r"the weights of `transformer\.h\.1\.mlp\.c_proj\.bias` are others"):
        apply(other, recipe)
    assert same(other, before)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_undo_file_brings_biases_back_to_the_last_bit(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    base, model = gpt2(), gpt2()
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    model.transformer.h[1].mlp.c_fc.bias.data[0] = -0.0
    bits = {name: value.view(torch.int32).clone() for name, value in model.state_dict().items()}
    plan = f"{PLAN}, 1.attn@0.2:cut=delta"
    spectra = Spectra(base=BaseWeights(base, model))
    save_undo(model, plan, tmp_path / "undo", spectra)
    apply(model, plan, spectra=spectra)
    assert not model.transformer.h[1].mlp.c_fc.bias.any()
    restore(model, tmp_path / "undo")  # without the base: it computes nothing
    assert all(torch.equal(value.view(torch.int32), bits[name]) for name, value in model.state_dict().items())


def test_shipped_models_have_the_cut_biases(tmp_path):
    model, tokens = gpt2(), torch.arange(6)[None]
    before = weights(model)
    with reduced(model, PLAN), torch.no_grad():
        wanted = model(tokens).logits
    save_reduced(model, PLAN, tmp_path / "dense", "dense")
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(dense(tokens).logits, wanted)
    save_reduced(model, PLAN, tmp_path / "thin", "factored")
    thin = load_factored(tmp_path / "thin").eval()
    with torch.no_grad():
        torch.testing.assert_close(thin(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`transformer\.h\.1\.mlp\.c_fc\.bias` is a bias, which no adapter holds"):
        save_reduced(model, "1.mlp@0:bias=cut", tmp_path / "adapter", "adapter")
    assert not (tmp_path / "adapter").exists()
    assert same(model, before)


def test_thin_layers_share_the_bias_that_is_cut():
    model, tokens = gpt2(), torch.arange(6)[None]
    snapshot = Snapshot(model)
    with reduced(model, SILENT), torch.no_grad():
        wanted = model(tokens).logits
    with factored(model, SILENT) as thin, torch.no_grad():
        assert {*thin.ranks.values()} == {0}
        assert len(thin.layers) == 4
        assert all(silent(model, tokens))
        assert torch.equal(model(tokens).logits, wanted)
    assert snapshot.is_restored()


# ---- delta mode ------------------------------------------------------------------------------------------------------


def test_in_delta_mode_the_bias_goes_back_to_that_of_the_base():
    base, model = gpt2(), gpt2()
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    own, theirs = (copy.deepcopy(m.transformer.h[1].mlp.c_fc) for m in (model, base))
    spectra = Spectra(base=BaseWeights(base, model))
    inside = model.transformer.h[1].mlp.c_fc
    for scale in (0.0, 0.5, -0.25):
        with reduced(model, f"1.fc_in@0:bias=cut,cut=delta,scale={scale}", spectra):
            for name in ("weight", "bias"):
                one, other = (getattr(m, name).data.double() for m in (own, theirs))
                wanted = other + scale * (one - other)
                torch.testing.assert_close(getattr(inside, name).data.double(), wanted, rtol=2e-7, atol=1e-7)
            if scale == 0:
                assert torch.equal(inside.bias, theirs.bias)
    mixed = "1.fc_in@0:bias=cut,cut=delta, 1.fc_out@0:bias=cut, 0.fc_in@0.2:cut=delta, 0.fc_out@0.2"
    with reduced(model, mixed, spectra) as cut:
        assert torch.equal(inside.bias, theirs.bias)
        assert not model.transformer.h[1].mlp.c_proj.bias.any()
        assert sum(matrix.is_bias for matrix, _ in cut.matrices) == 2
    recipe = apply(copy.deepcopy(model), mixed, spectra=spectra)
    assert recipe.base == spectra.base.digest
    assert apply(copy.deepcopy(model), recipe, spectra=spectra).matrices == recipe.matrices


def test_the_bias_of_a_base_that_has_none_is_named():
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4, bias=False)})])})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4)})])})
    model["layers"][0]["fc1"].weight.data = base["layers"][0]["fc1"].weight.data + 1e-3
    spectra = Spectra(base=BaseWeights(base, model))
    with pytest.raises(ValueError, match=r"the base has no counterpart of `layers\.0\.fc1\.bias`"):
        reduced(model, "0.fc_in@0:bias=cut,cut=delta", spectra).prepare()


def test_every_bias_has_as_many_rows_as_its_matrix():
    for name in FAMILIES:
        if name == "mpt":
            continue
        for matrix in find_matrices(make(name)):
            if not matrix.obstacle and (bias := matrix.bias) is not None:
                assert bias.obstacle is None
                assert bias.value.shape == bias.shape == (matrix.shape[0], 1)
                assert bias.bias is None
