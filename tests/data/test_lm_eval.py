"""Tasks of lm-evaluation-harness as facts: the same prompts, log-likelihoods and acc as by its own evaluator."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch
import yaml
from tiny import save_deep_lm, tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserModule
from laser_callback.cli.commands import main
from laser_callback.data.facts import Fact
from laser_callback.data.lm_eval.choices import ACC
from laser_callback.data.lm_eval.reading import read_lm_eval
from laser_callback.data.row_scores import Role
from laser_callback.finished import compare_runs
from laser_callback.finished.reading import read_run

PLACES = ["France", "Italy", "Japan", "Brazil", "Australia", "Rome", "Paris", "Canberra"]
CHOICES = ["Rome", "the capital city of Australia", "Paris and Canberra", "yen"]
ROWS = [
    {"question": f"{kind} of {place} {i}", "choices": CHOICES[i % 4 :] + CHOICES[: i % 4], "label": i // 3 % 4}
    for i, (kind, place) in enumerate((kind, place) for kind in ("capital", "currency", "claim") for place in PLACES)
]
TASK = {
    "task": "places",
    "dataset_path": "json",
    "validation_split": "validation",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a task, changed in some keys, and its rows; returns the task's source."""
    pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "laser-callback[lm-eval]"')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def written(rows=ROWS, **changes):
        config = TASK | changes
        name = config["task"]
        files = {}
        for split, part in {"train": ROWS[:6], "validation": rows, "test": rows[:3]}.items():
            (path := tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            files[split] = str(path)
        config["dataset_kwargs"] = {"data_files": files}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return f"lm_eval:{name}?include_path={tmp_path}"

    return written


def by_lm_eval(model, tokenizer, folder, **options):
    """What its evaluator says: acc, and per document the log-likelihood of each choice and whether it counts."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=["places"], task_manager=manager, **options
    )
    samples = sorted(found["samples"]["places"], key=lambda sample: sample["doc_id"])
    lls = [[float(ll[0]) for ll in sample["filtered_resps"]] for sample in samples]
    return found["results"]["places"]["acc,none"], lls, [sample["acc"] for sample in samples], samples


def predicted(module, data):
    trainer = quiet_trainer()
    return trainer.predict(module, data), trainer.validate(module, data, verbose=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("shots", [0, 2])
def test_acc_is_that_of_lm_eval_to_the_example(write, tmp_path, bos, shots):
    source, model, tokenizer = write(), tiny_causal_lm(), tiny_tokenizer(bos=bos)
    module = LaserModule(model, tokenizer)
    data = FactsDataModule(f"{source}&num_fewshot={shots}", tokenizer, batch_size=5)
    batches, metrics = predicted(module, data)
    acc, lls, each, samples = by_lm_eval(model, tokenizer, tmp_path, num_fewshot=shots)

    assert [f"places-{sample['doc_id']}" for sample in samples] == [i for batch in batches for i in batch["id"]]
    assert torch.cat([batch[ACC] for batch in batches]).tolist() == each
    assert metrics[ACC] == pytest.approx(acc, abs=1e-12)
    assert 0 < acc < 1
    means = torch.cat([batch["choice_accuracy"] for batch in batches]).tolist()
    assert means != each  # else the choices' lengths would not tell sum from mean
    facts = [item.fact for item in data.encoded]
    assert [fact.prompt for fact in facts] == [sample["arguments"][0][0] for sample in samples]
    assert all(fact.prompt.count("Question:") == shots + 1 for fact in facts)
    one_by_one = [
        Fact(f"{fact.id} {i}", fact.prompt, choice) for fact in facts for i, choice in enumerate(fact.choices)
    ]
    singly = FactsDataModule(one_by_one, tokenizer, batch_size=len(one_by_one))
    singly.setup()
    with torch.inference_mode():
        scores = module._scores(next(iter(singly.val_dataloader())))
    assert set(scores.role.tolist()) == {Role.PROMPT}
    ours = scores.log_prob[scores.fact.argsort()].tolist()
    assert ours == pytest.approx([ll for document in lls for ll in document], abs=1e-4)


def test_facts_of_a_task(write):
    with pytest.warns(UserWarning, match="lm_eval:places: 24 documents of the validation split, 0 examples"):
        facts, metric, generation = read_lm_eval(write())
    assert (metric, generation) == (ACC, None)
    assert facts[5].id == "places-5"
    assert facts[5].prompt == "Question: capital of Rome 5\nAnswer:"
    assert (facts[5].choices, facts[5].answer) == (tuple(ROWS[5]["choices"]), ROWS[5]["choices"][ROWS[5]["label"]])
    assert {fact.group for fact in facts} == {"places"}
    assert [fact.subject for fact in read_lm_eval(write() + "&num_fewshot=1").facts] == [fact.prompt for fact in facts]


def test_the_test_split_comes_first_as_in_lm_eval(write):
    with pytest.warns(UserWarning, match="3 documents of the test split"):
        assert len(read_lm_eval(write(test_split="test")).facts) == 3


def test_a_yaml_file_and_a_group(write, tmp_path):
    write()
    write(task="others", rows=ROWS[:4])
    assert len(read_lm_eval(f"lm_eval:{tmp_path / 'others.yaml'}?include_path={tmp_path}").facts) == 4
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["places", "others"]}))
    groups = [fact.group for fact in read_lm_eval(f"lm_eval:both?include_path={tmp_path}").facts]
    assert (groups.count("places"), groups.count("others")) == (24, 4)


LETTERS = {"doc_to_choice": ["A", "B", "C", "D"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "loglikelihood", "doc_to_target": "question"}, "is of the type loglikelihood"),
        ({"output_type": "loglikelihood_rolling", "doc_to_target": "question"}, "as `text` those with .*rolling"),
        ({"doc_to_text": "label", "doc_to_target": "question"}, "has a prompt for each choice"),
        ({"doc_to_target": "[0, 1]"}, "has several right answers"),
        ({"metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]}, "no metric acc"),
        ({"target_delimiter": ""}, "after one space"),
        ({"target_delimiter": "\n"}, "after one space"),
        ({"doc_to_text": "{{question}}\n\n "}, "must not end in white space"),
        (LETTERS | {"doc_to_target": "question"}, "right answer must be one of"),
        ({"num_fewshot": 0}, "`num_fewshot` must be 0"),
        ({"dataset_path": "no/such/data_set"}, "needs internet"),
    ],
)
def test_what_is_no_fact_is_refused(write, changes, message):
    with pytest.raises(ValueError, match=message):
        read_lm_eval(write(**changes) + "&num_fewshot=1")


def test_options_of_what_is_written_are_refused(write):
    with pytest.raises(ValueError, match="`max_gen_toks` is for tasks of the type generate_until"):
        read_lm_eval(write() + "&max_gen_toks=5")


def test_a_label_out_of_range_is_refused(write):
    with pytest.raises(ValueError, match=r"document 1: the right answer must be one of .*got -1"):
        read_lm_eval(write(rows=[ROWS[0], ROWS[1] | {"label": -1}]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # It reads the harness's own tasks, all of them.
        pytest.param("lm_eval:no_such_task?include_path=.", "got 'no_such_task'", marks=pytest.mark.slow),
        ("lm_eval:places?shots=5", r"options are num_fewshot, include_path, max_gen_toks.*\['shots'\]"),
        ("lm_eval:places?5", "options are"),
        ("lm_eval:places?num_fewshot=few", "whole number, at least 0, got 'few'"),
        ("lm_eval:places?max_gen_toks=0", "`max_gen_toks` must be a whole number, at least 1, got '0'"),
        ("lm_eval:places?fewshot_as_multiturn=1", "must be true or false, got '1'"),
    ],
)
def test_mistakes_in_the_source(write, source, message):
    with pytest.raises(ValueError, match=message):
        read_lm_eval(source)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "laser-callback\[lm-eval\]"'):
        read_lm_eval("lm_eval:arc_easy")


def test_a_masked_model_is_refused():
    with pytest.raises(ValueError, match="masked model, which lm_eval does not score"):
        FactsDataModule("lm_eval:arc_easy", tiny_tokenizer(masked=True)).setup()


@pytest.mark.slow
def test_search_and_gate(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "spectra"))
    monkeypatch.chdir(tmp_path)
    source, lm = write(), save_deep_lm(tmp_path)
    options = ["--model", str(lm), "--accelerator", "cpu", "--batch_size", "8"]
    searched = ["search", "--judge", source, "--within", "28-29.fc_up", "--candidates", "2", "--controls", "false"]
    assert main([*searched, *options, "--json"]) in (0, 3)
    answer = json.loads(capsys.readouterr().out)
    assert answer["objective"] == [ACC]
    assert sum(answer["sets"].values()) == len(ROWS)
    gate = ["gate", "--plan", "28.fc_up@0.5", "--gates", f'["{ACC} >= -0.99"]', "--facts", source]
    assert main([*gate, *options, "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert ACC in json.dumps(stage)
    assert main(["search", "--judge", source, "--facts", "facts.jsonl", *options]) == 2
    assert "without `--facts`" in capsys.readouterr().err


@pytest.mark.slow
def test_logs_of_its_evaluator_are_read_as_its_results(write, tmp_path):
    """Every metric that it reports, from the samples that it writes."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def metrics(*names):
        return {"metric_list": [{"metric": name} for name in names]}

    of_rows = {"rows": [row | {"answer": "yen", "text": row["question"]} for row in ROWS]}
    regexes = {"strict": "(yen)", "first": r"(\w+)"}
    take_first = {"function": "take_first"}
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, take_first]}
        for name, pattern in regexes.items()
    ]
    generated = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "doc_to_choice": None}
    generated |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "filter_list": filters}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rolling |= {"doc_to_choice": None}
    write(**of_rows, **metrics("acc", "acc_norm"))
    write(**of_rows, task="sums", **generated, **metrics("exact_match"))
    write(**of_rows, task="text", **rolling, **metrics("word_perplexity", "byte_perplexity", "bits_per_byte"))
    tasks = ["places", "sums", "text"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = HFLM(pretrained=tiny_causal_lm(), tokenizer=tiny_tokenizer(), batch_size=4)
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    samples = found.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.log_experiment_args("hf", "pretrained=me/tiny", None, None, False)
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in tasks:
        tracker.save_results_samples(task_name=task, samples=samples[task])

    run = read_run(tmp_path / "out", "a")
    assert (run.name, sorted(run.tasks)) == ("me/tiny", tasks)
    for task in tasks:
        arm = compare_runs(run, run, tasks=[task])["laser"]
        reported = {name.removesuffix(",none"): value for name, value in found["results"][task].items() if "," in name}
        reported = {name: value for name, value in reported.items() if "_stderr" not in name}
        assert {row.metric: row.original for row in arm.rows} == pytest.approx(reported, rel=1e-12)
    assert set(compare_runs(run, run, tasks=["places"])["laser"].prior_checks) == {"acc", "acc_norm"}
    assert run.tasks["text"].higher_is_better["bits_per_byte"] is False
