"""What training has made, in and out: the weights to clean, the checkpoint of the cleaned ones, all else as it was."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from laser_callback.passes.state import RandomState
from laser_callback.support.checkpoints import own_classes, strangers, unreadable
from laser_callback.support.files import appearing
from laser_callback.support.interrupts import whole
from laser_callback.support.merging import put_effective
from laser_callback.surgery.recipe import Recipe

_TRAINING_STATE = ("callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")
"""Parts of a checkpoint that belong to the weights before the cut."""


def device_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Where and how this process trained, as a Trainer of its own is told."""
    return {"accelerator": str(trainer.strategy.root_device), "precision": trainer.precision}


@whole
def as_found(
    trainer: pl.Trainer, module: pl.LightningModule, weights: Mapping[str, Any] | None
) -> Generator[None, None, None]:
    """After: the module belongs to its trainer, the random generators stand where they stood, ``weights`` are back."""
    state = RandomState.now()
    try:
        yield
    finally:
        module.trainer = trainer
        state.set()
        if weights is not None:
            module.load_state_dict(weights, strict=module.strict_loading)


def keeps_best(trainer: pl.Trainer) -> bool:
    """Whether there will be a best checkpoint."""
    callback = trainer.checkpoint_callback
    return callback is not None and getattr(callback, "save_top_k", 1) != 0


def best_path(trainer: pl.Trainer) -> str:
    """Of the best checkpoint; empty if there is none."""
    return str(getattr(trainer.checkpoint_callback, "best_model_path", ""))


def load_weights_to_clean(trainer: pl.Trainer, module: pl.LightningModule, which: str) -> tuple[dict[str, Any], str]:
    """Put the ``"best"`` or ``"last"`` weights into the module. Returns their checkpoint, and its name.

    Raises:
        MisconfigurationException: if there is no best checkpoint.
    """
    if which == "last":
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=True), "last"
    path = best_path(trainer)
    if not path:
        raise MisconfigurationException("there is no best checkpoint to clean: ModelCheckpoint has saved none")
    checkpoint = read_own(trainer, module, path)
    module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    return checkpoint, path


def read_own(trainer: pl.Trainer, module: pl.LightningModule, path: str | Path) -> dict[str, Any]:
    """A checkpoint of this training, hyperparameters that are objects included."""
    with own_classes(module, trainer.datamodule):
        return dict(trainer.strategy.load_checkpoint(path))


def refuse_unreadable(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise if :func:`read_own` will: for hyperparameters, and for what the first checkpoint shows, if there is one.

    Raises:
        MisconfigurationException: naming them.
    """
    owners = [module] if trainer.datamodule is None else [module, trainer.datamodule]
    path = best_path(trainer)
    found = [f"hyperparameter `{name}` of {type(owner).__name__}" for owner in owners for name in unreadable(owner)]
    found += [f"`{name}` in {path}" for name in (strangers(path, *owners) if path and not found else ())]
    if found:
        raise MisconfigurationException(
            "LaserCleanup reads a checkpoint back after training, and these objects in it are not loaded from a file: "
            f"{', '.join(found)}. Leave them out (`self.save_hyperparameters(ignore=[...])`), name their classes to "
            "`torch.serialization.add_safe_globals`, or take LaserCleanup(weights='last', apply=False)"
        )


def save_cleaned(
    checkpoint: dict[str, Any], module: pl.LightningModule, weights: Mapping[str, Tensor], recipe: Recipe, path: Path
) -> None:
    """Write ``checkpoint`` with the cleaned weights of the planned parameters, and with what was done."""
    state = module.state_dict()
    put_effective(state, module, weights)
    whole = {key: value for key, value in checkpoint.items() if key not in _TRAINING_STATE}
    with appearing(path) as file:
        torch.save({**whole, "state_dict": state, "laser": recipe.to_dict()}, file)


def free_path(path: Path) -> Path:
    """``path``, or where that is taken with a number, as ModelCheckpoint does it."""
    number, found = 0, path
    while found.exists() or found.with_suffix(".json").exists():
        number += 1
        found = path.with_stem(f"{path.stem}-v{number}")
    return found
