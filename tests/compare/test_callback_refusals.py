"""What LaserCallback refuses, with the cure, and that a refusal leaves the module alone."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix
from toy import CALLS, CLASSES, OTHER, PLAN, Toy, evaluate, make_data, update_mean
from untouched import assert_untouched, snapshot

from laser_callback import LaserCallback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loops": ()}, "`loops` must be some of validate, test, fit"),
        ({"loops": ("validate", "predict")}, "`loops` must be some of"),
        ({"loops": "train"}, "`loops` must be some of"),
        ({"metrics": MeanMetric()}, "`metrics` and `update` are given together"),
        ({"update": lambda m, o, b: None}, "`metrics` and `update` are given together"),
        ({"key_prefix": ""}, "`key_prefix` must be non-empty"),
        ({"key_prefix": "laser/"}, "`key_prefix` must be non-empty, without slashes around"),
        ({"key_prefix": "/laser"}, "`key_prefix` must be non-empty, without slashes around"),
        ({"report": "out.txt"}, r"`report` must be a bool or a path ending in \.json"),
        ({"report": "out"}, r"`report` must be a bool or a path ending in \.json"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        LaserCallback(PLAN, **arguments)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "delta", "original", "id", 3])
def test_bad_plan_names(name):
    with pytest.raises(MisconfigurationException, match="a plan's name must be a word"):
        LaserCallback({name: PLAN})


def test_no_plans():
    with pytest.raises(MisconfigurationException, match="at least one plan"):
        LaserCallback({})


def test_one_loop_as_text():
    assert LaserCallback(PLAN, loops="fit").loops == ("fit",)


def test_two_callbacks_with_one_prefix(trainer):
    with pytest.raises(MisconfigurationException, match="two LaserCallbacks have the key_prefix 'laser'"):
        evaluate(trainer, Toy(), LaserCallback(PLAN), LaserCallback(OTHER))


@pytest.mark.parametrize("watcher", [ModelCheckpoint, EarlyStopping])
def test_monitor_without_fit_loop(trainer, watcher):
    module = Toy()
    with pytest.raises(MisconfigurationException, match=f"{watcher.__name__} monitors 'laser/acc'.*add 'fit'"):
        trainer(LaserCallback(PLAN), watcher(monitor="laser/acc", mode="max")).fit(module, make_data(), make_data())
    # The same pair is fine where nothing monitors.
    trainer(LaserCallback(PLAN, report=False), watcher(monitor="laser/acc", mode="max")).validate(
        module, make_data(), verbose=False
    )


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "Custom"])
def test_sharded_strategies_are_refused(name):
    from lightning.pytorch import strategies

    if name == "Custom":
        strategy: Any = type("Custom", (strategies.DDPStrategy,), {})()
    else:
        strategy = object.__new__(getattr(strategies, name))
    fake = SimpleNamespace(strategy=strategy, callbacks=[], state=SimpleNamespace(fn="validate"))
    with pytest.raises(MisconfigurationException, match=f"single devices and DDP, got {name}"):
        LaserCallback(PLAN).setup(fake, Toy(), "validate")


@pytest.mark.parametrize("device", ["mps", "xla", "hpu"])
def test_devices_without_float64_are_refused(device):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    strategy = SingleDeviceStrategy(device=torch.device(device))
    fake = SimpleNamespace(strategy=strategy, callbacks=[], state=SimpleNamespace(fn="validate"))
    with pytest.raises(MisconfigurationException, match=f"CPU and CUDA devices, got '{device}'"):
        LaserCallback(PLAN).setup(fake, Toy(), "validate")


def test_dataloader_iter_is_refused(trainer):
    class Iterating(Toy):
        def validation_step(self, dataloader_iter):
            next(dataloader_iter)

    module = Iterating()
    with pytest.raises(MisconfigurationException, match=r"validation_step\(dataloader_iter\)"):
        evaluate(trainer, module, LaserCallback(PLAN))


def test_own_metric_with_the_name_of_the_modules(trainer):
    callback = LaserCallback(PLAN, metrics={"loss": MeanMetric()}, update=lambda m, o, b: m.update(o["logits"]))
    with pytest.raises(MisconfigurationException, match="`metrics` has the name 'loss'"):
        evaluate(trainer, Toy(), callback)


def test_own_metric_that_is_no_number(trainer):
    def update(metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        metrics.update(outputs["logits"], outputs["y"])

    callback = LaserCallback(PLAN, metrics={"confusion": MulticlassConfusionMatrix(CLASSES)}, update=update)
    module = Toy()
    before = snapshot(module)
    with pytest.raises(MisconfigurationException, match="confusion"):
        evaluate(trainer, module, callback)
    assert_untouched(module, before)


@pytest.mark.parametrize("key", ["laser/loss", "delta/loss", "laser/delta/loss"])
@pytest.mark.parametrize("where", ["step", "epoch_end"])
def test_a_users_key_that_collides(trainer, key, where):
    class Colliding(Toy):
        def validation_step(self, batch, batch_idx):
            if where == "step":
                self.log(key, 5.0, batch_size=len(batch[0]))
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            if where == "epoch_end":
                self.log(key, 5.0)

    module = Colliding()
    before = snapshot(module)
    with pytest.raises(MisconfigurationException, match=r"laser/(delta/)?loss.*`key_prefix`"):
        evaluate(trainer, module, LaserCallback(PLAN))
    assert_untouched(module, before)
    if key != "delta/loss":  # the cure that the message names
        logged = evaluate(trainer, module, LaserCallback(PLAN, key_prefix="cut", report=False))
        assert logged[key] == 5.0
        assert logged[f"cut/{key}"] == 5.0


@pytest.mark.parametrize("own", [False, True])
def test_primary_that_is_not_logged(trainer, capsys, own):
    """Said as soon as it can be known, and no number is lost."""
    metrics = {"mean": MeanMetric()} if own else None
    callback = LaserCallback(PLAN, primary="acuracy", metrics=metrics, update=update_mean if own else None)
    with pytest.warns(UserWarning, match=r"got 'acuracy', but") as warned:
        evaluate(trainer, Toy(), callback)
    said = [str(w.message) for w in warned if "acuracy" in str(w.message)]
    # Own metrics have names only at the end, when they are computed.
    assert [text.split("but ")[1].split(" logged")[0] for text in said] == ["the first batch"] * (not own) + [
        "this evaluation"
    ]
    assert "logged loss, acc" in said[0]
    assert callback.result.primary is None
    assert {row.role for row in callback.result["laser"].rows if row.p is not None} == {"holm"}
    assert "*" not in capsys.readouterr().out


def test_primary_that_is_not_logged_does_not_stop_training(trainer):
    callback = LaserCallback(PLAN, primary="acuracy", loops="fit", report=False)
    with pytest.warns(UserWarning, match="got 'acuracy', but the sanity check logged loss, acc"):
        trainer(callback, max_steps=0).fit(Toy(), make_data(), make_data())  # before the first step
    run = trainer(callback, num_sanity_val_steps=0, max_epochs=2)
    with pytest.warns(UserWarning, match="acuracy"):
        run.fit(Toy(), make_data(), make_data())
    assert run.current_epoch == 2
    assert callback.result["laser"]["acc"].n == 10


def test_primary_that_is_logged_late(trainer):
    class Late(Toy):
        def on_validation_epoch_end(self):
            self.log("late", self.acc.compute())

    callback = LaserCallback(PLAN, primary="late", loops=("validate", "fit"), report=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*`primary`")
        evaluate(trainer, Late(), callback)
        assert callback.result.primary == "late"
        trainer(callback).fit(Late(), make_data(), make_data())


DELTA = "1.mlp@0.1:cut=delta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "9.mlp@0.1"}, "layer"),
        ({"plan": {"a": PLAN, "b": "1.fc_up@0.1"}}, "fc_up"),
        ({"plan": DELTA, "base": {"net.other": torch.ones(2, 2)}}, "`base` is not what the model was fine-tuned from"),
        ({"plan": DELTA}, "cuts the difference to what the model was fine-tuned from: give that as `base`"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(trainer, arguments, message):
    module = Toy()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        trainer(LaserCallback(**arguments, loops="fit")).fit(module, make_data(), make_data())
    assert not CALLS  # not even the sanity check has run
    assert_untouched(module, before)
    trainer(LaserCallback(**arguments)).fit(module, make_data(), make_data())  # it is not asked to compare in fit


@pytest.mark.parametrize("plan", ["9.mlp@0.1", "1.fc_up@0.1", "1.nonsense@0.1"])
def test_plan_that_does_not_fit(trainer, plan):
    module = Toy()
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"."):
        evaluate(trainer, module, LaserCallback(plan))
    assert_untouched(module, before)


def test_weights_that_are_not_finite(trainer):
    module = Toy()
    module.net.encoder.layers[1].linear2.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.linear2"):
        evaluate(trainer, module, LaserCallback("1.mlp@0.1"))
    assert vars(module.net.encoder.layers[0]).get("forward") is None


def test_no_result_yet():
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = LaserCallback(PLAN).result
