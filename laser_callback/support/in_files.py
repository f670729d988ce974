"""Models that stay in their files: made from the config without memory, and read from there matrix by matrix.

Contract: what :func:`open_pretrained` returns is, wherever its weights are asked for, the very model that transformers
loads; where that is not sure (its loader would convert, cast, draw or merge weights) it is that model, in memory, and a
warning says why. :func:`save_weights` writes either.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from laser_callback.support.pretrained import (
    load_pretrained,
    model_class,
    named,
    read_config,
    said_to_be_dense,
    save_about,
    warn_of_unused,
    whole,
)
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.reading import read_plain
from laser_callback.support.stored import Stored, contents, place, put, read_header, write_stored
from laser_callback.support.suggest import clipped

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class _NotAsItIsError(ValueError):
    """Why a model is not, weight by weight, what its files hold."""


@dataclass(frozen=True)
class _Shard:
    """One of a model's files: its path, what it holds in the order of its bytes, and its metadata."""

    path: Path
    tensors: Mapping[str, Stored]
    about: Mapping[str, str]


@dataclass(frozen=True)
class _Files:
    """The files of a model, their index if there is one, and which weight each tensor in them is."""

    name: str
    index: Path | None
    shards: tuple[_Shard, ...]
    weights: dict[str, str]  # key in the files -> name in the model; what has no place in the model is not in here


_files: WeakKeyDictionary[nn.Module, _Files] = WeakKeyDictionary()


def open_pretrained(name: str | Path, allow_missing: bool = False, scratch: Path | None = None) -> PreTrainedModel:
    """A model as :func:`load_pretrained` has it, whose weights stay in its safetensors files until they are asked for.

    Its parameters are on the meta device, and no pass can be run. Where transformers would make other weights of the
    files than those in them, it is loaded into memory, and a warning says why.

    Args:
        name: a folder, a hub name, or a ``.gguf`` file (which is loaded).
        allow_missing: as in :func:`load_pretrained`.
        scratch: the folder for reduced weights that are not written yet, as large as these; by default the system's.

    Raises:
        OSError: if there is no such model, or one of its files is missing.
        ValueError: if a file is damaged; or as from :func:`load_pretrained`.
    """
    if str(name).endswith(".gguf"):
        return load_pretrained(name, allow_missing)
    with named(name):
        config = read_config(name)
        kind = model_class(config)
        try:
            return _opened(kind, config, str(name), scratch)
        except _NotAsItIsError as reason:
            warnings.warn(f"the model {str(name)!r} is loaded into memory as a whole: {reason}", stacklevel=2)
    return load_pretrained(name, allow_missing)


def in_files(model: nn.Module) -> bool:
    """Whether a model is one of :func:`open_pretrained` that has stayed in its files."""
    return model in _files


def in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its weights, as they are now, in memory."""
    if not in_files(model):
        return model
    loaded = whole(type(model), _files[model].name)
    for name, parameter in model.named_parameters():
        if _is_changed(where := place(parameter)):
            loaded.get_parameter(name).data = contents(where)
    return loaded


def bytes_of(model: nn.Module) -> int:
    """What the parameters of a model take, or would take in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available_memory() -> int:
    """How many bytes could be used now, as the system estimates; where it does not, no bound is known: all."""
    try:
        estimate = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        estimate = None
    return sys.maxsize if estimate is None else int(estimate[1]) * 1024


def save_dense(
    model: PreTrainedModel, folder: Path, tokenizer: Any = None, progress: PhaseProgress | None = None
) -> None:
    """Write weights, config and tokenizer, for ``from_pretrained``.

    Raises:
        ValueError: as from :func:`save_about`, which comes first.
    """
    save_about(model, folder, tokenizer)
    save_weights(model, folder, progress)


