"""What steps return and log, in a Trainer: all forms of outcomes, values that are none, a Trainer that logs nothing."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy import PLAN, Toy, make_data
from trainers import quiet_trainer

from laser_callback import LaserCallback, LaserSearch, StagedRollout
from laser_callback.reports.terminal import plain


def compared(module: pl.LightningModule, data: Any, loop: str = "validate", **options: Any) -> LaserCallback:
    callback = LaserCallback(PLAN, report=False, **options)
    getattr(quiet_trainer(callback), loop)(module, data, verbose=False)
    return callback


class Images(Toy):
    """Gets a list of images, as detection does."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        images, labels = batch
        right = self(torch.stack(images)).argmax(1) == labels
        self.log("acc", right.float().mean(), batch_size=len(right))
        return {"acc": right}


def test_a_list_of_images_counts_as_many_examples_as_there_are():
    def collate(items):
        return [x for x, _ in items], torch.stack([y for _, y in items])

    data = DataLoader(make_data(67).dataset, batch_size=8, collate_fn=collate)
    (row,) = compared(Images(), data).result["laser"].rows
    assert (row.n, row.test, row.note) == (67, "exact McNemar", "")


class Broken(Toy):
    """Its loss is nothing where its head says nothing, and one key never has a value."""

    broken = math.nan

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        logits = self(x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        cut = self.net.encoder.layers[1].linear1.weight.abs().sum() == 0
        loss = torch.full_like(loss, self.broken) if cut and not torch.is_grad_enabled() else loss
        self.log("loss", loss.mean(), batch_size=len(y))
        self.log("absent", torch.tensor(math.nan), batch_size=len(y))
        self.log("acc", (logits.argmax(1) == y).float().mean(), batch_size=len(y))
        return {"loss": loss, "acc": logits.argmax(1) == y}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_none_are_rows_that_say_so(value, tmp_path):
    module = Broken()
    module.broken = value
    callback = LaserCallback(PLAN, primary="loss", controls=True, report=str(tmp_path / "result.json"), loops=["fit"])
    quiet_trainer(callback, num_sanity_val_steps=0).fit(module, make_data(), make_data())
    result = callback.result
    assert "no unit has a value in both arms" in result["laser"]["absent"].note
    zeroed = result.controls["laser"]["zeroed"]["loss"]
    assert zeroed.test == "not tested"
    assert f"the reduced model's value is {value:g}" in zeroed.note
    assert result["laser"]["loss"].test == "paired t"
    assert "absent" in plain(result, 100)


def test_a_search_and_a_rollout_go_on_with_a_control_and_a_stage_that_break_the_model(tmp_path):
    module, data = Broken(), make_data(120)
    search = LaserSearch(
        module, data, objective="acc", direction="max", loss="loss", within="1.fc_in", rhos=[0.1, 0.5],
        candidates=2, accelerator="cpu", progress=False, constraints=["loss <= +100"],
    )  # fmt: skip
    found = search.run()
    assert found.verdict
    if found.confirmed is not None and "laser" in found.confirmed.controls:
        assert found.confirmed.controls["laser"]["zeroed"]["loss"].test == "not tested"
    rolled = StagedRollout(
        module, ["1.fc_in@0"], ["loss <= +9"], make_data(70), controls=True, accelerator="cpu", progress=False
    ).run()
    assert not rolled.complete
    assert "the reduced model's value is nan" in str(rolled.to_dict())


class Silent(Toy):
    """Logs nothing itself."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        return


@pytest.mark.parametrize("barebones", [False, True])
def test_where_nothing_is_logged_what_is_returned_is_compared(barebones, recwarn):
    callback = LaserCallback(PLAN, primary="acc", report=False)
    logging = compared(Toy(), make_data(40), primary="acc").result["laser"]["acc"]
    if barebones:
        trainer = pl.Trainer(barebones=True, accelerator="cpu", devices=1, callbacks=[callback])
        trainer.validate(Toy(), make_data(40), verbose=False)
    else:
        quiet_trainer(callback).validate(Silent(), make_data(40), verbose=False)
    (row,) = callback.result["laser"].rows
    assert row == logging
    reason = callback.result.not_compared["what is logged"]
    assert reason.startswith("a barebones Trainer logs nothing" if barebones else "the module logs nothing per epoch")
    assert "what the step returns is compared" in " ".join(plain(callback.result, 100).split())
    assert not [w for w in recwarn if "`primary`" in str(w.message)]


def test_where_nothing_is_logged_and_nothing_returned_the_table_says_so():
    class Nothing(Silent):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    result = compared(Nothing(), make_data()).result
    assert result["laser"].rows == []
    assert "the step returns no outcomes per example" in " ".join(plain(result, 100).split())


def test_an_id_that_starts_anew_in_each_batch_is_told_with_its_name():
    class Ids(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {**super().validation_step(batch, batch_idx), "id": list(range(len(batch[1])))}

    with pytest.warns(UserWarning, match="`id` must be another for each example, but '0' comes again"):
        result = compared(Ids(), make_data(64, batch_size=8)).result
    assert (result["laser"]["acc"].n, result.examples.duplicates) == (64, 0)


class _Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    "make",
    [
        lambda n: {"id": [_Mute() for _ in range(n)], "prompt": [_Mute() for _ in range(n)]},
        lambda n: {_Mute(): torch.ones(n)},
        lambda n: {"x": torch.arange(n).to(torch.float8_e4m3fn)},
        lambda n: {"x": torch.ones(n).to_sparse(), "id": torch.ones(n).to_sparse()},
        lambda n: {"x": torch.nested.nested_tensor([torch.ones(1)] * n), "prompt": torch.ones(n, device="meta")},
        lambda n: {"x": np.ones(n, np.longdouble), "id": torch.ones(n).to(torch.complex64)},
    ],
    ids=["no text", "key", "float8", "sparse", "nested", "long double"],
)
def test_odd_types_lose_no_comparison(tmp_path, make):
    class Odd(Toy):
        def validation_step(self, batch, batch_idx):
            return {**super().validation_step(batch, batch_idx), **make(len(batch[1]))}

    got = quiet_trainer(LaserCallback(PLAN), default_root_dir=tmp_path).validate(Odd(), make_data(), verbose=False)
    assert "laser/loss" in got[0]
