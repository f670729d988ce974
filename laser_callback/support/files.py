"""Write files and folders so that readers see the old content or the new, never a part.

Contract: what is being written lies in a hidden folder beside its place, which its writer holds locked. Of what a
killed writer has left the lock is gone, and the next writer of the same place removes it.
"""

from __future__ import annotations

import errno
import glob
import importlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from laser_callback.support.plain_json import plain

_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None  # elsewhere nothing is swept
_MARK = ".laser-"
"""In the name of each hidden folder, ahead of what makes it unique."""
_LONGEST = 200  # bytes of a place's name in that of its hidden folder: file systems hold 255


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to ``path`` wholly or not at all; its folder is made if it is missing.

    What is there keeps its mode, and a link stays a link: what it leads to is written. Half of a surrogate pair, which
    UTF-8 does not have, is written as JSON and Python escape it.
    """
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(raw)  # a terminal or a pipe
        return
    with _scratch(path) as whole:
        whole.write_bytes(raw)
        with suppress(FileNotFoundError):
            whole.chmod(stat.S_IMODE(path.stat().st_mode))
        _flush(whole)
        os.replace(whole, path)


def write_json(path: str | Path, data: Any) -> None:
    """Write data as JSON, as :func:`write_atomically` does; :func:`plain` makes of it what JSON can hold."""
    write_atomically(Path(path), json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def need_files(**paths: str | Path | None) -> None:
    """Look for files before something long begins.

    Args:
        **paths: by the name of the option that asks for it; ``None`` asks for nothing.

    Raises:
        FileNotFoundError: naming the first option whose file is not there.
        IsADirectoryError: or is a folder.
    """
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"`{option}`: there is no file {str(path)!r}")
        if path is not None and Path(path).is_dir():
            raise IsADirectoryError(f"`{option}`: {str(path)!r} is a folder, expected a file")


def need_writable(**paths: str | Path | None) -> None:
    """Try before something long begins whether files can be written afterwards; nothing is left behind.

    Args:
        **paths: of the files, by the name of the option that asks for it; ``None`` asks for nothing.

    Raises:
        OSError: naming the first option whose file cannot be written, and why.
    """
    for option, path in paths.items():
        if path is None:
            continue
        place = Path(os.path.realpath(path))
        try:
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file")
            if os.path.lexists(place) and not place.is_file():
                continue  # a terminal or a pipe
            folder = place.parent
            while not os.path.lexists(folder):
                folder = folder.parent
            with tempfile.TemporaryDirectory(dir=folder, prefix=_MARK):
                pass
        except OSError as error:
            raise type(error)(f"`{option}`: {str(path)!r} cannot be written: {error.strerror or error}") from error


@contextmanager
def told_if_unwritten(what: str) -> Iterator[None]:
    """Within: a disk that is full, or gone, costs ``what`` and no more; that is a warning."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not be written ({error}): going on without it", stacklevel=3)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a place for a new file or folder; what is put there gets the name ``path`` when the block ends well.

    If it does not, nothing is left behind. Of several processes that make one file or folder, one succeeds. Files get
    the mode that the umask gives, whoever has written them.

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
            os.rename(whole, path) if whole.is_dir() else _claim(whole, path)
        except OSError as error:
            _refuse_existing(path)  # another process was faster
            raise error


def _claim(whole: Path, path: Path) -> None:
    """Give a file a name that nothing has: a rename would take it from another file."""
    try:
        os.link(whole, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is claimed first, and filled then
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        try:
            os.replace(whole, path)
        except BaseException:
            path.unlink()
            raise


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, since a file from `mkstemp` would be readable by its owner only.
    prefix = f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST])}{_MARK}"
    if _fcntl is None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as scratch:
            yield Path(scratch) / path.name
        return
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_if_left(left)
    while True:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as scratch:
            try:
                lock = os.open(scratch, os.O_RDONLY)
            except FileNotFoundError:  # another writer has taken it for a killed one's
                continue
            try:
                with suppress(OSError):  # a file system without locks: what is left there stays
                    _fcntl.flock(lock, _fcntl.LOCK_EX)
                if os.path.lexists(scratch):
                    yield Path(scratch) / path.name
                    return
            finally:
                os.close(lock)


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _fcntl.flock(lock, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


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
