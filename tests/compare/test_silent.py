"""What a step in a reduced arm sees of the user's loggers, and that nothing of what it does there reaches them."""

from __future__ import annotations

import os
from collections import OrderedDict
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from toy import PLAN, Toy, evaluate, oracle

from laser_callback import LaserCallback
from laser_callback.passes.silent import silent


class Writer:
    """Of a logger: an object with values, calls, items, a closed class below it."""

    def __init_subclass__(cls) -> None:
        raise TypeError("final")

    def __init__(self) -> None:
        self.written: list[Any] = []

    def write(self, value: Any) -> None:
        self.written.append(value)

    def __setitem__(self, name: str, value: Any) -> None:
        self.written.append((name, value))

    def __getitem__(self, name: str) -> Writer:
        return self

    def __enter__(self) -> Writer:
        self.written.append("enter")
        return self

    def __exit__(self, *args: Any) -> None:
        self.written.append("exit")

    def __del__(self) -> None:
        ENDED.append(self)


ENDED: list[Writer] = []


class Own(Logger):
    """A user's logger with whatever a logger may hold."""

    name = "own"
    version = 3
    __slots__ = ("slot",)

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.path = folder / "runs"
        self.file = str(folder / "log.txt")
        Path(self.file).write_text("")
        self.slot = "a"
        self.options = OrderedDict(rate=0.1, tags=["a"], writers=[Writer()])
        self.day, self.weights, self.nothing = date(2026, 1, 1), torch.zeros(2), None
        self.writer = Writer()
        self.steps = 0

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def experiment(self) -> Writer:
        return self.writer

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps += 1

    def log_hyperparams(self, params: Any) -> None:
        self.steps += 1


@pytest.fixture
def own(tmp_path: Path) -> Own:
    return Own(tmp_path)


def test_it_is_of_the_class(own: Own, tmp_path: Path) -> None:
    for logger in (own, CSVLogger(tmp_path), TensorBoardLogger(tmp_path)):
        mute = silent(logger)
        assert isinstance(mute, type(logger))
        assert isinstance(mute, Logger)
        assert mute.__class__ is type(logger)
        assert type(mute).__name__ == type(logger).__name__
        assert isinstance(mute.experiment, type(logger.experiment))
        assert mute.experiment is mute.experiment
    assert not isinstance(silent(own), CSVLogger)


def test_values_are_read(own: Own) -> None:
    mute: Any = silent(own)
    assert (mute.name, mute.version, mute.steps, mute.slot, mute.day) == ("own", 3, 0, "a", own.day)
    assert mute.nothing is None
    assert mute.options["rate"] == 0.1
    assert type(mute.options) is OrderedDict
    assert torch.equal(mute.weights, own.weights)
    own.log_metrics({})
    assert mute.steps == 1
    assert hasattr(mute, "folder")
    with pytest.raises(AttributeError, match="absent"):
        _ = mute.absent


def test_nothing_is_written(own: Own) -> None:
    ENDED.clear()
    mute: Any = silent(own)
    assert mute.log_metrics({"a": 1.0}) is None
    assert mute.experiment.write(1) is None
    mute.experiment["name"] = 1
    mute.experiment["name"].write(1)
    with mute.experiment as writer:
        writer.write(2)
    mute.experiment.written.append(3)
    mute.options["tags"].append("b")
    mute.options["writers"][0].write(4)
    mute.weights.add_(1)
    mute.steps = 7
    mute.writer = None
    assert (mute.steps, mute.writer) == (7, None)
    assert (own.steps, own.writer.written, own.options["tags"]) == (0, [], ["a"])
    assert own.options["writers"][0].written == []
    assert torch.equal(own.weights, torch.zeros(2))
    del mute, writer
    assert ENDED == []


def test_paths_in_the_loggers_folder_lead_elsewhere(own: Own, tmp_path: Path) -> None:
    mute: Any = silent(own)
    assert own.save_dir not in {mute.save_dir, str(mute.folder)}
    assert os.path.isdir(mute.save_dir)
    assert mute.folder == Path(mute.save_dir)
    assert mute.path == Path(mute.save_dir, "runs")
    assert mute.file == os.path.join(mute.save_dir, "log.txt")
    Path(mute.file).write_text("other")
    assert Path(own.file).read_text() == ""
    folder = mute.save_dir
    del mute
    assert not os.path.exists(folder)

    for logger in (CSVLogger(tmp_path, version=5), TensorBoardLogger(tmp_path, version=6)):
        mute = silent(logger)
        assert Path(mute.log_dir).name == Path(logger.log_dir).name
        assert mute.experiment.log_dir == mute.log_dir
        assert Path(mute.log_dir).parent == Path(mute.root_dir)


class Single:
    """There is one, whoever asks for it."""

    one: Single | None = None

    def __new__(cls) -> Single:
        Single.one = Single.one or super().__new__(cls)
        return Single.one


class Rates(dict[str, float]):
    """No object of a class below it can be made without dict."""


def test_objects_that_are_made_in_other_ways(own: Own) -> None:
    own.single, own.rates, own.final = Single(), Rates(a=1.0), range
    mute: Any = silent(own)
    assert isinstance(mute.single, Single)
    mute.single.x = 1
    assert vars(own.single) == {}
    assert isinstance(mute.rates, Rates)
    assert (mute.rates["a"], list(mute.rates)) == (1.0, ["a"])
    mute.rates["a"] = 2.0
    assert own.rates == {"a": 1.0}
    assert mute.final is range


def test_loggers_that_are_mocks_or_namespaces() -> None:
    mock = Mock(experiment=SimpleNamespace(id="x", add=lambda: 1 / 0))
    mute: Any = silent(mock)
    mute.log_metrics({}, step=1)
    mute.anything.further(1)
    assert mute.experiment.id == "x"
    assert mute.experiment.add() is None
    assert mock.mock_calls == []


class LooksAtTheLogger(Toy):
    """Asks for the logger's class and values, and writes where they say."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        outputs = super().validation_step(batch, batch_idx)
        assert self.trainer.loggers[0] is self.logger
        assert isinstance(self.logger, (TensorBoardLogger, CSVLogger))
        assert isinstance(self.logger.experiment.log_dir, str)
        assert self.logger.name == "log"
        for folder in (self.logger.log_dir, self.logger.experiment.log_dir, self.trainer.log_dir):
            with Path(folder, "said.txt").open("a") as file:
                file.write(f"{float(outputs['logits'].sum())}\n")
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_text("said", "x", self.global_step)
            assert "version" in Path(self.logger.log_dir).name
        else:
            assert self.logger.experiment.metrics == []
        return outputs


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_steps_that_look_at_the_logger(trainer: Any, tmp_path: Path, kind: Any) -> None:
    said = []
    for at, callbacks in enumerate(([], [LaserCallback(PLAN, report=False)])):
        logger = kind(tmp_path, name="log", version=at)
        logged = evaluate(trainer, LooksAtTheLogger(), *callbacks, logger=logger)
        said.append(Path(logger.log_dir, "said.txt").read_text())
    assert said[0] == said[1]
    expected = oracle(trainer, LooksAtTheLogger(), logger=kind(tmp_path, name="log"))
    assert logged["laser/loss"] == pytest.approx(expected["loss"], rel=1e-6)
