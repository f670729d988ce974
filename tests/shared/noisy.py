"""A small classifier that is fine-tuned on labels of which a share is wrong, until it knows them by heart."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

CLASSES, WIDTH = 4, 48
AIM = {"objective": "val_acc", "direction": "max", "loss": "val_loss", "report": False, "constraints": []}


class Noisy(pl.LightningModule):
    """One layer of a Transformer and a head, which name the class of three noisy vectors."""

    def __init__(self, seed: int = 0, rate: float = 1e-3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, CLASSES)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        logits = self(x)
        losses, said = F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1)
        self.log("val_loss", losses.mean(), batch_size=len(y))
        self.log("val_acc", (said == y).float().mean(), batch_size=len(y))
        return {
            "loss": losses.mean(),
            "val_loss": losses,
            "val_acc": said == y,
            "answer": [f"class {i}" for i in y.tolist()],
            "prediction": [f"class {i}" for i in said.tolist()],
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def examples(n: int, seed: int, noise: float = 0.0, shift: float = 0.0) -> TensorDataset:
    """Vectors around the mean of their class; ``noise`` is the share of wrong labels, ``shift`` moves the means."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    means, moved = torch.randn(CLASSES, WIDTH, generator=fixed), torch.randn(CLASSES, WIDTH, generator=fixed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    x = torch.randn(n, 3, WIDTH, generator=generator) + 0.45 * (means + shift * (moved - means))[y][:, None]
    wrong = torch.rand(n, generator=generator) < noise
    return TensorDataset(x, torch.where(wrong, (y + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES, y))


def loader(data: TensorDataset, batch_size: int = 100) -> DataLoader[Any]:
    return DataLoader(data, batch_size)


def accuracy(module: Noisy, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float((module.eval()(x).argmax(-1) == y).double().mean())


def pretrained(seed: int = 0) -> Noisy:
    """What is fine-tuned: it has seen a little, with the right labels."""
    module = Noisy(seed)
    x, y = examples(400, 1).tensors
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(20):
        part = slice(64 * step % 384, 64 * step % 384 + 64)
        optimizer.zero_grad()
        F.cross_entropy(module(x[part]), y[part]).backward()
        optimizer.step()
    return module


def tune(folder: Any, module: pl.LightningModule, train: TensorDataset, *callbacks: Any, **options: Any) -> pl.Trainer:
    """Fit (an epoch has each example 20 times), with 600 validation examples whose labels are right."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"max_epochs": 2, **quiet, **options}
    trainer = pl.Trainer(default_root_dir=folder, accelerator="cpu", devices=1, callbacks=[*callbacks], **options)
    pl.seed_everything(0, verbose=False)
    shuffled = DataLoader(ConcatDataset([train] * 20), 64, shuffle=True)
    trainer.fit(module, shuffled, loader(examples(600, 3)))
    return trainer


def saved(folder: Any, **options: Any) -> ModelCheckpoint:
    """All validated epochs, by default."""
    return ModelCheckpoint(
        folder / "saved", filename="{epoch}", **{"monitor": "val_acc", "mode": "max", "save_top_k": -1} | options
    )
