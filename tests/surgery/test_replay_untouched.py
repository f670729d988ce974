"""A layer looks as ever while replay watches it, and nothing is left of a watch, whatever interrupts it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from replayed import Block, Replayed, Stack, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from tracing import Place, interrupted

from laser_callback.surgery import interception, replay
from laser_callback.surgery.replay import LayerReplay

CALL = nn.Module.__call__


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert nn.Module.__call__ is CALL
    assert not interception._open
    torch._dynamo.reset()


def _saved(model: nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


def _traced(model: Stack, x: Tensor) -> list[int]:
    """The operators, also of the layer itself: names of classes are numbered by torch."""
    model.requires_grad_(False)
    whole = nn.Sequential(*model.layers)
    return [str(torch.jit.trace(part, x).inlined_graph).count("aten::") for part in (model.layers[0], whole)]


LOOKS: dict[str, Callable[[Stack, Tensor], Any]] = {
    "pickle": lambda model, x: pickle.dumps(model.layers[0].norm) + pickle.dumps(model.layers[0]),
    "torch.save": lambda model, x: len(_saved(model.layers)),
    "copy": lambda model, x: list(vars(copy.copy(model.layers[0]))),
    "deepcopy": lambda model, x: list(vars(copy.deepcopy(model).layers[0])),
    "signature": lambda model, x: (inspect.signature(model.layers[0].forward), inspect.signature(model.layers[0])),
    "source": lambda model, x: inspect.getsource(model.layers[0].forward),
    "self": lambda model, x: model.layers[0].forward.__self__ is model.layers[0],
    "function": lambda model, x: model.layers[0].forward.__func__ is Block.forward,
    "vars": lambda model, x: [list(vars(layer)) for layer in model.layers],
    "class": lambda model, x: [type(layer) for layer in model.layers] + [sorted(vars(Block))],
    "state_dict": lambda model, x: list(model.state_dict()),
    "repr": lambda model, x: repr(model),
    "trace": _traced,
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_layer_looks_as_without_replay(look: str, x: Tensor) -> None:
    model = Stack()
    model.through = None  # type: ignore[assignment] - so that it can be pickled
    expected = LOOKS[look](model, x)
    seen: list[Any] = []
    replayed = Replayed(model)

    def step() -> Tensor:
        seen.append(LOOKS[look](model, x))
        out = model.plainly(x)
        seen.append(LOOKS[look](model, x))
        return out

    replayed.original(step)
    replayed.reduced(step)
    assert seen == [expected] * 4
    assert replayed.report().replayed >= 3  # tracing calls the layers, too


def test_a_traced_or_scripted_model_inside_of_the_step(x: Tensor) -> None:
    model = Stack().requires_grad_(False)

    def step() -> Tensor:
        return torch.jit.trace(lambda x: model.plainly(x), x, check_trace=False)(x) + model.plainly(x)

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3
    assert replayed.report().reasons == {"it is traced": 3}
    with replayed.replay.record():
        assert torch.jit.script(model.layers[0].fc_in)(x).shape == (2, 5, 16)


# ---- compiled code ---------------------------------------------------------------------------------------------------


class Compiled(nn.Module):
    """A model of which a part is compiled."""

    def __init__(self, how: str, counter: CompileCounter) -> None:
        super().__init__()
        self.net = Stack()
        compiled = torch.compile(self.plainly, backend=counter, fullgraph=True)
        if how == "closure":
            object.__setattr__(self, "call", lambda x: compiled(x))
        elif how == "attribute":
            self.call = compiled
        elif how == "forward":
            self.net.forward = torch.compile(self.net.forward, backend=counter)
            self.call = self.net
        elif how == "module":
            self.net.compile(backend=counter)
            self.call = self.net
        elif how == "wrapped":
            self.call = torch.compile(self.net, backend=counter)
        elif how == "a layer":
            self.net.layers[0].compile(backend=counter)
            self.call = self.net

    def plainly(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("before", [True, False], ids=["before", "within"])
@pytest.mark.parametrize("how", ["closure", "attribute", "forward", "module", "wrapped", "a layer"])
def test_compiled_code_is_neither_replayed_nor_compiled_again(how: str, before: bool, x: Tensor) -> None:
    counter = CompileCounter()
    model = Compiled(how, counter).eval()
    replayed = Replayed(model)
    expected = replayed.computed(
        lambda: model.plainly(x) if how in ("closure", "attribute") else model.net.head(model.plainly(x))
    )
    if before:
        with torch.no_grad():
            model(x)
        graphs = counter.frame_count
    for i in range(3):
        replayed.original(lambda: model(x))
        got = replayed.reduced(lambda: model(x))
        if i == 0 and not before:
            graphs = counter.frame_count
    assert_same(got, expected)
    assert counter.frame_count == graphs > 0
    assert replayed.report().replayed == 0
    assert "compiled" in str(replayed.report())


def test_a_compiled_step_that_calls_the_layers(x: Tensor) -> None:
    model, counter = Stack(), CompileCounter()
    step = torch.compile(lambda: model.plainly(x) * 2, backend=counter, fullgraph=True)
    replayed = Replayed(model)
    for _ in range(3):
        replayed.once(step)
    assert counter.frame_count == 1
    assert replayed.report().reasons == {"no call of a layer is seen, as in compiled code": 3}


def test_scripted_parts(x: Tensor) -> None:
    model = Stack()
    model.layers[1].fc_in = torch.jit.script(model.layers[1].fc_in)
    replayed = Replayed(model)
    replayed.once(lambda: model(x))
    assert replayed.report().reasons == {"the model is compiled": 1}


# ---- interrupts ------------------------------------------------------------------------------------------------------


def _pass(replayed: Replayed, x: Tensor) -> None:
    with LayerReplay.paused():
        pass
    replayed.original(lambda: replayed.model(x))
    replayed.reduced(lambda: replayed.model(x))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_at_any_line_leaves_nothing(x: Tensor) -> None:
    model = Stack()
    for layer in list(model.layers)[:2]:
        layer.register_forward_hook(lambda *_: None)
    files = {replay.__file__, interception.__file__}
    replayed = Replayed(model)
    _pass(replayed, x)
    replayed.replay.forget()
    with torch.no_grad():
        expected = model(x)
    places: list[Place] = []
    while place := interrupted(lambda: _pass(replayed, x), len(places), files):
        assert nn.Module.__call__ is CALL, place
        assert not interception._open, place
        assert not interception.paused()
        replayed.replay.forget()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        places.append(place)
    assert len(places) > 100
    report = replayed.report().replayed
    _pass(replayed, x)
    assert replayed.report().replayed == report + 3


def test_signals_at_any_moment_leave_nothing(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    generator = random.Random(0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        with torch.no_grad():  # around all: an interrupt may break the end of torch's own context
            for _ in range(600):
                try:
                    signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 4e-3))
                    _pass(replayed, x)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert nn.Module.__call__ is CALL
                assert not interception._open
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    assert signal.getsignal(signal.SIGALRM) == before
