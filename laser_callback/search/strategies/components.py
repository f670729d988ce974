"""Directions kept by what the loss says of them, not by their size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from laser_callback.plans.kinds import WRITES
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import listed_places, places_rule
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate
from laser_callback.search.sensitivities import View
from laser_callback.search.strategies.base import ENOUGH_BATCHES, Context, Need
from laser_callback.search.strategies.joint import each

SHARE = 0.2
"""Of a matrix' directions are amplified, or shrunk, as in the code of arXiv 2603.03995 (``abs_select``)."""
AMPLIFIED, SHRUNK = 1.25, 0.8
"""What these are multiplied by there."""
SHARES = (0.0, 0.05, 0.2, 0.5, 1.0)
"""Of the directions by whose removal the loss falls, to first order, are taken out; at least one."""


class Components:
    """Directions of a matrix amplified, shrunk or taken out by their sensitivity.

    With d_i = sigma_i u_i' G v_i, dL/d(sigma_i) = d_i / sigma_i. Spectral Surgery (arXiv 2603.03995, section 3) edits
    the update of a fine-tuning by the size of that: the most sensitive directions are made larger, the least sensitive
    smaller. Its two halves are candidates of their own here, on the matrices that write to the residual stream as
    there, of all layers at once; they are not scored, so that they race whatever the sign of the estimate. The others
    follow the sign, matrix by matrix: without its directions of the largest d_i the loss falls by their sum, to first
    order (as ZS-SVD, arXiv 2602.02848, scores components).

    Which directions they are is written into the plan.

    Args:
        cut: ``"weight"``, or ``"delta"``, which needs a base: what fine-tuning has changed is edited, as in Spectral
            Surgery.
    """

    def __init__(self, cut: Literal["weight", "delta"] = "weight") -> None:
        self.cut: Literal["weight", "delta"] = cut

    @property
    def name(self) -> str:
        """``components``, or ``delta-components``."""
        return "components" if self.cut == "weight" else "delta-components"

    @property
    def needs(self) -> frozenset[Need]:
        """The gradient, and for the difference the base."""
        return frozenset({"gradient"} if self.cut == "weight" else {"gradient", "base"})

    def propose(self, context: Context) -> Iterator[Candidate]:
        """Both halves of Spectral Surgery, then the directions to take out of each matrix."""
        every = [(m, address, self._of(m, context)) for m, address in each(context.targets)]
        measured = [(m, address, found) for m, address, found in every if found is not None and bool(found.any())]
        whole = not any(found is None for m, _, found in every if m.kind in WRITES)  # else it would be another plan
        for largest, scale in ((True, AMPLIFIED), (False, SHRUNK)):
            lists = [(a, self._by_size(m, d, context, largest)) for m, a, d in measured if m.kind in WRITES]
            if lists and whole:
                plan = LaserPlan(self._scaled(a, places, scale) for a, places in lists)
                yield context.unscored(self, plan)
        for matrix, address, sensitivity in measured:
            falling = int((sensitivity > 0).sum())
            for count in dict.fromkeys(max(round(share * falling), 1) for share in SHARES):
                if (cut := self._removed(address, sensitivity, count)) is not None:
                    score, error = self._honest(matrix, count, context)
                    yield replace(context.unscored(self, cut), score=score, error=error)

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterator[Candidate]:
        """A few directions fewer and more; or a factor nearer to and further from 1."""
        reductions = list(leader.plan)
        if reductions[0].scale:
            by = 0.5 if closest else 2.0
            yield context.candidate(
                self, LaserPlan(replace(r, scale=round(1 + (r.scale - 1) * by, 4)) for r in reductions)
            )
            return
        ((matrix, reduction),) = context.resolve(leader.plan)
        address = {name: getattr(reduction, name) for name in ("layer", "matrix", "stack", "expert")}
        sensitivity = self._of(matrix, context)
        count = sum(stop - start for start, stop in listed_places(reduction.rho) or ())
        for other in (round(count / 1.4), round(count * 1.4)) if closest else (count // 2, count * 2):
            if sensitivity is None or other in (0, count):
                continue
            if (cut := self._removed(address, sensitivity, other)) is not None:
                yield context.candidate(self, cut)

    def _of(self, matrix: WeightMatrix, context: Context) -> Tensor | None:
        return context.sensitivities.mean(View(self.cut), matrix.name)

    def _removed(self, address: Mapping[str, Any], sensitivity: Tensor, count: int) -> Reduction | None:
        """Without the directions by whose removal the loss falls most; ``None`` if there are not so many."""
        order = sensitivity.argsort(descending=True, stable=True)[:count]
        if count >= len(sensitivity) or float(sensitivity[order[-1]]) <= 0:
            return None
        return self._scaled(address, order.tolist(), 0.0)

    def _honest(self, matrix: WeightMatrix, count: int, context: Context) -> tuple[float, float]:
        """What it changes to take out so many, or they would crowd all other candidates out of the race."""
        known = context.sensitivities
        mean, error = known.without_largest(known.views[View(self.cut)][matrix.name], count)
        return mean, error if known.batches >= ENOUGH_BATCHES else 0.0  # as in `Context.estimate`

    def _scaled(self, address: Mapping[str, Any], places: Sequence[int], scale: float) -> Reduction:
        rule = places_rule(places)
        assert rule is not None
        return Reduction(rho=rule, keep="tail", scale=scale, cut=self.cut, **address)

    def _by_size(self, matrix: WeightMatrix, sensitivity: Tensor, context: Context, largest: bool) -> list[int]:
        """The fifth of the directions to whose singular values the loss is most, or least, sensitive."""
        values = context.spectra.of(matrix.value, matrix.name, self.cut).values.cpu()
        used = int((values > 0).sum())  # the difference of LoRA has few
        order = (sensitivity[:used] / values[:used]).abs().argsort(descending=largest, stable=True)
        return order[: max(round(SHARE * used), 1)].tolist()
