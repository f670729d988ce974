"""What a comparison is asked for, and the warning if its primary key is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import MetricCollection

from laser_callback.plans.plan import LaserPlan
from laser_callback.spectra.store import Spectra

UpdateFn = Callable[[MetricCollection, Any, Any], None]


@dataclass(frozen=True)
class RunOptions:
    """What a run needs to know of :class:`~laser_callback.compare.LaserCallback`'s arguments."""

    plans: Mapping[str, LaserPlan]
    metrics: MetricCollection | None
    update: UpdateFn | None
    primary: str | None
    controls: bool
    key_prefix: str
    replay: bool
    seed: int
    spectra: Spectra | None = None
    tensor_bytes: float = math.inf  # hold so much of reduced tensors, rebuild the others from their spectra
    with_spectra: bool = True  # put the spectra of what the plans cut into the result
    on_arm: Callable[[str], None] | None = None  # hears the name of each reduced arm that has finished a batch
    on_failure: Callable[[str, Exception], None] | None = None  # hears of arms that fail, which then rest
    isolate: tuple[str, ...] = ()
    skip_isolation: bool = False
    resample: bool = True  # keep what batches add to the states of metrics that are no means
    watched: bool = True  # see that the passes use the reduced weights

    def new_metrics(self, device: torch.device) -> MetricCollection | None:
        """Fresh in each run: states made under inference mode cannot be updated outside of it."""
        if self.metrics is None:
            return None
        metrics = self.metrics.clone().to(device)
        metrics.reset()
        return metrics


def warn_early(options: RunOptions, keys: Collection[str], where: str) -> None:
    """Warn if the primary is not among the ``keys`` that are logged so far. No error: a module may log others later."""
    if options.metrics is None:  # own metrics have their keys only when they are computed
        warn_if_absent(options.primary, keys, where)


def warn_if_absent(primary: str | None, keys: Collection[str], where: str) -> None:
    """Warn if ``primary`` is not among ``keys``."""
    if primary is not None and primary not in keys:
        rank_zero_warn(
            f"`primary` must be a key that is logged per epoch, got {primary!r}, but {where} logged "
            f"{', '.join(keys) or 'nothing'}. Without it no row has the star, and all p values are Holm-adjusted."
        )
