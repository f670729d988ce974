"""Other rhos of the leading matrices, ahead of a race's last round: which are tried, and what goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from laser_callback.compare.measure import Table, Values
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import RHOS, Target
from laser_callback.results.candidates import Candidate
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.race import Objective
from laser_callback.search.refine import REFINED, Refinement
from laser_callback.search.steps import Steps

EXAMPLES = 200
BEST = {"0.q_proj": 0.1, "1.fc_in": 0.9, "2.fc_in": 0.0, "3.fc_in": 0.05}
"""The rho at which each matrix gives the lowest loss, all of them the same, but for the first: lower."""


def outcome(reduction: Reduction) -> dict[str, Values]:
    """No gain, and a loss that rises with the number of grid steps from the best rho; with noise that pairs remove."""
    place = f"{reduction.layer}.{reduction.matrix}"
    steps = abs(np.interp(reduction.rho, RHOS, range(len(RHOS))) - RHOS.index(BEST[place]))
    loss = 0.5 + 0.01 * steps - 0.02 * (place == "0.q_proj")
    noise = np.random.default_rng(0).normal(size=EXAMPLES)

    def values(numbers: Any) -> Values:
        return Values(torch.from_numpy(numbers), torch.ones(EXAMPLES, dtype=torch.float64))

    return {"right": values(np.zeros(EXAMPLES)), "loss": values(loss + noise)}


def test_the_leading_matrices_find_their_best_rhos_and_the_others_stay():
    grid = {str(r := Reduction.parse(f"{p}@{rho}")): Candidate(r, r.layer, r.matrix, rho) for p in BEST for rho in RHOS}
    started = ["0.q_proj@0.005", "1.fc_in@0.8", "2.fc_in@0.01", "3.fc_in@0.6"]
    alive = {name: grid[name] for name in started}
    base = outcome(Reduction.parse("3.fc_in@0.9"))
    table: Table = {ORIGINAL: base} | {name: outcome(alive[name].reduction) for name in started}
    for candidate in alive.values():
        candidate.examples = EXAMPLES
    calls: list[list[str]] = []

    def measure(name: str, phase: str, reductions: list[Reduction], positions: range, *_: Any) -> Table:
        if positions.start == 0:
            calls.append([str(reduction) for reduction in reductions])
        whole = {ORIGINAL: base} | {str(reduction): outcome(reduction) for reduction in reductions}
        part = slice(positions.start, positions.stop)
        return {a: {k: Values(v.values[part], v.weights[part]) for k, v in row.items()} for a, row in whole.items()}

    sets = cast("Any", SimpleNamespace(loader=lambda name, positions: positions))
    lab = cast("Any", SimpleNamespace(alters=lambda candidate: True))
    none = cast("Any", None)
    steps = Steps(lab, sets, none, none, Objective(("right",), (1,), "loss"), ("right", "loss"))
    steps.measure = measure  # type: ignore[method-assign, assignment]
    matrix = cast("Any", SimpleNamespace(max_rank=1000))
    found = [Target((matrix,), {"layer": int(place[0]), "matrix": place[2:]}) for place in BEST]
    added: list[Candidate] = []
    refine = Refinement(steps, found, list(grid.values()), added, RHOS)
    kept = refine("1", alive, table, [range(80), range(80, EXAMPLES)], keep=6)

    first, second = calls
    assert {name.split("@")[0] for name in first} == {"0.q_proj", "1.fc_in", "2.fc_in"}
    assert len({name.split("@")[0] for name in first}) == REFINED
    assert {name for name in first if name.startswith("0.")} == {"0.q_proj@0", "0.q_proj@0.01", "0.q_proj@0.05"}
    # From 0.05, where the first call led, on to 0.1 and 0.2; and between the grid's rhos beside the leader.
    between = {"0.q_proj@0.0224", "0.q_proj@0.0707"}
    assert {"0.q_proj@0.1", "0.q_proj@0.2", *between} == set(second)
    assert {str(candidate.reduction) for candidate in added} == between
    assert next(iter(kept)) == "0.q_proj@0.1"
    assert len(kept) == 6
    assert set(table) == {ORIGINAL, *kept}
    assert alive.keys() == set(started), "the caller's own are not changed"
    for name in (*first, *second):
        candidate = kept.get(name) or grid.get(name)
        if candidate is not None:
            assert candidate.examples == EXAMPLES
            assert candidate.status == ("finalist" if name in kept else "dropped")
    assert "other rhos included" in grid["3.fc_in@0.6"].reason


def test_the_leader_brings_in_the_other_side_of_its_product():
    zeroed = {"0.q_proj": -2.0, "0.k_proj": -2.0, "0.v_proj": -1.0}
    grid = {
        str(r := Reduction.parse(f"{place}@{rho}")): Candidate(r, 0, r.matrix, rho, score=score + rho)
        for place, score in zeroed.items()
        for rho in RHOS
    }
    leader = grid["0.k_proj@0.05"]
    leader.examples = EXAMPLES
    lab = cast("Any", SimpleNamespace(alters=lambda candidate: candidate.rho != 0.1))
    steps = cast("Any", SimpleNamespace(lab=lab))
    keys = Target((cast("Any", SimpleNamespace(max_rank=1000)),), {"layer": 0, "matrix": "k_proj"})
    refine = Refinement(steps, [keys], list(grid.values()), [], RHOS)
    found = [str(candidate.reduction) for candidate in refine.around(leader)]
    assert found == ["0.k_proj@0.0224", "0.k_proj@0.0707", "0.q_proj@0.01", "0.q_proj@0.05"]
