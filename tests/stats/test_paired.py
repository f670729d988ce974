"""python -m pytest tests/stats/test_paired.py

Every number is compared with a published value, with scipy, or with a slow computation of another kind.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from laser_callback.stats.holm import adjust
from laser_callback.stats.outcomes import Outcomes, PairedResult, not_tested
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import MacroAccuracy, prior_checks

NAN = float("nan")


def table(both: int, broken: int, fixed: int, neither: int, **options) -> PairedResult:
    """The row of a paired 2x2 table, given by its four counts."""
    original = torch.tensor([1.0] * (both + broken) + [0.0] * (fixed + neither))
    reduced = torch.tensor([1.0] * both + [0.0] * broken + [1.0] * fixed + [0.0] * neither)
    return compare("acc", Outcomes(original, kind="binary"), Outcomes(reduced, kind="binary"), **options)


def mean_pair(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(n, generator=generator, dtype=torch.float64)
    return original, original + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64) + 0.1


def test_newcombe_interval_equals_published_values():
    # Cavo et al. (2012), from the tests of the R package contingencytables, chapter 8, which subtracts the other way
    # round. Without the continuity correction of phi the interval is -0.1174 to -0.0059.
    row = table(59, 6, 16, 80)
    assert [round(-x, 4) for x in (row.delta, row.upper, row.lower)] == [-0.0621, -0.1186, -0.0046]
    assert row.p == pytest.approx(0.052479, abs=5e-7)
    assert (row.fixed, row.broken, row.n, row.test) == (16, 6, 161, "exact McNemar")


def test_newcombe_bounds_of_one_side_equal_a_computation_by_roots():
    # Each Wilson end is a root of the score equation |p - s| = z sqrt(s (1 - s) / n), found here numerically.
    a, broken, fixed, d = 59, 6, 16, 80
    row, n, z = table(a, broken, fixed, d), a + broken + fixed + d, stats.norm.ppf(0.95)

    def wilson(p: float) -> tuple[float, float]:
        def score(s: float) -> float:
            return (p - s) ** 2 - z * z * s * (1 - s) / n

        return optimize.brentq(score, 0, p), optimize.brentq(score, p, 1)

    after, before = (a + fixed) / n, (a + broken) / n
    (low2, high2), (low1, high1) = wilson(after), wilson(before)
    phi = (a * d - fixed * broken - n / 2) / math.sqrt((a + fixed) * (broken + d) * (a + broken) * (fixed + d))

    def reach(x: float, y: float) -> float:
        return math.sqrt(x * x - 2 * phi * x * y + y * y)

    expected = (row.delta - reach(after - low2, high1 - before), row.delta + reach(high2 - after, before - low1))
    assert (row.lower90, row.upper90) == pytest.approx(expected, abs=1e-9)
    assert row.lower < row.lower90 < row.upper90 < row.upper


def test_newcombe_interval_covers_and_wald_does_not():
    # Exact coverage: the probability of every table of 15 pairs times whether its interval holds the true difference.
    n = 15
    counts = [(a, b, c, n - a - b - c) for a, b, c in product(range(n + 1), repeat=3) if a + b + c <= n]
    bounds = np.array([(row.lower, row.upper) for row in (table(*cells) for cells in counts)])
    assert np.abs(bounds).max() <= 1 + 1e-12
    cells = np.array(counts)
    delta = (cells[:, 2] - cells[:, 1]) / n
    half = 1.96 * np.sqrt(cells[:, 1] + cells[:, 2] - n * delta**2) / n
    for truth in [(0.6, 0.05, 0.15, 0.2), (0.1, 0.05, 0.05, 0.8), (0.3, 0.1, 0.3, 0.3), (0.25, 0.25, 0.25, 0.25)]:
        chance, true_delta = stats.multinomial.pmf(cells, n, truth), truth[2] - truth[1]
        newcombe = chance[(bounds[:, 0] <= true_delta) & (true_delta <= bounds[:, 1])].sum()
        wald = chance[(delta - half <= true_delta) & (true_delta <= delta + half)].sum()
        assert newcombe >= 0.93
        assert newcombe > wald


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (1, 0), (0, 6), (5, 5), (9, 2), (32, 2)])
def test_exact_mcnemar_equals_binomial_sum(fixed: int, broken: int):
    row = table(3, broken, fixed, 4)
    n, tail = fixed + broken, range(min(fixed, broken) + 1)
    assert row.p == pytest.approx(min(1.0, 2 * sum(math.comb(n, k) for k in tail) / 2**n))
    swapped = table(3, fixed, broken, 4)
    assert (row.lower, row.upper) == pytest.approx((-swapped.upper, -swapped.lower))


def test_direction_of_binary_outcomes_decides_what_is_fixed():
    row = adjust([table(5, 1, 12, 2, higher_is_better=False)], primary="acc")[0]
    assert (row.fixed, row.broken, row.verdict) == (1, 12, "worse")
    assert row.delta == pytest.approx(11 / 20)


def test_mean_equals_scipy_and_weights_of_one_change_nothing():
    original, reduced = mean_pair(40, seed=0)
    expected = stats.ttest_rel(reduced, original)
    interval = expected.confidence_interval(0.95)
    row = compare("loss", Outcomes(original), Outcomes(reduced))
    ones = torch.ones(40)
    weighted = compare("loss", Outcomes(original, ones), Outcomes(reduced, ones))
    for result, test in ((row, "paired t"), (weighted, "cluster-robust t")):
        assert (result.lower, result.upper, result.p) == pytest.approx((*interval, expected.pvalue), rel=1e-10)
        for end, side in ((result.upper90, "less"), (result.lower90, "greater")):  # one-sided 95 % bounds
            one_sided = stats.ttest_rel(reduced, original, alternative=side).confidence_interval(0.95)
            assert end == pytest.approx(one_sided.high if side == "less" else one_sided.low, rel=1e-10)
        assert result.test == test
    assert row.delta == pytest.approx(row.reduced - row.original)


def test_clusters_are_the_units_of_unweighted_values():
    original, reduced = mean_pair(30, seed=1)
    facts = [f"fact {i // 3}" for i in range(30)]
    for before, after, kind in ((original, reduced, "mean"), (original > 0, reduced > 0, "binary")):
        row = compare("m", Outcomes(before, kind=kind), Outcomes(after, kind=kind), clusters=facts)
        expected = stats.ttest_rel(*(x.double().view(10, 3).mean(1) for x in (after, before)))
        assert (row.n, row.test, row.fixed) == (10, "paired t", None)
        assert row.p == pytest.approx(expected.pvalue, rel=1e-10)
    # A cluster of one is a unit, so the exact test stands.
    assert table(3, 1, 7, 4, clusters=list(range(15))) == table(3, 1, 7, 4)


def test_perplexity_ratio_agrees_with_cluster_bootstrap():
    rng = np.random.default_rng(2)
    documents = np.repeat(np.arange(80), rng.integers(1, 6, 80))
    tokens = rng.integers(20, 200, len(documents)).astype(float)
    original = rng.normal(3.0, 0.5, len(documents))
    reduced = original + 0.03 + rng.normal(0, 0.1, 80)[documents] + rng.normal(0, 0.05, len(documents))
    arms = [Outcomes(torch.tensor(nll), torch.tensor(tokens), "log_ratio") for nll in (original, reduced)]
    row = compare("perplexity", *arms, clusters=documents.tolist())

    assert row.original == pytest.approx(math.exp((tokens * original).sum() / tokens.sum()))
    assert row.delta == pytest.approx(row.reduced / row.original - 1)
    assert (row.n, row.test, row.higher_is_better) == (80, "cluster-robust t", False)
    weight = np.bincount(documents, tokens)
    total = np.bincount(documents, tokens * (reduced - original))
    draws = rng.integers(0, 80, (4000, 80))
    bootstrap = (total[draws].sum(1) / weight[draws].sum(1)).std()
    for level, lower, upper in ((0.95, row.lower, row.upper), (0.9, row.lower90, row.upper90)):
        ratio = math.log1p(upper) - math.log1p(row.delta), math.log1p(row.delta) - math.log1p(lower)
        assert ratio == pytest.approx([stats.t.ppf((1 + level) / 2, 79) * bootstrap] * 2, rel=0.06)
    unclustered = compare("perplexity", *arms)
    assert unclustered.delta == pytest.approx(row.delta)
    assert unclustered.upper - unclustered.lower < 0.9 * (row.upper - row.lower)  # pretends to know more than it does


@pytest.mark.parametrize("clusters", [None, ["a", "a", "b"]])
@pytest.mark.parametrize("kind", ["binary", "mean", "log_ratio"])
def test_without_a_unit_in_both_arms_there_is_no_test(kind, clusters):
    nothing, some = Outcomes(torch.full((3,), NAN), kind=kind), Outcomes(torch.tensor([1.0, NAN, 0.0]), kind=kind)
    row = compare("m", some, nothing, clusters=clusters, higher_is_better=True)
    assert (row.test, row.n, row.p, row.lower90, row.verdict) == ("not tested", 0, None, None, "not tested")
    assert (
        row.note
        == "no unit has a value in both arms: 2 of 3 and 0 of 3 have one in the original and in the reduced model"
    )
    assert row.original == pytest.approx(math.exp(0.5) if kind == "log_ratio" else 0.5)
    assert math.isnan(row.reduced)
    assert math.isnan(row.delta)
    assert adjust([row], primary="m")[0].verdict == "not tested"
    assert "0 of 3 and 0 of 3" in compare("m", nothing, nothing).note
    assert compare("m", Outcomes(torch.zeros(0)), Outcomes(torch.zeros(0))).n == 0


def test_absent_units_are_dropped_pairwise():
    original, reduced = torch.tensor([1.0, NAN, 2.0, 3.0, NAN]), torch.tensor([2.0, 1.0, NAN, 7.0, NAN])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, NAN])
    row = compare("m", Outcomes(original, weights), Outcomes(reduced, weights))
    kept = [0, 3]
    expected = compare("m", Outcomes(original[kept], weights[kept]), Outcomes(reduced[kept], weights[kept]))
    assert row == replace(expected, note="2 of 5 units dropped: absent in one arm only")


def test_what_cannot_be_tested_says_so():
    values = torch.linspace(0.1, 7.3, 9)
    same = compare("m", Outcomes(values), Outcomes(values.clone()))
    assert (same.delta, same.lower, same.upper, same.p) == (0.0, 0.0, 0.0, 1.0)
    shifted = compare("m", Outcomes(values.double()), Outcomes(values.double() + 0.1))  # rounds differently per unit
    single = compare("m", Outcomes(values[:1]), Outcomes(values[1:2]))
    infinite = compare("m", Outcomes(values), Outcomes(values / 0))
    for row in (shifted, single, infinite):
        assert (row.verdict, row.lower, row.upper90, row.lower90, row.p) == ("not tested", None, None, None, None)
        assert row.note
    assert shifted.delta == pytest.approx(0.1)
    broken = not_tested("f1", 0.5, NAN, 9, "F1 is not a mean over units")
    json.loads(json.dumps([row.to_dict() for row in (same, shifted, infinite, broken)], allow_nan=False))
    assert (broken.to_dict()["reduced"], broken.to_dict()["verdict"]) == (None, "not tested")


def test_holm_by_hand_and_roles():
    base = replace(table(5, 1, 9, 5), test="paired t", delta=0.1, higher_is_better=True)
    rows = [replace(base, metric=m, p=p) for m, p in zip("abcd", (0.01, 0.04, 0.03, 0.005), strict=True)]
    rows.append(not_tested("f1", 0.5, 0.6, 9, "F1 is not a mean over units"))
    holm = adjust(rows, primary=None)
    assert [row.p_adjusted for row in holm] == pytest.approx([0.03, 0.06, 0.06, 0.02, None])
    assert [row.verdict for row in holm] == ["better", *["no difference shown"] * 2, "better", "not tested"]
    claimed = adjust(rows, primary="b")
    assert [row.role for row in claimed] == ["holm", "primary", "holm", "holm", "exploratory"]
    assert [row.p_adjusted for row in claimed] == pytest.approx([0.02, None, 0.03, 0.015, None])
    assert claimed[1].verdict == "better"
    assert replace(claimed[1], higher_is_better=False).verdict == "worse"
    assert replace(claimed[1], higher_is_better=None).verdict == "higher"
    assert rows[0].verdict == "exploratory"
    with pytest.raises(ValueError, match=r"'x'.*'a', 'b', 'c', 'd', 'f1'"):
        adjust(rows, primary="x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Outcomes(torch.zeros(2, 2)), "`values` must be 1-D"),
        (lambda: Outcomes(torch.tensor([0.0, 0.5]), kind="binary"), "got 0.5"),
        (lambda: Outcomes(torch.zeros(3), torch.ones(2)), "got 2 for 3"),
        (lambda: Outcomes(torch.zeros(2), torch.tensor([1.0, 0.0])), "`weights` must be positive"),
        (lambda: Outcomes(torch.zeros(2), kind="median"), "'median'"),
        (lambda: compare("m", Outcomes(torch.zeros(2)), Outcomes(torch.zeros(3))), "same units"),
        (lambda: compare("m", Outcomes(torch.zeros(2)), Outcomes(torch.zeros(2), torch.ones(2))), "weights"),
        (lambda: compare("m", Outcomes(torch.zeros(2)), Outcomes.of(torch.ones(2) > 0)), "kind"),
        (lambda: compare("m", Outcomes(torch.zeros(2)), Outcomes(torch.zeros(2)), clusters=["a"]), "`clusters`"),
        (lambda: prior_checks(["a"], ["a"], ["a", "b"], [1], [1]), r"\[1, 2, 1, 1, 1\]"),
    ],
)
def test_bad_input_is_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_prior_checks_by_hand():
    # Two groups; the reduced model's gain in "capital" is real, that in "currency" is saying euro to everything.
    groups = ["capital"] * 6 + ["currency"] * 6
    answers = ["Rome", "Oslo", "Bern", "Riga", "Kyiv", "Lima"] + ["euro"] * 5 + ["yen"]
    original = ["the"] * 6 + ["a"] * 6
    reduced = ["Rome", "Oslo", "Bern", "the", "the", "the"] + ["euro"] * 6
    right = [[gold == said for gold, said in zip(answers, arm, strict=True)] for arm in (original, reduced)]
    checks = prior_checks(answers, original, reduced, np.array(right[0]), torch.tensor(right[1]), groups)
    assert checks.delta == pytest.approx(8 / 12)
    assert checks.constant_answer == pytest.approx((1 + 5) / 12)
    rest = checks.majority_excluded
    assert (rest.n, rest.fixed, rest.broken) == (7, 3, 0)  # 6 capitals and the yen
    assert checks.macro == MacroAccuracy(original=0.0, reduced=1.0, delta=1.0, answers=1, n=5)
    assert checks.entropy["original"] == pytest.approx(math.log(2))
    assert checks.top_predictions["reduced"] == [("euro", 6), ("the", 3), ("Bern", 1), ("Oslo", 1), ("Rome", 1)]
    assert checks.prior_shift  # 3 of 7 does not exclude 0
    json.dumps(checks.to_dict(), allow_nan=False)

    # Ten times the capitals, and Rome as often again: enough to show a gain, and Rome weighs no more for it in macro.
    often = [column[:6] * 10 + column[:1] * 10 for column in (answers, original, reduced, *right)]
    many = prior_checks(*often)
    assert not many.prior_shift
    assert (many.macro.reduced, many.macro.answers, many.macro.n) == (pytest.approx(0.5), 6, 70)
    # The same gain with "euro" alone: nothing is left to show it on, and that is flagged.
    only = prior_checks(answers[6:11], original[6:11], reduced[6:11], right[0][6:11], right[1][6:11])
    assert (only.majority_excluded, only.prior_shift) == (None, True)
    # A loss is never a prior shift.
    assert not prior_checks(answers, reduced, original, right[1], right[0], groups).prior_shift
