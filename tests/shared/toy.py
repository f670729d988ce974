"""A small classifier as a user's module, its data, two plans for it, and what an evaluation of it logs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from laser_callback import reduced

PLAN = "1.mlp@0.1"
OTHER = "2.out_proj@0.2"
CLASSES = 3


def make_data(n: int = 10, seed: int = 1, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator)), batch_size)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Toy(pl.LightningModule):
    """A user's classifier: logs a loss and a torchmetrics accuracy, and returns which examples are right."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = Net()
            for parameter in self.net.parameters():
                if parameter.dim() == 2:
                    parameter.data.normal_(std=0.6)
        self.acc = MulticlassAccuracy(CLASSES, average="micro")
        self.steps = 0
        self.on_call: dict[int, Any] = {}  # number of the call of the step -> what happens in it

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def _evaluate(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        CALLS.append(1)
        if len(CALLS) in self.on_call:
            self.on_call[len(CALLS)]()
        self.log("loss", F.cross_entropy(logits, y), on_epoch=True, batch_size=len(y))
        self.acc(logits, y)
        self.log("acc", self.acc, on_epoch=True)
        return {"acc": logits.argmax(1) == y, "logits": logits, "y": y}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


CALLS: list[int] = []  # calls of the evaluation step, of both arms (a module's own number is kept apart per arm)


def evaluate(make: Any, module: Toy, *callbacks: pl.Callback, data: Any = None, **options: Any) -> dict[str, float]:
    return make(*callbacks, **options).validate(module, make_data() if data is None else data, verbose=False)[0]


def oracle(make: Any, module: Toy, plan: str = PLAN, **options: Any) -> dict[str, float]:
    with reduced(module, plan):
        return evaluate(make, module, **options)


def update_mean(metrics: MetricCollection, outputs: Any, batch: Any) -> None:
    metrics.update(outputs["logits"])
