"""A language model, or one of images, that says its loss per example, and a pass of the screen over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from laser_callback.compare.measure import Lab
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import RHOS, Target, targets
from laser_callback.search.screen import GradientScreen, sense
from laser_callback.search.sensitivities import View
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.grid import grid
from laser_callback.spectra.store import Spectra


class Steps(pl.LightningModule):
    """One loss per example; ``returns`` says what the step makes of them."""

    def __init__(self, model: nn.Module, returns: Callable[[Tensor], Any] = Tensor.mean) -> None:
        super().__init__()
        self.model, self.returns = model, returns

    def losses(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):  # images
            return F.cross_entropy(self.model(batch["x"]), batch["y"], reduction="none")
        kwargs = {"decoder_input_ids": batch.flip(1)} if self.model.config.is_encoder_decoder else {}
        logits = self.model(input_ids=batch, **kwargs).logits
        return F.cross_entropy(logits[:, :-1].mT, batch[:, 1:], reduction="none").mean(1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.returns(self.losses(batch))


def run(screen: GradientScreen, module: pl.LightningModule, data: Any, size: int = 100, *, others=(), **kwargs) -> None:
    trainer = quiet_trainer(*others, screen, **{"inference_mode": False, **kwargs})
    trainer.validate(module, DataLoader(data, batch_size=size), verbose=False)


def ids(count: int = 7, vocabulary: int = 60) -> Tensor:
    return torch.randint(3, vocabulary, (count, 8), generator=torch.Generator().manual_seed(0))


def screen_of(found: Sequence[Target], spectra: Spectra | None = None, **kwargs: Any) -> GradientScreen:
    matrices = {matrix.name: matrix for target in found for matrix in target.matrices}
    return GradientScreen(list(matrices.values()), spectra or Spectra(), **kwargs)


def estimates(
    screen: GradientScreen, found: Sequence[Target], rhos: Sequence[float]
) -> dict[Reduction, tuple[float, float]]:
    """By cut of the grid the estimated change of the loss, and its standard error."""
    known = {}
    for candidate in grid(found, rhos, "laser"):
        (cut,) = candidate.plan
        estimate = screen.estimate(candidate.plan)
        assert estimate is not None
        known[cut] = estimate
    return known


def context_of(module: pl.LightningModule, loader: DataLoader | None = None, **more: Any) -> Context:
    """What strategies are told of a module, in the first step of a search; with sensitivities if there is a loader."""
    lab = Lab(module, Spectra(), "cpu")
    found = targets(module)
    context = Context(module, lab.matrices, found, RHOS, "", 0, lab.spectra, loader, **more)
    if loader is None:
        return context
    matrices = [matrix for target in found for matrix in target.matrices]
    return replace(context, sensitivities=sense(lab, {View(): matrices}, loader))
