"""Original against reduced: the paired statistics behind every row of the results table.

Contract: one value per *independent unit* and arm goes in, in the same order for both arms, gathered from all ranks
and free of duplicates; frozen rows of plain Python numbers come out. Everything is computed in float64 on the CPU.
The delta is always reduced minus original. Its interval is a two-sided 95 % interval; the ends of the 90 % interval,
each a one-sided 95 % bound, are there for those who ask about one side. A row never holds a claim that its statistics
do not carry: what cannot be tested says so in its ``note``, and a row claims nothing before :func:`adjust` has given it
a role.

This file knows nothing about models, Lightning or processes.

Sources:
    McNemar, Q. (1947). Psychometrika 12, 153-157, with the exact binomial p value instead of chi-squared.
    Cochran, W. G. (1977). Sampling Techniques, 3rd ed., chapter 9A (clusters of unequal size).
    Holm, S. (1979). Scandinavian Journal of Statistics 6, 65-70.
    Those of the intervals stand in :mod:`laser_callback.stats.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from laser_callback.stats.intervals import Floats, mean_difference, newcombe

ALPHA = 0.05  # level of every verdict; 1 - ALPHA is the confidence of every interval

Array: TypeAlias = Any  # of NumPy, or a tensor
Kind: TypeAlias = Literal["binary", "mean", "log_ratio"]
Role: TypeAlias = Literal["primary", "holm", "exploratory"]
Test: TypeAlias = Literal["exact McNemar", "paired t", "cluster-robust t", "Fisher's exact", "Welch's t", "not tested"]
Verdict: TypeAlias = Literal["better", "worse", "higher", "lower", "no difference shown", "not tested", "exploratory"]


# ---------------------------------------------------------------------------------------------------------------------
# What goes in, and the row that comes out


@dataclass(frozen=True, eq=False)
class Outcomes:
    """One arm's outcome for every unit of an evaluation, or of one batch of it.

    Args:
        values: shape ``(n,)``, an array or tensor of any real dtype and device. NaN means that the unit has no
            such outcome.
        weights: shape ``(n,)``, positive wherever a value is present; ``None`` weighs all units the same.
        kind: what the values are, and so which metric and which test they make:

            - ``"binary"``: 0 or 1, unweighted; the metric is the share of ones.
            - ``"mean"``: any number; the metric is the (weighted) mean.
            - ``"log_ratio"``: the unit's mean negative log likelihood in nats per token, with its number of tokens as
              weight; the metric is ``exp(weighted mean)``, the perplexity, and arms are compared by their ratio.

    Raises:
        TypeError: if ``values`` or ``weights`` is neither an array nor a tensor.
        ValueError: if a shape, the kind, a binary value or a weight is not as stated above.
    """

    values: Array
    weights: Array | None = None
    kind: Kind = "mean"

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "mean", "log_ratio"):
            raise ValueError(f"`kind` must be 'binary', 'mean' or 'log_ratio', got {self.kind!r}")
        array: Array
        for name, array in (("values", self.values), ("weights", self.weights)):
            if array is None and name == "weights":
                continue
            if not hasattr(array, "ndim"):
                raise TypeError(f"`{name}` must be an array or a tensor, got {type(array).__name__}")
            if array.ndim != 1:
                raise ValueError(f"`{name}` must be 1-D, one number per unit, got shape {tuple(array.shape)}")
        values = as_float64(self.values)
        present = ~np.isnan(values)
        if self.kind == "binary":
            if self.weights is not None:
                raise ValueError("`weights` must be None for kind 'binary'; use kind 'mean' for a weighted share")
            wrong = present & (values != 0) & (values != 1)
            if wrong.any():
                raise ValueError(
                    f"`values` of kind 'binary' must be 0, 1 or NaN, got {values[wrong][0]}; "
                    "use kind 'mean' for other numbers"
                )
        if self.weights is not None:
            if len(self.weights) != len(self.values):
                raise ValueError(
                    f"`weights` must have one entry per value, got {len(self.weights)} for {len(self.values)} values"
                )
            used = as_float64(self.weights)[present]
            bad = ~((used > 0) & np.isfinite(used))
            if bad.any():
                raise ValueError(
                    f"`weights` must be positive and finite where a value is present, got {used[bad][0]}; "
                    "mark a unit as absent with a NaN value"
                )

    @classmethod
    def of(cls, values: Array) -> Outcomes:
        """Unweighted outcomes of a plain array or tensor of shape ``(n,)``: bool is "binary", floating point is "mean".

        Raises:
            TypeError: for any other dtype, because integers may be labels or counts as well as 0/1 outcomes.
        """
        dtype = str(values.dtype).removeprefix("torch.")
        if dtype == "bool":
            return cls(values, kind="binary")
        if "float" in dtype:
            return cls(values, kind="mean")
        raise TypeError(f"`values` must be bool or floating point, got {values.dtype}; build Outcomes(..., kind=...)")


@dataclass(frozen=True)
class PairedResult:
    """One metric, original against reduced.

    Attributes:
        metric: name of the metric.
        kind: kind of the outcomes; ``None`` for a metric that is not a mean over units.
        n: number of independent units behind the row; clusters where units were clustered.
        original: the metric of the original model.
        reduced: the metric of the reduced model.
        delta: ``reduced - original``; for kind "log_ratio" the relative change ``reduced / original - 1``.
        lower: lower end of the 95 % interval of ``delta``, on its scale; ``None`` if not tested.
        upper: upper end of it.
        lower90: lower end of the 90 % interval by the same method: a one-sided 95 % bound; ``None`` if not tested.
        upper90: upper end of it, the other one-sided bound.
        p: two-sided p value of "no difference", unadjusted; ``None`` if not tested.
        fixed: number of units wrong in the original and right in the reduced model (unclustered "binary" only).
        broken: number of units right in the original and wrong in the reduced model (unclustered "binary" only).
        test: name of the test behind ``p``.
        note: what a reader of the row must know, such as why it is not tested.
        p_adjusted: Holm-adjusted p value, for rows of role "holm".
        role: "primary" rows claim by ``p``, "holm" rows by ``p_adjusted``, "exploratory" rows never.
        higher_is_better: direction of the metric; ``None`` if unknown.
    """

    metric: str
    kind: Kind | None
    n: int
    original: float
    reduced: float
    delta: float
    lower: float | None = None
    upper: float | None = None
    lower90: float | None = None
    upper90: float | None = None
    p: float | None = None
    fixed: int | None = None
    broken: int | None = None
    test: Test = "not tested"
    note: str = ""
    p_adjusted: float | None = None
    role: Role = "exploratory"
    higher_is_better: bool | None = None

    @property
    def verdict(self) -> Verdict:
        """What the row may claim at level 0.05: "higher" or "lower" where it is unknown which of them is better.

        The p value decides, not the interval: near the boundary an exact test and a score interval may disagree.
        """
        if self.test == "not tested":
            return "not tested"
        if self.role == "exploratory":
            return "exploratory"
        p = self.p if self.role == "primary" else self.p_adjusted
        if p is None or p > ALPHA:
            return "no difference shown"
        if self.higher_is_better is None:
            return "higher" if self.delta > 0 else "lower"
        return "better" if (self.delta > 0) == self.higher_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, ready for strict JSON: a number that is not finite becomes ``None``."""
        fields = {**asdict(self), "verdict": self.verdict}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


