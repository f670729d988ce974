"""LaserModule on tiny models against brute force: full forwards, one prompt at a time, plain loops."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.data.datamodule import TextWindows

torch.set_num_threads(1)
PLAN = "2.mlp@0.1"
BASE = ["first_token_accuracy", "answer_accuracy", "top5_accuracy", "top10_accuracy", "log_loss", "soft_error"]
CHOICES = ["choice_accuracy", "summed_choice_accuracy"]
PARAPHRASES = ["paraphrase_accuracy", "paraphrase_robustness", "paraphrase_consistency"]
VOCABULARY = len(tiny_tokenizer(masked=True))
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
}


def build(kind: type[PreTrainedModel], config: Any, std: float = 0.3) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.normal_(std=std)
    return model.eval()


def masked_lm(name: str) -> PreTrainedModel:
    options = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    if name == "bert":
        return build(BertForMaskedLM, BertConfig(**options))
    return build(RobertaForMaskedLM, RobertaConfig(**{**options, "max_position_embeddings": 131}))


SAYS = ["Paris", "Rome", "the yen", "Canberra", "Portuguese", "true", "is", "of"]


def facts(paraphrases: bool = True, choices: bool = True, n: int = 12) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        answer = SAYS[i % len(SAYS)]
        row: dict[str, Any] = {"id": f"fact {i}", "answer": answer, "group": f"g{i % 2}"}
        row["prompt"] = f"{SENTENCES[i % 3][: 8 + 3 * i]} {i} is".replace("  ", " ")
        if paraphrases and i % 3:  # a third of the facts have none
            row["paraphrases"] = [f"So, {row['prompt']}", f"{i} it is:"][: i % 3]
        if choices and i % 2:
            row["choices"] = [answer, *(s for s in SAYS[:4] if s != answer)]
        rows.append(row)
    return rows


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
        }
        return pl.Trainer(**{**defaults, **options})

    return make


def run(make: Any, module: LaserModule, rows: Any, *callbacks: pl.Callback, loop: str = "validate", **data: Any) -> Any:
    options = data.pop("options", {})
    datamodule = FactsDataModule(rows, module.tokenizer, **data)
    (logged, *_) = getattr(make(*callbacks, **options), loop)(module, datamodule=datamodule, verbose=False)
    return logged


# ---- brute force -----------------------------------------------------------------------------------------------------


def answer_log_probs(
    model: Any, tokenizer: Any, prompt: str, answer: str, masked: bool
) -> tuple[torch.Tensor, list[int]]:
    """(A, V) float64 log probabilities at the answer's positions, and its tokens: one row, no padding, all logits."""
    targets = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if masked:
        inner = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        dot = tokenizer(".", add_special_tokens=False)["input_ids"]
        ids = inner + [tokenizer.mask_token_id] * len(targets) + dot
        bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        wrapped = tokenizer("a")["input_ids"]
        ids = (bos if wrapped[0] == bos[0] else []) + ids + (eos if wrapped[-1] == eos[0] else [])
        where = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = [token for token in prompt_ids if token != tokenizer.eos_token_id] + targets
        where = list(range(len(ids) - len(targets) - 1, len(ids) - 1))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[where].log_softmax(-1), targets


