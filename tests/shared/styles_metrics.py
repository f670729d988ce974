"""Styles of counting with torchmetrics: as attributes, in collections, aliased, lazy, wrapped, of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from styles import CLASSES, Style, style
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, Running


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
