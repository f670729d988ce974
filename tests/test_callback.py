"""LaserCallback in a Trainer: refusals, interrupts, checkpoints, loggers, precision, progress bars, files.

That its numbers are right for every style of module is test_oracle.py's subject; here one small module is enough.
"""

from __future__ import annotations

import copy
import csv
import fcntl
import json
import os
import pickle
import pty
import re
import signal
import struct
import termios
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.wrappers import ClasswiseWrapper

from laser_callback import LaserCallback, LaserPlan, reduced
from laser_callback.reports.terminal import plain

torch.set_num_threads(1)
PLAN = "1.mlp@0.1"
OTHER = "2.out_proj@0.2"
CLASSES = 3


def make_data(n: int = 10, seed: int = 1, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator)), batch_size)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Toy(pl.LightningModule):
    """A user's classifier: logs a loss and a torchmetrics accuracy, and returns which examples are right."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = Net()
            for parameter in self.net.parameters():
                if parameter.dim() == 2:
                    parameter.data.normal_(std=0.6)
        self.acc = MulticlassAccuracy(CLASSES, average="micro")
        self.steps = 0
        self.on_call: dict[int, Any] = {}  # number of the call of the step -> what happens in it

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def _evaluate(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        CALLS.append(1)
        if len(CALLS) in self.on_call:
            self.on_call[len(CALLS)]()
        self.log("loss", F.cross_entropy(logits, y), on_epoch=True, batch_size=len(y))
        self.acc(logits, y)
        self.log("acc", self.acc, on_epoch=True)
        return {"acc": logits.argmax(1) == y, "logits": logits, "y": y}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


CALLS: list[int] = []  # calls of the evaluation step, of both arms (a module's own number is kept apart per arm)


@pytest.fixture(autouse=True)
def _fresh_calls():
    CALLS.clear()


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            "max_epochs": 1,
        }
        return pl.Trainer(**{**defaults, **options})

    return make


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "pointers": [p.data_ptr() for p in module.parameters()],
        "versions": [p._version for p in module.parameters()],
        # Attributes that an instance has beside its class': a patched hook or forward would show up here.
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    for name, value in before["weights"].items():
        assert torch.equal(after["weights"][name], value), name
    for key in ("pointers", "versions", "hooks"):
        assert after[key] == before[key], key
    for name, attributes in before["attributes"].items():
        new = set(after["attributes"][name]) - set(attributes)
        assert not {n for n in new if n == "forward" or n.startswith("on_") or n.endswith("_step")}, (name, new)
    assert not any(p.is_inference() for p in module.parameters())


def evaluate(make: Any, module: Toy, *callbacks: pl.Callback, data: Any = None, **options: Any) -> dict[str, float]:
    return make(*callbacks, **options).validate(module, make_data() if data is None else data, verbose=False)[0]


def oracle(make: Any, module: Toy, plan: str = PLAN, **options: Any) -> dict[str, float]:
    with reduced(module, plan):
        return evaluate(make, module, **options)


# ---- refusals --------------------------------------------------------------------------------------------------------


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


def test_predict_is_refused_and_says_what_to_do(trainer):
    module = Toy()
    before = snapshot(module)
    with pytest.raises(MisconfigurationException, match=r"trainer\.predict.*with laser_callback\.reduced"):
        trainer(LaserCallback(PLAN)).predict(module, make_data())
    assert_untouched(module, before)


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
    callback = LaserCallback(PLAN, primary="acuracy", metrics=metrics, update=_update_mean if own else None)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "9.mlp@0.1"}, "layer"),
        ({"plan": {"a": PLAN, "b": "1.fc_up@0.1"}}, "fc_up"),
        ({"plan": "*.all@0.1", "controls": True}, "the random control needs"),
        ({"plan": PLAN, "base": {"net.other": torch.ones(2, 2)}}, "`base` is not what the model was fine-tuned from"),
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


# ---- interrupts ------------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("loop", ["validate", "test", "fit"])
@pytest.mark.parametrize("call", [1, 2, 4])  # the user's step, the reduced step, and that of the second batch
@pytest.mark.parametrize("kind", ["error", "ctrl-c", "sigterm"])
def test_interrupts_leave_nothing(trainer, loop, call, kind):
    module = Toy()
    acts = {
        "error": _raise(RuntimeError("broken step")),
        "ctrl-c": _raise(KeyboardInterrupt()),
        "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    module.on_call = {call: acts[kind]}
    callback = LaserCallback(PLAN, loops=("validate", "test", "fit"), report=False)
    run = trainer(callback, num_sanity_val_steps=0, val_check_interval=1, limit_train_batches=2)
    expected = {"error": RuntimeError, "ctrl-c": (SystemExit, KeyboardInterrupt), "sigterm": BaseException}[kind]
    handler = signal.getsignal(signal.SIGTERM)
    if loop == "fit":  # validate in the middle of an epoch that changes no weight
        module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        start = partial(run.fit, module, make_data(), make_data())
    else:
        start = partial(getattr(run, loop), module, make_data(), verbose=False)
    before = snapshot(module)
    with pytest.raises(expected):
        start()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert_untouched(module, before)

    # The module's metric is where its own passes left it, as without the callback.
    finished = {1: 0, 2: 1, 4: 2}[call] if kind != "sigterm" else {1: 1, 2: 1, 4: 2}[call]
    assert module.acc.update_count == finished
    module.acc.reset()
    # The module is as good as new, for the same callback too.
    module.on_call = {}
    fresh = Toy()
    assert evaluate(trainer, module, callback) == evaluate(trainer, fresh, LaserCallback(PLAN, report=False))
    if loop != "fit":
        trainer(num_sanity_val_steps=0, max_steps=1).fit(module, make_data())


def test_error_in_the_users_epoch_end(trainer):
    class Breaking(Toy):
        def on_validation_epoch_end(self):
            CALLS.append(1)
            if len(CALLS) == self.fail_at:
                raise RuntimeError("broken end")

    for fail_at in (7, 8):  # three batches, two arms: then the user's end, then the reduced arm's
        CALLS.clear()
        module = Breaking()
        module.fail_at = fail_at
        before = snapshot(module)
        with pytest.raises(RuntimeError, match="broken end"):
            evaluate(trainer, module, LaserCallback(PLAN))
        assert_untouched(module, before)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_error_in_another_callback(trainer, hook):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken callback")

    module = Toy()
    before = snapshot(module)
    for order in (0, 1):
        other = pl.Callback()
        setattr(other, hook, fail)
        callbacks = [LaserCallback(PLAN), other]
        with pytest.raises(RuntimeError, match="broken callback"):
            evaluate(trainer, module, *(callbacks if order else reversed(callbacks)))
        assert_untouched(module, before)


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
    assert not [key for key in logged if "zeroed" in key or "random" in key]
    assert set(callback.result.arms) == {"a", "b"}
    for name, plan in (("a", PLAN), ("b", OTHER)):
        controls = callback.result.controls[name]
        assert set(controls) == {"zeroed", "random"}
        for control in controls.values():
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
        Toy(seed=0), make_data(), ckpt_path=tmp_path / "trained.ckpt", verbose=False, weights_only=True
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
            assert (row.test, row.higher_is_better) == ("not tested", True)
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


# ---- the trainer's options -------------------------------------------------------------------------------------------


def test_inference_mode_off(trainer):
    class Gradients(Toy):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(self(x), batch[1]), x)
            self.log("slope", slope.norm(), batch_size=len(x))

    module = Gradients()
    before = snapshot(module)
    logged = evaluate(trainer, module, LaserCallback(PLAN, report=False), inference_mode=False)
    expected = oracle(trainer, module, inference_mode=False)
    assert logged["laser/slope"] == pytest.approx(expected["slope"], rel=1e-5)
    assert logged["slope"] == evaluate(trainer, module, inference_mode=False)["slope"]
    assert_untouched(module, before)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(trainer, precision):
    module = Toy()
    logged = evaluate(trainer, module, LaserCallback(PLAN, report=False), precision=precision)
    plain = evaluate(trainer, module, precision=precision)
    expected = oracle(trainer, module, precision=precision)
    for key in plain:
        assert logged[key] == plain[key]
        assert logged[f"laser/{key}"] == pytest.approx(expected[key], rel=1e-6)
    assert logged["laser/loss"] != plain["loss"]


def test_csv_logger_gets_the_keys(trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    logged = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False), logger=logger)
    (row,) = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").open()))
    for key in ("loss", "laser/loss", "laser/delta/loss", "acc", "laser/acc", "laser/delta/acc"):
        assert float(row[key]) == pytest.approx(logged[key])


def test_tensorboard_logger_gets_the_keys(trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log", version=0)
    logged = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False), logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for key in ("loss", "laser/loss", "laser/delta/loss"):
        (scalar,) = events.Scalars(key)
        assert scalar.value == pytest.approx(logged[key])


def test_keys_kept_from_loggers_stay_from_them(trainer, tmp_path):
    class Quiet(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("quiet", 1.0, logger=False, batch_size=len(batch[0]))
            return super().validation_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="log", version=0)
    run = trainer(LaserCallback(PLAN, report=False), logger=logger)
    run.validate(Quiet(), make_data(), verbose=False)
    (row,) = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").open()))
    assert "laser/loss" in row
    assert not [key for key in row if "quiet" in key]
    assert "laser/quiet" in run.callback_metrics


# ---- the report ------------------------------------------------------------------------------------------------------


def test_json_report(trainer, tmp_path, capsys):
    path = tmp_path / "deep" / "er" / "result.json"
    callback = LaserCallback(PLAN, primary="acc", controls=True, report=path)
    evaluate(trainer, Toy(), callback)
    assert json.loads(path.read_text()) == json.loads(json.dumps(callback.result.to_dict(), allow_nan=False))
    assert {p.name for p in path.parent.iterdir()} == {"result.json", "result.examples.jsonl"}
    out = capsys.readouterr().out
    assert "acc*" in out
    assert str(LaserPlan.parse(PLAN)) in out


def test_report_is_printed_once_and_on_rank_zero_only(trainer, capsys, monkeypatch, tmp_path):
    callback = LaserCallback(PLAN)
    run = trainer(callback)
    run.validate(Toy(), make_data(), verbose=False)
    assert capsys.readouterr().out.count("original against reduced") == 1
    run.validate(Toy(), make_data(), verbose=False)
    assert capsys.readouterr().out.count("original against reduced") == 1
    evaluate(trainer, Toy(), LaserCallback(PLAN, report=False))
    assert "original against reduced" not in capsys.readouterr().out

    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda _: False))
    other = LaserCallback(PLAN, report=tmp_path / "other.json")
    evaluate(trainer, Toy(), other)
    assert "original against reduced" not in capsys.readouterr().out
    assert not (tmp_path / "other.json").exists()
    assert other.result["laser"]["acc"].n == 10  # the result is on every rank


def test_a_key_that_is_logged_as_something_else(trainer, capsys, tmp_path):
    """torchmetrics averages over classes by default; the step returns what happened to each example."""
    module = Toy()
    module.acc = MulticlassAccuracy(CLASSES)
    callback = LaserCallback(PLAN, report=tmp_path / "result.json")
    logged = evaluate(trainer, module, callback)
    row = callback.result["laser"]["acc"]
    assert row.original == 0.3
    assert logged["acc"] != pytest.approx(0.3, rel=0.01)
    note = f"logged as {logged['acc']:.4g} and {logged['laser/acc']:.4g} (reduced): not the mean over these examples"
    assert row.note == note
    assert callback.result["laser"]["loss"].note == "unit: the batch"
    assert f"acc: {note}" in " ".join(capsys.readouterr().out.split())
    rows = json.loads((tmp_path / "result.json").read_text())["arms"]["laser"]["rows"]
    assert [r["note"] for r in rows if r["metric"] == "acc"] == [note]
    evaluate(trainer, Toy(), callback)  # the same outcomes, and their mean is logged: the last batch is smaller
    assert callback.result["laser"]["acc"].note == ""


@pytest.fixture
def _rich_console() -> Iterator[None]:
    """What Rich's console is like holds for the whole process; bars change it."""
    yield
    rich.reconfigure()


