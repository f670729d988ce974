"""The callback against its oracle: each arm equals a run that never heard of the other one."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from every_style import STYLES
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from packaging.version import Version
from styles import Style, tokens
from styles_logging import Experiment, LogsEveryWay, SeveralLoaders
from styles_metrics import Collection, LazyMetrics, MetricAttributes
from styles_state import EndsEarly, InPlaceState, Outputs, OutputsInHooks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from trainers import quiet_trainer
from versions import TRANSFORMERS

from laser_callback import LaserCallback, reduced
from laser_callback.compare.reduced_arm import ReducedPassError

Results = list[dict[str, float]]


class CountingLogger(Logger):
    """Counts what reaches it."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.scalars: list[dict[str, float]] = []
        folder.mkdir(exist_ok=True)
        self.folder = str(folder)

    name = "counting"
    version = 0

    @property
    def save_dir(self) -> str:
        return self.folder

    @property
    def experiment(self) -> CountingLogger:
        return self

    def log_text(self, *args: Any) -> None:
        self.calls.append("text")

    def log_image(self, *args: Any) -> None:
        self.calls.append("image")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append("metrics" if "direct" not in metrics else "direct")
        self.scalars.append(metrics)


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def trainer_for(tmp_path: Any, *callbacks: Callback, **options: Any) -> pl.Trainer:
    return quiet_trainer(*callbacks, default_root_dir=tmp_path, **options)


def laser(module: Style, **options: Any) -> LaserCallback:
    return LaserCallback(module.plan, report=False, **options)


def evaluate(trainer: pl.Trainer, module: Style, loop: str = "validate") -> Results:
    seed()
    return getattr(trainer, loop)(module, dataloaders=module.data(), verbose=False)


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: parameter.detach().numpy().tobytes() for name, parameter in module.named_parameters()}


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def without_laser(values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("laser/")}


def of_laser(values: Any) -> dict[str, Any]:
    return {
        key.removeprefix("laser/"): value
        for key, value in values.items()
        if key.startswith("laser/") and not key.startswith("laser/delta/")
    }


