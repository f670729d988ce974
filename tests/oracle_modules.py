"""LightningModules as their users write them, in many styles, for the tests that compare two evaluations of each.

Each class says in ``plan`` what to cut and gives its evaluation data in ``data()``. Nothing here knows the callback.
"""

from __future__ import annotations

import random
from collections import Counter, UserDict, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch.utilities import CombinedLoader
from tiny import tiny_causal_lm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, Running
from transformers import BatchEncoding

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


def quiet(seed: int, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


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


# ---- metrics ---------------------------------------------------------------------------------------------------------


@style
class MetricAttributes(Style):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.f1 = MulticlassF1Score(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        self.accuracy(logits, batch["labels"])
        self.f1.update(logits, batch["labels"])
        self.log("loss", loss, prog_bar=True)
        self.log("acc", self.accuracy)
        self.log("f1", self.f1, on_step=False, on_epoch=True)
        return loss


@style
class Collection(Style):
    """Members of a compute group share their states by reference."""

    def __init__(self) -> None:
        super().__init__()
        members = [MulticlassAccuracy(CLASSES), MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES)]
        self.metrics = MetricCollection(members, prefix="val_")
        self.by_class = ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        self.metrics.update(logits, batch["labels"])
        self.by_class.update(logits, batch["labels"])
        self.log_dict(self.metrics)

    def on_validation_epoch_end(self) -> None:
        first, second = (self.metrics[name] for name in ("val_MulticlassPrecision", "val_MulticlassRecall"))
        self.log("groups", float(len(self.metrics.compute_groups)))
        self.log("shared", float(first.tp is second.tp))
        self.log_dict({f"class/{k}": v for k, v in self.by_class.compute().items()})
        self.by_class.reset()


@style
class CollectionComputedByHand(Style):
    """forward() in the step, compute and reset at the epoch's end, a second collection cloned from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MetricCollection({"acc": MulticlassAccuracy(CLASSES), "recall": MulticlassRecall(CLASSES)})
        self.second = self.first.clone(prefix="top/")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        now = self.first(logits, batch["labels"])
        self.log_dict({f"batch_{k}": v for k, v in now.items()}, batch_size=len(logits))
        self.second.update(logits.flip(1), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        for collection in (self.first, self.second):
            self.log_dict(collection.compute())
            collection.reset()


@style
class Aliased(Style):
    """One object under two names, in a list, in a dict and in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.best_name = self.accuracy
        self.all_metrics = [self.accuracy, SumMetric()]  # the second one is in no module
        self.by_name = {"nested": ({"acc": self.accuracy},)}
        accuracy = self.accuracy
        self.observe = lambda logits, labels: accuracy.update(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        self.observe(logits, batch["labels"])
        self.all_metrics[1].update(logits.sum())

    def on_validation_epoch_end(self) -> None:
        self.log("same", float(self.best_name is self.all_metrics[0] is self.by_name["nested"][0]["acc"]))
        self.log("acc", self.best_name.compute())
        self.log("acc_of_list", self.all_metrics[0].compute())
        self.log("total", self.all_metrics[1].compute())
        self.log("updates", float(self.accuracy.update_count))
        for metric in self.all_metrics:
            metric.reset()


@style
class LazyMetrics(Style):
    """Created at first use: by hasattr, by None, in a submodule, and in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.f1 = None
        self.head = nn.Identity()
        self.by_name = nn.ModuleDict()
        self.plain: dict[str, Metric] = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits, labels = self.logits(batch), batch["labels"]
        if not hasattr(self, "accuracy"):
            self.accuracy = MulticlassAccuracy(CLASSES)
        if self.f1 is None:
            self.f1 = MulticlassF1Score(CLASSES)
        if not hasattr(self.head, "recall"):
            self.head.recall = MulticlassRecall(CLASSES)
        for name in ("even", "odd"):
            if name not in self.by_name:
                self.by_name[name] = SumMetric()
            if name not in self.plain:
                self.plain[name] = MeanMetric()
        for metric in (self.accuracy, self.f1, self.head.recall):
            metric.update(logits, labels)
        self.by_name["even"].update(logits[:, ::2].sum())
        self.by_name["odd"].update(logits[:, 1::2].sum())
        self.plain["odd"].update(logits[:, 1])
        self.log("acc", self.accuracy)
        self.log("f1", self.f1)
        self.log("recall", self.head.recall)
        self.log("even", self.by_name["even"])

    def on_validation_epoch_end(self) -> None:
        self.log("odd", self.by_name["odd"].compute())
        self.log("plain_odd", self.plain["odd"].compute())
        self.by_name["odd"].reset()
        self.plain["odd"].reset()


@style
class Wrappers(Style):
    def __init__(self) -> None:
        super().__init__()
        self.range = MinMaxMetric(MulticlassAccuracy(CLASSES))
        self.recent = Running(SumMetric(), window=2)
        self.tracker = MetricTracker(MulticlassAccuracy(CLASSES, average="micro"))

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        self.range.update(logits, batch["labels"])
        self.log_dict({f"range/{k}": v for k, v in self.range.compute().items()}, batch_size=len(logits))
        self.recent.update(logits.sum())
        self.tracker.update(logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"end/{k}": v for k, v in self.range.compute().items()})
        self.log("recent", self.recent.compute())
        self.log("tracked", self.tracker.compute())
        self.log("evaluations", float(self.tracker.n_steps))
        self.log("all", self.tracker.compute_all().sum())


class Margin(Metric):
    """A metric of the user's own: a list state, and a plain attribute beside the states."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("margins", default=[], dist_reduce_fx="cat")
        self.add_state("worst", default=torch.tensor(1e9), dist_reduce_fx="min")
        self.calls = 0

    def update(self, logits: Tensor) -> None:
        top = logits.topk(2, dim=1).values
        self.margins.append(top[:, 0] - top[:, 1])
        self.worst = torch.minimum(self.worst, self.margins[-1].min())
        self.calls += 1

    def compute(self) -> Tensor:
        return torch.cat(list(self.margins)).mean() + 100 * self.calls + self.worst


@style
class OwnMetric(Style):
    def __init__(self) -> None:
        super().__init__()
        self.margin = Margin()
        self.scaled = self.margin * 2  # CompositionalMetric

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.margin.update(self.logits(batch))
        self.log("margin", self.margin)

    def on_validation_epoch_end(self) -> None:
        self.log("scaled", self.scaled.compute())


# ---- plain attributes ------------------------------------------------------------------------------------------------


@style
class Outputs(Style):
    """The style of Lightning's migration guide."""

    def __init__(self) -> None:
        super().__init__()
        self.validation_step_outputs: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.logits(batch)
        out = {"logits": logits, "labels": batch["labels"]}
        self.validation_step_outputs.append(out)
        return out

    def on_validation_epoch_end(self) -> None:
        logits = torch.cat([o["logits"] for o in self.validation_step_outputs])
        labels = torch.cat([o["labels"] for o in self.validation_step_outputs])
        self.log("loss", F.cross_entropy(logits, labels))
        self.log("right", (logits.argmax(1) == labels).sum())
        self.log("batches", len(self.validation_step_outputs))
        self.validation_step_outputs.clear()


@style
class OutputsInHooks(Style):
    """Made new in one hook, filled in another, also under on_validation_start and batch_start."""

    def on_validation_start(self) -> None:
        self.events = Counter(start=1)

    def on_validation_epoch_start(self) -> None:
        self.outputs: list[Tensor] = []
        self.by_class: defaultdict[int, list[Tensor]] = defaultdict(list)

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.events["batch_start"] += 1
        batch["input_ids"][:, 0] = 5 + batch_idx  # seen by the step

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.logits(batch)
        return {"logits": logits, "loss": F.cross_entropy(logits, batch["labels"], reduction="none")}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["logits"])
        for label, loss in zip(batch["labels"].tolist(), outputs["loss"], strict=True):
            self.by_class[label].append(loss)
        self.log("first", outputs["logits"][:, 0].mean())
        self.events["batch_end"] += 1

    def on_validation_epoch_end(self) -> None:
        self.log("mean", torch.cat(self.outputs).mean())
        self.log_dict({f"loss_{label}": torch.stack(losses).mean() for label, losses in self.by_class.items()})
        self.log_dict({f"n_{name}": float(count) for name, count in self.events.items()})


@dataclass
class Tally:
    right: int = 0
    losses: list[float] = field(default_factory=list)


class AverageMeter:
    """The helper class of countless training scripts."""

    def __init__(self) -> None:
        self.sum, self.count, self.history = 0.0, 0, []

    def update(self, value: float, n: int = 1) -> None:
        self.sum += value * n
        self.count += n
        self.history.append(value)

    @property
    def average(self) -> float:
        return self.sum / self.count


@style
class Meters(Style):
    """Helper objects that hold nothing but values; one is kept in a dict and under a second name, one made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.meter = AverageMeter()
        self.meters = {"loss": self.meter, "norm": AverageMeter()}
        self.space = SimpleNamespace(calls=0)

    def on_validation_epoch_start(self) -> None:
        self.fresh = AverageMeter()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        self.tally.right += int((logits.argmax(1) == batch["labels"]).sum())
        self.tally.losses.append(float(loss))
        self.meter.update(float(loss), len(logits))
        self.meters["norm"].update(float(logits.norm()))
        self.fresh.update(float(logits.max()))
        self.space.calls += 1

    def on_validation_epoch_end(self) -> None:
        self.log("right", float(self.tally.right))
        self.log("losses", float(np.mean(self.tally.losses)))
        self.log("count", float(self.meters["loss"].count))
        self.log("loss", self.meter.average)
        self.log("norm", self.meters["norm"].average)
        self.log("max", self.fresh.average)
        self.log("seen", float(len(self.fresh.history)))
        self.log("calls", float(self.space.calls))


@style
class InPlaceState(Style):
    """Tensors, buffers, arrays and numbers as attributes, changed in place; tuples and sets rebound."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("histogram", torch.zeros(CLASSES), persistent=False)
        self.total = torch.zeros(CLASSES)
        self.view = self.total[:2]
        self.array = np.zeros(3)
        self.n = 0
        self.pair = (0.0, [])
        self.seen: set[int] = set()
        self.records = UserDict({"predictions": []})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        self.total += logits.sum(0)
        self.count.add_(len(logits))
        self.histogram += torch.bincount(logits.argmax(1), minlength=CLASSES)
        self.array[batch_idx % 3] += float(logits.mean())
        self.n += 1
        self.pair = (self.pair[0] + float(logits.max()), [*self.pair[1], batch_idx])
        self.seen |= set(logits.argmax(1).tolist())
        self.records["predictions"] += logits.argmax(1).tolist()

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"total_{i}": value for i, value in enumerate(self.total)})
        self.log_dict({f"histogram_{i}": value for i, value in enumerate(self.histogram)})
        self.log("count", self.count)
        self.log("array", float(self.array.sum()))
        self.log("n", self.n)
        self.log("pair", self.pair[0] + len(self.pair[1]))
        self.log("seen", float(sum(2**i for i in self.seen)))
        self.log("predicted", float(sum(self.records["predictions"])))


