"""A Trainer that says nothing about itself and leaves nothing behind: for runs inside of other work."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from laser_callback.compare.callback import accelerator_of


@contextmanager
def quiet_trainer(accelerator: str = "auto", **options: Any) -> Iterator[pl.Trainer]:
    """Within: a Trainer on one device, and Lightning introduces neither it nor itself.

    Ctrl-C comes out as KeyboardInterrupt, and may be struck again: Lightning exits the process at the first one, and
    has all further ones ignored.

    Args:
        accelerator: as in ``Trainer``, but "auto" takes CUDA or the CPU, and "cuda:1" names the device.
        **options: of ``Trainer``; by default it logs, saves and shows nothing.
    """
    name, _, index = accelerator_of(accelerator).partition(":")
    shows = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(shows, False), **options}
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(does not have many workers|isinstance.treespec, LeafSpec)")
            yield pl.Trainer(accelerator=name, devices=[int(index)] if index else 1, **options)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        logger.setLevel(level)
        if handler not in (None, signal.SIG_IGN) and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
