"""A task of ``lm_eval``, whichever kind it is, as facts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from laser_callback.data.facts import Fact
from laser_callback.data.generation import Generation
from laser_callback.data.lm_eval.answers import written_facts
from laser_callback.data.lm_eval.choices import ACC, choice_facts
from laser_callback.data.lm_eval.source import Source, built


class TaskFacts(NamedTuple):
    """A task.

    Attributes:
        facts: its documents.
        metric: what the task is judged by.
        generation: how answers are written and judged, where they are written.
    """

    facts: list[Fact]
    metric: str
    generation: Generation | None = None


def read_lm_eval(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
) -> TaskFacts:
    """The documents of a task, or of all tasks of a group, as facts; ``group`` is the task's name.

    Documents are those that ``lm_eval`` evaluates: of the test split, or else of the validation split. A warning says
    which, and how many examples stand in front of each. These are drawn by the seed of ``lm_eval``'s evaluator.

    Args:
        source: ``lm_eval:TASK``, where TASK is a name or a YAML file, or ``lm_eval:TASK?num_fewshot=5``;
            ``&include_path=FOLDER`` looks in that folder instead of among ``lm_eval``'s own tasks. Without
            ``num_fewshot``, what the task says. Where answers are written, ``max_gen_toks=64`` and
            ``fewshot_as_multiturn=true`` are as for ``lm_eval``.
        tokenizer: of the model that is to write answers.
        chat: where answers are written, let ``lm_eval`` put all into the tokenizer's chat template.
        system: the system message of that chat.

    Raises:
        ModuleNotFoundError: if ``lm_eval`` is missing.
        ValueError: for an unknown task or option, a task that cannot be built, and one that is neither multiple choice
            with one prompt and one right answer scored by ``acc``, nor writes one answer a document, greedily, judged
            by a mean over documents.
    """
    tasks, text = built(str(source)), str(source)
    parsed = Source.parse(text)
    if all(task.OUTPUT_TYPE == "generate_until" for task in tasks):
        if tokenizer is None:
            raise ValueError(f"`tokenizer` must be given for {text}, whose answers are written, got None.")
        facts, generation = written_facts(tasks, text, tokenizer, chat=chat, system=system)
        return TaskFacts(facts, generation.scores[0].name, generation)
    if given := [name for name in ("max_gen_toks", "fewshot_as_multiturn") if getattr(parsed, name)]:
        raise ValueError(f"{text}: `{given[0]}` is for tasks of the type generate_until")
    return TaskFacts([fact for task in tasks for fact in choice_facts(task, parsed)], ACC)
