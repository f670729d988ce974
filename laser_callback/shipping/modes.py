"""Two ways to clean the same weights: full mode cuts them, delta mode what fine-tuning has changed.

Contract: the modes were declared beforehand, so all are confirmed on the same examples and share one level by Holm's
procedure. Accepted is the one that gains most of those that pass everything, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import lightning.pytorch as pl

from laser_callback.compare.measure import Lab
from laser_callback.results.cleanup import CleanupResult
from laser_callback.search.budget import OutOfTimeError
from laser_callback.search.search import LaserSearch
from laser_callback.shipping.gates import Gates
from laser_callback.spectra.delta import BaseSource, BaseWeights
from laser_callback.spectra.store import Spectra

MODES = ("full", "delta")


def spectra_of(mode: str, module: pl.LightningModule, base: BaseSource) -> Spectra:
    """What is cut in ``mode``."""
    return Spectra.default(BaseWeights(base, module) if mode == "delta" else None)


def search_modes(
    result: CleanupResult,
    modes: Sequence[str],
    search_in: Callable[[str, float | None], LaserSearch],
    minutes: float | None,
) -> None:
    """Run each mode's search, which is made for the minutes that are its own, and adjust their p for each other."""
    start, left = time.perf_counter(), minutes
    for place, mode in enumerate(modes):
        if minutes is not None:
            left = (minutes - (time.perf_counter() - start) / 60) / (len(modes) - place)
        search = search_in(mode, left)
        try:
            result.searches[mode] = search.run()
        except OutOfTimeError as error:  # no reason to lose what the other mode has found
            search.result.reason = str(error)
            result.searches[mode] = search.result
    result.adjust()


def accept(result: CleanupResult, lab: Lab, gates: Gates | None, base: BaseSource) -> None:
    """Accept the best mode that holds at their common level and passes the gates."""
    for mode in result.candidates():
        plan = result.searches[mode].plan
        assert plan is not None
        if gates is not None:
            lab.spectra = spectra_of(mode, lab.module, base)
            verdict = result.gates[mode] = gates.judge(plan, partial(gates.measure, lab, plan))
            if not verdict.accepted:
                continue
        result.mode, result.plan = mode, plan
        break
