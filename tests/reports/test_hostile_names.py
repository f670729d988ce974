"""Text that came from users stays text in every report, and what is no number is no percentage."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from classifier import compared, searched
from rich.console import Console

from laser_callback import LaserPlan
from laser_callback.reports.gate_terminal import print_cleanup, print_rollout
from laser_callback.reports.loggers import _markdown
from laser_callback.reports.model_card import model_card
from laser_callback.reports.page import page
from laser_callback.reports.search_terminal import print_search
from laser_callback.reports.terminal import print_ab, print_report
from laser_callback.results.ab_test import ABResult
from laser_callback.results.cleanup import CleanupResult, Contender
from laser_callback.results.comparison import LaserResult
from laser_callback.results.evidence import numbers_of
from laser_callback.results.gates import GateVerdict
from laser_callback.results.other_tasks import OtherTask
from laser_callback.results.rollout import RolloutResult, Stage
from laser_callback.stats.judgement import Judgement
from laser_callback.stats.outcomes import PairedResult
from laser_callback.stats.unpaired import UnpairedResult
from laser_callback.surgery.recipe import CutMatrix, Recipe

MARKUP = "[/red][bold]x[link=a]"
PLAN = "1.fc_in@0.1"


@pytest.fixture(scope="module")
def result() -> LaserResult:
    return compared(PLAN)


def printed(show: Any, *found: Any) -> str:
    console = Console(file=io.StringIO(), width=400)
    show(*found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_markup_is_printed_as_it_is(result):
    arm = result["laser"]
    rows = [replace(row, metric=f"{MARKUP}{i}", note=f"{MARKUP} note") for i, row in enumerate(arm.rows)]
    hostile = replace(
        result,
        arms={MARKUP: replace(arm, plan=f"/{MARKUP}/@0.1", rows=rows, replay=MARKUP)},
        not_compared={MARKUP: MARKUP},
        primary=f"{MARKUP}0",
    )
    assert printed(print_report, hostile).count(MARKUP) >= 7
    search = searched(hostile)
    search.reason, search.warnings, search.objective = MARKUP, [MARKUP], (MARKUP,)
    search.candidates[0].reason = MARKUP
    assert printed(print_search, search).count(MARKUP) >= 3
    judgement = Judgement(MARKUP, MARKUP, 5, 0.1, 0.2, "undecided", MARKUP)
    plan = LaserPlan.parse("/a[b]c/@0.1")
    stage = Stage(GateVerdict(plan, [judgement], {}), "went back", 1.0)
    shown = printed(print_rollout, RolloutResult(None, False, (plan,), [stage]))
    assert shown.count(MARKUP) >= 2
    assert "/a[b]c/@0.1" in shown
    contenders = [Contender("checkpoint", f"{MARKUP}.ckpt"), Contender("single", "/a[b]c/@0.1", confirmed=True)]
    row = PairedResult(MARKUP, "mean", 6, 1.0, 2.0, 1.0, 0.5, 1.5)
    others = [OtherTask(MARKUP, row, row, 1)]
    cleaned = CleanupResult(f"{MARKUP}.ckpt", search, contenders, others=others, reason=MARKUP, notes=[MARKUP])
    shown = printed(print_cleanup, cleaned)
    assert shown.count(MARKUP) == 4  # the checkpoint's row has its name without the folder
    assert shown.count("[bold]x[link=a].ckpt") == 2
    assert "/a[b]c/@0.1" in shown
    ab = ABResult(
        MARKUP, 0.5, 0, {MARKUP: 3}, [UnpairedResult(MARKUP, "mean", 6, 1.0, 2.0, 1.0, n_original=3, n_reduced=3)]
    )
    assert printed(print_ab, ab).count(MARKUP) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_percentage(result, value):
    arm = result["laser"]
    odd = [replace(row, original=value, reduced=value, delta=value, lower=value, upper=value) for row in arm.rows]
    ((metric, priors),) = arm.prior_checks.items()
    macro = replace(priors.macro, original=value, reduced=value)
    priors = replace(priors, constant_answer=value, matched=value, chance=value, worth={"group": value}, macro=macro)
    broken = replace(result, arms={"laser": replace(arm, rows=odd, prior_checks={metric: priors})})
    for text in (printed(print_report, broken), page(broken)):
        for word in ("nan%", "inf%", "nan %", "inf %"):
            assert word not in text


def test_notes_that_differ_by_case_are_two(result):
    arm = result["laser"]
    rows = [replace(arm.rows[0], metric=name, note=note) for name, note in (("a", "Unit: x"), ("b", "unit: X"))]
    text = page(replace(result, arms={"laser": replace(arm, rows=rows)}, primary=None))
    assert "a: Unit: x" in text
    assert "b: unit: X" in text


def test_names_do_not_break_the_model_card(result):
    name = "a|b`c\nd*e<i>[x](y)"
    arm = result["laser"]
    rows = [replace(row, metric=name) for row in arm.rows[:1]]
    hostile = replace(result, arms={"laser": replace(arm, rows=rows)}, primary=name, controls={})
    matrix = CutMatrix("lay`er|1", "/a``b|c/@0.1", (3, 4), "float32", "0" * 64, "1" * 64, 1.0)
    plan = LaserPlan.parse(PLAN)
    recipe = Recipe(plan, [matrix], numbers=numbers_of(hostile, plan))
    lines = str(model_card(recipe, title="t", usage="u", library="l")).splitlines()
    (row,) = [line for line in lines if line.startswith("| **a")]
    assert row.startswith("| **a&#124;b&#96;c d&#42;e&#60;i&#62;&#91;x&#93;(y)** |")
    assert row.count("|") == 8
    (cut,) = [line for line in lines if line.startswith("| `` lay`er")]
    assert cut.startswith("| `` lay`er\\|1 `` | ``` /a``b\\|c/@0.1 ``` | 3 x 4 |")


def test_a_card_says_no_more_than_the_result(result):
    plan = LaserPlan.parse(PLAN)
    arm, metric = result["laser"], next(iter(result["laser"].prior_checks))
    checks = replace(arm.prior_checks[metric], delta=0.2, chance=0.5, chance_p=0.9, matched=0.5)
    doubted = replace(arm, prior_checks={metric: checks})
    numbers = numbers_of(replace(result, arms={"laser": doubted}, primary=metric), plan) | {
        "sets": {"race": 4},
        "seed": 3,
    }
    card = str(model_card(Recipe(plan, [], numbers=numbers), title="t", usage="u", library="l"))
    assert f"In doubt: {checks.doubt}." in card
    assert "carries the claim." in card
    assert "Examples: 4 race; seed 3." in card
    assert "no subject in two sets" not in card  # of data whose subjects are not known
    looks = replace(result, provenance={**result.provenance, "loop": "fit"}, primary=metric)
    card = str(model_card(Recipe(plan, [], numbers=numbers_of(looks, plan)), title="t", usage="u", library="l"))
    assert "nothing is claimed: each validation of a training is another look." in card
    assert "carries the claim" not in card


def test_a_card_of_a_comparison_without_rows(result):
    plan = LaserPlan.parse(PLAN)
    empty = replace(result, arms={"laser": replace(result["laser"], rows=[])}, primary=None)
    card = str(model_card(Recipe(plan, [], numbers=numbers_of(empty, plan)), title="t", usage="u", library="l"))
    assert "## Numbers" in card
    with pytest.raises(ValueError, match="`comparison` is missing"):
        model_card(Recipe(plan, [], numbers={"seed": 3}), title="t", usage="u", library="l")


def test_tables_of_loggers_hold_no_markup():
    text = _markdown([{"a": "x|y`z\n<b>", "b": None, "c": 0.5}])
    assert text.splitlines()[-1] == "| x&#124;y&#96;z &#60;b&#62; |  | 0.5 |"