# ---------------------------------------------------------------------------------------------------------------------
# One comparison


def compare(
    metric: str,
    original: Outcomes,
    reduced: Outcomes,
    *,
    clusters: Sequence[Hashable] | None = None,
    higher_is_better: bool | None = None,
) -> PairedResult:
    r"""Compare two arms unit by unit.

    A unit absent (NaN) in either arm is dropped from both; the note counts those absent in one arm only.

    - "binary": exact two-sided McNemar test and Newcombe's interval (method 10).
    - "mean": paired t test and interval.
    - "mean" with weights, and "log_ratio": :math:`r = \sum_c w_c d_c / \sum_c w_c` over C clusters (without
      ``clusters``, the units), with the cluster-robust variance
      :math:`\frac{C}{C-1} \sum_c (w_c d_c - r w_c)^2 / (\sum_c w_c)^2` and t with C - 1 degrees of freedom;
      "log_ratio" then maps estimate and interval by ``exp(.) - 1``.

    Clusters hold units that are not independent, such as the prompts of one fact. Unweighted "binary" and "mean" values
    are averaged within each cluster first: the clusters become the units of a paired t test, and the metric the mean
    over clusters. Weighted values and "log_ratio" keep their mean over units. Clusters of one unit change nothing.

    Args:
        metric: name for the row.
        original: outcomes of the original model, ``n`` units.
        reduced: outcomes of the reduced model for the same units in the same order, with the same kind and weights.
        clusters: one label per unit.
        higher_is_better: direction of the metric. ``None`` means that ones are right for "binary", that lower is better
            for "log_ratio", and that the direction is unknown for "mean".

    Returns:
        A row of role "exploratory"; :func:`adjust` gives it the role in which it may claim something.

    Raises:
        ValueError: if the arms do not match, ``clusters`` has another length, or no unit is present in both arms.

    Example:
        >>> original = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1], bool)
        >>> reduced = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 1], bool)
        >>> row = compare("accuracy", Outcomes.of(original), Outcomes.of(reduced))
        >>> row.fixed, row.broken, row.p
        (6, 0, 0.03125)
        >>> f"{row.delta:+.1f} [{row.lower:+.3f}, {row.upper:+.3f}]"
        '+0.6 [+0.171, +0.809]'
        >>> row.verdict, adjust([row], primary="accuracy")[0].verdict
        ('exploratory', 'better')
    """
    before, after, weights, labels, notes = _pairs(original, reduced, clusters)
    if labels is not None:
        before, after, weights = _cluster_means(before, after, weights, labels)
        notes.append(f"{len(labels)} units in {len(before)} clusters")
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
    )

    if original.kind == "binary" and labels is None:
        gained, lost = int((after > before).sum()), int((after < before).sum())
        counts = int((before * after).sum()), gained, lost, len(before)
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        fixed, broken = (gained, lost) if higher_is_better else (lost, gained)
        row = replace(row, p=p, fixed=fixed, broken=broken, test="exact McNemar")
        return _with_bounds(row, [newcombe(*counts, level) for level in (1 - ALPHA, 1 - 2 * ALPHA)])

    tested = mean_difference(before, after, weights)
    if isinstance(tested, str):
        return replace(row, note="; ".join([*notes, tested]))
    row = replace(row, p=tested.p, test="paired t" if weights is None else "cluster-robust t")
    with np.errstate(over="ignore"):
        ends = np.array([tested.interval(level) for level in (1 - ALPHA, 1 - 2 * ALPHA)])
        return _with_bounds(row, (np.expm1(ends) if log_ratio else ends).tolist())