class StatefulHead(nn.Module):
    """A submodule that is not a LightningModule and keeps state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CLASSES))
        self.calls = 0
        self.history: list[Tensor] = []

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        self.mean += logits.mean(0)
        self.history.append(logits.max())
        return logits - self.mean / self.calls


@style
class StatefulSubmodule(Style):
    def __init__(self) -> None:
        super().__init__()
        self.head = StatefulHead()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.head(self.logits(batch))
        self.log("loss", F.cross_entropy(logits, batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        self.log("calls", float(self.head.calls))
        self.log("mean", self.head.mean.mean())
        self.log("history", torch.stack(self.head.history).mean())


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


# ---- randomness ------------------------------------------------------------------------------------------------------


@style
class Stochastic(Style):
    """Draws from every global generator, in each hook."""

    def on_validation_epoch_start(self) -> None:
        self.offset = torch.rand(()) + random.random()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"].clone()
        ids[torch.rand(ids.shape) < 0.3] = random.randrange(4, 300)
        ids[:, np.random.randint(ids.shape[1])] = 9
        logits = self.logits({"input_ids": ids})
        sampled = torch.multinomial(logits.softmax(1), 1).squeeze(1)
        self.log("loss", F.cross_entropy(logits, batch["labels"]) + self.offset)
        self.log("sampled", (sampled == batch["labels"]).float().mean())

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("noise", torch.rand(()))

    def on_validation_epoch_end(self) -> None:
        self.log("final", torch.rand(()) + np.random.rand() + random.random())


@style
class OwnGenerators(Style):
    """Draws from generators that the module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(3)
        self.legacy = np.random.RandomState(3)
        self.python = random.Random(3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch)
        noise = torch.rand(logits.shape, generator=self.generator) * self.numpy.random() + self.python.random()
        self.log("loss", F.cross_entropy(logits + noise, batch["labels"]))
        self.log("noise", noise.mean() + self.legacy.rand())


