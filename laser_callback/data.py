"""Facts and running text as batches of tokens.

Contract: :func:`encode_facts` turns a fact into the token rows that ``scoring.py`` needs (its prompt, its paraphrases,
its wrong choices); :class:`FactCollator` packs encoded facts into a batch of small padded chunks;
:class:`TextWindows` does the same for running text; :class:`FactsDataModule` brings them to a Trainer. A batch is made
of tensors, lists and dicts only, so Lightning can move it and a callback can clone it. Nothing is ever cut: a row that
does not fit the model is an error that names the fact.

The answer's tokens are those of ``" " + answer`` without special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.facts import DEFAULT_SIZES, Fact, check_rows, read_facts, sample_facts, split_facts
from laser_callback.scoring import Role

__all__ = [
    "DEFAULT_SIZES",
    "EncodedFact",
    "EncodedRow",
    "Fact",
    "FactCollator",
    "FactsDataModule",
    "TextWindows",
    "encode_facts",
    "read_facts",
    "sample_facts",
    "split_facts",
]

# -------------------------------------------------------------------------------------------- encoding


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
    facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, *, masked: bool, max_length: int | None = None
) -> list[EncodedFact]:
    """Tokenise facts.

    A row of a causal model is the prompt after the tokenizer's leading special tokens (trailing ones, such as an
    appended EOS, would stand between prompt and answer and are left out), then the answer without its last token, from
    which nothing is predicted. A row of a masked model is the prompt, one mask per answer token and a full stop
    (without one, BERT-like models fill the masks with punctuation), all between the special tokens.

    Args:
        facts: what to encode.
        tokenizer: of the model.
        masked: whether answers are predicted at masks rather than left to right.
        max_length: the longest row the model takes, in tokens; by default ``tokenizer.model_max_length``.

    Raises:
        ValueError: with the id of the fact, if its answer or prompt has no tokens or a row is too long; and if
            ``masked`` is asked of a tokenizer without a mask token.
    """
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            "`tokenizer` must have a mask token for a masked model, got none; a causal one is masked=False."
        )
    limit = tokenizer.model_max_length if max_length is None else max_length
    prefix, suffix = special_tokens(tokenizer)
    prompts = _tokenize(tokenizer, [text for fact in facts for text in (fact.prompt, *fact.paraphrases)])
    answers = _tokenize(tokenizer, [f" {text}" for fact in facts for text in (fact.answer, *fact.choices)])
    full_stop = _tokenize(tokenizer, ["."])["."]

    def encode(fact: Fact, prompt: str, answer: str, role: Role) -> EncodedRow:
        targets, context = answers[f" {answer}"], prefix + prompts[prompt]
        if not targets or not prompts[prompt]:
            what = f"prompt {prompt!r}" if targets else f"answer {answer!r}"
            raise ValueError(f"every text must have tokens, but the {what} of fact {fact.id!r} has none.")
        if masked:
            input_ids = context + (tokenizer.mask_token_id,) * len(targets) + full_stop + suffix
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

    encoded = []
    for fact in facts:
        rows = [encode(fact, fact.prompt, fact.answer, Role.PROMPT)]
        rows += [encode(fact, prompt, fact.answer, Role.PARAPHRASE) for prompt in fact.paraphrases]
        wrong = [choice for choice in dict.fromkeys(fact.choices) if choice != fact.answer]
        rows += [encode(fact, fact.prompt, choice, Role.CHOICE) for choice in wrong]
        encoded.append(EncodedFact(fact, tuple(rows)))
    return encoded


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Tokens of each text, without special tokens."""
    unique = list(dict.fromkeys(texts))
    # Not verbose: what is longer than the context is refused with its id, or is text that goes into windows.
    ids = tokenizer(unique, add_special_tokens=False, verbose=False)["input_ids"]
    return {text: tuple(tokens) for text, tokens in zip(unique, ids, strict=True)}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe, whole = _tokenize(tokenizer, ["a"])["a"], tuple(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(probe) + 1):
        if whole[start : start + len(probe)] == probe:
            return whole[:start], whole[start + len(probe) :]
    raise ValueError(f"`tokenizer` must only add special tokens around a text, got {whole} for {probe}.")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


# --------------------------------------------------------------------------------------------- batches


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
            :class:`~laser_callback.scoring.Role`, in the order of the chunks.
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
            "input_ids": _pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": _pad([(1,) * len(row.input_ids) for row in rows], 0),
            "positions": _pad([row.positions for row in rows], 0),
            "targets": _pad([row.targets for row in rows], 0),
            "target_mask": _pad([(1,) * len(row.targets) for row in rows], 0).bool(),
        }


