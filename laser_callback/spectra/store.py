"""Spectra by content: one factorisation per matrix serves every rho, every batch and, with a folder, every later run.

A spectrum is found by a hash of the matrix' bytes, so that a weight that has changed is never served an old one, and
equal weights share theirs whatever they are called. Contract: :class:`Spectra` returns the same bits from memory, from
disk and from a factorisation (made on the same kind of device with as many threads), holds no more bytes than it is
allowed, and never fails a run because of its folder: what cannot be read is made again, what cannot be written is not
kept, and either is said once. Any number of processes may share a folder, and any number of threads an object.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy
import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.rank_rules import global_ranks, mean_rank, unit
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.spectra.directions import Directions, InputDirections, cut_in_directions, to_text
from laser_callback.spectra.entries import reduce_entries
from laser_callback.spectra.folder import (
    DISK_BYTES,
    VERSION,
    SpectrumFolder,
    default_folder,
    size_for,
    size_of,
)
from laser_callback.spectra.noise import noisy
from laser_callback.spectra.reference import reduce_as_reference
from laser_callback.spectra.spectrum import (
    Spectrum,
    as_double,
    need_weights,
    refuse_non_finite,
    refuse_out_of_range,
)
from laser_callback.support.hashing import content_hash
from laser_callback.support.interrupts import elsewhere, is_awaited
from laser_callback.support.settings import with_gradients, with_inference
from laser_callback.support.stored import lies_in_file

if TYPE_CHECKING:
    from laser_callback.spectra.delta import BaseWeights

NEGLIGIBLE = 1e-3
"""Share of a difference's norm below which what is removed is taken for rounding."""
SIDE_BY_SIDE = 4
"""So many matrices at most are factorised at a time, each on one thread: each needs several times its own memory."""

Resolved = list[tuple[WeightMatrix, Reduction]]
"""What :meth:`LaserPlan.resolve` gives."""

_lock = Lock()
"""Of what is kept in memory. Not an attribute of it: a module with spectra may be copied, and sent to a process."""
_making: WeakValueDictionary[str, Lock] = WeakValueDictionary()
"""By key: held by the thread that reads or makes it."""


