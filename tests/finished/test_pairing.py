"""Two finished runs, paired by their ids: what is compared, what is pooled, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from finished_logs import sample

from laser_callback.finished.eval_logs import read_samples
from laser_callback.finished.logged import FinishedRun, LoggedExample, LoggedTask
from laser_callback.finished.pairing import MEAN, compare_runs
from laser_callback.reports.page import page
from laser_callback.reports.page_columns import flip_tables
from laser_callback.reports.row_text import value_text, verdict
from laser_callback.reports.terminal import plain
from laser_callback.results import LaserResult
from laser_callback.stats import Outcomes, compare, judge_all, parse_gate

N = 120


def run(name: str, **tasks: LoggedTask) -> FinishedRun:
    return FinishedRun(name, f"{name}.jsonl", tasks)


def task(seed: int, right: float, n: int = N, metric: str = "acc", **more) -> LoggedTask:
    values = (np.random.default_rng(seed).random(n) < right).astype(float)
    return LoggedTask({str(i): LoggedExample(str(i), {metric: value}) for i, value in enumerate(values)}, **more)


def values(logged: LoggedTask, metric: str = "acc") -> np.ndarray:
    return np.array([example.outcomes[metric] for example in logged.examples.values()])


def right_or_wrong(values: np.ndarray) -> Outcomes:
    return Outcomes(values, kind="binary")


def test_the_row_is_that_of_the_statistics():
    before, after = task(0, 0.4), task(1, 0.6)
    result = compare_runs(run("small", x=before), run("large", x=after), metric="acc")
    expected = compare("acc", right_or_wrong(values(before)), right_or_wrong(values(after)))
    assert result["laser"]["acc"] == replace(expected, role="primary")
    assert (result.names, result.primary, result["laser"].plan) == (("small", "large"), "acc", "large")
    assert result.to_dict() == LaserResult.from_dict(result.to_dict()).to_dict()
    assert [j.verdict for j in judge_all([parse_gate("acc: gain")], result["laser"].rows)] == ["pass"]


def test_pairs_go_by_id_and_what_is_missing_is_told():
    before, after = task(0, 0.4), task(1, 0.6)
    after.examples = {key: after.examples[key] for key in reversed(after.examples) if key not in ("3", "4")}
    del before.examples["9"]
    result = compare_runs(run("one", x=before), run("two", x=after))
    kept = [key for key in before.examples if key not in ("3", "4")]
    pair = [right_or_wrong(np.array([t.examples[k].outcomes["acc"] for k in kept])) for t in (before, after)]
    assert replace(result["laser"]["acc"], role="exploratory", p_adjusted=None) == compare("acc", *pair)
    assert result.not_compared == {
        "2 of 119 examples of x in one": "not in the other run, the first is '3'",
        "1 of 118 examples of x in two": "not in the other run, the first is '9'",
    }


def test_clusters_are_what_is_independent():
    before, after = task(0, 0.4), task(1, 0.6)
    for example in before.examples.values():
        example.cluster = str(int(example.id) // 3)
    row = compare_runs(run("one", x=before), run("two", x=after))["laser"]["acc"]
    assert (row.n, row.examples, row.test) == (N // 3, N, "exact cluster sign flip")


def test_several_tasks_have_a_row_each_and_a_mean_that_claims():
    before, after = (task(0, 0.4), task(2, 0.5, 40)), (task(1, 0.6), task(3, 0.6, 40))
    one, two = (run(name, x=of[0], y=of[1]) for name, of in (("one", before), ("two", after)))
    rows = compare_runs(one, two)["laser"].rows
    assert [row.metric for row in rows] == [MEAN, "x/acc", "y/acc"]
    assert [row.role for row in rows] == ["primary", "holm", "holm"]
    pooled = [right_or_wrong(np.concatenate([values(t) for t in of])) for of in (before, after)]
    assert rows[0] == replace(compare(MEAN, *pooled), role="primary")
    assert compare_runs(one, two, tasks=["x", "y", "x"])["laser"].rows == rows  # named twice, counted once
    singles = [compare("x", *(right_or_wrong(values(of[i])) for of in (before, after))).p for i in (0, 1)]
    smallest = min(1.0, 2 * min(singles))
    assert [row.p_adjusted for row in rows[1:]] == [
        smallest if p == min(singles) else max(p, smallest) for p in singles
    ]


def test_tasks_that_weigh_the_same():
    before, after = (task(0, 0.4), task(2, 0.5, 40)), (task(1, 0.6), task(3, 0.6, 40))
    one, two = (run(name, x=of[0], y=of[1]) for name, of in (("one", before), ("two", after)))
    result = compare_runs(one, two, weights="equal")
    row = result["laser"][MEAN]
    changes = [values(b).mean() - values(a).mean() for a, b in zip(before, after, strict=True)]
    assert row.delta == pytest.approx(np.mean(changes))
    assert (row.test, row.role, row.n) == ("cluster-robust t", "primary", N + 40)
    assert (row.verdict, row.higher_is_better, value_text(row, row.reduced)) == ("better", True, f"{row.reduced:.1%}")
    assert " points at 95 % confidence" in verdict(result, "laser")
    for logged in (*before, *after):
        for example in logged.examples.values():
            example.cluster = f"{int(example.id) // 4}"  # a subject is in both tasks
    clustered = compare_runs(one, two, weights="equal")["laser"][MEAN]
    assert (clustered.n, clustered.examples) == (N // 4, N + 40)
    assert clustered.delta == pytest.approx(row.delta)


def test_a_mean_of_shares_that_are_better_low_is_better_low():
    low = {"higher_is_better": {"acc": False}}
    before, after = (task(0, 0.4, **low), task(2, 0.4, **low)), (task(1, 0.7, **low), task(3, 0.7, **low))
    one, two = (run(name, x=of[0], y=of[1]) for name, of in (("one", before), ("two", after)))
    for weights in ("size", "equal"):
        assert {row.verdict for row in compare_runs(one, two, weights=weights)["laser"].rows} == {"worse"}


def test_of_several_tasks_the_other_metrics_are_named():
    def of(seed: int) -> LoggedTask:
        found = task(seed, 0.5)
        for example in found.examples.values():
            example.outcomes |= {"f1": 0.5, "score": 0.25}
        return found

    one, two = run("one", x=of(0), y=of(1), z=task(4, 0.5)), run("two", x=of(2), y=of(3), z=task(5, 0.5))
    result = compare_runs(one, two)
    assert [row.metric for row in result["laser"].rows] == [MEAN, "x/acc", "y/acc", "z/acc"]
    assert result.not_compared == {
        "f1, score of x, y": "of several tasks one metric each is compared, here acc; `metric` chooses"
    }
    assert not compare_runs(one, two, metric="acc").not_compared


def test_the_mean_of_fixed_tasks_keeps_its_level():
    """Two tasks, one of which gains what the other loses: by either weights no more than 5 % of samples claim."""
    rng, claims = np.random.default_rng(0), {"size": 0, "equal": 0}
    for _ in range(300):
        arms = []
        for shift in (0.0, 0.15):
            p = {"x": 0.5 + shift, "y": 0.5 - 3 * shift}
            n = {"x": 60, "y": 20}
            arms.append({t: LoggedTask(_examples(rng.random(n[t]) < p[t])) for t in p})
        one, two = (run(name, **arm) for name, arm in zip(("one", "two"), arms, strict=True))
        claims["size"] += compare_runs(one, two)["laser"][MEAN].p <= 0.05
        arms[1]["y"] = LoggedTask(_examples(rng.random(20) < 0.35))
        two = run("two", **arms[1])
        claims["equal"] += compare_runs(one, two, weights="equal")["laser"][MEAN].p <= 0.05
    assert max(claims.values()) <= 300 * 0.05


def _examples(right: np.ndarray) -> dict[str, LoggedExample]:
    return {str(i): LoggedExample(str(i), {"acc": float(value)}) for i, value in enumerate(right)}


def test_prior_checks_of_what_was_chosen():
    gold = [0] * 30 + [1, 2, 3] * 10
    before = read_samples([sample(i, g, 1) for i, g in enumerate(gold)], {"acc": True})
    after = read_samples([sample(i, g, 0) for i, g in enumerate(gold)], {"acc": True})
    result = compare_runs(run("one", x=before), run("two", x=after))
    row = result["laser"]["acc"]
    assert (row.fixed, row.broken, row.verdict) == (30, 10, "in doubt")
    assert result["laser"].prior_checks["acc"].top_predictions == {
        "original": [("yen", 60)],
        "reduced": [("euro", 60)],
    }


def test_another_run_of_the_original_is_its_noise():
    before, after, again = task(0, 0.4), task(1, 0.6), task(0, 0.4)
    for key in ("0", "1", "2"):
        again.examples[key].outcomes["acc"] = 1 - again.examples[key].outcomes["acc"]
    result = compare_runs(run("one", x=before), run("two", x=after), again=run("one", x=again))
    row = result.rerun["acc"]
    assert row.fixed + row.broken == 3
    assert (row.role, result.rerun.plan) == ("exploratory", "one.jsonl")
    assert LaserResult.from_dict(result.to_dict()).rerun["acc"] == row


def test_two_runs_of_one_model_are_told_apart():
    one = run("m", x=task(0, 0.4))
    assert compare_runs(one, replace(one, source="other.jsonl")).names == ("m.jsonl", "other.jsonl")
    assert compare_runs(one, one).names == ("m.jsonl", "m.jsonl (again)")


# ---- refused ---------------------------------------------------------------------------------------------------------


def logged(metric: str = "acc", value: float = 1.0, **changes) -> LoggedTask:
    return LoggedTask({str(i): LoggedExample(str(i), {metric: value}, **changes) for i in range(8)})


@pytest.mark.parametrize(
    ("one", "two", "options", "words"),
    [
        ({"x": logged()}, {"y": logged()}, {}, "both runs must be of the same task, but one has 'x' and two has 'y'"),
        ({"coins": logged()}, None, {"tasks": ["coin"]}, "one has no 'coin', did you mean `coins`?"),
        ({"x": logged("acc")}, {"x": logged("f1")}, {}, "no metric of x is in both runs: one has acc and two has f1"),
        (
            {"x": LoggedTask({"0": LoggedExample("0")}, unused={"f1": "no number, such as 'A'"})},
            {"x": logged("f1")},
            {},
            "no metric of x is in both runs: one has none (f1: no number, such as 'A') and two has f1",
        ),
        ({"x": logged()}, {"x": LoggedTask({"a": LoggedExample("a")})}, {}, "no `id` of x is in both runs: one begins"),
        ({"x": logged()}, {"x": logged()}, {"metric": "f1"}, "`metric` must be one, acc, got 'f1'"),
        (
            {"x": logged(same={"prompt_hash": "1"})},
            {"x": logged(same={"prompt_hash": "2"})},
            {},
            "of the task x, example '0' the `prompt_hash` differs: '1' in one, '2' in two",
        ),
        (
            {"x": logged(), "y": logged("bleu", 30.0)},
            None,
            {},
            "must have one scale and one better direction to have a",
        ),
    ],
)
def test_what_cannot_be_compared(one, two, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        compare_runs(run("one", **one), run("two", **(two or one)), **options)


@pytest.mark.parametrize("weights", ["equal", "size"])
def test_the_page_has_the_flips_of_every_task(weights):
    before, after = (task(0, 0.4), task(2, 0.5, 40)), (task(1, 0.6), task(3, 0.6, 40))
    one, two = (run(name, x=of[0], y=of[1]) for name, of in (("one", before), ("two", after)))
    result = compare_runs(one, two, weights=weights)
    tables = flip_tables(result, "laser", result.examples.to_rows())
    counted = [row for row in result["laser"].rows if row.fixed is not None]
    shown = [row for row in counted if (row.metric == MEAN) == (weights == "size")]
    assert [t["caption"] for t in tables] == [f"By {r.metric}: {r.fixed} fixed, {r.broken} broken" for r in shown]
    text = page(result)
    assert text.count('<form class="filter"') == len(shown)
    assert text.count("<details><summary>By y/acc: ") == (weights == "equal")


def test_the_prior_check_of_every_gain_in_doubt_is_shown():
    before, after = task(0, 0.4), task(1, 0.6)
    for i, examples in enumerate(zip(before.examples.values(), after.examples.values(), strict=True)):
        answer = "yes" if i % 5 else "no"
        for example, said in zip(examples, ("no", "yes"), strict=True):  # each run says one answer to everything
            example.outcomes["acc"] = float(said == answer)
            example.answers["acc"], example.predictions["acc"] = answer, said
    result = compare_runs(*(run(name, x=of, y=of) for name, of in (("one", before), ("two", after))))
    shown = page(result)
    for name in ("x/acc", "y/acc"):
        assert result["laser"][name].verdict == "in doubt"
        assert shown.count(f"Is the change of {name} only a shift of what is said?") == 1
        assert plain(result).count(f"prior check of {name}: ") == 1