def not_tested(
    metric: str, original: float, reduced: float, n: int, note: str, higher_is_better: bool | None = None
) -> PairedResult:
    """A row for a metric that is not a mean over units (F1, BLEU, AUROC, ...): both values, ``n`` and why no test."""
    return PairedResult(
        metric, None, n, original, reduced, reduced - original, note=note, higher_is_better=higher_is_better
    )


Row = TypeVar("Row", bound=PairedResult)


def adjust(results: Sequence[Row], primary: str | None) -> list[Row]:
    """Give every tested row the role in which it may claim something.

    Args:
        results: rows of one comparison.
        primary: name of the metric declared beforehand, which keeps its own p value. The other tested rows share
            level 0.05 among themselves by Holm's step-down procedure; without a primary all tested rows do.

    Returns:
        The rows in the same order. Rows that are not tested keep their role unless one is the primary.

    Raises:
        ValueError: if ``primary`` does not name exactly one row.
    """
    names = [row.metric for row in results]
    if primary is not None and names.count(primary) != 1:
        raise ValueError(f"`primary` must name exactly one row, got {primary!r}; the rows are {names}")
    tested = sorted((row.p, i) for i, row in enumerate(results) if row.p is not None and row.metric != primary)
    adjusted: dict[int, float] = {}
    floor = 0.0
    for rank, (p, i) in enumerate(tested):
        # The running maximum keeps the order of the raw p values: no row may pass after an earlier one has failed.
        floor = adjusted[i] = max(floor, min(1.0, (len(tested) - rank) * p))
    rows = list(results)
    for i, row in enumerate(rows):
        if i in adjusted:
            rows[i] = replace(row, role="holm", p_adjusted=adjusted[i])
        elif row.metric == primary:
            rows[i] = replace(row, role="primary", p_adjusted=None)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def _with_bounds(row: PairedResult, ends: Sequence[Sequence[float]]) -> PairedResult:
    (lower, upper), (lower90, upper90) = ends
    return replace(row, lower=lower, upper=upper, lower90=lower90, upper90=upper90)


def as_float64(values: Array) -> Floats:
    """The values as a float64 array of NumPy."""
    if hasattr(values, "detach"):  # a tensor: NumPy reads no other device and no bfloat16
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


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
    if not kept.any():
        raise ValueError(f"`original` and `reduced` must share at least one present unit, got 0 of {len(before)}")

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
        number: dict[Hashable, int] = {}
        labels = np.array([number.setdefault(clusters[i], len(number)) for i in np.flatnonzero(kept).tolist()])
        if len(number) == len(labels):
            labels = None
    return before[kept], after[kept], weights, labels, notes


def _cluster_means(
    before: Floats, after: Floats, weights: Floats | None, labels: NDArray[np.int64]
) -> tuple[Floats, Floats, Floats | None]:
    """Weighted mean of each arm within each cluster, and the clusters' weights if the units have any."""
    within = np.ones(len(labels)) if weights is None else weights
    total = np.bincount(labels, within).astype(np.float64)
    before, after = np.bincount(labels, within * before) / total, np.bincount(labels, within * after) / total
    return before, after, None if weights is None else total
