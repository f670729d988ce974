"""Model folders that others have written: loaded whole, or refused with what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_models import gpt2, t5
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import Tensor

from laser_callback.compare.language_model import load_language_model
from laser_callback.compare.module import LaserModule
from laser_callback.support.pretrained import load_pretrained

KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_causal_lm().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [load_pretrained, load_language_model])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k: v for k, v in w.items() if k != KEY}, rf"no weights for {KEY}"),
        (lambda w: {k.replace("1.mlp.up", "1.mlp.upp"): v for k, v in w.items()}, rf"{KEY}.*it has .*upp_proj"),
        (lambda w: {k: v[:3].clone() if k == KEY else v for k, v in w.items()}, rf"other shapes for {KEY} \(\(3, 32\)"),
    ],
    ids=["missing", "renamed", "shape"],
)
def test_weights_that_would_be_random_are_refused(
    load: Callable[[str], object], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, folder: Path
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load(str(folder))


@pytest.fixture
def partial(folder: Path) -> Path:
    """A model in whose folder a weight is missing."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != KEY}, file, metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_missing_weights_are_allowed_on_demand(partial: Path) -> None:
    for load in (load_pretrained, load_language_model, LaserModule):
        with pytest.raises(ValueError, match=rf"no weights for {KEY}.*`allow_missing=True` makes them random"):
            load(str(partial))  # type: ignore[operator]
        with pytest.warns(UserWarning, match=rf"no weights for {KEY}: these are random"):
            load(str(partial), allow_missing=True)  # type: ignore[operator]


def test_whole_models_are_loaded_without_a_warning(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    load_pretrained(folder, allow_missing=True)
    assert not recwarn.list


@pytest.mark.parametrize("load", [load_pretrained, load_language_model])
def test_what_the_config_asks_for_in_vain_is_the_configs(load: Callable[[str], object], folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "nope"}))
    with pytest.raises(ValueError, match=f"{config}: `hidden_act` is 'nope', which transformers does not have"):
        load(str(folder))


@pytest.mark.parametrize("load", [load_pretrained, load_language_model])
def test_weights_that_no_layer_has_are_told_of(load: Callable[[str], object], folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match=r"leaves \d+ weights of its files unused, .*: model\.layers\.1\..* more"):
        load(str(folder))


def test_a_name_that_no_folder_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="is neither a folder here nor found on the hub") as error:
        load_pretrained("x" * 5000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_broken_file_names_the_folder(name: str, folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (folder / name).write_text("null")
    what = "model" if name.startswith("model") else "tokenizer"
    with pytest.raises(ValueError, match=rf"the {what} of '{folder}' cannot be read: "):
        LaserModule(str(folder))


@pytest.mark.parametrize("make", [tiny_causal_lm, gpt2, t5])
def test_tied_weights_are_not_missing(make: Callable[[], object], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert type(load_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize("named", [["LlamaConfig"], ["pipeline"], ["__doc__"], ["NoSuch" * 1000], 3, [], [3], None])
def test_a_config_must_name_a_model_class(named: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": named}))
    with pytest.raises((ValueError, OSError), match=r"config") as error:
        load_pretrained(folder)
    assert len(str(error.value)) < 600
