"""Searches where something is missing, breaks or is the same: batch means, absent metrics, broken arms, no time."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from candidates import proposed
from recall import QUIET, SEARCH, Recall
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laser_callback import FactsDataModule, LaserModule, LaserSearch, reduced
from laser_callback.compare.measure import Lab, Table, Values
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import targets
from laser_callback.reports.search_terminal import plain
from laser_callback.results.candidates import Estimate
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.budget import Budget, OutOfTimeError, passes_of
from laser_callback.search.race import Objective, Rung
from laser_callback.search.steps import Steps
from laser_callback.search.tables import from_original, joined, row_of, rows_of, to_step, to_table
from laser_callback.spectra.store import Spectra
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.outcomes import Outcomes
from laser_callback.support.journal import Journal
from laser_callback.support.progress import PhaseProgress

pytestmark = pytest.mark.slow


class Means(Recall):
    """Logs means of batches, and returns the loss only."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().validation_step(batch, batch_idx)["loss"]


def test_where_pairs_are_batches_refined_candidates_see_the_batches_of_the_others(recall, monkeypatch):
    module, loader = recall
    originals: dict[str, list[Tensor]] = {"race": [], "refine": []}
    measure = Steps.measure

    def recorded(self: Steps, name: str, phase: str, *rest: Any, **options: Any) -> Table:
        table = measure(self, name, phase, *rest, **options)
        originals[phase].append(table[ORIGINAL]["val_loss"].values)
        return table

    monkeypatch.setattr(Steps, "measure", recorded)
    loader = DataLoader(loader.dataset, batch_size=32)
    LaserSearch(Means(module.model).eval(), loader, **{**SEARCH, "candidates": 20}, controls=False).run()
    rungs, refined = originals["race"][:-1], originals["refine"]  # the last rung comes after
    assert len(rungs) > 1
    assert len(refined) % len(rungs) == 0
    for number, values in enumerate(refined):
        assert torch.equal(values, rungs[number % len(rungs)])


@pytest.mark.parametrize("loss", [None, "loss"])
def test_without_a_loss_the_same_right_answers_make_no_twins(loss):
    arms = [f"0.fc_in@{rho}" for rho in (0.1, 0.2, 0.4)]
    ones = Values(torch.ones(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64))

    def measure(name: str, phase: str, plans: list[LaserPlan], *_: Any) -> Table:
        return {arm: {"right": ones, "loss": ones} for arm in [ORIGINAL, *map(str, plans)]}

    none = cast("Any", None)
    sets = cast("Any", SimpleNamespace(loader=lambda *_, **__: None))
    objective = Objective(("right",), (1,), loss)
    steps = Steps(none, sets, none, PhaseProgress(False), objective, objective.measured)
    steps.measure = measure  # type: ignore[method-assign, assignment]
    candidates = list(map(proposed, arms))
    _, finalists = steps.race("1", candidates, range(10), [Rung(10, 3)])
    assert len(finalists) == (3 if loss is None else 1)


