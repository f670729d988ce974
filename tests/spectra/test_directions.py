"""Cuts in the metric of the inputs: against the truncated SVD of W S, and as a recipe brings them along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy import Toy, evaluate
from trainers import quiet_trainer

from laser_callback import LaserCallback, find_matrices, save_reduced
from laser_callback.plans import Reduction
from laser_callback.spectra import InputDirections, Spectra, input_directions
from laser_callback.spectra.directions import DAMPING, from_text, to_text
from laser_callback.surgery import Recipe, apply, recorded, reduced


def made(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and the second moments of inputs some of whose entries are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs


def whitened(matrix: Tensor, moments: Tensor, rank: int) -> Tensor:
    """(W S)_k S^-1 by torch's SVD, with S the symmetric root of the damped moments."""
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(matrix @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_is_the_truncation_of_the_matrix_times_the_root(shape: tuple[int, int], rank: int) -> None:
    matrix, moments = made(*shape)
    found = InputDirections({("m", "weight"): input_directions(matrix, moments)})
    cut = Spectra(directions=found).reduce(matrix, Reduction(0, "fc_in", f"k{rank}", metric="inputs"), "m")
    assert torch.allclose(cut, whitened(matrix, moments, rank), atol=1e-6)


def test_outputs_change_less_than_by_the_plain_cut() -> None:
    matrix, moments = made(12, 8)
    spectra = Spectra(directions=InputDirections({("m", "weight"): input_directions(matrix, moments)}))

    def error(metric: str) -> float:
        change = matrix - spectra.reduce(matrix, Reduction(0, "fc_in", "k3", metric=metric), "m")
        return float((change @ moments @ change.T).trace())

    assert error("inputs") < 0.9 * error("none")


def test_scale_and_tail_and_lists() -> None:
    matrix, moments = made(6, 8)
    spectra = Spectra(directions=InputDirections({("m", "weight"): input_directions(matrix, moments)}))
    head = whitened(matrix, moments, 2)
    for reduction, right in (
        (Reduction(0, "fc_in", "k2", metric="inputs", scale=0.5), head + 0.5 * (matrix - head)),
        (Reduction(0, "fc_in", "k2", metric="inputs", keep="tail"), matrix - head),
        (Reduction(0, "fc_in", "places-0-1", metric="inputs"), head),
        (Reduction(0, "fc_in", "places-0-1", metric="inputs", keep="tail", scale=1.25), matrix + 0.25 * head),
    ):
        assert torch.allclose(spectra.reduce(matrix, reduction, "m"), right, atol=1e-5), str(reduction)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(8, 6), "fc2": nn.Linear(6, 8)})])})


def directions_of(model: nn.Module) -> InputDirections:
    weight = model["layers"][0]["fc1"].weight.data  # type: ignore[index]
    _, moments = made(6, 8)
    return InputDirections({("layers.0.fc1", "weight"): input_directions(weight, moments)})


def test_a_recipe_brings_them_along(tmp_path) -> None:
    model, other = a_model(), a_model()
    with recorded(model, "0.fc_in@0.4:metric=inputs", Spectra(directions=directions_of(model))) as (_, recipe):
        inside = model["layers"][0]["fc1"].weight.clone()  # type: ignore[index]
    for name in ("laser.json", "laser.yaml"):
        recipe.to_file(tmp_path / name)
        fresh = a_model()
        apply(fresh, Recipe.of(str(tmp_path / name)))
        assert torch.equal(fresh["layers"][0]["fc1"].weight, inside)  # type: ignore[index]
    with reduced(other, recipe):
        assert torch.equal(other["layers"][0]["fc1"].weight, inside)  # type: ignore[index]


def test_without_them_it_says_where_they_come_from() -> None:
    with pytest.raises(ValueError, match="give the recipe in place of the plan"):
        reduced(a_model(), "0.fc_in@0.4:metric=inputs").prepare()
    model = a_model()
    with pytest.raises(ValueError, match=r"nothing is known of the inputs of `layers\.0\.fc2`"):
        reduced(model, "0.fc_out@0.4:metric=inputs", Spectra(directions=directions_of(model))).prepare()


def test_what_keeps_nothing_needs_none() -> None:
    model = a_model()
    with reduced(model, "0.fc_in@0:metric=inputs,bias=cut"):
        layer = model["layers"][0]["fc1"]  # type: ignore[index]
        assert not layer.weight.any()
        assert not layer.bias.any()
    with recorded(model, "0.fc_in@0:metric=inputs") as (_, recipe):
        assert recipe.matrices[0].directions is None


