"""LaserCallback in a Trainer: when it does nothing, what keys, monitors and checkpoints show of it, own metrics.

That its numbers are right for every style of module is test_oracle.py's subject; here one small module is enough.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import ClasswiseWrapper
from toy import CALLS, CLASSES, OTHER, PLAN, Toy, evaluate, make_data, oracle
from untouched import assert_untouched, snapshot

from laser_callback import LaserCallback, LaserPlan, reduced

# ---- nothing to do ---------------------------------------------------------------------------------------------------


def test_sanity_check_does_nothing(trainer, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("factorised")

    monkeypatch.setattr("laser_callback.surgery.reduced.prepare", refuse)
    callback = LaserCallback(PLAN, loops=("fit",))
    trainer(callback, limit_train_batches=1, num_sanity_val_steps=2, check_val_every_n_epoch=2).fit(
        Toy(), make_data(), make_data()
    )
    assert len(CALLS) == 2  # each sanity batch once
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = callback.result


def test_fit_is_left_alone_unless_asked(trainer):
    callback = LaserCallback(PLAN)
    run = trainer(callback, num_sanity_val_steps=0)
    run.fit(Toy(), make_data(), make_data())
    assert len(CALLS) == 3
    assert not [key for key in run.callback_metrics if key.startswith("laser")]


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_only_the_loops_asked_for(trainer, loop):
    callback = LaserCallback(PLAN, loops=loop, report=False)
    run = trainer(callback)
    results = {name: getattr(run, name)(Toy(), make_data(), verbose=False)[0] for name in ("validate", "test")}
    assert {name for name, logged in results.items() if "laser/loss" in logged} == {loop}


def test_no_batches(trainer, recwarn):
    module = Toy()
    before = snapshot(module)
    callback = LaserCallback(PLAN)
    trainer(callback, limit_val_batches=0).validate(module, make_data(), verbose=False)
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = callback.result

    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    evaluate(trainer, module, callback, data=DataLoader(Nothing()))
    assert any("compared nothing" in str(w.message) for w in recwarn.list)
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = callback.result
    assert_untouched(module, before)


def test_an_empty_run_does_not_keep_the_last_result(trainer):
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    callback = LaserCallback(PLAN, report=False)
    evaluate(trainer, Toy(), callback)
    assert callback.result["laser"]["loss"].n
    evaluate(trainer, Toy(), callback, data=DataLoader(Nothing()))
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = callback.result


# ---- what others see -------------------------------------------------------------------------------------------------


def test_two_callbacks_with_different_prefixes(trainer):
    module = Toy()
    before = snapshot(module)
    first, second = LaserCallback(PLAN, report=False), LaserCallback(OTHER, key_prefix="second", report=False)
    logged = evaluate(trainer, module, first, second)
    assert_untouched(module, before)
    plain, a, b = evaluate(trainer, module), oracle(trainer, module, PLAN), oracle(trainer, module, OTHER)
    for key in ("loss", "acc"):
        assert logged[key] == plain[key]
        assert logged[f"laser/{key}"] == pytest.approx(a[key], rel=1e-6)
        assert logged[f"second/{key}"] == pytest.approx(b[key], rel=1e-6)
    assert set(logged) == {f"{p}{k}" for p in ("", "laser/", "laser/delta/", "second/", "second/delta/") for k in plain}
    assert not first.result.not_compared
    assert not second.result.not_compared


def test_deltas_and_several_plans(trainer):
    module = Toy()
    callback = LaserCallback({"a": PLAN, "b": OTHER}, primary="acc", report=False)
    logged = evaluate(trainer, module, callback)
    plain = evaluate(trainer, module)
    assert set(logged) == {*plain} | {f"laser/{p}/{d}{k}" for p in "ab" for d in ("", "delta/") for k in plain}
    for name, plan in (("a", PLAN), ("b", OTHER)):
        expected = oracle(trainer, module, plan)
        for key in plain:
            assert logged[f"laser/{name}/{key}"] == pytest.approx(expected[key], rel=1e-6)
            delta = torch.tensor(logged[f"laser/{name}/{key}"]) - torch.tensor(logged[key])
            assert logged[f"laser/{name}/delta/{key}"] == float(delta)
        row = callback.result[name]["acc"]
        assert row.delta == pytest.approx(logged[f"laser/{name}/delta/acc"], abs=1e-6)
        assert callback.result[name].plan == str(LaserPlan.parse(plan))
        assert row.n == 10
        assert row.p_adjusted is not None  # the best of two is picked: their primaries are adjusted
    assert list(callback.result.arms) == ["a", "b"]


def test_prefix_of_ones_own(trainer):
    callback = LaserCallback(PLAN, key_prefix="exp/cut", report=False)
    logged = evaluate(trainer, Toy(), callback)
    assert {"exp/cut/loss", "exp/cut/delta/loss"} < set(logged)
    assert callback.result["exp/cut"]["loss"].n == 3


def test_controls_are_in_the_result_and_not_in_the_keys(trainer):
    module = Toy()
    callback = LaserCallback({"a": PLAN, "b": OTHER}, controls=True, report=False)
    logged = evaluate(trainer, module, callback)
    assert not [key for key in logged if "zeroed" in key or "random" in key or "noise" in key]
    assert set(callback.result.arms) == {"a", "b"}
    for name, plan in (("a", PLAN), ("b", OTHER)):
        controls = callback.result.controls[name]
        assert set(controls) == {"zeroed", "random", "noise"}
        for control in (controls["zeroed"], controls["random"], *controls["noise"].passes):
            expected = oracle(trainer, module, control.plan)
            assert control["acc"].reduced == pytest.approx(expected["acc"])
            assert control["loss"].reduced == pytest.approx(expected["loss"], rel=1e-5)
        zeroed = LaserPlan.parse(controls["zeroed"].plan)
        assert {r.rho for r in zeroed} == {0.0}
        planned = {m.name for m, _ in LaserPlan.parse(plan).resolve(module)}
        assert {m.name for m, _ in zeroed.resolve(module)} == planned
        drawn = LaserPlan.parse(controls["random"].plan).resolve(module)
        assert len(drawn) == len(planned)
        assert not planned & {m.name for m, _ in drawn}
    again = LaserCallback({"a": PLAN, "b": OTHER}, controls=True, report=False)
    evaluate(trainer, module, again)
    assert again.result.controls["a"]["random"].plan == callback.result.controls["a"]["random"].plan


class SaveInBatchEnd(pl.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path
        self.live: dict[str, Tensor] = {}

    def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs):
        trainer.save_checkpoint(self.path)
        self.live = {k: v.clone() for k, v in pl_module.state_dict().items()}


def test_monitors_and_checkpoints_in_fit(trainer, tmp_path):
    class Watch(pl.Callback):  # the last weights that training left, and what validation then said
        def __init__(self) -> None:
            self.weights: list[dict[str, Tensor]] = []
            self.said: list[float] = []

        def on_validation_start(self, trainer, pl_module):
            self.weights.append({k: v.detach().clone() for k, v in pl_module.state_dict().items()})

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.said.append(float(trainer.callback_metrics["laser/delta/loss"]))

    module, watch = Toy(), Watch()
    callback = LaserCallback(PLAN, loops=("fit",), report=False)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="laser/loss", save_top_k=-1, filename="{epoch}")
    save = SaveInBatchEnd(tmp_path / "middle.ckpt")
    stop = EarlyStopping(monitor="laser/loss", mode="min", patience=100)
    run = trainer(callback, watch, save, checkpoint, stop, max_epochs=3, num_sanity_val_steps=1)
    run.fit(module, make_data(), make_data())
    assert len(watch.weights) == 4  # one sanity check, three epochs
    assert len(set(watch.said)) == 3  # the cut follows the trained weights
    for epoch, weights in enumerate(watch.weights[1:]):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(saved["state_dict"][name], value), (epoch, name)
    middle = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(middle[name], value) for name, value in watch.weights[-1].items())
    assert float(checkpoint.best_model_score) == pytest.approx(min(float(s) for s in checkpoint.best_k_models.values()))
    assert float(stop.best_score) == pytest.approx(float(checkpoint.best_model_score))

    # What training saw does not depend on the callback.
    alone = Toy()
    trainer(max_epochs=3, num_sanity_val_steps=1).fit(alone, make_data(), make_data())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_early_stopping_acts_on_the_reduced_arm(trainer):
    callback = LaserCallback(PLAN, loops=("fit",), report=False)
    stop = EarlyStopping(monitor="laser/delta/loss", mode="min", stopping_threshold=1e9)  # met at once
    run = trainer(callback, stop, max_epochs=5, num_sanity_val_steps=0)
    run.fit(Toy(), make_data(), make_data())
    assert stop.stopped_epoch == 0
    assert run.current_epoch == 1


def test_checkpoint_path_is_loaded_before_the_cut(trainer, tmp_path):
    saver = trainer(num_sanity_val_steps=0)
    saver.fit(trained := Toy(seed=5), make_data())
    saver.save_checkpoint(tmp_path / "trained.ckpt")
    logged = trainer(LaserCallback(PLAN, report=False)).validate(
        Toy(seed=0), make_data(), ckpt_path=tmp_path / "trained.ckpt", verbose=False
    )[0]
    expected = oracle(trainer, trained)
    assert logged["laser/loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert logged["loss"] == pytest.approx(evaluate(trainer, trained)["loss"], rel=1e-6)
    assert logged["laser/loss"] != pytest.approx(oracle(trainer, Toy(seed=0))["loss"], rel=1e-3)


def test_checkpoints_carry_no_state_of_the_callback(trainer, tmp_path):
    run = trainer(LaserCallback(PLAN, loops=("fit",), report=False), num_sanity_val_steps=0)
    run.fit(Toy(), make_data(), make_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not [key for key in saved["callbacks"] if "Laser" in key]
    assert not [key for key in saved["state_dict"] if "laser" in key.lower()]


# ---- own metrics -----------------------------------------------------------------------------------------------------


def test_own_metrics(trainer):
    def update(metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        metrics.update(outputs.pop("logits"), batch.pop())  # may take things apart: both are its own

    own = {"f1": MulticlassF1Score(CLASSES), "top2": MulticlassAccuracy(CLASSES, top_k=2)}
    callback = LaserCallback(PLAN, metrics=own, update=update, report=False)
    module = Toy()
    for _ in range(2):  # the second run starts from zero
        logged = evaluate(trainer, module, callback)
        x = torch.cat([b[0] for b in make_data()])
        y = torch.cat([b[1] for b in make_data()])
        with torch.no_grad():
            before = module(x)
            with reduced(module, PLAN):
                after = module(x)
        for name, metric in own.items():
            assert logged[name] == pytest.approx(float(metric.clone()(before, y)), rel=1e-6)
            assert logged[f"laser/{name}"] == pytest.approx(float(metric.clone()(after, y)), rel=1e-6)
            assert logged[f"laser/delta/{name}"] == pytest.approx(logged[f"laser/{name}"] - logged[name], abs=1e-6)
            row = callback.result["laser"][name]
            assert (row.test, row.n, row.higher_is_better) == ("paired permutation", 3, True)
        assert all(metric.update_count == 0 for metric in own.values())  # those given are only a model for the copies
    # Metrics used in validate (inference mode) are usable in fit (no_grad).
    callback = LaserCallback(PLAN, loops=("validate", "fit"), metrics=own, update=update, report=False)
    evaluate(trainer, module, callback)
    run = trainer(callback, num_sanity_val_steps=0)
    run.fit(module, make_data(), make_data())
    assert "laser/delta/f1" in run.callback_metrics


def test_own_metrics_of_several_values_and_with_prefix(trainer):
    def update(metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        metrics.update(outputs["logits"], outputs["y"])

    own = MetricCollection(
        {"each": ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None), prefix="class_")}, prefix="own_"
    )
    callback = LaserCallback(PLAN, metrics=own, update=update, report=False)
    logged = evaluate(trainer, Toy(), callback)
    names = [key for key in logged if key.startswith("own_")]
    assert len(names) == CLASSES
    assert all(f"laser/{name}" in logged for name in names)
    single = LaserCallback(PLAN, metrics=MulticlassF1Score(CLASSES), update=update, report=False)
    assert "laser/MulticlassF1Score" in evaluate(trainer, Toy(), single)
