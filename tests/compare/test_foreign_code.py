"""The callback's promises on code as users write it: what they share, keep, write, and do in the middle of a pass."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy import PLAN, Toy, evaluate, make_data, oracle
from untouched import assert_untouched, snapshot
from versions import EXACT

from laser_callback import LaserCallback
from laser_callback.compare.reduced_arm import ReducedPassError
from laser_callback.surgery import reduced

# ---- what the passes share -------------------------------------------------------------------------------------------


class Counts(Toy):
    """Each variant appends one number per step to some shared place, and logs how many there are."""

    def place(self) -> list[Any]:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        self.place().append(float(output["logits"].norm()))
        return output

    def on_validation_epoch_end(self) -> None:
        self.log("n", float(len(self.place())))
        self.log("sum", float(sum(map(float, self.place()))))


class OfTheClass(Counts):
    values: list[float] = []

    def place(self) -> list[Any]:
        return self.values


class OfABaseClass(OfTheClass):
    pass


class NestedInTheClass(Counts):
    values: dict[str, list[list[float]]] = {"val": [[], []]}

    def place(self) -> list[Any]:
        return self.values["val"][1]


class Evaluator:
    """Holds more than plain values: a function, a lock, a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock, self.key, self.found = model, threading.Lock(), len, {"all": []}