class Normed(pl.LightningModule):
    """Divides by a norm: with its matrix zeroed, every value is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_causal_lm()
        self.project = nn.Linear(8, 8, bias=False)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        hidden = self.project(batch[0])
        loss = ((hidden / hidden.norm(dim=1, keepdim=True) - batch[0]) ** 2).sum(1)
        self.log("val_loss", loss.mean())
        return {"val_loss": loss}


def test_an_arm_that_is_nan_everywhere_is_the_last_and_ends_nothing():
    loader = DataLoader(TensorDataset(torch.randn(12, 8)), batch_size=5)
    plans = {text: LaserPlan.parse(text) for text in ("/project/@0", "/project/@0.5")}
    table = Lab(Normed(), Spectra(), "cpu").measure(plans, loader, ["val_loss"])
    assert table["/project/@0"]["val_loss"].values.isnan().all()
    assert table["/project/@0.5"]["val_loss"].values.isfinite().all()
    objective = Objective(("val_loss",), (-1,))
    broken, _ = objective.estimates(table, "/project/@0")
    assert broken.delta != broken.delta
    assert not rows_of(["val_loss"], table, "/project/@0")
    assert not proposed("0.fc_in@0", gain=broken).helps


@pytest.mark.slow
def test_facts_of_which_few_have_paraphrases_are_judged_by_them_too():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    facts = [
        {"id": str(i), "prompt": f"The capital of land {i} is", "answer": "Rome", "subject": str(i)}
        | ({"paraphrases": [f"Land {i} has the capital"]} if i % 20 == 7 else {})
        for i in range(160)
    ]
    search = LaserSearch(module, FactsDataModule(facts, module.tokenizer), candidates=12, controls=False, **QUIET)
    result = search.run()
    assert result.objective == ("first_token_accuracy", "paraphrase_robustness")
    assert any(candidate.gain for candidate in result.candidates)


@pytest.mark.slow
def test_a_search_goes_on_with_as_many_candidates_as_it_began_with(recall, tmp_path, monkeypatch):
    module, loader = recall
    folder = tmp_path / "run"
    first = LaserSearch(module, loader, **SEARCH, folder=folder, controls=False).run()
    again = LaserSearch(module, loader, **SEARCH, folder=folder, controls=False, resume=True, minutes=1e-6).run()
    assert again.found == first.found
    assert [c.to_dict() for c in again.candidates] == [c.to_dict() for c in first.candidates]


class Refuses(Recall):
    """Refuses a matrix of zeros, and, where it is told so, any other than its own."""

    strict = False

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        weight = self.model.model.layers[0].mlp.up_proj.weight
        if not weight.any() or (self.strict and not torch.equal(weight, self.own)):
            raise ValueError("Input contains NaN")
        return super().validation_step(batch, batch_idx)


def test_a_candidate_that_raises_is_dropped_with_the_reason_also_on_resuming(recall, tmp_path):
    module, loader = Refuses(recall[0].model).eval(), recall[1]
    options = {
        **SEARCH,
        "within": "0.mlp",
        "rhos": [0.0, 0.1],
        "candidates": 8,
        "strategies": "random",
        "controls": False,
    }
    options |= {"folder": tmp_path / "run"}
    results = [LaserSearch(module, loader, **options, resume=resume).run() for resume in (False, True)]
    for result in results:
        (dropped,) = [c for c in result.candidates if str(c.plan) == "0.fc_up@0"]
        assert dropped.status == "dropped out"
        assert "fails on batch 0" in dropped.reason
        assert "Input contains NaN" in dropped.reason
    assert results[0].found == results[1].found


def test_a_plan_that_raises_on_unseen_examples_is_not_confirmed(recall, monkeypatch):
    module, loader = Refuses(recall[0].model).eval(), recall[1]
    module.own = module.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    compare = Steps.compare

    def strict(*arguments: Any, **options: Any) -> Any:
        module.strict = True
        return compare(*arguments, **options)

    monkeypatch.setattr(Steps, "compare", strict)
    options = {**SEARCH, "within": "0.fc_up", "rhos": [0.1, 0.9], "strategies": "random", "controls": False}
    result = LaserSearch(module, loader, **options).run()
    assert result.plan is None
    if result.found is not None:
        assert "is confirmed: the reduced pass of the plan" in result.reason
        assert "Input contains NaN" in result.reason


def test_what_enters_late_is_in_the_budget():
    lab = cast("Any", SimpleNamespace(share=lambda plan: 0.5))
    sets = cast("Any", SimpleNamespace(sizes={"confirm": 100}))
    none = cast("Any", None)
    steps = Steps(lab, sets, Journal(None, {}), none, Objective(("right",), (1,)), ("right",))
    ranked = [proposed(f"{i}.fc_in@0.1") for i in range(12)]
    alone, with_others = (passes_of(steps, ranked, 200, 6, near) for near in (0, 20))
    assert with_others - alone == 20 * 0.5 * 200 / 2
    for minutes in (None, with_others + 1):  # a pass takes a minute
        assert Budget(minutes, time.perf_counter(), 60.0).affordable(steps, "1", ranked, 200, 6, 20) == 12
    with pytest.raises(OutOfTimeError, match="is too short"):
        Budget(alone, time.perf_counter(), 60.0).affordable(steps, "1", ranked, 200, 6, 20)
    without = passes_of(steps, ranked, 200, 6, 0, 2)
    assert alone - without == 5 * steps.sets.sizes["confirm"]


def test_what_comes_first_may_take_all_places_and_a_race_that_goes_on_says_why(recall, capsys):
    module, loader = recall
    base = {name: 0.9 * parameter.detach() for name, parameter in module.named_parameters()}
    own = {**SEARCH, "candidates": 4, "progress": True, "strategies": ["delta", "laser"], "rhos": (0.1,)}
    result = LaserSearch(module, loader, base=base, **own, constraints=["val_loss <= -50"]).run()
    told = capsys.readouterr().err
    assert told.count("race again: every finalist breaks a constraint in the race, so that the next candidates") == 2
    assert "refine: 1 candidates" not in told
    why = "delta came first, ahead of all others, and took all 12 places"
    assert {c.reason for c in result.candidates if c.strategy == "laser"} == {why}
    assert f"nothing of laser raced: {why}" in plain(result, 200)


def test_a_plan_that_leaves_no_other_matrix_has_the_other_controls(recall):
    module, loader = recall
    base = {name: 0.9 * parameter.detach() for name, parameter in module.named_parameters()}
    result = LaserSearch(module, loader, base=base, **{**SEARCH, "strategies": ["delta"]}).run()
    assert result.confirmed is not None
    assert {*result.confirmed.controls["laser"]} == {"zeroed", "noise"}
    assert (
        result.confirmed.not_compared[f"random control of {result.found}"] == "the plan leaves too few other matrices"
    )


@pytest.mark.parametrize(
    ("gain", "loss", "helps"),
    [(0.1, 0.2, True), (-0.1, -0.2, False), (0.0, -0.1, True), (0.0, 0.1, False), (0.0, None, False)],
)
def test_what_helps(gain, loss, helps):
    estimate = None if loss is None else Estimate(loss)
    assert proposed("0.fc_in@0", gain=Estimate(gain), loss=estimate).helps is helps


def test_a_row_against_a_base_becomes_one_against_the_original():
    values = {ORIGINAL: [0.2, 0.4, 0.6], "base": [0.3, 0.5, 0.8], "arm": [0.1, 0.5, 0.7]}
    table = {
        arm: {"acc": Values(torch.tensor(row, dtype=torch.float64), torch.ones(3, dtype=torch.float64))}
        for arm, row in values.items()
    }
    change = row_of("acc", table, "base").delta
    row = from_original(row_of("acc", {ORIGINAL: table["base"], "arm": table["arm"]}, "arm"), change)
    expected = row_of("acc", table, "arm")
    assert (row.original, row.delta) == pytest.approx((expected.original, expected.delta))


@pytest.mark.parametrize(("batch", "said"), [(80, "2 batches, .* tells as much as 6 independent ones"), (4, "")])
def test_where_pairs_are_batches_a_few_of_them_are_known_to_tell_little(recall, batch, said):
    module, loader = recall
    for kind in (Means, Recall):
        data = DataLoader(loader.dataset, batch_size=batch)
        search = LaserSearch(kind(module.model).eval(), data, **SEARCH, min_gain=0.15, controls=False)
        search._prepare(time.perf_counter())
        about = [warning for warning in search.result.warnings if "confirm set" in warning]
        assert bool(about) is bool(said and kind is Means)
        assert not about or re.search(f"160 examples in {said}:.* or return a value per example", about[0])


def test_relative_changes_are_multiplied_and_not_added():
    values = {ORIGINAL: [2.0, 2.2, 2.4], "base": [2.3, 2.6, 2.9], "arm": [2.1, 2.9, 3.3]}  # nats per token
    tokens = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    table = {
        arm: {"ppl": Values(torch.tensor(row, dtype=torch.float64), tokens, "log_ratio")} for arm, row in values.items()
    }
    change = row_of("ppl", table, "base").delta
    against_base = row_of("ppl", {ORIGINAL: table["base"], "arm": table["arm"]}, "arm")
    row, expected = from_original(against_base, change), row_of("ppl", table, "arm")
    assert (row.original, row.delta) == pytest.approx((expected.original, expected.delta))
    assert row.original * (1 + row.delta) == pytest.approx(row.reduced)
    assert row.lower < row.delta < row.upper


def test_the_passes_of_confirm_are_those_of_the_plan_and_of_its_controls(recall):
    module, loader = recall
    shares: list[float] = []
    for controls in (False, True):
        result = LaserSearch(module, loader, **SEARCH, controls=controls, within="1.mlp").run()
        (confirm,) = [phase for phase in result.phases if phase.name == "confirm"]
        assert confirm.passes == result.sets["confirm"] * (7 if controls else 2)
        shares.append(confirm.whole_passes / result.sets["confirm"])
    controls = result.confirmed.controls["laser"]
    arms = [controls["zeroed"], controls["random"], *controls["noise"].passes]
    plans = [result.found, *(LaserPlan.parse(arm.plan) for arm in arms)]
    lab = Lab(module, Spectra(), "cpu")
    assert shares == pytest.approx([1 + lab.share(plans[0]), 1 + sum(map(lab.share, plans))])


def test_a_single_matrix_of_no_kind_in_a_layer_is_a_target_by_its_name():
    model = tiny_causal_lm()
    for layer in model.model.layers:
        layer.odd = nn.Linear(32, 16, bias=False)
    found = targets(model, "/.*odd/")
    assert len(found) == len(model.model.layers)
    assert all(str(target.at(0.5)).startswith("/") for target in found)


class Text(pl.LightningModule):
    """Returns what a perplexity is made of: nats per token, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8, bias=False)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Outcomes]:
        nll, tokens = self.project(batch[0]).square().mean(1), batch[1]
        self.log("ppl", (nll * tokens).sum().div(tokens.sum()).exp())
        return {"ppl": Outcomes(nll, tokens, "log_ratio")}


def test_a_perplexity_is_compared_as_a_ratio_in_the_race_too():
    data, tokens = torch.randn(12, 8), torch.arange(1.0, 13.0)
    module, plan = Text(), LaserPlan.parse("/project/@0.25")
    table = Lab(module, Spectra(), "cpu").measure({"cut": plan}, DataLoader(TensorDataset(data, tokens), 5), ["ppl"])

    def part(where: slice) -> Table:
        return {
            arm: {"ppl": replace(row["ppl"], values=row["ppl"].values[where], weights=row["ppl"].weights[where])}
            for arm, row in table.items()
        }

    row = row_of("ppl", to_table(*to_step(joined(part(slice(5)), part(slice(5, None))))), "cut")
    before = module.project(data).square().mean(1)
    with reduced(module, plan):
        after = module.project(data).square().mean(1)
    nats = [float((nll * tokens).sum() / tokens.sum()) for nll in (before, after)]
    assert row.kind == "log_ratio"
    assert (row.original, row.reduced) == pytest.approx(tuple(map(math.exp, nats)), rel=1e-5)
    bound = Constraint.parse("ppl <= +5 %")
    assert bound.judge(row).change == pytest.approx(math.exp(nats[1] - nats[0]) - 1, rel=1e-4)
