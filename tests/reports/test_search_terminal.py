"""The report of a search: order, units, what is missing, 80 columns, hostile names."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
import torch
from candidates import candidate, proposed
from rich.console import Console

from laser_callback.plans.kinds import KINDS
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.search_terminal import plain, print_search, render
from laser_callback.results.candidates import Candidate, Estimate
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.examples import PairedExamples
from laser_callback.results.search import Phase, SearchResult, Trade
from laser_callback.search.verdict import decide
from laser_callback.stats.holm import adjust
from laser_callback.stats.judgement import Judgement
from laser_callback.stats.outcomes import Outcomes
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import prior_checks

RHOS = (0.0, 0.005, 0.1)
OBJECTIVE = ("first_token_accuracy",)


def grid(layers: int) -> list[Candidate]:
    """All improve by 0.01 nats times a number that grows with the layer; layer 0 does not improve."""
    return [
        candidate(layer, kind, rho, -0.01 * layer * (1 + place) * (1 + rho))
        for layer in range(layers)
        for place, kind in enumerate(KINDS)
        for rho in RHOS
    ]


def confirmed(plan: str, metric: str = OBJECTIVE[0], primary: str | None = OBJECTIVE[0]) -> LaserResult:
    right = torch.arange(40) < 4, torch.arange(40) < 16
    rows = [
        compare(metric, *map(Outcomes.of, right)),
        compare("log_loss", Outcomes(torch.linspace(5, 9, 40)), Outcomes(torch.linspace(4, 9, 40) ** 1.01)),
    ]
    said = [["Paris" if r else "the" for r in x.tolist()] for x in right]
    checks = prior_checks(metric, ["Paris"] * 40, tuple(said), tuple(map(Outcomes.of, right)))
    arms = {"laser": ArmResult(plan, adjust(rows, primary), {metric: checks}, "", 1.0, 0.1)}
    zeroed = ArmResult("3.fc_up@0", rows, {}, "", 1.0, 0.1)
    return LaserResult(arms, {"laser": {"zeroed": zeroed}}, primary, 1.0, {}, PairedExamples())


def full(layers: int = 4) -> SearchResult:
    candidates = grid(layers)
    best = max(candidates, key=lambda c: -(c.score or 0))
    for place, c in enumerate(sorted(candidates, key=lambda c: c.score or 0)[:14]):
        c.examples, c.status, c.reason = 300, "dropped out", f"place {place} of 48"
        c.gain = Estimate(0.05 - 0.01 * place, 0.004 - 0.01 * place, 0.096 - 0.01 * place)
        c.loss = Estimate(-0.81 + 0.1 * place, -0.92 + 0.1 * place, -0.70 + 0.1 * place)
    best.status, best.reason = "chosen", ""
    plan = str(best.plan)
    return SearchResult(
        LaserPlan.parse(plan),
        LaserPlan.parse(plan),
        "it is right more often",
        OBJECTIVE,
        candidates,
        [
            Trade(plan, 0.05, 0.013, True, True, 0.0123),
            Trade("0.q_proj@0.1", 0.02, -0.004),
            Trade("1.k_proj@0", 0.01, None),
        ],
        confirmed(plan),
        None,
        [
            Judgement(
                "perplexity <= +2 %", "perplexity", 32, 0.013, 0.031, "undecided", "96 windows decide it", None, True
            )
        ],
        [Phase("screen", 24.84, 100, 300.0), Phase("race", 3725.0, 9600, 1800.4)],
        {"screen": 100, "race": 300, "confirm": 400, "guard": 200},
        {},
        ["few guard examples"],
    )


def nothing(**more) -> SearchResult:
    known = {"plan": None, "found": None, "reason": "no candidate was better", "objective": OBJECTIVE, "candidates": []}
    return SearchResult(**known | more)


def fits(text: str, width: int = 80) -> bool:
    return max(map(len, text.splitlines())) <= width


def test_sections_in_order_with_numbers_and_units():
    text = plain(full(), 80)
    heads = ["use 3.fc_out@0.1", "confirmed on 400", "constraints", "race:", "gain against", "map of the screen"]
    places = [text.index(head) for head in [*heads, "map of the race", "\ntime", "! few guard examples"]]
    assert places == sorted(places)
    assert places[0] == 0
    assert "it is right more often  (1 warning below)" in text
    assert re.search(r"confirmed on 400 examples that no earlier step has seen", text)
    for expected in (
        "control, same matrix zeroed",
        f"prior check of {OBJECTIVE[0]}:",
        r"perplexity <= \+2 % +\+1.3% +\+3.1% +32 examples +undecided",
        "perplexity <= .2 %: 96 windows decide it",
        r"14 of 84 candidates run: 1 chosen, 13 dropped",
        r"✓ 3.fc_out@0.1 +1 +-0.23 +300 \+5.0 \[ ?\+0.4, +\+9.6\] -0.81 \[-0.92, -0.70\]",
        r"· 3.fc_out@0.005 +2 .* \+4.0 ",
        "4 more are in the JSON file",
        r"● +3.fc_out@0.1 +\+5.0 +\+1.3 +0.0123 +→ confirm",
        r"○ +0.q_proj@0.1 +\+2.0 +-0.4 +-",
        r"screen +24.8 s +100 +300",
        r"total +1 h 02 min +9,700 +2,100",
        "guard 200",
    ):
        assert re.search(expected, text), expected
    assert re.search(r"points +nats", text)
    assert "1.k_proj@0" not in text  # of unknown fluency


def test_verdicts():
    text = plain(nothing(found=LaserPlan.parse("3.mlp@0.1"), confirmed=confirmed("3.mlp@0.1")))
    assert text.startswith("keep the original: no candidate was better\n")
    assert "confirmed on 40 examples" in text  # the count of the rows, where the sets are unknown
    styles = [str(render(result)[0].spans[0].style) for result in (full(), nothing())]
    assert styles == ["bold green", "bold yellow"]


def test_a_gain_that_stays_below_a_constant_answer_is_told():
    gold = ["true"] * 20 + ["false"] * 20
    said = ["the"] * 40, ["true"] * 14 + ["a"] * 6 + ["false"] * 5 + ["a"] * 15
    right = [torch.tensor([one == answer for one, answer in zip(arm, gold, strict=True)]) for arm in said]
    outcomes = tuple(map(Outcomes.of, right))
    rows = adjust([compare(OBJECTIVE[0], *outcomes)], OBJECTIVE[0])
    checks = {OBJECTIVE[0]: prior_checks(OBJECTIVE[0], gold, said, outcomes)}
    arm = ArmResult("3.mlp@0.1", rows, checks, "", 1.0, 0.1)
    result = nothing(
        found=LaserPlan.parse("3.mlp@0.1"),
        confirmed=LaserResult({"laser": arm}, {}, OBJECTIVE[0], 1.0, {}, PairedExamples()),
    )
    decide(result, 1)
    assert result.plan == result.found
    (told,) = result.warnings
    assert "47.5% is right after the cut" in told
    assert "would reach 50.0%" in told


@pytest.mark.parametrize("layers", [2, 30, 80, 126])
def test_fits_in_80_columns_and_on_a_screen(layers):
    text = plain(full(layers), 80)
    assert fits(text)
    assert "…" not in text
    part = text[text.index("map of the screen") : text.index("map of the race")]
    assert part.count("\n") < 48
    assert all(kind in part for kind in KINDS)
    assert fits(plain(full(layers), 120), 120)


def test_degrades():
    for result in (
        nothing(),
        nothing(candidates=grid(2)),
        nothing(candidates=[candidate(0, "fc_in", 0.1, examples=3, status="finalist")]),
        nothing(phases=[Phase("screen", 1, 2, 3)], warnings=["a", "b"]),
    ):
        assert fits(plain(result, 80))
    text = plain(nothing(candidates=grid(2)))
    assert "not confirmed: no plan came out of the race" in text
    assert "none of 42 candidates was run" in text
    assert "map of the race" not in text
    assert "total" not in plain(nothing(phases=[Phase("screen", 1, 2, 3)]))  # of one phase
    exhaustive = [candidate(0, "fc_in", 0.1, examples=9, gain=Estimate(0.1), loss=Estimate(-0.1), status="finalist")]
    text = plain(nothing(candidates=exhaustive))
    assert "screen" not in text
    assert "map of the race" in text
    assert "+10.0" in text


def test_units_follow_what_was_measured():
    run = {"examples": 9, "gain": Estimate(0.25, 0.125, 0.5), "loss": Estimate(-0.1)}
    candidates = [candidate(0, "fc_in", 0.1, -3.0, **run)]
    by_key = {
        key: plain(SearchResult(None, None, "", (key,), candidates, settings={"loss": "mse"}))
        for key in ("answer_accuracy", "log_loss", "f1")
    }
    assert "+25.0 [+12.5, +50.0]" in by_key["answer_accuracy"]
    assert "points" in by_key["answer_accuracy"]
    assert "+0.25 [+0.12, +0.50]" in by_key["log_loss"]
    assert "nats" in by_key["log_loss"]
    assert "points" not in by_key["f1"]
    assert "nats" not in by_key["f1"]
    assert all("units of mse" in text for text in by_key.values())


def test_later_steps_are_told_apart():
    result = full()
    added = candidate(1, "q_proj", 0.1, -9.0, base="3.fc_out@0.1", examples=300, gain=Estimate(0.01))
    added.status, added.reason = "rejected", "no better on fresh examples"
    result.candidates.append(added)
    text = plain(result, 80)
    assert re.search(r"✗ 1.q_proj@0.1 +2 +1 +-9.00 +300 +\+1.0", text)
    assert "step 2 adds to 3.fc_out@0.1" in text
    assert "✗ 1.q_proj@0.1: no better on fresh examples" in text
    assert "9" not in text[text.index("░ lower") : text.index("at the rho")]  # the map is of the first step
    assert "rejected: no better" in plain(result, 120)


def test_hostile_names_are_text():
    evil = "[red]x[/]"
    candidates = [candidate(0, evil, 0.1, -1.0, examples=1, gain=Estimate(0.1), reason=evil, status="dropped out")]
    result = SearchResult(None, None, evil, (evil,), candidates, warnings=[evil], phases=[Phase(evil)])
    result.trades = [Trade(evil, 0.1, math.nan)]
    result.judgements = [Judgement(evil, evil, 3, math.nan, None, "fail", evil)]
    result.confirmed = confirmed(evil, metric=evil, primary=evil)
    result.candidates.append(proposed("0.fc_in@0.1, 1.fc_in@0.1", evil, examples=1))
    result.settings, result.sets = {"loss": evil}, {evil: 1}
    for width in (80, 120):
        text = plain(result, width)
        assert fits(text, width)
        # As markup it would vanish and leave its x alone.
        assert not re.search(r"(?<![\]\w])x(?![\w\[])", text.replace("/x.*/", ""))
        assert re.search(rf"layer +{re.escape(evil)}", text)
        assert re.search(rf"○ +{re.escape(evil)} +\+10.0 +-", text)


def test_long_plans_are_shown_in_short():
    plan = LaserPlan.parse(", ".join(f"{layer}.fc_out@0.005" for layer in range(30)))
    result = full()
    result.plan = result.found = plan
    result.confirmed = confirmed(str(plan))
    result.trades = [Trade(str(plan), 0.1, 0.1)] * 40
    text = plain(result, 80)
    assert fits(text)
    assert "30 more are in the JSON file" in text
    assert "0.fc_out@0.005" in text
    assert "29.fc_out@0.005" not in text
    assert "the whole plan, of 30 reductions, is `found` in the JSON file" in text
    assert "use 0.fc_out@0.005, 1.fc_out@0.005, 2.fc_out@0.005, 3.fc_out@0.005, and 26 more:" in " ".join(text.split())


def test_order_of_the_race():
    def run(name: str, examples: int, gain: float, loss: float, status: str) -> Candidate:
        estimates = {"gain": Estimate(gain), "loss": Estimate(loss)}
        return proposed(name, examples=examples, status=status, **estimates)

    in_order = [
        run("9.fc_in@0.1", 50, -0.1, 0.5, "chosen"),
        run("8.fc_in@0.1", 90, 0.1, 0.5, "rejected"),
        run("7.fc_in@0.1", 90, 0.1, 0.6, "finalist"),
        run("6.fc_in@0.1", 90, math.nan, 0.1, "finalist"),
        run("4.fc_in@0.1", 60, 0.0, 0.2, "dropped out"),
        run("5.fc_in@0.1", 60, 0.0, 0.2, "dropped out"),
        run("3.fc_in@0.1", 30, 0.9, -0.2, "dropped out"),
    ]
    for candidates in (in_order, in_order[::-1]):
        table = plain(nothing(candidates=candidates), 80)
        assert re.findall(r"^[✓✗•·] (\d)", table, re.M) == list("9876453")


def test_deterministic_and_pure():
    result = full()
    before = json.dumps(result.to_dict())
    assert plain(result) == plain(full()) == plain(result)
    result.candidates.reverse()
    result.trades.reverse()
    upside_down = plain(result)
    result.candidates.reverse()
    result.trades.reverse()
    assert upside_down == plain(result)
    assert json.dumps(result.to_dict()) == before


def test_terminals_without_unicode():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_search(full(), console)
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert "?" not in text
    assert "44 .1<" in text
    assert "+ 3.fc_out@0.1" in text
    out = io.StringIO()
    print_search(full(), Console(file=out, width=80))
    assert out.getvalue() == plain(full(), 80)
