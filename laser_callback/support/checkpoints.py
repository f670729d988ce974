"""Checkpoints, read without running what is in them.

torch reads tensors and plain data (``weights_only=True``); a checkpoint of Lightning also holds the module's
hyperparameters, which may be any objects. Contract: of these only such are made as the module at hand has among its own
hyperparameters, since whoever gives a module trusts what it is made of; all else is refused, by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from laser_callback.support.files import need_files
from laser_callback.support.interrupts import whole
from laser_callback.support.suggest import clipped


def read_checkpoint(path: str | Path, *owners: Any) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: of a file that ``torch.save`` or Lightning has written.
        *owners: modules or datamodules: what their hyperparameters are made of may be in it; and classes that may.

    Raises:
        ValueError: if it holds other objects, or cannot be read.
    """
    with own_classes(*owners):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever a foreign or broken file makes a parser say
            if names := strangers(path):
                raise ValueError(
                    f"{str(path)!r} holds objects beside tensors ({', '.join(names)}), which are not loaded from a "
                    "file that might be anybody's: if you trust them, call `torch.serialization.add_safe_globals`"
                ) from error
            raise ValueError(f"{str(path)!r} is damaged, or no checkpoint: {clipped(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must be a checkpoint, a dict with weights, got a {type(content).__name__}")
    return content


def read_tensors(path: str | Path, option: str) -> dict[str, Tensor]:
    """The tensors of the safetensors file that an option names.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else.
    """
    need_files(**{option: path})
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`{option}`: {path} is damaged, or no safetensors file: {clipped(error)}") from error


def need_checkpoint(path: str | Path, option: str) -> None:
    """Look, without loading it, whether a file may be one of ``torch.save``.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is none.
    """
    need_files(**{option: path})
    with Path(path).open("rb") as file:
        pickled = file.read(2) == b"\x80\x02"  # as torch wrote them before 1.6
    if not pickled and not zipfile.is_zipfile(path):
        raise ValueError(f"`{option}`: {path} is damaged, or no checkpoint of torch.save")


@whole
def own_classes(*owners: Any) -> Generator[None, None, None]:
    """Within: torch reads what the hyperparameters of ``owners`` are made of, too, with ``weights_only=True``."""
    own: set[Any] = set()
    for owner in owners:
        own |= {owner} if isinstance(owner, type) else _made_of(_hyperparameters(owner))
    # On its way out the context takes back all that it was given: not what the user has allowed.
    with torch.serialization.safe_globals([*own.difference(torch.serialization.get_safe_globals())]):
        yield


def strangers(path: str | Path, *owners: Any) -> list[str]:
    """What is in a checkpoint that :func:`read_checkpoint` refuses: names of classes and functions.

    Nothing is loaded for that. Empty, too, if the file is not one of ``torch.save``.
    """
    with own_classes(*owners), suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return []


def unreadable(owner: Any) -> list[str]:
    """The hyperparameters of a module or datamodule that would be refused in its own checkpoint."""
    content = _hyperparameters(owner)
    if _comes_back(content, owner):
        return []
    return [name for name, value in content.items() if not _comes_back(value, owner)] or list(content)


def _comes_back(content: Any, owner: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        buffer.seek(0)
        with own_classes(owner):
            torch.load(buffer, weights_only=True)
    except Exception:  # whatever a foreign object makes of it
        return False
    return True


def _hyperparameters(owner: Any) -> Any:
    """As Lightning puts them into a checkpoint."""
    found = getattr(owner, "hparams", None) or {}
    return dict(found) if isinstance(found, dict) else found  # OmegaConf's stay what they are


class _Names(pickle.Pickler):
    """Pickles all but tensors, and notes of what types the objects are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2, fix_imports=False)  # the protocol of torch
        self.types: set[Any] = set()

    @override
    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if isinstance(obj, Tensor) else None

    @override
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
            self.types.add(type(obj))
        return NotImplemented


def _made_of(content: Any) -> set[Any]:
    """Classes, and the functions that pickle uses to make their objects, without what would serve to make any other."""
    buffer = io.BytesIO()
    pickler = _Names(buffer)
    try:
        pickler.dump(content)
    except Exception:  # it cannot be saved either
        return set()
    names = [str(arg).split(" ") for code, arg, _ in pickletools.genops(buffer.getvalue()) if code.name == "GLOBAL"]
    found = {getattr(sys.modules[module], name) for module, name in names} | pickler.types
    return {
        each
        for each in found
        if hasattr(each, "__qualname__") and (isinstance(each, type) or each.__module__ != "builtins")
    }
