"""The last step of a search: confirm the found plan, recommend it or the original, and say why."""

from __future__ import annotations

from collections.abc import Sequence

from laser_callback.compare.reduced_arm import ReducedPassError
from laser_callback.reports.row_text import finding
from laser_callback.results.search import SearchResult
from laser_callback.search.steps import Steps
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.gain import Gain
from laser_callback.stats.gates import judge_all
from laser_callback.surgery.recipe import recorded


def confirm(steps: Steps, result: SearchResult, bounds: Sequence[Constraint], controls: bool) -> None:
    """Run the found plan, if there is one, against the original on what nothing has seen; then :func:`decide`."""
    if result.found is None:
        return
    if any(reduction.needs_inputs for reduction in result.found):  # what is kept is in no weights
        with recorded(steps.lab.module, result.found, steps.lab.spectra) as (_, recipe):
            result.found = result.recipe = recipe
    try:
        _compare_unseen(steps, result, bounds, controls)
    except ReducedPassError as error:
        result.reason = f"no gain of {result.found} is confirmed: {error}"
        return
    decide(result, steps.objective.signs[0])


def _compare_unseen(steps: Steps, result: SearchResult, bounds: Sequence[Constraint], controls: bool) -> None:
    """On the confirm and the guard set."""
    assert result.found is not None
    loaders, primary = [steps.sets.loader("confirm")], steps.objective.keys[0]
    better = dict(zip(steps.objective.keys, (sign > 0 for sign in steps.objective.signs), strict=True))
    result.confirmed = steps.compare("confirm", result.found, loaders, primary, controls).directed(better)
    if bounds:
        text = steps.sets.text("guard")
        guard = [steps.sets.loader("guard")] if steps.sets.sizes.get("guard") else []
        guard += [] if text is None else [text]
        result.guard = steps.compare("guard", result.found, guard, None, controls=False).directed(better)
        result.judgements = judge_all(bounds, result.guard["laser"].rows)


def decide(result: SearchResult, sign: int) -> None:
    """Recommend the confirmed plan or the original, and say why.

    The plan is recommended if the first objective's gain is significant, if there is a gain outside of what is said
    most, and if every constraint is shown to hold.

    Args:
        result: with ``found``, ``confirmed`` and ``judgements``; ``plan`` and ``reason`` are set.
        sign: 1 where the first objective is better high, -1 where it is better low.
    """
    assert result.confirmed is not None
    arm, key = result.confirmed["laser"], result.objective[0]
    row = arm[key]
    gain = f"on unseen examples {finding(row)}"
    broken = [judgement.sentence for judgement in result.judgements if judgement.verdict != "pass"]
    judged = Gain(key, direction="max" if sign > 0 else "min").judge(row, arm.prior_checks.get(key))
    if judged.verdict != "pass":
        result.reason = f"no gain of {result.found} is confirmed: {gain}; {judged.note}"
    elif broken:
        result.reason = f"with {result.found}, {gain}; but {'; and '.join(broken)}"
    else:
        result.plan = result.found
        result.reason = f"{gain}{judged.note and f'; {judged.note}'}"
        checks = arm.prior_checks.get(key)
        right = row.reduced if sign > 0 else 1 - row.reduced
        if checks is not None and right < checks.constant_answer:
            result.warnings.append(
                f"by {key}, {right:.1%} is right after the cut, and each group's most common answer, always given, "
                f"would reach {checks.constant_answer:.1%}: what changed may be the form of the answers, not what it "
                "knows"
            )
