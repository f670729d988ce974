"""Whether a strategy of one's own keeps to what :class:`~laser_callback.search.strategies.Strategy` demands."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from laser_callback.compare.measure import Lab
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.short import brief
from laser_callback.plans.target import RHOS
from laser_callback.results.candidates import Candidate
from laser_callback.search.moments import input_directions_of
from laser_callback.search.proposals import checked, views_for
from laser_callback.search.screen import LossFn, sense
from laser_callback.search.strategies.base import ENOUGH_BATCHES, Context, Strategy
from laser_callback.search.strategies.registry import strategies_of
from laser_callback.spectra.delta import BaseSource, BaseWeights
from laser_callback.spectra.store import Spectra


def check_strategy(
    strategy: Strategy,
    module: pl.LightningModule,
    data: Any,
    *,
    base: BaseSource | None = None,
    within: str = "*.all",
    rhos: Sequence[float] = RHOS,
    loss: LossFn | None = None,
    accelerator: str = "cpu",
) -> list[Candidate]:
    """Try a strategy on a module as a search would, ahead of a race.

    It must have a name and known needs; propose at least one candidate; each with its own name, the base that is in
    place, a finite score if any, and a plan that fits the module and is the same when its text is read back; none
    twice. Around a candidate it must propose others that keep to the same, and not the candidate itself. It must do the
    same when it is asked again, and leave the module as it was: weights, gradients, hooks and modes.

    Args:
        strategy: to be tried.
        module: that a plan is proposed for.
        data: as for :class:`~laser_callback.search.LaserSearch`; of it the screen set is used.
        base: what the module was fine-tuned from, for strategies that need it.
        within: where to look, as plan text without rho.
        rhos: the grid.
        loss: what the screen differentiates, as for :class:`~laser_callback.search.GradientScreen`.
        accelerator: as in ``Trainer``.

    Returns:
        What it proposes.

    Raises:
        AssertionError: with the demand that is not met.
        TypeError: if it is no strategy at all.
        ValueError: for a strategy that needs a base, if there is none.

    Example::

        def test_my_strategy():
            check_strategy(MyStrategy(), module, data)
    """
    strategies_of([strategy])
    if "base" in strategy.needs and base is None:
        raise ValueError(
            f"the strategy {strategy.name!r} needs a base: give `base`, what the module was fine-tuned from"
        )
    spectra = Spectra(base=None if base is None else BaseWeights(base, module))
    lab = Lab(module, spectra, accelerator)
    loader = ExampleSets.of(data).loader("screen", batches=ENOUGH_BATCHES)
    run = partial(lab.validate, loader, limit_batches=1)
    context = Context(module, lab.matrices, lab.targets(within), tuple(rhos), "", 0, spectra, run)
    if "activations" in strategy.needs:
        lab.spectra = spectra.bringing(input_directions_of(lab, context.targets, loader))
        context = replace(context, spectra=lab.spectra)
    if wanted := views_for([strategy], context):
        context = replace(context, sensitivities=sense(lab, wanted, loader, loss=loss))

    before = _state(module)
    proposed = _kept(strategy, "propose", strategy.propose(context), context)
    _demand(strategy, bool(proposed), "`propose` gives at least one candidate, got none")
    again = _kept(strategy, "propose", strategy.propose(context), context)
    _demand(strategy, proposed == again, "`propose` gives the same when it is asked again, by the seed of the context")
    _demand(
        strategy, _state(module) == before, "`propose` leaves the module as it was: weights, gradients, hooks, modes"
    )

    middle = proposed[len(proposed) // 2]
    for leader in {id(c): c for c in (proposed[0], middle, proposed[-1])}.values():
        for closest in (False, True):
            what = f"`neighbours` of {brief(leader.plan)}, closest={closest},"
            around = [
                _kept(strategy, what, strategy.neighbours(copy.copy(leader), context, closest), context)
                for _ in range(2)
            ]
            _demand(strategy, around[0] == around[1], f"{what} are the same when they are asked for again")
            _demand(strategy, all(c.plan != leader.plan for c in around[0]), f"{what} are others than itself")
    _demand(
        strategy, _state(module) == before, "`neighbours` leaves the module as it was: weights, gradients, hooks, modes"
    )
    return proposed


def _kept(strategy: Strategy, what: str, given: Any, context: Context) -> list[Candidate]:
    """What it has given, if that keeps to all that is demanded of candidates."""
    candidates = list(given)
    wrong = [each for each in candidates if not isinstance(each, Candidate)]
    _demand(strategy, not wrong, f"{what} gives candidates (`context.candidate(self, plan)`), got {wrong[:1]}")
    try:
        cuts = [cut for _, cut in checked(strategy, candidates, context)]
    except ValueError as error:
        raise AssertionError(str(error)) from error
    twice = [c for i, c in enumerate(candidates) if cuts[i] in cuts[:i]] if len(set(cuts)) < len(cuts) else []
    _demand(strategy, not twice, f"{what} gives no cut twice, got {', '.join(brief(c.plan) for c in twice[:3])}")
    return candidates


def _demand(strategy: Strategy, held: bool, demand: str) -> None:
    if not held:
        raise AssertionError(f"the strategy {strategy.name!r} must be such that {demand}")


def _state(module: nn.Module) -> list[Any]:
    """All that a strategy could leave behind in a module, by value."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found: list[Any] = [
        (name, t.data_ptr(), t.requires_grad, _bits(t.detach()), None if t.grad is None else _bits(t.grad))
        for name, t in tensors
    ]
    for name, part in module.named_modules():
        hooks = {key: list(value) for key, value in vars(part).items() if key.endswith("_hooks") and value}
        found.append((name, part.training, hooks))
    return found


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
