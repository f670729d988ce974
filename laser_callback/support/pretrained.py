"""Transformers models in and out of folders: load one of any class, find the one inside of a module, save it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laser_callback.support.files import need_files
from laser_callback.support.interrupts import whole as undivided
from laser_callback.support.merging import adapted_layers
from laser_callback.support.reading import shown
from laser_callback.support.suggest import clipped

GENERATION = "generation_config.json"
"""Where transformers keeps how a model generates."""


def load_pretrained(name: str | Path, allow_missing: bool = False) -> PreTrainedModel:
    """The model of a folder, of a hub name, or of a ``.gguf`` file (dequantised), in its own class and dtype.

    Args:
        name: of the model.
        allow_missing: see :func:`whole`.

    Raises:
        OSError: if there is no such model.
        ValueError: if its config names no class that transformers has, or it cannot be read.
    """
    gguf = str(name).endswith(".gguf")
    if gguf:
        need_files(model=name)
    with named(name):
        if gguf:
            return AutoModelForCausalLM.from_pretrained(**_place(name))
        return whole(model_class(read_config(name)), name, allow_missing)


def whole(kind: Any, name: str | Path, allow_missing: bool = False) -> PreTrainedModel:
    """A model with all of its weights.

    Args:
        kind: its class, or a class for any.
        name: a folder or a hub name.
        allow_missing: only warn of weights that are missing or have other shapes, and so are random.

    Raises:
        OSError: if there is no such model.
        ValueError: if weights are missing or have other shapes: transformers would draw them at random, and only log
            it. What a class ties, or makes itself, is not missing. Weights that the class has no place for, as where
            the config has fewer layers than the files, are a warning.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True)
    except KeyError as error:  # a table of transformers has not what the config asks for
        fields = _fields_that_are(error.args[0], read_config(name).to_dict()) if error.args else []
        if not fields:
            raise
        raise ValueError(
            f"{Path(name) / 'config.json'}: `{fields[0]}` is {shown(error.args[0])}, which transformers does not have"
        ) from error
    problems = []
    if missing := sorted(found["missing_keys"]):
        problems.append(f"has no weights for {_some(missing)}")
    if mismatched := sorted(found["mismatched_keys"]):
        shapes = [f"{key} ({tuple(there)}, expected {tuple(wanted)})" for key, there, wanted in mismatched]
        problems.append(f"has other shapes for {_some(shapes)}")
    unused = sorted(found["unexpected_keys"])
    about = f"the model {str(name)!r}, as a {type(model).__name__}, {' and '.join(problems)}"
    if problems:
        there = f"; it has {_some(unused)}, which no layer is called" if unused else ""
        if not allow_missing:
            raise ValueError(f"{about}, which would be random{there}; `allow_missing=True` makes them random")
        warnings.warn(f"{about}: these are random{there}", stacklevel=2)
    elif unused:
        warn_of_unused(model, name, unused)
    return model


def warn_of_unused(model: PreTrainedModel, name: str | Path, unused: Sequence[str]) -> None:
    """Say that files of the model have weights that its class has no place for."""
    count = f"{len(unused)} weight{'s' * (len(unused) > 1)}"
    warnings.warn(
        f"the model {str(name)!r}, as a {type(model).__name__}, leaves {count} of its files unused, which no layer is "
        f"called: {_some(unused)}",
        stacklevel=3,
    )


def _fields_that_are(value: Any, config: Mapping[str, Any], inside: str = "") -> list[str]:
    """The names of a config's fields, and of those in them, that have a value."""
    found = [f"{inside}{name}" for name, here in config.items() if type(here) is type(value) and here == value]
    parts = {name: here for name, here in config.items() if isinstance(here, Mapping)}
    return found + [deep for name, part in parts.items() for deep in _fields_that_are(value, part, f"{inside}{name}.")]


