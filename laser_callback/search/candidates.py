"""What a search tries: every target of a model at every rho of a grid, and in which order.

Contract: candidates in, candidates out; nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest

from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.spectra.folder import size_for

REFERENCE_RHOS = tuple((10 - rate) * 0.1 for rate in (1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95))
"""The rates of the paper's code as it turns them into shares, in floating point: they decide its ranks."""

DELTA_RHOS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""For the difference to a base: fine-tuning, and LoRA by its making, changes few directions."""

CAUTION = 2.0
"""Standard errors that count against a candidate in the cautious order of the screen."""

Score = float | tuple[float, float]
"""What a screen says of a candidate: how the loss changes, lower is better; with its standard error, where known."""


def in_parts(found: Sequence[Target], capacity: int) -> list[list[Target]]:
    """Targets in as few runs of neighbours as have spectra of ``capacity`` bytes at most, or a single target more."""
    parts: list[list[Target]] = []
    room = 0
    for target in found:
        needed = sum(size_for(matrix.shape) for matrix in target.matrices)
        if not parts or needed > room:
            parts.append([])
            room = capacity
        parts[-1].append(target)
        room -= needed
    return parts


def grid(found: Sequence[Target], rhos: Sequence[float], base: str = "") -> list[Candidate]:
    """Every target at every rho, each rank once, but for the whole rank."""
    candidates = []
    for target in found:
        matrix = target.matrices[0]
        ranks = {matrix.max_rank}
        for rho in rhos:
            rank = target.at(rho).rank(matrix.max_rank)
            if rank not in ranks:
                ranks.add(rank)
                candidates.append(Candidate(target.at(rho), matrix.layer, matrix.kind, rho, base))
    return candidates


def shortlist(scored: Iterable[Candidate]) -> list[Candidate]:
    """Candidates in the order in which they should race.

    Two orders take turns: by the score plus two standard errors, which brings what is known to help, and by the score
    alone, which brings what may help more. Each has one rho of every target, its best, ahead of all others: scores of
    one target go together, and so do their errors, so that a few targets that the screen is wrong about would fill the
    race with all of their rhos.
    """
    cautious, hopeful = (_best_of_each(scored := list(scored), caution) for caution in (CAUTION, 0.0))
    turns = [candidate for pair in zip_longest(cautious, hopeful) for candidate in pair if candidate is not None]
    rest = sorted(scored, key=lambda candidate: _score(candidate, CAUTION))
    return list({id(candidate): candidate for candidate in [*turns, *rest]}.values())


def _best_of_each(scored: Sequence[Candidate], caution: float) -> list[Candidate]:
    best: dict[Reduction, Candidate] = {}
    zeroed: list[Candidate] = []
    for candidate in sorted(scored, key=lambda candidate: _score(candidate, caution)):
        if candidate.rho == 0:
            if any(_do_the_same(candidate, other) for other in zeroed):
                continue  # it races for one of them, and the other with its next best rho
            zeroed.append(candidate)
        best.setdefault(replace(candidate.reduction, rho=0.0), candidate)
    return list(best.values())


def _score(candidate: Candidate, caution: float) -> float:
    return float(candidate.score or 0) + caution * candidate.error


def partners(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates of the matrices with which this one acts as a product, at its rho and the next ones of the grid.

    What helps by taking a product's noise away may help more on its other side. The screen tells which these are.
    """
    rows: dict[Reduction, list[Candidate]] = {}
    for other in candidates:
        rows.setdefault(replace(other.reduction, rho=0.0), []).append(other)
    own = rows.pop(replace(candidate.reduction, rho=0.0))
    place = own.index(candidate)
    rhos = {other.rho for other in own[max(place - 1, 0) : place + 2]} - {0.0}  # that would be this matrix's own zero
    return [c for row in rows.values() if _do_the_same(own[0], row[0]) for c in row if c.rho in rhos]


def _do_the_same(one: Candidate, other: Candidate) -> bool:
    """Whether to zero one is to zero the other: then only their product acts (queries and keys, values and output)."""
    if one.rho or other.rho or one.layer != other.layer or one.score is None or other.score is None:
        return False
    return math.isclose(one.score, other.score, rel_tol=1e-3)


def neighbours(candidate: Candidate, rhos: Sequence[float], max_rank: int) -> list[Candidate]:
    """Candidates of the same target between ``candidate`` and the next lower and higher of ``rhos``.

    Their rho is the geometric mean of the two, or half of the higher where the lower is 0.
    """
    places = sorted({*rhos, candidate.rho})
    place = places.index(candidate.rho)
    found = []
    for low, high in pairwise(places[max(place - 1, 0) : place + 2]):
        rho = round(math.sqrt(low * high) if low else high / 2, 4)
        reduction = replace(candidate.reduction, rho=rho)
        ends = {replace(candidate.reduction, rho=end).rank(max_rank) for end in (low, high)}
        if reduction.rank(max_rank) not in ends:
            found.append(Candidate(reduction, candidate.layer, candidate.kind, rho, candidate.base))
    return found
