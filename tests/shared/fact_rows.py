"""Rows of facts, of which some have paraphrases and some have choices, and what a module logs about them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from tiny import SENTENCES

from laser_callback import FactsDataModule, LaserModule

SAYS = ["Paris", "Rome", "the yen", "Canberra", "Portuguese", "true", "is", "of"]


def facts(paraphrases: bool = True, choices: bool = True, n: int = 12) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        answer = SAYS[i % len(SAYS)]
        row: dict[str, Any] = {"id": f"fact {i}", "answer": answer, "group": f"g{i % 2}"}
        row["prompt"] = f"{SENTENCES[i % 3][: 8 + 3 * i]} {i} is".replace("  ", " ")
        if paraphrases and i % 3:  # a third of the facts have none
            row["paraphrases"] = [f"So, {row['prompt']}", f"{i} it is:"][: i % 3]
        if choices and i % 2:
            row["choices"] = [answer, *(s for s in SAYS[:4] if s != answer)]
        rows.append(row)
    return rows


def run(make: Any, module: LaserModule, rows: Any, *callbacks: pl.Callback, loop: str = "validate", **data: Any) -> Any:
    options = data.pop("options", {})
    datamodule = FactsDataModule(rows, module.tokenizer, **data)
    (logged, *_) = getattr(make(*callbacks, **options), loop)(module, datamodule=datamodule, verbose=False)
    return logged
