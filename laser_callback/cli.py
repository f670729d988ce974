"""The command line. A command is a plain typed function; its options and help come from its signature and docstring."""

from __future__ import annotations

import importlib
import sys

_COMMANDS = {
    "demo": ("laser_callback.demo", "compare plans on a real model and real facts"),
    "search": ("laser_callback.search_cli", "find the cuts that help a model on a task, and confirm them"),
    "cache": ("laser_callback.cache_cli", "list or clear the factorisations kept on disk"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run ``laser-callback COMMAND [options]``; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        lines = [f"  {name:10} {summary}" for name, (_, summary) in _COMMANDS.items()]
        print("usage: laser-callback COMMAND [options]\n\ncommands:", *lines, sep="\n")
        print("\nlaser-callback COMMAND --help shows a command's options")
        return 0
    if command not in _COMMANDS:
        print(f"laser-callback: unknown command {command!r}; there are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    # Imported late: `--help` must not wait for torch.
    from jsonargparse import auto_cli

    function = getattr(importlib.import_module(_COMMANDS[command][0]), command)
    code = auto_cli(function, args=arguments[1:], prog=f"laser-callback {command}", as_positional=False)
    return code if isinstance(code, int) else 0
