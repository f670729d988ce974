"""Plans of hundreds of reductions, and candidates that no map has a place for: readable wherever they are shown."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from candidates import proposed
from classifier import PLAN, compared, searched
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from laser_callback.plans import LaserPlan, brief
from laser_callback.plans.words import in_words
from laser_callback.reports import print_cleanup, print_rollout
from laser_callback.reports.loggers import publish
from laser_callback.reports.model_card import model_card
from laser_callback.reports.page import page
from laser_callback.reports.pictures import figures
from laser_callback.reports.search_terminal import leaders, plain
from laser_callback.reports.terminal import plain as plain_comparison
from laser_callback.results import (
    CleanupResult,
    Contender,
    Estimate,
    GateVerdict,
    RolloutResult,
    SearchResult,
    Stage,
    Trade,
)
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import apply

PLACES = "places-" + "+".join(map(str, range(1, 200, 3)))
MANY = LaserPlan.parse(", ".join(f"{layer}.fc_out@{PLACES}:keep=tail" for layer in range(200)))
LAST = str(MANY.reductions[-1])
SHORT = "0.fc_out@places(67):keep=tail"


def long_search() -> SearchResult:
    """A search whose winner is a plan of 200 reductions, beside cuts of the grid and a dropped layer."""
    search = searched()
    numbers = {"gain": Estimate(0.05, 0.01, 0.09), "loss": Estimate(-0.4, -0.5, -0.3)}
    winner = proposed(str(MANY), "components", examples=100, status="chosen", score=-1.0, **numbers)
    layer = replace(proposed("1.writes@0:bias=cut", "drop", score=-0.1), rho=None, kind=None)
    search.candidates[0].status = "finalist"
    search.candidates += [winner, layer, proposed("1.q_proj@0.2", base=str(MANY), examples=9)]
    search.plan = search.found = MANY
    search.trades = [Trade(str(MANY), 0.05, 0.01, True, True), Trade("0.q_proj@0.1", 0.03, 0.02)]
    search.confirmed = compared("*.mlp@0.5", controls=True)
    arm = search.confirmed.arms["laser"]
    search.confirmed.arms["laser"] = replace(arm, plan=str(MANY))
    return search


@pytest.fixture(scope="module")
def search() -> SearchResult:
    return long_search()


def test_the_terminal_has_no_long_plan(search):
    for width in (80, 120):
        text = plain(search, width)
        assert max(map(len, text.splitlines())) <= width
        assert "199.fc_out" not in text
        assert text.count("places(67)") >= 5  # verdict, confirmed, strategies, race, trades
        assert text.count("\n") < 130
    console = Console(width=80)
    with console.capture() as shown:
        console.print(leaders([c for c in search.candidates if c.examples], ("acc",), "log_loss"))
    assert shown.get().count("\n") < 9


def test_the_terminal_says_who_proposed_what(search):
    text = plain(search, 80)
    part = text[text.index("strategies: ") : text.index("race: ")]
    rows = {line.split()[0]: line.split()[1:3] for line in part.splitlines() if line[:5] in ("laser", "drop ", "compo")}
    assert rows == {"laser": ["21", "8"], "drop": ["1", "0"], "components": ["1", "1"]}
    assert re.search(r"components .* 0.fc_out@places\(67\):keep=tail", part)
    first = sum(not candidate.base for candidate in search.candidates)
    assert f"2 of {first} candidates have no place in the maps" in " ".join(text.split())
    told = " ".join(text.split())
    assert "places(9): nine single directions of a matrix; plans in full are in the JSON file" in told
    assert "places(9)" not in plain(searched(), 80)
    assert "nothing of drop raced: others were ahead of these in the order of the race" in told
    assert "strategies: " not in plain(searched(), 80)  # of one strategy there is nothing to say


def test_a_strategy_of_a_long_name_leaves_room_for_plans():
    search = long_search()
    for candidate in search.candidates:
        if candidate.strategy == "components":
            candidate.strategy = "mine-of-whom-much-is-to-be-told-by-its-name"
    table = plain(search, 80).partition("strategies: ")[2]
    assert max(map(len, table.splitlines())) <= 80
    assert "mine-of-...its-name" in table
    assert "best of these" in table.replace("\n", " ")
    assert "0.fc_out@places(67)" in table
    assert " plan " in table


def test_a_comparison_has_no_long_plan(search):
    text = plain_comparison(search.confirmed, 80)
    assert "199.fc_out" not in text
    assert SHORT in text


def test_the_page_unfolds_them(search):
    source = page(search)
    assert f"<h1>Use <code>{SHORT}, 1.fc_out@places(67):keep=tail, and 198 more</code></h1>" in source
    whole = str(MANY).replace(", ", ",\n")
    assert source.count(f'<pre tabindex="0">{whole}</pre>') >= 4  # head, comparison, race, trades
    outside = re.sub(r"<details.*?</details>", "", source, flags=re.DOTALL)
    assert "199.fc_out" not in outside
    assert "have no place in a map" in source
    assert "1.writes@0:bias=cut" in source[source.index("have no place in a map") :]


def test_the_pages_code_reads_the_plan_from_the_file_that_it_names(search, tmp_path, monkeypatch):
    source = page(search)
    (saved,) = re.findall(
        r"save it as <code>plan.txt</code></summary><pre tabindex=\"0\">(.*?)</pre>", source, re.DOTALL
    )
    (tmp_path / "plan.txt").write_text(saved)
    monkeypatch.chdir(tmp_path)
    assert LaserPlan.of("plan.txt") == MANY
    assert "with reduced(model, &#39;plan.txt&#39;):" in source
    assert "with reduced(model, &#39;plan.txt&#39;):" not in page(compared(PLAN))


def test_pictures_and_loggers(search, tmp_path):
    drawn = figures(search)
    assert set(drawn) >= {"map", "trades", "comparison"}
    for figure in drawn.values():
        texts = [text.get_text() for axis in figure.axes for text in axis.texts] + [figure.get_suptitle()]
        assert all(len(line) < 110 for text in texts for line in text.split("\n"))
    logger = TensorBoardLogger(tmp_path)
    written: list[str] = []
    logger.experiment.add_text = lambda name, text, step: written.append(text)
    publish(search, logger)
    assert any(SHORT in text for text in written)
    assert not any("199.fc_out" in text for text in written)


def test_a_search_without_any_cut_in_the_map_has_no_map():
    both = [
        proposed("0.fc_in@0.1, 1.fc_in@0.1", "mine", examples=9, score=-0.1, gain=Estimate(0.1), loss=Estimate(-0.1)),
        proposed("0.fc_in@0.1, 1.fc_in@0.2", "mine", score=-0.2),
    ]
    search = SearchResult(None, None, "it is", ("acc",), both)
    assert "map" not in figures(search)
    assert "map of" not in plain(search)
    assert "Map of the search" not in page(search)


def test_gates_rollout_and_cleanup(search):
    stage = Stage(GateVerdict(MANY, [], {}, "a gate"), "went back", 1.0)
    rollout = RolloutResult(None, False, (MANY, MANY), [stage])
    contender = Contender("strategy", str(MANY), "components", 0.1, 100, 0.9)
    cleanup = CleanupResult("a.ckpt", search, [contender], plan=MANY)
    for show, result in ((print_rollout, rollout), (print_cleanup, cleanup)):
        console = Console(width=80)
        with console.capture() as shown:
            show(result, console)
        assert "199.fc_out" not in shown.get()
        assert shown.get().count("\n") < 20
    assert all(len(line) < 300 for line in [*rollout.log, cleanup.verdict])
    assert len(search.verdict) < 300
    assert search.to_dict()["plan"] == str(MANY)  # files have all of it


def test_the_model_card_folds_a_long_table():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 16)
    whole = apply(copy.deepcopy(model), "*.all@0.5")
    for recipe, folded in ((whole, True), (apply(model, "3.all@0.5"), False)):
        card = str(model_card(recipe, title="t", usage="u", library="l"))
        before, _, table = card.partition("\n\n| matrix | cut |")
        assert before.endswith(f"<summary>{len(recipe.matrices)} matrices</summary>" if folded else "## What was cut")
        rows = table.partition("\n\n")[0].splitlines()
        assert len(rows) == len(recipe.matrices) + 2
        assert ("\n\n</details>\n\nThe whole hashes" in card) == folded


def test_the_model_card():
    plan = LaserPlan.parse(
        f"*.fc_in@places-{'+'.join(map(str, range(0, 16, 2)))}:keep=tail, *.q_proj@0.1:band=0.5,scale=0.5"
    )
    long = LaserPlan([*plan, *LaserPlan.parse(", ".join(f"{layer}.out_proj@0.1:scale=0.123" for layer in range(2)))])
    card = str(model_card(Recipe(long, []), title="t", usage="u", library="l"))
    assert f"without training: `{brief(long)}`" in card
    assert "The whole plan and the whole hashes are in `laser.json`" in card
    assert "The whole hashes are in" in str(
        model_card(Recipe(LaserPlan.parse(PLAN), []), title="t", usage="u", library="l")
    )


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("1.fc_in@0.1, 1.q_proj@k2", "were replaced by low-rank approximations ("),
        ("4.writes@0", "were set to zero ("),
        ("4.writes@0, 1.fc_in@0.1", "were set to zero or replaced by low-rank approximations ("),
        ("*.all@0:scale=0.8", "were multiplied by 0.8 ("),
        ("1.fc_in@0.1:keep=tail", "were changed in some of their directions ("),
        ("1.fc_in@0.1:of=entries", "were cut by the size of their entries ("),
    ],
)
def test_the_model_card_says_what_was_done(text, done):
    card = str(model_card(Recipe(LaserPlan.parse(text), []), title="t", usage="u", library="l"))
    assert done in card
    words = in_words(LaserPlan.parse(text))
    assert (f"In words: {words}." in card) == bool(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("27.fc_in@0.01, 3.fc_out@0", ""),
        ("12.writes@0", "it drops layer 12 (all that it writes is cut to zero)"),
        (
            "12.writes@0:bias=cut, 14.fc_out@0:bias=cut, 3.fc_in@0.1",
            "it drops layer 12 and the MLP of layer 14 (all that they write is cut to zero)",
        ),
        ("*.all@k2:cut=delta", "it cuts what fine-tuning has changed, and nothing else"),
        (
            "*.all@0:scale=0.4,cut=delta",
            "it keeps 0.4 of what fine-tuning has changed: weight interpolation with the base (WiSE-FT)",
        ),
        ("*.all@0:cut=delta", "it cuts what fine-tuning has changed, and nothing else"),
        (
            "3.fc_in@0.1, 2.fc_in@k2:cut=delta",
            "it cuts what fine-tuning has changed, and other weights themselves",
        ),
        (
            "3.fc_in@places-0-4+9:keep=tail, 4.fc_in@places-1:keep=tail",
            "it takes out 7 directions, chosen one by one, of 2 matrices",
        ),
        ("3.fc_in@places-1:keep=tail,scale=1.25", "it multiplies by 1.25 1 direction, chosen one by one, of 1 matrix"),
        ("3.fc_in@places-1-3:scale=0", "it takes out all but 3 directions, chosen one by one, of 1 matrix"),
    ],
)
def test_in_words(text, words):
    assert in_words(LaserPlan.parse(text)) == words
