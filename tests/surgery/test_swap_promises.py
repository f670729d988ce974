"""What `reduced` does with weights that the block writes, moves, or casts, and with blocks that end in any order."""

from __future__ import annotations

import copy
import gc
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import gpt2
from torch import Tensor, nn
from weights import Snapshot

from laser_callback.surgery import reduced


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc_in": nn.Linear(8, 8), "fc_out": nn.Linear(8, 8)}) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["fc_out"](torch.relu(layer["fc_in"](x)))
        return x


X = torch.ones(1, 8)
PLAN = "0.fc_in@0.3"


@pytest.fixture
def net() -> Net:
    return Net().eval()


def weight(net: Net) -> nn.Parameter:
    return net.layers[0]["fc_in"].weight


@torch.no_grad()
def test_one_autocast_block_around_both_passes(net: Net) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        alone = net(X)
    with torch.autocast("cpu", torch.bfloat16), reduced(net, PLAN):
        cut = net(X)
    assert not torch.equal(alone, cut)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(X)
        with reduced(net, PLAN):
            inside = net(X)
        after = net(X)
    assert torch.equal(before, alone)
    assert torch.equal(inside, cut)
    assert torch.equal(after, alone)


@torch.no_grad()
def test_blocks_of_one_matrix_end_in_any_order(net: Net) -> None:
    snapshot = Snapshot(net)
    first, second, third = (reduced(net, f"0.fc_in@{rho}") for rho in (0.3, 0.5, 0.7))
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        open_blocks = [first.__enter__(), second.__enter__(), third.__enter__()]
        for position in order:
            assert not snapshot.is_restored()
            open_blocks[position].__exit__(None, None, None)
        assert snapshot.is_restored(), order


def _steps(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(X).sum().backward()
    optimizer.step()


WRITES: dict[str, Callable[[Net], Any]] = {
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "optimizer": _steps,
    "data": lambda net: setattr(weight(net), "data", torch.zeros(8, 8)),
    "in place": lambda net: nn.init.zeros_(weight(net)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_a_reduced_weight_is_told(net: Net, write: Callable[[Net], Any]) -> None:
    before = weight(net).detach().clone()
    with (
        pytest.warns(UserWarning, match=r"layers\.0\.fc_in.*written to while reduced by '0\.fc_in@0\.3'"),
        reduced(net, PLAN),
    ):
        write(net)
    assert torch.equal(weight(net), before)


@pytest.mark.filterwarnings("error")
def test_reading_copying_and_moving_are_not_writing(net: Net) -> None:
    before = weight(net).detach().clone()
    with reduced(net, PLAN):
        net(X).sum().backward()
        copy.deepcopy(net).load_state_dict(net.state_dict())
        for parameter in net.parameters():  # as a trip to a device and back
            parameter.data = parameter.data.clone()
    assert torch.equal(weight(net), before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_weight_comes_back_in_the_precision_that_the_module_has_by_then(net: Net, dtype: torch.dtype) -> None:
    before = weight(net).detach().clone()
    with reduced(net, PLAN), torch.no_grad():
        net.to(dtype)
        net(X.to(dtype))
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
    assert torch.equal(weight(net), before.to(dtype))
    with torch.no_grad():
        net(X.to(dtype))


def test_a_reduction_that_is_entered_by_hand_and_dropped(net: Net) -> None:
    snapshot = Snapshot(net)
    with pytest.warns(UserWarning, match=r"'0\.fc_in@0\.3' was entered, never left and dropped"):
        reduced(net, PLAN).__enter__()
    assert snapshot.is_restored()


def test_a_reduction_that_stays_survives_being_dropped(net: Net) -> None:
    snapshot = Snapshot(net)
    cut = reduced(net, PLAN).__enter__()
    cut.stay()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del cut
        gc.collect()
    assert not snapshot.is_restored()


def test_a_handler_finds_the_original_weights(net: Net) -> None:
    before, saved = copy.deepcopy(net.state_dict()), []

    def handler(*_: Any) -> None:
        saved.append(copy.deepcopy(net.state_dict()))

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with reduced(net, PLAN), reduced(net, "0.fc_in@0.1, 1.mlp@0.2"):
            inside = net(X)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert torch.equal(net(X), inside)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(saved) == 1
    assert all(torch.equal(saved[0][name], before[name]) for name in before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_handler_that_raises_at_any_microsecond_leaves_nothing(net: Net) -> None:
    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    snapshot, cut = Snapshot(net), reduced(net, "0.mlp@0.3, 1.mlp@0.3")
    cut.prepare()
    hits, rng = 0, random.Random(0)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(1000):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                with cut:
                    pass
                time.sleep(3e-4)
            except KeyboardInterrupt:
                hits += 1
            assert snapshot.is_restored()
            assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 900


@pytest.mark.parametrize("how", ["load", "convert", "new object"])
def test_a_parameter_object_that_is_exchanged_inside_goes_back_too(how: str) -> None:
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with reduced(model, "1.mlp@0.1"):
        if how == "load":
            model.load_state_dict(model.state_dict(), assign=True)
        elif how == "convert":
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                model.half().float()
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(False)
        else:
            layer = model.transformer.h[1].mlp.c_fc
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    rounding = 2e-3 if how == "convert" else 0.0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=rounding)


def test_the_block_after_one_that_was_written_to_holds_the_cut() -> None:
    model = gpt2()
    cut = reduced(model, "1.fc_in@0.1")
    weight = model.transformer.h[1].mlp.c_fc.weight
    with cut:
        first = weight.detach().clone()
    with pytest.warns(UserWarning, match="What was written is lost"), cut, torch.no_grad():
        weight.add_(1.0)
    with cut:
        assert torch.equal(weight, first)
    with pytest.raises(KeyError), cut, torch.no_grad():
        {}[weight.add_(1.0)]  # written, then raised
    with cut:
        assert torch.equal(weight, first)
