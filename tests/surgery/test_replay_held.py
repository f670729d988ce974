"""What a layer reads and writes besides its arguments: a layer is replayed only if all of it is the same."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers as hf
from families import make, run
from replayed import Block, Replayed, Stack
from torch import Tensor, nn
from torchmetrics import SumMetric

CHANGES = "it changes what it holds"
SHARED: dict[str, float] = {"loss": 0.0}
TOTAL = 0.0


class Slotted:
    __slots__ = ("loss",)

    def __init__(self) -> None:
        self.loss = 0.0


@dataclass
class Context:
    loss: float = 0.0


class Nested:
    losses: ClassVar[list[float]] = []

    def __init__(self) -> None:
        self.inner = [SimpleNamespace(context=Slotted())]


class Collecting(nn.Module):
    """A submodule that appends to a list in its class."""

    losses: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.losses.append(float(x.sum()))
        return x


def _set(name: str, value: Any, owner: Any, y: Tensor) -> None:
    setattr(owner, name, getattr(owner, name) + value)


def _into_global(y: Tensor) -> None:
    global TOTAL
    TOTAL += float(y.sum())


def _increment(owner: Any, key: Any, y: Tensor) -> None:
    owner[key] = owner[key] + float(y.sum())


# What the layer holds, how it writes to it, and how its content is read.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any], Callable[[Any], Any]]] = {
    "dict": (lambda: {"n": 0.0}, lambda h, y: _increment(h, "n", y), dict),
    "nested list": (lambda: [[[0.0]]], lambda h, y: _increment(h[0][0], 0, y), lambda h: h[0][0][0]),
    "deque": (lambda: deque([1.0], maxlen=1), lambda h, y: h.append(float(y.sum())), list),
    "Counter": (lambda: Counter(a=1), lambda h, y: h.update("a"), dict),
    "OrderedDict": (lambda: OrderedDict(a=1.0), lambda h, y: _increment(h, "a", y), dict),
    "defaultdict": (lambda: defaultdict(float), lambda h, y: _increment(h, "a", y), dict),
    "set": (lambda: {0.0}, lambda h, y: (h.clear(), h.add(float(y.sum()))), sorted),
    "array": (lambda: np.zeros(2), lambda h, y: h.__iadd__(float(y.sum())), lambda h: h.tolist()),
    "bytearray": (lambda: bytearray(2), lambda h, y: h.__setitem__(0, h[0] + 1), bytes),
    "dataclass": (Context, lambda h, y: _set("loss", float(y.sum()), h, y), lambda h: h.loss),
    "slots": (Slotted, lambda h, y: _set("loss", float(y.sum()), h, y), lambda h: h.loss),
    "namespace": (lambda: SimpleNamespace(n=0), lambda h, y: _set("n", 1, h, y), lambda h: h.n),
    "object in an object": (
        Nested,
        lambda h, y: _set("loss", 1, h.inner[0].context, y),
        lambda h: h.inner[0].context.loss,
    ),
    "list in its class": (Nested, lambda h, y: h.losses.append(1.0), lambda h: list(h.losses)),
    "metric": (SumMetric, lambda h, y: h.update(y.sum()), lambda h: float(h.compute())),
    "tensor in a dict": (lambda: {"t": torch.zeros(1)}, lambda h, y: h["t"].add_(y.sum()), lambda h: h["t"].tolist()),
    "config": (lambda: hf.LlamaConfig(n=0.0), lambda h, y: _set("n", 1.0, h, y), lambda h: h.n),
    "bound method": (lambda: [].append, lambda h, y: h(float(y.sum())), lambda h: list(h.__self__)),
    "generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda h, y: torch.rand(1, generator=h),
        lambda h: h.get_state().tolist(),
    ),
    "numpy generator": (
        lambda: np.random.default_rng(1),
        lambda h, y: h.random(),
        lambda h: str(h.bit_generator.state),
    ),
}


@pytest.mark.parametrize("place", ["attribute", "list", "closure", "partial", "submodule"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inference", [True, False])
def test_a_layer_that_writes_to_what_it_holds_is_run(kind: str, place: str, inference: bool, x: Tensor) -> None:
    build, write, read = KINDS[kind]
    model = Stack()
    layer = model.layers[0]
    held = build()
    if place == "attribute":
        layer.__dict__["held"] = held
        layer.change = lambda layer, x, y: (write(layer.__dict__["held"], y), y)[1]
    elif place == "list":
        layer.held = [held]
        layer.change = lambda layer, x, y: (write(layer.held[0], y), y)[1]
    elif place == "closure":
        layer.change = lambda layer, x, y: (write(held, y), y)[1]
    elif place == "partial":
        layer.change = partial(lambda held, layer, x, y: (write(held, y), y)[1], held)
    else:
        layer.norm.__dict__["held"] = held
        layer.change = lambda layer, x, y: (write(layer.norm.__dict__["held"], y), y)[1]
    replayed = Replayed(model)
    with torch.inference_mode(inference), torch.no_grad():
        seen = [read(held)]
        for context in (replayed.replay.record(), replayed.replay.replay("arm")):
            with context:
                model(x)
            seen.append(read(held))
    assert len({str(content) for content in seen}) == (3 if kind != "deque" and kind != "set" else 2)
    assert replayed.report().reasons == {CHANGES: 1}
    assert replayed.report().replayed == 2


@pytest.mark.parametrize("where", ["class of a submodule", "global", "global number"])
def test_a_layer_that_writes_to_its_class_or_to_globals_is_run(where: str, x: Tensor) -> None:
    model = Stack()
    if where == "class of a submodule":
        model.layers[0].norm = nn.Sequential(model.layers[0].norm, Collecting())
    elif where == "global":
        model.layers[0].change = lambda layer, x, y: (SHARED.__setitem__("loss", float(y.sum()) + SHARED["loss"]), y)[1]
    else:
        model.layers[0].change = lambda layer, x, y: (_into_global(y), y)[1]
    replayed = Replayed(model.eval())
    for _ in range(2):
        replayed.once(lambda: model(x))
    assert replayed.report().reasons == {CHANGES: 2}
    assert replayed.report().replayed == 4


def test_layers_that_add_to_one_context_are_all_run(x: Tensor) -> None:
    """The auxiliary loss of a mixture of experts."""
    model, context = Stack(), {"loss": torch.zeros(())}

    def add(layer: Block, x: Tensor, y: Tensor) -> Tensor:
        layer.context["loss"] = layer.context["loss"] + y.mean()
        return y

    for layer in model.layers:
        layer.context = context
        layer.change = add

    def step() -> Any:
        context["loss"] = torch.zeros(())
        return model(x), context["loss"]

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {CHANGES: 3}


@pytest.mark.parametrize("write", [lambda c: c.append(1), lambda c: c.__setitem__(0, 2), lambda c: c.clear()])
def test_a_container_that_is_given_and_written_to(write: Callable[[list[int]], None], x: Tensor) -> None:
    model = Stack()
    model.layers[0].change = lambda layer, x, y, extra: (write(extra), y)[1]
    model.layers[1].change = model.layers[2].change = model.layers[3].change = lambda layer, x, y, extra: y

    def step() -> Any:
        extra = [0, 1]
        return model.plainly(x, extra), extra

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {"it changes its inputs in place": 1}


def test_a_container_that_is_passed_on_stays_the_same_object(x: Tensor) -> None:
    model = Stack()
    model.layers[0].change = lambda layer, x, y, extra: (y, extra)

    def step() -> Any:
        extra = {"n": 1}
        hidden, same = model.layers[0](x, extra)
        same["n"] = 2
        return hidden, extra

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {"it returns a container that it was given or holds": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer, x, y: layer.table, "it returns a tensor that it holds"),
        (lambda layer, x, y: layer.table[:1], "it returns a tensor that it holds"),
        (lambda layer, x, y: (y, y[:1]), "it returns several parts of one tensor"),
    ],
    ids=["buffer", "view", "two parts"],
)
def test_outputs_that_share_memory(change: Callable[..., Any], reason: str, x: Tensor) -> None:
    model = Stack()
    model.layers[0].register_buffer("table", torch.ones(2, 5, 8))
    model.layers[0].change = change

    def step() -> Any:
        out = model.layers[0](x)
        (out[1] if isinstance(out, tuple) else out).add_(1)
        return out, model.layers[0].table.clone()

    replayed = Replayed(model)
    replayed.original(step)
    model.layers[0].table.fill_(1)
    expected = replayed.computed(step)
    model.layers[0].table.fill_(1)
    got = replayed.reduced(step)
    assert torch.equal(got[1], expected[1])
    assert replayed.report().reasons == {reason: 1}


def test_what_a_layer_reads_must_have_the_recorded_value(x: Tensor) -> None:
    model = Stack()
    settings = {"scale": 1.0}
    for layer in model.layers:
        layer.settings = settings
        layer.change = lambda layer, x, y: y * layer.settings["scale"]
    replayed = Replayed(model)

    def step(scale: float) -> Tensor:
        settings["scale"] = scale
        return model(x)

    replayed.original(lambda: step(2.0))
    for scale, calls in ((2.0, 3), (3.0, 3), (2.0, 6)):
        expected = replayed.computed(lambda scale=scale: step(scale))
        assert torch.equal(replayed.reduced(lambda scale=scale: step(scale)), expected)
        assert replayed.report().replayed == calls
    assert replayed.report().reasons == {
        "what it holds differs between the arms": 1,
        "its inputs differ between the arms": 2,
    }


def test_weights_that_the_step_changes(x: Tensor) -> None:
    """Test-time adaptation, and a moving average that is copied in."""
    model = Stack()
    replayed = Replayed(model)
    weight = model.layers[0].fc_in.weight
    for change in (lambda: weight.mul_(1.01), lambda: setattr(weight, "data", weight * 1.01)):
        replayed.original(lambda change=change: (model(x), change()))
        replayed.reduced(lambda: model(x))
    assert replayed.report().reasons["what it holds differs between the arms"] == 2


def test_equal_values_in_other_objects_are_the_same_state(x: Tensor) -> None:
    model = Stack()
    layer = model.layers[0]

    def give(value: float) -> None:
        layer.held = {"a": [value, torch.full((2,), value)], "b": SimpleNamespace(c=value)}

    replayed = Replayed(model)
    give(1.0)
    replayed.original(lambda: model(x))
    give(1.0)
    replayed.reduced(lambda: model(x))
    assert replayed.report().replayed == 3
    give(2.0)
    replayed.reduced(lambda: model(x))
    assert replayed.report().reasons == {"what it holds differs between the arms": 1}


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (itertools.count(), "count"),
        (iter([1]), "list_iterator"),
        ((i for i in range(3)), "generator"),
        (np.zeros(2**20), "ndarray"),
        ([[] for _ in range(3000)], "great number of objects"),
    ],
    ids=["count", "iterator", "generator", "large array", "many"],
)
def test_what_cannot_be_looked_into(held: Any, name: str, x: Tensor) -> None:
    model = Stack()
    model.layers[0].held = [held]
    replayed = Replayed(model)
    replayed.once(lambda: model(x))
    assert replayed.report().reasons == {f"it holds a {name} that cannot be compared": 1}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "bert", "mixtral", "phi3", "opt", "gpt_neox"])
def test_layers_of_transformers_hold_nothing_that_hides(name: str) -> None:
    model = make(name)
    replayed = Replayed(model, "1.mlp@0.1" if name != "mixtral" else "1.q_proj@0.1")
    for _ in range(2):
        replayed.once(lambda: run(name, model))
    assert replayed.report().replayed > 0
    assert not [reason for reason in replayed.report().reasons if "hold" in reason]
