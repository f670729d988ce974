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
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from laser_callback.support.plain_json import plain

_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None  # elsewhere nothing is swept
_MARK = ".laser-"
"""In the name of each hidden folder, ahead of what makes it unique."""
_LONGEST = 200  # bytes of a place's name in that of its hidden folder: file systems hold 255
_SHOWN = 600  # characters of a path in a message
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) if os.name == "posix" else (errno.ENOSPC, errno.EFBIG)
_EXAMPLES = ".examples.jsonl"  # ends the name of what goes beside a result


def cache_root() -> Path:
    """Where the package keeps what outlives a run: ``$LASER_CALLBACK_CACHE``, else ``~/.cache/laser_callback``.

    Raises:
        OSError: if the user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("LASER_CALLBACK_CACHE") or "~/.cache/laser_callback").expanduser()
    except RuntimeError as error:
        raise OSError("there is no home folder to keep anything in: set $LASER_CALLBACK_CACHE to a folder") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to ``path`` wholly or not at all; its folder is made if it is missing.

    What is there keeps its mode, and a link stays a link: what it leads to is written. Half of a surrogate pair, which
    UTF-8 does not have, is written as JSON and Python escape it.

    Raises:
        OSError: if it cannot be written, with ``path`` as it was given.
    """
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    place = Path(os.path.realpath(path))
    with _told_of(path):
        if place.exists() and not place.is_file() and not place.is_dir():
            place.write_bytes(raw)  # a terminal or a pipe
            return
        with _scratch(place) as whole:
            whole.write_bytes(raw)
            with suppress(FileNotFoundError):
                whole.chmod(stat.S_IMODE(place.stat().st_mode))
            _flush(whole)
            os.replace(whole, place)


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
        OSError: or cannot be looked for.
    """
    for option, path in paths.items():
        if path is None:
            continue
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise FileNotFoundError(f"`{option}`: there is no file {_quoted(path)}") from None
        except OSError as error:
            raise type(error)(f"`{option}`: {_quoted(path)} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"`{option}`: {_quoted(path)} is a folder, expected a file")


def need_writable(read: Mapping[str, str | Path | None] | None = None, /, **paths: str | Path | None) -> None:
    """Try before something long begins whether files can be written afterwards; nothing is left behind.

    Of a ``.json`` also the file of examples is tried that goes beside a result.

    Args:
        read: files that are read for what is written, by the names of their options.
        **paths: of the files, by the name of the option that asks for it; ``None`` asks for nothing.

    Raises:
        OSError: naming the first option whose file cannot be written, and why.
        ValueError: if it is one that is read, or that another option writes.
    """
    taken = {
        os.path.realpath(path): option  # text, such as a plan's, may also stand for itself
        for option, path in (read or {}).items()
        if path is not None and os.path.isfile(path)
    }
    for option, path in paths.items():
        if path is None:
            continue
        try:
            place = Path(os.path.realpath(path))
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file")
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.stat(place).st_mode):
                    continue  # a terminal or a pipe
            beside = [place.with_suffix(_EXAMPLES)] if place.suffix == ".json" else []
            _try(place, *beside)
        except (OSError, ValueError) as error:
            kind, reason = (type(error), error.strerror) if isinstance(error, OSError) else (OSError, None)
            raise kind(f"`{option}`: {_quoted(path)} cannot be written: {reason or error}") from error
        for each in (place, *beside):
            if (other := taken.setdefault(str(each), option)) != option:
                what = "is" if each == place else f"has its examples in {each.name}, which is"
                raise ValueError(f"`{option}`: {_quoted(path)} {what} also `{other}`: name another file")


def need_writable_folder(**paths: str | Path | None) -> None:
    """As :func:`need_writable`, of folders to put files into."""
    for option, path in paths.items():
        if path is None:
            continue
        if os.path.lexists(path) and not os.path.isdir(path):
            raise NotADirectoryError(f"`{option}`: {_quoted(path)} is no folder")
        need_writable(**{option: Path(path) / "file"})


def _try(*places: Path) -> None:
    """Make files of these names, of one folder, in a scratch folder."""
    folder = places[0].parent
    while not os.path.lexists(folder):
        folder = folder.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=_MARK) as scratch:
        for place in places:
            probe = Path(scratch, place.name)
            try:
                probe.touch()
            except OSError as error:
                about = "" if place == places[0] else f" for the examples beside it, {_quoted(place.name)}"
                raise OSError(error.errno, f"{error.strerror}{about}") from error
            probe.unlink()


def _quoted(path: str | Path) -> str:
    text = repr(str(path))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Within: what cannot be written is an OSError with ``path``, and not with its hidden folder."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    except OSError as error:
        hidden = error.filename is not None and _MARK in str(error.filename)
        if not hidden and (error.filename is not None or error.errno not in _FULL):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
        OSError: if it cannot be written, with ``path`` as it was given; also where a library has its own error for it.
    """
    _refuse_existing(path)  # before a long block, and not only after it
    with _told_of(path), _scratch(path) as whole:
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
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: name another place, or move it away first")
