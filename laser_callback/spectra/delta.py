"""Delta mode: cut what fine-tuning has changed and nothing else, W_base + rank_k(W - W_base).

Contract: a reduction with ``cut="delta"`` is in delta mode. The :class:`~laser_callback.spectra.Spectra` of a run hold
:class:`BaseWeights`, which know of each matrix of a model the one that it was fine-tuned from; what is factorised and
cut is then the difference, in float64, and the sum is rounded once. Search, statistics and surgery are the same. What
does not fit (other shapes, missing weights, unrelated weights, adapters that are not merged) is an error
before any work.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix, find_matrices, known_as, same_name
from laser_callback.plans.stacks import plain_name
from laser_callback.spectra.spectrum import as_double
from laser_callback.support.checkpoints import read_checkpoint, read_tensors
from laser_callback.support.hashing import content_hash
from laser_callback.support.in_files import open_pretrained
from laser_callback.support.merging import unmerged_layers
from laser_callback.support.pretrained import load_pretrained
from laser_callback.support.stored import Stored, contents, has_values, lies_in_file, place

BaseSource: TypeAlias = "nn.Module | Mapping[str, Tensor | Stored] | str | Path"

UNRELATED = 1.0
"""A difference as large as the base itself. Independent weights differ by the square root of 2 of their size,
fine-tuned ones by a few hundredths."""
_ROWS = 1024  # are made float64 at a time


class BaseWeights:
    """The weights that a model was fine-tuned from, by the names of the model's matrices.

    Names need to be the same at their ends only: what stands in front (``model.``, ``base_model.model.``) is found out.
    The base is taken in the model's dtype, in which fine-tuning had it.

    Args:
        source: a model (its live weights, not a copy) or state dict; a ``.safetensors`` file; a Lightning or torch
            checkpoint; or the folder, hub name or ``.gguf`` file of a transformers model.
        model: the fine-tuned model, in which plans are to be put.

    Attributes:
        digest: 16 hexadecimal digits that stand for the base's weights.
        name: folder or hub name that the base came from, if it has one.

    Raises:
        ValueError: if ``source`` cannot be read, lacks a matrix, has one of another shape, or is not what ``model`` was
            fine-tuned from; or if ``model`` has adapters that are not merged.

    Example::

        base = BaseWeights("HuggingFaceTB/SmolLM2-135M-Instruct", module)
        with reduced(module, "27.fc_in@0.01:cut=delta", Spectra(base=base)): ...
    """

    def __init__(self, source: BaseSource, model: nn.Module) -> None:
        unmerged = [name for name, _ in unmerged_layers(model)]
        if unmerged:
            raise ValueError(
                f"the difference to the base is still in adapters, {len(unmerged)} of them from `{unmerged[0]}` on: "
                "merge them first, `model = model.merge_and_unload()` or `with laser_callback.merged(model): ...`"
            )
        matrices = [matrix for matrix in find_matrices(model) if not matrix.obstacle]
        self.name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name_or_path", None)
        weights = self._weights = _Weights(read_weights(source, model), matrices)
        self._pairs = weights.matched([*matrices, *(bias for matrix in matrices if (bias := matrix.bias))])
        known = [matrix for matrix in matrices if matrix.kind is not None]
        _check_complete(known, self._pairs)
        self._changes = {m.name: self._relative_change(m) for m in matrices if self.has(m) and has_values(m.parameter)}
        _check_related([self._changes[m.name] for m in known or matrices if m.name in self._changes])
        parameters = {id(tensor): tensor for _, tensor in (self._pairs[m.name] for m in known)}  # fused ones once
        self.digest = content_hash("base", *parameters.values())[:16]
        self._changed = [
            plain_name(name)
            for name, parameter in model.named_parameters()
            if has_values(parameter) and not _same(contents(parameter), weights.of(plain_name(name)))
        ]

    def matrix(self, name: str, like: Tensor) -> Tensor:
        """The base of the matrix ``name``, in the dtype and on the device of ``like``, shape (m, n).

        Raises:
            ValueError: if it has none.
        """
        # A module around the model puts its own name in front, and the model may be asked for without it.
        known = known_as(name, self._pairs)
        if known is None:
            raise ValueError(
                f"the base has no counterpart of `{name}`, so there is no difference to cut. It has one of "
                f"{', '.join(list(self._pairs)[:3])}, ...; give `BaseWeights` the very model that is cut"
            )
        matrix, tensor = self._pairs[known]
        return matrix.read(contents(tensor)).to(like.device, like.dtype)

    def has(self, matrix: WeightMatrix) -> bool:
        """Whether it has a counterpart of a matrix, of its shape."""
        pair = self._pairs.get(matrix.name)
        return pair is not None and pair[1].shape == matrix.parameter.shape

    def difference(self, matrix: Tensor, name: str) -> Tensor:
        """``matrix`` minus its base in float64, shape (m, n)."""
        return as_double(matrix) - as_double(self.matrix(name, matrix))

    def sum(self, difference: Tensor, matrix: Tensor, name: str) -> Tensor:
        """The base plus a difference, rounded once to the dtype of ``matrix``, shape (m, n)."""
        return (as_double(self.matrix(name, matrix)) + difference).to(matrix.device, matrix.dtype)

    def parameters(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of the model that have a counterpart of their shape, norms included, each with that."""
        named = ((parameter, self._weights.of(plain_name(name))) for name, parameter in model.named_parameters())
        return [
            (parameter, contents(tensor).to(parameter.device, parameter.dtype))
            for parameter, tensor in named
            if tensor is not None and tensor.shape == parameter.shape
        ]

    def changed(self, matrix: WeightMatrix) -> bool:
        """Whether fine-tuning has changed a matrix at all."""
        return self._changes.get(matrix.name, 0.0) > 0

    def changed_besides(self, matrices: Sequence[WeightMatrix]) -> list[str]:
        """Names of the parameters that fine-tuning has changed and none of ``matrices`` is in."""
        names = [plain_name(name) for matrix in matrices for name in matrix.parameter_names]
        return [name for name in self._changed if not any(same_name(name, other) for other in names)]

    def _relative_change(self, matrix: WeightMatrix) -> float:
        """||W - W_base|| / ||W_base||, in Frobenius norms."""
        value = matrix.value
        base = self.matrix(matrix.name, value)
        # Squares of large weights have no room in their dtype.
        scale = (float(base.abs().max()) if base.numel() else 0.0) or 1.0
        change = size = 0.0
        for weights, before in zip(value.split(_ROWS), base.split(_ROWS), strict=True):
            were = as_double(before)
            change += float(((as_double(weights) - were) / scale).square().sum())
            size += float((were / scale).square().sum())
        return math.sqrt(change / size) if size else math.sqrt(change)


