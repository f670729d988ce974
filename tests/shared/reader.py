"""What a reader of README and documentation has: a model's name, and a module of their own."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from transformers import LlamaForCausalLM

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Classifier(pl.LightningModule):
    """Its layers are deep enough for `27.fc_in`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = LlamaForCausalLM.from_pretrained(folder)

    def forward(self, batch):
        return self.model(batch["x"]).logits[:, -1, :4]

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch).argmax(-1) == batch["label"]).float().mean())