class Spectra:
    """Factorisations, kept in memory and on disk.

    Args:
        folder: where factorisations outlive the run; ``None`` keeps them in memory alone.
        memory_bytes: hold no more than this in memory; the least recently used go first. A spectrum takes 8 bytes times
            the square of the matrix' shorter side, on the matrix' device.
        disk_bytes: the same for the folder.
        base: the weights before fine-tuning, for reductions with ``cut="delta"``: what is factorised and cut is then
            the difference to them, and ``matrix``, wherever it is asked for, is the fine-tuned one, by its name.
        directions: for reductions with ``metric="inputs"``: what is known of the inputs.

    Attributes:
        factorised: factorisations made.
        loaded: factorisations read from disk.
        seconds: time spent on both, in all threads together.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        memory_bytes: int = 2**30,
        disk_bytes: int = DISK_BYTES,
        base: BaseWeights | None = None,
        directions: Directions | None = None,
    ) -> None:
        for argument, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise ValueError(f"`{argument}` must be a number of bytes, 0 to keep nothing, got {value}")
        self.base = base
        self.directions = directions
        self.memory_bytes = memory_bytes
        self.folder = None if folder is None else SpectrumFolder(folder, disk_bytes)
        self.factorised = 0
        self.loaded = 0
        self.seconds = 0.0
        self._memory: OrderedDict[str, Spectrum] = OrderedDict()

    @classmethod
    def default(cls, base: BaseWeights | None = None) -> Spectra:
        """With :func:`default_folder` if there can be one."""
        try:
            folder = default_folder()
        except OSError as error:
            warnings.warn(f"{error}. Going on without keeping spectra", stacklevel=2)
            folder = None
        return cls(folder, base=base)

    def sparing(self, model: nn.Module) -> Spectra:
        """The same; for a model that lies in files it holds no more in memory than the largest of its spectra."""
        if any(map(lies_in_file, model.parameters())):
            self.memory_bytes = max((size_for(matrix.shape) for matrix in find_matrices(model)), default=0)
        return self

    @property
    def capacity(self) -> int:
        """So many bytes of spectra outlast their use, in memory or on disk."""
        on_disk = 0 if self.folder is None else self.folder.disk_bytes
        return max(self.memory_bytes, on_disk - on_disk // 100)  # files have headers

    @property
    def held(self) -> int:
        """Bytes in memory now."""
        with _lock:
            return self._held()

    def _held(self) -> int:
        return sum(map(size_of, self._memory.values()))

    def forget(self) -> None:
        """Free what is held in memory."""
        with _lock:
            self._memory.clear()

    def ahead(self, matrices: Sequence[tuple[Tensor, str, str]]) -> None:
        """Find the spectra of these ``(matrix, name, cut)`` now, several at a time, if there is room for them all.

        Only time is gained: a factorisation uses one thread.

        Raises:
            ValueError: as :meth:`of` does.
        """
        workers = min(torch.get_num_threads(), len(matrices), SIDE_BY_SIDE)
        needed = sum(size_for(_shape(matrix)) for matrix, *_ in matrices)
        on_cpu = all(matrix.device.type == "cpu" for matrix, *_ in matrices)
        if workers < 2 or needed > self.capacity or not on_cpu:
            return

        def find(each: tuple[Tensor, str, str]) -> None:
            if not is_awaited():  # what is left to do is done when it is asked for, if at all
                self._of(self.operand(*each), each[1])

        def find_all() -> None:
            with ThreadPoolExecutor(workers) as pool:
                deque(pool.map(find, matrices), maxlen=0)

        elsewhere(find_all)

    def operand(self, matrix: Tensor, name: str = "matrix", cut: str = "weight") -> Tensor:
        """What is factorised and cut, shape (m, n): ``matrix``, or if ``cut`` is "delta" its difference to the base.

        Raises:
            ValueError: if there is no base.
        """
        return matrix if cut == "weight" else self._need_base(name).difference(matrix.detach(), name)

    def _need_base(self, name: str) -> BaseWeights:
        if self.base is None:
            raise ValueError(
                f"cut=delta cuts the difference of `{name}` to what it was fine-tuned from, and there is no base: give "
                "`base`, or in Python spectra=Spectra(base=BaseWeights(..., model))"
            )
        return self.base

    def of(self, matrix: Tensor, name: str = "matrix", cut: str = "weight") -> Spectrum:
        """The spectrum of ``matrix``' :meth:`operand`, any floating dtype, on its device: kept, read or made.

        It is shared with later callers: do not write into its tensors.

        Raises:
            ValueError: if ``matrix`` holds NaN or infinite values, or there is no base for its difference.
        """
        return self._of(self.operand(matrix, name, cut), name)

    def _of(self, matrix: Tensor, name: str) -> Spectrum:
        start = time.perf_counter()
        # Ordinary tensors whatever the mode: one made in inference mode could not serve a later training run.
        with with_inference(False), with_gradients(False):
            matrix, order = _dense(matrix.detach())
            home = _home(matrix)
            key = _key(matrix, order, home)
            with _lock:
                making = _making.setdefault(key, Lock())
            with making:  # others that want the same wait for it
                if (spectrum := self._remembered(key)) is not None:
                    return _moved(spectrum, home)
                spectrum = None if self.folder is None else self.folder.read(key, _shape(matrix))
                loaded = spectrum is not None
                if spectrum is None:
                    spectrum = Spectrum.of(matrix, name)
                    if self.folder is not None:
                        self.folder.write(key, spectrum)
                spectrum = _moved(spectrum, home)
                self._remember(key, spectrum)
        with _lock:
            self.loaded += loaded
            self.factorised += not loaded
            self.seconds += time.perf_counter() - start
        return spectrum

    def _remembered(self, key: str) -> Spectrum | None:
        with _lock:
            if key in self._memory:
                self._memory.move_to_end(key)
            return self._memory.get(key)

    def _remember(self, key: str, spectrum: Spectrum) -> None:
        size = size_of(spectrum)
        if size > self.memory_bytes:
            return
        with _lock:
            while self._memory and self._held() + size > self.memory_bytes:
                self._memory.popitem(last=False)
            self._memory[key] = spectrum

    def settled(self, resolved: Resolved) -> Resolved:
        """The matrices of a resolved plan with reductions that each know their rank.

        Where a reduction sets one threshold for all of its matrices (``*.all@global-2``), each gets the rank that this
        leaves it; all others stay as they are.
        """
        joint: dict[Reduction, dict[int, Tensor]] = {}
        for place, (matrix, reduction) in enumerate(resolved):
            if mean_rank(reduction.rho) is not None and (values := self._values(matrix, reduction)) is not None:
                joint.setdefault(reduction, {})[place] = values
        settled = list(resolved)
        for reduction, values_at in joint.items():
            ranks = global_ranks(list(values_at.values()), mean_rank(reduction.rho) or 0.0)
            for place, rank in zip(values_at, ranks, strict=True):
                settled[place] = settled[place][0], replace(reduction, rho=f"k{rank}")
        return settled

    def _values(self, matrix: WeightMatrix, reduction: Reduction) -> Tensor | None:
        """The singular values that a reduction goes by; ``None`` where a recipe says what it keeps."""
        if reduction.metric == "none":
            return self.of(matrix.value, matrix.name, reduction.cut).values
        known = self.directions
        return known.of(matrix.name, reduction.cut)[0] if isinstance(known, InputDirections) else None

    def reduce(self, matrix: Tensor, reduction: Reduction, name: str = "matrix") -> Tensor:
        """``matrix`` after ``reduction``, shape (m, n), in ``matrix``' dtype and on its device.

        Raises:
            ValueError: if ``matrix`` holds NaN or infinite values or no values at all, what is made of it is beyond its
                dtype, or there is no base for a cut of the difference to it.
        """
        with with_gradients(False):
            reduced = self._reduce(matrix, reduction, name)
            if reduction.noise is not None:
                reduced = noisy(matrix, reduced, reduction.noise)
        refuse_out_of_range(reduced, f"{name} after {brief(reduction)}")
        return reduced

    def _reduce(self, matrix: Tensor, reduction: Reduction, name: str) -> Tensor:
        if reduction.of == "reference":
            return reduce_as_reference(matrix, reduction, name)
        blocks = _blocks(self.operand(matrix, name, reduction.cut), reduction, name)
        parts = [self._reduce_block(block, reduction, name) for block in blocks]
        reduced = parts[0] if len(parts) == 1 else torch.cat(parts)
        return reduced if reduction.cut == "weight" else self._need_base(name).sum(reduced, matrix, name)

    def changes_nothing(self, matrix: Tensor, reduction: Reduction, name: str = "matrix") -> bool:
        """True where rounding would be the only effect: everything is kept, or what is removed keeps its scale.

        Only a rank rule needs the spectrum for that; a number is answered from the shape. Of a difference to a base it
        counts how much the part removed holds, since it may have a low rank (that of LoRA).
        """
        if reduction.of == "reference":
            need_weights(matrix, name)
            return reduction.rank(min(matrix.shape)) == min(matrix.shape)
        if reduction.scale == 1:
            return True
        if reduction.needs_inputs:
            return self._kept(reduction, name).shape[1] == min(matrix.shape)
        operand = self.operand(matrix, name, reduction.cut)
        return all(self._spares(block, reduction, name) for block in _blocks(operand, reduction, name))

    def _spares(self, block: Tensor, reduction: Reduction, name: str) -> bool:
        if reduction.of == "entries" or not reduction.is_ruled:
            size = block.numel() if reduction.of == "entries" else min(block.shape)
            removed = reduction.removed(reduction.rank(size), size)
        else:
            removed = self._of(block, name).removed(reduction)
        if not removed or reduction.cut == "weight" or reduction.of == "entries":
            return not removed
        values = self._of(block, name).values
        values = values / unit(values)
        gone = torch.cat([values[start:stop] for start, stop in removed])
        return bool(gone.norm() <= NEGLIGIBLE * values.norm())

    def _kept(self, reduction: Reduction, name: str) -> Tensor:
        """The directions that a reduction in the metric of the inputs keeps."""
        if self.directions is None:
            raise ValueError(
                f"{brief(reduction)} cuts `{name}` in the metric of its inputs, which is not in the weights: give the "
                "recipe in place of the plan, the search's `result.recipe` or its file"
            )
        return self.directions.kept(name, reduction)

    def directions_text(self, name: str, reduction: Reduction) -> str | None:
        """What a recipe must bring along of the matrix ``name`` for ``reduction``; ``None`` if that is nothing."""
        return to_text(self._kept(reduction, name)) if reduction.needs_inputs else None

    def bringing(self, directions: Directions | None) -> Spectra:
        """The same, with these directions, if there are any."""
        if directions is None:
            return self
        other = copy.copy(self)
        other.directions = directions
        return other

    def _reduce_block(self, block: Tensor, reduction: Reduction, name: str) -> Tensor:
        if reduction.of == "entries":
            refuse_non_finite(block, name)
            return reduce_entries(block, reduction)
        if reduction.is_scaling:
            refuse_non_finite(block, name)
            return (as_double(block) * reduction.scale + 0.0).to(block.device, block.dtype)
        if reduction.needs_inputs:
            refuse_non_finite(block, name)
            return cut_in_directions(block, self._kept(reduction, name), reduction).to(block.device, block.dtype)
        return self._of(block, name).reduce(block, reduction)


# ---- keys ------------------------------------------------------------------------------------------------------------


def _key(dense: Tensor, order: str, home: torch.device) -> str:
    """64 hexadecimal digits that stand for everything that the bits of the spectrum depend on, but for the machine."""
    about = (VERSION, torch.__version__, numpy.__version__, home.type, order, str(dense.dtype), _shape(dense))
    return content_hash(repr(about), dense.T if order == "columns" else dense)


def _dense(matrix: Tensor) -> tuple[Tensor, str]:
    """``matrix`` without gaps, and the order of its elements in memory, on which the bits of a product may depend."""
    if matrix.is_contiguous():
        return matrix, "rows"
    if matrix.stride(0) < matrix.stride(1):
        return matrix.T.contiguous().T, "columns"
    return matrix.contiguous(), "rows"


# ---- small ones ------------------------------------------------------------------------------------------------------


def _blocks(matrix: Tensor, reduction: Reduction, name: str) -> tuple[Tensor, ...]:
    """The groups of rows that ``reduction`` cuts apart."""
    need_weights(matrix, name)
    if reduction.blocks > len(matrix):
        raise ValueError(
            f"`blocks` of {brief(reduction)} must be at most the number of rows of `{name}`, {len(matrix)}, got "
            f"{reduction.blocks}"
        )
    return matrix.tensor_split(reduction.blocks)


def _home(matrix: Tensor) -> torch.device:
    """Where `Spectrum.of` leaves its result: Apple's GPUs have no float64."""
    return torch.device("cpu") if matrix.device.type == "mps" else matrix.device


def _moved(spectrum: Spectrum, device: torch.device) -> Spectrum:
    if spectrum.basis.device == device:
        return spectrum
    return Spectrum(spectrum.values.to(device), spectrum.basis.to(device), spectrum.shape)


def _dtype(matrix: Tensor) -> str:
    return str(matrix.dtype).removeprefix("torch.")


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
