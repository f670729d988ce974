from __future__ import annotations

import logging
import os
import signal
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from laser_callback.compare.measure import Lab
from laser_callback.compare.trainer import quiet_trainer
from laser_callback.spectra.store import Spectra


@pytest.mark.parametrize(
    ("accelerator", "told"), [("cpu", ("cpu", 1)), ("cuda", ("cuda", 1)), ("cuda:1", ("cuda", [1]))]
)
def test_one_device_which_may_be_named(monkeypatch, accelerator, told):
    monkeypatch.setattr(pl, "Trainer", lambda **told: SimpleNamespace(options=told))
    with quiet_trainer(accelerator, precision="16-mixed", logger=True) as made:
        options = made.options
        assert (options["accelerator"], options["devices"]) == told
        assert (options["precision"], options["logger"], options["enable_progress_bar"]) == ("16-mixed", True, False)


def test_lightning_says_nothing_of_it(caplog):
    level = logging.getLogger("lightning.pytorch").level
    with caplog.at_level(logging.INFO), quiet_trainer("cpu") as trainer:
        assert trainer.num_devices == 1
    assert not caplog.records
    assert logging.getLogger("lightning.pytorch").level == level


class Struck(BoringModel):
    def validation_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        return super().validation_step(batch, batch_idx)


class Exits(BoringModel):
    def validation_step(self, batch, batch_idx):
        sys.exit(7)


def test_ctrl_c_is_ctrl_c_and_can_be_struck_again():
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), quiet_trainer("cpu") as trainer:
            trainer.validate(Struck(), verbose=False)
        assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(SystemExit) as caught, quiet_trainer("cpu") as trainer:
        trainer.validate(Exits(), verbose=False)
    assert caught.value.code == 7


class Stop(KeyboardInterrupt):
    """What a handler of somebody else's raises."""


class Terminated(BoringModel):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def validation_step(self, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("batch", [0, 63])
def test_sigterm_does_what_it_does_outside(batch):
    """Lightning would go on after the last batch, and exit with 0 after any other."""

    def stop(number, frame):
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stop), quiet_trainer("cpu") as trainer:
            trainer.validate(Terminated(batch), verbose=False)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Ends(BoringModel):
    def __init__(self, error):
        super().__init__()
        self.frozen = torch.nn.Dropout().eval()
        self.error = error

    def validation_step(self, batch, batch_idx):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_a_run_that_does_not_end_leaves_the_module_in_its_mode(error):
    """Else a later `fit` would train in eval mode."""
    module = Ends(error)
    modes = [part.training for part in module.modules()]
    with pytest.raises(type(error)):
        Lab(module, Spectra()).validate(module.val_dataloader())
    assert [part.training for part in module.modules()] == modes
    assert module.training
    assert not module.frozen.training
