"""The LASER paper's eight tasks: prompts, answers, choices, metric and split.

Contract: a :class:`Task` turns the rows of its public data set into facts in the data set's order, with the prompts of
the paper's code (``task_prompts.py``); the paper selects on the first fifth of them and reports the rest. Rows come
from the internet by the package ``datasets`` (extra ``hub``), or from a file.

What differs: the paper's accuracy on HotPotQA and WikidataQA is whether 15 (10) generated tokens contain the answer,
here the answer must come at once (``answer_accuracy``); on Epistemic Reasoning it compares the choices' summed log
probabilities, here their means per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.data import prompts as prompts
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.facts import Fact, read_records
from laser_callback.data.prompts import Row
from laser_callback.plans.plan import LaserPlan

TaskName = Literal[
    "counterfact",
    "hotpotqa",
    "fever",
    "bios_gender",
    "bios_profession",
    "truthfulqa",
    "epistemic_reasoning",
    "wikidata_qa",
]
VALIDATION_SHARE = 0.2
"""The paper selects on so much of a data set, its beginning, and reports the rest."""


@dataclass(frozen=True)
class Source:
    """Where rows come from: what ``datasets.load_dataset`` is given, once per split, in the paper's order."""

    path: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    revision: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A cell of the paper's table 1: accuracies in percent, log losses in nats, and the cut as it prints it."""

    accuracy: float
    log_loss: float
    reduced_accuracy: float
    reduced_log_loss: float
    cut: tuple[str, int, float]

    @property
    def plan(self) -> LaserPlan:
        """The cut as a plan."""
        return LaserPlan.from_paper(*self.cut)


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks.

    Attributes:
        metric: what :class:`~laser_callback.compare.LaserModule` logs that is the paper's accuracy, or nearest to it.
        source: the public data set.
        convert: its rows as facts.
        columns: the columns that ``convert`` reads.
        examples: prompts, paraphrases counted, that the paper has; ``None`` where it depends on a tokenizer.
        max_answer_tokens: longer answers, special tokens counted, are left out.
        published: table 1 by model: ``roberta-base``, ``gpt-j-6b``, ``llama-2-7b``.
    """

    metric: str
    source: Source
    convert: Callable[[Iterable[Row]], Iterator[Fact]]
    columns: tuple[str, ...]
    examples: int | None
    max_answer_tokens: int | None = None
    published: Mapping[str, Published] = field(default_factory=dict)

    def facts(self, source: str | Path | None = None) -> list[Fact]:
        """The task's facts, in the data set's order.

        Args:
            source: a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file with rows of the public data set, or some of
                them; by default they are fetched, once, by ``datasets``.

        Raises:
            ModuleNotFoundError: if ``datasets`` is needed and missing.
            ConnectionError: if the data set cannot be fetched.
            ValueError: if rows lack a column or none is of use.
        """
        where = self.source.path if source is None else str(source)
        rows = self._checked(_fetched(self.source) if source is None else _read(Path(source)), where)
        facts = list(self.convert(rows))
        if not facts:
            raise ValueError(f"`source` must hold rows of the task, got none of use in {where}")
        found = sum(1 + len(fact.paraphrases) for fact in facts)
        if source is None and self.examples not in (None, found):
            rank_zero_warn(f"{where} gives {found} examples, the paper has {self.examples}: it may have changed since")
        return facts

    def _checked(self, rows: Iterable[Row], where: str) -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            if missing := [column for column in self.columns if column not in row]:
                raise ValueError(
                    f"{where}, row {number}: the columns {', '.join(self.columns)} are needed, {', '.join(missing)} is "
                    f"not among {', '.join(map(str, row))}; rows with prompt and answer go to FactsDataModule"
                )
            yield row


class TaskDataModule(FactsDataModule):
    """A task of the LASER paper for ``LaserModule``.

    Args:
        task: its name in :data:`TASKS`.
        tokenizer: as for :class:`~laser_callback.data.FactsDataModule`.
        source: a file with rows of the public data set (see :meth:`Task.facts`); by default they are fetched.
        part: all examples, or the paper's split: ``"validation"`` is the first fifth, ``"test"`` the rest.
        options: those of :class:`~laser_callback.data.FactsDataModule`.
    """

    def __init__(
        self,
        task: TaskName,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        source: str | Path | None = None,
        part: Literal["all", "validation", "test"] = "all",
        **options: Any,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}")
        if part not in ("all", "validation", "test"):
            raise ValueError(f"`part` must be 'all', 'validation' or 'test', got {part!r}")
        super().__init__((), tokenizer, **options)
        self.task, self.source, self.part = TASKS[task], source, part

    @override
    def prepare_data(self) -> None:
        """Fetch the data set, on one process, into the cache of ``datasets``."""
        if self.source is None:
            _fetched(self.task.source)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the facts, once for all stages."""
        if not self.encoded:
            self.path = self._facts_of_part()
        super().setup(stage)

    def _facts_of_part(self) -> Sequence[Fact]:
        facts, limit = self.task.facts(self.source), self.task.max_answer_tokens
        if limit is not None:
            tokens = self.loaded_tokenizer()([fact.answer for fact in facts])["input_ids"]
            facts = [fact for fact, ids in zip(facts, tokens, strict=True) if len(ids) <= limit]
        first = int(VALIDATION_SHARE * len(facts))
        return {"all": facts, "validation": facts[:first], "test": facts[first:]}[self.part]


