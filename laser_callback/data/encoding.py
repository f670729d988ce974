"""Facts as rows of tokens, and rows as batches.

Contract: :func:`encode_facts` turns a fact into the token rows that ``row_scores.py`` needs (its prompt, paraphrases
and wrong choices); :class:`FactCollator` packs encoded facts into a batch of small padded chunks. A batch is made of
tensors, lists and dicts only, so Lightning can move it and a callback can clone it. Nothing is ever cut: a row that
does not fit the model is an error that names the fact.

What is scored is running text, as the model has learnt it: an answer's tokens are those that follow the prompt's in the
tokens of prompt, space and answer together. Alone, ``" " + answer`` would have others wherever a tokenizer puts
something in front of every text, as those of SentencePiece do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from laser_callback.data.facts import Fact
from laser_callback.data.row_scores import Role


@dataclass(frozen=True)
class EncodedRow:
    """One row of model input.

    Attributes:
        input_ids: T tokens.
        positions: A indices into them; the logits there predict the targets.
        targets: A tokens.
        role: what the row is to its fact.
    """

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class EncodedFact:
    """A fact and its rows: the prompt, each paraphrase, and the prompt once per wrong choice."""

    fact: Fact
    rows: tuple[EncodedRow, ...]


def encode_facts(
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerBase,
    *,
    masked: bool,
    max_length: int | None = None,
    chat: bool = False,
) -> list[EncodedFact]:
    """Tokenise facts.

    A row of a causal model is the prompt after the tokenizer's leading special tokens (once, also where the prompt
    brings them; trailing ones, such as an appended EOS, would stand between prompt and answer and are left out), then
    the answer without its last token, from which nothing is predicted. A row of a masked model is the prompt, one mask
    per answer token and a full stop (without one, BERT-like models fill the masks with punctuation), all between the
    special tokens.

    Args:
        facts: what to encode.
        tokenizer: of the model.
        masked: whether answers are predicted at masks rather than left to right.
        max_length: the longest row the model takes, in tokens; by default ``tokenizer.model_max_length``.
        chat: put each prompt into the tokenizer's chat template, as a user's message that the answer replies to.

    Raises:
        ValueError: with the id of the fact, if its answer or prompt has no tokens, the tokenizer joins the two, or a
            row is too long; if ``masked`` is asked of a tokenizer without a mask token, or ``chat`` of one without a
            chat template or for a masked model.
    """
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            "`tokenizer` must have a mask token for a masked model, got none; a causal one is masked=False."
        )
    if masked and chat:
        raise ValueError("`chat` must be False for a masked model, which replies to nothing, got True.")
    limit = tokenizer.model_max_length if max_length is None else max_length
    leading, trailing = special_tokens(tokenizer)
    prompts = dict.fromkeys(text for fact in facts for text in (fact.prompt, *fact.paraphrases))
    starts = _before_answers(tokenizer, prompts) if chat else {text: (text, " ") for text in prompts}
    asked = [(prompt, answer) for fact in facts for prompt, answer, _ in _asked(fact)]
    wholes = {pair: "".join((*starts[pair[0]], pair[1])) for pair in asked}
    tokens = tokenize(tokenizer, [*(text for text, _ in starts.values()), *wholes.values()])
    full_stop = _full_stop(tokenizer) if masked else ()

    def encode(fact: Fact, prompt: str, answer: str, role: Role) -> EncodedRow:
        before, whole = tokens[starts[prompt][0]], tokens[wholes[prompt, answer]]
        if not before or whole == before:
            what = f"answer {answer!r}" if before else f"prompt {prompt!r}"
            raise ValueError(f"every text must have tokens, but the {what} of fact {fact.id!r} has none.")
        if whole[: len(before)] != before:
            raise ValueError(
                f"the tokens of a prompt must begin those of prompt and answer, but this tokenizer joins the prompt "
                f"{_shorten(prompt)!r} of fact {fact.id!r} to the answer {_shorten(answer)!r}; end the prompt in "
                "another way, or leave the fact out."
            )
        targets = whole[len(before) :]
        context = before if chat else with_leading(leading, before)  # a template writes all special tokens itself
        if masked:
            input_ids = context + (tokenizer.mask_token_id,) * len(targets) + full_stop + trailing
            first = len(context)
        else:
            input_ids = context + targets[:-1]
            first = len(context) - 1
        if len(input_ids) > limit:
            raise ValueError(
                f"a row must have at most {limit} tokens, but the prompt {_shorten(prompt)!r} of fact {fact.id!r} with "
                f"the answer {_shorten(answer)!r} makes {len(input_ids)}; shorten it or leave the fact out."
            )
        return EncodedRow(input_ids, tuple(range(first, first + len(targets))), targets, role)

    return [EncodedFact(fact, tuple(encode(fact, *row) for row in _asked(fact))) for fact in facts]


def _asked(fact: Fact) -> Iterator[tuple[str, str, Role]]:
    """The prompts and answers that are a fact's rows."""
    yield fact.prompt, fact.answer, Role.PROMPT
    for prompt in fact.paraphrases:
        yield prompt, fact.answer, Role.PARAPHRASE
    for choice in dict.fromkeys(fact.choices):
        if choice != fact.answer:
            yield fact.prompt, choice, Role.CHOICE


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Tokens of each text, without special tokens."""
    unique = list(dict.fromkeys(texts))
    # Not verbose: what is longer than the context is refused with its id, or is text that goes into windows.
    ids = tokenizer(unique, add_special_tokens=False, verbose=False)["input_ids"]
    return {text: tuple(tokens) for text, tokens in zip(unique, ids, strict=True)}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe, whole = tokenize(tokenizer, ["a"])["a"], tuple(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(probe) + 1):
        if whole[start : start + len(probe)] == probe:
            return whole[:start], whole[start + len(probe) :]
    raise ValueError(f"`tokenizer` must only add special tokens around a text, got {whole} for {probe}.")


def with_leading(leading: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
    """A text's tokens after the leading special tokens, which it may have brought itself."""
    return tokens if tokens[: len(leading)] == leading else leading + tokens


