"""Hashes of what a run depends on, its weights and its examples: a run that goes on must find them unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils import _pytree as pytree

from laser_callback.compare.module import LaserModule
from laser_callback.spectra.folder import content_hash


def fingerprints(module: pl.LightningModule, parts: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Hashes of weights and buffers, and of what each part's loaders give: all facts, of other data the first batch."""
    whole = isinstance(module, LaserModule)  # facts are small
    found = {"weights": _fingerprint(chain(module.parameters(), module.buffers()))}
    for name, loaders in parts.items():
        seen = [list(loader) if whole else next(iter(loader)) for loader in loaders]
        found[name] = _fingerprint(pytree.tree_leaves(seen))
    return found


def _fingerprint(leaves: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = content_hash(f"{leaf.dtype} {tuple(leaf.shape)}", leaf.detach().contiguous())
        digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
