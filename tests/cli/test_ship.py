from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from multimodal import multimodal
from tiny import tiny_causal_lm, tiny_tokenizer
from weights import same

from laser_callback import load_factored
from laser_callback.cli.commands import main
from laser_callback.results.search import SearchResult
from laser_callback.surgery.swap import reduced

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def original(tmp_path) -> Path:
    tiny_causal_lm().save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_there_and_back_again(original, tmp_path, capsys):
    plan, out = "1.fc_in@0.1, 3.fc_out@0.05", tmp_path / "out"
    for form, name in (
        ("recipe", "laser.json"), ("dense", "dense"), ("factored", "thin"), ("undo", "undo.safetensors"),
    ):  # fmt: skip
        assert run("export", "--model", original, "--plan", plan, "--form", form, "--output", out / name) == 0
        assert str(out / name) in capsys.readouterr().out.replace("\n", "")
    assert run("apply", "--model", original, "--recipe", out / "laser.json", "--output", out / "applied") == 0
    assert digest(out / "applied" / "model.safetensors") == digest(out / "dense" / "model.safetensors")
    with reduced(tiny_causal_lm(), plan) as cut:
        loaded = hf.AutoModelForCausalLM.from_pretrained(out / "applied")
        expected = {m.name: m.parameter.detach().clone() for m, _ in cut.matrices}
    assert all(torch.equal(loaded.get_parameter(f"{name}.weight"), value) for name, value in expected.items())
    assert load_factored(out / "thin").num_parameters() < loaded.num_parameters()

    arguments = ("restore", "--model", out / "applied", "--undo", out / "undo.safetensors", "--output", out / "back")
    assert run(*arguments) == 0
    assert digest(out / "back" / "model.safetensors") == digest(original / "model.safetensors")
    assert hf.AutoTokenizer.from_pretrained(out / "back")("Rome").input_ids == tiny_tokenizer()("Rome").input_ids
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_recipe_needs_an_ending_before_the_model_is_loaded(capsys):
    assert run("export", "--model", "no-model", "--plan", "1.fc_in@0.1", "--form", "recipe", "--output", "out") == 2
    assert "`output` of a recipe must end in .json or .yaml, got 'out'" in capsys.readouterr().err


def test_plans_from_files_and_json_output(original, tmp_path, capsys):
    (tmp_path / "plan.txt").write_text("1.fc_in@0.9\n")
    assert run("export", "--model", original, "--plan", tmp_path / "plan.txt", "--form", "adapter", "--output",
               tmp_path / "adapter", "--json") == 0  # fmt: skip
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(tmp_path / "adapter")
    assert answer["bytes"] == sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert answer["recipe"]["reductions"] == [{"layer": 1, "matrix": "fc_in", "rho": 0.9}]


def test_rounding_is_accepted_on_demand(original, tmp_path, capsys):
    recipe = tmp_path / "laser.json"
    run("export", "--model", original, "--plan", "1.fc_in@0.1", "--form", "recipe", "--output", recipe)
    data = json.loads(recipe.read_text())
    data["matrices"][0]["after"] = "0" * 64
    recipe.write_text(json.dumps(data))
    arguments = ("apply", "--model", original, "--recipe", recipe, "--output", tmp_path / "applied")
    assert run(*arguments) == 2
    assert "differs from the recipe by rounding" in capsys.readouterr().err
    assert not (tmp_path / "applied").exists()
    assert run(*arguments, "--exact", "false") == 0
    assert same(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "applied"), reduced_state())


def reduced_state() -> dict[str, torch.Tensor]:
    model = tiny_causal_lm()
    with reduced(model, "1.fc_in@0.1"):
        return {name: value.clone() for name, value in model.state_dict().items()}


