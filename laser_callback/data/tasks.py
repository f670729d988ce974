"""The LASER paper's eight tasks: prompts, answers, choices, metric and split.

Contract: a :class:`Task` turns the rows of its public data set into facts in the data set's order, with the prompts of
the paper's code for GPT-J and LLaMA (``prompts.py``); the paper selects on the first fifth of them and reports the
rest. Rows come from the internet by the package ``datasets`` (extra ``hub``), or from a file. Which tasks there are,
and the paper's numbers, is in ``tasks.yaml``.

What differs is in ``docs/howto/paper.md``: above all, where the paper generates text and looks for the answer in it
(HotPotQA, WikidataQA, and CounterFact for LLaMA), here the answer must come at once; and prompts are those for GPT-J
and LLaMA, from which those for RoBERTa differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.data import prompts
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.facts import Fact, read_records
from laser_callback.data.prompts import SourceRow
from laser_callback.plans.plan import LaserPlan
from laser_callback.support.reading import read_plain, typed

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
    convert: Callable[[Iterable[SourceRow]], Iterator[Fact]]
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

    def _checked(self, rows: Iterable[SourceRow], where: str) -> Iterator[SourceRow]:
        for number, row in enumerate(rows, 1):
            if missing := [column for column in self.columns if column not in row]:
                raise ValueError(
                    f"{where}, row {number}: the columns {', '.join(self.columns)} are needed, {', '.join(missing)} is "
                    f"not among {', '.join(map(str, row))}; rows with prompt and answer go to FactsDataModule"
                )
            yield row


class TaskDataModule(FactsDataModule):
    """A task of the LASER paper for ``LaserModule``. A search of it improves, and confirms, the task's metric.

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
        self.metric = self.task.metric

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
    row: SourceRow

    @classmethod
    def from_row(cls, row: SourceRow, default_id: str) -> _RawRow:
        return cls(default_id, row)


def _read(path: Path) -> Sequence[SourceRow]:
    if path.suffix == ".json":
        return read_plain(path, "source", partial(typed, list[dict[str, Any]]))
    return [record.row for record in read_records(path, _RawRow)]


def _fetched(source: Source) -> Iterable[SourceRow]:
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


def _task(name: str, row: Mapping[str, Any]) -> Task:
    source: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in row["source"].items()}
    return Task(
        metric=row["metric"],
        source=Source(**source),
        convert=getattr(prompts, name),
        columns=tuple(row["columns"]),
        examples=row["examples"],
        max_answer_tokens=row.get("max_answer_tokens"),
        published={
            model: Published(accuracy, loss, reduced_accuracy, reduced_loss, (tau, layer, rho))
            for model, (accuracy, loss, reduced_accuracy, reduced_loss, tau, layer, rho) in row["published"].items()
        },
    )


TASKS: Mapping[str, Task] = {name: _task(name, row) for name, row in prompts.TABLE.items()}
"""The tasks by name."""
