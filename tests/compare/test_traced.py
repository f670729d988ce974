"""An exception at any line of what puts an arm in place and takes it away again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from toy import Toy
from untouched import assert_untouched, snapshot

from laser_callback.compare.arms import _OfLightning
from laser_callback.passes.state import Own, Start
from laser_callback.support import interrupts


@interrupts.whole
def _both(own: Own, lightning: _OfLightning) -> Any:
    with own, lightning:
        yield


def _codes(*classes: type) -> set[CodeType]:
    return {value.__code__ for each in classes for value in vars(each).values() if hasattr(value, "__code__")}


def _raising_at(event: int, codes: set[CodeType], work: Callable[[], None]) -> bool:
    """Run ``work`` with KeyboardInterrupt at the ``event``-th line of ``codes``; whether there was one."""
    lines = [0]

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if kind == "line":
            lines[0] += 1
            if lines[0] == event:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        assert lines[0] >= event
    finally:
        sys.settrace(before)
    return lines[0] >= event


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_at_any_line_leaves_nothing() -> None:
    module = Toy()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.state.fn, trainer.state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    before = snapshot(module)

    def standing() -> tuple[Any, ...]:
        return trainer._logger_connector, trainer._evaluation_loop._results, trainer.loggers, module._current_fx_name

    outside, handlers = standing(), dict(interrupts._handlers._contexts)
    codes = _codes(Own, _OfLightning, interrupts._Whole)
    event = 1
    while True:
        start = Start(module)
        start.first_batch()

        def work(start: Start = start) -> None:
            with _both(Own(start), _OfLightning(trainer, module)):
                module.acc.update(*_batch(module))
                module.extra = 1

        reached = _raising_at(event, codes, work)
        if not reached:
            break
        assert_untouched(module, before)
        assert all(now is then or now == then for now, then in zip(standing(), outside, strict=True)), event
        assert not hasattr(module, "extra"), event
        assert module.acc.update_count == 0, event
        assert interrupts._handlers._contexts == handlers, event
        event += 1
    assert event > 50


def _batch(module: Toy) -> tuple[Any, Any]:
    return torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
