"""Multiple-choice tasks of lm-evaluation-harness as facts.

Contract: ``summed_choice_accuracy`` of the facts is what ``lm_eval`` reports as ``acc``, to the example. What cannot be
said as a fact is refused, never changed.

They can differ in two places. A right choice that is in the list twice is wrong for ``lm_eval``, whose best choice is
the first of equals, where the second is the right one; and a tie with another choice is wrong here.
What is longer than the model's context ``lm_eval`` cuts on the left; here it is an error. Where a tokenizer joins the
end of a prompt to its answer, ``lm_eval`` scores what follows as many tokens as the prompt alone has; here the joined
token is scored as the answer's.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from laser_callback.data.facts import Fact
from laser_callback.data.lm_eval.source import Source, ask, tell

ACC = "summed_choice_accuracy"
"""The metric that is ``acc`` of ``lm_eval``."""


def choice_facts(task: Any, source: Source) -> list[Fact]:
    """The documents of a multiple-choice task.

    Raises:
        ValueError: if they are no facts whose ``acc`` is defined here.
    """
    if reason := _unsupported(task):
        raise ValueError(
            f"the task {task.task_name!r} of lm_eval {reason}; supported are tasks, and groups of tasks, with "
            "`output_type: multiple_choice`, one prompt and one right answer a document, and the metric acc, or with "
            "`output_type: generate_until`; as `text` those with `output_type: loglikelihood_rolling`"
        )
    ask(task, source)
    facts = [_fact(task, list(requests)) for _, requests in groupby(task.instances, key=lambda request: request.doc_id)]
    tell(task, len(facts))
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
