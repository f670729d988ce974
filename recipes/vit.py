"""A LightningModule and its data, images in folders, without a word of LASER; vit.yaml compares plans in it."""

# python vit.py validate --model.model google/vit-base-patch16-224 --data.folder images/

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageClassification


class Classifier(pl.LightningModule):
    """A vision transformer that logs accuracy and loss, and returns both per image: pairs are then images.

    Args:
        model: hub name or folder of an image classifier.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = AutoModelForImageClassification.from_pretrained(model)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        # Folders are named by label, so that any classifier can tell which of its outputs is meant.
        target = torch.tensor([self.model.config.label2id[name] for name in batch["label"]], device=self.device)
        logits = self(batch["pixels"])
        correct = logits.argmax(-1) == target
        loss = F.cross_entropy(logits, target, reduction="none")
        self.log("accuracy", correct.float().mean(), batch_size=len(correct))
        self.log("loss", loss.mean(), batch_size=len(correct))
        return {"accuracy": correct, "loss": loss, "id": batch["id"]}


class Images(pl.LightningDataModule):
    """Images in one folder per label.

    Args:
        folder: holds the labels' folders.
        size: height and width that the model takes, in pixels.
        batch_size: images in a batch.
    """

    def __init__(self, folder: str, size: int = 224, batch_size: int = 32) -> None:
        super().__init__()
        self.folder, self.size, self.batch_size = Path(folder), size, batch_size

    def setup(self, stage: str | None = None) -> None:
        self.images = ImageFolder(self.folder, self.size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, self.batch_size)


class ImageFolder(Dataset[dict[str, Any]]):
    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(path for path in folder.glob("*/*") if path.is_file())
        self.size = size
        if not self.paths:
            raise ValueError(f"`folder` must hold one folder of images per label, got none in {folder}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = Image.open(path).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size)
        # ViT's own normalisation: mean and standard deviation 0.5.
        return {"pixels": pixels / 127.5 - 1.0, "label": path.parent.name, "id": str(path)}


if __name__ == "__main__":
    LightningCLI(Classifier, Images, save_config_callback=None)
