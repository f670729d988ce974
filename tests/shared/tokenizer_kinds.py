"""Real tokenizers of every kind that language models have, trained in memory on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tiny import SENTENCES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARK = "\u2581"
SPECIAL = ["<s>", "</s>", "<pad>", "<mask>", "<unk>"]
_WORDS = ["Paris", "Rome", "yen", "Portuguese", "today", "true", "false", "is", "the", "a"]
_MORE = [f"{word} {word} {word}" for word in _WORDS]
_MORE += ["".join(map(chr, range(33, 127))), "\n"]


def _trained(model: Any, trainer: Callable[..., Any], pre_tokenizer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    options = {"special_tokens": SPECIAL, "show_progress": False, **options}
    tokenizer.train_from_iterator(SENTENCES + _MORE, trainer(**options))
    return tokenizer


def _llama2() -> Tokenizer:
    """Llama 2, TinyLlama, Phi-3: the mark is prepended and replaced by the normalizer, and nothing splits words."""
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = _trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, words, vocab_size=300)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    """Newer Llama and Mistral files: the mark is put in by the pre-tokenizer."""
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = _trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, words, vocab_size=300)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _unigram(scheme: str) -> Tokenizer:
    """XLM-RoBERTa, ALBERT, T5; without a mark in front of every text, what SentencePiece calls no dummy prefix."""
    words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = _trained(models.Unigram(), trainers.UnigramTrainer, words, vocab_size=120, unk_token="<unk>")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """What is not in the vocabulary becomes its bytes, as in Llama 2, Mistral and Gemma."""
    state = json.loads(tokenizer.to_str())
    model, names = state["model"], [f"<0x{byte:02X}>" for byte in range(256)]
    if isinstance(model["vocab"], dict):
        model["vocab"].update({name: len(model["vocab"]) + i for i, name in enumerate(names)})
    else:
        model["vocab"] += [[name, -100.0] for name in names]
    model["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _word_piece() -> Tokenizer:
    """BERT."""
    words = pre_tokenizers.BertPreTokenizer()
    tokenizer = _trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, words, vocab_size=300)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(*before: Any) -> Tokenizer:
    """GPT-2, Llama 3, Qwen, RoBERTa; with digits split before, SmolLM2 and StarCoder."""
    words = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = _trained(models.BPE(), trainers.BpeTrainer, words, vocab_size=384, initial_alphabet=alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama2": _llama2,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "bytes": lambda: _with_bytes(_llama2()),
    "unigram": lambda: _unigram("always"),
    "unigram never": lambda: _unigram("never"),
    "unigram bytes": lambda: _with_bytes(_unigram("always")),
    "word piece": _word_piece,
    "byte level": _byte_level,
    "digits": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
}


@cache
def _file(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer_of(kind: str, *, bos: bool = False, eos: bool = False, masked: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, which on request wraps texts in BOS and EOS, or knows a mask token."""
    tokenizer = Tokenizer.from_str(_file(kind))
    if bos or eos:
        template = "<s> " * bos + "$A" + " </s>" * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if masked:
        names["mask_token"] = "<mask>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
