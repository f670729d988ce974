"""The README's code runs, its plans parse, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from reader import HUB_NAME, Classifier
from torch.utils.data import DataLoader

from laser_callback import LaserPlan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_callback_example(deep_lm, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = pl.LightningDataModule()
    rows = [{"x": torch.arange(i, i + 4), "label": i % 4, "id": i} for i in range(12)]
    data.val_dataloader = lambda: DataLoader(rows, batch_size=5)
    module = Classifier(deep_lm)
    scope = {"module": module, "data": data}
    exec(BLOCKS[0], scope)
    assert {"acc", "laser/acc", "laser/delta/acc"} <= set(scope["trainer"].callback_metrics)

    methods = {}
    exec(re.sub(r"^    ", "", BLOCKS[1], flags=re.MULTILINE), methods)
    monkeypatch.setattr(Classifier, "validation_step", methods["validation_step"])
    exec(BLOCKS[0], scope)
    result = scope["trainer"].callbacks[0].result
    assert result["laser"]["acc"].test == "exact McNemar"
    assert result["laser"]["acc"].n == 12


@pytest.mark.slow
def test_module_example(deep_lm, monkeypatch):
    monkeypatch.chdir(deep_lm)
    assert HUB_NAME in BLOCKS[2]
    scope = {}
    exec(BLOCKS[2].replace(HUB_NAME, str(deep_lm)), scope)
    result = scope["module"].result
    assert result["laser"]["first_token_accuracy"].n == 60
    assert result["laser"]["perplexity"].kind == "log_ratio"
    assert set(result.controls["laser"]) == {"zeroed", "random", "noise"}


@pytest.mark.slow
def test_search_example(deep_lm, own_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("facts.jsonl", "text.txt"):
        (tmp_path / name).write_text((deep_lm / name).read_text())
    scope = {}
    exec(BLOCKS[3].replace(HUB_NAME, str(deep_lm)), scope)
    assert scope["found"].sets == {"screen": 6, "race": 18, "confirm": 24, "guard": 12}
    assert (tmp_path / "search" / "result.json").is_file()


def test_every_block_is_one_of_these():
    assert len(BLOCKS) == 4


def test_plans_of_the_table_parse():
    table = README[README.index("| text | means |") : README.index("Kinds are those")]
    texts = [text for row in table.splitlines()[2:] for text in re.findall(r"`([^`]+@[^`]+)`", row.split(" | ")[0])]
    assert len(texts) >= 10
    for text in texts:
        assert LaserPlan.parse(str(LaserPlan.parse(text))) == LaserPlan.parse(text)


def test_commands_exist():
    for script in re.findall(r"bash (\S+\.sh)", README):
        assert (ROOT / script).is_file()
    for script in re.findall(r"python (tests/\S+\.py)", README):
        assert (ROOT / script).is_file()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).is_file(), link
