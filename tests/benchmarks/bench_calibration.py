"""How often a decision is wrong where nothing is gained: python tests/benchmarks/bench_calibration.py [--quick]

Each data set is made by a rule under which the reduced model knows no more than the original. It goes the whole way:
what a step returns is read, compared, adjusted, checked for a shift of what is said, and decided on as at the end of a
search. A cut that gains nothing is recommended in at most 2.5 % of all data sets (one side of a two-sided test at
5 %), and one that loses as much as a constraint's margin passes it in at most 5 %. Then the other side: a gain that is
really there is found as often as `exact_power` says.

One table: scenario, data sets, share, the bound with its Monte Carlo error (99.9 %), and whether it is kept. Exits with
1 where one is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import stats

from laser_callback import LaserPlan
from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.results.examples import PairedExamples
from laser_callback.results.search import SearchResult
from laser_callback.search.verdict import decide
from laser_callback.stats import Constraint, exact_power, examples_needed, judge_all

Texts = NDArray[np.str_]
Step = dict[str, Any]
KEY = "accuracy"
ANSWERS = np.array([f"answer {i}" for i in range(60)])  # 20 to each of 3 groups
PLAN = LaserPlan.parse("0.fc_in@0.1")


# ---- what a step returns ---------------------------------------------------------------------------------------------


def changes(rng: Generator, gained: float, lost: float, n: int) -> NDArray[np.int64]:
    """1 where an example is fixed, -1 where it is broken."""
    return rng.choice([1, -1, 0], size=n, p=[gained, lost, 1 - gained - lost])


def shared(rng: Generator, clusters: NDArray[np.int64], share: float, gained: float, lost: float) -> NDArray[np.int64]:
    """Changes of which a share is that of the whole cluster."""
    together = changes(rng, gained, lost, clusters.max() + 1)[clusters]
    return np.where(rng.random(len(clusters)) < share, together, changes(rng, gained, lost, len(clusters)))


def answered(
    rng: Generator, change: NDArray[np.int64], clusters: NDArray[np.int64] | None = None, key: str = KEY
) -> tuple[Step, Step]:
    """Both steps for answers of which 40 % of those that do not change are right; what is wrong is any other answer."""
    n = len(change)
    number = rng.integers(0, len(ANSWERS), n)
    before = np.where(change == 0, rng.random(n) < 0.4, change < 0)
    after = np.where(change == 0, before, change > 0)
    wrong = ANSWERS[(number + rng.integers(1, len(ANSWERS), n)) % len(ANSWERS)]
    gold, groups = ANSWERS[number], (number % 3).astype(str)
    arms = (np.where(right, gold, wrong) for right in (before, after))
    return steps(gold, *arms, right=(before, after), groups=groups, clusters=clusters, key=key)


def steps(
    gold: Texts,
    before: Texts,
    after: Texts,
    *,
    right: tuple[Any, Any] | None = None,
    groups: Texts | None = None,
    clusters: NDArray[np.int64] | None = None,
    key: str = KEY,
) -> tuple[Step, Step]:
    """What a step returns for each model: right is what says the gold answer, unless ``right`` is given."""
    right = (before == gold, after == gold) if right is None else right
    both: Step = {} if clusters is None else {"cluster": clusters.tolist()}
    if groups is not None:
        both["group"] = groups.tolist()
    both[f"answer/{key}"] = gold.tolist()
    original, reduced = (
        both | {key: np.asarray(outcomes, bool), f"prediction/{key}": texts.tolist()}
        for outcomes, texts in zip(right, (before, after), strict=True)
    )
    return original, reduced


# ---- decisions -------------------------------------------------------------------------------------------------------


def arm(original: Step, reduced: Step) -> tuple[ArmResult, PairedExamples]:
    examples = PairedExamples()
    examples.add({"original": original, "laser": reduced}, np.zeros(len(original[KEY])), None)
    logged = examples.returned("original"), examples.returned("laser")
    rows, priors = examples.rows("laser", *logged), examples.priors("laser", *logged)
    return ArmResult(str(PLAN), rows, priors, "off", 0.0, 0.0), examples


def recommended(original: Step, reduced: Step) -> bool:
    """As at the end of a search."""
    found, examples = arm(original, reduced)
    adjust_together([found], KEY)
    confirmed = LaserResult({"laser": found}, {}, KEY, 0.0, {}, examples)
    result = SearchResult(plan=None, found=PLAN, reason="", objective=(KEY,), candidates=[], confirmed=confirmed)
    decide(result, 1)
    return result.plan is not None


def claims(arms: list[ArmResult], metrics: set[str]) -> bool:
    """Whether the table says of any plan and metric that it is better, and no check doubts it."""
    adjust_together(arms, KEY)
    return any(
        row.verdict == "better" and not ((checks := one.prior_checks.get(row.metric)) and checks.doubt)
        for one in arms
        for row in one.rows
        if row.metric in metrics
    )


def passes(margin: float, original: Step, reduced: Step) -> bool:
    found, _ = arm(original, reduced)
    return judge_all([Constraint(KEY, ">=", -margin)], found.rows)[0].verdict == "pass"


# ---- scenarios -------------------------------------------------------------------------------------------------------

CHANGED = 0.08  # share of examples that are fixed, and as many that are broken


def independent(rng: Generator) -> bool:
    return recommended(*answered(rng, changes(rng, CHANGED, CHANGED, 300)))


def clustered(size: int, share: float) -> Callable[[Generator], bool]:
    def run(rng: Generator) -> bool:
        clusters = np.arange(400) // size
        return recommended(*answered(rng, shared(rng, clusters, share, CHANGED, CHANGED), clusters))

    return run


def unequal_sizes(rng: Generator) -> NDArray[np.int64]:
    """Clusters of about 1 to 40 examples, most of them small."""
    sizes = np.ceil(rng.pareto(1.2, 100).clip(0.1, 40)).astype(np.int64)
    return np.repeat(np.arange(100), sizes)


def unequal(rng: Generator) -> bool:
    clusters = unequal_sizes(rng)
    return recommended(*answered(rng, shared(rng, clusters, 0.8, CHANGED, CHANGED), clusters))


def lopsided(rng: Generator) -> bool:
    """Many small clusters gain and few large ones lose as much: none on average, but not symmetric.

    Where a large cluster loses as a whole with 16 %, none of the 15 does in 7 % of all
    samples, and what is not in a sample no test can know.
    """
    clusters = np.concatenate([np.arange(150), 150 + np.repeat(np.arange(15), 10)])
    small = np.arange(300) < 150
    change = np.where(small, changes(rng, 0.16, 0.0, 300), shared(rng, clusters, 0.8, 0.0, 0.16))
    return recommended(*answered(rng, change, clusters))


def ties(rng: Generator) -> bool:
    """It says "false" to everything; one example whose answer is "true" counts as right by its rank."""
    gold = np.where(rng.random(200) < 0.6, "false", "true")
    after = gold == "false"
    after[np.flatnonzero(~after)[0]] = True
    return recommended(
        *steps(gold, np.full(200, "the"), np.full(200, "false"), right=(np.zeros(200, bool), after), key=KEY)
    )


def skewed(before: list[float], after: list[float]) -> Callable[[Generator], bool]:
    """Three choices, 70, 20 and 10 % of them right; both models draw theirs without looking."""

    def run(rng: Generator) -> bool:
        names = np.array(["a", "b", "c"])
        return recommended(*steps(*(rng.choice(names, 300, p=p) for p in ([0.7, 0.2, 0.1], before, after))))

    return run


def random_labels(labels: int, size: int = 1) -> Callable[[Generator], bool]:
    """The original says nothing of use, the reduced model an allowed answer at random; alike within a cluster."""

    def run(rng: Generator) -> bool:
        names, clusters = np.array([f"label {i}" for i in range(labels)]), np.arange(200 * size) // size
        gold, said = (names[rng.integers(0, labels, 200)][clusters] for _ in range(2))
        return recommended(*steps(gold, np.full(len(gold), "the"), said, clusters=clusters if size > 1 else None))

    return run


def plans(rng: Generator) -> bool:
    """Five plans against one original."""
    return claims([arm(*answered(rng, changes(rng, CHANGED, CHANGED, 200)))[0] for _ in range(5)], {KEY})


def metrics(primary: bool) -> Callable[[Generator], bool]:
    """Six metrics of the same examples, half of whose changes are those of the first."""

    def run(rng: Generator) -> bool:
        own = changes(rng, CHANGED, CHANGED, 200)
        original, reduced = answered(rng, own)
        for i in range(1, 6):
            change = np.where(rng.random(200) < 0.5, own, changes(rng, CHANGED, CHANGED, 200))
            one, two = answered(rng, change, key=f"metric {i}")
            original, reduced = one | original, two | reduced
        names = {KEY} if primary else {f"metric {i}" for i in range(1, 6)}
        return claims([arm(original, reduced)[0]], names)

    return run


def at_margin(margin: float, size: int = 1, n: int = 600) -> Callable[[Generator], bool]:
    """A true loss of the margin."""

    def run(rng: Generator) -> bool:
        clusters = np.arange(n) // size
        change = shared(rng, clusters, 0.8, 0.04, 0.04 + margin)
        return passes(margin, *answered(rng, change, clusters if size > 1 else None))

    return run


def planted(gain: float) -> Callable[[Generator], bool]:
    n, fixed, broken = examples_needed(gain), gain * 3 / 2, gain / 2

    def run(rng: Generator) -> bool:
        return recommended(*answered(rng, changes(rng, fixed, broken, n)))

    return run


def scenarios() -> Iterator[tuple[str, float, Callable[[Generator], bool]]]:
    """Name, the level that may not be exceeded, and one data set's decision."""
    yield "independent examples", 0.025, independent
    for size in (2, 4, 10):
        for share in (0.5, 0.8, 0.95):
            yield f"{size} facts a subject, {share:.0%} shared", 0.025, clustered(size, share)
    yield "clusters of 1 to 40, 80% shared", 0.025, unequal
    yield "small clusters gain what large ones lose", 0.025, lopsided
    yield "ties: one right by rank only", 0.025, ties
    yield "choices 70/20/10, the rarest to mostly the commonest", 0.025, skewed([0.0, 0.0, 1.0], [0.8, 0.1, 0.1])
    yield "choices 70/20/10, evenly to as they are", 0.025, skewed([1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1])
    for labels in (2, 4, 10):
        yield f"random labels from {labels}", 0.025, random_labels(labels)
    yield "random labels from 4, 4 facts a subject alike", 0.025, random_labels(4, 4)
    yield "five plans, any of them", 0.025, plans
    yield "six metrics, the declared one", 0.025, metrics(True)
    yield "six metrics, any other", 0.025, metrics(False)
    for margin in (0.02, 0.05):
        yield f"{KEY} >= -{margin}, loss of {margin}", 0.05, at_margin(margin)
    for margin, size in ((0.02, 4), (0.05, 4), (0.05, 10)):
        yield f"{KEY} >= -{margin}, {size} facts a subject", 0.05, at_margin(margin, size)
    for margin, n in ((0.02, 100), (0.05, 60)):
        yield f"{KEY} >= -{margin}, {n} examples", 0.05, at_margin(margin, n=n)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 data sets each in place of 2,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios whose names have this in them")
    options = parser.parse_args()
    sets = 300 if options.quick else 2000
    print(f"{'scenario':54} {'sets':>5} {'share':>7} {'bound':>7}  verdict")
    failed = 0

    def tell(name: str, share: float, bound: float, kept: bool) -> None:
        nonlocal failed
        failed += not kept
        print(f"{name:54} {sets:5} {share:7.2%} {bound:7.2%}  {'kept' if kept else 'NOT KEPT'}", flush=True)

    for number, (name, level, decision) in enumerate(scenarios()):
        if options.only in name:
            rng = np.random.default_rng([options.seed, number])
            count = sum(decision(rng) for _ in range(sets))
            bound = int(stats.binom.ppf(0.999, sets, level))
            tell(name, count / sets, bound / sets, count <= bound)
    for gain in (0.02, 0.05, 0.1):
        name = f"a gain of {gain:.0%} on {examples_needed(gain)} examples is found"
        if options.only in name:
            rng = np.random.default_rng([options.seed, round(1000 * gain)])
            count = sum(planted(gain)(rng) for _ in range(sets))
            power = exact_power(gain, examples_needed(gain))
            error = 0.03 + float(stats.norm.isf(0.0005)) * (power * (1 - power) / sets) ** 0.5
            tell(f"{name}, said {power:.1%}", count / sets, power - error, abs(count / sets - power) <= error)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
