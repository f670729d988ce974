"""What is said of too few examples, before the work."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_tokenizer

from laser_callback import FactsDataModule
from laser_callback.compare.measure import Values
from laser_callback.data.sets import ExampleSets
from laser_callback.search.sizes import confirm_warnings, guard_warnings, is_share_right
from laser_callback.stats import Constraint
from laser_callback.stats.power import detectable_gain, examples_needed


def sets(per_subject: int = 1, answers: int = 100, n: int = 600) -> ExampleSets:
    rows = [
        {"id": str(i), "prompt": f"the number {i} is", "answer": f"a{i % answers}", "subject": f"s{i // per_subject}"}
        for i in range(n)
    ]
    data = FactsDataModule(rows, tiny_tokenizer())
    return ExampleSets.of(data, sizes={"screen": 20, "race": 80, "confirm": 0.75, "guard": 40})


def test_the_size_suffices() -> None:
    assert not confirm_warnings(sets(), 0.05)


def test_subjects_are_what_counts() -> None:
    (told,) = confirm_warnings(sets(per_subject=5), 0.05)
    assert "450 examples of 90 subjects, and tells as much as 89 to 444 independent ones, since the prior check" in told
    assert f"a gain of 5.0 points with 80% probability takes {examples_needed(0.05)} if a cut breaks one" in told
    assert "; 444 show gains from 3.8 points on if the examples of a subject change independently, and 89 " in told
    assert " 89 gains from 18.8 points on if together" in told


def test_what_the_prior_check_leaves_counts() -> None:
    """One answer in two is the most common: the check may be left with half of the examples."""
    (told,) = confirm_warnings(sets(answers=2), 0.05)
    assert "450 examples, and tells as much as 216 independent ones, since the prior check may leave out" in told
    assert not confirm_warnings(sets(answers=2), 0.1)
    (told,) = confirm_warnings(sets(answers=1), 0.1)
    assert "; 0 show no gain, even of a cut that breaks none." in told


def test_what_few_can_show_is_said_with_its_condition() -> None:
    (told,) = confirm_warnings(sets(per_subject=20), 0.05)
    few = detectable_gain(22, broken_per_fixed=0)
    assert f", and 22 gains from {100 * few:.1f} points on of a cut that breaks none if together." in told


@pytest.mark.parametrize(
    ("constraint", "values", "told"),
    [
        ("acc >= -0.02", [0.0, 1.0, torch.nan], True),
        ("acc >= -0.3", [0.0, 1.0], False),
        ("acc >= -0.02", [0.0, 0.5], False),  # no right and wrong: its spread decides
        ("acc >= -2 %", [0.0, 1.0], False),
        ("perplexity <= +0.5", [], False),
    ],
)
def test_a_bound_that_the_guard_set_cannot_show(constraint: str, values: list[float], told: bool) -> None:
    measured = {"acc": Values(torch.tensor(values), torch.ones(len(values)))}
    found = guard_warnings(sets(), [Constraint.parse(constraint)], measured)
    assert bool(found) == told
    if told:
        assert found == [
            "the guard set is small: 40 independent examples, none of which changes, leave a drop of 8.5 points "
            "possible, so that 'acc >= -0.02' stays undecided; 180 would do"
        ]


def test_a_bound_on_errors_speaks_of_a_rise() -> None:
    assert "leave a rise of 8.5 points possible" in Constraint.parse("error <= +0.02").too_few(40)


@pytest.mark.parametrize(
    ("values", "sign", "is_share"),
    [([0, 1], 1, True), ([0, 1], -1, True), ([0.2, 1], 1, True), ([0.2, 1], -1, False), ([2.5], 1, False)],
)
def test_how_many_answers_a_gain_takes_is_said_of_right_and_wrong_only(
    values: list[float], sign: int, is_share: bool
) -> None:
    assert is_share_right(Values(torch.tensor(values), torch.ones(len(values))), sign) is is_share
