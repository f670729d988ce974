"""Leave out the layers that a plan drops: a model of the same class with fewer of them, which gives the same.

Contract: :func:`save_without` writes such a model for ``from_pretrained``, or says why it does not. No table of
families stands behind it. Which setting counts the layers is found by trying; settings of single layers are renumbered
with the weights, all of which must find their place; each layer must be made with the settings that it had; and what
was written is loaded again and compared with the cut model, bit for bit, with and without a key/value cache.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from laser_callback.passes.drops import layer_path, why_no_identity
from laser_callback.plans.kinds import WRITES
from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.stacks import layer_stacks
from laser_callback.shipping.same_outputs import made_up_inputs, outputs, short, why_not_same
from laser_callback.support.in_files import available_memory, bytes_of, in_files, in_memory, save_dense
from laser_callback.support.pretrained import whole
from laser_callback.support.suggest import clipped

Layers = Mapping[str, Sequence[int]]
"""Stack -> indices of layers in it."""

# Settings of a config that are about single layers. A list with an entry for each layer needs no name here.
_INDICES = re.compile(
    r"mlp_only_layers|moe_layers|rope_scaling_layers|cross_attention_layers|\w*(ids|idxs|indices|indexes)"
)
_LEADING = ("first_k_dense_replace", "max_window_layers")
"""How many layers, from the first on, are of another sort."""
_NOT_BY_LAYER = re.compile(r"token|architectures|label|limit$")
_OF_TRAINING = ("training", "gradient_checkpointing")
_OF_PLACE = "relative_attention_bias"
"""What belongs to a place in the stack, and not to the layer: the first block of T5 makes the positions for all."""


class CannotLeaveOutError(ValueError):
    """Why no model with fewer layers gives the same."""


def dropped_layers(model: nn.Module, cut: Sequence[WeightMatrix]) -> dict[str, list[int]]:
    """The layers of a cut model that a plan drops: of those it cuts, the ones in which all that writes is zero.

    Args:
        model: with the cut in place.
        cut: what the plan cuts.
    """
    touched = {(matrix.stack, matrix.layer) for matrix in cut if matrix.stack is not None}
    writes: dict[tuple[str, int], bool] = {}
    for matrix in find_matrices(model):
        place = matrix.stack, matrix.layer
        if place in touched and matrix.kind in WRITES and matrix.stack is not None and matrix.layer is not None:
            parts = [matrix] if matrix.bias is None else [matrix, matrix.bias]
            zero = not any(bool(part.value.any()) for part in parts)
            writes[matrix.stack, matrix.layer] = writes.get((matrix.stack, matrix.layer), True) and zero
    dropped: dict[str, list[int]] = {}
    for (stack, layer), zero in writes.items():
        if zero:
            dropped.setdefault(stack, []).append(layer)
    return dropped


def listed(layers: Layers) -> str:
    """``layers 3, 12 of model.layers``, for people."""
    return "; ".join(
        f"layer{'s' * (len(places) > 1)} {', '.join(map(str, places))} of {stack or 'the model'}"
        for stack, places in layers.items()
    )


def save_without(model: PreTrainedModel, dropped: Layers, folder: Path) -> str:
    """Write what a cut model is without the layers that it drops; or nothing, and return the reason.

    Args:
        model: with the cut in place. It is the same afterwards. One that lies in files is loaded, since it must be run.
        dropped: as from :func:`dropped_layers`.
        folder: exists. Config and weights are written into it.

    Returns:
        Why nothing was written; empty if it was.
    """
    needed = 2 * bytes_of(model)
    if in_files(model) and needed > (free := available_memory()):
        return (
            f"both models would be run to compare them, which takes {decimal(needed)} of memory, and {decimal(free)} "
            "are free"
        )
    try:
        with TemporaryDirectory(dir=folder) as trial:
            _write_without(in_memory(model), dropped, Path(trial))
            for file in Path(trial).iterdir():
                shutil.move(file, folder / file.name)
    except CannotLeaveOutError as reason:
        return str(reason)
    return ""


def _write_without(model: PreTrainedModel, dropped: Layers, folder: Path) -> None:
    inputs = _inputs(model)
    stacks = layer_stacks(model)
    kept = {stack: [i for i in range(len(stacks[stack])) if i not in gone] for stack, gone in dropped.items()}
    if empty := [stack for stack, layers in kept.items() if not layers]:
        raise CannotLeaveOutError(f"no layer of `{empty[0]}` would be left")
    leaving = {layer_path(stack, i): stacks[stack][i] for stack, gone in dropped.items() for i in gone}
    _check_identity(leaving, model, inputs)
    small = _smaller(model, kept)
    _fill(small, model, kept)
    try:
        save_dense(small, folder)
        loaded = whole(type(model), folder).to(model.device)
    except OSError:  # of the disk
        raise
    except Exception as error:  # each class has its own way to fail
        raise CannotLeaveOutError(f"the smaller model cannot be written and read again: {short(error)}") from error
    _round_alike(loaded, model, kept)
    _check_settings(loaded, model, kept)
    if reason := why_not_same(model, loaded.eval(), inputs):
        raise CannotLeaveOutError(reason)


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    try:
        return made_up_inputs(model)
    except ValueError as error:
        raise CannotLeaveOutError(str(error)) from error


def _check_identity(layers: Mapping[str, nn.Module], model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    try:
        reasons = why_no_identity(layers.values(), lambda: outputs(model, inputs))
    except Exception as error:
        raise CannotLeaveOutError(f"the model does not run on made-up inputs: {short(error)}") from error
    for name, layer in layers.items():
        if reasons[layer]:
            raise CannotLeaveOutError(f"`{name}` does not hand on what it is given: {reasons[layer]}")


# ---- the config ------------------------------------------------------------------------------------------------------


def _smaller(model: PreTrainedModel, kept: Layers) -> PreTrainedModel:
    """A model of the same class with so many layers, on the meta device."""
    config, small = model.config, None
    sizes = {stack: len(layers) for stack, layers in layer_stacks(model).items()}
    for stack, layers in kept.items():
        before, sizes[stack] = sizes[stack], len(layers)
        tried = (_made(type(model), each) for each in _with_fewer(config, before, layers))
        small = next((made for made in tried if made is not None and _sizes(made) == sizes), None)
        if small is None:
            raise CannotLeaveOutError(
                f"no setting of {type(config).__name__} makes `{stack}` {len(layers)} layers instead of {before}, and "
                "leaves all else as it is"
            )
        config = small.config
    assert small is not None
    return small


def _with_fewer(config: PreTrainedConfig, before: int, kept: Sequence[int]) -> Iterator[PreTrainedConfig]:
    """Copies of ``config`` with one setting after the other that may be the number of layers, ``before``, lowered."""
    for path in _paths(config):
        for name, value in vars(_at(config, path)).items():
            if type(value) is int and value == before and re.search("layer|block|depth", name):
                fewer = copy.deepcopy(config)
                part = _at(fewer, path)
                for other, setting in vars(part).items():
                    vars(part)[other] = _renumbered(other, setting, before, kept)
                vars(part)[name] = len(kept)
                if hasattr(part, "num_decoder_layers"):  # T5, whose cache else has as many layers as its encoder
                    part.decoder_layers = part.num_decoder_layers
                yield fewer


def _renumbered(name: str, setting: Any, before: int, kept: Sequence[int]) -> Any:
    """A setting of a config, if it is about single layers, for those that are kept."""
    if name in _LEADING and type(setting) is int:
        return sum(i < setting for i in kept)
    if name == "attention_types" and setting:  # GPT-Neo: [[["global", "local"], 12]]
        by_layer = [kind for kinds, times in setting for _ in range(times) for kind in kinds]
        return [[[by_layer[i]], 1] for i in kept]
    if not isinstance(setting, (list, tuple)) or _NOT_BY_LAYER.search(name):
        return setting
    if _INDICES.fullmatch(name):
        return type(setting)(kept.index(i) for i in setting if i in kept)
    return type(setting)(setting[i] for i in kept) if len(setting) == before else setting


def _paths(config: PreTrainedConfig) -> Iterator[tuple[str, ...]]:
    """Where a config has configs in it, itself included."""
    yield ()
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            yield from ((name, *path) for path in _paths(part))


def _at(config: PreTrainedConfig, path: Sequence[str]) -> PreTrainedConfig:
    for name in path:
        config = vars(config)[name]
    return config


def _made(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception:  # the setting was another's, and the class says so in its own way
        return None


def _sizes(model: nn.Module) -> dict[str, int]:
    return {stack: len(layers) for stack, layers in layer_stacks(model).items()}


# ---- weights and settings --------------------------------------------------------------------------------------------


def _fill(small: PreTrainedModel, model: PreTrainedModel, kept: Layers) -> None:
    """Give ``small`` the weights of ``model``: the same tensors, under new numbers."""
    there, state, used = model.state_dict(), dict[str, Tensor](), set[str]()
    for name, empty in small.state_dict().items():
        source = _source(name, kept)
        if source not in there and _OF_PLACE in name:
            source = name
        if source not in there or there[source].shape != empty.shape:
            here = f"of shape {tuple(there[source].shape)}" if source in there else "not there"
            raise CannotLeaveOutError(
                f"the smaller model would need `{name}` of shape {tuple(empty.shape)}, which is {here}"
            )
        state[name] = there[source]
        used.add(source)
    places = {stack: range(len(layers)) for stack, layers in layer_stacks(model).items() if stack in kept}
    gone = tuple(f"{stack}.{i}." for stack in kept for i in places[stack] if i not in kept[stack])
    if unused := [name for name in there if name not in used and not name.startswith(gone)]:
        raise CannotLeaveOutError(f"the smaller model would have no place for `{clipped(unused[0], 100)}`")
    small.load_state_dict(state, assign=True)
    small.tie_weights()
    small.generation_config = getattr(model, "generation_config", None)
    if hasattr(model, "_weight_conversions"):  # by which it was loaded: files are written as they were
        small._weight_conversions = model._weight_conversions


def _source(name: str, kept: Layers) -> str:
    """Where the weight of this name is in the whole model."""
    for stack, layers in kept.items():
        if place := re.match(rf"{re.escape(stack)}\.(\d+)\.", name):
            return f"{stack}.{layers[int(place[1])]}.{name[place.end() :]}"
    return name


def _round_alike(loaded: PreTrainedModel, model: PreTrainedModel, kept: Layers) -> None:
    """Let ``loaded`` compute with the kernels of ``model``, and in its precision also what is in no file."""
    for what in ("attn_implementation", "experts_implementation"):
        wanted = getattr(model.config, f"_{what}", None)
        if wanted is not None and wanted != getattr(loaded.config, f"_{what}"):
            getattr(loaded, f"set_{what}")(wanted)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in loaded.named_parameters():  # by which torch chooses among kernels, without gradients too
        parameter.requires_grad_(_source(name, kept) not in frozen)
    buffers = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():  # `model.to(torch.bfloat16)` has rounded frequencies of positions, too
        if (was := buffers.get(_source(name, kept))) is not None:
            buffer.data = buffer.to(was.dtype)


def _check_settings(small: PreTrainedModel, model: PreTrainedModel, kept: Layers) -> None:
    """Each layer must have been made as it was: a short pass does not tell a window of 4,096 tokens from another."""
    before, after = layer_stacks(model), layer_stacks(small)
    for stack, layers in kept.items():
        for new, old in enumerate(layers):
            was, now = _settings(before[stack][old]), _settings(after[stack][new])
            for name in was:
                here, last = now.get(name), name.rpartition(".")[2]
                index = type(was[name]) is type(here) is int and (was[name], here) == (old, new)
                wanted = _renumbered(last, was[name], len(before[stack]), layers)
                if here != wanted and not index and _OF_PLACE not in last:
                    raise CannotLeaveOutError(
                        f"in its new place `{layer_path(stack, old)}` would have {name}={here!r} instead of "
                        f"{was[name]!r}"
                    )


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The plain values that the modules of a layer hold, but for switches of training."""
    return {
        f"{path}.{name}".lstrip("."): list(value) if isinstance(value, tuple) else value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _OF_TRAINING and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
