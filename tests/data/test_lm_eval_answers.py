"""Tasks of lm-evaluation-harness whose answers are written: what its own evaluator says, document by document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserModule

lm_eval = pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "laser-callback[lm-eval]"')
TASKS = Path(lm_eval.__file__).parent / "tasks"
CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NAMES = ["Ann", "Ben", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo"]


def sums(gold=lambda i: f"{i + 2}"):
    """Word problems, the answer to each behind a rationale."""
    return [
        {"question": f"{name} has {i} and gets 2. How many?", "answer": f"{i} + 2 = {i + 2}\n#### {gold(i)}"}
        for i, name in enumerate(NAMES)
    ]


def trivia(gold=lambda i: "Rome"):
    return [
        {"question": f"Where does {name} live", "answer": {"aliases": [gold(i), f"the city of {i}"], "value": gold(i)}}
        for i, name in enumerate(NAMES)
    ]


def passages(gold=lambda i: "Rome"):
    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "hit_id": "", "worker_id": ""}
    return [
        {
            "passage": f"{name} lives in Rome.",
            "question": "Where?",
            "query_id": str(i),
            "section_id": "",
            "answer": empty | {"spans": [gold(i)]},
            "validated_answers": {key: [] for key in ("number", "date", "spans", "worker_id", "hit_id")},
        }
        for i, name in enumerate(NAMES)
    ]


def problems(gold=lambda i: f"{i}"):
    return [
        {"problem": f"What is {i}?", "solution": rf"It is $\boxed{{{gold(i)}}}$.", "level": "1", "type": "Algebra"}
        for i in range(len(NAMES))
    ]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a task that includes one of lm_eval's own and has data here; returns its source."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    versions = iter(range(100))

    def written(task, rows, train=None, **changes):
        files = {}
        for split, part in {"train": train or rows, "validation": rows, "test": rows}.items():
            # A name of its own, since `datasets` keeps what it has read by name and time.
            path = tmp_path / f"{next(versions)}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            files[split] = str(path)
        config = {
            "include": str(TASKS / task),
            "task": "here",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        (tmp_path / "here.yaml").write_text(yaml.safe_dump(config | changes))
        return f"lm_eval:here?include_path={tmp_path}"

    return written


def by_lm_eval(model, tokenizer, folder, new, **options):
    """What its evaluator says: results, and by filter the samples in the order of the documents."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    gen_kwargs = {} if new is None else {"gen_kwargs": {"max_gen_toks": new}}
    found = simple_evaluate(lm, tasks=["here"], task_manager=manager, bootstrap_iters=0, **gen_kwargs, **options)
    samples = {}
    for sample in sorted(found["samples"]["here"], key=lambda sample: sample["doc_id"]):
        samples.setdefault(sample["filter"], []).append(sample)
    return found["results"]["here"], samples


def by_this_package(model, tokenizer, source, **options):
    module, data = LaserModule(model, tokenizer), FactsDataModule(source, tokenizer, batch_size=3, **options)
    trainer = quiet_trainer()
    batches, metrics = trainer.predict(module, data), trainer.validate(module, data, verbose=False)[0]
    found = {}
    for batch in batches:
        for name, values in batch.items():
            found.setdefault(name, []).extend(values.tolist() if isinstance(values, torch.Tensor) else values)
    return found, metrics, data


def compared(model, tokenizer, source, tmp_path, new, *, shots=None, chat=False, system=None, multiturn=False):
    """Assert that both say the same of every document, and return what they say."""
    results, samples = by_lm_eval(
        model,
        tokenizer,
        tmp_path,
        new,
        num_fewshot=shots,
        apply_chat_template=chat,
        system_instruction=system,
        fewshot_as_multiturn=multiturn,
    )
    source += "" if new is None else f"&max_gen_toks={new}"
    source += "" if shots is None else f"&num_fewshot={shots}"
    source += "&fewshot_as_multiturn=true" if multiturn else ""
    found, metrics, data = by_this_package(model, tokenizer, source, chat=chat, system=system)
    names = {
        f"{metric},{filter_}": metric if len(samples) == 1 else f"{metric},{filter_}"
        for filter_, each in samples.items()
        for metric in each[0]["metrics"]
    }
    for filter_, each in samples.items():
        assert [f"here-{sample['doc_id']}" for sample in each] == found["id"]
        assert [sample["arguments"][0][0].rstrip(" ") for sample in each] == found["prompt"]
        assert [sample["resps"][0][0] for sample in each] == found["continuation"]
        for metric in each[0]["metrics"]:
            name = names[f"{metric},{filter_}"]
            assert [float(sample[metric]) for sample in each] == found[name]
            assert metrics[name] == pytest.approx(results[f"{metric},{filter_}"], abs=1e-12)
    return found, data, names


def answered_by(model, tokenizer, folder, new, **options):
    """By filter, what is left of each continuation."""
    _, samples = by_lm_eval(model, tokenizer, folder, new, **options)
    return {name: [sample["filtered_resps"][0] for sample in each] for name, each in samples.items()}


def first_of(left, i, half):
    """What the model says to every other document, so that about half of them are right."""
    return left[i] if i % 2 == half and left[i].strip() else "7"


CASES = {
    "gsm8k": ("gsm8k/gsm8k.yaml", sums, "flexible-extract", {"shots": 1}),
    "gsm8k, five examples, cut": ("gsm8k/gsm8k.yaml", sums, "strict-match", {"shots": 5}),
    "triviaqa": ("triviaqa/default.yaml", trivia, "remove_whitespace", {"shots": 2}),
    "drop": ("drop/default.yaml", passages, "none", {}),
    "math": ("hendrycks_math/hendrycks_math_algebra.yaml", problems, "none", {}),
    "chat": ("gsm8k/gsm8k-cot-llama.yaml", sums, "flexible-extract", {"chat": True, "shots": 1, "system": "Be brief."}),
    "turns": ("gsm8k/gsm8k.yaml", sums, "flexible-extract", {"chat": True, "shots": 2, "multiturn": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bos", [False, True])
def test_every_document_is_judged_as_by_lm_eval(write, tmp_path, case, bos):
    config, rows, filter_, options = CASES[case]
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer(bos=bos)
    tokenizer.chat_template = CHAT
    asked = {
        "num_fewshot": options.get("shots"),
        "apply_chat_template": options.get("chat", False),
        "system_instruction": options.get("system"),
        "fewshot_as_multiturn": options.get("multiturn", False),
    }
    train = rows()
    write(config, rows(), train)
    left = answered_by(model, tokenizer, tmp_path, 48, **asked)[filter_]
    left = [one[0] if isinstance(one, list) else one for one in left]
    source = write(config, rows(lambda i: first_of(left, i, 0)), train)
    found, data, names = compared(model, tokenizer, source, tmp_path, 48, **options)
    shares = {name: sum(found[name]) / len(found[name]) for name in names.values()}
    assert any(0 < share < 1 for share in shares.values()), shares
    assert data.metric in shares
