"""LightningModules as their users write them: the base of all styles, and the list that they enter.

Each class says in ``plan`` what to cut and gives its evaluation data in ``data()``. Nothing here knows the callback.
The styles are in ``styles_*.py``; ``every_style.py`` has them all.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tiny import tiny_causal_lm
from torch import Tensor, nn
from torch.utils.data import DataLoader

STYLES: list[type[Style]] = []
CLASSES = 5


def style(cls: type[Style]) -> type[Style]:
    """Register the class; its test loop is its validation loop."""
    for base in reversed(cls.__mro__):
        for name, value in list(vars(base).items()):
            if issubclass(base, Style) and name.startswith(("on_validation_", "validation_step")):
                setattr(cls, name.replace("validation", "test"), value)
    STYLES.append(cls)
    return cls


def tokens(n: int = 10, length: int = 7, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 300, (n, length), generator=generator)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


class Style(pl.LightningModule):
    """A causal language model, used as a classifier by the logits of five tokens at the last position."""

    plan = "2.mlp@0.1, 3.q_proj@0.2"

    def __init__(self) -> None:
        super().__init__()
        self.model = self.build()

    def build(self) -> nn.Module:
        return tiny_causal_lm()

    def data(self) -> Any:
        return DataLoader(tokens(), batch_size=4)

    def logits(self, batch: Any) -> Tensor:
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, -1, :CLASSES]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)