def test_names_within_names_are_told_apart() -> None:
    """``nn.Sequential`` in another: ``2.0`` ends like ``0``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6)))
    columns = {name: torch.linalg.qr(torch.randn(6, 6)).Q for name in ("2.0", "0")}
    known = InputDirections({(name, "weight"): (torch.ones(6), q) for name, q in columns.items()})
    plan = "/0/@0.5:metric=inputs, /2.0/@0.5:metric=inputs"
    right = {name: columns[name][:, :3].double() for name in columns}
    for here, front in ((model, ""), (nn.ModuleDict({"net": model}), "net.")):
        text = plan.replace("/0/", f"/{front}0/").replace("/2.0/", f"/{front}2.0/")
        before = {name: here.get_submodule(front + name).weight.detach().double() for name in columns}  # type: ignore[union-attr]
        with recorded(here, text, Spectra(directions=known)) as (_, recipe):
            pass
        with reduced(here, recipe):
            for name, q in right.items():
                weight = here.get_submodule(front + name).weight.double()
                assert torch.allclose(weight, q @ q.T @ before[name], atol=1e-6), front + name


def test_one_threshold_goes_by_the_same_metric() -> None:
    """By its own singular values the first matrix would keep all three."""
    model = a_model()
    names = ("layers.0.fc1", "layers.0.fc2")
    values = {names[0]: [3.0, 2.0, 1.0, 0.1, 0.1, 0.1], names[1]: [9.0, 8.0, 7.0, 0.1, 0.1, 0.1]}
    found = {
        (n, "weight"): (torch.tensor(v).double(), torch.eye(6 if n == names[0] else 8, 6)) for n, v in values.items()
    }
    weight = model["layers"][0]["fc1"].weight  # type: ignore[index]
    weight.data *= 100
    with reduced(model, "/.*/@global-2:metric=inputs", Spectra(directions=InputDirections(found))):
        assert torch.linalg.matrix_rank(weight) == 1
    with recorded(model, "/.*/@global-2:metric=inputs", Spectra(directions=InputDirections(found))) as (_, recipe):
        inside = weight.clone()
    with reduced(model, recipe):
        assert torch.equal(weight, inside)


@pytest.mark.parametrize(
    "make", [lambda c: c[:, :1], lambda c: torch.cat([c, c], 1), lambda c: c * torch.inf, lambda c: c * 9]
)
def test_directions_that_are_of_another_cut_are_refused(make) -> None:
    model = a_model()
    with recorded(model, "0.fc_in@0.4:metric=inputs", Spectra(directions=directions_of(model))) as (_, recipe):
        data = recipe.to_dict()
    (matrix,) = data["matrices"]
    matrix["directions"] = to_text(make(from_text(matrix["directions"], 6)))
    with pytest.raises(ValueError, match=r"`directions` of 0\.fc_in@0\.4:metric=inputs must be 2 finite columns"):
        Recipe.of(data)


@pytest.mark.parametrize(("rows", "count"), [(3, 2), (4, 0)])
def test_text_holds_the_bits(rows: int, count: int) -> None:
    columns = torch.randn(rows, count)
    assert torch.equal(from_text(to_text(columns), rows), columns)


@pytest.mark.parametrize("text", ["no base64!", "AAAA", "AAAAAAAAAAAAAAAAAAAAAAAA"])
def test_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`directions` must be base64 of float32 columns of 4 rows"):
        from_text(text, 4)


def test_inputs_that_are_all_zero_are_named() -> None:
    with pytest.raises(ValueError, match="all inputs of `m` were 0"):
        input_directions(torch.randn(4, 3), torch.zeros(3, 3), "m")


def test_a_recipe_serves_controls_and_says_where_it_cannot_be_shipped(tmp_path) -> None:
    """Noise is as large as what the cut removes, which only the recipe tells."""
    module = Toy()
    (matrix,) = [m for m in find_matrices(module) if m.name == "net.encoder.layers.1.linear1"]
    found = {(matrix.name, "weight"): input_directions(matrix.value, made(16, 8)[1])}
    with recorded(module, "1.fc_in@0.3:metric=inputs", Spectra(directions=InputDirections(found))) as (_, recipe):
        pass
    recipe.to_file(tmp_path / "laser.json")
    callback = LaserCallback(str(tmp_path / "laser.json"), controls=True, report=False)
    evaluate(quiet_trainer, module, callback)
    assert {"zeroed", "random", "noise"} <= {*callback.result.controls["laser"]}
    with pytest.raises(ValueError, match="it is not cut along its singular directions"):
        save_reduced(module, str(tmp_path / "laser.json"), tmp_path / "thin.ckpt", "factored")
