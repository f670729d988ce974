"""Tasks of lm-evaluation-harness whose answers are written (``output_type: generate_until``).

Contract: prompts, examples, stop texts, filters and metrics are ``lm_eval``'s own objects, asked one document at a
time, so that an example's score is what ``lm_eval`` gives to the same continuation. What a model writes is this
package's own: up to the first stop text. ``lm_eval`` lets a row write on until its whole batch has stopped, and takes
special tokens out of the text before it looks for stop texts: where such a token is a stop text and not the model's own
end, what it writes depends on the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from laser_callback.data.encoding import EncodedFact, EncodedRow
from laser_callback.data.facts import Fact
from laser_callback.data.generation import Generation, Judged, Scored
from laser_callback.data.lm_eval.source import Source, ask, built, tell

_BINARY = ("exact_match", "acc", "em")
_OF_SEVERAL = ("majority_vote", "take_first_k")
_WITHOUT_EFFECT = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "use_cache")
"""Of a task's ``generation_kwargs``, what is known here, or does nothing where nothing is sampled."""


@dataclass(frozen=True)
class Score:
    """One metric of what one filter leaves of a continuation.

    Attributes:
        metric: its name in the task.
        filter: that of the filter.
        name: ``metric``, or ``metric,filter`` as ``lm_eval`` reports it, where a task has several filters.
        binary: whether it is 0 or 1.
        higher_is_better: whether more is better.
    """

    metric: str
    filter: str
    name: str
    binary: bool
    higher_is_better: bool


@dataclass(frozen=True)
class TaskAnswers(Generation):
    """How a task lets answers be written, and judges them.

    Attributes:
        source: ``lm_eval:TASK?options``.
        scores: what it judges by, the first one foremost.
    """

    source: str = ""
    scores: tuple[Score, ...] = ()

    @override
    def judged(self, continuations: Sequence[str], batch: Mapping[str, Any]) -> list[Scored]:
        asked = _documents(self.source)
        documents = [asked[name] for name in batch["id"]]
        found = [document.judge(text, self.scores) for document, text in zip(documents, continuations, strict=True)]
        return [
            Scored(score.name, list(judged), score.binary, score.higher_is_better)
            for score, judged in zip(self.scores, zip(*found, strict=True), strict=True)
        ]

    @override
    def before(self, fact: Fact) -> tuple[str, str]:
        document = _documents(self.source)[fact.id]
        return document.request.args[0], document.delimiter

    @override
    def check(self, fact: Fact, between: str = " ") -> None:
        """A target need not be what the filters look for: in some tasks it is the bare answer, or there is none."""

    def fitted(self, encoded: Sequence[EncodedFact], limit: int) -> list[EncodedFact]:
        """Facts within a context of ``limit`` tokens: of longer prompts the end, as ``lm_eval`` cuts them.

        Raises:
            ValueError: if ``limit`` leaves no room for a prompt, or for a target.
        """
        room = limit - self.max_new_tokens
        if room < 1:
            raise ValueError(
                f"`max_gen_toks` must be less than the model's context of {limit} tokens, got {self.max_new_tokens}; "
                "?max_gen_toks=64 behind the task lets less be written."
            )
        if long := [item.fact.id for item in encoded if len(item.asked) > room]:
            rank_zero_warn(
                f"{len(long)} of {len(encoded)} prompts are cut on the left to {room} tokens, as lm_eval does it; the "
                f"first is that of {long[0]!r}"
            )
        return [
            replace(item, rows=tuple(_end(r, limit) for r in item.rows), asked=item.asked[-room:]) for item in encoded
        ]


def _end(row: EncodedRow, limit: int) -> EncodedRow:
    excess = max(0, len(row.input_ids) - limit)
    if excess > row.positions[0]:
        raise ValueError(f"a target must have at most {limit} tokens, the model's context, got {len(row.targets)}.")
    return replace(row, input_ids=row.input_ids[excess:], positions=tuple(at - excess for at in row.positions))


