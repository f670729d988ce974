"""An exception at any line of what puts an arm in place and takes it away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from toy import Toy
from tracing import Place, interrupted
from trainers import evaluating
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_at_any_line_leaves_nothing() -> None:
    module = Toy()
    trainer = evaluating(module)
    before = snapshot(module)

    def standing() -> tuple[Any, ...]:
        return trainer._logger_connector, trainer._evaluation_loop._results, trainer.loggers, module._current_fx_name

    outside, handlers = standing(), dict(interrupts._handlers._contexts)
    codes = _codes(Own, _OfLightning, interrupts._Whole)
    places: list[Place] = []
    while True:
        start = Start(module)
        start.first_batch()

        def work(start: Start = start) -> None:
            with _both(Own(start), _OfLightning(trainer, module)):
                module.acc.update(*_batch(module))
                module.extra = 1

        place = interrupted(work, len(places), codes)
        if place is None:
            break
        assert_untouched(module, before)
        assert all(now is then or now == then for now, then in zip(standing(), outside, strict=True)), place
        assert not hasattr(module, "extra"), place
        assert module.acc.update_count == 0, place
        assert interrupts._handlers._contexts == handlers, place
        places.append(place)
    assert len(places) > 50


def _batch(module: Toy) -> tuple[Any, Any]:
    return torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.slow
def test_signals_around_every_context_leave_nothing() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "interrupt_storm.py"
    done = subprocess.run([sys.executable, script, "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
