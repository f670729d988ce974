"""Facts and running text for a Trainer.

Contract: :class:`TextWindows` cuts running text into windows for perplexity; :class:`FactsDataModule` brings encoded
facts and windows to a Trainer, as ``encoding.py`` packs them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.data.encoding import (
    EncodedFact,
    FactCollator,
    encode_facts,
    pad,
    pad_token_id,
    shared_first_token,
    special_tokens,
    tokenize,
    with_leading,
)
from laser_callback.data.facts import DEFAULT_SIZES, Fact, records_of, sample_facts, split_facts
from laser_callback.data.generation import EXACT_MATCH, Generation
from laser_callback.data.lm_eval.answers import TaskAnswers
from laser_callback.data.lm_eval.documents import TaskDocuments
from laser_callback.data.lm_eval.reading import read_lm_eval
from laser_callback.data.lm_eval.source import context_of, is_lm_eval
from laser_callback.data.scoring import OF_TEXT
from laser_callback.support.pretrained import load_tokenizer
from laser_callback.support.reading import read_text


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
        FileNotFoundError: if there is no such file.
    """

    metrics = OF_TEXT
    """What is measured on them."""

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, window: int = 256) -> None:
        leading, _ = special_tokens(tokenizer)
        if not len(leading) + 2 <= window <= tokenizer.model_max_length:
            limits = f"between {len(leading) + 2} and {tokenizer.model_max_length}"
            raise ValueError(f"`window` must be {limits} tokens, got {window}.")
        text = read_text(path, "text")
        tokens, step = tokenize(tokenizer, [text])[text], window - len(leading)
        windows = (with_leading(leading, tokens[start : start + step]) for start in range(0, len(tokens), step))
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
            "input_ids": pad(rows, self.pad_token_id),
            "attention_mask": pad([(1,) * len(row) for row in rows], 0),
            "id": [item["id"] for item in items],
        }


