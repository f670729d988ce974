"""Layer replay: what is returned instead of computed is what would have been computed, and else nothing is."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny import tiny_causal_lm
from torch import Tensor, nn

from laser_callback import LaserPlan, reduced
from laser_callback.surgery.replay import LayerReplay, ReplayReport

WIDTH = 8


class Block(nn.Module):
    """A layer that counts its own forward passes in a list outside of itself, so that replay may skip them."""

    def __init__(self, passes: list[int], index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc_in = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc_out = nn.Linear(2 * WIDTH, WIDTH)
        object.__setattr__(self, "count", lambda: passes.append(index))
        self.change: Callable[..., Any] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count()
        y = x + self.fc_out(F.gelu(self.fc_in(self.norm(x))))
        return y if self.change is None else self.change(self, x, y, *args, **kwargs)


class Stack(nn.Module):
    """Four layers; the code around them can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.passes: list[int] = []
            self.layers = nn.ModuleList(Block(self.passes, i) for i in range(4))
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


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 300, (2, 6), generator=torch.Generator().manual_seed(1))


# ---- what is replayed ------------------------------------------------------------------------------------------------


def test_only_the_layers_before_the_first_cut_are_skipped(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model, "2.fc_in@0.2, 3.fc_out@0.2")
    replayed.once(lambda: model(x))
    assert model.passes == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3]
    assert (replayed.report().replayed, replayed.report().run) == (2, 0)
    assert str(replayed.report()) == "2 of 2 layer calls before the first cut were replayed"


def test_a_cut_in_the_first_layer_replays_nothing(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model, "0.fc_in@0.2")
    replayed.once(lambda: model(x))
    assert (replayed.report().replayed, replayed.report().run) == (0, 0)


def test_a_cut_in_front_of_the_layers_changes_their_inputs(x: Tensor) -> None:
    model = Stack()
    model.embed = nn.Linear(WIDTH, WIDTH)
    model.through = lambda m, x: m.plainly(m.embed(x))
    replayed = Replayed(model, "/embed/@0.2")
    replayed.once(lambda: model(x))
    assert replayed.report().reasons == {"its inputs differ between the arms": 4}


def test_a_cut_behind_the_layers_skips_them_all(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model, "/head/@0.4")
    replayed.once(lambda: model(x))
    assert (replayed.report().replayed, replayed.report().run) == (4, 0)


def test_each_arm_has_its_own_first_cut(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model, "3.fc_in@0.2", early="1.fc_in@0.2")
    step = lambda: model(x)  # noqa: E731
    expected = {arm: replayed.computed(step, arm) for arm in ("arm", "early")}
    replayed.original(step)
    for arm in ("early", "arm", "early"):
        assert_same(replayed.reduced(step, arm), expected[arm])
    assert (replayed.report("arm").replayed, replayed.report("early").replayed) == (3, 2)


def test_a_weight_tied_into_an_early_layer_cuts_that_one(x: Tensor) -> None:
    model = Stack()
    model.layers[1].fc_in.weight = model.layers[3].fc_in.weight
    replayed = Replayed(model, "3.fc_out@0.2")
    replayed.once(lambda: model(x))
    assert replayed.report().replayed == 3
    tied = Replayed(model, "1.fc_in@0.2")
    tied.once(lambda: model(x))
    assert tied.report().replayed == 1


