"""``laser-callback completion``: commands and options at the press of the tab key.

The script is jsonargparse's, of the options as they are described: an option that names a class has no more than itself
there. Those of all classes that there are, and of those that these name in turn, would be more than a shell can hold.
"""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

from laser_callback.cli.command import Answer
from laser_callback.cli.commands import COMMANDS, GROUPS
from laser_callback.cli.quick.parser import options_of, quick_parser
from laser_callback.cli.recipes import recipes


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> Answer:
    """Print a completion script. Write it to a file that new shells read, with bash-completion by
    laser-callback completion bash > ~/.local/share/bash-completion/completions/laser-callback

    Args:
        shell: whose script.
    """
    root = ArgumentParser(prog="laser-callback")
    groups: dict[str, Any] = {"": root.add_subcommands()}
    for name, (_, summary) in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            groups[""].add_subcommand(group, parent := ArgumentParser(), help=GROUPS[group])
            groups[group] = parent.add_subcommands()
        groups[group].add_subcommand(verb, _recipes() if name == "recipes run" else _options(name), help=summary)
    script = root.get_completion_script(f"shtab-{shell}")
    print(script)
    return Answer({"shell": shell, "script": script})


def _options(name: str) -> ArgumentParser:
    parser, words = quick_parser(name), {option.name: option.choices for option in options_of(name)}
    for action in parser._actions:
        if words.get(action.dest):
            action.choices = words[action.dest]
    return parser


def _recipes() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("name", choices=[*recipes()])
    return parser