def written_facts(
    tasks: Sequence[Any],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool = False,
    system: str | None = None,
) -> tuple[list[Fact], TaskAnswers]:
    """The documents of tasks, and how answers to them are written and judged.

    Raises:
        ValueError: if answers are sampled or several to a document, if code or pictures are involved, if no metric is
            a mean over documents, and if the tasks do not agree in these.
    """
    if system is not None and not chat:
        raise ValueError(f"`system` must be None without `chat`, got {system!r}.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            "`chat` must be False for a tokenizer without a chat template, got True; take the tokenizer of the chat "
            "model, or set its `chat_template`."
        )
    source = Source.parse(text)
    if source.fewshot_as_multiturn and not chat:
        raise ValueError(f"{text}: `fewshot_as_multiturn` needs `chat`, of which each example is then a turn.")
    documents: list[_Document] = []
    generations: dict[str, TaskAnswers] = {}
    for task in tasks:
        if source.max_gen_toks is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": source.max_gen_toks}, update=True)
        if reason := _unsupported(task):
            raise ValueError(f"the task {task.task_name!r} of lm_eval {reason}")
        ask(task, source, tokenizer, chat=chat, system=system)
        if any(request.idx for request in task.instances):
            raise ValueError(f"the task {task.task_name!r} of lm_eval asks several times about a document")
        own = [_Document(task, request, _delimiter(task, request, chat)) for request in task.instances]
        scores, left_out = _scores(own[0])
        new, stop = _limits(own[0], tokenizer)
        generations[task.task_name] = TaskAnswers(max_new_tokens=new, stop=stop, source=text, scores=scores)
        also = f"; judged by {', '.join(score.name for score in scores)}{left_out}"
        if not any(document.judges_target(score) for document in own for score in scores):
            also += (
                f"; no target is right as it stands, so let a search race by what is written: race={scores[0].name!r}"
            )
        tell(task, len(own), also)
        documents += own
    (name, first), *others = generations.items()
    if other := next((one for one, generation in others if generation != first), None):
        raise ValueError(
            f"the tasks of a group must agree in stop texts, `max_gen_toks`, filters and metrics, but {other!r} has "
            f"{generations[other]} and {name!r} has {first}; take them one by one"
        )
    _ASKED[text] = {document.name: document for document in documents}
    return [document.fact() for document in documents], first


_ASKED: dict[str, dict[str, _Document]] = {}


def _documents(text: str) -> dict[str, _Document]:
    """The documents of a source by their ids, as they were read last; of another process, for judging, without chat."""
    if text not in _ASKED:
        source, tasks = Source.parse(text), built(text)
        for task in tasks:
            ask(task, source)
        documents = [_Document(task, request) for task in tasks for request in task.instances]
        _ASKED[text] = {document.name: document for document in documents}
    return _ASKED[text]


