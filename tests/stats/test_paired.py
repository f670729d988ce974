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

from laser_callback.stats.gain import Gain
from laser_callback.stats.holm import adjust
from laser_callback.stats.intervals import score_interval, sign_flip_p
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


@pytest.mark.parametrize(("broken", "fixed", "rest"), [(6, 16, 139), (0, 0, 60), (3, 0, 17), (1, 30, 9), (40, 60, 300)])
def test_score_interval_is_where_the_score_test_rejects(broken: int, fixed: int, rest: int):
    """Tango's test from its definition: the shares of highest likelihood under each difference, found numerically."""
    n = broken + fixed + rest
    row = table(rest, broken, fixed, 0)

    def statistic(d: float) -> float:
        def minus_log_likelihood(lost: float) -> float:
            cells = (lost, lost + d, 1 - 2 * lost - d)
            return -sum(
                count * math.log(max(share, 1e-300))
                for count, share in zip((broken, fixed, rest), cells, strict=True)
                if count
            )

        bounds = max(0.0, -d), (1 - d) / 2
        lost = optimize.minimize_scalar(
            minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x
        return (fixed - broken - n * d) / math.sqrt(n * (2 * lost + d - d * d))

    for ends, level in (((row.lower, row.upper), 0.95), ((row.lower90, row.upper90), 0.9)):
        z = stats.norm.ppf((1 + level) / 2)
        for end, sign in zip(ends, (1, -1), strict=True):
            if end == 0.0:
                assert row.p > 1 - level, "moved to where the exact test stops"
                continue
            corrected = sign * (fixed - broken - n * end) - 0.5
            sd = abs((fixed - broken - n * end) / statistic(end))
            assert corrected / sd == pytest.approx(z, abs=2e-4)
    assert (row.fixed, row.broken, row.n, row.test) == (fixed, broken, n, "exact McNemar")


@pytest.mark.parametrize("n", [20, 59, 134, 353, 1000])
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.2])
def test_a_bound_is_passed_by_at_most_five_percent_of_what_should_not(n: int, margin: float):
    """Exact level, by enumeration, of the models that lose exactly the margin, whatever share of answers changes."""
    most = min(n, round(n * 0.6) + 40)
    lost = np.arange(most + 1)
    passes = np.zeros_like(lost)  # the fewest that must be gained
    for i in lost:
        gained = passes[i - 1] if i else 0
        while gained <= n - i and -score_interval(gained, i, n, 0.9)[0] > margin:
            gained += 1
        passes[i] = gained
    worst = 0.0
    for changed in np.linspace(margin, 0.5, 40):
        p_lost, p_gained = (changed + margin) / 2, (changed - margin) / 2
        beyond = stats.binom.sf(passes - 1, n - lost, p_gained / (1 - p_lost))
        worst = max(worst, float((stats.binom.pmf(lost, n, p_lost) * beyond).sum()))
    assert worst <= 0.05
    assert worst >= 0.02 or n * margin < 3, "or nothing would ever pass"


def test_no_interval_says_more_than_the_exact_test():
    for broken, fixed in product(range(12), range(40)):
        row = table(30, broken, fixed, 30)
        for lower, upper, alpha in ((row.lower, row.upper, 0.05), (row.lower90, row.upper90, 0.1)):
            assert (lower > 0 or upper < 0) == (row.p <= alpha)


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


def test_clusters_are_the_units():
    original, reduced = mean_pair(30, seed=1)
    facts = [f"fact {i // 3}" for i in range(30)]
    row = compare("m", Outcomes(original), Outcomes(reduced), clusters=facts)
    expected = stats.ttest_rel(*(x.view(10, 3).mean(1) for x in (reduced, original)))
    assert (row.n, row.test, row.fixed) == (10, "cluster-robust t", None)
    assert row.p == pytest.approx(expected.pvalue, rel=1e-10)
    # A cluster of one is a unit, so the exact test stands.
    assert table(3, 1, 7, 4, clusters=list(range(15))) == table(3, 1, 7, 4)


def test_the_mean_is_over_examples_whatever_the_clusters():
    subjects = [0] * 8 + [1, 2]
    before, after = np.zeros(10, bool), np.array([True] * 8 + [False] * 2)
    for kind in ("binary", "mean"):
        arms = (Outcomes(x.astype(float), kind=kind) for x in (before, after))
        row = compare("m", *arms, clusters=subjects)
        assert (row.delta, row.n) == (0.8, 3)
    row = compare("m", Outcomes.of(before), Outcomes.of(after), clusters=subjects)
    assert (row.fixed, row.broken, row.test, row.p) == (8, 0, "exact cluster sign flip", 1.0)


