"""What fine-tuning has changed, cut as a whole by one rule, or matrix by matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import fixed_rank, mean_rank
from laser_callback.plans.target import Target, by_name
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import cut_by
from laser_callback.search.strategies.base import Context, Need
from laser_callback.search.strategies.joint import at, cover, one_name
from laser_callback.search.strategies.laser import Laser
from laser_callback.spectra.delta import BaseWeights

RANKS = (1, 2, 4, 8, 3, 16)
"""Directions of each matrix' change, those that helped most often after noisy labels first."""
THRESHOLDS = (1.0, 2.0, 0.5, 4.0, 0.25)
"""Directions of a matrix' change on average, by one threshold for the whole model."""
FACTORS = (0.5, 0.75, 0.25)
"""Of the whole change."""
RULES = ("gavish-donoho", "marchenko-pastur", "energy-0.9", "energy-0.5")
MATRIX_RANKS = (0, 1, 2, 3, 4, 6, 8, 16, 32, 64)
"""For single matrices: fine-tuning, and LoRA by its making, changes few directions."""


class Delta:
    """The whole change of fine-tuning, W - W_base of all targets, under one rule.

    - one integer rank for all matrices (``*.all@k2:cut=delta``),
    - the largest directions of the whole model, by one threshold (``*.all@global-1:cut=delta``),
    - all of it, smaller: weight interpolation, WiSE-FT (arXiv 2109.01903), which every other must beat to be worth its
      name (``*.all@0:cut=delta,scale=0.5``),
    - its first direction with the norm of the whole (arXiv 2510.00553, after reinforcement learning),
    - a rule of thumb: Gavish and Donoho's threshold (DG-Hard, arXiv 2605.20296), the Marchenko-Pastur edge, a share of
      the energy. Of a LoRA difference the first two keep everything, since most of its singular values are 0.

    They are up to 19, and not scored: a first-order estimate says nothing about so large a change. They race first.

    Args:
        besides: also what is changed besides the targets: embeddings, the head if the base has one, and biases. Without
            it they stay as fine-tuning has left them. Norms always do, and so does a head that the base lacks.
    """

    needs: frozenset[Need] = frozenset({"base"})
    races_first = True

    def __init__(self, besides: bool = False) -> None:
        self.besides = besides

    @property
    def name(self) -> str:
        """``delta``, or ``delta-all`` where embeddings and heads are included."""
        return "delta-all" if self.besides else "delta"

    def refusal(self, context: Context) -> str:
        """That fine-tuning has changed none of the matrices, where it is so; else empty."""
        if _changed(context) or (self.besides and any(map(_base(context).changed, self._others(context)))):
            return ""
        return _unchanged(context)

    def propose(self, context: Context) -> Iterator[Candidate]:
        """All rules, the kinds of rule by turns."""
        ranks = [self._plan(context, f"k{rank}") for rank in RANKS]
        thresholds = [self._plan(context, f"global-{mean:g}") for mean in THRESHOLDS]
        factors = [self._plan(context, 0, scale=factor) for factor in FACTORS]
        first = self._plan(context, "k1", norm="whole")
        rules = [first, *(self._plan(context, rule) for rule in RULES)]
        seen: set[Hashable] = set()
        for plan in _by_turns(factors, ranks, thresholds, rules):
            if plan is not None and (cut := cut_by(context.resolve(plan))) not in seen:
                seen.add(cut)
                yield context.candidate(self, plan)

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterator[Candidate]:
        """Ranks, thresholds or factors a little lower and higher."""
        reduction = next(iter(leader.plan))
        if reduction.norm == "whole":
            return
        step = 1.25 if closest else 1.5
        if (rank := fixed_rank(reduction.rho)) is not None:
            near: list[tuple[float | str, dict[str, Any]]] = [
                (f"k{other}", {})
                for other in {max(1, min(rank - 1, round(rank / step))), max(rank + 1, round(rank * step))}
            ]
        elif (mean := mean_rank(reduction.rho)) is not None:
            near = [(f"global-{float(f'{mean * by:.3g}'):g}", {}) for by in (1 / step, step)]
        elif reduction.rho == 0:
            gap = 0.05 if closest else 0.1
            near = [(0, {"scale": round(reduction.scale + by, 3)}) for by in (-gap, gap)]
        else:
            return
        for rho, options in near:
            plan = self._plan(context, rho, **options)
            if plan is not None and plan != leader.plan:
                yield context.candidate(self, plan)

    def _plan(self, context: Context, rho: float | str, **options: Any) -> LaserPlan | None:
        """All changes by one rule; ``None`` where one threshold for them has no name."""
        changed = _changed(context)
        addresses = cover(changed, context.matrices)
        if mean_rank(rho) is not None and len(addresses) > 1:
            together = one_name(changed)
            if together is None:
                return None
            addresses = [together]
        if not self.besides:
            return at(addresses, rho, cut="delta", **options)
        others = self._others(context)
        # A bias has one direction: it goes where the whole change is made smaller, and stays where directions are cut.
        if rho == 0 and any(matrix.bias for matrix in context.matrices):
            options["bias"] = "cut"
        return at([*addresses, *map(_by_all_names, others)], rho, cut="delta", **options)

    def _others(self, context: Context) -> list[WeightMatrix]:
        """Matrices besides those of the layers, as far as the base has them."""
        base, targets = _base(context), {matrix.name for target in _changed(context) for matrix in target.matrices}
        besides = [m for m in context.matrices if m.kind is None and m.name not in targets]
        return [matrix for matrix in besides if not matrix.obstacle and base.has(matrix)]


