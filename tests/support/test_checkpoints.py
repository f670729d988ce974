"""Checkpoints with objects among the hyperparameters: read where the module is made of the same, refused else."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import subprocess
import uuid
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny import tiny_causal_lm
from torch import nn
from torch.nn import functional

from laser_callback.spectra.delta import BaseWeights
from laser_callback.support.checkpoints import own_classes, read_checkpoint, strangers, unreadable


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Options:
    width: int = 3
    color: Color = Color.RED
    path: Path = Path("x")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    width: int = 3


class Outer:
    class Inner:
        pass


def objective(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


class Module(pl.LightningModule):
    def __init__(self, thing: Any = None, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = tiny_causal_lm(seed)


THINGS: dict[str, Any] = {
    "loss": nn.MSELoss(),
    "weighted loss": nn.CrossEntropyLoss(weight=torch.ones(3)),
    "module": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()),
    "model": tiny_causal_lm(),
    "config": tiny_causal_lm().config,
    "enum": Color.RED,
    "int enum": Level.LOW,
    "path": Path("a/b"),
    "pure path": pathlib.PurePosixPath("a"),
    "dataclass": Options(),
    "slots": Slotted(),
    "named tuple": Pair(1, 2),
    "function": objective,
    "torch function": functional.cross_entropy,
    "partial": functools.partial(torch.optim.AdamW, lr=1e-3),
    "class": torch.optim.AdamW,
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "namespace": argparse.Namespace(lr=1e-3, loss=nn.MSELoss()),
    "array": np.arange(3.0),
    "number": np.float64(1.5),
    "sets": [{1, 2}, frozenset({3}), Counter("aab"), OrderedDict(a=1)],
    "time": [datetime.datetime(2020, 1, 1), datetime.timedelta(1)],
    "others": [decimal.Decimal("1.5"), uuid.UUID(int=3), slice(1, 2), range(3), 1j, b"bytes", 2**70],
    "nested": {"losses": [nn.MSELoss(), {"color": Color.RED}]},
}


def saved(module: pl.LightningModule, path: Path) -> Path:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("name", THINGS)
def test_what_the_module_is_made_of_is_read(name, tmp_path):
    thing = THINGS[name]
    path = saved(Module(thing), tmp_path / "a.ckpt")
    before = set(torch.serialization.get_safe_globals())
    assert unreadable(Module(thing)) == strangers(path, Module(thing)) == []
    content = read_checkpoint(path, Module(thing))
    found = content["hyper_parameters"]["thing"]
    assert type(found) is type(thing)
    if name in ("enum", "dataclass", "path", "slots", "time", "others", "sets", "function", "class", "dtype", "number"):
        assert found == thing
    assert content["state_dict"].keys() == Module().state_dict().keys()
    assert set(torch.serialization.get_safe_globals()) == before
    assert len(BaseWeights(path, Module(thing)).digest) == 16  # a base that is such a checkpoint


def test_of_another_module_it_is_refused_by_name(tmp_path):
    path = saved(Module(Options()), tmp_path / "a.ckpt")
    assert strangers(path, Module(Color.RED)) == ["pathlib.PosixPath", "test_checkpoints.Options"]
    with pytest.raises(ValueError, match=r"a.ckpt' holds objects .*test_checkpoints.Options.*add_safe_globals"):
        read_checkpoint(path, Module())
    with torch.serialization.safe_globals([Options, Color, pathlib.PosixPath]):
        assert read_checkpoint(path, Module())["hyper_parameters"]["thing"] == Options()
        with own_classes(Module(Options())):
            pass
        assert Options in torch.serialization.get_safe_globals()  # what the user allows stays allowed


@pytest.mark.parametrize("thing", [Outer.Inner(), Outer.Inner, "abc".upper, getattr])
def test_what_would_take_more_than_classes_is_known_before(thing):
    module = Module()
    module.hparams["thing"] = thing
    assert unreadable(module) == ["thing"]


class Runs:
    def __reduce__(self) -> Any:
        return subprocess.Popen, (["touch", "ran"],)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": {"thing": Runs()}}, "a.ckpt")
    for owners in [(), (Module(nn.MSELoss()),), (Module(functools.partial(objective)),)]:
        with pytest.raises(ValueError, match=r"holds objects beside tensors.*Popen"):
            read_checkpoint("a.ckpt", *owners)
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no checkpoint", pickle.dumps([1]), b"\x80\x02}"])
def test_files_that_are_no_checkpoint_are_named(content, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt'"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [[1], torch.ones(1), 3])
def test_a_checkpoint_is_a_dict(content, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt' must be a checkpoint, a dict with weights, got a"):
        read_checkpoint(tmp_path / "a.ckpt")
