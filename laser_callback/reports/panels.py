"""A search as panels for pictures: one per kind of matrix, layers (or names) as rows, rhos as columns.

Contract: only the first step, in which every candidate is cut from the original model, and only what has a rho: plans
of several cuts have no place here. Where strategies meet in one place, the candidate that came furthest has it. Nothing
is drawn here.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laser_callback.plans.kinds import KINDS
from laser_callback.reports.heat_map import round_threshold
from laser_callback.reports.search_text import REACHED, GainText, change_unit, score_name
from laser_callback.support.plain_json import finite

if TYPE_CHECKING:  # the page of a comparison needs no torch, as searches do
    from laser_callback.results.candidates import Candidate
    from laser_callback.results.search import SearchResult

STEPS = 5
"""Shades on each side of 0."""


@dataclass(frozen=True)
class Panel:
    """One kind of matrix.

    Attributes:
        kind: its name, ``"other"`` for what has none.
        rows: layers, or the addresses of what is named otherwise, in the model's order.
        rhos: of the grid, ascending.
        cells: the candidate in each (row, rho) that there is.
        between: candidates off the grid, which entered beside a leader: each with its row, and how many of ``rhos`` are
            lower than its own.
    """

    kind: str
    rows: tuple[str, ...]
    rhos: tuple[float, ...]
    cells: Mapping[tuple[str, float], Candidate]
    between: tuple[tuple[str, int, Candidate], ...]


@dataclass(frozen=True)
class Shading:
    """How a change is shaded: in steps that double, so that one extreme does not hide all others.

    Attributes:
        change: of a candidate; negative is better, ``None`` where it is not known.
        name: what the change is.
        unit: of it.
        top: from this size on a change has the darkest shade.
    """

    change: Callable[[Candidate], float | None]
    name: str
    unit: str
    top: float

    @property
    def told(self) -> str:
        """What the change is, with its unit."""
        return f"{self.name} in {self.unit}" if self.unit else self.name

    @property
    def thresholds(self) -> tuple[float, ...]:
        """From which size on a change has the shades 1 to :data:`STEPS`."""
        return tuple(self.top / 2 ** (STEPS - 1 - step) for step in range(STEPS))

    def level(self, candidate: Candidate) -> int | None:
        """From -:data:`STEPS`, much better, over 0, no change to speak of, to :data:`STEPS`; ``None`` if unknown."""
        change = self.change(candidate)
        if change is None or math.isnan(change):
            return None
        size = sum(abs(change) >= threshold for threshold in self.thresholds)
        return size if change > 0 else -size


def panels(result: SearchResult) -> list[Panel]:
    """The candidates of the first step, by kind in the order of :data:`KINDS`, then others by name."""
    by_kind: dict[str, list[Candidate]] = {}
    for candidate in result.candidates:
        if not candidate.base and candidate.rho is not None:
            by_kind.setdefault(candidate.kind or "other", []).append(candidate)
    order = [*(kind for kind in KINDS if kind in by_kind), *sorted(set(by_kind) - {*KINDS, "other"}), "other"]
    return [_panel(kind, by_kind[kind], result.settings.get("rhos")) for kind in order if kind in by_kind]


def _panel(kind: str, candidates: Sequence[Candidate], grid: Sequence[float] | None) -> Panel:
    places: dict[tuple[str, float], Candidate] = {}
    for candidate in candidates:
        if candidate.rho is not None:
            there = places.setdefault((_address(candidate), candidate.rho), candidate)
            places[_address(candidate), candidate.rho] = min(there, candidate, key=_behind)
    rhos = tuple(sorted({rho for _, rho in places if grid is None or rho in grid}))
    cells = {place: candidate for place, candidate in places.items() if place[1] in rhos}
    between = ((row, bisect(rhos, rho), candidate) for (row, rho), candidate in places.items() if rho not in rhos)
    return Panel(kind, tuple(dict.fromkeys(row for row, _ in places)), rhos, cells, tuple(between))


def _behind(candidate: Candidate) -> tuple[Any, ...]:
    return REACHED[candidate.status], -candidate.examples, math.inf if candidate.score is None else candidate.score


def _address(candidate: Candidate) -> str:
    """A layer's number where that is enough, else all of the reduction's text in front of rho."""
    reduction = candidate.plan.reductions[0]
    if reduction.layer is None:
        return str(reduction).rpartition("@")[0]
    stack = f"{reduction.stack}." if reduction.stack else ""
    expert = "" if reduction.expert is None else f"[{reduction.expert}]"
    return f"{stack}{reduction.layer}{expert}"


def shading(result: SearchResult) -> Shading | None:
    """By the score; where there is none, by the measured change of the loss, or else of the objective.

    ``None`` if nothing of these is known.
    """
    gain, unit = GainText.of(result), change_unit(result)
    choices: list[tuple[Callable[[Candidate], float | None], str, str]] = [
        (lambda c: c.score, score_name(result).removesuffix(f" in {unit}"), unit),
        (lambda c: c.loss.delta if c.loss else None, "measured change of the loss", unit),
        (lambda c: -gain.scale * c.gain.delta if c.gain else None, f"minus the {gain.told}", gain.unit),
    ]
    for change, name, of_it in choices:
        known = [value for c in result.candidates if not c.base and (value := finite(change(c))) is not None]
        best = -min(known, default=0.0)
        if known:
            # Where nothing is better, half of what is worse gets a middle shade or more.
            typical = sorted(abs(value) for value in known)[len(known) // 2]
            return Shading(change, name, of_it, round_threshold(best if best > 0 else typical or 1.0))
    return None
