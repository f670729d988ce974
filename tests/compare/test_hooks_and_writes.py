"""Hooks that exchange weights, steps that write late or little, and what both passes return and save."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from toy import PLAN, Toy, evaluate, make_data

from laser_callback import LaserCallback
from laser_callback.compare.reduced_arm import ReducedPassError

# ---- weights that hooks exchange -------------------------------------------------------------------------------------


class Averaging(Toy):
    """As torch_ema does it: averaged weights from one hook to another."""

    begin, end = "on_validation_epoch_start", "on_validation_epoch_end"

    def __init__(self) -> None:
        super().__init__()
        self.average = [p.detach() * 0.9 for p in self.net.parameters()]
        self.kept: list[Tensor] = []

    def store(self) -> None:
        self.kept = [p.detach().clone() for p in self.net.parameters()]

    def put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.net.parameters(), values, strict=True):
                parameter.copy_(value)

    def _at(self, hook: str) -> None:
        if hook == self.begin:
            self.store()
            self.put(self.average)
        if hook == self.end:
            self.put(self.kept)

    def on_validation_start(self) -> None:
        self._at("on_validation_start")

    def on_validation_epoch_start(self) -> None:
        self._at("on_validation_epoch_start")

    def on_validation_epoch_end(self) -> None:
        self._at("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        self._at("on_validation_end")


class ByPointer(Averaging):
    def store(self) -> None:
        self.kept = [p.data for p in self.net.parameters()]

    def put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.net.parameters(), values, strict=True):
            parameter.data = value


class ByForeach(Averaging):
    def put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.net.parameters()), values)


class AtTheEnds(Averaging):
    begin, end = "on_validation_start", "on_validation_end"


class OneHookOnly(Averaging):
    """Weights are pulled towards their average at the end of each evaluation."""

    begin, end = "", "on_validation_epoch_end"

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.average


@pytest.mark.parametrize("kind", [Averaging, ByPointer, ByForeach, AtTheEnds, OneHookOnly])
@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_hooks_that_exchange_weights_are_refused_and_undone(trainer: Any, kind: type[Averaging], loop: str) -> None:
    plain, module = kind(), kind()
    told = r"a hook at the start or the end of the evaluation writes to `net\..*They are as they were"
    if loop == "validate":
        with pytest.raises(MisconfigurationException, match=told):
            evaluate(trainer, module, LaserCallback(PLAN, report=False))
        if kind is OneHookOnly or module.kept:  # the user's own hook has run; its end, or not
            expected = {tuple(v.flatten().tolist()) for v in (*module.average, *plain.net.parameters())}
            assert all(tuple(p.flatten().tolist()) in expected for p in module.net.parameters())
        return
    torch.manual_seed(0)
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(plain, make_data(), make_data())
    torch.manual_seed(0)
    run = trainer(LaserCallback(PLAN, loops="fit", report=False), max_epochs=2, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="gives up the comparison of epoch 0, and training goes on"):
        run.fit(module, make_data(), make_data())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


# ---- tensors that steps write to -------------------------------------------------------------------------------------


class CodeBook(Toy):
    """A step that writes to a few elements of a parameter, as vector quantisation does."""

    first = 0  # the batch in which it begins
    behind = False

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.zeros(1000, 8), requires_grad=False)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        if batch_idx >= self.first:
            row = self.book.data[501] if self.behind else self.book[501]
            row += 1.0
        return output


class CodeBookView(CodeBook):
    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.zeros(8, 1000).mT, requires_grad=False)


class CodeBookOfAClass(CodeBook):
    """Of a subclass of Parameter."""

    class Own(nn.Parameter):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.book = self.Own(torch.zeros(1000, 8), requires_grad=False)


class CodeBookLate(CodeBook):
    first = 1


@pytest.mark.parametrize("kind", [CodeBook, CodeBookView, CodeBookOfAClass, CodeBookLate])
def test_a_few_written_elements_are_seen(trainer: Any, kind: type[CodeBook]) -> None:
    module = kind()
    with pytest.raises(MisconfigurationException, match="the evaluation step changes the parameter `book`"):
        evaluate(trainer, module, LaserCallback(PLAN, report=False))
    assert module.book[501].tolist() == [1.0] * 8  # as the user's own pass has left it


class Replaces(Toy):
    """A step that puts another parameter in the place of one."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        self.net.head.weight = nn.Parameter(self.net.head.weight.detach() * 0.9)
        return output


