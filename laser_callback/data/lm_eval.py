"""Multiple-choice tasks of lm-evaluation-harness as facts.

Contract: :func:`read_lm_eval` lets ``lm_eval`` (optional) build a task, its documents and its requests, and turns each
document into a :class:`~laser_callback.data.Fact`; all else is this package's own. ``summed_choice_accuracy`` is then
what ``lm_eval`` reports as ``acc``, to the example. What cannot be said as a fact is refused, never changed.

They can differ in two places. A right choice that is in the list twice is wrong for ``lm_eval``, whose best choice is
the first of equals, where the second is the right one; and a tie with another choice is wrong here.
What is longer than the model's context ``lm_eval`` cuts on the left; here it is an error. Where a tokenizer joins the
end of a prompt to its answer, ``lm_eval`` scores what follows as many tokens as the prompt alone has; here the joined
token is scored as the answer's.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from laser_callback.data.facts import Fact
from laser_callback.support.suggest import clipped

PREFIX = "lm_eval:"
ACC = "summed_choice_accuracy"
"""The metric that is ``acc`` of ``lm_eval``."""
OPTIONS = ("num_fewshot", "include_path")


def is_lm_eval(source: Any) -> bool:
    """Whether a source of facts is a task of ``lm_eval`` rather than a file."""
    return isinstance(source, (str, Path)) and str(source).startswith(PREFIX)


def file_of(source: str | Path | None) -> str | Path | None:
    """The file that facts come from; ``None`` where they come from a task."""
    return None if is_lm_eval(source) else source


def read_lm_eval(source: str | Path) -> list[Fact]:
    """The documents of a task, or of all tasks of a group, as facts; ``group`` is the task's name.

    Documents are those that ``lm_eval`` evaluates: of the test split, or else of the validation split. A warning says
    which, and how many examples stand in front of each. These are drawn by the seed of ``lm_eval``'s evaluator.

    Args:
        source: ``lm_eval:TASK``, where TASK is a name or a YAML file, or ``lm_eval:TASK?num_fewshot=5``;
            ``&include_path=FOLDER`` looks in that folder instead of among ``lm_eval``'s own tasks. Without
            ``num_fewshot``, what the task says.

    Raises:
        ModuleNotFoundError: if ``lm_eval`` is missing.
        ValueError: for an unknown task or option, a task that cannot be built, and one that is not multiple choice with
            one prompt and one right answer scored by ``acc``.
    """
    name, options = _parse(str(source))
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{source} needs lm_eval: `pip install "laser-callback[lm-eval]"`') from error
    folder = options.get("include_path")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)  # to list those takes it seconds
    if name not in manager.task_index and not os.path.isfile(name):
        raise ValueError(
            f"`{PREFIX}` must be followed by a task of lm_eval or a YAML file of one, got {name!r}; `lm-eval ls tasks` "
            "lists them, `?include_path=FOLDER` looks in a folder of yours instead"
        )
    try:
        tasks = manager.load(name)["tasks"]
    except Exception as error:  # each of the libraries below has its own
        raise ValueError(
            f"lm_eval cannot build {name!r} ({type(error).__name__}: {clipped(error)}); a data set that is not in the "
            "cache of `datasets` needs internet, or a task whose `dataset_path` is json and whose `data_files` are here"
        ) from error
    shots = options.get("num_fewshot")
    return [fact for task in tasks.values() for fact in _facts(task, None if shots is None else int(shots))]


def _parse(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [option for option in options if option not in OPTIONS] or (query and not options and [query]):
        raise ValueError(f"{source}: options are {', '.join(OPTIONS)}, as in ?num_fewshot=5; got {unknown}")
    if not options.get("num_fewshot", "0").isdecimal():
        raise ValueError(f"{source}: `num_fewshot` must be a whole number, got {options['num_fewshot']!r}")
    return name, options


def _facts(task: Any, shots: int | None) -> list[Fact]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    name = task.task_name
    if reason := _unsupported(task):
        raise ValueError(
            f"the task {name!r} of lm_eval {reason}; supported are tasks, and groups of tasks, with `output_type: "
            "multiple_choice`, one prompt and one right answer a document, and the metric acc"
        )
    # As lm_eval's evaluator does it.
    if shots is not None and shots != (given := task.get_config("num_fewshot")):
        if given == 0:
            raise ValueError(f"`num_fewshot` must be 0 for the task {name!r} of lm_eval, which says so, got {shots}")
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.build_all_requests()
    facts = [_fact(task, list(requests)) for _, requests in groupby(task.instances, key=lambda request: request.doc_id)]
    split = "test" if task.has_test_docs() else "validation"
    rank_zero_warn(
        f"{PREFIX}{name}: {len(facts)} documents of the {split} split, {task.get_config('num_fewshot') or 0} examples "
        "in front of each"
    )
    return facts


def _unsupported(task: Any) -> str | None:
    """Why the documents of a task are no facts whose ``acc`` is defined here, if so."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return f"is of the type {task.OUTPUT_TYPE}"
    if task.multiple_input:
        return "has a prompt for each choice"
    if task.multiple_target:
        return "has several right answers"
    if callable(task.get_config("process_results")):
        return "computes its metrics by `process_results` of its own"
    return None if "acc" in task.aggregation() else f"has no metric acc, but {', '.join(task.aggregation())}"


def _fact(task: Any, requests: list[Any]) -> Fact:
    """One document, from its requests: a (context, continuation) for each choice, then what acc does not need."""
    doc, where = requests[0].doc, f"the task {task.task_name!r} of lm_eval, document {requests[0].doc_id}"
    names = task.doc_to_choice(doc)
    gold = task.doc_to_target(doc)
    right = names.index(gold) if isinstance(gold, str) and gold in names else gold
    if not isinstance(right, int) or not 0 <= right < len(names):
        raise ValueError(f"{where}: the right answer must be one of {names} or its index, got {gold!r}")
    context, continuations = requests[0].args[0], [request.args[1] for request in requests[: len(names)]]
    if context != context.rstrip():  # lm_eval moves that to the continuation
        raise ValueError(f"{where}: a prompt must not end in white space, got {context[-40:]!r}")
    for text in continuations:
        if text != f" {text.strip()}":
            raise ValueError(f"{where}: a choice must follow its prompt after one space and end without, got {text!r}")
    choices = tuple(text[1:] for text in continuations)
    try:
        return Fact(
            id=f"{task.task_name}-{requests[0].doc_id}",
            prompt=context,
            answer=choices[right],
            choices=choices,
            subject=task.doc_to_text(doc),  # without the examples, which differ where the question is the same
            group=task.task_name,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
