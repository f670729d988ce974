"""Styles of batches, which steps take apart, and of logging: every way, several loaders, loggers talked to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch.utilities import CombinedLoader
from styles import CLASSES, Style, style, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import BatchEncoding

# ---- batches ---------------------------------------------------------------------------------------------------------


@style
class PopsLabels(Style):
    def validation_step(self, batch: Any) -> None:
        labels = batch.pop("labels")
        logits = self.model(**batch).logits[:, -1, :CLASSES]
        batch["input_ids"].zero_()
        self.log("loss", F.cross_entropy(logits, labels))
        self.log("left", float(len(batch)))


def encode(items: list[dict[str, Tensor]]) -> BatchEncoding:
    return BatchEncoding({key: torch.stack([item[key] for item in items]) for key in items[0]})


@style
class PopsLabelsOfEncoding(PopsLabels):
    def data(self) -> Any:
        return DataLoader(tokens(), batch_size=4, collate_fn=encode)


class Pair(NamedTuple):
    ids: Tensor
    rest: list[Any]


@dataclass
class Example:
    pair: Pair
    extra: dict[str, Any]


def nested(items: list[dict[str, Tensor]]) -> Example:
    batch = encode(items)
    return Example(Pair(batch["input_ids"], [batch["labels"], "text"]), {"names": [str(i) for i in range(len(items))]})


@style
class EditsNestedBatch(Style):
    """A dataclass of a named tuple of lists, all edited."""

    def data(self) -> Any:
        return DataLoader(tokens(), batch_size=4, collate_fn=nested)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        labels = batch.pair.rest.pop(0)
        logits = self.model(batch.pair.ids).logits[:, -1, :CLASSES]
        batch.pair.ids.fill_(7)
        batch.extra["names"].pop()
        self.log("loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("names", float(len(batch.extra["names"])), batch_size=1)
        batch.extra = None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("gone", float(batch.extra is None), batch_size=1)


def output_batch(items: list[dict[str, Tensor]]) -> hf.utils.ModelOutput:
    batch = encode(items)
    return hf.modeling_outputs.SequenceClassifierOutput(loss=batch["labels"], logits=batch["input_ids"])


@style
class ModelOutputBatch(Style):
    """A transformers ModelOutput holds each value twice: as an item and as an attribute."""

    def data(self) -> Any:
        return DataLoader(tokens(), batch_size=4, collate_fn=output_batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.model(batch["logits"]).logits[:, -1, :CLASSES]
        self.log("loss", F.cross_entropy(logits, batch.loss), batch_size=len(logits))
        self.log("same", float(batch.logits is batch["logits"]), batch_size=1)
        batch.logits.zero_()
        batch.loss.zero_()


# ---- logging ---------------------------------------------------------------------------------------------------------


@style
class LogsEveryWay(Style):
    """on_step with on_epoch, step only, sync_dist, reductions, integers, no logger, other hooks."""

    def on_validation_start(self) -> None:
        self.log("constant", 3.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        right = (logits.argmax(1) == batch["labels"]).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("loss_at_step", loss, on_step=True, on_epoch=False)
        self.log("synced", loss, sync_dist=True)
        self.log("largest", logits.max(), reduce_fx="max")
        self.log("smallest", logits.min(), reduce_fx=torch.min)
        self.log("right", right, reduce_fx="sum")
        self.log("right_number", int(right), reduce_fx=sum)
        self.log("silent", loss * 2, logger=False)
        self.log("weighted", loss, batch_size=3)
        self.log("double", logits.double().mean())

    def on_validation_epoch_end(self) -> None:
        self.log("from_epoch_end", 7, sync_dist=True)
        self.log("loss_so_far", self.trainer.callback_metrics["loss"])


@style
class ReadsCallbackMetrics(Style):
    """The step reads what has been logged so far, of this evaluation and of none before."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        known = {k: v for k, v in self.trainer.callback_metrics.items() if not k.startswith("laser")}
        self.known.append(float(sum(known.values())))
        self.log("loss", F.cross_entropy(self.logits(batch), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        known = {k: v for k, v in self.trainer.callback_metrics.items() if not k.startswith("laser")}
        self.log("seen", float(sum(self.known)))
        self.log("at_end", known["loss"] * 2)


@style
class SeveralLoaders(Style):
    """Step keys carry the loader's number, epoch keys do not; one metric object is shared, others have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = MulticlassAccuracy(CLASSES)
        self.accuracies = nn.ModuleList([MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)])
        self.outputs: list[list[Tensor]] = [[], []]

    def data(self) -> Any:
        return [DataLoader(tokens(n, seed=seed), batch_size=3) for n, seed in ((7, 1), (5, 2))]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        self.shared.update(logits, batch["labels"])
        self.accuracies[dataloader_idx](logits, batch["labels"])
        self.outputs[dataloader_idx].append(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("plain", loss)
        self.log("shared", self.shared)
        self.log("acc", self.accuracies[dataloader_idx])
        self.log(f"own_name_{dataloader_idx}", loss, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        for i, losses in enumerate(self.outputs):
            self.log(f"mean_{i}", torch.stack(losses).mean())
            losses.clear()
        self.log("both", self.shared.compute())


@style
class CombinedLoaders(Style):
    """Two loaders at once: one batch is a dict of both loaders' batches, the shorter one begins again."""

    def data(self) -> Any:
        loaders = {"a": DataLoader(tokens(7, seed=1), batch_size=3), "b": DataLoader(tokens(5, seed=2), batch_size=3)}
        return CombinedLoader(loaders, "max_size_cycle")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["a"]["input_ids"] = batch["a"]["input_ids"].roll(int(torch.randint(7, ())), 1)  # augmentation
        return batch

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name in list(batch):
            part = batch.pop(name)
            self.log(name, F.cross_entropy(self.logits(part), part["labels"]), batch_size=len(part["labels"]))


@style
class Experiment(Style):
    """Talks to the logger directly, in three ways, and asks where to write."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        self.logger.experiment.log_text("loss", float(loss))
        self.logger.log_metrics({"direct": float(loss)}, step=batch_idx)
        for logger in self.trainer.loggers:
            logger.log_image("logits", [logits])
        for folder in (self.trainer.log_dir, self.logger.save_dir):
            with Path(folder, f"{self.logger.name}-{self.logger.version}.txt").open("a") as file:
                file.write(f"{float(loss)}\n")
        self.log("loss", loss)