def save_weights(model: PreTrainedModel, folder: Path, progress: PhaseProgress | None = None) -> None:
    """Write the weights beside what :func:`save_about` has written.

    A model that lies in files is written into files of the same names, with the same tensors in the same order; those
    that hold nothing that was changed are copied.
    """
    files = _files.get(model)
    if files is None:
        with said_to_be_dense(model):
            model.save_pretrained(folder)
        return
    progress = progress or PhaseProgress(enabled=False)
    now = {name: place(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    total = sum(tensor.nbytes for shard in files.shards for tensor in shard.tensors.values())
    with progress.phase(f"writing {len(files.shards)} file{'s' * (len(files.shards) > 1)} of weights", total):
        for shard in files.shards:
            _rewrite(shard, folder / shard.path.name, files.weights, now, progress)
    if files.index is not None:
        _write_index(files, folder / _INDEX)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _rewrite(
    shard: _Shard, path: Path, weights: Mapping[str, str], now: Mapping[str, Tensor | Stored], progress: PhaseProgress
) -> None:
    originals = {id(tensor) for tensor in shard.tensors.values()}
    tensors: dict[str, Stored] = {}
    for key, tensor in shard.tensors.items():
        if key in weights:
            # Of a buffer there is none. A parameter that is in the files twice points at one of them until it is cut.
            where = now.get(weights[key])
            tensors[key] = where if isinstance(where, Stored) and _is_changed(where) else tensor
    if list(tensors) == list(shard.tensors) and all(id(tensor) in originals for tensor in tensors.values()):
        shutil.copyfile(shard.path, path)
        progress.advance(sum(tensor.nbytes for tensor in tensors.values()))
    elif tensors:
        write_stored(path, tensors, shard.about, progress.advance)


def _is_changed(where: Tensor | Stored) -> bool:
    """Whether a weight is no more in the file that it came from."""
    return isinstance(where, Stored) and not isinstance(where.source, Path)


def _write_index(files: _Files, path: Path) -> None:
    assert files.index is not None
    index = read_plain(files.index, "model")
    held = {key: (shard.path.name, t) for shard in files.shards for key, t in shard.tensors.items()}
    kept = {key: held[key] for key in files.weights}
    if len(kept) < len(held) or set(index["weight_map"]) != set(kept):
        index["weight_map"] = {key: name for key, (name, _) in sorted(kept.items())}
        index["metadata"] = {"total_size": sum(tensor.nbytes for _, tensor in kept.values())}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- opening ---------------------------------------------------------------------------------------------------------


def _opened(kind: type[PreTrainedModel], config: PreTrainedConfig, name: str, scratch: Path | None) -> PreTrainedModel:
    index, paths = _weight_files(kind, config, name)
    shards = tuple(_Shard(path, *read_header(path, scratch)) for path in paths)
    tensors: dict[str, Stored] = {}
    for shard in shards:
        if twice := next((key for key in shard.tensors if key in tensors), None):
            raise _NotAsItIsError(f"`{clipped(twice)}` is in two of its files")
        tensors |= shard.tensors
    model = _empty(kind, config, name, tensors.values())
    weights = _places(model, tensors)
    _check_dtypes(model, weights, tensors)
    _attach(model, weights, tensors)
    unused = sorted(key for key in tensors if key not in weights)
    if loud := [key for key in unused if not _is_ignored(model, key)]:
        warn_of_unused(model, name, loud)
    _files[model] = _Files(name, index, shards, weights)
    return model


def _weight_files(kind: type[PreTrainedModel], config: PreTrainedConfig, name: str) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the files."""
    if getattr(config, "quantization_config", None) is not None:
        raise _NotAsItIsError("its weights are quantised")
    if _found(name, "adapter_config.json") is not None:
        raise _NotAsItIsError("it has an adapter")
    special = ("transformers_weights", "fusion_config")
    if kind.from_pretrained.__func__ is not PreTrainedModel.from_pretrained.__func__:
        raise _NotAsItIsError(f"{kind.__name__} has its own way to be loaded")
    if any(getattr(config, each, None) for each in special) or getattr(type(config), "extra_files", None):
        raise _NotAsItIsError("its config names other files, or other layers")
    if (single := _found(name, _SINGLE)) is not None:
        return None, [single]
    index = _found(name, _INDEX)
    if index is None:
        raise _NotAsItIsError(f"it has no {_SINGLE}")
    content = read_plain(index, "model")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(each, str) for each in listed.values()):
        raise ValueError(f"{index}: expected `weight_map` with the file of each weight")
    paths = []
    for each in sorted(set(listed.values())):
        if Path(each).name != each or each in ("", ".", ".."):
            raise ValueError(f"{index}: `weight_map` must name files beside it, got {clipped(each)!r}")
        path = _found(name, each)
        if path is None:
            count = sum(file == each for file in listed.values())
            raise FileNotFoundError(f"{index} names {each} for {count} weights, and there is no such file beside it")
        paths.append(path)
    return index, paths


def _found(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(name, file, **quiet)
    return None if found is None else Path(found)


def _empty(
    kind: type[PreTrainedModel], config: PreTrainedConfig, name: str, tensors: Iterable[Stored]
) -> PreTrainedModel:
    """The model without memory for its weights."""
    config = copy.deepcopy(config)
    config.name_or_path = name
    dtype = config.dtype
    if dtype is None:
        dtypes = {tensor.dtype for tensor in tensors if tensor.dtype is not None and tensor.dtype.is_floating_point}
        if len(dtypes) != 1:
            raise _NotAsItIsError("its config names no dtype, and its weights have several")
        (dtype,) = dtypes
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype)
    except Exception as error:  # each class has its own way to look at numbers that are not there
        raise _NotAsItIsError(f"a {kind.__name__} is not made without memory ({clipped(error)})") from error
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(name)
        except OSError:
            settings = {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(name, **settings)
    return model.eval()


def _places(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Which weight of the model each tensor is, as transformers' own loader has it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    known, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    weights: dict[str, str] = {}
    taken: set[str] = set()
    for key in tensors:
        renamed, converted = rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:
            renamed, converted = key, None
        if converted is not None:
            raise _NotAsItIsError(f"transformers makes `{clipped(renamed)}` of `{clipped(key)}` and what goes with it")
        if renamed not in known:
            continue
        if tuple(known[renamed].shape) != tensors[key].shape:
            raise _NotAsItIsError(f"`{clipped(key)}` has another shape than in the model")
        if renamed in taken:
            raise _NotAsItIsError(f"`{clipped(renamed)}` is in its files by two names")
        taken.add(renamed)
        weights[key] = renamed
    there = {id(known[name]) for name in taken}
    if missing := next((name for name, weight in known.items() if id(weight) not in there), None):
        raise _NotAsItIsError(f"`{clipped(missing)}` is in none of its files")
    return weights


def _check_dtypes(model: PreTrainedModel, weights: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """In the files each weight must have the dtype that it is loaded in; some stay float32 in every model."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())] if half else []
    kept += [*(getattr(model, "_keep_in_fp32_modules", None) or ())] if model.dtype == torch.float16 else []
    known = model.state_dict(keep_vars=True)
    for key, name in weights.items():
        wanted = torch.float32 if any(part in name for part in kept) else known[name].dtype
        if tensors[key].dtype != wanted:
            raise _NotAsItIsError(f"`{clipped(key)}` is {tensors[key].kind} in its file and loaded as {wanted}")
        if known[name].dtype != wanted:
            known[name].data = known[name].data.to(wanted)


def _attach(model: PreTrainedModel, weights: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys: dict[int, str] = {}
    for key, name in weights.items():
        parameter = parameters.get(name)
        if parameter is None:
            continue
        first = keys.setdefault(id(parameter), key)
        if first != key and not _equal(tensors[first], tensors[key]):
            raise _NotAsItIsError(f"`{first}` and `{key}` are one weight by its config, and two in its files")
        put(parameter, tensors[first])


def _equal(one: Stored, other: Stored) -> bool:
    return one.nbytes == other.nbytes and all(a == b for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _is_ignored(model: PreTrainedModel, key: str) -> bool:
    """Whether transformers leaves such a weight unused without a word."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    patterns += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    patterns += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return any(re.search(pattern, key) for pattern in patterns)