def test_mistakes_are_one_line(original, tmp_path, capsys):
    tiny_causal_lm(seed=1).save_pretrained(tmp_path / "other")
    recipe = tmp_path / "laser.json"
    run("export", "--model", original, "--plan", "1.fc_in@0.1", "--form", "recipe", "--output", recipe)
    (tmp_path / "plan.txt").write_text("1.fc_in@0.1")
    SearchResult(None, None, "no gain was confirmed", ("acc",), []).to_json(tmp_path / "search.json")
    capsys.readouterr()
    for arguments, message in (
        (("apply", "--model", tmp_path / "other", "--recipe", recipe), "laser.json: the weights of `model"),
        (("apply", "--model", original, "--recipe", tmp_path / "plan.txt"), "a plan without hashes, not a recipe"),
        (("export", "--model", original), "`--plan` is missing, and no result recommends one"),
        (("export", "--model", original, "--result", tmp_path / "search.json"), "no gain was confirmed"),
        (("restore", "--model", original, "--undo", recipe), "damaged, or no undo file"),
        (("export", "--model", tmp_path / "none", "--plan", "1.fc_in@0.1"), "none"),
    ):
        assert run(*arguments, "--output", tmp_path / "out") == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()


def test_a_file_for_another_model_and_one_that_was_used_already(original, tmp_path, capsys):
    recipe, undo, short = tmp_path / "laser.json", tmp_path / "undo.safetensors", tmp_path / "short"
    for form, file in (("recipe", recipe), ("undo", undo), ("dense", tmp_path / "cut")):
        assert run("export", "--model", original, "--plan", "3.fc_in@0.1", "--form", form, "--output", file) == 0
    config = hf.LlamaConfig(**{**tiny_causal_lm().config.to_dict(), "num_hidden_layers": 2})
    hf.LlamaForCausalLM(config).save_pretrained(short)
    capsys.readouterr()
    for arguments, message in (
        (("apply", "--model", short, "--recipe", recipe), "laser.json: the recipe was made for another model: the"),
        (("restore", "--model", short, "--undo", undo), "undo.safetensors: the recipe was made for another model: the"),
        (("apply", "--model", tmp_path / "cut", "--recipe", recipe), "make of it: there is nothing to do"),
        (("restore", "--model", original, "--undo", undo), "make of it: there is nothing to do"),
    ):
        assert run(*arguments, "--output", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert undo.stat().st_mode == recipe.stat().st_mode == (tmp_path / "cut" / "model.safetensors").stat().st_mode


def test_what_prepares_sound_goes_along(tmp_path):
    multimodal("Qwen2Audio").save_pretrained(tmp_path / "original")
    hearing = hf.WhisperFeatureExtractor(feature_size=8)
    hf.Qwen2AudioProcessor(hearing, tiny_tokenizer()).save_pretrained(tmp_path / "original")
    plan = ("--plan", "language_model.1.fc_in@0.1")
    assert run("export", "--model", tmp_path / "original", *plan, "--output", tmp_path / "cut") == 0
    written = hf.AutoProcessor.from_pretrained(tmp_path / "cut")
    assert type(written) is hf.Qwen2AudioProcessor
    assert written.feature_extractor.feature_size == 8
    assert type(hf.AutoModelForMultimodalLM.from_pretrained(tmp_path / "cut")) is hf.Qwen2AudioForConditionalGeneration


def test_what_is_left_out_is_told_and_what_cannot_be_with_the_reason(original, tmp_path, capsys):
    arguments = ("export", "--model", original, "--plan", "1.writes@0, 2.writes@0")
    assert run(*arguments, "--output", tmp_path / "cut") == 0
    assert ", without layers 1, 2 of model.layers\n" in capsys.readouterr().out
    assert hf.AutoConfig.from_pretrained(tmp_path / "cut").num_hidden_layers == 2
    recipe = tmp_path / "cut" / "laser.json"
    assert run("apply", "--model", original, "--recipe", recipe, "--output", tmp_path / "applied", "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["left_out"] == {"model.layers": [1, 2]}
    assert digest(tmp_path / "applied" / "model.safetensors") == digest(tmp_path / "cut" / "model.safetensors")

    assert run("export", "--model", original, "--plan", "*.writes@0", "--output", tmp_path / "none") == 0
    shown = capsys.readouterr()
    assert "without" not in shown.out
    assert "note: layers 0, 1, 2, 3 of model.layers could not be left out: no layer of" in shown.err
    assert ".py" not in shown.err
