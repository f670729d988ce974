"""Paired examples made by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laser_callback.results.examples import Logged, PairedExamples
from laser_callback.results.returned import ORIGINAL


def log(value: float, name: str, dataloader_idx: int | None = None, better: bool | None = None) -> Logged:
    return Logged(torch.tensor(value), name, dataloader_idx, None, True, False, better)


def bools(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


def pair(before: dict[str, Any], after: dict[str, Any], size: int, index: int | None = None) -> PairedExamples:
    examples = PairedExamples()
    examples.add({ORIGINAL: before, "laser": after}, torch.empty(size), index)
    return examples


def together(*parts: PairedExamples) -> PairedExamples:
    joined = PairedExamples()
    for part in parts:
        joined.batches += part.batches
        joined.means += part.means
    return joined


def described(answer: list[str], said: list[str], **more: list[str]) -> dict[str, Any]:
    return {"answer": answer, "prediction": said, **more}
