"""Spectra on disk: a safetensors file for each, found by its key and trusted by its checksum."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save

from laser_callback.spectra.spectrum import Spectrum
from laser_callback.support.files import cache_root
from laser_callback.support.hashing import content_hash

DISK_BYTES = 8 * 2**30
"""What a folder may hold unless said otherwise."""
VERSION = "gram-eigh-float64/3"
"""How spectra are made. To be changed whenever `Spectrum.of` may return other bits."""
_STALE = 3600  # seconds after which a temporary file is a crashed writer's


def default_folder() -> Path:
    """``spectra`` in the package's cache folder (``$LASER_CALLBACK_CACHE``, else ``~/.cache/laser_callback``)."""
    return cache_root() / "spectra"


class SpectrumFolder:
    """Spectra on disk: a safetensors file for each, under its key, with a checksum. Touches no other files.

    Files appear whole, by a rename; a file that is not what was written under its key is removed. Reading and writing
    never raise for the state of the disk: they warn, once.

    Args:
        path: the folder; it is made when there is something to write.
        disk_bytes: when the files exceed this, the least recently used are removed.
    """

    def __init__(self, path: str | Path, disk_bytes: int = DISK_BYTES) -> None:
        self.path = Path(path).expanduser()
        self.disk_bytes = disk_bytes
        self._writes = True
        self._warned: set[str] = set()

    def read(self, key: str, shape: tuple[int, int]) -> Spectrum | None:
        """The spectrum of a matrix of ``shape``, on the CPU; ``None`` if there is none that can be trusted."""
        path = self._file(key)
        try:
            content = path.read_bytes()  # not mapped: a file that vanishes from a network disk would kill the process
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn("read", f"cannot read spectra in {self.path} ({error}): factorising instead")
            return None
        try:
            spectrum = _decode(content, key, shape)
        except Exception as error:  # whatever a broken file makes a parser say
            self._warn("damaged", f"{path} is damaged ({error}): removing it, and factorising anew")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # used now, for the eviction
        return spectrum

    def write(self, key: str, spectrum: Spectrum) -> None:
        """Keep ``spectrum``, unless it is larger than the bound or the folder has refused to be written before."""
        if not self._writes or size_of(spectrum) > self.disk_bytes:
            return
        # Without fsync: what a power cut leaves behind does not pass the checksum.
        scratch = self.path / f".{key}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("xb") as stream:
                    stream.write(_encode(spectrum, key))
                os.replace(scratch, self._file(key))
            finally:
                scratch.unlink(missing_ok=True)
        except OSError as error:
            self._writes = False
            self._warn("write", f"cannot write spectra to {self.path} ({error}): going on without keeping them there")
            return
        self._evict()

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """The spectra with their sizes and times of last use (``st_mtime``), the least recently used first."""
        return sorted(self._scan(r"[0-9a-f]{64}\.safetensors"), key=lambda file: (file[1].st_mtime_ns, file[0].name))

    def clear(self) -> int:
        """Remove all spectra, and what crashed writers have left. Returns how many spectra there were."""
        files = self.files()
        for path, _ in files:
            path.unlink(missing_ok=True)
        self._sweep()
        return len(files)

    def _evict(self) -> None:
        files = self.files()
        excess = sum(stat.st_size for _, stat in files) - self.disk_bytes
        if excess <= 0:
            return
        for path, stat in files:
            if excess <= 0:
                break
            with suppress(OSError):  # another process may have been faster
                path.unlink(missing_ok=True)
            excess -= stat.st_size
        self._sweep()

    def _sweep(self) -> None:
        for path, stat in self._scan(r"\.[0-9a-f]{64}\.\d+\.[0-9a-f]{8}\.tmp"):
            if time.time() - stat.st_mtime > _STALE:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _scan(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        with suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(OSError):  # removed meanwhile
                    if re.fullmatch(pattern, entry.name) and entry.is_file():
                        found.append((Path(entry.path), entry.stat()))
        return found

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


# ---- the file --------------------------------------------------------------------------------------------------------


def _encode(spectrum: Spectrum, key: str) -> bytes:
    tensors = {"values": spectrum.values.cpu(), "basis": spectrum.basis.cpu()}
    metadata = {
        "method": VERSION,
        "shape": "x".join(map(str, spectrum.shape)),
        "checksum": content_hash(key, tensors["values"], tensors["basis"]),
    }
    return save(tensors, metadata)


def _decode(content: bytes, key: str, shape: tuple[int, int]) -> Spectrum:
    # The library gives metadata of files by their path only. The format: length of the header, header, tensors.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata, tensors = header["__metadata__"], load(content)
    # Copied into torch's own memory: elsewhere in a cache line the same product may be summed in another order.
    values, basis = tensors["values"].clone(), tensors["basis"].clone()
    short = min(shape)
    if (
        metadata["method"] != VERSION
        or metadata["shape"] != "x".join(map(str, shape))
        or (values.dtype, values.shape) != (torch.float64, (short,))
        or (basis.dtype, basis.shape) != (torch.float64, (short, short))
    ):
        raise ValueError("it holds something else than its name says")
    if metadata["checksum"] != content_hash(key, values, basis):
        raise ValueError("its checksum does not match")
    return Spectrum(values, basis, shape)


# ---- hashing ---------------------------------------------------------------------------------------------------------


def size_for(shape: tuple[int, int]) -> int:
    """Bytes of the spectrum of a matrix of ``shape``."""
    return 8 * min(shape) * (min(shape) + 1)


def size_of(spectrum: Spectrum) -> int:
    """Bytes of the tensors of ``spectrum``."""
    return spectrum.values.nbytes + spectrum.basis.nbytes
