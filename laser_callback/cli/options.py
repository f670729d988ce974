"""The options of a command: those of its function, as jsonargparse reads signature and docstring.

Required parameters are positional on the command line, unless they are keyword-only. jsonargparse's ``auto_cli`` would
do the same with one function, but gives no place between parsing and running at which to tell a mistake plainly.
"""

from __future__ import annotations

import inspect
from argparse import Action
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader
from typing_extensions import override

from laser_callback.cli.mistakes import readable_types, told_plainly

COMMON_OPTIONS = "every command also takes --json (the result as JSON on stdout, all else on stderr) and --debug"
CONFIG_HELP = "a YAML or JSON file with options; later ones override it (--print_config shows the file of a run)"

_read_yaml = get_loader("yaml")


def _yaml(text: str) -> Any:
    """What YAML makes of a text, but of an option's ``#### (.*)``: that is no comment."""
    value = _read_yaml(text)
    return text if value is None and text.lstrip().startswith("#") and "\n" not in text else value


set_loader("yaml", _yaml, exceptions=(yaml.YAMLError,))


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
        values = parser.instantiate(parser.parse_args([*_with_texts(parser, arguments)]))
    values.pop("config", None)
    return function(**values)


class _Text(str):
    """A text that jsonargparse takes as it is: it reads plain ones as YAML, to which ``Answer: (.*)`` is a mapping."""

    __slots__ = ()


def _with_texts(parser: ArgumentParser, arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, of which those after an option like ``--generation.extract``, whose type is a text, are texts."""
    texts = {
        f"--{action.dest}.{field}"
        for action in parser._actions
        for kind in get_args(getattr(action, "_typehint", None))
        if is_dataclass(kind)
        for field, type_ in get_type_hints(kind).items()
        if type_ is str
    }
    is_text = False
    for argument in arguments:
        name, given, value = argument.partition("=")
        if given and name in texts:
            yield name
            yield _Text(value)
        else:
            yield _Text(argument) if is_text else argument
        is_text = argument in texts