COLUMNS = 100


@contextmanager
def terminal(patch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Within: standard output and error are a terminal. Gives what is written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    written = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                written.extend(part)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = Thread(target=read, daemon=True)
    reader.start()
    with patch.context() as here, os.fdopen(theirs, "w", encoding="utf-8") as stream:
        here.setenv("TERM", "xterm-256color")
        here.setenv("COLUMNS", str(COLUMNS))
        here.setattr("sys.stdout", stream)
        here.setattr("sys.stderr", stream)
        rich.reconfigure()  # it looks at the environment when it is made
        yield written
    reader.join(10)
    os.close(ours)


def shown(written: str) -> list[str]:
    """The lines of a terminal after ``written``, as far as progress bars use one: they go up and erase lines."""
    lines, row, column = [""], 0, 0
    for number, command, character in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", written, re.DOTALL):
        if command == "A":
            row = max(row - int(number or 1), 0)
        elif command == "K":
            lines[row] = ""
        elif character == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif character == "\r":
            column = 0
        elif character:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.usefixtures("_rich_console")
@pytest.mark.parametrize("loop", ["validate", "test", "fit"])
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_report_in_a_terminal(trainer, monkeypatch, loop, bar):
    callback = LaserCallback(PLAN, loops=loop)
    with terminal(monkeypatch) as written:
        run = trainer(callback, bar(), enable_progress_bar=True)  # Lightning's default bar stands behind it, too
        getattr(run, loop)(Toy(), *[make_data()] * (2 if loop == "fit" else 1))
    lines = shown(written.decode())
    report = [line.rstrip() for line in plain(callback.result, COLUMNS).splitlines()]
    start = lines.index(report[0])
    assert lines[start : start + len(report)] == report
    assert len([line for line in lines if line.startswith(("Epoch", "Validation", "Testing"))]) == 1


BARS = {
    "rich": lambda: [RichProgressBar()],
    "rich, live": lambda: [RichProgressBar(console_kwargs={"force_terminal": True, "width": 120})],
    "tqdm": lambda: [TQDMProgressBar()],
    "none": lambda: [],
}


@pytest.mark.usefixtures("_rich_console")
@pytest.mark.parametrize("bar", BARS)
def test_report_in_fit_does_not_garble_the_progress_bar(trainer, capfd, bar):
    callback = LaserCallback(PLAN, loops=("fit",))
    run = trainer(callback, *BARS[bar](), max_epochs=2, enable_progress_bar=bar != "none")
    run.fit(Toy(), make_data(), make_data())
    captured = capfd.readouterr()
    out = captured.out + captured.err
    assert out.count("original against reduced") == 2
    width = rich.get_console().width
    shown = {re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in re.split(r"[\r\n]+", out)}
    expected = [line.strip() for line in plain(callback.result, width).splitlines() if line.strip()]
    assert len(expected) > 5
    for line in expected:  # each as a line of its own, with nothing of the bar in it
        assert line in shown, line


def test_report_in_fit_with_a_bar_that_is_off(trainer, capfd):
    callback = LaserCallback(PLAN, loops=("fit",))
    run = trainer(callback, TQDMProgressBar(refresh_rate=0), enable_progress_bar=True, num_sanity_val_steps=0)
    run.fit(Toy(), make_data(), make_data())
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("original against reduced") == 1


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_report_after_the_results_table(trainer, capfd, bar):
    trainer(LaserCallback(PLAN), bar(), enable_progress_bar=True).validate(Toy(), make_data())
    captured = capfd.readouterr()
    assert captured.out.index("laser/acc") < captured.out.index("original against reduced")


# ---- configuration ---------------------------------------------------------------------------------------------------


class ToyData(pl.LightningDataModule):
    def val_dataloader(self):
        return make_data()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"plan": PLAN, "report": False}, ["laser"]),
        ({"plan": {"a": PLAN, "b": OTHER}, "loops": ["validate", "fit"], "primary": "acc"}, ["a", "b"]),
        ({"plan": {"reductions": [{"layer": 1, "matrix": "mlp", "rho": 0.1}]}, "key_prefix": "cut"}, ["cut"]),
        ({"plan": PLAN, "report": "result.json", "loops": "validate", "controls": True, "seed": 3}, ["laser"]),
    ],
)
def test_lightning_cli(tmp_path, arguments, names, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "laser_callback.LaserCallback", "init_args": arguments}],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(Toy, ToyData, args=["validate", "--config", "config.yaml"], save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LaserCallback)]
    assert list(callback.plans) == names
    assert list(callback.result.arms) == names
    assert callback.result[names[0]]["acc"].n == 10
    if isinstance(arguments.get("report"), str):
        assert json.loads((tmp_path / "result.json").read_text())["arms"]["laser"]
    if "loops" in arguments:
        loops = arguments["loops"]
        assert callback.loops == ((loops,) if isinstance(loops, str) else tuple(loops))


def test_state_keys_differ_by_prefix():
    assert LaserCallback(PLAN).state_key != LaserCallback(PLAN, key_prefix="b").state_key


def test_callbacks_can_be_copied_and_pickled(trainer):
    """Launchers pickle callbacks, weight averaging copies modules that may hold them: before and after a run."""
    callback = LaserCallback({"a": PLAN}, metrics={"mean": MeanMetric()}, update=_update_mean, report=False)
    for _ in range(2):
        for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert other.plans == callback.plans
            assert "laser/a/mean" in evaluate(trainer, Toy(), other)
        evaluate(trainer, Toy(), callback)


def _update_mean(metrics: MetricCollection, outputs: Any, batch: Any) -> None:
    metrics.update(outputs["logits"])
