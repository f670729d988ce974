"""Metrics of pooled states: the interval and the test held against what they must be, and what cannot be tested."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from laser_callback.stats import Outcomes, compare, compare_pooled
from laser_callback.stats.pooled import DRAWS, LISTED, flipped_p


def mean_of(before, after, sizes):
    """The mean over examples of batches whose sums and sizes are these."""

    def pool(original, reduced):
        return float((original @ before + reduced @ after) / (original @ sizes + reduced @ sizes))

    return pool


def f1_of(before, after):
    """F1 of batches whose counts, (B, 3), are true positives, false positives and false negatives."""

    def pool(original, reduced):
        tp, fp, fn = original @ before + reduced @ after
        return float(2 * tp / (2 * tp + fp + fn))

    return pool


def exchanged(pool, n):
    """The difference of the arms for each way to exchange them batch by batch."""
    for signs in itertools.product((0.0, 1.0), repeat=n):
        kept = 1 - np.array(signs)
        yield pool(1 - kept, kept) - pool(kept, 1 - kept)


def counts(seed, n=8):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 20, (n, 3)), rng.integers(1, 20, (n, 3))


def test_of_a_mean_it_is_the_interval_and_test_of_a_mean():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=9), rng.normal(0.4, 1.0, 9)
    row = compare_pooled("m", mean_of(before, after, np.ones(9)), np.arange(9))
    plain = compare("m", Outcomes.of(before), Outcomes.of(after))
    assert (row.delta, row.original, row.reduced) == pytest.approx((plain.delta, plain.original, plain.reduced))
    # Where p is above .1 the ends are let out to 0.
    assert (min(plain.lower, 0), max(plain.upper, 0)) == pytest.approx((row.lower, row.upper))
    signs = np.array(list(itertools.product((-1, 1), repeat=9)))
    sums = np.abs(signs @ (after - before))
    assert row.p == pytest.approx((sums >= abs((after - before).sum()) - 1e-9).mean())
    assert (row.kind, row.unit, row.n, row.test) == ("pooled", "batch", 9, "paired permutation")


def test_unequal_batches_have_the_jackknife_of_the_whole():
    sizes = np.array([4.0, 4.0, 4.0, 1.0])
    before, after = np.array([2.0, 1.0, 3.0, 0.0]), np.array([40.0, 30.0, 52.0, 9.0])
    row = compare_pooled("m", mean_of(before, after, sizes), np.arange(4))
    d, w = (after - before) / sizes, sizes
    without = [np.average(np.delete(d, i), weights=np.delete(w, i)) for i in range(4)]
    error = np.sqrt(3 / 4 * ((np.array(without) - np.average(d, weights=w)) ** 2).sum())
    assert row.upper == pytest.approx(row.delta + stats.t.ppf(0.975, 3) * error)
    assert row.upper90 == pytest.approx(row.delta + stats.t.ppf(0.95, 3) * error)
    assert row.p == 0.125  # all rise: two of 16
    assert row.lower <= 0  # so that four batches show nothing


@pytest.mark.parametrize("seed", range(4))
def test_p_of_f1_is_close_to_that_of_exchanging_whole_batches(seed):
    pool = f1_of(*counts(seed))
    row = compare_pooled("f1", pool, np.arange(8))
    all_ = np.abs(list(exchanged(pool, 8)))
    assert row.p == pytest.approx((all_ >= abs(row.delta) - 1e-12).mean(), abs=0.05)
    assert row.lower <= row.delta <= row.upper


def test_exchanging_arms_turns_the_row_round():
    before, after = counts(5)
    one = compare_pooled("f1", f1_of(before, after), np.arange(8))
    other = compare_pooled("f1", f1_of(after, before), np.arange(8))
    assert one.p == other.p
    assert (one.lower, one.upper, one.delta) == pytest.approx((-other.upper, -other.lower, -other.delta))


def test_no_batch_changes_the_sign_of_another():
    """What makes the test exact: exchanging the arms of some batches flips the signs of these only."""
    before, after = counts(7)
    p = compare_pooled("f1", f1_of(before, after), np.arange(8)).p
    ps = []
    for signs in itertools.product((False, True), repeat=8):
        turned = np.array(signs)[:, None]
        pool = f1_of(np.where(turned, after, before), np.where(turned, before, after))
        ps.append(compare_pooled("f1", pool, np.arange(8)).p)
    assert p in ps
    for level in (0.05, 0.1, 0.5):  # of all that the batches may have been, exactly so many are as far out
        assert np.mean(np.array(ps) <= level) <= level


def test_few_batches_are_told():
    before, after = counts(1)
    told = "this test cannot show less than p"
    eight = compare_pooled("f1", f1_of(before, after), np.arange(8))
    how = "unit: the batch; permutation test, interval by the jackknife"
    assert eight.note == f"{how}; 8 batches: {told} = .0078"
    four = compare_pooled("f1", f1_of(before[:4], after[:4] + 50), np.arange(4))
    assert four.p >= 0.125
    assert four.lower <= 0 <= four.upper
    many = compare_pooled("f1", f1_of(*counts(1, 12)), np.arange(12))
    assert told in four.note
    assert told not in many.note


def test_what_cannot_be_tested():
    before, after = counts(2)
    one = compare_pooled("f1", f1_of(before[:1], after[:1]), np.zeros(1, np.int64))
    assert (one.test, one.kind, one.note) == ("not tested", "pooled", "one batch has no variance")
    assert one.delta == pytest.approx(one.reduced - one.original)

    def needs_first(original, reduced):
        return f1_of(before, after)(original, reduced) if original[0] + reduced[0] else float("nan")

    row = compare_pooled("f1", needs_first, np.arange(8))
    assert (row.p, row.lower) == (None, None)
    assert row.note == "unit: the batch; without some of the batches it has no value"

    shifted = mean_of(np.zeros(5), np.ones(5), np.ones(5))
    assert compare_pooled("m", shifted, np.arange(5)).note.endswith("all units differ by the same amount: no variance")


def test_arms_that_are_the_same():
    before, _ = counts(3)
    row = compare_pooled("f1", f1_of(before, before), np.arange(8))
    assert (row.delta, row.lower, row.upper, row.p) == (0, 0, 0, 1)


def test_many_units_are_taken_in_groups():
    rng = np.random.default_rng(0)
    before = rng.normal(size=1000)
    after = before + rng.normal(0.1, 1.0, 1000)
    calls = []

    def pool(original, reduced):
        calls.append(1)
        return mean_of(before, after, np.ones(1000))(original, reduced)

    row = compare_pooled("m", pool, np.arange(1000), unit="example")
    assert len(calls) == 402
    assert row.n == 1000
    assert row.note == "1,000 examples in 100 groups; permutation test, interval by the jackknife"
    plain = compare("m", Outcomes.of(before), Outcomes.of(after))
    assert row.p == pytest.approx(plain.p, abs=0.02)
    assert row.upper - row.lower == pytest.approx(plain.upper - plain.lower, rel=0.25)


def test_signs_that_are_drawn():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.5, 1.0, LISTED + 6)
    drawn = flipped_p(differences, seed=0)
    assert drawn == flipped_p(differences, seed=0) != flipped_p(differences, seed=1)
    assert drawn == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert flipped_p(np.ones(50), seed=0) == 1 / (1 + DRAWS)
    assert flipped_p(np.ones(LISTED), seed=0) == 2 ** (1 - LISTED)
