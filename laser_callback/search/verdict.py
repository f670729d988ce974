"""The last step of a search: confirm the found plan, recommend it or the original, and say why."""

from __future__ import annotations

from collections.abc import Sequence

from laser_callback.compare.module import LaserModule
from laser_callback.compare.reduced_arm import ReducedPassError
from laser_callback.data.generation import EXACT_MATCH
from laser_callback.plans.short import brief
from laser_callback.reports.row_text import controls_text, finding
from laser_callback.results.comparison import ArmResult
from laser_callback.results.search import SearchResult
from laser_callback.search.steps import Steps
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.gain import Gain
from laser_callback.stats.gates import judge_all
from laser_callback.stats.judgement import Judgement
from laser_callback.stats.outcomes import PairedResult
from laser_callback.surgery.record import recorded


def confirm(steps: Steps, result: SearchResult, bounds: Sequence[Constraint], controls: bool) -> None:
    """Run the found plan, if there is one, against the original on what nothing has seen; then :func:`decide`."""
    if result.found is None:
        return
    if result.found.needs_directions:  # what is kept is in no weights
        with recorded(steps.lab.module, result.found, steps.lab.spectra) as (_, recipe):
            result.recipe = recipe
    try:
        _compare_unseen(steps, result, bounds, controls)  # not by the recipe: a precision may convert the weights
    except ReducedPassError as error:
        result.reason = f"no gain of {brief(result.found)} is confirmed: {error}"
        return
    finally:
        result.found = result.recipe or result.found
    decide(result, steps.objective.signs[0], of_facts=isinstance(steps.lab.module, LaserModule))


def _compare_unseen(steps: Steps, result: SearchResult, bounds: Sequence[Constraint], controls: bool) -> None:
    """On the confirm and the guard set."""
    assert result.found is not None
    loaders, primary = [steps.sets.loader("confirm")], steps.objective.keys[0]
    better = dict(zip(steps.objective.keys, (sign > 0 for sign in steps.objective.signs), strict=True))
    result.confirmed = steps.compare("confirm", result.found, loaders, primary, controls).directed(better)
    if bounds:
        text = steps.sets.text("guard")
        writes = any(bound.key == EXACT_MATCH for bound in bounds)
        guard = [steps.sets.loader("guard", writes=writes)] if steps.sets.sizes.get("guard") else []
        guard += [] if text is None else [text]
        result.guard = steps.compare("guard", result.found, guard, None, controls=False).directed(better)
        result.judgements = judge_all(bounds, result.guard["laser"].rows)


def decide(result: SearchResult, sign: int, *, of_facts: bool = True) -> None:
    """Recommend the confirmed plan or the original, and say why.

    Args:
        result: with ``found``, ``confirmed`` and ``judgements``; ``plan`` and ``reason`` are set.
        sign: 1 where the first objective is better high, -1 where it is better low.
        of_facts: see :func:`judged`.
    """
    assert result.confirmed is not None
    arm, key = result.confirmed["laser"], result.objective[0]
    shown, result.reason = judged(brief(result.found), arm, key, sign, result.judgements, of_facts=of_facts)
    result.plan = result.found if shown else None
    if shown and (controls := controls_text(result.confirmed, "laser")):
        result.reason += f"; {controls}"
    checks = arm.prior_checks.get(key)
    if shown and checks is not None and (right := _right(arm[key], sign)) < checks.constant_answer:
        result.warnings.append(
            f"by {key}, {right:.1%} is right after the cut, and each group's most common answer, always given, "
            f"would reach {checks.constant_answer:.1%}: what changed may be the form of the answers, not what it "
            "knows"
        )


def judged(
    name: str, arm: ArmResult, key: str, sign: int, judgements: Sequence[Judgement], *, of_facts: bool
) -> tuple[bool, str]:
    """Whether what was confirmed is recommended, and why.

    It is if the gain in ``key`` is significant, if there is a gain outside of what is said most, and if every
    constraint is shown to hold. Where answers are labels (:attr:`PriorChecks.is_of_labels`) it must also be right at
    least as often as the most common one of them is, always given: a classifier that is not is worth nothing. Facts
    have no such bound, since nobody knows beforehand which answer is the most common.

    Args:
        name: of the plan, or of whatever else was compared with the original.
        arm: the comparison on examples that nothing was chosen by.
        key: the first objective.
        sign: 1 where it is better high, -1 where it is better low.
        judgements: of the constraints.
        of_facts: the answers are facts, even if they repeat.
    """
    row, checks = arm[key], arm.prior_checks.get(key)
    gain = f"on unseen examples {finding(row)}"
    broken = [judgement.sentence for judgement in judgements if judgement.verdict != "pass"]
    found = Gain(key, direction="max" if sign > 0 else "min").judge(row, checks)
    if found.verdict != "pass":
        is_told = row.verdict == "no difference shown"  # that there is no gain, and what is ruled out
        note = found.note.partition("; ")[2] if is_told else found.note
        return False, f"no gain of {name} is confirmed: {gain}{note and f'; {note}'}"
    if checks is not None and checks.is_of_labels and not of_facts and _right(row, sign) < checks.constant_answer:
        return False, (
            f"with {name}, {gain}; but the most common answer, always given, would be right more often "
            f"({checks.constant_answer:.1%})"
        )
    if broken:
        return False, f"with {name}, {gain}; but {'; and '.join(broken)}"
    return True, f"{gain}{found.note and f'; {found.note}'}"


def _right(row: PairedResult, sign: int) -> float:
    """The share that is right after the cut."""
    return row.reduced if sign > 0 else 1 - row.reduced