# ---------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _RawRow:
    """A row of a file as it is."""

    id: str
    row: Row

    @classmethod
    def from_row(cls, row: Row, default_id: str) -> _RawRow:
        return cls(default_id, row)


def _read(path: Path) -> Sequence[Row]:
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"`source` must hold a list of rows, got {type(rows).__name__} in {path}")
        return rows
    return [record.row for record in read_records(path, _RawRow)]


def _fetched(source: Source) -> Iterable[Row]:
    try:
        from datasets import concatenate_datasets, load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'fetching {source.path} needs datasets: `pip install "laser-callback[hub]"`, or give a file by `source`'
        ) from error
    files = {"data_files": list(source.files)} if source.files else {}
    try:
        parts = [
            load_dataset(source.path, source.config, split=split, revision=source.revision, **files)
            for split in source.splits
        ]
    except Exception as error:  # offline, each of the libraries below has its own
        place = ", ".join(source.files) or f"https://huggingface.co/datasets/{source.path}"
        raise ConnectionError(
            f"cannot fetch {place} ({type(error).__name__}: {error}); without internet, give its rows as a file by "
            "`source`"
        ) from error
    return concatenate_datasets(parts)


# --------------------------------------------------------------------------------------------------- tasks


def _table_1(*cells: tuple[float, float, float, float, tuple[str, int, float]]) -> dict[str, Published]:
    models = ("roberta-base", "gpt-j-6b", "llama-2-7b")
    return {model: Published(*cell) for model, cell in zip(models, cells, strict=True)}


_FEVER = "https://fever.ai/download/fever"
_BIOS = Source("LabHC/bias_in_bios", splits=("dev",))