def _full_stop(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a full stop that follows a word, or stands alone where it would become a part of the word."""
    alone, word, whole = tokenize(tokenizer, [".", "a", "a."]).values()
    return whole[len(word) :] if whole[: len(word)] == word and whole != word else alone


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """A user's message in the tokenizer's chat template, up to where the model replies, at once and not after thinking.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "`chat` must be False for a tokenizer without a chat template, got True; take the tokenizer of the chat "
            "model, or set its `chat_template`."
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    # Templates know no other variables than they use, so that only those of models that think ask for the last one.
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def _before_answers(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> dict[str, tuple[str, str]]:
    """For each prompt the text before a reply to it, and the space, if any, that the template writes between the two.

    A space belongs to the answer, in whose first token it is; other white space to the text before it.
    """
    ask = chat_text(tokenizer, "a")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    reply = whole.removeprefix(ask) if whole.startswith(ask) else ""
    blank = reply[: len(reply) - len(reply.lstrip())]
    starts = {}
    for prompt in prompts:
        text = chat_text(tokenizer, prompt) + blank
        starts[prompt] = text.removesuffix(" "), " " if text.endswith(" ") else ""
    return starts


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


# ---- batches ---------------------------------------------------------------------------------------------------------

PADDING = 0.25
"""A chunk ends where padding would be more than this share of its tokens ..."""
SMALLEST_CHUNK = 16
"""... but not with fewer rows than this: each chunk has costs of its own."""


@dataclass(frozen=True)
class FactCollator:
    """Packs F encoded facts into a batch of R rows.

    Rows are sorted by length and cut into chunks, each padded on the right to its own longest row. Right padding is
    exact: in a causal model no token sees a later one, so no pad is ever seen, and all positions count from 0 as they
    would without it; in a masked model ``attention_mask`` hides the pads.

    Args:
        pad_token_id: what to pad with.
        rows_per_forward: the most rows in a chunk.

    Raises:
        ValueError: if ``rows_per_forward`` is below 1.
    """

    pad_token_id: int
    rows_per_forward: int = 64

    def __post_init__(self) -> None:
        if self.rows_per_forward < 1:
            raise ValueError(f"`rows_per_forward` must be at least 1, got {self.rows_per_forward}.")

    def __call__(self, encoded: Sequence[EncodedFact]) -> dict[str, Any]:
        """Make the batch.

        Returns:
            ``id``, ``group``, ``subject``, ``prompt``, ``answer``: lists of F strings.
            ``row_fact``, ``row_role``: (R,) int64, index of each row's fact and its
            :class:`~laser_callback.data.row_scores.Role`, in the order of the chunks.
            ``chunks``: a list of dicts with ``input_ids`` and ``attention_mask``, (r, T) int64, ``positions`` and
            ``targets``, (r, A) int64, and ``target_mask``, (r, A) bool. Row by row, the logits at
            ``positions[target_mask]`` predict ``targets[target_mask]``.
        """
        rows = [(index, row) for index, item in enumerate(encoded) for row in item.rows]
        rows.sort(key=lambda pair: len(pair[1].input_ids))
        return {
            "chunks": [self._chunk(chunk) for chunk in self._split([row for _, row in rows])],
            "row_fact": torch.tensor([index for index, _ in rows]),
            "row_role": torch.tensor([row.role for _, row in rows]),
            **{
                name: [getattr(item.fact, name) for item in encoded]
                for name in ("id", "group", "subject", "prompt", "answer")
            },
        }

    def _split(self, rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
        """Cut rows, sorted by length, where a further one would make too much of the chunk padding."""
        chunk: list[EncodedRow] = []
        tokens = 0
        for row in rows:
            length = len(row.input_ids)
            padded = (len(chunk) + 1) * length > (1 + PADDING) * (tokens + length)
            if len(chunk) == self.rows_per_forward or (len(chunk) >= SMALLEST_CHUNK and padded):
                yield chunk
                chunk, tokens = [], 0
            chunk.append(row)
            tokens += length
        if chunk:
            yield chunk

    def _chunk(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        return {
            "input_ids": pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": pad([(1,) * len(row.input_ids) for row in rows], 0),
            "positions": pad([row.positions for row in rows], 0),
            "targets": pad([row.targets for row in rows], 0),
            "target_mask": pad([(1,) * len(row.targets) for row in rows], 0).bool(),
        }


def pad(rows: Sequence[tuple[int, ...]], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Rows of tokens as one tensor."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or any other where there is none: causal tokenizers often lack one, and no token sees it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
