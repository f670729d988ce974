"""What each word of a plan makes of a matrix, against a direct computation by LAPACK's SVD in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from matrices import best, noise
from tiny import tiny_causal_lm
from torch import Tensor, nn
from weights import Snapshot, same, weights

from laser_callback import find_matrices, reduced
from laser_callback.compare.controls import random_plan, zeroed_plan
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.shipping.adapter import difference_of
from laser_callback.shipping.thin import factored
from laser_callback.spectra.cut import cut_spectra
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import apply

SHAPES = [(20, 12), (12, 20), (15, 15)]


def of(text: str) -> Reduction:
    return Reduction.parse(f"0.x@{text}")


def cut(matrix: Tensor, text: str) -> Tensor:
    return Spectra().reduce(matrix, of(text), "x")


def terms(matrix: Tensor, kept: list[int], scale: float = 0.0) -> Tensor:
    """The sum of these singular directions, and ``scale`` times the others."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    gains = torch.full_like(s, scale)
    gains[kept] = 1.0
    return (u * (gains * s)) @ v


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    return noise(rows, rank, seed=seed) @ noise(rank, columns, seed=seed + 100)


def tuned(base: nn.Module, rank: int | None = None, kinds: tuple[str, ...] = ("q_proj", "fc_out")) -> nn.Module:
    """The base after a change of some matrices, of LoRA's kind where a rank is given."""
    model = copy.deepcopy(base)
    for seed, matrix in enumerate(find_matrices(model)):
        if matrix.kind in kinds:
            change = noise(*matrix.shape, seed=seed) if rank is None else low_rank(*matrix.shape, rank, seed=seed)
            matrix.parameter.data += (1e-2 * change).to(matrix.parameter.dtype)
    return model


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 12, 99])
def test_a_rank_in_full(shape, rank):
    matrix = noise(*shape)
    close(cut(matrix, f"k{rank}"), best(matrix, rank))
    close(cut(matrix, f"k{rank}:keep=tail"), matrix - best(matrix, rank))
    close(cut(matrix, f"k{rank}:scale=-0.5"), best(matrix, rank) - 0.5 * (matrix - best(matrix, rank)))
    blocks = torch.cat([best(block, rank) for block in matrix.tensor_split(3)])
    close(cut(matrix, f"k{rank}:blocks=3"), blocks)
    assert Spectra().changes_nothing(matrix, of(f"k{rank}")) is (rank >= min(shape))


def threshold_ranks(matrices: list[Tensor], mean: float) -> list[int]:
    """By going through all singular values of all matrices, from the largest on."""
    values = [(float(s), -i) for i, m in enumerate(matrices) for s in torch.linalg.svdvals(m.double())]
    count = max(round(mean * len(matrices)), 1)
    largest = max(value for value, _ in values)
    chosen = [-i for value, i in sorted(values, reverse=True)[:count] if value > 1e-7 * largest]
    return [chosen.count(i) for i in range(len(matrices))]


@pytest.mark.parametrize("mean", [0.04, 0.5, 1, 2.7, 10, 31.5, 32, 1e6, 1e300])
def test_one_threshold_for_all_matrices_of_a_reduction(mean):
    model = tiny_causal_lm()
    for seed, matrix in enumerate(find_matrices(model)):
        matrix.parameter.data = noise(*matrix.shape, seed=seed, dtype=torch.float32) * (1 + seed % 5)
    plan = LaserPlan.parse(f"*.attn@global-{mean}")
    found = [matrix for matrix, _ in plan.resolve(model)]
    ranks = threshold_ranks([matrix.value for matrix in found], min(mean, 100.0))
    before = [matrix.value.clone() for matrix in found]
    assert [str(reduction.rho) for _, reduction in Spectra().settled(plan.resolve(model))] == [f"k{r}" for r in ranks]
    with reduced(model, plan):
        for matrix, was, rank in zip(found, before, ranks, strict=True):
            torch.testing.assert_close(matrix.value.double(), best(was, rank), rtol=1e-5, atol=1e-5)
    if mean < 30:
        assert sum(ranks) == max(round(mean * len(found)), 1)
        assert len({*ranks}) > 1
    shown = cut_spectra(plan.resolve(model), Spectra())
    assert [32 - sum(stop - start for start, stop in each.removed) for each in shown] == [
        min(rank, min(matrix.shape)) + 32 - min(matrix.shape) for rank, matrix in zip(ranks, found, strict=True)
    ]


