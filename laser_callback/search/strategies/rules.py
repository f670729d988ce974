"""Strategies that look at no data but at the singular values only: what a gradient has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable

from laser_callback.plans.rank_rules import rank_by, unit
from laser_callback.plans.target import Target
from laser_callback.results.candidates import Candidate
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.grid import OnGrid
from laser_callback.spectra.spectrum import Spectrum


class _ByRule(OnGrid):
    """The matrices that a rule prefers first, each at ranks near what the rule keeps, on a log scale."""

    judge: Callable[[Spectrum], tuple[int, float]]
    """The rank that the rule keeps of a matrix, and its preference among matrices, lower is better."""

    def propose(self, context: Context) -> list[Candidate]:
        """The grid, in the order of the rule."""
        scored = [pair for target in self.targets(context) for pair in self._judged(target, context)]
        return [candidate for _, candidate in sorted(scored, key=lambda pair: pair[0])]

    def _judged(self, target: Target, context: Context) -> list[tuple[float, Candidate]]:
        cut = target.at(0.0).cut
        judged = [type(self).judge(context.spectra.of(m.value, m.name, cut)) for m in target.matrices]
        rank, preference = (sum(column) / len(judged) for column in zip(*judged, strict=True))
        max_rank = target.matrices[0].max_rank
        found = []
        for candidate in self.row(target, context):
            (reduction,) = candidate.plan
            kept = reduction.rank(max_rank)
            found.append((preference + abs(math.log((kept + 1) / (rank + 1))), candidate))
        return found


def laser_rmt(spectrum: Spectrum) -> tuple[int, float]:
    """The rank and the signal-to-noise ratio of laserRMT (`rmt_laser_snr.py`).

    The ratio is the sum of the singular values above the threshold of
    :func:`~laser_callback.plans.rank_rules.laser_rmt_rank` over the sum of those below.
    """
    rank = rank_by("laser-rmt", spectrum.values, spectrum.shape)
    values = spectrum.values / unit(spectrum.values)
    signal, noise = (float(part.sum()) for part in (values[:rank], values[rank:]))
    return rank, signal / noise if noise else math.inf


def _by_ratio(spectrum: Spectrum) -> tuple[int, float]:
    rank, ratio = laser_rmt(spectrum)
    return rank, math.log(ratio + 1e-12)


def _by_energy(rule: str) -> Callable[[Spectrum], tuple[int, float]]:
    def judge(spectrum: Spectrum) -> tuple[int, float]:
        rank = rank_by(rule, spectrum.values, spectrum.shape)
        energy = (spectrum.values / unit(spectrum.values)) ** 2
        return rank, -float(energy[rank:].sum() / energy.sum().clamp_min(1e-300))

    return judge


class LaserRMT(_ByRule):
    """The matrices with the lowest signal-to-noise ratio as laserRMT computes it, and ranks near its threshold."""

    name, judge = "laser-rmt", staticmethod(_by_ratio)


class GavishDonoho(_ByRule):
    """Ranks near what the optimal hard threshold keeps, and matrices of which it removes the largest energy share."""

    name, judge = "gavish-donoho", staticmethod(_by_energy("gavish-donoho"))


class Entropy(_ByRule):
    """Ranks near the effective rank, and matrices of which it removes the largest energy share."""

    name, judge = "entropy", staticmethod(_by_energy("entropy"))
