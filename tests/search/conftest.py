"""A model with a planted effect, and a cache of its own for each test."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.planted import Planted, plant
from recall import Recall, all_examples
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Any) -> None:
    """What one search has factorised must not help the next."""


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(layers=2, subjects=16, steps=150)


@pytest.fixture
def recall(planted: Planted) -> tuple[Recall, DataLoader]:
    return Recall(planted.module.model).eval(), all_examples(planted)
