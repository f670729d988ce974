"""Which candidates go on: successive halving on paired examples.

Contract: arithmetic on tables of values; nothing here runs a model. A race spends most examples on the few candidates
that may be the best. Its eliminations are a budget heuristic and claim nothing: what is claimed comes from examples
that the race has not seen.

Each candidate is judged twice, by its gain in the objective and by its change of the loss, and goes on if it is good by
either. A loss tells candidates apart on far fewer examples than right and wrong does; but a cut may make more answers
right while it makes the loss worse (the log loss in 6 of 24 cells of table 1 of arXiv 2312.13558), and would be lost by
loss alone.

Source of the schedule: Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization,
AISTATS 2016 (sequential halving).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from laser_callback.compare.measure import Table, Values
from laser_callback.results.candidates import Estimate
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.tables import joined
from laser_callback.stats.holm import adjust
from laser_callback.stats.intervals import standard_error
from laser_callback.stats.outcomes import ALPHA, Outcomes, PairedResult
from laser_callback.stats.paired import compare

SMALLEST_RUNG = 24
"""Fewer examples than this eliminate nobody."""


@dataclass(frozen=True)
class Objective:
    """What is to be improved.

    Attributes:
        keys: metrics; the objective is the mean of their changes, each in its better direction.
        signs: 1 where higher is better, -1 where lower is, one per key.
        loss: a smooth metric, lower is better, that helps to tell candidates apart; ``None`` if there is none.
        tie: another, lower is better, that decides between finalists which the loss cannot tell apart.
    """

    keys: tuple[str, ...]
    signs: tuple[int, ...]
    loss: str | None = None
    tie: str | None = None

    @property
    def measured(self) -> tuple[str, ...]:
        """All metrics that candidates are measured by."""
        return tuple(dict.fromkeys([*self.keys, *filter(None, (self.loss, self.tie))]))

    @property
    def by_loss(self) -> Objective:
        """The same, judged by its loss alone."""
        return self if self.loss is None else replace(self, keys=(self.loss,), signs=(-1,), tie=None)

    def gain(self, table: Table, arm: str, base: str = ORIGINAL) -> Values:
        """Each unit's change of the objective from ``base`` to ``arm``; positive is better."""
        changes = [
            sign * (table[arm][key].values - table[base][key].values)
            for key, sign in zip(self.keys, self.signs, strict=True)
        ]
        if len({len(change) for change in changes}) > 1:
            raise ValueError(
                f"the objectives {', '.join(self.keys)} have different units: return a value per example for each"
            )
        stacked = np.array([change.numpy() for change in changes])
        present = ~np.isnan(stacked)
        total = np.where(present, stacked, 0).sum(0)
        mean = np.divide(total, present.sum(0), out=np.full(total.shape, np.nan), where=present.any(0))
        weights = table[arm][self.keys[0]].weights  # of batches those of any key; a fact weighs 1 in a mean of keys
        weights = weights.where(weights > 0, 1.0) if len(self.keys) > 1 else weights
        return Values(_tensor(mean), weights, clusters=table[arm][self.keys[0]].clusters)

    def loss_change(self, table: Table, arm: str, base: str = ORIGINAL) -> Values | None:
        """Each unit's change of the loss from ``base`` to ``arm``; negative is better. ``None`` without a loss."""
        if self.loss is None:
            return None
        change = table[arm][self.loss].values - table[base][self.loss].values
        return Values(change, table[arm][self.loss].weights, clusters=table[arm][self.loss].clusters)

    def estimates(self, table: Table, arm: str) -> tuple[Estimate, Estimate | None]:
        """Gain and change of the loss of an arm against the base, with intervals."""
        loss = self.loss_change(table, arm)
        return estimate(self.gain(table, arm)), None if loss is None else estimate(loss)


@dataclass(frozen=True)
class Rung:
    """One round of a race: so many further examples, after which so many candidates go on."""

    examples: int
    keep: int


