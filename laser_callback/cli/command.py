"""What a command is, and how one is run.

A command is a plain typed function: its options and their help come from its signature and docstring, its
positional-only parameters are positional on the command line. What it prints is for people; what scripts need it
returns as an :class:`Answer`. Nothing here imports torch, so that help is quick.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from laser_callback.cli.mistakes import is_mistake, told_plainly

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMON_OPTIONS = "every command also takes --json (the result as JSON on stdout, all else on stderr) and --debug"
CONFIG_HELP = "a YAML or JSON file with options; later ones override it (--print_config shows the file of a run)"


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0  # and where a verdict is asked for: the plan is recommended
    CRASHED = 1
    MISUSED = 2  # a bad option, plan or file
    KEPT_ORIGINAL = 3  # all went well, and the verdict is to keep the original model
    INTERRUPTED = 130


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    Attributes:
        data: what ``--json`` writes: strings, finite numbers, booleans, ``None``, lists and mappings of these. ``None``
            writes nothing, as on all ranks but the first.
        code: the exit code.
    """

    data: Any = None
    code: int = Exit.DONE


def parser_of(function: Callable[..., Any], prog: str) -> ArgumentParser:
    """The parser of a command's options."""
    from jsonargparse import ArgumentParser

    from laser_callback.cli.help_text import PlainHelp

    summary = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=prog, description=summary, epilog=COMMON_OPTIONS, exit_on_error=False, formatter_class=PlainHelp
    )
    if inspect.signature(function).parameters:
        parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_function_arguments(function, as_group=False, as_positional=bool(_positional(function)), sub_configs=True)
    return parser


def call(function: Callable[..., Any], arguments: list[str], prog: str) -> Any:
    """Call a command with what the command line says."""
    parser = parser_of(function, prog)
    with told_plainly(parser):
        values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config", None)
    by_position = [values.pop(name) for name in _positional(function)]
    return function(*by_position, **values)


def run(work: Callable[[], Answer | int | None], prog: str, *, as_json: bool, debug: bool) -> int:
    """Do a command's work, write its answer, and tell a mistake of the user without a traceback.

    Args:
        work: calls the command.
        prog: the command as it was typed, ahead of an error.
        as_json: write the answer's data to stdout, and whatever is printed to stderr.
        debug: let exceptions through.

    Returns:
        The exit code.
    """
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            answer = work()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        if debug or not is_mistake(error):
            raise
        print(f"{prog}: error: {str(error).strip()}", file=sys.stderr)
        return Exit.MISUSED
    if not isinstance(answer, Answer):
        answer = Answer(code=answer or Exit.DONE)
    if as_json and answer.data is not None:
        print(json.dumps(answer.data, indent=2, ensure_ascii=False, allow_nan=False))
    return int(answer.code)


def finite(numbers: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers or scalar tensors as JSON has them: what is not finite becomes ``None``."""
    values = {name: float(number) for name, number in numbers.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
