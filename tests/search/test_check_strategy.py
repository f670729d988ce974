"""The conformance test for strategies: those of the package pass, and each kind of wrong one is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from recall import Recall, all_examples

from laser_callback.results.candidates import Candidate
from laser_callback.search import check_strategy
from laser_callback.search.strategies import STRATEGIES, strategies_of


class Half:
    """Half the rank of each target; subclasses do one thing wrong."""

    name, needs = "half", frozenset({"gradient"})

    def propose(self, context: Any) -> Any:
        return [context.candidate(self, target.at(0.5)) for target in context.targets]

    def neighbours(self, leader: Candidate, context: Any, closest: bool) -> Any:
        (cut,) = leader.plan
        return [context.candidate(self, replace(cut, rho=rho)) for rho in ((0.45, 0.55) if closest else (0.3, 0.7))]


@pytest.fixture
def tried(planted):
    module = Recall(planted.module.model).eval()
    return lambda strategy: check_strategy(strategy, module, all_examples(planted), within="0.mlp")


@pytest.mark.parametrize("name", STRATEGIES)
def test_those_of_the_package_pass(planted, name):
    module = Recall(planted.module.model).eval()
    torch.manual_seed(0)
    base = {key: value + 0.01 * torch.randn_like(value) for key, value in module.state_dict().items()}
    needs = STRATEGIES[name]().needs
    assert check_strategy(
        strategies_of([name])[0], module, all_examples(planted), within="0.all", base=base if "base" in needs else None
    )


def test_one_of_ones_own_passes(tried):
    assert [str(c.plan) for c in tried(Half())] == ["0.fc_in@0.5", "0.fc_up@0.5", "0.fc_out@0.5"]
    assert all(c.score is not None for c in tried(Half()))


class OfNobody(Half):
    def propose(self, context):
        return [replace(c, strategy="laser") for c in super().propose(context)]


class OnNothing(Half):
    def propose(self, context):
        return [replace(c, base="1.fc_in@0.1") for c in super().propose(context)]


class Nothing(Half):
    def propose(self, context):
        return []


class Texts(Half):
    def propose(self, context):
        return ["0.fc_in@0.5"]


class Twice(Half):
    def propose(self, context):
        return [context.candidate(self, text) for text in ("0.fc_in@0.5", "0.fc_in@k32")]


class Elsewhere(Half):
    def propose(self, context):
        found = super().propose(context)
        cut = replace(found[0].plan.reductions[0], layer=99)
        return [replace(found[0], plan=type(found[0].plan)([cut]))]


class NotFinite(Half):
    def propose(self, context):
        return [replace(c, score=float("nan")) for c in super().propose(context)]


class Drawn(Half):
    def propose(self, context):
        return [context.candidate(self, t.at(round(0.2 + 0.5 * torch.rand(()).item(), 4))) for t in context.targets]


class Writes(Half):
    def propose(self, context):
        next(context.module.parameters()).data.view(-1)[0] += 1
        return super().propose(context)


class Hooks(Half):
    def neighbours(self, leader, context, closest):
        context.module.register_forward_hook(lambda *_: None)
        return super().neighbours(leader, context, closest)


class Trains(Half):
    def neighbours(self, leader, context, closest):
        context.module.train()
        return super().neighbours(leader, context, closest)


class Itself(Half):
    def neighbours(self, leader, context, closest):
        return [replace(leader)]


class Forgets(Half):
    def neighbours(self, leader, context, closest):
        self.asked = getattr(self, "asked", 0) + 1
        return [context.candidate(self, replace(leader.plan.reductions[0], rho=0.01 * self.asked))]


class Unbounded(Half):
    def neighbours(self, leader, context, closest):
        return [replace(leader, plan=leader.plan, base="x")]


@pytest.mark.parametrize(
    ("wrong", "demand"),
    [
        (OfNobody, "its `strategy` must be 'half', got 'laser'"),
        (OnNothing, "its `base` must be '', got '1.fc_in@0.1'"),
        (Nothing, "gives at least one candidate"),
        (Texts, r"gives candidates \(`context.candidate"),
        (Twice, "gives no cut twice, got 0.fc_in@k32"),
        (Elsewhere, "proposes 99.fc_in@0.5: .* matches no matrix"),
        (NotFinite, "its `score` must be finite, got nan"),
        (Drawn, "gives the same when it is asked again"),
        (Writes, "`propose` leaves the module as it was"),
        (Hooks, "`neighbours` leaves the module as it was"),
        (Trains, "`neighbours` leaves the module as it was"),
        (Itself, "`neighbours` of 0.fc_in@0.5, closest=False, are others than itself"),
        (Forgets, "are the same when they are asked for again"),
        (Unbounded, "its `base` must be '', got 'x'"),
    ],
)
def test_each_kind_of_wrong_one_is_told(tried, planted, wrong, demand):
    before = {name: value.clone() for name, value in planted.module.state_dict().items()}
    try:
        with pytest.raises(AssertionError, match=demand):
            tried(wrong())
    finally:
        planted.module.load_state_dict(before)


def test_a_base_must_be_there(tried):
    class OfABase(Half):
        needs = frozenset({"base"})

    with pytest.raises(ValueError, match="needs a base"):
        tried(OfABase())
