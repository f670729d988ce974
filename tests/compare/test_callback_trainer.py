"""LaserCallback with a Trainer's options and loggers, from a config file, copied and pickled."""

from __future__ import annotations

import copy
import csv
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from toy import OTHER, PLAN, Toy, evaluate, make_data, oracle, update_mean
from untouched import assert_untouched, snapshot

from laser_callback import LaserCallback

# ---- the trainer's options -------------------------------------------------------------------------------------------


def test_inference_mode_off(trainer):
    class Gradients(Toy):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(self(x), batch[1]), x)
            self.log("slope", slope.norm(), batch_size=len(x))

    module = Gradients()
    before = snapshot(module)
    logged = evaluate(trainer, module, LaserCallback(PLAN, report=False), inference_mode=False)
    expected = oracle(trainer, module, inference_mode=False)
    assert logged["laser/slope"] == pytest.approx(expected["slope"], rel=1e-5)
    assert logged["slope"] == evaluate(trainer, module, inference_mode=False)["slope"]
    assert_untouched(module, before)


def test_one_trainer_evaluates_fits_and_predicts(trainer, monkeypatch):
    """Predictions are the original's, whatever else the trainer does, and this is said once."""
    said: list[str] = []
    monkeypatch.setattr("laser_callback.compare.callback.rank_zero_info", said.append)
    module, plain = Toy(), trainer().predict(Toy(), make_data())
    laser = LaserCallback(PLAN, loops=("validate", "test", "fit"), report=False)
    run = trainer(laser)
    assert all(map(torch.equal, run.predict(module, make_data()), plain))
    logged = run.validate(module, make_data(), verbose=False)[0]
    result = laser.result
    assert all(map(torch.equal, run.predict(module, make_data()), plain))
    assert laser.result is result  # still that of the evaluation
    assert logged["laser/loss"] == run.test(module, make_data(), verbose=False)[0]["laser/loss"]
    run.fit(module, make_data(), make_data())
    assert not all(map(torch.equal, run.predict(module, make_data()), plain))
    (message,) = said
    assert "LaserCallback compares nothing in `trainer.predict()`" in message


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(trainer, precision):
    module = Toy()
    logged = evaluate(trainer, module, LaserCallback(PLAN, report=False), precision=precision)
    plain = evaluate(trainer, module, precision=precision)
    expected = oracle(trainer, module, precision=precision)
    for key in plain:
        assert logged[key] == plain[key]
        assert logged[f"laser/{key}"] == pytest.approx(expected[key], rel=1e-6)
    assert logged["laser/loss"] != plain["loss"]


def test_csv_logger_gets_the_keys(trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    logged = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False), logger=logger)
    (row,) = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").open()))
    for key in ("loss", "laser/loss", "laser/delta/loss", "acc", "laser/acc", "laser/delta/acc"):
        assert float(row[key]) == pytest.approx(logged[key])


def test_tensorboard_logger_gets_the_keys(trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log", version=0)
    logged = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False), logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for key in ("loss", "laser/loss", "laser/delta/loss"):
        (scalar,) = events.Scalars(key)
        assert scalar.value == pytest.approx(logged[key])


def test_keys_kept_from_loggers_stay_from_them(trainer, tmp_path):
    class Quiet(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("quiet", 1.0, logger=False, batch_size=len(batch[0]))
            return super().validation_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="log", version=0)
    run = trainer(LaserCallback(PLAN, report=False), logger=logger)
    run.validate(Quiet(), make_data(), verbose=False)
    (row,) = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").open()))
    assert "laser/loss" in row
    assert not [key for key in row if "quiet" in key]
    assert "laser/quiet" in run.callback_metrics


# ---- configuration ---------------------------------------------------------------------------------------------------


class ToyData(pl.LightningDataModule):
    def val_dataloader(self):
        return make_data()

    def predict_dataloader(self):
        return DataLoader(make_data().dataset, batch_size=4)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"plan": PLAN, "report": False}, ["laser"]),
        ({"plan": {"a": PLAN, "b": OTHER}, "loops": ["validate", "fit"], "primary": "acc"}, ["a", "b"]),
        ({"plan": {"reductions": [{"layer": 1, "matrix": "mlp", "rho": 0.1}]}, "key_prefix": "cut"}, ["cut"]),
        ({"plan": PLAN, "report": "result.json", "loops": "validate", "controls": True, "seed": 3}, ["laser"]),
    ],
)
def test_lightning_cli(tmp_path, arguments, names, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "laser_callback.LaserCallback", "init_args": arguments}],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(Toy, ToyData, args=["validate", "--config", "config.yaml"], save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LaserCallback)]
    assert list(callback.plans) == names
    assert list(callback.result.arms) == names
    assert callback.result[names[0]]["acc"].n == 10
    if isinstance(arguments.get("report"), str):
        assert json.loads((tmp_path / "result.json").read_text())["arms"]["laser"]
    if "loops" in arguments:
        loops = arguments["loops"]
        assert callback.loops == ((loops,) if isinstance(loops, str) else tuple(loops))
    cli = LightningCLI(Toy, ToyData, args=["predict", "--config", "config.yaml"], save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LaserCallback)]
    with pytest.raises(RuntimeError):
        _ = callback.result  # nothing is compared there


def test_state_keys_differ_by_prefix():
    assert LaserCallback(PLAN).state_key != LaserCallback(PLAN, key_prefix="b").state_key


def test_callbacks_can_be_copied_and_pickled(trainer):
    """Launchers pickle callbacks, weight averaging copies modules that may hold them: before and after a run."""
    callback = LaserCallback({"a": PLAN}, metrics={"mean": MeanMetric()}, update=update_mean, report=False)
    for _ in range(2):
        for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert other.plans == callback.plans
            assert "laser/a/mean" in evaluate(trainer, Toy(), other)
        evaluate(trainer, Toy(), callback)