def test_sign_flips_are_all_of_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sums = rng.integers(-3, 4, 9)
        flips = np.array(list(product([1, -1], repeat=9))) @ sums
        assert sign_flip_p(sums) == pytest.approx(float(np.mean(np.abs(flips) >= abs(sums.sum()))))
    assert sign_flip_p(np.array([1] * 9 + [-1] * 2)) == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert sign_flip_p(np.zeros(3, np.int64)) == 1.0


def test_repeating_each_unit_changes_nothing_that_is_claimed():
    """Copies under one cluster are worth one unit: the counts, p and, but for Student's t, the interval say so."""
    once, copies = table(30, 4, 16, 50), 5
    outcomes = [np.repeat(x, copies) for x in (np.r_[[1] * 34, [0] * 66], np.r_[[1] * 30, [0] * 4, [1] * 16, [0] * 50])]
    arms = [Outcomes(x.astype(float), kind="binary") for x in outcomes]
    row = compare("acc", *arms, clusters=np.repeat(np.arange(100), copies).tolist())
    assert (row.n, row.fixed, row.broken, row.delta) == (100, 80, 20, pytest.approx(once.delta))
    assert row.p == pytest.approx(once.p)
    assert (row.lower90, row.upper90) == pytest.approx((once.lower90, once.upper90), abs=3e-3)
    alone = compare("acc", *arms)
    assert alone.p < row.p / 100


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
        (lambda: checked(["a"], ["a"], ["a", "b"], [1.0], [1.0]), r"\[1, 2, 1, 1\]"),
        (lambda: checked(["a"], ["a"], ["a"], [1.0], [float("nan")]), "at least one example"),
        (lambda: prior_checks("m", ["a"], (["a"], ["a"]), (Outcomes(np.ones(1)), Outcomes(np.array([2.0])))), "got 2"),
    ],
)
def test_bad_input_is_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def checked(answers, before, after, right_before, right_after, groups=None, clusters=None, metric="accuracy"):
    arms = [Outcomes(np.asarray(right, float), kind="binary") for right in (right_before, right_after)]
    return prior_checks(metric, answers, (before, after), tuple(arms), groups, clusters)


def test_prior_checks_by_hand():
    # Two groups; the reduced model's gain in "capital" is real, that in "currency" is saying euro to everything.
    groups = ["capital"] * 6 + ["currency"] * 6
    answers = ["Rome", "Oslo", "Bern", "Riga", "Kyiv", "Lima"] + ["euro"] * 5 + ["yen"]
    original = ["the"] * 6 + ["a"] * 6
    reduced = ["Rome", "Oslo", "Bern", "the", "the", "the"] + ["euro"] * 6
    right = [[gold == said for gold, said in zip(answers, arm, strict=True)] for arm in (original, reduced)]
    checks = checked(answers, original, reduced, *right, groups)
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
    many = checked(*often)
    assert not many.prior_shift
    assert (many.macro.reduced, many.macro.answers, many.macro.n) == (pytest.approx(0.5), 6, 70)
    # The same gain with "euro" alone: nothing is left to show it on, and that is flagged.
    only = checked(*(column[6:11] for column in (answers, original, reduced, *right)))
    assert (only.majority_excluded, only.prior_shift) == (None, True)
    # A loss is never a prior shift.
    assert not checked(answers, reduced, original, right[1], right[0], groups).doubt


@pytest.mark.parametrize("labels", [2, 4, 10])
def test_naming_an_allowed_answer_at_random_is_a_change_of_form(labels: int):
    """Exact moments against exchanges that are really made, and the verdict on many samples."""
    rng = np.random.default_rng(labels)
    names = np.array([f"label {i}" for i in range(labels)])
    doubts = 0
    for seed in range(200):
        gold, said = names[rng.integers(0, labels, 200)], names[rng.integers(0, labels, 200)]
        groups = rng.choice(["g", "h"], 200)
        checks = checked(gold, ["the"] * 200, said, np.zeros(200), gold == said, groups)
        doubts += bool(checks.doubt)
        assert checks.delta > 0
        if seed == 0:
            exchanged = np.zeros(4000)
            for i in range(len(exchanged)):
                for group in "gh":
                    of = groups == group
                    exchanged[i] += (rng.permutation(said[of]) == gold[of]).sum()
            assert checks.chance == pytest.approx(exchanged.mean() / 200, abs=0.003)
            z = ((gold == said).sum() - exchanged.mean() - 0.5) / exchanged.std()
            assert checks.chance_p == pytest.approx(stats.norm.sf(z), abs=0.03)
    assert doubts >= 190
    knows = np.where(rng.random(200) < 0.5, gold, said)
    assert not checked(gold, ["the"] * 200, knows, np.zeros(200), knows == gold).doubt


def test_what_is_said_most_needs_a_count():
    """With one fact a group, everything is said most there; and what is said once is said most nowhere."""
    gold = [f"answer {i}" for i in range(100)]
    each = checked(gold, ["the"] * 100, gold, np.zeros(100), np.ones(100), groups=gold)
    assert (each.doubt, each.majority_excluded.n) == ("", 100)


