"""Original against reduced, unit by unit: the paired statistics behind every row of the results table.

Contract: one value per *independent unit* and arm goes in, in the same order for both arms, gathered from all ranks
and free of duplicates; frozen rows of plain Python numbers come out. Everything is computed in float64 on the CPU.
The delta is always reduced minus original. Its interval is a two-sided 95 % interval; the ends of the 90 % interval,
each a one-sided 95 % bound, are there for those who ask about one side.

Sources:
    McNemar, Q. (1947). Psychometrika 12, 153-157, with the exact binomial p value instead of chi-squared.
    Rao, J. N. K. and Scott, A. J. (1992). A simple method for the analysis of clustered binary data. Biometrics 48,
    577-585.
    Those of the intervals stand in :mod:`laser_callback.stats.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from laser_callback.stats.intervals import Floats, design_effect_of, mean_difference, score_interval, sign_flip_p
from laser_callback.stats.outcomes import ALPHA, Outcomes, PairedResult, as_float64, not_tested


def compare(
    metric: str,
    original: Outcomes,
    reduced: Outcomes,
    *,
    clusters: Sequence[Hashable] | None = None,
    higher_is_better: bool | None = None,
) -> PairedResult:
    r"""Compare two arms unit by unit.

    A unit absent (NaN) in either arm is dropped from both; the note counts those absent in one arm only. Where no unit
    is left, the row says so and has no test.

    - "binary": exact two-sided McNemar test and Tango's score interval with a continuity correction.
    - "mean": paired t test and interval, both with a continuity correction where all differences are multiples of a
      step (scores in thirds, say). Without weights, and all 0 or 1, it is right or wrong by another name: then the test
      and interval of "binary".
    - "mean" with weights, and "log_ratio": :math:`r = \sum_c w_c d_c / \sum_c w_c` over C clusters (without
      ``clusters``, the units), with the jackknife's variance
      :math:`\frac{C-1}{C} \sum_c (h_c (d_c - r) / (1 - h_c))^2`, where :math:`h_c = w_c / \sum_c w_c`, and t with
      :math:`1 / \sum_c h_c^2 - 1` degrees of freedom, which are C - 1 for equal weights; "log_ratio" then maps
      estimate and interval by ``exp(.) - 1``.
    - "pair": the interval of "mean", as far as it is on the side on which the number can be, and no test: that the
      models differ is seen, and there is nothing that a p value could add.

    Clusters hold units that are not independent, such as the facts of one subject; they are then what ``n`` counts. The
    metric stays the mean over units, and "mean" has the cluster-robust test. "binary" has the exact test that exchanges
    the arms of whole clusters, and the score interval of as many independent units as the clusters are worth: all
    counts are divided by the design effect, that variance over the one of independent units (Rao and Scott 1992), where
    it is above 1. Clusters of one unit change nothing. Exchanging arms takes each cluster to be as likely gained as
    lost where the metric stays the same; few large clusters that lose what many small ones gain are not found by it.

    An interval of "binary" leaves 0 out only where the exact test does.

    Args:
        metric: name for the row.
        original: outcomes of the original model, ``n`` units.
        reduced: outcomes of the reduced model for the same units in the same order, with the same kind and weights.
        clusters: one label per unit.
        higher_is_better: direction of the metric. ``None`` means that ones are right for "binary", that lower is better
            for "log_ratio", that the original's is the best for "pair", and that it is unknown for "mean".

    Returns:
        A row of role "exploratory"; :func:`~laser_callback.stats.adjust` gives it the role in which it may claim
        something.

    Raises:
        ValueError: if the arms do not match or ``clusters`` has another length.

    Example:
        >>> original = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1], bool)
        >>> reduced = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 1], bool)
        >>> row = compare("accuracy", Outcomes.of(original), Outcomes.of(reduced))
        >>> row.fixed, row.broken, row.p
        (6, 0, 0.03125)
        >>> f"{row.delta:+.1f} [{row.lower:+.3f}, {row.upper:+.3f}]"
        '+0.6 [+0.087, +0.863]'
        >>> from laser_callback.stats import adjust
        >>> row.verdict, adjust([row], primary="accuracy")[0].verdict
        ('exploratory', 'better')
    """
    if original.kind == reduced.kind == "pair":
        as_means = replace(original, kind="mean"), replace(reduced, kind="mean")
        return _of_pair(compare(metric, *as_means, clusters=clusters))
    before, after, weights, labels, notes = _pairs(original, reduced, clusters)
    if not len(before):
        return _without_units(metric, original, reduced, higher_is_better)
    # A t test of few zeros and ones claims what the exact test does not.
    is_exact = original.kind == "binary" or (weights is None and bool(np.isin([before, after], (0, 1)).all()))
    signs = (after - before).astype(np.int64) if is_exact else None
    if labels is not None:
        before, after, weights = _cluster_means(before, after, weights, labels)
    log_ratio = original.kind == "log_ratio"
    if higher_is_better is None and original.kind != "mean":
        higher_is_better = original.kind == "binary"
    with np.errstate(over="ignore", invalid="ignore"):  # infinite outcomes are legal; they are not tested below
        means = [float(np.average(values, weights=weights)) for values in (before, after, after - before)]
        if log_ratio:
            means = [float(np.exp(means[0])), float(np.exp(means[1])), float(np.expm1(means[2]))]
    row = PairedResult(
        metric=metric,
        kind=original.kind,
        n=len(before),
        original=means[0],
        reduced=means[1],
        delta=means[2],
        note="; ".join(notes),
        higher_is_better=higher_is_better,
        unit=original.unit,
    )
    if labels is not None:
        row = replace(row, unit="cluster", examples=len(labels))
        row = replace(row, note="; ".join([*notes, row.sample]))

    if signs is not None:
        return _tested_exactly(row, signs, labels)

    tested = mean_difference(before, after, weights)
    if isinstance(tested, str):
        return replace(row, note="; ".join(filter(None, [row.note, tested])))
    row = replace(row, p=tested.p, test="paired t" if weights is None else "cluster-robust t")
    with np.errstate(over="ignore"):
        ends = np.array([tested.interval(level) for level in (1 - ALPHA, 1 - 2 * ALPHA)])
        return _with_bounds(row, (np.expm1(ends) if log_ratio else ends).tolist())


def _tested_exactly(row: PairedResult, signs: NDArray[np.int64], labels: NDArray[np.int64] | None) -> PairedResult:
    """The row with the test of right and wrong: ``signs`` are 1 where a unit was gained, -1 where it was lost."""
    gained, lost, n = int((signs > 0).sum()), int((signs < 0).sum()), len(signs)
    fixed, broken = (gained, lost) if row.higher_is_better else (lost, gained)
    if row.kind == "binary":  # which of both is right is not known of a plain number
        row = replace(row, fixed=fixed, broken=broken)
    effect, df = 1.0, math.inf
    if labels is None:
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        row = replace(row, p=p, test="exact McNemar")
    elif row.n < 2:
        return replace(row, note=f"{row.note}; one independent unit has no variance")
    else:
        p = sign_flip_p(np.bincount(labels, signs).astype(np.int64))
        row = replace(row, p=p, test="exact cluster sign flip")
        effect, df = design_effect_of(signs.astype(np.float64), labels), row.n - 1
    assert row.p is not None
    ends = []
    for level in (1 - ALPHA, 1 - 2 * ALPHA):
        lower, upper = score_interval(gained / effect, lost / effect, n / effect, level, df)
        if row.p > 1 - level:  # no end passes 0 before the exact test does
            lower, upper = min(lower, 0.0), max(upper, 0.0)
        ends.append((lower, upper))
    return _with_bounds(row, ends)


def _of_pair(row: PairedResult) -> PairedResult:
    """The row of a number of both models: without a test, and with an interval inside of what the number can be."""
    if not math.isfinite(row.original):  # no unit has a value
        return replace(row, kind="pair")
    low, high = (0.0, math.inf) if row.original == 0 else (-row.original, 0.0)
    ends = [row.lower, row.upper, row.lower90, row.upper90]
    lower, upper, lower90, upper90 = (None if end is None else min(max(end, low), high) for end in ends)
    return replace(
        row,
        kind="pair",
        lower=lower,
        upper=upper,
        lower90=lower90,
        upper90=upper90,
        p=None,
        test="not tested",
        note="; ".join(filter(None, [row.note, f"the original has {row.original:g} by definition"])),
        higher_is_better=row.original > 0,
    )


def _without_units(metric: str, original: Outcomes, reduced: Outcomes, higher_is_better: bool | None) -> PairedResult:
    """The row where no unit has a value in both arms: what there is of each, and no test."""
    values, present = [], []
    for arm in (original, reduced):
        kept = ~np.isnan(units := as_float64(arm.values))
        weights = None if arm.weights is None else as_float64(arm.weights)[kept]
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(np.average(units[kept], weights=weights)) if kept.any() else math.nan
            values.append(float(np.exp(mean)) if arm.kind == "log_ratio" else mean)
        present.append(int(kept.sum()))
    shares = " and ".join(f"{count} of {len(units)}" for count in present)
    note = f"no unit has a value in both arms: {shares} have one in the original and in the reduced model"
    return not_tested(metric, values[0], values[1], 0, note, higher_is_better, original.kind)


def _with_bounds(row: PairedResult, ends: Sequence[Sequence[float]]) -> PairedResult:
    (lower, upper), (lower90, upper90) = ends
    return replace(row, lower=lower, upper=upper, lower90=lower90, upper90=upper90)


def _pairs(
    original: Outcomes, reduced: Outcomes, clusters: Sequence[Hashable] | None
) -> tuple[Floats, Floats, Floats | None, NDArray[np.int64] | None, list[str]]:
    """Both arms' values, weights and cluster numbers on the units present in both, and notes on what was dropped."""
    if original.kind != reduced.kind:
        raise ValueError(f"`reduced` must have the kind of `original`, {original.kind!r}, got {reduced.kind!r}")
    before, after = as_float64(original.values), as_float64(reduced.values)
    if len(before) != len(after):
        raise ValueError(f"`reduced` must hold the same units as `original`, {len(before)}, got {len(after)}")
    if clusters is not None and len(clusters) != len(before):
        raise ValueError(f"`clusters` must have one label per unit, {len(before)}, got {len(clusters)}")
    kept = ~(np.isnan(before) | np.isnan(after))
    weights, other = (None if arm.weights is None else as_float64(arm.weights)[kept] for arm in (original, reduced))
    if not (weights is other if weights is None or other is None else np.array_equal(weights, other)):
        raise ValueError("`reduced` must have the weights of `original`, got others; a weight belongs to the unit")
    if original.kind == "log_ratio" and weights is None:
        weights = np.ones(int(kept.sum()))  # so that clustering leaves the perplexity a mean over units

    notes = []
    dropped = int((np.isnan(before) != np.isnan(after)).sum())
    if dropped:
        notes.append(f"{dropped} of {len(before)} units dropped: absent in one arm only")
    labels = None
    if clusters is not None:
        labels = numbered([clusters[i] for i in np.flatnonzero(kept).tolist()])
        if not len(labels) or labels.max() + 1 == len(labels):
            labels = None
    return before[kept], after[kept], weights, labels, notes


def numbered(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """Each unit's cluster as a number, from 0 in the order in which they come."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.int64)


def _cluster_means(
    before: Floats, after: Floats, weights: Floats | None, labels: NDArray[np.int64]
) -> tuple[Floats, Floats, Floats | None]:
    """Weighted mean of each arm within each cluster, and the clusters' weights: of units without any, their number."""
    within = np.ones(len(labels)) if weights is None else weights
    total = np.bincount(labels, within).astype(np.float64)
    return np.bincount(labels, within * before) / total, np.bincount(labels, within * after) / total, total
