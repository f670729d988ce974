"""``lm_eval:TASK?options``, and the tasks that ``lm_eval`` builds of it.

Contract: everything is set as by ``lm_eval.simple_evaluate`` with the same options: the number of examples in front of
each question, the seed that draws them, and how the whole is put into a chat template.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from laser_callback.support.suggest import clipped

PREFIX = "lm_eval:"
OPTIONS = ("num_fewshot", "include_path", "max_gen_toks", "fewshot_as_multiturn")


def is_lm_eval(source: Any) -> bool:
    """Whether a source of facts or text is a task of ``lm_eval`` rather than a file."""
    return isinstance(source, (str, Path)) and str(source).startswith(PREFIX)


def file_of(source: str | Path | None) -> str | Path | None:
    """The file that facts or text come from; ``None`` where they come from a task."""
    return None if is_lm_eval(source) else source


@dataclass(frozen=True)
class Source:
    """A task and how it is asked.

    Attributes:
        name: of the task or group, or a YAML file.
        num_fewshot: examples in front of each question; ``None`` for what the task says.
        include_path: the folder it is looked for in, instead of among ``lm_eval``'s own tasks.
        max_gen_toks: the most tokens that are written; ``None`` for what the task says.
        fewshot_as_multiturn: in a chat, whether each example is a turn of its own.
    """

    name: str
    num_fewshot: int | None = None
    include_path: str | None = None
    max_gen_toks: int | None = None
    fewshot_as_multiturn: bool = False

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read ``lm_eval:TASK?num_fewshot=5&include_path=FOLDER``.

        Raises:
            ValueError: for an option that there is not, or a value that it cannot have.
        """
        name, _, query = text.removeprefix(PREFIX).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := [option for option in options if option not in OPTIONS] or (query and not options and [query]):
            raise ValueError(f"{text}: options are {', '.join(OPTIONS)}, as in ?num_fewshot=5; got {unknown}")

        def whole(option: str, least: int) -> int | None:
            given = options.get(option)
            if given is not None and (not given.isdecimal() or int(given) < least):
                raise ValueError(f"{text}: `{option}` must be a whole number, at least {least}, got {given!r}")
            return None if given is None else int(given)

        multiturn = options.get("fewshot_as_multiturn", "false")
        if multiturn not in ("true", "false"):
            raise ValueError(f"{text}: `fewshot_as_multiturn` must be true or false, got {multiturn!r}")
        shots, new = whole("num_fewshot", 0), whole("max_gen_toks", 1)
        return cls(name, shots, options.get("include_path"), new, multiturn == "true")


def built(text: str) -> list[Any]:
    """The task of a source, or all tasks of its group, without requests.

    Raises:
        ModuleNotFoundError: if ``lm_eval`` is missing.
        ValueError: for an unknown task or option, and a task that cannot be built.
    """
    source = Source.parse(text)
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{text} needs lm_eval: `pip install "laser-callback[lm-eval]"`') from error
    folder = source.include_path
    manager = TaskManager(include_path=folder, include_defaults=folder is None)  # to list those takes it seconds
    if source.name not in manager.task_index and not os.path.isfile(source.name):
        raise ValueError(
            f"`{PREFIX}` must be followed by a task of lm_eval or a YAML file of one, got {source.name!r}; `lm-eval ls "
            "tasks` lists them, `?include_path=FOLDER` looks in a folder of yours instead"
        )
    try:
        return list(manager.load(source.name)["tasks"].values())
    except Exception as error:  # each of the libraries below has its own
        raise ValueError(
            f"lm_eval cannot build {source.name!r} ({type(error).__name__}: {clipped(error)}); a data set that is not "
            "in the cache of `datasets` needs internet, or a task whose `dataset_path` is json and whose `data_files` "
            "are here"
        ) from error


def ask(
    task: Any,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
) -> None:
    """Let a task build its requests, as the evaluator of ``lm_eval`` does it.

    Raises:
        ValueError: if the source asks for examples of a task that allows none.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    shots = source.num_fewshot
    if shots is not None and shots != (given := task.get_config("num_fewshot")):
        if given == 0:
            raise ValueError(
                f"`num_fewshot` must be 0 for the task {task.task_name!r} of lm_eval, which says so, got {shots}"
            )
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.build_all_requests(
        apply_chat_template=chat,
        chat_template=_template(tokenizer) if chat and tokenizer is not None else None,
        system_instruction=system,
        fewshot_as_multiturn=source.fewshot_as_multiturn,
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    from lm_eval.models.huggingface import HFLM

    of_tokenizer = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return lambda history, **options: HFLM.apply_chat_template(of_tokenizer, history, **options)


def context_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The context that ``lm_eval`` takes a model to have whose config does not say it."""
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(None, tokenizer)


def tell(task: Any, count: int, also: str = "") -> None:
    """Warn which documents these are, and what the reader of a result must know of them."""
    split = "test" if task.has_test_docs() else "validation"
    shots = task.get_config("num_fewshot") or 0
    told = f"{count} documents of the {split} split, {shots} examples in front of each"
    rank_zero_warn(f"{PREFIX}{task.task_name}: {told}{also}")
