"""Where a result comes from: the versions, the model, the device and the seed that its numbers depend on."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    names = ("laser-callback", "torch", "lightning", "transformers", "torchmetrics")
    return {name: version(name) for name in names}


def provenance(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> dict[str, Any]:
    """What a reader needs to make the numbers of one evaluation again, as plain data.

    Args:
        trainer: that runs it.
        module: under test; if it holds a transformers model under ``model``, that model's name is stated too. So is the
            ``provenance`` of a data module that has some.
        seed: of the random control and of the noise.
    """
    name = getattr(getattr(module, "model", None), "name_or_path", None)
    data = getattr(getattr(trainer, "datamodule", None), "provenance", {})
    return {
        "module": type(module).__qualname__,
        **({"model": name} if isinstance(name, str) and name else {}),
        **(data if isinstance(data, dict) else {}),
        "loop": "" if trainer.state.fn is None else trainer.state.fn.value,
        **({"epoch": trainer.current_epoch} if trainer.state.fn == "fit" else {}),
        "device": str(module.device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "seed": seed,
        "versions": versions(),
    }
