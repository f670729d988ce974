"""Describe the options of all commands: ``python docs/describe.py`` writes ``laser_callback/cli/quick/options.json``.

Help and mistakes in options are told from this file, without the imports that the commands need. A test compares it
with the parsers that read the options when a command runs.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
import types
from argparse import SUPPRESS, Action
from collections.abc import Collection
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, capture_parser
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath, _ActionPrintConfig
from jsonargparse._required import iter_required_keys

from laser_callback.cli.commands import COMMANDS, READ_THEIR_OWN_ARGUMENTS, function_of
from laser_callback.cli.lightning import LaserCLI
from laser_callback.cli.options import PlainHelp, parser_of
from laser_callback.cli.quick.parser import FILE, LIGHTNING, Option
from laser_callback.search.strategies.registry import STRATEGIES

_PLAIN = {int, str, float, bool, types.NoneType, Path, datetime.timedelta, Any}


def real_parser(command: str) -> ArgumentParser:
    """The parser that reads a command's options when it runs."""
    function = function_of(command)
    if command not in LIGHTNING:
        return parser_of(function, f"laser-callback {command}")
    commands: Any = capture_parser(lambda: LaserCLI(function, []))._subcommands_action
    return commands.choices[command]


def described() -> dict[str, Any]:
    """The options of all commands, as ``options.json`` has them."""
    commands = {}
    for name in COMMANDS:
        if name in LIGHTNING or name not in READ_THEIR_OWN_ARGUMENTS:
            with redirect_stdout(StringIO()):  # on a terminal defaults are others
                parser = real_parser(name)
            required = {*iter_required_keys(parser)}
            options = [_option(name, action, required) for action in parser._actions if not _is_own(action)]
            summary = (inspect.getdoc(function_of(name)) or "").split("\n\n")[0]
            commands[name] = {"summary": summary, "options": [option.row() for option in options]}
    return {"lightning": version("lightning"), "commands": commands}


def written(data: Any) -> str:
    """JSON with a line for each option."""
    lines = re.sub(r"(?m)^( {8})\{(.*?)^ {8}\}", lambda found: _line(found[0]), json.dumps(data, indent=2), flags=re.S)
    return f"{lines}\n"


def _line(block: str) -> str:
    return f"        {json.dumps(json.loads(block), ensure_ascii=False)}"


def _is_own(action: Action) -> bool:
    """Whether each parser of jsonargparse has it by itself."""
    return action.dest == "help" or isinstance(action, _ActionPrintConfig)


def _option(command: str, action: Action, required: Collection[str]) -> Option:
    flags = [flag for flag in action.option_strings if not flag.endswith("+")]
    told = _plain_text(action.help or "")
    if action.dest == "config":
        return Option("config", flags, "config", help=told)
    if isinstance(action, _ActionConfigLoad):
        return Option(action.dest, flags, "block", help=told)
    if isinstance(action, _ActionHelpClassPath):
        return Option(action.dest, flags, "help", help=told)
    hint = getattr(action, "_typehint", action.type)
    return Option(
        action.dest,
        flags,
        type=_expression(hint) if _is_plain(hint) else None,
        shown=re.sub(r"Unvalidated<([^<>]*)>", r"\1", PlainHelp("")._get_type_str(action) or "").replace(
            " | null | null", " | null"
        ),
        default=None if action.default == SUPPRESS else json.loads(json.dumps(action.default, default=str)),
        required=bool(action.option_strings) and (action.required or action.dest in required),
        help=told,
        choices=[*STRATEGIES] if (command, action.dest) == ("search", "strategies") else None,
    )


def _is_plain(hint: Any) -> bool:
    """Whether it names what Python itself has, only."""
    if get_origin(hint) is Literal:
        return True
    parts: Collection[Any] = [part for part in get_args(hint) if part is not ...]
    whole = hint in _PLAIN if not parts else get_origin(hint) is not type and not _is_callable(hint)
    return whole and all(map(_is_plain, parts))


def _is_callable(hint: Any) -> bool:
    return getattr(get_origin(hint), "__name__", "") == "Callable"


def _expression(hint: Any) -> str:
    return hint.__name__ if hint in (int, str, float, bool) else "pathlib.Path" if hint is Path else repr(hint)


def _plain_text(text: str) -> str:
    """Help without the marks of reStructuredText.

    >>> _plain_text("a :class:`~laser_callback.plans.LaserPlan`, ``None`` or :attr:`result`")
    'a LaserPlan, `None` or result'
    """
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([\w -]+?)(?: <[^>]*>)?`", r"\1", text)
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    FILE.write_text(written(described()), encoding="utf-8")
