"""What a step can write to by kind: each is kept apart, or the run stops with its name and a cure."""

from __future__ import annotations

import itertools
import mmap
import os
import queue
import subprocess
import sys
from array import array
from collections import defaultdict
from contextvars import ContextVar
from enum import Enum
from typing import Any
from unittest.mock import MagicMock, patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import PLAN, Toy, evaluate, make_data, oracle
from trainers import quiet_trainer

from laser_callback import LaserCallback
from laser_callback.passes.reach import reachable
from laser_callback.passes.values import Bytes

DATA = 16  # examples, in four batches


class Writes(Toy):
    """A step that writes to what it holds, from its batch ``first`` on, and logs what is there."""

    def __init__(self, held: Any, write: Any, read: Any, first: int = 0) -> None:
        super().__init__()
        if isinstance(held, torch.Tensor) and held.layout is not torch.jagged:
            self.register_buffer("held", held)
        else:
            self.held = held
        self.write, self.read, self.first = write, read, first

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx >= self.first:
            self.write(self.held)
        self.log("n", float(self.read(self.held)), on_step=False, on_epoch=True, batch_size=1)
        return super().validation_step(batch, batch_idx)


class Split(Enum):
    VAL = 1


def _set_attribute(value: Any) -> None:
    value.n = getattr(value, "n", 0) + 1


def _add_first(value: Any) -> None:
    value[0] += 1


def _variable() -> ContextVar[int]:
    found: ContextVar[int] = ContextVar("n")
    found.set(0)
    return found


def _enum() -> Split:
    Split.VAL.n = 0  # type: ignore[attr-defined]
    return Split.VAL


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)


LARGE = 2**20 + 5
APART: dict[str, Any] = {
    "bytearray": (lambda: bytearray(2), _add_first, lambda v: v[0]),
    "a bytearray that grows": (bytearray, lambda v: v.append(1), len),
    "array": (lambda: array("d", [0]), _add_first, lambda v: v[0]),
    "large array": (lambda: array("b", bytes(LARGE)), _add_first, lambda v: v[0]),
    "mmap": (lambda: mmap.mmap(-1, 16), _add_first, lambda v: v[0]),
    "memoryview": (lambda: memoryview(bytearray(2)), _add_first, lambda v: v[0]),
    "masked": (lambda: np.ma.masked_array([0.0, 1.0], [0, 1]), _add_first, lambda v: v[0]),
    "objects": (lambda: np.array([[], None], dtype=object), lambda v: v[0].append(1), lambda v: len(v[0])),
    "bits": (lambda: np.random.PCG64(0), lambda v: v.random_raw(), lambda v: v.state["state"]["state"] % 1000),
    "variable": (_variable, lambda v: v.set(v.get() + 1), lambda v: v.get()),
    "enum": (_enum, _set_attribute, lambda v: v.n),
    "attribute of a tensor": (lambda: torch.zeros(1), _set_attribute, lambda v: v.n),
    "coo": (lambda: torch.eye(2).to_sparse(), lambda v: v._values().add_(1), lambda v: v._values().sum()),
    "coo, in place": (lambda: torch.eye(2).to_sparse(), lambda v: v.mul_(2), lambda v: v._values().sum()),
    "coo that grows": (
        lambda: torch.eye(2).to_sparse(),
        lambda v: v.add_(torch.ones(2, 2).to_sparse()),
        lambda v: v.to_dense().sum(),
    ),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), lambda v: v.values().mul_(2), lambda v: v.values().sum()),
    "jagged": (_jagged, lambda v: v.values().add_(1), lambda v: v.values().sum()),
    "late, by NumPy": (lambda: torch.zeros(3), lambda v: v.numpy().__iadd__(1), lambda v: v.sum(), 1),
    "late, by data": (lambda: torch.zeros(3), lambda v: v.data.add_(1), lambda v: v.sum(), 2),
    "late, in a middling one": (lambda: torch.zeros(9000), lambda v: v.data.add_(1), lambda v: v[0], 1),
}


@pytest.mark.parametrize("case", APART)
def test_it_is_kept_apart(trainer: Any, case: str) -> None:
    make, *rest = APART[case]
    plain = evaluate(trainer, Writes(make(), *rest), data=make_data(DATA))
    alone = oracle(trainer, Writes(make(), *rest), data=make_data(DATA))
    got = evaluate(trainer, Writes(make(), *rest), LaserCallback(PLAN, report=False), data=make_data(DATA))
    assert {key: got[key] for key in plain} == plain
    assert {key: got[f"laser/{key}"] for key in alone} == pytest.approx(alone, rel=1e-6)