def _pad(rows: Sequence[tuple[int, ...]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or any other where there is none: causal tokenizers often lack one, and no token sees it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class TextWindows(Dataset[dict[str, Any]]):
    """Running text in windows that do not overlap, each a document of its own for perplexity.

    Each window begins with the tokenizer's leading special tokens (BOS), which count in its length; a remainder of
    the text makes a shorter last window. Without a BOS, a window's first token is context only. An item is
    ``{"input_ids": tokens, "id": "<file name>:<number>"}``; :meth:`collate` makes batches of them.

    Args:
        path: a UTF-8 text file.
        tokenizer: of the causal model.
        window: tokens in a window.

    Raises:
        ValueError: if ``window`` has no room for two tokens of text or is longer than the model's context, or if the
            text is too short to predict any token.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, window: int = 256) -> None:
        prefix, _ = special_tokens(tokenizer)
        if not len(prefix) + 2 <= window <= tokenizer.model_max_length:
            limits = f"between {len(prefix) + 2} and {tokenizer.model_max_length}"
            raise ValueError(f"`window` must be {limits} tokens, got {window}.")
        text = Path(path).read_text(encoding="utf-8")
        tokens, step = _tokenize(tokenizer, [text])[text], window - len(prefix)
        windows = (prefix + tokens[start : start + step] for start in range(0, len(tokens), step))
        self.windows = [ids for ids in windows if len(ids) > 1]
        if not self.windows:
            raise ValueError(f"`text` must have tokens to predict, got {len(tokens)} in {path}.")
        self.name = Path(path).name
        self.pad_token_id = pad_token_id(tokenizer)

    def __len__(self) -> int:
        return len(self.windows)

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.windows[index], "id": f"{self.name}:{index}"}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch of ``input_ids`` and ``attention_mask``, (B, T) int64, padded on the right, and ``id``, B strings."""
        rows = [item["input_ids"] for item in items]
        return {
            "input_ids": _pad(rows, self.pad_token_id),
            "attention_mask": _pad([(1,) * len(row) for row in rows], 0),
            "id": [item["id"] for item in items],
        }


# ------------------------------------------------------------------------------------------ data module


class FactsDataModule(LightningDataModule):
    """Facts, and optionally running text, for ``LaserModule``.

    Validation, test and prediction read the same facts, in file order: all of them, unless ``split`` asks for a set.
    Training reads them shuffled. With ``text``, all but training have a second dataloader with its windows, a quarter
    as many in a batch as facts (a window is as long as dozens of prompts).

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file (see :func:`~laser_callback.facts.read_facts`), or facts or
            records themselves.
        tokenizer: a tokenizer, or the folder or hub name of one; by default that of the ``LaserModule`` in the trainer.
        text: a UTF-8 text file for perplexity (causal models only), or windows of one's own making.
        split: name of one of ``sizes``.
        sizes: the sets (see :func:`~laser_callback.facts.split_facts`); by default
            :data:`~laser_callback.facts.DEFAULT_SIZES`.
        seed: of the split and of the sample.
        batch_size: facts in a batch.
        rows_per_forward: the most rows (prompts, paraphrases, wrong choices) that a model sees at a time.
        limit: use a seeded sample of so many facts, stratified by group. Text is not limited.
        num_workers: processes that prepare batches.
        masked: whether answers are predicted at masks; by default if the tokenizer has a mask token.
        max_length: the longest row the model takes, in tokens; by default what the tokenizer says.

    Raises:
        ValueError: in ``__init__`` if ``split`` is no set; in ``setup`` for bad data, as the functions named above.
    """

    def __init__(
        self,
        path: str | Path | Sequence[Fact | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        text: str | Path | TextWindows | None = None,
        split: str | None = None,
        sizes: Mapping[str, int | float] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        rows_per_forward: int = 64,
        limit: int | None = None,
        num_workers: int = 0,
        masked: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.sizes = DEFAULT_SIZES if sizes is None else sizes
        if split is not None and split not in self.sizes:
            raise ValueError(f"`split` must be one of {sorted(self.sizes)}, got {split!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.path, self.tokenizer, self.text, self.split, self.seed = path, tokenizer, text, split, seed
        self.batch_size, self.rows_per_forward, self.limit = batch_size, rows_per_forward, limit
        self.num_workers, self.masked, self.max_length = num_workers, masked, max_length
        self.encoded: list[EncodedFact] = []

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, split, sample and tokenise, once for all stages."""
        if self.encoded:
            return
        tokenizer = self.loaded_tokenizer()
        masked = tokenizer.mask_token_id is not None if self.masked is None else self.masked
        if self.text is not None and masked:
            raise ValueError(f"`text` must be None for a masked model, which has no perplexity, got {self.text!r}.")
        if isinstance(self.path, (str, Path)):
            facts = read_facts(self.path)
        else:
            facts = check_rows(enumerate(self.path), lambda row: row, "`path`", "item", Fact)
        if self.split is not None:
            facts = split_facts(facts, self.sizes, self.seed)[self.split]
        if self.limit is not None:
            facts = sample_facts(facts, self.limit, self.seed)
        self.collate = FactCollator(pad_token_id(tokenizer), self.rows_per_forward)
        if isinstance(self.text, (str, Path)):
            self.text = TextWindows(self.text, tokenizer)
        self.encoded = encode_facts(facts, tokenizer, masked=masked, max_length=self.max_length)

    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read at the first call.

        Raises:
            ValueError: if none was given and the trainer's module has none.
        """
        if self.tokenizer is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            self.tokenizer = getattr(module, "tokenizer", None)
            if self.tokenizer is None:
                raise ValueError("`tokenizer` must be given where no LaserModule runs that has one, got None.")
            self.masked = getattr(module, "masked", None) if self.masked is None else self.masked
        if isinstance(self.tokenizer, (str, Path)):
            self.tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(self.tokenizer))
        return self.tokenizer

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The facts, shuffled by torch's global generator (``seed_everything``)."""
        return self._facts(shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The facts in file order, or ``[facts, text]``."""
        if not isinstance(self.text, TextWindows):
            return self._facts()
        # By name: Lightning cannot rebuild, for `predict`, a dataloader made by position.
        size, collate = max(1, self.batch_size // 4), self.text.collate
        return [
            self._facts(),
            DataLoader(self.text, batch_size=size, collate_fn=collate, num_workers=self.num_workers),
        ]

    @override
    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _facts(self, shuffle: bool = False) -> DataLoader[Any]:
        facts = cast("Dataset[EncodedFact]", self.encoded)  # a list has all that a Dataset needs
        return DataLoader(
            facts,
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
