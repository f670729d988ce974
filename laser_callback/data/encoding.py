"""Facts as rows of tokens, and rows as batches.

Contract: :func:`encode_facts` turns a fact into the token rows that ``row_scores.py`` needs (its prompt, paraphrases,
wrong choices and neighbours); :class:`FactCollator` packs encoded facts into a batch of small padded chunks. A batch is
made of tensors, lists and dicts only, so Lightning can move it and a callback can clone it. Nothing is ever cut: a row
that does not fit the model is an error that names the fact.

What is scored is running text, as the model has learnt it: an answer's tokens are those that follow the prompt's in the
tokens of prompt, space and answer together. Alone, ``" " + answer`` would have others wherever a tokenizer puts
something in front of every text, as those of SentencePiece do. A token that holds the end of the prompt and the
beginning of the answer is the answer's: in the context it would give the answer away. One that joins only the space to
the prompt's end is the prompt's.

An answer's *first token* is the first one that is not white space. Many tokenizers write the space before a number, or
before a word that they do not know, as a token of its own: it says nothing about the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from laser_callback.data.facts import Fact
from laser_callback.data.generation import Generation
from laser_callback.data.row_scores import Role
from laser_callback.support.suggest import clipped


@dataclass(frozen=True)
class EncodedRow:
    """One row of model input.

    Attributes:
        input_ids: T tokens.
        positions: A indices into them; the logits there predict the targets.
        targets: A tokens.
        role: what the row is to its fact.
        first: index into the targets of the first token, the first that is not white space.
    """

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    role: Role
    first: int = 0


@dataclass(frozen=True)
class EncodedFact:
    """A fact and its rows: the prompt, each paraphrase, the prompt once per wrong choice, and each neighbour.

    Attributes:
        fact: it.
        rows: what is scored.
        asked: tokens that the model is to continue, where answers are written.
    """

    fact: Fact
    rows: tuple[EncodedRow, ...]
    asked: tuple[int, ...] = ()


def encode_facts(
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerBase,
    *,
    masked: bool,
    max_length: int | None = None,
    chat: bool = False,
    system: str | None = None,
    generation: Generation | None = None,
) -> list[EncodedFact]:
    """Tokenise facts.

    A row of a causal model is the prompt after the tokenizer's leading special tokens (once, also where the prompt
    brings them; trailing ones, such as an appended EOS, would stand between prompt and answer and are left out), then
    the answer without its last token, from which nothing is predicted. A row of a masked model is the prompt, one mask
    per answer token and the full stop's tokens behind the answer (without one, BERT-like models fill the masks with
    punctuation), all between the special tokens.

    Args:
        facts: what to encode.
        tokenizer: of the model.
        masked: whether answers are predicted at masks rather than left to right.
        max_length: the longest row the model takes, in tokens; by default ``tokenizer.model_max_length``.
        chat: put each prompt into the tokenizer's chat template, as a user's message that the answer replies to. All
            special tokens are then the template's own: a BOS that it does not write is not there.
        system: the system message that goes ahead of it.
        generation: how answers are written, if they are. A fact then has one row, its prompt, whose target is rationale
            and answer.

    Raises:
        ValueError: with the id of the fact, if its answer or prompt has no tokens, nothing is left to predict the
            answer from, a row is too long, or its own answer would not be judged right
            (:meth:`Generation.check`); if ``masked`` is asked of a tokenizer without a mask token, ``chat`` of one
            without a chat template, ``chat`` or ``generation`` for a masked model, or ``system`` without ``chat`` or of
            a template that takes none.
    """
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            "`tokenizer` must have a mask token for a masked model, got none; a causal one is masked=False."
        )
    if masked and chat:
        raise ValueError("`chat` must be False for a masked model, which replies to nothing, got True.")
    if masked and generation is not None:
        raise ValueError("`generation` must be None for a masked model, which writes nothing.")
    if system is not None and not chat:
        raise ValueError(f"`system` must be None without `chat`, got {system!r}; put it into the prompts.")
    limit = tokenizer.model_max_length if max_length is None else max_length
    leading, trailing = special_tokens(tokenizer)
    prompts = dict.fromkeys(prompt for fact in facts for prompt, _, _ in _asked(fact))
    written = {fact.prompt: generation.before(fact) for fact in facts} if generation is not None and not chat else {}
    starts = {text: _start("".join(written.get(text, (text, " ")))) for text in prompts}
    starts = _before_answers(tokenizer, prompts, system) if chat else starts
    rows_of = _asked if generation is None else _written
    asked = [(prompt, answer) for fact in facts for prompt, answer, _ in rows_of(fact)]
    wholes = {pair: "".join((*starts[pair[0]], pair[1])) for pair in asked}
    stopped = [f"{whole}." for whole in wholes.values()] if masked else []
    # What a model is to continue is a prompt without a space behind it, or the template as it is.
    continued = {text: "".join(start) if chat else written.get(text, (text, " "))[0] for text, start in starts.items()}
    texts = [*(text for text, _ in starts.values()), *wholes.values(), *stopped, *continued.values(), "."]
    tokens = tokenize(tokenizer, texts)

    @cache
    def is_blank(token: int) -> bool:
        return not tokenizer.decode([token]).strip()

    def encode(fact: Fact, prompt: str, answer: str, role: Role) -> EncodedRow:
        start, text = starts[prompt][0], wholes[prompt, answer]
        whole = tokens[text]
        border = _border(tokenizer, start, text, len(text) - len(answer), tokens)
        before, targets = whole[:border], whole[border:]
        if not tokens[start] or not targets:
            what = f"answer {answer!r}" if tokens[start] else f"prompt {prompt!r}"
            raise ValueError(f"every text must have tokens, but the {what} of fact {fact.id!r} has none.")
        context = before if chat else with_leading(leading, before)  # a template writes all special tokens itself
        if not context and not masked:
            raise ValueError(
                f"a prompt must have tokens of its own, but this tokenizer joins all of {_shorten(prompt)!r} of fact "
                f"{fact.id!r} to the answer {_shorten(answer)!r}; lengthen the prompt, or leave the fact out."
            )
        if masked:
            full_stop = _full_stop(tokenizer, whole, tokens[f"{text}."]) or tokens["."]
            input_ids = context + (tokenizer.mask_token_id,) * len(targets) + full_stop + trailing
            position = len(context)
        else:
            input_ids = context + targets[:-1]
            position = len(context) - 1
        if len(input_ids) > limit:
            raise ValueError(
                f"a row must have at most {limit} tokens, but the prompt {_shorten(prompt)!r} of fact {fact.id!r} with "
                f"the answer {_shorten(answer)!r} makes {len(input_ids)}; shorten it or leave the fact out."
            )
        first = next((i for i, token in enumerate(targets) if not is_blank(token)), 0)
        return EncodedRow(input_ids, tuple(range(position, position + len(targets))), targets, role, first)

    def ask(fact: Fact) -> tuple[int, ...]:
        if generation is None:
            return ()
        generation.check(fact, "" if chat else written[fact.prompt][1])
        prompt = tokens[continued[fact.prompt]]
        prompt = prompt if chat else with_leading(leading, prompt)
        if len(prompt) + generation.max_new_tokens > limit:
            raise ValueError(
                f"a prompt and `max_new_tokens` must be at most {limit} tokens, but {_shorten(fact.prompt)!r} of fact "
                f"{fact.id!r} makes {len(prompt)} and {generation.max_new_tokens}; shorten it, leave the fact out, or "
                "let less be written."
            )
        return prompt

    return [EncodedFact(fact, tuple(encode(fact, *row) for row in rows_of(fact)), ask(fact)) for fact in facts]


def _written(fact: Fact) -> Iterator[tuple[str, str, Role]]:
    """The prompt, and what should be written to it."""
    yield fact.prompt, fact.written, Role.PROMPT


def _asked(fact: Fact) -> Iterator[tuple[str, str, Role]]:
    """The prompts and answers that are a fact's rows."""
    yield fact.prompt, fact.answer, Role.PROMPT
    for prompt in fact.paraphrases:
        yield prompt, fact.answer, Role.PARAPHRASE
    for choice in dict.fromkeys(fact.choices):
        if choice != fact.answer:
            yield fact.prompt, choice, Role.CHOICE
    for neighbour in fact.neighbours:
        yield neighbour.prompt, neighbour.answer, Role.NEIGHBOUR


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


