"""Pictures and tables where they are wanted: files, TensorBoard, CSV, Weights & Biases (offline), the command line."""

from __future__ import annotations

import csv
import json

import pytest
from classifier import PLAN, compared, searched
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from laser_callback.cli.commands import main
from laser_callback.reports.loggers import publish, tables
from laser_callback.reports.page import save_page
from laser_callback.reports.pictures import figures, save_figures

PICTURES = {"map", "trades", "comparison", "spectra", "labels"}


@pytest.fixture(scope="module")
def search(result):
    return searched(result)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_show_what_there_is(result, search):
    assert set(figures(search)) == PICTURES
    assert set(figures(result)) == PICTURES - {"map", "trades"}
    assert set(figures(result, examples=[])) == {"comparison", "spectra"}
    assert set(figures(searched())) == {"map", "trades"}
    row = result["laser"]["<i>acc</i>"]
    (axis,) = figures(result)["comparison"].axes
    interval, point, zero = axis.lines
    assert list(interval.get_xdata()) == [100 * row.lower, 100 * row.upper]
    assert list(point.get_xdata()) == [100 * row.delta]
    assert list(zero.get_xdata()) == [0, 0]


@pytest.mark.parametrize(
    ("format", "start"),
    [pytest.param("png", b"\x89PNG", marks=pytest.mark.slow), ("svg", b"<svg"), ("pdf", b"%PDF")],
)
def test_files(result, search, tmp_path, format, start):
    found, names = (search, PICTURES) if format == "png" else (result, PICTURES - {"map", "trades"})
    paths = save_figures(found, tmp_path / "new", format)
    assert {path.stem for path in paths} == names
    assert all(path.read_bytes().startswith(start) for path in paths)
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)


def test_drawing_leaves_matplotlib_as_it_is(search):
    from matplotlib import pyplot

    before = dict(pyplot.rcParams)
    figures(search)
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []


# ---- loggers ---------------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    result = compared(publish=True, logger=logger)
    folder = tmp_path / "lightning_logs" / "version_0" / "laser-0"
    assert {path.name for path in folder.iterdir()} == {"comparison.csv", "comparison.png", "spectra.png", "labels.png"}
    with (folder / "comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    row = result["laser"]["<i>acc</i>"]
    assert [r["control"] for r in rows] == ["", "zeroed", "random", "noise"]
    assert rows[0]["plan"] == PLAN
    assert float(rows[0]["lower"]) == row.lower
    assert int(rows[0]["fixed"]) == row.fixed
    noise = result.controls["laser"]["noise"]
    assert (float(rows[3]["reduced"]), rows[3]["plan"]) == (noise["<i>acc</i>"].reduced, noise.plan)
    assert (rows[0]["ahead_delta"], float(rows[3]["ahead_delta"])) == ("", noise.ahead[0].delta)
    assert float(rows[3]["ahead_lower"]) == noise.ahead[0].lower
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as stream:
        (scalars,) = csv.DictReader(stream)
    assert float(scalars["laser/<i>acc</i>"]) == pytest.approx(row.reduced)


def test_tensorboard(tmp_path, search):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    publish(search, logger, step=7)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"laser/{name}" for name in PICTURES}
    assert set(events.Tags()["tensors"]) == {"laser/comparison/text_summary", "laser/candidates/text_summary"}
    (event,) = events.Tensors("laser/comparison/text_summary")
    assert event.step == 7
    text = event.tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}  # no cell makes a column
    assert "<" not in text


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="laser")
    result = compared(publish=True, logger=logger)
    logger.experiment.finish()
    (table,) = tmp_path.rglob("*.table.json")
    content = json.loads(table.read_text())
    first = dict(zip(content["columns"], content["data"][0], strict=True))
    row = result["laser"]["<i>acc</i>"]
    assert (first["metric"], first["fixed"], first["lower"]) == ("<i>acc</i>", row.fixed, row.lower)
    pictures = {path.name.split("_")[0] for path in tmp_path.rglob("media/images/**/*.png")}
    assert pictures == {"comparison", "spectra", "labels"}


def test_other_loggers_are_told_apart(result, recwarn):
    class Other(DummyLogger):
        pass

    publish(result, [Other()])
    assert any("Other gets no tables and pictures" in str(warning.message) for warning in recwarn)


def test_tables_are_never_empty(search):
    assert set(tables(search)) == {"comparison", "candidates"}
    assert set(tables(searched())) == {"candidates"}
    assert len(tables(search)["candidates"]) == len(search.candidates)


# ---- the callback's files and the command line -----------------------------------------------------------------------


def test_the_report_is_named_by_its_ending(tmp_path):
    result = compared(report=str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    again = compared(report=str(tmp_path / "r.json"))
    assert again["laser"].rows == result["laser"].rows
    lines = (tmp_path / "r.examples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.examples.to_rows()
    with pytest.raises(MisconfigurationException, match=r"ending in \.json or \.html, got 'r\.txt'"):
        compared(report="r.txt")


def test_the_command_makes_what_the_callback_makes(tmp_path, capsys):
    result = compared(report=str(tmp_path / "r.json"))
    capsys.readouterr()
    page = tmp_path / "page.html"
    code = main(["report", str(tmp_path / "r.json"), "--html", str(page), "--pictures", str(tmp_path / "p"), "--json"])
    assert code == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["written"]) == {
        str(page),
        *(str(tmp_path / "p" / f"{n}.png") for n in PICTURES - {"map", "trades"}),
    }
    assert "<i>acc</i>" in answer["verdict"]
    save_page(result, tmp_path / "direct.html")
    assert page.read_text() == (tmp_path / "direct.html").read_text()


def test_the_command_prints_where_nothing_is_written(tmp_path, capsys, result, search):
    for found, expected in ((result, "original against reduced"), (search, "gain against fluency")):
        found.to_json(tmp_path / "r.json")
        assert main(["report", str(tmp_path / "r.json")]) == 0
        assert expected in capsys.readouterr().out


def test_the_command_refuses_other_files(tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"reductions": []}')
    assert main(["report", str(tmp_path / "r.json")]) == 2
    assert "is no result: expected" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.json")]) == 2
    searched().to_json(tmp_path / "r.json")
    assert main(["report", str(tmp_path / "r.json"), "--examples", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
