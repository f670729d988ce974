"""What tests of several rooms need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_deep_lm

# What these assert is told as what a test asserts.
pytest.register_assert_rewrite("brute_force", "coverage_page", "replayed", "untouched")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models and matrices as small as these are slower on several."""
    torch.set_num_threads(1)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the package keeps between runs, in a folder of the test's own."""
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def deep_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model as deep as the plans of README, recipes and pages need."""
    return save_deep_lm(tmp_path_factory.mktemp("model"))