def read_config(name: str | Path) -> PreTrainedConfig:
    """The config of a folder or hub name.

    Raises:
        OSError: if there is none.
        ValueError: if it is not what transformers expects, with its file.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError:
        raise
    except Exception as error:  # each field of each class of config has its own way to fail
        reason = clipped(error) or type(error).__name__
        raise ValueError(f"{Path(name) / 'config.json'}: expected the config of a model: {reason}") from error
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise ValueError(f"the model's config must name its class in a list `architectures`, got {shown(names)}")
    return config


def _some(names: Sequence[str]) -> str:
    shown = [clipped(name, 100) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of a hub name, or of a ``.gguf`` file.

    Raises:
        OSError, ValueError: if there is none.
    """
    with named(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(**_place(name))


def _place(name: str | Path) -> dict[str, Any]:
    """What ``from_pretrained`` takes for ``name``."""
    if str(name).endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    return {"pretrained_model_name_or_path": name}


@contextmanager
def named(name: str | Path, what: str = "model") -> Iterator[None]:
    """Within: where transformers finds nothing under ``name``, or cannot read it, the error says so.

    Raises:
        OSError: if there is no such model.
        ValueError: if it cannot be read.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # which no other file would mend
    except Exception as error:  # each library below has its own for a broken file
        if os.path.exists(name):
            if isinstance(error, (OSError, ValueError)) and str(name) in str(error):
                raise  # with the file that the folder lacks
            reason = clipped(error) or type(error).__name__
            raise ValueError(f"the {what} of {str(name)!r} cannot be read: {reason}") from error
        if not isinstance(error, OSError):
            raise
        reason = clipped(str(error).strip().split("\n")[0])
        raise OSError(f"{clipped(name)!r} is neither a folder here nor found on the hub: {reason}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config`` is of."""
    names = config.architectures
    if not names:
        raise ValueError("the model's config names no class in `architectures`, e.g. ['LlamaForCausalLM']")
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ValueError(f"the model's config names the class {clipped(names[0])}, which transformers does not have")
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(
            f"the model's config names {clipped(names[0])} as its class, which is no model of transformers"
        )
    return found


def pretrained_in(model: nn.Module) -> PreTrainedModel:
    """The transformers model that ``model`` is, or holds.

    Raises:
        ValueError: if there is none, or several, or it has adapters.
    """
    if adapted := adapted_layers(model):
        raise ValueError(
            f"`model` has adapters, first at `{adapted[0][0]}`, and would be saved as adapters, without the cut: merge "
            "them first, e.g. by model.merge_and_unload()"
        )
    found = _outermost(model)
    if len(found) != 1:
        there = ", ".join(type(one).__name__ for one in found) or "none"
        raise ValueError(
            f"`model` must be a transformers model or hold one, got {type(model).__name__} with {there}; "
            "a LightningModule can be written as a checkpoint (form='checkpoint')"
        )
    return found[0]


def save_about(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Write config and tokenizer beside weights, for ``from_pretrained``.

    What a generation config holds beside the point, such as a temperature where nothing is sampled, is written as it
    is: many published ones do, and transformers refuses to save them once they have been touched.

    Raises:
        ValueError: if transformers could not read a config again.
    """
    with said_to_be_dense(model):
        config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        generation = model.generation_config
        generation.validate()
        generation.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@undivided
def said_to_be_dense(model: PreTrainedModel) -> Generator[None, None, None]:
    """Within: the model does not say that it is quantised, or transformers refuses to save what it has dequantised.

    Only for models whose weights are dense, as those are in which matrices were found. Nor does it say that it can
    generate: its generation config has been written.
    """
    config, quantizer = model.config.__dict__.pop("quantization_config", None), model.__dict__.pop("hf_quantizer", None)
    model.can_generate = lambda: False
    try:
        yield
    finally:
        del model.can_generate
        if config is not None:
            model.config.quantization_config = config
        if quantizer is not None:
            model.hf_quantizer = quantizer


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    found = [model for child in module.children() for model in _outermost(child)]
    return list(dict.fromkeys(found))
