"""Where the package keeps what outlives a run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where the package keeps what outlives a run: ``$LASER_CALLBACK_CACHE``, else ``~/.cache/laser_callback``.

    Raises:
        OSError: if the user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("LASER_CALLBACK_CACHE") or "~/.cache/laser_callback").expanduser()
    except RuntimeError as error:
        raise OSError("there is no home folder to keep anything in: set $LASER_CALLBACK_CACHE to a folder") from error
