"""Right or wrong in any form, errors included: the exact test, and a prior check of what is right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from paired import bools, log, pair, together

from laser_callback.reports.page_columns import flip_tables
from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.results.examples import PairedExamples
from laser_callback.stats.gain import Gain
from laser_callback.stats.outcomes import Outcomes
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import prior_checks
from laser_callback.support.plain_json import label

GOLD = ["true"] * 120 + ["false"] * 80
SAID = ["the"] * 200, ["true"] * 200  # a shift of what is said, and no more


def shifted(errors: bool, dtype: torch.dtype) -> PairedExamples:
    """Examples of a model that says one answer everywhere."""
    one, two = (
        {"acc": torch.tensor([(a == b) != errors for a, b in zip(GOLD, said, strict=True)]).to(dtype)} for said in SAID
    )
    return pair(one | {"answer": GOLD, "prediction": SAID[0]}, two | {"prediction": SAID[1]}, 200)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("errors", [True, False])
def test_a_shift_of_what_is_said_is_found_in_rights_and_in_errors(errors: bool, known: bool, dtype) -> None:
    examples = shifted(errors, dtype)
    logged = {"acc": log(0.5, "acc")._replace(higher_is_better=not errors if known else None)}
    (row,), checks = examples.rows("laser", logged, logged), examples.priors("laser", logged, logged)["acc"]
    assert checks.delta == pytest.approx(0.6)  # of what is right
    judged = Gain("acc", direction="min" if errors else "max").judge(row, checks)
    assert judged.verdict == "undecided"
    assert judged.note == checks.doubt != ""


def test_a_gain_whose_check_is_of_something_else_is_not_checked() -> None:
    """Nothing is right word for word, so that errors are taken for right answers."""
    gold, said = ["Yes, sir"] * 40, (["no"] * 40, ["yes"] * 40)
    arms = Outcomes.of(np.ones(40, bool)), Outcomes.of(np.arange(40) < 20)
    judged = Gain("error", direction="min").judge(compare("error", *arms), prior_checks("error", gold, said, arms))
    assert judged.verdict == "pass"
    assert "not checked for a shift" in judged.note


@pytest.mark.parametrize("clusters", [None, [i // 2 for i in range(20)]])
def test_zeros_and_ones_are_tested_exactly_whatever_their_type(clusters) -> None:
    """Five of twenty fixed: Student's t test of the floats says .02, McNemar's exact one .06."""
    arms = np.zeros(20), np.array([1.0] * 5 + [0.0] * 15)
    floats = compare("acc", *map(Outcomes.of, arms), clusters=clusters)
    right = compare("acc", *(Outcomes.of(arm.astype(bool)) for arm in arms), clusters=clusters)
    assert (floats.p, floats.lower, floats.upper, floats.test) == (right.p, right.lower, right.upper, right.test)
    assert floats.p > 0.05
    assert (floats.fixed, floats.higher_is_better) == (None, None), "which of both is right is not known"


def test_a_mean_and_its_interval_agree_about_zero() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        before = rng.integers(0, 4, 20) / 3
        after = np.clip(before + rng.integers(-1, 3, 20) / 3 * (rng.random(20) < 0.4), 0, 1)
        row = compare("score", Outcomes.of(before), Outcomes.of(after))
        assert row.p is None or (row.p <= 0.05) == (not row.lower <= 0 <= row.upper)


def test_case_and_spaces_tell_no_answers_apart_where_they_are_right_without() -> None:
    gold = [*GOLD, *(f"answer {i}" for i in range(20))]
    said = ["the"] * 220, ["True "] * 200 + gold[200:]
    right = [np.array([a == b.strip().lower() for a, b in zip(gold, arm, strict=True)]) for arm in said]
    checks = prior_checks("acc", gold, said, (Outcomes.of(right[0]), Outcomes.of(right[1])))
    assert checks.matched == pytest.approx(140 / 220)
    assert checks.majority_excluded.n == 100
    exact = [a == b for a, b in zip(gold, said[1], strict=True)]  # where they are wrong, they are others
    arms = Outcomes.of(right[0]), Outcomes.of(np.array(exact))
    assert prior_checks("acc", gold, said, arms).matched == pytest.approx(20 / 220)


def test_clusters_that_some_batches_lack_still_count() -> None:
    examples = together(
        pair({"acc": bools("0000"), "cluster": list("aabb")}, {"acc": bools("1111")}, 4),
        pair({"acc": bools("00")}, {"acc": bools("11")}, 2),
    )
    (row,) = examples.rows("laser", {"acc": log(0, "acc")}, {"acc": log(1, "acc")})
    assert (row.n, row.examples) == (4, 6)
    assert "1 of 2 batches came without `cluster`: their examples count as independent" in row.note


def test_one_nan_in_many_places_is_no_common_cluster() -> None:
    assert len({label(value) for value in [float("nan")] * 1 + [np.nan] * 3}) == 4


@pytest.mark.parametrize("higher", [True, False])
def test_a_declared_direction_goes_to_every_row(higher: bool) -> None:
    """A step returns bools under "error", which count as right unless they are said to be better low."""
    arms = Outcomes.of(np.ones(40, bool)), Outcomes.of(np.arange(40) < 20)
    arm = ArmResult("1.mlp@0.1", [compare("error", *arms)], {}, "off", 0.0, 0.0)
    adjust_together([arm], "error")
    examples = [{"id": i, "original": {"error": 1.0}, "laser": {"error": float(i < 20)}} for i in range(40)]
    result = LaserResult({"laser": arm}, {"laser": {"zeroed": arm}}, "error", 0.0, {}, PairedExamples())
    result = result.directed({"error": higher, "other": True})
    row = result["laser"]["error"]
    assert row == result.controls["laser"]["zeroed"]["error"]
    assert (row.verdict, row.fixed, row.broken) == (("worse", 0, 20) if higher else ("better", 20, 0))
    assert f"{row.fixed} fixed, {row.broken} broken" in flip_tables(result, "laser", examples)[0]["caption"]
    assert json.dumps(result.to_dict(), allow_nan=False)