@style
class EndsEarly(Style):
    """How often the model is called, and already before the first step, depends on what it says."""

    def on_validation_epoch_start(self) -> None:
        with torch.no_grad():
            self.warm = self.logits({"input_ids": torch.stack([x["input_ids"] for x in tokens()[:4]])}).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        total, calls = torch.zeros(()), 0
        for _ in range(3):
            logits = self.logits(batch)
            total, calls = total + F.cross_entropy(logits, batch["labels"]), calls + 1
            if logits[0].argmax() != 1:
                break
        self.log("loss", total + self.warm)
        self.log("calls", float(calls))


@style
class DropoutOn(Style):
    """Monte Carlo dropout: the layers are put in train mode within the step."""

    plan = "1.mlp@0.1"

    def build(self) -> nn.Module:
        config = hf.GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=16)
        return quiet(0, lambda: hf.GPT2LMHeadModel(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        samples = torch.stack([self.logits(batch).softmax(1) for _ in range(2)])
        self.eval()
        self.log("loss", F.nll_loss(samples.mean(0).log(), batch["labels"]))
        self.log("spread", samples.std(0).mean())


# ---- transformers ----------------------------------------------------------------------------------------------------


@style
class DefaultForward(Style):
    """As in transformers' documentation: labels in, loss out, and a cache that nobody asked for."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"])
        cache = out.past_key_values
        self.log("loss", out.loss)
        self.log("cached_layers", float(len(cache.layers)))
        self.log("cached_length", float(cache.get_seq_length()))
        for i, layer in enumerate(cache.layers):
            self.log(f"keys_{i}", layer.keys.sum())
            self.log(f"values_{i}", layer.values.sum())
        return out.loss


@style
class ContinuesFromCache(Style):
    """Prefill, then one token at a time, then the same cache for another call."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        out = self.model(ids[:, :4])
        loss = torch.zeros(())
        for i in range(4, ids.shape[1]):
            loss = loss + F.cross_entropy(out.logits[:, -1], ids[:, i])
            out = self.model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        self.log("loss", loss)
        self.log("length", float(out.past_key_values.get_seq_length()))
        self.log("keys", out.past_key_values.layers[0].keys.sum() + out.past_key_values.layers[3].keys.sum())


@style
class Generates(Style):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        greedy = self.model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=2)
        sampled = self.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, pad_token_id=2)
        beams = self.model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, pad_token_id=2)
        self.log("greedy", greedy[:, 7:].float().mean())
        self.log("sampled", sampled[:, 7:].float().mean())
        self.log("beams", beams[:, 7:].float().mean())
        return {"greedy": (greedy[:, -1] % 2 == 0)}


