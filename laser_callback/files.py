"""Write files and folders so that readers see the old content or the new, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to ``path`` wholly or not at all; its folder is made if it is missing."""
    with _scratch(path) as whole:
        whole.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(whole)
        os.replace(whole, path)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a place for a new file or folder; what is put there gets the name ``path`` when the block ends well.

    If it does not, nothing is left behind.

    Raises:
        FileExistsError: if there is something at ``path``, before the block or after it.
    """
    _refuse_existing(path)  # before a long block, and not only after it
    with _scratch(path) as whole:
        yield whole
        for file in (whole, *whole.rglob("*")):
            if file.is_file():
                _flush(file)
        _refuse_existing(path)
        try:
            os.rename(whole, path)
        except OSError as error:
            _refuse_existing(path)  # another process was faster
            raise error


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, since a file from `mkstemp` would be readable by its owner only.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        yield Path(scratch) / path.name


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already: name another place, or move it away first")
