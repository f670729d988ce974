"""A search of one of the paper's tasks selects and judges by the task's metric; one that the user names wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_causal_lm, tiny_tokenizer

from laser_callback import LaserModule, LaserSearch
from laser_callback.data.sets import ExampleSets
from laser_callback.data.tasks import TASKS, TaskDataModule
from laser_callback.results.search import SearchResult

QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": False, "controls": False}
LABELS = ("SUPPORTS", "REFUTES")


def _rewrite(i: int) -> dict[str, Any]:
    return {
        "prompt": "{} comes from",
        "subject": f"Person {i}",
        "target_true": {"str": ("France", "Italy")[i % 2]},
        "relation_id": "P27",
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "fever": [{"id": i, "claim": f"Number {i} is odd.", "label": LABELS[i % 2]} for i in range(60)],
    "counterfact": [
        {
            "case_id": i,
            "requested_rewrite": _rewrite(i),
            "paraphrase_prompts": [f"Then {i} went to", f"A {i} in"],
        }
        for i in range(60)
    ],
    "wikidata_qa": [{"inputs": f"Person {i} lives in ", "targets": [("Rome", "Paris")[i % 2]]} for i in range(60)],
    "epistemic_reasoning": [
        {"inputs": f"Premise {i}. Relation:", "targets": [("entailment", "non-entailment")[i % 2]]} for i in range(60)
    ],
}


def _data(task: Any, folder: Path) -> TaskDataModule:
    (path := folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    return TaskDataModule(task, tiny_tokenizer(), source=path)


def _searched(data: Any, **options: Any) -> SearchResult:
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    return LaserSearch(module, data, **{**QUIET, "method": "paper", "within": "3.mlp", **options}).run()


@pytest.mark.parametrize("task", ROWS)
def test_the_papers_procedure_selects_and_judges_by_the_papers_metric(task, tmp_path):
    result = _searched(_data(task, tmp_path))
    assert result.objective == (TASKS[task].metric,)
    assert (result.settings["loss"], result.sets) == ("log_loss", {"race": 12, "confirm": 48})
    tried = [candidate for candidate in result.candidates if candidate.examples]
    best = max(tried, key=lambda candidate: (candidate.gain.delta, -candidate.loss.delta))
    if result.found is not None:
        assert result.found == best.plan
        assert result.confirmed.primary == TASKS[task].metric
        assert TASKS[task].metric in result.reason


def test_fevers_original_chooses_between_true_and_false(tmp_path):
    result = _searched(_data("fever", tmp_path), rhos=(0.01, 0.5))
    row = result.confirmed["laser"]["choice_accuracy"]
    assert 0.3 < row.original < 0.7  # a random model guesses, and says neither of the two words first
    assert result.confirmed["laser"]["first_token_accuracy"].original < 0.1


def test_what_the_user_names_wins_in_the_sets_too(tmp_path):
    named = _searched(_data("fever", tmp_path), objective="first_token_accuracy", rhos=(0.5,))
    assert named.objective == ("first_token_accuracy",)
    dealt = ExampleSets.of(_data("fever", tmp_path), sizes={"race": 30, "confirm": 30})
    assert _searched(dealt, method="exhaustive", rhos=(0.5,)).objective == ("choice_accuracy",)