@dataclass
class _Document:
    """One document of a task.

    Attributes:
        task: of ``lm_eval``.
        request: its own of that document.
        delimiter: what stands between the prompt and its target.
    """

    task: Any
    request: Any
    delimiter: str = " "

    @property
    def name(self) -> str:
        """The id of the fact."""
        return f"{self.task.task_name}-{self.request.doc_id}"

    def results(self, text: str) -> dict[str, tuple[Any, dict[str, Any]]]:
        """By filter: what it leaves of a continuation, and the task's metrics of that."""
        one = copy.copy(self.request)
        one.resps, one.filtered_resps = [text], {}
        for pipeline in self.task._filters:
            if pipeline.name not in _several(self.task):
                pipeline.apply([one])
        left = one.filtered_resps
        return {name: (left[name], self.task.process_results(one.doc, [left[name]])) for name in left}

    def judge(self, text: str, scores: Sequence[Score]) -> list[Judged]:
        """A continuation, by each score."""
        results, found = self.results(text), []
        for score in scores:
            left, values = results[score.filter]
            value = float(values.get(score.metric, np.nan))
            answer = self.answer(score)
            found.append(Judged(answer if value == 1 else _text(left), value, answer))
        return found

    @cached_property
    def of_target(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """The results of the target, were it written."""
        return self.results(self.target)

    def judges_target(self, score: Score) -> bool:
        """Whether the target is right, were it written."""
        return bool(self.of_target[score.filter][1].get(score.metric) == 1)

    def answer(self, score: Score) -> str:
        """The right answer as a filter shows it: what it leaves of the target, if that is right, or the target."""
        return _text(self.of_target[score.filter][0]) if self.judges_target(score) else self.target

    @cached_property
    def target(self) -> str:
        """The first of the accepted answers, as examples show it."""
        target = self.task.doc_to_target(self.request.doc)
        if self.task.get_config("doc_to_choice") is not None and isinstance(target, int):
            target = self.task.doc_to_choice(self.request.doc)[target]
        return _text(target)

    def fact(self) -> Fact:
        """The document. Where a filter finds the answer at the end of the target, what is ahead is the rationale."""
        ends = [_text(left) for left, _ in self.of_target.values()]
        end = next((end for end in ends if end and self.target.endswith(f" {end}")), "")
        rationale = self.target.removesuffix(f" {end}").strip() if end else ""
        try:
            return Fact(
                id=self.name,
                prompt=self.request.args[0].rstrip(" "),
                answer=end if f"{rationale} {end}" == self.target else self.target,
                subject=self.task.doc_to_text(self.request.doc),  # without the examples
                group=self.task.task_name,
                rationale=rationale if f"{rationale} {end}" == self.target else "",
            )
        except ValueError as error:
            where = f"the task {self.task.task_name!r} of lm_eval, document {self.request.doc_id}"
            raise ValueError(f"{where}: {error}") from error


def _text(value: Any) -> str:
    """What a filter has left, or a target, as text: of several the first."""
    if isinstance(value, (list, tuple)):
        return _text(value[0]) if value else ""
    return str(value).strip()


def _delimiter(task: Any, request: Any, chat: bool) -> str:
    if request.args[0][-1:].isspace():
        return ""
    if task.get_config("gen_prefix"):
        return " "
    return "" if chat else task.get_config("target_delimiter") or ""


def _several(task: Any) -> list[str]:
    """The filters that choose among several continuations of one document."""
    pipelines = task.get_config("filter_list") or []
    return [
        one["name"]
        for one in pipelines
        if any(step["function"] in _OF_SEVERAL and step.get("k", 2) > 1 for step in one["filter"])
    ]


def _unsupported(task: Any) -> str | None:
    """Why what is written for a task is not judged here, if so."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model writes (`unsafe_code`)"
    if getattr(task, "MULTIMODAL", False):
        return "asks about pictures or sound"
    if len(several := _several(task)) == len(task._filters):
        return f"judges by a vote over several continuations of a document, filter {', '.join(several)}"
    options = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})
    if options["do_sample"]:
        return "samples what is written (`do_sample`); here it is written greedily"
    if other := sorted(set(options) - set(_WITHOUT_EFFECT)):
        return f"has `generation_kwargs` that are not known here: {', '.join(other)}"
    return None


def _limits(document: _Document, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Sequence[str]]:
    """The most new tokens, and the stop texts, as ``lm_eval`` has them for a model of transformers."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    options = normalize_gen_kwargs(document.request.args[1])
    end = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)
    return options["max_gen_toks"], handle_stop_sequences(options["until"], eos=end)


def _scores(document: _Document) -> tuple[tuple[Score, ...], str]:
    """What a task's documents are judged by, and what is left out of that and why, as a part of a sentence."""
    from lm_eval.api.metrics import mean

    task = document.task
    try:
        results = document.of_target
    except Exception as error:  # a function of the task's own
        raise ValueError(f"the task {task.task_name!r} of lm_eval cannot judge {document.target!r}: {error}") from error
    scores, others = [], {f"{name}: it chooses among several continuations" for name in _several(task)}
    for name, (_, values) in results.items():
        for metric, value in values.items():
            is_mean = task.aggregation().get(metric, mean) is mean
            if not is_mean or not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
                others.add(f"{metric}: no mean of one number for each document")
                continue
            binary = metric in _BINARY or isinstance(value, (bool, np.bool_))
            full = f"{metric},{name}" if len(task._filters) > 1 else metric
            scores.append(Score(metric, name, full, binary, bool(task.higher_is_better().get(metric, True))))
    if not scores:
        raise ValueError(
            f"the task {task.task_name!r} of lm_eval has no metric that is known here: {', '.join(sorted(others))}"
        )
    return tuple(scores), "".join(f"; without {other}" for other in sorted(others))
