"""Tensors that lie in files of the safetensors format, and parameters whose values do.

Contract: a :class:`Stored` tensor is read when it is asked for, into memory of its own (a mapped file that vanishes
would kill the process), and nothing of it is held afterwards. A parameter on the meta device with such a tensor is used
as any other: :func:`contents` gives its values, :func:`place` and :func:`put` say where they are. What replaces it goes
to a :class:`Spill`, a file without a name, which is gone with the process.

The format: 8 bytes with the length of the header, the header as JSON, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from laser_callback.support.suggest import clipped

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_PIECE = 2**24  # bytes that are copied at a time


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
        source: the file.
        begin: its first byte there.
        nbytes: how many it has.
        kind: its dtype, as the format calls it.
        shape: its shape.
        scratch: the folder for what replaces it; ``None`` is the system's.
    """

    source: Path | Spill
    begin: int
    nbytes: int
    kind: str
    shape: tuple[int, ...]
    scratch: Path | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; ``None`` if it is one of those that nothing here computes with."""
        return _DTYPES.get(self.kind)

    def __getitem__(self, index: int) -> Stored:
        """One of those that are stacked in it."""
        each = self.nbytes // self.shape[0]
        return replace(self, begin=self.begin + index * each, nbytes=each, shape=self.shape[1:])

    def read(self) -> Tensor:
        """A copy of it, on the CPU.

        Raises:
            OSError: if the file has become shorter.
        """
        content = torch.empty(self.nbytes, dtype=torch.uint8)
        self._into(content.numpy().data, 0)
        assert self.dtype is not None
        return content.view(self.dtype).reshape(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, a few at a time."""
        piece = memoryview(bytearray(min(self.nbytes, _PIECE)))
        for start in range(0, self.nbytes, _PIECE):
            part = piece[: self.nbytes - start]
            self._into(part, start)
            yield part

    def _into(self, room: memoryview, start: int) -> None:
        with _opened(self.source) as stream:
            stream.seek(self.begin + start)
            done = 0
            while done < len(room):  # the system reads no more than 2 GiB at a time
                got = stream.readinto(room[done:])
                if not got:
                    raise OSError(f"{self.source} has become shorter while it was read")
                done += got


class Spill:
    """A file without a name, for what is too much to hold.

    Args:
        folder: of the file system that it takes room of; ``None`` is the system's temporary one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.stream = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with self
        weakref.finalize(self, self.stream.close)

    def add(self, tensor: Tensor) -> Stored:
        """Put a tensor there; what it takes in memory may then be freed."""
        kind = next(kind for kind, dtype in _DTYPES.items() if dtype == tensor.dtype)
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        begin = self.stream.seek(0, os.SEEK_END)
        done = 0
        while done < len(content):
            done += self.stream.write(content[done:])
        return Stored(self, begin, len(content), kind, tuple(tensor.shape), self._folder)


@contextmanager
def _opened(source: Path | Spill) -> Iterator[FileIO]:
    if isinstance(source, Spill):
        yield source.stream
    else:
        with source.open("rb", buffering=0) as stream:
            yield stream


# ---- parameters ------------------------------------------------------------------------------------------------------


def lies_in_file(parameter: Tensor) -> bool:
    """Whether the values of a parameter are in a file."""
    return "stored" in vars(parameter)


def has_values(parameter: Tensor) -> bool:
    """Whether a parameter has values, in memory or in a file."""
    return not parameter.is_meta or lies_in_file(parameter)


def place(parameter: nn.Parameter) -> Tensor | Stored:
    """Where the values of a parameter are: its live tensor, outside of autograd, or what lies in a file."""
    stored: Stored | None = vars(parameter).get("stored")
    return parameter.data if stored is None else stored


def put(parameter: nn.Parameter, values: Tensor | Stored) -> None:
    """Let a parameter have these values from now on."""
    if isinstance(values, Stored):
        vars(parameter)["stored"] = values
    else:
        parameter.data = values


def contents(values: Tensor | Stored) -> Tensor:
    """The values of a parameter or of a place: the live tensor, or a copy of what lies in a file."""
    if isinstance(values, nn.Parameter):
        values = place(values)
    return values.read() if isinstance(values, Stored) else values


# ---- files -----------------------------------------------------------------------------------------------------------


def read_header(path: Path, scratch: Path | None = None) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their bytes, and its metadata.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is damaged: cut off, say, or no such file at all.
    """
    try:
        with safe_open(path, "pt"):  # holds lengths and places to each other
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {clipped(error)}") from error
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    about: dict[str, str] = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        tensors[name] = Stored(path, 8 + size + begin, end - begin, entry["dtype"], tuple(entry["shape"]), scratch)
    return tensors, about


def write_stored(
    path: Path,
    tensors: Mapping[str, Stored],
    about: Mapping[str, str],
    advance: Callable[[float], None] = lambda amount: None,
) -> None:
    """Write a safetensors file of these tensors, in their order.

    Args:
        path: of the file.
        tensors: by name. Those of more bytes a number should come first, as the format wants them aligned.
        about: its metadata.
        advance: is told how many bytes more are done.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                stream.write(piece)
                advance(len(piece))