class FactsDataModule(LightningDataModule):
    """Facts, and optionally running text, for ``LaserModule``.

    Validation, test and prediction read the same facts, in file order: all of them, unless ``split`` asks for a set.
    Training reads them shuffled. With ``text``, all but training have a second dataloader with its windows, a quarter
    as many in a batch as facts (a window is as long as dozens of prompts).

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file (see :func:`~laser_callback.data.read_facts`), facts or
            records themselves, or ``lm_eval:TASK`` (see :func:`~laser_callback.data.read_lm_eval`).
        tokenizer: a tokenizer, or the folder or hub name of one; by default that of the ``LaserModule`` in the trainer.
        text: a UTF-8 text file for perplexity (causal models only), ``lm_eval:TASK`` for a task such as wikitext, or
            windows or documents of one's own making.
        split: name of one of ``sizes``.
        sizes: the sets (see :func:`~laser_callback.data.split_facts`); by default
            ``DEFAULT_SIZES``.
        seed: of the split and of the sample.
        batch_size: facts in a batch.
        rows_per_forward: the most rows (prompts, paraphrases, wrong choices) that a model sees at a time.
        limit: use a seeded sample of so many facts, stratified by group. Text is not limited.
        num_workers: processes that prepare batches.
        masked: whether answers are predicted at masks; by default if the tokenizer has a mask token.
        max_length: the longest row the model takes, in tokens; by default what the tokenizer says.
        chat: put each prompt into the tokenizer's chat template, as a user's message that the answer replies to.
        system: the system message that goes ahead of it.
        generation: let the model write its answers, and judge these; paraphrases and choices are then not asked.

    Attributes:
        metric: what a search of these facts improves by default; ``None`` leaves that to the search. Of a task of
            ``lm_eval`` it is known after ``setup``, and so is ``generation``.
        context: the most tokens that the model reads; by default that of the trainer's module, if it says so.

    Raises:
        ValueError: in ``__init__`` if ``split`` is no set; in ``setup`` for bad data, as the functions named above.
    """

    metric: str | None = None
    context: int | None = None

    def __init__(
        self,
        path: str | Path | Sequence[Fact | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        text: str | Path | TextWindows | TaskDocuments | None = None,
        split: str | None = None,
        sizes: Mapping[str, int | float] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        rows_per_forward: int = 64,
        limit: int | None = None,
        num_workers: int = 0,
        masked: bool | None = None,
        max_length: int | None = None,
        chat: bool = False,
        system: str | None = None,
        generation: Generation | None = None,
    ) -> None:
        super().__init__()
        self.generation, self.metric = generation, self.metric if generation is None else EXACT_MATCH
        self.sizes = DEFAULT_SIZES if sizes is None else sizes
        if generation is not None and is_lm_eval(path):
            raise ValueError(
                f"`generation` must be None for a task of lm_eval, which says how answers are written, got "
                f"{generation}; ?max_gen_toks=64 behind the task lets less be written."
            )
        if split is not None and split not in self.sizes:
            raise ValueError(f"`split` must be one of {sorted(self.sizes)}, got {split!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.path, self.tokenizer, self.text, self.split, self.seed = path, tokenizer, text, split, seed
        self.batch_size, self.rows_per_forward, self.limit = batch_size, rows_per_forward, limit
        self.num_workers, self.masked, self.max_length = num_workers, masked, max_length
        self.chat, self.system = chat, system
        self.encoded: list[EncodedFact] = []

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, split, sample and tokenise, once for all stages."""
        if self.encoded:
            self._check_context()
            return
        tokenizer = self.loaded_tokenizer()
        masked = tokenizer.mask_token_id is not None if self.masked is None else self.masked
        if self.text is not None and masked:
            raise ValueError(f"`text` must be None for a masked model, which has no perplexity, got {self.text!r}.")
        if is_lm_eval(self.path) and masked:
            raise ValueError(f"`path` must be facts for a masked model, which lm_eval does not score, got {self.path}.")
        chat, system, limit = self.chat, self.system, self.max_length
        if is_lm_eval(self.path):
            read = read_lm_eval(str(self.path), tokenizer, chat=chat, system=system)
            facts, self.metric, self.generation = read
            if self.generation is not None:  # lm_eval has put the prompts into the template, and asks the model alone
                chat, system = False, None
                limit = sys.maxsize  # prompts that are too long are cut below
        else:
            facts = records_of(self.path, Fact)
        if self.split is not None:
            facts = split_facts(facts, self.sizes, self.seed)[self.split]
        if self.limit is not None:
            facts = sample_facts(facts, self.limit, self.seed)
        self.collate = FactCollator(pad_token_id(tokenizer), self.rows_per_forward, self.generation)
        if is_lm_eval(self.text):
            context = self.max_length or self._context() or context_of(tokenizer)
            self.text = TaskDocuments(str(self.text), tokenizer, context)
        elif isinstance(self.text, (str, Path)):
            self.text = TextWindows(self.text, tokenizer)
        self.encoded = encode_facts(
            facts,
            tokenizer,
            masked=masked,
            max_length=limit,
            chat=chat,
            system=system,
            generation=self.generation,
        )
        if isinstance(self.generation, TaskAnswers):
            limit = self.max_length or self._context() or context_of(tokenizer)
            self.encoded = self.generation.fitted(self.encoded, limit)
        self._check_context()
        if self.generation is None and (warning := shared_first_token(self.encoded, tokenizer)):
            rank_zero_warn(warning)

    def _context(self) -> int | None:
        return self.context or getattr(self.trainer and self.trainer.lightning_module, "context", None)

    def _check_context(self) -> None:
        """Refuse prompts that leave the model no room to answer."""
        context = self._context()
        new = 0 if self.generation is None else self.generation.max_new_tokens
        long = [item for item in self.encoded if new and context is not None and len(item.asked) + new > context]
        if long:
            raise ValueError(
                f"`max_new_tokens` must leave room for the prompts in the model's context of {context} tokens, but "
                f"fact {long[0].fact.id!r} makes {len(long[0].asked)}, and {new} may be written; shorten or leave out "
                f"{len(long)} of {len(self.encoded)} facts, or let less be written."
            )

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
            self.tokenizer = load_tokenizer(self.tokenizer)
        return self.tokenizer

    @property
    def provenance(self) -> dict[str, Any]:
        """What is asked and how, as plain data for reports; of all that can be asked otherwise only what is."""
        found: dict[str, Any] = {"facts": str(self.path)} if isinstance(self.path, (str, Path)) else {}
        if type(self.generation) is Generation:  # a task of lm_eval says it by its name
            found["generation"] = asdict(self.generation)
        told = {"limit": self.limit, "chat": self.chat, "system": self.system, "split": self.split}
        return found | {name: value for name, value in told.items() if value}

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The facts, shuffled by torch's global generator (``seed_everything``)."""
        return self._facts(shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The facts in file order, or ``[facts, text]``."""
        if not isinstance(self.text, (TextWindows, TaskDocuments)):
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
            collate_fn=replace(self.collate, writes=not shuffle),  # what trains is a loss
            num_workers=self.num_workers,
        )
