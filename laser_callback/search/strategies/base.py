"""What a strategy is, and what it may know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import lightning.pytorch as pl

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import Catalogue
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.sensitivities import Sensitivities
from laser_callback.spectra.store import Spectra

Need = Literal["gradient", "base", "activations"]

ENOUGH_BATCHES = 5
"""Fewer batches than this tell nothing about their variance."""


@dataclass(frozen=True, eq=False)
class Context:
    """Everything that a strategy may know in one step of a search. It changes none of it.

    Attributes:
        module: the module that is searched, with what is in place already.
        matrices: of the module.
        targets: what may be cut: within the search's ``within``, and not cut yet.
        rhos: the search's grid.
        base: the plan that is in place, as text; empty in the first step.
        seed: of the search; whatever is drawn is drawn by it.
        spectra: factorisations of the matrices; with a base where a strategy needs one, and with the directions of
            their inputs where one needs activations.
        run: passes a few examples of the screen set, on which nothing is claimed, through the module's validation step;
            ``None`` where there is no such set.
        sensitivities: how the loss on these answers to each singular direction. Empty where nothing is screened: in
            the methods "exhaustive" and "paper", and where no strategy has "gradient" among its needs.
    """

    module: pl.LightningModule
    matrices: Catalogue
    targets: Sequence[Target]
    rhos: Sequence[float]
    base: str
    seed: int
    spectra: Spectra
    run: Callable[[], object] | None = None
    sensitivities: Sensitivities = field(default_factory=Sensitivities)

    def resolve(self, plan: LaserPlan) -> list[tuple[WeightMatrix, Reduction]]:
        """The matrices that a plan names, each with its cut, which knows its rank (:meth:`Spectra.settled`).

        Raises:
            ValueError: as :meth:`LaserPlan.resolve`.
        """
        return self.spectra.settled(plan.resolve(self.matrices))

    def estimate(self, plan: LaserPlan) -> tuple[float, float] | None:
        """The first-order change of the mean loss on the screen set under ``plan``, and its standard error.

        Returns:
            ``None`` if the plan cuts anything that nothing was measured of. The standard error is 0 where it is not
            known, which is with fewer than five batches.
        """
        found = self.sensitivities.estimate(self.resolve(plan), self.spectra)
        if found is None or self.sensitivities.batches >= ENOUGH_BATCHES:
            return found
        return found[0], 0.0

    def candidate(self, strategy: Strategy, plan: LaserPlan | Reduction | str) -> Candidate:
        """``plan`` as a candidate of ``strategy``, with its place in the map of the search.

        It has the estimated change of the loss for its score if the strategy needs the gradient.

        Raises:
            ValueError: if the plan cannot be read, or does not fit the model.
        """
        found = self.unscored(strategy, plan)
        score, error = (self.estimate(found.plan) if "gradient" in strategy.needs else None) or (None, 0.0)
        return replace(found, score=score, error=error)

    def unscored(self, strategy: Strategy, plan: LaserPlan | Reduction | str) -> Candidate:
        """The same without a score, for a strategy that has its own, or wants none.

        Raises:
            ValueError: as :meth:`candidate`.
        """
        if isinstance(plan, Reduction):
            plan = LaserPlan([plan])
        plan = LaserPlan.parse(plan) if isinstance(plan, str) else plan
        cuts = self.resolve(plan)
        layers, kinds = ({getattr(matrix, name) for matrix, _ in cuts} for name in ("layer", "kind"))
        layer, kind = (found.pop() if len(found) == 1 else None for found in (layers, kinds))
        rhos = [reduction.rho for reduction in plan]
        one_place = len(rhos) == 1 and (len(cuts) == 1 or (layer is not None and kind is not None))
        rho = rhos[0] if one_place and isinstance(rhos[0], float) else None
        return Candidate(plan, strategy.name, layer, kind, rho, self.base)


class Strategy(Protocol):
    """What proposes candidates. One of your own is any object with these two attributes and two methods.

    Both methods are called with the base in place. A strategy that runs the module puts it into the mode it needs, and
    leaves it as it was. The same context gives the same candidates.

    A strategy with "gradient" among its needs gets the sensitivities of all targets' weights, or if "base" is among
    them too, of their differences to the base. Two more methods are asked if there are any: ``views(context)`` returns
    the matrices of which it wants each :class:`~laser_callback.search.View` instead, and
    ``refusal(context)``, before the work, why there is nothing to propose for this model, or an empty text.
    An attribute ``races_first``, if true, says that its candidates are few: they race in their order, ahead of all
    others.

    Attributes:
        name: letters, digits and hyphens; each of its candidates has it.
        needs: what it cannot do without. ``"gradient"``: a backward pass over the screen set. ``"base"``: what the
            module was fine-tuned from. ``"activations"``: what goes into each matrix on the screen set.

    Example::

        class HalfTheRank:
            name, needs = "half-the-rank", frozenset({"gradient"})

            def propose(self, context):
                return [context.candidate(self, target.at(0.5)) for target in context.targets]

            def neighbours(self, leader, context, closest):
                (cut,) = leader.plan
                rhos = (0.45, 0.55) if closest else (0.3, 0.7)
                return [context.candidate(self, replace(cut, rho=rho)) for rho in rhos]
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without."""

    def propose(self, context: Context) -> Iterable[Candidate]:
        """All candidates of a step.

        Those with a score (the estimated change of the mean loss, lower is better) are put in order by it, together
        with those of all other strategies. Those without one race in the order in which they are given, the best first.
        """
        ...

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterable[Candidate]:
        """What to try around one of its candidates that leads a race; what has raced already is left out by the search.

        Args:
            leader: the candidate.
            context: of the step.
            closest: first this is asked, with ``False``, for the best candidates of the first few families, and means
                further away; then, with ``True``, for the best of all, and means close by.
        """
        ...
