"""The sentence that speaks for a row, and for a plan: it says no more than the row does."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from laser_callback.reports.row_text import NO_INTERVAL, ahead_text, change_text, finding, heads, prior_text, verdict
from laser_callback.reports.terminal import footnotes, plain, print_ab
from laser_callback.results.ab_test import ABResult
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.examples import PairedExamples
from laser_callback.stats import Outcomes, adjust, compare, prior_checks
from laser_callback.stats.outcomes import PairedResult, not_tested
from laser_callback.stats.unpaired import compare_groups


def right(fixed: int, broken: int, n: int, clusters: list[int] | None = None) -> PairedResult:
    before, after = np.zeros(n, bool), np.zeros(n, bool)
    after[:fixed] = before[fixed : fixed + broken] = True
    return compare("acc", Outcomes.of(before), Outcomes.of(after), clusters=clusters)


def claimed(row: PairedResult) -> PairedResult:
    return adjust([row], row.metric)[0]


def loss(kind: str, shift: float) -> PairedResult:
    values = np.linspace(1, 2, 40)
    weights = np.ones(40) if kind == "log_ratio" else None
    after = values + shift + 0.01 * np.sin(np.arange(40))
    arms = (Outcomes(v, weights, kind) for v in (values, after))
    return compare("perplexity" if kind == "log_ratio" else "val_loss", *arms, higher_is_better=False)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            claimed(right(30, 5, 400)),
            "acc rises from 1.2% to 7.5% on 400 examples (p <.0001), by at least 3.5 and at most 9.6 points at "
            "95 % confidence",
        ),
        (
            claimed(right(5, 30, 400)),
            "acc falls from 7.5% to 1.2% on 400 examples (p <.0001), by at least 3.5 and at most 9.6 points at "
            "95 % confidence",
        ),
        (
            claimed(right(3, 3, 100)),
            "no change of acc is shown on 100 examples (p = 1): a gain above 6.6 and a fall above 6.6 points are ruled "
            "out at 95 % confidence",
        ),
        (
            right(3, 3, 100),
            "acc goes from 3.0% to 3.0% on 100 examples: 0.0% [-6.6, +6.6], of which nothing is claimed",
        ),
        (
            not_tested("f1", 0.5, 0.6, 12, "not an average over examples"),
            "f1 goes from 0.500 to 0.600 on 12 examples, and is not tested: not an average over examples",
        ),
    ],
)
def test_a_row_in_words(row: PairedResult, sentence: str) -> None:
    assert finding(row) == sentence


def test_a_name_in_a_head_is_the_part_that_differs() -> None:
    assert heads(("logs/A/money.csv", "logs/B/money.csv"), 9) == ("A", "B")
    assert heads(("results/base", "/tmp/long/path/reduced")) == ("base", "reduced")
    assert heads(("one", "one")) == ("1: one", "2: one")


def test_units_and_scales() -> None:
    clustered = finding(claimed(right(20, 0, 400, [i // 4 for i in range(400)])))
    assert "on 400 examples in 100 clusters (p = " in clustered
    batches = finding(replace(claimed(loss("mean", -0.1)), unit="batch"))
    assert batches.startswith("val_loss falls from 1.50 to 1.40 on 40 batches (p <.0001), by at least 0.09")
    assert "points" not in batches
    ratio = finding(claimed(loss("log_ratio", 0.1)))
    assert ratio.startswith(
        "perplexity rises from 4.48 to 4.95 on 40 examples (p <.0001), by at least 10.3 and at most 10.8 %"
    )
    assert "after Holm" in finding(replace(right(30, 5, 400), role="holm", p_adjusted=0.001))
    alone = right(30, 5, 400)
    assert "after Holm" not in finding(replace(alone, role="holm", p_adjusted=alone.p))


def test_a_loss_that_is_not_shown_by_an_interval_that_is_not_adjusted() -> None:
    """After Holm no change is shown, though the row's own interval leaves 0 out: nothing is said to be ruled out."""
    row = replace(right(8, 1, 100), role="holm", p_adjusted=0.2)
    assert row.lower > 0
    assert "its own interval, which is not adjusted, is [+0.8, +14.8]" in finding(row)
    assert "no more" not in finding(row)


def test_ends_at_zero() -> None:
    """Five of six fixed, none broken: p is .0625, and the interval begins at 0."""
    assert finding(claimed(right(5, 0, 6))) == (
        "no change of acc is shown on 6 examples (p = .0625): a gain above 99.1 points and any fall are ruled out at "
        "95 % confidence"
    )
    assert ": any gain and a fall above 99.1 points are ruled out" in finding(claimed(right(0, 5, 6)))