def read_weights(source: BaseSource, *owners: Any) -> Mapping[str, Tensor | Stored]:
    """Weights by name, from whatever :class:`BaseWeights` takes.

    Args:
        source: see there.
        *owners: of a checkpoint, see :func:`~laser_callback.support.read_checkpoint`. If one of them is a model that
            lies in files, a folder's weights are left in theirs.

    Raises:
        ValueError: if ``source`` is an adapter, or a checkpoint that holds objects of its own.
    """
    if isinstance(source, nn.Module):
        return {name: place(parameter) for name, parameter in source.named_parameters(remove_duplicate=False)}
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.suffix == ".safetensors":
        return read_tensors(path, "base")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        content = read_checkpoint(path, *owners)
        weights: Mapping[str, Tensor] = content.get("state_dict", content)
        return weights
    if os.path.isfile(path / "adapter_config.json"):
        raise ValueError(f"`base` {str(path)!r} is an adapter: give the model under it")
    in_files = any(isinstance(owner, nn.Module) and any(map(lies_in_file, owner.parameters())) for owner in owners)
    return read_weights(open_pretrained(str(source)) if in_files else load_pretrained(str(source)))


# ---- matching --------------------------------------------------------------------------------------------------------


class _Weights:
    """The base's weights, to be found by the names that the model has for them.

    Both sides name the same layers alike but for what stands in front. The front parts are those for which most names
    meet: a single name, such as that of a new head, may end like an unrelated one.
    """

    def __init__(self, weights: Mapping[str, Tensor | Stored], matrices: Sequence[WeightMatrix]) -> None:
        self._by_name = {plain_name(name): tensor for name, tensor in weights.items()}
        by_end: dict[str, list[str]] = {}
        for name in self._by_name:
            for end in _ends(name):
                by_end.setdefault(end, []).append(name)
        votes: Counter[tuple[str, str]] = Counter()
        for matrix in matrices:
            own = plain_name(matrix.parameter_names[0])
            shared = next((end for end in _ends(own) if end in by_end), None)
            if shared is not None:
                votes.update((own.removesuffix(shared), found.removesuffix(shared)) for found in by_end[shared])
        self._front, self._base_front = votes.most_common(1)[0][0] if votes else ("", "")

    def of(self, name: str) -> Tensor | Stored | None:
        """The counterpart of the model's parameter of this (plain) name, if there is one."""
        if not name.startswith(self._front):
            return None
        return self._by_name.get(self._base_front + name.removeprefix(self._front))

    def matched(self, matrices: Sequence[WeightMatrix]) -> dict[str, tuple[WeightMatrix, Tensor | Stored]]:
        """Each matrix of the model with the base's parameter that holds its counterpart."""
        found: dict[str, tuple[WeightMatrix, Tensor | Stored]] = {}
        for matrix in matrices:
            for name in map(plain_name, matrix.parameter_names):
                tensor = self.of(name)
                if tensor is not None:
                    found.setdefault(matrix.name, (matrix, tensor))
        return found


def _check_complete(
    matrices: Sequence[WeightMatrix], pairs: Mapping[str, tuple[WeightMatrix, Tensor | Stored]]
) -> None:
    missing = [matrix for matrix in matrices if matrix.name not in pairs]
    if missing:
        raise ValueError(
            f"`base` is not what the model was fine-tuned from: it lacks {len(missing)} of {len(matrices)} matrices, "
            f"first `{missing[0].parameter_names[0]}`"
        )
    other = [(m, m.parameter.shape, pairs[m.name][1].shape) for m in matrices]
    other = [(m, own, base) for m, own, base in other if own != base]
    if other:
        matrix, own, base = other[0]
        raise ValueError(
            f"`base` is not what the model was fine-tuned from: {len(other)} of {len(matrices)} matrices have another "
            f"shape, first `{matrix.name}`, {tuple(base)} in the base and {tuple(own)} in the model"
        )


def _check_related(changes: Sequence[float]) -> None:
    middle = sorted(changes)[len(changes) // 2] if changes else 0.0
    if not middle < UNRELATED:
        raise ValueError(
            f"`base` is not what the model was fine-tuned from: its weights differ from the model's by {middle:.0%} of "
            "their size (the middle of all matrices), as those of unrelated models do"
        )


def _same(parameter: Tensor, base: Tensor | Stored | None) -> bool:
    """Whether fine-tuning has left a parameter as it was, in its own dtype."""
    if base is None or base.shape != parameter.shape:
        return False
    return torch.equal(parameter, contents(base).to(parameter.device, parameter.dtype))


def _ends(name: str) -> list[str]:
    """All ends of a dotted name, the longest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
