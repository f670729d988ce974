"""Where the package keeps what outlives a run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where the package keeps what outlives a run: ``$LASER_CALLBACK_CACHE``, else ``~/.cache/laser_callback``."""
    return Path(os.environ.get("LASER_CALLBACK_CACHE") or "~/.cache/laser_callback").expanduser()
