"""One batch with layer replay and without: a small stack of layers that count their passes, and the comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_callback import LaserPlan, reduced
from laser_callback.surgery.replay import LayerReplay, ReplayReport

WIDTH = 8
LOG = logging.getLogger("replayed")


class Block(nn.Module):
    """A layer that logs its forward passes: replay may skip what is only logged."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc_in = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc_out = nn.Linear(2 * WIDTH, WIDTH)
        self.index = index
        self.change: Callable[..., Any] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            LOG.info("%d", self.index)
        y = x + self.fc_out(F.gelu(self.fc_in(self.norm(x))))
        return y if self.change is None else self.change(self, x, y, *args, **kwargs)


class Stack(nn.Module):
    """Four layers; the code around them can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Block(i) for i in range(4))
            self.head = nn.Linear(WIDTH, 3)
        self.eval()
        self.through: Callable[[Stack, Tensor], Tensor] = lambda model, x: model.plainly(x)

    def plainly(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(self, x))


class Replayed:
    """One batch: the original pass, recorded, and reduced passes with replay, each beside the one without."""

    def __init__(self, model: nn.Module, plan: str = "3.fc_in@0.2", **more: str) -> None:
        self.model = model
        self.cuts = {name: reduced(model, LaserPlan.parse(text)) for name, text in {"arm": plan, **more}.items()}
        self.replay = LayerReplay(model, {k: [m for m, _ in cut.matrices] for k, cut in self.cuts.items()})

    def original(self, step: Callable[[], Any], grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.replay.record():
            return step()

    def reduced(self, step: Callable[[], Any], arm: str = "arm", grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.cuts[arm], self.replay.replay(arm):
            return step()

    def computed(self, step: Callable[[], Any], arm: str = "arm", grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.cuts[arm]:
            return step()

    def report(self, arm: str = "arm") -> ReplayReport:
        return self.replay.reports[arm]

    def once(self, step: Callable[[], Any], grad: bool = False) -> Any:
        """Record and replay one step; its result must be what computing gives."""
        expected = self.computed(step, grad=grad)
        self.original(step, grad=grad)
        got = self.reduced(step, grad=grad)
        assert_same(got, expected)
        return got


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
