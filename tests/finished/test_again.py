"""The original once more under other arithmetic: what differs is told, and of what is the same that it is."""

from __future__ import annotations

import json

import pytest
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserModule
from laser_callback.cli.commands import main
from laser_callback.finished import rerun
from laser_callback.reports.row_text import noise_text

PLAN = "*.mlp@0.2"


@pytest.fixture(scope="module")
def compared(deep_lm, tmp_path_factory):
    """A module, data in batches of another size, and the result of a comparison with its folder."""
    folder = tmp_path_factory.mktemp("live")
    module = LaserModule(str(deep_lm), plan=PLAN, report=str(folder / "one.json"))
    rows = [{"id": f"f{i}", "prompt": f"The capital of {i} is", "answer": "Paris"} for i in range(20)]

    def data(batch_size):
        return FactsDataModule(rows, module.tokenizer, batch_size=batch_size)

    quiet_trainer().validate(module, data(8), verbose=False)
    return module, data, module.result, folder


def test_the_same_arithmetic_gives_the_same(compared):
    module, data, result, _ = compared
    again = rerun(result, module, data(8), accelerator="cpu")
    rows = {row.metric: row for row in again.rerun.rows}
    assert {row.delta for row in rows.values()} == {0.0}
    assert rows["log_loss"].n == result["laser"]["log_loss"].n == 20
    assert rows["first_token_accuracy"].original == result["laser"]["first_token_accuracy"].original
    assert noise_text(again, "laser").startswith(
        "by arithmetic alone 0 of 20 outcomes of the original flip (0 up, 0 down)"
    )
    assert result.rerun is None


def test_another_precision_differs(compared):
    module, data, result, _ = compared
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    again = rerun(result, module, data(5), precision="bf16-mixed", accelerator="cpu")
    assert again.rerun["log_loss"].delta != 0
    assert again.rerun.plan == "precision bf16-mixed, cpu"
    assert again["laser"] is result["laser"]
    assert all(weight.equal(before[name]) for name, weight in module.state_dict().items())


def test_examples_of_another_run_of_a_comparison(compared, capsys, tmp_path):
    *_, folder = compared
    lines = [json.loads(line) for line in (folder / "one.examples.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        line["original"]["first_token_accuracy"] = 1 - line["original"]["first_token_accuracy"]
    (tmp_path / "two.examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder / "one.json"), "--noise", str(tmp_path / "two.examples.jsonl"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["verdict"]
    assert "; by arithmetic alone 3 of 20 outcomes of the original flip (3 up, 0 down), and " in told


def test_without_examples_there_is_nothing_to_hold_it_against(compared, capsys, tmp_path):
    *_, folder = compared
    (tmp_path / "one.json").write_text((folder / "one.json").read_text())
    noise = str(folder / "one.examples.jsonl")
    assert main(["report", str(tmp_path / "one.json"), "--noise", noise]) == 2
    assert "`noise` is held against the examples of a comparison" in capsys.readouterr().err
