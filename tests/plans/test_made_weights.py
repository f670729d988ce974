"""Weights that are made from other parameters in each pass, or lie in another's memory: refused with both names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.surgery.swap import reduced


def model(change: Callable[[nn.Linear], object] = lambda layer: layer) -> nn.Module:
    layers = [nn.ModuleDict({"fc_in": nn.Linear(4, 4), "fc_out": nn.Linear(4, 4)}) for _ in range(3)]
    change(layers[0]["fc_in"])
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.orthogonal, "remove_parametrizations"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized norm", "orthogonal", "pruned"],
)
@pytest.mark.parametrize("plan", ["0.fc_in@0.5", "0-2.fc_in@0.5", "*.mlp@0.5", "-3.fc_in@0.5", "/layers.0.fc_in/@0.5"])
def test_a_made_weight_is_named_with_the_cure(change: Callable[[nn.Linear], object], cure: str, plan: str) -> None:
    changed = model(change)
    for where in (changed, find_matrices(changed)):
        with pytest.raises(ValueError, match=rf"`layers\.0\.fc_in`.*{cure}"):
            LaserPlan.parse(plan).resolve(where)
    assert len(LaserPlan.parse("1-2.fc_in@0.5, *.fc_out@0.5").resolve(changed)) == 5
    assert [m.name for m in find_matrices(changed) if m.obstacle] == ["layers.0.fc_in"]


def test_a_range_says_which_of_its_layers_has_no_such_matrix() -> None:
    lacking = model()
    del lacking["layers"][1]["fc_in"]
    with pytest.raises(ValueError, match=r"layer 1 of the range has no fc_in, 0, 2 has"):
        LaserPlan.parse("0-2.fc_in@0.5").resolve(lacking)
    assert len(LaserPlan.parse("*.fc_in@0.5").resolve(lacking)) == 2


@pytest.mark.parametrize("part", [slice(None), slice(2, None)])
def test_a_weight_in_the_memory_of_another_is_refused_with_both_names(part: slice) -> None:
    shared = model()
    layers = shared["layers"]
    layers[1]["fc_out"].weight = nn.Parameter(layers[0]["fc_in"].weight.data[part])
    for plan in ("0.fc_in@0.5", "1.fc_out@0.5", "*.all@0.5"):
        for where in (shared, find_matrices(shared)):
            with pytest.raises(ValueError, match=r"layers\.(0\.fc_in|1\.fc_out).*layers\.(1\.fc_out|0\.fc_in)"):
                LaserPlan.parse(plan).resolve(where)
    assert len(LaserPlan.parse("2.all@0.5").resolve(shared)) == 2


def test_parts_of_one_storage_that_do_not_overlap_are_parameters_like_others() -> None:
    apart = model()
    whole = torch.randn(8, 4)
    apart["layers"][0]["fc_in"].weight = nn.Parameter(whole[:4])
    apart["layers"][1]["fc_in"].weight = nn.Parameter(whole[4:])
    assert len(LaserPlan.parse("*.fc_in@0.5").resolve(apart)) == 3


def test_to_look_for_them_moves_nothing() -> None:
    """Spectral normalisation takes a step whenever its weight is read in train mode."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8)).train()
    before = [buffer.clone() for buffer in model.buffers()]
    with reduced(model, "/1/@0.5"):
        pass
    assert all(map(torch.equal, before, model.buffers()))
    assert all(child.training for child in model.modules())
