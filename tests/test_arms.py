"""What `arms.py` uses of Lightning's private parts is there, and means what it takes it to mean."""

from __future__ import annotations

import inspect

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultCollection, _ResultMetric
from packaging.version import Version

from laser_callback import arms


def test_supported_version():
    """A new minor version: read the diff of the parts below, run the oracle tests, then widen pyproject's range."""
    assert Version("2.6") <= Version(lightning.__version__) < Version("2.7")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (_EvaluationLoop, "_build_kwargs", ["self", "batch", "batch_idx", "dataloader_idx"]),
        (_EvaluationLoop, "_build_step_args_from_hook_kwargs", ["self", "hook_kwargs", "step_hook_name"]),
        (_LoggerConnector, "__init__", ["self", "trainer"]),
        (_LoggerConnector, "on_batch_start", ["self", "batch", "dataloader_idx"]),
        (_LoggerConnector, "on_batch_end", ["self"]),
        (_LoggerConnector, "epoch_end_reached", ["self"]),
        (_LoggerConnector, "update_eval_epoch_metrics", ["self"]),
        (_LoggerConnector, "_evaluation_epoch_end", ["self"]),
        (_LoggerConnector, "on_epoch_end", ["self"]),
        (_ResultCollection, "__init__", ["self", "training"]),
        (_ResultCollection, "_get_cache", ["result_metric", "on_step"]),
        (_ResultCollection, "_forked_name", ["self", "result_metric", "on_step"]),
    ],
)
def test_private_functions(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_private_attributes():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    connector = _LoggerConnector(trainer)
    assert vars(connector).keys() == {
        "trainer",
        "_progress_bar_metrics",
        "_logged_metrics",
        "_callback_metrics",
        "_current_fx",
        "_first_loop_iter",
    }
    assert {"_trainer", "_current_fx_name", "_metric_attributes"} <= vars(pl.LightningModule()).keys()
    loop = trainer.validate_loop
    assert {"_results", "_logged_outputs", "_data_fetcher", "_combined_loader"} <= vars(loop).keys()
    assert isinstance(_EvaluationLoop._is_sequential, property)
    assert isinstance(type(trainer)._evaluation_loop, property)
    assert _DataLoaderIterDataFetcher.__name__ == "_DataLoaderIterDataFetcher"
    assert vars(_ResultCollection(training=False)) == {
        "training": False,
        "batch": None,
        "batch_size": None,
        "dataloader_idx": None,
    }


def test_a_logged_mean_is_what_running_means_reads():
    results = _ResultCollection(training=False)
    results.log("validation_step", "loss", torch.tensor(2.0), on_epoch=True, batch_size=3)
    results.log("validation_step", "loss", torch.tensor(4.0), on_epoch=True, batch_size=1)
    (item,) = results.values()
    assert isinstance(item, _ResultMetric)
    assert isinstance(item.meta, _Metadata)
    assert arms.running_means(results) == {"loss": (10.0, 4.0)}
    logged = arms.logged(results)["loss"]
    assert (float(logged.value), logged.name, logged.dataloader_idx) == (2.5, "loss", None)
    assert (logged.logger, logged.prog_bar, logged.also) == (True, False, None)


def test_call_after_hook_runs_once_and_leaves_nothing():
    module = pl.LightningModule()
    calls: list[str] = []
    module.on_validation_epoch_end = lambda: calls.append("hook")
    own = vars(module)["on_validation_epoch_end"]
    arms.call_after_hook(module, "on_validation_epoch_end", lambda: calls.append("then"))
    module.on_validation_epoch_end()
    module.on_validation_epoch_end()
    assert calls == ["hook", "then", "hook"]
    assert vars(module)["on_validation_epoch_end"] is own

    undo = arms.call_after_hook(module, "on_test_epoch_end", lambda: calls.append("never"))
    undo()
    undo()
    assert "on_test_epoch_end" not in vars(module)