def test_one_layer_under_two_numbers(x: Tensor) -> None:
    model = Stack()
    model.layers[1] = model.layers[0]
    replayed = Replayed(model)
    replayed.once(lambda: model(x))
    assert (replayed.report().replayed, replayed.report().run) == (3, 0)
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_a_layer_that_is_called_twice_in_a_step(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    replayed.once(lambda: (model(x), model(x * 2), model(x)))
    assert (replayed.report().replayed, replayed.report().run) == (9, 0)


def test_more_calls_than_were_recorded_are_run(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    replayed.original(lambda: model(x))
    assert_same(replayed.reduced(lambda: (model(x), model(x))), replayed.computed(lambda: (model(x), model(x))))
    assert replayed.report().reasons == {"no call was recorded": 3}


def test_without_a_record_everything_is_run(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    assert_same(replayed.reduced(lambda: model(x)), replayed.computed(lambda: model(x)))
    assert replayed.report().replayed == 0


def test_a_record_replaces_the_one_before(x: Tensor) -> None:
    model = Stack()
    replayed = Replayed(model)
    for scale in (1, 2, 3):
        replayed.once(lambda scale=scale: model(x * scale))
    assert replayed.report().replayed == 9


# ---- what is run, and why --------------------------------------------------------------------------------------------


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
        (_counts, "it changes its own attributes or buffers"),
        (_collects, "it changes its own attributes or buffers"),
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


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
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
    assert replayed.report().reasons == {"a global forward hook listens": 3}


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (Odd(), "it takes a Odd that cannot be compared"),
        (torch.ones(2).as_subclass(Quantity), "it takes a Quantity that cannot be compared"),
        (torch.eye(2).to_sparse(), "it takes a Tensor that cannot be compared"),
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


# ---- hooks and the attribute -----------------------------------------------------------------------------------------


def test_the_layers_own_hooks_fire_and_may_change_things(x: Tensor) -> None:
    model = Stack()
    heard: list[str] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        heard.append("before")
        return (args[0] * 2, *args[1:]), kwargs

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heard.append("after")
        return output + 1

    model.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    model.layers[1].register_forward_hook(after)
    replayed = Replayed(model)
    replayed.once(lambda: model(x))
    assert heard == ["before", "after"] * 3
    assert (replayed.report().replayed, replayed.report().run) == (3, 0)


@contextmanager
def _fails(error: BaseException) -> Iterator[None]:
    with pytest.raises(type(error)):
        yield


@pytest.mark.parametrize("error", [ValueError("in a layer"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_the_forward_attribute_is_put_back_exactly(error: BaseException, x: Tensor) -> None:
    model = Stack()
    own = model.layers[1].forward
    doubled = lambda *args, **kwargs: own(*args, **kwargs) * 2  # noqa: E731 - as accelerate and others patch layers
    model.layers[1].forward = doubled
    before = [list(vars(layer)) for layer in model.layers]
    replayed = Replayed(model)
    replayed.once(lambda: model(x))
    assert replayed.report().replayed == 3

    def breaks(layer: Block, x: Tensor, y: Tensor) -> Tensor:
        raise error

    model.layers[2].change = breaks
    for run in (replayed.original, replayed.reduced):
        with _fails(error):
            run(lambda: model(x))
        assert vars(model.layers[1])["forward"] is doubled
        assert [list(vars(layer)) for layer in model.layers] == before
        assert all("forward" not in vars(model.layers[i]) for i in (0, 2, 3))


def test_a_layer_that_is_copied_within_the_step_computes_with_its_own_weights(x: Tensor) -> None:
    model = Stack()

    def step() -> Tensor:
        twin = copy.deepcopy(model.layers[0])
        twin.fc_in.weight.mul_(3)
        return twin(x).sum() + model(x)

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3


def test_two_callbacks_record_at_once_and_end_in_any_order(x: Tensor) -> None:
    model = Stack()
    first, second = Replayed(model), Replayed(model, "2.fc_in@0.2")
    expected = first.computed(lambda: model(x)), second.computed(lambda: model(x))
    one, two = first.replay.record(), second.replay.record()
    with torch.no_grad():
        one.__enter__()
        two.__enter__()
        model(x)
        one.__exit__(None, None, None)
        two.__exit__(None, None, None)
    assert not any("forward" in vars(layer) for layer in model.layers)
    assert_same(first.reduced(lambda: model(x)), expected[0])
    assert_same(second.reduced(lambda: model(x)), expected[1])
    assert (first.report().replayed, second.report().replayed) == (3, 2)


# ---- changes in place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [True, False])
def test_outer_code_may_change_outputs_in_place(inference: bool, x: Tensor) -> None:
    """The original, and the first arm, must not change what the next arm is given."""
    model = Stack()

    def through(model: Stack, x: Tensor) -> Tensor:
        for layer in model.layers:
            x = layer(x)
            x += 1
            x[:, 0] = 0
        return x

    model.through = through
    replayed = Replayed(model, second="3.fc_out@0.2")
    step = lambda: model(x)  # noqa: E731
    with torch.inference_mode(inference), torch.no_grad():
        expected = {arm: replayed.computed(step, arm) for arm in ("arm", "second")}
        with replayed.replay.record():
            step()
        for arm in ("arm", "second", "arm"):
            with replayed.cuts[arm], replayed.replay.replay(arm):
                got = step()
            assert_same(got, expected[arm])
    assert (replayed.report("arm").replayed, replayed.report("arm").run) == (6, 0)


@pytest.mark.parametrize("inference", [True, False])
def test_an_argument_that_changes_between_layers(inference: bool, x: Tensor) -> None:
    model = Stack()
    for layer in model.layers:
        layer.change = lambda layer, x, y, bias: y + bias

    def step(increment: float) -> Tensor:
        bias = torch.zeros(WIDTH)
        hidden = x
        for layer in model.layers:
            hidden = layer(hidden, bias)
            bias += increment
        return hidden

    replayed = Replayed(model)
    with torch.inference_mode(inference), torch.no_grad():
        with replayed.replay.record():
            step(1.0)
        for increment, calls in ((1.0, 3), (0.0, 4)):  # without the change, only the first layer's inputs are the same
            expected = replayed.computed(lambda increment=increment: step(increment))
            with replayed.cuts["arm"], replayed.replay.replay("arm"):
                got = step(increment)
            assert_same(got, expected)
            assert replayed.report().replayed == calls


def test_an_output_that_is_its_input_stays_the_same_object(x: Tensor) -> None:
    """A skipped layer, or T5's position bias: adding to the output in place adds to the input."""
    model = Stack()
    model.layers[0].change = lambda layer, x, y, bias: (x, bias, y, y)
    model.layers[1].change = lambda layer, x, y, bias: y + bias

    def step() -> Any:
        bias = torch.ones(WIDTH)
        start = x.clone()
        same, passed, y, again = model.layers[0](start, bias)
        same += 1
        again *= 2
        hidden = model.layers[1](y, passed)
        return hidden, start, y, passed is bias, same is start, again is y

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 2


# ---- transformers ----------------------------------------------------------------------------------------------------


def _cache_content(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def test_a_dynamic_cache_is_filled_layer_by_layer_as_without_replay(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Any:
        out = model(ids)
        return out.logits, _cache_content(out.past_key_values)

    replayed = Replayed(model)
    _, content = replayed.once(step)
    assert len(content) == 4
    assert replayed.report().replayed == 3


def test_all_hidden_states_are_bit_identical(ids: Tensor) -> None:
    model = tiny_causal_lm()
    replayed = Replayed(model)
    replayed.once(lambda: tuple(model(ids, output_hidden_states=True).hidden_states))
    assert replayed.report().replayed == 3


def test_a_cache_that_already_holds_something(ids: Tensor) -> None:
    """The prefill is replayed, and what follows is run; the cache that the user hands over is extended."""
    model = tiny_causal_lm()

    def step() -> Any:
        cache = hf.DynamicCache(config=model.config)
        first = model(ids[:, :4], past_key_values=cache).logits
        second = model(ids[:, 4:], past_key_values=cache).logits
        return first, second, _cache_content(cache)

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3
    assert replayed.report().reasons == {"its key/value cache is not empty": 3}


def test_a_cache_that_is_filled_before_the_step(ids: Tensor) -> None:
    model = tiny_causal_lm()
    with torch.no_grad():
        prefix = model(ids).past_key_values
    replayed = Replayed(model)
    replayed.once(lambda: model(ids, past_key_values=copy.deepcopy(prefix)).logits)
    assert replayed.report().replayed == 0


def test_changing_cached_keys_in_place_does_not_reach_the_record(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Any:
        cache = model(ids).past_key_values
        content = _cache_content(cache)
        for layer in cache.layers:
            layer.keys.zero_()
        return content

    replayed = Replayed(model, second="3.fc_out@0.2")
    replayed.once(step)
    assert_same(replayed.reduced(step, "second"), replayed.computed(step, "second"))
    assert replayed.report("second").replayed == 3


def test_a_static_cache_is_not_replayed(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Tensor:
        cache = hf.StaticCache(config=model.config, max_cache_len=8)
        return model(ids, past_key_values=cache).logits

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {"its cache is a StaticCache": 3}


def _quiet(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.mark.parametrize("window", [4, 32])  # shorter and longer than the 6 tokens
def test_a_cache_with_a_sliding_window(window: int, ids: Tensor) -> None:
    config = hf.Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
    )
    model = _quiet(lambda: hf.Gemma2ForCausalLM(config))

    def step() -> Any:
        out = model(ids)
        cache = out.past_key_values
        content, lengths = _cache_content(cache), [layer.get_seq_length() for layer in cache.layers]
        return out.logits, content, lengths, model(ids[:, :2], past_key_values=cache).logits

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3
    assert replayed.report().reasons == {"its key/value cache is not empty": 3}


def test_states_of_a_convolution_are_not_lost(ids: Tensor) -> None:
    """LFM2 mixes convolutions, whose states have no length, with attention."""
    config = hf.Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        conv_L_cache=3,
        pad_token_id=0,
    )
    model = _quiet(lambda: hf.Lfm2ForCausalLM(config))

    def step() -> Any:
        first = model(ids[:, :5])
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
        return first.logits, second.logits, model.generate(ids, max_new_tokens=3, do_sample=False)

    replayed = Replayed(model, "3.fc_out@0.2")
    replayed.once(step)
    assert "its cache holds a LinearAttentionLayer" in replayed.report().reasons


def test_captured_outputs_count_as_hooks_only_while_captured(ids: Tensor) -> None:
    """The naive version loses the attentions of the layers it skips."""
    model = tiny_causal_lm()
    model.set_attn_implementation("eager")
    replayed = Replayed(model)
    for _ in range(2):  # the first time installs transformers' capturing hooks
        got = replayed.once(lambda: tuple(model(ids, output_attentions=True).attentions))
        assert len(got) == 4
    assert replayed.report().reasons == {"a forward hook listens inside of it": 6}
    replayed.once(lambda: model(ids).logits)
    assert replayed.report().replayed == 3


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=300,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _quiet(lambda: hf.T5ForConditionalGeneration(config))


def test_a_cut_encoder_replays_no_decoder_layer(ids: Tensor) -> None:
    model = _t5()
    replayed = Replayed(model, "encoder.2.mlp@0.1")
    replayed.once(lambda: model(ids, labels=ids, use_cache=False).logits)
    assert replayed.report().replayed == 2  # of the encoder
    assert replayed.report().reasons == {"its inputs differ between the arms": 3}


def test_a_cut_decoder_replays_the_whole_encoder(ids: Tensor) -> None:
    model = _t5()
    replayed = Replayed(model, "decoder.1.mlp@0.1")
    replayed.once(lambda: model(ids, labels=ids, use_cache=False).logits)
    assert (replayed.report().replayed, replayed.report().run) == (4, 0)
    replayed.once(lambda: model(ids, labels=ids).logits)
    assert replayed.report().reasons == {"its cache is a EncoderDecoderCache": 1}


def test_albert_shares_one_layer(ids: Tensor) -> None:
    config = hf.AlbertConfig(
        vocab_size=300,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = _quiet(lambda: hf.AlbertForMaskedLM(config))
    cut = Replayed(model, "0.mlp@0.2")
    cut.once(lambda: model(ids).logits)
    assert cut.report().replayed == 0
    outside = Replayed(model, "/predictions.dense/@0.2")
    outside.once(lambda: model(ids).logits)
    assert (outside.report().replayed, outside.report().run) == (3, 0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_after_forget(x: Tensor) -> None:
    model = Stack()
    kept: list[weakref.ref[Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    replayed = Replayed(model)
    replayed.original(lambda: model(x))
    records = [weakref.ref(leaf) for calls in replayed.replay._calls.values() for leaf in calls[0].output]
    replayed.reduced(lambda: model(x))
    assert records
    assert all(record() is not None for record in records)
    replayed.replay.forget()
    gc.collect()
    assert [reference() for reference in kept + records] == [None] * len(kept + records)
