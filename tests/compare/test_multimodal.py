"""Models that also take images or sound, used for text: scored as their own class, and cut where text goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from brute_force import assert_close, brute_force
from fact_rows import facts, run
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from multimodal import MULTIMODAL, multimodal, paligemma
from small_models import t5
from tiny import tiny_tokenizer

from laser_callback import LaserModule
from laser_callback.compare.controls import random_plan
from laser_callback.data import ProbesDataModule
from laser_callback.plans import LaserPlan
from laser_callback.plans.target import targets


def _text_part(name: str) -> str:
    return "text_model" if name == "Idefics3" else "language_model"


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_folder_is_scored_on_text_as_its_own_class(name: str, trainer: Any, tmp_path: Path) -> None:
    model, tokenizer, rows = multimodal(name), tiny_tokenizer(), facts(n=8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = LaserModule(str(tmp_path / "model"))
    assert type(module.model) is type(model)
    saved, loaded = model.state_dict(), module.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(weight, loaded[key]) for key, weight in saved.items())
    assert not module.masked
    assert_close(run(trainer, module, rows), brute_force(model, tokenizer, rows)["metrics"])


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_model_is_cut_where_text_goes_through(name: str, trainer: Any) -> None:
    part = _text_part(name)
    plan, tokenizer, rows = f"{part}.1.fc_in@0.1", tiny_tokenizer(), facts(n=8)
    module = LaserModule(model := multimodal(name), tokenizer, plan=plan, report=False)
    run(trainer, module, rows)
    before = brute_force(model, tokenizer, rows)["metrics"]["log_loss"]
    ((matrix, _),) = LaserPlan.parse(plan).resolve(model)
    assert part in matrix.name
    assert matrix.name.endswith("layers.1.mlp.gate_proj")
    left, values, right = torch.linalg.svd(matrix.value.double(), full_matrices=False)
    matrix.value.copy_((left[:, :3] * values[:3]) @ right[:3])
    row = module.result["laser"]["log_loss"]
    after = brute_force(model, tokenizer, rows)["metrics"]["log_loss"]
    assert (row.original, row.reduced) == (pytest.approx(before, abs=1e-5), pytest.approx(after, abs=1e-5))
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_short_name_never_cuts_what_sees_or_hears(name: str) -> None:
    model = multimodal(name)
    for layer in (0, -1, "*", 3):
        try:
            found = LaserPlan.parse(f"{layer}.fc_in@0.1").resolve(model)
        except ValueError as error:
            known = str(error)
            assert "several layer stacks" in known or (layer == 3 and "there are" in known)
        else:
            raise AssertionError([matrix.name for matrix, _ in found])
    deep = LaserPlan.parse("visual.3.fc_in@0.1").resolve(multimodal("Qwen2VL"))
    assert [matrix.name for matrix, _ in deep] == ["model.visual.blocks.3.mlp.fc1"]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_what_a_search_finds_around_a_model_can_be_cut_in_it(name: str) -> None:
    module = LaserModule(multimodal(name), tiny_tokenizer())
    for target in targets(module, "*.all"):
        if target.address["layer"] is not None:
            alone = LaserPlan([target.at(0.1)]).resolve(module.model)
            assert [f"model.{matrix.name}" for matrix, _ in alone] == [matrix.name for matrix in target.matrices]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_random_control_is_cut_where_text_goes_through(name: str) -> None:
    model, plan = multimodal(name), LaserPlan.parse(f"{_text_part(name)}.1.fc_up@0.1")
    for seed in range(20):
        ((matrix, _),) = random_plan(model, plan, seed).resolve(model)
        assert _text_part(name) in str(matrix.stack)


def test_a_model_is_asked_probes(trainer: Any) -> None:
    module = LaserModule(multimodal("Qwen2VL"), tokenizer := tiny_tokenizer())
    probes = [{"prompt": "The capital of France is", "should": "answer"}, {"prompt": "People", "should": "refuse"}]
    (logged,) = trainer().validate(module, datamodule=ProbesDataModule(probes, tokenizer, max_new_tokens=3))
    assert logged == {"answer_rate": 1.0, "refusal_rate": 0.0}


def _florence() -> hf.PreTrainedModel:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sees = {"depths": [1], "embed_dim": [16], "num_heads": [2], "num_groups": [2], "patch_size": [3]}
    sees |= {"patch_stride": [2], "patch_padding": [1], "patch_prenorm": [False], "projection_dim": 16}
    text = {"model_type": "bart", "vocab_size": 64, **sizes, **heads}
    return hf.Florence2ForConditionalGeneration(hf.Florence2Config(text_config=text, vision_config=sees))


def _blip() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "encoder_hidden_size": 16, "bos_token_id": 0, "sep_token_id": 1, **sizes}
    sees = {"image_size": 8, "patch_size": 4, **sizes}
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=sees))


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (t5, "got T5ForConditionalGeneration, an encoder-decoder"),
        (_florence, "got Florence2ForConditionalGeneration, an encoder-decoder"),
        (_blip, "got BlipForConditionalGeneration, which needs `pixel_values` beside text"),
        (paligemma, "got PaliGemmaForConditionalGeneration, which reads its prompt in both directions"),
    ],
)
def test_others_are_refused_with_what_to_do(make: Callable[[], Any], said: str, folder: bool, tmp_path: Path) -> None:
    model, tokenizer = make(), tiny_tokenizer()
    if folder:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    with pytest.raises(MisconfigurationException, match=said) as error:
        LaserModule(model, tokenizer)
    assert "Use LaserCallback with a LightningModule of your own" in str(error.value)


def test_a_body_without_a_head_is_refused_with_the_class_to_load() -> None:
    body = multimodal("Llava").model
    with pytest.raises(MisconfigurationException, match=r"got LlavaModel\. .*AutoModelForMultimodalLM"):
        LaserModule(body, tiny_tokenizer())


def test_the_text_part_alone_is_a_causal_model(trainer: Any, tmp_path: Path) -> None:
    whole, tokenizer, rows = multimodal("Mllama"), tiny_tokenizer(), facts(n=8)
    whole.save_pretrained(tmp_path / "model")
    part = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(part) is hf.MllamaForCausalLM
    assert_close(run(trainer, LaserModule(part, tokenizer), rows), brute_force(whole, tokenizer, rows)["metrics"])
