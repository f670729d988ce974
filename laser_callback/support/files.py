"""Write files and folders so that readers see the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to ``path`` wholly or not at all; its folder is made if it is missing."""
    with _scratch(path) as whole:
        whole.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(whole)
        os.replace(whole, path)


def write_json(path: str | Path, data: Any) -> None:
    """Write plain data as JSON, as :func:`write_atomically` does."""
    write_atomically(Path(path), json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def need_files(**paths: str | Path | None) -> None:
    """Look for files before something long begins.

    Args:
        **paths: by the name of the option that asks for it; ``None`` asks for nothing.

    Raises:
        FileNotFoundError: naming the first option whose file is not there.
    """
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"`{option}`: there is no file {str(path)!r}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a place for a new file or folder; what is put there gets the name ``path`` when the block ends well.

    If it does not, nothing is left behind. Files get the mode that the umask gives, whoever has written them.

    Raises:
        FileExistsError: if there is something at ``path``, before the block or after it.
    """
    _refuse_existing(path)  # before a long block, and not only after it
    with _scratch(path) as whole:
        yield whole
        mode = _mode_of_new_files(whole.parent)  # safetensors makes its files readable by their owner only
        for file in (whole, *whole.rglob("*")):
            if file.is_file():
                file.chmod(mode)
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


def _mode_of_new_files(folder: Path) -> int:
    """What the umask makes of it: to read that itself, it would have to be changed for all threads."""
    (probe := folder / ".mode").touch()
    return stat.S_IMODE(probe.stat().st_mode)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already: name another place, or move it away first")
