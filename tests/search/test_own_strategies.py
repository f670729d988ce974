"""A search with a strategy of one's own, whose candidates are plans of several cuts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recall import SEARCH
from torch.utils.data import DataLoader

from laser_callback import LaserSearch
from laser_callback.data.sets import ExampleSets
from laser_callback.reports.page import save_page
from laser_callback.reports.search_terminal import plain
from laser_callback.results.candidates import Candidate, to_rows
from laser_callback.results.search import SearchResult
from laser_callback.search.screen import GradientScreen
from laser_callback.search.setup import described


@dataclass
class Together:
    """Values and output, and the whole MLP, at one rho."""

    rhos: tuple[float, ...] = (0.1, 0.5)
    name = "together"
    needs = frozenset({"gradient"})

    def propose(self, context: Any) -> Any:
        texts = ("{0}.v_proj@{1}, {0}.out_proj@{1}", "{0}.mlp@{1}")
        return [context.candidate(self, t.format(layer, rho)) for t in texts for layer in (0, 1) for rho in self.rhos]

    def neighbours(self, leader: Candidate, context: Any, closest: bool) -> Any:
        factor = 1.25 if closest else 1.5
        return [
            context.candidate(self, type(leader.plan)(replace(cut, rho=round(cut.rho * f, 4)) for cut in leader.plan))
            for f in (1 / factor, factor)
        ]


@dataclass
class Only:
    """One matrix at a few rhos."""

    where: str
    name = "only"
    needs = frozenset()

    def propose(self, context: Any) -> Any:
        return [context.candidate(self, f"{self.where}@{rho}") for rho in (0.1, 0.3, 0.5, 0.7)]

    def neighbours(self, leader: Candidate, context: Any, closest: bool) -> Any:
        return []


@pytest.fixture
def searched(recall, tmp_path):
    module, loader = recall
    options = {**SEARCH, "strategies": [Together(), "laser"], "candidates": 24, "controls": False}
    return module, loader, {**options, "folder": tmp_path / "run"}


def test_plans_of_several_cuts_race_beside_those_of_one(searched, tmp_path):
    module, loader, options = searched
    result = LaserSearch(module, loader, **options).run()
    raced = [c for c in result.candidates if c.examples]
    together = [c for c in raced if c.strategy == "together"]
    assert {c.strategy for c in raced} == {"together", "laser"}
    assert {len(c.plan) for c in together} <= {1, 2}
    assert any(len(c.plan) == 2 for c in together)
    assert all(c.score is not None for c in result.candidates if c.strategy == "together")
    assert all(c.rho is None for c in together)
    assert result.settings["strategies"] == ["together(rhos=[0.1, 0.5])", "laser"]

    again = SearchResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert [c.to_dict() for c in again.candidates] == [c.to_dict() for c in result.candidates]
    rows = to_rows(again.candidates)
    assert {row["strategy"] for row in rows} == {"together", "laser"}
    assert {row["plan"] for row in rows} == {str(c.plan) for c in result.candidates}
    text = plain(result)
    assert "strategy" in text
    assert "together" in text
    save_page(result, tmp_path / "page.html")
    assert "together" in (tmp_path / "page.html").read_text(encoding="utf-8")

    resumed = LaserSearch(module, loader, **options, resume=True).run()
    assert [c.to_dict() for c in resumed.candidates] == [c.to_dict() for c in result.candidates]
    other = {**options, "strategies": [Together((0.1,)), "laser"]}
    with pytest.raises(ValueError, match=r"strategies \("):
        LaserSearch(module, loader, **other, resume=True).run()


@pytest.mark.slow
def test_one_backward_pass_serves_all_and_what_is_in_place_is_left_alone(searched, monkeypatch):
    module, loader, options = searched
    made: list[int] = []
    end = GradientScreen.on_validation_end
    monkeypatch.setattr(GradientScreen, "on_validation_end", lambda self, *a: (made.append(1), end(self, *a)))
    result = LaserSearch(module, loader, **{**options, "max_reductions": 2}).run()
    bases = {c.base for c in result.candidates}
    assert len(made) == len(bases)
    for candidate in result.candidates:
        if candidate.base and candidate.reason == "it cuts what is cut already":
            assert not candidate.examples
    for candidate in (c for c in result.candidates if c.examples):
        names = [matrix.name for matrix, _ in candidate.whole.resolve(module)]
        assert len(set(names)) == len(names)
        assert str(candidate.whole).endswith(str(candidate.plan))


def test_composing_ends_where_nothing_is_left_to_cut(searched):
    module, loader, options = searched
    own = {**options, "strategies": [Only("1.v_proj")], "within": "1.v_proj", "max_reductions": 3}
    result = LaserSearch(module, loader, **own).run()
    assert {c.base for c in result.candidates} == {""}
    assert result.found is not None
    assert result.confirmed is not None


def test_exhaustive_runs_all_that_is_proposed(searched):
    module, loader, options = searched
    own = {**options, "strategies": [Together((0.5,))], "method": "exhaustive"}
    result = LaserSearch(module, loader, **own).run()
    assert len([c for c in result.candidates if c.score is None]) == len(result.candidates)
    proposed = [c for c in result.candidates if c.examples]
    assert len(proposed) >= 4
    assert {c.examples for c in proposed} == {result.sets["race"]}


class OfTheBase(Together):
    name, needs = "of-the-base", frozenset({"gradient", "base"})


class OfActivations(Together):
    name, needs = "of-activations", frozenset({"activations"})


def test_what_a_strategy_cannot_do_without_is_said_before_the_work(recall):
    module, loader = recall
    with pytest.raises(MisconfigurationException, match="'of-the-base' needs `base`"):
        LaserSearch(module, loader, **SEARCH, strategies=["laser", OfTheBase()]).run()
    sets = ExampleSets.reference(loader)  # race and confirm
    for strategy in (OfActivations(), "laser"):
        with pytest.raises(MisconfigurationException, match="needs examples to run the module on"):
            LaserSearch(module, sets, **SEARCH, strategies=[strategy]).run()


class Wrong(Together):
    def propose(self, context: Any) -> Any:
        return [replace(c, score=float("inf")) for c in super().propose(context)]


def test_a_wrong_proposal_names_its_strategy(recall):
    module, loader = recall
    loader = DataLoader(loader.dataset, batch_size=50)
    with pytest.raises(ValueError, match=r"the strategy 'together' proposes 0.v_proj@0.1, 0.out_proj@0.1: its `score`"):
        LaserSearch(module, loader, **SEARCH, strategies=[Wrong()]).run()


@pytest.mark.parametrize(
    ("given", "told"), [(["0.fc_in@0.1"], "proposes '0.fc_in@0.1': it must be"), (None, "got None")]
)
def test_what_is_no_candidate_is_told(recall, given, told):
    strategy = Together()
    strategy.propose = lambda context: given
    with pytest.raises(TypeError, match=f"the strategy 'together' .*{told}"):
        LaserSearch(*recall, **SEARCH, strategies=[strategy]).run()


@pytest.mark.parametrize("strategies", ["components", "intruders"])
def test_a_search_without_a_candidate_says_so(recall, strategies):
    """Without a gradient nothing is chosen by it; and a change of few percent brings no direction in."""
    module, loader = recall
    base = {name: value * 1.001 for name, value in module.state_dict().items()}
    more = {"method": "exhaustive"} if strategies == "components" else {"base": base}
    result = LaserSearch(module, loader, **SEARCH, **more, strategies=strategies, within="0.mlp").run()
    assert result.reason.startswith(f"nothing that {strategies} would propose can race")
    assert ("gradient to choose by" in result.reason) == (strategies == "components")


def test_exhaustive_sees_inputs_where_they_are_needed(recall):
    module, loader = recall
    own = {**SEARCH, "strategies": "whitened", "method": "exhaustive", "within": "0.fc_in", "controls": False}
    result = LaserSearch(module, loader, **own).run()
    assert any(":metric=inputs" in str(c.plan) and c.examples for c in result.candidates)


def test_a_search_leaves_gradients_where_they_are(recall):
    module, loader = recall
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad for parameter in module.parameters()]
    LaserSearch(module, loader, **SEARCH, strategies="late-mlp", within="0.fc_in", controls=False).run()
    assert all(p.grad is was and bool((was == 1).all()) for p, was in zip(module.parameters(), before, strict=True))
    module.zero_grad()


def test_what_may_be_used_up_is_not_looked_into():
    strategy = Together()
    vars(strategy).clear()
    strategy.numbers, strategy.kinds, strategy.one = itertools.count(), {"b", "c", "a"}, torch.tensor(2.5)
    assert described(strategy) == "together(numbers=count, kinds=['a', 'b', 'c'], one=2.5)"
    assert next(strategy.numbers) == 0


def test_a_strategy_is_described_by_what_it_was_made_with():
    assert described(Together()) == "together(rhos=[0.1, 0.5])"
    bare = Together()
    vars(bare).clear()
    assert described(bare) == "together"
