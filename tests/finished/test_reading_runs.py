"""Logs of finished runs: read as their programs write them, or refused with their place."""

from __future__ import annotations

import json
import math
import re

import pytest
from finished_logs import inspect_log, lm_eval_folder, sample, scored, write_lines

from laser_callback.finished.eval_logs import read_samples
from laser_callback.finished.logged import FinishedRun
from laser_callback.finished.pairing import compare_runs
from laser_callback.finished.reading import read_run
from laser_callback.results.flips import flips


def only(run):
    (task,) = run.tasks.values()
    return task


def outcomes(task, metric):
    return {one.id: one.outcomes.get(metric) for one in task.examples.values()}


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------


def test_samples_of_lm_eval(tmp_path):
    rows = [sample(0, 1, 1), sample(1, 1, 2), sample(2, 3, 3)]
    folder = lm_eval_folder(tmp_path, "me/small", {"coins": rows})
    run = read_run(folder, "a")
    assert (run.name, list(run.tasks)) == ("me/small", ["coins"])
    task = run.tasks["coins"]
    assert outcomes(task, "acc") == {"0": 1.0, "1": 0.0, "2": 1.0}
    first, second, _ = task.examples.values()
    assert (first.answers, first.predictions, first.prompt) == ({"acc": "yen"}, {"acc": "yen"}, "Question 0:")
    assert (second.answers["acc"], second.predictions["acc"]) == ("yen", "peso")
    assert set(first.same) == {"doc_hash", "prompt_hash", "target_hash"}
    assert task.higher_is_better == {"acc": True}
    (alone,) = folder.glob("samples_*")
    assert read_run(alone, "a") == read_run(folder, "a").__class__("me/small", str(alone), run.tasks)


def test_filters_of_one_document_are_metrics_of_one_example(tmp_path):
    generated = {"arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": {"until": ["\n"]}}}, "metrics": ["exact_match"]}
    rows = [
        sample(0, 0, 0, **generated, target="7", filter=name, filtered_resps=[text], exact_match=value)
        for name, text, value in (("strict-match", "[invalid]", 0.0), ("flexible-extract", "7.", 1.0))
    ]
    (example,) = only(read_run(lm_eval_folder(tmp_path, "m", {"sums": rows}), "a")).examples.values()
    assert example.outcomes == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert example.predictions == {"exact_match,strict-match": "[invalid]", "exact_match,flexible-extract": "7."}


def test_what_was_said_is_what_was_judged_right_or_wrong(tmp_path):
    """As of GSM8K, whose targets hold the whole way to an answer."""
    said = {"gen_args_0": {"arg_0": "Q:", "arg_1": {"until": ["Q:"]}}}
    rows = [
        sample(i, 0, 0, arguments=said, target=f"{i} + {i} = {2 * i}. #### {2 * i}", metrics=["exact_match"])
        | {"filtered_resps": [text], "resps": [[f"It is {text}."]], "exact_match": float(text == str(2 * i))}
        for i, text in enumerate(["0", "2", "5"])
    ]
    task = read_samples(rows, {})
    found = list(task.examples.values())
    assert [example.predictions["exact_match"] for example in found] == ["0", "2", "5"]
    assert [example.continuation for example in found] == ["It is 0.", "It is 2.", "It is 5."]
    other = read_samples([row | {"filtered_resps": ["5"], "resps": [["5"]], "exact_match": 0.0} for row in rows], {})
    result = compare_runs(FinishedRun("a", "a", {"": other}), FinishedRun("b", "b", {"": task}))
    assert not result["laser"].prior_checks  # no target is common
    first = flips(result.examples.to_rows(), "laser", result["laser"]["exact_match"], rewritten=True)
    assert [(flip.outcome, flip.before, flip.after, flip.written_after) for flip in first] == [
        ("fixed", "5", "0", "It is 0."),
        ("fixed", "5", "2", "It is 2."),
        ("still wrong", "5", "5", "It is 5."),
    ]


