"""The documentation's code and commands run, page by page, and the tutorial prints what it shows."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from reader import HUB_NAME, Classifier
from torch.utils.data import DataLoader

from laser_callback.cli.commands import main
from laser_callback.cli.search import search
from laser_callback.data.facts import Fact
from laser_callback.data.probes import Probe
from laser_callback.data.tasks import TASKS
from laser_callback.search.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}
SLOW = {("howto/search.md", "python"), ("howto/gates.md", "python"), ("howto/own-facts.md", "bash")}
BLOCK = re.compile(r"(<!-- not run: .*? -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The blocks of a page that run."""
    return [code for mark, kind, code in BLOCK.findall(PAGES[page]) if kind == language and not mark]


def pages_with(language):
    """The pages that have such blocks; those that search, or load a model per command, are for the whole run."""
    pages = [page for page in PAGES if blocks(page, language)]
    return [pytest.param(page, marks=pytest.mark.slow) if (page, language) in SLOW else page for page in pages]


@pytest.fixture
def folder(deep_lm, own_cache, tmp_path, monkeypatch):
    """Where a reader is: with facts, text, probes and the recipes, which name a small model here."""
    monkeypatch.chdir(tmp_path)
    for name in ("facts.jsonl", "text.txt"):
        shutil.copy(deep_lm / name, tmp_path)
    (probes,) = blocks("howto/gates.md", "json")
    (tmp_path / "probes.jsonl").write_text(probes)
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        (tmp_path / recipe.name).write_text(recipe.read_text().replace(HUB_NAME, str(deep_lm)))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != "tutorial.md"])
def test_python(page, deep_lm, folder):
    """The blocks of a page in one namespace, in which a reader's own module, data and plan are."""
    data = pl.LightningDataModule()
    rows = [{"x": torch.arange(i, i + 4), "label": i % 4, "id": i} for i in range(12)]
    data.val_dataloader = lambda: DataLoader(rows, batch_size=5)
    scope = {"module": Classifier(deep_lm), "data": data, "datamodule": data, "plan": "28.fc_up@0.01"}
    for code in blocks(page, "python"):
        exec(textwrap.dedent(code).replace(HUB_NAME, str(deep_lm)), scope)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands(page, deep_lm, folder):
    """``laser-callback`` commands run; of others, the files and extras that they name exist."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    for line in "".join(blocks(page, "bash")).splitlines():
        program, *options = shlex.split(line.replace(HUB_NAME, str(deep_lm)), comments=True)
        if program == "laser-callback":
            on_cpu = ["--accelerator", "cpu"] if options[0] == "gate" else []
            on_cpu = ["--trainer.accelerator", "cpu"] if options[0] == "validate" else on_cpu
            assert main([*options, *on_cpu]) in (0, 3), line
        elif program == "pip":
            assert all(f"\n{extra} = [" in pyproject for extra in re.findall(r"\[(\w+)\]", line)), line
        else:
            assert (ROOT / options[0]).is_file(), line


def test_json_lines_are_facts_or_probes():
    lines = [json.loads(line) for page in PAGES for block in blocks(page, "json") for line in block.splitlines()]
    assert len([(Probe if "should" in line else Fact).from_row(line, "1") for line in lines]) >= 3


def test_published_table_is_that_of_the_tasks():
    text = PAGES["when-it-helps.md"]
    for name, task in TASKS.items():
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)
        for cell, published in zip(row.split(" | "), task.published.values(), strict=True):
            numbers = (published.accuracy, published.reduced_accuracy, published.log_loss, published.reduced_log_loss)
            worse = published.reduced_log_loss > published.log_loss
            assert tuple(map(float, re.findall(r"[\d.]+", cell.split("`")[0]))) == numbers
            assert cell.split("`")[1] == str(published.plan)
            assert ("**" in cell) == worse


def test_every_strategy_is_told_with_what_it_needs():
    part = PAGES["how-the-search-works.md"].partition("## What is proposed")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:3] == "| `"]
    words = {"gradient": "gradient", "base": "base", "inputs": "activations"}
    told = {
        name: {words[word] for word in row[-1].strip(" |").split(", ") if word} for row in rows for name in code(row)
    }
    assert told == {name: set(made().needs) for name, made in STRATEGIES.items()}
    for text in (inspect.getdoc(search), (ROOT / "recipes/search.yaml").read_text()):
        assert set(STRATEGIES) <= set(re.findall(r"[a-z]+(?:-[a-z]+)*", text))


def code(row):
    """The names in the first cell."""
    return re.findall(r"`([a-z-]+)`", row[0])


def test_issue_forms_have_what_the_site_demands():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            assert all({"type", "id", "attributes"} <= set(field) for field in form["body"])
    assert len(forms) >= 3


# ---- the tutorial ----------------------------------------------------------------------------------------------------

SECONDS = re.compile(r"\d+\.\d+ s\b")
NUMBER = re.compile(r"\d*\.?\d+(?:e-\d+)?")


@pytest.fixture
def notebook(monkeypatch):
    pytest.importorskip("nbclient", reason='the tutorial runs as a notebook: pip install "laser-callback[docs]"')
    monkeypatch.syspath_prepend(str(DOCS))
    import notebook

    return notebook


@pytest.mark.slow
def test_tutorial_prints_what_it_shows(notebook, tmp_path):
    """In a kernel of its own, on the real model: the same words, and numbers to the rounding of another processor."""
    shown = notebook.to_notebook(PAGES["tutorial.md"])
    expected = ["".join(output.text for output in cell.outputs) for cell in shown.cells if cell.cell_type == "code"]
    printed = notebook.run(shown, tmp_path)
    assert sum(map(bool, expected)) >= 6
    for before, now in zip(expected, printed, strict=True):
        before, now = SECONDS.sub("", before), SECONDS.sub("", now)
        assert NUMBER.sub("#", now).split() == NUMBER.sub("#", before).split()
        numbers = zip(map(float, NUMBER.findall(before)), map(float, NUMBER.findall(now)), strict=True)
        assert all(math.isclose(a, b, rel_tol=0.02, abs_tol=0.01) for a, b in numbers), f"{before}\n{now}"


def test_outputs_are_replaced_added_and_removed(notebook):
    page = "a\n\n```python\nx = 1\n```\n\nb\n\n```python\nprint(x)\n```\n\n```text\nold\n```\n\nc\n"
    new = notebook.with_outputs(page, ["first\n", "second\n"])
    assert [o.text for c in notebook.to_notebook(new).cells for o in c.get("outputs", [])] == ["first\n", "second\n"]
    assert "old" not in new
    assert notebook.with_outputs(new, ["", "old\n"]) == page
