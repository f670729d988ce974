"""Tiny tokenizers and models, made in memory: no file, no network, the same on every machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "The capital of France is Paris and the capital of Italy is Rome.",
    "The currency of Japan is the yen. Canberra is the capital city of Australia.",
    "This claim is true. This claim is false. People in Brazil speak Portuguese.",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<mask>"]


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text has tokens
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, bos: bool = False, eos: bool = False, masked: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 380 tokens; on request it wraps texts in BOS and EOS, or knows a mask token."""
    tokenizer = Tokenizer.from_str(_bpe())
    if bos or eos:
        template = "<s> " * bos + "$A" + " </s>" * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        **({"mask_token": "<mask>"} if masked else {}),
    )


def tiny_causal_lm(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in eval mode: 4 layers, width 32, the vocabulary of :func:`tiny_tokenizer`."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for weight in model.parameters():  # the default initialisation gives near-uniform predictions
            if weight.dim() == 2:
                weight.data.normal_(std=0.3)
    return model.eval()


def save_deep_lm(folder: Path) -> Path:
    """Write a model as deep as the plans of README and recipes need (30 layers, width 16), its tokenizer, and data.

    The data: 60 facts of 60 subjects in ``facts.jsonl`` and running text in ``text.txt``.
    """
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=30,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [f'{{"prompt": "The capital of the country {i} is", "answer": "Paris"}}\n' for i in range(60)]
    (folder / "facts.jsonl").write_text("".join(rows))
    (folder / "text.txt").write_text("Paris is the capital of France. " * 400)
    return folder
