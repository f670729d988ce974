"""Where a step may write to: each place that the walk finds is kept apart, whoever holds it."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import io
import queue
import threading
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Sampler
from toy import PLAN, Toy, evaluate, make_data, oracle

from laser_callback import LaserCallback
from laser_callback.passes.copies import copy_batch
from laser_callback.passes.places import Elements, Items
from laser_callback.passes.reach import reachable


class Counts(Toy):
    """Each variant counts its steps in a place of its own, and logs the count."""

    def note(self) -> None:
        self.values().append(1)

    def count(self) -> float:
        return len(self.values())

    def values(self) -> Any:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.note()
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log("n", float(self.count()))


# ---- what a module refers to -----------------------------------------------------------------------------------------


class InASlot(Counts):
    __slots__ = ("n", "seen")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.n = 0

    def note(self) -> None:
        self.n += 1
        self.seen.append(1)

    def count(self) -> float:
        return len(self.seen) + 10 * self.n


class _Descriptor:
    def __init__(self) -> None:
        self.found: dict[int, list[int]] = {}

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else self.found.setdefault(0, [])


class OfADescriptor(Counts):
    found = _Descriptor()

    def __init__(self) -> None:
        super().__init__()
        type(self).found.found.clear()

    def values(self) -> Any:
        return self.found


class _Counted:
    def __init__(self, function: Any) -> None:
        self.n = 0
        functools.update_wrapper(self, function)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def __call__(self, *_: Any) -> None:
        self.n += 1


class OfADecorator(Counts):
    def __init__(self) -> None:
        super().__init__()
        type(self).help.n = 0

    @_Counted
    def help(self) -> None:
        pass

    def note(self) -> None:
        self.help()

    def count(self) -> float:
        return type(self).help.n


class InADispatch(Counts):
    found: Any = []

    def __init__(self) -> None:
        super().__init__()
        vars(type(self))["keep"].func.__defaults__[0].clear()

    @functools.singledispatchmethod
    def keep(self, value: Any, found: list[int] = []) -> Any:  # noqa: B006
        found.append(1)
        return found

    def note(self) -> None:
        self.last = len(self.keep(None))

    def count(self) -> float:
        return self.last


class _Meta(type(pl.LightningModule)):  # type: ignore[misc]
    found: list[int] = []


class OfTheMetaclass(Counts, metaclass=_Meta):
    def __init__(self) -> None:
        super().__init__()
        _Meta.found.clear()

    def values(self) -> Any:
        return type(self).found


class OfABuiltinMethod(Counts):
    def __init__(self) -> None:
        super().__init__()
        found: list[int] = []
        self.sink, self.size = found.append, found.__len__

    def note(self) -> None:
        self.sink(1)

    def count(self) -> float:
        return self.size()


class _Held:
    def __init__(self) -> None:
        self.found: list[int] = []


_ALIVE: list[_Held] = []


class ByAWeakReference(Counts):
    def __init__(self) -> None:
        super().__init__()
        _ALIVE[:] = [_Held()]
        self.reference = self.refer(_ALIVE[0])

    def refer(self, held: _Held) -> Any:
        return weakref.ref(held)

    def values(self) -> Any:
        return self.reference().found


class ByAProxy(ByAWeakReference):
    def refer(self, held: _Held) -> Any:
        return weakref.proxy(held)

    def values(self) -> Any:
        return self.reference.found


class AWeakKey(ByAWeakReference):
    def refer(self, held: _Held) -> Any:
        return weakref.WeakKeyDictionary({held: 0})

    def note(self) -> None:
        self.reference[_ALIVE[0]] += 1

    def count(self) -> float:
        return self.reference[_ALIVE[0]]


class AWeakValue(ByAWeakReference):
    def refer(self, held: _Held) -> Any:
        return weakref.WeakValueDictionary({"a": held})

    def values(self) -> Any:
        return self.reference["a"].found


class InAMappingProxy(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.held = types.MappingProxyType({"a": []})

    def values(self) -> Any:
        return self.held["a"]


class OfAThread(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.held = threading.local()
        self.held.found = []

    def values(self) -> Any:
        return self.held.found


class AText(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.data = io.StringIO(), io.BytesIO()

    def note(self) -> None:
        self.text.write("ab\n")
        self.data.write(b"a")

    def count(self) -> float:
        return len(self.text.getvalue()) + 100 * len(self.data.getvalue())


class _Hard(Sampler[int]):
    def __init__(self) -> None:
        self.found: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __len__(self) -> int:
        return 10


class InASampler(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.sampler = _Hard()

    def values(self) -> Any:
        return self.sampler.found


class BeyondTheFirst(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.many = [0] * 150_000
        self.named = dict.fromkeys(range(150_000), 0)

    def note(self) -> None:
        self.many[5000] += 1
        self.named[5000] += 1

    def count(self) -> float:
        return self.many[5000] + 10 * self.named[5000]


class ManyInTheClass(Counts):
    found: dict[int, list[int]] = {i: [] for i in range(1500)}

    def __init__(self) -> None:
        super().__init__()
        self.found[7].clear()

    def values(self) -> Any:
        return self.found[7]


KINDS = [
    *(InASlot, OfADescriptor, OfADecorator, InADispatch, OfTheMetaclass, OfABuiltinMethod, ByAWeakReference, ByAProxy),
    *(AWeakKey, AWeakValue, InAMappingProxy, OfAThread, AText, InASampler, BeyondTheFirst, ManyInTheClass),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_has_its_own(trainer: Any, kind: type[Counts]) -> None:
    plain, alone = evaluate(trainer, kind()), oracle(trainer, kind())
    got = evaluate(trainer, kind(), LaserCallback(PLAN, report=False))
    assert {key: got[key] for key in plain} == plain
    assert {key: got[f"laser/{key}"] for key in alone} == pytest.approx(alone, rel=1e-6)


def test_isolate_reaches_slots(trainer: Any) -> None:
    plain = evaluate(trainer, InASlot())
    got = evaluate(trainer, InASlot(), LaserCallback(PLAN, report=False, isolate=["seen"]))
    assert (got["n"], got["laser/n"]) == (plain["n"], plain["n"])


def test_dead_references_are_passed_by() -> None:
    held = _Held()
    roots = {"module": [weakref.proxy(held), weakref.ref(held), weakref.WeakSet([held])]}
    del held
    assert isinstance(reachable(roots)[0], Elements)


# ---- what the trainer has --------------------------------------------------------------------------------------------


class OwnTrainer(pl.Trainer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.found: list[int] = []


class OnTheTrainer(Counts):
    def values(self) -> Any:
        return self.trainer.found


class OnItsLoops(Counts):
    def note(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        loop.noted = self.count() + 1

    def count(self) -> float:
        return getattr(self.trainer.fit_loop.epoch_loop, "noted", 0)


@pytest.mark.parametrize("kind", [OnTheTrainer, OnItsLoops])
def test_what_users_put_on_the_trainer(kind: type[Counts]) -> None:
    def make(*callbacks: pl.Callback) -> pl.Trainer:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return OwnTrainer(callbacks=list(callbacks), accelerator="cpu", devices=1, **quiet)

    got = evaluate(make, kind(), LaserCallback(PLAN, report=False))
    assert (got["n"], got["laser/n"]) == (3, 3)


class Trains(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Steps(Trains):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]


class Plateaus(Steps):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [ReduceLROnPlateau(optimizer, patience=0, factor=0.5)]

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step(1.0)  # type: ignore[union-attr,call-arg]


class Halves(Trains):
    def on_validation_epoch_end(self) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] *= 0.5


class Stops(Trains):
    """Of the two models only the one that is ``when`` stops."""

    when = "reduced"

    def on_validation_epoch_start(self) -> None:
        weight = self.net.encoder.layers[1].linear1.weight
        reduced = bool(torch.linalg.matrix_rank(weight) < min(weight.shape))
        if reduced == (self.when == "reduced"):
            self.trainer.should_stop = True


class StopsItself(Stops):
    when = "original"


@pytest.mark.parametrize("kind", [Steps, Plateaus, Halves, Stops, StopsItself])
def test_training_is_as_without(trainer: Any, kind: type[Trains]) -> None:
    def fit(*callbacks: pl.Callback) -> tuple[Any, ...]:
        module, made = kind(), trainer(*callbacks, max_epochs=3, num_sanity_val_steps=0)
        made.fit(module, make_data(), make_data())
        weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        return made.current_epoch, made.optimizers[0].param_groups[0]["lr"], weights.tolist()

    plain = fit()
    assert fit(LaserCallback(PLAN, loops=["fit"], report=False, on_error="raise")) == plain
    assert plain[0] == (1 if kind is StopsItself else 3)


def test_the_state_of_an_optimizer_is_left_alone() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    names = [place.name for place in reachable({"optimizer": optimizer})]
    assert "optimizer.param_groups[0]" in names
    assert not [name for name in names if ".state" in name]


# ---- loaders ---------------------------------------------------------------------------------------------------------


class _Collate:
    def __init__(self) -> None:
        self.n = 0

    def __call__(self, items: list[Any]) -> Any:
        x, y = (torch.stack(values) for values in zip(*items, strict=True))
        return x * (1 + self.n / 10), y


class WritesToTheLoader(Counts):
    def note(self) -> None:
        loader = self.trainer.val_dataloaders
        loader.collate_fn.n += 1
        loader.sampler.found.append(1)
        loader.batch_sampler.noted = loader.batch_sampler.noted + 1 if hasattr(loader.batch_sampler, "noted") else 1
        loader.worker_init_fn.__self__.append(1)

    def count(self) -> float:
        loader = self.trainer.val_dataloaders
        parts = loader.collate_fn.n, len(loader.sampler.found), loader.batch_sampler.noted
        return sum(n * 10**i for i, n in enumerate((*parts, len(loader.worker_init_fn.__self__))))


def test_what_a_loader_holds(trainer: Any) -> None:
    def make() -> DataLoader[Any]:
        options: Any = {"collate_fn": _Collate(), "sampler": _Hard(), "worker_init_fn": [].append}
        return DataLoader(make_data().dataset, 4, **options)

    plain, alone = (
        evaluate(trainer, WritesToTheLoader(), data=make()),
        oracle(trainer, WritesToTheLoader(), data=make()),
    )
    got = evaluate(trainer, WritesToTheLoader(), LaserCallback(PLAN, report=False), data=make())
    assert {key: got[key] for key in plain} == plain
    assert {key: got[f"laser/{key}"] for key in alone} == pytest.approx(alone, rel=1e-6)


def test_the_records_of_a_dataset_are_one_place() -> None:
    places = reachable({"the dataloaders": [[{"text": ["a"]}] * 3, [[i] for i in range(1001)]]})
    assert len(places) == 5
    assert sum(isinstance(place, Items) for place in places) == 1


# ---- parameters ------------------------------------------------------------------------------------------------------


class _OwnParameter(nn.Parameter):
    pass


class InAList(Toy):
    def __init__(self, kind: Any = nn.Parameter, registered: bool = False) -> None:
        super().__init__()
        self.held: Any = [kind(torch.zeros(3), requires_grad=False)]
        if registered:
            self.one = self.held[0]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.held[0] += 1
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("module", [lambda: InAList(), lambda: InAList(_OwnParameter, registered=True)])
def test_parameters_that_a_step_writes_to(trainer: Any, module: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"changes the parameter `(held\[0\]|one)`"):
        evaluate(trainer, module(), LaserCallback(PLAN, report=False))


def test_isolate_of_what_is_cut(trainer: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"'net', which holds `net\..*`, a weight that the plan cuts"):
        evaluate(trainer, Toy(), LaserCallback(PLAN, report=False, isolate=["net"]))
    got = evaluate(trainer, Toy(), LaserCallback(PLAN, report=False, isolate=["net.head"]))
    assert got["laser/loss"] == pytest.approx(oracle(trainer, Toy())["loss"], rel=1e-6)


def test_isolate_of_what_has_no_copy(trainer: Any) -> None:
    module = Toy()
    module.queue = queue.Queue()
    with pytest.raises(MisconfigurationException, match="`isolate` names 'queue', which cannot be copied"):
        evaluate(trainer, module, LaserCallback(PLAN, report=False, isolate=["queue"]))


# ---- loggers ---------------------------------------------------------------------------------------------------------


class _Run:
    """What a client of some service is: it keeps nothing, and tells others (a file is not kept apart)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{what}\n")


