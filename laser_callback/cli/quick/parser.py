"""A parser of a command's options out of their description, which imports nothing of the command."""

from __future__ import annotations

import collections.abc
import datetime
import json
import pathlib
import re
import typing
from argparse import SUPPRESS, Action
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._actions import _ActionConfigLoad
from typing_extensions import override

from laser_callback.cli.options import COMMON_OPTIONS, PlainHelp

FILE = Path(__file__).with_name("options.json")
LIGHTNING = ("validate", "test", "fit")
"""Commands most of whose options are Lightning's."""
_NAMES = {
    "typing": typing,
    "collections": collections,
    "pathlib": pathlib,
    "datetime": datetime,
    "NoneType": type(None),
}
_TRAINER = ("accelerator", "devices", "precision", "logger", "callbacks", "default_root_dir")
_MOST_USED = ("model", "data", "cleanup", "config", "seed_everything", "ckpt_path", *(f"trainer.{n}" for n in _TRAINER))
_MOST_USED_IN = {
    "validate": ("trainer.limit_val_batches",),
    "test": ("trainer.limit_test_batches",),
    "fit": ("trainer.max_epochs", "trainer.limit_val_batches"),
}
_WORDS = 32
"""Characters of a type in short help."""
_TITLES = {
    "laser": "the comparison, a LaserCallback",
    "cleanup": "after training, a LaserCleanup",
    "model": "your LightningModule, --model package.Class, and its parameters, --model.NAME",
    "data": "your LightningDataModule, --data package.Class, and its parameters, --data.NAME",
    "trainer": "the Trainer of Lightning",
}
"""By the first part of an option's name, in the order of help."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as ``trainer.max_epochs``.
        flags: on the command line; none of a positional one.
        kind: ``option``; ``config``, a file with options; ``block``, the same of those whose names begin so; or
            ``help``, that of a class.
        type: an expression, or ``None`` where a class decides what is accepted: neither its value nor the options that
            its name begins are looked at.
        shown: the type in words, for help.
        default: the default value, as JSON has it.
        required: whether it must be given.
        help: what it does.
        choices: words that complete it, of which its value is made.
    """

    name: str
    flags: list[str]
    kind: str = "option"
    type: str | None = None
    shown: str = ""
    default: Any = None
    required: bool = False
    help: str = ""
    choices: list[str] | None = None

    def row(self) -> dict[str, Any]:
        """As JSON, without what is so by default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def typehint(self) -> Any:
        """The type."""
        return _anything if self.type is None else eval(self.type, _NAMES)  # an expression of the package's own file

    def short(self, command: str) -> Option:
        """As in short help: what is not ours or not in most runs is hidden, and the rest takes a sentence."""
        if not (self.name.startswith("laser.") or self.name in (*_MOST_USED, *_MOST_USED_IN[command])):
            return replace(self, help=SUPPRESS)
        told = re.split(r"(?<!e\.g)\.(?: |$)|(?<=.{20})[:;] ", self.help)[0]
        shown = self.shown if self.type is not None and len(self.shown) <= _WORDS else ""
        return replace(self, help=told, shown=shown, default=SUPPRESS if self.default is None else self.default)


def _anything(value: Any) -> Any:
    """A value that a class judges; as ``Any``, jsonargparse would import what it names."""
    return value


@cache
def table() -> dict[str, Any]:
    """What ``options.json`` holds."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def options_of(command: str) -> list[Option]:
    """The options of a command."""
    return [Option(**row) for row in table()["commands"][command]["options"]]


def is_current(command: str) -> bool:
    """Whether the description holds here: Lightning's options differ with its version."""
    return command not in LIGHTNING or table()["lightning"] == version("lightning")


class _Help(PlainHelp):
    """Tells the types that the description has in words."""

    @override
    def _get_type_str(self, action: Action) -> str | None:
        return (action.shown or None) if hasattr(action, "shown") else super()._get_type_str(action)


def quick_parser(command: str, *, short: bool = False) -> ArgumentParser:
    """The parser of a command's options, from their description.

    Args:
        command: its name.
        short: help shows what is ours, and of Lightning's options those that most runs need.
    """
    options = options_of(command)
    prog = f"laser-callback {command}"
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} --model CLASS --data CLASS --laser.plan PLAN [options]" if short else None,
        description=table()["commands"][command]["summary"],
        epilog=_more(len(options)) if short else COMMON_OPTIONS,
        exit_on_error=False,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    blocks: dict[str, Any] = {}
    if command in LIGHTNING:
        there = {_block(option) for option in options}
        blocks = {block: parser.add_argument_group(title) for block, title in _TITLES.items() if block in there}
        positional, own, *ours = parser._action_groups
        parser._action_groups = [positional, *ours, own]  # what every parser has comes last
    for option in options:
        _add(blocks.get(_block(option), parser), option.short(command) if short else option)
    for action in parser._actions:
        if short and action.dest == "print_config":
            action.help = "Print the configuration of this run and exit."
    return parser


def _block(option: Option) -> str:
    return option.name.partition(".")[0]


def _add(place: Any, option: Option) -> Action:
    if option.kind == "config":
        return place.add_argument(*option.flags, action="config", help=option.help)
    if option.kind == "block":
        added = place.add_argument(*option.flags, action=_ActionConfigLoad)
        added.help = option.help
        return added
    if option.kind == "help":
        return place.add_argument(*option.flags, metavar="CLASS", default=SUPPRESS, help=option.help)
    keywords: dict[str, Any] = {"type": option.typehint, "help": option.help}
    if option.flags:
        keywords |= {"default": option.default, "required": option.required and option.type is not None}
    added = place.add_argument(*(option.flags or [option.name]), **keywords)
    added.shown = option.shown
    return added


def _more(count: int) -> str:
    return (
        f"--help=all shows all {count} options, --model.help CLASS those of a class, --print_config the file of this "
        f"run; {COMMON_OPTIONS}"
    )
