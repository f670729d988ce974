"""The planted model as somebody's module, its examples, and the options of a search for what is planted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from benchmarks.planted import FactRecall, Planted
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laser_callback import find_matrices

QUIET = {"progress": False, "accelerator": "cpu"}
AIM = {"objective": "val_acc", "direction": "max", "loss": "val_loss", "candidates": 16}
SEARCH = {**AIM, **QUIET}


class Recall(FactRecall):
    """Logs a loss and, per example, whether the answer is right."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        prompts, objects = batch
        logits = self.model(input_ids=prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, objects, reduction="none")
        right = logits.argmax(-1) == objects
        self.log("val_loss", loss.mean(), batch_size=len(loss))
        self.log("val_acc", right.float().mean(), batch_size=len(loss))
        return {"loss": loss.mean(), "val_loss": loss, "val_acc": right}


def all_examples(planted: Planted) -> DataLoader:
    prompts, objects = (torch.cat(pair) for pair in zip(planted.screen, planted.race, strict=True))
    return DataLoader(TensorDataset(prompts, objects), batch_size=50)


def healthy(planted: Planted) -> nn.Module:
    """The planted model without its tail."""
    model = copy.deepcopy(planted.module.model)
    (matrix,) = planted.target.matrices
    (own,) = [m for m in find_matrices(model) if m.name == matrix.name.removeprefix("model.")]
    u, s, v = torch.linalg.svd(own.parameter.data.double())
    own.parameter.data = ((u[:, : planted.rank] * s[: planted.rank]) @ v[: planted.rank]).float()
    return model
