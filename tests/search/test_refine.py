"""Neighbours of the leading candidates, ahead of a race's last round: which are tried, and what goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from screening import Steps as Module
from screening import context_of, ids
from tiny import tiny_causal_lm
from torch.utils.data import DataLoader

from laser_callback.compare.measure import Lab, Table, Values
from laser_callback.plans.plan import LaserPlan
from laser_callback.results.candidates import Candidate
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.proposals import Proposals, views_for
from laser_callback.search.race import Objective
from laser_callback.search.refine import REFINED, Refinement
from laser_callback.search.sensitivities import View
from laser_callback.search.steps import Steps
from laser_callback.search.strategies import AtRandom, Context, Laser, LateMLP

EXAMPLES = 200
GRID = (0.0, 0.005, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
"""Rhos that make different ranks of 32."""
BEST = {"0.q_proj": 0.2, "1.fc_in": 0.9, "2.fc_in": 0.0, "3.fc_in": 0.2}
"""The rho at which each matrix gives the lowest loss, all of them the same, but for the first: lower."""


def outcome(plan: LaserPlan) -> dict[str, Values]:
    """No gain, and a loss that rises with the number of grid steps from the best rho; with noise that pairs remove."""
    (cut,) = plan
    place = f"{cut.layer}.{cut.matrix}"
    steps = abs(np.interp(cut.rho, GRID, range(len(GRID))) - GRID.index(BEST[place]))
    loss = 0.5 + 0.01 * steps - 0.02 * (place == "0.q_proj")
    noise = np.random.default_rng(0).normal(size=EXAMPLES)

    def values(numbers: Any) -> Values:
        return Values(torch.from_numpy(numbers), torch.ones(EXAMPLES, dtype=torch.float64))

    return {"right": values(np.zeros(EXAMPLES)), "loss": values(loss + noise)}


def proposals(context: Context, *strategies: Any, base: str = "", listed: list[Candidate] | None = None) -> Proposals:
    context = replace(context, base=base)
    found = [candidate for strategy in strategies for candidate in strategy.propose(context)]
    lab = Lab(context.module, context.spectra, "cpu")
    in_place = LaserPlan.parse(base) if base else None
    return Proposals(found, strategies, context, lab, in_place, found if listed is None else listed)


@pytest.fixture(scope="module")
def screened() -> Context:
    return context_of(Module(tiny_causal_lm()), DataLoader(ids(10), 2))


def test_the_leading_matrices_find_their_best_rhos_and_the_others_stay():
    listed: list[Candidate] = []
    proposed = proposals(context_of(Module(tiny_causal_lm())), Laser(), listed=listed)
    grid = {str(candidate.plan): candidate for candidate in proposed.ranked}
    started = ["0.q_proj@0.005", "1.fc_in@0.8", "2.fc_in@0.005", "3.fc_in@0.9"]
    alive = {name: grid[name] for name in started}
    base = outcome(LaserPlan.parse("3.fc_in@0.9"))
    table: Table = {ORIGINAL: base} | {name: outcome(alive[name].plan) for name in started}
    for candidate in alive.values():
        candidate.examples = EXAMPLES
    calls: list[list[str]] = []

    def measure(name: str, phase: str, plans: list[LaserPlan], positions: range, *_: Any) -> Table:
        if positions.start == 0:
            calls.append([str(plan) for plan in plans])
        whole = {ORIGINAL: base} | {str(plan): outcome(plan) for plan in plans}
        part = slice(positions.start, positions.stop)
        return {a: {k: Values(v.values[part], v.weights[part]) for k, v in row.items()} for a, row in whole.items()}

    class Sets:
        def loader(self, name: str, positions: range, *, writes: bool = True) -> range:
            return positions

    none = cast("Any", None)
    steps = Steps(none, cast("Any", Sets()), none, none, Objective(("right",), (1,), "loss"), ("right", "loss"))
    steps.measure = measure  # type: ignore[method-assign, assignment]
    refine = Refinement(steps, proposed)
    kept = refine("1", alive, table, [range(80), range(80, EXAMPLES)], keep=6)

    first, second = calls
    assert {name.split("@")[0] for name in first} == {"0.q_proj", "1.fc_in", "2.fc_in"}
    assert len({name.split("@")[0] for name in first}) == REFINED
    assert {name for name in first if name.startswith("0.")} == {"0.q_proj@0", "0.q_proj@0.1", "0.q_proj@0.2"}
    # From 0.2, where the first call led, on to 0.4 and 0.6; and between the grid's rhos beside the leader.
    between = {"0.q_proj@0.1414", "0.q_proj@0.2828"}
    assert {"0.q_proj@0.4", "0.q_proj@0.6", *between} == set(second)
    assert {str(candidate.plan) for candidate in listed} == between
    assert next(iter(kept)) == "0.q_proj@0.2"
    assert len(kept) == 6
    assert set(table) == {ORIGINAL, *kept}
    assert alive.keys() == set(started), "the caller's own are not changed"
    for name in (*first, *second):
        candidate = kept.get(name) or grid.get(name)
        if candidate is not None:
            assert candidate.examples == EXAMPLES
            assert candidate.status == ("finalist" if name in kept else "dropped out")
    assert "neighbours included" in grid["3.fc_in@0.9"].reason


# ---- what may race ---------------------------------------------------------------------------------------------------


def test_neighbours_are_the_candidates_that_there_are_and_not_those_that_have_raced(screened):
    listed: list[Candidate] = []
    proposed = proposals(screened, Laser(), listed=listed)
    grid = {str(candidate.plan): candidate for candidate in proposed.ranked}
    leader = grid["1.q_proj@0.2"]
    leader.examples = grid["1.q_proj@0.1"].examples = 9
    far = proposed.around(leader, closest=False)
    assert [str(c.plan) for c in far] == ["1.q_proj@0.005", "1.q_proj@0.4", "1.q_proj@0.6"]
    assert all(candidate is grid[str(candidate.plan)] for candidate in far)
    assert not listed
    close = proposed.around(leader, closest=True)
    new = [c for c in close if c.kind == "q_proj"]
    assert listed == new
    assert {c.kind for c in close} == {"q_proj", "k_proj"}
    assert all(c.score is not None for c in close if c.kind == "k_proj"), "the other side is one that was proposed"
    new[0].examples = 9
    assert new[0] not in proposed.around(leader, closest=True)
    assert listed == new


def test_each_cut_races_once_for_the_strategy_whose_turn_comes_first(screened):
    candidates: list[Candidate] = []
    proposed = proposals(screened, Laser(), LateMLP(), AtRandom(), listed=candidates)
    texts = [str(candidate.plan) for candidate in proposed.ranked]
    assert len(set(texts)) == len(texts)
    assert {candidate.strategy for candidate in proposed.ranked[:9]} == {"laser", "late-mlp", "random"}
    first = next(c for c in proposed.ranked if c.strategy == "late-mlp")
    assert str(first.plan) == "3.fc_in@0.005"


def test_what_is_not_first_says_whose_it_is(screened):
    found: list[Candidate] = []
    context = screened
    found = [*Laser().propose(context), *LateMLP().propose(context)]
    lab = Lab(context.module, context.spectra, "cpu")
    ranked = Proposals(found, (Laser(), LateMLP()), context, lab, None, found).ranked
    assert len(ranked) == len(found) / 2
    left = [c for c in found if not any(c is r for r in ranked)]
    assert all(c.reason.startswith(f"the same cut as {c.plan} of l") for c in left)
    alone = Proposals(found, (Laser(), LateMLP()), context, lab, None, found, in_order=True).ranked
    assert all(c.strategy == "laser" for c in alone), "where all race, in the order in which they were proposed"


def test_what_is_cut_already_does_not_race(screened):
    base = "*.q_proj@0.5"
    proposed = proposals(screened, Laser(), base=base)
    assert {c.kind for c in proposed.ranked} == {"k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out"}


class Views(LateMLP):
    name, needs = "views", frozenset({"gradient"})

    def views(self, context: Context) -> Any:
        return {View("delta"): [context.matrices[0]], View(): []}


def test_what_is_looked_at_follows_from_the_needs(screened):
    every = [matrix.name for target in screened.targets for matrix in target.matrices]
    both = views_for([Laser(), Views(), LateMLP()], screened)
    assert {view: [m.name for m in found] for view, found in both.items()} == {
        View("weight"): every,
        View("delta"): [screened.matrices[0].name],
    }
    assert views_for([LateMLP(), AtRandom()], screened) == {}

    class OfTheBase(Laser):
        needs = frozenset({"gradient", "base"})

    assert list(views_for([OfTheBase()], screened)) == [View("delta")]