@pytest.mark.parametrize(
    ("better", "told"),
    [
        (True, "a gain above 0.02 and a fall above 0.01 are ruled out at 95 % confidence"),
        (False, "a gain above 0.01 and a rise above 0.02 are ruled out at 95 % confidence"),
        (None, "a fall above 0.01 and a rise above 0.02 are ruled out at 95 % confidence"),
    ],
)
def test_what_is_ruled_out_is_a_gain_where_the_better_direction_is_known(better: bool | None, told: str) -> None:
    row = replace(claimed(loss("mean", 0.0)), p=0.4, lower=-0.01, upper=0.02, higher_is_better=better)
    assert finding(row).endswith(told)
    ratio = replace(claimed(loss("log_ratio", 0.0)), p=0.4, lower=-0.01, upper=0.02)
    assert finding(ratio).endswith("a gain above 1.0 and a rise above 2.0 % are ruled out at 95 % confidence")


@pytest.mark.parametrize("kind", ["mean", "log_ratio"])
def test_nothing_is_ruled_out_by_two_units_that_are_the_same(kind: str) -> None:
    arm = Outcomes(np.array([1.0, 2.0]), np.ones(2) if kind == "log_ratio" else None, kind)
    row = claimed(compare("loss", arm, arm, higher_is_better=False))
    assert finding(row).endswith("(p = 1): it is the same on every one of them, which rules out nothing about others")
    assert change_text(row) in ("0 [-]", "0.0% [-]")
    result = LaserResult(
        {"laser": ArmResult("1.mlp@0.1", [row], {}, "off", 0.0, 0.0)}, {}, None, 0.0, {}, PairedExamples()
    )
    assert footnotes(result).count(NO_INTERVAL) == 1
    assert " [-] " in plain(result, 80)
    changed = ArmResult("1.mlp@0.1", [replace(row, upper=0.1)], {}, "off", 0.0, 0.0)
    assert NO_INTERVAL not in footnotes(replace(result, arms={"laser": changed}))


