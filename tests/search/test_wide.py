"""The gradient's factors, and matrices of which the leading directions alone are factorised, against the whole."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from screening import Steps, ids, run, screen_of
from tiny import tiny_causal_lm
from torch import nn
from torch.utils.data import DataLoader

import laser_callback.search.screen as screen_module
import laser_callback.search.strategies.wide as wide_module
from laser_callback.compare.measure import Lab
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import RHOS
from laser_callback.search.screen import sense
from laser_callback.search.sensitivities import Sensitivities, View
from laser_callback.search.strategies.base import Context
from laser_callback.search.strategies.components import Components
from laser_callback.search.strategies.laser import Laser
from laser_callback.search.strategies.wide import flops, wide
from laser_callback.spectra.store import Spectra

PICKED = 3


def model() -> Steps:
    torch.manual_seed(0)
    inner = tiny_causal_lm()
    for weight in inner.parameters():
        if weight.dim() > 1:  # a spectrum that falls, as those of trained matrices do
            u, s, v = torch.linalg.svd(weight.data, full_matrices=False)
            weight.data = (u * (s[0] * torch.arange(1, len(s) + 1) ** -0.7)) @ v
    return Steps(inner.eval())


def sensed(module: pl.LightningModule) -> tuple[Lab, Sensitivities]:
    lab = Lab(module, Spectra(), "cpu")
    matrices = [m for m in find_matrices(module) if m.kind]
    return lab, sense(lab, {View(): matrices}, DataLoader(ids(10), batch_size=2))


@pytest.fixture
def both(monkeypatch):
    """The module, and what is known of it whole and in part."""
    module = model()
    lab, whole = sensed(module)
    for name, value in (("WHOLE_FLOPS", 0), ("PICKED", PICKED), ("LEADING", 0.1)):
        monkeypatch.setattr(wide_module, name, value)
    return module, whole, sensed(module)[1], lab


def test_heads_tell_what_the_whole_tells_as_far_as_they_reach(both):
    module, whole, part, lab = both
    assert sum(map(len, part.views.values())) >= PICKED
    assert part.heads
    largest = max(float(each.sum(1).abs().max()) for each in whole.views[View()].values())
    for matrix in find_matrices(module):
        if matrix.kind is None:
            continue
        for rho, reached in ((0, True), (0.05, True), (0.5, False)):
            cuts = LaserPlan.parse(f"{matrix.layer}.{matrix.kind}@{rho}").resolve(module)
            exact, found = (known.estimate(cuts, lab.spectra) for known in (whole, part))
            in_part = matrix.name in part.heads[View()]
            assert (found is None) == (in_part and not reached)
            if found is not None:
                near = {"rel": 1e-4, "abs": 1e-5 * largest} if rho == 0 or not in_part else {"abs": 0.05 * largest}
                assert found[0] == pytest.approx(exact[0], **near)


def test_they_are_the_same_from_a_journal(both):
    _, _, part, _ = both
    data, tensors = part.to_step()
    again = Sensitivities.from_step(json.loads(json.dumps(data)), tensors)
    (name, *_) = part.heads[View()]
    assert torch.equal(again.heads[View()][name], part.heads[View()][name])
    assert Sensitivities.join([part]).heads[View()].keys() == part.heads[View()].keys()


def test_strategies_propose_what_is_known(both):
    module, _, part, lab = both
    context = Context(module, lab.matrices, lab.targets("*.all"), RHOS, "", 0, lab.spectra, None, part)
    grid = list(Laser().propose(context))
    assert grid
    assert all(candidate.score is not None for candidate in grid)
    named = {matrix.name for c in Components().propose(context) for matrix, _ in context.resolve(c.plan)}
    assert named <= part.views[View()].keys()  # and not all matrices that write, as Spectral Surgery would have


def test_where_too_few_are_found_the_whole_is_factorised(both, monkeypatch):
    module, whole, _, _ = both
    monkeypatch.setattr(screen_module, "leading", lambda *_: None)
    _, found = sensed(module)
    assert not found.heads
    for name, each in whole.views[View()].items():
        assert torch.equal(found.views[View()][name], each)


def test_the_cheapest_are_whole_as_far_as_the_work_goes(monkeypatch):
    found = [m for m in find_matrices(model()) if m.kind]
    assert wide({View(): found}) == set()
    costs = sorted({flops(m.shape) for m in found})
    least = [m for m in found if flops(m.shape) == costs[0]]
    monkeypatch.setattr(wide_module, "WHOLE_FLOPS", len(least) * costs[0])
    assert {name for _, name in wide({View(): found})} == {m.name for m in found} - {m.name for m in least}
    assert wide({View(blocks=2): found, View(metric="inputs"): found}) == set()


# ---- factors of gradients --------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called, and whose weight is read by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.first.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu_() @ self.first.weight)


@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "a gradient inside of the step"])
def test_a_weight_that_does_more_than_its_layer(monkeypatch, penalty):
    """As where no layer gives its factors away."""

    class Penalised(Steps):
        def losses(self, batch):
            x = batch.clone().requires_grad_()
            found = self.model(x).square().sum(1)
            if penalty:
                (slope,) = torch.autograd.grad(found.sum(), x, create_graph=True)
                found = found + slope.square().sum(1)
            return found

    module = Penalised(Twice().double())
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    found = {}
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(screen_module, "is_plain", lambda layer: False)
        screen = screen_of([], Spectra())
        screen._wanted = {View(): [m for m in find_matrices(module) if m.shape[0] > 1]}
        run(screen, module, data, 3)
        found[plain] = screen.sensitivities.views[View()]
    assert found[True].keys() == found[False].keys()
    for name, each in found[True].items():
        assert torch.allclose(each, found[False][name], rtol=1e-9)
