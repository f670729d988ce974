"""In which order candidates race, and which of them are the same cut.

Contract: candidates in, candidates out; nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import fields
from itertools import zip_longest

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate

CAUTION = 2.0
"""Standard errors that count against a candidate in the cautious order of the scores."""

_ADDRESS = ("layer", "matrix", "stack", "expert")
_OPTIONS = tuple(f.name for f in fields(Reduction) if f.name not in (*_ADDRESS, "rho"))


def in_turns(
    candidates: Sequence[Candidate], strategies: Iterable[str], first: Collection[str] = ()
) -> list[Candidate]:
    """Candidates in the order in which they should race.

    Those with a score, of whatever strategy, are one list (see :func:`shortlist`), and those without one of each
    strategy another. The lists take turns. All candidates of the strategies named in ``first`` come ahead of these, in
    the order in which they are given.
    """
    ahead = [candidate for candidate in candidates if candidate.strategy in first]
    others = [candidate for candidate in candidates if candidate.strategy not in first]
    lists = [shortlist(c for c in others if c.score is not None)]
    for name in strategies:
        in_order = [c for c in others if c.strategy == name and c.score is None]
        lists.append(_without_doubles([*_best_of_each(in_order), *in_order]))
    return [*ahead, *_turns(lists)]


def shortlist(scored: Iterable[Candidate]) -> list[Candidate]:
    """Candidates with a score in the order in which they should race.

    Two orders take turns: by the score plus two standard errors, which brings what is known to help, and by the score
    alone, which brings what may help more. Each has one of every family, its best, ahead of all others: scores of one
    target go together, and so do their errors, so that a few targets that the screen is wrong about would fill the race
    with all of their rhos.
    """
    scored = list(scored)
    orders = (sorted(scored, key=lambda candidate: _score(candidate, caution)) for caution in (CAUTION, 0.0))
    rest = sorted(scored, key=lambda candidate: _score(candidate, CAUTION))
    return _without_doubles([*_turns([_best_of_each(in_order) for in_order in orders]), *rest])


def family(plan: LaserPlan) -> Hashable:
    """What plans have in common that differ in their rhos alone."""
    return frozenset(tuple(getattr(r, name) for name in (*_ADDRESS, *_OPTIONS)) for r in plan)


def _best_of_each(in_order: Iterable[Candidate]) -> list[Candidate]:
    """The first candidate of each family."""
    best: dict[Hashable, Candidate] = {}
    zeroed: list[Candidate] = []
    for candidate in in_order:
        if candidate.rho == 0:
            if any(do_the_same(candidate, other) for other in zeroed):
                continue  # it races for one of them, and the other with its next best rho
            zeroed.append(candidate)
        best.setdefault(family(candidate.plan), candidate)
    return list(best.values())


def do_the_same(one: Candidate, other: Candidate) -> bool:
    """Whether to zero one is to zero the other: then only their product acts (queries and keys, values and output)."""
    if one.rho != 0 or other.rho != 0 or one.layer != other.layer or one.score is None or other.score is None:
        return False
    return math.isclose(one.score, other.score, rel_tol=1e-3)


def _score(candidate: Candidate, caution: float) -> float:
    return float(candidate.score or 0) + caution * candidate.error


def _turns(lists: Iterable[Sequence[Candidate]]) -> list[Candidate]:
    return [each for turn in zip_longest(*lists) for each in turn if each is not None]


def _without_doubles(candidates: Iterable[Candidate]) -> list[Candidate]:
    return list({id(candidate): candidate for candidate in candidates}.values())


# ---- the same cut ----------------------------------------------------------------------------------------------------


def cut_by(cuts: Iterable[tuple[WeightMatrix, Reduction]]) -> Hashable:
    """What a resolved plan does to which matrices: two plans of the same are one cut, however they say it."""
    return frozenset((matrix.name, _effect(matrix, reduction)) for matrix, reduction in cuts)


def _effect(matrix: WeightMatrix, reduction: Reduction) -> Hashable:
    options = {name: getattr(reduction, name) for name in _OPTIONS if name != "bias"}  # which is a matrix of its own
    if reduction.is_ruled:  # only the spectrum tells the rank
        return (reduction.rho, *options.items())
    size = math.prod(matrix.shape) if reduction.of == "entries" else matrix.max_rank
    removed = reduction.removed(reduction.rank(size), size)
    if removed == ((0, size),):  # of whatever components: all of it
        return ("all", *(options[name] for name in ("scale", "cut", "noise")))
    if reduction.blocks > 1:  # each has a rank of its own
        return (reduction.rho, *options.items())
    return (removed, *((name, value) for name, value in options.items() if name not in ("keep", "band")))