def test_an_interval_that_holds_zero_is_no_least_change() -> None:
    """An exact test of few clusters, and an interval by their variance, may disagree."""
    row = replace(claimed(right(20, 5, 69, [i // 3 for i in range(69)])), p=0.03, lower=-0.03, upper=0.3)
    assert row.verdict == "better"
    assert finding(row).endswith(
        "(p = .0300), but its interval at 95 % confidence, [-3.0, +30.0], does not leave 0 out"
    )


def test_what_is_in_percent_already_is_no_share() -> None:
    values = np.linspace(30, 40, 50)
    arms = Outcomes.of(values), Outcomes.of(values + 3 + np.sin(values))
    told = finding(claimed(compare("val_accuracy", *arms, higher_is_better=True)))
    assert told.startswith("val_accuracy rises from 35.0 to 38.1 on 50 examples (p <.0001), by at least 2.9")
    assert "points" not in told


def test_numbers_without_end_stay_short() -> None:
    values = np.linspace(1, 2, 50)
    arms = (Outcomes(v, np.ones(50), "log_ratio") for v in (values, values + 500 + 9 * np.sin(values * 99)))
    assert len(finding(claimed(compare("perplexity", *arms)))) < 200


def test_a_declared_metric_without_a_test_speaks_for_the_plan() -> None:
    """Not another one, by which the model that the cut broke looks well."""
    broken = not_tested("acc", 0.5, float("nan"), 40, "the reduced model's value is nan", True, "binary")
    arm = ArmResult("1.mlp@0.1", adjust([broken, loss("mean", -0.1)], "acc"), {}, "off", 0.0, 0.0)
    result = LaserResult({"laser": arm}, {}, "acc", 0.0, {}, PairedExamples())
    assert verdict(result, "laser").startswith("with 1.mlp@0.1, acc goes from 50.0% to nan on 40 examples, and is not")


def test_an_ab_test_says_whose_examples_and_what_was_not_checked() -> None:
    arms = Outcomes.of(np.arange(80) < 8), Outcomes.of(np.arange(60) < 40)
    row = adjust([compare_groups("acc", *arms)], "acc")[0]
    assert "on 140 examples, 80 of the original and 60 of the reduced model (p <.0001)" in finding(row)
    console = Console(file=io.StringIO(), width=200)
    print_ab(ABResult("1.mlp@0.1", 0.4, 0, {"original": 80, "reduced": 60}, [row]), console)
    assert "; not checked for a mere shift of what is said" in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("better", [None, True])
def test_a_plan_in_words(better: bool | None) -> None:
    n = 40
    gold = ["euro"] * 24 + ["yen", "peso"] * 8
    said = (["the"] * n, ["euro"] * n)
    arms = tuple(Outcomes.of(np.array([a == b for a, b in zip(gold, texts, strict=True)])) for texts in said)
    row = replace(claimed(compare("acc", *arms)), higher_is_better=better)
    checks = prior_checks("acc", gold, said, arms)
    arm = ArmResult("1.mlp@0.1", [row], {"acc": checks}, "off", 0.0, 0.0)
    control = ArmResult("1.mlp@0", [replace(row, delta=0.025)], {}, "off", 0.0, 0.0)
    result = LaserResult({"laser": arm}, {"laser": {"zeroed": control}}, "acc", 0.0, {}, PairedExamples())
    told = verdict(result, "laser")
    assert told.startswith("with 1.mlp@0.1, acc rises from 0.0% to 60.0% on 40 examples (p <.0001)")
    assert f"; but {checks.doubt}" in told
    assert told.endswith("; controls: the same matrix zeroed +2.5%")


@pytest.mark.parametrize(
    ("gained", "lost", "better", "told"),
    [
        (24, 2, True, "the cut is better"),
        (24, 2, False, "the cut is worse"),
        (2, 24, True, "the cut is worse"),
        (2, 24, False, "the cut is better"),
        (24, 2, None, "the cut is higher"),
        (2, 24, None, "the cut is lower"),
        (4, 2, True, "the cut is not shown to be better"),
        (0, 0, True, "the cut is not shown to be better"),
    ],
)
def test_whether_a_cut_is_better_than_noise_is_said(gained: int, lost: int, better: bool | None, told: str) -> None:
    """Alone of the noise: with more controls in it the sentence would be no sentence."""
    row = replace(right(gained, lost, 80), higher_is_better=better)
    of = ArmResult("1.mlp@0.1", [claimed(right(30, 2, 80))], {}, "off", 0.0, 0.0)
    noise = [replace(of, plan=f"1.mlp@0.1:noise={seed}") for seed in (1, 2, 3)]
    zeroed, mean = replace(of, plan="1.mlp@0", ahead=[row]), replace(of, passes=noise, ahead=[row])
    controls = {"zeroed": zeroed, "noise": mean}
    result = LaserResult({"laser": of}, {"laser": controls}, "acc", 0.0, {}, PairedExamples())
    said = (
        f"the same matrix zeroed +35.0%, noise of the same size +35.0% ({told}); as much is gained by the same matrix"
    )
    assert verdict(result, "laser").endswith(f"{said} zeroed")
    shown = plain(result, 80)
    line = f"control, noise of the same size, 3 seeds: acc 37.5%, delta {change_text(of['acc'])}; {told}: "
    assert line + change_text(row) in " ".join(shown.split())
    without = plain(replace(result, controls={"laser": {"zeroed": zeroed}}), 80)
    assert len(shown.splitlines()) <= len(without.splitlines()) + 3


def test_of_what_is_not_tested_nothing_is_said_to_be_better() -> None:
    row = not_tested("f1", 0.5, 0.7, 80, "not an average over examples", True)
    assert ahead_text(row) == "whether the cut is better is not tested"


@pytest.mark.parametrize(
    ("fixed", "role", "told"),
    [
        (24, "primary", "no gain is shown outside of the answers said most"),
        (3, "primary", "no gain is shown, so that there is none to explain"),
        (24, "exploratory", "no gain is shown outside of the answers said most"),
        (0, "primary", "no gain to explain"),
    ],
)
def test_a_prior_check_speaks_of_gains_that_are_shown(fixed: int, role: str, told: str) -> None:
    row = replace(right(fixed, 0, 40), role=role)
    gold = ["euro"] * 24 + ["yen", "peso"] * 8
    said = (["the"] * 40, ["euro"] * fixed + ["the"] * (40 - fixed))
    arms = tuple(Outcomes.of(np.array([a == b for a, b in zip(gold, texts, strict=True)])) for texts in said)
    checks = replace(prior_checks("acc", gold, said, arms), chance_p=0.0)
    assert prior_text(row, checks) == told
