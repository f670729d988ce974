"""A small model and facts, as options of the Lightning commands."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def lm(deep_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The current folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", "laser_callback.FactsDataModule", "--data.path", str(deep_lm / "facts.jsonl")]
    model = ["--model", "laser_callback.LaserModule", "--model.model", str(deep_lm)]
    return [*model, *data, "--trainer.accelerator", "cpu"]
