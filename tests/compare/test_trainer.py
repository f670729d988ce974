from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest

from laser_callback.compare.trainer import quiet_trainer


@pytest.mark.parametrize(
    ("accelerator", "told"), [("cpu", ("cpu", 1)), ("cuda", ("cuda", 1)), ("cuda:1", ("cuda", [1]))]
)
def test_one_device_which_may_be_named(monkeypatch, accelerator, told):
    monkeypatch.setattr(pl, "Trainer", lambda **options: options)
    with quiet_trainer(accelerator, precision="16-mixed", logger=True) as options:
        assert (options["accelerator"], options["devices"]) == told
        assert (options["precision"], options["logger"], options["enable_progress_bar"]) == ("16-mixed", True, False)


def test_lightning_says_nothing_of_it(caplog):
    level = logging.getLogger("lightning.pytorch").level
    with caplog.at_level(logging.INFO), quiet_trainer("cpu") as trainer:
        assert trainer.num_devices == 1
    assert not caplog.records
    assert logging.getLogger("lightning.pytorch").level == level
