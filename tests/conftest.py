"""What tests of several rooms need."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_deep_lm

# What these assert is told as what a test asserts.
pytest.register_assert_rewrite("brute_force", "coverage_page", "replayed", "untouched")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models and matrices as small as these are slower on several."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leaves_no_setting() -> Iterator[None]:
    """Whoever leaves a setting of the process is told, not those who come after."""
    before, ctrl_c = _settings(), signal.getsignal(signal.SIGINT)
    yield
    after = _settings()
    torch.set_grad_enabled(True)
    signal.signal(signal.SIGINT, ctrl_c)  # a Trainer that was interrupted ignores it from then on
    assert after == before


def _settings() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "handlers": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)},
    }


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the package keeps between runs, in a folder of the test's own."""
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def deep_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model as deep as the plans of README, recipes and pages need."""
    return save_deep_lm(tmp_path_factory.mktemp("model"))