def test_a_replaced_parameter_is_seen_and_put_back(trainer: Any) -> None:
    module, plain = Replaces(), Toy()
    with pytest.raises(MisconfigurationException, match=r"changes the parameter `net\.head\.weight` for another"):
        evaluate(trainer, module, LaserCallback(PLAN, report=False))
    torch.testing.assert_close(module.net.head.weight, plain.net.head.weight * 0.9)  # once, by the user's own pass


class Renormed(Toy):
    """A version that grows with each pass, and a content that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8, max_norm=1.0)
        self.embedding(torch.arange(50))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.embedding(torch.arange(50))
        return super().validation_step(batch, batch_idx)


def test_a_write_that_changes_nothing_is_none(trainer: Any) -> None:
    got = evaluate(trainer, Renormed(), LaserCallback(PLAN, report=False))
    assert got["laser/delta/loss"] != 0


# ---- what a step returns and keeps -----------------------------------------------------------------------------------


class Keeps(Toy):
    """Returns what it keeps, and writes to it in the next pass."""

    def __init__(self) -> None:
        super().__init__()
        self.output: dict[str, Any] = {"acc": torch.zeros(4, dtype=torch.bool)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        right = super().validation_step(batch, batch_idx)["acc"]
        return self.keep(right)

    def keep(self, right: Tensor) -> Any:
        self.output["acc"] = right
        return self.output


class KeepsABuffer(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(8, dtype=torch.bool))

    def keep(self, right: Tensor) -> Any:
        self.right[: len(right)] = right
        return {"acc": self.right[: len(right)]}


class KeepsAList(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[bool] = []

    def keep(self, right: Tensor) -> Any:
        self.rows[:] = right.tolist()
        return {"acc": self.rows}


@pytest.mark.parametrize("kind", [Keeps, KeepsABuffer, KeepsAList])
def test_what_a_step_keeps_is_read_as_it_was_returned(trainer: Any, kind: type[Keeps]) -> None:
    rows = []
    for module in (Toy(), kind()):
        callback = LaserCallback(PLAN, report=False)
        evaluate(trainer, module, callback)
        examples = callback.result.examples.to_rows()
        rows.append([(row["original"]["acc"], row["laser"]["acc"]) for row in examples])
    assert rows[0] == rows[1]
    assert any(a != b for a, b in rows[0])


# ---- what hooks save, and what goes wrong in a pass ------------------------------------------------------------------


class SavesTheBest(Toy):
    """In the hook at the end, with more in the checkpoint than Lightning puts there."""

    folder: Path

    def on_validation_epoch_end(self) -> None:
        self.trainer.save_checkpoint(self.folder / f"{len(list(self.folder.iterdir()))}.ckpt")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {name: p.detach().clone() for name, p in self.named_parameters()}


def test_a_checkpoint_that_a_hook_saves_holds_the_original_weights(trainer: Any, tmp_path: Path) -> None:
    module = SavesTheBest()
    module.folder = tmp_path / "best"
    module.folder.mkdir()
    before = copy.deepcopy(dict(module.named_parameters()))
    evaluate(trainer, module, LaserCallback(PLAN, report=False))
    (file,) = module.folder.iterdir()  # the reduced pass has saved none
    saved = torch.load(file, weights_only=False)
    assert all(torch.equal(saved["mine"][name], value) for name, value in before.items())
    assert "save_checkpoint" not in vars(module.trainer)


def test_an_iterator_that_ends_in_the_reduced_pass_does_not_end_the_evaluation(trainer: Any) -> None:
    class Ends(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if int(torch.linalg.matrix_rank(self.net.encoder.layers[1].linear1.weight.detach())) < 8:
                next(iter(()))
            return super().validation_step(batch, batch_idx)

    with pytest.raises(ReducedPassError, match=r"fails on batch 0.*StopIteration"):
        evaluate(trainer, Ends(), LaserCallback(PLAN, report=False))


def test_a_handler_that_raises_is_no_failure_of_the_plan(trainer: Any) -> None:
    class TimeLimit(Exception):
        pass

    class Slow(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if int(torch.linalg.matrix_rank(self.net.encoder.layers[1].linear1.weight.detach())) < 8:
                signal.raise_signal(signal.SIGUSR1)
            return super().validation_step(batch, batch_idx)

    def handler(*_: Any) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeLimit):
            evaluate(trainer, Slow(), LaserCallback(PLAN, report=False))
        run = trainer(LaserCallback(PLAN, loops="fit", report=False), max_epochs=1, num_sanity_val_steps=0)
        with pytest.raises(TimeLimit):
            run.fit(Slow(), make_data(), make_data())
    finally:
        signal.signal(signal.SIGUSR1, before)
