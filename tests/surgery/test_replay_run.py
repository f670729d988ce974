"""What layer replay runs all the same, and the reason that it gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replayed import Block, Replayed, Stack, assert_same
from torch import Tensor, nn


class Odd:
    """An object that nobody can compare."""


class Quantity(Tensor):
    pass


def _dropout(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    return F.dropout(y, 0.5, training=True)


def _numpy(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    return y * np.random.rand()


def _python(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    return y * random.random()


def _counts(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    layer.calls = getattr(layer, "calls", 0) + 1
    return y


def _collects(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    layer.norm.__dict__.setdefault("seen", []).append(float(y.sum()))
    return y


def _in_place(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return y


def _part(layer: Block, x: Tensor, y: Tensor) -> Tensor:
    return x[:]


def _subclass(layer: Block, x: Tensor, y: Tensor) -> Any:
    return y.as_subclass(Quantity).sin().as_subclass(Quantity)


def _object(layer: Block, x: Tensor, y: Any) -> Any:
    return y, Odd()


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_dropout, "it draws random numbers"),
        (_numpy, "it draws random numbers"),
        (_python, "it draws random numbers"),
        (_counts, "it changes what it holds"),
        (_collects, "it changes what it holds"),
        (_in_place, "it changes its inputs in place"),
        (_part, "it returns a part of its input"),
        (_subclass, "it returns a Quantity that cannot be copied"),
        (_object, "it returns a Odd that cannot be copied"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_layer_that_does_more_than_compute_is_run(
    change: Callable[..., Any], reason: str, inference: bool, x: Tensor
) -> None:
    model = Stack()
    model.layers[0].norm.__dict__["seen"] = []
    model.layers[0].change = change
    first = lambda value: value[0] if isinstance(value, tuple) else value.as_subclass(Tensor)  # noqa: E731

    def step() -> Any:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model.layers[0].__dict__.pop("calls", None)
        model.layers[0].norm.seen.clear()
        start = x.clone()
        hidden = first(model.layers[0](start))
        for layer in list(model.layers)[1:]:
            hidden = layer(hidden)
        seen = list(model.layers[0].norm.seen), getattr(model.layers[0], "calls", None)
        return hidden, start, torch.rand(3), list(np.random.rand(2)), random.random(), seen

    replayed = Replayed(model)
    with torch.inference_mode(inference), torch.no_grad():
        expected = replayed.computed(step)
        with replayed.replay.record():
            step()
        with replayed.cuts["arm"], replayed.replay.replay("arm"):
            got = step()
    assert_same(got, expected)
    assert replayed.report().reasons == {reason: 1}
    assert replayed.report().replayed == 2


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand()], ids=["random", "numpy"])
def test_a_layer_that_begins_to_draw_in_a_later_batch(draw: Callable[[], float], x: Tensor) -> None:
    model = Stack()
    draws = [False]
    object.__setattr__(model.layers[1], "change", lambda layer, x, y: y * draw() if draws[0] else y)
    replayed = Replayed(model)

    def step() -> Tensor:
        random.seed(1)
        np.random.seed(1)
        return model(x)

    replayed.once(step)
    assert replayed.report().replayed == 3
    draws[0] = True
    replayed.once(step)  # noticed, but not yet which layer it is
    assert replayed.report().reasons == {"random numbers are drawn": 3}
    replayed.once(step)
    assert replayed.report().replayed == 5
    assert replayed.report().reasons["it draws random numbers"] == 1


def test_a_step_that_draws_outside_of_the_layers(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)

    def step() -> Any:
        before = random.random(), np.random.rand(), torch.rand(2)
        return model(x), before, model(x), random.random()

    for _ in range(4):
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        expected = replayed.computed(step)
        for run in (replayed.original, replayed.reduced):
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            got = run(step)
        assert_same(got, expected)
    assert replayed.report().replayed == 18  # all but those of one batch
    assert replayed.report().reasons == {"random numbers are drawn": 6}


def _train(model: Stack) -> None:
    model.layers[1].norm.train()


def _inner_hook(model: Stack) -> None:
    model.layers[1].fc_in.register_forward_hook(lambda *_: None)


def _inner_pre_hook(model: Stack) -> None:
    model.layers[1].norm.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (_train, "it is in train mode"),
        (_inner_hook, "a forward hook listens inside of it"),
        (_inner_pre_hook, "a forward hook listens inside of it"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("when", ["always", "in the reduced pass"])
def test_a_layer_in_another_mode_is_run(prepare: Callable[[Stack], None], reason: str, when: str, x: Tensor) -> None:
    model = Stack()
    if when == "always":
        prepare(model)
    replayed = Replayed(model)
    replayed.original(lambda: model(x))
    prepare(model)
    assert_same(replayed.reduced(lambda: model(x)), replayed.computed(lambda: model(x)))
    assert replayed.report().reasons == {reason: 1}


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_global_hook_hears_every_layer(register: str, x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    heard: list[str] = []
    handle = getattr(nn.modules.module, register)(lambda module, *_: heard.append(type(module).__name__))
    try:
        replayed.original(lambda: model(x))
        once = len(heard)
        replayed.reduced(lambda: model(x))
    finally:
        handle.remove()
    assert len(heard) == 2 * once
    assert replayed.report().reasons == {"a global hook listens": 3}


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (Odd(), "it takes a Odd that cannot be compared"),
        (torch.ones(2).as_subclass(Quantity), "it takes a Quantity that cannot be compared"),
        (torch.eye(2).to_sparse(), "it takes a sparse tensor that cannot be compared"),
        (lambda: None, "it takes a function that cannot be compared"),
    ],
    ids=["object", "subclass", "sparse", "function"],
)
def test_arguments_that_cannot_be_compared(argument: Any, reason: str, x: Tensor) -> None:
    model = Stack()
    for layer in model.layers:
        layer.change = lambda layer, x, y, extra: y
    replayed = Replayed(model)
    replayed.once(lambda: model.plainly(x, argument))
    assert replayed.report().reasons == {reason: 3}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (1.0, 2.0, "it is called with other arguments|its inputs differ between the arms"),
        (1, True, "its inputs differ between the arms"),
        ({"a": 1}, {"b": 1}, "it is called with other arguments"),
        ([1, 2], (1, 2), "it is called with other arguments"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "its inputs differ between the arms"),
        (torch.ones(2), torch.ones(1, 2), "its inputs differ between the arms"),
        (torch.ones(2), torch.tensor([1.0, 1.0000001]), "its inputs differ between the arms"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), "its inputs differ between the arms"),
        (None, torch.ones(2), "it is called with other arguments|its inputs differ between the arms"),
    ],
    ids=str,
)
def test_other_inputs(before: Any, after: Any, reason: str, x: Tensor) -> None:
    model = Stack()
    for layer in model.layers:
        layer.change = lambda layer, x, y, extra: y * (extra.sum() if isinstance(extra, Tensor) else 1)
    replayed = Replayed(model)
    replayed.original(lambda: model.plainly(x, before))
    got = replayed.reduced(lambda: model.plainly(x, after))
    with replayed.cuts["arm"], torch.no_grad():
        assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(model.plainly(x, after)))
    (why,) = replayed.report().reasons
    assert why in reason.split("|")
    assert replayed.report().replayed == 0


def test_equal_values_in_other_objects_are_the_same_input(x: Tensor) -> None:
    model = Stack()
    for layer in model.layers:
        layer.change = lambda layer, x, y, mask, scale: y * mask * scale
    replayed = Replayed(model)
    replayed.once(lambda: model.plainly(x.clone(), mask=torch.ones(2, 5, 1), scale=0.5))
    assert replayed.report().replayed == 3


def test_autograd_is_not_cut_off(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)

    def step() -> Tensor:
        start = x.clone().requires_grad_()
        return torch.autograd.grad(model(start).sum(), [start, model.layers[0].fc_in.weight])[0]

    replayed.once(step, grad=True)
    assert replayed.report().reasons == {"autograd runs through it": 3}


def test_frozen_parameters_and_an_input_that_needs_a_gradient(x: Tensor) -> None:
    model = Stack().requires_grad_(False)
    replayed = Replayed(model)
    replayed.once(lambda: model(x), grad=True)
    assert replayed.report().replayed == 3  # nothing to differentiate
    replayed.original(lambda: model(x), grad=True)

    def step() -> Tensor:
        start = x.clone().requires_grad_()
        return torch.autograd.grad(model(start).sum(), start)[0]

    assert_same(replayed.reduced(step, grad=True), replayed.computed(step, grad=True))


def test_grad_mode_and_autocast_belong_to_the_record(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)

    def cast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    replayed.original(lambda: model(x))
    assert_same(replayed.reduced(cast), replayed.computed(cast))
    assert replayed.report().replayed == 0
    replayed.once(cast)
    assert replayed.report().replayed == 3
    replayed.original(lambda: model(x))
    assert replayed.reduced(lambda: model(x), grad=True).requires_grad


@pytest.mark.parametrize("how", ["module.compile()", "torch.compile(module)"])
def test_a_compiled_model_is_left_alone(how: str, x: Tensor) -> None:
    model = Stack()
    if how == "module.compile()":
        model.layers[0].compile(backend="eager")
    else:
        model.layers[0] = torch.compile(model.layers[0], backend="eager")
    replayed = Replayed(model)
    with replayed.replay.record(), replayed.replay.replay("arm"):
        assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, Block))
    assert "compiled" in str(replayed.report())


# ---- transforms, modes and other tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (lambda f, x: torch.func.vmap(f)(x), "torch.func transforms it"),
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), "torch.func transforms it"),
        (lambda f, x: torch.func.jacfwd(lambda x: f(x).sum())(x), "torch.func transforms it"),
        (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), "torch.func transforms it"),
        (lambda f, x: torch.func.functionalize(f)(x), "torch.func transforms it"),
    ],
    ids=["vmap", "jvp", "jacfwd", "grad", "functionalize"],
)
def test_transforms_of_functions_are_run(transform: Callable[..., Any], reason: str, x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    replayed.once(lambda: transform(model, x), grad=True)
    assert replayed.report().reasons == {reason: 3}


def test_weights_of_a_functional_call(x: Tensor) -> None:
    model = Stack().requires_grad_(False)
    weights = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
    replayed = Replayed(model)
    replayed.once(lambda: (torch.func.functional_call(model, weights, x), model(x)))
    assert replayed.report().replayed == 6


def test_forward_mode_is_run(x: Tensor) -> None:
    model = Stack()

    def step() -> Any:
        with torch.autograd.forward_ad.dual_level():
            return tuple(torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, x))))

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {"forward-mode autograd runs through it": 3}


def test_a_mode_that_listens(x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Stack()

    def step() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().run == 3
    assert all("listens" in reason for reason in replayed.report().reasons)


@pytest.mark.parametrize("kind", ["fake", "meta", "nested", "default device"])
def test_tensors_of_other_kinds(kind: str, x: Tensor) -> None:
    model = Stack()

    def step() -> Any:
        if kind == "fake":
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                return tuple(model.plainly(mode.from_tensor(x)).shape)
        if kind == "meta":
            return tuple(model.layers[0].change(None, None, model.layers[0](x, x.to("meta")), None).shape)
        if kind == "nested":
            nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
            return model.layers[0](nested).values()
        with torch.device("cpu"):
            return model(x)

    if kind == "meta":
        model.layers[0].change = lambda layer, x, y, extra: y
    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == (3 if kind == "default device" else 0)
