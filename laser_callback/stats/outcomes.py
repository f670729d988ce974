"""What goes into a comparison, one value per unit and arm, and the row of numbers that comes out.

A row never holds a claim that its statistics do not carry: what cannot be tested says so in its ``note``, and a row
claims nothing before :func:`~laser_callback.stats.adjust` has given it a role.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from typing_extensions import Self

from laser_callback.stats.intervals import Floats

ALPHA = 0.05  # level of every verdict; 1 - ALPHA is the confidence of every interval

Array: TypeAlias = Any  # of NumPy, or a tensor
Kind: TypeAlias = Literal["binary", "mean", "log_ratio", "pair", "pooled"]
Role: TypeAlias = Literal["primary", "holm", "exploratory"]
Test: TypeAlias = Literal[
    "exact McNemar",
    "exact cluster sign flip",
    "paired t",
    "cluster-robust t",
    "Fisher's exact",
    "Welch's t",
    "paired permutation",
    "not tested",
]
WINDOW = "window of text"
"""The unit of running text."""
Verdict: TypeAlias = Literal[
    "better", "in doubt", "worse", "higher", "lower", "no difference shown", "not tested", "exploratory"
]


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
            - ``"pair"``: a number of both models, such as their divergence, of which the original has by definition 0
              and the reduced model no less, or 1 and no more; the metric is the (weighted) mean. It has an interval
              and no test.
        unit: what a value is of, in the singular, for readers.

    Raises:
        TypeError: if ``values`` or ``weights`` is neither an array nor a tensor.
        ValueError: if a shape, the kind, a binary value or a weight is not as stated above.
    """

    values: Array
    weights: Array | None = None
    kind: Kind = "mean"
    unit: str = "example"

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "mean", "log_ratio", "pair"):
            raise ValueError(f"`kind` must be 'binary', 'mean', 'log_ratio' or 'pair', got {self.kind!r}")
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


def as_float64(values: Array) -> Floats:
    """The values as a float64 array of NumPy."""
    if hasattr(values, "detach"):  # a tensor: NumPy reads no other device and no bfloat16
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class PairedResult:
    """One metric, original against reduced.

    Attributes:
        metric: name of the metric.
        kind: kind of the outcomes; "pooled" for a metric of all units' states, of which none has a value of its own
            (F1, AUROC, BLEU, ...); ``None`` for one that is no mean over units and has no such states either.
        n: number of independent units behind the row.
        original: the metric of the original model.
        reduced: the metric of the reduced model.
        delta: ``reduced - original``; for kind "log_ratio" the relative change ``reduced / original - 1``.
        lower: lower end of the 95 % interval of ``delta``, on its scale; ``None`` if not tested.
        upper: upper end of it.
        lower90: lower end of the 90 % interval by the same method: a one-sided 95 % bound; ``None`` if not tested.
        upper90: upper end of it, the other one-sided bound.
        p: two-sided p value of "no difference", unadjusted; ``None`` if not tested.
        fixed: examples wrong in the original and right in the reduced model ("binary" only), clustered or not.
        broken: examples right in the original and wrong in the reduced model ("binary" only).
        test: name of the test behind ``p``.
        note: what a reader of the row must know, such as why it is not tested.
        p_adjusted: Holm-adjusted p value, for rows of role "holm".
        role: "primary" rows claim by ``p``, "holm" rows by ``p_adjusted``, "exploratory" rows never.
        higher_is_better: direction of the metric; ``None`` if unknown.
        unit: what is independent: an example (or what the outcomes say), a cluster of them, or a batch where no values
            per example are known.
        examples: number of examples in the clusters; ``None`` where there are none.
        doubt: why a gain may be no more than another way to answer, as the prior check says; empty if there is none.
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
    unit: str = "example"
    examples: int | None = None
    doubt: str = ""

    @property
    def verdict(self) -> Verdict:
        """What the row may claim at level 0.05: "higher" or "lower" where it is unknown which of them is better.

        A gain that the prior check doubts is "in doubt", and no "better".

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
        if (self.delta > 0) != self.higher_is_better:
            return "worse"
        return "in doubt" if self.doubt else "better"

    def directed(self, higher_is_better: bool) -> Self:
        """The row of a metric whose better direction was declared."""
        if self.fixed is not None and self.higher_is_better != higher_is_better:
            return replace(self, higher_is_better=higher_is_better, fixed=self.broken, broken=self.fixed)
        return replace(self, higher_is_better=higher_is_better)

    @property
    def units(self) -> str:
        """What ``n`` counts, in the plural."""
        return {"batch": "batches", WINDOW: "windows of text"}.get(self.unit, f"{self.unit}s")

    @property
    def sample(self) -> str:
        """What was looked at, such as "300 examples" or "300 examples in 120 clusters"."""
        units = f"{self.n:,} {self.unit if self.n == 1 else self.units}"
        return units if self.examples is None else f"{self.examples:,} examples in {units}"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, ready for strict JSON: a number that is not finite becomes ``None``."""
        return {**plain_fields(self), "verdict": self.verdict}


ResultRow = TypeVar("ResultRow", bound=PairedResult)


def row_named(metric: str, rows: Sequence[ResultRow]) -> ResultRow:
    """The row of a metric.

    Raises:
        KeyError: if there is none, naming those there are.
    """
    for row in rows:
        if row.metric == metric:
            return row
    raise KeyError(f"no row {metric!r}; there are {', '.join(row.metric for row in rows) or 'none'}")


def not_tested(
    metric: str,
    original: float,
    reduced: float,
    n: int,
    note: str,
    higher_is_better: bool | None = None,
    kind: Kind | None = None,
) -> PairedResult:
    """A row for what has no test: both values, ``n`` and why.

    Without a ``kind`` it can never have one, since the metric is no mean over units and of no known states.
    """
    return PairedResult(
        metric, kind, n, original, reduced, reduced - original, note=note, higher_is_better=higher_is_better
    )


def plain_fields(row: Any) -> dict[str, Any]:
    """The fields of a dataclass, ready for strict JSON: a number that is not finite becomes ``None``."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