def test_of_equal_singular_values_the_earlier_matrix_keeps_its_own():
    layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(3, 3, bias=False)}) for _ in range(3))
    model = nn.ModuleDict({"layers": layers})
    for layer in layers:
        layer["fc1"].weight.data = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    for mean, ranks in ((1, [1, 1, 1]), (2 / 3, [1, 1, 0]), (4 / 3, [2, 1, 1]), (3, [2, 2, 2])):
        settled = Spectra().settled(LaserPlan.parse(f"*.fc_in@global-{mean}").resolve(model))
        assert [reduction.rho for _, reduction in settled] == [f"k{rank}" for rank in ranks]
    each = Spectra().settled(LaserPlan.parse("0.fc_in@global-1, 1-2.fc_in@global-1.5").resolve(model))
    assert [reduction.rho for _, reduction in each] == ["k1", "k2", "k1"]  # a threshold for each reduction


def test_of_small_changes_a_threshold_keeps_no_more_than_there_is():
    base = tiny_causal_lm().double()
    model = tuned(base, rank=3)
    spectra = Spectra(base=BaseWeights(base, model))
    originals = {m.name: m.value.clone() for m in find_matrices(base)}
    for mean in (1, 2, 8):
        plan = LaserPlan.parse(f"*.all@global-{mean}:cut=delta")
        resolved = plan.resolve(model)
        deltas = [matrix.value - originals[matrix.name] for matrix, _ in resolved]
        ranks = threshold_ranks(deltas, mean)
        assert [int(str(r.rho)[1:]) for _, r in spectra.settled(resolved)] == ranks
        assert sum(ranks) == min(mean * len(resolved), 3 * 8)
        with reduced(model, plan, spectra):
            for (matrix, _), delta, rank in zip(resolved, deltas, ranks, strict=True):
                close(matrix.value, originals[matrix.name] + best(delta, rank), 1e-8)


def test_one_matrix_alone_has_no_threshold():
    for ask in (Spectra().reduce, Spectra().changes_nothing):
        with pytest.raises(ValueError, match="global-2 is one threshold for all matrices of a reduction"):
            ask(noise(4, 4), of("global-2"), "x")


def test_a_threshold_with_weights_on_the_meta_device_is_refused_as_any_cut():
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4)})])})
    with pytest.raises(TypeError, match="meta device"):
        reduced(model, "*.fc_in@global-1").prepare()


@pytest.mark.parametrize("text", ["*.mlp@0", "*.mlp@0:scale=0.5", "*.mlp@0:noise=1", "*.mlp@0:blocks=2"])
def test_to_keep_nothing_takes_no_factorisation(text, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model, spectra = tiny_causal_lm(), Spectra()
    own = {m.name: m.value.clone().double() for m in find_matrices(model)}
    with reduced(model, text, spectra) as cut:
        assert spectra.factorised == 0
        if "noise" not in text:
            for matrix, reduction in cut.matrices:
                close(matrix.value, own[matrix.name] * reduction.scale)
    reduced(model, "1.mlp@0:norm=whole,scale=0.5, 2.mlp@0:band=0.5", spectra).prepare()
    assert spectra.factorised == 6


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("listed", "places"),
    [("0", [0]), ("0-4+7", [0, 1, 2, 3, 4, 7]), ("3", [3]), ("1+3+5-6+11", [1, 3, 5, 6, 11]), ("0-11", [*range(12)])],
)
def test_a_list_of_directions(shape, listed, places):
    matrix = noise(*shape)
    others = [place for place in range(min(shape)) if place not in places]
    close(cut(matrix, f"places-{listed}"), terms(matrix, places))
    close(cut(matrix, f"places-{listed}:scale=0.5"), terms(matrix, places, 0.5))
    close(cut(matrix, f"places-{listed}:keep=tail"), terms(matrix, others))
    close(cut(matrix, f"places-{listed}:keep=tail,scale=2"), terms(matrix, others, 2.0))
    assert Spectra().changes_nothing(matrix, of(f"places-{listed}")) is (not others)
    wide = matrix.bfloat16()
    assert torch.equal(cut(wide, f"places-{listed}"), terms(wide, places).bfloat16())


