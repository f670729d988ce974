"""Answers that are written, in a whole comparison: the oracle, the claim, what is kept of each example, and reports."""

from __future__ import annotations

import csv
import json
import warnings
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.cli.lightning import LaserBlock
from laser_callback.compare import writing
from laser_callback.data import Generation
from laser_callback.reports import save_page
from laser_callback.reports.loggers import publish
from laser_callback.reports.terminal import plain
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import flips

PLAN = "3.mlp@0.95"
GENERATION = Generation(max_new_tokens=20, extract="([a-z]+)")


def rows(model: Any, n: int = 11) -> list[dict[str, Any]]:
    """Facts of which the original gets some right, and the reduced model others."""
    found = [
        {"id": f"f{i}", "prompt": f"{SENTENCES[i % 3][: 8 + 3 * i].strip()} {i} is", "answer": "x"} for i in range(n)
    ]
    data = FactsDataModule(found, tiny_tokenizer(), generation=GENERATION, batch_size=n)
    data.setup()
    (batch,) = data.val_dataloader()

    def said() -> list[str]:
        with torch.inference_mode():
            written = writing.write(model, tiny_tokenizer(), batch["asked"])
        (scored,) = batch["asked"]["judged"](written.texts, batch)
        return [one.said for one in scored.judged]

    before = said()
    with reduced(model, PLAN):
        after = said()
    for i, row in enumerate(found):
        row["answer"] = (before[i], after[i], "no")[i % 3] or "none"
        row["answers"] = ["nothing", "7"]
    return found


MODEL = tiny_causal_lm()
ROWS = rows(MODEL)


@pytest.fixture
def model() -> Any:
    return MODEL


def compared(trainer: Any, model: Any, *callbacks: Any, **options: Any) -> tuple[LaserModule, dict[str, float]]:
    module = LaserModule(model, tiny_tokenizer(), **options)
    data = FactsDataModule(ROWS, module.tokenizer, generation=GENERATION, batch_size=4)
    (logged,) = trainer(*callbacks).validate(module, datamodule=data, verbose=False)
    return module, logged


def test_the_oracle(trainer, model):
    module, logged = compared(trainer, model, plan=PLAN, report=False)
    own = {f"{part}{key}" for key in ("exact_match", "log_loss") for part in ("", "laser/", "laser/delta/")}
    assert set(logged) == own | {"laser/answer_kl", "laser/answer_top1_agreement"}  # of what should be written
    _, before = compared(trainer, model)
    with reduced(model, PLAN):
        _, after = compared(trainer, model)
    assert before == {key: logged[key] for key in ("exact_match", "log_loss")}
    assert after["exact_match"] == logged["laser/exact_match"]
    assert after["log_loss"] == pytest.approx(logged["laser/log_loss"], abs=1e-6)
    row = module.result["laser"]["exact_match"]
    assert row.role == "primary"
    assert row.test == "exact McNemar"
    assert row.fixed > 0 < row.broken
    assert module.result["laser"].prior_checks["exact_match"].metric == "exact_match"
    replay = module.result["laser"].replay
    assert "of 11 continuations are the original's" in replay
    assert "run:" not in replay


def test_without_replay_each_writes_for_itself(trainer, model, monkeypatch):
    monkeypatch.setattr(writing, "_Reduced", None)
    callback = LaserCallback(PLAN, replay=False, report=False, primary="exact_match")
    _, logged = compared(trainer, model, callback)
    monkeypatch.undo()
    other = LaserCallback(PLAN, report=False, primary="exact_match")
    _, expected = compared(trainer, model, other)
    assert logged == pytest.approx(expected, abs=1e-6)
    rows = [callback.result.examples.to_rows() for callback in (callback, other)]
    texts = [[[row[arm]["continuation"] for arm in ("original", "laser")] for row in found] for found in rows]
    assert texts[0] == texts[1]


def test_two_callbacks_and_several_plans(trainer, model):
    one = LaserCallback({"a": PLAN, "b": "1.mlp@0.5"}, report=False, primary="exact_match")
    two = LaserCallback("2.q_proj@0.5", key_prefix="other", report=False, primary="exact_match")
    _, logged = compared(trainer, model, one, two)
    for key, plan in (("laser/a", PLAN), ("laser/b", "1.mlp@0.5"), ("other", "2.q_proj@0.5")):
        with reduced(model, plan):
            _, alone = compared(trainer, model)
        assert logged[f"{key}/exact_match"] == alone["exact_match"], plan
    for result in (one.result["a"], one.result["b"], two.result["other"]):
        assert "written alone" not in result.replay


