"""Random causal and masked language models of several families, with the vocabulary of the tiny tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
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


CAUSAL = {
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "cohere": lambda: build(CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=7.0)),
    "gpt2": lambda: build(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0),
    ),
}
