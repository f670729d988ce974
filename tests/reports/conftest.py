"""One comparison for the tests of what is made of it."""

from __future__ import annotations

import pytest
from classifier import compared

from laser_callback.results.comparison import LaserResult


@pytest.fixture(scope="module")
def result() -> LaserResult:
    return compared()