class _Client(Logger):
    name, version = "client", 0  # type: ignore[assignment]

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._experiment = _Run(path)

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass


class HoldsItsLogger(Toy):
    def setup(self, stage: str) -> None:
        self.mine, self.run, self.tell = self.logger, self.logger.experiment, self.logger.experiment.tell  # type: ignore
        self.many = {"a": [self.run]}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(self.run, _Run)
        assert isinstance(self.mine, _Client)
        self.run.tell("run")
        self.tell("method")
        self.mine.experiment.tell("logger")
        self.many["a"][0].tell("list")
        return super().validation_step(batch, batch_idx)


def test_loggers_that_the_module_holds(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "told.txt"
    evaluate(trainer, HoldsItsLogger(), LaserCallback(PLAN, report=False), logger=_Client(path))
    assert collections.Counter(path.read_text().split()) == dict.fromkeys(("run", "method", "logger", "list"), 3)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_values_that_cannot_change_stay_the_ones_that_they_are() -> None:
    values = [decimal.Decimal(1), fractions.Fraction(1, 2), datetime.timezone.utc, torch.zeros(1).numpy().dtype]
    held = frozenset({decimal.Decimal(2), datetime.date(2020, 1, 1)})
    copied = copy_batch([*values, held, torch.ones(2)])
    assert all(a is b for a, b in zip(values, copied, strict=False))
    assert copied[4] == held
