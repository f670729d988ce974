"""``laser-callback recipes``: annotated YAML files and scripts, one idea each, to run, or to copy and change.

The first line of a recipe says what it does: ``# laser-callback COMMAND: summary`` of a YAML file, which is a
``--config`` of that command, and the docstring of a Python script.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from laser_callback.cli.command import Answer, Exit
from laser_callback.support.files import need_files, need_writable, write_atomically
from laser_callback.support.reading import read_text, shown
from laser_callback.support.suggest import closest

_HEADER = re.compile(r"# laser-callback (?P<command>\w+): (?P<summary>.+)")


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        path: its file.
        command: which it is a config of; ``None`` for a script.
        summary: what it does, in one line.
    """

    path: Path
    command: str | None
    summary: str

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read what the recipe says of itself."""
        first = read_text(path, "name").split("\n", 1)[0]
        if path.suffix == ".py":
            return cls(path, None, first.strip('"'))
        match = _HEADER.fullmatch(first)
        if match is None:
            raise ValueError(f"{path} must begin with `# laser-callback COMMAND: summary`, got {shown(first)}")
        return cls(path, match["command"], match["summary"])


def recipes() -> dict[str, Recipe]:
    """All recipes by file name."""
    package = Path(__file__).parents[1]
    folder = package / "recipes"  # in an installed package; in a checkout they stand beside it
    folder = folder if folder.is_dir() else package.parent / "recipes"
    return {path.name: Recipe.read(path) for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".py")}


def ls() -> Answer:
    """List the recipes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("recipe", "runs", "what it does"):
        table.add_column(heading)
    for name, recipe in recipes().items():
        table.add_row(*map(Text, (name, recipe.command or "python", recipe.summary)))
    Console(highlight=False).print(table)
    return Answer([{"name": n, "command": r.command, "summary": r.summary} for n, r in recipes().items()])


def show(name: str) -> Answer:
    """Print a recipe.

    Args:
        name: of the recipe, as `recipes ls` shows it, or the path of one's own, e.g. ./search.yaml.
    """
    recipe = _find(name)
    text = read_text(recipe.path, "name")
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "python" if recipe.command is None else "yaml", background_color="default"))
    else:
        print(text, end="")
    return Answer({"name": name, "command": recipe.command, "text": text})


def cp(name: str, to: Path) -> Answer:
    """Copy a recipe, to change it.

    Args:
        name: of the recipe, as `recipes ls` shows it.
        to: a new file, or a folder to put it into.
    """
    recipe = _find(name)
    target = to / recipe.path.name if os.path.isdir(to) else to
    if os.path.exists(target):
        raise ValueError(f"`to` must be a new file, got {str(target)!r}, which exists")
    need_writable(to=target)
    write_atomically(target, recipe.path.read_bytes())
    run_by = "python" if recipe.command is None else f"laser-callback {recipe.command} --config"
    print(f"run it with `{run_by} {target}`")
    return Answer({"path": str(target)})


def run(arguments: list[str]) -> Answer | int:
    """``laser-callback recipes run NAME [options]``; the options are those of its command, or of the script."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: laser-callback recipes run NAME [options of its command, or of the script]")
        print("`laser-callback recipes ls` lists the recipes; a path, such as ./search.yaml, is a recipe of your own")
        return Exit.DONE if arguments else Exit.MISUSED
    recipe, options = _find(arguments[0]), arguments[1:]
    if recipe.command is not None:
        from laser_callback.cli.commands import work

        sys.path.insert(0, str(recipe.path.parent))  # classes that the recipe names stand beside it
        return work(recipe.command, ["--config", str(recipe.path), *options])
    # In this process, and as if by `python recipe.py`: what it launches, such as a DDP rank, starts the script anew.
    own = sys.argv
    sys.argv = [str(recipe.path), *options]
    try:
        runpy.run_path(str(recipe.path), run_name="__main__")
    finally:
        sys.argv = own
    return Exit.DONE


def _find(name: str) -> Recipe:
    """The user's recipe, if ``name`` is a path, else the package's."""
    path, found = Path(name), recipes()
    if name != path.name:
        need_files(name=path)
        return Recipe.read(path)
    if name not in found:
        hint = f" (the file in this folder is ./{name})" if os.path.isfile(path) else closest(name, found)
        raise ValueError(f"`name` must be a path or one of {', '.join(found)}, got {name!r}{hint}")
    if os.path.isfile(path) and path.read_bytes() != found[name].path.read_bytes():
        print(f"note: {name} is the package's recipe; yours, in this folder, is ./{name}", file=sys.stderr)
    return found[name]
