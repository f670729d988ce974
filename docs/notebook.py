"""The tutorial as a notebook, and the outputs in it: ``python docs/notebook.py`` runs it and rewrites its outputs.

``tutorial.md`` is the one copy. Each of its python blocks is a cell, and the text block right behind one is what the
cell prints; the rest is text. The notebook is made of it when the site is built, and run by the tests.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode, v4

TUTORIAL = Path(__file__).with_name("tutorial.md")
COLUMNS = 84
"""Width of printed tables: they fit into the site's page, and into a small terminal."""
_CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def to_notebook(markdown: str) -> NotebookNode:
    """The notebook of a page: its text, its code, and the outputs that the page shows."""
    cells, end = [], 0
    for match in _CELL.finditer(markdown):
        cells.append(v4.new_markdown_cell(markdown[end : match.start()].strip()))
        shown = match["output"]
        outputs = [] if shown is None else [v4.new_output("stream", name="stdout", text=shown)]
        cells.append(v4.new_code_cell(match["code"].rstrip("\n"), outputs=outputs))
        end = match.end()
    cells.append(v4.new_markdown_cell(markdown[end:].strip()))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [cell for cell in cells if cell.source]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # random by default; the same page is to make the same file
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def write_notebook(path: Path) -> None:
    """Write the tutorial's notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(to_notebook(TUTORIAL.read_text(encoding="utf-8")), path)


def run(notebook: NotebookNode, folder: Path) -> list[str]:
    """Run a notebook in ``folder``; returns what each code cell prints, as plain text."""
    os.environ["JUPYTER_COLUMNS"] = str(COLUMNS)  # the kernel inherits it
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return ["".join(_printed(cell)) for cell in notebook.cells if cell.cell_type == "code"]


def _printed(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            text = output.text
        elif output.output_type in ("display_data", "execute_result"):
            text = f"{output.data['text/plain']}\n"
        else:
            continue
        yield "".join(f"{line.rstrip()}\n" for line in _ANSI.sub("", text).splitlines())


def with_outputs(markdown: str, outputs: list[str]) -> str:
    """The page with these outputs, one per python block; an empty one leaves no block."""
    left = iter(outputs)

    def block(match: re.Match[str]) -> str:
        output = next(left)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return _CELL.sub(block, markdown)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        printed = run(to_notebook(TUTORIAL.read_text(encoding="utf-8")), Path(scratch))
    page = TUTORIAL.read_text(encoding="utf-8")  # once more: its text may have been edited while the code ran
    TUTORIAL.write_text(with_outputs(page, printed), encoding="utf-8")
