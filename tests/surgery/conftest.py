"""Inputs of the tests of layer replay."""

from __future__ import annotations

import pytest
import torch
from replayed import WIDTH
from torch import Tensor


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 300, (2, 6), generator=torch.Generator().manual_seed(1))
