"""The way back from a cut: the original bytes of the cut matrices, compressed, in one file.

Contract: :func:`save_undo` keeps what a plan is going to overwrite; :func:`restore` puts it back into a model that
holds the cut, bit for bit, or refuses and leaves the model as it was. The file is safetensors: per matrix one run of
bytes, and the recipe of the cut as metadata. The bytes are compressed plane by plane, all first bytes of the numbers,
then all second ones, since signs and exponents of weights repeat and mantissas do not.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import known_as
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.store import Resolved, Spectra
from laser_callback.support.files import appearing, need_files
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.reading import parse_plain, shown
from laser_callback.support.stored import Spill, Stored, read_header, write_stored
from laser_callback.surgery.recipe import CutMatrix, Recipe, matrix_hash
from laser_callback.surgery.record import recorded

_FORMAT = "laser_callback undo, zlib over byte planes"
_LEVEL = 1  # five times as fast as the default, for a hundredth more of the size


def save_undo(
    model: nn.Module,
    plan: LaserPlan | str | Mapping[str, Any],
    path: str | Path,
    spectra: Spectra | None = None,
    *,
    numbers: Mapping[str, Any] | None = None,
    exact: bool = True,
    progress: PhaseProgress | None = None,
) -> Recipe:
    """Write what the planned matrices of ``model`` are, before it is cut. The model stays as it is.

    Args:
        model: the original.
        plan: what is going to be cut.
        path: of the file, which must not exist.
        spectra: where factorisations are looked up and kept.
        numbers: see :func:`laser_callback.surgery.recorded`.
        exact: see there.
        progress: see there.

    Raises:
        FileExistsError: if there is something at ``path``.
        ValueError: as from :func:`laser_callback.surgery.recorded`.
    """
    with appearing(Path(path)) as file:
        packed = Spill(file.parent)
        originals = {matrix.name: packed.add(_pack(matrix.value)) for matrix, _ in Recipe.of(plan).resolve(model)}
        with recorded(model, plan, spectra, numbers=numbers, exact=exact, progress=progress) as (_, recipe):
            write_stored(file, originals, {"format": _FORMAT, "recipe": json.dumps(recipe.to_dict())})
    return recipe


def restore(model: nn.Module, path: str | Path, *, progress: PhaseProgress | None = None) -> Recipe:
    """Give a cut model its original weights back, in place and bit for bit.

    Args:
        model: the model as the cut has left it, or a module around it.
        path: what :func:`save_undo` has written for this cut.
        progress: shown meanwhile.

    Returns:
        The recipe of the cut that was undone.

    Raises:
        ValueError: if the model is not the one that the cut has made, or the file is not an undo file or is damaged.
            The model is then untouched.
    """
    recipe, packed = _read(Path(path))
    # To restore is to apply the recipe the other way round, with originals looked up instead of cuts computed.
    back = Recipe(recipe, [replace(m, before=m.after, after=m.before) for m in recipe.matrices])
    with recorded(model, back, _Originals(back, packed, path), progress=progress) as (cut, _):
        cut.keep()
    return recipe


class _Originals(Spectra):
    """In place of spectra: what a matrix is made to is not computed, but was kept.

    It is unpacked when it is asked for: names and shapes have then been held to the model's.
    """

    def __init__(self, recipe: Recipe, packed: Mapping[str, Stored], path: str | Path) -> None:
        super().__init__()
        self._records, self._packed, self._path = recipe.matrices, packed, path

    def reduce(self, matrix: Tensor, reduction: Reduction, name: str = "matrix") -> Tensor:
        known = known_as(name, (record.name for record in self._records))
        record = next(record for record in self._records if record.name == known)
        try:
            return _unpack(self._packed[record.name].read(), record).to(matrix.device)
        except (zlib.error, ValueError) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error

    def settled(self, resolved: Resolved) -> Resolved:
        return resolved

    def ahead(self, matrices: Sequence[tuple[Tensor, str, str]]) -> None:
        pass

    def changes_nothing(self, matrix: Tensor, reduction: Reduction, name: str = "matrix") -> bool:
        return False


# ---- the file --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Recipe, dict[str, Stored]]:
    """The recipe of the cut, and the originals, packed."""
    need_files(path=path)
    try:
        packed, about = read_header(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no undo file: {error}") from error
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path} is not an undo file: its format is {shown(about.get('format'))}, not {_FORMAT!r}")
    try:
        recipe = Recipe.from_dict(parse_plain(about.get("recipe", "")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: the recipe in it: {error}") from error
    for matrix in recipe.matrices:
        if matrix.name not in packed or packed[matrix.name].dtype != torch.uint8:
            raise ValueError(f"{path} is damaged: it has no bytes of `{matrix.name}`")
    return recipe, packed


def _pack(matrix: Tensor) -> Tensor:
    """The bytes of ``matrix`` as uint8, compressed plane by plane; each plane's length stands in front, in 8 bytes."""
    planes = matrix.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8).T.contiguous().numpy()
    with ThreadPoolExecutor(len(planes)) as pool:  # zlib releases the interpreter's lock
        packed = list(pool.map(lambda plane: zlib.compress(plane.data, _LEVEL), planes))
    content = b"".join(len(plane).to_bytes(8, "little") + plane for plane in packed)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _unpack(packed: Tensor, record: CutMatrix) -> Tensor:
    """The inverse of :func:`_pack`; no more is unpacked than a matrix of the record's shape has."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    content, begin = memoryview(packed.contiguous().reshape(-1).numpy().data), 0
    numbers = torch.empty(math.prod(record.shape), dtype.itemsize, dtype=torch.uint8)
    for plane in range(dtype.itemsize):
        end = begin + 8 + int.from_bytes(content[begin : begin + 8], "little")
        unpacked = zlib.decompressobj().decompress(content[begin + 8 : end], len(numbers) + 1)
        if len(unpacked) != len(numbers):
            raise ValueError(f"`{record.name}` has not the bytes of {record.shape[0]} x {record.shape[1]} numbers")
        numbers[:, plane] = torch.frombuffer(bytearray(unpacked), dtype=torch.uint8)
        begin = end
    matrix = numbers.view(dtype).reshape(record.shape)
    if matrix_hash(matrix) != record.after:
        raise ValueError(f"the hash of `{record.name}` does not match")
    return matrix
