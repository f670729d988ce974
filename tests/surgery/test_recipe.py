from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from small_models import IDS, PLAN, Wrapped, gpt2, mixtral
from tiny import tiny_causal_lm
from weights import same, weights

from laser_callback.plans.plan import LaserPlan
from laser_callback.surgery.recipe import Recipe, matrix_hash, matrix_sketch
from laser_callback.surgery.record import apply
from laser_callback.surgery.swap import reduced

# ---- applying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, PLAN),
        (gpt2, "1.q_proj@0.25, 1.v_proj@0.5, 2.fc_in@0.1"),
        (mixtral, "1.fc_in[2]@0.1, 0.fc_out@0.2, 0.q_proj@0.5"),
    ],
)
def test_applied_for_good_are_the_weights_of_the_block(make, plan):
    model = make()
    with reduced(model, plan):
        expected = weights(model)
    parameters = list(model.parameters())
    recipe = apply(model, plan)
    assert same(model, expected)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert recipe == LaserPlan.parse(plan)
    assert not torch.equal(make()(IDS).logits, model(IDS).logits)


def test_a_recipe_makes_the_same_bits_of_the_same_model_in_another_module(tmp_path):
    model, other = tiny_causal_lm(), Wrapped()
    apply(model, PLAN).to_file(tmp_path / "laser.json")
    recipe = Recipe.from_file(tmp_path / "laser.json")
    assert isinstance(recipe, Recipe)
    done = apply(other, recipe)
    assert same(other.net, weights(model))
    assert [m.after for m in done.matrices] == [m.after for m in recipe.matrices]
    assert done.matrices[0].name == f"net.{recipe.matrices[0].name}"
    apply(tiny_causal_lm(), done)  # and out of a module again


def test_training_goes_on_from_the_cut_weights():
    model = tiny_causal_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    apply(model, "1.fc_in@0.1")
    cut = model.model.layers[1].mlp.gate_proj.weight
    before = cut.detach().clone()
    assert torch.linalg.matrix_rank(before) == 3
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(cut, before)


def test_hashes_are_of_the_matrices_in_the_model():
    model = gpt2()
    before = model.transformer.h[1].attn.c_attn.weight[:, :16].T.clone()
    (matrix,) = apply(model, "1.q_proj@0.25").matrices
    after = model.transformer.h[1].attn.c_attn.weight[:, :16].T
    assert (matrix.name, matrix.shape, matrix.dtype) == ("transformer.h.1.attn.c_attn[q_proj]", (16, 16), "float32")
    assert (matrix.before, matrix.after) == (matrix_hash(before), matrix_hash(after))
    assert matrix.before != matrix.after
    assert matrix.norm == pytest.approx(float(after.double().norm()))
    assert matrix_hash(before) != matrix_hash(before.T) != matrix_hash(before.T.bfloat16())