def test_a_list_of_directions_of_a_difference():
    base = tiny_causal_lm().double()
    model = tuned(base)
    own, theirs = (m.model.layers[1].self_attn.q_proj.weight.data.clone() for m in (model, base))
    with reduced(model, "1.q_proj@places-1+4:keep=tail,cut=delta", Spectra(base=BaseWeights(base, model))):
        kept = terms(own - theirs, [place for place in range(32) if place not in (1, 4)])
        close(model.model.layers[1].self_attn.q_proj.weight.data, theirs + kept, 1e-8)


def test_a_place_that_there_is_not_is_named():
    for ask in (Spectra().reduce, Spectra().changes_nothing):
        with pytest.raises(ValueError, match=r"0\.x@places-0\+12 names place 12, of 12, counted from 0"):
            ask(noise(20, 12), of("places-0+12"), "x")


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", ["keep=head", "keep=tail", "band=0.3", "scale=0.25", "scale=-0.25"])
@pytest.mark.parametrize("power", [0, 600, -600])
def test_what_is_left_gets_the_norm_of_the_whole(shape, options, power):
    matrix = noise(*shape) * 2.0**power
    part = cut(matrix, f"0.3:{options}") / 2.0**power
    whole = cut(matrix, f"0.3:{options},norm=whole") / 2.0**power
    size = (matrix / 2.0**power).norm()
    assert part.norm() < 0.95 * size
    close(whole, part * (size / part.norm()), 1e-8)


def test_each_block_gets_its_own_norm():
    matrix = noise(12, 9)
    wanted = [best(block, 1) * (block.norm() / best(block, 1).norm()) for block in matrix.tensor_split(3)]
    close(cut(matrix, "k1:blocks=3,norm=whole"), torch.cat(wanted))


def test_where_nothing_is_left_nothing_is_made_of_it():
    """Rounding is no direction: enlarged to the norm of the whole it would be noise."""
    matrix = low_rank(20, 12, 3)
    size = float(matrix.norm())
    for text in ("k3:keep=tail,norm=whole", "0.5:keep=tail,norm=whole", "0:norm=whole"):
        assert cut(matrix, text).norm() < 1e-6 * size
    assert not cut(torch.zeros(4, 5), "k1:norm=whole").any()
    close(cut(matrix, "k2:norm=whole").norm(), matrix.norm())
    close(cut(matrix, "0:scale=0.5,norm=whole"), matrix)  # halved and then made as large as it was


def test_the_norm_of_a_difference():
    base = tiny_causal_lm().double()
    model = tuned(base, rank=4)
    own, theirs = (m.model.layers[1].self_attn.q_proj.weight.data.clone() for m in (model, base))
    first = best(own - theirs, 1)
    with reduced(model, "1.q_proj@k1:norm=whole,cut=delta", Spectra(base=BaseWeights(base, model))):
        wanted = theirs + first * ((own - theirs).norm() / first.norm())
        close(model.model.layers[1].self_attn.q_proj.weight.data, wanted, 1e-8)


# ---- noise -----------------------------------------------------------------------------------------------------------

NOISY = ["0.2", "k1:keep=tail", "0:scale=0.5", "0.1:of=entries", "0.2:of=reference", "0.2:blocks=3", "k2:norm=whole"]


