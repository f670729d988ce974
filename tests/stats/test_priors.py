"""Prior checks of answers that are few, as classes are."""

from __future__ import annotations

import numpy as np
import pytest

from laser_callback.stats import Outcomes, prior_checks


def checked(gold, before, after, weights=None, **labels):
    """The checks of two arms' classes."""
    outcomes = tuple(
        Outcomes(np.equal(gold, said).astype(float), weights, "binary" if weights is None else "mean")
        for said in (before, after)
    )
    texts = [[str(label) for label in labels_] for labels_ in (gold, before, after)]
    return prior_checks("acc", texts[0], (texts[1], texts[2]), outcomes, **labels)


def says(gold, right_of, seed):
    """For each class of two, what is said: the right one with this probability."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(gold)) < np.array(right_of)[gold], gold, 1 - gold)


GOLD = np.repeat([0, 1], 150)


def test_one_of_two_classes_got_right_more_often_is_a_gain():
    before = says(GOLD, (0.8, 0.9), 1)
    after = np.where((GOLD == 0) & (says(GOLD, (0.6, 0.0), 2) == 0), 0, before)
    checks = checked(GOLD, before, after)
    rest = checks.majority_excluded
    assert checks.evened
    assert not checks.doubt
    assert checks.where == "where each right answer counts the same"
    recalls = [[float((said[c == GOLD] == c).mean()) for c in (0, 1)] for said in (before, after)]
    assert (rest.original, rest.reduced) == pytest.approx([np.mean(of) for of in recalls])
    assert rest.n == 300
    assert rest.p < 1e-3


def test_the_more_frequent_class_said_more_often_is_none():
    gold = np.repeat([0, 1], [240, 60])
    before = says(gold, (0.7, 0.7), 1)
    after = np.where(np.random.default_rng(3).random(300) < 0.6, 0, before)  # whatever it is asked
    checks = checked(gold, before, after)
    assert checks.delta > 0.05
    assert checks.majority_excluded.delta < 0
    assert checks.doubt == "no gain is shown where each right answer counts the same"


def test_a_skewed_class_learnt_is_a_gain():
    gold = np.repeat([0, 1], [270, 30])
    before = says(gold, (0.75, 0.95), 1)
    assert not checked(gold, before, gold).doubt


def test_classes_weigh_alike_whatever_examples_weigh():
    gold = np.repeat([0, 1], [200, 100])
    weights = np.where(np.arange(300) % 2, 1.0, 3.0)
    before, after = says(gold, (0.6, 0.7), 1), says(gold, (0.8, 0.7), 2)
    rest = checked(gold, before, after, weights).majority_excluded
    recalls = [np.average((before == gold)[gold == c], weights=weights[gold == c]) for c in (0, 1)]
    assert rest.original == pytest.approx(np.mean(recalls))


def test_groups_of_two_classes_stand_beside_groups_of_many_answers():
    gold = [*("yes", "no") * 20, *(f"city {i}" for i in range(30)), *["Paris"] * 10]
    groups = ["question"] * 40 + ["city"] * 40
    before = ["no"] * 40 + ["Paris"] * 40
    outcomes = tuple(Outcomes(np.array([a == b for a, b in zip(gold, said, strict=True)])) for said in (before, gold))
    checks = prior_checks("acc", gold, (before, gold), outcomes, groups)
    assert checks.evened
    assert checks.majority_excluded.n == 40 + 30
    assert checks.majority_excluded.original == pytest.approx(20 / 70)


def test_many_answers_lose_those_said_most():
    gold = [*(f"city {i}" for i in range(30)), *["Paris"] * 10]
    outcomes = (Outcomes(np.zeros(40, bool)), Outcomes(np.array([a == "Paris" for a in gold])))
    checks = prior_checks("acc", gold, (["the"] * 40, ["Paris"] * 40), outcomes)
    assert not checks.evened
    assert checks.majority_excluded.n == 30
    assert checks.majority_excluded.delta == 0


@pytest.mark.parametrize("skew", [0.5, 0.8])
def test_shifts_of_what_is_said_are_seldom_taken_for_gains(skew):
    rng = np.random.default_rng(0)
    passed = 0
    for seed in range(400):
        gold = (rng.random(200) > skew).astype(int)
        before = says(gold, (0.7, 0.7), seed)
        after = np.where(rng.random(200) < 0.3, 0, before)
        checks = checked(gold, before, after)
        passed += checks.delta > 0 and not checks.doubt
    assert passed <= 400 * 0.05
