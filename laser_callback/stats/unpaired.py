r"""Two groups of different examples, one per model: the statistics of an A/B test.

Contract: as :mod:`laser_callback.stats.paired`, but each example was seen by one model only, so that nothing pairs
them. The delta is reduced minus original, with a two-sided 95 % interval; computed in float64 on the CPU.

Sources:
    Fisher's exact test.
    Welch, B. L. (1947). Biometrika 34, 28-35.
    Those of the intervals stand in :mod:`laser_callback.stats.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from typing_extensions import override

from laser_callback.stats.intervals import Floats, MeanDifference, joined_wilson, standard_error, worth
from laser_callback.stats.outcomes import ALPHA, Outcomes, PairedResult, as_float64
from laser_callback.stats.paired import numbered

Groups: TypeAlias = tuple[tuple[Floats, Floats], tuple[Floats, Floats]]
Labels: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class UnpairedResult(PairedResult):
    """A row like that of a paired comparison, of two groups; ``n`` is the number of units of both, or of clusters.

    Attributes:
        n_original: units, or clusters of them, that the original model saw.
        n_reduced: those that the reduced model saw; where units were clustered, some may be in both.
    """

    n_original: int = 0
    n_reduced: int = 0

    @property
    @override
    def sample(self) -> str:
        """What was looked at; of two groups of other examples."""
        return f"{super().sample}, {self.n_original:,} of the original and {self.n_reduced:,} of the reduced model"


def compare_groups(
    metric: str,
    original: Outcomes,
    reduced: Outcomes,
    higher_is_better: bool | None = None,
    *,
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> UnpairedResult:
    r"""Compare the outcomes of two groups of units. Units whose value is absent (NaN) are left out.

    - "binary": Fisher's exact test and Newcombe's interval for independent shares.
    - "mean" and "log_ratio": Welch's t test and interval. With weights, each group's mean is
      :math:`m = \sum_i w_i x_i / \sum_i w_i` with the jackknife's variance,
      as in :func:`~laser_callback.stats.compare`; "log_ratio" then maps estimate and interval by
      ``exp(.) - 1``.

    Clusters hold units that are not independent, such as the facts of one subject, and may be in both groups. The
    difference then has the jackknife's variance :math:`\frac{C-1}{C} \sum_c z_c^2` over C clusters, where :math:`z_c`
    sums :math:`w_i (x_i - m) / \sum w / (1 - h_c)` over a cluster's units in the reduced group, whose share of the
    group's weights is :math:`h_c`, and subtracts those in the original's; its t has :math:`1 / \sum_c h_c^2 - 1`
    degrees of freedom, those of the group with fewer. A share of right and wrong claims no more than Fisher's exact
    test and Newcombe's interval allow, either.

    Args:
        metric: name for the row.
        original: of the units that the original model saw.
        reduced: of those that the reduced model saw, of the same kind.
        higher_is_better: direction of the metric; as in :func:`~laser_callback.stats.compare`.
        clusters: one label per unit of each group.

    Returns:
        A row of role "exploratory"; a group with too few units is not tested.

    Raises:
        ValueError: if the kinds differ, or the clusters have other lengths than the groups.

    Example:
        >>> before, after = np.arange(80) < 48, np.arange(70) < 56  # Newcombe's first example
        >>> row = compare_groups("right", Outcomes.of(before), Outcomes.of(after))
        >>> f"{row.delta:+.4f} [{row.lower:+.4f}, {row.upper:+.4f}], p = {row.p:.4f}"
        '+0.2000 [+0.0524, +0.3339], p = 0.0125'
    """
    if original.kind != reduced.kind:
        raise ValueError(f"`reduced` must have the kind of `original`, {original.kind!r}, got {reduced.kind!r}")
    groups, labels = (_present(original), _present(reduced)), _numbered(clusters, original, reduced)
    sizes = len(groups[0][0]), len(groups[1][0])
    log_ratio = original.kind == "log_ratio"
    if higher_is_better is None and original.kind != "mean":
        higher_is_better = original.kind == "binary"
    means = [float(np.average(values, weights=weights)) if len(values) else math.nan for values, weights in groups]
    difference = means[1] - means[0]
    values = [_expm1(mean) + 1 for mean in means] if log_ratio else means
    row = UnpairedResult(
        metric,
        original.kind,
        sum(sizes),
        values[0],
        values[1],
        _expm1(difference) if log_ratio else difference,
        higher_is_better=higher_is_better,
        n_original=sizes[0],
        n_reduced=sizes[1],
    )
    if labels is not None:
        sizes = len(np.unique(labels[0])), len(np.unique(labels[1]))
        count = len(np.unique(np.concatenate(labels)))
        row = replace(row, n=count, n_original=sizes[0], n_reduced=sizes[1], unit="cluster", examples=row.n)
        row = replace(row, note=row.sample)
        if min(sizes) < 2:
            return replace(row, note=f"{row.note}; {sizes[0]} and {sizes[1]} clusters are too few")
    if min(sizes) < (1 if original.kind == "binary" else 2):
        return replace(row, note=f"{sizes[0]} and {sizes[1]} units are too few")
    if original.kind == "binary":
        robust = None if labels is None else _clustered(groups, means, labels)
        if robust is None or robust.error:  # else nothing varies within a group: each cluster is one unit
            sizes = len(groups[0][0]), len(groups[1][0])
        ones = round(means[0] * sizes[0]), round(means[1] * sizes[1])
        table = np.array([[one, size - one] for one, size in zip(ones, sizes, strict=True)])
        ends = [joined_wilson(ones, sizes, level) for level in (1 - ALPHA, 1 - 2 * ALPHA)]
        row = replace(row, p=float(stats.fisher_exact(table).pvalue), test="Fisher's exact")
        if robust is not None and robust.error:
            wider = [robust.interval(level) for level in (1 - ALPHA, 1 - 2 * ALPHA)]
            ends = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(ends, wider, strict=True)]
            row = replace(row, p=max(row.p or 0.0, robust.p), test="cluster-robust t")
    elif labels is not None:
        robust = _clustered(groups, means, labels)
        if not 0 < robust.error < math.inf:
            reason = "no variance" if robust.error == 0 else "infinite outcomes have no difference"
            return replace(row, note=f"{row.note}; {reason}")
        ends = [robust.interval(level) for level in (1 - ALPHA, 1 - 2 * ALPHA)]
        ends = [(_expm1(lower), _expm1(upper)) for lower, upper in ends] if log_ratio else ends
        row = replace(row, p=robust.p, test="cluster-robust t")
    else:
        errors = [standard_error(*group, mean) ** 2 for group, mean in zip(groups, means, strict=True)]
        if not 0 < sum(errors) < math.inf:
            return replace(row, note="no variance" if sum(errors) == 0 else "infinite outcomes have no difference")
        sizes_worth = [worth(weights) for _, weights in groups]
        df = sum(errors) ** 2 / sum(error**2 / (size - 1) for error, size in zip(errors, sizes_worth, strict=True))
        error = math.sqrt(sum(errors))
        margins = [float(stats.t.ppf(1 - tail, df)) * error for tail in (ALPHA / 2, ALPHA)]
        ends = [(difference - margin, difference + margin) for margin in margins]
        ends = [(_expm1(lower), _expm1(upper)) for lower, upper in ends] if log_ratio else ends
        row = replace(row, p=float(2 * stats.t.sf(abs(difference) / error, df)), test="Welch's t")
    (lower, upper), (lower90, upper90) = ends
    return replace(row, lower=lower, upper=upper, lower90=lower90, upper90=upper90)


def _clustered(groups: Groups, means: Sequence[float], labels: Labels) -> MeanDifference:
    """The difference of the groups' means, with its error over clusters."""
    count = 1 + max(int(of_group.max()) for of_group in labels)
    sums, worths = np.zeros(count), []
    for sign, (values, weights), mean, of_group in zip((-1, 1), groups, means, labels, strict=True):
        shares = np.bincount(of_group, weights, count) / weights.sum()
        worths.append(worth(shares))
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = np.bincount(of_group, weights * (values - mean), count) / weights.sum()
            sums += sign * parts / (1 - shares)
    error = math.sqrt((count - 1) / count * float((sums**2).sum()))
    return MeanDifference(means[1] - means[0], error, max(min(worths) - 1, 1e-3))


def _numbered(
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None, original: Outcomes, reduced: Outcomes
) -> Labels | None:
    """Each present unit's cluster as a number, over both groups; ``None`` where every unit is one of its own."""
    if clusters is None:
        return None
    kept: list[Hashable] = []
    ends = []
    for labels, group in zip(clusters, (original, reduced), strict=True):
        present = ~np.isnan(as_float64(group.values))
        if len(labels) != len(present):
            raise ValueError(f"`clusters` must have one label per unit, {len(present)}, got {len(labels)}")
        kept += [labels[i] for i in np.flatnonzero(present).tolist()]
        ends.append(len(kept))
    numbers = numbered(kept)
    return None if len(set(kept)) == len(kept) else (numbers[: ends[0]], numbers[ends[0] :])


def _expm1(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.expm1(value))


def _present(outcomes: Outcomes) -> tuple[Floats, Floats]:
    """Values and weights of the units that have a value."""
    values = as_float64(outcomes.values)
    kept = ~np.isnan(values)
    weights = np.ones(len(values)) if outcomes.weights is None else as_float64(outcomes.weights)
    return values[kept], weights[kept]
