"""What a search may cut: targets of all kinds of models, the grid, neighbours in rho."""

from __future__ import annotations

import pytest
from small_models import mixtral, t5
from tiny import tiny_causal_lm

from laser_callback import LaserPlan, Reduction, find_matrices
from laser_callback.plans.target import targets
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import grid, neighbours, partners, shortlist


@pytest.mark.parametrize("make", [tiny_causal_lm, t5, mixtral])
def test_targets_cover_every_matrix_of_a_known_kind_once_and_are_found_by_their_address(make):
    model = make()
    found = targets(model)
    covered = [matrix.name for target in found for matrix in target.matrices]
    assert sorted(covered) == sorted(matrix.name for matrix in find_matrices(model) if matrix.kind)
    for target in found:
        named = [matrix.name for matrix, _ in LaserPlan([target.at(0.5)]).resolve(model)]
        assert named == [matrix.name for matrix in target.matrices]
        assert Reduction.parse(str(target.at(0.5))) == target.at(0.5)


def test_the_experts_of_a_layer_are_one_target():
    experts = [target for target in targets(mixtral(), "0.fc_out") if len(target.matrices) == 3]
    assert [str(target.at(0.1)) for target in experts] == ["0.fc_out@0.1"]


def test_an_encoder_and_a_decoder_have_their_own():
    names = {str(target.at(0.1)) for target in targets(t5(), "*.fc_out")}
    assert names == {f"{stack}.block.{layer}.fc_out@0.1" for stack in ("encoder", "decoder") for layer in (0, 1)}
    assert {str(target.at(0.1)) for target in targets(t5(), "decoder.-1.fc_out")} == {"decoder.block.1.fc_out@0.1"}


def test_within_and_without():
    model = tiny_causal_lm()
    assert len(targets(model, "0-1.mlp, 1.all")) == 3 + 7
    cut = Reduction.parse("1.fc_in@0.1")
    assert len(targets(model, "0-1.mlp, 1.all", without=[cut])) == 9
    with pytest.raises(ValueError, match="leaves nothing to cut"):
        targets(model, "1.fc_in", without=[cut])
    with pytest.raises(ValueError, match="matches no matrix of the model"):
        targets(model, "9.fc_in")
    with pytest.raises(ValueError, match="without rho"):
        targets(model, "9.fc_in@0.1")


def test_the_grid_has_each_rank_once_and_never_the_whole():
    model = tiny_causal_lm()  # 32 wide: 0.005, 0.01 and 0.05 all keep rank 1
    (target,) = targets(model, "0.q_proj")
    candidates = grid([target], (0, 0.005, 0.01, 0.05, 0.5, 1.0), base="1.fc_in@0.1")
    assert [candidate.rho for candidate in candidates] == [0, 0.005, 0.5]
    assert str(candidates[1].plan) == "1.fc_in@0.1, 0.q_proj@0.005"
    assert (candidates[1].layer, candidates[1].kind) == (0, "q_proj")


def test_the_shortlist_has_the_best_rho_of_each_target_by_two_orders_first():
    #          rho 0.1        rho 0.2       rho 0.3: score, standard error
    scores = {
        "0.fc_in": [(-9.0, 6.0), (-5.0, 1.0), (-1.0, 0.1)],  # more is hoped for than known
        "1.fc_in": [(-4.0, 0.1), (-3.9, 0.1), (-4.1, 2.0)],
        "2.fc_in": [(-2.0, 0.5), (-0.5, 0.1), (0.5, 0.0)],
    }
    candidates = [
        Candidate(Reduction.parse(f"{name}@{rho}"), 0, "fc_in", rho, score=score, error=error)
        for name, three in scores.items()
        for rho, (score, error) in zip((0.1, 0.2, 0.3), three, strict=True)
    ]
    found = [str(candidate.reduction) for candidate in shortlist(candidates)]
    cautious = ["1.fc_in@0.1", "0.fc_in@0.2", "2.fc_in@0.1"]  # -3.8, -3, -1
    hopeful = ["0.fc_in@0.1", "1.fc_in@0.3", "2.fc_in@0.1"]
    turns = [name for pair in zip(cautious, hopeful, strict=True) for name in pair]
    assert found == [*dict.fromkeys(turns), "1.fc_in@0.2", "0.fc_in@0.3", "2.fc_in@0.2", "2.fc_in@0.3"]
    for candidate in candidates:
        candidate.error = 0.0
    assert [str(c.reduction) for c in shortlist(candidates)][:3] == ["0.fc_in@0.1", "1.fc_in@0.3", "2.fc_in@0.1"]


def scored(text, score, layer=0):
    reduction = Reduction.parse(text)
    return Candidate(reduction, layer, reduction.matrix, reduction.rho, score=score)


def test_of_two_matrices_that_are_the_same_when_zeroed_one_races_so():
    queries = [scored("0.q_proj@0", -2.0), scored("0.q_proj@0.1", -1.0)]
    keys = [scored("0.k_proj@0", -2.0001), scored("0.k_proj@0.1", -0.5)]
    other = [scored("1.q_proj@0", -2.0, layer=1)]
    found = [str(candidate.reduction) for candidate in shortlist([*queries, *keys, *other])]
    assert found == ["0.k_proj@0", "1.q_proj@0", "0.q_proj@0.1", "0.q_proj@0", "0.k_proj@0.1"]


def test_partners_are_the_matrices_of_the_layer_that_are_the_same_when_zeroed():
    rhos = (0, 0.005, 0.01, 0.05, 0.1)
    zeroed = {"0.q_proj": -2.0, "0.k_proj": -2.001, "0.v_proj": -2.1, "1.k_proj": -2.0}
    candidates = [scored(f"{name}@{rho}", z + rho, int(name[0])) for name, z in zeroed.items() for rho in rhos]
    of = {str(candidate.reduction): candidate for candidate in candidates}
    assert [str(c.reduction) for c in partners(of["0.k_proj@0.01"], candidates)] == [
        "0.q_proj@0.005",
        "0.q_proj@0.01",
        "0.q_proj@0.05",
    ]
    assert [str(c.reduction) for c in partners(of["0.q_proj@0"], candidates)] == ["0.k_proj@0.005"]
    assert partners(of["0.v_proj@0.01"], candidates) == []
    unscored = [Candidate(c.reduction, c.layer, c.kind, c.rho) for c in candidates]
    assert partners(unscored[0], unscored) == []


@pytest.mark.parametrize(
    ("rho", "expected"), [(0.0, [0.005]), (0.01, [0.005, 0.0316]), (0.1, [0.0316, 0.3]), (0.9, [0.3])]
)
def test_neighbours_lie_between(rho, expected):
    candidate = Candidate(
        Reduction(0, "fc_in", rho), 0, "fc_in", rho, "1.fc_in@0.1", 1.0, examples=3, status="finalist"
    )
    near = neighbours(candidate, (0, 0.01, 0.1, 0.9), 1000)
    assert [c.rho for c in near] == expected
    assert all(c.reduction.rho == c.rho and c.score is None and c.base == candidate.base for c in near)
    assert all(c.examples == 0 and c.status == "screened out" for c in near), "they have not raced"


def test_neighbours_of_the_same_rank_are_left_out():
    candidate = Candidate(Reduction(0, "fc_in", 0.1), 0, "fc_in", 0.1)
    assert neighbours(candidate, (0.1, 0.11), 20) == []
