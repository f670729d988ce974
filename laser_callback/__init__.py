"""LASER (layer-selective rank reduction, arXiv 2312.13558) for PyTorch Lightning, with sound statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BaseWeights": "delta",
    "FactsDataModule": "data",
    "LaserCallback": "callback",
    "LaserCleanup": "cleanup",
    "LaserModule": "module",
    "LaserPlan": "plan",
    "LaserSearch": "search",
    "Outcomes": "comparison",
    "ProbesDataModule": "probes",
    "Reduction": "reduction",
    "Spectra": "spectra",
    "StagedRollout": "rollout",
    "WeightMatrix": "matrices",
    "find_matrices": "matrices",
    "load_factored": "factored_file",
    "merged": "merging",
    "reduced": "surgery",
    "restore": "undo",
    "save_reduced": "export",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from laser_callback.callback import LaserCallback as LaserCallback
    from laser_callback.cleanup import LaserCleanup as LaserCleanup
    from laser_callback.comparison import Outcomes as Outcomes
    from laser_callback.data import FactsDataModule as FactsDataModule
    from laser_callback.delta import BaseWeights as BaseWeights
    from laser_callback.export import save_reduced as save_reduced
    from laser_callback.factored_file import load_factored as load_factored
    from laser_callback.matrices import WeightMatrix as WeightMatrix
    from laser_callback.matrices import find_matrices as find_matrices
    from laser_callback.merging import merged as merged
    from laser_callback.module import LaserModule as LaserModule
    from laser_callback.plan import LaserPlan as LaserPlan
    from laser_callback.probes import ProbesDataModule as ProbesDataModule
    from laser_callback.reduction import Reduction as Reduction
    from laser_callback.rollout import StagedRollout as StagedRollout
    from laser_callback.search import LaserSearch as LaserSearch
    from laser_callback.spectra import Spectra as Spectra
    from laser_callback.surgery import reduced as reduced
    from laser_callback.undo import restore as restore


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for torch, Lightning and transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
