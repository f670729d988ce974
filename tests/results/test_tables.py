"""Results made of examples, and the tables that show them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from paired import bools, described, log, pair
from rich.console import Console
from scipy import stats

from laser_callback.reports.row_text import delta_text, interval_text
from laser_callback.reports.terminal import plain, print_report, quoted
from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.stats.outcomes import Outcomes, PairedResult
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import prior_checks
from laser_callback.support.reading import built

# ---- results ---------------------------------------------------------------------------------------------------------


def arm(flips: dict[str, tuple[str, str]], plan: str = "1.mlp@0.1") -> ArmResult:
    rows = [compare(name, Outcomes.of(bools(b)), Outcomes.of(bools(a))) for name, (b, a) in flips.items()]
    return ArmResult(plan, rows, {}, "off", 1.0, 0.1)


WORSE = ("1" * 10, "1" + "0" * 9)
BETTER = ("0" * 10, "1" * 8 + "00")
SAME = ("01" * 5, "01" * 5)


def test_one_plan_keeps_its_primary():
    (one,) = arms = [arm({"acc": BETTER, "top5": WORSE, "top10": SAME})]
    adjust_together(arms, "acc")
    assert (one["acc"].role, one["acc"].p_adjusted, one["acc"].verdict) == ("primary", None, "better")
    assert one["top5"].p_adjusted == pytest.approx(2 * stats.binomtest(9, 9).pvalue)
    assert one["top10"].p_adjusted == 1.0
    with pytest.raises(KeyError, match="no row 'top1'; there are acc, top5, top10"):
        _ = one["top1"]


def test_two_plans_are_one_family():
    a, b = arms = [arm({"acc": BETTER, "top5": WORSE}), arm({"acc": WORSE, "top5": SAME})]
    adjust_together(arms, "acc")
    p_better, p_worse = stats.binomtest(8, 8).pvalue, stats.binomtest(9, 9).pvalue
    # The primaries among each other: the smaller p times two, then the larger, not below it.
    assert b["acc"].p_adjusted == pytest.approx(2 * p_worse)
    assert a["acc"].p_adjusted == pytest.approx(max(p_better, 2 * p_worse))
    assert (a["acc"].verdict, b["acc"].verdict) == ("better", "worse")
    # The others in a family of their own.
    assert a["top5"].p_adjusted == pytest.approx(2 * p_worse)
    assert b["top5"].p_adjusted == 1.0
    assert {row.metric for row in a.rows} == {"acc", "top5"}
    with pytest.raises(ValueError, match="primary"):
        adjust_together(arms, "nothing")


def test_two_plans_without_primary():
    arms = [arm({"acc": BETTER}), arm({"acc": WORSE})]
    adjust_together(arms, None)
    assert {row.role for one in arms for row in one.rows} == {"holm"}
    assert arms[0]["acc"].p_adjusted == pytest.approx(stats.binomtest(8, 8).pvalue)
    assert arms[1]["acc"].p_adjusted == pytest.approx(2 * stats.binomtest(9, 9).pvalue)


LONG = "paraphrase_consistency/dataloader_idx_0"


def result(primary: str | None = "acc") -> LaserResult:
    before, after = bools("0101010101"), bools("1010101010")
    examples = pair(
        described(["x", "y"] * 5, ["y", "y"] * 5) | {"acc": before}, described([], ["x"] * 10) | {"acc": after}, 10
    )
    examples.duplicates = 2
    arms = {
        "a": arm({"acc": BETTER, "first_token_accuracy": WORSE, LONG: SAME}, plan=", ".join(["27.fc_in@0.01"] * 40)),
        "b": arm({"acc": WORSE, "first_token_accuracy": SAME, LONG: SAME}),
    }
    ratio = Outcomes(torch.tensor([2.0, 3.0, 2.5]), torch.tensor([10, 20, 30]), "log_ratio")
    better = Outcomes(ratio.values - torch.tensor([0.5, 0.4, 0.3]), ratio.weights, "log_ratio")
    infinite = Outcomes(torch.tensor([1.0, float("inf"), 1.0]))
    for one in arms.values():
        one.rows += [
            compare("perplexity", ratio, better),
            compare("infinite", infinite, Outcomes(torch.zeros(3))),
            compare("[bold]odd[/]name", Outcomes(torch.rand(3)), Outcomes(torch.rand(3))),
        ]
        one.prior_checks = examples.priors("laser", {"acc": log(0.5, "acc")}, {"acc": log(0.5, "acc")})
    adjust_together(list(arms.values()), primary)
    controls = {"a": {"zeroed": arm({"acc": SAME}), "random": arm({"acc": WORSE})}}
    return LaserResult(arms, controls, primary, 1.5, {"step_loss": "logged per step only"}, examples)


@pytest.mark.parametrize("primary", ["acc", None])
@pytest.mark.parametrize("width", [80, 100, 112, 116, 140])
def test_the_report_names_everything_at_any_width(width, primary):
    shown = result(primary)
    text = plain(shown, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    names = "".join(line.split(" ")[0] for line in lines)
    for row in shown["a"].rows:
        assert names.count(row.metric) >= 2, row.metric  # once for each plan; long names go on in the next line
    for word in ("step_loss", "logged per step only", "2 duplicates"):
        assert word in " ".join(text.split()), word
    assert "…" not in text


def test_the_report_as_it_is_printed(capsys):
    shown = result()
    print_report(shown)
    assert "first_token_accuracy" in capsys.readouterr().out
    console = Console(width=140, file=io.StringIO())
    print_report(shown, console)
    assert capsys.readouterr().out == ""
    assert console.file.getvalue() == plain(shown, 140)


@pytest.mark.parametrize("primary", ["acc", None])
def test_the_report_says_what_is_adjusted(primary):
    assert "Holm-adjusted, the intervals are not" in " ".join(plain(result(primary), 80).split())


def test_one_row_is_not_adjusted():
    one = arm({"acc": BETTER})
    adjust_together([one], None)
    assert "Holm" not in plain(replace(result(None), arms={"laser": one}, controls={}), 80)


def test_the_terminal_says_of_each_metric_why_it_is_in_doubt():
    shown = result("acc")
    ((name, arm),) = list(shown.arms.items())[:1]
    rows = [
        replace(
            row,
            role="primary" if row.metric == "acc" else "holm",
            p=0.001,
            p_adjusted=0.001,
            test="paired t",
            delta=0.1,
            higher_is_better=True,
            doubt=f"the form of {row.metric}",
        )
        for row in arm.rows
    ]
    told = plain(replace(shown, arms={name: replace(arm, rows=rows)}, controls={}), 4000)
    for row in rows[1:]:
        assert f"in doubt, {row.metric}: the form of {row.metric}" in told


def test_answers_are_quoted():
    """An answer may be a quotation mark, or only a space."""
    assert [quoted(text) for text in ('"', " the", "'", " ")] == ["'\"'", "'the'", '"\'"', "' '"]
    text = " ".join(plain(result(), 120).split())
    assert "original says most: 'y' 10 (entropy 0.00 nats)" in text


def test_zero_has_no_sign():
    row = PairedResult("acc", "binary", 10, 0.5, 0.4999, -0.0001, lower=-0.0004, upper=0.25)
    assert (delta_text(row, row.delta), interval_text(row)) == ("0.0%", "0.0, +25.0")
    row = PairedResult("loss", "mean", 10, 0.5, 0.5, -0.0, lower=-0.0004, upper=0.0)
    assert (delta_text(row, row.delta), interval_text(row)) == ("0", "-0.0004, 0")
    assert interval_text(replace(row, lower=float("-inf"))) == "-inf, 0"


def test_the_result_is_strict_json(tmp_path):
    shown = result()
    text = json.dumps(shown.to_dict(), allow_nan=False)
    shown.to_json(tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8")) == json.loads(text)
    assert shown.to_dict()["duplicates_removed"] == 2
    before = (tmp_path / "new" / "result.json").read_text()

    class Unwritable:
        def tolist(self) -> list[int]:
            raise TypeError

    shown.not_compared["bad"] = Unwritable()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        shown.to_json(tmp_path / "new" / "result.json")
    assert (tmp_path / "new" / "result.json").read_text() == before


def test_a_gain_that_the_prior_check_doubts_is_no_better():
    gold = ["euro"] * 24 + ["yen", "peso"] * 8
    said = (["the"] * 40, ["euro"] * 40)
    arms = tuple(Outcomes.of(np.array([a == b for a, b in zip(gold, texts, strict=True)])) for texts in said)
    checks = {"acc": prior_checks("acc", gold, said, arms)}
    arm = ArmResult("1.mlp@0.1", [compare("acc", *arms)], checks, "off", 0.0, 0.0)
    adjust_together([arm], "acc")
    assert arm["acc"].p < 1e-6
    assert arm["acc"].verdict == "in doubt"
    assert arm.to_dict()["rows"][0]["verdict"] == "in doubt"
    assert built(ArmResult, arm.to_dict()).rows == arm.rows
