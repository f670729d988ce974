"""Racing: the schedule, who goes on, who is chosen; against brute force and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from laser_callback.compare.measure import Values
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.race import Objective, choose, estimate, improved, order, paired, schedule

ACCURACY = Objective(("accuracy",), (1,), "loss")


def values(numbers, weights=None) -> Values:
    numbers = torch.as_tensor(np.asarray(numbers), dtype=torch.float64)
    return Values(numbers, torch.ones_like(numbers) if weights is None else torch.as_tensor(weights).double())


def table(right: dict, loss: dict):
    return {arm: {"accuracy": values(right[arm]), "loss": values(loss[arm])} for arm in right}


@pytest.mark.parametrize("examples", [1, 20, 47, 100, 300, 1000])
@pytest.mark.parametrize("candidates", [1, 2, 6, 7, 48, 2000])
def test_schedule_spends_all_examples_and_ends_with_the_finalists(examples, candidates):
    rungs = schedule(examples, candidates, finalists=6)
    assert sum(rung.examples for rung in rungs) == examples
    assert all(rung.examples > 0 for rung in rungs)
    assert rungs[-1].keep == min(6, candidates)
    assert [rung.keep for rung in rungs] == sorted((rung.keep for rung in rungs), reverse=True)
    if len(rungs) > 1:
        assert rungs[0].examples >= 24
        assert rungs[0].keep < candidates


def test_schedule_costs_a_fraction_of_running_all_on_all():
    alive, cost = 48, 0
    for rung in schedule(300, 48):
        cost += rung.examples * alive
        alive = rung.keep
    assert cost <= 300 * 48 / 3


def test_schedule_refuses_nothing_to_run():
    with pytest.raises(ValueError, match="`examples` must be at least 1, got 0"):
        schedule(0, 4)


def test_order_lets_the_best_by_either_measure_through():
    n = 100
    right = {
        ORIGINAL: np.zeros(n),
        "a": np.r_[np.ones(30), np.zeros(70)],
        "b": np.zeros(n),
        "c": np.r_[1, np.zeros(99)],
    }
    loss = {ORIGINAL: np.ones(n), "a": np.full(n, 1.5), "b": np.full(n, 0.2), "c": np.full(n, 0.9)}
    assert order(ACCURACY, table(right, loss), ["a", "b", "c"]) == ["b", "a", "c"]
    without_loss = Objective(("accuracy",), (1,))
    assert order(without_loss, table(right, loss), ["a", "b", "c"]) == ["a", "c", "b"]


def test_not_finite_goes_last():
    right = {ORIGINAL: np.zeros(4), "nan": np.zeros(4), "inf": np.zeros(4), "fine": np.zeros(4)}
    loss = {ORIGINAL: np.ones(4), "nan": np.full(4, np.nan), "inf": np.full(4, np.inf), "fine": np.full(4, 2.0)}
    assert order(ACCURACY, table(right, loss), ["nan", "inf", "fine"])[0] == "fine"


def test_choose_takes_the_lowest_loss_among_those_within_one_standard_error():
    n = 100
    best = np.r_[np.ones(30), np.zeros(70)]
    near = np.r_[np.zeros(5), np.ones(29), np.zeros(66)]
    far = np.r_[np.ones(10), np.zeros(90)]
    right = {ORIGINAL: np.zeros(n), "best": best, "near": near, "far": far}
    loss = {ORIGINAL: np.ones(n), "best": np.full(n, 0.9), "near": np.full(n, 0.5), "far": np.full(n, 0.1)}
    assert choose(ACCURACY, table(right, loss), ["best", "near", "far"]) == "near"
    assert choose(Objective(("accuracy",), (1,)), table(right, loss), ["best", "near", "far"]) == "best"


def test_what_the_loss_cannot_tell_apart_is_decided_by_the_tie():
    n = 100
    objective = Objective(("accuracy",), (1,), "loss", "tie")
    right = {arm: np.r_[np.ones(30), np.zeros(70)] for arm in ("sharp", "level", "worse")} | {ORIGINAL: np.zeros(n)}
    noise = np.where(np.arange(n) % 2, 0.2, -0.2)  # its standard error is 0.02
    loss = {ORIGINAL: np.ones(n), "sharp": np.full(n, 0.5), "level": 0.51 + noise, "worse": np.full(n, 0.6)}
    ties = {ORIGINAL: 9.0, "sharp": 3.0, "level": 2.0, "worse": 1.0}
    arms = table(right, loss)
    for arm, tie in ties.items():
        arms[arm]["tie"] = values(np.full(n, tie))
    assert choose(objective, arms, ["sharp", "level", "worse"]) == "level"
    assert choose(ACCURACY, arms, ["sharp", "level", "worse"]) == "sharp"
    assert objective.measured == ("accuracy", "loss", "tie")


def test_direction_and_several_keys():
    objective = Objective(("a", "b"), (1, -1))
    base = {"a": values([0.0, 1.0, 0.0]), "b": values([3.0, 3.0, np.nan])}
    arm = {"a": values([1.0, 1.0, 1.0]), "b": values([1.0, 4.0, np.nan])}
    gain = objective.gain({ORIGINAL: base, "x": arm}, "x")
    assert gain.values.tolist() == [(1 + 2) / 2, (0 - 1) / 2, 1.0]  # a unit without a value of one key has the other


def test_keys_of_different_units_are_refused():
    objective = Objective(("a", "b"), (1, 1))
    arms = {"a": values([0.0, 1.0]), "b": values([0.0])}
    with pytest.raises(ValueError, match="different units"):
        objective.gain({ORIGINAL: arms, "x": arms}, "x")


def test_estimate_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    change = rng.normal(0.3, 1, 50)
    found = estimate(values(change))
    low, high = stats.t.interval(0.95, 49, change.mean(), stats.sem(change))
    assert (found.delta, found.lower, found.upper) == pytest.approx((change.mean(), low, high))
    assert paired(values(change)).p == pytest.approx(stats.ttest_1samp(change, 0).pvalue)


def test_batches_count_by_their_size():
    found = estimate(values([1.0, 0.0], weights=[3.0, 1.0]))
    assert found.delta == 0.75


def test_the_true_best_is_rarely_lost():
    """The default race on 300 examples, 48 candidates: one is right 5 points more often, 47 are like the original."""
    rng = np.random.default_rng(1)
    lost = wrong = 0
    trials = 60
    for _ in range(trials):
        arms = [f"c{i}" for i in range(48)]
        base = rng.random(300) < 0.3
        right, loss = {ORIGINAL: base}, {ORIGINAL: np.where(base, 1.0, 3.0)}
        for i, arm in enumerate(arms):
            flips = rng.random(300)
            p_fix, p_break = (0.13, 0.05) if i == 17 else (0.06, 0.14)
            right[arm] = np.where(base, flips > p_break, flips < p_fix)
            loss[arm] = loss[ORIGINAL] + rng.normal(-0.1 if i == 17 else 0.0, 0.8, 300)
        whole = table({a: r.astype(float) for a, r in right.items()}, loss)
        alive, begin = arms, 0
        for rung in schedule(300, 48):
            begin += rung.examples
            seen = {
                arm: {key: Values(v.values[:begin], v.weights[:begin]) for key, v in whole[arm].items()}
                for arm in whole
            }
            alive = order(ACCURACY, seen, alive)[: rung.keep]
        lost += "c17" not in alive
        wrong += choose(ACCURACY, whole, alive) != "c17"
    assert lost / trials <= 0.1
    assert wrong / trials <= 0.3


def test_a_change_counts_whole_clusters():
    """Each cluster four times is as much evidence as each once."""
    change = torch.tensor([0.3, 0.1, -0.1, 0.2, 0.4], dtype=torch.float64)
    once, repeated = Values(change, torch.ones(5)), change.repeat_interleave(4)
    clusters = torch.arange(5).repeat_interleave(4)
    row = paired(Values(repeated, torch.ones(20).double(), clusters=clusters))
    assert (row.n, row.p) == (5, pytest.approx(paired(once).p))
    assert paired(Values(repeated, torch.ones(20).double())).p < 0.01 < 0.05 < row.p
    parts = Values.join([Values(repeated, torch.ones(20), clusters=clusters)] * 2)
    assert paired(parts).n == 5
    assert Values.join([once, parts]).clusters is None


def test_a_further_cut_must_improve_by_the_loss_on_fresh_clusters():
    def of(change, right, clusters=None):
        none = np.zeros(len(change))
        arms = {ORIGINAL: (none, none), "cut": (right, change)}
        return {
            arm: {
                key: Values(*(values(one).values, torch.ones(len(one)).double()), clusters=clusters) for key, one in row
            }
            for arm, row in ((arm, zip(("accuracy", "loss"), pair, strict=True)) for arm, pair in arms.items())
        }

    losses = -np.repeat([0.3, 0.1, -0.1, 0.2, 0.4], 4)
    clusters, right = torch.arange(5).repeat_interleave(4), np.zeros(20)
    chosen_by = of(losses, right)
    assert improved(ACCURACY, chosen_by, of(losses, right), ["cut"]) == ["cut"]
    assert improved(ACCURACY, chosen_by, of(losses, right, clusters), ["cut"]) == []
    assert improved(ACCURACY, chosen_by, of(losses, right - 1), ["cut"]) == []
    assert improved(ACCURACY, chosen_by, of(-losses, right), ["cut"]) == []
