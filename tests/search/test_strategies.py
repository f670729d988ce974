"""The strategies that have a name: what they propose, in which order, and around a leader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from candidates import proposed
from screening import Steps, context_of, ids
from small_models import mixtral
from tiny import tiny_causal_lm
from torch.utils.data import DataLoader

from laser_callback import LaserPlan
from laser_callback.plans.target import RHOS, targets
from laser_callback.search.strategies import Context, Laser, LateMLP, strategies_of
from laser_callback.search.strategies.grid import grid
from laser_callback.search.strategies.rules import laser_rmt
from laser_callback.spectra.spectrum import Spectrum


def texts(candidates) -> list[str]:
    return [str(candidate.plan) for candidate in candidates]


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_the_grid_has_each_rank_once_and_never_the_whole():
    model = tiny_causal_lm()  # 32 wide: 0.005, 0.01 and 0.05 all keep rank 1
    (target,) = targets(model, "0.q_proj")
    candidates = grid([target], (0, 0.005, 0.01, 0.05, 0.5, 1.0), "laser", base="1.fc_in@0.1")
    assert [candidate.rho for candidate in candidates] == [0, 0.005, 0.5]
    assert str(candidates[1].whole) == "1.fc_in@0.1, 0.q_proj@0.005"
    assert (candidates[1].layer, candidates[1].kind, candidates[1].strategy) == (0, "q_proj", "laser")


@pytest.mark.parametrize("name", ["laser", "late-mlp", "laser-rmt", "gavish-donoho", "entropy", "random"])
@pytest.mark.parametrize("make", [tiny_causal_lm, mixtral])
def test_each_proposes_the_grid_in_an_order_of_its_own(name, make):
    (strategy,) = strategies_of([name])
    context = context_of(Steps(make()))
    result = list(strategy.propose(context))
    assert sorted(texts(result)) == sorted(texts(grid(context.targets, RHOS, name)))
    assert texts(result) == texts(strategy.propose(context))
    assert {candidate.strategy for candidate in result} == {name}
    assert all(candidate.score is None for candidate in result), "nothing was screened"
    other = texts(strategy.propose(replace(context, seed=1)))
    assert (texts(result) == other) == (name != "random")


def test_laser_scores_by_the_gradient():
    screened = context_of(Steps(tiny_causal_lm()), DataLoader(ids(10), 2))
    found = Laser().propose(screened)
    assert texts(found) == texts(grid(screened.targets, RHOS, "laser"))
    for candidate in found:
        assert (candidate.score, candidate.error) == screened.estimate(candidate.plan)
        assert candidate.error > 0
    few = context_of(Steps(tiny_causal_lm()), DataLoader(ids(4), 2))
    assert {candidate.error for candidate in Laser().propose(few)} == {0.0}, "of two batches it is not known"


def test_late_mlps_come_first():
    order = texts(LateMLP().propose(context_of(Steps(tiny_causal_lm()))))
    assert order[:3] == ["3.fc_in@0.005", "3.fc_up@0.005", "3.fc_out@0.005"]
    assert order[-1].endswith("@0")
    assert order.index("0.fc_out@0.9") < order.index("3.q_proj@0.1")


def test_rules_prefer_what_they_say():
    """One matrix is noise and a few directions, in a model of noise: that matrix, at their number, comes first."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 200}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data += 12 * torch.linalg.qr(torch.randn(200, 10)).Q @ torch.linalg.qr(torch.randn(96, 10)).Q.T * 10
    context = replace(context_of(Steps(model)), rhos=(0.0, 10 / 96, 0.5, 0.9))
    (strategy,) = strategies_of(["gavish-donoho"])
    first = next(c for c in strategy.propose(context) if (c.layer, c.kind) == (1, "fc_up"))
    assert first.rho == 10 / 96


def test_the_ratio_of_laser_rmt():
    matrix = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix.double()).numpy()
    q75, q25 = np.percentile(values, [75, 25])
    threshold = (q75 - q25) / 1.349 * (1 + np.sqrt(40 / 100))
    rank, ratio = laser_rmt(Spectrum.of(matrix))
    assert rank == (values > threshold).sum()
    assert ratio == pytest.approx(values[values > threshold].sum() / values[values <= threshold].sum())


# ---- around a leader -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screened() -> Context:
    return context_of(Steps(tiny_causal_lm()), DataLoader(ids(10), 2))


@pytest.mark.parametrize(
    ("rho", "far", "near"),
    [
        (0.0, [0.005, 0.1], []),  # of 32 it keeps 0, and half of the next keeps as many as that
        (0.2, [0.005, 0.1, 0.4, 0.6], [0.1414, 0.2828]),
        (0.9, [0.6, 0.8], [0.8485]),
    ],
)
def test_on_a_grid_two_steps_each_way_and_then_between(screened, rho, far, near):
    leader = proposed(f"0.fc_in@{rho}", "late-mlp", examples=3, score=-1.0, status="finalist")
    for closest, expected in ((False, far), (True, near)):
        found = LateMLP().neighbours(leader, screened, closest)
        assert texts(found) == [f"0.fc_in@{each}" for each in expected]
        assert all((c.layer, c.kind, c.strategy) == (0, "fc_in", "late-mlp") for c in found)
        assert all(c.score is None and not c.examples and c.status == "screened out" for c in found), "it is new"


