"""Models that stay in their files are cut and written as those in memory are, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from safetensors.torch import load_file, save_file
from small_models import gpt2, mixtral
from tiny import tiny_causal_lm, tiny_tokenizer
from weights import same, weights

from laser_callback.cli.commands import main
from laser_callback.plans.matrices import find_matrices
from laser_callback.shipping.export import save_reduced
from laser_callback.shipping.undo import restore
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.inspection import inspect_model
from laser_callback.spectra.store import Spectra
from laser_callback.support.in_files import in_files, open_pretrained, save_dense
from laser_callback.support.pretrained import load_pretrained
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.stored import has_values, lies_in_file
from laser_callback.surgery.record import apply

BESIDE = ("config.json", "generation_config.json", "laser.json", "README.md", "tokenizer.json")


def tied() -> hf.PreTrainedModel:
    config = tiny_causal_lm().config
    config.tie_word_embeddings = True
    return hf.LlamaForCausalLM(config)


def family(name: str) -> Callable[[], Any]:
    return FAMILIES[name].make


def saved(folder: Path, make: Callable[[], Any] = tiny_causal_lm, **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sharded(folder: Path, make: Callable[[], Any] = tiny_causal_lm) -> Path:
    saved(folder, make, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that is in the files of weights."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def assert_as_in_memory(original: Path, plan: str, out: Path, form: Any = "dense", **options: Any) -> None:
    """Of the two ways, the same files beside the weights, and the same weights; and these can be loaded."""
    opened = open_pretrained(original)
    assert in_files(opened)
    assert all(parameter.is_meta and has_values(parameter) for parameter in opened.parameters())
    recipes = [
        save_reduced(model, plan, out / where, form, tokenizer=tiny_tokenizer(), **options)
        for where, model in (("files", opened), ("memory", load_pretrained(original)))
    ]
    assert recipes[0].to_dict() == recipes[1].to_dict()
    for name in BESIDE:
        assert (out / "files" / name).exists() == (out / "memory" / name).exists(), name
        if (out / "files" / name).exists():
            assert (out / "files" / name).read_bytes() == (out / "memory" / name).read_bytes(), name
    if form == "dense":
        streamed, whole = load_pretrained(out / "files"), load_pretrained(out / "memory")
        assert same(streamed, weights(whole))
        assert not same(streamed, weights(load_pretrained(original)))
        assert {n: p.dtype for n, p in streamed.named_parameters()} == {n: p.dtype for n, p in whole.named_parameters()}


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, "1.fc_in@0.1, *.q_proj@0.5, 3.fc_out@0.05:keep=tail"),
        (lambda: tiny_causal_lm().bfloat16(), "*.mlp@places-0-4+7, 0.out_proj@energy-0.9"),
        (lambda: tiny_causal_lm().half(), "*.all@global-0.3"),
        (gpt2, "1.q_proj@0:bias=cut, 1.v_proj@0.5, 2.fc_in@0.1:of=reference, 0.fc_out@0.1:noise=3"),
        (family("falcon"), "*.q_proj@0.5, 1.v_proj@0.5, 1.fc_in@0.2"),
        (family("phi3"), "0.k_proj@0.5, 1.fc_up@0.2, 1.fc_in@0.1:blocks=2"),
        (family("gpt_neox"), "*.v_proj@0:bias=cut, 0.q_proj@0.5"),
        (family("t5"), "decoder.0.fc_in@0.5, encoder.1.q_proj@0.5"),
        (family("bert"), "*.fc_in@0:bias=cut, 1.fc_out@0.5"),
        (tied, "/lm_head|.*embed_tokens/@0.5, 1.fc_in@0.1"),
    ],
    ids=["llama", "bfloat16", "float16", "gpt2", "falcon", "phi3", "neox", "t5", "bert", "tied"],
)
@pytest.mark.parametrize("save", [saved, sharded], ids=["one file", "shards"])
def test_bit_for_bit_as_in_memory(make, plan, save, tmp_path):
    original = save(tmp_path / "original", make)
    before = digests(original)
    assert_as_in_memory(original, plan, tmp_path)
    assert digests(original) == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    names = {file.name for file in original.glob("model*")}
    assert {file.name for file in (tmp_path / "files").glob("model*")} == names
    assert list(tensors(tmp_path / "files")) == list(tensors(original))


def test_only_files_with_a_cut_matrix_are_others(tmp_path):
    original = sharded(tmp_path / "original")
    save_reduced(open_pretrained(original), "2.fc_in@0.1", tmp_path / "cut")
    before, after = digests(original), digests(tmp_path / "cut")
    index = json.loads((original / "model.safetensors.index.json").read_text())
    assert json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text()) == index
    weights_of = {name for name in before if name.endswith(".safetensors")}
    changed = {name for name in weights_of if before[name] != after[name]}
    assert changed == {index["weight_map"]["model.layers.2.mlp.gate_proj.weight"]}
    assert all((original / name).stat().st_ino != (tmp_path / "cut" / name).stat().st_ino for name in weights_of)


def test_a_published_checkpoint_with_other_names_and_more_in_it(tmp_path, recwarn):
    """GPT-2 on the hub: names without `transformer.`, masks that are not used, and no head."""
    saved(tmp_path / "original", gpt2)
    file = tmp_path / "original" / "model.safetensors"
    content = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    save_file(content | {"h.0.attn.bias": torch.ones(4, 4), "h.9.stray": torch.ones(3)}, file, {"format": "pt"})
    assert_as_in_memory(tmp_path / "original", "1.q_proj@0.25, 0.fc_out@0.1", tmp_path)
    said = {str(each.message) for each in recwarn if "unused" in str(each.message)}
    assert len(said) == 1, "in memory and in files the same"
    assert "leaves 1 weight of its files unused, which no layer is called: " in said.pop()
    written = load_file(tmp_path / "files" / "model.safetensors")
    assert list(written) == sorted(content)


def test_both_names_of_a_tied_weight(tmp_path):
    saved(tmp_path / "original", tied)
    file = tmp_path / "original" / "model.safetensors"
    content = load_file(file)
    embedding = content["model.embed_tokens.weight"]
    save_file(content | {"lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    assert_as_in_memory(tmp_path / "original", "/.*embed_tokens|lm_head/@0.5, 1.fc_in@0.1", tmp_path)
    written = load_file(tmp_path / "files" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], embedding)
    save_file(content | {"lm_head.weight": embedding + 1}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="loaded into memory as a whole: `.*` and `.*` are one weight by its config"):
        assert not in_files(open_pretrained(tmp_path / "original"))


def test_weights_that_are_made_otherwise_on_loading_are_loaded_and_said(tmp_path):
    cast = saved(tmp_path / "cast")
    (cast / "config.json").write_text((cast / "config.json").read_text().replace("float32", "bfloat16"))
    with pytest.warns(UserWarning, match=r"whole: `.*` is F32 in its file and loaded as torch.bfloat16"):
        assert open_pretrained(cast).dtype == torch.bfloat16
    pickled = saved(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"whole: it has no model.safetensors"):
        assert same(open_pretrained(pickled), weights(tiny_causal_lm()))
    missing = saved(tmp_path / "missing")
    content = load_file(missing / "model.safetensors")
    del content["model.norm.weight"]
    save_file(content, missing / "model.safetensors", {"format": "pt"})
    with (
        pytest.warns(UserWarning, match=r"whole: `model.norm.weight` is in none of its files"),
        pytest.raises(ValueError, match=r"has no weights for model.norm.weight"),
    ):
        open_pretrained(missing)


# ---- the other forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["factored", "adapter"])
def test_other_folders(form, tmp_path):
    original = sharded(tmp_path / "original")
    assert_as_in_memory(original, "1.fc_in@0.9" if form == "adapter" else "1.fc_in@0.1", tmp_path, form)
    assert same_tensors(tensors(tmp_path / "files"), tensors(tmp_path / "memory"))


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, "*.mlp@0.1, 0.q_proj@0.5"),
        (gpt2, "*.q_proj@0:bias=cut, 1.fc_in@0.1"),
        (mixtral, "0.q_proj@0.5, 1.fc_out@0.2"),
        (family("phi3"), "*.fc_up@0.1, *.v_proj@0.2"),
    ],
    ids=["llama", "gpt2", "mixtral", "phi3"],
)
def test_undo_there_and_back(make, plan, tmp_path):
    original = saved(tmp_path / "original", make)
    opened, loaded = open_pretrained(original), load_pretrained(original)
    save_reduced(opened, plan, tmp_path / "undo", "undo")
    save_reduced(loaded, plan, tmp_path / "same", "undo")
    assert (tmp_path / "undo").read_bytes() == (tmp_path / "same").read_bytes()
    recipe = apply(opened, plan)
    save_dense(opened, tmp_path / "cut")
    cut = open_pretrained(tmp_path / "cut")
    assert restore(cut, tmp_path / "undo").to_dict() == recipe.to_dict()
    save_dense(cut, tmp_path / "back")
    assert same_tensors(tensors(tmp_path / "back"), tensors(original))


def test_a_model_that_is_refused_is_as_it_was(tmp_path):
    original = saved(tmp_path / "original")
    save_reduced(open_pretrained(original), "1.fc_in@0.1", tmp_path / "undo", "undo")
    opened = open_pretrained(original)
    with pytest.raises(ValueError, match="there is nothing to do"):
        restore(opened, tmp_path / "undo")
    save_dense(opened, tmp_path / "same")
    assert digests(tmp_path / "same")["model.safetensors"] == digests(original)["model.safetensors"]


@pytest.mark.parametrize("save", [saved, sharded], ids=["one file", "shards"])
def test_delta_with_a_base_in_a_folder(save, tmp_path):
    base, tuned = save(tmp_path / "base"), tiny_causal_lm()
    torch.manual_seed(1)
    for name in ("gate_proj", "down_proj"):
        tuned.model.layers[1].mlp.get_submodule(name).weight.data += 0.02 * torch.randn(1)
    save(tmp_path / "tuned", lambda: tuned)
    plan = "1.fc_in@k1:cut=delta, 1.fc_out@0.5:cut=delta, 0.q_proj@0.5"
    opened, loaded = open_pretrained(tmp_path / "tuned"), load_pretrained(tmp_path / "tuned")
    bases = [BaseWeights(base, model) for model in (opened, loaded)]
    assert bases[0].digest == bases[1].digest
    assert bases[0].changed_besides([]) == bases[1].changed_besides([]) != []
    recipes = [
        save_reduced(model, plan, tmp_path / where, spectra=Spectra(base=base))
        for where, model, base in zip(("files", "memory"), (opened, loaded), bases, strict=True)
    ]
    assert recipes[0].to_dict() == recipes[1].to_dict()
    assert same_tensors(tensors(tmp_path / "files"), tensors(tmp_path / "memory"))


def test_inspection(tmp_path):
    original = sharded(tmp_path / "original", gpt2)
    assert inspect_model(open_pretrained(original)).to_dict() == inspect_model(load_pretrained(original)).to_dict()


def test_dropped_layers_are_left_out_where_both_models_have_room(tmp_path, monkeypatch):
    original = sharded(tmp_path / "original")
    opened = open_pretrained(original)
    recipe = save_reduced(opened, "1.writes@0, 2.writes@0, 0.q_proj@0.5", tmp_path / "small")
    in_memory = save_reduced(load_pretrained(original), "1.writes@0, 2.writes@0, 0.q_proj@0.5", tmp_path / "memory")
    assert recipe.to_dict() == in_memory.to_dict()
    assert recipe.left_out == {"model.layers": [1, 2]}
    assert same_tensors(tensors(tmp_path / "small"), tensors(tmp_path / "memory"))
    monkeypatch.setattr("laser_callback.shipping.fewer_layers.available_memory", lambda: 1000)
    with pytest.warns(UserWarning, match=r"layer 1 of model.layers could not be left out: both models would be run"):
        recipe = save_reduced(opened, "1.writes@0", tmp_path / "zeros")
    assert recipe.left_out == {}
    assert not load_pretrained(tmp_path / "zeros").model.layers[1].mlp.down_proj.weight.any()


# ---- interrupts and damage -------------------------------------------------------------------------------------------


class Stopped(PhaseProgress):
    """Ctrl-C after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__(enabled=False)
        self.left = after

    def advance(self, amount: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_export_leaves_nothing_and_can_be_begun_anew(tmp_path, own_cache):
    original = sharded(tmp_path / "original")
    spectra, after = Spectra.default(), 0
    while True:
        opened = open_pretrained(original, scratch=tmp_path)
        try:
            save_reduced(opened, "*.fc_in@0.1", tmp_path / "cut", spectra=spectra, progress=Stopped(after))
            break
        except KeyboardInterrupt:
            assert {file.name for file in tmp_path.iterdir()} <= {"original", "cache"}
            where = [matrix.parameter for matrix in find_matrices(opened)]
            assert all(map(lies_in_file, where))
            save_dense(opened, tmp_path / "untouched")
            assert same_tensors(tensors(tmp_path / "untouched"), tensors(original))
            shutil.rmtree(tmp_path / "untouched")
            after += 1
    assert after > 6
    assert spectra.factorised == 4, "what was factorised before the interrupt is not factorised again"
    save_reduced(tiny_causal_lm(), "*.fc_in@0.1", tmp_path / "memory")
    assert same_tensors(tensors(tmp_path / "cut"), tensors(tmp_path / "memory"))


def damage_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def damage_gone(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def damage_renamed(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00002-of", "00099-of"))


def damage_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_short, "model-00002-of-0"),
        (damage_gone, "and there is no such file beside it"),
        (damage_renamed, "names model-00099-of-0"),
        (damage_outside, "`weight_map` must name files beside it, got '../model-00002-of"),
        (damage_index, "expected `weight_map` with the file of each weight"),
    ],
)
@pytest.mark.parametrize("command", ["export", "inspect"])
def test_damaged_checkpoints_are_told_in_a_line(damage, said, command, tmp_path, capsys, own_cache):
    original = sharded(tmp_path / "original")
    damage(original)
    capsys.readouterr()
    arguments = {
        "export": ["export", "--model", str(original), "--plan", "1.fc_in@0.1", "--output", str(tmp_path / "out")],
        "inspect": ["inspect", str(original)],
    }[command]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().split("\n")) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_shorter_meanwhile(tmp_path):
    original = sharded(tmp_path / "original")
    opened = open_pretrained(original)
    for file in original.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10_000])
    with pytest.raises(OSError, match="has become shorter while it was read"):
        save_reduced(opened, "*.fc_in@0.1", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
