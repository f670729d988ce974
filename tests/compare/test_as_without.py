"""What Lightning does without a LaserCallback it does with one: its errors, its modes, keys that two loaders share."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from torchmetrics import MeanMetric
from toy import OTHER, PLAN, Toy, evaluate, make_data, oracle, update_mean
from trainers import quiet_trainer
from untouched import assert_untouched, snapshot
from versions import LIGHTNING

from laser_callback import LaserCallback


class TwoLoaders(Toy):
    """Logs nothing of its own."""

    def _evaluate(self, batch: Any) -> dict[str, Any]:
        return {"acc": self(batch[0]).argmax(1) == batch[1]}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self._evaluate(batch)

    def share(self, name: str = "same", **options: Any) -> None:
        self.log(name, 1.0 + self.loader, add_dataloader_idx=False, batch_size=4, **options)

    @property
    def loader(self) -> int:
        return self.trainer._evaluation_loop._results.dataloader_idx or 0


class InTheStep(TwoLoaders):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        self.share()
        return self._evaluate(batch)


class PerStepOnly(TwoLoaders):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        self.share(on_step=True, on_epoch=False)
        return self._evaluate(batch)


class AMetric(TwoLoaders):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        self.acc(self(batch[0]), batch[1])
        self.log("same", self.acc, add_dataloader_idx=False)
        return self._evaluate(batch)


class BeforeTheStep(TwoLoaders):
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.share()


class AfterTheStep(TwoLoaders):
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.share()


@pytest.mark.parametrize("verb", ["validate", "fit"])
@pytest.mark.parametrize("kind", [InTheStep, PerStepOnly, AMetric, BeforeTheStep, AfterTheStep])
def test_a_key_that_two_loaders_log_in_one_hook_is_lightnings_error(kind: Any, verb: str) -> None:
    messages = []
    for callbacks in ([], [LaserCallback({"a": PLAN, "b": OTHER}, loops=verb, report=False)]):
        module = kind()
        data = [[make_data(), make_data()]] if verb == "validate" else [make_data(), [make_data(), make_data()]]
        before = snapshot(module)
        with pytest.raises(MisconfigurationException) as caught:
            getattr(quiet_trainer(*callbacks), verb)(module, *data)
        messages.append(str(caught.value))
        if verb == "validate":
            assert_untouched(module, before)
    assert messages[0] == messages[1]
    assert "twice in" in messages[0]


class InTwoHooks(TwoLoaders):
    """Lightning keeps apart what different hooks log, and each loader has its own dictionary."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if dataloader_idx == 0:
            self.share()
        return self._evaluate(batch)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 1:
            self.share()


class SpelledOut(TwoLoaders):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if dataloader_idx == 0:
            self.log("same", 1.0, batch_size=4)
        else:
            self.share("same/dataloader_idx_0")
        return self._evaluate(batch)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (InTwoHooks, "same"),
        pytest.param(
            SpelledOut,
            "same/dataloader_idx_0",
            marks=pytest.mark.skipif(Version("2.6") > LIGHTNING, reason="refused there"),
        ),
    ],
)
def test_a_key_that_two_loaders_log_apart_is_compared_in_each(kind: Any, key: str) -> None:
    loaders = [make_data(), make_data()]
    plain = quiet_trainer().validate(kind(), loaders, verbose=False)
    assert plain == [{key: 1.0}, {key: 2.0}]
    laser = LaserCallback(PLAN, report=False)
    got = quiet_trainer(laser).validate(kind(), loaders, verbose=False)
    expected = [{key: v, f"laser/{key}": v, f"laser/delta/{key}": 0.0} for v in (1.0, 2.0)]
    assert got == expected


@pytest.mark.parametrize("verb", ["validate", "test", "fit"])
def test_barebones(verb: str) -> None:
    """Where Lightning logs nothing there is nothing to compare, and nothing fails."""
    laser = LaserCallback(PLAN, loops=verb, controls=True, primary="acc", report=False)
    module = Toy()
    run = quiet_trainer(laser, barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None)
    if verb == "fit":
        run.fit(module, make_data(), make_data())
    else:
        before = snapshot(module)
        assert getattr(run, verb)(module, make_data()) == [{}]
        assert_untouched(module, before)
        assert [row.metric for row in laser.result.arms["laser"].rows] == ["acc"]  # what the step returns
        assert "barebones" in laser.result.not_compared["what is logged"]


def test_barebones_with_metrics_of_ones_own() -> None:
    laser = LaserCallback(PLAN, metrics=MeanMetric(), update=update_mean, report=False)
    run = quiet_trainer(laser, barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None)
    run.validate(Toy(), make_data())
    assert laser.result.arms["laser"]["MeanMetric"].reduced is not None


class TransferHooks(Toy):
    """What happens on the way of a batch to the device is part of a step's input."""

    moved = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.scale = batch[0].std()
        return batch

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        outputs = super().validation_step(batch, batch_idx)
        assert self.moved == batch_idx + 1
        self.log("scaled", (outputs["logits"] * self.scale).mean(), batch_size=len(batch[0]))
        return outputs


def test_what_the_transfer_hooks_write_is_seen() -> None:
    plain = evaluate(quiet_trainer, TransferHooks())
    expected = oracle(quiet_trainer, TransferHooks())
    got = evaluate(quiet_trainer, TransferHooks(), LaserCallback(PLAN, report=False))
    assert {key: got[key] for key in plain} == plain
    assert got["laser/scaled"] == pytest.approx(expected["scaled"], rel=1e-5)
