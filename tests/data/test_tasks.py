"""The paper's tasks: prompts to the letter, filters, split; on real rows where a folder of them is found.

The folder is ``$LASER_CALLBACK_TEST_DATA``, else ``../shared/data`` beside the checkout.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest
from tiny import tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer

from laser_callback import LaserModule, LaserPlan
from laser_callback.data.facts import read_facts
from laser_callback.data.scoring import METRICS
from laser_callback.data.tasks import TASKS, Source, TaskDataModule, TaskName

DATA = Path(os.environ.get("LASER_CALLBACK_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs a folder of real rows, there is none at {DATA}")


def facts_of(task, rows, tmp_path):
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TASKS[task].facts(path)


# ---- each task's rows ------------------------------------------------------------------------------------------------


def test_counterfact(tmp_path):
    rewrite = {"prompt": "{} plays as", "subject": "Ann", "target_true": {"str": "goalkeeper"}, "relation_id": "P413"}
    row = {
        "case_id": 7,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["Born in 1990. Ann plays as ", "Ann is a"],
    }
    (path := tmp_path / "counterfact.json").write_text(json.dumps([row]))  # the public file is one list
    (fact,) = TASKS["counterfact"].facts(path)
    assert (fact.prompt, fact.answer, fact.subject, fact.group) == ("Ann plays as", "goalkeeper", "Ann", "P413")
    assert fact.paraphrases == ("Born in 1990. Ann plays as", "Ann is a")


def test_hotpotqa(tmp_path):
    texts = ["Who? ", "Say who.", "Who"]
    rows = [{"id": str(i), "question": text, "answer": " Ann "} for i, text in enumerate(texts)]
    facts = facts_of("hotpotqa", rows, tmp_path)
    assert [f.prompt for f in facts] == ["Who? The answer is", "Say who. The answer is", "Who? The answer is"]
    assert facts[0].answer == "Ann"


def test_fever_leaves_out_what_is_unknown_repeated_or_contradictory(tmp_path):
    claims = [
        ("A.", "SUPPORTS"),
        ("B", "REFUTES"),
        ("C.", "NOT ENOUGH INFO"),
        ("A.", "SUPPORTS"),
        ("D.", "SUPPORTS"),
        ("D.", "REFUTES"),
        ("B", "NOT ENOUGH INFO"),
    ]
    rows = [{"id": i, "claim": claim, "label": label} for i, (claim, label) in enumerate(claims)]
    first, second = facts_of("fever", rows, tmp_path)
    assert first.prompt == "Consider the following claim: A. Is this claim true or false. The claim is"
    assert second.prompt == "Consider the following claim: B. Is this claim true or false. The claim is"
    assert (first.answer, second.answer, first.choices) == ("true", "false", ("true", "false"))


def test_bios(tmp_path):
    rows = [
        {"hard_text": "She paints", "profession": 14, "gender": 1},
        {"hard_text": "He sues.", "profession": 2, "gender": 0},
    ]
    woman, man = facts_of("bios_gender", rows, tmp_path)
    question = "Is the person in this text a male or female? The gender of this person is"
    assert woman.prompt == f"Consider the following text: She paints. {question}"
    assert man.prompt == f"Consider the following text: He sues. {question}"
    assert (woman.answer, man.answer, man.choices) == ("female", "male", ("male", "female"))
    (painter,) = facts_of("bios_profession", rows, tmp_path)  # an attorney is none of the eight
    assert painter.answer == "painter"
    assert painter.prompt.endswith(
        "What is the profession of the person in this text? The profession of this person is"
    )
    assert painter.choices == (
        "journalist",
        "poet",
        "composer",
        "model",
        "teacher",
        "architect",
        "painter",
        "professor",
    )


def test_truthfulqa(tmp_path):
    row = {"question": "Is it?", "mc2_targets": {"choices": ["Yes.", "No"], "labels": [1, 0]}}
    yes, no = facts_of("truthfulqa", [row], tmp_path)
    assert yes.prompt == "Is it? Yes.Is this statement true or false? This statement is"
    assert no.prompt == "Is it? No.Is this statement true or false? This statement is"
    assert (yes.answer, no.answer) == ("true", "false")
    assert yes.subject == no.subject  # so that a split never tells the one by the other


def test_bigbench(tmp_path):
    rows = [{"inputs": "Premise. Relation: ", "targets": ["entailment"]}]
    (fact,) = facts_of("epistemic_reasoning", rows, tmp_path)
    assert (fact.prompt, fact.choices) == ("Premise. Relation:", ("entailment", "non-entailment"))
    rows = [{"inputs": "Bern is in", "targets": ["Switzerland"]}, {"inputs": "Ann is", "targets": ["tall", "old"]}]
    assert [f.answer for f in facts_of("wikidata_qa", rows, tmp_path)] == ["Switzerland"]


# ---- real rows -------------------------------------------------------------------------------------------------------


def _fever_row(fact):
    claim = fact.prompt.removeprefix("Consider the following claim: ").removesuffix(
        " Is this claim true or false. The claim is"
    )
    return {"id": fact.id, "claim": claim, "label": {"true": "SUPPORTS", "false": "REFUTES"}[fact.answer]}


def _counterfact_row(fact):
    prompt = fact.prompt.replace(fact.subject, "{}")
    rewrite = {
        "prompt": prompt,
        "subject": fact.subject,
        "target_true": {"str": fact.answer},
        "relation_id": fact.group,
    }
    return {"case_id": fact.id, "requested_rewrite": rewrite, "paraphrase_prompts": list(fact.paraphrases)}


def _truthfulqa_row(fact):
    said = fact.prompt.removesuffix(" Is this statement true or false? This statement is")
    question, _, answer = said.partition("? ")
    return {"question": f"{question}?", "mc2_targets": {"choices": [answer], "labels": [fact.answer == "true"]}}


ROWS = {
    "counterfact": ("counterfact", _counterfact_row),
    "hotpotqa": (
        "hotpotqa",
        lambda f: {"id": f.id, "question": f.prompt[: -len(" The answer is")], "answer": f.answer},
    ),
    "fever": ("fever", _fever_row),
    "truthfulqa": ("truthfulqa_true_false", _truthfulqa_row),
    "epistemic_reasoning": ("bigbench_epistemic_reasoning", lambda f: {"inputs": f.prompt, "targets": [f.answer]}),
    "wikidata_qa": ("bigbench_qa_wikidata", lambda f: {"inputs": f.prompt, "targets": [f.answer]}),
}


@needs_data
@pytest.mark.parametrize("task", ROWS)
def test_real_rows_give_the_prompts_that_others_made_of_them(task, tmp_path):
    name, row_of = ROWS[task]
    wanted = read_facts(DATA / f"{name}.jsonl")
    got = facts_of(task, [row_of(fact) for fact in wanted], tmp_path)
    assert len(got) == len(wanted) >= 500
    for fact, other in zip(got, wanted, strict=True):
        prompt = fact.prompt.replace("Is this statement", " Is this statement")  # the paper's code forgets this space
        assert (prompt if task == "truthfulqa" else fact.prompt) == other.prompt
        assert (fact.answer, fact.paraphrases, fact.choices) == (other.answer, other.paraphrases, other.choices)


# ---- all tasks -------------------------------------------------------------------------------------------------------


def test_table_1_and_metrics():
    cells = [cell for task in TASKS.values() for cell in task.published.values()]
    assert len(cells) == 24
    assert sum(cell.reduced_accuracy > cell.accuracy for cell in cells) == 22  # as counted on the printed table
    assert TASKS["fever"].published["gpt-j-6b"].plan == LaserPlan.parse("24.fc_in@0.01")
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    assert get_args(TaskName) == tuple(TASKS)


def test_bad_rows_and_names(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: .*label is not among id, prompt"):
        facts_of("fever", [{"id": 1, "prompt": "A"}], tmp_path)
    with pytest.raises(ValueError, match="none of use"):
        facts_of("fever", [{"id": 1, "claim": "A", "label": "NOT ENOUGH INFO"}], tmp_path)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rows\.json: expected a list, got"):
        TASKS["fever"].facts(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"one of counterfact, .*got 'fact'"):
        TaskDataModule("fact", tiny_tokenizer())
    with pytest.raises(ValueError, match="'all', 'validation' or 'test'"):
        TaskDataModule("fever", tiny_tokenizer(), part="train")


def test_offline_is_said_with_its_cure(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match=r"cannot fetch https://huggingface.co/datasets/truthfulqa/.*`source`"):
        TASKS["truthfulqa"].facts()


@pytest.fixture
def fetching(monkeypatch, tmp_path):
    """What `datasets` fetches goes into the test's own cache."""
    datasets = pytest.importorskip("datasets")
    for place in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, place, str(tmp_path / place))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_files_are_fetched_from_where_they_are_served(fetching, tmp_path):
    (served := tmp_path / "served").mkdir()
    for name, claims in (("dev", ["A.", "B."]), ("test", ["C."])):
        rows = [{"id": i, "claim": claim, "label": "SUPPORTS"} for i, claim in enumerate(claims)]
        (served / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = tuple(f"http://127.0.0.1:{server.server_port}/{name}.jsonl" for name in ("dev", "test"))
        task = replace(TASKS["fever"], source=Source("json", files=files), examples=3)
        facts = task.facts()
        server.shutdown()
    assert ["A." in facts[0].prompt, "B." in facts[1].prompt, "C." in facts[2].prompt] == [True] * 3
    assert len(facts) == 3


def test_a_data_set_is_fetched_split_by_split(fetching, tmp_path):
    folder = tmp_path / "hotpot"
    folder.mkdir()
    for split, count in (("train", 5), ("validation", 2)):
        rows = [{"id": f"{split}-{i}", "question": f"Who is {i}?", "answer": "Ann"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"      - {{split: {name}, path: {name}.jsonl}}\n" for name in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n  - config_name: fullwiki\n    data_files:\n{files}---\n")
    source = Source(str(folder), "fullwiki", splits=("train[:3]", "validation"))
    facts = replace(TASKS["hotpotqa"], source=source).facts()
    assert [fact.id for fact in facts] == [
        f"hotpotqa-{i}" for i in ("train-0", "train-1", "train-2", "validation-0", "validation-1")
    ]


def test_data_module_takes_the_papers_split_and_the_modules_tokenizer(tmp_path):
    rows = [{"id": str(i), "question": f"Who is {i}?", "answer": "Ann " * (1 + 9 * (i % 5 == 4))} for i in range(25)]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="3.fc_in@0.1", primary=TASKS["hotpotqa"].metric)
    trainer = quiet_trainer()
    ids = {}
    for part in ("validation", "test", "all"):
        data = TaskDataModule("hotpotqa", source=path, part=part, batch_size=8)
        trainer.validate(module, data, verbose=False)
        ids[part] = [item.fact.id for item in data.encoded]
        assert module.result["laser"]["answer_accuracy"].n == len(ids[part])
    # Every fifth answer is too long; of the other twenty the first fifth selects.
    assert ids["validation"] == [f"hotpotqa-{i}" for i in (0, 1, 2, 3)]
    assert ids["validation"] + ids["test"] == ids["all"]
    assert len(ids["all"]) == 20
