"""What others than the module write, and when: each arm sees it as if it ran alone with the same callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.nn import functional as F
from toy import PLAN, Toy, evaluate, make_data

from laser_callback import LaserCallback
from laser_callback.surgery import reduced


class Follows(Toy):
    """Its answers depend on what others write to it, and it writes to some of the same places itself."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.own = 0.0
        self.found: list[float] = []
        self.by_key: dict[str, list[float]] = {"all": []}
        self.kinds: set[int] = set()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("sums", torch.zeros(3))

    def _evaluate(self, batch: Any) -> Any:
        x, y = batch
        logits = self(x) * self.scale / self.temperature + getattr(self, "shift", 0.0)
        loss = F.cross_entropy(logits, y)
        self.own += float(loss)
        self.sums += logits.sum(0)
        self.kinds |= set(logits.argmax(1).tolist())
        self.by_key["all"].append(float(loss))
        for found in (self.found, getattr(self, "fresh", [])):
            found.append(float(loss))
        self.acc(logits, y)
        self.log("loss", loss, on_epoch=True, batch_size=len(y))
        self.log("acc", self.acc, on_epoch=True)
        self._log_all()
        return {"acc": logits.argmax(1) == y}

    def _log_all(self) -> None:
        hook = self._current_fx_name
        self.log(f"{hook}/temperature", float(self.temperature), on_step=False, on_epoch=True, batch_size=1)
        for name in ("own", "found", "fresh", "kinds", "by_key"):
            value = getattr(self, name, ())
            value = value["all"] if name == "by_key" else value
            total = value if isinstance(value, float) else sum(value) + len(value)
            self.log(f"{hook}/{name}", float(total), on_step=False, on_epoch=True, batch_size=1)
        for name in ("scale", "sums"):
            self.log(f"{hook}/{name}", getattr(self, name).sum(), on_step=False, on_epoch=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self._log_all()

    on_test_epoch_end = on_validation_epoch_end


class Hooked(Follows):
    """Has all of the hooks, and writes in each."""

    def _count(self, *args: Any) -> None:
        self.own = self.own * 1.5 + 1
        self.sums += self.own
        self.found.append(self.own)

    on_validation_start = on_validation_epoch_start = on_validation_batch_start = on_validation_batch_end = _count

    def on_validation_epoch_end(self) -> None:
        self._count()
        self._log_all()


def _new(module: Any) -> None:
    module.shift = getattr(module, "shift", 0) + torch.tensor([0.5, 0.1, 0.0])


def _float(module: Any) -> None:
    module.temperature *= 1.25


def _cleared(module: Any) -> None:
    module.found.clear()


def _tensor(module: Any) -> None:
    module.scale.mul_(1.1)


def _appended(module: Any) -> None:
    module.found.append(7.0)
    module.kinds.add(7)


def _exchanged(module: Any) -> None:
    module.fresh, module.by_key["all"] = [], []


def _metric(module: Any) -> None:
    module.acc.reset()


ACTS = [_new, _float, _cleared, _tensor, _appended, _exchanged]
HOOKS = ["start", "epoch_start", "batch_start", "batch_end", "epoch_end"]


class Acts(pl.Callback):
    """Does something to the module in one hook."""

    def __init__(self, act: Callable[[Any], None], *hooks: str, stage: str = "validation") -> None:
        self.seen: list[str] = []
        for hook in hooks:
            setattr(self, f"on_{stage}_{hook}", partial(self._act, act, hook))

    def _act(self, act: Callable[[Any], None], hook: str, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.seen.append(hook)
        act(module)


def assert_as_alone(
    trainer: Any,
    make: Callable[[], Toy],
    others: Callable[[], pl.Callback],
    first: bool,
    verb: str = "validate",
    data: Callable[[], Any] = make_data,
    **options: Any,
) -> None:
    """Original and arm have what either gives without the other."""

    def run(*lasers: pl.Callback, plan: str = "") -> dict[str, float]:
        module = make()
        callbacks = (*lasers, others()) if first else (others(), *lasers)
        with reduced(module, plan) if plan else torch.no_grad():
            used = trainer(*callbacks)
            results = getattr(used, verb)(module, data(), verbose=False)
        assert "profile" not in vars(used.profiler)
        return {key: value for result in results for key, value in result.items()}

    plain, alone = run(), run(plan=PLAN)
    got = run(LaserCallback(PLAN, report=False, **options))
    assert plain != alone
    assert {key: got[key] for key in plain} == plain
    assert {key: got[f"laser/{key}"] for key in alone} == alone


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("act", ACTS)
def test_what_a_callback_writes_belongs_to_all_arms(trainer: Any, act: Any, hook: str, first: bool) -> None:
    assert_as_alone(trainer, Follows, lambda: Acts(act, hook), first)


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("act", ACTS)
def test_among_hooks_of_the_modules_own(trainer: Any, act: Any, first: bool) -> None:
    assert_as_alone(trainer, Hooked, lambda: Acts(act, *HOOKS), first)


@pytest.mark.parametrize("hook", HOOKS[:3])
def test_a_metric_that_is_reset(trainer: Any, hook: str) -> None:
    assert_as_alone(trainer, Follows, lambda: Acts(_metric, hook), True)


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_the_batch_is_the_one_that_all_callbacks_have_left(trainer: Any, first: bool) -> None:
    class Shifts(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
            batch[0].mul_(1.3)

    assert_as_alone(trainer, Follows, Shifts, first)


def test_outputs_that_a_later_callback_takes_away(trainer: Any) -> None:
    class Takes(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            outputs.clear()

    callback = LaserCallback(PLAN, report=False)
    evaluate(trainer, Toy(), callback, Takes())
    assert callback.result["laser"]["acc"].n == 10


def test_a_lambda_callback(trainer: Any) -> None:
    def other() -> pl.Callback:
        return LambdaCallback(on_validation_batch_end=lambda trainer, module, *_: _float(module))

    assert_as_alone(trainer, Follows, other, True)


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_in_test(trainer: Any, first: bool) -> None:
    for act in (_float, _cleared):
        assert_as_alone(trainer, Follows, lambda act=act: Acts(act, *HOOKS, stage="test"), first, "test")


def test_several_dataloaders(trainer: Any) -> None:
    class Several(Follows):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self._evaluate(batch)

    assert_as_alone(
        trainer,
        Several,
        lambda: Acts(_float, "batch_start", "batch_end"),
        True,
        data=lambda: [make_data(), make_data(6)],
    )


class Keeps:
    def __init__(self) -> None:
        self.values: list[float] = []


class Isolated(Follows):
    def __init__(self) -> None:
        super().__init__()
        self.keeps = Keeps()

    def _evaluate(self, batch: Any) -> Any:
        outputs = super()._evaluate(batch)
        self.keeps.values.append(self.own)
        self.log("kept", sum(self.keeps.values), on_epoch=True, batch_size=1)
        return outputs


@pytest.mark.parametrize("options", [{"isolate": "keeps"}, {"skip_isolation": True}])
def test_with_isolation_of_another_kind(trainer: Any, options: dict[str, Any]) -> None:
    assert_as_alone(trainer, Isolated, lambda: Acts(_float, *HOOKS), True, **options)


def test_several_plans_controls_and_callbacks(trainer: Any) -> None:
    module = Follows()
    with reduced(module, PLAN):
        alone = evaluate(trainer, module, Acts(_tensor, *HOOKS))
    one = LaserCallback({"a": PLAN, "b": "2.mlp@0.1"}, controls=True, report=False, key_prefix="one")
    two = LaserCallback(PLAN, report=False, key_prefix="two")
    got = evaluate(trainer, Follows(), one, Acts(_tensor, *HOOKS), two, profiler="simple")
    assert {key: got[f"one/a/{key}"] for key in alone} == alone
    assert {key: got[f"two/{key}"] for key in alone} == alone


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_in_fit(trainer: Any, first: bool) -> None:
    """What does not depend on the weights is the same in both arms, sanity check and training included."""

    class Counts(Follows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.temperature += 0.125
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            self.log("n", float(len(self.found)))
            super().on_validation_epoch_end()

    def act(module: Any) -> None:
        _float(module)
        _appended(module)

    laser, other = LaserCallback(PLAN, loops="fit", report=False), Acts(act, *HOOKS)
    run = trainer(*((laser, other) if first else (other, laser)), max_epochs=2)
    run.fit(Counts(), make_data(), make_data())
    got = run.callback_metrics
    keys = [key for key in got if key == "n" or key.endswith("/temperature")]
    keys = [key for key in keys if not key.startswith("laser/")]
    assert len(keys) == 3
    assert {key: got[f"laser/{key}"] for key in keys} == {key: got[key] for key in keys}


def test_nothing_is_left_where_a_callback_fails(trainer: Any) -> None:
    class Fails(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise RuntimeError("of the user's")

    lasers = [LaserCallback(PLAN, report=False, key_prefix=name) for name in ("one", "two")]
    module, run = Follows(), trainer(*lasers, Fails())
    with pytest.raises(RuntimeError, match="of the user's"):
        run.validate(module, make_data(), verbose=False)
    assert "profile" not in vars(run.profiler)
    assert not [name for name in vars(module) if name.startswith("on_validation")]
