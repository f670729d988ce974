"""On the device, in every precision: each arm is a run of its own, and the screen is the derivative of the loss.

Modules are made on the CPU and brought to the device by Lightning, as their users do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from device import DEVICE
from fact_rows import facts
from screening import Steps, estimates, ids, run, screen_of
from styles_metrics import MetricAttributes
from tiny import tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer
from weights import same, weights

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.plans.target import targets

PLAN = "2.mlp@0.1, 3.q_proj@0.2"
WEIGHTS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


def language_model() -> LaserModule:
    return LaserModule(tiny_causal_lm(), tiny_tokenizer())


def validate(module: pl.LightningModule, precision: Any, *callbacks: pl.Callback) -> dict[str, float]:
    trainer = quiet_trainer(*callbacks, accelerator=DEVICE.type, precision=precision)
    data = FactsDataModule(facts(), module.tokenizer) if isinstance(module, LaserModule) else module.data()
    return trainer.validate(module, data, verbose=False)[0]


@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize("make", [MetricAttributes, language_model])
def test_each_arm_is_a_run_of_its_own(make: Callable[[], pl.LightningModule], precision: Any) -> None:
    plain, oracle, compared = (make().to(WEIGHTS[precision]) for _ in range(3))
    original = validate(plain, precision)
    with reduced(oracle, PLAN):
        expected = validate(oracle, precision)
    before = weights(compared)
    got = validate(compared, precision, LaserCallback(PLAN, report=False))

    assert {key: value for key, value in got.items() if not key.startswith("laser/")} == original
    assert {key: got[f"laser/{key}"] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert expected != original
    assert same(compared, before)


@pytest.mark.parametrize("precision", WEIGHTS)
def test_the_screen_is_the_derivative_of_the_loss(precision: Any) -> None:
    def scores(model: torch.nn.Module, precision: Any) -> dict[Any, float]:
        module = Steps(model)
        screen = screen_of(targets(module))
        run(screen, module, ids(), size=4, accelerator=DEVICE.type, precision=precision)
        known = estimates(screen, targets(module), (0.0, 0.1, 0.5))
        return {cut: score for cut, (score, _) in known.items()}

    exact = scores(tiny_causal_lm().to(WEIGHTS[precision]).double(), "64-true")
    found = scores(tiny_causal_lm().to(WEIGHTS[precision]), precision)
    tolerance = (1e-4 if precision == "32-true" else 0.1) * max(map(abs, exact.values()))
    assert found == pytest.approx(exact, abs=tolerance)