class InAnEvaluator(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.evaluator = Evaluator(self.net)

    def place(self) -> list[Any]:
        return self.evaluator.found["all"]


class InSlots(Counts):
    class Kept:
        __slots__ = ("items",)

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.Kept()
        self.kept.items = []

    def place(self) -> list[Any]:
        return self.kept.items


class InAClosure(Counts):
    def __init__(self) -> None:
        super().__init__()
        found: list[float] = []
        self.place = lambda: found  # type: ignore[method-assign]


class InAPartial(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.place = functools.partial(lambda found: found, [])  # type: ignore[method-assign]


class InADefault(Counts):
    def place(self, found: list[float] = []) -> list[Any]:  # noqa: B006
        return found


class InTheDatamodule(Counts):
    def place(self) -> list[Any]:
        return self.trainer.datamodule.found


class InTheDataset(Counts):
    def place(self) -> list[Any]:
        return self.trainer.val_dataloaders.dataset.found


class InAnotherCallback(Counts):
    def place(self) -> list[Any]:
        return next(c.found for c in self.trainer.callbacks if isinstance(c, Finds))


class Finds(pl.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def val_dataloader(self) -> DataLoader[Any]:
        return make_data()


class WithFound(TensorDataset):
    found: list[float]


def _data(kind: type[Counts]) -> Any:
    if kind is InTheDatamodule:
        return Data()
    data = WithFound(*make_data().dataset.tensors)
    data.found = []
    return DataLoader(data, 4)


KINDS = [
    OfTheClass,
    OfABaseClass,
    NestedInTheClass,
    InAnEvaluator,
    InSlots,
    InAClosure,
    InAPartial,
    InADefault,
    InTheDatamodule,
    InTheDataset,
    InAnotherCallback,
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_has_its_own(trainer: Any, kind: type[Counts]) -> None:
    def run(*callbacks: pl.Callback, plan: str = "") -> dict[str, float]:
        module = kind()
        finds, data = Finds(), _data(kind)
        make = functools.partial(trainer, finds, *callbacks)
        with reduced(module, plan) if plan else torch.no_grad():
            result = make().validate(module, data, verbose=False)[0]
        for values in (OfTheClass.values, NestedInTheClass.values["val"][1], InADefault.place.__defaults__[0]):
            values.clear()
        return result

    plain, alone = run(), run(plan=PLAN)
    got = run(LaserCallback(PLAN, report=False))
    for key in plain:
        assert got[key] == plain[key], key
        assert got[f"laser/{key}"] == pytest.approx(alone[key], rel=1e-6), key
    assert plain["n"] == 3


class Bank(Toy):
    """A memory bank, larger than what is copied without a reason, written in place by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.register_buffer("bank", torch.zeros(2**20 + 7))
        self.array = np.zeros(2**20 + 7)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        self.net.bank[batch_idx::3] += output["logits"].norm()
        self.array[batch_idx] += float(output["logits"].norm())
        self.log("bank", self.net.bank.mean() + float(self.array.sum()))
        return output


def test_large_tensors_that_move(trainer: Any) -> None:
    plain, got = evaluate(trainer, Bank()), evaluate(trainer, Bank(), LaserCallback(PLAN, report=False))
    assert {key: got[key] for key in plain} == plain
    assert got["laser/bank"] == pytest.approx(oracle(trainer, Bank())["bank"], rel=1e-6)


class Adapts(Toy):
    """Test-time adaptation."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            loss = F.cross_entropy(self.net(batch[0].clone()), batch[1].clone())
            gradient = torch.autograd.grad(loss, self.net.head.weight)[0]
        with torch.no_grad():
            self.net.head.weight -= 0.1 * gradient
        return super().validation_step(batch, batch_idx)


def test_a_step_that_trains_is_refused_by_the_name_of_the_parameter(trainer: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"changes the parameter `net\.head\.weight`.*skip_isolation"):
        evaluate(trainer, Adapts(), LaserCallback(PLAN, report=False), inference_mode=False)
    evaluate(trainer, Adapts(), LaserCallback(PLAN, report=False, skip_isolation=True), inference_mode=False)


class Opaque:
    """Its state is where nobody can look."""

    def __init__(self) -> None:
        self._count = iter(range(1000))

    def __deepcopy__(self, memo: Any) -> Opaque:
        return Opaque()

    def count(self) -> int:
        return next(self._count)


def test_what_nobody_can_look_into_is_copied_on_request(trainer: Any) -> None:
    class Uses(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.opaque = Opaque()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("count", float(self.opaque.count()))
            return super().validation_step(batch, batch_idx)

    plain = evaluate(trainer, Uses())
    got = evaluate(trainer, Uses(), LaserCallback(PLAN, report=False, isolate="opaque"))
    assert (got["count"], got["laser/count"]) == (plain["count"], plain["count"])
    with pytest.raises(MisconfigurationException, match="`isolate` names 'nothing'"):
        evaluate(trainer, Uses(), LaserCallback(PLAN, report=False, isolate=["nothing"]))


# ---- whether the swap is seen ----------------------------------------------------------------------------------------


def test_autocast_around_both_passes(trainer: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain = evaluate(trainer, Toy())
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False))
    with torch.autocast("cpu", torch.bfloat16):
        alone = oracle(trainer, Toy())
    assert {key: got[key] for key in plain} == plain
    assert got["laser/loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert got["laser/loss"] != got["loss"]


class Averages(Toy):
    """Averaged weights are copied in for half of the step, and what was there is copied back."""

    in_place = staticmethod(lambda parameter, value: parameter.data.copy_(value))

    def __init__(self) -> None:
        super().__init__()
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        kept = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        for name, parameter in self.net.named_parameters():
            self.in_place(parameter, self.average[name])
        logits = self(batch[0])
        for name, parameter in self.net.named_parameters():
            self.in_place(parameter, kept[name])
        self.log("ema", F.cross_entropy(logits, batch[1]))
        return {"right": logits.argmax(1) == batch[1]}


class Exchanges(Averages):
    in_place = staticmethod(lambda parameter, value: setattr(parameter, "data", value))


@pytest.mark.parametrize("kind", [Averages, Exchanges])
def test_a_step_that_writes_the_weights_itself(trainer: Any, kind: type[Toy]) -> None:
    module = kind()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"writes to `net\.encoder\.layers\.1\.linear1`.* itself"):
        evaluate(trainer, module, LaserCallback(PLAN, report=False))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Caches(Toy):
    """Features that are computed once, by whoever comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.features = functools.lru_cache(self._features)

    def _features(self) -> Tensor:
        return self.net(torch.ones(1, 4, 8)).detach()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.features() + batch[0].mean((1, 2))[:, None]
        self.log("loss", F.cross_entropy(scores, batch[1]))
        return {"right": scores.argmax(1) == batch[1]}


@pytest.mark.parametrize("filled", [False, True], ids=["in the first pass", "before"])
def test_features_under_a_cache(trainer: Any, filled: bool) -> None:
    module, callback = Caches(), LaserCallback(PLAN, report=False)
    if filled:
        module.features()
    with pytest.warns(UserWarning, match=r"did not read the weight of `net\.encoder\.layers\.1\.linear1`"):
        got = evaluate(trainer, module, callback)
    assert got == evaluate(trainer, Caches())  # no key of the cut, and the user's own as ever
    assert callback.result["laser"].rows == []
    assert "did not read" in callback.result.not_compared["plan laser"]


def test_weights_that_only_some_batches_use(trainer: Any) -> None:
    class Sometimes(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if self.steps > 1 else x.mean(1)[:, :3]

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.steps += 1
            return super().validation_step(batch, batch_idx)

    got = evaluate(trainer, Sometimes(), LaserCallback(PLAN, report=False))
    assert got["laser/delta/loss"] != 0


class Compiled(Toy):
    """What is logged is the same in both passes."""

    log_loss = False

    def __init__(self, backend: Any) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.compiled = torch.compile(lambda x: self.net(x) * 1, backend=backend, fullgraph=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.compiled(batch[0])
        self.log("rows", float(logits.isfinite().all(1).sum()), reduce_fx="sum")
        if self.log_loss:
            self.log("loss", F.cross_entropy(logits, batch[1]))


@pytest.mark.skipif(not EXACT, reason="before torch 2.7 a fused encoder layer cannot be compiled whole")
def test_compiled_code_is_looked_at_and_stays_compiled(trainer: Any) -> None:
    alone, counter = CompileCounter(), CompileCounter()
    evaluate(trainer, Compiled(alone))
    module, callback = Compiled(counter), LaserCallback(PLAN, report=False)
    for _ in range(2):
        got = evaluate(trainer, module, callback)
        assert got["laser/rows"] == got["rows"] > 0
        assert counter.frame_count == alone.frame_count
    assert not callback.result.not_compared


@pytest.mark.skipif(not EXACT, reason="before torch 2.7 a fused encoder layer cannot be compiled whole")
def test_a_graph_that_keeps_weights_of_its_own(trainer: Any) -> None:
    def frozen(graph: Any, inputs: list[Any]) -> Any:
        kept = [value.detach().clone() if isinstance(value, nn.Parameter) else None for value in inputs]
        assert any(value is not None for value in kept)
        return lambda *new: graph(*[now if own is None else own for own, now in zip(kept, new, strict=True)])

    module, callback = Compiled(frozen), LaserCallback(PLAN, report=False)
    module.log_loss = True
    with pytest.warns(UserWarning, match="code was compiled in this process"):
        got = evaluate(trainer, module, callback)
    assert set(got) == {"rows", "loss"}
    assert "may keep weights of its own" in callback.result.not_compared["plan laser"]


def test_a_compiled_module(trainer: Any) -> None:
    """`torch.compile(LightningModule)`: the users' keys are as without the callback, and nothing is replayed."""
    plain = evaluate(trainer, torch.compile(Toy(), backend="eager"))
    callback = LaserCallback(PLAN, report=False)
    module = Toy()
    got = evaluate(trainer, torch.compile(module, backend="eager"), callback)
    assert {key: got[key] for key in plain} == plain
    with reduced(fresh := Toy(), PLAN):
        alone = evaluate(trainer, torch.compile(fresh, backend="eager"))
    assert {key: got[f"laser/{key}"] for key in alone} == pytest.approx(alone)
    assert "compiled" in callback.result["laser"].replay


# ---- what breaks in the reduced pass only ----------------------------------------------------------------------------


class Breaks(Toy):
    """A metric refuses what the cut model gives."""

    def validation_step(self, *args: Any) -> Any:
        rank = torch.linalg.matrix_rank(self.net.encoder.layers[1].linear1.weight.detach())
        if int(rank) < 8:
            raise ValueError("Input contains NaN.")
        return super().validation_step(*args) if len(args) == 2 else None


def test_the_error_names_the_plan(trainer: Any) -> None:
    told = r"the reduced pass of the plan '1\.mlp@0\.1' fails on batch 0.*ValueError: Input contains NaN\."
    with pytest.raises(ReducedPassError, match=told) as caught:
        evaluate(trainer, Breaks(), LaserCallback(PLAN, report=False))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_control_that_breaks_says_nothing_of_the_plan(trainer: Any) -> None:
    class Zeros(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx and not self.net.encoder.layers[1].linear1.weight.any():
                raise ValueError("Input contains NaN.")
            return super().validation_step(batch, batch_idx)

    callback = LaserCallback(PLAN, controls=True, report=False)
    evaluate(trainer, Zeros(), callback)
    alone = LaserCallback(PLAN, report=False)
    evaluate(trainer, Zeros(), alone)
    assert callback.result["laser"].rows == alone.result["laser"].rows
    assert list(callback.result.controls["laser"]) == ["random", "noise"]
    assert "fails on batch 1" in callback.result.not_compared["zeroed control of laser"]


def test_training_goes_on(trainer: Any) -> None:
    module = Breaks()
    callback = LaserCallback(PLAN, loops="fit", report=False)
    run = trainer(callback, max_epochs=2, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"gives up the comparison of epoch 0, and training goes on.*'1\.mlp@0\.1'"):
        run.fit(module, make_data(), make_data())
    assert run.current_epoch == 2
    assert "acc" in run.callback_metrics
    assert "laser/acc" not in run.callback_metrics
    strict = LaserCallback(PLAN, loops="fit", report=False, on_error="raise")
    with pytest.raises(ReducedPassError):
        trainer(strict, max_epochs=1, num_sanity_val_steps=0).fit(Breaks(), make_data(), make_data())
    with pytest.raises(MisconfigurationException, match="`on_error` must be"):
        LaserCallback(PLAN, on_error="ignore")


def test_an_error_of_a_hook_that_fails_for_both_is_the_users_own(trainer: Any) -> None:
    class Fails(Toy):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise TypeError("for both")

    with pytest.raises(TypeError, match="for both"):
        evaluate(trainer, Fails(), LaserCallback(PLAN, report=False))

    class FailsReduced(Breaks):
        validation_step = Toy.validation_step
        on_validation_batch_end = Breaks.validation_step

    with pytest.raises(ReducedPassError, match="fails on batch 0"):
        evaluate(trainer, FailsReduced(), LaserCallback(PLAN, report=False))


# ---- checkpoints and signals in the middle of a pass -----------------------------------------------------------------


@pytest.fixture
def usr1() -> Iterator[list[Any]]:
    """SIGUSR1 does what is put in the list."""
    acts: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: acts[0]())
    yield acts
    signal.signal(signal.SIGUSR1, before)


class Signalled(Toy):
    """A signal strikes in each step; a thread saves as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net.register_buffer("count", torch.zeros(()))
        self.saved: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.count += 1
        output = super().validation_step(batch, batch_idx)
        os.kill(os.getpid(), signal.SIGUSR1)
        thread = threading.Thread(target=lambda: SAVED.append(copy.deepcopy(self.net.state_dict())))
        thread.start()
        thread.join()
        SAVED.append(copy.deepcopy(self.state_dict()))
        pickle.dumps(self.net)
        return output


SAVED: list[dict[str, Tensor]] = []


def test_checkpoints_in_the_middle_of_a_pass(trainer: Any, tmp_path: Any, usr1: list[Any]) -> None:
    module, logger, seen = Signalled(), CSVLogger(tmp_path), []
    weights = {name: value.clone() for name, value in module.net.state_dict().items() if name != "count"}
    run = trainer(LaserCallback(PLAN, report=False), logger=logger)

    def requeue() -> None:
        run.save_checkpoint(tmp_path / f"{len(seen)}.ckpt")
        seen.append(run.loggers)

    usr1.append(requeue)
    SAVED.clear()
    got = run.validate(module, make_data(), verbose=False)[0]
    assert len(seen) >= 6
    assert all(loggers == [logger] for loggers in seen)
    for i in range(len(seen)):
        state = torch.load(tmp_path / f"{i}.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(state[f"net.{name}"], value) for name, value in weights.items())
    for saved in SAVED:
        found = {name.removeprefix("net."): value for name, value in saved.items()}
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    usr1[0] = lambda: None
    assert got["laser/loss"] == pytest.approx(oracle(trainer, Signalled())["loss"], rel=1e-6)
    assert not any(m._state_dict_hooks for m in module.modules())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_ctrl_c_at_any_moment_of_an_evaluation(trainer: Any) -> None:
    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    module, hits = Toy(), 0
    before = snapshot(module)
    previous = signal.signal(signal.SIGALRM, handler)
    rng = np.random.default_rng(0)
    try:
        for _ in range(40):
            run = trainer(LaserCallback("1.mlp@0.1, 2.mlp@0.1", report=False))
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.002, 0.12))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run.validate(module, make_data(), verbose=False)
            except (KeyboardInterrupt, SystemExit):
                hits += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert_untouched(module, before)
            assert signal.getsignal(signal.SIGALRM) is handler
            assert not {"forward", "on_validation_epoch_end"} & vars(module).keys()
            module.acc.reset()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert hits > 10
    assert evaluate(trainer, module) == evaluate(trainer, Toy())


def test_memory_is_not_paid_for_what_does_not_move(trainer: Any) -> None:
    """One copy while the first batch shows what moves, whatever the number of arms, and none afterwards."""
    bank = torch.zeros(2**22)
    held: list[int] = []

    class Holds(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.bank = bank

        def on_validation_epoch_end(self) -> None:
            self.log("bank", self.bank.sum())

    class Looks(pl.Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            held.append(sum(issubclass(type(o), Tensor) and o.shape == bank.shape for o in gc.get_objects()))

    plans = {"a": PLAN, "b": "2.mlp@0.1"}
    evaluate(trainer, Holds(), Looks(), LaserCallback(plans, controls=True, report=False))
    assert held == [1]