def test_perplexities_are_weighed_by_what_they_are_of(tmp_path):
    metrics = ["word_perplexity", "bits_per_byte"]
    changes = {"metrics": metrics, "filtered_resps": ["-30.0"], "arguments": {"gen_args_0": {"arg_0": "text"}}}
    rows = [sample(0, 0, 0, **changes, word_perplexity=[-30.0, 6], bits_per_byte=[-30.0, 20])]
    task = only(read_run(lm_eval_folder(tmp_path, "m", {"text": rows}), "a"))
    (example,) = task.examples.values()
    assert example.outcomes == {"word_perplexity": 5.0, "bits_per_byte": 30 / 20 / math.log(2)}
    assert example.weights == {"word_perplexity": 6.0, "bits_per_byte": 20.0}
    assert task.kinds == {"word_perplexity": "log_ratio"}


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"target": "yen"}, True),
        ({"target": "1", "acc": 0.0}, False),  # scored by something else than the likeliest choice
        ({"target": "franc"}, False),
    ],
)
def test_an_answer_is_known_only_where_it_agrees_with_the_score(tmp_path, changes, known):
    rows = [sample(0, 1, 1, **changes)]
    (example,) = only(read_run(lm_eval_folder(tmp_path, "m", {"coins": rows}), "a")).examples.values()
    assert ("acc" in example.answers) == known


def test_a_number_among_numbers_is_no_known_answer(tmp_path):
    arguments = {f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" {number}"} for i, number in enumerate((3, 2, 1, 0))}
    rows = [sample(0, 1, 1, arguments=arguments)]
    (example,) = only(read_run(lm_eval_folder(tmp_path, "m", {"sums": rows}), "a")).examples.values()
    assert example.answers == {}


def test_the_latest_of_several_runs_in_a_folder_is_read_and_said(tmp_path):
    lm_eval_folder(tmp_path, "m", {"coins": [sample(0, 1, 0)]}, day=1)
    folder = lm_eval_folder(tmp_path, "m", {"coins": [sample(0, 1, 1)]}, day=2)
    with pytest.warns(UserWarning, match="has 1 older logs of the same tasks; the latest are read"):
        run = read_run(folder, "a")
    assert outcomes(only(run), "acc") == {"0": 1.0}


def test_a_folder_of_two_models_is_refused(tmp_path):
    for model in ("one", "two"):
        lm_eval_folder(tmp_path, model, {f"coins_{model}": [sample(0, 1, 0)]})
    with pytest.raises(ValueError, match=r"`b`: .* holds runs of one, two: name the folder or file of one"):
        read_run(tmp_path, "b")


# ---- Inspect ---------------------------------------------------------------------------------------------------------


def test_a_log_of_inspect(tmp_path):
    samples = [scored(0, "C", "1"), scored(1, "I", "5"), scored(2, "P"), scored(3, "N"), scored(4, 0.25, scores=None)]
    run = read_run(inspect_log(tmp_path / "log.json", "openai/x", samples), "a")
    assert (run.name, list(run.tasks)) == ("openai/x", ["arithmetic"])
    assert outcomes(only(run), "match") == {"0": 1.0, "1": 0.0, "2": 0.5, "3": 0.0, "4": None}
    assert only(run).higher_is_better == {"match": True}  # of letters
    first, second, *_ = only(run).examples.values()
    assert (first.prompt, first.same["target"], first.cluster) == ("user: 0 + 1?", "1", None)
    assert (second.answers, second.predictions) == ({"match": "2"}, {"match": "5"})


def test_epochs_are_a_cluster_and_several_values_several_metrics(tmp_path):
    samples = [scored(0, {"right": 1, "why": "because"}, epoch=epoch) for epoch in (1, 2)]
    task = only(read_run(inspect_log(tmp_path / "log.json", "m", samples), "a"))
    assert [(one.id, one.cluster) for one in task.examples.values()] == [("0, epoch 1", "0"), ("0, epoch 2", "0")]
    assert outcomes(task, "match/right") == {"0, epoch 1": 1.0, "0, epoch 2": 1.0}
    assert task.unused == {"match/why": "no number, such as 'because'"}


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_lines_and_cells(tmp_path):
    rows = [
        {"id": 1, "acc": True, "loss": 0.5, "subject": "x", "note": "slow", "prompt": "P", "answer": "a"},
        {"id": "b", "acc": False, "loss": None, "subject": "x", "note": None, "prompt": "Q", "answer": "b"},
    ]
    task = only(read_run(write_lines(tmp_path / "run.jsonl", rows), "a"))
    assert outcomes(task, "acc") == {"1": 1.0, "b": 0.0}
    assert math.isnan(outcomes(task, "loss")["b"])
    assert [one.cluster for one in task.examples.values()] == ["x", "x"]
    assert task.unused == {"note": "no number, such as 'slow'"}
    assert task.examples["1"].same == {"prompt": "P", "answer": "a"}
    (tmp_path / "run.csv").write_text(
        "id,acc,loss,subject,note,prompt,answer\n1,True,0.5,x,slow,P,a\nb,false,,x,,Q,b\n"
    )
    cells = only(read_run(tmp_path / "run.csv", "a"))
    assert str(cells.examples) == str(task.examples)
    assert cells.unused == task.unused
    for sign, missing in ((";", "NA"), ("\t", "null")):  # as spreadsheets and R write them
        (tmp_path / "run.csv").write_text(
            f"\ufeffid,acc,loss,subject,note,prompt,answer\n1,TRUE,0.5,x,slow,P,a\nb,FALSE,{missing},x,,Q,b\n".replace(
                ",", sign
            ),
            encoding="utf-8",
        )
        assert str(only(read_run(tmp_path / "run.csv", "a")).examples) == str(task.examples)


