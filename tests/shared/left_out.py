"""The table of docs/coverage.md about dropped layers: which families are written without them.

Rewrite the table with ``python tests/shared/left_out.py``.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from pathlib import Path

import torch
from families import FAMILIES, make, run
from transformers import PreTrainedModel

from laser_callback.passes.drops import droppable
from laser_callback.plans.stacks import layer_stacks
from laser_callback.shipping.export import save_reduced

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEADER = "| a layer that is dropped | families |\n|---|---|\n"


def outcome(name: str) -> str:
    """What becomes of each layer of the family when it is dropped, alone."""
    model = make(name, torch.float32)
    found = droppable(model, lambda: run(name, model))
    said: dict[str, list[str]] = {}
    for stack, layers in layer_stacks(model).items():
        for i in range(len(layers)):
            text = found.reasons.get(f"{stack}.{i}", "")
            if text:
                text = f"cannot be dropped: {text}"
            elif not isinstance(model, PreTrainedModel):
                text = "can be dropped, and there is no form for `from_pretrained`"
            else:
                text = _exported(model, f"{stack}.{i}.writes@0:bias=cut")
            said.setdefault(text, []).append(f"{stack}.{i}")
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(f'`{layer}`' for layer in layers)}: {text}" for text, layers in said.items())


def _exported(model: PreTrainedModel, plan: str) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = save_reduced(model, plan, Path(folder) / "new")
    said = [str(w.message) for w in caught if "could not be left out: " in str(w.message)]
    assert bool(said) != bool(recipe.left_out)
    return "is left out" if recipe.left_out else "stays: " + said[0].partition("left out: ")[2].rpartition(". What")[0]


def table() -> tuple[str, dict[str, str], str]:
    """The page up to the table's rows, outcome -> families, and what follows."""
    head, header, rest = PAGE.read_text(encoding="utf-8").partition(HEADER)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()))
    cells = dict(row.strip("| ").split(" | ") for row in rows)
    return head + header, cells, rest[sum(len(row) + 1 for row in rows) :]


if __name__ == "__main__":
    groups: dict[str, list[str]] = {}
    for family in FAMILIES:
        groups.setdefault(outcome(family), []).append(family)
    before, _, after = table()
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = "".join(f"| {text} | {', '.join(names)} |\n" for text, names in ordered)
    PAGE.write_text(before + rows + after, encoding="utf-8")