def _border(
    tokenizer: PreTrainedTokenizerBase, start: str, text: str, answer: int, tokens: dict[str, tuple[int, ...]]
) -> int:
    """How many tokens of a text are those of its start.

    Where the start alone has other tokens at its end, it is those that hold nothing of the answer, which begins at the
    character ``answer``. Tokenizers in Python cannot tell which: there it is those that are the same.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens[start], tokens[text], strict=False)))
    if same == len(tokens[start]) or not tokenizer.is_fast:
        return same
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return same + sum(1 for _ in takewhile(lambda span: span[1] <= answer, spans[same:]))


def _full_stop(tokenizer: PreTrainedTokenizerBase, text: tuple[int, ...], stopped: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of the full stop behind a text; where it becomes a part of the last word, the vocabulary's own."""
    if stopped[: len(text)] == text:
        return stopped[len(text) :]
    token = tokenizer.get_vocab().get(".")
    return () if token is None else (token,)


def shared_first_token(encoded: Sequence[EncodedFact], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence about the one first token of most answers, if these differ: it does not tell them apart."""
    answers: dict[int, set[str]] = {}
    counts = Counter[int]()
    for item in encoded:
        token = item.rows[0].targets[item.rows[0].first]
        answers.setdefault(token, set()).add(item.fact.answer)
        counts[token] += 1
    (token, count), *_ = counts.most_common(1)
    if 2 * count <= len(encoded) or len(answers[token]) == 1:
        return None
    return (
        f"{count} of {len(encoded)} answers begin with the token {tokenizer.convert_ids_to_tokens(token)!r}, "
        f"{len(answers[token])} different ones: metrics of the first token and of paraphrases hardly tell them apart; "
        "judge by `answer_accuracy` (`primary` of a LaserModule, `objective` of a search)"
    )


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """A user's message in the tokenizer's chat template, up to where the model replies, at once and not after thinking.

    A BOS that the prompt brings is left out where the template writes one.

    Raises:
        ValueError: if the tokenizer has no chat template, or its template takes no system message.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "`chat` must be False for a tokenizer without a chat template, got True; take the tokenizer of the chat "
            "model, or set its `chat_template`."
        )
    if (bos := tokenizer.bos_token) and prompt.startswith(bos):
        text = chat_text(tokenizer, prompt.removeprefix(bos), system)
        if text.startswith(bos):
            return text
    user = {"role": "user", "content": prompt}
    if system is None:
        return _render(tokenizer, [user], add_generation_prompt=True)
    try:
        text, refusal = (
            _render(tokenizer, [{"role": "system", "content": system}, user], add_generation_prompt=True),
            None,
        )
    except Exception as error:  # jinja2's own, which transformers does not need elsewhere
        text, refusal = "", error
    if refusal is not None or text == chat_text(tokenizer, prompt):
        said = f"refuses it ({clipped(refusal)})" if refusal is not None else "leaves it out"
        raise ValueError(
            f"`system` must be None for a chat template that takes no system message, got {system!r}, and this one "
            f"{said}; put the text into the prompts."
        ) from refusal
    return text


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    # Templates know no other variables than they use, so that only those of models that think ask for the last one.
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)