TASKS: Mapping[str, Task] = {
    "counterfact": Task(
        metric="paraphrase_accuracy",  # each prompt is an example of the paper's
        source=Source("json", files=("https://rome.baulab.info/data/dsets/counterfact.json",)),
        convert=prompts.counterfact,
        columns=("case_id", "requested_rewrite", "paraphrase_prompts"),
        examples=65757,
        published=_table_1(
            (17.3, 5.78, 19.3, 5.43, ("U_in", 8, 0.8)),
            (13.1, 5.78, 24.0, 5.05, ("U_in", 27, 0.01)),
            (35.6, 3.61, 37.6, 3.49, ("U_in", 28, 0.05)),
        ),
    ),
    "hotpotqa": Task(
        metric="answer_accuracy",
        source=Source(
            "hotpotqa/hotpot_qa",
            "fullwiki",
            splits=("train[:7405]", "validation"),
            revision="1908d6afbbead072334abe2965f91bd2709910ab",
        ),
        convert=prompts.hotpotqa,
        columns=("id", "question", "answer"),
        examples=None,  # 14,618 by LLaMA's tokenizer
        max_answer_tokens=15,
        published=_table_1(
            (6.1, 10.99, 6.7, 10.55, ("U_out", 2, 0.4)),
            (19.6, 3.40, 19.5, 3.39, ("U_in", 27, 0.1)),
            (16.5, 3.15, 17.2, 2.97, ("U_in", 27, 0.2)),
        ),
    ),
    "fever": Task(
        metric="choice_accuracy",
        source=Source("json", files=(f"{_FEVER}/paper_dev.jsonl", f"{_FEVER}/paper_test.jsonl")),
        convert=prompts.fever,
        columns=("id", "claim", "label"),
        examples=13086,
        published=_table_1(
            (50.0, 2.5, 52.3, 1.76, ("U_in", 3, 0.4)),
            (50.2, 1.24, 56.2, 1.27, ("U_in", 24, 0.01)),
            (59.3, 1.02, 64.5, 0.91, ("U_in", 30, 0.2)),
        ),
    ),
    "bios_gender": Task(
        metric="choice_accuracy",
        source=_BIOS,
        convert=prompts.bios_gender,
        columns=("hard_text", "gender"),
        examples=39642,
        published=_table_1(
            (87.5, 0.87, 93.7, 1.13, ("U_in", 9, 0.9)),
            (70.9, 3.86, 97.5, 4.20, ("U_in", 14, 0.01)),
            (75.5, 3.48, 88.4, 2.98, ("U_in", 24, 0.01)),
        ),
    ),
    "bios_profession": Task(
        metric="choice_accuracy",
        source=_BIOS,
        convert=prompts.bios_profession,
        columns=("hard_text", "profession"),
        examples=19223,
        published=_table_1(
            (64.5, 4.91, 72.5, 6.44, ("U_in", 3, 0.9)),
            (75.6, 4.64, 82.1, 4.91, ("U_in", 18, 0.01)),
            (85.0, 4.19, 86.7, 4.05, ("U_out", 30, 0.4)),
        ),
    ),
    "truthfulqa": Task(
        metric="choice_accuracy",
        source=Source(
            "truthfulqa/truthful_qa",
            "multiple_choice",
            splits=("validation",),
            revision="741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        ),
        convert=prompts.truthfulqa,
        columns=("question", "mc2_targets"),
        examples=5882,
        published=_table_1(
            (56.2, 1.60, 56.2, 1.42, ("U_in", 0, 0.01)),
            (54.9, 1.02, 55.6, 1.01, ("U_in", 7, 0.8)),
            (50.5, 0.95, 56.2, 1.04, ("U_in", 30, 0.05)),
        ),
    ),
    "epistemic_reasoning": Task(
        metric="choice_accuracy",
        source=Source("tasksource/bigbench", "epistemic_reasoning", splits=("validation", "train")),
        convert=prompts.epistemic_reasoning,
        columns=("inputs", "targets"),
        examples=2000,
        published=_table_1(
            (37.1, 9.39, 41.8, 6.80, ("U_out", 1, 0.4)),
            (37.1, 0.74, 38.3, 0.62, ("U_in", 26, 0.01)),
            (44.8, 0.78, 63.4, 0.73, ("U_out", 28, 0.01)),
        ),
    ),
    "wikidata_qa": Task(
        metric="answer_accuracy",
        source=Source("tasksource/bigbench", "qa_wikidata", splits=("validation", "train")),
        convert=prompts.wikidata_qa,
        columns=("inputs", "targets"),
        examples=20321,
        published=_table_1(
            (28.0, 9.07, 30.7, 7.69, ("U_in", 7, 0.4)),
            (51.8, 3.52, 65.9, 2.86, ("U_in", 27, 0.01)),
            (59.5, 2.40, 62.0, 2.31, ("U_in", 27, 0.01)),
        ),
    ),
}
"""The tasks by name."""
