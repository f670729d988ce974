"""Styles of keeping things between steps: lists, meters, buffers and submodules; and what draws random numbers."""

from __future__ import annotations

import random
from collections import Counter, UserDict, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from seeded import seeded
from styles import CLASSES, Style, style, tokens
from torch import Tensor, nn

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
        return seeded(lambda: hf.GPT2LMHeadModel(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        samples = torch.stack([self.logits(batch).softmax(1) for _ in range(2)])
        self.eval()
        self.log("loss", F.nll_loss(samples.mean(0).log(), batch["labels"]))
        self.log("spread", samples.std(0).mean())
