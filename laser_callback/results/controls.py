"""What the controls of a plan show: those of several passes as their mean, and the plan against each.

Contract: the mean is taken example by example, ahead of all statistics, so that its interval and that of the plan's
difference to it are paired, and respect clusters, as those of any arm do. They are about other examples: the passes
are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from laser_callback.results.comparison import ArmResult
from laser_callback.results.examples import Logged, PairedExamples
from laser_callback.stats.outcomes import Outcomes, PairedResult, as_float64


def control_results(
    examples: PairedExamples,
    name: str,
    plan: ArmResult,
    controls: Mapping[str, Mapping[str, ArmResult]],
    original: Mapping[str, Logged],
    logged: Mapping[str, Mapping[str, Logged]],
) -> dict[str, ArmResult]:
    """Each control of one plan, with the plan against it.

    Args:
        examples: of all arms, gathered from all ranks.
        name: the plan's key in ``examples``.
        plan: its result.
        controls: by control and key in ``examples``, the result of each of its passes.
        original: what the original logged.
        logged: what each arm did, by its key.
    """
    found: dict[str, ArmResult] = {}
    for control, passes in controls.items():
        (key, arm), *others = passes.items()
        own = logged[key]
        if others:
            key = f"{name}.{control}"
            examples = _with_mean(examples, key, list(passes))
            own = _mean_logged([logged[one] for one in passes], [*passes.values()])
            arm = _mean(examples.rows(key, original, own), plan, [*passes.values()])
        finite = {k: value for k, value in own.items() if math.isfinite(float(value.value))}
        ahead = examples.rows(name, finite, {k: v for k, v in logged[name].items() if k in original}, key)
        found[control] = replace(arm, ahead=_as_of(plan, ahead))
    return found


def _mean(rows: Sequence[PairedResult], plan: ArmResult, passes: list[ArmResult]) -> ArmResult:
    """Of several passes their mean, whose outcomes are in ``rows``."""
    told = f"mean of {len(passes)} passes"
    return ArmResult(
        plan="; ".join(one.plan for one in passes),
        rows=[replace(row, note="; ".join(filter(None, [row.note, told]))) for row in _as_of(plan, rows)],
        prior_checks={},
        replay=passes[0].replay,
        seconds=sum(one.seconds for one in passes),
        factorise_seconds=sum(one.factorise_seconds for one in passes),
        passes=passes,
    )


def _as_of(plan: ArmResult, rows: Sequence[PairedResult]) -> list[PairedResult]:
    """Those of ``rows`` that the plan has, in its direction; the mean of what is right and wrong is a share as well."""
    like = {row.metric: row for row in plan.rows}
    found = []
    for row in (row for row in rows if row.metric in like):
        own = like[row.metric]
        kind = own.kind if (row.kind, own.kind) == ("mean", "binary") else row.kind
        found.append(replace(row, kind=kind, higher_is_better=own.higher_is_better))
    return found


def _mean_logged(logged: Sequence[Mapping[str, Logged]], passes: Sequence[ArmResult]) -> dict[str, Logged]:
    """The mean of what is in all of ``logged``; of perplexities that of their logarithms, as of the outcomes."""
    found = {}
    for key, first in logged[0].items():
        if all(key in one for one in logged):
            values = np.array([float(one[key].value) for one in logged])
            is_ratio = any(row.kind == "log_ratio" for row in passes[0].rows if row.metric == key)
            found[key] = first._replace(value=float(np.exp(np.log(values).mean()) if is_ratio else values.mean()))
    return found


def _with_mean(examples: PairedExamples, key: str, arms: Sequence[str]) -> PairedExamples:
    """The same with one more arm, the mean of some: of each example, and of each batch."""
    batches = []
    for batch in examples.batches:
        first, *others = [batch.outcomes.get(arm, {}) for arm in arms]
        mean = {
            name: _mean_outcomes([one[name] for one in (first, *others)])
            for name in first
            if all(name in other and _match(first[name], other[name]) for other in others)
        }
        batches.append(replace(batch, outcomes={**batch.outcomes, key: mean}))
    means = []
    for shares in examples.means:
        first_share, *rest = [shares.get(arm, {}) for arm in arms]
        mean_share = {
            metric: (sum(one[metric][0] for one in (first_share, *rest)) / len(arms), weight)
            for metric, (_, weight) in first_share.items()
            if all(metric in one and one[metric][1] == weight for one in rest)
        }
        means.append({**shares, key: mean_share})
    return replace(examples, batches=batches, means=means)


def _match(one: Outcomes, other: Outcomes) -> bool:
    """Whether two arms' outcomes have a mean: an example is measured the same way in both, and weighs the same."""
    if ("log_ratio" in (one.kind, other.kind) and one.kind != other.kind) or len(one.values) != len(other.values):
        return False
    if one.weights is None or other.weights is None:
        return one.weights is other.weights
    return np.array_equal(one.weights, other.weights, equal_nan=True)


def _mean_outcomes(outcomes: Sequence[Outcomes]) -> Outcomes:
    """Example by example; absent where one is."""
    values = np.stack([as_float64(one.values) for one in outcomes]).mean(0)
    return replace(outcomes[0], values=values, kind="mean" if outcomes[0].kind == "binary" else outcomes[0].kind)
