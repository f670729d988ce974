"""Draw the rooms of the package and who imports whom: ``python docs/rooms.py`` writes ``docs/rooms.svg``.

A row is a room, with what its ``__init__`` says it is for; a dot says that it imports from the room of that column. All
dots lie to the right of the diagonal: rooms import from rooms below. A test compares the picture with the code.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from xml.etree import ElementTree

import grimp
from matplotlib.figure import Figure

from laser_callback.reports.drawing import DIM, INK, LINE, PAPER, SHADES, styled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PICTURE = HERE / "rooms.svg"
PACKAGE = "laser_callback"


def rooms() -> dict[str, str]:
    """What each room is for, from top to bottom as the import contract has them."""
    contracts = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name.strip() for layer in layers for name in layer.split("|")]
    told = {name: ast.parse((HERE.parent / PACKAGE / name / "__init__.py").read_text()) for name in names}
    return {name: (ast.get_docstring(tree) or "").split("\n")[0] for name, tree in told.items()}


def imports() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports from the second."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = (name.split(".")[1:2] for name in (module, imported))
            if one and other and one != other:
                found.add((one[0], other[0]))
    return {pair for pair in found if {*pair} <= {*rooms()}}


def drawn(path: Path = PICTURE) -> set[str]:
    """What a picture says: the names of its marks."""
    found = (element.get("id", "") for element in ElementTree.parse(path).iter())
    return {name for name in found if name.startswith(("room: ", "import: "))}


def marks() -> set[str]:
    """What the picture should say."""
    told = {f"room: {name}: {text}" for name, text in rooms().items()}
    return told | {f"import: {one} -> {other}" for one, other in imports()}


def draw(path: Path = PICTURE) -> None:
    """Write the picture."""
    names, pairs = rooms(), imports()
    place = {name: i for i, name in enumerate(names)}
    with styled():
        figure = Figure(figsize=(10, 4.6))
        axis = figure.add_axes((0, 0, 1, 1), xlim=(-18.4, len(names) + 0.5), ylim=(len(names) - 0.3, -3.2))
        axis.set_axis_off()
        for name, i in place.items():
            axis.axhspan(i - 0.45, i + 0.45, color=SHADES[5], alpha=0.7 if i % 2 else 0.35, linewidth=0)
            text = axis.text(-18, i, name, color=INK, weight="bold", va="center")
            text.set_gid(f"room: {name}: {names[name]}")
            axis.text(-15.6, i, names[name], color=DIM, va="center", fontsize=7.5)
            axis.text(i, -0.8, name, color=DIM, rotation=50, rotation_mode="anchor", fontsize=8)
        axis.plot([-0.5, len(names) - 0.5], [-0.5, len(names) - 0.5], color=LINE, linewidth=1)
        for one, other in sorted(pairs):
            (dot,) = axis.plot(place[other], place[one], "o", color=SHADES[1], markersize=6, markeredgecolor=PAPER)
            dot.set_gid(f"import: {one} -> {other}")
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(f"written: {PICTURE}")
