"""A pytest plugin: whatever tests run, each of their Trainers has one callback more.

It is loaded with ``-p with_laser``; ``suite.py`` does so three times, once for each of :data:`MODES`, and compares.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
from torch import nn

from laser_callback import LaserCallback
from laser_callback.compare import arms
from laser_callback.compare.run import ComparisonRun
from laser_callback.plans import LaserPlan
from laser_callback.plans.matrices import find_matrices

MODES = ("nothing", "unpublished", "published")


class Cutting(LaserCallback):
    """Compares in every loop, whatever the module: it cuts the last of its matrices to half of the rank.

    A module without one has nothing to cut; there it does nothing.

    Args:
        published: whether the keys of the reduced model are logged beside the user's.
    """

    def __init__(self, published: bool) -> None:
        super().__init__("/.*/@0.5", loops=("validate", "test", "fit"), report=False)
        self.published = published

    def is_active(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        matrices = find_matrices(pl_module) if isinstance(pl_module, nn.Module) else []
        if not matrices or not super().is_active(trainer, pl_module):
            return False
        last = matrices[-1]
        rho = 0.5 if last.max_rank > 1 else 0.0  # so that the cut always changes something
        self.plans = {self.key_prefix: LaserPlan.parse(f"/{re.escape(last.name)}/@{rho}")}
        return True

    def _finish(self, run: ComparisonRun, trainer: pl.Trainer) -> None:
        with nullcontext() if self.published else patch.object(arms, "publish"):
            super()._finish(run, trainer)


class Nothing(pl.Callback):
    """In the place of :class:`Cutting`, to see which tests fail for the sake of one callback more."""


def extra(mode: str) -> pl.Callback:
    return Nothing() if mode == "nothing" else Cutting(published=mode == "published")


def add_to_trainers(mode: str) -> None:
    """From now on each new Trainer has the callback of ``mode`` behind its own."""
    build = pl.Trainer.__init__

    @functools.wraps(build)
    def init(self: pl.Trainer, *args: Any, callbacks: Any = None, **options: Any) -> None:
        own = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks or ())
        build(self, *args, callbacks=[*own, extra(mode)], **options)

    pl.Trainer.__init__ = init


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--laser", choices=MODES, default="nothing", help="which callback to add to each Trainer")
    parser.addoption("--outcomes", type=Path, help="a JSON-lines file for each test's outcome")
    parser.addoption("--seconds", type=int, default=120, help="after so many seconds a test has failed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which need not be installed")
    add_to_trainers(config.getoption("--laser"))
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes"), config.getoption("--seconds")))


class Outcomes:
    """Writes each test's outcome as soon as it is known, so that a run that dies has told what came before."""

    def __init__(self, path: Path | None, seconds: int) -> None:
        self.path = path
        self.seconds = seconds
        self.process = os.getpid()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        def stop(*_: Any) -> None:
            if os.getpid() == self.process:
                raise TimeoutError(f"the test did not end within {self.seconds} seconds")

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)
        try:
            return (yield)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.path is None or (report.when != "call" and report.passed):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = "" if crash is None else f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
        if "Process " in reason:  # what a child process raised stands at the end
            reason = reason.strip().rpartition("\n")[2]
        with self.path.open("a", encoding="utf-8") as file:
            line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason[:2000]}
            file.write(json.dumps(line) + "\n")
