"""A Trainer that says and writes nothing of its own accord."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage, TrainerFn


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """On the CPU, for one epoch where it fits; checkpoints are there if a callback asks for them."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def evaluating(module: pl.LightningModule) -> pl.Trainer:
    """In the middle of a validation of ``module``, without its loop."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.state.fn, trainer.state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    return trainer
