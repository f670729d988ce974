"""Refusal probes: files, phrases, and both rates against continuations made one prompt at a time."""

from __future__ import annotations

import json
import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from torch import Tensor
from trainers import quiet_trainer
from transformers import BertConfig, BertForMaskedLM

from laser_callback import LaserCallback, LaserModule, ProbesDataModule, reduced
from laser_callback.data.probes import PHRASES, Probe, refuses

PLAN = "1.mlp@0.05"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def rows(n: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": SENTENCES[i % 3][: 5 + 4 * i], "should": "answer" if i % 3 else "refuse", "group": str(i % 2)}
        for i in range(n)
    ]


def validate(module: LaserModule, data: pl.LightningDataModule, *callbacks: pl.Callback) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return dict(quiet_trainer(*callbacks).validate(module, data, verbose=False)[0])


def greedily(model: Any, tokens: Tensor, steps: int) -> list[int]:
    """Whole forwards without a cache, one prompt at a time."""
    said: list[int] = []
    for _ in range(steps):
        ids = torch.cat([tokens, torch.tensor(said, dtype=torch.long)])[None]
        with torch.no_grad():
            said.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        if said[-1] == model.config.eos_token_id:
            break
    return said


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("match", ["start", "anywhere"])
def test_rates_are_those_of_continuations_made_one_by_one(chat, match):
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE if chat else None
    model = tiny_causal_lm()
    module = LaserModule(model, tokenizer)

    def by_hand(text: str) -> str:
        if chat:
            text = f"<s>system: Be kind.</s><s>user: {text}</s><s>assistant:"
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        return tokenizer.decode(greedily(model, torch.tensor(ids), 6), skip_special_tokens=True)

    said = {}
    for arm in ("original", "reduced"):
        if arm == "reduced":
            with reduced(model, PLAN):
                said[arm] = [by_hand(row["prompt"]) for row in rows()]
        else:
            said[arm] = [by_hand(row["prompt"]) for row in rows()]
    # What the models say is noise; two of it serve as phrases.
    phrases = [said["original"][0][:3] if match == "start" else said["original"][0][2:5], said["reduced"][1][:4]]
    data = ProbesDataModule(
        rows(),
        tokenizer,
        phrases=phrases,
        match=match,
        max_new_tokens=6,
        batch_size=5,
        system="Be kind." if chat else None,
    )
    callback = LaserCallback(PLAN, report=False)
    logged = validate(module, data, callback)
    for arm, prefix in (("original", ""), ("reduced", "laser/")):
        refused = [refuses(text, phrases, match) for text in said[arm]]
        harmful = [row["should"] == "refuse" for row in rows()]
        expected = sum(r for r, h in zip(refused, harmful, strict=True) if h) / sum(harmful)
        assert logged[f"{prefix}refusal_rate"] == pytest.approx(expected)
        expected = sum(not r for r, h in zip(refused, harmful, strict=True) if not h) / (12 - sum(harmful))
        assert logged[f"{prefix}answer_rate"] == pytest.approx(expected)
    assert logged["refusal_rate"] > 0
    result = callback.result["laser"]
    assert (result["refusal_rate"].n, result["answer_rate"].n) == (4, 8)
    assert result["refusal_rate"].test == "exact McNemar"
    assert result.prior_checks == {}


def test_each_probe_is_named_and_nothing_is_left_from_one_evaluation_to_the_next():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    data = ProbesDataModule(rows(), module.tokenizer, max_new_tokens=3)
    first = validate(module, data)
    (batch,) = quiet_trainer().predict(module, data)
    assert batch["id"] == [str(i) for i in range(1, 13)]
    assert len(batch["continuation"]) == 12
    assert batch["refusal_rate"].isnan().tolist() == [i % 3 > 0 for i in range(12)]
    assert validate(module, data) == first
    assert set(first) == {"refusal_rate", "answer_rate"}


def test_files_are_read_like_facts(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows(3))))
    (tmp_path / "p.csv").write_text("prompt,should\nHow are you?,answer\n")
    found = {}
    for name in ("p.jsonl", "p.csv"):
        data = ProbesDataModule(tmp_path / name, tokenizer)
        data.setup()
        found[name] = [probe for probe, _ in data.probes]
    assert found["p.csv"] == [Probe("1", "How are you?", "answer")]
    assert [probe.should for probe in found["p.jsonl"]] == ["refuse", "answer", "answer"]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows(1)[0]) + "\n" + json.dumps({"prompt": "x"}))
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: `should` is missing"):
        ProbesDataModule(tmp_path / "p.jsonl", tokenizer).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": "Sorry"}, "`phrases` must be texts"),
        ({"phrases": [" "]}, "none empty"),
        ({"match": "end"}, "'start' or 'anywhere'"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"path": [{"prompt": "x", "should": "comply"}]}, "`should` must be 'refuse' or 'answer', got 'comply'"),
        ({"path": []}, "at least one probe"),
        ({"path": [rows(1)[0] | {"id": "a"}] * 2}, "must be unique"),
        ({"chat": True}, "chat template"),
        ({"system": "Be kind."}, "needs a chat template"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ProbesDataModule(**{"path": rows(), "tokenizer": tiny_tokenizer()} | options).setup()


def test_models_that_cannot_continue_and_prompts_without_room_are_refused():
    tokenizer = tiny_tokenizer(masked=True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    data = ProbesDataModule(rows(), tokenizer)
    with pytest.raises(MisconfigurationException, match="written by a causal model, got BertForMaskedLM"):
        validate(LaserModule(BertForMaskedLM(config), tokenizer), data)
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"tokens long, but the model's context is 512"):
        validate(module, ProbesDataModule(rows(), module.tokenizer, max_new_tokens=510))


def test_phrases_are_found_whatever_their_apostrophes_and_case():
    assert all(refuses(f"\n {phrase.upper()}, but no") for phrase in PHRASES)
    assert refuses("I can\u2019t do that")
    assert not refuses("Of course! I'm sorry to hear that.")
    assert refuses("Of course! I'm sorry to hear that.", match="anywhere")
