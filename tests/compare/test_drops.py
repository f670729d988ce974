from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from families import make, run
from tiny import tiny_causal_lm
from torch import Tensor, nn
from weights import Snapshot

from laser_callback.passes.drops import Droppable, droppable, why_no_identity

X = torch.sin(torch.arange(2 * 3 * 8.0)).view(2, 3, 8)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Layer(nn.Module):
    """A layer of a kind: what it returns is ``give(what it was given, what its MLP makes of it)``."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any] = torch.add) -> None:
        super().__init__()
        self.mlp, self.give = Part(), give

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Any:
        return self.give(hidden_states, self.mlp(hidden_states))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module, keyword: bool = False) -> None:
        super().__init__()
        self.layers, self.keyword = nn.ModuleList(layers), keyword

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(mask=torch.zeros(1), hidden_states=x) if self.keyword else layer(x)
            while not isinstance(out, Tensor):
                out = next(iter(out.values())) if isinstance(out, dict) else out[0]
            x = out
        return x


def found(*layers: nn.Module, keyword: bool = False) -> Droppable:
    torch.manual_seed(0)
    model = Stack(*layers, keyword=keyword).eval()
    before = Snapshot(model)
    result = droppable(model, lambda: model(X))
    assert before.is_restored()
    return result


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return x.add_(y)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(
    "give",
    [
        torch.add,
        in_place,
        lambda x, y: (x + y,),
        lambda x, y: (x + y, None, (x, y)),
        lambda x, y: {"hidden_states": x + y, "scores": y},
        lambda x, y: hf.modeling_outputs.BaseModelOutput(last_hidden_state=x + y),
        lambda x, y: (x.double() + y).float(),
        lambda x, y: x.double() + y,
        lambda x, y: x.bfloat16() + y.bfloat16(),
        lambda x, y: (x + y).half().float(),  # it rounds, and does nothing else
    ],
)
def test_a_layer_that_adds_can_be_dropped_however_it_returns_the_sum(give, keyword):
    assert found(Layer(), Layer(give), keyword=keyword) == Droppable({"layers": [0, 1]}, {})


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda x, y: 0.5 * x + y, "it multiplies what it is given by 0.5"),
        (lambda x, y: y, "it multiplies what it is given by 0"),
        (lambda x, y: x + y + x.flip(-1), "with all that is known to write in it at zero it still changes"),
        (lambda x, y: x + y + 1e-6 * x.flip(-1), "with all that is known to write in it at zero it still changes"),
        (lambda x, y: x + y / y.norm(), "with its writes at zero it gives values that are not finite"),
        (lambda x, y: (x + y)[:, :2], r"it makes a tensor of shape (2, 2, 8) of one of shape (2, 3, 8)"),
    ],
)
def test_the_reason_says_what_a_layer_does_instead(give, reason):
    result = found(Layer(), Layer(give))
    assert result.layers == {"layers": [0]}
    assert list(result.reasons) == ["layers.1"]
    assert result.reasons["layers.1"].startswith(reason)


def test_a_norm_behind_the_sum_is_named():
    class Post(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.last_norm = nn.LayerNorm(8)

        def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.last_norm(hidden_states + self.mlp(hidden_states))

    reasons = found(Post(), Layer()).reasons
    assert reasons == {"layers.0": "a norm stands behind its sum: what it gives comes from `last_norm`"}


def test_a_part_of_no_known_kind_that_writes_is_named():
    class Mixed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            return hidden_states + self.mixer(hidden_states) + self.mlp(hidden_states)

    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.one(x))

    reasons = found(Layer(), Mixed()).reasons
    assert reasons["layers.1"].endswith("it still changes what it is given; what is of no known kind: `mixer`")
    reasons = found(Unknown(), Unknown()).reasons
    assert reasons["layers.0"] == "no matrix in it is known to write; what is of no known kind: `one`, `two`"


def test_a_layer_that_is_not_called_is_not_known():
    class Skips(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    model = Skips(Layer(), Layer())
    result = droppable(model, lambda: model(X))
    assert result == Droppable({"layers": [0]}, {"layers.1": "no call of it is seen in the pass"})


def test_a_layer_must_be_the_identity_each_time():
    class Once(Layer):
        calls = 0

        def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            self.calls += 1
            return hidden_states * (2 if self.calls == 2 else 1) + self.mlp(hidden_states)

    model = Stack(Once(), Layer())
    reasons = droppable(model, lambda: [model(X) for _ in range(3)]).reasons
    assert reasons == {"layers.0": "it multiplies what it is given by 2"}


def test_what_cannot_be_cut_says_so():
    model = tiny_causal_lm()
    down = model.model.layers[2].mlp.down_proj
    torch.nn.utils.parametrizations.weight_norm(down)
    result = droppable(model, lambda: model(torch.tensor([[3, 4, 5]])))
    assert result.layers == {"model.layers": [0, 1, 3]}
    assert "down_proj" in result.reasons["model.layers.2"]
    assert "cannot be cut" in result.reasons["model.layers.2"]


def test_a_pass_that_fails_leaves_the_weights():
    model = tiny_causal_lm()
    before = Snapshot(model)

    def fails() -> None:
        model(torch.tensor([[3, 4, 5]]))
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        droppable(model, fails)
    assert before.is_restored()


def test_the_step_of_a_module_serves_as_a_pass():
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_causal_lm()

        def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch, labels=batch).loss

    module = Module().eval()
    result = droppable(module, lambda: module.validation_step(torch.tensor([[3, 4, 5]]), 0))
    assert result == Droppable({"net.model.layers": [0, 1, 2, 3]}, {})


def test_layers_that_write_are_not_the_identity():
    """What the cut is for: without it no layer hands on what it is given."""
    model = make("llama")
    reasons = why_no_identity(model.model.layers, lambda: run("llama", model))
    assert all(reasons.values())


def test_each_stack_is_looked_at():
    model = make("t5", torch.bfloat16)
    assert droppable(model, lambda: run("t5", model)).layers == {"encoder.block": [0, 1], "decoder.block": [0, 1]}