def test_what_is_kept_of_each_example(trainer, model, tmp_path):
    module, _ = compared(trainer, model, plan=PLAN, report=False)
    result = module.result
    kept = result.examples.to_rows()
    assert len(kept) == 11
    for row in kept:
        for arm in ("original", "laser"):
            assert row[arm]["exact_match"] in (0, 1)
            assert row[arm]["near_ties"] == 0
            said = row[arm]["prediction/exact_match"]
            assert (said == row["answer/exact_match"]) == (row[arm]["exact_match"] == 1)
            assert said in row[arm]["continuation"].casefold() or not said
    found = flips(kept, "laser", result["laser"]["exact_match"])
    assert all(flip.written_before != flip.written_after for flip in found)
    assert len(found) == result["laser"]["exact_match"].fixed + result["laser"]["exact_match"].broken

    text = plain(result, 120)
    assert "original wrote" in text
    assert found[0].id in text
    save_page(result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "reduced wrote" in page
    rewritten = flips(kept, "laser", result["laser"]["exact_match"], rewritten=True)
    assert rewritten[: len(found)] == found
    assert {flip.outcome for flip in rewritten[len(found) :]} <= {"still wrong", "still right"}
    assert page.count("<mark>") == 2 * len(rewritten)
    assert "max_new_tokens" in page
    again = LaserResult.from_dict(result.to_dict())
    again.examples.kept = kept
    row = result["laser"]["exact_match"]
    assert f"exact_match: {row.fixed} fixed, {row.broken} broken; the first of each" in plain(again, 80)


def test_loggers_get_what_both_wrote(trainer, model, tmp_path):
    module, _ = compared(trainer, model, plan=PLAN, report=False)
    result = module.result
    found = flips(result.examples.to_rows(), "laser", result["laser"]["exact_match"])
    publish(result, [CSVLogger(tmp_path, "", ""), board := TensorBoardLogger(tmp_path, "", "")])
    with (tmp_path / "laser-0" / "written.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["id"], row["outcome"] == "fixed") for row in rows] == [(flip.id, flip.fixed) for flip in found]
    for row, flip in zip(rows, found, strict=True):
        assert (row["original"], row["reduced"]) == (flip.written_before, flip.written_after)
    board.experiment.flush()
    (file,) = tmp_path.glob("events*")
    assert file.read_bytes().count(b"<strong>") == 2 * len(found) > 0


def test_predict_and_another_primary(trainer, model):
    module = LaserModule(model, tiny_tokenizer(), plan=PLAN, primary="log_loss", report=False)
    data = FactsDataModule(ROWS, module.tokenizer, generation=GENERATION, batch_size=11)
    (batch,) = trainer().predict(module, data)
    assert len(batch["continuation"]) == len(batch["exact_match"]) == 11
    trainer().validate(module, data, verbose=False)
    assert module.result.primary == "log_loss"


def test_a_prompt_without_room_is_refused_before_the_work(trainer, model, monkeypatch):
    monkeypatch.setattr(LaserModule, "_step", None)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    data = FactsDataModule(ROWS, tokenizer, generation=Generation(max_new_tokens=505))
    with pytest.raises(ValueError, match="leave room for the prompts in the model's context of 512"):
        trainer().validate(LaserModule(model, tokenizer), data, verbose=False)


def test_where_no_answer_is_found_that_is_said(trainer, model):
    nothing = Generation(max_new_tokens=3, extract="#### (.+)")
    module = LaserModule(model, tiny_tokenizer(), plan=PLAN, report=False)
    with pytest.warns(UserWarning, match="`exact_match` judges nothing: of 11 continuations none holds an answer"):
        trainer().validate(module, FactsDataModule(ROWS, module.tokenizer, generation=nothing), verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*judges nothing")
        compared(trainer, model, plan=PLAN, report=False)


def test_the_block_of_yaml_is_judged_by_what_its_module_is_judged_by(trainer, model):
    for block in (LaserBlock(PLAN, report=False), LaserBlock(PLAN, report=False, primary="log_loss")):
        declared = block.primary
        compared(trainer, model, block)
        assert block.result.primary == (declared or "exact_match")


@pytest.mark.slow
def test_yaml_and_options_are_those_of_python(tmp_path, deep_lm, monkeypatch):
    from laser_callback.cli.commands import main

    monkeypatch.chdir(tmp_path)
    settings = {"max_new_tokens": 5, "stop": ["\n"], "extract": r"(\w+)", "match": "last", "normalise": ["case"]}
    model = {"class_path": "laser_callback.LaserModule", "init_args": {"model": str(deep_lm), "report": False}}
    arguments = {"path": str(deep_lm / "facts.jsonl"), "limit": 6, "generation": settings}
    data = {"class_path": "laser_callback.FactsDataModule", "init_args": arguments}
    laser = {"plan": "28.fc_up@0.01", "primary": "exact_match", "report": "result.json"}
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    config = {"model": model, "data": data, "laser": laser, "trainer": trainer}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["validate", "--config", "run.yaml"]) == 0
    by_yaml = (tmp_path / "result.examples.jsonl").read_text()
    options = [f"--generation.{k}={v if isinstance(v, (int, str)) else json.dumps(v)}" for k, v in settings.items()]
    demo = ["demo", "--model", str(deep_lm), "--facts", str(deep_lm / "facts.jsonl"), "--limit", "6"]
    assert main([*demo, "--plan", "28.fc_up@0.01", "--controls", "false", "--output", "demo.json", *options]) == 0
    assert (tmp_path / "demo.examples.jsonl").read_text() == by_yaml


def test_an_ab_test_lets_each_write_by_its_model(trainer, model):
    module = LaserModule(model, tiny_tokenizer(), plan=PLAN, ab_fraction=0.5, report=False)
    data = FactsDataModule(ROWS, module.tokenizer, generation=GENERATION, batch_size=11)
    (batch,) = trainer().predict(module, data)
    plain = LaserModule(model, tiny_tokenizer())
    (original,) = trainer().predict(plain, data)
    with reduced(model, PLAN):
        (other,) = trainer().predict(plain, data)
    assert {"original", "reduced"} == set(batch["arm"])
    for i, arm in enumerate(batch["arm"]):
        expected = original if arm == "original" else other
        for name in ("continuation", "exact_match", "prediction/exact_match"):
            assert batch[name][i] == expected[name][i]
    assert {row.metric for row in module.ab_result.rows} == {"exact_match", "log_loss"}
    assert [row.metric for row in module.ab_result.rows if row.role == "primary"] == ["exact_match"]
