"""`laser-callback compare`: what it prints, writes and refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finished_logs import lm_eval_folder, sample, write_lines
from rich import get_console

from laser_callback.cli.commands import main
from laser_callback.results import LaserResult

GOLD = [i // 7 % 4 for i in range(84)]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Folders of three runs: b is right on the first 60 documents, a on every third, c as a but for two of them."""
    monkeypatch.chdir(tmp_path)
    right = {"a": lambda i: i % 3 == 0, "b": lambda i: i < 60, "c": lambda i: (i % 3 == 0) != (i in (3, 4))}
    for name, is_right in right.items():
        rows = [sample(i, gold, gold if is_right(i) else (gold + 1 + i % 3) % 4) for i, gold in enumerate(GOLD)]
        tasks = {"coins": rows, "more": rows[::2]}
        lm_eval_folder(tmp_path / name, f"me/{'b' if name == 'b' else 'a'}", tasks)
    return {name: str(tmp_path / name) for name in right}


def test_the_report_names_the_runs(logs, capsys, monkeypatch):
    monkeypatch.setattr(get_console(), "_width", 120)
    assert main(["compare", logs["a"], logs["b"], "--tasks", "coins", "--noise", logs["c"]]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "with me/b in place of me/a, acc rises from 33.3% to 71.4% on 84 examples (p" in out
    assert "; by arithmetic alone 2 of 84 outcomes of me/a flip (1 up, 1 down), and " in out
    assert "me/a against me/b metric a b delta 95 % interval" in out
    assert "me/b says the right answer 71.4%" in out
    assert "delta = me/b - me/a" in out
    assert not {"reduced", "original", "passes"} & set(out.split())


def test_files_hold_the_same_as_json(logs, capsys):
    arguments = ["compare", logs["a"], logs["b"], "--html", "page.html", "--output", "result.json", "--json"]
    assert main(arguments) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(Path("result.json").read_text())
    assert {key: printed[key] for key in written} == written
    assert printed["names"] == ["me/a", "me/b"]
    assert [row["metric"] for row in written["arms"]["laser"]["rows"]] == ["mean over tasks", "coins/acc", "more/acc"]
    page = Path("page.html").read_text()
    assert "How to apply it" not in page
    assert "<bdi>me/a</bdi> against <bdi>me/b</bdi>" in page
    assert "said by me/a" in page
    assert main(["report", "result.json", "--html", "again.html"]) == 0
    assert Path("again.html").read_text() == page
    assert LaserResult.from_json("result.json").is_of_runs


def test_other_prompts_are_refused(logs, capsys):
    path = next(Path(logs["b"]).rglob("samples_coins*"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["prompt_hash"] = "other"
    write_lines(path, rows)
    assert main(["compare", logs["a"], logs["b"]]) == 2
    told = capsys.readouterr().err
    assert (
        "error: both runs must be asked the same, but of the task coins, example '5' the `prompt_hash` differs" in told
    )


def test_a_result_of_two_runs_is_of_no_plan(logs, capsys, deep_lm):
    assert main(["compare", logs["a"], logs["b"], "--output", "result.json"]) == 0
    arguments = ["--model", str(deep_lm), "--plan", "1.mlp@0.1", "--output", "out", "--result", "result.json"]
    assert main(["export", *arguments]) == 2
    assert "`result` must be about the plan 1.mlp@0.1, got one of two finished runs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("page", [[], ["--html", "page.html"]])
def test_no_torch_is_imported(logs, page):
    code = (
        "import sys; from laser_callback.cli.commands import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'lightning', 'transformers'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, "compare", logs["a"], logs["b"], *page]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
