"""Errors, Ctrl-C and signals in the middle of a comparison: nothing of it stays in the module."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from toy import PLAN, Toy, evaluate, make_data
from untouched import assert_untouched, snapshot

from laser_callback import LaserCallback


def _raise(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("loop", ["validate", pytest.param("test", marks=pytest.mark.slow), "fit"])
@pytest.mark.parametrize("call", [1, 2, 4])  # the user's step, the reduced step, and that of the second batch
@pytest.mark.parametrize("kind", ["error", "ctrl-c", "sigterm"])
def test_interrupts_leave_nothing(trainer, loop, call, kind):
    module = Toy()
    acts = {
        "error": _raise(RuntimeError("broken step")),
        "ctrl-c": _raise(KeyboardInterrupt()),
        "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    module.on_call = {call: acts[kind]}
    callback = LaserCallback(PLAN, loops=("validate", "test", "fit"), report=False, on_error="raise")
    run = trainer(callback, num_sanity_val_steps=0, val_check_interval=1, limit_train_batches=2)
    expected = {"error": RuntimeError, "ctrl-c": (SystemExit, KeyboardInterrupt), "sigterm": BaseException}[kind]
    handler = signal.getsignal(signal.SIGTERM)
    if loop == "fit":  # validate in the middle of an epoch that changes no weight
        module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        start = partial(run.fit, module, make_data(), make_data())
    else:
        start = partial(getattr(run, loop), module, make_data(), verbose=False)
    before = snapshot(module)
    with pytest.raises(expected):
        start()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert_untouched(module, before)

    # The module's metric is where its own passes left it, as without the callback.
    finished = {1: 0, 2: 1, 4: 2}[call] if kind != "sigterm" else {1: 1, 2: 1, 4: 2}[call]
    assert module.acc.update_count == finished
    module.acc.reset()
    # The module is as good as new, for the same callback too.
    module.on_call = {}
    fresh = Toy()
    assert evaluate(trainer, module, callback) == evaluate(trainer, fresh, LaserCallback(PLAN, report=False))
    if loop != "fit":
        trainer(num_sanity_val_steps=0, max_steps=1).fit(module, make_data())


def test_error_in_the_users_epoch_end(trainer):
    class Breaking(Toy):
        def on_validation_epoch_end(self):
            rank = torch.linalg.matrix_rank(self.net.encoder.layers[1].linear1.weight)
            if (int(rank) == 8) == self.fails_for_the_user:
                raise RuntimeError("broken end")

    for user in (True, False):
        module = Breaking()
        module.fails_for_the_user = user
        before = snapshot(module)
        with pytest.raises(RuntimeError, match="broken end"):
            evaluate(trainer, module, LaserCallback(PLAN))
        assert_untouched(module, before)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_error_in_another_callback(trainer, hook):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken callback")

    module = Toy()
    before = snapshot(module)
    for order in (0, 1):
        other = pl.Callback()
        setattr(other, hook, fail)
        callbacks = [LaserCallback(PLAN), other]
        with pytest.raises(RuntimeError, match="broken callback"):
            evaluate(trainer, module, *(callbacks if order else reversed(callbacks)))
        assert_untouched(module, before)
