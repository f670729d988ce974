"""Progress of a long run: a bar with the time left for each phase in a terminal, elsewhere a line when it is done."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Generator, Iterator

import transformers.utils.logging
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from laser_callback.support.interrupts import whole


def quiet_libraries() -> None:
    """For commands: remarks on hardware, workers, loggers and libraries' internals are noise there; the rest is not."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for noise in ("does not have many workers", "but have no logger configured", "isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{noise}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI calls


class _Bar(Progress):
    """A progress bar with something above it."""

    above: RenderableType | None = None

    @override
    def get_renderables(self) -> Iterator[RenderableType]:
        if self.above is not None:
            yield self.above
        yield self.make_tasks_table(self.tasks)


class PhaseProgress:
    """Shows the phase that is running.

    Args:
        enabled: show anything at all.
        console: where; standard error by default, so that output can be piped.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self._enabled = enabled
        self._console = console or Console(stderr=True)
        self._live: _Bar | None = None
        self._above: RenderableType | None = None

    @whole
    def phase(self, description: str, total: float | None = None) -> Generator[None, None, None]:
        """Within: the phase runs. ``total`` is in the units of :meth:`advance`; ``None`` if unknown."""
        begin = time.perf_counter()
        if not self._enabled:
            yield
            return
        if not self._console.is_terminal:
            yield
            self._done(description, begin)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with _Bar(*columns, console=self._console, transient=True) as live:
            live.above = self._above
            live.add_task(description, total=total)
            self._live = live
            try:
                yield
            finally:
                self._live = None
        self._done(description, begin)

    def advance(self, amount: float) -> None:
        """So much of the phase's total is done."""
        if self._live is not None:
            self._live.advance(self._live.task_ids[0], amount)

    def show(self, above: RenderableType) -> None:
        """Show this above the bars of the phases to come, in place of what was there; only in a terminal."""
        self._above = above

    def say(self, text: str) -> None:
        """A line between two phases."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _done(self, description: str, begin: float) -> None:
        self.say(f"{description}  {time.perf_counter() - begin:.1f} s")
