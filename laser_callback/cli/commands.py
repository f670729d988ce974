"""The command line: which commands there are, and the way from the words of a user to one of them.

That way is argparse's, and not jsonargparse's as within a command: jsonargparse has no subcommands that are imported
when they are asked for, and its import alone takes longer than ``laser-callback --help`` may.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, NoReturn

from typing_extensions import override

from laser_callback import __version__
from laser_callback.cli.command import Exit, in_lines, run, terminable
from laser_callback.support.suggest import closest

COMMANDS = {
    "demo": ("laser_callback.cli.demo", "compare plans on a real model and real facts"),
    "validate": ("laser_callback.cli.lightning", "compare a plan in trainer.validate of your own module and data"),
    "test": ("laser_callback.cli.lightning", "the same in trainer.test"),
    "fit": ("laser_callback.cli.lightning", "train, and compare in each validation"),
    "search": ("laser_callback.cli.search", "find the cuts that help a model on a task, and confirm them"),
    "compare": ("laser_callback.cli.compare", "compare two finished runs from their logs, without a model"),
    "gate": ("laser_callback.cli.rollout", "judge a plan by gates; the exit code says whether it may ship"),
    "rollout": ("laser_callback.cli.rollout", "put a plan in stage by stage, keep the last that passes all gates"),
    "export": ("laser_callback.cli.ship", "write what a plan makes of a model: dense, factored, adapter, recipe, undo"),
    "apply": ("laser_callback.cli.ship", "apply a recipe to the original, and write the reduced model"),
    "restore": ("laser_callback.cli.ship", "give a cut model its original weights back, bit for bit"),
    "inspect": ("laser_callback.cli.inspect", "show a model's matrices, their spectra, and what each rank rule keeps"),
    "report": ("laser_callback.cli.report", "show a result again: in the terminal, as a page, or as pictures"),
    "recipes ls": ("laser_callback.cli.recipes", "list the recipes"),
    "recipes show": ("laser_callback.cli.recipes", "print one"),
    "recipes cp": ("laser_callback.cli.recipes", "copy one"),
    "recipes run": ("laser_callback.cli.recipes", "run one, with options of its command to override it"),
    "cache ls": ("laser_callback.cli.stock", "show what they take"),
    "cache clear": ("laser_callback.cli.stock", "remove them"),
    "get facts": ("laser_callback.cli.stock", "write the facts to a file"),
    "get model": ("laser_callback.cli.stock", "print the folder of the model, made if it is missing"),
    "completion": (
        "laser_callback.cli.completion",
        "print a script that lets your shell complete commands and options",
    ),
}
"""By name: the module, imported only to run it, that has the function of the name's last word, and a summary."""
GROUPS = {
    "recipes": "annotated files to run, copy and change",
    "cache": "factorisations that are kept on disk",
    "get": "the demo's facts and model, to try a command on",
}
READ_THEIR_OWN_ARGUMENTS = ("validate", "test", "fit", "recipes run")
"""Commands whose function takes the list of arguments, since their options depend on what is run."""


_BLOCKS = ("model", "data", "trainer", "laser", "cleanup", "optimizer", "lr_scheduler")
"""Options of the Lightning commands that take a config of their own."""
_CLASSES = ("module", "data")
"""Those of other commands."""


def main(arguments: list[str] | None = None) -> int:
    """Run ``laser-callback COMMAND [options]``; returns the exit code, an :class:`Exit`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, rest = _parser().parse_known_args(arguments or ["--help"])
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: modules of one's own beside the config
    debug = "debug" in given or bool(os.environ.get("LASER_CALLBACK_DEBUG"))
    name = given.command
    return run(lambda: work(name, rest), f"laser-callback {name}", as_json="json" in given, debug=debug)


def work(name: str, arguments: list[str]) -> Any:
    """Do what a command does with these arguments; returns its answer."""
    # What can be said without the command's imports, which take seconds, is said first.
    _need_configs(name, arguments)
    from laser_callback.cli.quick.check import checked

    arguments = checked(name, arguments)
    function = function_of(name)
    if "transformers" in sys.modules:  # by the import of the command
        from laser_callback.support.progress import quiet_libraries

        quiet_libraries()
    if name in READ_THEIR_OWN_ARGUMENTS:
        return function(arguments)
    from laser_callback.cli.options import call

    with terminable():  # the others are Lightning's, which has a way of its own with signals
        return call(function, arguments, f"laser-callback {name}")


def function_of(name: str) -> Callable[..., Any]:
    """The function behind a command."""
    return getattr(import_module(COMMANDS[name][0]), name.split()[-1])


class _Parser(ArgumentParser):
    """Says what may have been meant."""

    @override
    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            name, known = choice[1], choice[2].replace("'", "")
            message = f"unknown command {name!r}{closest(name, known.split(', ')) or f'; there are {known}'}"
        self.exit(Exit.MISUSED, f"{self.prog}: error: {in_lines(message)}\n")


def _parser() -> ArgumentParser:
    """Knows the commands, and of their options those that all have; what else is given is left to the command."""
    common = _Parser(add_help=False, argument_default=SUPPRESS, allow_abbrev=False)
    common.add_argument("--json", action="store_true", help="the result as JSON on stdout, all else on stderr")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    root = _Parser(
        prog="laser-callback",
        allow_abbrev=False,
        parents=[common],
        formatter_class=RawDescriptionHelpFormatter,
        epilog="`laser-callback COMMAND --help` shows a command's options.\n"
        "exit codes: 0 done, or a plan is recommended; 1 a crash; 2 a bad option, plan or file;\n"
        "            3 the verdict is to keep the original; 130 interrupted; 143 terminated",
    )
    root.add_argument("--version", action="version", version=__version__)
    groups = {"": root.add_subparsers(title="commands", metavar="COMMAND [options]", required=True)}
    for name, (_, summary) in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            groups[group] = (
                groups[""].add_parser(group, help=GROUPS[group], allow_abbrev=False).add_subparsers(required=True)
            )
        leaf = groups[group].add_parser(verb, help=summary, add_help=False, allow_abbrev=False, parents=[common])
        leaf.set_defaults(command=name)
    return root


def _need_configs(name: str, arguments: list[str]) -> None:
    """Refuse what is no config: jsonargparse has a way to fail for each."""
    from laser_callback.support.reading import read_plain, typed

    blocks = _BLOCKS if name in READ_THEIR_OWN_ARGUMENTS else _CLASSES
    for option, value in pairwise([*arguments, ""]):
        flag, _, given = option.partition("=")
        key, path = "config" if flag == "-c" else flag.removeprefix("--"), given or value
        is_file = path.endswith((".yaml", ".yml", ".json"))
        if flag != key and ((key in blocks and is_file) or (key == "config" and (is_file or os.path.exists(path)))):
            read_plain(path, key, partial(typed, dict[str, Any]), yaml_form=True)
