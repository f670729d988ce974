"""The options of a command: those of its function, as jsonargparse reads signature and docstring.

Required parameters are positional on the command line, unless they are keyword-only. jsonargparse's ``auto_cli`` would
do the same with one function, but gives no place between parsing and running at which to tell a mistake plainly.
"""

from __future__ import annotations

import inspect
from argparse import Action
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from typing_extensions import override

from laser_callback.cli.mistakes import readable_types, told_plainly

COMMON_OPTIONS = "every command also takes --json (the result as JSON on stdout, all else on stderr) and --debug"
CONFIG_HELP = "a YAML or JSON file with options; later ones override it (--print_config shows the file of a run)"


class PlainHelp(DefaultHelpFormatter):
    """Writes types as a person does: ``str | list[str] | null`` in place of ``Union[str, list[str], null]``."""

    @override
    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        return None if text is None else readable_types(text)


def parser_of(function: Callable[..., Any], prog: str) -> ArgumentParser:
    """The parser of a command's options."""
    summary = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=prog,
        description=summary,
        epilog=COMMON_OPTIONS,
        exit_on_error=False,
        formatter_class=PlainHelp,
        allow_abbrev=False,
    )
    if inspect.signature(function).parameters:
        parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True)
    return parser


def call(function: Callable[..., Any], arguments: list[str], prog: str) -> Any:
    """Call a command with what the command line says."""
    parser = parser_of(function, prog)
    with told_plainly(parser):
        values = parser.instantiate(parser.parse_args(arguments))
    values.pop("config", None)
    return function(**values)