def _before_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], system: str | None
) -> dict[str, tuple[str, str]]:
    """For each prompt the text before a reply to it, and the space, if any, that the template writes between the two.

    A space belongs to the answer, in whose first token it is; other white space to the text before it.
    """
    ask = chat_text(tokenizer, "a")
    whole = _render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    reply = whole.removeprefix(ask) if whole.startswith(ask) else ""
    blank = reply[: len(reply) - len(reply.lstrip())]
    starts = {}
    for prompt in prompts:
        starts[prompt] = _start(chat_text(tokenizer, prompt, system) + blank)
    return starts


def _start(text: str) -> tuple[str, str]:
    return text.removesuffix(" "), " " if text.endswith(" ") else ""


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
        generation: how answers are written, if they are.
        writes: whether the model is to write them, or only the loss of what should be written is asked for.

    Raises:
        ValueError: if ``rows_per_forward`` is below 1.
    """

    pad_token_id: int
    rows_per_forward: int = 64
    generation: Generation | None = None
    writes: bool = True

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
            ``targets``, (r, A) int64, ``target_mask``, (r, A) bool, and ``first``, (r,) int64. Row by row, the logits
            at ``positions[target_mask]`` predict ``targets[target_mask]``; ``first`` is each first token's column.
            With ``generation`` also ``accepted``, a list of right answers for each fact, and ``asked``: empty, or with
            ``input_ids`` and ``attention_mask``, (F, T) int64, padded on the left, ``max_new_tokens``, ``stop`` and
            ``judged``, which tells the answer in each continuation and whether it is right.
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
            **({} if self.generation is None else self._to_write(encoded, self.generation)),
        }

    def _to_write(self, encoded: Sequence[EncodedFact], generation: Generation) -> dict[str, Any]:
        accepted = [list(item.fact.accepted) for item in encoded]
        if not self.writes:
            return {"accepted": accepted, "asked": {}}
        asked = [item.asked for item in encoded]
        return {
            "accepted": accepted,
            "asked": {
                "input_ids": pad(asked, self.pad_token_id, side="left"),
                "attention_mask": pad([(1,) * len(row) for row in asked], 0, side="left"),
                "max_new_tokens": generation.max_new_tokens,
                "stop": list(generation.stop),
                "judged": generation.judged,
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
            "first": torch.tensor([row.first for row in rows]),
        }


def pad(rows: Sequence[tuple[int, ...]], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Rows of tokens as one tensor."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or any other where there is none: causal tokenizers often lack one, and no token sees it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
