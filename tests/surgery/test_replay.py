"""Layer replay: what is returned instead of computed is what would have been computed, and nothing is left behind.

What is run all the same is in test_replay_run.py, models of transformers are in test_replay_transformers.py.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from replayed import WIDTH, Block, Replayed, Stack, assert_same
from torch import Tensor, nn

# ---- what is replayed ------------------------------------------------------------------------------------------------


def test_only_the_layers_before_the_first_cut_are_skipped(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "replayed")
    model = Stack()
    replayed = Replayed(model, "2.fc_in@0.2, 3.fc_out@0.2")
    replayed.once(lambda: model(x))
    assert "".join(caplog.messages) == "0123" + "0123" + "23"
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
