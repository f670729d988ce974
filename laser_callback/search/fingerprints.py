"""Hashes of what a run depends on, its weights and its examples: a run that goes on must find them unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import lightning.pytorch as pl

from laser_callback.data.example_set import fingerprint


def fingerprints(module: pl.LightningModule, parts: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Hashes of weights and buffers, and of every batch that each part's loaders give."""
    found = {"weights": fingerprint(chain(module.parameters(), module.buffers()))}
    return found | {name: fingerprint(chain.from_iterable(loaders)) for name, loaders in parts.items()}
