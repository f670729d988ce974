"""Tasks of lm-evaluation-harness that score running text (``output_type: loglikelihood_rolling``).

Contract: documents, what is counted of each (words, bytes) and the windows that a long one is read in are ``lm_eval``'s
own, so that ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte`` are what it reports. A document is one
example: windows of it are never apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.data.encoding import pad, pad_token_id
from laser_callback.data.lm_eval.source import Source, ask, built, tell
from laser_callback.data.scoring import IGNORED, OF_TEXT

TOKENS = 4096
"""The most tokens of several windows that go through a model together."""
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        id: task and number.
        windows: tokens that a model reads, and those that it should predict there, one for one; none of an empty text,
            whose words and bytes count all the same.
        weights: by metric, what of the document is counted.
    """

    id: str
    windows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    weights: Mapping[str, float]


class TaskDocuments(Dataset[Document]):
    """The documents of a rolling task, for ``text`` of a :class:`FactsDataModule`, or in a dataloader of their own.

    Args:
        source: ``lm_eval:TASK``, and options as for :func:`read_lm_eval`.
        tokenizer: of the causal model.
        context: the most tokens that the model reads at once.

    Raises:
        ModuleNotFoundError: if ``lm_eval`` is missing.
        ValueError: if there is no such task, it is of another kind, or its metrics are others than :data:`METRICS`.
    """

    def __init__(self, source: str | Path, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        text = str(source)
        self.pad_token_id = pad_token_id(tokenizer)
        self.documents: list[Document] = []
        parsed = Source.parse(text)
        for task in built(text):
            if task.OUTPUT_TYPE != "loglikelihood_rolling":
                raise ValueError(
                    f"`text` must be a task of the type loglikelihood_rolling, as wikitext, got {task.task_name!r} of "
                    f"the type {task.OUTPUT_TYPE}; that goes where facts do."
                )
            ask(task, parsed)
            self.documents += [_document(task, request, tokenizer, context) for request in task.instances]
            tell(task, len(task.instances))
        if len({tuple(document.weights) for document in self.documents}) > 1:
            raise ValueError(
                f"the tasks of a group must agree in metrics, but those of {text} do not; take one of them."
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured on them."""
        return (*OF_TEXT, *self.documents[0].weights)

    def __len__(self) -> int:
        return len(self.documents)

    @override
    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    def collate(self, documents: Sequence[Document]) -> dict[str, Any]:
        """A batch of B documents with W windows.

        Returns:
            ``id``, B strings; ``weights``, by metric (B,) float64; ``windows``: a list of dicts with ``input_ids`` and
            ``attention_mask``, (w, T) int64, padded on the right, ``targets``, (w, T) int64, :data:`IGNORED` where
            nothing is predicted, and ``owner``, (w,) int64, each window's document.
        """
        rows = [(index, window) for index, document in enumerate(documents) for window in document.windows]
        rows.sort(key=lambda row: len(row[1][0]))
        parts: list[list[Any]] = []
        for row in rows:
            if not parts or (len(parts[-1]) + 1) * len(row[1][0]) > TOKENS:
                parts.append([])
            parts[-1].append(row)
        return {
            "id": [document.id for document in documents],
            "weights": {
                name: torch.tensor([document.weights[name] for document in documents], dtype=torch.float64)
                for name in documents[0].weights
            },
            "windows": [self._part(part) for part in parts],
        }

    def _part(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return {
            "input_ids": pad([ids for _, (ids, _) in rows], self.pad_token_id),
            "attention_mask": pad([(1,) * len(ids) for _, (ids, _) in rows], 0),
            "targets": pad([targets for _, (_, targets) in rows], IGNORED),
            "owner": torch.tensor([index for index, _ in rows]),
        }


def _document(task: Any, request: Any, tokenizer: PreTrainedTokenizerBase, context: int) -> Document:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    of_tokenizer = SimpleNamespace(tokenizer=tokenizer, add_bos_token=None, prefix_token_id=first)
    tokens = HFLM.tok_encode(of_tokenizer, request.args[0])
    pairs = map(make_disjoint_window, get_rolling_token_windows(tokens, first, context, 1))
    windows = [
        ((*before, *ids[:-1]), (*(IGNORED for _ in before[1:]), *ids))  # all but the last is read, to predict the next
        for before, ids in pairs
    ]
    return Document(f"{task.task_name}-{request.doc_id}", tuple(windows), _weights(task, request.doc))


def _weights(task: Any, doc: Any) -> dict[str, float]:
    """What a task counts of a document, by metric: what it puts beside the log likelihood that it is given."""
    probe = -1.5
    found = task.process_results(doc, [probe])
    pairs = {name: value for name, value in found.items() if isinstance(value, tuple) and len(value) == 2}
    if unknown := sorted({*found} - {*METRICS}) or sorted(
        {*found} - {n for n, (ll, _) in pairs.items() if ll == probe}
    ):
        raise ValueError(
            f"the task {task.task_name!r} of lm_eval has metrics that are not known here, {', '.join(unknown)}; known "
            f"are {', '.join(METRICS)}, each a log likelihood and what is counted"
        )
    return {name: float(weight) for name, (_, weight) in pairs.items()}
