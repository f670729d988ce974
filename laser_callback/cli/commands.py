"""The command line: which commands there are. How one is run is in ``command.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

from laser_callback.cli.command import COMMON_OPTIONS, Exit, call, run
from laser_callback.support.files import need_files
from laser_callback.support.suggest import closest

COMMANDS = {
    "demo": ("laser_callback.cli.demo", "compare plans on a real model and real facts"),
    "validate": ("laser_callback.cli.lightning", "compare a plan in trainer.validate of your own module and data"),
    "test": ("laser_callback.cli.lightning", "the same in trainer.test"),
    "fit": ("laser_callback.cli.lightning", "train, and compare in each validation"),
    "search": ("laser_callback.cli.search", "find the cuts that help a model on a task, and confirm them"),
    "gate": ("laser_callback.cli.rollout", "judge a plan by gates; the exit code says whether it may ship"),
    "rollout": ("laser_callback.cli.rollout", "put a plan in stage by stage, keep the last that passes all gates"),
    "export": ("laser_callback.cli.ship", "write what a plan makes of a model: dense, factored, adapter, recipe, undo"),
    "apply": ("laser_callback.cli.ship", "apply a recipe to the original, and write the reduced model"),
    "restore": ("laser_callback.cli.ship", "give a cut model its original weights back, bit for bit"),
    "inspect": ("laser_callback.cli.inspect", "show a model's matrices, their spectra, and what each rank rule keeps"),
    "report": ("laser_callback.cli.report", "show a result again: in the terminal, as a page, or as pictures"),
    "recipes ls": ("laser_callback.cli.recipes", "list the recipes: annotated files to run, copy and change"),
    "recipes show": ("laser_callback.cli.recipes", "print one"),
    "recipes cp": ("laser_callback.cli.recipes", "copy one"),
    "recipes run": ("laser_callback.cli.recipes", "run one, with options of its command to override it"),
    "cache ls": ("laser_callback.cli.cache", "show what the factorisations kept on disk take"),
    "cache clear": ("laser_callback.cli.cache", "remove them"),
    "get facts": ("laser_callback.cli.get", "write the demo's facts to a file, to try a command on"),
    "get model": ("laser_callback.cli.get", "print the folder of the demo's model, made if it is missing"),
    "completion": (
        "laser_callback.cli.completion",
        "print a script that lets your shell complete commands and options",
    ),
}
"""By name: the module, imported only to run it, that has the function of the name's last word, and a summary."""
READ_THEIR_OWN_ARGUMENTS = ("validate", "test", "fit", "recipes run")
"""Commands whose function takes the list of arguments, since their options depend on what is run."""


def main(arguments: list[str] | None = None) -> int:
    """Run ``laser-callback COMMAND [options]``; returns the exit code, an :class:`Exit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = _take(given, "--json"), _take(given, "--debug") or bool(os.environ.get("LASER_CALLBACK_DEBUG"))
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return Exit.DONE
    if given == ["--version"]:
        from laser_callback import __version__

        print(__version__)
        return Exit.DONE
    name = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    if name not in COMMANDS:
        verbs = [known.split()[1] for known in COMMANDS if known.startswith(f"{name} ")]
        if verbs and given[1:] in (["-h"], ["--help"]):
            print(f"usage: laser-callback {name} {{{','.join(verbs)}}} [options]")
            return Exit.DONE
        if verbs:
            name, hint = " ".join(given[:2]), f"; `{name}` is followed by one of {', '.join(verbs)}"
        else:
            hint = closest(name, [*COMMANDS]) or f"; there are {', '.join(COMMANDS)}"
        print(f"laser-callback: error: unknown command {name!r}{hint}", file=sys.stderr)
        return Exit.MISUSED
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: modules of one's own beside the config
    rest, prog = given[len(name.split()) :], f"laser-callback {name}"
    return run(lambda: work(name, rest), prog, as_json=as_json, debug=debug)


def work(name: str, arguments: list[str]) -> Any:
    """Do what a command does with these arguments; returns its answer."""
    _need_configs(arguments)  # before the imports, which take seconds
    function = function_of(name)
    if name in READ_THEIR_OWN_ARGUMENTS:
        return function(arguments)
    return call(function, arguments, f"laser-callback {name}")


def function_of(name: str) -> Callable[..., Any]:
    """The function behind a command."""
    return getattr(import_module(COMMANDS[name][0]), name.split()[-1])


def _need_configs(arguments: list[str]) -> None:
    for option, value in pairwise([*arguments, ""]):
        flag, _, given = option.partition("=")
        path = given or value
        if flag in ("--config", "-c") and path.endswith((".yaml", ".yml", ".json")):
            need_files(config=path)


def _take(arguments: list[str], flag: str) -> bool:
    """Whether the flag is among the arguments; it is removed."""
    found = flag in arguments
    arguments[:] = [argument for argument in arguments if argument != flag]
    return found


def _help() -> str:
    lines = [f"  {name:12}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: laser-callback COMMAND [options]\n\ncommands:",
            *lines,
            f"\n`laser-callback COMMAND --help` shows a command's options;\n{COMMON_OPTIONS}",
            "exit codes: 0 done, or a plan is recommended; 1 a crash; 2 a bad option, plan or file;",
            "            3 the verdict is to keep the original; 130 interrupted",
        ]
    )