def test_a_tie_in_one_example_does_not_hide_a_constant_answer():
    """The checks count the metric's own outcomes, whatever texts say of one of them."""
    gold = ["false"] * 120 + ["true"] * 80
    right = [answer == "false" for answer in gold]
    right[0] = False  # by rank; the texts are the same
    assert checked(gold, ["the"] * 200, ["false"] * 200, np.zeros(200), right).doubt


def test_texts_that_never_match_are_told():
    """Right by a metric that normalises them: no verdict about chance can be given, and how to get one is said."""
    gold = [f"City {i % 20}" for i in range(100)]
    checks = checked(gold, ["the"] * 100, [f"{text}." for text in gold], np.zeros(100), np.ones(100))
    assert (checks.matched, checks.delta) == (0.0, 1.0)
    assert "return both as one text where they mean the same" in checks.doubt


def test_a_row_says_what_it_counts():
    arms = Outcomes.of(np.zeros(4, bool)), Outcomes.of(np.array([True, True, False, False]))
    assert (compare("m", *arms).units, compare("m", *arms, clusters="aabb").units) == ("examples", "clusters")
    judged = Gain("m").judge(compare("m", *arms, clusters="aabb"))
    assert "clusters in place of 2" in judged.note


def test_clusters_reach_the_prior_checks():
    rng = np.random.default_rng(0)
    gold = np.repeat([f"city {i}" for i in range(20)], 5)
    right = np.repeat(rng.random(20) < 0.3, 5)
    said = np.where(right, gold, "the")
    alone, together = (
        checked(gold, ["a"] * 100, said, np.zeros(100), right, clusters=c) for c in (None, gold.tolist())
    )
    assert alone.majority_excluded.p < together.majority_excluded.p / 100
    assert together.majority_excluded.n == 20
    assert together.worth["answer"] == pytest.approx(20, abs=1)
    assert alone.chance_p < together.chance_p


def test_scores_in_steps_have_a_continuity_correction():
    """Of half a step of the sum, in the interval and in p, which never disagree about 0."""
    rng = np.random.default_rng(3)
    before, after = (Outcomes(rng.integers(0, 4, 20) / 3) for _ in range(2))
    row, change = compare("score", before, after), after.values - before.values
    student = stats.ttest_1samp(change, 0)
    error = change.std(ddof=1) / 20**0.5
    assert row.p == pytest.approx(2 * stats.t.sf((abs(row.delta) - 1 / 120) / error, 19))
    assert row.p > student.pvalue
    for ends, level in (((row.lower, row.upper), 0.95), ((row.lower90, row.upper90), 0.9)):
        low, high = student.confidence_interval(level)
        assert ends == pytest.approx((low - 1 / 120, high + 1 / 120))


@pytest.mark.parametrize("best", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("clustered", [True, False])
def test_a_number_of_both_models_has_the_interval_of_a_mean_and_no_test(best, weighted, clustered):
    rng = np.random.default_rng(0)
    away = rng.gamma(0.3, 0.1, 24)
    before, after = np.full(24, best), np.abs(best - np.minimum(away, 1))
    weights = rng.integers(1, 9, 24).astype(float) if weighted else None
    clusters = [i // 3 for i in range(24)] if clustered else None
    rows = [
        compare("x", *(Outcomes(values, weights, kind) for values in (before, after)), clusters=clusters)
        for kind in ("pair", "mean")
    ]
    for row in rows[:1]:
        assert (row.p, row.test, row.verdict, row.fixed) == (None, "not tested", "not tested", None)
        assert row.higher_is_better == bool(best)
        assert (row.n, row.original, row.reduced, row.delta) == (rows[1].n, best, rows[1].reduced, rows[1].delta)
        assert f"the original has {best:g} by definition" in row.note
    for name in ("lower", "upper", "lower90", "upper90"):
        end = getattr(rows[1], name)
        possible = max(end, 0) if best == 0 else min(max(end, -1), 0)
        assert getattr(rows[0], name) == pytest.approx(possible)


def test_a_number_of_both_models_may_be_absent_infinite_or_the_same():
    same = compare("kl", Outcomes(np.zeros(9), kind="pair"), Outcomes(np.zeros(9), kind="pair"))
    assert (same.delta, same.higher_is_better) == (0, False)
    assert same.upper >= same.lower >= 0
    none = compare("kl", Outcomes(np.full(3, np.nan), kind="pair"), Outcomes(np.full(3, np.nan), kind="pair"))
    assert (none.kind, none.n, none.lower) == ("pair", 0, None)
    far = compare("kl", Outcomes(np.zeros(3), kind="pair"), Outcomes(np.array([0, np.inf, 1]), kind="pair"))
    assert (far.reduced, far.lower) == (math.inf, None)