class DeltaMatrices(Laser):
    """One matrix' change at a time, cut to a small rank, scored by the gradient."""

    name = "delta-matrices"
    needs: frozenset[Need] = frozenset({"gradient", "base"})
    options: Mapping[str, Any] = MappingProxyType({"cut": "delta"})

    def refusal(self, context: Context) -> str:
        """That fine-tuning has changed none of the matrices, where it is so; else empty."""
        return "" if _changed(context) else _unchanged(context)

    @override
    def targets(self, context: Context) -> list[Target]:
        return _changed(context, super().targets(context))

    @override
    def row(self, target: Target, context: Context) -> list[Candidate]:
        return self._scored([self._at(target, rank, context) for rank in MATRIX_RANKS if rank < _most(target)], context)

    @override
    def between(self, candidate: Candidate, target: Target, context: Context) -> list[Candidate]:
        (reduction,) = candidate.plan
        own = reduction.rank(_most(target))
        places = sorted({*MATRIX_RANKS, own})
        near = places[max(places.index(own) - 1, 0) : places.index(own) + 2]
        middles = {round(math.sqrt(low * high)) for low, high in pairwise(near)} - {*near}
        return [self._at(target, rank, context) for rank in sorted(middles) if rank < _most(target)]

    def _at(self, target: Target, rank: int, context: Context) -> Candidate:
        matrix = target.matrices[0]
        plan, rho = LaserPlan([replace(target.at(0.0), rho=f"k{rank}")]), rank / _most(target)
        return Candidate(plan, self.name, matrix.layer, matrix.kind, rho, context.base)


def _by_all_names(matrix: WeightMatrix) -> dict[str, Any]:
    """The fields that name a matrix, tied weights by each of their names."""
    names = [name.removesuffix(".weight") for name in matrix.parameter_names]
    return {"layer": None, "matrix": f"/{'|'.join(map(re.escape, names))}/"} if len(names) > 1 else by_name(matrix)


def _most(target: Target) -> int:
    return target.matrices[0].max_rank


def _base(context: Context) -> BaseWeights:
    assert context.spectra.base is not None
    return context.spectra.base


def _changed(context: Context, targets: Sequence[Target] | None = None) -> list[Target]:
    """Those that fine-tuning has changed."""
    base = _base(context)
    targets = context.targets if targets is None else targets
    return [target for target in targets if any(map(base.changed, target.matrices))]


def _unchanged(context: Context) -> str:
    besides = _base(context).changed_besides([m for target in context.targets for m in target.matrices])
    there = f"; what differs is {', '.join(besides[:3])}: 'delta-all' includes embeddings and heads" if besides else ""
    return f"the base and the module do not differ in any matrix of `within`{there}"


def _by_turns(*lists: Sequence[LaserPlan | None]) -> Iterator[LaserPlan | None]:
    return (plan for turn in zip_longest(*lists) for plan in turn)