def brute_force(model: Any, tokenizer: Any, rows: list[dict[str, Any]], masked: bool = False) -> dict[str, Any]:
    """Each metric, and each metric's value per fact."""
    each: dict[str, list[float | None]] = {name: [] for name in BASE + CHOICES + PARAPHRASES}
    prompts_right = prompts = pairs_same = pairs = 0
    softly = 0.0
    for row in rows:
        table, targets = answer_log_probs(model, tokenizer, row["prompt"], row["answer"], masked)
        ranks = [int((line >= line[t]).sum()) - 1 for line, t in zip(table, targets, strict=True)]
        score = float(sum(line[t] for line, t in zip(table, targets, strict=True))) / len(targets)
        each["first_token_accuracy"].append(float(ranks[0] == 0))
        each["answer_accuracy"].append(float(max(ranks) == 0))
        each["top5_accuracy"].append(float(ranks[0] < 5))
        each["top10_accuracy"].append(float(ranks[0] < 10))
        each["log_loss"].append(-score)
        others, other_sums = [], []
        for choice in row.get("choices", []):
            if choice != row["answer"]:
                t, tokens = answer_log_probs(model, tokenizer, row["prompt"], choice, masked)
                other_sums.append(float(sum(line[x] for line, x in zip(t, tokens, strict=True))))
                others.append(other_sums[-1] / len(tokens))
        each["choice_accuracy"].append(float(score > max(others)) if others else None)
        summed = score * len(targets)
        each["summed_choice_accuracy"].append(float(summed > max(other_sums)) if others else None)
        said, soft = [], []
        for prompt in [row["prompt"], *row.get("paraphrases", [])]:
            t, tokens = answer_log_probs(model, tokenizer, prompt, row["answer"], masked)
            said.append((int(t[0].argmax()), tokens[0]))
            highest = max(float(x) for token, x in enumerate(t[0]) if token != tokens[0])
            soft.append(1 / (1 + math.exp((float(t[0][tokens[0]]) - highest) / 2)))
        right = [s == gold for s, gold in said]
        prompts_right, prompts, softly = prompts_right + sum(right), prompts + len(right), softly + sum(soft)
        same = [a[0] == b[0] for i, a in enumerate(said) for b in said[i + 1 :]]
        pairs_same, pairs = pairs_same + sum(same), pairs + len(same)
        each["soft_error"].append(sum(soft) / len(soft))
        each["paraphrase_accuracy"].append(sum(right) / len(right))
        each["paraphrase_robustness"].append(float(all(right)) if len(right) > 1 else None)
        each["paraphrase_consistency"].append(sum(same) / len(same) if same else None)
    metrics = {}
    for name, values in each.items():
        present = [v for v in values if v is not None]
        if present:
            metrics[name] = sum(present) / len(present)
    metrics["paraphrase_accuracy"], metrics["soft_error"] = prompts_right / prompts, softly / prompts
    if pairs:
        metrics["paraphrase_consistency"] = pairs_same / pairs
    return {"metrics": metrics, "each": each}


def assert_close(logged: dict[str, float], expected: dict[str, float], prefix: str = "") -> None:
    for name, value in expected.items():
        assert logged[f"{prefix}{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paraphrases", [True, False])
@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_keys_follow_the_data(trainer, tmp_path, paraphrases, choices, text):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    data = {"text": tmp_path / "text.txt"} if text else {}
    results = trainer().validate(
        module, datamodule=FactsDataModule(facts(paraphrases, choices), module.tokenizer, **data), verbose=False
    )
    names = BASE + CHOICES * choices + PARAPHRASES * paraphrases + ["perplexity"] * text
    expected = {f"{prefix}{name}" for name in names for prefix in ("", "laser/", "laser/delta/")}
    for logged in results:  # one dictionary for each dataloader, all keys in both and without suffixes
        assert set(logged) == expected
        assert not [key for key, value in logged.items() if value != value]
    assert [row.metric for row in module.result["laser"].rows] == names


def test_no_plan_is_a_plain_evaluation(trainer):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    assert set(run(trainer, module, facts())) == {*BASE, *CHOICES, *PARAPHRASES}
    with pytest.raises(RuntimeError, match="give LaserModule a `plan`"):
        _ = module.result


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [{}, {"bos": True}, {"bos": True, "eos": True}])
def test_causal_against_brute_force(trainer, special):
    tokenizer = tiny_tokenizer(**special)
    module = LaserModule(tiny_causal_lm(), tokenizer, plan=PLAN, report=False)
    rows = facts()
    logged = run(trainer, module, rows, batch_size=5, rows_per_forward=7)
    before = brute_force(module.model, tokenizer, rows)
    assert_close(logged, before["metrics"])
    with reduced(module.model, PLAN):
        after = brute_force(module.model, tokenizer, rows)
    assert_close(logged, after["metrics"], "laser/")
    for name in before["metrics"]:
        delta = after["metrics"][name] - before["metrics"][name]
        assert logged[f"laser/delta/{name}"] == pytest.approx(delta, rel=1e-4, abs=1e-5)


