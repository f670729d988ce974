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
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from laser_callback.stats.intervals import Floats, joined_wilson, standard_error
from laser_callback.stats.outcomes import ALPHA, Outcomes, PairedResult, as_float64


@dataclass(frozen=True)
class UnpairedResult(PairedResult):
    """A row like that of a paired comparison, of two groups; ``n`` is the number of units of both.

    Attributes:
        n_original: units that the original model saw.
        n_reduced: units that the reduced model saw.
    """

    n_original: int = 0
    n_reduced: int = 0


def compare_groups(
    metric: str, original: Outcomes, reduced: Outcomes, higher_is_better: bool | None = None
) -> UnpairedResult:
    r"""Compare the outcomes of two groups of units. Units whose value is absent (NaN) are left out.

    - "binary": Fisher's exact test and Newcombe's interval for independent shares.
    - "mean" and "log_ratio": Welch's t test and interval. With weights, each group's mean is
      :math:`m = \sum_i w_i x_i / \sum_i w_i` with the linearised variance
      :math:`\frac{n}{n-1} \sum_i (w_i (x_i - m))^2 / (\sum_i w_i)^2`; "log_ratio" then maps estimate and interval by
      ``exp(.) - 1``.

    Args:
        metric: name for the row.
        original: of the units that the original model saw.
        reduced: of those that the reduced model saw, of the same kind.
        higher_is_better: direction of the metric; as in :func:`~laser_callback.stats.compare`.

    Returns:
        A row of role "exploratory"; a group with too few units is not tested.

    Raises:
        ValueError: if the kinds differ.

    Example:
        >>> before, after = np.arange(80) < 48, np.arange(70) < 56  # Newcombe's first example
        >>> row = compare_groups("right", Outcomes.of(before), Outcomes.of(after))
        >>> f"{row.delta:+.4f} [{row.lower:+.4f}, {row.upper:+.4f}], p = {row.p:.4f}"
        '+0.2000 [+0.0524, +0.3339], p = 0.0125'
    """
    if original.kind != reduced.kind:
        raise ValueError(f"`reduced` must have the kind of `original`, {original.kind!r}, got {reduced.kind!r}")
    groups = _present(original), _present(reduced)
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
    if min(sizes) < (1 if original.kind == "binary" else 2):
        return replace(row, note=f"{sizes[0]} and {sizes[1]} units are too few")
    if original.kind == "binary":
        ones = round(float(groups[0][0].sum())), round(float(groups[1][0].sum()))
        table = np.array([[one, size - one] for one, size in zip(ones, sizes, strict=True)])
        ends = [joined_wilson(ones, sizes, level) for level in (1 - ALPHA, 1 - 2 * ALPHA)]
        row = replace(row, p=float(stats.fisher_exact(table).pvalue), test="Fisher's exact")
    else:
        errors = [standard_error(*group, mean) ** 2 for group, mean in zip(groups, means, strict=True)]
        if not 0 < sum(errors) < math.inf:
            return replace(row, note="no variance" if sum(errors) == 0 else "infinite outcomes have no difference")
        df = sum(errors) ** 2 / sum(error**2 / (size - 1) for error, size in zip(errors, sizes, strict=True))
        error = math.sqrt(sum(errors))
        margins = [float(stats.t.ppf(1 - tail, df)) * error for tail in (ALPHA / 2, ALPHA)]
        ends = [(difference - margin, difference + margin) for margin in margins]
        ends = [(_expm1(lower), _expm1(upper)) for lower, upper in ends] if log_ratio else ends
        row = replace(row, p=float(2 * stats.t.sf(abs(difference) / error, df)), test="Welch's t")
    (lower, upper), (lower90, upper90) = ends
    return replace(row, lower=lower, upper=upper, lower90=lower90, upper90=upper90)


def _expm1(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.expm1(value))


def _present(outcomes: Outcomes) -> tuple[Floats, Floats]:
    """Values and weights of the units that have a value."""
    values = as_float64(outcomes.values)
    kept = ~np.isnan(values)
    weights = np.ones(len(values)) if outcomes.weights is None else as_float64(outcomes.weights)
    return values[kept], weights[kept]