@style
class MixtralRouterLoss(Style):
    plan = "2.fc_out[1]@0.1, 2.q_proj@0.1"

    def build(self) -> nn.Module:
        config = hf.MixtralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
            sliding_window=None,
        )
        return quiet(0, lambda: hf.MixtralForCausalLM(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        out = self.model(ids, labels=ids, output_router_logits=True)
        self.log("loss", out.loss)
        self.log("aux", out.aux_loss)
        self.log("routers", float(len(out.router_logits)))
        self.log("without", self.model(ids, labels=ids).loss)


@style
class Attentions(Style):
    """Eager attention with all outputs."""

    def build(self) -> nn.Module:
        model = tiny_causal_lm()
        model.set_attn_implementation("eager")
        return model

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.model(batch["input_ids"], output_attentions=True, output_hidden_states=True)
        self.log("loss", F.cross_entropy(out.logits[:, -1, :CLASSES], batch["labels"]))
        self.log("n", float(len(out.attentions) * 100 + len(out.hidden_states)))
        for i, attention in enumerate(out.attentions):
            self.log(f"attention_{i}", attention.max(dim=-1).values.mean())
        hidden = self.model(batch["input_ids"], output_hidden_states=True).hidden_states
        for i, states in enumerate(hidden):
            self.log(f"hidden_{i}", states.norm())


@style
class InnerHook(Style):
    """A forward hook inside of a layer, as in interpretability work."""

    def __init__(self) -> None:
        super().__init__()
        self.fired = 0
        self.captured: list[Tensor] = []
        self.model.model.layers[0].mlp.register_forward_hook(self.capture)
        self.model.model.layers[1].register_forward_hook(self.capture)

    def capture(self, module: nn.Module, args: Any, output: Any) -> None:
        self.fired += 1
        self.captured.append(output.norm())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.logits(batch), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        self.log("fired", float(self.fired))
        self.log("captured", torch.stack(self.captured).mean())


@style
class HookForOneEvaluation(Style):
    """Registered when the evaluation starts, removed when it ends."""

    def on_validation_epoch_start(self) -> None:
        self.captured: list[Tensor] = []
        layers = self.model.model.layers
        capture = lambda module, args, output: self.captured.append(output.norm())  # noqa: E731
        self.handles = [layer.mlp.register_forward_hook(capture) for layer in (layers[0], layers[3])]
        self.handles.append(
            layers[1].register_forward_pre_hook(lambda module, args: self.captured.append(args[0].max()))
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.logits(batch), batch["labels"]))
        self.log("captured", float(len(self.captured)))

    def on_validation_epoch_end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.log("mean", torch.stack(self.captured).mean())
        self.log("left", float(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules())))


