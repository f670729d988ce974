"""A finished comparison is never lost to its report: whatever examples are called, and whatever the disk says."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from classifier import PLAN, Classifier
from toy import PLAN as TOY_PLAN
from toy import Toy, make_data

from laser_callback import LaserCallback
from laser_callback.cli.report import read_examples, read_result


class Colour(Enum):
    RED = "red"
    BLUE = 2


KINDS: dict[str, Any] = {
    "uuid": lambda i: uuid.UUID(int=i),
    "bytes": lambda i: f"é{i}".encode(),
    "other bytes": lambda i: b"\xff" + bytes([i]),
    "time": lambda i: datetime(2024, 1, 1) + timedelta(i),
    "path": lambda i: Path("a") / str(i),
    "decimal": lambda i: Decimal(i) / 10,
    "list": lambda i: [i, "x"],
    "dict": lambda i: {"a": {i}},
    "tuple": lambda i: (i, None),
    "half of a pair": lambda i: f"\ud800{i}",
    "lines": lambda i: f"a\u2028b\u0085c\x1cd\n{i}",
    "numpy": lambda i: np.int64(i),
    "numpy time": lambda i: np.datetime64("2024-01-01") + i,
    "torch": lambda i: torch.tensor(i),
    "enum": lambda i: Colour.RED if i % 2 else Colour.BLUE,
    "nan": lambda i: float("nan"),
    "mixed": lambda i: [i, str(i), None, b"x"][i % 4],
}


class Named(Classifier):
    """Its examples have names of one kind."""

    kind: str

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        names = [KINDS[self.kind](i) for i in batch["id"].tolist()]
        own = {} if self.kind in ("enum", "mixed") else {"id": names}  # some are of several examples
        return {
            **output,
            **own,
            "group": names,
            "cluster": names,
            "prompt": names,
            "answer": names,
            "prediction": names,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_examples_may_be_named_by_anything(trainer, kind, tmp_path):
    module, report = Named(), tmp_path / "result.json"
    module.kind = kind
    callback = LaserCallback(PLAN, report=report)
    trainer(callback).validate(module, module.rows(), verbose=False)
    rows = read_examples(report, must_exist=True)
    assert rows == json.loads(json.dumps(callback.result.examples.to_rows(), allow_nan=False))
    assert len(rows) == len(module.labels)
    assert callback.result.examples.duplicates == 0
    if kind not in ("enum", "mixed", "nan"):
        assert len({str(row["id"]) for row in rows}) == len(rows)
    assert read_result(report)["laser"].rows == callback.result["laser"].rows
    page = LaserCallback(PLAN, report=tmp_path / "result.html")
    trainer(page).validate(module, module.rows(), verbose=False)
    assert "</html>" in (tmp_path / "result.html").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_known_before_the_first_batch(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    steps: list[int] = []

    class Counted(Toy):
        def validation_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().validation_step(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    for path in (tmp_path / "file" / "result.json", tmp_path / "folder.json", tmp_path / "file" / "page.html"):
        with pytest.raises(OSError, match=r"`report`: .* cannot be written"):
            trainer(LaserCallback(TOY_PLAN, report=path)).validate(Counted(), make_data(), verbose=False)
        with pytest.raises(OSError, match=r"`report`: .* cannot be written"):
            trainer(LaserCallback(TOY_PLAN, loops=("fit",), report=path)).fit(Counted(), make_data(), make_data())
    assert not steps
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "lightning_logs") == ["file", "folder.json"]


@pytest.mark.parametrize("ending", ["json", "html"])
def test_a_disk_that_is_gone_does_not_end_training(trainer, tmp_path, ending):
    class Unplug(pl.Callback):
        """Something takes the folder's place, as when a disk is gone."""

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (tmp_path / "disk").touch()

    callback = LaserCallback(TOY_PLAN, loops=("fit",), report=tmp_path / "disk" / f"result.{ending}")
    run = trainer(callback, Unplug(), max_epochs=2)
    with pytest.warns(UserWarning, match="the report of the comparison could not be written"):
        run.fit(Toy(), make_data(), make_data())
    assert run.current_epoch == 2
    assert callback.result["laser"]["acc"].n == 10
