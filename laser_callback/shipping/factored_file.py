"""Factored models on disk: what :func:`load_factored` reads.

The weights of a transformers model lie in ``factored.safetensors`` of a folder, beside its config and tokenizer. The
name is not one that ``from_pretrained`` looks for: it would find no weights of the layers that are thin here, and make
some up. The layers' ranks stand in the file's metadata, so that the file is enough for whoever has the model's class.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from laser_callback.shipping.thin import FactoredLinear, make_room
from laser_callback.support.checkpoints import read_checkpoint
from laser_callback.support.pretrained import GENERATION, model_class

WEIGHTS = "factored.safetensors"
RANKS = "laser_ranks"
"""Where the ranks stand in a file's metadata, and in a Lightning checkpoint."""


def save_factored_weights(model: nn.Module, ranks: dict[str, int], file: Path) -> None:
    """Write the weights of ``model``, whose thin layers are in place, and their ranks."""
    save_model(model, str(file), {"format": "pt", RANKS: json.dumps(ranks)})


def load_factored(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a factored model.

    Args:
        path: a folder with the weights of a transformers model; its weights' file alone; or a Lightning checkpoint.
        model: with a file or a checkpoint: a model of the class that was saved, whose linear layers are replaced and
            whose weights are overwritten. With a folder, by default, its model is made.

    Returns:
        The model, in evaluation mode if it was made here.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if ``model`` is missing, is another model, or the file is no factored model; or if it holds objects
            that are not among the hyperparameters of ``model``.

    Example::

        save_reduced(model, "20-29.mlp@0.05", "small", "factored")
        model = load_factored("small")
    """
    path = Path(path)
    file = path / WEIGHTS if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no factored model at {path}: it has no {WEIGHTS}")
    if model is None:
        if not os.path.isdir(path):
            raise ValueError(
                f"`model` must be given to load the weights of {path}: a model of the class that was saved"
            )
        model = _skeleton(path)
    if file.suffix == ".safetensors":
        _load_safetensors(file, model)
    else:
        _load_checkpoint(file, model)
    return model


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of the folder's config, with memory for its weights but no values in it."""
    config = AutoConfig.from_pretrained(folder)
    with no_init_weights():
        model = model_class(config)._from_config(config)
    model.tie_weights()
    if model.can_generate() and (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast("PreTrainedModel", model.eval())


def _load_safetensors(file: Path, model: nn.Module) -> None:
    try:
        with safe_open(file, "pt") as content:
            about = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    make_room(model, json.loads(_ranks(about, file)))
    try:
        load_model(model, file)
    except RuntimeError as error:
        raise ValueError(f"`model` is another model than that of {file}: {error}") from error


def _load_checkpoint(file: Path, model: nn.Module) -> None:
    content = read_checkpoint(file, model, FactoredLinear)  # which a model among the hyperparameters has
    make_room(model, _ranks(content, file))
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"`model` is another model than that of {file}: {error}") from error


def _ranks(about: dict[str, Any], file: Path) -> Any:
    if RANKS not in about:
        raise ValueError(f"{file} is no factored model: it does not say the ranks of its layers")
    return about[RANKS]