@pytest.mark.parametrize("text", NOISY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_noise_as_large_as_what_the_cut_removes(text, dtype, tolerance):
    matrix = noise(40, 30, dtype=dtype)
    separator = "," if ":" in text else ":"
    removed = (matrix.double() - cut(matrix, text).double()).norm()
    state = torch.get_rng_state()
    one = cut(matrix, f"{text}{separator}noise=3")
    assert torch.equal(torch.get_rng_state(), state)
    added = one.double() - matrix.double()
    assert one.dtype == dtype
    assert float(added.norm()) == pytest.approx(float(removed), rel=tolerance)
    assert torch.equal(one, cut(matrix.clone(), f"{text}{separator}noise=3"))
    other = cut(matrix, f"{text}{separator}noise=4").double() - matrix.double()
    cosine = float((added * other).sum() / added.norm() / other.norm())
    assert abs(cosine) < 5 / math.sqrt(matrix.numel())
    # Gaussian: about 68 % within a deviation, and of no rank.
    deviation = float(removed) / math.sqrt(matrix.numel())
    assert 0.6 < float((added.abs() < deviation).double().mean()) < 0.76
    if dtype == torch.float64:
        assert torch.linalg.matrix_rank(added) == 30


def test_other_matrices_get_other_noise():
    one, other = noise(40, 30), noise(40, 30, seed=1)
    first, second = (cut(matrix, "0.2:noise=0") - matrix for matrix in (one, other))
    assert abs(float((first * second).sum() / first.norm() / second.norm())) < 0.15


def test_a_cut_that_changes_nothing_adds_no_noise():
    matrix = noise(6, 5)
    assert Spectra().changes_nothing(matrix, of("1:noise=1"))
    assert torch.equal(cut(matrix, "k9:noise=1"), matrix)
    huge = noise(6, 5) * 1e200
    removed = (huge / 1e200 - cut(huge, "k2") / 1e200).norm()
    close(((cut(huge, "k2:noise=1") - huge) / 1e200).norm(), removed, 1e-6)


def test_noise_in_place_of_a_cut_of_the_difference():
    base = tiny_causal_lm()
    model = tuned(base)
    weight = model.model.layers[1].self_attn.q_proj.weight
    own, theirs = weight.data.clone(), base.model.layers[1].self_attn.q_proj.weight.data
    delta = own.double() - theirs.double()
    with reduced(model, "1.q_proj@k2:cut=delta,noise=5", Spectra(base=BaseWeights(base, model))):
        added = weight.data.double() - own.double()
    assert float(added.norm()) == pytest.approx(float((delta - best(delta, 2)).norm()), rel=1e-4)
    assert float(added.norm()) < 0.5 * float((own.double() - best(own.double(), 2)).norm())


# ---- together --------------------------------------------------------------------------------------------------------

MIXED = (
    "0.q_proj@k2:cut=delta, 0.fc_out@k1:norm=whole, 1.attn@global-1.5, 1.fc_out@places-0-3+9:cut=delta,keep=tail, "
    "2.q_proj@0.3:of=reference, 2.fc_in@0.2:noise=7, 3.fc_out@global-4:cut=delta, 3.out_proj@0:scale=0.5"
)


def test_one_plan_may_cut_weights_and_differences():
    base = tiny_causal_lm()
    model = tuned(base)
    snapshot = Snapshot(model)
    spectra = Spectra(base=BaseWeights(base, model))
    own = {m.name: m.value.clone().double() for m in find_matrices(model)}
    theirs = {m.name: m.value.clone().double() for m in find_matrices(base)}
    with reduced(model, MIXED, spectra):
        now = {m.name: m.value.double() for m in find_matrices(model)}
        q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
        close(now[q], theirs[q] + best(own[q] - theirs[q], 2), 1e-6)
        close(now[down], best(own[down], 1) * own[down].norm() / best(own[down], 1).norm(), 1e-6)
    assert snapshot.is_restored()
    with pytest.raises(ValueError, match=r"cut=delta cuts the difference of `.*` .*there is no base: give `base`"):
        reduced(model, MIXED).prepare()


def test_a_recipe_makes_the_same_bits_again(tmp_path):
    base = tiny_causal_lm()
    one, other = tuned(base), tuned(base)
    recipe = apply(one, MIXED, spectra=Spectra(base=BaseWeights(base, one)))
    recipe.to_file(tmp_path / "laser.yaml")
    read = Recipe.from_file(tmp_path / "laser.yaml")
    assert read.base is not None
    before = weights(other)
    with pytest.raises(ValueError, match="cuts the difference to the base"):
        apply(other, read)
    assert same(other, before)
    assert apply(other, read, spectra=Spectra(base=BaseWeights(base, other))).matrices == recipe.matrices
    assert same(other, weights(one))


def test_a_recipe_of_weights_asks_for_no_base_and_minds_none():
    base = tiny_causal_lm()
    model = tuned(base)
    spectra = Spectra(base=BaseWeights(base, model))
    recipe = apply(copy.deepcopy(model), "1.q_proj@k2", spectra=spectra)
    assert recipe.base is None
    assert apply(copy.deepcopy(model), recipe).matrices == recipe.matrices
    assert apply(copy.deepcopy(model), recipe, spectra=spectra).matrices == recipe.matrices


def test_the_writes_of_a_model():
    model = tiny_causal_lm()
    kinds = [matrix.kind for matrix, _ in LaserPlan.parse("*.writes@0").resolve(model)]
    assert kinds == ["out_proj", "fc_out"] * len(model.model.layers)


@pytest.mark.parametrize("text", ["*.fc_out@global-1.5", "*.fc_out@k2:norm=whole", "*.fc_out@places-0+3"])
def test_thin_layers_are_the_cut(text):
    model, tokens = tiny_causal_lm(), torch.arange(6)[None]
    with torch.no_grad(), reduced(model, text):
        wanted = model(tokens).logits
    with torch.no_grad(), factored(model, text) as thin:
        assert len(thin.layers) == 4
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "of_delta"),
    [
        ("*.q_proj@global-1.5:cut=delta, *.fc_out@k1:cut=delta,norm=whole", True),
        ("*.q_proj@places-0-2+4:cut=delta, *.fc_out@0:cut=delta,scale=0.5", True),
        ("1.q_proj@places-0+2:keep=tail", False),
    ],
)
def test_an_adapter_holds_the_cut(text, of_delta):
    base = tiny_causal_lm().double()
    model = tuned(base, rank=4)
    spectra = Spectra(base=BaseWeights(base, model))
    factors = difference_of(model, LaserPlan.parse(text), spectra)
    start = {m.name: m.value.clone() for m in find_matrices(base if of_delta else model)}
    with reduced(model, text, spectra) as cut:
        assert len(cut.matrices) == (8 if of_delta else 1)
        for matrix, _ in cut.matrices:
            up, down = factors.get(matrix.name, (torch.zeros(1), torch.zeros(1)))
            close(matrix.value, start[matrix.name] + up @ down, 1e-7)


