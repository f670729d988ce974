"""What a search may cut: the targets of a model, each at every rho of a grid, and what became of each.

A *target* is what one reduction covers: one matrix, or one kind of matrix of all experts of a layer. A *candidate* is a
target at a rho.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any, Literal

from torch import nn

from laser_callback.matrices import WeightMatrix, find_matrices
from laser_callback.plan import LaserPlan
from laser_callback.reduction import Reduction
from laser_callback.spectrum_folder import size_for

RHOS = (0.0, 0.005, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
"""The nine of the paper's reference code (rates 1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95), and the zero matrix."""

REFERENCE_RHOS = tuple((10 - rate) * 0.1 for rate in (1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95))
"""The rates of the paper's code as it turns them into shares, in floating point: they decide its ranks."""

DELTA_RHOS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""For the difference to a base: fine-tuning, and LoRA by its making, changes few directions."""

CAUTION = 2.0
"""Standard errors that count against a candidate in the cautious order of the screen."""

Score = float | tuple[float, float]
"""What a screen says of a candidate: how the loss changes, lower is better; with its standard error, where known."""

Status = Literal["screened out", "dropped", "finalist", "rejected", "chosen"]


@dataclass(frozen=True, eq=False)
class Target:
    """What one reduction covers.

    Attributes:
        matrices: one matrix, or that of each expert.
        address: the fields of a :class:`Reduction` that name them, all but rho.
    """

    matrices: tuple[WeightMatrix, ...]
    address: Mapping[str, Any]

    def at(self, rho: float) -> Reduction:
        """The candidate of this target at ``rho``."""
        return Reduction(rho=rho, **self.address)


@dataclass(frozen=True)
class Estimate:
    """A paired difference on race examples: its mean, and a 95 % interval that no choice among candidates is in."""

    delta: float
    lower: float | None = None
    upper: float | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Estimate:
        """The inverse of ``dataclasses.asdict``, also after JSON has made ``None`` of a mean that is no number."""
        return cls(**{**data, "delta": math.nan if data["delta"] is None else data["delta"]})


@dataclass
class Candidate:
    """One candidate in one step of the search.

    Attributes:
        reduction: what is cut; :attr:`plan` adds what was in place already.
        layer, kind, rho: where it stands in the map of the search.
        base: the reductions in place when it was tried, as text; empty in the first step.
        score: the screen's estimate of how the loss changes (lower is better), or ``None`` where there was no screen.
        error: its standard error; 0 where it is not known.
        examples: race examples that it was run on.
        gain: change of the objective on these, in the direction that is better, against ``base``.
        loss: change of the loss on these, where there is one.
        status: how far it came.
        reason: why no further.
    """

    reduction: Reduction
    layer: int | None
    kind: str | None
    rho: float
    base: str = ""
    score: float | None = None
    error: float = 0.0
    examples: int = 0
    gain: Estimate | None = None
    loss: Estimate | None = None
    status: Status = "screened out"
    reason: str = ""

    @property
    def plan(self) -> LaserPlan:
        """The whole plan that was run: ``base`` and the reduction."""
        return LaserPlan([*(LaserPlan.parse(self.base) if self.base else ()), self.reduction])

    @property
    def helps(self) -> bool:
        """Whether it was better than ``base`` in the race: by the objective, or by the loss where that is the same."""
        gain = 0.0 if self.gain is None else self.gain.delta
        return gain > 0 or (gain == 0 and self.loss is not None and self.loss.delta < 0)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "reduction": str(self.reduction)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of :meth:`to_dict`."""
        estimates = {name: data[name] and Estimate.from_dict(data[name]) for name in ("gain", "loss")}
        return cls(**{**data, **estimates, "reduction": Reduction.parse(data["reduction"])})


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


def targets(model: nn.Module, within: str = "*.all", without: Iterable[Reduction] = ()) -> list[Target]:
    """The targets of a model, in its order.

    Args:
        model: any module.
        within: where to look: plan text without rho, e.g. ``"*.all"`` or ``"20-29.mlp, *.q_proj"``.
        without: reductions whose matrices are left out, since they are cut already.

    Raises:
        ValueError: if ``within`` cannot be read or matches nothing, listing what the model has.
    """
    matrices = find_matrices(model)
    if not any(matrix.kind for matrix in matrices) and within == "*.all":
        raise ValueError("the model has no matrix of a known kind: name some in `within`, e.g. '/.*weight_hh_l0/'")
    wanted: dict[str, WeightMatrix] = {}
    stacks = list(dict.fromkeys(matrix.stack for matrix in matrices if matrix.stack))
    for piece in _pieces(within):
        # One by one, since here they may overlap.
        wanted |= {matrix.name: matrix for matrix in _named(model, Reduction.parse(f"{piece}@0"), stacks)}
    cut = list(without)
    taken = {matrix.name for matrix, _ in LaserPlan(cut).resolve(model)} if cut else set()

    by_place: dict[tuple[Any, ...], list[WeightMatrix]] = {}
    for matrix in matrices:
        by_place.setdefault((matrix.stack, matrix.layer, matrix.kind), []).append(matrix)
    stacks_of_kind: dict[tuple[Any, ...], set[Any]] = {}
    for stack, layer, kind in by_place:
        stacks_of_kind.setdefault((layer, kind), set()).add(stack)

    found: list[Target] = []
    for (stack, layer, kind), members in by_place.items():
        chosen = [m for m in members if m.name in wanted and m.name not in taken]
        experts = kind is not None and len(members) > 1 and all(m.expert is not None for m in members)
        unique = kind is not None and stacks_of_kind[layer, kind] == {stack}
        if chosen == members and kind is not None and stack is not None and (experts or len(members) == 1):
            among = {} if unique or not stack else {"stack": stack}
            found.append(Target(tuple(members), {**among, "layer": layer, "matrix": kind}))
        else:
            found += [Target((matrix,), by_name(matrix)) for matrix in chosen]
    if not found:
        raise ValueError(f"`within` {within!r} leaves nothing to cut: all that it names is cut already")
    return found


def by_name(matrix: WeightMatrix) -> dict[str, Any]:
    """The fields of a :class:`Reduction` that name exactly this matrix, by the whole name of its module."""
    pattern = re.escape(re.sub(r"\[\d+\]$", "", matrix.name))
    return {"layer": None, "matrix": f"/{pattern}/", "expert": matrix.expert}


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


def _named(model: nn.Module, reduction: Reduction, stacks: Sequence[str]) -> list[WeightMatrix]:
    """The matrices that a reduction names; unlike in a plan, in every layer stack unless it names one."""
    found = []
    if reduction.stack is None and reduction.layer is not None and len(stacks) > 1:
        for stack in stacks:
            with suppress(ValueError):  # not every stack has what is named
                found += LaserPlan([replace(reduction, stack=stack)]).resolve(model)
    return [matrix for matrix, _ in found or LaserPlan([reduction]).resolve(model)]


def _pieces(text: str) -> list[str]:
    pieces = [piece.strip() for piece in re.split(r",(?=(?:[^/]*/[^/]*/)*[^/]*$)", text) if piece.strip()]
    for piece in pieces:
        if "@" in piece:
            raise ValueError(f"`within` names matrices without rho, e.g. '*.mlp', got {piece!r}")
    if not pieces:
        raise ValueError("`within` must name matrices, e.g. '*.all', got nothing")
    return pieces