def schedule(examples: int, candidates: int, finalists: int = 6, smallest: int = SMALLEST_RUNG) -> list[Rung]:
    """Rungs that share out ``examples`` so that each costs about as much as the next.

    The first rung sees all candidates and the last only the finalists; in between the examples seen in all double while
    the number of candidates halves. With few examples there are fewer and steeper rungs.

    Args:
        examples: race examples there are.
        candidates: candidates at the start.
        finalists: candidates that see all examples.
        smallest: examples in the smallest rung.

    Raises:
        ValueError: if a number is below 1.

    >>> schedule(300, 48)
    [Rung(examples=38, keep=24), Rung(examples=37, keep=12), Rung(examples=75, keep=6), Rung(examples=150, keep=6)]
    """
    for name, value in (("examples", examples), ("candidates", candidates), ("finalists", finalists)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    finalists = min(finalists, candidates)
    halvings = math.ceil(math.log2(candidates / finalists))
    while halvings and examples < smallest * 2**halvings:
        halvings -= 1
    ends = [math.ceil(examples / 2 ** (halvings - i)) for i in range(halvings + 1)]
    ratio = (finalists / candidates) ** (1 / max(halvings, 1))
    keeps = [max(finalists, round(candidates * ratio ** (i + 1))) for i in range(halvings)] + [finalists]
    starts = [0, *ends[:-1]]
    return [Rung(end - start, keep) for start, end, keep in zip(starts, ends, keeps, strict=True)]


def order(objective: Objective, table: Table, arms: Sequence[str]) -> list[str]:
    """Candidates, best first: by the better of their ranks by gain and by loss, then by loss, then by gain.

    Last come those that gave a value that is not finite where the original's is.
    """
    gains, losses = _means(objective, table, arms)
    best = rankdata([-gains[arm] for arm in arms], method="min")
    if objective.loss is not None:
        best = np.minimum(best, rankdata([losses[arm] for arm in arms], method="min"))
    place = dict(zip(arms, best, strict=True))
    return sorted(arms, key=lambda arm: (place[arm], losses[arm], -gains[arm]))


def choose(objective: Objective, table: Table, arms: Sequence[str]) -> str:
    """The finalist to confirm.

    Right and wrong on a few hundred examples cannot tell near-equals apart, and a smooth loss can. So among those whose
    gain lies within one standard error of the highest, the one with the lowest loss; or, of those within one standard
    error of that, the one that is best by :attr:`Objective.tie`. Without a loss, the one with the highest gain.
    """
    gains, losses = _means(objective, table, arms)
    leader = min(arms, key=lambda arm: (-gains[arm], losses[arm]))
    if objective.loss is None:
        return leader
    close = [arm for arm in arms if arm == leader or _no_more_than_noise(objective.gain(table, leader, base=arm))]
    best = min(close, key=lambda arm: (losses[arm], -gains[arm]))
    if objective.tie is None:
        return best
    further = replace(objective, loss=objective.tie)
    _, ties = _means(further, table, close)
    close = [arm for arm in close if arm == best or _no_more_than_noise(objective.loss_change(table, arm, base=best))]
    return min(close, key=lambda arm: (ties[arm], losses[arm]))


def improved(objective: Objective, table: Table, fresh: Table, arms: Sequence[str]) -> list[str]:
    """The arms that improve on the base also on fresh examples, Holm-corrected for all arms.

    Tested is the loss where there is one, since it decides on fewer examples; the gain over all examples must then not
    be negative.

    Args:
        objective: what is to be improved.
        table: values that the arms were chosen by.
        fresh: values on examples that they were not chosen by.
        arms: as named in both.
    """
    rows = []
    for arm in arms:
        change = objective.loss_change(fresh, arm)
        rows.append(replace(paired(change or objective.gain(fresh, arm)), metric=arm))
    better = -1 if objective.loss else 1
    found = []
    for row in adjust(rows, None):
        gain, _ = objective.estimates(joined({arm: table[arm] for arm in (ORIGINAL, row.metric)}, fresh), row.metric)
        significant = row.p_adjusted is not None and row.p_adjusted <= ALPHA and row.delta * better > 0
        if significant and gain.delta >= 0:
            found.append(row.metric)
    return found


def _no_more_than_noise(change: Values | None) -> bool:
    return change is not None and _mean(change) <= _standard_error(change)


def estimate(change: Values) -> Estimate:
    """Mean of a paired change with its 95 % interval; NaN where it is not finite or there is none."""
    values = change.values[~torch.isnan(change.values)]
    if not len(values) or not bool(torch.isfinite(values).all()):
        return Estimate(math.nan)
    row = paired(change)
    return Estimate(row.delta, row.lower, row.upper)


def paired(change: Values) -> PairedResult:
    """The test of a paired change against zero, which counts whole clusters."""
    zero = torch.zeros_like(change.values)
    weights = None if bool((change.weights == 1).all()) else change.weights
    clusters = None if change.clusters is None else change.clusters.tolist()
    return compare("change", Outcomes(zero, weights), Outcomes(change.values, weights), clusters=clusters)


def _means(objective: Objective, table: Table, arms: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Each arm's mean gain and change of the loss; the worst there is for those that broke."""
    gains, losses = {}, {}
    for arm in arms:
        broken = _broken(table, arm)
        gains[arm] = -math.inf if broken else _mean(objective.gain(table, arm))
        losses[arm] = math.inf if broken else _mean(objective.loss_change(table, arm))
    return gains, losses


def _mean(change: Values | None) -> float:
    """Weighted mean; 0 where there is nothing to average."""
    if change is None:
        return 0.0
    values, weights = _present(change)
    return float(np.average(values, weights=weights)) if len(values) else 0.0


def _standard_error(change: Values) -> float:
    values, weights = _present(change)
    if len(values) < 2:
        return math.inf
    return standard_error(values, weights, float(np.average(values, weights=weights)))


def _present(change: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, weights = change.values.numpy(), change.weights.numpy()
    present = ~np.isnan(values)
    return values[present], weights[present]


def _broken(table: Table, arm: str) -> bool:
    """Whether an arm lost its mind: values that the original has are not finite."""
    return any(
        bool((~torch.isfinite(values.values) & torch.isfinite(table[ORIGINAL][key].values)).any())
        for key, values in table[arm].items()
    )


def _tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