@style
class ViT(Style):
    plan = "1.mlp@0.1"

    def build(self) -> nn.Module:
        config = hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        )
        return quiet(0, lambda: hf.ViTForImageClassification(config)).eval()

    def data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        items = [(torch.randn(3, 16, 16, generator=generator), i % CLASSES) for i in range(10)]
        return DataLoader(items, batch_size=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        out = self.model(images, labels=labels)
        self.log("loss", out.loss)
        self.log("right", (out.logits.argmax(1) == labels).sum().float(), reduce_fx="sum")


@style
class Bert(Style):
    plan = "2.mlp@0.1, 1.v_proj@0.1"

    def build(self) -> nn.Module:
        config = hf.BertConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
        )
        config.num_labels = CLASSES
        return quiet(0, lambda: hf.BertForSequenceClassification(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        mask = torch.ones_like(batch["input_ids"])
        mask[::2, -2:] = 0
        out = self.model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"])
        self.log_dict({"loss": out.loss, "acc": (out.logits.argmax(-1) == batch["labels"]).float().mean()})


@style
class T5(Style):
    """A cut in the encoder: whatever the decoder does depends on it."""

    plan = "encoder.1.mlp@0.1"

    def build(self) -> nn.Module:
        config = hf.T5Config(
            vocab_size=300,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        return quiet(0, lambda: hf.T5ForConditionalGeneration(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"].flip(1))
        self.log("loss", out.loss)
        without = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"].flip(1), use_cache=False)
        self.log("without_cache", without.loss)


@style
class T5CutInDecoder(T5):
    plan = "decoder.1.mlp@0.1"


@style
class Albert(Bert):
    """All layers are one layer."""

    plan = "0.mlp@0.2"

    def build(self) -> nn.Module:
        config = hf.AlbertConfig(
            vocab_size=300,
            hidden_size=32,
            embedding_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=CLASSES,
        )
        return quiet(0, lambda: hf.AlbertForSequenceClassification(config)).eval()


@style
class LSTM(Style):
    plan = r"/rnn\..*weight_hh_l1/@0.2"

    def build(self) -> nn.Module:
        return quiet(0, lambda: nn.ModuleDict({"embed": nn.Embedding(300, 16), "out": nn.Linear(24, CLASSES)}))

    def __init__(self) -> None:
        super().__init__()
        self.rnn = quiet(1, lambda: nn.LSTM(16, 24, num_layers=2, batch_first=True))
        self.carry: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        states = self.carry if self.carry is not None and self.carry[0].shape[1] == len(batch["labels"]) else None
        hidden, self.carry = self.rnn(self.model["embed"](batch["input_ids"]), states)
        logits = self.model["out"](hidden[:, -1])
        self.log("loss", F.cross_entropy(logits, batch["labels"]))


class NaiveBlock(nn.Module):
    """As in many a tutorial: the residual is added in place, to the caller's tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc_in, self.fc_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x += self.out_proj(F.scaled_dot_product_attention(self.q_proj(h), h, h, is_causal=True))
        x += self.fc_out(F.gelu(self.fc_in(self.norm2(x))))
        return x


@style
class InPlaceResidual(Style):
    """The same tensor goes through all layers; snapshots between them, an addition in place between two of them."""

    plan = "2.fc_in@0.1"

    def build(self) -> nn.Module:
        def make() -> nn.Module:
            layers = nn.ModuleList(NaiveBlock(16) for _ in range(4))
            return nn.ModuleDict({"embed": nn.Embedding(300, 16), "layers": layers, "out": nn.Linear(16, CLASSES)})

        return quiet(0, make)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        embedded = x = self.model["embed"](batch["input_ids"])
        kept = []
        for i, layer in enumerate(self.model["layers"]):
            kept.append(x)
            x = layer(x)
            if i == 0:
                x += 1
        logits = self.model["out"](x[:, -1])
        self.log("loss", F.cross_entropy(logits, batch["labels"]))
        self.log("embedded", embedded.sum())
        for i, states in enumerate(kept):
            self.log(f"kept_{i}", states.sum())


@style
class TestTimeGradient(Style):
    """Grad mode is switched on within the step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            embedded = self.model.get_input_embeddings()(batch["input_ids"].clone()).detach().requires_grad_()
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[:, -1, :CLASSES]
            loss = F.cross_entropy(logits, batch["labels"].clone())
            (gradient,) = torch.autograd.grad(loss, embedded)
        self.log("loss", loss.detach())
        self.log("saliency", gradient.norm())
