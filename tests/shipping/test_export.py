from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
import yaml
from peft import LoraConfig, get_peft_model
from small_models import PLAN, gpt2, mixtral
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer
from weights import same, weights

from laser_callback.compare.module import LaserModule
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.model_card import hub_name
from laser_callback.reports.row_text import ahead_text, change_text
from laser_callback.results.comparison import LaserResult
from laser_callback.results.evidence import numbers_of
from laser_callback.shipping.export import RECIPE, save_reduced
from laser_callback.shipping.factored_file import load_factored
from laser_callback.shipping.undo import restore
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import appearing
from laser_callback.support.pretrained import load_pretrained
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import apply
from laser_callback.surgery.swap import reduced


def card(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, about, body = text.split("---\n", 2)
    return yaml.safe_load(about), body


# ---- what is written about a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize(
    "flaw", [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 7}, {"length_penalty": 2.0}, {"pad_token_id": -1}]
)
def test_a_generation_config_is_written_as_it_is(form, flaw, tmp_path):
    model = tiny_causal_lm()
    model.generation_config.update(**flaw)
    with pytest.raises(ValueError, match="Fix these issues"):
        model.save_pretrained(tmp_path / "plain")
    before = model.generation_config.to_dict()
    save_reduced(model, "*.fc_in@0.1", tmp_path / "cut", form)
    assert model.generation_config.to_dict() == before
    assert model.can_generate()
    assert "can_generate" not in vars(model)
    loaded = hf.GenerationConfig.from_pretrained(tmp_path / "cut")
    assert {name: getattr(loaded, name) for name in flaw} == flaw
    load = load_factored if form == "factored" else hf.AutoModelForCausalLM.from_pretrained
    assert {name: getattr(load(tmp_path / "cut").generation_config, name) for name in flaw} == flaw


def test_a_published_generation_config_comes_through_as_its_file(tmp_path):
    model = tiny_causal_lm()
    model.save_pretrained(tmp_path / "original")
    published = {
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "transformers_version": "4.31.0",
    }
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps(published))
    save_reduced(load_pretrained(tmp_path / "original"), "0.fc_in@0.1", tmp_path / "cut")
    found = json.loads((tmp_path / "cut" / "generation_config.json").read_text())
    assert {**found, "transformers_version": "4.31.0"} == published


def odd_config(model: nn.Module) -> None:
    model.config.temperature = 0.6


def impossible_generation(model: nn.Module) -> None:
    model.generation_config.early_stopping = "sometimes"


def generation_that_is_no_json(model: nn.Module) -> None:
    model.generation_config.stop = object()


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("spoil", [odd_config, impossible_generation, generation_that_is_no_json])
def test_what_cannot_be_written_is_refused_before_the_work(spoil, form, tmp_path):
    model, spectra = tiny_causal_lm(), Spectra()
    spoil(model)
    with pytest.raises((ValueError, TypeError)):
        save_reduced(model, "*.fc_in@0.1", tmp_path / "cut", form, spectra=spectra)
    assert spectra.factorised == 0
    assert not list(tmp_path.iterdir())


# ---- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, PLAN),
        (gpt2, "1.q_proj@0.25, 1.v_proj@0.5, 2.fc_in@0.1"),  # fused, transposed, tied output layer
        (mixtral, "1.fc_in[2]@0.1, 0.fc_out@0.2, 0.q_proj@0.5"),  # saved expert by expert
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_folder_is_the_reduced_model_for_plain_transformers(make, plan, dtype, tmp_path):
    model = make().to(dtype)
    before = weights(model)
    with reduced(model, plan):
        expected = weights(model)
    recipe = save_reduced(model, plan, tmp_path / "dense")
    assert same(model, before)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert loaded.dtype == dtype
    assert same(loaded, expected)
    assert Recipe.from_file(tmp_path / "dense" / RECIPE).to_dict() == recipe.to_dict()


