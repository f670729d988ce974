"""What a search may cut, in which order candidates race, and which of them are the same cut."""

from __future__ import annotations

import pytest
from candidates import proposed
from small_models import mixtral, t5
from tiny import tiny_causal_lm

from laser_callback import LaserPlan, Reduction, find_matrices
from laser_callback.plans.target import targets
from laser_callback.search.candidates import cut_by, family, in_turns, shortlist


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
    assert targets(model, "1.fc_in", without=[cut]) == []
    with pytest.raises(ValueError, match="matches no matrix of the model"):
        targets(model, "9.fc_in")
    with pytest.raises(ValueError, match="without rho"):
        targets(model, "9.fc_in@0.1")


SCORES = {  # at rho 0.1, 0.2 and 0.3: score, standard error
    "0.fc_in": [(-9.0, 6.0), (-5.0, 1.0), (-1.0, 0.1)],  # more is hoped for than known
    "1.fc_in": [(-4.0, 0.1), (-3.9, 0.1), (-4.1, 2.0)],
    "2.fc_in": [(-2.0, 0.5), (-0.5, 0.1), (0.5, 0.0)],
}


def test_the_shortlist_has_the_best_rho_of_each_target_by_two_orders_first():
    candidates = [
        proposed(f"{name}@{rho}", score=score, error=error)
        for name, three in SCORES.items()
        for rho, (score, error) in zip((0.1, 0.2, 0.3), three, strict=True)
    ]
    found = [str(candidate.plan) for candidate in shortlist(candidates)]
    cautious = ["1.fc_in@0.1", "0.fc_in@0.2", "2.fc_in@0.1"]  # -3.8, -3, -1
    hopeful = ["0.fc_in@0.1", "1.fc_in@0.3", "2.fc_in@0.1"]
    turns = [name for pair in zip(cautious, hopeful, strict=True) for name in pair]
    assert found == [*dict.fromkeys(turns), "1.fc_in@0.2", "0.fc_in@0.3", "2.fc_in@0.2", "2.fc_in@0.3"]
    for candidate in candidates:
        candidate.error = 0.0
    assert [str(c.plan) for c in shortlist(candidates)][:3] == ["0.fc_in@0.1", "1.fc_in@0.3", "2.fc_in@0.1"]


def scored(text, score):
    return proposed(text, score=score)


def test_of_two_matrices_that_are_the_same_when_zeroed_one_races_so():
    queries = [scored("0.q_proj@0", -2.0), scored("0.q_proj@0.1", -1.0)]
    keys = [scored("0.k_proj@0", -2.0001), scored("0.k_proj@0.1", -0.5)]
    other = [scored("1.q_proj@0", -2.0)]
    found = [str(candidate.plan) for candidate in shortlist([*queries, *keys, *other])]
    assert found == ["0.k_proj@0", "1.q_proj@0", "0.q_proj@0.1", "0.q_proj@0", "0.k_proj@0.1"]


def test_lists_take_turns_that_of_all_scores_first():
    of_scores = [proposed("0.fc_in@0.1", score=-1.0), proposed("0.fc_in@0.2", "other", score=-2.0)]
    first = [proposed(f"{layer}.fc_out@{rho}", "first") for layer in (3, 2) for rho in (0.1, 0.2)]
    second = [proposed("1.fc_in@0.1, 2.fc_in@0.1", "second")]
    found = in_turns([*second, *first, *of_scores], ["first", "second", "other"])
    assert [str(c.plan) for c in found] == [
        "0.fc_in@0.2",
        "3.fc_out@0.1",
        "1.fc_in@0.1, 2.fc_in@0.1",
        "0.fc_in@0.1",
        "2.fc_out@0.1",  # one of each family ahead of the second of any
        "3.fc_out@0.2",
        "2.fc_out@0.2",
    ]


def test_what_races_first_comes_ahead_in_its_own_order():
    of_scores = [proposed("0.fc_in@0.1", score=-1.0), proposed("1.fc_in@0.1", "ahead", score=-2.0)]
    rules = [proposed(f"*.all@k{rank}", "ahead") for rank in (4, 1, 2)]
    other = [proposed("2.fc_in@0.1", "other")]
    found = in_turns([*other, *of_scores, *rules], ["other", "scores", "ahead"], ["ahead"])
    assert [str(c.plan) for c in found] == [
        "1.fc_in@0.1",
        "*.all@k4",
        "*.all@k1",
        "*.all@k2",
        "0.fc_in@0.1",
        "2.fc_in@0.1",
    ]


def test_a_family_differs_in_its_rhos_alone():
    def of(text: str) -> object:
        return family(LaserPlan.parse(text))

    assert of("0.fc_in@0.1, 1.fc_in@0.5") == of("1.fc_in@entropy, 0.fc_in@0")
    assert (
        len({of(text) for text in ("0.fc_in@0.1", "0.fc_in@0.1:scale=0.5", "0.fc_in@0.1:cut=delta", "0-1.fc_in@0.1")})
        == 4
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.fc_in@0.1", "/.*layers.0.mlp.gate_proj/@k3", True),  # 32 wide
        ("0.mlp@0.1", "0.fc_in@0.1, 0.fc_up@0.1, 0.fc_out@0.1", True),
        ("0.fc_in@0.1", "0.fc_in@0.12", True),
        ("0.fc_in@0.1", "0.fc_in@0.2", False),
        ("0.fc_in@0.1", "0.fc_up@0.1", False),
        ("0.fc_in@0.5", "0.fc_in@0.5:keep=tail", False),
        ("0.fc_in@0.5:keep=tail", "0.fc_in@places-16-31", True),
        ("0.fc_in@0", "0.fc_in@0:of=entries", True),
        ("0.fc_in@0", "0.fc_in@0:blocks=4", True),
        ("0.fc_in@0.5", "0.fc_in@0.5:blocks=4", False),
        ("0.fc_in@0.5:blocks=4", "0.fc_in@0.51:blocks=4", False),  # of each block another rank, perhaps
        ("0.fc_out@0", "0.fc_out@0:bias=cut", True),  # the model has no biases
        ("0.fc_in@0", "0.fc_in@0:noise=1", False),
        ("0.fc_in@0", "0.fc_in@0:scale=0.5", False),
        ("0.fc_in@0:scale=0.5", "0.fc_in@0:scale=0.5,norm=whole", False),  # the latter is the matrix itself
        ("0.fc_in@0", "0.fc_in@0:norm=whole", True),
        ("0.fc_in@0", "0.fc_in@0:cut=delta", False),
        ("0.fc_in@entropy", "0.fc_in@0.1", False),
    ],
)
def test_which_plans_are_the_same_cut(one, other, same):
    model = tiny_causal_lm()
    cuts = [cut_by(LaserPlan.parse(text).resolve(model)) for text in (one, other)]
    assert (cuts[0] == cuts[1]) is same
