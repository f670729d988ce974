"""``laser-callback cache``: what the spectra on disk take, and how to be rid of them."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from laser_callback.cli.command import Answer
from laser_callback.spectra.folder import DISK_BYTES, SpectrumFolder, default_folder


def ls(folder: Path | None = None) -> Answer:
    """Show what the factorisations take that are kept on disk, so that later runs need not make them again.

    Args:
        folder: where they are; by default ``spectra`` in ``$LASER_CALLBACK_CACHE`` or in ``~/.cache/laser_callback``.
    """
    kept = _kept(folder)
    files = kept.files()
    size = sum(stat.st_size for _, stat in files)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("folder", Text(str(kept.path)))
    table.add_row("kept", f"{_count(len(files))}, {decimal(size)} of {decimal(DISK_BYTES)} by default")
    if files:
        table.add_row("last use", f"{datetime.fromtimestamp(files[-1][1].st_mtime):%Y-%m-%d %H:%M}")
    Console(highlight=False).print(table)
    return Answer({"folder": str(kept.path), "spectra": len(files), "bytes": size, "limit_bytes": DISK_BYTES})


def clear(folder: Path | None = None) -> Answer:
    """Remove the factorisations that are kept on disk, and no other file.

    Args:
        folder: where they are, as for ``cache ls``.
    """
    kept = _kept(folder)
    files = kept.files()
    size = sum(stat.st_size for _, stat in files)
    kept.clear()
    print(f"removed {_count(len(files))}, {decimal(size)}, from {kept.path}")
    return Answer({"folder": str(kept.path), "removed": len(files), "bytes": size})


def _kept(folder: Path | None) -> SpectrumFolder:
    if folder is not None and os.path.isfile(folder):
        raise NotADirectoryError(f"`folder`: {str(folder)!r} is a file, expected a folder")
    return SpectrumFolder(default_folder() if folder is None else folder)


def _count(files: int) -> str:
    return f"{files} spectr{'um' if files == 1 else 'a'}"
