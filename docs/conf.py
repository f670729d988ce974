"""Sphinx: ``python -m sphinx -W --keep-going -n -b html docs docs/_build/html``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import notebook  # noqa: E402 - beside this file

import laser_callback  # noqa: E402
from laser_callback.cli.commands import COMMANDS, READ_THEIR_OWN_ARGUMENTS, function_of  # noqa: E402
from laser_callback.cli.options import parser_of  # noqa: E402

ROOMS = [path.parent.name for path in (HERE.parent / "laser_callback").glob("*/__init__.pyi")]

project = "laser_callback"
version = release = laser_callback.__version__
copyright = "the laser_callback authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "laser_callback"
html_static_path = ["_static"]
html_css_files = ["page.css"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_numpy_docstring = False
add_module_names = False

# Whatever is not ours is not linked: a build must not need the internet. Links to our own names are checked.
nitpick_ignore_regex = [(r"py:.*", r"(?!laser_callback).*")]
nitpick_ignore = [("py:class", "laser_callback.stats.outcomes.ResultRow")]  # a type variable
ROOM_OF = {name: room for room in ROOMS for name in import_module(f"laser_callback.{room}").__all__}

(HERE / "_build").mkdir(exist_ok=True)
notebook.write_notebook(HERE / "_build" / "notebook" / "tutorial.ipynb")


class Commands(Directive):
    """The help of every command, as the command line prints it."""

    def run(self) -> list[nodes.Node]:
        """One section per command."""
        os.environ["COLUMNS"] = "88"
        sections: list[nodes.Node] = []
        for name, (_, summary) in COMMANDS.items():
            command = f"laser-callback {name}"
            section = nodes.section(ids=[nodes.make_id(command)], names=[command])
            section += [nodes.title(text=name), nodes.paragraph(text=f"{summary[0].upper()}{summary[1:]}.")]
            if name in READ_THEIR_OWN_ARGUMENTS:
                told = f"Its options depend on the classes that are run: {command} --help"
                section += nodes.paragraph(text=told)
            else:
                text = parser_of(function_of(name), command).format_help()
                text = "".join(c for c in text if c.isprintable() or c == "\n")  # jsonargparse marks an option by one
                section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def link_public_names(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """Link a public name to the room that exports it, whichever module a docstring finds it in."""
    name = node.get("reftarget", "").removeprefix("laser_callback.").rsplit(".", 1)[-1]
    if node.get("refdomain") != "py" or name not in ROOM_OF:
        return None
    target = f"laser_callback.{ROOM_OF[name]}.{name}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("commands", Commands)
    app.connect("missing-reference", link_public_names)
