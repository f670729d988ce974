"""How the package is laid out: names of rooms, what an import costs, how long files are."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import laser_callback

PACKAGE = Path(laser_callback.__file__).parent
ROOMS = sorted(stub.parent.name for stub in PACKAGE.glob("*/__init__.pyi"))
TESTS = Path(__file__).parent


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def public(package: Path) -> set[str]:
    """The names that a package's stub gives away."""
    stub = (package / "__init__.pyi").read_text(encoding="utf-8")
    return set(re.findall(r"^from \.\S* import \w+ as (\w+)$", stub, re.MULTILINE))


def test_every_folder_is_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    assert len(ROOMS) == 14
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_the_names_of_a_room_are_there_and_are_no_modules(room):
    package = import_module(f"laser_callback.{room}")
    assert set(package.__all__) == public(PACKAGE / room)
    modules = {path.stem for path in (PACKAGE / room).iterdir() if path.suffix == ".py" or path.is_dir()}
    # Python would put the module in the name's place as soon as somebody imports it.
    assert modules & set(package.__all__) == set()
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_the_public_names_are_listed_and_typed():
    assert set(laser_callback.__all__) == public(PACKAGE)
    assert set(laser_callback.__all__) <= set(dir(laser_callback))
    assert all(getattr(laser_callback, name) is not None for name in laser_callback.__all__)
    assert (PACKAGE / "py.typed").is_file()


def test_statistics_need_no_torch():
    code = """
import sys
import numpy as np
import laser_callback
from laser_callback.stats import Outcomes, compare
before, after = np.arange(12) % 2 == 0, np.arange(12) % 3 == 0
assert compare("acc", Outcomes.of(before), Outcomes.of(after)).n == 12
print(sorted({"torch", "lightning", "transformers"} & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_files_and_rooms_are_small():
    assert {path: n for path in PACKAGE.rglob("*.py") if (n := lines(path)) > 450} == {}
    assert {room: n for room in ROOMS if (n := len([*(PACKAGE / room).glob("[!_]*.py")])) > 16} == {}
    assert {path: n for path in TESTS.rglob("*.py") if (n := lines(path)) > 600} == {}


def test_tests_share_what_is_in_shared_and_no_names_of_files():
    """Each folder of tests is on the path: a second file of a name would hide the first."""
    files = [path for path in TESTS.rglob("*.py") if path.name != "conftest.py"]
    assert len({path.name for path in files}) == len(files)
    imports = re.compile(r"^\s*(?:from|import) (test_\w+)", re.MULTILINE)
    assert {path.name: found for path in files if (found := imports.findall(path.read_text(encoding="utf-8")))} == {}


def test_the_picture_of_the_rooms_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS.parent / "docs"))
    import rooms

    assert rooms.drawn() == rooms.marks(), "python docs/rooms.py draws it"


def test_docs_and_recipes_name_public_names_only():
    root = TESTS.parent
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("docs/howto/*.md"), *root.glob("recipes/*")]
    named = re.compile(r"from (laser_callback[\w.]*) import ([\w, ]+)|`(laser_callback(?:\.\w+)*)\.(\w+)`")
    for page in pages:
        for match in named.finditer(page.read_text(encoding="utf-8")):
            room, names = match[1] or match[3], (match[2] or match[4]).split(",")
            public_names = {*import_module(room).__all__, *(ROOMS if room == "laser_callback" else ())}
            assert {name.strip() for name in names} <= public_names, f"{page.name}: {match[0]}"
