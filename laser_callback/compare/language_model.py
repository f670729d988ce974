"""A language model that transformers has made: its kind, its context, and its logits where they are wanted.

Contract: nothing here knows facts or metrics, and no model is changed.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Literal

import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from laser_callback.support.interrupts import whole as undivided
from laser_callback.support.pretrained import named, read_config, whole

_SPACE_MARK = "\u2581"  # of SentencePiece
_PART = "\ufffd"  # what a part of a character decodes to


def load_language_model(name: str, allow_missing: bool = False) -> PreTrainedModel:
    """The masked or causal model of a folder or hub name; causal where its config does not say.

    What also sees or hears is loaded in its own class, so that its matrices have the names that they have everywhere.

    Args:
        name: of the model.
        allow_missing: only warn of weights that are missing.

    Raises:
        MisconfigurationException: if its config names a class that cannot go through text alone.
    """
    with named(name):
        architectures = list(map(str, read_config(name).architectures or ()))
    kinds = {kind_of(architecture) for architecture in architectures}
    for architecture in architectures if kinds == {None} else ():
        if obstacle := _obstacle(getattr(transformers, architecture, None)):
            raise _no_language_model(architecture, obstacle)
    kind = AutoModelForMaskedLM if "masked" in kinds else AutoModelForCausalLM
    if kinds == {"causal"} and any(map(_is_multimodal, architectures)):
        kind = AutoModelForMultimodalLM
    with named(name):
        return whole(kind, name, allow_missing)


def kind_of(name: str) -> Literal["masked", "causal"] | None:
    """What a class of this name models; ``None`` if no language.

    Not all classes are among transformers' own: PEFT wraps them, and a model may bring its code. Those tell by suffix.
    A class that also sees or hears is causal if it can go through text alone.
    """
    # Masked first: XLM's class is both.
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("MaskedLM"):
        return "masked"
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(("CausalLM", "LMHeadModel"))
    if _is_multimodal(name) and not causal:
        causal = _obstacle(getattr(transformers, name, None)) is None
    return "causal" if causal else None


def is_masked(model: PreTrainedModel) -> bool:
    """Whether it is a masked language model, and not a causal one.

    Raises:
        MisconfigurationException: if it is neither, or a causal one whose tokens see those behind them.
    """
    kind = kind_of(name := type(model).__name__)
    if kind is None:
        raise _no_language_model(name, _obstacle(type(model)))
    ahead = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
    if kind == "causal" and ahead in (True, "all"):  # Gemma 4's "vision" is for images only
        raise _no_language_model(name, "which reads its prompt in both directions and would see the answer")
    return kind == "masked"


def _is_multimodal(name: str) -> bool:
    return name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()


def _obstacle(kind: type[nn.Module] | None) -> str | None:
    """Why a class does not take text alone, from left to right; ``None`` if its ``forward`` does not say."""
    if kind is None:
        return None
    inputs = inspect.signature(kind.forward).parameters
    if "decoder_input_ids" in inputs:
        return "an encoder-decoder"
    if "input_ids" not in inputs:
        return "which takes no `input_ids`"
    plain = [each for each in list(inputs.values())[1:] if each.kind is each.POSITIONAL_OR_KEYWORD]
    needed = [f"`{each.name}`" for each in plain if each.default is each.empty and each.name != "input_ids"]
    return f"which needs {', '.join(needed)} beside text" if needed else None


def _no_language_model(name: str, obstacle: str | None) -> MisconfigurationException:
    return MisconfigurationException(
        f"`model` must be a causal or masked language model, got {name}{f', {obstacle}' if obstacle else ''}. A model "
        "that also takes images or sound is scored on text if AutoModelForMultimodalLM loads it and it needs no more "
        "than `input_ids`. Use LaserCallback with a LightningModule of your own for other tasks"
    )


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that ``model`` has positions for, if there is a limit."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)  # RoBERTa-like models count positions from there on
    return longest if longest is None or padding is None else longest - padding - 1


def refuse_too_long(
    context: int | None, masks: Sequence[Tensor], owner: Tensor, ids: Sequence[str], new: int = 0
) -> None:
    """Refuse rows, each of the example ``ids[owner[row]]``, that with ``new`` tokens exceed the context."""
    width = max(mask.shape[1] for mask in masks) + new
    if context is None or width <= context:
        return
    lengths = (torch.cat([mask.sum(1) for mask in masks]) + new).tolist()
    long = [ids[i] for i, length in zip(owner.tolist(), lengths, strict=True) if length > context]
    raise ValueError(
        f"a row is {max(lengths)} tokens long, but the model's context is {context}: shorten or leave out "
        f"{', '.join(dict.fromkeys(long))}"
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Each token as a text of its own: two tokens have the same text only if they are the same.

    That is what the token decodes to, with the spaces that its name in the vocabulary marks where decoding has cut
    them. Where this is nothing, a part of a character or the text of another token, it is the name.
    """
    texts = _vocabulary(tokenizer, len(tokenizer))
    return [texts.get(token, f"token {token}") for token in tokens]  # a model may have rows for more than there are


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """The texts of all ``size`` tokens."""
    decode = tokenizer.backend_tokenizer.decode if tokenizer.is_fast else tokenizer.decode  # ten times as fast

    def text_of(name: str, token: int) -> str:
        text, marks = decode([token], skip_special_tokens=False), len(name) - len(name.lstrip(_SPACE_MARK))
        return " " * marks + text.lstrip(" ") if marks else text

    names = {token: name for name, token in tokenizer.get_vocab().items()}
    texts = {token: text_of(name, token) for token, name in sorted(names.items())}

    def rank(token: int) -> tuple[bool, bool]:  # "A" is first called so, and then <0x41>, which also decodes to it
        text = texts[token]
        return not text or _PART in text, names[token].replace(_SPACE_MARK, " ") != text

    taken: dict[str, int] = {}
    for token in sorted(texts, key=rank):
        others = (_PART * count + names[token] for count in itertools.count())
        options = others if rank(token)[0] else itertools.chain([texts[token]], others)
        taken[next(text for text in options if text not in taken)] = token
    return {token: text for text, token in taken.items()}


def logits_of(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits of one pass, which has no use for a key/value cache."""
    options = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    return model(input_ids=input_ids, attention_mask=attention_mask, **options).logits


@undivided
def logits_at(model: PreTrainedModel, rows: Tensor, columns: Tensor) -> Generator[None, None, None]:
    """Within: the model's output layer sees only the hidden states at (rows[i], columns[i]); logits are (1, P, V).

    At the output layer and not by indexing the logits, because the vocabulary is the largest matrix of a small model;
    and not by calling the inner model, because scaling or capping of logits is the outer model's.

    Raises:
        MisconfigurationException: if the model has no output layer.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise MisconfigurationException(f"{type(model).__name__} has no output embeddings: it is no language model")

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns][None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
