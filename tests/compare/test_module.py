"""LaserModule on tiny models against brute force: which keys there are, and their values."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from brute_force import BASE, CHOICES, OF_BOTH, OF_TEXT, PARAPHRASES, assert_close, brute_force, text_perplexity
from fact_rows import SAYS, facts, run
from language_models import CAUSAL, masked_lm
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from versions import EXACT

from laser_callback import FactsDataModule, LaserModule, reduced
from laser_callback.data.datamodule import TextWindows

PLAN = "2.mlp@0.1"

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
    of_both = OF_BOTH + OF_TEXT * text
    expected = {f"{prefix}{name}" for name in names for prefix in ("", "laser/", "laser/delta/")}
    expected |= {f"laser/{name}" for name in of_both}
    for logged in results:  # one dictionary for each dataloader, all keys in both and without suffixes
        assert set(logged) == expected
        assert not [key for key, value in logged.items() if value != value]
    assert [row.metric for row in module.result["laser"].rows] == names + of_both


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


@pytest.mark.slow
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
            size = abs(value) if EXACT else abs(results[0].get(key.replace("laser/delta/", ""), value))
            assert other[key] == pytest.approx(value, abs=1e-5 * max(1, size)), key
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
    expected = {"perplexity", "laser/perplexity", "laser/delta/perplexity", "laser/kl", "laser/top1_agreement"}
    assert set(logged) == expected


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
    shares = {name for name in logged if name.endswith(("accuracy", "robustness")) and "/" not in name}
    assert shares <= set(checks)
    for name in shares:
        check, row = checks[name], module.result["laser"][name]
        there = [target for target in expected["each"][name] if target is not None]
        assert check.n == len(there), name
        if row.kind == "binary":
            assert check.delta == pytest.approx(logged[f"laser/delta/{name}"], abs=1e-7)


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
        chunk["targets"].scatter_(1, chunk["first"][:, None], alike[1])

    def only(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(output)
        output[..., alike[0]] = 1
        return output

    module.model.lm_head.register_forward_hook(only)
    with torch.no_grad():
        outcomes = module.validation_step(batch, 0)
    assert outcomes["first_token_accuracy"].values.tolist() == [0, 0]
    assert outcomes["prediction"][0] != outcomes["answer"][0]
