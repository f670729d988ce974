"""Model folders that others have written: loaded whole, or refused with what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_models import gpt2, t5
from tiny import tiny_causal_lm
from torch import Tensor

from laser_callback.compare.language_model import load_language_model
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
