"""Places that hold elements, and so may be large: tensors of any layout, arrays, and bytes."""

from __future__ import annotations

import operator
from array import array
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy
from typing_extensions import override

from laser_callback.passes.places import Place

# A tensor or array of more elements is copied ahead of time only for the first batch, and from then on if it moves.
LARGE = 2**20

# So many elements of a tensor are compared each time: `.data` and `.numpy()` write without a trace.
_FEW = 2**12


class Values(Place):
    """The elements of a tensor or array: what costs memory to remember.

    Attributes:
        moves: whether a write to it may go unseen, so that it is taken to have been written to by every pass.
    """

    moves = False

    @property
    def is_large(self) -> bool:
        """Whether to remember it costs memory that matters."""
        return size(self.owner) > LARGE

    def is_as_at_first(self) -> bool:
        """Element by element, whatever its version says."""
        return self.holds(self.start)


class _Held:
    """What a tensor holds: its storage and form, their values at one time, and the version that they have in place."""

    __slots__ = ("data", "value", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.data = tensor.data
        self.value = tensor.detach().clone()
        self.version = tensor_version(tensor)


def tensor_version(tensor: Tensor) -> int | None:
    """How often it was written to in place; ``None`` for inference tensors, which do not count that."""
    return None if tensor.is_inference() else tensor._version


class TensorValues(Values):
    """The elements of a tensor."""

    @override
    def read(self) -> Any:
        return _Held(self.owner)

    @override
    def holds(self, content: Any) -> bool:
        if self.moves or content.version is None or tensor_version(self.owner) != content.version:
            return False
        if not is_in_place(self.owner, content.data):
            return False
        return not self.owner.is_cpu or _seem_same(self.owner.detach(), content.value)

    @override
    def write(self, content: Any) -> None:
        with torch.inference_mode(self.owner.is_inference()), torch.no_grad():
            if not is_in_place(self.owner, content.data):
                self.owner.data = content.data
            self.owner.data.copy_(content.value)
        if not self.owner.is_inference():
            increment_version(self.owner)  # each content in place has a version of its own
        content.version = tensor_version(self.owner)

    @override
    def is_as_at_first(self) -> bool:
        return same_elements(self.owner, self.start.value)


def _seem_same(a: Tensor, b: Tensor) -> bool:
    step = a.numel() // _FEW + 1
    if step > 1:
        if not (a.is_contiguous() and b.is_contiguous()):
            return True
        a, b = a.view(-1)[::step], b.view(-1)[::step]
    return same_elements(a, b)


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same; NaN is the same as NaN."""
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and bool(torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, True)))


def is_in_place(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor has the memory that ``data`` has, in the same form."""
    same_form = tensor.shape == data.shape and tensor.stride() == data.stride() and tensor.dtype == data.dtype
    return same_form and tensor.data_ptr() == data.data_ptr()


def is_plain(tensor: Tensor) -> bool:
    """Whether its elements can be read and written as those of any tensor."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_lazy(tensor)
    return plain and not tensor.is_meta and tensor.layout is torch.strided and not tensor.is_nested


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a sparse or a nested one is made of; none for any other."""
    if tensor.layout is torch.jagged:
        return [getattr(tensor, name) for name in ("_values", "_offsets")]
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


class PartsValues(Values):
    """The elements of a sparse or nested tensor, whose version says nothing of what is written to its parts."""

    @override
    def read(self) -> Any:
        whole = None if self.owner.is_nested else self.owner.detach().clone()
        return whole, [part.detach().clone() for part in parts(self.owner if whole is None else whole)]

    @override
    def holds(self, content: Any) -> bool:
        return all(map(same_elements, parts(self.owner), content[1]))

    @override
    def write(self, content: Any) -> None:
        mine, (whole, saved) = parts(self.owner), content
        with torch.inference_mode(any(part.is_inference() for part in mine)), torch.no_grad():
            if [part.shape for part in mine] != [part.shape for part in saved]:
                self.owner.copy_(whole.clone())  # another number of elements that are not zero
            else:
                for part, value in zip(mine, saved, strict=True):
                    part.detach().copy_(value)


class ArrayValues(Values):
    """The elements of a NumPy array."""

    @override
    def read(self) -> Any:
        return self.owner.copy(order="K")

    @override
    def holds(self, content: Any) -> bool:
        if self.owner.shape != content.shape or self.owner.dtype != content.dtype:
            return False
        if self.owner.dtype.hasobject:
            return all(map(operator.is_, self.owner.flat, content.flat))
        if self.owner.flags.forc and self.owner.strides == content.strides:
            a, b = (np.asarray(value).ravel("K").view(np.uint8) for value in (self.owner, content))
            return _same_bytes(a, b)
        floats = self.owner.dtype.kind in "fc"
        return bool(np.array_equal(self.owner, content, equal_nan=floats))

    @override
    def write(self, content: Any) -> None:
        if self.owner.shape != content.shape:
            self.owner.resize(content.shape, refcheck=False)
        self.owner[...] = content


def _same_bytes(a: Any, b: Any) -> bool:
    # Not `np.array_equal`, which makes an array as large as they are.
    return a.shape == b.shape and torch.equal(torch.from_numpy(a), torch.from_numpy(b))


def memory(value: Any) -> memoryview | None:
    """The bytes of what gives others a way to write to them, such as a ``bytearray`` or an ``mmap``."""
    try:
        view = memoryview(value)
        return None if view.readonly or not view.c_contiguous else view.cast("B")
    except (TypeError, ValueError, BufferError):  # no buffer, a closed one, a format of its own
        return None


def size(value: Any) -> int:
    """The number of elements; of memory, of bytes."""
    if isinstance(value, Tensor):
        return value.numel() if not value.is_nested else sum(part.numel() for part in parts(value))
    if isinstance(value, np.ndarray):
        return value.size
    view = memory(value)
    return 0 if view is None else view.nbytes


class Bytes(Values):
    """The bytes of a ``bytearray``, an array of Python's, a writable map of a file, a ctypes object."""

    @override
    def read(self) -> Any:
        view = memory(self.owner)
        return None if view is None else np.array(view)

    @override
    def holds(self, content: Any) -> bool:
        view = memory(self.owner)
        if view is None or content is None:
            return view is content
        return _same_bytes(np.asarray(view), content)

    @override
    def write(self, content: Any) -> None:
        view = memory(self.owner)
        if view is None or content is None:
            return
        if view.nbytes == len(content):
            view[:] = content
            return
        view.release()
        data = content.tobytes()
        self.owner[:] = array(self.owner.typecode, data) if isinstance(self.owner, array) else data