def test_between_are_no_ranks_that_the_grid_has():
    context = replace(context_of(Steps(tiny_causal_lm())), rhos=(0.1, 0.11))
    assert LateMLP().neighbours(proposed("0.fc_in@0.1", "late-mlp"), context, closest=True) == []


def test_the_closest_of_laser_are_the_other_sides_of_a_product_too(screened):
    """To zero the queries of a layer is to zero its keys; to zero its values is to zero its output."""
    for kind, other in (("q_proj", "k_proj"), ("k_proj", "q_proj"), ("v_proj", "out_proj")):
        leader = proposed(f"1.{kind}@0.2")
        beside = [c for c in Laser().neighbours(leader, screened, closest=True) if c.kind != kind]
        assert {c.kind for c in beside} == {other}
        assert {0.2, 0.4} <= {c.rho for c in beside} <= {0.005, 0.1, 0.2, 0.4}
    zeroed = texts(Laser().neighbours(proposed("1.q_proj@0"), screened, closest=True))
    assert [text for text in zeroed if "k_proj" in text] == ["1.k_proj@0.005"], "its own zero is the same"
    far = texts(Laser().neighbours(proposed("1.q_proj@0.1"), screened, closest=False))
    assert all("q_proj" in text for text in far)
    unscreened = replace(screened, sensitivities=type(screened.sensitivities)())
    assert all("q_proj" in text for text in texts(Laser().neighbours(proposed("1.q_proj@0.1"), unscreened, True)))


def test_a_leader_off_the_grid_has_what_lies_between(screened):
    leader = proposed("1.q_proj@0.15")
    assert Laser().neighbours(leader, screened, closest=False) == []
    assert [c.rho for c in Laser().neighbours(leader, screened, closest=True)] == [0.1732]


# ---- what a context tells --------------------------------------------------------------------------------------------


def test_a_candidate_knows_its_place(screened):
    def place(plan: str) -> tuple[object, ...]:
        found = screened.candidate(Laser(), plan)
        assert str(found.plan) == plan
        return found.layer, found.kind, found.rho

    assert place("0.fc_in@0.1") == (0, "fc_in", 0.1)
    assert place("0.fc_in@entropy") == (0, "fc_in", None)
    assert place("0.mlp@0.1") == (0, None, None)
    assert place("0.fc_in@0.1, 1.fc_in@0.1") == (None, "fc_in", None)
    assert place("-1.fc_in@0.1") == (3, "fc_in", 0.1)
    (cut,) = LaserPlan.parse("0.fc_in@0.1")
    assert screened.candidate(Laser(), cut) == screened.candidate(Laser(), LaserPlan([cut]))
    assert screened.candidate(Laser(), "0.fc_in@0.1").score is not None
    assert screened.candidate(LateMLP(), "0.fc_in@0.1").score is None, "it does not need the gradient"
    with pytest.raises(ValueError, match="matches no matrix"):
        screened.candidate(Laser(), "9.fc_in@0.1")


# ---- names -----------------------------------------------------------------------------------------------------------


class Own:
    name, needs = "own", frozenset()

    def propose(self, context):
        return []

    def neighbours(self, leader, context, closest):
        return []


class Lacking:
    name, needs = "lacking", frozenset()


def test_strategies_are_names_or_objects():
    own = Own()
    assert [s.name for s in strategies_of("laser, late-mlp")] == ["laser", "late-mlp"]
    assert strategies_of(["random", own])[1] is own


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["late_mlp"], ValueError, "`strategies` must be of laser, .* got 'late_mlp', did you mean `late-mlp`"),
        ([], ValueError, "one or more, .* got none"),
        ([Own(), Own()], ValueError, "each of a name of its own, got own, own"),
        ([Own], TypeError, r"give an object, Own\(\)"),
        ([Lacking()], TypeError, "it has no `propose` and no `neighbours`"),
        ([3], TypeError, "it has no `name` and no `needs`"),
    ],
)
def test_what_is_no_strategy_is_said(given, error, message):
    with pytest.raises(error, match=message):
        strategies_of(given)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "a b"}, "letters, digits and hyphens, got 'a b'"),
        ({"needs": {"time"}}, "must be a set of gradient, base"),
    ],
)
def test_names_and_needs_are_checked(attributes, message):
    own = Own()
    vars(own).update(attributes)
    with pytest.raises(TypeError, match=message):
        strategies_of([own])