def test_the_tokenizer_goes_along(tmp_path):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    save_reduced(module, "1.fc_in@0.1", tmp_path / "dense")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("The capital").input_ids == module.tokenizer("The capital").input_ids


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers cannot tell gguf's version there")
def test_models_that_were_dequantised_can_be_saved(tmp_path):
    """As a model loaded from GGUF, which still says that it is quantised."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = gguf_model(gguf, tmp_path / "tiny.gguf")
    assert model.hf_quantizer is not None
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "refused")
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    with reduced(model, "1.fc_in@0.1"):
        expected = weights(model)
    save_reduced(model, "1.fc_in@0.1", tmp_path / "dense")
    save_reduced(model, "1.fc_in@0.1", tmp_path / "thin", "factored")
    assert (model.hf_quantizer, model.config.quantization_config) == (quantizer, config)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert same(loaded, expected)
    for folder in ("dense", "thin"):
        assert "quantization_config" not in (tmp_path / folder / "config.json").read_text()


def gguf_model(gguf: Any, file: Path) -> nn.Module:
    """The tiny Llama, through a GGUF file."""
    model = tiny_causal_lm()
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(width, width)}) for _ in range(3)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer["fc1"](inputs).relu()
        return inputs

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("mean", self(batch).double().mean())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7


def test_a_checkpoint_is_the_reduced_module(tmp_path):
    module, data = Module(24, seed=2), DataLoader(torch.randn(8, 24), batch_size=4)
    before = weights(module)
    save_reduced(module, "1.fc_in@0.1", tmp_path / "cut.ckpt", "checkpoint")
    assert same(module, before)
    with reduced(module, "1.fc_in@0.1"):
        expected = weights(module)
        (metrics,) = quiet_trainer(default_root_dir=tmp_path).test(module, data, verbose=False)
    assert same(Module.load_from_checkpoint(tmp_path / "cut.ckpt"), expected)  # with its hyperparameters
    fresh = Module(24)
    (again,) = quiet_trainer(default_root_dir=tmp_path).test(
        fresh, data, ckpt_path=str(tmp_path / "cut.ckpt"), verbose=False
    )
    assert again == metrics
    content = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert content["mine"] == 7
    assert isinstance(Recipe.of(content["laser"]), Recipe)


def test_a_checkpoint_in_the_middle_of_training_disturbs_nothing(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            save_reduced(module, "1.fc_in@0.1", tmp_path / f"{trainer.global_step}.ckpt", "checkpoint")
            assert module.trainer is trainer
            assert trainer.lightning_module is module

    data = DataLoader(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), batch_size=4)
    states = []
    for callbacks in ([], [Save()]):
        module = Module()
        quiet_trainer(*callbacks, default_root_dir=tmp_path, max_epochs=2).fit(module, data)
        states.append(weights(module))
    assert same(module, states[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"]


def test_any_module_has_recipes_and_undo_files(tmp_path):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(16, 16)}) for _ in range(2)])})
    before = weights(model)
    save_reduced(model, "1.fc_in@0.1", tmp_path / "laser.yaml", "recipe")
    save_reduced(model, "1.fc_in@0.1", tmp_path / "undo", "undo")
    apply(model, Recipe.from_file(tmp_path / "laser.yaml"))
    assert not same(model, before)
    restore(model, tmp_path / "undo")
    assert same(model, before)


# ---- numbers and the card --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> LaserResult:
    from laser_callback import FactsDataModule

    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="1.fc_in@0.1", controls=True, report=False)
    facts = [
        {"id": f"f{i}", "prompt": f"The capital of {i} is", "answer": answer, "group": "capital", "subject": str(i)}
        for i, answer in enumerate(["Paris", "Rome", "Canberra", "true", "false", "yen"] * 4)
    ]
    quiet_trainer().validate(module, datamodule=FactsDataModule(facts, module.tokenizer), verbose=False)
    return module.result


def test_the_card_carries_the_numbers(result, tmp_path):
    recipe = save_reduced(tiny_causal_lm(), "1.fc_in@0.1", tmp_path / "dense", result=result)
    about, body = card(tmp_path / "dense")
    assert about == {"library_name": "transformers", "tags": ["laser", "rank-reduction"]}
    row = result["laser"]["first_token_accuracy"]
    assert f"**first_token_accuracy** | {row.original:.1%} | {row.reduced:.1%}" in body
    assert f"| {row.fixed} / {row.broken} | {row.n} |" in body
    for text in ("`1.fc_in@0.1`", "64 x 32", recipe.matrices[0].before[:12], "the same matrices zeroed", "torch"):
        assert text in body
    noise = result.controls["laser"]["noise"].ahead_in("first_token_accuracy")
    assert (
        f"Control, noise of the same size, the mean of several seeds: first_token_accuracy {noise.original:.1%}" in body
    )
    assert f"; {ahead_text(noise)}, {change_text(noise)}." in body
    assert str(tmp_path) not in body
    kept = Recipe.from_file(tmp_path / "dense" / RECIPE)
    assert isinstance(kept, Recipe)
    numbers = LaserResult.from_dict(kept.numbers["comparison"])
    assert numbers["laser"].rows == result["laser"].rows
    assert numbers.controls["laser"]["noise"].rows == result.controls["laser"]["noise"].rows
    assert numbers.controls["laser"]["noise"].passes == []
    assert (tmp_path / "dense" / RECIPE).stat().st_size < 50_000
    # A recipe brings its numbers along.
    save_reduced(tiny_causal_lm(), kept, tmp_path / "again")
    assert card(tmp_path / "again") == card(tmp_path / "dense")


def test_without_numbers_nothing_is_claimed(tmp_path):
    save_reduced(tiny_causal_lm(), "1.fc_in@0.1, 2.fc_in@0.9", tmp_path / "thin", "factored")
    _, body = card(tmp_path / "thin")
    assert "nothing is claimed about this model's quality" in body
    assert "rank 3, thin" in body
    assert re.search(r"`model\.layers\.2\.mlp\.gate_proj` is dense: its rank is 28", body)


def test_a_search_brings_its_sets_seed_and_verdict(result):
    data = {
        "plan": None, "found": "1.fc_in@0.1", "base": None, "reason": "a gain is not confirmed", "judgements": [],
        "confirmed": result.to_dict(), "sets": {"confirm": 24}, "settings": {"seed": 5}, "warnings": ["few examples"],
        "objective": ["acc"], "candidates": [],
    }  # fmt: skip
    plan = LaserPlan.parse("1.fc_in@0.1")
    numbers = numbers_of(data, plan)
    assert numbers["verdict"] == "not recommended: a gain is not confirmed"
    assert (numbers["seed"], numbers["sets"]) == (5, {"confirm": 24})
    with pytest.raises(ValueError, match="has confirmed nothing: a gain is not confirmed"):
        numbers_of({**data, "confirmed": None}, plan)
    assert numbers_of({**data, "base": "abc"}, plan) == numbers, "the plan does not cut the difference to a base"
    with pytest.raises(ValueError, match="about cuts against the base abc, not None"):
        numbers_of({**data, "base": "abc"}, LaserPlan.parse("1.fc_in@0.1:cut=delta"))


def test_numbers_of_another_plan_are_refused(result, tmp_path):
    with pytest.raises(ValueError, match=r"must be about the plan 2\.fc_in@0\.1, got one about 1\.fc_in@0\.1"):
        save_reduced(tiny_causal_lm(), "2.fc_in@0.1", tmp_path / "dense", result=result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"), [("a/b-1.5", "a/b-1.5"), ("gpt2", None), ("", None), (None, None), ("/somewhere/x", None)]
)
def test_only_names_of_the_hub_are_published(name, expected):
    assert hub_name(name) == expected


# ---- refused, whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "form", "message"),
    [
        (tiny_causal_lm, "zip", "`form` must be one of recipe, dense, .* got 'zip'"),
        (tiny_causal_lm, "checkpoint", "must be a LightningModule to be written as a checkpoint, got LlamaForCausalLM"),
        (Module, "dense", r"must be a transformers model or hold one, got Module with none; .*form='checkpoint'"),
        (lambda: nn.ModuleList([tiny_causal_lm(), gpt2()]), "dense", "with LlamaForCausalLM, GPT2LMHeadModel"),
        (
            lambda: get_peft_model(tiny_causal_lm(), LoraConfig()),
            "dense",
            r"has adapters, first at .* merge them first",
        ),
    ],
)
def test_models_that_have_no_such_form(make: Callable[[], nn.Module], form, message, tmp_path):
    model = make()
    plan = "1.fc_in@0.1" if isinstance(model, Module) else "/.*layers.1.mlp.gate_proj.*/@0.1"
    with pytest.raises(ValueError, match=message):
        save_reduced(model, plan, tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["recipe", "dense", "factored", "adapter", "undo"])
def test_what_exists_stays(form, tmp_path):
    target = tmp_path / "out.json"
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists already: name another place"):
        save_reduced(tiny_causal_lm(), "1.fc_in@0.9, 2.fc_in@0.1" if form != "adapter" else "1.fc_in@0.9", target, form)
    assert list(target.iterdir()) == []


def test_two_that_write_to_one_place_do_not_mix(tmp_path):
    barrier, errors = threading.Barrier(2), []

    def write(author: str) -> None:
        try:
            with appearing(tmp_path / "out") as folder:
                folder.mkdir()
                for name in "ab":
                    (folder / name).write_text(author)
                barrier.wait(5)
        except FileExistsError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(author,)) for author in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("form", ["dense", "factored", "adapter", "undo", "recipe"])
def test_interrupted_writing_leaves_nothing(form, tmp_path, monkeypatch):
    model = tiny_causal_lm()
    before, modules = weights(model), list(model.modules())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("laser_callback.support.files._flush", interrupt)
    plan = "1.fc_in@0.9" if form == "adapter" else "1.fc_in@0.1"
    with pytest.raises(KeyboardInterrupt):
        save_reduced(model, plan, tmp_path / "out.json", form)
    assert list(tmp_path.iterdir()) == []
    assert same(model, before)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