REFUSED: dict[str, Any] = {
    "Queue": (queue.Queue, lambda v: v.put(1)),
    "SimpleQueue": (queue.SimpleQueue, lambda v: v.put(1)),
    "count": (itertools.count, next),
    "list_iterator": (lambda: iter(list(range(99))), next),
    "list_iterator of a cycle": (lambda: itertools.cycle([1, 2]), next),
    "count of an islice": (lambda: itertools.islice(itertools.count(), 99), next),
    "product": (lambda: itertools.product(range(99)), next),
    "generator": (lambda: (i for i in range(99)), next),
    "count of a factory": (lambda: defaultdict(itertools.count().__next__), lambda v: v[len(v)]),
    "_SingleProcessDataLoaderIter": (lambda: iter(make_data(40)), next),
    "SeedSequence": (lambda: np.random.default_rng(0), lambda v: v.spawn(1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_brought_back_is_refused_by_name(trainer: Any, case: str) -> None:
    make, write = REFUSED[case]
    kind = case.partition(" ")[0]
    with pytest.raises(MisconfigurationException, match=f"changes `module.held.*`, an? {kind} that cannot"):
        evaluate(trainer, Writes(make(), write, lambda _: 0), LaserCallback(PLAN, report=False))


def test_isolate_gives_each_pass_an_iterator(trainer: Any) -> None:
    got = evaluate(
        trainer,
        Writes(itertools.count(), next, lambda v: int(repr(v)[6:-1])),
        LaserCallback(PLAN, report=False, isolate=["held"]),
    )
    assert got["n"] == got["laser/n"] == 2


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count()
        self.bank = np.zeros(LARGE)

    def val_dataloader(self) -> Any:
        return make_data()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        next(self.ids)
        return batch


def test_what_others_move_on_is_theirs(trainer: Any) -> None:
    assert "laser/loss" in evaluate(trainer, Toy(), LaserCallback(PLAN, report=False), data=Data())


def test_a_large_array_of_the_datamodule(trainer: Any) -> None:
    module = Writes(None, lambda _: module.trainer.datamodule.bank.__setitem__(3, 7.0), lambda _: 0)
    with pytest.raises(MisconfigurationException, match=r"changes `trainer\.datamodule\.bank` of 1,048,581 elements"):
        trainer(LaserCallback(PLAN, report=False)).validate(module, datamodule=Data(), verbose=False)


PEAK = """
import sys, tracemalloc
from array import array
import numpy as np
from laser_callback.passes.state import Own, Start
from toy import Toy
kinds = {
    "memmap": lambda: np.memmap(sys.argv[1], "u1", "r"),
    "own": lambda: np.memmap(sys.argv[1], "u1", "c"),
    "bytes": lambda: bytes(2**25),
    "bytearray": lambda: bytearray(2**25),
    "array": lambda: array("b", bytes(2**25)),
    "numpy": lambda: np.ones(2**22),
}
for kind, make in kinds.items():
    module = Toy()
    module.held = make()
    tracemalloc.start()
    start = Start(module)
    start.first_batch()
    start.after(first=True)
    with Own(start), Own(start):
        print(kind, *(n >> 20 for n in tracemalloc.get_traced_memory()))
    tracemalloc.stop()
"""


def test_what_is_not_written_to_is_not_kept_twice(tmp_path: Any) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(2**25))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, env=_environment(), check=True
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 6
    for kind, held, peak in found:
        assert int(held) <= 2
        assert int(peak) <= (2 if kind in ("memmap", "bytes") else 36)  # one copy, for the first batch


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_memory_of_its_own_form_has_a_place() -> None:
    assert [type(place) for place in reachable({"a": bytearray(1), "b": b"x", "c": memoryview(b"x")})] == [Bytes]


def test_a_mock_is_not_asked_for_what_it_would_make() -> None:
    """A mock has every attribute, and each is a mock: to follow them would never end."""
    module = Toy()
    trainer = quiet_trainer(laser := LaserCallback(PLAN, report=False))
    loop = trainer.validate_loop
    module.mock = MagicMock()
    with patch.object(loop, "_evaluation_step", wraps=loop._evaluation_step) as mocked:
        trainer.validate(module, make_data(), verbose=False)
    assert mocked.call_count == 3
    assert not module.mock.mock_calls
    assert laser.result["laser"]["acc"].n == 10