def test_an_adapter_is_of_weights_or_of_differences():
    base = tiny_causal_lm()
    model = tuned(base)
    spectra = Spectra(base=BaseWeights(base, model))
    for text, message in (
        ("0.q_proj@k30, 1.q_proj@k1:cut=delta", "no one adapter is for the weights and for what fine-tuning"),
        ("*.q_proj@k1:cut=delta,noise=1, *.fc_out@k1:cut=delta", "it is not cut along its singular directions"),
    ):
        with pytest.raises(ValueError, match=message):
            difference_of(model, LaserPlan.parse(text), spectra)


# ---- the controls ----------------------------------------------------------------------------------------------------


def test_the_random_control_of_a_threshold_is_a_threshold_for_all():
    model = tiny_causal_lm()
    plan = LaserPlan.parse("1-2.attn@global-0.5, 0.fc_in@k3:bias=kept, 3.q_proj@0.2:noise=1")
    control = random_plan(model, plan, seed=1)
    planned = {matrix.name for matrix, _ in plan.resolve(model)}
    found = Spectra().settled(control.resolve(model))
    assert not planned & {matrix.name for matrix, _ in found}
    assert len(found) == len(planned) == 10
    joint = [int(str(r.rho)[1:]) for (_, r), (_, was) in zip(found, control.resolve(model), strict=True) if was != r]
    assert (len(joint), sum(joint)) == (8, 4)
    assert sorted(str(r.rho) for r in control) == ["0.2", "global-0.5", "k3"]


def test_the_zeroed_control_cuts_what_the_plan_cuts():
    plan = LaserPlan.parse("1.fc_in@k3:cut=delta,norm=whole, 2.fc_out@0:bias=cut, 3.q_proj@0.2:noise=1")
    assert str(zeroed_plan(plan)) == "1.fc_in@0:cut=delta, 2.fc_out@0:bias=cut, 3.q_proj@0"
