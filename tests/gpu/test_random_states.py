"""Random numbers of the device's own generator: replay and factorisation neither lose nor draw any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from matrices import noise
from replayed import WIDTH, Replayed, Stack, assert_same
from torch import Tensor

from laser_callback.passes.state import RandomState
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.store import Spectra


@pytest.fixture
def stack() -> Stack:
    return Stack().to(DEVICE)


def twice(stack: Stack, replayed: Replayed) -> None:
    """A step that draws before, between and after two passes, with replay as without."""
    x = torch.ones(2, 5, WIDTH, device=DEVICE)

    def step() -> Any:
        first = torch.rand(2, device=DEVICE)
        return first, stack(x), torch.rand(2, device=DEVICE), stack(x), torch.rand(2, device=DEVICE)

    state = RandomState.now()
    expected = replayed.computed(step)
    for run in (replayed.original, replayed.reduced):
        state.set()
        got = run(step)
    assert_same(got, expected)


def test_a_step_that_draws(stack: Stack) -> None:
    replayed = Replayed(stack)
    twice(stack, replayed)
    assert (replayed.report().replayed, replayed.report().run) == (6, 0)


def test_a_layer_that_draws(stack: Stack) -> None:
    def dropout(_: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, training=True)

    stack.layers[0].change = dropout
    replayed = Replayed(stack)
    twice(stack, replayed)
    assert replayed.report().reasons == {"it draws random numbers": 2}
    assert replayed.report().replayed == 4


def test_the_cut_of_the_paper_s_code_has_a_seed_of_its_own() -> None:
    matrix, cut = noise(40, 30).to(DEVICE), Reduction(layer=0, matrix="fc_in", rho=0.3, of="reference")
    state = RandomState.now()
    first = Spectra().reduce(matrix, cut)
    drawn = torch.rand(4, device=DEVICE)
    assert torch.equal(Spectra().reduce(matrix, cut), first)
    state.set()
    assert torch.equal(torch.rand(4, device=DEVICE), drawn)