def test_random_models_get_some_facts_right(trainer):
    """The comparisons above would be empty if all answers were wrong: train a little, compare again."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm().train()
    module = LaserModule(model, tokenizer, plan=PLAN, report=False, learning_rate=1e-2)
    rows = facts()
    data = FactsDataModule(rows, tokenizer, batch_size=12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit = trainer(max_epochs=25, num_sanity_val_steps=1, check_val_every_n_epoch=20)
    fit.fit(module, datamodule=data)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert float(fit.callback_metrics["train_loss"]) < 1.0
    model.eval()
    logged = run(trainer, module, rows, batch_size=5)
    expected = brute_force(model, tokenizer, rows)
    assert_close(logged, expected["metrics"])
    assert 0.5 < logged["first_token_accuracy"] <= 1
    with reduced(model, PLAN):
        after = brute_force(model, tokenizer, rows)
    assert_close(logged, after["metrics"], "laser/")
    row = module.result["laser"]["first_token_accuracy"]
    one, two = (e["each"]["first_token_accuracy"] for e in (expected, after))
    assert row.fixed == sum(b > a for a, b in zip(one, two, strict=True))
    assert row.broken == sum(b < a for a, b in zip(one, two, strict=True))
    assert row.n == len(rows)
    assert row.role == "primary"


def test_training_loss_and_its_gradient():
    tokenizer, model = tiny_tokenizer(), tiny_causal_lm()
    module = LaserModule(model, tokenizer)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = FactsDataModule(facts(n=3), tokenizer, batch_size=3, rows_per_forward=4)
    data.setup()
    (batch,) = data.val_dataloader()
    module.training_step(batch, 0).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for row in facts(n=3):
        for prompt in [row["prompt"], *row.get("paraphrases", [])]:
            targets = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
            ids = tokenizer(prompt)["input_ids"] + targets
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            where = logits[len(ids) - len(targets) - 1 : -1]
            losses.append(nn.functional.cross_entropy(where, torch.tensor(targets)))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("special", [{}, {"bos": True, "eos": True}])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_masked_against_brute_force(trainer, name, special):
    tokenizer, model = tiny_tokenizer(masked=True, **special), masked_lm(name)
    module = LaserModule(model, tokenizer, plan="1.mlp@0.1", report=False)
    assert module.masked
    rows = facts()
    logged = run(trainer, module, rows, batch_size=5, rows_per_forward=7)
    assert_close(logged, brute_force(model, tokenizer, rows, masked=True)["metrics"])
    with reduced(model, "1.mlp@0.1"):
        expected = brute_force(model, tokenizer, rows, masked=True)["metrics"]
    assert_close(logged, expected, "laser/")


CAUSAL = {
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "cohere": lambda: build(CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=7.0)),
    "gpt2": lambda: build(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0),
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_what_the_model_does_after_its_output_layer(trainer, name):
    model, tokenizer = CAUSAL[name](), tiny_tokenizer()
    rows = facts(n=8)
    logged = run(trainer, LaserModule(model, tokenizer), rows, batch_size=3)
    assert_close(logged, brute_force(model, tokenizer, rows)["metrics"])


def test_logits_are_computed_at_answers_only(trainer):
    model, seen = tiny_causal_lm(), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    rows = facts()
    run(trainer, LaserModule(model, tiny_tokenizer()), rows, batch_size=12, rows_per_forward=1000)
    tokens = {s: len(tiny_tokenizer()(f" {s}", add_special_tokens=False)["input_ids"]) for s in SAYS}
    wanted = 0
    for row in rows:
        wanted += tokens[row["answer"]] * (1 + len(row.get("paraphrases", ())))
        wanted += sum(tokens[c] for c in row.get("choices", ()) if c != row["answer"])
    assert sum(shape[1] for shape in seen) == wanted
    assert {(shape[0], shape[2]) for shape in seen} == {(1, model.config.vocab_size)}
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_hook_on_the_output_layer_is_gone_after_an_error():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    data = FactsDataModule(facts(n=2), module.tokenizer)
    data.setup()
    (batch,) = data.val_dataloader()
    batch["chunks"][0]["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError):
        module.validation_step(batch, 0)
    assert len(module.model.lm_head._forward_pre_hooks) == 0


def test_batch_size_does_not_matter(trainer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 10))
    results, rows = [], {}
    for size in (1, 3, 64):
        module = LaserModule(tiny_causal_lm(), tiny_tokenizer(bos=True), plan=PLAN, report=False)
        windows = TextWindows(tmp_path / "text.txt", module.tokenizer, window=50)
        results.append(run(trainer, module, facts(), batch_size=size, text=windows))
        rows[size] = {row.metric: (row.n, row.fixed, row.broken) for row in module.result["laser"].rows}
    for other in results[1:]:
        assert set(other) == set(results[0])
        for key, value in results[0].items():
            assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert rows[1] == rows[3] == rows[64]


def test_bfloat16_models_are_scored_in_float32(trainer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 4))
    model, tokenizer = tiny_causal_lm().to(torch.bfloat16), tiny_tokenizer()
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: logits.append(output[0].double()))
    rows = facts(paraphrases=False, choices=False)
    windows = TextWindows(tmp_path / "text.txt", tokenizer, window=40)
    logged = run(trainer, LaserModule(model, tokenizer), rows, batch_size=1, text=windows)

    losses = []
    for row, table in zip(rows, logits, strict=False):
        targets = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
        losses.append(nn.functional.cross_entropy(table, torch.tensor(targets)))
    assert logged["log_loss"] == pytest.approx(float(sum(losses) / len(rows)), rel=1e-6)
    total = count = 0
    for ids, table in zip(windows.windows, logits[len(rows) :], strict=True):
        total += float(nn.functional.cross_entropy(table[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert logged["perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def text_perplexity(model: Any, windows: TextWindows) -> float:
    total = count = 0.0
    for ids in windows.windows:
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= float(sum(table[i, token] for i, token in enumerate(ids[1:])))
        count += len(ids) - 1
    return float(torch.tensor(total / count).double().exp())


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_against_brute_force(trainer, tmp_path, bos):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 7))
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(bos=bos), plan=PLAN, report=False)
    windows = TextWindows(tmp_path / "text.txt", module.tokenizer, window=37)
    assert len({len(ids) for ids in windows.windows}) == 2  # the last one is shorter
    logged = run(trainer, module, facts(), batch_size=16, text=windows)
    before = text_perplexity(module.model, windows)
    with reduced(module.model, PLAN):
        after = text_perplexity(module.model, windows)
    assert logged["perplexity"] == pytest.approx(before, rel=1e-5)
    assert logged["laser/perplexity"] == pytest.approx(after, rel=1e-5)
    row = module.result["laser"]["perplexity"]
    assert (row.n, row.kind) == (len(windows), "log_ratio")
    assert (row.original, row.reduced) == pytest.approx((before, after), rel=1e-5)
    assert row.delta == pytest.approx(after / before - 1, rel=1e-4)


def test_text_alone(trainer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 7))
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False, primary="perplexity")
    windows = TextWindows(tmp_path / "text.txt", module.tokenizer, window=37)
    (logged,) = trainer().validate(module, DataLoader(windows, 3, collate_fn=windows.collate), verbose=False)
    assert set(logged) == {"perplexity", "laser/perplexity", "laser/delta/perplexity"}


def test_outcomes_agree_with_what_is_logged(trainer):
    returned: list[dict[str, Any]] = []

    class Collect(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *args, **kwargs):
            returned.append(outputs)

    module, rows = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False), facts()
    logged = run(trainer, module, rows, Collect(), batch_size=5)
    expected = brute_force(module.model, module.tokenizer, rows)
    assert [i for output in returned for i in output["id"]] == [row["id"] for row in rows]
    assert [g for output in returned for g in output["group"]] == [row["group"] for row in rows]
    for name in BASE + CHOICES + PARAPHRASES:
        values = torch.cat([output[name].values for output in returned])
        for value, target in zip(values.tolist(), expected["each"][name], strict=True):
            assert (value != value) if target is None else value == pytest.approx(target, rel=1e-5), name
        weights = [output[name].weights for output in returned]
        weight = torch.ones_like(values) if weights[0] is None else torch.cat(weights)
        there = ~values.isnan()
        mean = float((values * weight)[there].sum() / weight[there].sum())
        assert mean == pytest.approx(logged[name], rel=1e-6), name
        row = module.result["laser"][name]
        assert row.original == pytest.approx(logged[name], rel=1e-6)
        assert row.reduced == pytest.approx(logged[f"laser/{name}"], rel=1e-6)
        assert row.n == sum(target is not None for target in expected["each"][name])
    # The prior checks speak of the same accuracy as `first_token_accuracy`.
    checks = module.result["laser"].prior_checks
    assert checks.n == len(rows)
    assert checks.delta == pytest.approx(logged["laser/delta/first_token_accuracy"], abs=1e-7)
    said = sum(count for _, count in checks.top_predictions["original"])
    assert said <= len(rows)


def test_prior_checks_know_tokens_apart_that_look_alike():
    """Two tokens that decode to one text are not the same prediction."""
    tokenizer = tiny_tokenizer()
    module = LaserModule(tiny_causal_lm(), tokenizer)
    data = FactsDataModule(facts(n=2), tokenizer)
    data.setup()
    (batch,) = data.val_dataloader()
    alike = tokenizer.convert_tokens_to_ids(["Ã", "©"])  # two bytes of one character: each alone is no text
    assert tokenizer.decode(alike[:1]) == tokenizer.decode(alike[1:])
    module.model.lm_head.weight.data[alike[0]] = 0
    for chunk in batch["chunks"]:
        chunk["targets"][:, 0] = alike[1]

    def only(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(output)
        output[..., alike[0]] = 1
        return output

    module.model.lm_head.register_forward_hook(only)
    with torch.no_grad():
        outcomes = module.validation_step(batch, 0)
    assert outcomes["first_token_accuracy"].values.tolist() == [0, 0]
    assert outcomes["prediction"][0] != outcomes["answer"][0]


# ---- state -----------------------------------------------------------------------------------------------------------


def test_metrics_start_from_zero_in_each_evaluation(trainer):
    """Metrics that were not logged, or not finished, leave nothing for the next evaluation."""
    expected = run(trainer, LaserModule(tiny_causal_lm(), tiny_tokenizer()), facts())

    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    run(trainer, module, facts(paraphrases=False))
    logged = run(trainer, module, facts())
    assert {k: v for k, v in logged.items() if not k.startswith("laser")} == expected

    class Interrupt(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(trainer, module, facts(), Interrupt(), batch_size=3)
    again = run(trainer, module, facts())
    assert again == logged


def test_validate_then_fit_then_test(trainer):
    module = LaserModule(tiny_causal_lm().train(), tiny_tokenizer(), plan=PLAN, report=False)
    rows = facts()
    first = run(trainer, module, rows)
    trainer(max_epochs=1).fit(module, datamodule=FactsDataModule(rows, module.tokenizer))
    assert run(trainer, module, rows)["log_loss"] != first["log_loss"]
    tested = run(trainer, module, rows, loop="test")
    assert set(tested) == set(first)
    module.model.eval()
    assert_close(tested, brute_force(module.model, module.tokenizer, rows)["metrics"])


def test_checkpoints_carry_the_model_alone(trainer, tmp_path):
    module = LaserModule(tiny_causal_lm().train(), tiny_tokenizer(), plan=PLAN, report=False, learning_rate=1e-2)
    fit = trainer(max_epochs=1)
    fit.fit(module, datamodule=FactsDataModule(facts(), module.tokenizer))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("model.") for key in keys)
    other = LaserModule(tiny_causal_lm(seed=3), tiny_tokenizer(), plan=PLAN, report=False)
    data = FactsDataModule(facts(), module.tokenizer)
    logged = trainer().validate(other, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False)[0]
    with reduced(module.model.eval(), PLAN):
        expected = brute_force(module.model, module.tokenizer, facts())
    assert_close(logged, expected["metrics"], "laser/")


# ---- its callback ----------------------------------------------------------------------------------------------------


def test_the_trainers_callback_takes_precedence(trainer):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    theirs = LaserCallback({"a": "0.mlp@0.5", "b": "1.mlp@0.5"}, report=False)
    logged = run(trainer, module, facts(), theirs)
    assert {key.split("/")[1] for key in logged if key.startswith("laser")} == {"a", "b"}
    assert set(theirs.result.arms) == {"a", "b"}


class Other(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", self.layer(batch).mean(), batch_size=len(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)


def test_it_rests_for_other_modules(trainer):
    """The module's callback stays in the trainer's list: another module is then none of its business."""
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    shared = trainer()
    data = FactsDataModule(facts(), module.tokenizer)
    shared.validate(module, datamodule=data, verbose=False)
    ours = module.result
    other, loader = Other(), DataLoader(torch.ones(4, 2), 2)
    assert set(shared.validate(other, loader, verbose=False)[0]) == {"x"}
    assert set(shared.test(other, loader, verbose=False)[0]) == {"x"}
    assert len(shared.predict(other, loader)) == 2
    assert module.result is ours
    # A second LaserModule brings its own.
    second = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="1.mlp@0.1", report=False)
    assert "laser/log_loss" in shared.validate(second, datamodule=data, verbose=False)[0]
    assert second.result is not ours
    assert module.result is ours
    assert len([c for c in shared.callbacks if isinstance(c, LaserCallback)]) == 1
    # And the first one may come back.
    assert "laser/log_loss" in shared.validate(module, datamodule=data, verbose=False)[0]
    assert module.result is not ours


def test_predict(trainer):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    data = FactsDataModule(facts(), module.tokenizer, batch_size=5)
    shared = trainer()
    logged = shared.validate(module, datamodule=data, verbose=False)[0]
    predicted = shared.predict(module, data.val_dataloader())  # also on the trainer that holds its callback
    assert [i for output in predicted for i in output["id"]] == [row["id"] for row in facts()]
    assert all(isinstance(word, str) for output in predicted for word in output["prediction"])
    assert trainer().predict(module, data.val_dataloader())[0]["prediction"] == predicted[0]["prediction"]
    assert shared.validate(module, datamodule=data, verbose=False)[0] == logged  # predicting counts nowhere


def test_controls_and_several_plans(trainer):
    plans = {"a": PLAN, "b": "1.q_proj@0.3"}
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=plans, controls=True, report=False)
    logged = run(trainer, module, facts())
    assert {"laser/a/log_loss", "laser/b/delta/log_loss"} <= set(logged)
    assert set(module.result.controls["b"]) == {"zeroed", "random"}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_the_longest_prompt_that_fits_and_one_token_more(trainer, name):
    masked = name in ("bert", "roberta")
    tokenizer = tiny_tokenizer(masked=masked)
    tokenizer.model_max_length = 10**6  # a tokenizer that does not know the model's context
    model = masked_lm(name) if masked else tiny_causal_lm() if name == "llama" else CAUSAL["gpt2"]()
    context = 512 if name == "llama" else 128
    letter = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert len(letter) == 1
    extra = 1 if masked else -1  # the full stop; or the answer's last token, which is not part of the row
    answer = tokenizer(" of", add_special_tokens=False)["input_ids"]
    brief = {"id": "brief", "prompt": "x", "answer": "of"}
    for length, fits in ((context, True), (context + 1, False)):
        prompt = "x" * (length - len(answer) - extra)
        assert len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) == len(prompt)
        rows = [brief, {"id": "long", "prompt": prompt, "answer": "of"}]
        if fits:
            run(trainer, LaserModule(model, tokenizer), rows)
        else:
            with pytest.raises(ValueError, match=rf"{context + 1} tokens long.*context is {context}: .*long") as error:
                run(trainer, LaserModule(model, tokenizer), rows)
            assert "brief" not in str(error.value)


def test_perplexity_of_a_masked_model(trainer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    windows = TextWindows(tmp_path / "text.txt", tiny_tokenizer(), window=20)
    module = LaserModule(masked_lm("bert"), tiny_tokenizer(masked=True))
    with pytest.raises(MisconfigurationException, match="perplexity is defined for causal models"):
        trainer().validate(module, DataLoader(windows, 2, collate_fn=windows.collate), verbose=False)


def test_no_tokenizer():
    with pytest.raises(MisconfigurationException, match="`tokenizer` must be given"):
        LaserModule(tiny_causal_lm())


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForPreTraining])
def test_not_a_language_model(kind):
    options = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    with pytest.raises(MisconfigurationException, match=f"causal or masked language model, got {kind.__name__}"):
        LaserModule(kind(BertConfig(**options)), tiny_tokenizer(masked=True))


@pytest.mark.parametrize("masked", [False, True])
def test_from_a_folder(trainer, tmp_path, masked):
    model = masked_lm("roberta") if masked else tiny_causal_lm()
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(masked=masked)
    tokenizer.save_pretrained(tmp_path / "model")
    plan = "1.mlp@0.1"
    module = LaserModule(str(tmp_path / "model"), plan=plan, report=False)
    assert module.masked == masked
    logged = run(trainer, module, facts(n=5))
    assert logged == run(trainer, LaserModule(model, tokenizer, plan=plan, report=False), facts(n=5))


def test_peft_model(trainer):
    peft = pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    model = peft.get_peft_model(
        tiny_causal_lm(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    module = LaserModule(model, tokenizer, plan=PLAN, report=False)
    rows = facts(n=6)
    logged = run(trainer, module, rows)
    with reduced(model, PLAN):
        assert_close(logged, brute_force(model, tokenizer, rows)["metrics"], "laser/")
