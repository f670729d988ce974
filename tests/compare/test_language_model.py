"""What a model of transformers is: masked or causal, also where its class is neither by name."""

from __future__ import annotations

import pytest
from brute_force import assert_close, brute_force
from fact_rows import facts, run
from language_models import VOCABULARY, build
from tiny import tiny_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, XLMConfig, XLMWithLMHeadModel

from laser_callback import LaserModule
from laser_callback.compare.language_model import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2LMHeadModel", "causal"),
        ("ReformerModelWithLMHead", "causal"),
        ("PeftModelForCausalLM", "causal"),  # not transformers' own
        ("BertForMaskedLM", "masked"),
        ("XLMWithLMHeadModel", "masked"),  # its auto classes are both
        ("T5ForConditionalGeneration", None),
        ("BertForPreTraining", None),
    ],
)
def test_kind(name, kind):
    assert kind_of(name) == kind


SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(BartForConditionalGeneration, BartConfig(**SMALL, **BART, **HEADS, pad_token_id=2)),
        lambda: build(XLMWithLMHeadModel, XLMConfig(**SMALL, emb_dim=32, n_layers=2, n_heads=4, pad_index=2)),
    ],
)
def test_masked_by_its_auto_class_and_not_by_its_name(trainer, make):
    tokenizer, model, rows = tiny_tokenizer(masked=True), make(), facts(n=8)
    module = LaserModule(model, tokenizer)
    assert module.masked
    assert_close(run(trainer, module, rows), brute_force(model, tokenizer, rows, masked=True)["metrics"])
