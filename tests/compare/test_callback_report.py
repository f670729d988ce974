"""The report of a comparison: in files, in a terminal, beside progress bars, on rank zero."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import lightning.pytorch as pl
import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torchmetrics.classification import MulticlassAccuracy
from toy import CLASSES, PLAN, Toy, evaluate, make_data

from laser_callback import LaserCallback, LaserPlan
from laser_callback.reports.terminal import plain
from laser_callback.results.comparison import LaserResult


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


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_what_fit_shows_each_epoch_is_exploratory_and_says_so(trainer, loop):
    callback = LaserCallback(PLAN, loops=(loop,), primary="acc")
    getattr(trainer(callback, max_epochs=2), loop)(Toy(), *[make_data()] * (2 if loop == "fit" else 1))
    result = callback.result
    assert result.is_one_look_of_several is result.to_dict()["is_one_look_of_several"] is (loop == "fit")
    assert result.provenance.get("epoch") == (1 if loop == "fit" else None)
    assert ("p is not corrected for their number" in " ".join(plain(result).split())) is (loop == "fit")
    assert (result["laser"]["acc"].verdict == "exploratory") is (loop == "fit")
    assert ("of which nothing is claimed" in " ".join(plain(result).split())) is (loop == "fit")
    assert ("carries the claim" in " ".join(plain(result).split())) is (loop == "validate")
    assert LaserResult.from_dict(json.loads(json.dumps(result.to_dict()))).is_one_look_of_several is (loop == "fit")


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