def assert_exactly(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    different = {key: (got[key], expected[key]) for key in got if not same(float(got[key]), float(expected[key]))}
    assert not different


def assert_close(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for key in got:
        # A delta of small numbers is the rounding of two larger ones: exactness is asserted between the arms' runs.
        assert float(got[key]) == pytest.approx(float(expected[key]), rel=1e-6, abs=1e-7, nan_ok=True), key


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a module, its metrics and its submodules hold, except what differs between any two objects."""
    skip = {"_trainer", "_metric_attributes", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"}
    state: dict[str, Any] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        state[name] = {
            key: value
            for key, value in vars(child).items()
            if key not in skip and not callable(value) and type(value).__module__ != "weakref"
        }
        state[name]["hooks"] = len(child._forward_hooks), len(child._forward_pre_hooks)
        state[name]["children"] = {key: type(value).__name__ for key, value in child._modules.items()}
    return state


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Deep equality of plain values, tensors and the objects that hold them."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, (int, float, str, bytes, set, torch.dtype, torch.device, type(None))):
        assert a == b or a != a, where
    elif isinstance(a, torch.Generator):
        assert torch.equal(a.get_state(), b.get_state()), where
    elif isinstance(a, np.random.Generator):
        assert a.bit_generator.state == b.bit_generator.state, where
    elif isinstance(a, (random.Random, np.random.RandomState)):
        assert str(a.getstate() if isinstance(a, random.Random) else a.get_state()) == str(
            b.getstate() if isinstance(b, random.Random) else b.get_state()
        ), where
    elif isinstance(a, Metric):
        assert_equal(a.metric_state, b.metric_state, where)
    elif type(a).__module__ == "oracle_modules":
        assert_equal(vars(a), vars(b), where)


# ---- every style -----------------------------------------------------------------------------------------------------


IN_TEST_LOOP = [MetricAttributes, LazyMetrics, OutputsInHooks, InPlaceState, LogsEveryWay, SeveralLoaders, Experiment]
NOTHING_REPLAYED = {  # why nothing can be replayed
    "LSTM": "0 of 0 layer calls",  # there are no layers
    "Albert": "0 of 0 layer calls",  # the first one is cut
    "DropoutOn": "train mode",
    "InPlaceResidual": "changes its inputs in place",
    "TestTimeGradient": "autograd",
}
if Version("5.2") > TRANSFORMERS:  # before, outputs are collected by hooks on the layers
    NOTHING_REPLAYED["Attentions"] = "a forward hook listens inside of it"


@pytest.mark.parametrize(
    ("cls", "loop"),
    [(cls, "validate") for cls in STYLES] + [pytest.param(cls, "test", marks=pytest.mark.slow) for cls in IN_TEST_LOOP],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_arm_equals_a_run_of_its_own(cls: type[Style], loop: str, tmp_path: Any) -> None:
    plain_module, oracle_module, laser_module, full_module = cls(), cls(), cls(), cls()
    loggers = [CountingLogger(tmp_path / str(i)) for i in range(4)]

    plain_trainer = trainer_for(tmp_path, logger=loggers[0])
    plain = evaluate(plain_trainer, plain_module, loop)
    oracle_trainer = trainer_for(tmp_path, logger=loggers[1])
    with reduced(oracle_module, cls.plan):
        oracle = evaluate(oracle_trainer, oracle_module, loop)
    weights, callback = bits(laser_module), laser(laser_module)
    laser_trainer = trainer_for(tmp_path, callback, logger=loggers[2])
    got = evaluate(laser_trainer, laser_module, loop)

    for mine, his, its in zip(got, plain, oracle, strict=True):
        assert_exactly(without_laser(mine), his)  # the user's own keys, as if the callback were not there
        assert_close(of_laser(mine), its)  # the reduced arm, as if it had been the only one
        for key in its:
            delta = mine[f"laser/{key}"] - mine[key]
            assert mine[f"laser/delta/{key}"] == pytest.approx(delta, rel=1e-5, abs=1e-6 * abs(mine[key]))
    assert_exactly(without_laser(laser_trainer.callback_metrics), plain_trainer.callback_metrics)
    assert_close(of_laser(laser_trainer.callback_metrics), oracle_trainer.callback_metrics)
    assert_exactly(without_laser(laser_trainer.logged_metrics), plain_trainer.logged_metrics)

    assert bits(laser_module) == weights  # not close: the same bits
    assert_equal(state_of(laser_module), state_of(plain_module))
    assert [c for c in loggers[2].calls if c != "metrics"] == [c for c in loggers[0].calls if c != "metrics"]
    files = [{p.name: p.read_text() for p in (tmp_path / str(i)).iterdir()} for i in (0, 2)]
    assert files[0] == files[1]  # what the user writes into the logger's folder
    left, left_by_itself = (
        {name for name, module in each.named_modules() if "forward" in vars(module)}
        for each in (laser_module, plain_module)
    )
    assert left <= left_by_itself
    assert not left or Version("5.2") > TRANSFORMERS  # before, it leaves some behind by itself
    assert any(
        not same(mine[k], mine[f"laser/{k}"]) for mine in got for k in without_laser(mine) if f"laser/{k}" in mine
    )

    (arm,) = callback.result.arms.values()
    assert (int(arm.replay.split()[0]) == 0) == (cls.__name__ in NOTHING_REPLAYED), arm.replay
    assert NOTHING_REPLAYED.get(cls.__name__, "") in arm.replay

    if loop == "validate":  # replay changes nothing, not a bit
        full_trainer = trainer_for(tmp_path, laser(full_module, replay=False), logger=loggers[3])
        full = evaluate(full_trainer, full_module, loop)
        for mine, theirs in zip(got, full, strict=True):
            assert_exactly(mine, theirs)
        assert_exactly(laser_trainer.callback_metrics, full_trainer.callback_metrics)


# ---- more than once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MetricAttributes, Collection, Outputs, OutputsInHooks, SeveralLoaders, InPlaceState])
def test_a_second_run_of_the_same_callback_and_trainer(cls: type[Style], tmp_path: Any) -> None:
    plain_module, oracle_module, module = cls(), cls(), cls()
    plain_trainer, trainer = trainer_for(tmp_path), trainer_for(tmp_path, laser(module))
    for loop in ("validate", "test", "validate"):
        before = copy.deepcopy({k: v for k, v in vars(module).items() if k not in ("_trainer", "_modules")})
        plain, got = evaluate(plain_trainer, plain_module, loop), evaluate(trainer, module, loop)
        for mine, his in zip(got, plain, strict=True):
            assert_exactly(without_laser(mine), his)
        if cls is not InPlaceState:  # whose totals go on from run to run: the arm starts from the user's
            with reduced(oracle_module, cls.plan):
                oracle = evaluate(trainer_for(tmp_path), oracle_module, loop)
            for mine, its in zip(got, oracle, strict=True):
                assert_close(of_laser(mine), its)
        else:
            assert [m["laser/n"] for m in got] == [m["n"] for m in got] == [before["n"] + 3]
    assert_equal(state_of(module), state_of(plain_module))


class Curve(Callback):
    """Keeps the metrics of each validation within fit."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append(dict(trainer.callback_metrics))


class OracleInFit(Callback):
    """Evaluates a deep copy of the module inside of `reduced`, at each validation within fit."""

    def __init__(self, tmp_path: Any) -> None:
        self.tmp_path = tmp_path
        self.seen: list[dict[str, float]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        twin = type(pl_module)()
        twin.load_state_dict(pl_module.state_dict())
        rng = torch.get_rng_state()
        with reduced(twin, twin.plan):
            self.seen += evaluate(trainer_for(self.tmp_path, inference_mode=False), twin)
        torch.set_rng_state(rng)


FIT_STYLES = [MetricAttributes, Collection, Outputs, OutputsInHooks, LogsEveryWay]


@pytest.mark.parametrize("cls", FIT_STYLES, ids=lambda cls: cls.__name__)
def test_validation_inside_of_fit(cls: type[Style], tmp_path: Any) -> None:
    def fit(*callbacks: Callback) -> tuple[Style, list[dict[str, Tensor]]]:
        module, curve = cls(), Curve()
        seed()
        trainer = trainer_for(tmp_path, *callbacks, curve, max_epochs=2, num_sanity_val_steps=1)
        trainer.fit(module, DataLoader(tokens(8, seed=5), batch_size=4), module.data())
        return module, curve.seen

    plain_module, plain = fit()
    oracle = OracleInFit(tmp_path)
    module, got = fit(oracle, LaserCallback(cls.plan, loops=("fit",), report=False))
    full_module, full = fit(LaserCallback(cls.plan, loops=("fit",), report=False, replay=False))
    assert len(got) == len(plain) == len(oracle.seen) == 2
    for mine, theirs, his, its in zip(got, full, plain, oracle.seen, strict=True):
        assert_exactly(without_laser(mine), his)
        reduced_arm = {key: value for key, value in of_laser(mine).items() if key in its}
        assert_close(reduced_arm, its)
        assert_exactly(mine, theirs)
    assert not torch.equal(got[0]["laser/loss"], got[1]["laser/loss"]) if "laser/loss" in got[0] else True
    assert bits(module) == bits(plain_module) == bits(full_module)  # trained the same, to the last bit


@pytest.mark.parametrize("cls", [MetricAttributes, Collection], ids=lambda cls: cls.__name__)
def test_fit_then_validate_then_fit_again_on_one_module(cls: type[Style], tmp_path: Any) -> None:
    """States made under inference mode must not reach the next fit."""
    module, plain = cls(), cls()
    callback = LaserCallback(cls.plan, loops=("fit", "validate"), report=False)
    for target, callbacks in ((plain, ()), (module, (callback,))):
        seed()
        for _ in range(2):
            trainer = trainer_for(tmp_path, *callbacks, max_epochs=1, num_sanity_val_steps=0)
            trainer.fit(target, DataLoader(tokens(4, seed=5), batch_size=4), target.data())
            trainer.validate(target, target.data(), verbose=False)
    assert bits(module) == bits(plain)
    assert not any(parameter.is_inference() for parameter in module.parameters())


@pytest.mark.skipif(not hasattr(pl_callbacks, "EMAWeightAveraging"), reason="new in Lightning 2.6")
def test_averaged_weights_are_the_ones_compared_in_fit(tmp_path: Any) -> None:
    class Averages(Callback):
        """The weights that the validation has seen; it comes after weight averaging in the list."""

        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def fit(*callbacks: Callback) -> tuple[Style, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        module, curve, averages = MetricAttributes(), Curve(), Averages()
        seed()
        averaging = pl_callbacks.EMAWeightAveraging(decay=0.5)
        trainer = trainer_for(tmp_path, *callbacks, averaging, averages, curve, max_epochs=2, num_sanity_val_steps=0)
        trainer.fit(module, DataLoader(tokens(8, seed=5), batch_size=4), module.data())
        return module, curve.seen, averages.seen

    plain_module, plain, _ = fit()
    module, got, averages = fit(LaserCallback(MetricAttributes.plan, loops=("fit",), report=False))
    assert bits(module) == bits(plain_module)
    for mine, his, weights in zip(got, plain, averages, strict=True):
        assert_exactly(without_laser(mine), his)
        twin = MetricAttributes()
        twin.load_state_dict(weights)
        with reduced(twin, twin.plan):
            (its,) = evaluate(trainer_for(tmp_path, inference_mode=False), twin)
        assert_close(of_laser(mine), its)


def test_weights_of_a_checkpoint_are_the_ones_compared(tmp_path: Any) -> None:
    """`ckpt_path=` loads them after `setup`."""
    other = MetricAttributes()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    trainer = trainer_for(tmp_path)
    trainer.strategy.connect(other)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    (plain,) = evaluate(trainer_for(tmp_path), other)
    with reduced(other, other.plan):
        (oracle,) = evaluate(trainer_for(tmp_path), other)

    module = MetricAttributes()
    (got,) = trainer_for(tmp_path, laser(module)).validate(
        module, module.data(), ckpt_path=tmp_path / "other.ckpt", verbose=False
    )
    assert_exactly(without_laser(got), plain)
    assert_close(of_laser(got), oracle)


# ---- what the reduced arm must not reach -----------------------------------------------------------------------------


def test_loggers_hear_the_user_once_and_the_callback_once(tmp_path: Any) -> None:
    logger, second = CountingLogger(tmp_path / "a"), CountingLogger(tmp_path / "b")
    module = Experiment()
    evaluate(trainer_for(tmp_path, laser(module), logger=[logger, second]), module)
    assert logger.calls.count("text") == logger.calls.count("direct") == logger.calls.count("image") == 3  # batches
    assert second.calls.count("image") == 3
    for each in (logger, second):
        (final,) = [scalars for scalars in each.scalars if "loss" in scalars]
        assert {"loss", "laser/loss", "laser/delta/loss"} <= final.keys()


def test_the_csv_file_has_both_arms(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    module = MetricAttributes()
    (got,) = evaluate(trainer_for(tmp_path, laser(module), logger=logger), module)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {key: float(value) for key, value in row.items() if key not in ("step", "epoch")} == pytest.approx(got)


def test_step_values_of_the_reduced_arm_reach_no_logger(tmp_path: Any) -> None:
    plain, got = CountingLogger(tmp_path), CountingLogger(tmp_path)
    module, plain_module = LogsEveryWay(), LogsEveryWay()
    evaluate(trainer_for(tmp_path, logger=plain), plain_module)
    evaluate(trainer_for(tmp_path, laser(module), logger=got), module)
    assert [without_laser(scalars) for scalars in got.scalars] == plain.scalars


def test_the_trainers_state_is_the_users_between_the_arms(tmp_path: Any) -> None:
    """Other callbacks see the user's logger, connector, outputs and batch in every hook."""

    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            values = {key: float(value) for key, value in trainer.logged_metrics.items()}
            means = {key: float(item.value) for key, item in trainer._results.items() if item.is_tensor}
            self.seen.append((values, means, float(outputs), sorted(batch), type(trainer.logger).__name__))
            self.seen.append((pl_module._current_fx_name, list(vars(pl_module.accuracy)["tp"].shape)))

    watches = Watch(), Watch()
    module, plain_module = MetricAttributes(), MetricAttributes()
    evaluate(trainer_for(tmp_path, watches[0], logger=CountingLogger(tmp_path)), plain_module)
    evaluate(trainer_for(tmp_path, laser(module), watches[1], logger=CountingLogger(tmp_path)), module)
    assert watches[0].seen == watches[1].seen


def test_several_plans_do_not_see_each_other(tmp_path: Any) -> None:
    plans = {"a": "2.mlp@0.1", "b": "3.q_proj@0.01", "none": "1.mlp@1.0"}
    module = InPlaceState()
    (got,) = evaluate(trainer_for(tmp_path, LaserCallback(plans, report=False)), module)
    for name, plan in plans.items():
        twin = InPlaceState()
        with reduced(twin, plan):
            (oracle,) = evaluate(trainer_for(tmp_path), twin)
        assert_close({key: got[f"laser/{name}/{key}"] for key in oracle}, oracle)
    for key in oracle:  # a plan that changes nothing gives the user's own numbers, to the last bit
        assert same(got[f"laser/none/{key}"], got[key])


def test_two_callbacks_do_not_see_each_other(tmp_path: Any) -> None:
    """The second one is still recording the user's layers while the first one runs its reduced arm."""
    early = {"plan": "0.mlp@0.1", "key_prefix": "early"}
    module, alone, early_alone = EndsEarly(), EndsEarly(), EndsEarly()
    (alone_values,) = evaluate(trainer_for(tmp_path, laser(alone)), alone)
    (early_values,) = evaluate(trainer_for(tmp_path, LaserCallback(**early, report=False)), early_alone)
    (got,) = evaluate(trainer_for(tmp_path, LaserCallback(**early, report=False), laser(module)), module)
    assert_exactly({key: value for key, value in got.items() if not key.startswith("early/")}, alone_values)
    assert_exactly({key: value for key, value in got.items() if not key.startswith("laser/")}, early_values)
    assert_equal(state_of(module), state_of(alone))


_CALLS = itertools.count(1)  # of both arms: what a module, class or closure holds is kept apart


def test_an_exception_in_the_reduced_arm_leaves_the_users_state(tmp_path: Any) -> None:
    class Breaks(OutputsInHooks):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            self.events["steps"] += 1
            if next(_CALLS) == 4:  # the reduced arm's second
                raise ValueError("in the reduced arm")
            return output

    class Stops(Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            if args[4] == 1:
                raise ValueError("after the user's second step")

    module, plain = Breaks(), OutputsInHooks()
    weights, logger = bits(module), CountingLogger(tmp_path / "a")
    told = "reduced pass of the plan .* fails on batch 1, where the original's does not: ValueError: in the reduced arm"
    with pytest.raises(ReducedPassError, match=told):
        evaluate(trainer_for(tmp_path, laser(module), logger=logger), module)
    with pytest.raises(ValueError, match="second step"):
        evaluate(trainer_for(tmp_path, Stops()), plain)
    assert bits(module) == weights
    assert module.events.pop("steps") == 2
    assert_equal(state_of(module), state_of(plain))
    assert module.trainer.loggers == [logger]


def test_large_tensors_are_kept_apart_where_they_move_and_not_copied_where_they_do_not(tmp_path: Any) -> None:
    """Memory banks are written in place; packed weights and tables of a model are buffers, too."""

    class Bank(Style):
        def __init__(self) -> None:
            super().__init__()
            self.model.register_buffer("table", torch.zeros(2**20 + 1), persistent=False)
            self.model.register_buffer("bank", torch.zeros(2**20 + 1), persistent=False)
            self.behind = np.zeros(2**20 + 1)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.logits(batch)
            self.model.bank[batch_idx] += logits.sum()
            self.behind[batch_idx] += float(logits.sum())
            self.log("bank", self.model.bank.sum())
            self.log("behind", float(self.behind.sum()))
            self.log("loss", logits.norm())

    module, alone, twin = Bank(), Bank(), Bank()
    callback = laser(module)
    (got,) = evaluate(trainer_for(tmp_path, callback), module)
    (plain,) = evaluate(trainer_for(tmp_path), alone)
    with reduced(twin, module.plan):
        (expected,) = evaluate(trainer_for(tmp_path), twin)
    assert_exactly(without_laser(got), plain)
    assert_close(of_laser(got), expected)
    assert torch.equal(module.model.bank, alone.model.bank)


def test_random_numbers_go_on_as_without_the_callback(tmp_path: Any) -> None:
    def draws(*callbacks: Callback) -> list[float]:
        module = next(cls for cls in STYLES if cls.__name__ == "Stochastic")()
        evaluate(trainer_for(tmp_path, *callbacks), module)
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    assert draws() == draws(LaserCallback(Style.plan, report=False, controls=True))
