"""Two groups against scipy, a published example, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from laser_callback.stats.holm import adjust
from laser_callback.stats.outcomes import Outcomes
from laser_callback.stats.unpaired import UnpairedResult, compare_groups


def shares(ones: int, n: int) -> Outcomes:
    return Outcomes.of(torch.arange(n) < ones)


@pytest.mark.parametrize(
    ("reduced", "original", "interval"),
    [  # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
    ],
)
def test_shares_have_newcombes_interval_and_fishers_p(reduced, original, interval):
    row = compare_groups("right", shares(*original), shares(*reduced))
    assert (row.lower, row.upper) == pytest.approx(interval, abs=5e-5)
    assert row.lower <= row.lower90 <= row.delta <= row.upper90 <= row.upper
    (a, n), (b, m) = original, reduced
    assert row.p == stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue
    assert (row.n_original, row.n_reduced, row.n, row.test) == (n, m, n + m, "Fisher's exact")
    assert row.higher_is_better


def test_means_have_welchs_test_and_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(3, 1, 40), rng.normal(2.4, 0.3, 25)
    row = compare_groups("loss", Outcomes(torch.tensor(before)), Outcomes(torch.tensor(after)), higher_is_better=False)
    welch = stats.ttest_ind(after, before, equal_var=False)
    assert row.p == pytest.approx(welch.pvalue)
    assert (row.lower, row.upper) == pytest.approx(tuple(welch.confidence_interval(0.95)))
    assert (row.lower90, row.upper90) == pytest.approx(tuple(welch.confidence_interval(0.9)))
    (claimed,) = adjust([row], primary="loss")
    assert isinstance(claimed, UnpairedResult)
    assert claimed.verdict == "better"


def test_a_weight_counts_a_unit_in_the_mean_and_once_in_the_variance():
    """Against the definition: documents resampled whole."""
    rng = np.random.default_rng(1)
    groups = []
    for size, mean in ((60, 3.0), (50, 3.2)):
        tokens = rng.integers(5, 200, size)
        groups.append((torch.tensor(rng.normal(mean, 0.4, size)), torch.tensor(tokens).double()))
    row = compare_groups("perplexity", *(Outcomes(*group, "log_ratio") for group in groups))
    means = [float((v * w).sum() / w.sum()) for v, w in groups]
    assert (row.original, row.reduced) == pytest.approx(tuple(np.exp(means)))
    assert row.delta == pytest.approx(math.exp(means[1] - means[0]) - 1)
    drawn = []
    for _ in range(4000):
        values = []
        for v, w in groups:
            chosen = torch.tensor(rng.integers(0, len(v), len(v)))
            values.append(float((v[chosen] * w[chosen]).sum() / w[chosen].sum()))
        drawn.append(values[1] - values[0])
    half = (math.log1p(row.upper) - math.log1p(row.lower)) / 2
    assert half == pytest.approx(1.98 * np.std(drawn), rel=0.06)


def test_the_test_keeps_its_level():
    rng = np.random.default_rng(2)
    wrong = {"binary": 0, "mean": 0}
    for _ in range(400):
        x = torch.tensor(rng.normal(size=90))
        for kind, values in (("mean", x), ("binary", (x > 0.3).double())):
            row = compare_groups("m", Outcomes(values[:60], kind=kind), Outcomes(values[60:], kind=kind))
            wrong[kind] += row.p <= 0.05
    assert wrong["binary"] <= wrong["mean"] <= 32  # 20 expected, 32 is 2.8 standard errors above


def test_what_cannot_be_tested_says_so():
    one, few, nan = torch.tensor([1.0]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([math.nan])
    for before, after, note in (
        (Outcomes(few), Outcomes(one), "3 and 1 units are too few"),
        (Outcomes(few), Outcomes(torch.cat([few, few * math.inf])), "infinite"),
        (Outcomes(one.repeat(3)), Outcomes(one.repeat(2)), "no variance"),
        (shares(1, 3), Outcomes(nan, kind="binary"), "3 and 0 units"),
    ):
        row = compare_groups("m", before, after)
        assert (row.p, row.lower, row.verdict) == (None, None, "not tested")
        assert note in row.note
    assert compare_groups("m", Outcomes(few), Outcomes(torch.cat([few, nan]))).n_reduced == 3
    with pytest.raises(ValueError, match="must have the kind"):
        compare_groups("m", Outcomes(few), shares(1, 3))


@pytest.mark.parametrize("kind", ["binary", "mean", "log_ratio"])
def test_units_of_a_cluster_are_not_independent(kind):
    """Each unit four times is as much evidence as each once, in its own group or in both."""
    rng = np.random.default_rng(2)
    before, after = (
        torch.tensor(rng.integers(0, 2, 30) if kind == "binary" else rng.normal(size=30)) for _ in range(2)
    )
    once = compare_groups("m", Outcomes(before, kind=kind), Outcomes(after, kind=kind))
    groups = [Outcomes(arm.repeat_interleave(4), kind=kind) for arm in (before, after)]
    labels = np.repeat(np.arange(30), 4).tolist()
    row = compare_groups("m", *groups, clusters=(labels, [label + 30 for label in labels]))
    assert (row.n, row.n_original, row.n_reduced, row.test, row.units) == (60, 30, 30, "cluster-robust t", "clusters")
    assert (row.original, row.reduced, row.delta) == pytest.approx((once.original, once.reduced, once.delta))
    assert row.upper - row.lower == pytest.approx(once.upper - once.lower, rel=0.15)
    alone = compare_groups("m", *groups)
    assert alone.upper - alone.lower < 0.6 * (row.upper - row.lower)
    assert row.p == pytest.approx(once.p, abs=0.2)
    assert compare_groups("m", *groups, clusters=(range(120), range(120, 240))) == alone
    both = compare_groups("m", groups[0], groups[0], clusters=(labels, labels))
    assert (both.n, both.delta) == (30, 0)


def test_clusters_that_cannot_be_tested_say_so():
    same = compare_groups("m", shares(0, 40), shares(40, 40), clusters=([0] * 20 + [1] * 20, [2] * 20 + [3] * 20))
    assert (same.p, same.test) == (stats.fisher_exact([[0, 2], [2, 0]]).pvalue, "Fisher's exact")
    one = compare_groups("m", shares(3, 9), shares(5, 9), clusters=([0] * 9, range(9)))
    assert one.p is None
    assert "1 and 9 clusters are too few" in one.note
    with pytest.raises(ValueError, match="`clusters` must have one label per unit, 9, got 2"):
        compare_groups("m", shares(3, 9), shares(5, 9), clusters=([0] * 9, [1, 2]))