def test_a_column_of_tasks_and_a_folder_of_them(tmp_path):
    rows = [{"id": i, "task": task, "acc": 1} for task in ("x", "y") for i in range(2)]
    assert list(read_run(write_lines(tmp_path / "all.jsonl", rows), "a").tasks) == ["x", "y"]
    for task in ("x", "y"):
        write_lines(tmp_path / "run" / f"{task}.jsonl", [{"id": 0, "acc": 1}])
    run = read_run(tmp_path / "run", "a")
    assert (run.name, list(run.tasks)) == ("run", ["x", "y"])


def test_own_examples_are_read_as_the_original(tmp_path):
    row = {
        "id": "1",
        "answer": "a",
        "original": {"acc": 1.0, "perplexity": 2.0, "prediction": "a"},
        "laser": {"acc": 0.0},
    }
    run = read_run(write_lines(tmp_path / "result.examples.jsonl", [row]), "a")
    (example,) = only(run).examples.values()
    assert (run.name, example.outcomes, example.predictions["acc"]) == ("result", {"acc": 1.0}, "a")
    assert list(only(run).unused) == ["perplexity"]  # a mean over tokens, whose numbers are not there


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "x.jsonl",
            '{"id": 1, "acc": 1}\n{"acc": 1}\n',
            "x.jsonl: line 2: expected a row with an `id`, got {'acc': 1}",
        ),
        (
            "x.jsonl",
            '{"id": 1, "acc": 1}\n' * 3,
            "`id` must be another for each example, but these come again: '1' (3 t",
        ),
        (
            "x.jsonl",
            '{"id": 1, "acc": "good"}\n',
            "it has no outcomes: expected rows with an `id` and numbers, true or false; `acc` has no",
        ),
        ("x.jsonl", '{"id": 1, "acc": 1' + 400 * "0" + "}\n", "`acc` has no number, such as 1000000"),
        ("x.csv", "id,acc,acc\n1,1,0\n", "expected a name of its own for each column, got 'acc' twice"),
        ("x.jsonl", "", "it has no outcomes"),
        ("x.jsonl", "[1]\n", "line 1: expected a row with an `id`"),
        ("x.csv", "id,acc\n1,1,0\n", "line 2: more cells than the header has"),
        (
            "x.jsonl",
            json.dumps({"doc_hash": "", "metrics": []}) + "\n",
            "line 1 is no sample as lm-eval writes it: KeyE",
        ),
        ("x.jsonl", json.dumps(sample(0, 0, 0) | {"arguments": 3}) + "\n", "line 1 is no sample as lm-eval writes it"),
        ("x.jsonl", (json.dumps(sample(5, 0, 0)) + "\n") * 2, "these come again: '5' (2 times)"),
        (
            "x.json",
            '{"results": {}, "n-samples": {}}',
            "expected a log of Inspect, with `version`, `eval` and `samples`: of",
        ),
        ("x.json", "[]", "expected a log of Inspect"),
        ("x.json", '{"version": 2, "eval": {}}', "expected `samples`: Inspect writes none with `--no-log-samples`"),
        (
            "x.json",
            '{"version": 2, "eval": {}, "samples": [{"id": 1, "scores": 3}]}',
            "sample 1 is none as Inspect writes",
        ),
        ("x.eval", "PK", "a finished run is a folder, or a .jsonl, .csv, .json file, got "),
    ],
)
def test_what_is_no_run(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_run(tmp_path / name, "a")
    assert str(error.value).startswith("`a`: ")
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(
        ValueError, match=r"`a`: .* has no samples_\*.jsonl of lm-eval, and no .jsonl, .csv, .json file"
    ):
        read_run(tmp_path, "a")
