"""``laser-callback completion``: commands and options at the press of the tab key.

The script is jsonargparse's, without one thing: for an option that names a class it would list the options of all
classes that there are, and of those that these name in turn. For a LightningModule of transformers that takes minutes,
and more than a shell can hold.
"""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser, capture_parser

from laser_callback.cli.command import Answer
from laser_callback.cli.commands import COMMANDS, GROUPS, READ_THEIR_OWN_ARGUMENTS, function_of
from laser_callback.cli.lightning import LaserCLI
from laser_callback.cli.options import parser_of
from laser_callback.cli.recipes import recipes
from laser_callback.search.strategies.registry import STRATEGIES


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> Answer:
    """Print a completion script. It takes seconds: write it to a file that new shells read, with bash-completion by
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
        groups[group].add_subcommand(verb, _options(name), help=summary)
    script = root.get_completion_script(f"shtab-{shell}")
    print(script)
    return Answer({"shell": shell, "script": script})


def _options(name: str) -> ArgumentParser:
    function = function_of(name)
    if name not in READ_THEIR_OWN_ARGUMENTS:
        parser = parser_of(function, name)
    elif name == "recipes run":
        parser = ArgumentParser()
        parser.add_argument("name", choices=[*recipes()])
    else:
        commands: Any = capture_parser(lambda: LaserCLI(function, []))._subcommands_action
        parser = commands.choices[name]
    for action in parser._actions:
        if name == "search" and action.dest == "strategies":
            action.choices = [*STRATEGIES]
        if f"--{action.dest}.help" in parser._option_string_actions:  # it names a class
            action.complete = {}  # type: ignore[attr-defined]  # for shtab: nothing, in any shell
    return parser
