"""The checkpoints of other epochs: early stopping, which a cleanup must beat to be worth its name.

Contract: a checkpoint is held against the model as it would be restored, and everything is put back. It is confirmed
only where the confirm set has not chosen it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from laser_callback.shipping.trained import read_own
from laser_callback.support.checkpoints import strangers
from laser_callback.support.interrupts import whole

MOST = 8
"""So many checkpoints are tried, the best by what was monitored."""


@dataclass(frozen=True)
class Rival:
    """A checkpoint of another epoch.

    Attributes:
        path: of its file.
        chosen: by the validation data, and so perhaps by what would confirm it.
    """

    path: str
    chosen: bool


def rivals_of(trainer: pl.Trainer, module: pl.LightningModule, source: str, own_data: bool) -> tuple[list[Rival], str]:
    """The checkpoints that the Trainer's ModelCheckpoints have kept, but for ``source``; and a note on those left out.

    A validation metric has chosen those that ``save_top_k`` keeps. That does no harm where it is the one that has
    chosen ``source`` before all of these, since it favours ``source``; nor where all epochs are kept, or the search has
    data of its own.

    Args:
        trainer: that has fitted.
        module: to which they belong.
        source: what is cleaned, a path or ``"last"``.
        own_data: whether the examples of the search are others than the validation data.
    """
    found: dict[str, Rival] = {}
    notes: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.monitor is None and callback.save_top_k == -1:
            notes.append("a ModelCheckpoint without `monitor` knows of its latest checkpoint only: no other is tried")
        sign = -1 if callback.mode == "max" else 1
        scores = callback.best_k_models
        kept = sorted(scores, key=lambda path: sign * float(scores[path]))
        is_chosen = callback.monitor is not None and callback.save_top_k != -1 and not own_data
        is_of_source = callback is trainer.checkpoint_callback and source != "last"
        for path in (callback.last_model_path, callback.best_model_path, *kept):
            chosen = is_chosen and not is_of_source and path != callback.last_model_path
            if path and os.path.isfile(path):
                found.setdefault(os.path.realpath(path), Rival(path, chosen))
    found.pop(os.path.realpath(source), None)
    readable = [rival for rival in found.values() if not strangers(rival.path, module, trainer.datamodule)]
    if len(readable) < len(found):
        notes.append(
            f"{len(found) - len(readable)} checkpoints are not tried, since they hold objects of other classes"
        )
    if len(readable) > MOST:
        notes.append(f"{len(readable) - MOST} more checkpoints are not tried")
    return readable[:MOST], "; ".join(notes)


@whole
def put_in(module: pl.LightningModule, state: Mapping[str, Any]) -> Generator[None, None, None]:
    """Within: the module has what ``state`` holds; after: what it had."""
    before = copy.deepcopy(module.state_dict())
    try:
        module.load_state_dict(state, strict=module.strict_loading)
        yield
    finally:
        module.load_state_dict(before, strict=module.strict_loading)


def state_of(trainer: pl.Trainer, module: pl.LightningModule, rival: Rival) -> Mapping[str, Any]:
    """The weights of a checkpoint, as the module's own hook wants them."""
    checkpoint = read_own(trainer, module, rival.path)
    module.on_load_checkpoint(checkpoint)
    state: Mapping[str, Any] = checkpoint["state_dict"]
    return state


def differs(module: pl.LightningModule, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` holds anything else than the module does."""
    now = module.state_dict()
    return any(
        name not in now or not torch.equal(value.to(now[name].device), now[name])
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    )
