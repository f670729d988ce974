"""A Trainer that writes below the test's folder, and a fresh count of the toy's steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
from toy import CALLS
from trainers import quiet_trainer


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    CALLS.clear()


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    return partial(quiet_trainer, default_root_dir=tmp_path)