def test_a_refused_model_is_as_it_was():
    recipe = apply(tiny_causal_lm(), PLAN)
    model = tiny_causal_lm()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[1, 2] += 1e-3  # the last of the planned matrices
    before, pointers = weights(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"the weights of `model\.layers\.3\.mlp\.up_proj` are others"):
        apply(model, recipe)
    assert same(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers


# ---- other models ----------------------------------------------------------------------------------------------------


def test_what_differs_is_named():
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1")
    applied = tiny_causal_lm()
    apply(applied, recipe)
    with pytest.raises(
        ValueError, match=r"`model\.layers\.1\.mlp\.gate_proj` is already what .* make of it: there is nothing to do"
    ):
        apply(applied, recipe)
    with pytest.raises(ValueError, match=r"is bfloat16, but the recipe is for float32: load the model with dtype"):
        apply(tiny_causal_lm().bfloat16(), recipe)
    config = hf.LlamaConfig(**{**tiny_causal_lm().config.to_dict(), "intermediate_size": 48})
    with pytest.raises(ValueError, match=r"another model: `model\.layers\.1\.mlp\.gate_proj` is 48 x 32, not 64 x 32"):
        apply(hf.LlamaForCausalLM(config), recipe)
    with pytest.raises(
        ValueError, match=r"another model: this has `transformer\.h\.1\.mlp\.c_fc` where it had `model\.layers"
    ):
        apply(gpt2(), recipe)
    config.num_hidden_layers = 1
    with pytest.raises(
        ValueError,
        match=r"made for another model: the reduction 1.fc_in@0.1 matches no .*: layer 1: there are 0 with",
    ):
        apply(hf.LlamaForCausalLM(config), recipe)
    every = apply(tiny_causal_lm(), "*.fc_in@0.1")
    with pytest.raises(ValueError, match="cuts 1 matrices of this one, not 4"):
        apply(hf.LlamaForCausalLM(config), every)


def test_another_result_is_refused_and_rounding_only_on_demand():
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1")
    (matrix,) = recipe.matrices
    elsewhere = Recipe(recipe, [replace(matrix, after="0" * 64, norm=matrix.norm * (1 + 1e-8))])
    model = tiny_causal_lm()
    before = weights(model)
    with pytest.raises(ValueError, match=r"differs from the recipe by rounding .* exact=False"):
        apply(model, elsewhere)
    assert same(model, before)
    assert apply(model, elsewhere, exact=False).matrices == recipe.matrices
    other = Recipe(LaserPlan.parse("1.fc_in@0.2"), recipe.matrices)
    for exact in (True, False):
        model = tiny_causal_lm()
        with pytest.raises(
            ValueError, match=r"after the cut `model\.layers\.1\.mlp\.gate_proj` is not what the recipe"
        ):
            apply(model, other, exact=exact)
        assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", ["1.fc_in@0.1:scale=-1", "1.fc_in@0.1:band=0.5,scale=-1", "1.fc_in@0.2"])
def test_another_cut_is_no_rounding_whatever_its_norm(other, dtype):
    recipe = apply(tiny_causal_lm().to(dtype), "1.fc_in@0.1")
    changed = apply(tiny_causal_lm().to(dtype), other)
    (matrix,), (found,) = recipe.matrices, changed.matrices
    if "scale=-1" in other:
        matrix = replace(matrix, norm=found.norm)
    model = tiny_causal_lm().to(dtype)
    before = weights(model)
    with pytest.raises(ValueError, match="which is no rounding"):
        apply(model, Recipe(LaserPlan.parse(other), [matrix]), exact=False)
    assert same(model, before)


def test_what_is_rounded_otherwise_is_rounding():
    for dtype in (torch.float32, torch.bfloat16):
        recipe = apply(tiny_causal_lm().to(dtype), "1.fc_in@0.1")
        (matrix,) = recipe.matrices
        cut = tiny_causal_lm().to(dtype)
        apply(cut, recipe)
        weight = cut.model.layers[1].mlp.gate_proj.weight.detach()
        bits = weight.view(torch.int32 if dtype is torch.float32 else torch.int16)
        bits += torch.randint(-1, 2, bits.shape, generator=torch.Generator().manual_seed(0)).to(
            bits.dtype
        )  # last place
        elsewhere = replace(matrix, after=matrix_hash(weight), sketch=matrix_sketch(weight))
        model = tiny_causal_lm().to(dtype)
        with pytest.raises(ValueError, match="differs from the recipe by rounding"):
            apply(model, Recipe(recipe, [elsewhere]))
        assert apply(model, Recipe(recipe, [elsewhere]), exact=False).matrices == recipe.matrices


def test_a_sketch_beyond_all_numbers_is_another_cut():
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1")
    (matrix,) = recipe.matrices
    elsewhere = Recipe(recipe, [replace(matrix, after="0" * 64, sketch=(1e308,) * len(matrix.sketch))])
    with pytest.raises(ValueError, match=rf"after the cut `{matrix.name}` is not what the recipe says"):
        apply(tiny_causal_lm(), elsewhere, exact=False)


def test_without_a_sketch_nothing_but_the_same_bits_is_accepted():
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1")
    older = [replace(matrix, sketch=()) for matrix in recipe.matrices]
    assert apply(tiny_causal_lm(), Recipe(recipe, older), exact=False) == recipe
    with pytest.raises(ValueError, match="the recipe has no sketch of it"):
        apply(tiny_causal_lm(), Recipe(recipe, [replace(older[0], after="0" * 64)]), exact=False)


def test_how_the_paper_s_code_cuts_is_part_of_the_recipe():
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1:of=reference")
    assert recipe.reductions[0].of == "reference"
    again = tiny_causal_lm()
    assert apply(again, recipe).matrices == recipe.matrices
    assert apply(tiny_causal_lm(), "1.fc_in@0.1").matrices != recipe.matrices


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["laser.json", "laser.yaml"])
def test_files_hold_all_of_a_recipe(name, tmp_path):
    done = apply(tiny_causal_lm(), PLAN)
    recipe = Recipe(done, done.matrices, None, {"seed": 3}, done.versions)
    recipe.to_file(tmp_path / name)
    read = Recipe.from_file(tmp_path / name)
    assert isinstance(read, Recipe)
    assert (read, read.to_dict()) == (recipe, recipe.to_dict())
    assert read.numbers == {"seed": 3}
    assert (tmp_path / name).stat().st_size < 10_000
    assert "torch" in read.versions


def test_what_is_no_recipe_is_said(tmp_path):
    recipe = apply(tiny_causal_lm(), "1.fc_in@0.1")
    with pytest.raises(ValueError, match=r"must end in .json or .yaml"):
        recipe.to_file(tmp_path / "laser.txt")
    data = recipe.to_dict()
    for change, message in (
        ({"more": 1}, "expected the keys .*; got 'more', too"),
        *(
            ({"matrices": [{**data["matrices"][0], key: value}]}, message)
            for key, value, message in (
                ("norm", math.inf, "`norm` and `sketch` must be finite"),
                ("norm", None, "`norm` and `sketch` must be finite"),
                ("norm", "1", r"`matrices\[0\]\.norm`: expected a number, got '1'"),
                ("dtype", "load", "`dtype` must be a floating dtype of torch, got 'load'"),
                ("dtype", "int8", "`dtype` must be a floating dtype of torch"),
                ("shape", [3], r"`matrices\[0\]\.shape`: expected 2 values"),
                ("shape", [-3, 2], "`shape` must be rows and columns"),
                ("before", 5, r"`matrices\[0\]\.before`: expected text, got 5"),
            )
        ),
        ({"matrices": {}}, "`matrices`: expected a list"),
        ({"numbers": []}, "`numbers`: expected a mapping"),
        ({"reductions": [5]}, "a reduction must be"),
        ({"method": "exact"}, "expected the keys .*; got 'method', too"),
        ({"matrices": [{"name": "x", "shape": [1, 2]}]}, r"`matrices\[0\]`: `reduction`, `dtype`, .* is missing"),
    ):
        (tmp_path / "laser.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            Recipe.from_file(tmp_path / "laser.json")
