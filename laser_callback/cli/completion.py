"""``laser-callback completion``: commands and options at the press of the tab key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, get_args

import shtab

from laser_callback.cli.command import Answer, parser_of
from laser_callback.cli.commands import COMMANDS, function_of
from laser_callback.cli.lightning import options_parser
from laser_callback.cli.recipes import recipes


def completion(shell: Literal["bash", "zsh", "tcsh"], /) -> Answer:
    """Print a completion script; for bash, put `eval "$(laser-callback completion bash)"` into ~/.bashrc.

    Args:
        shell: whose script.
    """
    script = shtab.complete(_whole_parser(), shell)
    print(script)
    return Answer({"shell": shell, "script": script})


def _whole_parser() -> argparse.ArgumentParser:
    """All commands below one parser."""
    root = argparse.ArgumentParser(prog="laser-callback")
    groups: dict[str, Any] = {"": root.add_subparsers()}
    for name, (_, summary) in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=group).add_subparsers()  # without help shtab hides it
        _copy_options(_source(name), groups[group].add_parser(verb, help=summary))
    return root


def _source(name: str) -> argparse.ArgumentParser:
    if name in ("validate", "test", "fit"):
        return options_parser(name)
    if name == "recipes run":
        parser = argparse.ArgumentParser()
        parser.add_argument("name", choices=[*recipes()])
        return parser
    return parser_of(function_of(name), f"laser-callback {name}")


def _copy_options(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """The options by name, with the words they choose from.

    jsonargparse has a script of its own, which also lists all options of all classes that an option could name: for a
    LightningModule that takes minutes, and more than a shell can hold.
    """
    for action in source._actions:
        kind = getattr(action, "_typehint", None)
        flags = [flag for flag in action.option_strings if not flag.endswith("+")]
        if flags and not {"-h", "--help"} & {*flags}:
            copy = target.add_argument(*flags, dest=action.dest, choices=action.choices or _words(kind))
        elif not action.option_strings:
            copy = target.add_argument(action.dest, choices=action.choices or _words(kind))
        else:
            continue
        if kind is Path or Path in get_args(kind) or action.dest == "config":
            copy.complete = shtab.FILE  # type: ignore[attr-defined]  # this is how shtab is told


def _words(kind: Any) -> list[str] | None:
    """What a type chooses from, also one that may be left out."""
    if kind is bool:
        return ["true", "false"]
    parts = [kind, *get_args(kind)]
    words = [word for part in parts for word in get_args(part) if isinstance(word, str)]
    return words or None
