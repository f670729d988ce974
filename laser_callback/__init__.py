"""LASER (layer-selective rank reduction, arXiv 2312.13558) for PyTorch Lightning, with sound statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "FactsDataModule": "data",
    "LaserCallback": "callback",
    "LaserModule": "module",
    "LaserPlan": "plan",
    "LaserSearch": "search",
    "Outcomes": "comparison",
    "Reduction": "plan",
    "WeightMatrix": "matrices",
    "find_matrices": "matrices",
    "reduced": "surgery",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from laser_callback.callback import LaserCallback as LaserCallback
    from laser_callback.comparison import Outcomes as Outcomes
    from laser_callback.data import FactsDataModule as FactsDataModule
    from laser_callback.matrices import WeightMatrix as WeightMatrix
    from laser_callback.matrices import find_matrices as find_matrices
    from laser_callback.module import LaserModule as LaserModule
    from laser_callback.plan import LaserPlan as LaserPlan
    from laser_callback.plan import Reduction as Reduction
    from laser_callback.search import LaserSearch as LaserSearch
    from laser_callback.surgery import reduced as reduced


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for torch, Lightning and transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
